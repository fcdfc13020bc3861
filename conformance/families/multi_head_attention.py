"""Multi-head attention (Vaswani et al. 2017) with its projections; grouped and multi-query variants.

Oracle: `torch.nn.functional.multi_head_attention_forward`; for what it lacks (shared key/value heads, heads of another
width, queries that see nothing), `torch.nn.functional.linear` and `scaled_dot_product_attention`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, ConfigField, Value, relations
from conformance.families.components import ALL, Claims

if TYPE_CHECKING:
    from torch import Tensor

_RIGHT = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
_LEFT = [row[::-1] for row in _RIGHT]
_CROSS = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
# One input for queries, keys and values, exact in bfloat16; no two tokens are alike.
_SELF = [[[((5 * b + 7 * t * t + 3 * i * (i + t)) % 13 - 6) / 4 for i in range(6)] for t in range(4)] for b in range(3)]
_NO_OUT = "out_proj ignored"
_OUTPUTS: Claims = {"component.outputs": ALL["component.outputs"]}
_DOUBLE: Claims = {"component.outputs": ("float64",)}


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    import torch
    import torch.nn.functional as F

    if settings.get("mistake") == _NO_OUT:
        weight, bias = tensors["out_proj_weight"], tensors["out_proj_bias"]
        tensors = tensors | {"out_proj_weight": torch.eye(len(weight), dtype=weight.dtype), "out_proj_bias": bias * 0}
    heads, batch = settings["num_attention_heads"], len(tensors["query"])
    size = len(tensors["q_proj_weight"]) // heads
    query, key, value = (
        F.linear(tensors[name], tensors[f"{name[0]}_proj_weight"], tensors[f"{name[0]}_proj_bias"])
        .view(batch, tensors[name].shape[1], -1, size)
        .transpose(1, 2)
        for name in ("query", "key", "value")
    )
    may_see = _may_see(tensors, settings["causal"])
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=may_see[:, None], enable_gqa=True)
    context = attended.transpose(1, 2).flatten(2)
    every = torch.tensor([head * key.shape[1] // heads for head in range(heads)])
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key[:, every]) / size**0.5
    weights = scores.masked_fill(~may_see[:, None], -torch.inf).softmax(-1)
    plain = key.shape[1] == heads and context.shape[-1] == tensors["query"].shape[-1]
    if plain and may_see.any(-1).all():
        y, weights = _multi_head_attention_forward(tensors, settings)
    else:
        y = F.linear(context, tensors["out_proj_weight"], tensors["out_proj_bias"])
    return {"y": y, "scores": scores, "weights": weights, "context": context}


def _may_see(tensors: "dict[str, Tensor]", causal: bool) -> "Tensor":
    """(batch, queries, keys), one at a time."""
    import torch

    (batch, queries), keys = tensors["query"].shape[:2], tensors["key"].shape[1]
    real = tensors["attention_mask"].tolist() if "attention_mask" in tensors else [[1] * keys] * batch
    last = [keys - queries + t if causal else keys - 1 for t in range(queries)]
    return torch.tensor(
        [[[bool(row[s]) and s <= last[t] for s in range(keys)] for t in range(queries)] for row in real]
    )


def _multi_head_attention_forward(tensors: "dict[str, Tensor]", settings: Config) -> "tuple[Tensor, Tensor]":
    import torch
    import torch.nn.functional as F

    query, key, value = (tensors[name].transpose(0, 1) for name in ("query", "key", "value"))
    (queries, _, hidden), keys = query.shape, len(key)
    future = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    y, weights = F.multi_head_attention_forward(
        query, key, value, hidden, settings["num_attention_heads"],
        in_proj_weight=None, in_proj_bias=torch.cat([tensors[f"{name}_proj_bias"] for name in "qkv"]),
        bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
        out_proj_weight=tensors["out_proj_weight"], out_proj_bias=tensors["out_proj_bias"], training=False,
        key_padding_mask=tensors["attention_mask"] == 0 if "attention_mask" in tensors else None,
        attn_mask=future if settings["causal"] else None,
        use_separate_proj_weight=True, average_attn_weights=False,
        q_proj_weight=tensors["q_proj_weight"], k_proj_weight=tensors["k_proj_weight"],
        v_proj_weight=tensors["v_proj_weight"],
    )  # fmt: skip
    assert weights is not None
    return y.transpose(0, 1), weights


def _recipe(
    name: str,
    summary: str,
    *,
    causal: bool = False,
    heads: int = 2,
    kv_heads: int | None = None,
    head_dim: int = 3,
    hidden: int = 6,
    sizes: tuple[int, int] | None = None,
    lengths: tuple[int, int] = (4, 4),
    mask: list[list[int]] | None = None,
    itself: bool = False,
    mistakes: Mapping[str, Config] | None = None,
    claims: Claims = _OUTPUTS,
    **more: Any,
) -> ComponentRecipe:
    """sizes: features of a key and of a value, where they are not `hidden`.  lengths: queries, keys.

    itself: self-attention, one input for all three, and biases of zero: what has no biases can run it.
    mistakes: label -> the settings that differ.
    """
    key_size, value_size = sizes or (hidden, hidden)
    rows, kv_rows = heads * head_dim, (kv_heads or heads) * head_dim
    inputs: dict[str, Any] = {
        "query": (3, lengths[0], hidden),
        "key": (3, lengths[1], key_size),
        "value": (3, lengths[1], value_size),
    }
    settings: Config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads or heads, "causal": causal}
    if itself:
        inputs = dict.fromkeys(inputs, _SELF)

    def bias(size: int) -> Any:
        return [0.0] * size if itself else (size,)

    return ComponentRecipe(
        name=f"multi_head_attention/{name}",
        summary=summary,
        settings=settings,
        inputs=inputs | ({"attention_mask": mask} if mask else {}),
        weights={
            "q_proj_weight": (rows, hidden), "q_proj_bias": bias(rows),
            "k_proj_weight": (kv_rows, key_size), "k_proj_bias": bias(kv_rows),
            "v_proj_weight": (kv_rows, value_size), "v_proj_bias": bias(kv_rows),
            "out_proj_weight": (hidden, rows), "out_proj_bias": bias(hidden),
        },
        claims=claims,
        counterfactuals={label: settings | wrong for label, wrong in (mistakes or {}).items()},
        **more,
    )  # fmt: skip


FAMILY = Component(
    name="multi_head_attention",
    title="Multi-head attention",
    paper="Vaswani et al. 2017, arXiv:1706.03762, section 3.2; Ainslie et al. 2023, arXiv:2305.13245",
    equations="""
    head_h = softmax(Q_h K_gᵀ / √head_dim) V_g,   g = h // (num_attention_heads / num_key_value_heads)
    y = (head_0 head_1 …) W_outᵀ + b_out

    Q = query W_qᵀ + b_q, and so K and V; a head is head_dim neighbouring features; head_dim = rows of W_q divided by
    num_attention_heads.  Causal: the queries are the last of the keys' tokens, each sees itself and those before it.
