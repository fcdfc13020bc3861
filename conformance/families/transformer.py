"""The Transformer (Vaswani et al. 2017): encoder and decoder, post-norm, scaled embeddings, sinusoidal positions.

Cases are checkpoints of Marian (model_type "marian"), which is the paper's model with positions in another order and a
bias on the logits; a case of model_type "transformer", ours, has the paper's order.

Oracles: `MarianMTModel` of Hugging Face transformers at true double precision, and `torch.nn.Transformer`: logits that
they do not agree on to 1e-12 are not written.
"""

import dataclasses
import re
from typing import Any

from conformance.families import Config, ConfigField, Family, Recipe
from conformance.families.decoders import field_case, without
from conformance.families.encoder_decoders import FULL, MODEST
from conformance.families.properties import ENCODER_DECODER, EVERY, Properties
from conformance.probes import ProbeSpec

# --- configurations -------------------------------------------------------------------------------------------------


def _config(**changes: Any) -> Config:
    """A small Transformer as in the paper, all sizes different, then changed."""
    return {
        "architectures": ["MarianMTModel"],
        "model_type": "marian",
        "is_encoder_decoder": True,
        "vocab_size": 47,
        "d_model": 24,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 3,
        "encoder_ffn_dim": 37,
        "decoder_ffn_dim": 43,
        "activation_function": "relu",
        "scale_embedding": True,
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
        "max_position_embeddings": 67,
        "decoder_start_token_id": 1,
        "pad_token_id": 46,
        "eos_token_id": 0,
        "forced_eos_token_id": None,
        # only in training; the suite evaluates, so a candidate that applies them fails
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "encoder_layerdrop": 0.1,
        "decoder_layerdrop": 0.1,
        "torch_dtype": "float32",
    } | changes


# Keys that a config.json may leave out: each has a default.
_OPTIONAL = (
    "activation_function", "scale_embedding", "share_encoder_decoder_embeddings", "tie_word_embeddings", "dropout",
    "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop",
)  # fmt: skip


def _terse() -> Config:
    return {key: value for key, value in _config().items() if key not in _OPTIONAL}


# --- cases ----------------------------------------------------------------------------------------------------------

_UNSHARED = {"share_encoder_decoder_embeddings": False}


def _field(field: str, label: str, changes: dict[str, Any], also: dict[str, Config] | None = None) -> Recipe:
    moved = field_case("transformer", field, label, _config(**changes), _config(), tensor_shapes, also=also)
    return _encoder_decoder(moved)


def _encoder_decoder(recipe: Recipe) -> Recipe:
    """A field case with the claims of its kind, and a decoder."""
    return dataclasses.replace(recipe, claims=MODEST, target=13)


