"""Which mistake is it?  Makes the catalogue's mistakes in `reference_impl` and sees which gives the candidate's values.

The very check that failed is run on the reference with a mistake (or a config field at its default), and what it would
compare is compared with what the candidate gave there.  So full forwards, padded batches, sessions and components are
all diagnosed in one way.  A mistake that reproduces the wrong values is the diagnosis.  Mistakes that touch the first
wrong tensor are tried first; of several that reproduce equally they are named.

Two mistakes at once are found one after the other: one that puts the first wrong tensor right moves the divergence
further down, and a second is looked for there.

Never changes a verdict, and never guesses: what is not reproduced is an unknown mistake, with what can be seen of it.
"""

import copy
import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from types import CodeType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from conformance import bounds, localise
from conformance.align import Probe, align
from conformance.component import ComponentCandidate
from conformance.families import Component, Config, Family, get
from conformance.implementation import Candidate, Implementation, load_checkpoint, precision, vocabulary
from conformance.implementations import partition, reference
from conformance.implementations.ranks import Handle
from conformance.judge import Compared, Judge, Result
from conformance.mistakes import Mistake, catalogue
from conformance.mistakes.patching import Patch
from conformance.mutation import model_under, mutant, staged
from conformance.pristine import pristine
from conformance.probes import word
from conformance.signatures import Wrong, signature

if TYPE_CHECKING:
    from conformance.cases import Case

Check = Callable[[Judge], None]
Values = dict[tuple[str, int], Compared]

# Seconds that the search for one diagnosis may take; what is not simulated by then is not.
SECONDS = 6.0
# Simulated at true double precision, the same mistake gives the same values to about 1e-14.
REPRODUCED = 1e-9
# In every dtype a diagnosis explains the error: so much of it may remain.  A mistake without effect leaves all of it.
UNEXPLAINED = {"float64": 1e-3}
UNEXPLAINED_ROUNDED = 0.1
# Reproductions that differ by less than rounding are equally good.
EQUALLY_GOOD = 1e-12
# So many searches in vain are made for one implementation.
MOST_UNKNOWN = 5
# A mistake that is only near is worth a word if it leaves so much of the error.
NEAR = 0.1


@dataclass(frozen=True)
class Hypothesis:
    """What the candidate may have done: mistakes, or a field of config.json left at its default."""

    id: str
    text: str
    fix: str
    mistakes: tuple[Mistake, ...] = ()
    field: str | None = None
    touches: frozenset[str] = frozenset()


def of_mistake(mistake: Mistake) -> Hypothesis:
    return Hypothesis(mistake.id, mistake.what, mistake.fix, (mistake,), None, frozenset(mistake.touches))


def both(first: Hypothesis, second: Hypothesis) -> Hypothesis:
    return Hypothesis(
        f"{first.id} and {second.id}", f"{first.text} And: {second.text}", f"{first.fix} And: {second.fix}",
        first.mistakes + second.mistakes, first.field or second.field, first.touches | second.touches,
    )  # fmt: skip


@dataclass(frozen=True)
class Ranks:
    """Over what processes a candidate runs: one, where count is 1; or `stages`, where the check partitions a model."""

    count: int = 1
    stages: bool = False

    def make(self, mistake: Mistake) -> bool:
        """Whether a mistake of a partition could be made so."""
        return mistake.partition == "pipeline" if self.stages else self.count > 1


ONE = Ranks()


def ranks_of(judge: Judge, check: str) -> Ranks:
    handle = getattr(getattr(judge.candidate, "model", None), "handle", None)
    return Ranks(handle.ranks.count if isinstance(handle, Handle) else 1, check.startswith("partition."))


