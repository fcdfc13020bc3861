"""Attention of a recurrent decoder over its source: additive (Bahdanau et al. 2015) and Luong et al. 2015.

Shapes: B batch, T target, S source. `source_mask` is true at real positions; a row needs at least one. Arithmetic is in
float32, or float64 for float64 input; results have the dtype of `memory`.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Additive(NamedTuple):
    """context c, energies e before the mask, attention_weights α."""

    context: Float[Tensor, "batch annotation"]
    energies: Float[Tensor, "batch source"]
    attention_weights: Float[Tensor, "batch source"]


class Luong(NamedTuple):
    """attentional h̃, context c, scores before the mask, attention_weights a."""

    attentional: Float[Tensor, "batch target attentional"]
    context: Float[Tensor, "batch target annotation"]
    scores: Float[Tensor, "batch target source"]
    attention_weights: Float[Tensor, "batch target source"]


def additive_attention(
    query: Float[Tensor, "batch query"],
    memory: Float[Tensor, "batch source annotation"],
    query_weight: Float[Tensor, "attention query"],
    memory_weight: Float[Tensor, "attention annotation"],
    score_vector: Float[Tensor, "attention"],
    bias: Float[Tensor, "attention"] | None = None,
    source_mask: Bool[Tensor, "batch source"] | None = None,
) -> Additive:
    """Weighs the source by a small network's answer to each of its positions, for one step of the decoder.

        e_j = v_aᵀ tanh(W_a s_{i-1} + U_a h_j + b)
        α   = softmax(e)
        c   = Σ_j α_j h_j

    Bahdanau et al. 2015 (arXiv:1409.0473), equations 5 and 6 and appendix A.1.2: s_{i-1} → `query`, h → `memory`,
    W_a → `query_weight`, U_a → `memory_weight`, v_a → `score_vector`. The paper leaves b out for readability. The query
    is the decoder's state before the step that reads the context.
    """
    keys = additive_keys(memory, memory_weight)
    return attend_additively(query, memory, keys, query_weight, score_vector, bias, source_mask)


def additive_keys(
    memory: Float[Tensor, "batch source annotation"], memory_weight: Float[Tensor, "attention annotation"]
) -> Float[Tensor, "batch source attention"]:
    """U_a h_j, which is the same for every step of the decoder; in the dtype of the arithmetic."""
    memory, memory_weight = in_working_dtype(memory, memory_weight)
    return memory @ memory_weight.T


def attend_additively(
    query: Float[Tensor, "batch query"],
    memory: Float[Tensor, "batch source annotation"],
    keys: Float[Tensor, "batch source attention"],
    query_weight: Float[Tensor, "attention query"],
    score_vector: Float[Tensor, "attention"],
    bias: Float[Tensor, "attention"] | None = None,
    source_mask: Bool[Tensor, "batch source"] | None = None,
) -> Additive:
    """`additive_attention` with U_a h_j computed before."""
    dtype = memory.dtype
    memory, query, query_weight, score_vector = in_working_dtype(memory, query, query_weight, score_vector)
    inner = (query @ query_weight.T)[:, None] + keys  # (B, S, attention)
    if bias is not None:
        inner = inner + bias.to(inner.dtype)
    energies = inner.tanh() @ score_vector  # (B, S)
    weights = masked_softmax(energies, source_mask)
    context = (weights[:, None] @ memory)[:, 0]  # (B, annotation)
    return Additive(context.to(dtype), energies.to(dtype), weights.to(dtype))


def luong_attention(
    query: Float[Tensor, "batch target query"],
    memory: Float[Tensor, "batch source annotation"],
    attentional_weight: Float[Tensor, "attentional annotation+query"],
    score: str,
    score_weight: Tensor | None = None,
    score_vector: Float[Tensor, "attention"] | None = None,
    source_mask: Bool[Tensor, "batch source"] | None = None,
) -> Luong:
    """Global attention: every target step weighs the source and mixes what it reads with its own state.

        score(h_t, h̄_s) = h_tᵀ h̄_s                            "dot"
                          h_tᵀ W_a h̄_s                        "general", W_a (query, annotation)
                          v_aᵀ tanh(W_a [h_t; h̄_s])           "concat", W_a (attention, query + annotation)
        a_t = softmax(score)
        c_t = Σ_s a_t(s) h̄_s
        h̃_t = tanh(W_c [c_t; h_t])

    Luong et al. 2015 (arXiv:1508.04025), equations 5, 7 and 8: h_t → `query`, h̄_s → `memory`, W_a → `score_weight`,
    v_a → `score_vector`, W_c → `attentional_weight`. h_t is the state of the very step that is predicted. Feeding h̃_t
    to the next step (section 3.3) is the decoder's matter.

    Raises:
        ValueError: `score` is none of the three, or lacks a weight that it needs.
    """
    dtype = memory.dtype
    query, memory, attentional_weight = in_working_dtype(query, memory, attentional_weight)
    scores = raw_scores(score, query, memory, score_weight, score_vector)  # (B, T, S)
    mask = None if source_mask is None else source_mask[:, None]
    weights = masked_softmax(scores, mask)
    context = weights @ memory  # (B, T, annotation)
    attentional = attentional_vector(context, query, attentional_weight)
    return Luong(attentional.to(dtype), context.to(dtype), scores.to(dtype), weights.to(dtype))


def raw_scores(score: str, query: Tensor, memory: Tensor, weight: Tensor | None, vector: Tensor | None) -> Tensor:
    """Scores of all pairs in one of the three forms."""
    if score == "dot":
        return dot_score(query, memory)
    if score == "general":
        return general_score(query, memory, needed(score, "score_weight", weight).to(query.dtype))
    if score == "concat":
        weight, vector = needed(score, "score_weight", weight), needed(score, "score_vector", vector)
        return concat_score(query, memory, weight.to(query.dtype), vector.to(query.dtype))
    raise ValueError(f"score={score!r} is not implemented; use dot, general or concat")


def needed(score: str, name: str, weight: Tensor | None) -> Tensor:
    if weight is None:
        raise ValueError(f"score={score!r} needs {name}; none was given")
    return weight


def dot_score(query: Tensor, memory: Tensor) -> Tensor:
    return query @ memory.mT


def general_score(query: Tensor, memory: Tensor, weight: Tensor) -> Tensor:
    return query @ weight @ memory.mT


def concat_score(query: Tensor, memory: Tensor, weight: Tensor, vector: Tensor) -> Tensor:
    """W_a [h; h̄] is the sum of both products with their own columns of W_a."""
    own, source = weight[:, : query.shape[-1]], weight[:, query.shape[-1] :]
    inner = (query @ own.T)[:, :, None] + (memory @ source.T)[:, None]  # (B, T, S, attention)
    return inner.tanh() @ vector


def attentional_vector(context: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    """h̃ = tanh(W_c [c; h]): the context comes first."""
    return (torch.cat([context, query], dim=-1) @ weight.T).tanh()


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the source's real positions; zero at the others."""
    return scores.softmax(-1) if mask is None else scores.masked_fill(~mask, float("-inf")).softmax(-1)