def _recipes() -> tuple[Recipe, ...]:
    paper = _config(model_type="transformer")
    return (
        Recipe(
            name="transformer/plain",
            summary="unequal sizes, the paper's options: what a modest engine can pass",
            config=_config(),
            weights="transformer/plain",
            target=13,
            claims=without(FULL, "golden.gradients"),
            store=frozenset({"loss"}),
            field="model_type",
            counterfactuals={"the paper's order of sines and cosines": paper},
        ),
        Recipe(
            name="transformer/distinct",
            summary="everything at once: two vocabularies, a head of its own, SiLU, all sizes different",
            config=_config(
                d_model=30,
                encoder_attention_heads=5,
                decoder_attention_heads=3,
                decoder_vocab_size=45,
                pad_token_id=44,  # never a real id, of source or target: its embedding gets no gradient in the library
                tie_word_embeddings=False,
                activation_function="swish",
                **_UNSHARED,
            ),
            weights="transformer/distinct",
            batch=4,
            seq=9,
            target=11,
            claims=FULL,
            store=frozenset({"probes", "gradients", "loss"}),
        ),
        Recipe(
            name="transformer/large",
            summary="a residual stream whose squares overflow float16: norms are computed in float32",
            config=_config(),
            weights="transformer/plain",
            target=13,
            scaled={"self_attn.out_proj.weight": 256.0},
            claims={"golden.logits": ("float64", "float16")},
        ),
        Recipe(
            name="transformer/square",
            summary="as many sizes equal as can be, so that a projection that is not transposed loads",
            config=_config(
                d_model=24, vocab_size=24, encoder_ffn_dim=24, decoder_ffn_dim=24, decoder_layers=2,
                encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=23, max_position_embeddings=24,
            ),
            weights="transformer/square",
            batch=3,
            target=11,
            claims=MODEST | {"golden.loss": ("float64",)},
            store=frozenset({"loss"}),
        ),
        Recipe(
            name="transformer/paper",
            summary="plain with sines and cosines in the paper's alternating order (model_type transformer, ours)",
            config=paper,
            weights="transformer/plain",
            target=13,
            claims=MODEST,
            field="model_type",
            counterfactuals={"all sines before all cosines": _config()},
        ),
        Recipe(
            name="transformer/long",
            summary="plain with hundreds of tokens; the last 16 of the target are compared",
            config=_config(max_position_embeddings=301),
            weights="transformer/plain",
            batch=2,
            seq=300,
            target=280,
            last_rows=16,
            claims={"golden.logits": ("float64", "float32", "bfloat16"), "cache.prefill_decode": ("float64",)},
        ),
        _field("activation_function", "activation_function-gelu", {"activation_function": "gelu"},
               {"GELU in its tanh form": _config(activation_function="gelu_new")}),
        _field("activation_function", "activation_function-swish", {"activation_function": "swish"}),
        _field("scale_embedding", "scale_embedding", {"scale_embedding": False}),
        _field("encoder_attention_heads", "encoder_attention_heads", {"encoder_attention_heads": 6},
               {"encoder_attention_heads taken from the decoder's": _config(encoder_attention_heads=3)}),
        _field("decoder_attention_heads", "decoder_attention_heads", {"decoder_attention_heads": 2},
               {"decoder_attention_heads taken from the encoder's": _config(decoder_attention_heads=4)}),
        _field("share_encoder_decoder_embeddings", "share_encoder_decoder_embeddings", _UNSHARED),
        _field("decoder_vocab_size", "decoder_vocab_size", _UNSHARED | {"decoder_vocab_size": 45, "pad_token_id": 44}),
        _field("tie_word_embeddings", "tie_word_embeddings", _UNSHARED | {"tie_word_embeddings": False},
               {"the target's embedding table as the head": _config(**_UNSHARED)}),
        _encoder_decoder(
            Recipe(
                name="transformer/field-absent",
                summary="plain with every key that has a default left out of config.json",
                config=_terse(),
                weights="transformer/plain",
                claims=MODEST,
                field="absent keys",
                counterfactuals={
                    "scale_embedding on": _config(activation_function="gelu"),
                    "ReLU for the activation": _config(scale_embedding=False),
                },
            )
        ),
    )  # fmt: skip


# --- checkpoint -----------------------------------------------------------------------------------------------------


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Hub name -> shape of everything a checkpoint holds; tables that are shared or tied once."""
    size, vocab = config["d_model"], config["vocab_size"]
    target = config.get("decoder_vocab_size") or vocab
    if config.get("share_encoder_decoder_embeddings", True):
        shapes: dict[str, tuple[int, ...]] = {"model.shared.weight": (vocab, size)}
    else:
        shapes = {
            "model.encoder.embed_tokens.weight": (vocab, size),
            "model.decoder.embed_tokens.weight": (target, size),
        }
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (target, size)
    shapes["final_logits_bias"] = (1, target)
    for side, attentions in {"encoder": ("self_attn",), "decoder": ("self_attn", "encoder_attn")}.items():
        inside = config[f"{side}_ffn_dim"]
        projections = {f"{a}.{part}_proj": (size, size) for a in attentions for part in ("q", "k", "v", "out")}
        projections |= {"fc1": (inside, size), "fc2": (size, inside)}
        norms = (*(f"{a}_layer_norm" for a in attentions), "final_layer_norm")
        for layer in range(config[f"{side}_layers"]):
            prefix = f"model.{side}.layers.{layer}."
            for name, shape in projections.items():
                shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
            for name in norms:
                shapes |= {f"{prefix}{name}.weight": (size,), f"{prefix}{name}.bias": (size,)}
    return shapes


# --- probes ---------------------------------------------------------------------------------------------------------

SOURCE, TARGET = ("batch", "source", "hidden"), ("batch", "seq", "hidden")


def probes(config: Config) -> list[ProbeSpec]:
    """The Transformer's probes in computational order: the encoder's, then the decoder's."""
    specs: list[ProbeSpec] = []

    def add(name: str, axes: tuple[str, ...], *parents: str) -> str:
        specs.append(ProbeSpec(name=name, axes=axes, parents=parents))
        return name

    x = add("encoder.embedding", SOURCE)
    for layer in range(config["encoder_layers"]):
        prefix = f"encoder.layers.{layer}."
        n = _add_attention(add, prefix + "attention.", x, x, ("source", "source_key"), "head")
        x = _add_feed_forward(add, prefix, n, "source", "intermediate")
    encoded = x
    x = add("decoder.embedding", TARGET)
    for layer in range(config["decoder_layers"]):
        prefix = f"decoder.layers.{layer}."
        n = _add_attention(add, prefix + "attention.", x, x, ("seq", "key"), "decoder_head")
        m = _add_attention(add, prefix + "cross_attention.", n, encoded, ("seq", "source_key"), "decoder_head")
        x = _add_feed_forward(add, prefix, m, "seq", "decoder_intermediate")
    add("logits", ("batch", "seq", "vocab"), x)
    return specs