@cache
def hypotheses(family: str, ranks: Ranks = ONE) -> tuple[Hypothesis, ...]:
    """Everything that can be simulated in a family: the catalogue's mistakes, then the fields.

    A partition that gives other bits than one process has a mistake of partitions, and no other.
    """
    of_family = [mistake for mistake in catalogue().values() if family in mistake.families]
    parted = [of_mistake(mistake) for mistake in of_family if mistake.partition and ranks.make(mistake)]
    parted.sort(key=lambda hypothesis: hypothesis.mistakes[0].partition)  # pipelines are simulated fastest
    if ranks.stages:
        return tuple(parted)
    known = parted + [of_mistake(mistake) for mistake in of_family if not mistake.partition]
    fields = [
        Hypothesis(
            field.name, f"the values are those with {field.name} at its default, {field.default}",
            f"Read {field.name} from config.json.", field=field.name,
        )
        for field in get(family).fields
    ]  # fmt: skip
    return (*known, *fields)


# --- simulating -------------------------------------------------------------------------------------------------------


class Simulation(Judge):
    """Runs a check and only keeps what it would compare."""

    def __init__(self, case: "Case", dtype: str, device: str, implementation: Implementation, candidate: Any):
        self.case, self.dtype, self.device = case, dtype, device
        self.implementation, self.candidate, self.forward_is_right = implementation, candidate, None
        self.begin()

    def compare(self, got: Any, truth: Any, *, real: Any = None, noise: str = "logits", what: str = "logits",
                scale: bounds.Error | None = None, known_mistakes: Any = None) -> None:  # fmt: skip
        got = got.detach().to(device="cpu", dtype=torch.float64)
        self.compared.append(Compared(what, got, truth, noise, scale, real))

    def identical(self, got: Any, wanted: Any, what: str) -> None:
        self.compare(got, wanted.detach().to(device="cpu", dtype=torch.float64), what=what)

    def run(self, check: Check) -> Values:
        check(self)
        return by_name(self.compared)


def by_name(compared: Iterable[Compared]) -> Values:
    """Comparisons by what they compare, and which of that name they are."""
    found: Values = {}
    for one in compared:
        number = sum(what == one.what for what, _ in found)
        found[one.what, number] = one
    return found


class Simulator:
    """The reference, on one claim, with and without mistakes; remembers what it has simulated."""

    def __init__(self, check: Check, case: "Case", dtype: str, ranks: Ranks = ONE):
        self.check, self.case, self.dtype, self.family = check, case, dtype, get(case.family)
        self.ranks, self.hypotheses = ranks, hypotheses(case.family, ranks)
        self._is_component = isinstance(self.family, Component)
        self._model: Any = None
        self._loading: set[CodeType] = set()  # what was called while it was loaded
        self._known: dict[str, Values | None] = {}
        with pristine():
            self.right = self._simulate(None)

    def simulate(self, hypothesis: Hypothesis) -> Values | None:
        """What the check would compare; None if it does not run to its end."""
        if hypothesis.id not in self._known:
            with pristine():
                self._known[hypothesis.id] = self._simulate(hypothesis)
        return self._known[hypothesis.id]

    def _simulate(self, hypothesis: Hypothesis | None) -> Values | None:
        try:
            if self.ranks.stages or (hypothesis and _of_partition(hypothesis)):
                return self._partitioned(hypothesis.mistakes if hypothesis else ())
            if hypothesis is not None and hypothesis.mistakes and not hypothesis.field and not self._is_component:
                patch = Patch(*hypothesis.mistakes)
                if not self._acts_on_loading(patch):
                    return self._run(self._patched(patch), mutant(*hypothesis.mistakes))
            case = _with_default(self.case, hypothesis.field) if hypothesis and hypothesis.field else self.case
            implementation = mutant(*(hypothesis.mistakes if hypothesis else ()))
            return self._run(self._loaded(implementation, case), implementation)
        except Exception:  # a mistake that cannot be made here, or that does not run
            return None

    def _partitioned(self, mistakes: Sequence[Mistake]) -> Values:
        """Over threads for ranks, as many as the candidate has."""
        kind = mistakes[0].partition if mistakes else "pipeline"
        right = staged() if self.ranks.stages else partition.simulated(kind, self.ranks.count)
        implementation = mutant(*mistakes, of=right)
        return self._run(self._loaded(implementation, self.case), implementation)

    def _run(self, candidate: Any, implementation: Implementation) -> Values:
        return Simulation(self.case, self.dtype, "cpu", implementation, candidate).run(self.check)

    def _loaded(self, implementation: Implementation, case: "Case") -> Any:
        if isinstance(self.family, Component):
            return ComponentCandidate(implementation, self.family, case, self.dtype, "cpu")
        return load_checkpoint(implementation, case.config, case.weights, self.dtype, "cpu")

    def _acts_on_loading(self, patch: Patch) -> bool:
        """Whether a patch replaces what is called while the model is loaded, so that a loaded one would not show it."""
        if self._model is None:
            before = sys.getprofile()
            sys.setprofile(lambda frame, event, _: self._loading.add(frame.f_code) if event == "call" else None)
            try:
                self._model = self._loaded(mutant(), self.case)
            finally:
                sys.setprofile(before)
        functions = [getattr(original, "fget", None) or inspect.unwrap(original) for original in patch.originals]
        codes = [getattr(getattr(f, "__func__", f), "__code__", None) for f in functions]
        return None in codes or not self._loading.isdisjoint(codes)

    def _patched(self, patch: Patch) -> Any:
        """The right model, loaded once, run under a patch."""
        with precision(self.dtype):
            pristine = copy.deepcopy(self._model.model.__wrapped__)  # what a mistake leaves behind must not stay
        model, dtype = model_under(patch, pristine), getattr(torch, self.dtype)
        return Candidate(model, dtype, torch.device("cpu"), vocabulary(self.case.config))


