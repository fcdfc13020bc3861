"""Transformer-XL's relative attention, one query and one key at a time, in float64."""

import math
from typing import Any

import torch
from torch import Tensor


def one_row(x: Tensor, memory: Tensor, w: dict[str, Tensor], u: Tensor, v: Tensor, heads: int) -> dict[str, Any]:
    """Attention of one segment of one sequence.  Dai et al. 2019 (arXiv:1901.02860), section 3.3.

        A^rel_ij = E_i^T W_q^T W_kE E_j + E_i^T W_q^T W_kR R_(i−j) + u^T W_kE E_j + v^T W_kR R_(i−j)

    i is a place of the segment, j one of memory and segment together, none after i; u and v are per head.  A is divided
    by √head_dim before the softmax (the authors' code; the paper leaves it out).

    x: (segment, hidden).  memory: (memory, hidden).  w: "q", "k" (W_kE), "r" (W_kR), "v", "o", (out, in), and "R", the
    encodings of the distances 0, 1, …, (distances, hidden).  u, v: (heads, head_dim).
    """
    known = list(memory) + list(x)
    size = len(w["q"]) // heads
    outputs, contents, positions, weights, contexts = [], [], [], [], []
    for i, E_i in enumerate(x):
        own = len(memory) + i
        head_contexts, head_contents, head_positions, head_weights = [], [], [], []
        for h in range(heads):
            rows = slice(h * size, (h + 1) * size)
            q = w["q"][rows] @ E_i
            ac, bd, energies = [], [], []
            for j, E_j in enumerate(known):
                k = w["k"][rows] @ E_j
                ac.append((q.dot(k) + u[h].dot(k)) / math.sqrt(size))
                if j <= own:
                    r = w["r"][rows] @ w["R"][own - j]
                    bd.append((q.dot(r) + v[h].dot(r)) / math.sqrt(size))
                    energies.append(ac[j] + bd[j])
            a = _softmax(energies)
            context = torch.zeros(size, dtype=x.dtype)
            for j, share in enumerate(a):
                context = context + share * (w["v"][rows] @ known[j])
            hidden = [torch.zeros((), dtype=x.dtype)] * (len(known) - own - 1)
            head_contexts.append(context)
            head_contents.append(torch.stack(ac))
            head_positions.append(torch.stack(bd + hidden))
            head_weights.append(torch.stack(a + hidden))
        contexts.append(torch.cat(head_contexts))
        outputs.append(w["o"] @ contexts[-1])
        contents.append(torch.stack(head_contents))
        positions.append(torch.stack(head_positions))
        weights.append(torch.stack(head_weights))
    return {
        "y": torch.stack(outputs),
        "content_scores": torch.stack(contents, dim=1),
        "position_scores": torch.stack(positions, dim=1),
        "weights": torch.stack(weights, dim=1),
        "context": torch.stack(contexts),
    }


def _softmax(energies: list[Tensor]) -> list[Tensor]:
    highest = max(float(energy.detach()) for energy in energies)
    powers = [torch.exp(energy - highest) for energy in energies]
    total = sum(powers[1:], start=powers[0])
    return [power / total for power in powers]
