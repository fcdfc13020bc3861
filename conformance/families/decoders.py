"""What the decoder families share: claims, field cases, spellings of config keys, one-layer checkpoints."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from conformance.families import Config, Recipe

if TYPE_CHECKING:
    from torch import Tensor

Claims = dict[str, tuple[str, ...]]

WORKING = ("float64", "float32", "bfloat16")
# What every case claims: a full forward, padding, decoding.
MODEST: Claims = {
    "golden.logits": WORKING,
    "golden.left_padding": ("float64", "float32"),
    "golden.right_padding": ("float64", "float32"),
    "cache.prefill_decode": ("float64", "float32"),
    "cache.one_by_one": ("float64",),
    "cache.chunks": ("float64", "float32"),
    "cache.ragged": ("float64", "float32"),
}
# What one case of the family claims beside; it must store positions, loss, blocks and gradients.
FULL: Claims = MODEST | {
    "golden.logits": (*WORKING, "float16"),
    "golden.positions": ("float64",),
    "golden.loss": ("float64",),
    "golden.blocks": ("float64", "float32"),
    "golden.gradients": ("float64",),
    "packed.logits": ("float64", "float32"),
    "packed.isolation": ("float64",),
}
# What a case with more tokens than two of its windows claims beside; no dtype decides it.
CONSTANT_STATE: Claims = {"cache.constant_state": ("float32",)}

# What one case of the family claims beside, the one with the most blocks.
PARTITION: Claims = {"partition.bit_equal": ("float64", "float32")}


def without(claims: Claims, *checks: str) -> Claims:
    return {check: dtypes for check, dtypes in claims.items() if check not in checks}


def only_in(dtypes: tuple[str, ...], claims: Claims) -> Claims:
    """The claims in these dtypes alone."""
    return {check: tuple(d for d in claimed if d in dtypes) for check, claimed in claims.items()}


def field_case(
    family: str,
    field: str,
    label: str,
    config: Config,
    plain: Config,
    tensor_shapes: Callable[[Config], dict[str, tuple[int, ...]]],
    *,
    also: Mapping[str, Config] | None = None,
) -> Recipe:
    """`plain` with one field moved.  Where a candidate that ignores the field could load the checkpoint, the first
    counterfactual is the field ignored, that is `plain` itself; `also` adds further ones.

    A tensor that is in the file and not read (an ignored bias) does not stop it; one of another shape does.
    """
    shapes, plain_shapes = tensor_shapes(config), tensor_shapes(plain)
    loads = all(shapes.get(name) == shape for name, shape in plain_shapes.items())
    return Recipe(
        name=f"{family}/field-{label}",
        summary=f"plain with {field} moved",
        config=config,
        weights=f"{family}/plain",
        claims=MODEST | (CONSTANT_STATE if field == "sliding_window" else {}),
        field=field,
        counterfactuals=({f"{field} ignored": plain} if loads else {}) | dict(also or {}),
    )


# --- configurations -------------------------------------------------------------------------------------------------

# Where transformers keeps what rotary positions need; what reads one spelling silently ignores the other.
SPELLINGS = {"4.x": ("rope_theta", "rope_scaling", "partial_rotary_factor"), "5.x": ("rope_parameters",)}


def rope_keys(rope: Mapping[str, Any], spelling: str | None = None) -> Config:
    """The keys of config.json that say `rope` = {rope_type, rope_theta, …}, in both spellings unless one is asked for.

    transformers 4.x wrote rope_theta, rope_scaling and partial_rotary_factor, 5.x writes rope_parameters.
    """
    apart = {key: value for key, value in rope.items() if key in ("rope_theta", "partial_rotary_factor")}
    scaling = {key: value for key, value in rope.items() if key not in apart}
    keys = apart | {
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": dict(rope),
    }
    return {key: value for key, value in keys.items() if spelling is None or key in SPELLINGS[spelling]}


def kv_heads(config: Config) -> int:
    """Key-value heads; as many as query heads where the file says nothing."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


# --- one block alone ------------------------------------------------------------------------------------------------


def block_checkpoint(
    config: Config, weights: "dict[str, Tensor]", block_input: "Tensor", layer: int, *, final_norm: str
) -> "tuple[Config, dict[str, Tensor]]":
    """A one-layer checkpoint that feeds `block_input` (batch, seq, hidden) to block `layer` alone.

    Its embedding table is the block's input, one row a token of the batch, so that arange(batch · seq) as ids looks
    it up; block `layer` becomes layer 0; the norm called `final_norm` and the head are kept, the head with as many rows
    as there are ids: the first ones, or all of them over and over.
    """
    import torch

    rows = block_input.flatten(0, 1)
    head = {"lm_head.weight": weights.get("lm_head.weight", weights["model.embed_tokens.weight"])}
    if "lm_head.bias" in weights:
        head["lm_head.bias"] = weights["lm_head.bias"]
    one = {
        name.replace(f"layers.{layer}.", "layers.0."): tensor
        for name, tensor in weights.items()
        if f"layers.{layer}." in name or name.startswith(f"{final_norm}.")
    }
    one |= {name: tensor[torch.arange(len(rows)) % len(tensor)] for name, tensor in head.items()}
    one |= {"model.embed_tokens.weight": rows.contiguous()}
    return config | {"num_hidden_layers": 1, "vocab_size": len(rows), "tie_word_embeddings": False}, one


# --- probes ---------------------------------------------------------------------------------------------------------


def kernel_probes(config: Config) -> dict[str, tuple[str, str]]:
    """Probe -> (layer's module path as the reference names it, what the attention kernel calls the value)."""
    return {
        f"layers.{layer}.attention.{probe}": (f"model.layers.{layer}.self_attn.{probe}", quantity)
        for layer in range(config["num_hidden_layers"])
        for probe, quantity in {
            "query_rotated": "query", "key_rotated": "key", "scores": "scores", "weights": "weights",
        }.items()
    }  # fmt: skip
