"""Which properties a model family has: the table from which the claims of property checks are made.

A property holds for every input and needs no oracle.  A family that lacks one says why, in `exceptions`; what depends
on the configuration (a tied head, a window, shared key-value heads) is asked of the configuration.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

Config = dict[str, Any]
Claims = dict[str, tuple[str, ...]]

_DOUBLE = ("float64",)
_FINE = ("float64", "float32")

# What every model claims unless its family makes an exception.
EVERY: Claims = {
    "shapes.any": ("float64", "float32", "bfloat16"),
    "shapes.inputs": _DOUBLE,
    "batching.alone": _FINE,
    "batching.permutation": _DOUBLE,
    "batching.padding": _FINE,
    "sensitivity.weights": _DOUBLE,
    "gradients.directions": _DOUBLE,
    "determinism.repeat": _FINE,
    "determinism.eval": _DOUBLE,
    "determinism.threads": _DOUBLE,
    "round_trip.parameters": _DOUBLE,
    "round_trip.storage": _DOUBLE,
    "invariance.absent": _DOUBLE,
    "invariance.loss": _DOUBLE,
}
# What a model beside that claims whose logits at a token depend on earlier tokens alone, and that opens sessions.
DECODER: Claims = {
    "causality.prefix": _FINE,
    "causality.gradient": _DOUBLE,
    "reach.last_row": _DOUBLE,
    "reach.one_layer": _DOUBLE,
    "cache.any_plan": _FINE,
    "cache.fresh_session": _FINE,
    "cache.interleaved": _FINE,
    "cache.ragged_plan": _DOUBLE,
    "batching.decoding": _DOUBLE,
    "batching.packed": _DOUBLE,
    "generation.greedy": _DOUBLE,
    "generation.stop_token": _DOUBLE,
}
# Of an encoder–decoder no layer can be had alone, its texts are not packed, and what is generated for a source begins
# with a token that its family agrees on.
_NOT_WITH_A_SOURCE = ("reach.one_layer", "batching.packed", "generation.greedy", "generation.stop_token")


# The same for a decoder that reads a source through an encoder.
ENCODER_DECODER: Claims = {check: dtypes for check, dtypes in DECODER.items() if check not in _NOT_WITH_A_SOURCE} | {
    "causality.source": _DOUBLE,
    "batching.source_padding": _DOUBLE,
}


# Why a model with a router makes an exception of float32.
ROUTED = dict.fromkeys(
    (
        f"{check} float32"
        for check in (
            "causality.prefix", "cache.any_plan", "cache.fresh_session", "cache.interleaved", "batching.alone",
            "batching.padding",
        )
    ),
    "rounding may send a token to another expert",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Twins:
    """Two checkpoints that compute the same, made of one: what a property of the maths says of whole models.

    applies: whether a configuration has such twins.
    make: config, weights, tokens that will be fed at most -> both checkpoints as (config, weights).
    """

    applies: Callable[[Config], bool]
    make: Callable[[Config, Any, int], tuple[tuple[Config, Any], tuple[Config, Any]]]


@dataclass(frozen=True, kw_only=True)
class Relation:
    """Two calls of a component whose returns say the same: a property of its maths.

    applies: whether a case has it, of its recipe.
    everywhere: every case has it, so that plain and distinct are enough.
    make: tensors and settings of a call by name, the example -> what differs from them in the one call and in the
        other.
    expected: returns of the one call, the example -> what the other must return.
    compared: returns of the other call, the example -> what is compared with that.
    sizes: the example -> axes of the returns that have another size in the other call than in the case; −1: any.
    draws: keys of an example beside the seed of the inputs -> the numbers they lie between, both included.
    """

    applies: Callable[[Any], bool] = lambda recipe: True
    everywhere: bool = False
    make: Callable[[dict[str, Any], dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]]
    expected: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda returns, example: returns
    compared: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda returns, example: returns
    sizes: Callable[[dict[str, Any]], Mapping[str, int]] = lambda example: {}
    draws: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Properties:
    """What a family's models promise for every input.

    table: config -> hub name of the table of token embeddings, of the decoder's where it has its own.
    claims: check -> dtypes, what it has but for the exceptions.
    exceptions: a check, or a check and a dtype ("batching.alone float32") or a case ("cache.any_plan distinct"), that
        does not hold -> why.
    windows: config -> for each layer the keys that a query sees, itself included; None: all up to itself.
    memory: config -> tokens before a segment that each layer remembers, of a model that is fed in segments.
    tied: whether head and embedding table are one tensor in a configuration.
    shift: whether positions only matter by their distance.
    positions: hub name of the table in which positions are looked up, where they are.
    attention_output: regular expression over hub names that finds the output projection of each layer's attention, the
        layer's number its first group; stated where windows differ from layer to layer.
    positionless: config, weights -> a checkpoint in which positions do not count, whose encoder sees a source as a bag
        of tokens; only of a model that has such.
    twins: name of a check of the group `invariance` -> checkpoints that it compares.
    untrained: names of tensors of a checkpoint that are not parameters and get no gradient.
    unmoved: regular expression over hub names -> why a tensor of that name may change and the logits stay.
    cases: the cases whose checkpoints are searched.
    also: a further case -> the checks that it is searched with, no others.
    """

    table: Callable[[Config], str]
    windows: Callable[[Config], tuple[int | None, ...]]
    tied: Callable[[Config], bool]
    claims: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: EVERY | DECODER)
    exceptions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    memory: Callable[[Config], int] | None = None
    shift: bool = False
    positions: str | None = None
    attention_output: str | None = None
    positionless: Callable[[Config, Any], tuple[Config, Any]] | None = None
    twins: Mapping[str, Twins] = dataclasses.field(default_factory=dict)
    untrained: frozenset[str] = frozenset()
    unmoved: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cases: tuple[str, ...] = ("plain", "distinct")
    also: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def of(self, case: str, config: Config) -> Claims:
        """The claims of a case: check -> dtypes."""
        which = case.split("/")[1]
        if which not in self.cases and which not in self.also:
            return {}
        claims = dict(self.claims)
        if self.tied(config):
            claims["gradients.tied"] = _DOUBLE
        if self.memory is not None:
            claims |= {"reach.memory": _DOUBLE, "gradients.memory": _DOUBLE}
        if self.shift:
            claims |= {"invariance.shift": _DOUBLE, "sensitivity.fractions": _DOUBLE}
        if self.attention_output is not None and len(set(self.windows(config))) > 1:
            claims["reach.each_layer"] = _DOUBLE
        if self.shift or self.memory is not None or (self.positions is not None and None in self.windows(config)):
            claims["invariance.weights_sum_to_one"] = _DOUBLE
        if self.positionless is not None:
            claims["causality.encoder"] = _DOUBLE
        if self.positions is not None and None in self.windows(config):
            claims["invariance.order"] = _DOUBLE
        claims |= {f"invariance.{name}": _DOUBLE for name, twins in self.twins.items() if twins.applies(config)}
        kept = {
            check: tuple(dtype for dtype in dtypes if f"{check} {dtype}" not in self.exceptions)
            for check, dtypes in claims.items()
            if not {check, f"{check} {which}"} & self.exceptions.keys() and check in self.also.get(which, (check,))
        }
        return {check: dtypes for check, dtypes in kept.items() if dtypes}


def reach(windows: tuple[int | None, ...]) -> int | None:
    """How many last tokens move the last row: 1 + Σ (window − 1) over the layers; None: all.

    Each layer sees `window` keys, its own among them, and so hands on what lies up to window − 1 tokens further back.
    """
    return None if any(w is None for w in windows) else 1 + sum(w - 1 for w in windows if w is not None)


def remembered(windows: tuple[int | None, ...], memory: int, plan: Sequence[int]) -> int:
    """Index of the first token that moves the last row of a text fed in segments of the planned sizes.

    A query sees its segment up to itself and what entered its layer for the last `memory` tokens before the segment,
    `window` keys of these at most.  What it sees there was made in the layer below, in the segment of that time, which
    saw as far back again (Dai et al. 2019, arXiv:1901.02860, section 3.2: O(N × L) for N layers and segments of L).
    With a memory of 2, two layers and segments of 3, the last of 9 tokens sees tokens 4 to 8, and token 4, of the
    segment that begins with 3, saw tokens 1 to 4: the first that counts is 1.
    """
    starts = [0, *accumulate(plan)][:-1]
    first = sum(plan) - 1
    for window in reversed(windows):
        segment = max(start for start in starts if start <= first)
        first = max(0, segment - memory, 0 if window is None else first - window + 1)
    return first
