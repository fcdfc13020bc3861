"""Global attention with an attentional vector (Luong et al. 2015).

Oracle: the paper's equations as float64 loops.  Input feeding belongs to a decoder and is not part of the component.
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, ConfigField, Value, relations
from conformance.families.additive_attention import BATCH, HOLES, MASK, SOURCE
from conformance.families.components import EXACT_GRADIENTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Tensors = dict[str, Tensor]

TARGET, SAME, QUERY, ATTENTION, ATTENTIONAL = 2, 6, 4, 8, 7
_SCORE = ConfigField(
    name="score", default="dot", meaning='"dot" hᵀh̄, "general" hᵀW_a h̄, "concat" v_aᵀ tanh(W_a [h; h̄])'
)


def truth(tensors: "Tensors", settings: Config) -> "Tensors":
    from conformance.oracles.equations.attention import luong

    mistake = settings.get("mistake")
    return luong(_ALTERED[mistake](tensors) if mistake in _ALTERED else tensors, settings)


def _turned(name: str, first: "Callable[[Tensors], int]") -> "Callable[[Tensors], Tensors]":
    """A matrix whose two blocks of columns are exchanged: as if the other vector came first."""

    def alter(tensors: "Tensors") -> "Tensors":
        import torch

        head, tail = tensors[name][:, : first(tensors)], tensors[name][:, first(tensors) :]
        return {**tensors, name: torch.cat([tail, head], dim=1)}

    return alter


# Mistake -> the tensors with which a right implementation gives what the mistake gives.
_ALTERED: "dict[str | None, Callable[[Tensors], Tensors]]" = {
    "source_mask ignored": lambda tensors: {n: t for n, t in tensors.items() if n != "source_mask"},
    "W_a transposed": lambda tensors: {**tensors, "score_weight": tensors["score_weight"].T},
    "[h; c] in place of [c; h]": _turned("attentional_weight", lambda tensors: tensors["query"].shape[-1]),
    "[h̄; h] in place of [h; h̄]": _turned("score_weight", lambda tensors: tensors["memory"].shape[-1]),
}


def _recipe(
    name: str,
    summary: str,
    score: str = "dot",
    sizes: tuple[int, int] = (SAME, SAME),
    mask: list[list[bool]] | None = None,
    mistakes: tuple[str, ...] = (),
    field: str | None = None,
) -> ComponentRecipe:
    query, annotation = sizes
    inputs: dict[str, Any] = {"query": (BATCH, TARGET, query), "memory": (BATCH, SOURCE, annotation)}
    scoring: dict[str, dict[str, tuple[int, ...]]] = {
        "dot": {},
        "general": {"score_weight": (query, annotation)},
        "concat": {"score_weight": (ATTENTION, query + annotation), "score_vector": (ATTENTION,)},
    }
    known = {f"{field} ignored": {"score": "dot"}} if field else {}
    return ComponentRecipe(
        name=f"luong_attention/{name}", summary=summary, settings={"score": score},
        inputs=inputs | ({"source_mask": mask} if mask else {}),
        weights={**scoring[score], "attentional_weight": (ATTENTIONAL, annotation + query)},
        claims=EXACT_GRADIENTS, field=field,
        counterfactuals={**known, **{label: {"score": score, "mistake": label} for label in mistakes}},
    )  # fmt: skip


FAMILY = Component(
    name="luong_attention",
    title="Luong's global attention",
    paper="Luong et al. 2015, arXiv:1508.04025",
    equations="""
    score(h_t, h̄_s) = h_tᵀ h̄_s  ·  h_tᵀ W_a h̄_s  ·  v_aᵀ tanh(W_a [h_t; h̄_s])          dot, general, concat
    a_t = softmax(score) over the real source positions
    c_t = Σ_s a_t(s) h̄_s
    h̃_t = tanh(W_c [c_t; h_t])          h_t is the decoder's state of this very step
""",
    oracle="the paper's equations in plain float64 loops",
    arguments=(
        Value(name="query", axes="batch target query", meaning="h_t, the decoder's states"),
        Value(name="memory", axes="batch source annotation", meaning="h̄_s, the encoder's states"),
        Value(name="source_mask", axes="batch source", meaning="true at real positions; absent: all are real"),
        Value(name="score_weight", axes="rows columns", meaning="W_a: (query, annotation); concat: (attention, both)"),
        Value(name="score_vector", axes="attention", meaning="v_a, of concat alone"),
        Value(name="attentional_weight", axes="attentional annotation+query", meaning="W_c"),
        Value(name="score", axes=None, meaning=_SCORE.meaning),
    ),
    returns=(
        Value(name="attentional", axes="batch target attentional", meaning="h̃_t"),
        Value(name="context", axes="batch target annotation", meaning="c_t", optional=True),
        Value(name="scores", axes="batch target source", meaning="of all positions, before the mask", optional=True),
        Value(name="attention_weights", axes="batch target source", meaning="a_t, zero at pads", optional=True),
    ),
    recipes=(
        _recipe("plain", "dot, no mask", mistakes=("[h; c] in place of [c; h]",)),
        _recipe("field-score-general", "plain with the score general, W_a square", "general", field="score",
                mistakes=("W_a transposed",)),
        _recipe("field-score-concat", "plain with the score concat", "concat", field="score",
                mistakes=("[h̄; h] in place of [h; h̄]",)),
        _recipe("mask", "dot, rows of different length over junk", mask=MASK, mistakes=("source_mask ignored",)),
        _recipe("distinct", "general, all sizes different, pads in the middle of rows", "general", (QUERY, SAME), HOLES,
                mistakes=("source_mask ignored",)),
        _recipe("distinct-concat", "concat, all sizes different, pads in the middle of rows", "concat", (QUERY, SAME),
                HOLES, mistakes=("source_mask ignored",)),
    ),
    truth=truth,
    exact=True,
    reference="reference_impl.nn.sequence_attention:luong_attention",
    relations={
        "batching.alone": relations.rows("query", "memory", "source_mask"),
        "batching.padding": relations.padding("source_mask", "memory"),
        "invariance.one_query": relations.last_query("attentional", "context", size="target"),
        "invariance.order": relations.source_order("attentional"),
        "invariance.weights_sum_to_one": relations.mixes_memory("attentional"),
    },
    fields=(_SCORE,),
)  # fmt: skip
