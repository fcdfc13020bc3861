"""Recurrent layers, cell by cell.

A second derivation for what torch.nn decides (tests prove that both agree), and the oracle for the one form that
torch.nn lacks, the GRU whose reset gate comes before the product.  Weights have torch.nn's names and shapes; the gates
lie below each other in the rows: i, f, g, o in an LSTM; r, z, n in a GRU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Vectors = tuple[Tensor, ...]
# x_t, state, (W_ih, W_hh, b_ih, b_hh) -> new state (its first vector is h_t), gates by name
Cell = Callable[[Tensor, Vectors, Vectors], tuple[Vectors, dict[str, Tensor]]]


def rnn(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Elman 1990: h_t = φ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), φ being tanh or relu."""
    phi = {"tanh": torch.tanh, "relu": torch.relu}[settings["nonlinearity"]]

    def cell(x: Tensor, state: Vectors, weights: Vectors) -> tuple[Vectors, dict[str, Tensor]]:
        W_ih, W_hh, b_ih, b_hh = weights
        return (phi(W_ih @ x + b_ih + W_hh @ state[0] + b_hh),), {}

    return _run(cell, ("h",), tensors, settings)


def lstm(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000, no peepholes.

    i, f, o = σ(…), g = tanh(…), each … = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh with its own rows;
    c_t = f ⊙ c_{t-1} + i ⊙ g;   h_t = o ⊙ tanh(c_t).
    """

    def cell(x: Tensor, state: Vectors, weights: Vectors) -> tuple[Vectors, dict[str, Tensor]]:
        h, c = state
        gate = {}
        for k, (name, phi) in enumerate(
            [("input", torch.sigmoid), ("forget", torch.sigmoid), ("cell", torch.tanh), ("output", torch.sigmoid)]
        ):
            W_ih, W_hh, b_ih, b_hh = _block(k, weights, len(h))
            gate[f"{name}_gate"] = phi(W_ih @ x + b_ih + W_hh @ h + b_hh)
        c = gate["forget_gate"] * c + gate["input_gate"] * gate["cell_gate"]
        return (gate["output_gate"] * torch.tanh(c), c), gate

    return _run(cell, ("h", "c"), tensors, settings)


def gru(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Cho et al. 2014 (arXiv:1406.1078), r and z by equations 5 and 6, h_t = z ⊙ h_{t-1} + (1 - z) ⊙ n by equation 7.

    The candidate n is tanh(W x_t + b_in + U (r ⊙ h_{t-1}) + b_hn) in version 3, equation 8 (`reset_after` false), and
    tanh(W x_t + b_in + r ⊙ (U h_{t-1} + b_hn)) in version 1, cuDNN and PyTorch (`reset_after` true).  The paper leaves
    the biases out.
    """

    def cell(x: Tensor, state: Vectors, weights: Vectors) -> tuple[Vectors, dict[str, Tensor]]:
        (h,) = state
        gate = {}
        for k, name in enumerate(["reset_gate", "update_gate"]):
            W_ih, W_hh, b_ih, b_hh = _block(k, weights, len(h))
            gate[name] = torch.sigmoid(W_ih @ x + b_ih + W_hh @ h + b_hh)
        r, z = gate["reset_gate"], gate["update_gate"]
        W, U, b_in, b_hn = _block(2, weights, len(h))
        if settings["reset_after"]:
            n = torch.tanh(W @ x + b_in + r * (U @ h + b_hn))
        else:
            n = torch.tanh(W @ x + b_in + U @ (r * h) + b_hn)
        return (z * h + (1 - z) * n,), {**gate, "new_gate": n}

    return _run(cell, ("h",), tensors, settings)


def _block(k: int, weights: Vectors, hidden: int) -> Vectors:
    """The rows of the k-th gate."""
    return tuple(weight[k * hidden : (k + 1) * hidden] for weight in weights)


def _run(
    cell: Cell, states: tuple[str, ...], tensors: dict[str, Tensor], settings: dict[str, Any]
) -> dict[str, Tensor]:
    """Every example alone, over its real positions; zeros where it has none."""
    x = tensors["x"]
    batch, seq, _ = x.shape
    lengths = tensors["lengths"].tolist() if "lengths" in tensors else [seq] * batch
    examples = [_example(cell, states, tensors, settings, b, lengths[b]) for b in range(batch)]
    found = {}
    for name in examples[0]:
        if name.endswith("_n"):
            found[name] = torch.stack([torch.stack(example[name]) for example in examples], dim=1)
            continue
        blank = torch.zeros_like(examples[0][name][0])
        rows = [[*example[name], *[blank] * (seq - len(example[name]))] for example in examples]
        found[name] = torch.stack([torch.stack(row) for row in rows])
    return found


def _example(
    cell: Cell, states: tuple[str, ...], tensors: dict[str, Tensor], settings: dict[str, Any], b: int, length: int
) -> dict[str, list[Tensor]]:
    """One example: outputs and first-layer gates by position, final states by layer and direction."""
    below = [tensors["x"][b, t] for t in range(length)]
    found: dict[str, list[Tensor]] = {"output": [], **{f"{s}_n": [] for s in states}}
    directions = ["", "_reverse"] if settings["bidirectional"] else [""]
    for layer in range(settings["num_layers"]):
        above: list[list[Tensor]] = [[] for _ in below]
        for d, suffix in enumerate(directions):
            kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            weights = tuple(tensors[f"{kind}_l{layer}{suffix}"] for kind in kinds)
            state = tuple(tensors[f"{s}0"][layer * len(directions) + d, b] for s in states)
            for t in reversed(range(length)) if suffix else range(length):
                state, gates = cell(below[t], state, weights)
                above[t].append(state[0])
                if layer == 0 and d == 0:
                    for name, gate in gates.items():
                        found.setdefault(name, []).append(gate)
            for s, value in zip(states, state, strict=True):
                found[f"{s}_n"].append(value)
        below = [torch.cat(vectors) for vectors in above]
    found["output"] = below
    return found
