"""Mixtral (Jiang et al. 2024): Mistral's decoder with a sparse mixture of experts for its feed-forward layers.

Oracle: `MixtralForCausalLM` of Hugging Face transformers at true double precision. In memory the library fuses the
experts; checkpoints, and so all names here, hold them one by one.

Rounding may send a token to another expert, so a working dtype is claimed only where `golden make` finds the routing
margins to suffice. Two cases have token ids that were chosen one after another, each the first of a random order whose
margins are wide in both layers (and, for `unbalanced`, that keeps off one expert), with weights that allow it.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from conformance.families import Config, ConfigField, Family, Recipe, llama_like
from conformance.families.decoders import (
    FULL,
    MODEST,
    PARTITION,
    block_checkpoint,
    field_case,
    kernel_probes,
    only_in,
    rope_keys,
    without,
)
from conformance.families.properties import DECODER, EVERY, ROUTED, Properties
from conformance.families.twins import NARROW_WINDOW, ONE_EXPERT, REPEATED_KEY_VALUES, WIDE_WINDOW, spelling
from conformance.probes import ProbeSpec

# --- configurations -------------------------------------------------------------------------------------------------

_DEFAULT_THETA = 1e6
_DEFAULT_EXPERTS, _DEFAULT_CHOSEN = 8, 2


def _config(*, spelling: str | None = None, **changes: Any) -> Config:
    """A small Mixtral at its defaults, then changed; the rotary settings in both spellings unless one is asked for."""
    rope = {"rope_type": "default", "rope_theta": _DEFAULT_THETA} | changes.pop("rope", {})
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_local_experts": _DEFAULT_EXPERTS,
        "num_experts_per_tok": _DEFAULT_CHOSEN,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "attention_dropout": 0.1,  # only in training, like the next; the suite evaluates, so a candidate that applies
        "router_jitter_noise": 0.1,  # one of them fails
        "tie_word_embeddings": False,
        **rope_keys(rope, spelling),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "torch_dtype": "float32",
    } | changes


# Keys that decide the maths and that a config.json may leave out; without num_key_value_heads there would be 8.
_OPTIONAL = (
    "num_local_experts", "num_experts_per_tok", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "sliding_window", "attention_dropout", "router_jitter_noise", "tie_word_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters",
)  # fmt: skip


def _terse() -> Config:
    return {key: value for key, value in _config().items() if key not in _OPTIONAL}


# --- cases ----------------------------------------------------------------------------------------------------------

_FINE = ("float64", "float32")
_MODEST, _FULL = only_in(_FINE, MODEST), only_in(_FINE, FULL)
# Found by trial, see above.
_PLAIN = "mixtral/plain-e"
_PLAIN_IDS = (
    (44, 20, 20, 42, 39, 13, 9, 13, 20, 54, 54),
    (24, 9, 18, 19, 0, 53, 47, 45, 45, 9, 8),
    (24, 12, 14, 16, 18, 18, 39, 34, 21, 8, 28),
    (21, 21, 26, 26, 46, 14, 19, 46, 26, 21, 7),
)
_UNBALANCED_IDS = (
    (13, 7, 26, 52, 3, 10, 22, 1, 24, 42, 24),
    (13, 42, 52, 52, 21, 39, 9, 9, 30, 9, 36),
    (13, 13, 13, 18, 13, 7, 39, 13, 18, 13, 47),
)


def _field(field: str, label: str, changes: dict[str, Any], *, also: dict[str, Config] | None = None) -> Recipe:
    config = _config(**changes)
    recipe = field_case("mixtral", field, label, config, _config(), tensor_shapes, also=also)
    return replace(recipe, weights=_PLAIN, claims={**recipe.claims, **_MODEST})


_LINEAR = {"rope_type": "linear", "rope_theta": _DEFAULT_THETA, "factor": 4.0}
_BOTH_MOVED = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}


def _recipes() -> tuple[Recipe, ...]:
    distinct = _config(
        hidden_size=26, head_dim=14, intermediate_size=16, vocab_size=47, num_key_value_heads=3,
        rms_norm_eps=1e-3, sliding_window=5, num_local_experts=5,
        rope={"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    )  # fmt: skip
    square = _config(
        hidden_size=24, intermediate_size=24, vocab_size=24, num_attention_heads=4, num_key_value_heads=4,
        num_local_experts=4,
    )  # fmt: skip
    few = _config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=12, num_local_experts=5
    )
    eleven = _config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=6, num_local_experts=11,
        num_experts_per_tok=3, vocab_size=37,
    )  # fmt: skip
    return (
        Recipe(
            name="mixtral/plain",
            summary="unequal sizes, every maths field at its default: what a modest engine can pass",
            config=_config(),
            weights=_PLAIN,
            input_ids=_PLAIN_IDS,
            claims=without(FULL, "golden.gradients"),
            store=frozenset({"blocks", "positions", "loss"}),
        ),
        Recipe(
            name="mixtral/distinct",
            summary="everything at once: all sizes different, 2 of 5 experts, a window, grouped queries, scaling",
            config=distinct,
            weights="mixtral/distinct",
            claims=_FULL | PARTITION | {"golden.auxiliary_losses": ("float64",)},
            store=frozenset({"probes", "gradients", "blocks", "positions", "loss", "auxiliary"}),
            counterfactuals={"sliding_window ignored": distinct | {"sliding_window": None}},
        ),
        Recipe(
            name="mixtral/square",
            summary="all sizes equal, so that a wrong transpose loads without a shape error",
            config=square,
            weights="mixtral/square",
            batch=3,
            claims=without(_FULL, "golden.gradients", "golden.blocks"),
            store=frozenset({"positions", "loss"}),
        ),
        Recipe(
            name="mixtral/unbalanced",
            summary="2 of 5 experts: in layer 1 no token goes to expert 0, and every one to expert 3",
            config=few,
            weights="mixtral/unbalanced-0",
            batch=3,
            input_ids=_UNBALANCED_IDS,
            claims=MODEST | {"golden.logits": FULL["golden.logits"]},
        ),
        Recipe(
            name="mixtral/eleven-experts",
            summary="3 of 11 experts: sorted as strings, 10 comes before 2",
            config=eleven,
            weights="mixtral/eleven-experts",
            claims=_MODEST,
        ),
        _field("num_experts_per_tok", "num_experts_per_tok", {"num_experts_per_tok": 3}),
        _field("num_local_experts", "num_local_experts", {"num_local_experts": 5}),
        _field("sliding_window", "sliding_window", {"sliding_window": 3},
               also={"4 keys in the window (self not counted)": _config(sliding_window=4),
                     "2 keys in the window": _config(sliding_window=2)}),
        _field("rms_norm_eps", "rms_norm_eps", {"rms_norm_eps": 0.05}),
        _field("rope_theta", "rope_theta", {"rope": {"rope_theta": 100.0}},
               also={"rope_theta at 10,000": _config(rope={"rope_theta": 10000.0})}),
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
        Recipe(
            name="mixtral/field-absent",
            summary="plain with every key that has a default left out of config.json",
            config=_terse(),
            weights=_PLAIN,
            claims=_MODEST,
            field="absent keys",
            counterfactuals={
                "rope_theta at 10,000": _config(rope={"rope_theta": 10000.0}),
                "rms_norm_eps at 1e-6": _config(rms_norm_eps=1e-6),
                "tie_word_embeddings taken for true": _config(tie_word_embeddings=True),
            },
        ),
        _field("tie_word_embeddings", "tie_word_embeddings", {"tie_word_embeddings": True}),
    )  # fmt: skip


# --- checkpoint -----------------------------------------------------------------------------------------------------


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Hub name -> shape of everything a checkpoint holds (no lm_head when it is tied)."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    experts = config.get("num_local_experts", _DEFAULT_EXPERTS)
    projections = llama_like.attention_projections(config)
    projections["block_sparse_moe.gate"] = (experts, hidden, False)
    for expert in range(experts):
        for matrix, shape in {"w1": (ffn, hidden), "w2": (hidden, ffn), "w3": (ffn, hidden)}.items():
            projections[f"block_sparse_moe.experts.{expert}.{matrix}"] = (*shape, False)
    return llama_like.tensor_shapes(config, projections)


# --- probes ---------------------------------------------------------------------------------------------------------

_SPARSE: llama_like.FeedForward = {
    "router_logits": (("batch", "seq", "expert"), ("norm",)),
    "routing_weights": (("batch", "seq", "choice"), ("router_logits",)),
    "expert_outputs": (("batch", "seq", "choice", "hidden"), ("norm", "router_logits")),
    "output": (llama_like.STREAM, ("routing_weights", "expert_outputs")),
}


def probes(config: Config) -> list[ProbeSpec]:
    return llama_like.probes(config, _SPARSE)


def probe_sizes(config: Config, batch: int, seq: int) -> dict[str, int]:
    """Axis name -> size; `choice` counts a token's experts, the heaviest first."""
    return llama_like.probe_sizes(config, batch, seq) | {
        "expert": config.get("num_local_experts", _DEFAULT_EXPERTS),
        "choice": config.get("num_experts_per_tok", _DEFAULT_CHOSEN),
    }


