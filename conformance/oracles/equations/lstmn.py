"""The long short-term memory-network of Cheng et al. 2016 (arXiv:1601.06733), section 3.2: intra-attention on tapes."""

from typing import Any

import torch
from torch import Tensor


def lstmn(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Equations 4 to 9, one example and one step at a time.

    a_i = vᵀ tanh(W_h h_i + W_x x_t + W_h̃ h̃_{t-1}) for every h_i on the hidden tape; s = softmax(a);
    h̃_t = Σ s_i h_i, c̃_t = Σ s_i c_i; i, f, o = σ, ĉ = tanh of W [h̃_t, x_t], rows in that order;
    c_t = f ⊙ c̃_t + i ⊙ ĉ; h_t = o ⊙ tanh(c_t).  Each new h_t and c_t is appended to its tape.

    The paper does not say what the tapes hold before the first step: here h0 and c0, and h̃_0 is `summary0`.  Its W has
    no bias; here `gate_bias` is added.
    """
    examples = [
        _example({n: t[b] if n in _INPUTS else t for n, t in tensors.items()}) for b in range(len(tensors["x"]))
    ]
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


_INPUTS = ("x", "h0", "c0", "summary0")


def _example(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    W_h, W_x = tensors["attention_hidden_weight"], tensors["attention_input_weight"]
    W_s, v = tensors["attention_summary_weight"], tensors["score_vector"]
    hiddens, cells, summary = [tensors["h0"]], [tensors["c0"]], tensors["summary0"]
    steps, hidden = len(tensors["x"]), len(tensors["h0"])
    summaries, weights = [], []
    for x in tensors["x"]:
        powers = [torch.exp(v @ torch.tanh(W_h @ h + W_x @ x + W_s @ summary)) for h in hiddens]
        total = torch.stack(powers).sum()
        summary, cell_summary = torch.zeros_like(tensors["h0"]), torch.zeros_like(tensors["c0"])
        for power, h, c in zip(powers, hiddens, cells, strict=True):
            summary = summary + power / total * h
            cell_summary = cell_summary + power / total * c
        gates = tensors["gate_weight"] @ torch.cat([summary, x]) + tensors["gate_bias"]
        i, f, o = (torch.sigmoid(gates[k * hidden : (k + 1) * hidden]) for k in range(3))
        candidate = torch.tanh(gates[3 * hidden :])
        cells.append(f * cell_summary + i * candidate)
        hiddens.append(o * torch.tanh(cells[-1]))
        summaries.append(summary)
        weights.append(torch.stack([*(power / total for power in powers), *[total * 0] * (steps - len(powers))]))
    return {
        "output": torch.stack(hiddens[1:]),
        "cells": torch.stack(cells[1:]),
        "summaries": torch.stack(summaries),
        "attention_weights": torch.stack(weights),
    }
