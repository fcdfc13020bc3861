"""Judging one claim: the object that a check receives, and what a claim can come to.

Everything here runs in the worker process, beside the candidate.
"""

import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conformance import bounds, search
from conformance.cases import Case, Claim, FixtureError
from conformance.component import ComponentCandidate
from conformance.families import Component, Tokenizer, get
from conformance.implementation import (
    Candidate,
    CandidateRaised,
    Implementation,
    Misbehaviour,
    Unsupported,
    load,
    load_checkpoint,
    precision,
)
from conformance.report.model import FORWARD
from conformance.search import Example, NotAnExample, Settings
from conformance.strategies import describe
from conformance.tokenizer import TokenizerCandidate

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

# Where the frames lie that a candidate's traceback can do without.
_NOT_THE_CANDIDATE = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))


@dataclass
class Result:
    """What one claim came to, as it travels to the report (`to_json` is the published schema's claim).

    message: one line; empty for a pass.
    kind: for a failure, "value", "shape", "dtype", "type" or "not finite"; for an error, the exception's name.
    judgement: the comparison that decided (the worst one of the check).
    details: further lines for a person (where the values are wrong, the candidate's traceback).
    divergence: first wrong probe and last good ones, when the fault was localised.
    equals: the counterfactual that the candidate's values reproduce ("rope_theta ignored"), when one does.
    diagnosis: the mistake that reproduces the candidate's values, or what is known of an unknown one (`diagnosis`).
    notes: harmless internal differences.
    example: the smallest example found that breaks the property.  examples: how many were run.
    """

    claim: Claim
    outcome: str
    message: str = ""
    kind: str = ""
    judgement: bounds.Judgement | None = None
    details: list[str] = field(default_factory=list)
    divergence: dict[str, Any] | None = None
    equals: str | None = None
    diagnosis: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    calls: int = 0
    example: Example | None = None
    examples: int = 0

    def to_json(self) -> dict[str, Any]:
        judgement = self.judgement.to_json() if self.judgement else {"error": None, "bound": None, "ratio": None}
        return {
            "case": self.claim.case,
            "check": self.claim.check,
            "dtype": self.claim.dtype,
            "outcome": self.outcome,
            "message": self.message,
            "kind": self.kind,
            **judgement,
            "details": self.details,
            "divergence": self.divergence,
            "equals": self.equals,
            "diagnosis": self.diagnosis,
            "notes": self.notes,
            "seconds": round(self.seconds, 6),
            "calls": self.calls,
            "example": self.example,
            "examples": self.examples,
        }


class Failure(Exception):
    """The candidate's values are wrong.

    judgement: None for ids and text, which are right or wrong.
    details: where.  equals: label of the known wrong answer that the values reproduce, if one does.
    """

    def __init__(self, message: str, judgement: bounds.Judgement | None, details: list[str], equals: str | None):
        super().__init__(message)
        self.judgement, self.details, self.equals = judgement, details, equals


@dataclass(frozen=True, slots=True)
class Compared:
    """One comparison of a check: the candidate's values and the truth of the rows that count, float64 on the CPU.

    noise: the expected tensor whose oracle error measures the working tier.
    scale: see `bounds.measure`.  real: (batch, seq) mask of the rows that count, where some do not.
    """

    what: str
    got: Tensor
    truth: Tensor
    noise: str = "logits"
    scale: bounds.Error | None = None
    real: Tensor | None = None

    def kept(self, values: Tensor) -> Tensor:
        return values if self.real is None else values[self.real]

    def judged(self, case: Case, dtype: str, got: Tensor, truth: Tensor) -> bounds.Judgement:
        """What the difference of two such values (real rows alone) comes to in a dtype."""
        stored = case.oracle_error(self.noise, dtype)
        oracle = bounds.Error(**stored) if stored else None
        return bounds.within(bounds.measure(got, truth, self.scale), dtype, oracle)


@dataclass(frozen=True, slots=True)
class Answers:
    """What a check asked of a tokenizer: what it was given (texts, or rows of ids), what came, what is right."""

    given: Sequence[Any]
    got: Sequence[Any]
    wanted: Sequence[Any]

    def wrong(self) -> list[int]:
        """Which of them are."""
        return [n for n, (got, wanted) in enumerate(zip(self.got, self.wanted, strict=True)) if got != wanted]


