"""GPT-3 (Brown et al. 2020): GPT-2 in which blocks of dense and of locally banded attention alternate.

No weights were published and Hugging Face never had it: config.json and tensors are GPT-2's, with two keys of our own,
`attention_pattern` and `window_size`.  Oracle at true double precision: GPT-2 of Hugging Face transformers where every
block is dense, else its GPT-Neo (see `conformance.oracles.gpt3`).
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from conformance.families import Config, ConfigField, Family, Recipe, gpt_blocks
from conformance.families.decoders import FULL, MODEST, PARTITION, field_case, only_in, without
from conformance.families.properties import Properties, Twins
from conformance.probes import ProbeSpec

if TYPE_CHECKING:
    from torch import Tensor

# --- configurations -------------------------------------------------------------------------------------------------


def _config(**changes: Any) -> Config:
    """A small GPT-3 at its defaults, then changed.  Heads are 4 or 16 wide, so that 1/√head_dim is a power of two: the
    oracle folds it into weights, which stay exact in every dtype.
    """
    return {
        "architectures": ["GPT3LMHeadModel"],
        "model_type": "gpt3",
        "vocab_size": 41,
        "n_positions": 67,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 2,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "attention_pattern": ["dense", "banded"],
        "window_size": 5,
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
    "n_inner", "activation_function", "layer_norm_epsilon", "tie_word_embeddings", "attention_pattern", "attn_pdrop",
    "embd_pdrop", "resid_pdrop",
)  # fmt: skip


def _terse() -> Config:
    return {key: value for key, value in _config().items() if key not in _OPTIONAL}


# --- cases ----------------------------------------------------------------------------------------------------------


# Long enough for a window of 5 to pass over the text twice.
_BATCH, _SEQ = 4, 13


def _field(field: str, label: str, changes: dict[str, Any], *, also: dict[str, Config] | None = None) -> Recipe:
    recipe = field_case("gpt3", field, label, _config(**changes), _config(), tensor_shapes, also=also)
    return dataclasses.replace(recipe, batch=_BATCH, seq=_SEQ)


def _recipes() -> tuple[Recipe, ...]:
    return (
        Recipe(
            name="gpt3/plain",
            summary="unequal sizes, every maths field at its default: dense, banded, dense",
            config=_config(),
            weights="gpt3/plain",
            batch=_BATCH,
            seq=_SEQ,
            claims=without(FULL, "golden.gradients"),
            store=frozenset({"blocks", "positions", "loss"}),
            counterfactuals={
                "every block dense (the band ignored)": _config(attention_pattern=["dense"]),
                "the pattern begun with the banded block": _config(attention_pattern=["banded", "dense"]),
                "a band of window_size keys beside the query": _config(window_size=6),
                "a band of window_size − 1 keys, the query included": _config(window_size=4),
            },
        ),
        Recipe(
            name="gpt3/distinct",
            summary="everything at once: all sizes different, banded first, n_inner, a large epsilon",
            config=_config(
                n_embd=28, n_head=7, n_layer=2, n_inner=36, layer_norm_epsilon=1e-3, window_size=6,
                attention_pattern=["banded", "dense"],
            ),
            weights="gpt3/distinct",
            batch=3,
            seq=_SEQ,
            claims=FULL,
            store=frozenset({"probes", "gradients", "blocks", "positions", "loss"}),
        ),
        Recipe(
            name="gpt3/large",
            summary="a residual stream whose squares overflow float16: norms are computed in float32",
            config=_config(),
            weights="gpt3/plain",
            batch=_BATCH,
            seq=_SEQ,
            scaled={"attn.c_proj.weight": 256.0},
            claims={"golden.logits": ("float64", "float16")},
        ),
        Recipe(
            name="gpt3/square",
            summary="all sizes equal, so that a projection that is not transposed loads without a shape error",
            config=_config(n_embd=16, n_inner=16, vocab_size=16, n_positions=16, n_head=4, n_layer=2),
            weights="gpt3/square",
            batch=3,
            claims=without(FULL, "golden.gradients", "golden.blocks", "golden.positions"),
            store=frozenset({"loss"}),
        ),
        Recipe(
            name="gpt3/deep",
            summary="eleven layers of a pattern of three, a narrow band, and the whole context",
            config=_config(
                n_embd=12, n_head=3, n_layer=11, n_positions=23, vocab_size=29, window_size=3,
                attention_pattern=["dense", "banded", "banded"],
            ),
            weights="gpt3/deep",
            batch=3,
            seq=23,
            # The order of many layers shows in float64; what each adds to the rounding is no business of this case.
            claims=only_in(("float64",), MODEST) | PARTITION,
        ),
        Recipe(
            name="gpt3/dense",
            summary="every block dense: GPT-2 by another name",
            config=_config(attention_pattern=["dense"], window_size=None),
            weights="gpt3/plain",
            batch=_BATCH,
            seq=_SEQ,
            claims=MODEST,
        ),
        _field(
            "attention_pattern", "attention_pattern", {"attention_pattern": ["banded", "dense"]},
            also={
                "every block dense": _config(attention_pattern=["dense"]),
                "every block banded": _config(attention_pattern=["banded"]),
            },
        ),
        _field("window_size", "window_size", {"window_size": 3}),
        _field("layer_norm_epsilon", "layer_norm_epsilon", {"layer_norm_epsilon": 0.05}),
        _field("n_inner", "n_inner", {"n_inner": 50}),
        _field("activation_function", "activation_function-relu", {"activation_function": "relu"}),
        _field("tie_word_embeddings", "tie_word_embeddings", {"tie_word_embeddings": False}),
        Recipe(
            name="gpt3/field-absent",
            summary="plain with every key that has a default left out of config.json",
            config=_terse(),
            weights="gpt3/plain",
            batch=_BATCH,
            seq=_SEQ,
            claims=MODEST,
            field="absent keys",
            counterfactuals={
                "attention_pattern taken for dense alone": _config(attention_pattern=["dense"]),
                "activation_function at gelu, the exact form": _config(activation_function="gelu"),
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

    See `gpt_blocks.one_block`; the pattern becomes that block's kind of attention.
    """
    one_config, one = gpt_blocks.one_block(
        config, weights, block_input, layer, table="transformer.wte.weight", positions="transformer.wpe.weight",
        kept=("transformer.ln_f.weight", "transformer.ln_f.bias"),
    )  # fmt: skip
    pattern = config.get("attention_pattern", ["dense", "banded"])
    return one_config | {"attention_pattern": [pattern[layer % len(pattern)]]}, one


