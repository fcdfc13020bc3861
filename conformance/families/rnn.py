"""The simple recurrent network (Elman 1990).

Oracle: `torch.nn.RNN`.
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, ConfigField, Value, relations
from conformance.families.components import ALL
from conformance.families.recurrent import (
    CHUNKS,
    DIRECTIONS,
    LAYERS,
    arguments,
    recipe,
    returns,
    with_mistakes,
)

if TYPE_CHECKING:
    from torch import Tensor

_STATES = ("h",)
_NONLINEARITY = ConfigField(name="nonlinearity", default="tanh", meaning='φ: "tanh" or "relu"')


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    from conformance.oracles.torch_recurrent import rnn

    return rnn(tensors, settings)


def _recipe(name: str, summary: str, nonlinearity: str = "tanh", **more: Any) -> ComponentRecipe:
    return recipe(f"rnn/{name}", summary, gates=1, states=_STATES, more={"nonlinearity": nonlinearity}, **more)


FAMILY = Component(
    name="rnn",
    title="Simple recurrent network",
    paper="Elman 1990",
    equations="""
    h_t = φ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)          a layer reads the outputs of all directions of the one below
""",
    oracle="torch.nn.RNN",
    arguments=arguments(1, _STATES, (Value(name="nonlinearity", axes=None, meaning=_NONLINEARITY.meaning),)),
    returns=returns(_STATES),
    recipes=(
        _recipe("plain", "one layer, one direction, tanh", claims=CHUNKS,
                mistakes=("initial states ignored", "bias_hh ignored")),
        _recipe("field-nonlinearity", "plain with relu", "relu", claims=CHUNKS, field="nonlinearity",
                counterfactuals={"nonlinearity ignored":
                                 {"num_layers": 1, "bidirectional": False, "nonlinearity": "tanh"}}),
        _recipe("layers", "two layers, one direction", layers=2, claims=CHUNKS),
        _recipe("bidirectional", "one layer, both directions, all rows of one length", bidirectional=True,
                mistakes=("reverse final state at the last position",)),
        _recipe("lengths", "one layer, one direction, unequal lengths over junk", lengths=True,
                mistakes=("final states at the last position", "lengths ignored")),
        _recipe("bidirectional-lengths", "one layer, both directions, unequal lengths over junk", bidirectional=True,
                lengths=True, mistakes=("reverse direction over the pads", "lengths ignored")),
        _recipe("distinct", "two layers, both directions, unequal lengths, relu", "relu", layers=2, bidirectional=True,
                lengths=True, claims=ALL, mistakes=("lengths ignored",)),
    ),
    truth=with_mistakes(truth),
    reference="reference_impl.nn.recurrent:rnn",
    relations={
        "batching.alone": relations.rows("x", "lengths", states=("h0",), returned_states=("h_n",)),
        "batching.padding": relations.junk_after_lengths(),
        "invariance.reversal": relations.reversal(),
    },
    fields=(LAYERS, DIRECTIONS, _NONLINEARITY),
    carried={"h_n": "h0"},
)  # fmt: skip
