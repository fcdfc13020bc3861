"""The kill matrix: the suite against its own catalogue of mistakes.

Every mistake is made in `reference_impl`, and the result is judged like any implementation, in every family in which
the mistake can be made.  The patch is in force only while the mutant runs (it loads, is called, is fed), so that the
reference that supplies localisation probes is the right one.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any

import torch

from conformance.cases import Case, Claim, Manifest
from conformance.families import FAMILIES
from conformance.implementation import DTYPES, Implementation
from conformance.implementations import partition
from conformance.implementations.ranks import RankedModel
from conformance.implementations.reference import Reference
from conformance.judge import Judge, Result, judge
from conformance.mistakes import Mistake, catalogue, get
from conformance.mistakes.patching import Patch
from conformance.probes import word
from conformance.search import Settings
from conformance.suite import checks
from conformance.suite.test_partition import STAGES

# What a mutant can come to in a family.
#   killed           a check that the mistake names failed it
#   killed unnamed   only another check failed it: the entry names the wrong ones
#   raised           it did not run to the end: not a silent mistake, so that its death proves nothing
#   survived         every claim of the family passed
#   equivalent       declared equivalent, and no claim that could show it failed
#   policy           the same of a mistake of precision: no output in float64 can, and lower budgets allow it
#   not equivalent   declared equivalent, and killed
DECLARED = ("equivalent", "policy")
GOOD = ("killed", *DECLARED)


@dataclass(frozen=True)
class Outcome:
    """What a mutant came to in one family.

    by: the claim that killed it.  kind, message: of its result.
    first_wrong: the probe at which the failure was localised; localised: whether the entry says so (None: it was not).
    kills: every claim that failed, when all were judged.  claims: how many were.
    """

    mistake: str
    family: str
    status: str
    by: str = ""
    check: str = ""
    kind: str = ""
    message: str = ""
    first_wrong: str = ""
    localised: bool | None = None
    kills: tuple[str, ...] = ()
    claims: int = 0
    seconds: float = 0.0


# --- a mistake as an implementation -----------------------------------------------------------------------------------


def mutant(*mistakes: Mistake, of: Any = None) -> Implementation:
    """The reference with some mistakes, as an implementation like any other.

    of: what is mistaken, where it is not the model in one process (`partition.simulated`, `staged`).
    """
    patch, right = Patch(*mistakes), Reference("eager") if of is None else of

    def load(checkpoint: Any) -> Any:
        with patch:
            model = right.load(checkpoint)
        return model_under(patch, model)

    name = "reference_impl with " + " and ".join(mistake.id for mistake in mistakes)
    return Implementation(name, name, frozenset(FAMILIES), frozenset(DTYPES), load)


# Ranks that simulate a partition; three share heads of two, and blocks, unevenly.
RANKS = {"pipeline": 2, "tensor parallel": 3}


def staged() -> Reference:
    """The reference in one process, which a check that partitions it shares out to threads."""
    whole = Reference("eager")
    whole.pipelines = {stages: partition.simulated("pipeline", stages) for stages in STAGES}
    return whole


def _under(patch: Patch, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps what it declares, and its attributes
    def patched(*args: Any, **kwargs: Any) -> Any:
        with patch:
            return function(*args, **kwargs)

    return patched


def _method_under(patch: Patch, owner: Any, name: str) -> Callable[..., Any]:
    """A method that is looked up under the patch: bound before, it would be the right one."""

    @wraps(getattr(owner, name))
    def patched(*args: Any, **kwargs: Any) -> Any:
        with patch:
            return getattr(owner, name)(*args, **kwargs)

    return patched


def model_under(patch: Patch, model: Any) -> Any:
    """A loaded model (a component's function, a tokenizer) of which everything that is called runs under the patch."""
    if hasattr(model, "encode"):
        return SimpleNamespace(
            encode=_method_under(patch, model, "encode"),
            decode=_method_under(patch, model, "decode"),
            decoder=lambda: _decoder_under(patch, model.decoder()),
        )
    patched: Any = _under(patch, model)
    if hasattr(model, "session"):

        @wraps(model.session)
        def session(**source: Any) -> SimpleNamespace:
            with patch:
                opened = model.session(**source)
            return SimpleNamespace(feed=_method_under(patch, opened, "feed"))

        patched.session = session
    if isinstance(model, RankedModel):  # which its backward asks by itself
        model.gradients = _under(patch, model.gradients)  # type: ignore[method-assign]
    if hasattr(model, "partitioned"):
        partitioned = _under(patch, model.partitioned)
        patched.partitioned = lambda stages: model_under(patch, partitioned(stages))
    for name in ("packed", "greedy"):
        if hasattr(model, name):
            setattr(patched, name, _method_under(patch, model, name))
    return patched


def _decoder_under(patch: Patch, decoder: Any) -> SimpleNamespace:
    return SimpleNamespace(**{name: _method_under(patch, decoder, name) for name in ("feed", "finish")})


# --- judging one ------------------------------------------------------------------------------------------------------


@cache
def _manifest() -> Manifest:
    return Manifest()


@cache
def _case(name: str) -> Case:
    """A case, read once a process; what is read before a pool forks is shared by all of it."""
    case = Case(name, _manifest())
    case.read()
    return case


def ordered(mistake: Mistake, family: str) -> list[Claim]:
    """The family's claims, those first that should kill: named checks, short cases, dtype, what a case can show."""
    dtypes = DTYPES if not mistake.precision else tuple(reversed(DTYPES))

    def key(claim: Claim) -> tuple[Any, ...]:
        named, label = claim.check in mistake.killed_by, claim.case.split("/")[1]
        order = dtypes.index(claim.dtype) if claim.dtype in dtypes else 0  # text has none
        first = (order, mistake.killed_by.index(claim.check)) if named else ()
        return not named, label == "long", *first, label != "distinct"

    return sorted(_seeing(family, mistake.partition == "pipeline"), key=key)


@cache
def _seeing(family: str, stages: bool) -> tuple[Claim, ...]:
    """The family's claims that a mutant can fail; stages: one whose ranks are simulated when a check partitions it."""
    return tuple(claim for claim in _manifest().claims() if claim.family == family and _can_see(claim.check, stages))


def _can_see(check: str, stages: bool) -> bool:
    """A patch is in this process alone: what a check starts elsewhere runs the right code, but for simulated ranks."""
    return stages or not check.startswith("partition.")


def judge_mutant(mistake: Mistake, family: str, *, everything: bool = False) -> Outcome:
    """Run the family's claims on the mutant, up to the first kill by a named check unless `everything` is asked for.

    Of a declared equivalent, the float64 claims of the named checks are run: those that would show it.
    """
    started = time.perf_counter()
    outcome = Outcome(mistake.id, family, "survived")
    for result in _results(mistake, _wanted(mistake, family)):
        outcome = replace(outcome, claims=outcome.claims + 1)
        if result.outcome in ("pass", "unsupported"):
            continue
        if result.outcome == "fail":
            outcome = replace(outcome, kills=(*outcome.kills, str(result.claim)))
        outcome = _better(outcome, mistake, result)
        if outcome.status == "killed" and not everything:
            break
    status = outcome.status
    if family in mistake.equivalent:
        declared = "policy" if mistake.precision else "equivalent"
        status = declared if status == "survived" else "not equivalent"
    kills = outcome.kills if everything else ()
    return replace(outcome, status=status, kills=kills, seconds=round(time.perf_counter() - started, 3))


def _wanted(mistake: Mistake, family: str) -> list[Claim]:
    claims = ordered(mistake, family)
    if family in mistake.equivalent:
        plain = [c for c in claims if c.dtype == "float64" and not c.case.endswith("/long")]
        return [c for c in plain if c.check in mistake.killed_by]
    return claims


def _results(mistake: Mistake, claims: Iterable[Claim]) -> Iterator[Result]:
    judges: dict[tuple[str, str, bool], Judge] = {}

    kind = mistake.partition
    whole = mutant(mistake, of=partition.simulated(kind, RANKS[kind]) if kind else None)
    by_stages = {False: whole, True: mutant(mistake, of=staged()) if kind else whole}

    def prepared(claim: Claim) -> Judge:
        key = claim.case, claim.dtype, claim.check.startswith("partition.")
        if key not in judges:
            judges[key] = Judge(by_stages[key[2]], _case(claim.case), claim.dtype, "cpu")
            judges[key].settings = Settings(diagnose=False, localise=not mistake.partition)
        return judges[key]

    for claim in claims:
        yield judge(checks()[claim.check], claim, lambda claim=claim: prepared(claim))  # type: ignore[misc]


def _better(known: Outcome, mistake: Mistake, result: Result) -> Outcome:
    """The outcome with this failure in it, if it says more than what is known: named before unnamed before raised."""
    ranks = ["killed", "killed unnamed", "raised", "survived"]
    status = "raised" if result.outcome != "fail" else "killed" if result.claim.check in mistake.killed_by else ranks[1]
    if ranks.index(status) >= ranks.index(known.status):
        return known
    first = (result.divergence or {}).get("first_wrong", "")
    return replace(
        known, status=status, by=str(result.claim), check=result.claim.check, kind=result.kind, message=result.message,
        first_wrong=first, localised=_localised(mistake, first) if first else None,
    )  # fmt: skip


def _localised(mistake: Mistake, first_wrong: str) -> bool:
    try:
        return word(first_wrong) in mistake.touches
    except KeyError:  # block by block: `layers.1`
        return any(touched.startswith("layers.N.") for touched in mistake.touches)


# --- judging many -----------------------------------------------------------------------------------------------------


class CannotMutate(ValueError):
    """The matrix could not be run."""


def pairs(families: Iterable[str] = (), mistakes: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Mistake and family of every mutant that is asked for; an empty filter is all.

    A mistake of a partition is made outside the blocks, where families hardly differ: unless families are asked for,
    it is judged in its first.

    Raises: ValueError for an unknown name, or if there is no such mutant.
    """
    if unknown := set(families) - set(FAMILIES):
        raise ValueError(f"unknown family {', '.join(sorted(unknown))}; there is {', '.join(FAMILIES)}")
    chosen = [get(identifier) for identifier in mistakes] or list(catalogue().values())
    wanted = set(families) or set(FAMILIES)
    found = [(mistake.id, family) for mistake in chosen for family in _judged_in(mistake, families) if family in wanted]
    if not found:
        raise ValueError("no mistake of these can be made in any of these families")
    return found


def _judged_in(mistake: Mistake, families: Iterable[str]) -> tuple[str, ...]:
    return mistake.families[:1] if mistake.partition and not families else mistake.families


def run(chosen: list[tuple[str, str]], jobs: int = 1, everything: bool = False) -> Iterator[Outcome]:
    """The outcome of every mutant, in order; with several jobs in processes that share the loaded cases.

    Raises: CannotMutate if a process died.
    """
    torch.set_num_threads(1)
    if jobs == 1:
        yield from (_judged((identifier, family, everything)) for identifier, family in chosen)
        return
    for name in _manifest().cases:
        if name.split("/")[0] in {family for _, family in chosen}:
            _case(name)
    tasks = [(identifier, family, everything) for identifier, family in chosen]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            yield from pool.map(_judged, tasks)
        except BrokenProcessPool as error:
            raise CannotMutate("a mutant ended its process; run with --jobs 1 to see which") from error


def _judged(task: tuple[str, str, bool]) -> Outcome:
    identifier, family, everything = task
    return judge_mutant(get(identifier), family, everything=everything)


def default_jobs() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- reporting --------------------------------------------------------------------------------------------------------


def line(mistake: str, outcomes: list[Outcome]) -> str:
    """One line of the table: a mistake, in how many of its families it is dead, by which checks, where localised."""
    good = sum(o.status in GOOD for o in outcomes)
    equivalent = sum(o.status in DECLARED for o in outcomes)
    by = list(dict.fromkeys(o.check for o in outcomes if o.status == "killed"))
    looked = [o.localised for o in outcomes if o.status == "killed" and o.localised is not None]
    verdict = f"{'killed' if good == len(outcomes) else 'PROBLEM':<8}{good}/{len(outcomes)}"
    verdict += f" ({equivalent} equivalent)" if equivalent else ""
    where = f"localised {sum(looked)}/{len(looked)}" if looked else ""
    seconds = sum(o.seconds for o in outcomes)
    return f"{mistake:<36} {verdict:<26} {', '.join(by):<44} {where:<16} {seconds:6.1f} s"


def problems(outcome: Outcome) -> list[str]:
    """What is wrong with an outcome, for a person."""
    if outcome.status not in GOOD:
        return [f"    {outcome.family}: {outcome.status} {outcome.by} {outcome.message}".rstrip()]
    if outcome.localised is False:
        return [f"    {outcome.family}: localised at {outcome.first_wrong}, which the entry does not name"]
    return []


def summary(outcomes: list[Outcome]) -> dict[str, int]:
    """How many mutants came to what, and how many of the kills were localised where the entry says."""
    counts = {status: sum(o.status == status for o in outcomes) for status in dict.fromkeys(o.status for o in outcomes)}
    looked = [o for o in outcomes if o.status == "killed" and o.localised is not None]
    counts = {"mistakes": len({o.mistake for o in outcomes}), "mutants": len(outcomes), **counts}
    right = sum(bool(o.localised) for o in looked)
    return counts | {"localised": right, "localised elsewhere": len(looked) - right}


def to_json(outcomes: list[Outcome]) -> dict[str, Any]:
    return {"format": 1, "summary": summary(outcomes), "mutants": [asdict(outcome) for outcome in outcomes]}
