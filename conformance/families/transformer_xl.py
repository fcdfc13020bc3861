"""Transformer-XL (Dai et al. 2019): a memory of earlier segments, relative positions, an adaptive softmax.

Oracle: `TransfoXLLMHeadModel` of Hugging Face transformers at true double precision, of a release that still has it.
A first segment has an empty memory (see `conformance.oracles.transformer_xl`).  There is no padding in this family: a
batch is so many texts side by side.
"""

import dataclasses
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from conformance.families import Config, ConfigField, Family, Recipe, gpt_blocks
from conformance.families.decoders import CONSTANT_STATE, WORKING, Claims, field_case, without
from conformance.families.properties import Properties
from conformance.families.twins import NO_CLAMP
from conformance.probes import ProbeSpec

if TYPE_CHECKING:
    from torch import Tensor

# --- configurations -------------------------------------------------------------------------------------------------


def _config(**changes: Any) -> Config:
    """A small Transformer-XL at its defaults, then changed."""
    return {
        "architectures": ["TransfoXLLMHeadModel"],
        "model_type": "transfo-xl",
        "vocab_size": 37,
        "cutoffs": [12, 26],
        "d_model": 20,
        "d_embed": 32,
        "div_val": 4,
        "n_layer": 2,
        "n_head": 5,
        "d_head": 7,
        "d_inner": 26,
        "mem_len": 1600,
        "clamp_len": 1000,
        "same_length": True,
        "pre_lnorm": False,
        "untie_r": True,
        "proj_share_all_but_first": True,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "adaptive": True,
        "attn_type": 0,
        "sample_softmax": -1,
        # only in training; the suite evaluates, so a candidate that applies them fails
        "dropout": 0.1,
        "dropatt": 0.1,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    } | changes


# Keys that a config.json may leave out; cutoffs could be too, but at its default the vocabulary would be large.
_OPTIONAL = (
    "div_val", "mem_len", "clamp_len", "same_length", "pre_lnorm", "untie_r", "proj_share_all_but_first",
    "layer_norm_epsilon", "tie_word_embeddings", "adaptive", "attn_type", "sample_softmax", "dropout", "dropatt",
    "eos_token_id",
)  # fmt: skip

# What only counterfactuals say, and the oracle understands (`conformance.oracles.transformer_xl`).
ZEROS = {"first_memory": "zeros"}
REVERSED = {"cluster_order": "reversed"}


def _terse() -> Config:
    return {key: value for key, value in _config().items() if key not in _OPTIONAL}


# --- cases ----------------------------------------------------------------------------------------------------------

# What every case claims whose memory holds all that a query may see: any plan of feeds is the full forward.
_WHOLE: Claims = {
    "golden.logits": WORKING,
    "cache.prefill_decode": ("float64", "float32"),
    "cache.one_by_one": ("float64",),
    "cache.chunks": ("float64", "float32"),
}
# What a case claims whose memory forgets.
_SEGMENTS: Claims = {
    "golden.logits": WORKING,
    "memory.segments": WORKING,
    "memory.second_session": ("float64",),
}
_STORED: Claims = {
    "golden.loss": ("float64",),
    "golden.blocks": ("float64", "float32"),
    "golden.gradients": ("float64",),
}
_BATCH, _SEQ = 3, 11
# More than half of the memory and less than all of it, so that a memory spans two segments and cuts the older.
_MEMORY, _PIECES = 5, (4, 4, 3)
# The model multiplies embeddings by √d_model, and their projections are wider the narrower a cluster is.  So they enter
# the first block with a deviation near 1; larger ones make its softmax so sharp that rounding alone decides.
_EMBEDDINGS = {f"word_emb.emb_layers.{cluster}.weight": 0.5 ** (cluster + 1) for cluster in range(4)}


def _field(
    label: str, changes: dict[str, Any], *, plain: dict[str, Any] | None = None, also: dict[str, Config] | None = None,
    pieces: tuple[int, ...] = (),
) -> Recipe:  # fmt: skip
    """plain: what is unlike `_config` with the field at its default as well.  pieces: fed in these segments."""
    field, before = label.split("-")[0], plain or {}
    recipe = field_case(
        "transformer_xl", field, label, _config(**before | changes), _config(**before), tensor_shapes, also=also
    )
    return dataclasses.replace(recipe, batch=_BATCH, seq=_SEQ, segments=pieces, claims=_SEGMENTS if pieces else _WHOLE)


