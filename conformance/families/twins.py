"""Pairs of checkpoints that compute the same: properties of the maths, said of whole models.

Each is a `Twins` for `Properties.twins`, under the name of the check of group `invariance` that compares them.
"""

import re
from collections.abc import Callable
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


def _narrow(config: Config, weights: "Weights", most: int) -> "tuple[Checkpoint, Checkpoint]":
    """A window of 1, where a query has no choice: once with the queries as they are, once with others."""
    other = {name: tensor * -2 for name, tensor in weights.items() if re.search(r"\.q_proj\.", name)}
    config = config | {"sliding_window": 1}
    return (config, weights), (config, weights | other)


NARROW_WINDOW = Twins(applies=lambda config: True, make=_narrow)


def _unclamped(config: Config, weights: "Weights", most: int) -> "tuple[Checkpoint, Checkpoint]":
    return (config | {"clamp_len": 0}, weights), (config | {"clamp_len": -1}, weights)


# Transformer-XL's distances are all told apart by a clamp_len of 0, or of less.
NO_CLAMP = Twins(applies=lambda config: True, make=_unclamped)

# Names of activations that mean the same function.
_SYNONYMS = {"silu": "swish", "gelu_new": "gelu_pytorch_tanh"}


def _spelt(act: str, *, rope: bool = True) -> "Callable[[Config, Weights, int], tuple[Checkpoint, Checkpoint]]":
    """The activation by its other name, and a scaling of positions with `type` for `rope_type`, as old files have it.

    act: the key of the activation.
    """

    def make(config: Config, weights: "Weights", most: int) -> "tuple[Checkpoint, Checkpoint]":
        old: Config = {act: _SYNONYMS.get(config[act], config[act])}
        if rope:
            config = {name: value for name, value in config.items() if name != "rope_parameters"}
            config |= {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}
            old |= {"rope_scaling": {"type": "linear", "factor": 2.5}}
        return (config, weights), (config | old, weights)

    return make


def spelling(act: str, *, rope: bool = True) -> Twins:
    """What config.json says, said in two ways."""
    return Twins(applies=lambda config: rope or config[act] in _SYNONYMS, make=_spelt(act, rope=rope))


def _deeper(config: Config, weights: "Weights", most: int) -> "tuple[Checkpoint, Checkpoint]":
    """Scores of block n divided by n + 1 at run time, of queries that are so many times as large; four blocks.

    With the other switches where they seldom are: no division by √Dh, scores in float32.
    """
    copied: Weights = {name: tensor for name, tensor in weights.items() if ".h." not in name}
    larger: Weights = {}
    for block in range(4):
        for name, tensor in weights.items():
            if (found := re.match(r"(.*\.h\.)(\d+)(\..*)", name)) and int(found[2]) == block % config["n_layer"]:
                copied[f"{found[1]}{block}{found[3]}"] = tensor.clone()
    for name, tensor in copied.items():
        if found := re.search(r"\.h\.(\d+)\.attn\.c_attn\.(weight|bias)$", name):
            queries = tensor.shape[-1] // 3
            larger[name] = tensor.clone()
            larger[name][..., :queries] *= 1 + int(found[1])
    deep = config | {"n_layer": 4, "scale_attn_weights": False, "reorder_and_upcast_attn": True}
    plain, divided = (deep | {"scale_attn_by_inverse_layer_idx": flag} for flag in (False, True))
    return (plain, copied), (divided, copied | larger)


LAYER_SCALE = Twins(applies=lambda config: True, make=_deeper)


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
