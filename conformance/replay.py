"""An example that killed or hung the candidate's process: confirmed alone in a fresh process, then made smaller.

Hypothesis cannot do this: it would die with the candidate.  What the child was running stands in its journal.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from conformance.report.model import died
from conformance.strategies import describe
from conformance.worker import Died

if TYPE_CHECKING:
    from conformance.cases import Claim
    from conformance.search import Example
    from conformance.worker import Worker

# Smaller examples that are tried, each in a fresh process; a hang is waited for this part of a claim's time.
TRIES = 12


def replayed(worker: "Worker", claim: "Claim", death: Died, timeout: float, settings: dict[str, Any]) -> dict[str, Any]:
    """The result of a claim during which the process died or hung.

    If an example of a property was being run, the result is that of the smallest one found that does the same alone,
    or says that the example alone does not do it.
    """
    result, example = died(claim, death, timeout), worker.journalled()
    if example is None:
        return result
    again = _alone(worker, claim, example, timeout, settings)
    if not _as_bad(again, death):
        note = "not repeated" if death.outcome == "crash" else "answered"
        result["notes"].append(f"the example at hand, alone in a fresh process, was {note}: {describe(example)}")
        return result
    smallest, end = _smaller(worker, claim, example, again, timeout, settings)
    # The time of the claim, not that of a replay
    result = died(claim, dataclasses.replace(death, output=end.output), timeout)
    result["message"] += f"   [{describe(smallest)}]"
    result["example"] = smallest
    return result


def _alone(
    worker: "Worker",
    claim: "Claim",
    example: "Example",
    timeout: float,
    settings: dict[str, Any],
    patience: float | None = None,
) -> "dict[str, Any] | Died":
    """What one example comes to in a process that has run nothing else.

    patience: seconds for the example; importing and loading, which come first, still have the claim's time.
    """
    worker.retire()
    if patience is not None:
        loaded = worker.request(timeout, op="judge", **_request(claim, settings, listing=True))
        if isinstance(loaded, Died):
            return loaded
    answer = worker.request(patience or timeout, op="judge", **_request(claim, settings, example=example))
    worker.retire()
    return answer


def _request(claim: "Claim", settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(claim), **settings, "example": None, **changes}


def _as_bad(answer: "dict[str, Any] | Died", death: Died) -> bool:
    return isinstance(answer, Died) and answer.outcome == death.outcome


def _smaller(
    worker: "Worker", claim: "Claim", example: "Example", death: Any, timeout: float, settings: dict[str, Any]
) -> "tuple[Example, Died]":
    """The smallest example found in a dozen tries that ends as this one does, and its end.

    Tried are examples that the check could draw, by size: the smallest, then ever larger ones.
    """
    listed = worker.request(timeout, op="judge", **_request(claim, settings, listing=True))
    if isinstance(listed, Died) or "examples" not in listed:
        return example, death
    known = sorted((e for e in listed["examples"] if set(e) == set(example) and _size(e) < _size(example)), key=_size)
    for index in range(TRIES):
        if not known:
            break
        # By halves from the smallest: index 0, then the middle of what is left, …
        place = 0 if index == 0 else len(known) // 2
        candidate = known[place]
        patience = timeout / TRIES if death.outcome == "timeout" else None
        end = _alone(worker, claim, candidate, timeout, settings, patience)
        if _as_bad(end, death):
            example, death = candidate, end
            known = known[:place]
        else:
            known = known[place + 1 :]
    return example, death


def _size(example: "Example") -> tuple[int, int]:
    """How large an example is to a person: the numbers in it, seeds counting last."""
    sizes = seeds = 0
    for key, value in example.items():
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int):
                continue
            if key in ("ids", "inputs", "other"):
                seeds += number
            else:
                sizes += number + 1
    return sizes, seeds
