"""Searching for an input that breaks a property, with Hypothesis, beside the candidate.

A property check draws examples and puts each to the candidate.  An example is a small dict that JSON can hold (seeds
stand for token ids, see `conformance.strategies`), so that a failure can be repeated:

    conformance run IMPL --case llama/plain --check causality.prefix --dtype float64 --example '{"ids": 0, …}'

What is drawn follows from the seed and the version of Hypothesis.  A failing example is made smaller in a bounded
number of runs.  Before each example is run it is written to a journal outside this process, so that one that kills it
is known; see `conformance.replay`.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.cases import FixtureError
from conformance.implementation import CandidateRaised, Misbehaviour, Unsupported
from conformance.strategies import in_order

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from conformance.judge import Judge

Example = dict[str, Any]
Property = Callable[[Example], None]

# Examples drawn for a claim, beside those that every run puts first.
PROFILES = {"quick": 2, "ci": 25, "thorough": 200}
DEFAULT_PROFILE = "quick"
DEFAULT_SEED = 0
# How long a failing example is made smaller: runs of the property, and seconds.
SHRINK_RUNS, SHRINK_SECONDS = 60, 10.0
# Examples offered to `replay` as possibly smaller ones.
LISTED = 200
JOURNAL = "example.json"


@dataclass(frozen=True)
class Settings:
    """How to search.

    profile, seed: how many examples are drawn, and which.
    example: this one alone.
    listing: run nothing, but raise Listed with examples that could be drawn.
    seconds: no further example is begun after so long.
    diagnose: simulate known mistakes on a failure, which takes seconds.  localise: look for the first wrong tensor.
    """

    profile: str = DEFAULT_PROFILE
    seed: int = DEFAULT_SEED
    example: Example | None = None
    listing: bool = False
    seconds: float = 20.0
    diagnose: bool = True
    localise: bool = True


class NotAnExample(ValueError):
    """What was to be replayed is not an example of the check."""


class Listed(BaseException):
    """Carries examples that the check could draw, in the place of a verdict."""

    def __init__(self, examples: list[Example]):
        super().__init__(f"{len(examples)} examples")
        self.examples = examples


class _Falsified(Exception):
    """What Hypothesis sees of a failure, whatever it was: one kind, raised in one place."""


class _Stop(BaseException):
    """Ends Hypothesis's search at once."""


def search(
    judge: "Judge", strategy: "SearchStrategy[Example]", test: Property, first: Sequence[Example] = (), cost: float = 1
) -> None:
    """Put examples to a property: those of `first`, then drawn ones.

    cost: of an example, where an ordinary one calls a whole model a few times; of dearer ones fewer are drawn than the
        profile says, of cheaper ones more.
    test: raises what a check raises (`Failure`, `Misbehaviour`, …) if the example breaks the property.
    Raises: what the property raised for the smallest example found, which is left in `judge.example`.
    """
    settings = judge.settings
    if settings.listing:
        raise Listed([*first, *_drawn(strategy, LISTED, settings.seed)])
    if settings.example is not None:
        known = [*first, *_drawn(strategy, 1, settings.seed)]
        _replay(judge, settings.example, test, [set(example) for example in known])
        return
    runner = _Runner(judge, test)
    for example in first:
        if (raised := runner.run(example)) is not None:
            judge.example = example
            raise raised
    _hypothesis(runner, strategy, max(1, int(PROFILES[settings.profile] / cost)))
    if runner.smallest is not None:
        judge.example, raised = runner.smallest
        raise raised


def each(judge: "Judge", examples: Iterable[Example], test: Property) -> None:
    """Put every one of these examples to a property; the further ones that fail are named in the first one's details.

    Raises: what the property raised for the first example that breaks it, which is left in `judge.example`; Unsupported
        if there is none to put.
    """
    examples, settings = list(examples), judge.settings
    if not examples:
        raise Unsupported("the checkpoint has nothing that this could be tried with")
    if settings.listing:
        raise Listed(examples)
    if settings.example is not None:
        _replay(judge, settings.example, test, [set(example) for example in examples])
        return
    runner = _Runner(judge, test)
    failed = [(example, raised) for example in examples if (raised := runner.run(example)) is not None]
    if not failed:
        return
    judge.example, raised = failed[0]
    others = [str(error) for _, error in failed[1:] if str(error) != str(raised)]
    judge.also = [f"also: {text}" for text in dict.fromkeys(others)]
    raise raised


