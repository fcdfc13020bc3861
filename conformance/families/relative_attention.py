"""Relative attention with memory (Transformer-XL, Dai et al. 2019).

Oracle: the paper's equation for A^rel, one query and one key at a time
(`conformance.oracles.equations.relative_attention`).
"""

from typing import TYPE_CHECKING

from conformance.families import Component, ComponentRecipe, Config, Value, relations
from conformance.families.components import EXACT, Claims

if TYPE_CHECKING:
    from torch import Tensor

# The loops are over torch vectors, so that the oracle has gradients.
_CLAIMS: Claims = {**EXACT, "component.gradients": ("float64",)}


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    import torch

    from conformance.oracles.equations.relative_attention import one_row

    w = {letter: tensors[f"{letter}_proj_weight"] for letter in "qkvro"} | {"R": tensors["distances"]}
    u, v = tensors["content_bias"], tensors["position_bias"]
    memories = tensors.get("memory", tensors["x"][:, :0])
    rows = [
        one_row(x, memory, w, u, v, settings["num_attention_heads"])
        for x, memory in zip(tensors["x"], memories, strict=True)
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _recipe(
    name: str, summary: str, *, seq: int, memory: int, heads: int, head_dim: int, hidden: int = 6,
    claims: Claims = _CLAIMS,
) -> ComponentRecipe:  # fmt: skip
    features = heads * head_dim
    return ComponentRecipe(
        name=f"relative_attention/{name}",
        summary=summary,
        settings={"num_attention_heads": heads},
        inputs={"x": (2, seq, hidden), "distances": (seq + memory, hidden)}
        | ({"memory": (2, memory, hidden)} if memory else {}),
        weights={
            **{f"{letter}_proj_weight": (features, hidden) for letter in "qkvr"},
            "o_proj_weight": (hidden, features), "content_bias": (heads, head_dim), "position_bias": (heads, head_dim),
        },
        claims=claims,
    )  # fmt: skip


FAMILY = Component(
    name="relative_attention",
    title="Relative attention",
    paper="Dai et al. 2019, arXiv:1901.02860, section 3.3",
    equations="""
    A_ij = (W_q E_i + u) · W_kE E_j  +  (W_q E_i + v) · W_kR R_{i−j}        for every j up to i, memory included
    y_i = W_o Σ_j softmax_j(A_ij / √head_dim) W_v E_j

    E is memory and x one after the other; R_d is row d of distances.  The paper leaves the factor 1/√head_dim out; the
    authors' code has it.
""",
    oracle="the paper's equation in float64",
    arguments=(
        Value(name="x", axes="batch seq hidden", meaning="the segment"),
        Value(name="memory", axes="batch memory hidden", meaning="what came right before it; absent: nothing"),
        Value(name="distances", axes="keys hidden", meaning="row d is R_d, the encoding of distance d = 0, 1, …"),
        Value(name="q_proj_weight", axes="features hidden", meaning="W_q, (out, in)"),
        Value(name="k_proj_weight", axes="features hidden", meaning="W_kE, (out, in)"),
        Value(name="v_proj_weight", axes="features hidden", meaning="W_v, (out, in)"),
        Value(name="r_proj_weight", axes="features hidden", meaning="W_kR, (out, in)"),
        Value(name="o_proj_weight", axes="hidden features", meaning="W_o, (out, in)"),
        Value(name="content_bias", axes="heads head_dim", meaning="u, added to the query that meets keys"),
        Value(name="position_bias", axes="heads head_dim", meaning="v, added to the query that meets distances"),
        Value(name="num_attention_heads", axes=None, meaning="heads"),
    ),
    returns=(
        Value(name="y", axes="batch seq hidden", meaning="output"),
        Value(
            name="content_scores", axes="batch heads seq keys", optional=True,
            meaning="terms (a) and (c) / √head_dim, for all keys",
        ),
        Value(
            name="position_scores", axes="batch heads seq keys", optional=True,
            meaning="terms (b) and (d) / √head_dim, by key, 0 after the query",
        ),
        Value(name="weights", axes="batch heads seq keys", meaning="softmax, 0 after the query", optional=True),
        Value(name="context", axes="batch seq features", meaning="the heads side by side", optional=True),
    ),
    recipes=(
        _recipe("plain", "no memory yet: a first segment", seq=4, memory=0, heads=2, head_dim=3),
        _recipe("memory", "a segment of 3 after a memory of 5", seq=3, memory=5, heads=2, head_dim=3),
        _recipe("distinct", "heads wider than hidden / heads, memory longer than the segment",
                seq=4, memory=7, heads=3, head_dim=5, hidden=8, claims=EXACT),
    ),
    truth=truth,
    exact=True,
    reference="reference_impl.nn.relative_attention:relative_attention",
    relations={
        "batching.alone": relations.rows("x", "memory"),
        "causality.prefix": relations.first_tokens(),
    },
)  # fmt: skip
