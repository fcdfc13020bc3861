"""Attention over a source, one query and one source position at a time: Bahdanau et al. 2015, Luong et al. 2015.

Weights are matrices as the papers write them: they multiply column vectors from the left.
"""

from typing import Any

import torch
from torch import Tensor


def additive(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Bahdanau et al. 2015 (arXiv:1409.0473), section 3.1, equations 5 and 6, and appendix A.1.2.

    e_j = v_aᵀ tanh(W_a s + U_a h_j), α = softmax(e), c = Σ_j α_j h_j, for one s (s_{i-1}) an example.  W_a is
    `query_weight`, U_a `memory_weight`, v_a `score_vector`.  The paper leaves the bias out "to increase readability":
    where there is a `bias` it is added inside the tanh.
    """
    W_a, U_a, v_a = tensors["query_weight"], tensors["memory_weight"], tensors["score_vector"]
    found: dict[str, list[Tensor]] = {"context": [], "energies": [], "attention_weights": []}
    for b, s in enumerate(tensors["query"]):
        energies = []
        for h_j in tensors["memory"][b]:
            inner = W_a @ s + U_a @ h_j
            if "bias" in tensors:
                inner = inner + tensors["bias"]
            energies.append(v_a @ torch.tanh(inner))
        alpha = _softmax(energies, _real(tensors, b))
        found["context"].append(_expected(alpha, tensors["memory"][b]))
        found["energies"].append(torch.stack(energies))
        found["attention_weights"].append(torch.stack(alpha))
    return {name: torch.stack(rows) for name, rows in found.items()}


def luong(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Luong et al. 2015 (arXiv:1508.04025), global attention, section 3.1: equations 5, 7 and 8.

    a_t(s) = softmax over s of score(h_t, h̄_s); c_t = Σ_s a_t(s) h̄_s; h̃_t = tanh(W_c [c_t; h_t]).  W_a is
    `score_weight`, v_a `score_vector`, W_c `attentional_weight`.
    """
    found: dict[str, list[Tensor]] = {"attentional": [], "context": [], "scores": [], "attention_weights": []}
    for b, queries in enumerate(tensors["query"]):
        rows: dict[str, list[Tensor]] = {name: [] for name in found}
        for h_t in queries:
            scores = [_score(h_t, h_s, tensors, settings["score"]) for h_s in tensors["memory"][b]]
            alpha = _softmax(scores, _real(tensors, b))
            c_t = _expected(alpha, tensors["memory"][b])
            rows["attentional"].append(torch.tanh(tensors["attentional_weight"] @ torch.cat([c_t, h_t])))
            rows["context"].append(c_t)
            rows["scores"].append(torch.stack(scores))
            rows["attention_weights"].append(torch.stack(alpha))
        for name, values in rows.items():
            found[name].append(torch.stack(values))
    return {name: torch.stack(rows) for name, rows in found.items()}


def _score(h_t: Tensor, h_s: Tensor, tensors: dict[str, Tensor], form: str) -> Tensor:
    """Equation 8."""
    if form == "dot":
        return h_t @ h_s
    if form == "general":
        return h_t @ (tensors["score_weight"] @ h_s)
    if form == "concat":
        return tensors["score_vector"] @ torch.tanh(tensors["score_weight"] @ torch.cat([h_t, h_s]))
    raise ValueError(f"no score is called {form!r}")


def _real(tensors: dict[str, Tensor], b: int) -> list[bool]:
    """Which source positions of example b are real."""
    if "source_mask" in tensors:
        return tensors["source_mask"][b].tolist()
    return [True] * tensors["memory"].shape[1]


def _softmax(energies: list[Tensor], real: list[bool]) -> list[Tensor]:
    """exp(e_j) / Σ_k exp(e_k), over real positions alone; zero elsewhere."""
    powers = [e.exp() if r else torch.zeros_like(e) for e, r in zip(energies, real, strict=True)]
    total = torch.stack(powers).sum()
    return [power / total for power in powers]


def _expected(alpha: list[Tensor], memory: Tensor) -> Tensor:
    """Σ_j α_j h_j."""
    total = torch.zeros_like(memory[0])
    for a, h in zip(alpha, memory, strict=True):
        total = total + a * h
    return total
