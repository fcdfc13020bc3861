"""Attention of recurrent decoders (Bahdanau, Luong), and relative attention (Transformer-XL)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.making import instead

SOFTMAX = "reference_impl.nn.sequence_attention:masked_softmax"
ADDITIVE = "reference_impl.nn.sequence_attention:additive_attention"
LUONG = "reference_impl.nn.sequence_attention:luong_attention"
VECTOR = "reference_impl.nn.sequence_attention:attentional_vector"
PART = "reference_impl.nn.sequence_attention:"
RELATIVE = "reference_impl.nn.relative_attention:"
BOTH = ("additive_attention", "luong_attention")
CHECKS = ("component.outputs", "golden.logits", "golden.left_padding", "golden.right_padding")
STEPS = ("steps.N.attention.scores", "steps.N.attention.weights", "steps.N.attention.context")


def entry(identifier: str, families: tuple[str, ...], *swaps: Swap, **text: Any) -> Mistake:
    more = {"seen": "common knowledge", "killed_by": CHECKS, "touches": STEPS} | text
    return Mistake(id=identifier, families=families, swaps=swaps, **more)


# --- Bahdanau and Luong -----------------------------------------------------------------------------------------------


def masked_after(scores: Tensor, mask: Tensor | None) -> Tensor:
    weights = scores.softmax(-1)
    return weights if mask is None else weights.masked_fill(~mask, 0.0)


def padding_as_zero(scores: Tensor, mask: Tensor | None) -> Tensor:
    return (scores if mask is None else scores.masked_fill(~mask, 0.0)).softmax(-1)


def inverted(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda scores, mask: original(scores, None if mask is None else ~mask)


def over_targets(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Softmax over the axis before the last: the target's steps, or the rows of the batch."""

    def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
        hidden = scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 2)
        return hidden.softmax(-2)

    return masked_softmax


