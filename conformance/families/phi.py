"""Phi-1, Phi-1.5 and Phi-2: parallel blocks with one LayerNorm, partial rotary positions, biases everywhere.

Oracle: `PhiForCausalLM` of Hugging Face transformers at true double precision.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from conformance.families import Config, ConfigField, Family, Recipe
from conformance.families.decoders import (
    FULL,
    MODEST,
    PARTITION,
    WORKING,
    block_checkpoint,
    field_case,
    kernel_probes,
    kv_heads,
    rope_keys,
    without,
)  # fmt: skip
from conformance.families.properties import Properties
from conformance.families.twins import REPEATED_KEY_VALUES, spelling
from conformance.probes import ProbeSpec

# --- configurations -------------------------------------------------------------------------------------------------

_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def _config(*, spelling: str | None = None, **changes: Any) -> Config:
    """A small Phi at its defaults, then changed.

    `rope` = {rope_type, rope_theta, partial_rotary_factor, …} is written in both spellings unless one is asked for.
    """
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "vocab_size": 37,
        "hidden_size": 48,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "qk_layernorm": False,
        # only in training; the suite evaluates, so a candidate that applies them fails
        "attention_dropout": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "tie_word_embeddings": False,
        **rope_keys(_DEFAULT_ROPE | changes.pop("rope", {}), spelling),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "torch_dtype": "float32",
    } | changes


# Keys that decide the maths and that a config.json may leave out.
_OPTIONAL = (
    "hidden_act", "max_position_embeddings", "layer_norm_eps", "qk_layernorm", "attention_dropout", "embd_pdrop",
    "resid_pdrop", "tie_word_embeddings", "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters",
)  # fmt: skip


def _terse() -> Config:
    return {key: value for key, value in _config().items() if key not in _OPTIONAL}


def _head_dim(config: Config) -> int:
    return int(config["hidden_size"] // config["num_attention_heads"])


# --- cases ----------------------------------------------------------------------------------------------------------


def _field(field: str, label: str, changes: dict[str, Any], *, also: dict[str, dict[str, Any]] | None = None) -> Recipe:
    """`plain` with a field moved; `also`: label -> the changes that a mistaken candidate effectively makes."""
    others = {mistake: _config(**effective) for mistake, effective in (also or {}).items()}
    recipe = field_case("phi", field, label, _config(**changes), _config(), tensor_shapes, also=others)
    return replace(recipe, batch=3)


# 0.72 of a head of 12 is 8.64 elements: 8 turn.
_FACTOR = {"partial_rotary_factor": 0.72}
_LINEAR = {"rope_type": "linear", "factor": 4.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 6.0,
    "low_freq_factor": 1.25,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 60,  # 24 would leave no pair between the thresholds
}
_ALL_MOVED = _LINEAR | _FACTOR | {"rope_theta": 100.0}
_WHOLE_HEAD: dict[str, Any] = {"rope": {"partial_rotary_factor": 1.0}}


def _recipes() -> tuple[Recipe, ...]:
    sizes: dict[str, Any] = {
        "hidden_size": 60,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 34,
    }
    eight_of_ten = {"partial_rotary_factor": 0.8}
    distinct = _config(
        **sizes, layer_norm_eps=1e-3, qk_layernorm=True, hidden_act="gelu",
        rope=_LINEAR | eight_of_ten | {"rope_theta": 100.0},
    )  # fmt: skip
    square = _config(hidden_size=24, intermediate_size=24, vocab_size=24, num_attention_heads=2)
    return (
        Recipe(
            name="phi/plain",
            summary="unequal sizes, every maths field at its default: what a modest engine can pass",
            config=_config(),
            weights="phi/plain",
            batch=3,
            claims=without(FULL, "golden.gradients"),
            store=frozenset({"blocks", "positions", "loss"}),
            counterfactuals={
                "the whole head turned": _config(**_WHOLE_HEAD),
                "GELU in its exact form": _config(hidden_act="gelu"),
            },
        ),
        Recipe(
            name="phi/distinct",
            summary="everything at once: all sizes different, grouped queries, qk_layernorm, scaled partial rotary",
            config=distinct,
            weights="phi/distinct",
            batch=3,
            seq=9,
            claims=FULL | PARTITION,
            store=frozenset({"probes", "gradients", "blocks", "positions", "loss"}),
            counterfactuals={"GELU in its tanh form": distinct | {"hidden_act": "gelu_new"}},
        ),
        Recipe(
            name="phi/large",
            summary="a residual stream whose squares overflow float16: norms are computed in float32",
            config=_config(),
            weights="phi/plain",
            batch=3,
            scaled={"dense.weight": 256.0},
            claims={"golden.logits": ("float64", "float16")},
        ),
        Recipe(
            name="phi/square",
            summary="all sizes equal, so that a wrong transpose loads without a shape error",
            config=square,
            weights="phi/square",
            batch=3,
            claims=without(FULL, "golden.gradients", "golden.blocks"),
            store=frozenset({"positions", "loss"}),
        ),
        Recipe(
            name="phi/gqa",
            summary="grouped-query attention, 3 query heads a key-value head, without what distinct adds to it",
            config=_config(**sizes, rope=eight_of_ten),
            weights="phi/distinct",
            batch=3,
            claims=MODEST,
        ),
        Recipe(
            name="phi/long",
            summary="2,060 tokens in one row: positions past 2,000; the last 16 rows are compared",
            config=_config(hidden_size=24, num_attention_heads=2, intermediate_size=28),
            weights="phi/long",
            batch=1,
            seq=2060,
            claims={"golden.logits": WORKING, "cache.prefill_decode": WORKING},
            last_rows=16,
        ),
        _field("layer_norm_eps", "layer_norm_eps", {"layer_norm_eps": 0.05}),
        _field("rope_theta", "rope_theta", {"rope": {"rope_theta": 100.0}}),
        _field("partial_rotary_factor", "partial_rotary_factor", {"rope": _FACTOR},
               also={"the whole head turned": _WHOLE_HEAD}),
        _field("rope_scaling (linear)", "rope_scaling-linear", {"rope": _LINEAR}),
        _field("rope_scaling (llama3)", "rope_scaling-llama3", {"rope": _LLAMA3},
               also={"rope_scaling ignored, rope_theta read": {"rope": {"rope_theta": 100.0}}}),
        _field(
            "rope_parameters (5.x spelling)", "rope_parameters-only", {"rope": _ALL_MOVED, "spelling": "5.x"},
            also={
                "partial_rotary_factor ignored": {"rope": _ALL_MOVED | {"partial_rotary_factor": 0.5}},
                "the scaling ignored": {"rope": _FACTOR | {"rope_theta": 100.0}},
            },
        ),
        _field(
            "rope_theta, rope_scaling and partial_rotary_factor (4.x spelling)", "partial_rotary_factor-4.x-only",
            {"rope": _ALL_MOVED, "spelling": "4.x"},
            also={
                "partial_rotary_factor ignored": {"rope": _ALL_MOVED | {"partial_rotary_factor": 0.5}},
                "rope_scaling ignored": {"rope": _FACTOR | {"rope_theta": 100.0}},
            },
        ),
        _field("num_key_value_heads", "num_key_value_heads", {"num_key_value_heads": 1}),
        _field("qk_layernorm", "qk_layernorm", {"qk_layernorm": True}),
        _field("hidden_act", "hidden_act-relu", {"hidden_act": "relu"}),
        Recipe(
            name="phi/field-absent",
            summary="plain with every key that has a default left out of config.json",
            config=_terse(),
            weights="phi/plain",
            batch=3,
            claims=MODEST,
            field="absent keys",
            counterfactuals={
                "partial_rotary_factor taken for 1": _config(**_WHOLE_HEAD),
                "layer_norm_eps at 1e-6": _config(layer_norm_eps=1e-6),
            },
        ),
        _field("tie_word_embeddings", "tie_word_embeddings", {"tie_word_embeddings": True}),
    )  # fmt: skip


# --- checkpoint -----------------------------------------------------------------------------------------------------


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Hub name -> shape of everything a checkpoint holds (no lm_head.weight when it is tied; its bias always)."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries, keys = config["num_attention_heads"] * _head_dim(config), kv_heads(config) * _head_dim(config)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.bias": (vocab,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    norms = {"model.final_layernorm": hidden}
    projections = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.dense": (hidden, queries),
        "mlp.fc1": (ffn, hidden),
        "mlp.fc2": (hidden, ffn),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        norms[prefix + "input_layernorm"] = hidden
        if config.get("qk_layernorm", False):
            norms |= {f"{prefix}self_attn.{which}_layernorm": _head_dim(config) for which in "qk"}
        for name, (rows, columns) in projections.items():
            shapes |= {f"{prefix}{name}.weight": (rows, columns), f"{prefix}{name}.bias": (rows,)}
    return shapes | {f"{norm}.{part}": (size,) for norm, size in norms.items() for part in ("weight", "bias")}


# --- probes ---------------------------------------------------------------------------------------------------------


def probes(config: Config) -> list[ProbeSpec]:
    """Phi's probes in computational order; heads are split into (kv_head, group) where a layout may split them."""
    stream = ("batch", "seq", "hidden")
    inner = ("batch", "seq", "intermediate")
    query_heads, key_heads = ("batch", "kv_head", "group", "seq", "head_dim"), ("batch", "kv_head", "seq", "head_dim")
    specs = [ProbeSpec(name="embedding", axes=stream, parents=())]

    def add(name: str, axes: tuple[str, ...], *parents: str) -> None:
        specs.append(ProbeSpec(name=name, axes=axes, parents=parents))

    block_input = "embedding"
    for layer in range(config["num_hidden_layers"]):
        block, a, f = (f"layers.{layer}.{part}" for part in ("", "attention.", "feed_forward."))
        add(block + "norm", stream, block_input)
        add(a + "query", ("batch", "seq", "kv_head", "group", "head_dim"), block + "norm")
        add(a + "key", ("batch", "seq", "kv_head", "head_dim"), block + "norm")
        add(a + "value", ("batch", "seq", "kv_head", "head_dim"), block + "norm")
        unturned = ("query", "key")
        if config.get("qk_layernorm", False):
            unturned = ("query_normed", "key_normed")
            add(a + "query_normed", query_heads, a + "query")
            add(a + "key_normed", key_heads, a + "key")
        add(a + "query_rotated", query_heads, a + unturned[0])
        add(a + "key_rotated", key_heads, a + unturned[1])
        add(a + "scores", ("batch", "kv_head", "group", "seq", "key"), a + "query_rotated", a + "key_rotated")
        add(a + "weights", ("batch", "kv_head", "group", "seq", "key"), a + "scores")
        add(a + "context", ("batch", "seq", "kv_head", "group", "head_dim"), a + "weights", a + "value")
        add(a + "output", stream, a + "context")
        add(f + "up", inner, block + "norm")
        add(f + "activation", inner, f + "up")
        add(f + "output", stream, f + "activation")
        add(block + "output", stream, a + "output", f + "output", block_input)
        block_input = block + "output"
    add("final_norm", stream, block_input)
    add("logits", ("batch", "seq", "vocab"), "final_norm")
    return specs


