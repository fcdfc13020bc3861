"""Switch Transformer (Fedus et al. 2021): T5's encoder and decoder with one expert a token in some of their blocks.

Oracle: `SwitchTransformersForConditionalGeneration` of Hugging Face transformers at true double precision; where the
library differs from the paper, the paper decides (`conformance.oracles.switch`).

Capacity.  An expert takes `expert_capacity` tokens of a row, the first ones that choose it; a later one passes by on
the residual connection only.  The paper says so (section 2.2 and figure 3), and so do 4.57.6 and 5.18.0 to 5.23.0 of
the library.  5.0.0 to 5.17.0 drop no token (huggingface/transformers#48293, fixed by #48421), and 5.0.0 and 5.10.2 keep
the position bias from all blocks but the first: `plain` and `capacity` tell these apart.

Padding takes room like any token, and the tokens of a call know nothing of those of the call before: where room is
scarce, neither a padded row nor a text that is fed in pieces need equal the row alone.  So padding and decoding are
claimed where there is room for all, and padding where `router_ignore_padding_tokens` is set.

Rounding may send a token to another expert: working dtypes are claimed only where `golden make` finds the routing
margins to suffice.
"""

from typing import Any

from conformance.families import Config, ConfigField, Family, Recipe
from conformance.families.decoders import field_case, only_in, without
from conformance.families.encoder_decoders import MODEST
from conformance.families.properties import ENCODER_DECODER, EVERY, ROUTED, Properties
from conformance.probes import ProbeSpec

# --- configurations -------------------------------------------------------------------------------------------------

_DEFAULT_EXPERTS, _DEFAULT_BUCKETS, _DEFAULT_DECODER_LAYERS = 8, 32, 12


