"""Llama-1 and Llama-2 (Touvron et al. 2023): pre-norm with RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Oracle: `LlamaForCausalLM` of Hugging Face transformers at true double precision.
"""

from functools import partial
from typing import Any

from conformance.families import Config, ConfigField, Family, Recipe, llama_like
from conformance.families.decoders import (
    FULL,
    MODEST,
    PARTITION,
    WORKING,
    block_checkpoint,
    field_case,
    kernel_probes,
    rope_keys,
    without,
)
from conformance.families.properties import Properties
from conformance.families.twins import REPEATED_KEY_VALUES, spelling
from conformance.probes import ProbeSpec

# --- configurations -------------------------------------------------------------------------------------------------

_DEFAULT_THETA = 10000.0


def _config(*, spelling: str | None = None, **changes: Any) -> Config:
    """A small Llama at its defaults, then changed; the rotary settings in both spellings unless one is asked for."""
    rope = {"rope_type": "default", "rope_theta": _DEFAULT_THETA} | changes.pop("rope", {})
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.1,  # only in training; the suite evaluates, so a candidate that applies it fails
        "tie_word_embeddings": False,
        **rope_keys(rope, spelling),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "torch_dtype": "float32",
    } | changes


# Keys that decide the maths and that a config.json may leave out.
_OPTIONAL = (
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias", "mlp_bias", "attention_dropout",
    "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
)  # fmt: skip


def _terse() -> Config:
    return {key: value for key, value in _config().items() if key not in _OPTIONAL}


# --- cases ----------------------------------------------------------------------------------------------------------


def _field(field: str, label: str, changes: dict[str, Any], *, also: dict[str, Config] | None = None) -> Recipe:
    return field_case("llama", field, label, _config(**changes), _config(), tensor_shapes, also=also)


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 6.0,
    "low_freq_factor": 1.25,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}
_LINEAR = {"rope_type": "linear", "rope_theta": _DEFAULT_THETA, "factor": 4.0}
_BOTH_MOVED = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}


def _recipes() -> tuple[Recipe, ...]:
    distinct = _config(
        hidden_size=42, head_dim=10, num_key_value_heads=3, rms_norm_eps=1e-3, attention_bias=True, mlp_bias=True,
        rope=_LLAMA3,
    )  # fmt: skip
    square = _config(hidden_size=24, intermediate_size=24, vocab_size=24, num_attention_heads=4)
    llama3_fields = {
        f"{key} at {value:g}": _config(rope=_LLAMA3 | {key: value})
        for key, value in {
            "rope_theta": _DEFAULT_THETA,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }.items()
    }
    return (
        Recipe(
            name="llama/plain",
            summary="unequal sizes, every maths field at its default: what a modest engine can pass",
            config=_config(),
            weights="llama/plain",
            claims=without(FULL, "golden.gradients"),
            store=frozenset({"blocks", "positions", "loss"}),
        ),
        Recipe(
            name="llama/distinct",
            summary="everything at once: all sizes different, grouped-query attention, biases, llama3 scaling",
            config=distinct,
            weights="llama/distinct",
            claims=FULL,
            store=frozenset({"probes", "gradients", "blocks", "positions", "loss"}),
        ),
        Recipe(
            name="llama/large",
            summary="a residual stream whose squares overflow float16: norms are computed in float32",
            config=_config(),
            weights="llama/plain",
            scaled={"o_proj.weight": 256.0},
            claims={"golden.logits": ("float64", "float16")},
        ),
        Recipe(
            name="llama/square",
            summary="all sizes equal, so that a wrong transpose loads without a shape error",
            config=square,
            weights="llama/square",
            batch=3,
            claims=without(FULL, "golden.gradients", "golden.blocks"),
            store=frozenset({"positions", "loss"}),
        ),
        Recipe(
            name="llama/mha",
            summary="Llama-1: multi-head attention, no num_key_value_heads in the file",
            config=_config(hidden_size=40, num_attention_heads=5, intermediate_size=44, num_hidden_layers=3),
            weights="llama/mha",
            claims=without(FULL, "golden.gradients", "golden.blocks") | PARTITION,
            store=frozenset({"positions", "loss"}),
        ),
        Recipe(
            name="llama/mqa",
            summary="multi-query attention: one key-value head",
            config=_config(num_key_value_heads=1),
            weights="llama/plain",
            claims=without(FULL, "golden.gradients", "golden.blocks"),
            store=frozenset({"positions", "loss"}),
        ),
        Recipe(
            name="llama/long",
            summary="2,060 tokens in one row: positions past 2,000; the last 16 rows are compared",
            config=_config(hidden_size=32, num_attention_heads=2, intermediate_size=36, num_key_value_heads=1),
            weights="llama/long",
            batch=1,
            seq=2060,
            claims={"golden.logits": WORKING, "cache.prefill_decode": WORKING},
            last_rows=16,
        ),
        _field("rms_norm_eps", "rms_norm_eps", {"rms_norm_eps": 0.05}),
        _field("rope_theta", "rope_theta", {"rope": {"rope_theta": 100.0}}),
        _field("rope_scaling (linear)", "rope_scaling-linear", {"rope": _LINEAR}),
        _field(
            "rope_scaling (llama3)", "rope_scaling-llama3", {"rope": _LLAMA3},
            also={"rope_scaling ignored, rope_theta read": _config(rope={"rope_theta": 100.0})} | llama3_fields,
        ),
        _field(
            "rope_parameters (5.x spelling)", "rope_parameters-only", {"rope": _BOTH_MOVED, "spelling": "5.x"},
            also={"the scaling ignored": _config(rope={"rope_theta": 100.0})},
        ),
        _field(
            "rope_theta and rope_scaling (4.x spelling)", "rope_theta-rope_scaling-only",
            {"rope": _BOTH_MOVED, "spelling": "4.x"},
            also={"rope_scaling ignored": _config(rope={"rope_theta": 100.0})},
        ),
        _field("head_dim", "head_dim", {"head_dim": 10}),
        _field("num_key_value_heads", "num_key_value_heads", {"num_key_value_heads": 3}),
        _field("attention_bias", "attention_bias", {"attention_bias": True}),
        _field("mlp_bias", "mlp_bias", {"mlp_bias": True}),
        _field("hidden_act", "hidden_act-gelu", {"hidden_act": "gelu"},
               also={"GELU in its tanh form": _config(hidden_act="gelu_pytorch_tanh")}),
        _field("hidden_act", "hidden_act-gelu_pytorch_tanh", {"hidden_act": "gelu_pytorch_tanh"},
               also={"GELU in its exact form": _config(hidden_act="gelu")}),
        _field("hidden_act", "hidden_act-relu", {"hidden_act": "relu"}),
        Recipe(
            name="llama/field-absent",
            summary="plain with every key that has a default left out of config.json",
            config=_terse(),
            weights="llama/plain",
            claims=MODEST,
            field="absent keys",
            counterfactuals={
                "tie_word_embeddings taken for true": _config(tie_word_embeddings=True),
                "rms_norm_eps at 1e-5": _config(rms_norm_eps=1e-5),
            },
        ),
        _field("tie_word_embeddings", "tie_word_embeddings", {"tie_word_embeddings": True}),
    )  # fmt: skip


