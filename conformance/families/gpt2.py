"""GPT-2 (Radford et al. 2019): pre-norm with LayerNorm, learned positions, multi-head attention, tanh GELU, tied head.

Oracle: `GPT2LMHeadModel` of Hugging Face transformers at true double precision.
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Config, ConfigField, Family, Recipe, gpt_blocks
from conformance.families.decoders import FULL, MODEST, PARTITION, field_case, without
from conformance.families.properties import Properties
from conformance.families.twins import LAYER_SCALE, spelling
from conformance.probes import ProbeSpec

if TYPE_CHECKING:
    from torch import Tensor

# --- configurations -------------------------------------------------------------------------------------------------


def _config(**changes: Any) -> Config:
    """A small GPT-2 at its defaults, then changed."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 47,
        "n_positions": 67,
        "n_embd": 30,
        "n_layer": 2,
        "n_head": 3,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": True,
        # only in training; the suite evaluates, so a candidate that applies them fails
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    } | changes


# Keys that a config.json may leave out; n_positions could be too, but at its default the table would be large.
_OPTIONAL = (
    "n_inner", "activation_function", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn", "tie_word_embeddings", "attn_pdrop", "embd_pdrop", "resid_pdrop",
)  # fmt: skip


def _terse() -> Config:
    return {key: value for key, value in _config().items() if key not in _OPTIONAL}


# --- cases ----------------------------------------------------------------------------------------------------------


def _field(field: str, label: str, changes: dict[str, Any], *, also: dict[str, Config] | None = None) -> Recipe:
    return field_case("gpt2", field, label, _config(**changes), _config(), tensor_shapes, also=also)


def _recipes() -> tuple[Recipe, ...]:
    distinct = _config(
        n_embd=30, n_head=5, n_inner=40, layer_norm_epsilon=1e-3, scale_attn_by_inverse_layer_idx=True,
    )  # fmt: skip
    return (
        Recipe(
            name="gpt2/plain",
            summary="unequal sizes, every maths field at its default: what a modest engine can pass",
            config=_config(),
            weights="gpt2/plain",
            claims=without(FULL, "golden.gradients"),
            store=frozenset({"blocks", "positions", "loss"}),
        ),
        Recipe(
            name="gpt2/distinct",
            summary="everything at once: all sizes different, n_inner, scores divided by the layer's number",
            config=distinct,
            weights="gpt2/distinct",
            claims=FULL,
            store=frozenset({"probes", "gradients", "blocks", "positions", "loss"}),
        ),
        Recipe(
            name="gpt2/square",
            summary="all sizes equal, so that a projection that is not transposed loads without a shape error",
            config=_config(n_embd=24, n_inner=24, vocab_size=24, n_positions=24, n_head=4),
            weights="gpt2/square",
            batch=3,
            claims=without(FULL, "golden.gradients", "golden.blocks", "golden.positions"),
            store=frozenset({"loss"}),
        ),
        Recipe(
            name="gpt2/deep",
            summary="eleven layers, whose names sort otherwise than their numbers, and the whole context",
            config=_config(n_embd=12, n_head=2, n_layer=11, n_positions=23, vocab_size=29),
            weights="gpt2/deep",
            batch=3,
            seq=23,
            claims=MODEST | PARTITION,
        ),
        Recipe(
            name="gpt2/reorder_and_upcast_attn",
            summary="scores that overflow float16 unless they are scaled in float32, as the config asks",
            config=_config(reorder_and_upcast_attn=True),
            weights="gpt2/plain",
            scaled={"attn.c_attn.weight": 64.0},
            # not float64: there is nothing to upcast, and the library's guard on torch.float32 raises under TrueDouble
            claims={"golden.logits": ("float32", "float16"), "cache.prefill_decode": ("float32", "float16")},
        ),
        _field("layer_norm_epsilon", "layer_norm_epsilon", {"layer_norm_epsilon": 0.05}),
        _field("n_inner", "n_inner", {"n_inner": 50}),
        Recipe(
            name="gpt2/field-activation_function-gelu",
            summary="plain with activation_function moved to GELU's exact form, which float64 alone tells apart",
            config=_config(activation_function="gelu"),
            weights="gpt2/plain",
            claims=MODEST,
            field="activation_function",
            counterfactuals={"GELU in its tanh form": _config()},
        ),
        _field("activation_function", "activation_function-relu", {"activation_function": "relu"}),
        _field("activation_function", "activation_function-silu", {"activation_function": "silu"}),
        _field("scale_attn_weights", "scale_attn_weights", {"scale_attn_weights": False}),
        _field(
            "scale_attn_by_inverse_layer_idx", "scale_attn_by_inverse_layer_idx",
            {"scale_attn_by_inverse_layer_idx": True},
            also={"1/√head_dim left out": _config(
                scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False,
            )},
        ),
        _field("tie_word_embeddings", "tie_word_embeddings", {"tie_word_embeddings": False}),
        Recipe(
            name="gpt2/field-absent",
            summary="plain with every key that has a default left out of config.json",
            config=_terse(),
            weights="gpt2/plain",
            claims=MODEST,
            field="absent keys",
            counterfactuals={
                "activation_function at gelu, the exact form": _config(activation_function="gelu"),
                "layer_norm_epsilon at 1e-6": _config(layer_norm_epsilon=1e-6),
                "scale_attn_weights taken for false": _config(scale_attn_weights=False),
            },
        ),
    )  # fmt: skip