def scaled(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda query, memory, *weights: original(query, memory, *weights) * query.shape[-1] ** -0.5


def transposed(query: Tensor, memory: Tensor, weight: Tensor) -> Tensor:
    """Legal for square matrices; others are read as if they lay the other way."""
    return query @ weight.reshape(weight.shape[::-1]).T @ memory.mT


def source_first(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def concat_score(query: Tensor, memory: Tensor, weight: Tensor, vector: Tensor) -> Tensor:
        """[h̄; h] for [h; h̄]."""
        own, source = weight[:, -query.shape[-1] :], weight[:, : memory.shape[-1]]
        inner = (query @ own.T)[:, :, None] + (memory @ source.T)[:, None]
        return inner.tanh() @ vector

    return concat_score


def without_tanh(query: Tensor, memory: Tensor, weight: Tensor, vector: Tensor) -> Tensor:
    own, source = weight[:, : query.shape[-1]], weight[:, query.shape[-1] :]
    return ((query @ own.T)[:, :, None] + (memory @ source.T)[:, None]) @ vector


def query_first(context: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    return (torch.cat([query, context], dim=-1) @ weight.T).tanh()


def not_squashed(context: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([context, query], dim=-1) @ weight.T


def additive(change: Callable[..., Any]) -> Callable[..., Any]:
    """change(original, arguments by name)."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def additive_attention(
            query: Tensor, memory: Tensor, query_weight: Tensor, memory_weight: Tensor, score_vector: Tensor,
            bias: Any = None, source_mask: Any = None,
        ) -> Any:  # fmt: skip
            given = {"query": query, "memory": memory, "query_weight": query_weight, "memory_weight": memory_weight,
                     "score_vector": score_vector, "bias": bias, "source_mask": source_mask}  # fmt: skip
            return change(original, given)

        return additive_attention

    return make


def unsquashed(original: Callable[..., Any], given: dict[str, Any]) -> Any:
    query, memory = given["query"].double(), given["memory"].double()
    inner = (query @ given["query_weight"].double().T)[:, None] + memory @ given["memory_weight"].double().T
    if given["bias"] is not None:
        inner = inner + given["bias"].double()
    energies = inner @ given["score_vector"].double()
    mask = given["source_mask"]
    weights = (energies if mask is None else energies.masked_fill(~mask, float("-inf"))).softmax(-1)
    dtype = given["memory"].dtype
    context = (weights[:, None] @ memory)[:, 0]
    return {"context": context.to(dtype), "energies": energies.to(dtype), "attention_weights": weights.to(dtype)}


def projected_memory(original: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The context mixes U h, cut or padded to the annotations' width."""
    found = original(**given)
    memory, weight = given["memory"], given["memory_weight"]
    keys = memory @ weight.T
    width = memory.shape[-1]
    keys = F.pad(keys, (0, max(0, width - keys.shape[-1])))[..., :width]
    return found._replace(context=(found.attention_weights[:, None] @ keys)[:, 0])


def roles_crossed(original: Callable[..., Any], given: dict[str, Any]) -> Any:
    """W_a and U_a change places where shapes allow it."""
    if given["query_weight"].shape != given["memory_weight"].shape:
        return original(**given)
    crossed = {"query_weight": given["memory_weight"], "memory_weight": given["query_weight"]}
    return original(**given | crossed)


def luong(change: Callable[..., Any]) -> Callable[..., Any]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def luong_attention(
            query: Tensor, memory: Tensor, attentional_weight: Tensor, score: str, score_weight: Any = None,
            score_vector: Any = None, source_mask: Any = None,
        ) -> Any:  # fmt: skip
            given = {
                "query": query, "memory": memory, "attentional_weight": attentional_weight, "score": score,
                "score_weight": score_weight, "score_vector": score_vector, "source_mask": source_mask,
            }  # fmt: skip
            return change(original, given)

        return luong_attention

    return make


def previous_state(original: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Scores of h_{t−1}; h̃ still joins h_t."""
    earlier = F.pad(given["query"], (0, 0, 1, 0))[:, :-1]
    found = original(**given | {"query": earlier})
    sizes = found.context.shape[-1]
    weight, query = given["attentional_weight"], given["query"]
    attentional = torch.tanh(found.context @ weight[:, :sizes].T + query @ weight[:, sizes:].T)
    return found._replace(attentional=attentional)


def context_alone(original: Callable[..., Any], given: dict[str, Any]) -> Any:
    weight = given["attentional_weight"].clone()
    weight[:, given["memory"].shape[-1] :] = 0
    return original(**given | {"attentional_weight": weight})


_RECURRENT = (
    entry(
        "s2s-no-source-mask", (*BOTH, "rnn_search", "gnmt"),
        Swap(SOFTMAX, lambda original: lambda scores, mask: original(scores, None)),
        what="The softmax runs over the source's padding too.", why="Pads are no input.",
        shows="Only in sources shorter than the longest.", fix="−∞ at pads, before the softmax.",
        seen="tensorflow#512, tensorflow#43941, pytorch/tutorials#593",
    ),
    entry(
        "s2s-mask-after-softmax", (*BOTH, "rnn_search", "gnmt"), Swap(SOFTMAX, instead(masked_after)),
        what="Weights of pads are set to 0 after the softmax, and the others are not normalised again.",
        why="A step's weights sum to 1.", shows="Only in short sources; sums below 1.", fix="Mask the scores.",
    ),
    entry(
        "s2s-pads-scored-zero", (*BOTH, "rnn_search", "gnmt"), Swap(SOFTMAX, instead(padding_as_zero)),
        what="Scores of pads are 0.", why="exp(0) = 1: they keep a weight.", shows="Only in short sources.", fix="−∞.",
        seen="transformers#382 (fills that are too small)",
    ),
    entry(
        "s2s-mask-inverted", BOTH, Swap(SOFTMAX, inverted),
        what="The mask is read the other way round: real positions are hidden.", why="True is real.",
        shows="Wherever there is a mask; NaN in full rows.", fix="One polarity.", seen="pytorch#114083",
    ),
    entry(
        "s2s-softmax-wrong-axis", BOTH, Swap(SOFTMAX, over_targets),
        what="Softmax over the wrong axis: the target's steps, or the batch.",
        why="A step's weights over the source sum to 1.",
        shows="Everywhere.", fix="softmax(dim=−1).",
    ),
    entry(
        "bahdanau-bias-or-split", ("additive_attention",),
        Swap(ADDITIVE, additive(lambda original, given: original(**given | {"bias": None}))),
        what="The bias inside the energy is left out.", why="It is part of the model where there is one.",
        shows="Nothing while it is 0.", fix="Add it.", seen="OpenNMT-py#110, tensorflow#6597",
    ),
    entry(
        "bahdanau-tanh-missing", ("additive_attention",), Swap(ADDITIVE, additive(unsquashed)),
        what="The energy is linear: vᵀ(W s + U h).", why="vᵀ tanh(W s + U h).",
        shows="Small while everything is small.", fix="tanh.",
    ),
    entry(
        "bahdanau-context-of-keys", ("additive_attention",), Swap(ADDITIVE, additive(projected_memory)),
        what="The context mixes the projected annotations U h.", why="It mixes the annotations h.",
        shows="Everywhere; a shape error where widths differ, unless they are cut.", fix="Σ α h.",
    ),
    entry(
        "bahdanau-weights-crossed", ("additive_attention",), Swap(ADDITIVE, additive(roles_crossed)),
        what="W_a and U_a change places.", why="One is the decoder's, the other the source's.",
        shows="A shape error, or silence where both sizes are equal.", fix="Follow the names.", seen="tensorflow#6597",
    ),
    entry(
        "luong-dot-scaled", ("luong_attention",), Swap(PART + "dot_score", scaled),
        what="Dot scores are divided by √d.", why="Luong's are not; Vaswani's are.", shows="Everywhere.", fix="h · h̄.",
    ),
    entry(
        "luong-general-transposed", ("luong_attention",), Swap(PART + "general_score", instead(transposed)),
        what="h̄ᵀ W h for hᵀ W h̄.", why="W is (query, annotation).",
        shows="Legal where both sizes are equal; nothing for symmetric W.", fix="hᵀ W h̄.",
    ),
    entry(
        "luong-general-is-dot", ("luong_attention",),
        Swap(PART + "general_score", instead(lambda query, memory, weight: (
            query @ torch.eye(*weight.shape, dtype=weight.dtype) @ memory.mT))),
        what="W_a is not used.", why="general has a matrix.", shows="Everywhere.", fix="hᵀ W h̄.",
    ),
    entry(
        "luong-concat-order", ("luong_attention",), Swap(PART + "concat_score", source_first),
        what="W_a is applied to [h̄; h].", why="[h; h̄].", shows="Wherever W's halves differ.", fix="[h; h̄].",
        seen="OpenNMT-py#110, tensorflow#6597",
    ),
    entry(
        "luong-concat-tanh-missing", ("luong_attention",), Swap(PART + "concat_score", instead(without_tanh)),
        what="vᵀ W [h; h̄], without tanh.", why="vᵀ tanh(W [h; h̄]).",
        shows="Weights no longer depend on h at all: it adds a constant.", fix="tanh.",
    ),
    entry(
        "luong-no-attentional-layer", ("luong_attention",), Swap(VECTOR, instead(not_squashed)),
        what="h̃ = W_c [c; h], without tanh.", why="h̃ = tanh(W_c [c; h]).", shows="Small while it is small.",
        fix="tanh.",
        seen="spro/practical-pytorch#33",
    ),
    entry(
        "luong-attentional-order", ("luong_attention",), Swap(VECTOR, instead(query_first)),
        what="W_c is applied to [h; c].", why="[c; h].",
        shows="A shape error, or silence where both are equally wide or joined.",
        fix="[c; h].", seen="tensorflow#6597 (the same seam)",
    ),
    entry(
        "luong-attentional-context-alone", ("luong_attention",), Swap(LUONG, luong(context_alone)),
        what="h̃ = tanh(W_c c).", why="The decoder's own state belongs to it.", shows="Everywhere.", fix="[c; h].",
        seen="spro/practical-pytorch#33",
    ),
    entry(
        "luong-uses-previous-state", ("luong_attention",), Swap(LUONG, luong(previous_state)),
        what="Scores are those of h_{t−1} (Bahdanau's way).", why="Luong scores the current h_t.",
        shows="Everywhere.", fix="Step first, attend afterwards.",
        seen="A-Jacobson/minimal-nmt#2, gabrielloye/Attention_Seq2seq-Translation#3",
    ),
)  # fmt: skip


# --- relative attention -----------------------------------------------------------------------------------------------


def cut_at_the_end(x: Tensor) -> Tensor:
    batch, heads, queries, keys = x.shape
    padded = F.pad(x, (1, 0))
    return padded.view(batch, heads, 1 + keys, queries)[:, :, :-1].reshape(batch, heads, queries, keys)


def padded_behind(x: Tensor) -> Tensor:
    batch, heads, queries, keys = x.shape
    padded = F.pad(x, (0, 1))
    return padded.view(batch, heads, 1 + keys, queries)[:, :, 1:].reshape(batch, heads, queries, keys)


def rising(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda query, distance_key, bias: original(query, distance_key.flip(dims=(-2,)), bias)


def unbiased(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda query, key, bias: original(query, key, torch.zeros_like(bias))


def biases(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """u and v, changed."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def relative_attention(
            x: Tensor, distances: Tensor, q_proj_weight: Tensor, k_proj_weight: Tensor, v_proj_weight: Tensor,
            r_proj_weight: Tensor, o_proj_weight: Tensor, content_bias: Tensor, position_bias: Tensor,
            memory: Any = None,
        ) -> Any:  # fmt: skip
            u, v = change(content_bias, position_bias)
            return original(x, distances, q_proj_weight, k_proj_weight, v_proj_weight, r_proj_weight, o_proj_weight,
                            u, v, memory)  # fmt: skip

        return relative_attention

    return make


def unscaled_sum(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda query, key, bias: original(query, key, bias) * query.shape[-1] ** 0.5


def memory_forgotten(original: Callable[..., Any]) -> Callable[..., Any]:
    def relative_attention(
        x: Tensor, distances: Tensor, q_proj_weight: Tensor, k_proj_weight: Tensor, v_proj_weight: Tensor,
        r_proj_weight: Tensor, o_proj_weight: Tensor, content_bias: Tensor, position_bias: Tensor, memory: Any = None,
    ) -> Any:  # fmt: skip
        found = original(x, distances, q_proj_weight, k_proj_weight, v_proj_weight, r_proj_weight, o_proj_weight,
                         content_bias, position_bias, memory)  # fmt: skip
        if memory is None:
            return found
        alone = original(x, distances, q_proj_weight, k_proj_weight, v_proj_weight, r_proj_weight, o_proj_weight,
                         content_bias, position_bias)  # fmt: skip
        return {**found, "y": alone["y"], "context": alone["context"]}

    return relative_attention


def both(identifier: str, *swaps: Swap, **text: Any) -> Mistake:
    """In the component and in the model."""
    more = {"killed_by": ("component.outputs", "golden.logits"), "touches": SCORES} | text
    return entry(identifier, ("relative_attention", "transformer_xl"), *swaps, **more)


def relative(identifier: str, *swaps: Swap, **text: Any) -> Mistake:
    return entry(identifier, ("relative_attention",), *swaps, **text)


SCORES = ("layers.N.attention.content_scores", "layers.N.attention.position_scores", "layers.N.attention.weights")
SHIFT = RELATIVE + "relative_shift"
WHOLE = RELATIVE + "relative_attention"

_RELATIVE = (
    both(
        "txl-rel-shift-slice", Swap(SHIFT, instead(cut_at_the_end)),
        what="The padded matrix is cut [:−1] instead of [1:].", why="The first of its new rows is the padding's.",
        shows="2e-5 at tiny weights, large at real scale.", fix="[1:]; test against a double loop.",
        seen="labmlai/annotated_deep_learning_paper_implementations#185, #218",
    ),
    both(
        "txl-rel-shift-missing", Swap(SHIFT, instead(lambda x: x)),
        what="Scores by distance are used as scores by key.", why="Row i must move by T − 1 − i.",
        shows="Only the last row is right.", fix="Shift.",
        seen="labmlai/annotated_deep_learning_paper_implementations#185",
    ),
    both(
        "txl-rel-shift-padded-behind", Swap(SHIFT, instead(padded_behind)),
        what="The column of zeros is put behind the scores instead of in front.", why="In front.",
        shows="Everywhere but in single rows.", fix="pad(x, (1, 0)).", seen="kimiyoung/transformer-xl#132",
    ),
    both(
        "txl-distances-rising", Swap(RELATIVE + "position_scores", rising),
        what="Distances run from 0 upwards where the shift expects them to fall.",
        why="The first column is distance S − 1.",
        shows="Everywhere.", fix="R_{S−1} … R_0.", seen="kimiyoung/transformer-xl#132 (family)",
    ),
    relative(
        "txl-u-v-swapped", Swap(WHOLE, biases(lambda u, v: (v, u))),
        what="u (content) and v (position) change places.", why="u goes with keys of tokens, v with keys of distances.",
        shows="Nothing while both are 0; 3e-6 at deviation 0.02.", fix="r_w_bias is u, r_r_bias is v.",
    ),
    relative(
        "txl-u-v-shared", Swap(WHOLE, biases(lambda u, v: (u, u))),
        what="One bias serves both.", why="There are two.", shows="Nothing while they agree.", fix="u and v.",
        seen="dmlc/gluon-nlp#846 (which parameters are shared)",
    ),
    both(
        "txl-u-missing", Swap(RELATIVE + "content_scores", unbiased),
        what="u is left out.", why="Term (c) is u · W_kE E_j.", shows="Nothing while it is 0.", fix="q + u.",
    ),
    both(
        "txl-v-missing", Swap(RELATIVE + "position_scores", unbiased),
        what="v is left out.", why="Term (d) is v · W_kR R.", shows="Nothing while it is 0.", fix="q + v.",
    ),
    both(
        "txl-position-not-scaled", Swap(RELATIVE + "position_scores", unscaled_sum),
        what="Content scores are scaled, position scores are not.", why="Their sum is scaled.",
        shows="Everywhere.", fix="(AC + BD) / √Dh.",
    ),
    relative(
        "txl-memory-ignored", Swap(WHOLE, memory_forgotten),
        what="The memory is not attended to.", why="Keys and values are those of memory and segment.",
        shows="Only from the second segment on.", fix="cat((memory, x)).", seen="transformers#14832 (family)",
    ),
)  # fmt: skip

MISTAKES = (*_RECURRENT, *_RELATIVE)
