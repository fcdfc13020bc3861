"""GPT (Radford et al. 2018): post-norm with LayerNorm, learned positions, multi-head attention, tanh GELU, tied head.

Oracle: `OpenAIGPTLMHeadModel` of Hugging Face transformers at true double precision.  It has no key-value cache.
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Config, ConfigField, Family, Recipe, gpt_blocks
from conformance.families.decoders import FULL, MODEST, PARTITION, field_case, without
from conformance.families.properties import Properties
from conformance.probes import ProbeSpec

if TYPE_CHECKING:
    from torch import Tensor

# --- configurations -------------------------------------------------------------------------------------------------


def _config(**changes: Any) -> Config:
    """A small GPT at its defaults, then changed."""
    return {
        "architectures": ["OpenAIGPTLMHeadModel"],
        "model_type": "openai-gpt",
        "vocab_size": 47,
        "n_positions": 67,
        "n_embd": 30,
        "n_layer": 2,
        "n_head": 5,
        "afn": "gelu",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        # only in training; the suite evaluates, so a candidate that applies them fails
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "torch_dtype": "float32",
    } | changes


# Keys that a config.json may leave out; n_positions could be too, but at its default the table would be large.
_OPTIONAL = ("afn", "layer_norm_epsilon", "tie_word_embeddings", "attn_pdrop", "embd_pdrop", "resid_pdrop")

# Unlike anywhere else "gelu" means the tanh form here.
_EXACT = {"GELU in its exact form": _config(afn="gelu, exact")}


def _terse() -> Config:
    return {key: value for key, value in _config().items() if key not in _OPTIONAL}


# --- cases ----------------------------------------------------------------------------------------------------------


def _field(field: str, label: str, changes: dict[str, Any]) -> Recipe:
    return field_case("gpt", field, label, _config(**changes), _config(), tensor_shapes)


def _recipes() -> tuple[Recipe, ...]:
    return (
        Recipe(
            name="gpt/plain",
            summary="unequal sizes, every maths field at its default: what a modest engine can pass",
            config=_config(),
            weights="gpt/plain",
            claims=without(FULL, "golden.gradients"),
            store=frozenset({"blocks", "positions", "loss"}),
        ),
        Recipe(
            name="gpt/distinct",
            summary="everything at once: all sizes different, a large epsilon",
            config=_config(n_embd=27, n_head=3, layer_norm_epsilon=1e-3),
            weights="gpt/distinct",
            claims=FULL,
            store=frozenset({"probes", "gradients", "blocks", "positions", "loss"}),
        ),
        Recipe(
            name="gpt/large",
            summary="a residual stream whose squares overflow float16: norms are computed in float32",
            config=_config(),
            weights="gpt/plain",
            scaled={"attn.c_proj.weight": 256.0},
            claims={"golden.logits": ("float64", "float16")},
        ),
        Recipe(
            name="gpt/square",
            summary="as many sizes equal as can be, so that a projection that is not transposed loads",
            config=_config(n_embd=24, vocab_size=24, n_positions=24, n_head=4),
            weights="gpt/square",
            batch=3,
            claims=without(FULL, "golden.gradients", "golden.blocks", "golden.positions"),
            store=frozenset({"loss"}),
        ),
        Recipe(
            name="gpt/deep",
            summary="eleven layers, whose names sort otherwise than their numbers, and the whole context",
            config=_config(n_embd=12, n_head=2, n_layer=11, n_positions=23, vocab_size=29),
            weights="gpt/deep",
            batch=3,
            seq=23,
            claims=MODEST | PARTITION,
        ),
        _field("layer_norm_epsilon", "layer_norm_epsilon", {"layer_norm_epsilon": 0.05}),
        Recipe(
            name="gpt/field-afn-gelu",
            summary='plain, with the values that afn "gelu" in its usual meaning would give',
            config=_config(),
            weights="gpt/plain",
            claims=MODEST,
            field="afn",
            counterfactuals=_EXACT,
        ),
        _field("afn", "afn-relu", {"afn": "relu"}),
        _field("afn", "afn-silu", {"afn": "silu"}),
        _field("afn", "afn-swish", {"afn": "swish"}),
        _field("tie_word_embeddings", "tie_word_embeddings", {"tie_word_embeddings": False}),
        Recipe(
            name="gpt/field-absent",
            summary="plain with every key that has a default left out of config.json",
            config=_terse(),
            weights="gpt/plain",
            claims=MODEST,
            field="absent keys",
            counterfactuals=_EXACT | {"layer_norm_epsilon at 1e-6": _config(layer_norm_epsilon=1e-6)},
        ),
    )


# --- checkpoint -----------------------------------------------------------------------------------------------------


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Hub name -> shape of everything a checkpoint holds (no lm_head when it is tied)."""
    hidden, vocab = config["n_embd"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.tokens_embed.weight": (vocab, hidden),
        "transformer.positions_embed.weight": (config["n_positions"], hidden),
    }
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes | gpt_blocks.block_shapes(config)


