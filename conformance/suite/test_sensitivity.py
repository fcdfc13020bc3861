"""Sensitivity: every weight of a checkpoint has an effect, so that none is silently not loaded."""

import copy
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from conformance import draws
from conformance.implementation import Misbehaviour
from conformance.suite import drawn

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.judge import Judge
    from conformance.search import Example

# Short texts in many rows: enough tokens for most experts, in few steps of a recurrence.
ROWS, LENGTH = 24, 3
# Kinds of tensors that the profile `quick` tries at most.
QUICK_KINDS = 20
# Texts that are tried before a tensor counts as without effect: an expert may get no token of a text.
TEXTS = 8
# What numbers that could be taken for integers are moved by; exact in binary.
FRACTION = 0.25


def test_weights(judge: "Judge") -> None:
    """When any one tensor of the checkpoint is drawn anew, the logits move.

    The profile `quick` tries one tensor of each kind (names that differ in numbers alone are a kind), of 20 kinds at
    most, and in a family's second case the kinds that the first one lacks, 6 at least; `ci` and `thorough` try all
    tensors.  A tensor that provably may change without effect is named in the family's file, with the reason; the
    logits must then not move.
    """
    family, case = drawn.family(judge), judge.case
    before: dict[int, Tensor] = {}

    def logits_before(seed: int) -> "Tensor":
        if seed not in before:
            before[seed] = drawn.logits(judge, drawn.text(judge, seed, ROWS, LENGTH))
        return before[seed]

    def holds(example: "Example") -> None:
        name = example["tensor"]
        changed = draws.tensor(f"property/{case.family}", name, case.weights[name].shape, family.module_kinds)
        other = judge.load_other(case.config, case.weights | {name: changed})
        unmoved = drawn.properties(judge).unmoved
        reason = next((why for pattern, why in unmoved.items() if re.search(pattern, name)), None)
        moved = any(
            judge.moved(drawn.logits_of(judge, other, drawn.text(judge, seed, ROWS, LENGTH)), logits_before(seed))
            for seed in range(TEXTS if reason is None else 1)
        )
        if reason is None and not moved:
            raise Misbehaviour("no effect", f"the logits do not move when {name} is drawn anew: is it loaded?")
        if reason is not None and moved:
            raise Misbehaviour("effect", f"the logits move when {name} is drawn anew; they must not: {reason}")

    judge.each([{"tensor": name} for name in _chosen(judge)], holds)


def test_fractions(judge: "Judge") -> None:
    """Numbers of rotary positions may have a fraction: when one grows by less than 1 the logits move.

    The base and the parameters of a scaling (linear, by a factor of 2, where the case has none), each in all places
    where config.json says it.
    """
    config = judge.case.config
    if all(found.get("rope_type", "default") == "default" for found in _rotary(config)[1:]):
        config = {key: value for key, value in config.items() if key != "rope_parameters"}
        config["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    text = drawn.text(judge, 0, ROWS, LENGTH)
    before = drawn.logits_of(judge, judge.load_other(config, judge.case.weights), text)

    def holds(example: "Example") -> None:
        name = example["field"]
        grown = copy.deepcopy(config)
        for place in _rotary(grown):
            if name in place:
                place[name] += FRACTION
        other = judge.load_other(grown, judge.case.weights)
        if not judge.moved(drawn.logits_of(judge, other, text), before):
            raise Misbehaviour("no effect", f"the logits do not move when {name} grows by {FRACTION}: is it cut?")

    floats = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor")
    judge.each([{"field": name} for name in floats if any(name in place for place in _rotary(config))], holds)


def _rotary(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects in which config.json may say something of rotary positions: itself first."""
    return [config, *(config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key))]


def _chosen(judge: "Judge") -> list[str]:
    """Names of tensors: all, or of the profile `quick` one of each chosen kind."""
    if judge.settings.profile != "quick":
        return list(judge.case.weights)
    kinds, seed = _kinds(judge.case.weights), judge.settings.seed
    shapes = drawn.family(judge).tensor_shapes
    return [
        kinds[kind][int(draws.integers(f"property/{kind}/{seed}", 1, 0, len(kinds[kind]) - 1))]
        for kind in drawn.tried(judge, list(kinds), lambda config: _kinds(shapes(config)), QUICK_KINDS)
    ]


def _kinds(names: "Iterable[str]") -> dict[str, list[str]]:
    """Names of tensors by kind: those that differ in numbers alone are of one."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "N", name), []).append(name)
    return kinds