# A case's claims are judged one after the other; those of other candidates meet the same simulations.
simulator = lru_cache(maxsize=4)(Simulator)


def _with_default(case: "Case", field: str) -> "Case":
    """The case with a config field at its default, and only the weights that such a configuration has."""
    family = get(case.family)
    default = next(known.default for known in family.fields if known.name == field)
    changed: Any = copy.copy(case)
    changed.config = _at_default(case.config, field, default, leave_out=isinstance(family, Family))
    if isinstance(family, Family):
        shapes = family.tensor_shapes(changed.config)
        changed.weights = {name: weight for name, weight in case.weights.items() if name in shapes}
    return changed  # type: ignore[no-any-return]


def _at_default(config: Config, field: str, default: str, leave_out: bool) -> Config:
    """Without the key, also where another key's table has it; what must be given (a component's) at the value."""
    try:
        value = json.loads(default)
    except ValueError:
        value = default
    if not leave_out:
        return config | {field: value}
    nested = {key: {k: v for k, v in table.items() if k != field} if isinstance(table, dict) else table
              for key, table in config.items() if key != field}  # fmt: skip
    if field == "rope_scaling" and isinstance(nested.get("rope_parameters"), dict):
        kept = {k: v for k, v in nested["rope_parameters"].items() if k in ("rope_theta", "partial_rotary_factor")}
        nested["rope_parameters"] = {"rope_type": "default", **kept}
    return nested


# --- comparing --------------------------------------------------------------------------------------------------------


def difference(values: Values | None, others: Values | None, case: "Case", dtype: str) -> tuple[float, bool]:
    """The largest error of `values` against others, relative to the truth, over what `values` holds; and whether each
    is within what the dtype allows.  Infinite where one lacks something, or is finite and the other is not.
    """
    if values is None or others is None or not values.keys() <= others.keys():
        return math.inf, False
    largest, within = 0.0, True
    for name, mine in values.items():
        got, other, truth = (mine.kept(t) for t in (mine.got, others[name].got, mine.truth))
        if got.shape != other.shape or not got.isfinite().equal(other.isfinite()):
            return math.inf, False
        scaled = Compared(mine.what, got, truth, mine.noise, mine.scale or bounds.magnitude(truth))
        judgement = scaled.judged(case, dtype, got.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0))
        largest, within = max(largest, judgement.error.max), within and judgement.passed
    return largest, within