def _config(**changes: Any) -> Config:
    """A small Switch Transformer at its defaults, then changed.  One block in each stack is sparse, the second one."""
    return {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": "switch_transformers",
        "is_encoder_decoder": True,
        "vocab_size": 61,
        "d_model": 26,
        "d_kv": 7,
        "d_ff": 20,
        "num_heads": 3,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "encoder_sparse_step": 3,
        "decoder_sparse_step": 2,
        "num_experts": _DEFAULT_EXPERTS,
        "expert_capacity": 64,
        "router_bias": False,
        "router_ignore_padding_tokens": False,
        "router_dtype": "float32",
        "relative_attention_num_buckets": _DEFAULT_BUCKETS,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "dense_act_fn": "relu",
        "tie_word_embeddings": True,
        "dropout_rate": 0.1,  # only in training, like the next; the suite evaluates, so a candidate that applies one
        "router_jitter_noise": 0.1,  # of them fails
        "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 0.001,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    } | changes


# Keys that decide the maths and that a config.json may leave out. Without the steps they follow from the numbers of
# sparse blocks; without num_decoder_layers there would be 12 blocks.
_OPTIONAL = (
    "encoder_sparse_step", "decoder_sparse_step", "num_experts", "expert_capacity", "router_bias",
    "router_ignore_padding_tokens", "router_dtype", "relative_attention_num_buckets",
    "relative_attention_max_distance", "layer_norm_epsilon", "dense_act_fn", "tie_word_embeddings", "dropout_rate",
    "router_jitter_noise", "router_aux_loss_coef", "router_z_loss_coef",
)  # fmt: skip


def _terse() -> Config:
    return {key: value for key, value in _config().items() if key not in _OPTIONAL}


# --- cases ----------------------------------------------------------------------------------------------------------

_TARGET = 9
_MODEST = only_in(("float64", "float32"), MODEST)
_FULL = _MODEST | {
    "golden.loss": ("float64",),
    "golden.auxiliary_losses": ("float64",),
    "golden.gradients": ("float64",),
}
# Scores are not divided by √d_kv; T5 draws query weights smaller instead, and so do these cases (by a power of two).
_SMALL_QUERIES = {"Attention.q.weight": 0.25}
_PADDED = ("golden.left_padding", "golden.right_padding", "cache.ragged")
_CACHED = ("cache.prefill_decode", "cache.one_by_one", "cache.chunks", "cache.ragged")


def _recipe(name: str, summary: str, config: Config, *, weights: str | None = None, **more: Any) -> Recipe:
    name = f"switch_transformer/{name}"
    settings: dict[str, Any] = {"claims": _MODEST, "target": _TARGET, "scaled": _SMALL_QUERIES, **more}
    return Recipe(name=name, summary=summary, config=config, weights=weights or name, **settings)


def _field(
    field: str, label: str, changes: dict[str, Any], *, also: dict[str, Config] | None = None, **more: Any
) -> Recipe:
    config = _config(**changes)
    case = field_case("switch_transformer", field, label, config, _config(), tensor_shapes, also=also)
    return _recipe(
        f"field-{label}", case.summary, config, weights=case.weights, field=field,
        counterfactuals=case.counterfactuals, **more,
    )  # fmt: skip


def _recipes() -> tuple[Recipe, ...]:
    distinct = _config(
        vocab_size=47, d_model=18, d_kv=7, num_heads=3, d_ff=13, num_layers=4, num_decoder_layers=3,
        num_sparse_encoder_layers=2, encoder_sparse_step=2, decoder_sparse_step=3, num_experts=6, expert_capacity=3,
        router_bias=True, relative_attention_num_buckets=10, relative_attention_max_distance=7,
        layer_norm_epsilon=1e-3,
    )  # fmt: skip
    square = _config(vocab_size=24, d_model=24, d_kv=6, num_heads=4, d_ff=24, num_experts=4)
    scarce = _config(num_experts=4, expert_capacity=2)
    eleven = _config(num_experts=11, d_ff=6, vocab_size=37)
    return (
        _recipe(
            "plain", "unequal sizes, every maths field at its default: what a modest engine can pass", _config(),
            claims=without(_FULL, "golden.gradients"), store=frozenset({"loss", "auxiliary"}),
        ),
        _recipe(
            "distinct", "everything at once: all sizes different, a bias in the router, room for 3 tokens an expert",
            distinct, claims=without(_FULL, *_PADDED, *_CACHED),
            store=frozenset({"probes", "gradients", "loss", "auxiliary"}),
            counterfactuals={"expert_capacity ignored": distinct | {"expert_capacity": 64}},
        ),
        _recipe(
            "square", "all sizes equal, so that a wrong transpose loads without a shape error", square, batch=3,
            claims=_MODEST | {"golden.loss": ("float64",)}, store=frozenset({"loss"}),
        ),
        _recipe(
            "capacity", "room for 2 tokens of a row at each of 4 experts: the rest are dropped", scarce,
            weights="switch_transformer/plain",
            claims={"golden.logits": _MODEST["golden.logits"], "golden.auxiliary_losses": ("float64",)},
            store=frozenset({"auxiliary"}),
            field="expert_capacity",
            counterfactuals={
                "expert_capacity ignored": scarce | {"expert_capacity": 64},
                "room for 3 tokens (counted from 0)": scarce | {"expert_capacity": 3},
                "room for 1 token": scarce | {"expert_capacity": 1},
            },
        ),
        _recipe(
            "field-router_ignore_padding_tokens", "capacity, but padding takes no room: a padded row is as if alone",
            scarce | {"router_ignore_padding_tokens": True}, weights="switch_transformer/plain",
            claims=dict.fromkeys(("golden.left_padding", "golden.right_padding"), ("float64",)),
            field="router_ignore_padding_tokens",
        ),
        _recipe("eleven-experts", "11 experts: sorted as strings, 10 comes before 2", eleven),
        _recipe(
            "long", "40 source and 37 target tokens: far positions share buckets", _config(), batch=1, seq=40,
            target=37, weights="switch_transformer/plain", claims=without(_MODEST, *_PADDED),
            counterfactuals={
                "relative_attention_max_distance at 64": _config(relative_attention_max_distance=64),
                "relative_attention_max_distance at 256": _config(relative_attention_max_distance=256),
            },
        ),
        _field("num_experts", "num_experts", {"num_experts": 5}),
        _field("num_sparse_encoder_layers", "num_sparse_encoder_layers",
               {"num_sparse_encoder_layers": 3, "encoder_sparse_step": 1}),
        _field("num_sparse_decoder_layers", "num_sparse_decoder_layers",
               {"num_sparse_decoder_layers": 2, "decoder_sparse_step": 1}),
        _field("encoder_sparse_step and decoder_sparse_step", "sparse_step",
               {"encoder_sparse_step": 0, "decoder_sparse_step": 1}),
        _field("num_decoder_layers", "num_decoder_layers", {"num_decoder_layers": None, "decoder_sparse_step": 3}),
        _field("router_bias", "router_bias", {"router_bias": True}),
        _field("relative_attention_num_buckets", "relative_attention_num_buckets",
               {"relative_attention_num_buckets": 12}),
        _field("relative_attention_max_distance", "relative_attention_max_distance",
               {"relative_attention_max_distance": 20}, seq=25, target=23),
        _field("layer_norm_epsilon", "layer_norm_epsilon", {"layer_norm_epsilon": 0.05}),
        _field("dense_act_fn", "dense_act_fn-gelu", {"dense_act_fn": "gelu"},
               also={"GELU in its tanh form": _config(dense_act_fn="gelu_new")}),
        _field("dense_act_fn", "dense_act_fn-gelu_new", {"dense_act_fn": "gelu_new"},
               also={"GELU in its exact form": _config(dense_act_fn="gelu")}),
        _field("dense_act_fn", "dense_act_fn-silu", {"dense_act_fn": "silu"}),
        _field("tie_word_embeddings", "tie_word_embeddings", {"tie_word_embeddings": False}),
        _recipe(
            "field-absent", "plain with every key that has a default left out of config.json", _terse(),
            weights="switch_transformer/plain", field="absent keys",
            counterfactuals={
                "layer_norm_epsilon at 1e-5": _config(layer_norm_epsilon=1e-5),
                "dense_act_fn taken for gelu_new": _config(dense_act_fn="gelu_new"),
            },
        ),
    )  # fmt: skip


# --- checkpoint -----------------------------------------------------------------------------------------------------


_COPIES = {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"}


def _blocks(config: Config, stack: str) -> list[bool]:
    """Of each block of the encoder or the decoder, whether it is sparse."""
    count = config["num_layers"]
    if stack == "decoder":
        stated = config.get("num_decoder_layers", _DEFAULT_DECODER_LAYERS)
        count = count if stated is None else stated
    step = config.get(f"{stack}_sparse_step")
    if step is None:
        step = count // config[f"num_sparse_{stack}_layers"]
    return [step == 1 or (step > 1 and block % step == 1) for block in range(count)]


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Hub name -> shape of everything a checkpoint holds.

    With a tied head there is one table.  With an untied one 4.x wrote, beside it and the head, only "shared.weight",
    which the library then gave to encoder and decoder; 5.23.0 wants theirs in the file, and draws them anew where they
    are missing.
    """
    hidden, vocab, heads = config["d_model"], config["vocab_size"], config["num_heads"]
    inner, buckets = heads * config["d_kv"], config.get("relative_attention_num_buckets", _DEFAULT_BUCKETS)
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (vocab, hidden)}
    if not config.get("tie_word_embeddings", True):
        shapes |= dict.fromkeys(("lm_head.weight", *_COPIES), (vocab, hidden))
    for stack in ("encoder", "decoder"):
        shapes[f"{stack}.final_layer_norm.weight"] = (hidden,)
        shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (buckets, heads)
        for block, sparse in enumerate(_blocks(config, stack)):
            attentions = ["SelfAttention"] if stack == "encoder" else ["SelfAttention", "EncDecAttention"]
            for layer, attention in enumerate(attentions):
                path = f"{stack}.block.{block}.layer.{layer}."
                shapes |= {f"{path}{attention}.{name}.weight": (inner, hidden) for name in "qkv"}
                shapes |= {f"{path}{attention}.o.weight": (hidden, inner), f"{path}layer_norm.weight": (hidden,)}
            path = f"{stack}.block.{block}.layer.{len(attentions)}."
            shapes |= {f"{path}layer_norm.weight": (hidden,)} | _feed_forward_shapes(config, f"{path}mlp.", sparse)
    return shapes


def _feed_forward_shapes(config: Config, path: str, sparse: bool) -> dict[str, tuple[int, ...]]:
    hidden, ffn, experts = config["d_model"], config["d_ff"], config.get("num_experts", _DEFAULT_EXPERTS)
    inside = [f"experts.expert_{expert}." for expert in range(experts)] if sparse else [""]
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix in inside:
        shapes |= {f"{path}{prefix}wi.weight": (ffn, hidden), f"{path}{prefix}wo.weight": (hidden, ffn)}
    if sparse:
        shapes[f"{path}router.classifier.weight"] = (experts, hidden)
        if config.get("router_bias", False):
            shapes[f"{path}router.classifier.bias"] = (experts,)
    return shapes


# --- probes ---------------------------------------------------------------------------------------------------------


def probes(config: Config) -> list[ProbeSpec]:
    """The encoder's probes in computational order, then the decoder's, then the logits."""
    specs: list[ProbeSpec] = []

    def add(name: str, axes: tuple[str, ...], *parents: str) -> str:
        specs.append(ProbeSpec(name=name, axes=axes, parents=parents))
        return name

    def attention(path: str, block_input: str, seq: str, key: str, memory: str | None = None) -> str:
        """`seq`, `key`: axes of queries and keys.  `memory`: what keys and values are projections of, if not norm."""
        norm = add(f"{path}norm", ("batch", seq, "hidden"), block_input)
        source, place = (norm, seq) if memory is None else (memory, "source")
        add(f"{path}query", ("batch", seq, "head", "head_dim"), norm)
        add(f"{path}key", ("batch", place, "head", "head_dim"), source)
        add(f"{path}value", ("batch", place, "head", "head_dim"), source)
        add(f"{path}scores", ("batch", "head", seq, key), f"{path}query", f"{path}key")
        add(f"{path}weights", ("batch", "head", seq, key), f"{path}scores")
        add(f"{path}context", ("batch", seq, "head", "head_dim"), f"{path}weights", f"{path}value")
        add(f"{path}output", ("batch", seq, "hidden"), f"{path}context")
        return add(f"{path}residual", ("batch", seq, "hidden"), f"{path}output", block_input)

    def feed_forward(path: str, block_input: str, seq: str, sparse: bool) -> str:
        stream = ("batch", seq, "hidden")
        norm = add(f"{path}norm", stream, block_input)
        if not sparse:
            add(f"{path}up", ("batch", seq, "intermediate"), norm)
            add(f"{path}activation", ("batch", seq, "intermediate"), f"{path}up")
            return add(f"{path}output", stream, f"{path}activation")
        add(f"{path}router_logits", ("batch", seq, "expert"), norm)
        add(f"{path}routing_weights", ("batch", seq, "choice"), f"{path}router_logits")
        add(f"{path}expert_outputs", ("batch", seq, "choice", "hidden"), norm, f"{path}router_logits")
        return add(f"{path}output", stream, f"{path}routing_weights", f"{path}expert_outputs")

    for stack, seq, key in (("encoder", "source", "source_key"), ("decoder", "seq", "key")):
        x = add(f"{stack}.embedding", ("batch", seq, "hidden"))
        for block, sparse in enumerate(_blocks(config, stack)):
            layer = f"{stack}.layers.{block}."
            x = attention(f"{layer}attention.", x, seq, key)
            if stack == "decoder":
                x = attention(f"{layer}cross_attention.", x, seq, "source_key", memory="encoder.final_norm")
            added = feed_forward(f"{layer}feed_forward.", x, seq, sparse)
            x = add(f"{layer}output", ("batch", seq, "hidden"), added, x)
        add(f"{stack}.final_norm", ("batch", seq, "hidden"), x)
    add("logits", ("batch", "seq", "vocab"), "decoder.final_norm")
    return specs


def probe_sizes(config: Config, batch: int, seq: int, source: int) -> dict[str, int]:
    """Axis name -> size; `choice` counts a token's experts, and there is one."""
    return {
        "batch": batch, "seq": seq, "key": seq, "source": source, "source_key": source, "hidden": config["d_model"],
        "head": config["num_heads"], "head_dim": config["d_kv"], "intermediate": config["d_ff"],
        "expert": config.get("num_experts", _DEFAULT_EXPERTS), "choice": 1, "vocab": config["vocab_size"],
    }  # fmt: skip


_ATTENTION_MODULES = {
    "norm": ("layer_norm", "output"),
    "query": ("{attention}.q", "output"),
    "key": ("{attention}.k", "output"),
    "value": ("{attention}.v", "output"),
    "context": ("{attention}.o", "input"),
    "output": ("{attention}.o", "output"),
    "residual": ("", "output"),
}
_DENSE_MODULES = {
    "norm": ("layer_norm", "output"),
    "up": ("mlp.wi", "output"),
    "activation": ("mlp.wo", "input"),
    "output": ("mlp", "output"),
}
_SPARSE_MODULES = {
    "norm": ("layer_norm", "output"),
    "router_logits": ("mlp.router.classifier", "output"),
    "output": ("mlp", "output"),
}


def _sublayers(config: Config) -> list[tuple[str, str, str, bool]]:
    """Of every sublayer: the beginning of its probes' names, its path, the name of its attention or "mlp", sparse?"""
    found = []
    for stack in ("encoder", "decoder"):
        for block, sparse in enumerate(_blocks(config, stack)):
            named = {"attention": "SelfAttention", "cross_attention": "EncDecAttention", "feed_forward": "mlp"}
            if stack == "encoder":
                del named["cross_attention"]
            for number, (probe, module) in enumerate(named.items()):
                path = f"{stack}.block.{block}.layer.{number}"
                found.append((f"{stack}.layers.{block}.{probe}.", path, module, sparse))
    return found


def module_probes(config: Config) -> dict[str, tuple[str, str]]:
    """Probe -> (module path as the hub names it, "input" or "output")."""
    found = {"logits": ("lm_head", "output")}
    for stack in ("encoder", "decoder"):
        found[f"{stack}.embedding"] = (f"{stack}.block.0", "input")
        found[f"{stack}.final_norm"] = (f"{stack}.final_layer_norm", "output")
        for block, _ in enumerate(_blocks(config, stack)):
            found[f"{stack}.layers.{block}.output"] = (f"{stack}.block.{block}", "output")
    for probe, path, module, sparse in _sublayers(config):
        places = _ATTENTION_MODULES if module != "mlp" else _SPARSE_MODULES if sparse else _DENSE_MODULES
        for name, (inside, side) in places.items():
            found[probe + name] = (f"{path}.{inside}".format(attention=module).rstrip("."), side)
    return found


def kernel_probes(config: Config) -> dict[str, tuple[str, str]]:
    """Probe -> (path as the reference names it, what the kernel of attention or of experts calls the value)."""
    found: dict[str, tuple[str, str]] = {}
    for probe, path, module, sparse in _sublayers(config):
        if module != "mlp":
            found |= {probe + name: (f"{path}.{module}.{name}", name) for name in ("scores", "weights")}
        elif sparse:
            found |= {probe + name: (f"{path}.mlp.{name}", name) for name in ("routing_weights", "expert_outputs")}
    return found


# --- properties -----------------------------------------------------------------------------------------------------

# `distinct` has room for 3 tokens of a row at an expert, and drops more.
_SCARCE = dict.fromkeys(
    (f"{check} distinct" for check in (
        "cache.any_plan", "cache.fresh_session", "cache.interleaved", "cache.ragged_plan", "batching.decoding",
    )),
    "an expert's room is for the tokens of one call: fed in several, none may be dropped that one call drops",
) | dict.fromkeys(
    ("batching.padding distinct", "batching.source_padding distinct"), "padding takes room at the experts"
) | {"causality.encoder distinct": "experts drop the last tokens of a row, so that order counts"}  # fmt: skip


def _positionless(config: Config, weights: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Biases of 0 for every distance."""
    return config, {n: t * 0 if "relative_attention_bias" in n else t for n, t in weights.items()}


_EQUATIONS = r"""
Encoder, with x (source, d_model) the residual stream, which starts as Wshared[id], in each block:

    n      = x / sqrt(mean(x²) + layer_norm_epsilon) · w                RMSNorm, no mean subtracted, no shift
    q,k,v  = n Wqᵀ, n Wkᵀ, n Wvᵀ                                        num_heads heads of d_kv
    A      = softmax(q kᵀ + t[bucket(j − i)] + mask)                    not divided by sqrt(d_kv); t: a number a head
    x      = x + (A v) Woᵀ
    n      = RMSNorm(x)
    x      = x + relu(n Wiᵀ) Woᵀ                                        in a dense block
    x      = x + p_e(n) · relu(n Wi_eᵀ) Wo_eᵀ,  e = argmax p(n)         in a sparse one; p = softmax(n Wrᵀ) in float32

then encoder = RMSNorm(x).  The decoder's blocks have causal self-attention, attention over `encoder` (no t, no causal
mask; keys and values are projections of `encoder`) and the feed-forward layer, and logits =
RMSNorm(x) / sqrt(d_model) · Wsharedᵀ; the input of an untied head is not divided.

The table t stands in the first block of a stack and serves all of its blocks.  Half of an encoder's buckets are for
j ≤ i, half for j > i; all of a decoder's are for j ≤ i.  Of the b buckets of one direction, distances below e = ⌊b/2⌋
have one each; a farther n gets min(b − 1, e + ⌊log(n/e) / log(max_distance/e) · (b − e)⌋).  Positions count real
tokens.

Block i of a stack is sparse if i mod step = 1 (all are, if step = 1; none, if step = 0); step is encoder_sparse_step or
decoder_sparse_step, in their absence ⌊blocks / number of sparse blocks⌋.

An expert takes the first expert_capacity tokens of each row that choose it; a later one gets 0 from the layer.

A router adds, for each sparse layer, aux_loss = E Σ_e f_e P_e (f: share of the batch's tokens that choose e, P: mean
p_e) and z_loss = mean((log Σ_e exp r_e)²), r the router's logits; the suite compares the sums over all sparse layers.
"""


FAMILY = Family(
    name="switch_transformer",
    title="Switch Transformer",
    paper="Fedus et al. 2021, arXiv:2101.03961; T5: Raffel et al. 2020, arXiv:1910.10683",
    equations=_EQUATIONS,
    oracle="SwitchTransformersForConditionalGeneration",
    fields=(
        ConfigField(name="expert_capacity", default="64", meaning="tokens of a row that an expert takes"),
        ConfigField(name="num_experts", default="8", meaning="experts of a sparse block"),
        ConfigField(name="num_sparse_encoder_layers", default="3", meaning="sparse blocks of the encoder, from which "
                    "encoder_sparse_step follows"),
        ConfigField(name="num_sparse_decoder_layers", default="3", meaning="the same of the decoder"),
        ConfigField(name="encoder_sparse_step", default="num_layers // num_sparse_encoder_layers", meaning="block i is "
                    "sparse if i mod this is 1; 1: all are, 0: none is"),
        ConfigField(name="decoder_sparse_step", default="as the encoder's", meaning="the same of the decoder"),
        ConfigField(name="num_decoder_layers", default="12", meaning="blocks of the decoder; null: as many as the "
                    "encoder has"),
        ConfigField(name="router_bias", default="false", meaning="a bias in the router's projection"),
        ConfigField(name="router_ignore_padding_tokens", default="false", meaning="padding takes no room at experts"),
        ConfigField(name="relative_attention_num_buckets", default="32", meaning="rows of a table of position biases"),
        ConfigField(name="relative_attention_max_distance", default="128", meaning="distance from which on all share "
                    "the last bucket"),
        ConfigField(name="layer_norm_epsilon", default="1e-6", meaning="ε inside the root of RMSNorm"),
        ConfigField(name="dense_act_fn", default="relu", meaning="activation of feed-forward layers and experts"),
        ConfigField(name="tie_word_embeddings", default="true", meaning="the head is the embedding table, and its "
                    "input is divided by √d_model"),
    ),
    recipes=_recipes(),
    tensor_shapes=tensor_shapes,
    probes=probes,
    probe_sizes=probe_sizes,
    module_probes=module_probes,
    kernel_probes=kernel_probes,
    encoder_decoder=True,
    oracle_class="conformance.oracles.switch:SwitchTransformers",
    oracle_kernels=("eager",),
    layers_key="num_layers",
    module_kinds={"shared": "embedding"},
    copies=_COPIES,
    whole_rows_only=lambda config, longest: bool(config.get("expert_capacity", 64) < longest),
    properties=Properties(
        table=lambda config: "shared.weight",
        windows=lambda config: (None,) * len(_blocks(config, "decoder")),
        tied=lambda config: bool(config.get("tie_word_embeddings", True)),
        claims=EVERY | ENCODER_DECODER | {"gradients.auxiliary": ("float64",)},
        exceptions=ROUTED | _SCARCE,
        positionless=_positionless,
    ),
)  # fmt: skip
