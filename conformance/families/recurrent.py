"""What the recurrent families share: arguments, weight shapes, cases, and the mistakes that their cases know.

A counterfactual of these families is the truth of altered tensors or settings; its settings name it under "mistake".
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from conformance.families import ComponentRecipe, Config, ConfigField, Value
from conformance.families.components import ALL

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = dict[str, Tensor]
    Truth = Callable[[Tensors, Config], Tensors]

BATCH, SEQ, INPUT, HIDDEN = 3, 5, 4, 6
# Unsorted, unequal, one of them 1; the pads hold draws like any other.
LENGTHS = [3, 5, 1]
MOST_LAYERS = 2
OUTPUTS = {"component.outputs": ALL["component.outputs"]}
CHUNKS = {**ALL, "component.chunks": ("float64",)}

LAYERS = ConfigField(name="num_layers", default="1", meaning="layers on top of each other")
DIRECTIONS = ConfigField(
    name="bidirectional",
    default="false",
    meaning="whether a second direction reads from the last position to the first",
)


def arguments(gates: int, states: tuple[str, ...], settings: tuple[Value, ...] = ()) -> tuple[Value, ...]:
    """Inputs, weights by name (or all at once as the dict `weights`), settings."""
    inputs = [Value(name="x", axes="batch seq input", meaning="input, batch first")]
    inputs += [
        Value(name=f"{s}0", axes="layers·directions batch hidden",
              meaning=f"initial {_STATES[s]}, layer by layer, forward before reverse")
        for s in states
    ]  # fmt: skip
    inputs.append(
        Value(name="lengths", axes="batch", meaning="how many positions of each row are real; absent: all of them")
    )
    weights = [
        Value(name=name, axes=" ".join(_axes(name, gates)), meaning=_MEANINGS[name.split("_l")[0]])
        for name in shapes(gates, layers=MOST_LAYERS, bidirectional=True)
    ]
    shared = [Value(name=field.name, axes=None, meaning=field.meaning) for field in (LAYERS, DIRECTIONS)]
    return (*inputs, *weights, *shared, *settings)


_STATES = {"h": "hidden state", "c": "cell state"}
_MEANINGS = {
    "weight_ih": "input or output of the layer below to gates",
    "weight_hh": "hidden state to gates",
    "bias_ih": "bias beside weight_ih",
    "bias_hh": "bias beside weight_hh",
}


def _axes(name: str, gates: int) -> list[str]:
    rows = "hidden" if gates == 1 else f"{gates}·hidden"
    if name.startswith("bias"):
        return [rows]
    if name.startswith("weight_hh"):
        return [rows, "hidden"]
    return [rows, "input" if "_l0" in name else "directions·hidden"]


def returns(states: tuple[str, ...], gates: tuple[str, ...] = ()) -> tuple[Value, ...]:
    """Output and final states; the gates are optional."""
    final = [
        Value(
            name=f"{s}_n",
            axes="layers·directions batch hidden",
            meaning=f"final {_STATES[s]} after each row's last step",
        )
        for s in states
    ]
    inner = [
        Value(name=f"{gate}_gate", axes="batch seq hidden", optional=True,
              meaning=f"{gate} gate where there is one layer and direction; zero at pads")
        for gate in gates
    ]  # fmt: skip
    output = Value(
        name="output",
        axes="batch seq directions·hidden",
        meaning="last layer's hidden states, forward beside reverse; zero at pads",
    )
    return (output, *final, *inner)


def shapes(gates: int, *, layers: int, bidirectional: bool, inputs: int = INPUT) -> dict[str, tuple[int, ...]]:
    """Weight shapes by torch.nn's names."""
    found: dict[str, tuple[int, ...]] = {}
    suffixes = ["", "_reverse"] if bidirectional else [""]
    rows = gates * HIDDEN
    for layer in range(layers):
        below = inputs if layer == 0 else len(suffixes) * HIDDEN
        for suffix in suffixes:
            found[f"weight_ih_l{layer}{suffix}"] = (rows, below)
            found[f"weight_hh_l{layer}{suffix}"] = (rows, HIDDEN)
            found[f"bias_ih_l{layer}{suffix}"] = (rows,)
            found[f"bias_hh_l{layer}{suffix}"] = (rows,)
    return found


def recipe(
    name: str,
    summary: str,
    *,
    gates: int,
    states: tuple[str, ...],
    layers: int = 1,
    bidirectional: bool = False,
    lengths: bool = False,
    claims: Mapping[str, tuple[str, ...]] = OUTPUTS,
    more: Mapping[str, Any] | None = None,
    mistakes: tuple[str, ...] = (),
    field: str | None = None,
    counterfactuals: Mapping[str, Config] | None = None,
) -> ComponentRecipe:
    """A case.  mistakes: counterfactuals by name, of `MISTAKES`; more: settings of the family alone."""
    settings = {"num_layers": layers, "bidirectional": bidirectional, **(more or {})}
    slots = layers * (1 + bidirectional)
    inputs: dict[str, Any] = {"x": (BATCH, SEQ, INPUT)}
    inputs |= {f"{s}0": (slots, BATCH, HIDDEN) for s in states}
    if lengths:
        inputs["lengths"] = LENGTHS
    known = {**(counterfactuals or {}), **{label: {**settings, "mistake": label} for label in mistakes}}
    return ComponentRecipe(
        name=name, summary=summary, settings=settings, inputs=inputs,
        weights=shapes(gates, layers=layers, bidirectional=bidirectional),
        deviation={f"{s}0": 0.7 for s in states}, claims=claims, field=field, counterfactuals=known,
    )  # fmt: skip


