"""RNNsearch (Bahdanau et al. 2015): a bidirectional gated encoder, additive attention, a gated decoder with maxout.

Oracle: the paper's equations as float64 loops, `conformance.oracles.equations.rnn_search`.
"""

from dataclasses import replace
from typing import Any

from conformance.families import Config, ConfigField, Family, Recipe
from conformance.families.decoders import field_case
from conformance.families.encoder_decoders import FULL
from conformance.families.properties import ENCODER_DECODER, EVERY, Properties
from conformance.families.sequence_models import (
    ALONE,
    WITH_LOSS,
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
    """A small RNNsearch as the paper has it, then changed."""
    return {
        "architectures": ["RNNSearch"],
        "model_type": "rnn_search",
        "vocab_size": 29,
        "decoder_vocab_size": 23,
        "embedding_size": 10,
        "hidden_size": 12,
        "attention_size": 14,
        "maxout_size": 8,
        "reset_after": False,
        "decoder_start_token_id": 2,
        # only in training; the suite evaluates, so a candidate that applies it fails
        "dropout": 0.2,
        "torch_dtype": "float32",
    } | changes


def _terse() -> Config:
    optional = ("decoder_vocab_size", "reset_after", "dropout")
    return {key: value for key, value in _config().items() if key not in optional}


# The likeliest first.
_MISTAKES = (
    "s_i in the deep output, where the appendix has s_{i-1}",
    "the search after the step, with s_i",
    "the update gates the other way round, as the paper writes them",
    "maxout over the halves, not over neighbours",
    "s_0 from the backward state of the last word",
    "s_0 from the forward state",
    "s_0 at zero",
    "the backward states not turned back into reading order",
    "the directions swapped in the annotations",
    "the context in the candidate state only, not in the gates",
)
_RESET_AFTER = "the reset gates after the product, as torch.nn.GRU has them"


# --- cases ----------------------------------------------------------------------------------------------------------


def _recipes() -> tuple[Recipe, ...]:
    plain = _config()
    return sharper(
        Recipe(
            name="rnn_search/plain",
            summary="the paper's model, unequal sizes",
            config=plain,
            weights="rnn_search/plain",
            seq=7,
            target=9,
            claims=WITH_LOSS,
            store=frozenset({"loss"}),
            counterfactuals={_RESET_AFTER: _config(reset_after=True)} | mistakes(plain, _MISTAKES),
        ),
        Recipe(
            name="rnn_search/distinct",
            summary="all sizes different, a source longer than the target",
            config=_config(
                vocab_size=31, embedding_size=11, hidden_size=13, attention_size=17, maxout_size=10,
                decoder_start_token_id=5,
            ),
            weights="rnn_search/distinct",
            seq=15,
            target=9,
            claims=FULL,
            store=frozenset({"probes", "gradients", "loss"}),
        ),
        Recipe(
            name="rnn_search/square",
            summary="as many sizes equal as can be, so that a projection that is not transposed loads",
            config=_config(
                vocab_size=12, decoder_vocab_size=12, embedding_size=12, hidden_size=12, attention_size=12,
                maxout_size=12,
            ),
            weights="rnn_search/square",
            batch=3,
            seq=12,
            target=12,
            claims=WITH_LOSS,
            store=frozenset({"loss"}),
        ),
        Recipe(
            name="rnn_search/one-word",
            summary="one sentence of one word: nothing to weigh, and axes of length one",
            config=plain,
            weights="rnn_search/plain",
            batch=1,
            seq=1,
            target=9,
            claims=ALONE,
        ),
        replace(
            field_case(
                "rnn_search", "reset_after", "reset_after", _config(reset_after=True), plain, tensor_shapes,
                also=mistakes(_config(reset_after=True), _MISTAKES[:3]),
            ),
            seq=7,
            target=9,
        ),
        Recipe(
            name="rnn_search/field-absent",
            summary="plain with every key that has a default left out: as many target ids as source ids",
            config=_terse(),
            weights="rnn_search/plain",
            seq=7,
            target=9,
            claims=WITH_LOSS,
            store=frozenset({"loss"}),
            field="absent keys",
            counterfactuals={_RESET_AFTER: _terse() | {"reset_after": True}},
        ),
    )  # fmt: skip


# --- checkpoint -----------------------------------------------------------------------------------------------------


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything a checkpoint holds."""
    m, n, l = (config[f"{size}_size"] for size in ("embedding", "hidden", "maxout"))  # noqa: E741 (the paper's letters)
    vocab = decoder_vocabulary(config)
    return {
        "encoder.embedding.weight": (config["vocab_size"], m),
        **layer_shapes("encoder.rnn", 3, m, n, both_ways=True),
        "decoder.embedding.weight": (vocab, m),
        "decoder.initial.weight": (n, n),
        "decoder.initial.bias": (n,),
        **attention_shapes(config, 2 * n),
        **layer_shapes("decoder.rnn", 3, m + 2 * n, n),
        "decoder.readout.state_weight": (2 * l, n),
        "decoder.readout.word_weight": (2 * l, m),
        "decoder.readout.context_weight": (2 * l, 2 * n),
        "decoder.readout.bias": (2 * l,),
        "decoder.output.weight": (vocab, l),
        "decoder.output.bias": (vocab,),
    }


# --- probes ---------------------------------------------------------------------------------------------------------


def probes(config: Config) -> list[ProbeSpec]:
    """RNNsearch's probes in computational order."""
    specs: list[ProbeSpec] = []

    def add(name: str, axes: tuple[str, ...], *parents: str) -> None:
        specs.append(ProbeSpec(name=name, axes=axes, parents=parents))

    both, states = ("direction", "hidden"), ("batch", "source", "hidden")
    add("encoder.embedding", ("batch", "source", "embedding"))
    add("encoder.layers.0.forward", states, "encoder.embedding")
    add("encoder.layers.0.backward", states, "encoder.embedding")
    add("encoder.layers.0.output", ("batch", "source", *both), "encoder.layers.0.forward", "encoder.layers.0.backward")
    add("decoder.initial_state", ("batch", "hidden"), "encoder.layers.0.backward")
    add("decoder.embedding", ("batch", "seq", "embedding"))
    steps = add_steps(add, both, "encoder.layers.0.output", ("decoder.initial_state",))
    add("decoder.pieces", ("batch", "seq", "maxout", "piece"), "decoder.initial_state", "decoder.embedding", *steps)
    add("decoder.maxout", ("batch", "seq", "maxout"), "decoder.pieces")
    add("logits", ("batch", "seq", "vocab"), "decoder.maxout")
    return specs


def probe_sizes(config: Config, batch: int, seq: int, source: int) -> dict[str, int]:
    """Axis name -> size, for the axes that the probes use."""
    return {
        "batch": batch, "seq": seq, "source": source, "embedding": config["embedding_size"], "direction": 2,
        "hidden": config["hidden_size"], "maxout": config["maxout_size"], "piece": 2,
        "vocab": decoder_vocabulary(config),
    }  # fmt: skip


def module_probes(config: Config) -> dict[str, tuple[str, str]]:
    """Probe -> (path of the reference's module, "output")."""
    return {
        "encoder.embedding": ("encoder.embedding", "output"),
        "encoder.layers.0.forward": ("encoder.left_to_right", "output"),
        "encoder.layers.0.backward": ("encoder.right_to_left", "output"),
        "encoder.layers.0.output": ("encoder.rnn", "output"),
        "decoder.initial_state": ("decoder.initial_state", "output"),
        "decoder.embedding": ("decoder.embedding", "output"),
        **step_places("decoder.state"),
        "decoder.pieces": ("decoder.readout.pieces", "output"),
        "decoder.maxout": ("decoder.readout", "output"),
        "logits": ("decoder.output", "output"),
    }


_EQUATIONS = r"""
With E and E' the embedding tables of source and target, GRU(x, h) a gated unit (below), and y₀ the start token:

    h⃗_j, h⃖_j = GRU(E x_j, h⃗_{j−1}), GRU(E x_j, h⃖_{j+1})                h⃗_0 = h⃖_{S+1} = 0, each with its own weights
    h_j      = [h⃗_j ; h⃖_j]
    s_0      = tanh(W_s h⃖_1 + b_s)
    e_ij     = v · tanh(W_a s_{i−1} + U_a h_j + b_a),  α_i = softmax_j(e_i),  c_i = Σ_j α_ij h_j
    s_i      = GRU([E' y_{i−1} ; c_i], s_{i−1})
    t̃_i      = U_o s_{i−1} + V_o E' y_{i−1} + C_o c_i + b
    t_i      = [max(t̃_{i,2k−1}, t̃_{i,2k})] for k = 1 … l
    logits_i = W_o t_i + b_o

A gated unit has torch.nn.GRU's rows r, z, n:

    r, z = σ(W x + b + U h + b')                                 each with its own rows
    n    = tanh(W_n x + b_n + U_n (r ⊙ h) + b'_n)                reset_after: tanh(W_n x + b_n + r ⊙ (U_n h + b'_n))
    h'   = (1 − z) ⊙ n + z ⊙ h

What the paper calls z is 1 − z, and it leaves the biases out.  The deep output reads s_{i−1}, as appendix A.2.2 prints
and GroundHog, its authors' code, computes.  Pads of source and target leave every state as it was.
"""


FAMILY = Family(
    name="rnn_search",
    title="RNNsearch",
    paper="Bahdanau et al. 2015, Neural Machine Translation by Jointly Learning to Align and Translate, "
    "arXiv:1409.0473",
    equations=_EQUATIONS,
    oracle="loops over the paper's equations (conformance.oracles.equations.rnn_search)",
    oracle_class="conformance.oracles.sequence_models:RNNSearch",
    oracle_requires=None,
    oracle_kernels=("eager",),
    encoder_decoder=True,
    fields=(ConfigField(name="reset_after", default="false", meaning="the reset gates stand after the product U h"),),
    recipes=_recipes(),
    tensor_shapes=tensor_shapes,
    probes=probes,
    probe_sizes=probe_sizes,
    module_probes=module_probes,
    kernel_probes=lambda config: {},
    properties=Properties(
        table=lambda config: "decoder.embedding.weight",
        windows=lambda config: (None,),
        tied=lambda config: False,
        claims=EVERY | ENCODER_DECODER,
    ),
)
