"""GNMT (Wu et al. 2016): stacks of LSTM layers with residual connections, and one attention for all decoder layers.

Oracle: the paper's equations as float64 loops, `conformance.oracles.equations.gnmt`.
"""

from typing import Any

from conformance.families import Config, Family, Recipe
from conformance.families.encoder_decoders import FULL, MODEST
from conformance.families.properties import ENCODER_DECODER, EVERY, Properties
from conformance.families.sequence_models import (
    ALONE,
    WITH_LOSS,
    Add,
    add_steps,
    attention_shapes,
    decoder_vocabulary,
    layer_shapes,
    mistakes,
    sharper,
    step_places,
)
from conformance.probes import ProbeSpec

# --- configurations -------------------------------------------------------------------------------------------------


def _config(**changes: Any) -> Config:
    """A small GNMT, then changed."""
    return {
        "architectures": ["GNMT"],
        "model_type": "gnmt",
        "vocab_size": 29,
        "decoder_vocab_size": 23,
        "embedding_size": 12,
        "hidden_size": 10,
        "attention_size": 14,
        "encoder_layers": 4,
        "decoder_layers": 5,
        "decoder_start_token_id": 2,
        # only in training; the suite evaluates, so a candidate that applies it fails
        "dropout": 0.2,
        "torch_dtype": "float32",
    } | changes


def _terse() -> Config:
    return {key: value for key, value in _config().items() if key not in ("decoder_vocab_size", "dropout")}


# The likeliest first.
_MISTAKES = (
    "the search with the bottom layer's new output",
    "the context in the bottom decoder layer only",
    "no context in the first step",
    "residual connections from the second decoder layer on",
    "no residual connections",
    "no residual connections in the encoder",
    "residual connections from the fourth layer on",
    "the context above the bottom decoder layer only",
    "the backward outputs not turned back into reading order",
    "the directions of the bottom encoder layer swapped",
    "1 added to the forget gates",
)


# --- cases ----------------------------------------------------------------------------------------------------------


def _recipes() -> tuple[Recipe, ...]:
    plain, shallow = _config(), _config(encoder_layers=2, decoder_layers=2)
    return sharper(
        Recipe(
            name="gnmt/plain",
            summary="the paper's model, unequal sizes",
            config=plain,
            weights="gnmt/plain",
            seq=7,
            target=9,
            claims=WITH_LOSS,
            store=frozenset({"loss"}),
            counterfactuals=mistakes(plain, _MISTAKES),
        ),
        Recipe(
            name="gnmt/distinct",
            summary="all sizes different, a source longer than the target",
            config=_config(
                vocab_size=31, embedding_size=13, hidden_size=11, attention_size=17, encoder_layers=5,
                decoder_layers=3, decoder_start_token_id=5,
            ),
            weights="gnmt/distinct",
            seq=15,
            target=9,
            claims=FULL,
            store=frozenset({"probes", "gradients", "loss"}),
        ),
        Recipe(
            name="gnmt/square",
            summary="as many sizes equal as can be, so that a projection that is not transposed loads",
            config=_config(
                vocab_size=12, decoder_vocab_size=12, embedding_size=12, hidden_size=12, attention_size=12,
                encoder_layers=3, decoder_layers=3,
            ),
            weights="gnmt/square",
            batch=3,
            seq=12,
            target=12,
            claims=WITH_LOSS,
            store=frozenset({"loss"}),
        ),
        Recipe(
            name="gnmt/shallow",
            summary="two layers each: the residual connections begin above them, so that there are none",
            config=shallow,
            weights="gnmt/plain",
            seq=7,
            target=9,
            claims=MODEST,
            counterfactuals=mistakes(shallow, ("residual connections from the second decoder layer on",)),
        ),
        Recipe(
            name="gnmt/one-word",
            summary="one sentence of one word: nothing to weigh, and axes of length one",
            config=plain,
            weights="gnmt/plain",
            batch=1,
            seq=1,
            target=9,
            claims=ALONE,
        ),
        Recipe(
            name="gnmt/field-absent",
            summary="plain with every key that has a default left out: as many target ids as source ids",
            config=_terse(),
            weights="gnmt/plain",
            seq=7,
            target=9,
            claims=WITH_LOSS,
            store=frozenset({"loss"}),
            field="absent keys",
        ),
    )  # fmt: skip


# --- checkpoint -----------------------------------------------------------------------------------------------------


