"""How long the properties of each family take in a run, on top of its goldens.

    python benchmarks/properties.py reference --runs 3
    python benchmarks/properties.py reference --family mixtral --by-check

Runs `conformance run IMPL --family F`, one process for the candidate, and adds up what its claims took; prints the
median of several runs, the families interleaved.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import click

from conformance.families import FAMILIES, get
from conformance.search import DEFAULT_PROFILE, PROFILES


def seconds(implementation: str, family: str, profile: str) -> dict[str, tuple[float, bool]]:
    """What each check of a family took, over all of its claims, and whether it is a property."""
    stated = {f"{family}/{recipe.name.split('/')[-1]}": recipe.claims for recipe in get(family).recipes}
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch, "run.json")
        done = subprocess.run(
            [sys.executable, "-m", "conformance", "run", implementation, "--family", family, "--profile", profile,
             "--save", str(saved)],
            capture_output=True, text=True,
        )  # fmt: skip
        if not saved.exists():
            raise SystemExit(done.stdout + done.stderr)
        claims = json.loads(saved.read_text())["claims"]
    spent: defaultdict[str, float] = defaultdict(float)
    kinds: dict[str, bool] = {}
    for claim in claims:
        kinds[claim["check"]] = claim["check"] not in stated[claim["case"]]
        spent[claim["check"]] += claim["seconds"]
    return {check: (spent[check], kinds[check]) for check in spent}


@click.command(help=__doc__)
@click.argument("implementation")
@click.option("--family", "families", multiple=True)
@click.option("--runs", default=3, show_default=True)
@click.option("--profile", type=click.Choice(list(PROFILES)), default=DEFAULT_PROFILE, show_default=True)
@click.option("--by-check", is_flag=True, help="Print where the time goes.")
def main(implementation: str, families: tuple[str, ...], runs: int, profile: str, by_check: bool) -> None:
    taken: defaultdict[str, list[dict[str, tuple[float, bool]]]] = defaultdict(list)
    for _ in range(runs):
        for family in families or FAMILIES:
            taken[family].append(seconds(implementation, family, profile))
    print(f"{'family':<26} {'properties':>10} {'goldens':>10}   seconds, median of {runs}, profile {profile}")
    for family, found in sorted(taken.items(), key=lambda item: -_median(item[1], True)):
        print(f"{family:<26} {_median(found, True):10.2f} {_median(found, False):10.2f}")
        if by_check:
            of_check = {
                c: statistics.median(run[c][0] for run in found) for c, (_, is_one) in found[0].items() if is_one
            }
            for check, spent in sorted(of_check.items(), key=lambda item: -item[1]):
                print(f"    {check:<32} {spent:6.2f}")


def _median(runs: list[dict[str, tuple[float, bool]]], properties: bool) -> float:
    return statistics.median(sum(spent for spent, is_one in run.values() if is_one == properties) for run in runs)


if __name__ == "__main__":
    main()