def _recipes() -> tuple[Recipe, ...]:
    forgetful = {"same_length": False, "mem_len": _MEMORY}
    return (
        Recipe(
            name="transformer_xl/plain",
            summary="unequal sizes, every maths field at its default: a memory that holds more than is fed",
            config=_config(),
            weights="transformer_xl/plain",
            batch=_BATCH,
            seq=_SEQ,
            claims=_WHOLE | without(_STORED, "golden.gradients"),
            store=frozenset({"blocks", "loss"}),
            counterfactuals={
                "a first memory of mem_len zero vectors that are attended to": _config(**ZEROS),
                "the clusters of the head counted from its end": _config(**REVERSED),
            },
        ),
        Recipe(
            name="transformer_xl/distinct",
            summary="everything at once: all sizes different, a short memory, clamped distances, shared biases",
            config=_config(
                d_model=14, d_embed=36, n_head=4, d_head=7, d_inner=22, cutoffs=[10, 20, 28], div_val=3,
                mem_len=5, clamp_len=6, same_length=False, untie_r=False, tie_projs=[True, False, True, False],
                tie_word_embeddings=False, layer_norm_epsilon=1e-3, vocab_size=41,
            ),
            weights="transformer_xl/distinct",
            batch=3,
            seq=11,
            segments=(4, 4, 3),
            claims=_SEGMENTS | _STORED | {
                "golden.logits": (*WORKING, "float16"),
                "memory.segments": (*WORKING, "float16"),
                "memory.gradients": ("float64",),
            },
            store=frozenset({"probes", "gradients", "blocks", "loss", "segment_gradients"}),
        ),
        Recipe(
            name="transformer_xl/square",
            summary="as many sizes equal as can be, no clusters and no projections",
            config=_config(
                d_model=16, d_embed=16, n_head=4, d_head=4, d_inner=16, vocab_size=16, cutoffs=[], div_val=1,
                mem_len=16, proj_share_all_but_first=False,
            ),
            weights="transformer_xl/square",
            batch=4,
            seq=16,
            claims=_WHOLE | {"golden.loss": ("float64",)},
            store=frozenset({"loss"}),
        ),
        Recipe(
            name="transformer_xl/field-mem_len",
            summary="plain with a memory that spans more than one segment and is shorter than what is fed",
            config=_config(**forgetful),
            weights="transformer_xl/plain",
            batch=_BATCH,
            seq=_SEQ,
            segments=_PIECES,
            claims=_SEGMENTS | CONSTANT_STATE | {"memory.gradients": ("float64",)},
            store=frozenset({"segment_gradients"}),
            field="mem_len",
            counterfactuals={
                "mem_len ignored": _config(same_length=False),
                "no memory at all": _config(**forgetful | {"mem_len": 0}),
                "a memory of the last segment alone": _config(**forgetful | {"mem_len": _PIECES[0]}),
                "a memory of one token more": _config(**forgetful | {"mem_len": _MEMORY + 1}),
                "a first memory of mem_len zero vectors that are attended to": _config(**forgetful, **ZEROS),
            },
        ),
        Recipe(
            name="transformer_xl/uneven-segments",
            summary="segments shorter and longer than the memory, with norms before each half of a block",
            config=_config(pre_lnorm=True, same_length=False, mem_len=3),
            weights="transformer_xl/plain",
            batch=_BATCH,
            seq=_SEQ,
            segments=(2, 1, 5, 3),
            claims=_SEGMENTS,
        ),
        _field(
            "same_length", {"same_length": False}, plain={"mem_len": 4}, pieces=(3, 3, 5),
            also={"every query shown mem_len + 1 keys": _config(mem_len=5)},
        ),
        dataclasses.replace(
            _field(
                "mem_len-window", {"mem_len": 4}, also={"every query shown mem_len + 1 keys": _config(mem_len=5)}
            ),
            summary="plain with a memory so short that same_length hides keys, in one call and in many",
        ),
        _field("clamp_len", {"clamp_len": 4}, also={"distances clamped to clamp_len + 1": _config(clamp_len=5)}),
        Recipe(
            name="transformer_xl/unclamped",
            summary="plain with a negative clamp_len, which clamps nothing",
            config=_config(clamp_len=-1),
            weights="transformer_xl/plain",
            batch=_BATCH,
            seq=_SEQ,
            claims=_WHOLE,
        ),
        _field("pre_lnorm", {"pre_lnorm": True}),
        _field("untie_r", {"untie_r": False}),
        _field("layer_norm_epsilon", {"layer_norm_epsilon": 0.05}),
        _field("tie_word_embeddings", {"tie_word_embeddings": False}),
        _field("proj_share_all_but_first", {"proj_share_all_but_first": False}),
        _field("tie_projs", {"tie_projs": [True, False, True]}),
        _field("cutoffs", {"cutoffs": [6, 21]}),
        _field(
            "cutoffs-one-table", {"cutoffs": [12, 26]}, plain={"div_val": 1, "cutoffs": []},
        ),
        _field("cutoffs-none", {"cutoffs": []}),
        _field("div_val", {"div_val": 2}),
        _field("div_val-1", {"div_val": 1}),
        _field("d_embed", {"d_embed": 20}, plain={"div_val": 1}),
        Recipe(
            name="transformer_xl/field-absent",
            summary="plain with every key that has a default left out of config.json",
            config=_terse(),
            weights="transformer_xl/plain",
            batch=_BATCH,
            seq=_SEQ,
            claims=_WHOLE,
            field="absent keys",
            counterfactuals={"layer_norm_epsilon at 1e-6": _config(layer_norm_epsilon=1e-6)},
        ),
    )  # fmt: skip