def _add_attention(add: Any, a: str, x: str, memory: str, axes: tuple[str, str], head: str) -> str:
    """From the block's stream `x` and what it attends to, to the normalised sum, whose name is returned."""
    rows, keys = axes
    dim = "head_dim" if head == "head" else "decoder_head_dim"
    query = add(a + "query", ("batch", rows, head, dim), x)
    key = add(a + "key", ("batch", keys, head, dim), memory)
    value = add(a + "value", ("batch", keys, head, dim), memory)
    scores = add(a + "scores", ("batch", head, rows, keys), query, key)
    weights = add(a + "weights", ("batch", head, rows, keys), scores)
    context = add(a + "context", ("batch", rows, head, dim), weights, value)
    output = add(a + "output", ("batch", rows, "hidden"), context)
    residual = add(a + "residual", ("batch", rows, "hidden"), output, x)
    return str(add(a + "output_norm", ("batch", rows, "hidden"), residual))


def _add_feed_forward(add: Any, prefix: str, x: str, rows: str, intermediate: str) -> str:
    """From the feed-forward's input `x` to the block's output, whose name is returned."""
    f = prefix + "feed_forward."
    up = add(f + "up", ("batch", rows, intermediate), x)
    activation = add(f + "activation", ("batch", rows, intermediate), up)
    output = add(f + "output", ("batch", rows, "hidden"), activation)
    residual = add(f + "residual", ("batch", rows, "hidden"), output, x)
    return str(add(prefix + "output", ("batch", rows, "hidden"), residual))


def probe_sizes(config: Config, batch: int, seq: int, source: int) -> dict[str, int]:
    """Axis name -> size, for the axes that the probes use."""
    size, heads, others = config["d_model"], config["encoder_attention_heads"], config["decoder_attention_heads"]
    return {
        "batch": batch, "seq": seq, "key": seq, "source": source, "source_key": source, "hidden": size,
        "head": heads, "head_dim": size // heads, "decoder_head": others, "decoder_head_dim": size // others,
        "intermediate": config["encoder_ffn_dim"], "decoder_intermediate": config["decoder_ffn_dim"],
        "vocab": config.get("decoder_vocab_size") or config["vocab_size"],
    }  # fmt: skip


# probe inside an attention -> (module, side); {a} is its name on the hub
ATTENTION = {
    "query": ("{a}.q_proj", "output"), "key": ("{a}.k_proj", "output"), "value": ("{a}.v_proj", "output"),
    "context": ("{a}.out_proj", "input"), "output": ("{a}.out_proj", "output"),
    "residual": ("{a}_layer_norm", "input"), "output_norm": ("{a}_layer_norm", "output"),
}  # fmt: skip
# probe inside a block, behind its attentions -> (module, side)
REST = {
    "feed_forward.up": ("fc1", "output"), "feed_forward.activation": ("fc2", "input"),
    "feed_forward.output": ("fc2", "output"), "feed_forward.residual": ("final_layer_norm", "input"),
    "output": ("final_layer_norm", "output"),
}  # fmt: skip
# stack -> its attentions: word of the vocabulary -> name on the hub
ATTENTIONS = {
    "encoder": {"attention": "self_attn"},
    "decoder": {"attention": "self_attn", "cross_attention": "encoder_attn"},
}


def module_probes(config: Config) -> dict[str, tuple[str, str]]:
    """Probe -> (module path as the hub names it, "input" or "output")."""
    found = {"logits": ("", "output")}
    for side, attentions in ATTENTIONS.items():
        found[f"{side}.embedding"] = (f"model.{side}.layers.0", "input")
        for layer in range(config[f"{side}_layers"]):
            path, prefix = f"model.{side}.layers.{layer}.", f"{side}.layers.{layer}."
            found |= {prefix + probe: (path + module, boundary) for probe, (module, boundary) in REST.items()}
            for word, name in attentions.items():
                found |= {
                    f"{prefix}{word}.{probe}": (path + module.format(a=name), boundary)
                    for probe, (module, boundary) in ATTENTION.items()
                }
    return found


