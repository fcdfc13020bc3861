"""Sensitivity: every weight of a checkpoint has an effect, so that none is silently not loaded."""

import re
from typing import TYPE_CHECKING, Any

from conformance import draws
from conformance.families import get
from conformance.implementation import Misbehaviour
from conformance.suite import drawn

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.judge import Judge
    from conformance.search import Example

ROWS = 8
# Texts that are tried before a tensor counts as without effect: an expert may get no token of a text.
TEXTS = 8


def test_weights(judge: "Judge") -> None:
    """When any one tensor of the checkpoint is drawn anew, the logits move.

    The profile `quick` tries one tensor of each kind (names that differ in numbers alone are a kind), `ci` and
    `thorough` all.  A tensor that provably may change without effect is named in the family's file, with the reason;
    the logits must then not move.
    """
    family, case = get(case_family := judge.case.family), judge.case
    length = drawn.usual(judge)
    before: dict[int, Tensor] = {}

    def logits_before(seed: int) -> "Tensor":
        if seed not in before:
            before[seed] = drawn.logits(judge, drawn.text(judge, seed, ROWS, length))
        return before[seed]

    def holds(example: "Example") -> None:
        name = example["tensor"]
        changed = draws.tensor(
            f"property/{case_family}/{example['other']}", name, case.weights[name].shape, family.module_kinds
        )
        other = judge.load_other(case.config, case.weights | {name: changed})
        moved = any(
            judge.moved(drawn.logits_of(judge, other, drawn.text(judge, seed, ROWS, length)), logits_before(seed))
            for seed in range(TEXTS)
        )
        reason = next(
            (why for pattern, why in drawn.properties(judge).unmoved.items() if re.search(pattern, name)), None
        )
        if reason is None and not moved:
            raise Misbehaviour("no effect", f"the logits do not move when {name} is drawn anew: is it loaded?")
        if reason is not None and moved:
            raise Misbehaviour("effect", f"the logits move when {name} is drawn anew; they must not: {reason}")

    judge.each([{"tensor": name, "other": judge.settings.seed} for name in _chosen(judge)], holds)


def _chosen(judge: "Judge") -> list[str]:
    """Names of tensors, all or one of each kind."""
    kinds: dict[str, list[str]] = {}
    for name in judge.case.weights:
        kinds.setdefault(re.sub(r"\d+", "N", name), []).append(name)
    if judge.settings.profile != "quick":
        return [name for names in kinds.values() for name in names]
    return [names[_index(judge.settings.seed, kind, len(names))] for kind, names in kinds.items()]


def _index(seed: Any, kind: str, count: int) -> int:
    return int(draws.integers(f"property/kind/{kind}/{seed}", 1, 0, count - 1))