@dataclass(frozen=True)
class Failing:
    """The candidate's values, and how wrong they are."""

    judge: Judge
    values: Values
    error: float
    unsteady: bool

    def leaves(self, simulated: Values | None) -> float:
        """How much of the error a simulation leaves; infinite if it has nothing to do with it."""
        return difference(self.values, simulated, self.judge.case, self.judge.dtype)[0]

    def reproduced(self, simulated: Values | None) -> float | None:
        """To what difference a simulation gives the candidate's values; None if it does not."""
        dtype = self.judge.dtype
        apart, within = difference(self.values, simulated, self.judge.case, dtype)
        close = apart <= REPRODUCED if dtype == "float64" else within
        return apart if close and apart <= UNEXPLAINED.get(dtype, UNEXPLAINED_ROUNDED) * self.error else None


def _failing(check: Check, judge: Judge) -> Failing:
    """The values of the failed check and, as it stops at the first wrong one, of all that follow, from a second run."""
    judged, calls, case, dtype = by_name(judge.compared), judge.candidate.calls, judge.case, judge.dtype
    try:
        values = Simulation(case, dtype, judge.device, judge.implementation, judge.candidate).run(check)
    except Exception:
        values = judged
    judge.candidate.calls = calls
    unsteady = difference(judged, values, case, dtype)[0] > EQUALLY_GOOD and dtype == "float64"
    values = judged if unsteady else values
    return Failing(judge, values, difference(values, truths(values), case, dtype)[0], unsteady)


def truths(values: Values) -> Values:
    """The same comparisons with the truth in the place of what was got."""
    return {name: replace(compared, got=compared.truth) for name, compared in values.items()}


# --- searching --------------------------------------------------------------------------------------------------------


# What was found in one implementation: diagnoses of a family are tried first in its other claims, and a case whose
# mistake is unknown is not searched for again in the same kind of check.
@dataclass
class Recall:
    known: list[tuple[Hypothesis, ...]] = field(default_factory=list)
    unknown: list[tuple[str, str]] = field(default_factory=list)


_found: "WeakKeyDictionary[Implementation, Recall]" = WeakKeyDictionary()


def recalled(implementation: Implementation) -> Recall:
    return _found.setdefault(implementation, Recall())


def diagnose(check: Check, judge: Judge, result: Result) -> tuple[dict[str, Any] | None, list[str]]:
    """The diagnosis (as the run's schema has it) of a failed check, or None with a note why there is none."""
    failing, simulated = (
        _failing(check, judge),
        simulator(check, judge.case, judge.dtype, ranks_of(judge, result.claim.check)),
    )
    right = simulated.right
    if right is None or not difference(right, truths(right), judge.case, judge.dtype)[1]:
        return None, ["not diagnosed: reference_impl itself does not pass this claim in this process"]
    memory = recalled(judge.implementation)
    kind = judge.case.name, result.claim.check.split(".")[0]
    searched = kind in memory.unknown or len(memory.unknown) >= MOST_UNKNOWN
    search = Search(simulated, failing, suspects(judge.case, result.divergence), result.claim.check)
    hits = search.first_that_reproduce([memory.known])
    if not hits and not searched:
        hits = search.first_that_reproduce(search.stages()) or search.two_at_once(result.divergence)
        if hits:
            hits = search.with_lookalikes(hits)
            memory.known.append(tuple(hypothesis for _, hypothesis in hits))
        else:
            memory.unknown.append(kind)
    if hits:
        return named(hits), []
    return _unknown(search, failing, result, searched), []


Hits = list[tuple[float, Hypothesis]]


