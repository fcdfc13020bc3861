"""Mistral 7B (Jiang et al. 2023): Llama's decoder with a sliding window and grouped queries.

Oracle: `MistralForCausalLM` of Hugging Face transformers at true double precision.
"""

from functools import partial
from typing import Any

from conformance.families import Config, ConfigField, Family, Recipe, llama_like
from conformance.families.decoders import (
    CONSTANT_STATE,
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
from conformance.families.twins import NARROW_WINDOW, REPEATED_KEY_VALUES, WIDE_WINDOW, spelling
from conformance.probes import ProbeSpec

# --- configurations -------------------------------------------------------------------------------------------------

_DEFAULT_THETA = 10000.0
_DEFAULT_WINDOW = 4096


def _config(*, spelling: str | None = None, **changes: Any) -> Config:
    """A small Mistral at its defaults, then changed; the rotary settings in both spellings unless one is asked for."""
    rope = {"rope_type": "default", "rope_theta": _DEFAULT_THETA} | changes.pop("rope", {})
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 47,
        "hidden_size": 48,
        "intermediate_size": 38,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "sliding_window": _DEFAULT_WINDOW,
        "attention_dropout": 0.1,  # only in training; the suite evaluates, so a candidate that applies it fails
        "tie_word_embeddings": False,
        **rope_keys(rope, spelling),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "torch_dtype": "float32",
    } | changes


# Keys that decide the maths and that a config.json may leave out; without num_key_value_heads there would be 8.
_OPTIONAL = (
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "sliding_window", "attention_dropout",
    "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
)  # fmt: skip


def _terse() -> Config:
    return {key: value for key, value in _config().items() if key not in _OPTIONAL}


# --- cases ----------------------------------------------------------------------------------------------------------


def _field(field: str, label: str, changes: dict[str, Any], *, also: dict[str, Config] | None = None) -> Recipe:
    return field_case("mistral", field, label, _config(**changes), _config(), tensor_shapes, also=also)


_LINEAR = {"rope_type": "linear", "rope_theta": _DEFAULT_THETA, "factor": 4.0}
_BOTH_MOVED = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}


def _window_mistakes(config: Config) -> dict[str, Config]:
    """What other readings of the window give: label -> configuration."""
    window = config["sliding_window"]
    return {
        "sliding_window ignored": config | {"sliding_window": None},
        f"{window + 1} keys in the window (self not counted)": config | {"sliding_window": window + 1},
        f"{window - 1} keys in the window": config | {"sliding_window": window - 1},
    }


