"""How often a property check blames an implementation that is right.

    python benchmarks/false_alarms.py reference hf --seeds 1000

Every claim of a property is put to the implementation with the examples of one seed after another, all in this process,
with the models kept loaded.  An example that passed is not put to the same claim again: those that come first for every
seed are run once, and so is a claim without examples.  An outcome other than `pass` and `unsupported` is an alarm; each
is printed with what repeats it.  With --first the seeds begin elsewhere, so that several processes can share the work.
"""

import argparse
import hashlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits leaves its core to other processes
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from conformance.cases import Case, Claim, Manifest
from conformance.families import FAMILIES, claims, get
from conformance.implementation import Candidate, Implementation, resolve
from conformance.judge import Judge, judge
from conformance.search import DEFAULT_PROFILE, PROFILES, Example, Settings
from conformance.suite import checks

# Checkpoints that a check makes of its case, kept for the next seed.
KEPT = 64
# After so many seeds it is said how far the run has come.
REPORTED = 50


class Keeping(Judge):
    """A judge that loads a checkpoint once, though every seed asks for it, and runs an example of a check once.

    check: the one that is judged.  has_examples: whether it has put one to the candidate.
    """

    check: str
    has_examples = False

    def search(
        self, strategy: Any, test: Callable[[Example], None], first: Sequence[Example] = (), cost: float = 1
    ) -> None:
        super().search(strategy, self._once(test), first, cost)

    def each(self, examples: Iterable[Example], test: Callable[[Example], None]) -> None:
        super().each(examples, self._once(test))

    def _once(self, test: Callable[[Example], None]) -> Callable[[Example], None]:
        self.has_examples = True
        passed: set[tuple[str, str]] = self.__dict__.setdefault("passed", set())

        def once(example: Example) -> None:
            if (key := (self.check, json.dumps(example, sort_keys=True))) not in passed:
                test(example)
                passed.add(key)

        return once

    def load_other(self, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Candidate:
        key = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, tensor in sorted(weights.items()):
            key.update(name.encode())
            key.update(str(tensor.dtype).encode())
            key.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        kept = self.__dict__.setdefault("kept", {})
        if (found := kept.get(key.digest())) is None:
            if len(kept) >= KEPT:
                kept.pop(next(iter(kept)))
            found = kept[key.digest()] = super().load_other(config, weights)
        return found  # type: ignore[no-any-return]


def property_claims(implementation: Implementation, families: list[str]) -> list[Claim]:
    """The claims of properties in the families that the implementation declares."""
    known = set(Manifest().cases)
    found = []
    for family in families or FAMILIES:
        if implementation.families is not None and family not in implementation.families:
            continue
        for recipe in get(family).recipes:
            stated = {check: dtypes for check, dtypes in claims(recipe).items() if check not in recipe.claims}
            if recipe.name in known:
                found += [Claim(recipe.name, check, dtype) for check, dtypes in stated.items() for dtype in dtypes]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("implementations", nargs="+")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--profile", choices=PROFILES, default=DEFAULT_PROFILE)
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--dtype", help="only claims in this dtype")
    parser.add_argument("--by-check", action="store_true", help="print where the time goes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    alarms = sum(count_alarms(resolve(name), asked) for name in asked.implementations)
    raise SystemExit(1 if alarms else 0)


def count_alarms(implementation: Implementation, asked: argparse.Namespace) -> int:
    """Put every claim to the implementation, seed after seed; returns how many alarms there were."""
    claimed, functions = property_claims(implementation, asked.family), checks()
    claimed = [claim for claim in claimed if asked.dtype in (None, claim.dtype)]
    judges: dict[tuple[str, str], Keeping] = {}
    outcomes: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    without_examples: set[Claim] = set()
    examples, started = 0, time.perf_counter()
    for seed in range(asked.first, asked.first + asked.seeds):
        for claim in claimed:
            if claim in without_examples:
                continue
            place = (claim.case, claim.dtype)
            if place not in judges:
                judges[place] = Keeping(implementation, Case(claim.case), claim.dtype, "cpu")
            judges[place].check, judges[place].has_examples = claim.check, False
            judges[place].settings = Settings(profile=asked.profile, seed=seed, seconds=float("inf"))
            result = judge(functions[claim.check], claim, lambda place=place: judges[place])  # type: ignore[misc]
            outcomes[result.outcome] += 1
            seconds[claim.check] += result.seconds
            examples += result.examples
            if result.outcome in ("pass", "unsupported"):
                without_examples |= set() if judges[place].has_examples else {claim}
            else:
                print(f"ALARM seed {seed}  {claim}  {result.message}\n      --example '{json.dumps(result.example)}'")
        if (seed + 1 - asked.first) % REPORTED == 0:
            print(f"… seed {seed}: {dict(outcomes)}", flush=True)
    took = time.perf_counter() - started
    if asked.by_check:
        for check, spent in sorted(seconds.items(), key=lambda item: -item[1]):
            print(f"{check:<32} {1000 * spent / asked.seeds:7.0f} ms a seed")
    alarms = sum(count for outcome, count in outcomes.items() if outcome not in ("pass", "unsupported"))
    print(
        f"{implementation.spec}: {alarms} alarms in {asked.seeds} seeds of the profile {asked.profile}: "
        f"{sum(outcomes.values())} verdicts ({dict(outcomes)}), {examples} examples, {took / asked.seeds:.2f} s a seed"
    )
    return alarms


if __name__ == "__main__":
    main()