def _replay(judge: "Judge", example: Example, test: Property, known_keys: list[set[str]]) -> None:
    if set(example) not in known_keys:
        raise NotAnExample(
            f"an example of this check has {', '.join(sorted(known_keys[0]))}; got {json.dumps(example)}"
        )
    judge.example = example
    journal(example)
    judge.examples += 1
    try:
        test(example)
    except (Misbehaviour, CandidateRaised, Unsupported, FixtureError):
        raise
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise NotAnExample(f"{json.dumps(example)} cannot be put to this check: {error}") from error
    judge.example = None


class _Runner:
    """Runs a property on examples, each once; knows the smallest failure and when to give up making it smaller."""

    def __init__(self, judge: "Judge", test: Property):
        self.judge, self.test = judge, test
        self.started = time.monotonic()
        self.known: dict[str, Exception | None] = {}
        self.smallest: tuple[Example, Exception] | None = None
        self.failed_at = 0.0
        self.runs_since = 0

    def run(self, example: Example) -> Exception | None:
        """What the property raises for the example, None if it holds or there is no time left to ask.

        Raises: Unsupported and FixtureError at once.
        """
        key = json.dumps(example, sort_keys=True)
        if key in self.known:
            return self.known[key]
        now = time.monotonic()
        if self.smallest is None:
            if now - self.started > self.judge.settings.seconds:
                self.judge.out_of_time = True
                return None
        else:
            self.runs_since += 1
            if self.runs_since > SHRINK_RUNS or now - self.failed_at > SHRINK_SECONDS:
                return None
        self.known[key] = raised = self._put(example)
        if raised is not None:
            if self.smallest is None:
                self.failed_at = time.monotonic()
            self.smallest = (example, raised)
        return raised

    def _put(self, example: Example) -> Exception | None:
        journal(example)
        self.judge.examples += 1
        try:
            self.test(example)
        except (Unsupported, FixtureError):
            raise
        except Exception as error:
            return error
        return None


def _hypothesis(runner: _Runner, strategy: "SearchStrategy[Example]", count: int) -> None:
    """Draw examples until one fails, then make it smaller; what was found is in the runner.

    Hypothesis ends with the smallest example that it knows, so that the last one that failed is that one.
    """
    stopped: list[Exception] = []

    def put(example: Example) -> None:
        try:
            raised = runner.run(example)
        except Exception as error:
            stopped.append(error)
            raise _Stop from None
        if raised is not None:
            runner.smallest = (example, raised)
            raise _Falsified

    try:
        _given(strategy, put, count, runner.judge.settings.seed)
    except _Falsified:
        pass
    except _Stop:
        raise stopped[0] from None


def _drawn(strategy: "SearchStrategy[Example]", count: int, seed: int) -> list[Example]:
    """Examples that the strategy draws."""
    found: list[Example] = []
    _given(strategy, found.append, count, seed)
    return found


def _given(strategy: "SearchStrategy[Example]", put: Callable[[Example], None], count: int, seed: int) -> None:
    import hypothesis

    settings = hypothesis.settings(
        backend=_backend(),
        max_examples=count, deadline=None, database=None, derandomize=False, report_multiple_bugs=False,
        print_blob=False, verbosity=hypothesis.Verbosity.quiet, suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )  # fmt: skip

    # A function of one signature, whatever `put` is
    def one(example: Example) -> None:
        put(in_order(example))

    settings(hypothesis.seed(seed)(hypothesis.given(strategy)(one)))()


@functools.cache
def _backend() -> str:
    """Hypothesis's own backend, but for the constants that it reads out of whatever code is loaded.

    With them the same seed would draw other examples where another module has been imported before.
    """
    from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider

    class SeedAlone(HypothesisProvider):
        def _maybe_draw_constant(self, *_: Any, **__: Any) -> None:
            return None

    AVAILABLE_PROVIDERS["conformance"] = SeedAlone
    return "conformance"


# --- journal --------------------------------------------------------------------------------------------------------


def journal_file(scratch: str | None) -> Path | None:
    """Where the example at hand is written, in a directory that outlives this process; None where there is none."""
    return Path(scratch) / JOURNAL if scratch else None


def journal(example: Example | None) -> None:
    """Write down the example that is about to be run; None when there is none any more."""
    path = journal_file(os.environ.get("CONFORMANCE_SCRATCH"))
    if path is None:
        return
    if example is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(json.dumps(example), encoding="utf-8")


def journalled(scratch: str | None) -> Example | None:
    """The example that was run last, as the journal has it."""
    path = journal_file(scratch)
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None