def in_working_dtype(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


class Source(NamedTuple):
    """What a decoder reads of its source at every step: annotations h, U_a h, and which positions are no padding."""

    memory: Float[Tensor, "batch source annotation"]
    keys: Float[Tensor, "batch source attention"]
    real: Bool[Tensor, "batch source"]


class AdditiveAttention(nn.Module):
    """`additive_attention` with its weights; scores (energies), weights and context of a step can be hooked."""

    def __init__(self, *, query_size: int, memory_size: int, attention_size: int) -> None:
        super().__init__()
        self.query_weight = nn.Parameter(torch.empty(attention_size, query_size))
        self.memory_weight = nn.Parameter(torch.empty(attention_size, memory_size))
        self.bias = nn.Parameter(torch.empty(attention_size))
        self.score_vector = nn.Parameter(torch.empty(attention_size))
        self.scores, self.weights, self.context = nn.Identity(), nn.Identity(), nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform between ±1/√fan_in, the bias zero."""
        for parameter in (self.query_weight, self.memory_weight, self.score_vector):
            bound = 1 / math.sqrt(parameter.shape[-1])
            nn.init.uniform_(parameter, -bound, bound)
        nn.init.zeros_(self.bias)

    def read(self, memory: Float[Tensor, "batch source annotation"], real: Bool[Tensor, "batch source"]) -> Source:
        """A source, prepared once for all steps.

        Raises:
            ValueError: a row has no real position, over which the softmax is undefined.
        """
        if not real.any(dim=-1).all():
            row = int(real.any(dim=-1).logical_not().nonzero()[0])
            raise ValueError(f"row {row} of the source is all padding; attention needs one real token a row")
        return Source(memory, additive_keys(memory, self.memory_weight), real)

    def forward(self, query: Float[Tensor, "batch query"], source: Source) -> Float[Tensor, "batch annotation"]:
        found = attend_additively(
            query, source.memory, source.keys, self.query_weight, self.score_vector, self.bias, source.real
        )
        self.scores(found.energies)
        self.weights(found.attention_weights)
        context: Tensor = self.context(found.context)
        return context