# --- checkpoint -----------------------------------------------------------------------------------------------------


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Hub name -> shape of everything a checkpoint holds (no lm_head when it is tied)."""
    hidden, vocab = config["n_embd"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
        "transformer.ln_f.weight": (hidden,),
        "transformer.ln_f.bias": (hidden,),
    }
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes | gpt_blocks.block_shapes(config)


def block_checkpoint(
    config: Config, weights: "dict[str, Tensor]", block_input: "Tensor", layer: int
) -> "tuple[Config, dict[str, Tensor]]":
    """A one-layer checkpoint that feeds `block_input` (batch, seq, hidden) to block `layer` alone.

    See `gpt_blocks.one_block`.  Where scores are divided by the layer's number, which becomes 1, the query weights are
    divided in its stead.
    """
    one_config, one = gpt_blocks.one_block(
        config, weights, block_input, layer, table="transformer.wte.weight", positions="transformer.wpe.weight",
        kept=("transformer.ln_f.weight", "transformer.ln_f.bias"),
    )  # fmt: skip
    if config.get("scale_attn_by_inverse_layer_idx", False):
        for kind in ("weight", "bias"):
            joint = one[f"transformer.h.0.attn.c_attn.{kind}"].clone()
            joint[..., : config["n_embd"]] /= layer + 1
            one[f"transformer.h.0.attn.c_attn.{kind}"] = joint
    return one_config, one


# --- probes ---------------------------------------------------------------------------------------------------------


def probes(config: Config) -> list[ProbeSpec]:
    """GPT-2's probes in computational order."""
    specs: list[ProbeSpec] = []
    add, stream = gpt_blocks.collector(specs), gpt_blocks.STREAM
    add("embedding", stream)
    block_input = "embedding"
    for layer in range(config["n_layer"]):
        a, f = f"layers.{layer}.attention.", f"layers.{layer}.feed_forward."
        add(a + "norm", stream, block_input)
        attention = gpt_blocks.add_attention(add, layer, a + "norm")
        add(a + "residual", stream, attention, block_input)
        add(f + "norm", stream, a + "residual")
        feed_forward = gpt_blocks.add_feed_forward(add, layer, f + "norm")
        block_input = f"layers.{layer}.output"
        add(block_input, stream, feed_forward, a + "residual")
    add("final_norm", stream, block_input)
    add("logits", ("batch", "seq", "vocab"), "final_norm")
    return specs


def module_probes(config: Config) -> dict[str, tuple[str, str]]:
    """Probe -> (module path as the hub names it, "input" or "output")."""
    return {
        "embedding": ("transformer.h.0", "input"),
        "final_norm": ("transformer.ln_f", "output"),
        "logits": ("lm_head", "output"),
    } | gpt_blocks.inside_blocks(
        config,
        gpt_blocks.INSIDE
        | {
            "attention.norm": ("ln_1", "output"),
            "attention.residual": ("ln_2", "input"),
            "feed_forward.norm": ("ln_2", "output"),
        },
    )


_EQUATIONS = r"""
With x (seq, hidden) the residual stream, which starts as Wte[id] + Wpe[position], for each block:

    n      = (x − mean(x)) / sqrt(var(x) + layer_norm_epsilon) · w + b  LayerNorm; var divides by hidden, not hidden − 1
    q,k,v  = n Wattn + battn, cut into thirds                           each cut into n_head heads of head_dim
    A      = softmax(q kᵀ / sqrt(head_dim) + causal mask)
    x      = x + (A v) Wproj + bproj
    n      = LayerNorm(x)
    x      = x + gelu(n Wfc + bfc) Wproj + bproj                        gelu in its tanh form

and logits = LayerNorm(x) Wteᵀ.  Positions count real tokens.  Projections are stored (in, out): y = x W + b.
"""


FAMILY = Family(
    name="gpt2",
    title="GPT-2",
    paper="Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
    equations=_EQUATIONS,
    oracle="GPT2LMHeadModel",
    double_settings={"reorder_and_upcast_attn": False},  # nothing in float64, where its guard on torch.float32 raises
    layers_key="n_layer",
    positions_key="n_positions",
    module_kinds=gpt_blocks.MODULE_KINDS,
    fields=(
        ConfigField(name="layer_norm_epsilon", default="1e-5", meaning="ε inside the root of LayerNorm"),
        ConfigField(name="n_inner", default="4 · n_embd", meaning="width of the feed-forward layer"),
        ConfigField(name="activation_function", default="gelu_new", meaning="activation of the feed-forward layer; "
                    "gelu_new is GELU's tanh form"),
        ConfigField(name="scale_attn_weights", default="true", meaning="scores are divided by sqrt(head_dim)"),
        ConfigField(name="scale_attn_by_inverse_layer_idx", default="false", meaning="scores of layer n, counted from "
                    "0, are divided by n + 1"),
        ConfigField(name="tie_word_embeddings", default="true", meaning="the head is the embedding table"),
    ),
    recipes=_recipes(),
    tensor_shapes=tensor_shapes,
    probes=probes,
    probe_sizes=gpt_blocks.probe_sizes,
    module_probes=module_probes,
    kernel_probes=gpt_blocks.kernel_probes,
    block_checkpoint=block_checkpoint,
    properties=Properties(
        table=lambda config: "transformer.wte.weight",
        windows=lambda config: (None,) * config["n_layer"],
        tied=lambda config: bool(config.get("tie_word_embeddings", True)),
        positions="transformer.wpe.weight",
        twins={"layer_scale": LAYER_SCALE, "spelling": spelling("activation_function", rope=False)},
    ),
)  # fmt: skip
