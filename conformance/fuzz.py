"""Differential fuzzing: random valid configurations, weights and inputs, compared with `reference_impl` in float64.

An example is a configuration, a batch size, lengths, and a seed.  It becomes a self-contained case, which the worker
process judges like any other: a hang or a crash of the candidate ends with it.  A failure is shrunk by Hypothesis to
the smallest example that fails; its case is kept, and `conformance run IMPL --case DIR` replays it.

The reference itself is compared with the live oracle (Hugging Face, …), which needs transformers.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from conformance.cases import Case, Claim, forward_arguments
from conformance.configurations import DRAWN, between, configurations, lengths
from conformance.families import Config, Family, Recipe, get
from conformance.golden.model import draw_inputs, draw_weights, of_cut_sources
from conformance.implementation import BUILT_IN
from conformance.implementations import reference
from conformance.oracles import oracle_class, oracle_missing
from conformance.report.model import died
from conformance.suite.test_cache import DECODED
from conformance.worker import Died, Worker

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy
    from torch import Tensor

Example = dict[str, Any]
# Shrinking stops after so many seconds: what was found by then is reported.
SHRINK_SECONDS = 30.0
TIMEOUT = 60.0
OUTCOMES_OF_FAILURE = ("fail", "error", "timeout", "crash")


@dataclass
class Found:
    """What fuzzing a family came to.

    examples: how many configurations were tried up to the first failure.  passed: claims of them that passed.
    unsupported: reasons that the candidate gave for others, how often.
    failure: the result of the claim that fails, of the smallest example; None if none does.
    directory: where its case is kept.  config, size: its configuration, and the shape of its inputs in words.
    """

    family: str
    examples: int = 0
    passed: int = 0
    seconds: float = 0.0
    failure: dict[str, Any] | None = None
    directory: Path | None = None
    config: Config | None = None
    size: str = ""
    unsupported: dict[str, int] = field(default_factory=dict)


class Disagreement(AssertionError):
    """The candidate failed a claim of an example."""


class TimeIsUp(BaseException):
    """Ends a search.  Not an Exception, which Hypothesis would take for a failure and shrink."""


def examples(family: str) -> "SearchStrategy[Example]":
    """{"config", "batch", "seq", "seed"} and for encoder–decoder models "target"."""
    shape = {"batch": between(1, 4), "seq": lengths()}
    if get(family).encoder_decoder:
        shape["target"] = lengths()
    return st.fixed_dictionaries({"config": configurations(family), **shape, "seed": st.integers(0, 9999)})


# --- one example as a case ------------------------------------------------------------------------------------------


def recipe(family: str, example: Example) -> Recipe:
    """The example as the recipe of a case."""
    fed: int = example.get("target") or example["seq"]
    known = {check for made in get(family).recipes for check in made.claims}
    checks = ["golden.logits", "cache.one_by_one"]
    if get(family).whole_rows_only(example["config"], max(fed, example["seq"])):
        return _recipe(family, example, ["golden.logits"])
    if example["batch"] > 1:
        checks += ["golden.left_padding", "golden.right_padding"]
    if fed > DECODED:
        checks += ["cache.prefill_decode"] + (["cache.ragged"] if example["batch"] > 1 else [])
    if fed > 8:
        checks += ["cache.chunks"]
    return _recipe(family, example, [check for check in checks if check in known])


def _recipe(family: str, example: Example, checks: list[str]) -> Recipe:
    return Recipe(
        name=f"{family}/fuzz-{example['seed']}",
        summary="drawn by conformance fuzz",
        config=example["config"],
        weights=f"fuzz-{example['seed']}",
        batch=example["batch"],
        seq=example["seq"],
        target=example.get("target"),
        claims=dict.fromkeys(checks, ("float64",)),
    )


def write(family: Family, made: Recipe, directory: Path, oracle: bool) -> None:
    """Write a self-contained case whose expected values are the reference's, or the oracle's."""
    weights, inputs = draw_weights(family, made), draw_inputs(made)
    forward: Callable[..., Tensor] = (
        oracle_class(family)(family, made.config, weights).logits if oracle else reference.forward(made.config, weights)
    )
    expected = {"logits": forward(**forward_arguments(inputs))}
    if made.target is not None and made.batch > 1:
        expected["source_cut.logits"] = of_cut_sources(forward, inputs)
    provenance = {
        "recipe": made.name, "summary": made.summary, "field": None, "last_rows": None, "oracle_error": {},
        "movement": {}, "claims": {check: list(dtypes) for check, dtypes in made.claims.items()},
    }  # fmt: skip
    Case.write(directory, made.config, weights, inputs, expected, provenance)


# --- the search -----------------------------------------------------------------------------------------------------


class Fuzzer:
    """Judges examples of one family in a worker process.

    keep: directory below which the case of a failure is written.
    oracle: compare with the live oracle instead of `reference_impl`.
    """

    def __init__(self, worker: Worker, family: str, scratch: Path, keep: Path, *, oracle: bool = False):
        self.worker, self.family, self.scratch, self.keep, self.oracle = worker, get(family), scratch, keep, oracle
        self.found = Found(family)
        self.number = 0

    def judge(self, example: Example) -> None:
        """Raises: Disagreement if a claim of the example fails; the example's case is kept then."""
        self.number += 1
        made = recipe(self.family.name, example)
        directory = self.scratch / str(self.number) / made.name
        write(self.family, made, directory, self.oracle)
        for check in made.claims:
            result = self._judge(Claim(made.name, check, "float64"), directory)
            if self.found.failure is None:
                self._count(result)
            if result["outcome"] in OUTCOMES_OF_FAILURE:
                self._keep(directory, result, made)
                raise Disagreement(f"{check}: {result['outcome']}")
        shutil.rmtree(directory.parent.parent)

    def _count(self, result: dict[str, Any]) -> None:
        said = result["message"]
        if result["outcome"] == "unsupported":
            self.found.unsupported[said] = self.found.unsupported.get(said, 0) + 1
        self.found.passed += result["outcome"] == "pass"

    def _judge(self, claim: Claim, directory: Path, diagnose: bool = False) -> dict[str, Any]:
        answer = self.worker.request(
            TIMEOUT, op="judge", case=claim.case, check=claim.check, dtype=claim.dtype, directory=str(directory),
            diagnose=diagnose,
        )  # fmt: skip
        if isinstance(answer, Died):
            return died(claim, answer, TIMEOUT)
        if "fixture" in answer:  # nothing that the candidate could have done
            raise RuntimeError(f"the drawn case cannot be judged: {answer['fixture']}")
        return answer

    def _keep(self, directory: Path, result: dict[str, Any], made: Recipe) -> None:
        target = self.keep / made.name
        if self.found.directory is not None:
            shutil.rmtree(self.found.directory, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(directory, target)
        self.found.failure, self.found.directory, self.found.config = result, target, made.config
        self.found.failure["directory"] = str(target)
        decoded = "" if made.target is None else f", {made.target} decoded"
        self.found.size = f"batch {made.batch}, sequence {made.seq}{decoded}"

    def search(self, *, seconds: float, most: int, seed: int) -> Found:
        """Try examples until one fails, the time is up, or there were `most` of them.

        seconds: for finding a failure; shrinking it has its own limit.
        """
        started = time.perf_counter()
        shrinking_from: float | None = None

        @seeded(seed)
        @settings(
            max_examples=most, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=False,
            phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False, print_blob=False,
        )  # fmt: skip
        @given(examples(self.family.name))
        def try_example(example: Example) -> None:
            nonlocal shrinking_from
            now = time.perf_counter()
            if now > (started + seconds if shrinking_from is None else shrinking_from + SHRINK_SECONDS):
                raise TimeIsUp
            if shrinking_from is None:
                self.found.examples += 1
            try:
                self.judge(example)
            except Disagreement:
                shrinking_from = shrinking_from or now
                raise

        with contextlib.suppress(Disagreement, Flaky, TimeIsUp):  # what it came to is in `found`
            try_example()
        self._diagnose()
        self.found.seconds = time.perf_counter() - started
        return self.found

    def _diagnose(self) -> None:
        """Name the mistake of the smallest failure; while examples shrink there is no time for it."""
        failure, directory = self.found.failure, self.found.directory
        if failure is None or directory is None or failure["outcome"] != "fail":
            return
        again = self._judge(Claim(failure["case"], failure["check"], failure["dtype"]), directory, diagnose=True)
        failure["diagnosis"] = again["diagnosis"]


def fuzz(
    implementation: str,
    families: Iterable[str] = (),
    *,
    keep: Path,
    seconds: float = 30.0,
    most: int = 10_000,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[Found], None] = lambda _: None,
) -> list[Found]:
    """Fuzz an implementation, family by family (all that it declares, or those named), each for so many seconds.

    The reference is compared with the live oracle, and unless they are named not in families whose oracle another
    release of transformers has.
    Raises: ValueError if the implementation cannot be had, or a family cannot be fuzzed or is not declared.
    """
    worker = Worker(implementation, device)
    oracle = implementation in BUILT_IN and implementation.startswith("reference")
    if oracle and (
        missing := {family: why for family in families if family in DRAWN and (why := oracle_missing(family))}
    ):
        raise ValueError("; ".join(f"the oracle of {family} {why}" for family, why in missing.items()))
    results = []
    try:
        for family in _families(worker, list(families)):
            if oracle and oracle_missing(family):
                continue
            with tempfile.TemporaryDirectory(prefix="conformance-fuzz-") as scratch:
                fuzzer = Fuzzer(worker, family, Path(scratch), keep, oracle=oracle)
                results.append(fuzzer.search(seconds=seconds, most=most, seed=seed))
            progress(results[-1])
    finally:
        worker.close()
    return results


def _families(worker: Worker, wanted: list[str]) -> list[str]:
    """The families to fuzz: those wanted, or all that the implementation declares and configurations are drawn for."""
    answer = worker.request(TIMEOUT, op="describe")
    if isinstance(answer, Died):
        raise ValueError(f"the implementation did not survive its import: {answer.how}\n{answer.output}".strip())
    if "cannot" in answer:
        raise ValueError(answer["cannot"])
    declared, name = answer["implementation"]["families"], answer["implementation"]["name"]
    if declared is None and not wanted:
        raise ValueError(f"{name} is a bare function and declares no family; say which: --family {' | '.join(DRAWN)}")
    if unknown := sorted(set(wanted) - DRAWN.keys()):
        raise ValueError(f"family {', '.join(unknown)} is not fuzzed; there is {', '.join(DRAWN)}")
    if declared is not None and (missing := sorted(set(wanted) - set(declared))):
        raise ValueError(f"{name} does not declare family {', '.join(missing)}; it declares {', '.join(declared)}")
    chosen = [family for family in DRAWN if family in (wanted or declared)]
    if not chosen:
        raise ValueError(f"{name} declares no family that is fuzzed; there is {', '.join(DRAWN)}")
    return chosen