def module_probes(config: Config) -> dict[str, tuple[str, str]]:
    feed_forward = {
        "router_logits": ("block_sparse_moe.gate", "output"),
        "output": ("block_sparse_moe", "output"),
    }
    return llama_like.module_probes(config, feed_forward)


def _kernel_probes(config: Config) -> dict[str, tuple[str, str]]:
    experts = {
        f"layers.{layer}.feed_forward.{probe}": (f"model.layers.{layer}.block_sparse_moe.{path}", probe)
        for layer in range(config["num_hidden_layers"])
        for probe, path in {"routing_weights": "weights", "expert_outputs": "expert_outputs"}.items()
    }
    return kernel_probes(config) | experts


_EQUATIONS = r"""
For each block, with x (seq, hidden) the residual stream and m the position:

    n      = x / sqrt(mean(x²) + rms_norm_eps) · w                      RMSNorm, no mean subtracted
    q,k,v  = n Wqᵀ, n Wkᵀ, n Wvᵀ                                        H query heads, KV key-value heads of head_dim
    q', k' = R(m) q, R(m) k                                             pairs (i, i + head_dim/2) by m·θ^(-2i/head_dim)
    A      = softmax(q' k'ᵀ / sqrt(head_dim) + mask)                    query head h reads key-value head h // (H / KV)
    x      = x + (A v) Woᵀ
    n      = RMSNorm(x)
    g      = softmax over the k largest of n Wgateᵀ                     E router logits; in float32
    x      = x + Σ g_e (act(n W1_eᵀ) ⊙ (n W3_eᵀ)) W2_eᵀ                 over the k chosen experts e; act = SiLU

and logits = RMSNorm(x) Wheadᵀ.  Softmax over all E, then the k largest divided by their sum, is the same g.  There is
no capacity: no token is dropped.  With sliding_window W the token at i sees the W keys i - W + 1 … i; with null, all
up to i.  Positions count real tokens.  Rotary pairs are half-split, as Hugging Face checkpoints store them.
"""


