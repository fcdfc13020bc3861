"""Recurrent layers: Elman's RNN, LSTM and GRU, stacked, in one or two directions, over sequences of unequal length.

Shapes: B batch, T time, I input, H hidden, L layers, D directions (2 if bidirectional), G gates (1, 4, 3).
Weights have torch.nn's names and layouts: for layer k `weight_ih_lk` (G·H, I, or D·H above layer 0), `weight_hh_lk`
(G·H, H), `bias_ih_lk` and `bias_hh_lk` (G·H); the second direction's end in `_reverse`. States are (L·D, B, H), layer
by layer, forward before reverse; the batch is their second axis although it is the first one of the sequences.

With `lengths`, a row counts up to its length only, whatever the pads hold: the reverse direction starts at the last
real position, a final state is that of the row's own last step, and the output is zero at pads. `recurrent` takes any
mask in their place: padding may stand on either side, or between real positions.

Arithmetic is in float32, or float64 for float64 input; results have the dtype of `x`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reference_impl.nn import recurrent_cells as cells
from reference_impl.nn.recurrent_cells import Gates, State, Step

Weights = Mapping[str, Tensor]
KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Recurrent(NamedTuple):
    """output (B, T, D·H); final states, each (L·D, B, H); gates (B, T, H) by name, one dict a layer and direction."""

    output: Tensor
    final: State
    gates: list[Gates]

    def named(self) -> dict[str, Tensor]:
        """output, h_n, of an LSTM c_n, and the gates of the first layer's forward direction."""
        return {"output": self.output, **dict(zip(("h_n", "c_n"), self.final, strict=False)), **self.gates[0]}


def rnn(
    x: Float[Tensor, "batch seq input"],
    h0: Float[Tensor, "states batch hidden"],
    weights: Weights,
    *,
    num_layers: int,
    bidirectional: bool,
    nonlinearity: str,
    lengths: Int[Tensor, "batch"] | None = None,
) -> Recurrent:
    """A simple recurrent network; final is (h_n,).

        h_t = φ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    Elman 1990, "Finding structure in time"; φ is `nonlinearity`, "tanh" or "relu".

    Raises:
        ValueError: `nonlinearity` is neither, or `h0` is not for so many layers and directions.
    """
    step = cells.rnn_step(nonlinearity)
    return recurrent(step, x, (h0,), weights, num_layers, bidirectional, real_steps(lengths, x.shape[1]))


def lstm(
    x: Float[Tensor, "batch seq input"],
    h0: Float[Tensor, "states batch hidden"],
    c0: Float[Tensor, "states batch hidden"],
    weights: Weights,
    *,
    num_layers: int,
    bidirectional: bool,
    lengths: Int[Tensor, "batch"] | None = None,
) -> Recurrent:
    """Long short-term memory; final is (h_n, c_n), the gates are input_gate, forget_gate, cell_gate and output_gate.

        i, f, o = σ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)       each with its own rows
        g       = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)    with its own rows
        c_t     = f ⊙ c_{t-1} + i ⊙ g
        h_t     = o ⊙ tanh(c_t)

    Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; no peepholes. The rows lie in the order
    i, f, g, o. Nothing is added to f at run time: a forget bias is part of the biases.

    Raises:
        ValueError: `h0` is not for so many layers and directions.
    """
    real = real_steps(lengths, x.shape[1])
    return recurrent(cells.lstm_step, x, (h0, c0), weights, num_layers, bidirectional, real)


def gru(
    x: Float[Tensor, "batch seq input"],
    h0: Float[Tensor, "states batch hidden"],
    weights: Weights,
    *,
    num_layers: int,
    bidirectional: bool,
    reset_after: bool = True,
    lengths: Int[Tensor, "batch"] | None = None,
) -> Recurrent:
    """Gated recurrent unit; final is (h_n,), the gates are reset_gate, update_gate and new_gate.

        r, z = σ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)          each with its own rows
        n    = tanh(W_in x_t + b_in + r ⊙ (W_hn h_{t-1} + b_hn))        reset_after
        n    = tanh(W_in x_t + b_in + W_hn (r ⊙ h_{t-1}) + b_hn)        not reset_after
        h_t  = (1 - z) ⊙ n + z ⊙ h_{t-1}

    Cho et al. 2014 (arXiv:1406.1078), equations 5 to 8, there without biases. Version 3, the published one, resets
    before the product; version 1, cuDNN and PyTorch after it. The rows lie in the order r, z, n.

    Raises:
        ValueError: `h0` is not for so many layers and directions.
    """
    step = cells.gru_step if reset_after else cells.gru_step_reset_before
    return recurrent(step, x, (h0,), weights, num_layers, bidirectional, real_steps(lengths, x.shape[1]))


