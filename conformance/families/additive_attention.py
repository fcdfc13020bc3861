"""Additive attention (Bahdanau et al. 2015).

Oracle: the paper's equations as float64 loops.
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, Value, relations
from conformance.families.components import EXACT_GRADIENTS

if TYPE_CHECKING:
    from torch import Tensor

BATCH, SOURCE, QUERY, ANNOTATION, ATTENTION = 3, 5, 4, 6, 7
# One row has a single real position; the pads hold draws like any other.
MASK = [[True, True, True, False, False], [True, True, True, True, True], [True, False, False, False, False]]
# Real positions need not be a prefix.
HOLES = [[True, False, True, True, False], [False, False, False, True, False], [True, True, True, False, True]]
_MISTAKES = ("source_mask ignored", "source_mask applied after the softmax")


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    from conformance.oracles.equations.attention import additive

    mistake = settings.get("mistake")
    if mistake == "bias ignored":
        tensors = {name: tensor for name, tensor in tensors.items() if name != "bias"}
    if mistake == "W_a transposed":
        tensors = {**tensors, "query_weight": tensors["query_weight"].T}
    if mistake == "U_a transposed":
        tensors = {**tensors, "memory_weight": tensors["memory_weight"].T}
    if mistake == "W_a and U_a exchanged":
        tensors = {
            **tensors, "query_weight": tensors["memory_weight"], "memory_weight": tensors["query_weight"],
        }  # fmt: skip
    if mistake in _MISTAKES:
        mask = tensors["source_mask"]
        found = additive({name: tensor for name, tensor in tensors.items() if name != "source_mask"}, settings)
        return found if mistake == _MISTAKES[0] else _masked_afterwards(found, mask, tensors["memory"])
    return additive(tensors, settings)


def _masked_afterwards(found: "dict[str, Tensor]", mask: "Tensor", memory: "Tensor") -> "dict[str, Tensor]":
    """Weights zeroed at pads and not normalised again."""
    weights = found["attention_weights"] * mask
    return {**found, "attention_weights": weights, "context": (weights[..., None] * memory).sum(1)}


def _recipe(
    name: str,
    summary: str,
    sizes: tuple[int, int, int] = (QUERY, ANNOTATION, ATTENTION),
    bias: bool = False,
    mask: list[list[bool]] | None = None,
    mistakes: tuple[str, ...] = (),
) -> ComponentRecipe:
    query, annotation, attention = sizes
    inputs: dict[str, Any] = {"query": (BATCH, query), "memory": (BATCH, SOURCE, annotation)}
    weights: dict[str, tuple[int, ...]] = {
        "query_weight": (attention, query),
        "memory_weight": (attention, annotation),
        "score_vector": (attention,),
    }
    return ComponentRecipe(
        name=f"additive_attention/{name}", summary=summary, settings={},
        inputs=inputs | ({"source_mask": mask} if mask else {}),
        weights=weights | ({"bias": (attention,)} if bias else {}),
        claims=EXACT_GRADIENTS, counterfactuals={label: {"mistake": label} for label in mistakes},
    )  # fmt: skip


FAMILY = Component(
    name="additive_attention",
    title="Additive attention",
    paper="Bahdanau et al. 2015, arXiv:1409.0473",
    equations="""
    e_j = v_aᵀ tanh(W_a s + U_a h_j + b)          s is the decoder's state before the step, h_j an annotation
    α = softmax(e) over the real positions
    c = Σ_j α_j h_j
""",
    oracle="the paper's equations in plain float64 loops",
    arguments=(
        Value(name="query", axes="batch query", meaning="s, the decoder's state before the step"),
        Value(name="memory", axes="batch source annotation", meaning="h_j, the encoder's annotations"),
        Value(name="source_mask", axes="batch source", meaning="true at real positions; absent: all are real"),
        Value(name="query_weight", axes="attention query", meaning="W_a"),
        Value(name="memory_weight", axes="attention annotation", meaning="U_a"),
        Value(name="score_vector", axes="attention", meaning="v_a"),
        Value(name="bias", axes="attention", meaning="b, inside the tanh; absent: none, as the paper writes it"),
    ),
    returns=(
        Value(name="context", axes="batch annotation", meaning="c"),
        Value(name="energies", axes="batch source", meaning="e_j at every position, before the mask", optional=True),
        Value(name="attention_weights", axes="batch source", meaning="α_j, zero at pads", optional=True),
    ),
    recipes=(
        _recipe("plain", "no mask, no bias"),
        _recipe("bias", "a bias inside the tanh", bias=True, mistakes=("bias ignored",)),
        _recipe("mask", "rows of different length over junk", mask=MASK, mistakes=_MISTAKES),
        _recipe("square", "state, annotation and attention of one size", (6, 6, 6),
                mistakes=("W_a transposed", "U_a transposed", "W_a and U_a exchanged")),
        _recipe("distinct", "bias, and pads in the middle of rows", bias=True, mask=HOLES, mistakes=_MISTAKES),
    ),
    truth=truth,
    exact=True,
    reference="reference_impl.nn.sequence_attention:additive_attention",
    relations={
        "batching.alone": relations.rows("query", "memory", "source_mask"),
        "batching.padding": relations.padding("source_mask", "memory"),
        "invariance.order": relations.source_order("context"),
        "invariance.weights_sum_to_one": relations.mixes_memory("context"),
    },
)  # fmt: skip