FAMILY = Family(
    name="mixtral",
    title="Mixtral",
    paper="Jiang et al. 2024, arXiv:2401.04088",
    equations=_EQUATIONS,
    oracle="MixtralForCausalLM",
    fields=(
        ConfigField(name="num_local_experts", default="8", meaning="experts in a block"),
        ConfigField(name="num_experts_per_tok", default="2", meaning="experts that a token is sent to"),
        ConfigField(name="sliding_window", default="null", meaning="keys that a query sees, with itself; null: all"),
        ConfigField(name="rms_norm_eps", default="1e-5", meaning="ε inside the root of RMSNorm"),
        ConfigField(name="rope_theta", default="1000000", meaning="base of the rotary frequencies"),
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
    probe_sizes=probe_sizes,
    module_probes=module_probes,
    kernel_probes=_kernel_probes,
    block_checkpoint=partial(block_checkpoint, final_norm="model.norm"),
    oracle_class="conformance.oracles.mixtral:Mixtral",
    oracle_settings={"experts_implementation": "eager"},
    properties=Properties(
        table=lambda config: "model.embed_tokens.weight",
        windows=lambda config: (config.get("sliding_window"),) * config["num_hidden_layers"],
        tied=lambda config: bool(config.get("tie_word_embeddings", False)),
        shift=True,
        also={"field-tie_word_embeddings": ("gradients.tied",)},
        twins={"repeated_key_values": REPEATED_KEY_VALUES, "wide_window": WIDE_WINDOW, "one_expert": ONE_EXPERT,
               "narrow_window": NARROW_WINDOW, "spelling": spelling("hidden_act")},
        exceptions=ROUTED,
        claims=EVERY | DECODER | {"gradients.auxiliary": ("float64",)},
    ),
)  # fmt: skip
