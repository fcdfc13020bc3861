"""How long a verdict takes.

    PYTHONPATH=tests python benchmarks/verdict.py --runs 5

1. Wall time of `conformance run reference --family llama`, imports included, and claims a second; median of several
   runs, interleaved with the start-up alone (one claim), so that both see the same noise.
2. What judging costs in forwards of the candidate: the seconds of a passing `golden.logits` claim in float64, and of a
   failing one with its localisation, divided by the seconds of one forward of the same model under the same mode.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click


def command(*arguments: str) -> tuple[float, dict]:
    """Seconds of one `conformance run reference …` as a whole process, and the run that it saved."""
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch, "run.json")
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "conformance", "run", "reference", "--save", str(saved), *arguments],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return time.perf_counter() - started, json.loads(saved.read_text())


def forwards(repeats: int) -> dict[str, float]:
    """Cost of a passing and of a failing claim, in forwards of the candidate; median of interleaved measurements."""
    import torch

    from candidates import LAYOUTS
    from conformance.cases import Case, Claim
    from conformance.implementation import adopt
    from conformance.judge import Judge, judge
    from conformance.suite import checks

    torch.set_num_threads(1)
    case, claim = Case("llama/distinct"), Claim("llama/distinct", "golden.logits", "float64")
    right = Judge(adopt("", LAYOUTS["batch_first"]()), case, "float64", "cpu")
    wrong = Judge(adopt("", LAYOUTS["batch_first"](mistake="scale_missing")), case, "float64", "cpu")
    ratios: dict[str, list[float]] = {"passing": [], "failing": []}
    for _ in range(repeats):
        started = time.perf_counter()
        right.logits(case.inputs["input_ids"])
        forward = time.perf_counter() - started
        for what, session in (("passing", right), ("failing", wrong)):
            ratios[what].append(judge(checks()["golden.logits"], claim, lambda s=session: s).seconds / forward)
    return {what: statistics.median(values) for what, values in ratios.items()}


@click.command()
@click.option("--runs", default=5, show_default=True)
def main(runs: int) -> None:
    whole, startup, claims = [], [], 0
    for _ in range(runs):
        seconds, run = command("--family", "llama")
        whole.append(seconds)
        claims = run["counts"]["executed"]
        startup.append(command("--case", "llama/plain", "--check", "golden.logits", "--dtype", "float64")[0])
    print(f"whole verdict: {statistics.median(whole):.2f} s ({min(whole):.2f}–{max(whole):.2f}), {claims} claims")
    print(f"start-up and one claim: {statistics.median(startup):.2f} s ({min(startup):.2f}–{max(startup):.2f})")
    print(f"claims a second, start-up included: {claims / statistics.median(whole):.0f}")
    for what, ratio in forwards(200).items():
        print(f"a {what} claim costs {ratio:.1f} forwards of the candidate")


if __name__ == "__main__":
    main()