""",
    oracle="torch.nn.functional.multi_head_attention_forward and scaled_dot_product_attention",
    arguments=(
        Value(name="query", axes="batch queries hidden", meaning="what asks"),
        Value(name="key", axes="batch keys key_size", meaning="what is compared with the queries"),
        Value(name="value", axes="batch keys value_size", meaning="what is mixed"),
        Value(name="attention_mask", axes="batch keys", meaning="1 real, 0 padding; absent: all keys are real"),
        Value(name="q_proj_weight", axes="query_features hidden", meaning="W_q, (out, in)"),
        Value(name="q_proj_bias", axes="query_features", meaning="b_q"),
        Value(name="k_proj_weight", axes="key_features key_size", meaning="W_k, (out, in)"),
        Value(name="k_proj_bias", axes="key_features", meaning="b_k"),
        Value(name="v_proj_weight", axes="key_features value_size", meaning="W_v, (out, in)"),
        Value(name="v_proj_bias", axes="key_features", meaning="b_v"),
        Value(name="out_proj_weight", axes="hidden query_features", meaning="W_out, (out, in)"),
        Value(name="out_proj_bias", axes="hidden", meaning="b_out"),
        Value(name="num_attention_heads", axes=None, meaning="query heads"),
        Value(name="num_key_value_heads", axes=None, meaning="key and value heads; neighbouring query heads share one"),
        Value(name="causal", axes=None, meaning="whether later keys are hidden"),
    ),
    returns=(
        Value(name="y", axes="batch queries hidden", meaning="output"),
        Value(name="scores", axes="batch heads queries keys", meaning="Q Kᵀ / √head_dim, not masked", optional=True),
        Value(name="weights", axes="batch heads queries keys", meaning="softmax, 0 at hidden keys", optional=True),
        Value(name="context", axes="batch queries query_features", meaning="the heads side by side", optional=True),
    ),
    recipes=(
        _recipe("plain", "every query sees every key", claims=ALL, mistakes={_NO_OUT: {"mistake": _NO_OUT}}),
        _recipe(
            "field-causal", "later keys are hidden", causal=True,
            field="causal", mistakes={"causal ignored": {"causal": False}},
        ),
        _recipe(
            "self", "causal, one input for queries, keys and values, biases of zero", itself=True, causal=True,
            mistakes={
                "causal ignored": {"causal": False},
                _NO_OUT: {"mistake": _NO_OUT},
                f"causal ignored and {_NO_OUT}": {"causal": False, "mistake": _NO_OUT},
            },
        ),
        _recipe("padding", "causal, rows of 2, 4 and 1 keys", causal=True, mask=_RIGHT),
        _recipe(
            "left-padding", "causal, padded on the left: queries of padding see nothing and spoil nothing",
            causal=True, mask=_LEFT, claims=ALL,
            compared={"y": _LEFT, "context": _LEFT, "weights": [[row, row] for row in _LEFT]},
        ),
        _recipe(
            "cross", "not causal, other lengths and sizes of keys and values, padded",
            sizes=(5, 7), lengths=(2, 5), mask=_CROSS,
        ),
        _recipe("head_dim", "heads of 4 beside a hidden size of 6: not hidden / heads", head_dim=4),
        _recipe("field-num_key_value_heads", "6 query heads share 2", heads=6, kv_heads=2, head_dim=2,
                hidden=5, lengths=(3, 3), field="num_key_value_heads"),
        _recipe("mqa", "6 query heads share 1", heads=6, kv_heads=1, head_dim=2, hidden=5, lengths=(3, 3)),
        _recipe("large", "scores of many thousands: what hides a key must be lower still", causal=True, mask=_RIGHT,
                deviation={"query": 100.0, "key": 100.0}, claims=_DOUBLE),
        _recipe("distinct", "grouped, padded, other sizes, causal with two queries at the end of five keys",
                causal=True, heads=6, kv_heads=2, head_dim=4, hidden=7, sizes=(10, 9), lengths=(2, 5), mask=_CROSS,
                claims=ALL),
    ),
    truth=truth,
    reference="reference_impl.nn.multi_head_attention:multi_head_attention",
    relations={
        "batching.alone": relations.rows("query", "key", "value", "attention_mask"),
        "batching.padding": relations.padding("attention_mask", "key", "value"),
        "invariance.weights_sum_to_one": relations.mixes_values(),
        "invariance.one_query": relations.last_query("y", "context"),
        "invariance.order": relations.blind_to_order(),
        "invariance.repeated_key_values": relations.repeated_key_values(),
    },
    fields=(
        ConfigField(name="causal", default="none", meaning="whether later keys are hidden"),
        ConfigField(name="num_key_value_heads", default="none", meaning="key and value heads"),
    ),
)  # fmt: skip
