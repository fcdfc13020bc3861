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


def seconds(implementation: str, family: str, profile: str) -> tuple[dict[str, float], float]:
    """What the claims of each property of a family took, and what all others of it did."""
    stated = {recipe.name: recipe.claims for recipe in get(family).recipes}
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
    properties: defaultdict[str, float] = defaultdict(float)
    goldens = 0.0
    for claim in claims:
        if claim["check"] in stated[claim["case"]]:
            goldens += claim["seconds"]
        else:
            properties[claim["check"]] += claim["seconds"]
    return properties, goldens


@click.command(help=__doc__)
@click.argument("implementation")
@click.option("--family", "families", multiple=True)
@click.option("--runs", default=3, show_default=True)
@click.option("--profile", type=click.Choice(list(PROFILES)), default=DEFAULT_PROFILE, show_default=True)
@click.option("--by-check", is_flag=True, help="Print where the time goes.")
def main(implementation: str, families: tuple[str, ...], runs: int, profile: str, by_check: bool) -> None:
    taken: defaultdict[str, list[tuple[dict[str, float], float]]] = defaultdict(list)
    for _ in range(runs):
        for family in families or FAMILIES:
            taken[family].append(seconds(implementation, family, profile))
    print(f"{'family':<26} {'properties':>10} {'goldens':>10}   seconds, median of {runs}, profile {profile}")
    lines = [
        (statistics.median(sum(properties.values()) for properties, _ in found), family)
        for family, found in taken.items()
    ]
    for spent, family in sorted(lines, reverse=True):
        found = taken[family]
        print(f"{family:<26} {spent:10.2f} {statistics.median(goldens for _, goldens in found):10.2f}")
        if by_check:
            of_check = {check: statistics.median(run[check] for run, _ in found) for check in found[0][0]}
            for check, its_own in sorted(of_check.items(), key=lambda item: -item[1]):
                print(f"    {check:<32} {its_own:6.2f}")


if __name__ == "__main__":
    main()