def recurrent(
    step: Step,
    x: Tensor,
    initial: State,
    weights: Weights,
    num_layers: int,
    bidirectional: bool,
    real: Bool[Tensor, "batch seq"] | None,
) -> Recurrent:
    """Layers on top of each other: each reads the outputs of all directions of the one below, joined.

    `real` is true where a position is no padding; None: everywhere. Final states have the dtype of the initial ones.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    directions = ["", "_reverse"] if bidirectional else [""]
    check_states(initial, num_layers, len(directions))
    output = x.to(dtype)
    finals: list[State] = []
    gates: list[Gates] = []
    for layer in range(num_layers):
        outputs = []
        for suffix in directions:
            own = [weights[f"{kind}_l{layer}{suffix}"].to(dtype) for kind in KINDS]
            state = tuple(states[len(finals)].to(dtype) for states in initial)
            states, final, gate = scan(step, output, state, own, real, reverse=bool(suffix))
            outputs.append(states)
            finals.append(final)
            gates.append({name: value.to(x.dtype) for name, value in gate.items()})
        output = torch.cat(outputs, dim=-1)  # (B, T, D·H)
    stacked = tuple(torch.stack(kind).to(initial[0].dtype) for kind in zip(*finals, strict=True))
    return Recurrent(output.to(x.dtype), stacked, gates)


def check_states(initial: State, num_layers: int, directions: int) -> None:
    for states in initial:
        if len(states) != num_layers * directions:
            raise ValueError(
                f"an initial state has {len(states)} entries; num_layers={num_layers} and {directions} directions need "
                f"{num_layers * directions}"
            )


def scan(
    step: Step, x: Tensor, state: State, weights: list[Tensor], real: Tensor | None, *, reverse: bool
) -> tuple[Tensor, State, Gates]:
    """One layer in one direction: outputs (B, T, H), final state, gates (B, T, H) by name.

    At a pad the state stays as it was and what is returned is zero. Reverse with length 2 of 4: the state stays the
    initial one through positions 3 and 2, and the first step is at position 1.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    projected = F.linear(x, weight_ih, bias_ih).unbind(dim=1)  # T of (B, G·H): one product for all steps
    outputs: dict[int, Tensor] = {}
    gates: dict[int, Gates] = {}
    for t in time_order(len(projected), reverse):
        new, gates[t] = step(projected[t], state, weight_hh, bias_hh)
        outputs[t] = new[0]
        state = advance(real_rows(t, real), state, new)

    def all_steps(values: list[Tensor]) -> Tensor:
        return zero_at_pads(real, torch.stack(values, dim=1))

    order = range(len(projected))
    by_name = {name: all_steps([gates[t][name] for t in order]) for name in gates[0]}
    return all_steps([outputs[t] for t in order]), state, by_name


def time_order(seq: int, reverse: bool) -> range:
    """The order in which a direction visits the positions."""
    return range(seq - 1, -1, -1) if reverse else range(seq)


def real_steps(lengths: Tensor | None, seq: int) -> Tensor | None:
    """(B, T): true before a row's length; None where there are no lengths."""
    return None if lengths is None else torch.arange(seq, device=lengths.device) < lengths[:, None]


def real_rows(t: int, real: Tensor | None) -> Tensor | None:
    """(B, 1): which rows have a real position t; None where all have."""
    return None if real is None else real[:, t, None]


def zero_at_pads(real: Tensor | None, value: Tensor) -> Tensor:
    """Values (B, T, H), zero where no real position is."""
    return value if real is None else torch.where(real[..., None], value, 0.0)


def advance(rows: Tensor | None, old: State, new: State) -> State:
    """The new state of the rows that have a real position, the old one of the others."""
    return new if rows is None else tuple(torch.where(rows, n, o) for o, n in zip(old, new, strict=True))