def probe_sizes(config: Config, batch: int, seq: int) -> dict[str, int]:
    """Axis name -> size, for the axes that `probes` uses."""
    heads, keys = config["num_attention_heads"], kv_heads(config)
    return {
        "batch": batch, "seq": seq, "key": seq, "hidden": config["hidden_size"], "vocab": config["vocab_size"],
        "intermediate": config["intermediate_size"], "kv_head": keys, "group": heads // keys,
        "head_dim": _head_dim(config),
    }  # fmt: skip


def module_probes(config: Config) -> dict[str, tuple[str, str]]:
    """Probe -> (module path as the hub names it, "input" or "output").

    What no module boundary shows is in `kernel_probes`.
    """
    found = {
        "embedding": ("model.embed_tokens", "output"),
        "final_norm": ("model.final_layernorm", "output"),
        "logits": ("lm_head", "output"),
    }
    inside = {
        "norm": ("input_layernorm", "output"),
        "attention.query": ("self_attn.q_proj", "output"),
        "attention.key": ("self_attn.k_proj", "output"),
        "attention.value": ("self_attn.v_proj", "output"),
        "attention.context": ("self_attn.dense", "input"),
        "attention.output": ("self_attn.dense", "output"),
        "feed_forward.up": ("mlp.fc1", "output"),
        "feed_forward.activation": ("mlp.activation_fn", "output"),
        "feed_forward.output": ("mlp.fc2", "output"),
        "output": ("", "output"),
    }
    if config.get("qk_layernorm", False):
        inside["attention.query_normed"] = ("self_attn.q_layernorm", "output")
        inside["attention.key_normed"] = ("self_attn.k_layernorm", "output")
    for layer in range(config["num_hidden_layers"]):
        for probe, (module, side) in inside.items():
            found[f"layers.{layer}.{probe}"] = (f"model.layers.{layer}.{module}".rstrip("."), side)
    return found