class Search:
    """One search, with its time.

    near: what was simulated, and how much of the error it leaves.
    """

    def __init__(self, simulator: Simulator, failing: Failing, touched: frozenset[str], check: str):
        self.simulator, self.failing, self.touched, self.check = simulator, failing, touched, check
        self.near: Hits = []
        self.ends = time.perf_counter() + (SECONDS if simulator.ranks == ONE else 2 * SECONDS)
        self.out_of_time = False

    def stages(self) -> Iterator[Sequence[Hypothesis]]:
        """Those of a partition, where the candidate is one; those that touch the first wrong tensor; those that this
        check must kill; the others.
        """
        remaining = list(self.simulator.hypotheses)
        for wanted in (_of_partition, self._touching, self._killed_here, lambda _: True):
            yield [h for h in remaining if wanted(h)]
            remaining = [h for h in remaining if not wanted(h)]

    def with_lookalikes(self, hits: Hits) -> Hits:
        """What ranks do wrong may look like a mistake of one process at what it touches; then both are named."""
        touched = frozenset[str]().union(*(h.touches for _, h in hits if _of_partition(h)))
        alike = [h for h in self.simulator.hypotheses if not _of_partition(h) and not touched.isdisjoint(h.touches)]
        return _best(hits + self.first_that_reproduce([alike]))

    def _touching(self, hypothesis: Hypothesis) -> bool:
        return not self.touched.isdisjoint(hypothesis.touches)

    def _killed_here(self, hypothesis: Hypothesis) -> bool:
        return any(self.check in mistake.killed_by for mistake in hypothesis.mistakes)

    def first_that_reproduce(self, stages: Iterable[Sequence[Any]]) -> Hits:
        """The hypotheses of the first stage in which one reproduces the values, the best and its equals."""
        for stage in stages:
            hits = []
            for hypothesis in (h for some in stage for h in (some if isinstance(some, tuple) else (some,))):
                if time.perf_counter() > self.ends:
                    self.out_of_time = True
                    break
                if (apart := self._try(hypothesis)) is not None:
                    hits.append((apart, hypothesis))
            if hits:
                return _best(hits)
        return []

    def _try(self, hypothesis: Hypothesis) -> float | None:
        simulated = self.simulator.simulate(hypothesis)
        self.near.append((self.failing.leaves(simulated), hypothesis))
        return self.failing.reproduced(simulated)

    def two_at_once(self, divergence: dict[str, Any] | None) -> Hits:
        """Of the mistakes that put the first wrong tensor right, one that reproduces the values with a second."""
        judge = self.failing.judge
        if divergence is None or divergence["probes_from"] == "blocks" or judge.plan or self.check != judge.forward:
            return []
        self.ends += SECONDS
        first, recorded = divergence["first_wrong"], localise.record_forward(judge)
        touching = [h for h in self.simulator.hypotheses if self._touching(h) and h.mistakes]
        for one in touching:
            if time.perf_counter() > self.ends:
                return []
            second_wrong = _moves_on(judge, one, first, *recorded)
            if second_wrong is None:
                continue
            words = suspects(judge.case, second_wrong)
            pairs = [both(one, h) for h in self.simulator.hypotheses if not words.isdisjoint(h.touches)]
            if hits := self.first_that_reproduce([pairs]):
                return hits
        return []


def _of_partition(hypothesis: Hypothesis) -> bool:
    return any(mistake.partition for mistake in hypothesis.mistakes)


def _best(hits: Hits) -> Hits:
    best = min(apart for apart, _ in hits)
    return [hit for hit in hits if hit[0] <= max(10 * best, EQUALLY_GOOD)]


def _moves_on(
    judge: Judge, hypothesis: Hypothesis, first: str, tensors: list[Any], logits: Any
) -> dict[str, Any] | None:
    """Where the candidate diverges from the reference with a mistake, if that puts the first wrong tensor right."""
    case = judge.case
    try:
        with pristine(), Patch(*hypothesis.mistakes):
            values = reference.probes(get(case.family), case.config, case.weights, **case.arguments)
        probes = {probe.name: probe for probe in localise.probes_of(case, values)}
    except Exception:  # it cannot be made here, or leaves a probe out
        return None
    alone = Probe(first, probes[first].value, probes[first].axes)
    if align([alone], tensors).first_divergence is not None:
        return None
    alignment = align(list(probes.values()), tensors, result=logits)
    found = alignment.first_divergence
    if found is None or list(probes).index(found.name) <= list(probes).index(first):
        return None
    good = [str(finding) for finding in alignment.last_good]
    return {"first_wrong": found.name, "last_good": good, "probes_from": "reference"}


