"""Pairs of checkpoints that compute the same: properties of the maths, said of whole models.

Each is a `Twins` for `Properties.twins`, under the name of the check of group `invariance` that compares them.
"""

import re
from typing import TYPE_CHECKING

from conformance.families import Config
from conformance.families.decoders import kv_heads
from conformance.families.properties import Twins

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[str, Tensor]
    Checkpoint = tuple[Config, Weights]


def _repeated(config: Config, weights: "Weights", most: int) -> "tuple[Checkpoint, Checkpoint]":
    """Every query head gets a copy of the key and value head that it shares."""
    heads, shared = config["num_attention_heads"], kv_heads(config)
    repeated = {
        name: tensor.unflatten(0, (shared, -1)).repeat_interleave(heads // shared, dim=0).flatten(0, 1).contiguous()
        for name, tensor in weights.items()
        if re.search(r"\.[kv]_proj\.(weight|bias)$", name)
    }
    return (config, weights), (config | {"num_key_value_heads": heads}, weights | repeated)


REPEATED_KEY_VALUES = Twins(
    applies=lambda config: kv_heads(config) < config["num_attention_heads"],
    make=_repeated,
)


def _wide(config: Config, weights: "Weights", most: int) -> "tuple[Checkpoint, Checkpoint]":
    return (config | {"sliding_window": None}, weights), (config | {"sliding_window": most}, weights)


# `sliding_window` without one is null.
WIDE_WINDOW = Twins(applies=lambda config: True, make=_wide)


def _one(config: Config, weights: "Weights", most: int) -> "tuple[Checkpoint, Checkpoint]":
    """Expert 0 in the place of every expert, and expert 0 alone."""
    same, one = {}, {}
    for name, tensor in weights.items():
        first = re.sub(r"experts\.\d+\.", "experts.0.", name)
        same[name] = weights[first].clone()
        if first == name:
            one[name] = tensor[:1].contiguous() if name.endswith("block_sparse_moe.gate.weight") else tensor
    return (config, same), (config | {"num_local_experts": 1, "num_experts_per_tok": 1}, one)


ONE_EXPERT = Twins(applies=lambda config: True, make=_one)
