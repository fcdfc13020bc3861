"""Attention as functions of queries, keys and values: multi-head with its projections, and sliding-window.

The functions of `attention` and `masks` put together. Models use modules that do the same.

Shapes: B batch, T queries, S keys, H query heads, KV key/value heads, Dh head_dim.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reference_impl.nn import masks
from reference_impl.nn.attention import (
    attention_scores,
    attention_weights,
    merge_heads,
    repeat_key_value_heads,
    split_heads,
)


def multi_head_attention(
    query: Float[Tensor, "batch queries hidden"],
    key: Float[Tensor, "batch keys key_size"],
    value: Float[Tensor, "batch keys value_size"],
    q_proj_weight: Float[Tensor, "query_features hidden"],
    q_proj_bias: Float[Tensor, "query_features"],
    k_proj_weight: Float[Tensor, "key_features key_size"],
    k_proj_bias: Float[Tensor, "key_features"],
    v_proj_weight: Float[Tensor, "key_features value_size"],
    v_proj_bias: Float[Tensor, "key_features"],
    out_proj_weight: Float[Tensor, "hidden query_features"],
    out_proj_bias: Float[Tensor, "hidden"],
    num_attention_heads: int,
    causal: bool,
    attention_mask: Int[Tensor, "batch keys"] | Bool[Tensor, "batch keys"] | None = None,
) -> dict[str, Tensor]:
    """Projects queries, keys and values, attends in every head, and projects the heads side by side.

        head_h = softmax(Q_h K_gᵀ / √Dh) V_g,   y = (head_1 … head_H) W^O + b^O,   g = the KV head that h shares

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.2: W^Q, W^K, W^V, W^O → q_, k_, v_, out_proj, stored transposed,
    (out, in). With fewer rows in k_proj and v_proj than in q_proj, H / KV neighbouring query heads share a key/value
    head: Ainslie et al. 2023 (arXiv:2305.13245), section 2.2; KV = 1 is Shazeer 2019 (arXiv:1911.02150). Dh is the
    rows of q_proj over H, whatever the hidden size.

    Softmax is in float32, or float64 for float64 input; everything else in the dtype of `query`.

    Args:
        causal: the queries are the last T of the S tokens; each sees itself and all before it. Otherwise all keys.
        attention_mask: 1 real, 0 padding, of the keys; None: all real. A query that sees no key gets weights of 0.

    Returns: `y`, and on the way `scores` (B, H, T, S), scaled, not yet masked, `weights` (B, H, T, S) and `context`
        (B, T, H · Dh), the heads side by side.

    Raises:
        ValueError: the rows of q_proj are not divisible by H, or H is not by the number of key/value heads.
    """
    features, key_features = len(q_proj_weight), len(k_proj_weight)
    if features % num_attention_heads:
        raise ValueError(f"{features} rows of q_proj must be divisible by num_attention_heads={num_attention_heads}")
    head_dim = features // num_attention_heads
    if key_features % head_dim or num_attention_heads % (key_features // head_dim):
        raise ValueError(f"{key_features} rows of k_proj must be heads of {head_dim}, as many as {num_attention_heads} "
                         "query heads can share evenly")  # fmt: skip
    queries = split_heads(F.linear(query, q_proj_weight, q_proj_bias), head_dim)  # (B, H, T, Dh)
    keys = split_heads(F.linear(key, k_proj_weight, k_proj_bias), head_dim)  # (B, KV, S, Dh)
    values = split_heads(F.linear(value, v_proj_weight, v_proj_bias), head_dim)  # (B, KV, S, Dh)
    mask = visible(query.shape[1], key.shape[:2], causal, attention_mask, query.device)
    attended = attend(queries, keys, values, mask)
    context = merge_heads(attended.pop("y"))  # (B, T, H · Dh)
    return {"y": F.linear(context, out_proj_weight, out_proj_bias), **attended, "context": context}


def visible(
    num_queries: int,
    keys: tuple[int, ...],
    causal: bool,
    attention_mask: Int[Tensor, "batch keys"] | Bool[Tensor, "batch keys"] | None,
    device: torch.device,
) -> Bool[Tensor, "batch 1 queries keys"]:
    """Which keys each query may see. `keys`: B and S."""
    real = torch.ones(keys, dtype=torch.bool, device=device) if attention_mask is None else attention_mask != 0
    if causal:
        return masks.visible_keys(real, num_queries=num_queries)
    return real[:, None, None].expand(-1, 1, num_queries, -1)


def attend(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    mask: Bool[Tensor, "batch 1 queries keys"],
) -> dict[str, Tensor]:
    """Scores, softmax, weighted sum `y`, all heads at once. `mask`: True where a query may see a key."""
    key, value = (repeat_key_value_heads(heads, query.shape[1]) for heads in (key, value))  # (B, H, S, Dh)
    scores = attention_scores(query, key)
    weights = attention_weights(scores, mask)
    return {"y": weights @ value, "scores": scores, "weights": weights}


def sliding_window_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    sliding_window: int,
) -> dict[str, Tensor]:
    """Causal attention that looks back over `sliding_window` keys, the query's own among them.

        y_i = Σ_{j = i − W + 1}^{i} softmax_j(q_i · k_j / √Dh) v_j

    Beltagy et al. 2020 (arXiv:2004.05150), section 3.1; Jiang et al. 2023, Mistral 7B (arXiv:2310.06825), section 2:
    W → `sliding_window`. See `masks.visible` on W and W + 1. The queries are the last T of the S tokens.

    Softmax is in float32, or float64 for float64 input; everything else in the dtype of `query`.

    Returns: `y` (B, H, T, Dh), and on the way `scores` (B, H, T, S), scaled, not yet masked, and `weights`.

    Raises:
        ValueError: the window holds no key.
    """
    if sliding_window < 1:
        raise ValueError(f"sliding_window={sliding_window} must be 1 (the query's own key) or more")
    real = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)  # (B, S)
    mask = masks.visible_keys(real, num_queries=query.shape[2], sliding_window=sliding_window)
    return attend(query, key, value, mask)