def annotation_size(config: Config) -> int:
    """Width of the encoder's output: of two directions only if there is nothing above the bottom layer."""
    return int(config["hidden_size"] * (2 if config["encoder_layers"] == 1 else 1))


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything a checkpoint holds."""
    embedding, hidden, vocab = config["embedding_size"], config["hidden_size"], decoder_vocabulary(config)
    annotation = annotation_size(config)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.embedding.weight": (config["vocab_size"], embedding),
        **layer_shapes("encoder.layers.0", 4, embedding, hidden, both_ways=True),
    }
    for layer in range(1, config["encoder_layers"]):
        shapes |= layer_shapes(f"encoder.layers.{layer}", 4, 2 * hidden if layer == 1 else hidden, hidden)
    shapes |= {"decoder.embedding.weight": (vocab, embedding), **attention_shapes(config, annotation)}
    for layer in range(config["decoder_layers"]):
        below = embedding if layer == 0 else hidden
        shapes |= layer_shapes(f"decoder.layers.{layer}", 4, below + annotation, hidden)
    return shapes | {"decoder.output.weight": (vocab, hidden), "decoder.output.bias": (vocab,)}


# --- probes ---------------------------------------------------------------------------------------------------------


def probes(config: Config) -> list[ProbeSpec]:
    """GNMT's probes in computational order."""
    specs: list[ProbeSpec] = []

    def add(name: str, axes: tuple[str, ...], *parents: str) -> None:
        specs.append(ProbeSpec(name=name, axes=axes, parents=parents))

    source = ("batch", "source", "hidden")
    add("encoder.embedding", ("batch", "source", "embedding"))
    for direction in ("forward", "backward"):
        add(f"encoder.layers.0.{direction}", source, "encoder.embedding")
    below = "encoder.layers.0.output"
    add(below, ("batch", "source", "direction", "hidden"), "encoder.layers.0.forward", "encoder.layers.0.backward")
    for layer in range(1, config["encoder_layers"]):
        below = _add_layer(add, "encoder", layer, source, (below,), ())[0]
    add("decoder.embedding", ("batch", "seq", "embedding"))
    annotation = ("hidden",) if config["encoder_layers"] > 1 else ("direction", "hidden")
    steps = tuple(add_steps(add, annotation, below, ()))
    contexts = tuple(step for step in steps if step.endswith("context"))
    before = tuple(step for step in steps if step.endswith("state"))
    for layer in range(1, config["decoder_layers"]):
        before = _add_layer(add, "decoder", layer, ("batch", "seq", "hidden"), before, contexts)
    add("logits", ("batch", "seq", "vocab"), *before, *(contexts if config["decoder_layers"] == 1 else ()))
    return specs


def _add_layer(
    add: Add, stack: str, layer: int, axes: tuple[str, ...], below: tuple[str, ...], beside: tuple[str, ...]
) -> tuple[str]:
    """A layer above the bottom one, which reads `below` and `beside`; with a residual connection from the third on."""
    name = f"{stack}.layers.{layer}."
    if layer < 2:
        add(name + "output", axes, *below, *beside)
    else:
        add(name + "hidden", axes, *below, *beside)
        add(name + "output", axes, name + "hidden", *below)
    return (name + "output",)


def probe_sizes(config: Config, batch: int, seq: int, source: int) -> dict[str, int]:
    """Axis name -> size, for the axes that the probes use."""
    return {
        "batch": batch, "seq": seq, "source": source, "embedding": config["embedding_size"], "direction": 2,
        "hidden": config["hidden_size"], "vocab": decoder_vocabulary(config),
    }  # fmt: skip


def module_probes(config: Config) -> dict[str, tuple[str, str]]:
    """Probe -> (path of the reference's module, "output")."""
    stacks = {"encoder": config["encoder_layers"], "decoder": config["decoder_layers"]}
    return {
        "encoder.embedding": ("encoder.embedding", "output"),
        "encoder.layers.0.forward": ("encoder.left_to_right", "output"),
        "encoder.layers.0.backward": ("encoder.right_to_left", "output"),
        "encoder.layers.0.output": ("encoder.layers.0.output", "output"),
        "decoder.embedding": ("decoder.embedding", "output"),
        **step_places("decoder.layers.0.output"),
        **{
            f"{stack}.layers.{layer}.{part}": (f"{stack}.layers.{layer}.{part}", "output")
            for stack, layers in stacks.items()
            for layer in range(1, layers)
            for part in (("hidden", "output") if layer > 1 else ("output",))
        },
        "logits": ("decoder.output", "output"),
    }


_EQUATIONS = r"""
With LSTM_l a layer with torch.nn.LSTM's weights, m its hidden state, E and E' the embedding tables of source and
target, y₀ the start token, and all states zero at the beginning:

    x¹_t  = [LSTM_1→(E x_t) ; LSTM_1←(E x_t)],   m^l_t = LSTM_l(x^{l−1}_t)                  encoder, l ≥ 2
    x^l   = m^l for l < 3,   x^l = m^l + x^{l−1} for l ≥ 3                                  in both stacks

    s_it  = v · tanh(W_a z¹_{i−1} + U_a x_t + b_a),  p_i = softmax_t(s_i),  a_i = Σ_t p_it x_t     x_t of the top layer
    z¹_i  = LSTM_1([E' y_{i−1} ; a_i])                                                      decoder; z¹_0 = 0
    m^l_i = LSTM_l([z^{l−1}_i ; a_i]), z^l as x^l                                           l ≥ 2
    logits_i = W_s z^L_i + b_s

The search of step i is made with the bottom layer's output of step i − 1; every decoder layer reads its result, and the
residual connections leave it out.  Pads of source and target leave every state as it was.
"""


FAMILY = Family(
    name="gnmt",
    title="GNMT",
    paper="Wu et al. 2016, Google's Neural Machine Translation System: Bridging the Gap between Human and Machine "
    "Translation, arXiv:1609.08144",
    equations=_EQUATIONS,
    oracle="loops over the paper's equations (conformance.oracles.equations.gnmt)",
    oracle_class="conformance.oracles.sequence_models:GNMT",
    oracle_requires=None,
    oracle_kernels=("eager",),
    encoder_decoder=True,
    fields=(),  # every key is a size that the shapes of the weights show
    recipes=_recipes(),
    tensor_shapes=tensor_shapes,
    probes=probes,
    probe_sizes=probe_sizes,
    module_probes=module_probes,
    kernel_probes=lambda config: {},
    layers_key="encoder_layers",
    properties=Properties(
        table=lambda config: "decoder.embedding.weight",
        windows=lambda config: (None,) * config["decoder_layers"],
        tied=lambda config: False,
        claims=EVERY | ENCODER_DECODER,
        exceptions={"invariance.absent": "every key's default asks for other tensors than the cases have"},
    ),
)
