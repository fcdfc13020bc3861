"""Causal attention over a sliding window of keys (Longformer, Mistral), between projections.

Oracle: `torch.nn.functional.scaled_dot_product_attention` with a mask written key by key.
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, ConfigField, Value, relations
from conformance.families.components import ALL

if TYPE_CHECKING:
    from torch import Tensor


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    import torch
    import torch.nn.functional as F

    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    may_see = torch.zeros(queries, keys, dtype=torch.bool)
    for t in range(queries):
        own = keys - queries + t
        for s in range(max(0, own - settings["sliding_window"] + 1), own + 1):
            may_see[t, s] = True
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=may_see, enable_gqa=True)
    every = torch.tensor([head * key.shape[1] // heads for head in range(heads)])
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key[:, every]) / query.shape[-1] ** 0.5
    return {"y": y, "scores": scores, "weights": scores.masked_fill(~may_see, -torch.inf).softmax(-1)}


def _recipe(
    name: str, summary: str, window: int, *, heads: int = 3, kv_heads: int = 3, lengths: tuple[int, int] = (7, 7),
    **more: Any,
) -> ComponentRecipe:  # fmt: skip
    """lengths: queries, keys."""
    return ComponentRecipe(
        name=f"sliding_window_attention/{name}",
        summary=summary,
        settings={"sliding_window": window},
        inputs={"query": (2, heads, lengths[0], 4), "key": (2, kv_heads, lengths[1], 4),
                "value": (2, kv_heads, lengths[1], 4)},
        deviation={"query": 1.5, "key": 1.5},
        claims=ALL,
        **more,
    )  # fmt: skip


FAMILY = Component(
    name="sliding_window_attention",
    title="Sliding-window attention",
    paper="Beltagy et al. 2020, arXiv:2004.05150; Jiang et al. 2023, arXiv:2310.06825, section 2",
    equations="""
    y_i = Σ_j softmax_j(q_i · k_j / √head_dim) v_j,   j = i − sliding_window + 1 … i

    A query sees exactly sliding_window keys, its own among them (fewer at the beginning).  The queries are the last of
    the keys' tokens.  With fewer key/value heads, neighbouring query heads share one.
""",
    oracle="torch.nn.functional.scaled_dot_product_attention",
    arguments=(
        Value(name="query", axes="batch heads queries head_dim", meaning="queries of the last tokens"),
        Value(name="key", axes="batch kv_heads keys head_dim", meaning="keys of all tokens so far"),
        Value(name="value", axes="batch kv_heads keys head_dim", meaning="values of all tokens so far"),
        Value(name="sliding_window", axes=None, meaning="how many keys a query sees, its own included"),
    ),
    returns=(
        Value(name="y", axes="batch heads queries head_dim", meaning="mixed values"),
        Value(name="scores", axes="batch heads queries keys", meaning="q · k / √head_dim, not masked", optional=True),
        Value(name="weights", axes="batch heads queries keys", meaning="softmax, 0 at hidden keys", optional=True),
    ),
    recipes=(
        _recipe("plain", "a window wider than the sequence: causal attention", 16),
        _recipe(
            "field-sliding_window", "3 keys of 7", 3,
            field="sliding_window",
            counterfactuals={
                "sliding_window ignored": {"sliding_window": 16},
                "sliding_window one key too wide": {"sliding_window": 4},
                "sliding_window one key too narrow": {"sliding_window": 2},
            },
        ),
        _recipe("one", "a window of 1: a query sees itself alone", 1),
        _recipe("distinct", "6 query heads share 2, five queries at the end of nine keys, window 4", 4,
                heads=6, kv_heads=2, lengths=(5, 9)),
    ),
    truth=truth,
    reference="reference_impl.nn.multi_head_attention:sliding_window_attention",
    relations={
        "batching.alone": relations.rows("query", "key", "value"),
        "invariance.weights_sum_to_one": relations.mixes_values(axis=2),
        "invariance.wide_window": relations.wide_window(),
        "invariance.one_query": relations.last_query("y", axis=2),
        "invariance.narrow_window": relations.narrow_window(),
    },
    fields=(ConfigField(name="sliding_window", default="none", meaning="keys that a query sees, its own included"),),
)  # fmt: skip