# --- checkpoint -----------------------------------------------------------------------------------------------------


def _tied_projections(config: Config) -> list[bool]:
    """For each cluster, whether the softmax uses the embedding's projection."""
    shared = config.get("proj_share_all_but_first", True)
    return list(config.get("tie_projs") or [False] + [shared] * len(config["cutoffs"]))


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Hub name -> shape of everything a checkpoint holds; what is tied stands once, under the embedding's name."""
    d_model, d_embed, div_val = config["d_model"], config["d_embed"], config.get("div_val", 4)
    bounds = [0, *config["cutoffs"], config["vocab_size"]]
    widths = [d_embed // div_val**cluster for cluster in range(len(bounds) - 1)]
    tables = list(zip([high - low for low, high in pairwise(bounds)], widths, strict=True))
    if div_val == 1:
        tables = [(config["vocab_size"], d_embed)]
    projected = div_val != 1 or d_embed != d_model
    shapes: dict[str, tuple[int, ...]] = {}
    for n, (entries, width) in enumerate(tables):
        shapes[f"transformer.word_emb.emb_layers.{n}.weight"] = (entries, width)
        if projected:
            shapes[f"transformer.word_emb.emb_projs.{n}"] = (d_model, width)
        if not config.get("tie_word_embeddings", True):
            shapes[f"crit.out_layers.{n}.weight"] = (entries, width)
        shapes[f"crit.out_layers.{n}.bias"] = (entries,)
    for n, tied in enumerate(_tied_projections(config)):
        if projected and not tied:
            shapes[f"crit.out_projs.{n}"] = (d_model, widths[n])
    if clusters := len(config["cutoffs"]):
        shapes |= {"crit.cluster_weight": (clusters, d_embed), "crit.cluster_bias": (clusters,)}
    return shapes | _block_shapes(config)


def _block_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    d_model, d_inner, own = config["d_model"], config["d_inner"], config.get("untie_r", True)
    heads = (config["n_head"], config["d_head"])
    features = heads[0] * heads[1]
    biases = {"r_w_bias": heads, "r_r_bias": heads}
    block = {
        "dec_attn.qkv_net.weight": (3 * features, d_model),
        "dec_attn.r_net.weight": (features, d_model),
        "dec_attn.o_net.weight": (d_model, features),
        "pos_ff.CoreNet.0.weight": (d_inner, d_model),
        "pos_ff.CoreNet.0.bias": (d_inner,),
        "pos_ff.CoreNet.3.weight": (d_model, d_inner),
        "pos_ff.CoreNet.3.bias": (d_model,),
    }
    for half in ("dec_attn", "pos_ff"):
        block |= {f"{half}.layer_norm.weight": (d_model,), f"{half}.layer_norm.bias": (d_model,)}
    block |= {f"dec_attn.{name}": shape for name, shape in biases.items() if own}
    shared = {f"transformer.{name}": shape for name, shape in biases.items() if not own}
    return shared | {
        f"transformer.layers.{layer}.{name}": shape
        for layer in range(config["n_layer"])
        for name, shape in block.items()
    }


def block_checkpoint(
    config: Config, weights: "dict[str, Tensor]", block_input: "Tensor", layer: int
) -> "tuple[Config, dict[str, Tensor]]":
    """A one-layer checkpoint that feeds `block_input` (batch, seq, hidden) to block `layer` alone.

    Its embedding is one table without clusters and projections, one row a token of the batch, so that
    arange(batch · seq) as ids looks the input up.  Since the model scales embeddings by √d_model, the rows are divided
    by it and rounded to bfloat16: the block's input is what these give.  The softmax is tied to the table; its bias is
    zero.
    """
    import torch

    rows = (block_input.flatten(0, 1) / config["d_model"] ** 0.5).to(torch.bfloat16).to(torch.float32)
    place = f"transformer.layers.{layer}."
    one = {
        name.replace(place, "transformer.layers.0."): tensor
        for name, tensor in weights.items()
        if name.startswith((place, "transformer.r_"))
    }
    one |= {"transformer.word_emb.emb_layers.0.weight": rows, "crit.out_layers.0.bias": torch.zeros(len(rows))}
    plain = {"cutoffs": [], "div_val": 1, "d_embed": config["d_model"], "tie_word_embeddings": True}
    one_config = {key: value for key, value in config.items() if key != "tie_projs"} | plain
    return one_config | {"n_layer": 1, "vocab_size": len(rows)}, one


# --- probes ---------------------------------------------------------------------------------------------------------


def probes(config: Config) -> list[ProbeSpec]:
    """Transformer-XL's probes in computational order, in a segment that nothing precedes."""
    specs: list[ProbeSpec] = []
    add, stream = gpt_blocks.collector(specs), gpt_blocks.STREAM
    add("embedding", stream)
    add("distances", ("key", "hidden"))
    block_input = "embedding"
    for layer in range(config["n_layer"]):
        a, f = f"layers.{layer}.attention.", f"layers.{layer}.feed_forward."
        if config.get("pre_lnorm", False):
            add(a + "norm", stream, block_input)
            attention = _add_attention(add, layer, a + "norm")
            add(a + "residual", stream, attention, block_input)
            add(f + "norm", stream, a + "residual")
            feed_forward = gpt_blocks.add_feed_forward(add, layer, f + "norm")
            add(f"layers.{layer}.output", stream, feed_forward, a + "residual")
        else:
            attention = _add_attention(add, layer, block_input)
            add(a + "residual", stream, attention, block_input)
            add(a + "output_norm", stream, a + "residual")
            feed_forward = gpt_blocks.add_feed_forward(add, layer, a + "output_norm")
            add(f + "residual", stream, feed_forward, a + "output_norm")
            add(f"layers.{layer}.output", stream, f + "residual")
        block_input = f"layers.{layer}.output"
    add("head_scores", ("batch", "seq", "head_entry"), block_input)
    add("logits", ("batch", "seq", "vocab"), block_input, "head_scores")
    return specs


def _add_attention(add: gpt_blocks.Add, layer: int, source: str) -> str:
    """The probes of relative attention, from its input `source` to its output, whose name is returned."""
    a = f"layers.{layer}.attention."
    heads, scores = ("batch", "head", "seq", "head_dim"), ("batch", "head", "seq", "key")
    for part in ("query", "key", "value"):
        add(a + part, heads, source)
    add(a + "distance_key", ("key", "head", "head_dim"), "distances")
    add(a + "content_scores", scores, a + "query", a + "key")
    add(a + "position_scores", scores, a + "query", a + "distance_key")
    add(a + "weights", scores, a + "content_scores", a + "position_scores")
    add(a + "context", ("batch", "seq", "head", "head_dim"), a + "weights", a + "value")
    add(a + "output", gpt_blocks.STREAM, a + "context")
    return a + "output"


def module_probes(config: Config) -> dict[str, tuple[str, str]]:
    """Probe -> (module path as the hub names it, "input" or "output")."""
    inside = {
        "attention.distance_key": ("dec_attn.r_net", "output"),
        "attention.context": ("dec_attn.o_net", "input"),
        "attention.output": ("dec_attn.o_net", "output"),
        "feed_forward.up": ("pos_ff.CoreNet.0", "output"),
        "feed_forward.activation": ("pos_ff.CoreNet.3", "input"),
        "feed_forward.output": ("pos_ff.CoreNet.3", "output"),
        "output": ("pos_ff", "output"),
    }
    if config.get("pre_lnorm", False):
        inside |= {
            "attention.norm": ("dec_attn.layer_norm", "output"),
            "attention.residual": ("pos_ff", "input"),
            "feed_forward.norm": ("pos_ff.layer_norm", "output"),
        }
    else:
        inside |= {
            "attention.residual": ("dec_attn.layer_norm", "input"),
            "attention.output_norm": ("dec_attn.layer_norm", "output"),
            "feed_forward.residual": ("pos_ff.layer_norm", "input"),
        }
    return {
        "embedding": ("transformer.layers.0", "input"),
        "distances": ("transformer.pos_emb", "output"),
        "head_scores": ("crit.head_scores", "output"),
        "logits": ("crit", "output"),
    } | {
        f"layers.{layer}.{probe}": (f"transformer.layers.{layer}.{module}", side)
        for layer in range(config["n_layer"])
        for probe, (module, side) in inside.items()
    }


def kernel_probes(config: Config) -> dict[str, tuple[str, str]]:
    """Probe -> (the nn.Identity that shows it in the reference, what the oracle calls the value)."""
    parts = ("query", "key", "value", "content_scores", "position_scores", "weights")
    return {
        f"layers.{layer}.attention.{part}": (f"transformer.layers.{layer}.dec_attn.{part}", part)
        for layer in range(config["n_layer"])
        for part in parts
    }


def probe_sizes(config: Config, batch: int, seq: int) -> dict[str, int]:
    """Axis name -> size, for the axes that the probes use."""
    shortlist = [*config["cutoffs"], config["vocab_size"]][0]
    return {
        "batch": batch, "seq": seq, "key": seq, "hidden": config["d_model"], "vocab": config["vocab_size"],
        "intermediate": config["d_inner"], "head": config["n_head"], "head_dim": config["d_head"],
        "head_entry": shortlist + len(config["cutoffs"]),
    }  # fmt: skip


# --- properties -----------------------------------------------------------------------------------------------------

_EXCEPTIONS = {
    "causality.gradient": "the embedding table is cut into clusters of ids",
    **dict.fromkeys(
        ("batching.padding", "batching.decoding", "cache.ragged_plan", "generation.greedy", "generation.stop_token"),
        "the model knows no padding: it takes no mask",
    ),
    "batching.packed": "a segment goes on where the one before it ended: there is no packing",
    **dict.fromkeys(
        ("cache.any_plan distinct", "cache.fresh_session distinct", "cache.interleaved distinct"),
        "the memory is shorter than the text: what a call sees ends where its memory does",
    ),
}


def _windows(config: Config) -> tuple[int | None, ...]:
    window: int | None = config["mem_len"] if config["same_length"] else None
    return (window,) * int(config["n_layer"])


_EQUATIONS = r"""
With x (seq, d_model) the residual stream, which starts as sqrt(d_model) · P_c E_c[id], c the id's cluster, for each
block, m being what entered it for the last mem_len tokens before the segment:

    E      = [SG(m) ∘ x]                                                SG: without gradients; a first m is empty
    q      = x Wqᵀ,  k, v = E Wkᵀ, E Wvᵀ                                 cut into n_head heads of d_head
    A_ij   = ((q_i + u) · k_j + (q_i + v) · (R_{i−j} Wrᵀ)) / sqrt(d_head)     i − j: how far j is before i
    n      = LayerNorm(x + (softmax(A) v) Woᵀ)                          over j up to i; var divides by d_model
    x      = LayerNorm(n + relu(n W1ᵀ + b1) W2ᵀ + b2)

R_d = [sin(d f), cos(d f)], f_i = 10000^(−2i / d_model), for d = min(distance, clamp_len) if clamp_len > 0.  With
same_length i sees mem_len keys, its own included.  With pre_lnorm the norms are of what enters attention (E) and
feed-forward, and nothing is normalised after the last block.  r_w_bias is u, r_r_bias is v.

    head   = log softmax([E_0 P_0ᵀ x + b_0, W_c P_0ᵀ x + b_c])           the first cluster's ids, then the clusters
    tail_c = log softmax(E_c P_cᵀ x + b_c)
    logits = head of the first cluster's ids; head of the cluster + tail of the id for the others

The logits are log-probabilities.  Without clusters they are log softmax(E_0 P_0ᵀ x + b_0).
"""


FAMILY = Family(
    name="transformer_xl",
    title="Transformer-XL",
    paper="Dai et al. 2019, arXiv:1901.02860",
    equations=_EQUATIONS,
    oracle="TransfoXLLMHeadModel",
    oracle_class="conformance.oracles.transformer_xl:TransformerXL",
    oracle_requires="transformers<=4.37.2",
    oracle_kernels=("eager",),
    layers_key="n_layer",
    fields=(
        ConfigField(name="mem_len", default="1600", meaning="tokens that each layer remembers"),
        ConfigField(name="same_length", default="true", meaning="every query sees mem_len keys, its own included"),
        ConfigField(name="clamp_len", default="1000", meaning="distances beyond count as this; 0 or less: all count"),
        ConfigField(name="pre_lnorm", default="false", meaning="norms before each half of a block, not after it"),
        ConfigField(name="untie_r", default="true", meaning="each layer has biases u and v of its own"),
        ConfigField(name="cutoffs", default="[20000, 40000, 200000]", meaning="ids at which a new cluster begins"),
        ConfigField(name="div_val", default="4", meaning="what the embedding's width is divided by from cluster to "
                    "cluster; 1: one table"),
        ConfigField(name="d_embed", default="1024", meaning="width of the first cluster's embedding; as d_model and "
                    "with div_val 1: no projections"),
        ConfigField(name="tie_word_embeddings", default="true", meaning="the softmax uses the embedding tables"),
        ConfigField(name="proj_share_all_but_first", default="true", meaning="the softmax uses the embedding's "
                    "projections of all clusters but the first"),
        ConfigField(name="tie_projs", default="as proj_share_all_but_first says", meaning="the same, said cluster by "
                    "cluster"),
        ConfigField(name="layer_norm_epsilon", default="1e-5", meaning="ε inside the root of LayerNorm"),
    ),
    recipes=tuple(dataclasses.replace(recipe, scaled=_EMBEDDINGS) for recipe in _recipes()),
    tensor_shapes=tensor_shapes,
    probes=probes,
    probe_sizes=probe_sizes,
    module_probes=module_probes,
    kernel_probes=kernel_probes,
    block_checkpoint=block_checkpoint,
    properties=Properties(
        table=lambda config: "transformer.word_emb.emb_layers.0.weight",
        windows=_windows,
        memory=lambda config: config["mem_len"],
        tied=lambda config: False,
        exceptions=_EXCEPTIONS,
        twins={"spelling": NO_CLAMP},
        also={
            "field-mem_len-window": (
                "cache.any_plan", "cache.fresh_session", "reach.last_row", "reach.one_layer", "reach.memory",
            )
        },
    ),
)  # fmt: skip