# --- checkpoint -----------------------------------------------------------------------------------------------------


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Hub name -> shape of everything a checkpoint holds (no lm_head when it is tied)."""
    attention = llama_like.attention_projections(config, bias=config.get("attention_bias", False))
    feed_forward = llama_like.gated_projections(config, bias=config.get("mlp_bias", False))
    return llama_like.tensor_shapes(config, attention | feed_forward)


# --- probes ---------------------------------------------------------------------------------------------------------


def probes(config: Config) -> list[ProbeSpec]:
    return llama_like.probes(config, llama_like.GATED)


def module_probes(config: Config) -> dict[str, tuple[str, str]]:
    return llama_like.module_probes(config, llama_like.GATED_MODULES)


_EQUATIONS = r"""
For each block, with x (seq, hidden) the residual stream and m the position:

    n      = x / sqrt(mean(x²) + rms_norm_eps) · w                      RMSNorm, no mean subtracted
    q,k,v  = n Wqᵀ, n Wkᵀ, n Wvᵀ  (+ biases)                            H query heads, KV key-value heads of head_dim
    q', k' = R(m) q, R(m) k                                             pairs (i, i + head_dim/2) by m·θ^(-2i/head_dim)
    A      = softmax(q' k'ᵀ / sqrt(head_dim) + causal mask)             query head h reads key-value head h // (H / KV)
    x      = x + (A v) Woᵀ
    n      = RMSNorm(x)
    x      = x + (act(n Wgateᵀ) ⊙ (n Wupᵀ)) Wdownᵀ                      SwiGLU: act = SiLU

and logits = RMSNorm(x) Wheadᵀ.  Positions count real tokens.  Rotary pairs are half-split, as Hugging Face checkpoints
store them (Meta's originals interleave).
"""


FAMILY = Family(
    name="llama",
    title="Llama-1 and Llama-2",
    paper="Touvron et al. 2023, arXiv:2302.13971 and arXiv:2307.09288",
    equations=_EQUATIONS,
    oracle="LlamaForCausalLM",
    fields=(
        ConfigField(name="rms_norm_eps", default="1e-6", meaning="ε inside the root of RMSNorm"),
        ConfigField(name="rope_theta", default="10000", meaning="base of the rotary frequencies"),
        ConfigField(name="rope_scaling", default="null", meaning="linear or llama3 stretching of the frequencies"),
        ConfigField(name="head_dim", default="hidden_size / heads", meaning="width of one attention head"),
        ConfigField(name="num_key_value_heads", default="num_attention_heads", meaning="key-value heads; each serves "
                    "num_attention_heads / num_key_value_heads consecutive query heads"),
        ConfigField(name="attention_bias", default="false", meaning="biases on the q, k, v and o projections"),
        ConfigField(name="mlp_bias", default="false", meaning="biases on the gate, up and down projections"),
        ConfigField(name="hidden_act", default="silu", meaning="activation of the gate"),
        ConfigField(name="tie_word_embeddings", default="false", meaning="the head is the embedding table"),
    ),
    recipes=_recipes(),
    tensor_shapes=tensor_shapes,
    probes=probes,
    probe_sizes=llama_like.probe_sizes,
    module_probes=module_probes,
    kernel_probes=kernel_probes,
    block_checkpoint=partial(block_checkpoint, final_norm="model.norm"),
    properties=Properties(
        table=lambda config: "model.embed_tokens.weight",
        windows=lambda config: (None,) * config["num_hidden_layers"],
        tied=lambda config: bool(config.get("tie_word_embeddings", False)),
        shift=True,
        also={"field-tie_word_embeddings": ("gradients.tied",)},
        twins={"repeated_key_values": REPEATED_KEY_VALUES, "spelling": spelling("hidden_act")},
    ),
)  # fmt: skip