def block_checkpoint(
    config: Config, weights: "dict[str, Tensor]", block_input: "Tensor", layer: int
) -> "tuple[Config, dict[str, Tensor]]":
    """A one-layer checkpoint that feeds `block_input` (batch, seq, hidden) to block `layer` alone.

    See `gpt_blocks.one_block`.
    """
    return gpt_blocks.one_block(
        config, weights, block_input, layer,
        table="transformer.tokens_embed.weight", positions="transformer.positions_embed.weight",
    )  # fmt: skip


# --- probes ---------------------------------------------------------------------------------------------------------


def probes(config: Config) -> list[ProbeSpec]:
    """GPT's probes in computational order."""
    specs: list[ProbeSpec] = []
    add, stream = gpt_blocks.collector(specs), gpt_blocks.STREAM
    add("embedding", stream)
    block_input = "embedding"
    for layer in range(config["n_layer"]):
        a, f = f"layers.{layer}.attention.", f"layers.{layer}.feed_forward."
        attention = gpt_blocks.add_attention(add, layer, block_input)
        add(a + "residual", stream, attention, block_input)
        add(a + "output_norm", stream, a + "residual")
        feed_forward = gpt_blocks.add_feed_forward(add, layer, a + "output_norm")
        add(f + "residual", stream, feed_forward, a + "output_norm")
        block_input = f"layers.{layer}.output"
        add(block_input, stream, f + "residual")
    add("logits", ("batch", "seq", "vocab"), block_input)
    return specs


def module_probes(config: Config) -> dict[str, tuple[str, str]]:
    """Probe -> (module path as the hub names it, "input" or "output")."""
    return {
        "embedding": ("transformer.h.0", "input"),
        "logits": ("lm_head", "output"),
    } | gpt_blocks.inside_blocks(
        config,
        gpt_blocks.INSIDE
        | {
            "attention.residual": ("ln_1", "input"),
            "attention.output_norm": ("ln_1", "output"),
            "feed_forward.residual": ("ln_2", "input"),
            "output": ("ln_2", "output"),
        },
    )


_EQUATIONS = r"""
With x (seq, hidden) the residual stream, which starts as Wtokens[id] + Wpositions[position], for each block:

    q,k,v  = x Wattn + battn, cut into thirds                           each cut into n_head heads of head_dim
    A      = softmax(q kᵀ / sqrt(head_dim) + causal mask)
    n      = LayerNorm(x + (A v) Wproj + bproj)                         var divides by hidden, not hidden − 1
    x      = LayerNorm(n + gelu(n Wfc + bfc) Wproj + bproj)             gelu in its tanh form

and logits = x Wtokensᵀ: there is no norm after the last block.  Positions count real tokens.  Projections are stored
(in, out): y = x W + b.
"""


FAMILY = Family(
    name="gpt",
    title="GPT",
    paper="Radford et al. 2018, Improving Language Understanding by Generative Pre-Training",
    equations=_EQUATIONS,
    oracle="OpenAIGPTLMHeadModel",
    oracle_class="conformance.oracles.gpt:OpenAIGPT",
    oracle_kernels=("eager",),
    layers_key="n_layer",
    positions_key="n_positions",
    module_kinds=gpt_blocks.MODULE_KINDS,
    fields=(
        ConfigField(name="layer_norm_epsilon", default="1e-5", meaning="ε inside the root of LayerNorm"),
        ConfigField(name="afn", default="gelu", meaning="activation of the feed-forward layer; gelu is the tanh form"),
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
        table=lambda config: "transformer.tokens_embed.weight",
        windows=lambda config: (None,) * config["n_layer"],
        tied=lambda config: bool(config.get("tie_word_embeddings", True)),
        positions="transformer.positions_embed.weight",
    ),
)