def suspects(case: "Case", divergence: dict[str, Any] | None) -> frozenset[str]:
    """Words of the probes at which the fault may be: the first wrong one, and those between it and the good ones."""
    if divergence is None or not isinstance(get(case.family), Family):
        return frozenset()
    specs = {spec.name: spec for spec in get(case.family).probes(case.config)}
    first = divergence["first_wrong"]
    if divergence["probes_from"] == "blocks":
        return frozenset(word(name) for name in specs if name.startswith(f"{first}."))
    good = {said.split(" ")[0] for said in divergence["last_good"]}
    reached: set[str] = set()
    waiting = {first}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= set(specs[name].parents) - good - reached
    return frozenset(map(word, reached))


# --- saying it --------------------------------------------------------------------------------------------------------


def named(hits: Hits) -> dict[str, Any]:
    found = [hypothesis for _, hypothesis in hits]
    fields, mistakes = [h for h in found if not h.mistakes], [h for h in found if h.mistakes]
    named = mistakes or fields
    kind = (
        "one of" if len(named) > 1 else "two at once" if " and " in named[0].id else "mistake" if mistakes else "field"
    )
    text = "; or: ".join(h.text for h in named)
    if mistakes and fields:
        text += f" (The values are also those with {' or '.join(f.id for f in fields)} at the default.)"
    return {
        "kind": kind, "id": " or ".join(h.id for h in named), "text": text,
        "reproduced_to": max(apart for apart, _ in hits), "fix": " Or: ".join(dict.fromkeys(h.fix for h in named)),
    }  # fmt: skip


def _unknown(search: Search, failing: Failing, result: Result, searched: bool) -> dict[str, Any]:
    judge = failing.judge
    last = judge.compared[-1]
    bound = result.judgement.bound.max if result.judgement else bounds.SEMANTIC
    window = judge.case.config.get("sliding_window")
    wrong = Wrong(
        last.got, last.truth, bound, last.real, tuple(judge.plan), window if isinstance(window, int) else None,
        _has_rows(judge, last.what), causal=not (judge.is_component or judge.case.source),
    )  # fmt: skip
    said = ["the same call gives other values when it is repeated"] if failing.unsteady else []
    if difference(failing.values, truths(failing.values), judge.case, judge.dtype)[1]:
        said.append(
            f"as small as {judge.dtype} allows: other arithmetic (a kernel, an order of sums), the same function"
        )
    elif sign := signature(wrong):
        said.append(sign)
    near = sorted((hit for hit in search.near if hit[0] <= NEAR * failing.error < math.inf), key=lambda hit: hit[0])[:3]
    if near:
        close = ", ".join(f"{h.id} (leaves {apart / failing.error:.1%} of the error)" for apart, h in near)
        said.append(f"near, and not the same: {close}")
    if not searched:
        said.append(f"none of {len(search.near)} simulated mistakes gives these values")
    if search.out_of_time:
        said.append(f"{len(search.simulator.hypotheses) - len(search.near)} were not tried for want of time")
    text = "; ".join(said) or "see the other failures of this implementation"
    return {"kind": "unknown", "id": None, "text": text, "reproduced_to": None, "fix": ""}


def _has_rows(judge: Judge, what: str) -> bool:
    """Whether the first axes of a value are those of rows of tokens."""
    family = get(judge.case.family)
    if not isinstance(family, Component):
        return True
    axes = {value.name: value.axes or "" for value in family.returns}
    return axes.get(what.split(" ")[0], "").startswith("batch seq ")