class Judge:
    """What a check works with: the case, the loaded candidate, and comparison against the truth.

    candidate: the loaded model (`implementation.Candidate`), component (`component.ComponentCandidate`) or tokenizer
        (`tokenizer.TokenizerCandidate`).
    forward: the plainest check of its kind; when that fails, others do.
    worst: the largest error that the check at hand has met.
    plan: sizes of the calls that it fed a session, when that can be replayed for localisation.
    compared: every comparison of the check at hand.  answers: what it asked of a tokenizer.
    forward_is_right: what `golden.logits` came to in this dtype, once it has been judged.
    settings: how properties are searched, and whether failures are diagnosed.
    example: the one that broke the property at hand; examples: how many were run; also: what else was broken;
        out_of_time: whether the search was cut short.
    """

    settings = Settings()

    def __init__(self, implementation: Implementation, case: Case, dtype: str, device: str):
        self.implementation, self.case, self.dtype, self.device = implementation, case, dtype, device
        case.read()
        family = get(case.family)
        of_model, of_component, of_tokenizer = FORWARD
        self.candidate: Any
        if isinstance(family, Component):
            self.forward, self.candidate = of_component, ComponentCandidate(implementation, family, case, dtype, device)
        elif isinstance(family, Tokenizer):
            self.forward, self.candidate = of_tokenizer, TokenizerCandidate(implementation, case)
        else:
            self.forward, self.candidate = of_model, load(implementation, case, dtype, device)
        self.forward_is_right: bool | None = None
        self.begin()

    @property
    def is_component(self) -> bool:
        return isinstance(self.candidate, ComponentCandidate)

    def begin(self) -> None:
        """Forget the previous check."""
        self.worst: bounds.Judgement | None = None
        self.plan: list[int] = []
        self.compared: list[Compared] = []
        self.answers: Answers | None = None
        self.candidate.calls = 0
        self.example: Example | None = None
        self.examples, self.also, self.out_of_time = 0, list[str](), False

    def precision(self, gradients: bool = False) -> AbstractContextManager[None]:
        """Where the candidate's code runs; see `implementation.precision`."""
        return precision(self.dtype, gradients)

    def logits(self, **arguments: Tensor) -> Tensor:
        """The candidate's logits of one call."""
        with self.precision():
            return self.candidate(**arguments).logits  # type: ignore[no-any-return]

    def load_other(self, config: dict[str, Any], weights: dict[str, Tensor]) -> Candidate:
        """The same implementation with another checkpoint."""
        return load_checkpoint(self.implementation, config, weights, self.dtype, self.device)

    def search(
        self,
        strategy: "SearchStrategy[Example]",
        test: Callable[[Example], None],
        first: Sequence[Example] = (),
        cost: float = 1,
    ) -> None:
        """Put drawn examples to a property; see `search.search`."""
        search.search(self, strategy, test, first, cost)

    def each(self, examples: Iterable[Example], test: Callable[[Example], None]) -> None:
        """Put all of these examples to a property; see `search.each`."""
        search.each(self, examples, test)

    def same(self, got: Tensor, other: Tensor, what: str, *, real: Tensor | None = None) -> None:
        """Compare two of the candidate's own runs that must agree.

        In a working dtype each is allowed five times the oracle's largest error in this case, and so their difference
        twice that.  The RMS, an average over the rows of the case, says nothing of a few rows: one alone may be off by
        several times as much.
        what: the values and what they must agree with, for the message: "logits of row 1 alone differ from …".
        Raises: Misbehaviour for NaN or infinity, Failure beyond the bound.
        """
        got, other = (value.detach().to(device="cpu", dtype=torch.float64) for value in (got, other))
        if got.shape != other.shape:
            raise Misbehaviour("shape", f"{what}: shapes {tuple(got.shape)} and {tuple(other.shape)}")
        kept, kept_other = (got, other) if real is None else (got[real], other[real])
        if not (kept.isfinite().all() and kept_other.isfinite().all()):
            raise Misbehaviour("not finite", f"{what}: there are NaN or infinite values")
        judgement = self._between(kept, kept_other)
        self._keep_worst(judgement)
        if not judgement.passed:
            raise Failure(what, judgement, _where(got, other, real, judgement), None)

    def moved(self, got: Tensor, other: Tensor) -> bool:
        """Whether two of the candidate's own runs differ by more than two equal ones may."""
        got, other = (value.detach().to(device="cpu", dtype=torch.float64) for value in (got, other))
        return not self._between(got, other).passed

    def _between(self, got: Tensor, other: Tensor) -> bounds.Judgement:
        stored = self.case.oracle_error("logits", self.dtype)
        if stored is None:
            return bounds.within(bounds.measure(got, other), self.dtype)
        # The noise is known relative to the case's logits: rows whose own are small do not have less of it.
        size = max(bounds.magnitude(values).max for values in (other, self.case.expected["logits"]))
        noise = 2 * stored["max"]
        # The limit by RMS is put where that by maximum is: it then decides nothing.
        oracle = bounds.Error(noise, noise * bounds.MAX_RATIO / bounds.RMS_RATIO)
        return bounds.within(bounds.measure(got, other, bounds.Error(size, size)), self.dtype, oracle)

    def compare(
        self,
        got: Tensor,
        truth: Tensor,
        *,
        real: Tensor | None = None,
        noise: str = "logits",
        what: str = "logits",
        scale: bounds.Error | None = None,
        known_mistakes: dict[str, Tensor] | None = None,
    ) -> None:
        """Compare with the float64 truth, element by element.

        real: (batch, seq) mask of the rows to compare; pads are left out.
        noise: the expected tensor whose oracle error measures the working tier.
        what: the values compared, for messages.  scale: see `bounds.measure`.
        known_mistakes: label -> the values that a certain mistake gives; a failure that equals one is named after it.
        Raises: Misbehaviour for NaN or infinity in a real row, Failure beyond the bound.
        """
        got = got.detach().to(device="cpu", dtype=torch.float64)
        if got.shape != truth.shape:
            raise Misbehaviour("shape", f"{what} of shape {tuple(got.shape)}, wanted {tuple(truth.shape)}")
        compared = Compared(what, got, truth, noise, scale, real)
        self.compared.append(compared)
        kept_got, kept_truth = compared.kept(got), compared.kept(truth)
        if not kept_got.isfinite().all():
            wrong = ~got.isfinite()
            if real is not None:
                wrong[~real] = False
            raise Misbehaviour("not finite", f"{int(wrong.sum())} of {kept_got.numel()} {what} are NaN or infinite, "
                               f"the first at {tuple(wrong.nonzero()[0].tolist())}")  # fmt: skip
        judgement = compared.judged(self.case, self.dtype, kept_got, kept_truth)
        self._keep_worst(judgement)
        if not judgement.passed:
            equals = next(
                (
                    label
                    for label, wrong in (known_mistakes or {}).items()
                    if compared.judged(self.case, self.dtype, kept_got, compared.kept(wrong)).passed
                ),
                None,
            )
            raise Failure(f"{what} differ from the oracle's", judgement, _where(got, truth, real, judgement), equals)

    def _keep_worst(self, judgement: bounds.Judgement) -> None:
        if self.worst is None or judgement.error.max > self.worst.error.max:
            self.worst = judgement

    def identical(self, got: Tensor, wanted: Tensor, what: str) -> None:
        """Compare two of the candidate's own answers, bit for bit.

        Raises: Misbehaviour if they differ in shape or dtype, Failure if they differ in a bit.
        """
        if (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
            raise Misbehaviour("shape", f"{what} are {tuple(got.shape)} in {got.dtype}, "
                               f"wanted {tuple(wanted.shape)} in {wanted.dtype}")  # fmt: skip
        mine, other = (values.detach().to(device="cpu", dtype=torch.float64) for values in (got, wanted))
        self.compared.append(Compared(what, mine, other))
        judgement = bounds.identical(got, wanted)
        self._keep_worst(judgement)
        if not judgement.passed:
            raise Failure(f"{what} differ from one process's", judgement, [], None)


def judge(check: Callable[[Judge], None], claim: Claim, prepare: Callable[[], Judge]) -> Result:
    """Run one check and turn whatever happens into a result.  Only BaseExceptions that are not errors pass through."""
    started = time.perf_counter()
    session: Judge | None = None
    try:
        session = prepare()
        session.begin()
        check(session)
        result = Result(claim, "pass", judgement=session.worst)
    except Unsupported as declared:
        result = Result(claim, "unsupported", str(declared) or "declared by the implementation")
    except Failure as failure:
        result = Result(claim, "fail", str(failure), "value", failure.judgement, failure.details, equals=failure.equals)
        if session is not None:
            _explain(session, result)
            _diagnose(check, session, result)
    except Misbehaviour as misbehaviour:
        result = Result(claim, "fail", str(misbehaviour), misbehaviour.kind)
        if session is not None and misbehaviour.kind == "not finite":
            _diagnose(check, session, result)
    except CandidateRaised as raised:
        result = _raised(claim, raised)
    except FixtureError:
        raise
    except NotAnExample as error:
        result = Result(claim, "error", str(error), "example")
    except Exception as error:
        result = Result(claim, "error", f"the suite itself raised {type(error).__name__}: {error}; please report it",
                        "suite", details=traceback.format_exc().splitlines())  # fmt: skip
    result.seconds = time.perf_counter() - started
    if session is not None:
        result.calls = session.candidate.calls
        _name_example(session, result)
        if claim.check in FORWARD:
            session.forward_is_right = result.outcome == "pass"
    return result


def _name_example(session: Judge, result: Result) -> None:
    """Say which example broke the property, and how many were run."""
    result.examples = session.examples
    if session.out_of_time:
        result.notes.append(f"the search ended after {session.examples} examples: there was no time for more")
    if session.example is not None and result.outcome in ("fail", "error") and result.kind != "example":
        result.example = session.example
        result.message += f"   [{describe(session.example)}]"
        result.details += session.also


def _explain(session: Judge, result: Result) -> None:
    """Say where the first wrong tensor is.  Never changes the verdict."""
    from conformance.localise import localise

    forward = session.forward
    if result.claim.check != forward and session.forward_is_right is False:
        result.notes.append(f"{forward} fails as well; see there first")
    elif forward != FORWARD[0] or session.example is not None:
        # There is nothing inside a component or tokenizer to look at, and no probes for drawn inputs
        return
    elif (result.claim.check == forward or session.plan) and session.settings.localise:
        try:
            result.divergence, result.notes = localise(session)
        except Exception as error:
            result.notes.append(f"not localised: {type(error).__name__}: {error}")
    elif session.forward_is_right and result.claim.check != "golden.blocks":
        group, _, what = result.claim.check.partition(".")
        what = "packing" if group == "packed" else what
        result.notes.append(f"{forward} passes: the same rows are right without {what}")


def _diagnose(check: Callable[[Judge], None], session: Judge, result: Result) -> None:
    """Name the mistake.  Never changes the verdict.

    A failure that a counterfactual of the golden reproduces has its name already; what follows from a wrong forward is
    not diagnosed again (what a tokenizer decodes does not follow from what it encodes).
    """
    if result.equals or not session.settings.diagnose:
        return
    follows = result.claim.check != session.forward and session.forward_is_right is False
    try:
        if session.answers is not None:
            from conformance.text_diagnosis import diagnose
        elif session.compared and not follows:
            from conformance.diagnosis import diagnose
        else:
            return
        result.diagnosis, notes = diagnose(check, session, result)
        result.notes += notes
    except Exception as error:
        result.notes.append(f"not diagnosed: {type(error).__name__}: {error}")


def _raised(claim: Claim, raised: CandidateRaised) -> Result:
    """An error of the candidate: its exception, and the innermost lines of its own traceback."""
    cause = raised.__cause__
    assert cause is not None
    kind = type(cause).__name__
    first_line = (str(cause).splitlines() or [""])[0]
    out_of_memory = isinstance(cause, MemoryError) or "can't allocate memory" in str(cause) or "OutOfMemory" in kind
    what = f"{kind}: {first_line}".rstrip(": ")
    message = f"{raised.where} ran out of memory ({what})" if out_of_memory else f"{raised.where} raised {what}"
    frames = traceback.extract_tb(cause.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_NOT_THE_CANDIDATE)] or list(frames)
    details = [f"{f.filename}:{f.lineno} in {f.name}: {f.line}" for f in own[-3:]]
    return Result(claim, "error", message, "out of memory" if out_of_memory else kind, details=details)


def _where(got: Tensor, truth: Tensor, real: Tensor | None, judgement: bounds.Judgement) -> list[str]:
    """Which batch rows and positions are wrong, for (batch, seq, …) tensors."""
    if got.ndim < 3 or got.shape != truth.shape:
        return []
    scale = truth.abs().max()
    row_error = (got - truth).abs().amax(-1) / scale  # (batch, seq)
    wrong = row_error > judgement.bound.max
    if real is not None:
        wrong &= real
    compared = torch.ones_like(wrong) if real is None else real
    if not wrong.any():
        return []
    if wrong.equal(compared):
        return ["wrong in every row and position"]
    rows, starts = [], []
    for row in range(len(wrong)):
        positions = wrong[row].nonzero().flatten().tolist()
        if positions:
            rows.append(row)
            starts.append(positions[0])
    which = "every batch row" if len(rows) == len(wrong) else f"batch rows {', '.join(map(str, rows))}"
    first = f"{min(starts)}" if min(starts) == max(starts) else f"{min(starts)}–{max(starts)}"
    return [f"wrong in {which}, first at position {first}; {int(wrong.sum())} of {int(compared.sum())} rows"]
