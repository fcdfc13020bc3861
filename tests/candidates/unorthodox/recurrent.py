"""RNN, LSTM and GRU as functions, right and unusual; each is made with the one mistake that it can make or without.

The loop runs time first, (t, b, ·).  A reverse direction is a forward one over rows that are turned round within their
lengths.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# weights and biases of a layer and direction, by "weight_ih", … -> a step: input and states to states
Cell = Callable[[dict[str, Tensor]], Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]]


def run(cell: Cell, x: Tensor, initial: tuple[Tensor, ...], lengths: Tensor | None, weights: dict[str, Tensor],
        num_layers: int, bidirectional: bool) -> tuple[Tensor, ...]:  # fmt: skip
    """Output (b, t, directions · hidden) and the final states, (layers · directions, b, hidden) each."""
    time, batch = x.shape[1], x.shape[0]
    ends = torch.full((batch,), time) if lengths is None else lengths
    steps = torch.arange(time)[:, None].expand(time, batch)
    turned = torch.where(steps < ends, ends - 1 - steps, steps)[..., None]
    layer_input, finals = x.transpose(0, 1), []
    for layer in range(num_layers):
        outputs = []
        for suffix in ("", "_reverse") if bidirectional else ("",):
            own = {name: weights[f"{name}_l{layer}{suffix}"]
                   for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}  # fmt: skip
            step, states = cell(own), tuple(state[len(finals)] for state in initial)
            read = layer_input.gather(0, turned.expand_as(layer_input)) if suffix else layer_input
            rows = []
            for t in range(time):
                real = (t < ends)[:, None]
                states = tuple(torch.where(real, *pair) for pair in zip(step(read[t], states), states, strict=True))
                rows.append(states[0] * real)
            stacked = torch.stack(rows)
            outputs.append(stacked.gather(0, turned.expand_as(stacked)) if suffix else stacked)
            finals.append(states)
        layer_input = torch.cat(outputs, dim=-1)
    return (layer_input.transpose(0, 1), *(torch.stack(state) for state in zip(*finals, strict=True)))


def merged_biases(wrong: bool = False) -> Callable[..., Any]:
    """An RNN with one bias, b_ih + b_hh, and one matrix for input and state together."""

    def rnn(x: Tensor, h0: Tensor, weights: dict[str, Tensor], num_layers: int, bidirectional: bool, nonlinearity: str,
            lengths: Tensor | None = None) -> tuple[Tensor, ...]:  # fmt: skip
        def cell(w: dict[str, Tensor]) -> Any:
            matrix = torch.cat((w["weight_ih"], w["weight_hh"]), dim=1).T
            bias = w["bias_ih"] if wrong else w["bias_ih"] + w["bias_hh"]
            act = {"tanh": torch.tanh, "relu": torch.relu}[nonlinearity]
            return lambda x, states: (act(torch.addmm(bias, torch.cat((x, states[0]), dim=1), matrix)),)

        return run(cell, x, (h0,), lengths, weights, num_layers, bidirectional)

    return rnn


def gates_reordered(wrong: bool = False) -> Callable[..., Any]:
    """An LSTM whose gates come from one product, those with a sigmoid side by side: i, f, o, then g."""

    def lstm(x: Tensor, h0: Tensor, c0: Tensor, weights: dict[str, Tensor], num_layers: int, bidirectional: bool,
             lengths: Tensor | None = None) -> tuple[Tensor, ...]:  # fmt: skip
        def cell(w: dict[str, Tensor]) -> Any:
            def reordered(tensor: Tensor) -> Tensor:
                i, f, g, o = tensor.chunk(4)
                return torch.cat((i, f, g, o) if wrong else (i, f, o, g))

            joint = torch.cat((reordered(w["weight_ih"]), reordered(w["weight_hh"])), dim=1)
            bias = reordered(w["bias_ih"] + w["bias_hh"])

            def step(x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                h, c = states
                gates = torch.cat((x, h), dim=1) @ joint.T + bias
                (i, f, o), g = gates[:, : 3 * h.shape[1]].sigmoid().chunk(3, dim=1), gates[:, 3 * h.shape[1] :].tanh()
                c = torch.lerp(torch.zeros_like(c), c, f) + i * g
                return o * c.tanh(), c

            return step

        return run(cell, x, (h0, c0), lengths, weights, num_layers, bidirectional)

    return lstm


def half_merged(wrong: bool = False) -> Callable[..., Any]:
    """A GRU that merges the biases of reset and update, and not the new state's; the mix is n + z (h − n)."""

    def gru(x: Tensor, h0: Tensor, weights: dict[str, Tensor], num_layers: int, bidirectional: bool, reset_after: bool,
            lengths: Tensor | None = None) -> tuple[Tensor, ...]:  # fmt: skip
        def cell(w: dict[str, Tensor]) -> Any:
            size = w["weight_hh"].shape[1]
            gates = torch.cat((w["weight_ih"], w["weight_hh"]), dim=1)[: 2 * size]
            bias, inner, outer = (w["bias_ih"] + w["bias_hh"])[: 2 * size], w["weight_hh"][2 * size :], w["weight_ih"]
            b_x, b_h = w["bias_ih"][2 * size :], w["bias_hh"][2 * size :]
            if wrong:
                b_x, b_h = b_x + b_h, torch.zeros_like(b_h)

            def step(x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                (h,) = states
                r, z = torch.sigmoid(torch.cat((x, h), dim=1) @ gates.T + bias).chunk(2, dim=1)
                recurrent = r * (h @ inner.T + b_h) if reset_after else (r * h) @ inner.T + b_h
                n = torch.tanh(x @ outer[2 * size :].T + b_x + recurrent)
                return (n + z * (h - n),)

            return step

        return run(cell, x, (h0,), lengths, weights, num_layers, bidirectional)

    return gru
