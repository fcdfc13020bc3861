"""The long short-term memory-network (Cheng et al. 2016): an LSTM whose state is read from tapes by intra-attention.

Oracle: the paper's equations as float64 loops.
"""

from typing import TYPE_CHECKING

from conformance.families import Component, ComponentRecipe, Config, Value, relations
from conformance.families.components import EXACT_GRADIENTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Tensors = dict[str, Tensor]

BATCH, SEQ, INPUT, HIDDEN, ATTENTION = 3, 5, 4, 6, 7


def truth(tensors: "Tensors", settings: Config) -> "Tensors":
    from conformance.oracles.equations.lstmn import lstmn

    mistake = settings.get("mistake")
    return lstmn(_ALTERED[mistake](tensors) if mistake in _ALTERED else tensors, settings)


def _exchange(tensors: "Tensors") -> "Tensors":
    hidden, summary = tensors["attention_hidden_weight"], tensors["attention_summary_weight"]
    return {**tensors, "attention_hidden_weight": summary, "attention_summary_weight": hidden}


def _order(tensors: "Tensors") -> "Tensors":
    """Rows read as i, f, ĉ, o."""
    import torch

    found = dict(tensors)
    for name in ("gate_weight", "gate_bias"):
        i, f, o, c = tensors[name].chunk(4)
        found[name] = torch.cat([i, f, c, o])
    return found


def _input_first(tensors: "Tensors") -> "Tensors":
    weight, first = tensors["gate_weight"], tensors["x"].shape[-1]
    return {**tensors, "gate_weight": weight.roll(-first, dims=1)}


# Mistake -> the tensors with which a right implementation gives what the mistake gives.
_ALTERED: "dict[str | None, Callable[[Tensors], Tensors]]" = {
    "h̃_{t-1} left out of the score": lambda t: {**t, "attention_summary_weight": t["attention_summary_weight"] * 0},
    "W_h and W_h̃ exchanged": _exchange,
    "gates in the order i, f, ĉ, o": _order,
    "[x, h̃] in place of [h̃, x]": _input_first,
    "gate_bias ignored": lambda t: {**t, "gate_bias": t["gate_bias"] * 0},
    "initial tapes ignored": lambda t: {**t, "h0": t["h0"] * 0, "c0": t["c0"] * 0, "summary0": t["summary0"] * 0},
}


def _recipe(
    name: str,
    summary: str,
    sizes: tuple[int, int, int] = (INPUT, HIDDEN, ATTENTION),
    zeros: bool = False,
    mistakes: tuple[str, ...] = (),
) -> ComponentRecipe:
    inputs, hidden, attention = sizes
    start = {state: [[0.0] * hidden] * BATCH if zeros else (BATCH, hidden) for state in ("h0", "c0", "summary0")}
    return ComponentRecipe(
        name=f"lstmn/{name}", summary=summary, settings={}, inputs={"x": (BATCH, SEQ, inputs), **start},
        weights={
            "attention_hidden_weight": (attention, hidden),
            "attention_input_weight": (attention, inputs),
            "attention_summary_weight": (attention, hidden),
            "score_vector": (attention,),
            "gate_weight": (4 * hidden, hidden + inputs),
            "gate_bias": (4 * hidden,),
        },
        deviation=dict.fromkeys(("h0", "c0", "summary0"), 0.7), claims=EXACT_GRADIENTS,
        counterfactuals={label: {"mistake": label} for label in mistakes},
    )  # fmt: skip


FAMILY = Component(
    name="lstmn",
    title="Long short-term memory-network",
    paper="Cheng et al. 2016, arXiv:1601.06733",
    equations="""
    a_i = vᵀ tanh(W_h h_i + W_x x_t + W_h̃ h̃_{t-1})          for every h_i on the tape, i = 0 … t-1
    s = softmax(a)
    h̃_t = Σ_i s_i h_i,  c̃_t = Σ_i s_i c_i
    i, f, o = σ(W [h̃_t, x_t] + b),  ĉ = tanh(W [h̃_t, x_t] + b)          rows in the order i, f, o, ĉ
    c_t = f ⊙ c̃_t + i ⊙ ĉ
    h_t = o ⊙ tanh(c_t)          h_t and c_t are appended to their tapes
""",
    oracle="the paper's equations in plain float64 loops",
    arguments=(
        Value(name="x", axes="batch seq input", meaning="input"),
        Value(name="h0", axes="batch hidden", meaning="what the hidden tape holds before the first step"),
        Value(name="c0", axes="batch hidden", meaning="what the memory tape holds before the first step"),
        Value(name="summary0", axes="batch hidden", meaning="h̃_0"),
        Value(name="attention_hidden_weight", axes="attention hidden", meaning="W_h"),
        Value(name="attention_input_weight", axes="attention input", meaning="W_x"),
        Value(name="attention_summary_weight", axes="attention hidden", meaning="W_h̃"),
        Value(name="score_vector", axes="attention", meaning="v"),
        Value(name="gate_weight", axes="4·hidden hidden+input", meaning="W, columns of h̃ before those of x"),
        Value(name="gate_bias", axes="4·hidden", meaning="b; the paper has none"),
    ),
    returns=(
        Value(name="output", axes="batch seq hidden", meaning="h_1 … h_T, the hidden tape without its first entry"),
        Value(name="cells", axes="batch seq hidden", meaning="c_1 … c_T, the memory tape without its first entry"),
        Value(name="summaries", axes="batch seq hidden", meaning="h̃_1 … h̃_T", optional=True),
        Value(name="attention_weights", axes="batch seq slots", optional=True,
              meaning="s at every step over the entries 0 … T-1 of the tape, zero where there is none yet"),
    ),
    recipes=(
        _recipe("plain", "tapes that begin with zeros", zeros=True,
                mistakes=("h̃_{t-1} left out of the score", "gates in the order i, f, ĉ, o", "gate_bias ignored")),
        _recipe("square", "input, hidden and attention of one size", (6, 6, 6),
                mistakes=("[x, h̃] in place of [h̃, x]", "W_h and W_h̃ exchanged")),
        _recipe("distinct", "tapes that begin with something", mistakes=("initial tapes ignored",)),
    ),
    truth=truth,
    exact=True,
    reference="reference_impl.nn.lstmn:lstmn",
    relations={
        "batching.alone": relations.rows("x", "h0", "c0", "summary0"),
    },
)  # fmt: skip
