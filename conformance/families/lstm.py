"""Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000).

Oracle: `torch.nn.LSTM`; the gates, which it does not return, are computed from its own states.
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, relations
from conformance.families.components import ALL
from conformance.families.recurrent import CHUNKS, DIRECTIONS, LAYERS, arguments, recipe, returns, with_mistakes

if TYPE_CHECKING:
    from torch import Tensor

_STATES = ("h", "c")


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    from conformance.oracles.torch_recurrent import lstm

    return lstm(tensors, settings)


def _recipe(name: str, summary: str, **more: Any) -> ComponentRecipe:
    return recipe(f"lstm/{name}", summary, gates=4, states=_STATES, **more)


FAMILY = Component(
    name="lstm",
    title="Long short-term memory",
    paper="Hochreiter and Schmidhuber 1997; Gers et al. 2000",
    equations="""
    i, f, o = σ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)      each with its own rows, which lie in the order i, f, g, o
    g = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
    c_t = f ⊙ c_{t-1} + i ⊙ g
    h_t = o ⊙ tanh(c_t)
""",
    oracle="torch.nn.LSTM",
    arguments=arguments(4, _STATES),
    returns=returns(_STATES, ("input", "forget", "cell", "output")),
    recipes=(
        _recipe("plain", "one layer, one direction", claims=CHUNKS,
                mistakes=("initial states ignored", "h0 and c0 exchanged", "bias_hh ignored",
                          "1 added to the forget gate", "gates in the order i, f, o, g",
                          "gates in the order i, g, f, o", "gates in the order i, o, f, g")),
        _recipe("layers", "two layers, one direction", layers=2, claims=CHUNKS),
        _recipe("bidirectional", "one layer, both directions, all rows of one length", bidirectional=True,
                mistakes=("reverse final state at the last position",)),
        _recipe("lengths", "one layer, one direction, unequal lengths over junk", lengths=True,
                mistakes=("final states at the last position", "lengths ignored")),
        _recipe("bidirectional-lengths", "one layer, both directions, unequal lengths over junk", bidirectional=True,
                lengths=True, mistakes=("reverse direction over the pads", "lengths ignored")),
        _recipe("distinct", "two layers, both directions, unequal lengths", layers=2, bidirectional=True, lengths=True,
                claims=ALL, mistakes=("lengths ignored",)),
    ),
    truth=with_mistakes(truth),
    reference="reference_impl.nn.recurrent:lstm",
    relations={
        "batching.alone": relations.rows("x", "lengths", states=("h0", "c0"), returned_states=("h_n", "c_n")),
        "batching.padding": relations.junk_after_lengths(),
        "invariance.reversal": relations.reversal(),
        "invariance.kept_state": relations.kept_state("c", (-1000.0, 1000.0, 0.0, 0.0)),
    },
    fields=(LAYERS, DIRECTIONS),
    carried={"h_n": "h0", "c_n": "c0"},
)  # fmt: skip
