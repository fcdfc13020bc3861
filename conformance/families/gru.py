"""Gated recurrent unit (Cho et al. 2014), with the reset gate after or before the product.

Oracle: `torch.nn.GRU`, whose reset gate comes after the product; its gates are computed from its own states.  The other
form exists in no library that could decide in double: it is derived from the paper, cell by cell, in float64 only.
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, ConfigField, Value, relations
from conformance.families.components import ALL
from conformance.families.recurrent import CHUNKS, DIRECTIONS, LAYERS, arguments, recipe, returns, with_mistakes

if TYPE_CHECKING:
    from torch import Tensor

_STATES = ("h",)
_RESET_AFTER = ConfigField(
    name="reset_after",
    default="true",
    meaning="whether the reset gate is applied after the product with W_hn (Cho et al. v1, cuDNN, PyTorch) "
    "or before it (Cho et al. v3)",
)
_EXACT = dict.fromkeys(CHUNKS, ("float64",))


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    from conformance.oracles import torch_recurrent
    from conformance.oracles.equations import recurrent

    oracle: Any = torch_recurrent if settings["reset_after"] else recurrent
    return oracle.gru(tensors, settings)  # type: ignore[no-any-return]


def _recipe(name: str, summary: str, reset_after: bool = True, **more: Any) -> ComponentRecipe:
    return recipe(f"gru/{name}", summary, gates=3, states=_STATES, more={"reset_after": reset_after}, **more)


def _other(reset_after: bool, **more: Any) -> Config:
    return {"num_layers": 1, "bidirectional": False, "reset_after": reset_after, **more}


FAMILY = Component(
    name="gru",
    title="Gated recurrent unit",
    paper="Cho et al. 2014, arXiv:1406.1078",
    equations="""
    r, z = σ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)            each with its own rows, which lie in the order r, z, n
    n = tanh(W_in x_t + b_in + r ⊙ (W_hn h_{t-1} + b_hn))      reset_after true: version 1, cuDNN, PyTorch
    n = tanh(W_in x_t + b_in + W_hn (r ⊙ h_{t-1}) + b_hn)      reset_after false: version 3, equation 8
    h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}
""",
    oracle="torch.nn.GRU (reset_after false: the paper's equations in plain float64 loops)",
    arguments=arguments(3, _STATES, (Value(name="reset_after", axes=None, meaning=_RESET_AFTER.meaning),)),
    returns=returns(_STATES, ("reset", "update", "new")),
    recipes=(
        _recipe("plain", "one layer, one direction, reset after the product", claims=CHUNKS,
                mistakes=("initial states ignored", "bias_hh ignored", "update gate flipped",
                          "gates in the order z, r, n", "b_hn outside the reset gate"),
                counterfactuals={"reset gate before the product": _other(False)}),
        _recipe("field-reset_after", "plain with the reset gate before the product", False, claims=_EXACT,
                field="reset_after", counterfactuals={"reset_after ignored": _other(True)},
                mistakes=("update gate flipped",)),
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
    reference="reference_impl.nn.recurrent:gru",
    relations={
        "batching.alone": relations.rows("x", "lengths", states=("h0",), returned_states=("h_n",)),
        "batching.padding": relations.junk_after_lengths(),
        "invariance.reversal": relations.reversal(),
        "invariance.kept_state": relations.kept_state("h", (0.0, 1000.0, 0.0)),
    },
    fields=(LAYERS, DIRECTIONS, _RESET_AFTER),
    carried={"h_n": "h0"},
)  # fmt: skip