def with_mistakes(truth: "Truth") -> "Truth":
    """The truth, which also knows what the mistakes would give."""

    def run(tensors: "Tensors", settings: Config) -> "Tensors":
        mistake = settings.get("mistake")
        if mistake in ALTERED:
            tensors = ALTERED[mistake](dict(tensors))
        found = truth(tensors, settings)
        if mistake in REPLACED:
            whole = truth({name: tensor for name, tensor in tensors.items() if name != "lengths"}, settings)
            found = REPLACED[mistake](found, whole, tensors)
        return found

    return run


def _blocks(change: "Callable[[list[Tensor]], list[Tensor]]", count: int) -> "Callable[[Tensors], Tensors]":
    """The same change to the blocks of rows of every weight and bias."""

    def alter(tensors: "Tensors") -> "Tensors":
        import torch

        return {
            name: torch.cat(change(list(tensor.chunk(count)))) if name.startswith(("weight", "bias")) else tensor
            for name, tensor in tensors.items()
        }

    return alter


def _set(prefix: str, value: "Callable[[Tensor], Tensor]") -> "Callable[[Tensors], Tensors]":
    return lambda tensors: {n: value(t) if n.startswith(prefix) else t for n, t in tensors.items()}


def _exchange(tensors: "Tensors") -> "Tensors":
    return {**tensors, "h0": tensors["c0"], "c0": tensors["h0"]}


def _more_forget(tensors: "Tensors") -> "Tensors":
    """1 added to the forget gate, the second of four blocks of b_ih."""
    import torch

    def add(bias: "Tensor") -> "Tensor":
        i, f, g, o = bias.chunk(4)
        return torch.cat([i, f + 1, g, o])

    return _set("bias_ih", add)(tensors)


def _merge_new_bias(tensors: "Tensors") -> "Tensors":
    """b_hn added to b_in: outside the reset gate."""
    import torch

    found = dict(tensors)
    for name in [name for name in tensors if name.startswith("bias_hh")]:
        r, z, n = tensors[name].chunk(3)
        other = name.replace("bias_hh", "bias_ih")
        found[name] = torch.cat([r, z, torch.zeros_like(n)])
        found[other] = tensors[other] + torch.cat([torch.zeros_like(r), torch.zeros_like(z), n])
    return found


# Mistake -> the tensors with which a right implementation gives what the mistake gives.
ALTERED: "dict[str | None, Callable[[Tensors], Tensors]]" = {
    "initial states ignored": lambda tensors: {n: t * 0 if n in ("h0", "c0") else t for n, t in tensors.items()},
    "bias_hh ignored": _set("bias_hh", lambda bias: bias * 0),
    "h0 and c0 exchanged": _exchange,
    "gates in the order i, f, o, g": _blocks(lambda b: [b[0], b[1], b[3], b[2]], 4),
    "gates in the order i, g, f, o": _blocks(lambda b: [b[0], b[2], b[1], b[3]], 4),
    "gates in the order i, o, f, g": _blocks(lambda b: [b[0], b[2], b[3], b[1]], 4),
    "1 added to the forget gate": _more_forget,
    # σ(-a) = 1 - σ(a)
    "update gate flipped": _blocks(lambda b: [b[0], -b[1], b[2]], 3),
    "gates in the order z, r, n": _blocks(lambda b: [b[1], b[0], b[2]], 3),
    "b_hn outside the reset gate": _merge_new_bias,
    "lengths ignored": lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lengths"},
}


def _final_at_pad(found: "Tensors", whole: "Tensors", _: "Tensors") -> "Tensors":
    return {**found, **{name: value for name, value in whole.items() if name.endswith("_n")}}


def _reverse_over_padding(found: "Tensors", whole: "Tensors", tensors: "Tensors") -> "Tensors":
    """One layer: the reverse half from a run over everything, outputs at pads zero."""
    import torch

    real = (torch.arange(SEQ) < tensors["lengths"][:, None])[..., None].to(found["output"].dtype)
    forward = found["output"][..., :HIDDEN]
    mixed = {"output": torch.cat([forward, whole["output"][..., HIDDEN:] * real], dim=-1)}
    mixed |= {n: torch.stack([v[0], whole[n][1]]) for n, v in found.items() if n.endswith("_n")}
    return {**found, **mixed}


def _reverse_final_at_end(found: "Tensors", _: "Tensors", __: "Tensors") -> "Tensors":
    """One layer, no lengths: the reverse direction's final state read at the last position, where it began."""
    import torch

    h_n = torch.stack([found["h_n"][0], found["output"][:, -1, HIDDEN:]])
    return {**found, "h_n": h_n}


# Mistake -> the returns, made of the right ones and of those of a run over the pads.
REPLACED: "dict[str | None, Callable[[Tensors, Tensors, Tensors], Tensors]]" = {
    "final states at the last position": _final_at_pad,
    "reverse direction over the pads": _reverse_over_padding,
    "reverse final state at the last position": _reverse_final_at_end,
}