# --- probes ---------------------------------------------------------------------------------------------------------


def probes(config: Config) -> list[ProbeSpec]:
    """GPT-3's probes, those of GPT-2, in computational order."""
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


# --- properties -----------------------------------------------------------------------------------------------------


def windows(config: Config) -> tuple[int | None, ...]:
    """For each block the keys that a query sees; None: all up to its own."""
    pattern = config.get("attention_pattern", ["dense", "banded"])
    kinds = [pattern[layer % len(pattern)] for layer in range(config["n_layer"])]
    return tuple(config["window_size"] if kind == "banded" else None for kind in kinds)


def _wide(
    config: Config, weights: "dict[str, Tensor]", most: int
) -> "tuple[tuple[Config, dict[str, Tensor]], tuple[Config, dict[str, Tensor]]]":
    """Every block dense, and every block with a band that no text outgrows."""
    dense = config | {"attention_pattern": ["dense"], "window_size": None}
    return (dense, weights), (config | {"attention_pattern": ["banded"], "window_size": most}, weights)


_EQUATIONS = r"""
GPT-2's, but block n, counted from 0, attends by attention_pattern[n mod len]:

    dense    query i sees keys j ≤ i
    banded   query i sees keys i − window_size < j ≤ i: window_size keys, its own included

With x (seq, hidden) the residual stream, which starts as Wte[id] + Wpe[position], for each block:

    n      = (x − mean(x)) / sqrt(var(x) + layer_norm_epsilon) · w + b  LayerNorm; var divides by hidden, not hidden − 1
    q,k,v  = n Wattn + battn, cut into thirds                           each cut into n_head heads of head_dim
    A      = softmax(q kᵀ / sqrt(head_dim) + the block's mask)
    x      = x + (A v) Wproj + bproj
    n      = LayerNorm(x)
    x      = x + gelu(n Wfc + bfc) Wproj + bproj                        gelu in its tanh form

and logits = LayerNorm(x) Wteᵀ.  Positions count real tokens.  Projections are stored (in, out): y = x W + b.
"""


FAMILY = Family(
    name="gpt3",
    title="GPT-3",
    paper="Brown et al. 2020, arXiv:2005.14165",
    equations=_EQUATIONS,
    oracle="GPT2LMHeadModel or GPTNeoForCausalLM",
    oracle_class="conformance.oracles.gpt3:GPT3",
    oracle_kernels=("eager",),
    layers_key="n_layer",
    positions_key="n_positions",
    module_kinds=gpt_blocks.MODULE_KINDS,
    fields=(
        ConfigField(name="attention_pattern", default='["dense", "banded"]', meaning="kinds of attention, one a block, "
                    "repeated"),
        ConfigField(name="window_size", default="none", meaning="keys that a query of a banded block sees, itself "
                    "included"),
        ConfigField(name="layer_norm_epsilon", default="1e-5", meaning="ε inside the root of LayerNorm"),
        ConfigField(name="n_inner", default="4 · n_embd", meaning="width of the feed-forward layer"),
        ConfigField(name="activation_function", default="gelu_new", meaning="activation of the feed-forward layer; "
                    "gelu_new is GELU's tanh form"),
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
        windows=windows,
        tied=lambda config: bool(config.get("tie_word_embeddings", True)),
        positions="transformer.wpe.weight",
        attention_output=r"\.h\.(\d+)\.attn\.c_proj\.",
        twins={"wide_window": Twins(applies=lambda config: True, make=_wide)},
    ),
)  # fmt: skip