def _recipes() -> tuple[Recipe, ...]:
    distinct = _config(
        hidden_size=26, head_dim=10, intermediate_size=20, num_key_value_heads=3, rms_norm_eps=1e-3, sliding_window=5,
        rope={"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    )  # fmt: skip
    square = _config(hidden_size=24, intermediate_size=24, vocab_size=24, num_attention_heads=4, num_key_value_heads=4)
    window = _config(
        hidden_size=26, head_dim=8, intermediate_size=20, num_hidden_layers=3, sliding_window=5,
    )  # fmt: skip
    unlimited = _config(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=36, sliding_window=None,
    )  # fmt: skip
    return (
        Recipe(
            name="mistral/plain",
            summary="unequal sizes, every maths field at its default: what a modest engine can pass",
            config=_config(),
            weights="mistral/plain",
            claims=without(FULL, "golden.gradients"),
            store=frozenset({"blocks", "positions", "loss"}),
        ),
        Recipe(
            name="mistral/distinct",
            summary="everything at once: all sizes different, a window of 5 keys, grouped queries, linear scaling",
            config=distinct,
            weights="mistral/distinct",
            claims=FULL,
            store=frozenset({"probes", "gradients", "blocks", "positions", "loss"}),
            counterfactuals=_window_mistakes(distinct),
        ),
        Recipe(
            name="mistral/square",
            summary="all sizes equal, so that a wrong transpose loads without a shape error",
            config=square,
            weights="mistral/square",
            batch=3,
            claims=without(FULL, "golden.gradients", "golden.blocks"),
            store=frozenset({"positions", "loss"}),
        ),
        Recipe(
            name="mistral/window",
            summary="three layers, 17 tokens, a window of 5 keys: prompts and chunks longer than the window",
            config=window,
            weights="mistral/window",
            seq=17,
            claims=without(FULL, "golden.gradients", "golden.blocks", "golden.loss") | CONSTANT_STATE | PARTITION,
            store=frozenset({"positions"}),
            field="sliding_window",
            counterfactuals=_window_mistakes(window),
        ),
        Recipe(
            name="mistral/window-null",
            summary="sliding_window null: full attention",
            config=_config(sliding_window=None),
            weights="mistral/plain",
            claims=MODEST,
            field="sliding_window (null)",
        ),
        Recipe(
            name="mistral/long",
            summary="sliding_window null, 4,110 tokens, more than the default window; the last 16 rows are compared",
            config=unlimited,
            weights="mistral/long",
            batch=1,
            seq=4110,
            claims={"golden.logits": WORKING, "cache.prefill_decode": WORKING},
            last_rows=16,
            counterfactuals={"sliding_window at 4096": unlimited | {"sliding_window": _DEFAULT_WINDOW}},
        ),
        _field("rms_norm_eps", "rms_norm_eps", {"rms_norm_eps": 0.05}),
        _field("rope_theta", "rope_theta", {"rope": {"rope_theta": 100.0}}),
        _field("rope_scaling (linear)", "rope_scaling-linear", {"rope": _LINEAR}),
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
        _field("hidden_act", "hidden_act-gelu", {"hidden_act": "gelu"},
               also={"GELU in its tanh form": _config(hidden_act="gelu_pytorch_tanh")}),
        _field("hidden_act", "hidden_act-relu", {"hidden_act": "relu"}),
        _field("sliding_window", "sliding_window", {"sliding_window": 3},
               also={label: config for label, config in _window_mistakes(_config(sliding_window=3)).items()
                     if label != "sliding_window ignored"}),
        Recipe(
            name="mistral/field-absent",
            summary="plain with every key that has a default left out of config.json",
            config=_terse(),
            weights="mistral/plain",
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
    projections = llama_like.attention_projections(config) | llama_like.gated_projections(config)
    return llama_like.tensor_shapes(config, projections)


# --- probes ---------------------------------------------------------------------------------------------------------


def probes(config: Config) -> list[ProbeSpec]:
    return llama_like.probes(config, llama_like.GATED)


def module_probes(config: Config) -> dict[str, tuple[str, str]]:
    return llama_like.module_probes(config, llama_like.GATED_MODULES)


_EQUATIONS = r"""
For each block, with x (seq, hidden) the residual stream, m the position and W = sliding_window:

    n      = x / sqrt(mean(x²) + rms_norm_eps) · w                      RMSNorm, no mean subtracted
    q,k,v  = n Wqᵀ, n Wkᵀ, n Wvᵀ                                        H query heads, KV key-value heads of head_dim
    q', k' = R(m) q, R(m) k                                             pairs (i, i + head_dim/2) by m·θ^(-2i/head_dim)
    A      = softmax(q' k'ᵀ / sqrt(head_dim) + mask)                    query head h reads key-value head h // (H / KV)
    x      = x + (A v) Woᵀ
    n      = RMSNorm(x)
    x      = x + (act(n Wgateᵀ) ⊙ (n Wupᵀ)) Wdownᵀ                      SwiGLU: act = SiLU

and logits = RMSNorm(x) Wheadᵀ.  The token at i sees the W keys i - W + 1 … i, itself included; with W null, all keys
up to i.  Positions count real tokens.  Rotary pairs are half-split, as Hugging Face checkpoints store them (the
original files interleave).
"""


FAMILY = Family(
    name="mistral",
    title="Mistral",
    paper="Jiang et al. 2023, arXiv:2310.06825",
    equations=_EQUATIONS,
    oracle="MistralForCausalLM",
    fields=(
        ConfigField(name="sliding_window", default="4096", meaning="keys that a query sees, with itself; null: all"),
        ConfigField(name="rms_norm_eps", default="1e-6", meaning="ε inside the root of RMSNorm"),
        ConfigField(name="rope_theta", default="10000", meaning="base of the rotary frequencies"),
        ConfigField(name="rope_scaling", default="null", meaning="linear or llama3 stretching of the frequencies"),
        ConfigField(name="head_dim", default="hidden_size / heads", meaning="width of one attention head"),
        ConfigField(name="num_key_value_heads", default="8", meaning="key-value heads; each serves "
                    "num_attention_heads / num_key_value_heads consecutive query heads"),
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
        windows=lambda config: (config.get("sliding_window", _DEFAULT_WINDOW),) * config["num_hidden_layers"],
        tied=lambda config: bool(config.get("tie_word_embeddings", False)),
        shift=True,
        also={"field-tie_word_embeddings": ("gradients.tied",)},
        twins={"repeated_key_values": REPEATED_KEY_VALUES, "wide_window": WIDE_WINDOW,
               "narrow_window": NARROW_WINDOW, "spelling": spelling("hidden_act")},
    ),
)  # fmt: skip