_EQUATIONS = r"""
For each block, with x (seq, hidden) the residual stream and m the position:

    n      = (x - mean(x)) / sqrt(var(x) + layer_norm_eps) · w + b      LayerNorm; var divides by hidden
    q,k,v  = n Wqᵀ + bq, n Wkᵀ + bk, n Wvᵀ + bv                         H query heads, KV key-value heads of head_dim
    q, k   = LayerNorm(q), LayerNorm(k)                                 each head alone, only with qk_layernorm
    q', k' = R(m) q, R(m) k                                             the first d elements of a head turn, others pass
    A      = softmax(q' k'ᵀ / sqrt(head_dim) + causal mask)             query head h reads key-value head h // (H / KV)
    x      = x + (A v) Woᵀ + bo + act(n W1ᵀ + b1) W2ᵀ + b2              both read the same n; act = GELU, tanh form

and logits = LayerNorm(x) Wheadᵀ + bhead.  Positions count real tokens.  d = partial_rotary_factor · head_dim, cut to an
integer; pairs (i, i + d/2) turn by m·θ^(-2i/d).
"""


FAMILY = Family(
    name="phi",
    title="Phi-1, Phi-1.5 and Phi-2",
    paper="Gunasekar et al. 2023, arXiv:2306.11644; Li et al. 2023, arXiv:2309.05463",
    equations=_EQUATIONS,
    oracle="PhiForCausalLM",
    fields=(
        ConfigField(name="layer_norm_eps", default="1e-5", meaning="ε inside the root of every LayerNorm"),
        ConfigField(name="rope_theta", default="10000", meaning="base of the rotary frequencies"),
        ConfigField(name="partial_rotary_factor", default="0.5", meaning="the part of each head that positions turn; "
                    "at the top level (4.x) or inside rope_parameters (5.x)"),
        ConfigField(name="rope_scaling", default="null", meaning="linear or llama3 stretching of the frequencies"),
        ConfigField(name="num_key_value_heads", default="num_attention_heads", meaning="key-value heads; each serves "
                    "num_attention_heads / num_key_value_heads consecutive query heads"),
        ConfigField(name="qk_layernorm", default="false", meaning="a LayerNorm on each query and key head, before "
                    "it is turned"),
        ConfigField(name="hidden_act", default="gelu_new", meaning="activation of the feed-forward layer"),
        ConfigField(name="tie_word_embeddings", default="false", meaning="the head's weight is the embedding table"),
    ),
    recipes=_recipes(),
    tensor_shapes=tensor_shapes,
    probes=probes,
    probe_sizes=probe_sizes,
    module_probes=module_probes,
    kernel_probes=kernel_probes,
    block_checkpoint=partial(block_checkpoint, final_norm="model.final_layernorm"),
    properties=Properties(
        table=lambda config: "model.embed_tokens.weight",
        windows=lambda config: (None,) * config["num_hidden_layers"],
        tied=lambda config: bool(config.get("tie_word_embeddings", False)),
        shift=True,
        also={"field-tie_word_embeddings": ("gradients.tied",)},
        twins={"repeated_key_values": REPEATED_KEY_VALUES, "spelling": spelling("hidden_act")},
    ),
)  # fmt: skip
