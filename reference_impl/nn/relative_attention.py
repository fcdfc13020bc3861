"""Relative attention with memory (Transformer-XL).

Shapes: B batch, T tokens of the segment (queries), M tokens of memory, S = M + T keys, H heads, Dh head_dim.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reference_impl.nn import masks
from reference_impl.nn.attention import attention_weights, merge_heads, score_scale, split_heads


def relative_shift(x: Float[Tensor, "batch heads queries distances"]) -> Float[Tensor, "batch heads queries keys"]:
    """From scores by distance to scores by key: column j of query i becomes the score of distance M + i − j.

    The columns of `x` fall from distance S − 1 to 0. A column of zeros is put in front, and the numbers are read again
    in rows of another length, which moves row i by T − 1 − i to the left; Dai et al. 2019, appendix B. With T = 2,
    S = 3, and ab standing for query a at distance b:

        0 02 01 00        0 02           01 00 0
        0 12 11 10   →   01 00    →      12 11 10
                          0 12
                         11 10

    The first of the new rows is cut off. What lies after the query (here the 0 of the first row) is no score: hide it.
    """
    batch, heads, queries, keys = x.shape
    padded = F.pad(x, (1, 0))  # (B, H, T, 1 + S)
    return padded.view(batch, heads, 1 + keys, queries)[:, :, 1:].view(batch, heads, queries, keys)


def content_scores(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    content_bias: Float[Tensor, "heads head_dim"],
) -> Float[Tensor, "batch heads queries keys"]:
    """(q_i + u) · k_j / √Dh: terms (a) and (c), what a key is."""
    return (query + content_bias[:, None]) @ key.transpose(-2, -1) * score_scale(query.shape[-1])


def position_scores(
    query: Float[Tensor, "batch heads queries head_dim"],
    distance_key: Float[Tensor, "heads distances head_dim"],
    position_bias: Float[Tensor, "heads head_dim"],
) -> Float[Tensor, "batch heads queries keys"]:
    """(q_i + v) · (W_kR R_{i−j}) / √Dh: terms (b) and (d), where a key is. `distance_key`: from distance 0 upwards."""
    falling = distance_key.flip(dims=(-2,))  # (H, S, Dh): distance S − 1 … 0
    by_distance = (query + position_bias[:, None]) @ falling.transpose(-2, -1) * score_scale(query.shape[-1])
    return relative_shift(by_distance)


def relative_attention(
    x: Float[Tensor, "batch seq hidden"],
    distances: Float[Tensor, "keys hidden"],
    q_proj_weight: Float[Tensor, "features hidden"],
    k_proj_weight: Float[Tensor, "features hidden"],
    v_proj_weight: Float[Tensor, "features hidden"],
    r_proj_weight: Float[Tensor, "features hidden"],
    o_proj_weight: Float[Tensor, "hidden features"],
    content_bias: Float[Tensor, "heads head_dim"],
    position_bias: Float[Tensor, "heads head_dim"],
    memory: Float[Tensor, "batch memory hidden"] | None = None,
) -> dict[str, Tensor]:
    """Causal attention of a segment to itself and its memory, with positions that count back from each query.

        A_ij = (W_q E_i + u) · W_kE E_j + (W_q E_i + v) · W_kR R_{i−j},   y = W_o softmax(A / √Dh) W_v E

    Dai et al. 2019 (arXiv:1901.02860), section 3.3: E → `memory` and `x` one after the other, R → `distances`, W_q,
    W_kE, W_v, W_kR → q_, k_, v_, r_proj, stored transposed, (out, in), u → `content_bias`, v → `position_bias`. The
    factor 1 / √Dh is the authors' code's. Nothing stops the gradient at `memory`: that is for the model to do.

    Softmax is in float32, or float64 for float64 input; everything else in the dtype of `x`.

    Args:
        memory: None: there is none yet.
        distances: row d is R_d, the encoding of distance d; S rows or more.

    Returns: `y`, and on the way `content_scores` and `position_scores` (B, H, T, S), both scaled, the latter 0 after
        the query, `weights` (B, H, T, S) and `context` (B, T, H · Dh).

    Raises:
        ValueError: there are fewer distances than keys.
    """
    known = x if memory is None else torch.cat((memory, x), dim=1)  # (B, S, hidden)
    queries, keys, head_dim = x.shape[1], known.shape[1], content_bias.shape[-1]
    if len(distances) < keys:
        raise ValueError(f"{len(distances)} distances are too few for {keys} keys: give one a key, from 0")
    query = split_heads(F.linear(x, q_proj_weight), head_dim)  # (B, H, T, Dh)
    key = split_heads(F.linear(known, k_proj_weight), head_dim)  # (B, H, S, Dh)
    value = split_heads(F.linear(known, v_proj_weight), head_dim)  # (B, H, S, Dh)
    distance_key = split_heads(F.linear(distances[None, :keys], r_proj_weight), head_dim)[0]  # (H, S, Dh)
    mask = masks.causal(queries, keys, x.device)  # (T, S)
    content = content_scores(query, key, content_bias)
    position = position_scores(query, distance_key, position_bias).masked_fill(~mask, 0.0)
    weights = attention_weights(content + position, mask[None, None])
    context = merge_heads(weights @ value)  # (B, T, H · Dh)
    return {
        "y": F.linear(context, o_proj_weight),
        "content_scores": content,
        "position_scores": position,
        "weights": weights,
        "context": context,
    }
