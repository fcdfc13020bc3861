"""Relative attention with memory (Transformer-XL).

Shapes: B batch, T tokens of the segment (queries), M tokens of memory, S = M + T keys, H heads, Dh head_dim.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reference_impl.nn import masks
from reference_impl.nn.absolute_positions import sinusoidal_positions
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

    The first of the new rows is cut off. Some ports cut off the last, which gives each query the scores of the one
    before it (labmlai/annotated_deep_learning_paper_implementations#185). What lies after the query (here the 0 of the
    first row) is no score: hide it.
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


class RelativePositions(nn.Module):
    """The encodings R of the distances 0, 1, …: sines, then cosines, of falling frequencies.

    Dai et al. 2019 (arXiv:1901.02860), section 3.3, which takes the sinusoids of Vaswani et al. 2017 and says nothing
    of their order; in the authors' code all sines come first. Distances beyond `clamp_len` are encoded as if they were
    `clamp_len`, if that is more than 0: the authors' code, for memories longer than in training.
    """

    def __init__(self, *, hidden_size: int, clamp_len: int) -> None:
        super().__init__()
        self.hidden_size, self.clamp_len = hidden_size, clamp_len

    def forward(self, like: Float[Tensor, "batch seq hidden"], keys: int) -> Float[Tensor, "keys hidden"]:
        """`keys` rows, row d for distance d, in the dtype and on the device of `like`."""
        distances = torch.arange(keys, device=like.device)
        if self.clamp_len > 0:
            distances = distances.clamp(max=self.clamp_len)
        return sinusoidal_positions(distances[None], self.hidden_size, "concatenated", like.dtype)[0]


class RelativeSelfAttention(nn.Module):
    """`relative_attention` as a module, with the names of Hugging Face's Transformer-XL.

    W_q, W_kE, W_v side by side → `qkv_net`, W_kR → `r_net`, W_o → `o_net`, u → `r_w_bias`, v → `r_r_bias`; the names of
    the last two mean "added to the query that meets words" and "… that meets relative positions".

    Children without weights show to forward hooks what no projection returns: `query` (B, H, T, Dh), `key` and `value`
    (B, H, S, Dh), and when written out `content_scores`, `position_scores` (0 after the query) and `weights`, all
    (B, H, T, S). Dropout is not implemented.

    Args:
        content_bias, position_bias: u and v where all layers share them; None: this layer has its own.
        attention: "eager" (written out) or "sdpa" (torch's fused kernel, to which position scores are a bias).

    Raises:
        ValueError: `attention` is neither.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        head_dim: int,
        content_bias: nn.Parameter | None = None,
        position_bias: nn.Parameter | None = None,
        attention: str = "eager",
    ) -> None:
        super().__init__()
        if attention not in ("eager", "sdpa"):
            raise ValueError(f"attention={attention!r} must be 'eager' (written out) or 'sdpa' (fused)")
        self.attention, self.head_dim = attention, head_dim
        self.qkv_net = nn.Linear(hidden_size, 3 * num_attention_heads * head_dim, bias=False)
        self.r_net = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=False)
        self.o_net = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=False)
        own = (nn.Parameter(torch.zeros(num_attention_heads, head_dim)) for _ in "uv")
        self.r_w_bias = next(own) if content_bias is None else content_bias
        self.r_r_bias = next(own) if position_bias is None else position_bias
        self.query, self.key, self.value = nn.Identity(), nn.Identity(), nn.Identity()
        self.content_scores, self.position_scores, self.weights = nn.Identity(), nn.Identity(), nn.Identity()

    def attend(
        self,
        known: Float[Tensor, "batch keys hidden"],
        distances: Float[Tensor, "keys hidden"],
        mask: Bool[Tensor, "#batch 1 queries keys"],
    ) -> Float[Tensor, "batch queries hidden"]:
        """`known`: memory and segment, whose tokens are the queries; `distances`: row d encodes distance d."""
        queries, keys = mask.shape[-2:]
        query_weight, key_weight, value_weight = self.qkv_net.weight.chunk(3)
        query = self.query(split_heads(F.linear(known[:, keys - queries :], query_weight), self.head_dim))
        key = self.key(split_heads(F.linear(known, key_weight), self.head_dim))  # (B, H, S, Dh)
        value = self.value(split_heads(F.linear(known, value_weight), self.head_dim))
        distance_key = split_heads(self.r_net(distances)[None], self.head_dim)[0]  # (H, S, Dh)
        position = position_scores(query, distance_key, self.r_r_bias)  # (B, H, T, S)
        if self.attention == "sdpa":
            bias = position.masked_fill(~mask, -torch.inf)
            query = query + self.r_w_bias[:, None]
            context = F.scaled_dot_product_attention(query, key, value, bias, scale=score_scale(self.head_dim))
        else:
            content = self.content_scores(content_scores(query, key, self.r_w_bias))
            causal = masks.causal(queries, keys, known.device)
            position = self.position_scores(position.masked_fill(~causal, 0.0))
            context = self.weights(attention_weights(content + position, mask)) @ value
        output: Tensor = self.o_net(merge_heads(context))
        return output