def kernel_probes(config: Config) -> dict[str, tuple[str, str]]:
    """Probe -> (the nn.Identity that shows it in the reference, what the attention kernel calls the value)."""
    return {
        f"{side}.layers.{layer}.{word}.{part}": (f"model.{side}.layers.{layer}.{name}.{part}", part)
        for side, attentions in ATTENTIONS.items()
        for layer in range(config[f"{side}_layers"])
        for word, name in attentions.items()
        for part in ("scores", "weights")
    }


# --- properties -----------------------------------------------------------------------------------------------------

# Embeddings so much larger than positions leave nothing of these in float64: 1e-14 of a vector.
_DROWNED = 2.0**45


def _positionless(config: Config, weights: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The embedding tables made so large that positions are lost beside them.

    The first layers' queries and keys, which alone see that size (a norm follows), are made smaller to match.
    """
    drowned = {
        name: tensor * _DROWNED if re.search(r"shared|embed_tokens", name)
        else tensor / _DROWNED if re.search(r"layers\.0\.self_attn\.[qk]_proj\.weight", name)
        else tensor
        for name, tensor in weights.items()
    }  # fmt: skip
    return config, drowned


_EQUATIONS = r"""
With x (source, d) the encoder's stream, which starts as sqrt(d) E[id] + PE[position], for each block of the encoder:

    n = LayerNorm(x + MultiHead(x, x))
    x = LayerNorm(n + FFN(n))

with MultiHead(x, z) = Concat_h(softmax(Q_h K_hᵀ / sqrt(d_h)) V_h) W_O + b_O, where Q = x W_Q + b_Q, K = z W_K + b_K and
V = z W_V + b_V are cut into heads, and FFN(n) = act(n W_1 + b_1) W_2 + b_2;

and y (seq, d) the decoder's, which starts likewise, for each block of the decoder, with z the encoder's last x:

    n = LayerNorm(y + causal MultiHead(y, y))
    m = LayerNorm(n + MultiHead(n, z))
    y = LayerNorm(m + FFN(m))

and logits = y Eᵀ + b.  PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(pos / 10000^(2i/d)) in the paper;
Marian has all sines, then all cosines.  Positions count real tokens.  There is no norm after the last block.
"""


FAMILY = Family(
    name="transformer",
    title="Transformer (2017)",
    paper="Vaswani et al. 2017, arXiv:1706.03762",
    equations=_EQUATIONS,
    oracle="MarianMTModel",
    oracle_class="conformance.oracles.marian:Marian",
    encoder_decoder=True,
    layers_key="decoder_layers",
    module_kinds={"shared": "embedding"},
    fields=(
        ConfigField(name="model_type", default="marian", meaning="marian: all sines, then all cosines; transformer "
                    "(ours): sines and cosines alternate, as in the paper"),
        ConfigField(name="activation_function", default="gelu", meaning="activation of the feed-forward layers; relu "
                    "in the paper"),
        ConfigField(name="scale_embedding", default="false", meaning="embeddings are multiplied by √d_model, as in "
                    "the paper"),
        ConfigField(name="encoder_attention_heads", default="16", meaning="heads of the encoder"),
        ConfigField(name="decoder_attention_heads", default="16", meaning="heads of the decoder"),
        ConfigField(name="share_encoder_decoder_embeddings", default="true", meaning="source and target have one "
                    "embedding table"),
        ConfigField(name="decoder_vocab_size", default="vocab_size", meaning="number of the target's tokens"),
        ConfigField(name="tie_word_embeddings", default="true", meaning="the head is the target's embedding table"),
    ),
    recipes=_recipes(),
    tensor_shapes=tensor_shapes,
    probes=probes,
    probe_sizes=probe_sizes,
    module_probes=module_probes,
    kernel_probes=kernel_probes,
    properties=Properties(
        table=lambda config: "model.shared.weight" if config.get("share_encoder_decoder_embeddings", True)
        else "model.decoder.embed_tokens.weight",
        windows=lambda config: (None,) * config["decoder_layers"],
        tied=lambda config: bool(config.get("tie_word_embeddings", True)),
        claims=EVERY | ENCODER_DECODER,
        positionless=_positionless,
        untrained=frozenset({"final_logits_bias"}),
        unmoved={r"\.k_proj\.bias$": "it adds the same number to all scores of a query, which softmax does not see"},
    ),
)  # fmt: skip
