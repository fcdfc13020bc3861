"""Causal self-attention with grouped queries and rotary positions (Llama, Mistral, Mixtral).

Written out, so that scores and weights can be read; the fused kernel of torch computes the same and shows nothing.

Shapes: B batch, T tokens of this call (queries), S tokens so far (keys), H query heads, KV key/value heads,
Dh head_dim.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reference_impl.nn import rotary
from reference_impl.nn.kv_cache import LayerCache
from reference_impl.nn.masks import BlockDiagonal, Mask


def split_heads(x: Float[Tensor, "batch seq features"], head_dim: int) -> Float[Tensor, "batch heads seq head_dim"]:
    """Cuts features into heads of Dh; a head is Dh neighbouring features."""
    batch, seq, features = x.shape
    return x.view(batch, seq, features // head_dim, head_dim).transpose(1, 2)  # (B, H, T, Dh)


def merge_heads(x: Float[Tensor, "batch heads seq head_dim"]) -> Float[Tensor, "batch seq features"]:
    """The inverse of `split_heads`: heads side by side again."""
    return x.transpose(1, 2).flatten(start_dim=2)  # (B, T, H · Dh)


def repeat_key_value_heads(
    x: Float[Tensor, "batch kv_heads keys head_dim"], num_attention_heads: int
) -> Float[Tensor, "batch heads keys head_dim"]:
    """Gives every query head its key or value head: query head h reads head h // (H / KV).

    Ainslie et al. 2023 (arXiv:2305.13245), section 2.2. With H = 6 and KV = 2 the heads become 0 0 0 1 1 1.
    """
    return x.repeat_interleave(num_attention_heads // x.shape[1], dim=1)  # (B, H, S, Dh)


def score_scale(head_dim: int) -> float:
    """1 / √Dh."""
    return float(head_dim**-0.5)


def attention_scores(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """q · k · scale for every query and key; nothing is masked yet. Arithmetic is in the dtype of `query`.

    `scale`: None for 1 / √Dh.
    """
    scale = score_scale(query.shape[-1]) if scale is None else scale
    return query @ key.transpose(-2, -1) * scale  # (B, H, T, S)


def attention_weights(
    scores: Float[Tensor, "batch heads queries keys"], mask: Bool[Tensor, "#batch 1 queries keys"]
) -> Float[Tensor, "batch heads queries keys"]:
    """Softmax over the keys that `mask` lets a query see; hidden keys get exactly 0.

    A query that sees no key gets weights of 0, not NaN, and no gradient: hidden scores are filled with the lowest
    finite number (−∞ would make such a row 0/0), and the uniform weights that this gives there are cleared afterwards.

    Arithmetic is in float32, or float64 for float64 scores; the weights are rounded to the dtype of `scores`.
    """
    working = scores.to(torch.promote_types(scores.dtype, torch.float32))
    lowest = torch.finfo(working.dtype).min
    weights = torch.softmax(working.masked_fill(~mask, lowest), dim=-1)
    return weights.masked_fill(~mask, 0.0).to(scores.dtype)


def fused_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys head_dim"],
    mask: Bool[Tensor, "#batch 1 queries keys"],
    scale: float | None = None,
    bias: Float[Tensor, "#batch heads queries keys"] | None = None,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """The same as weights @ value, by torch's fused kernel, which keeps no scores. `scale`: None for 1 / √Dh.

    What kernels do with a query that sees no key differs; here it is shown all keys and its result is set to 0.
    """
    sees_nothing = ~mask.any(dim=-1, keepdim=True)  # (B, 1, T, 1)
    shown = mask | sees_nothing
    if bias is not None:
        shown = bias.masked_fill(~shown, -torch.inf)
    scale = score_scale(query.shape[-1]) if scale is None else scale
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=shown, scale=scale)
    return context.masked_fill(sees_nothing, 0.0)


class AttentionKernel(nn.Module):
    """What a family's attention does between its projections: scores, softmax, weighted sum.

    A family's attention is a subclass with projections. When written out, two children without weights show to forward
    hooks what no projection returns: `scores` (B, H, T, S), scaled, biased, not yet masked, and `weights` (B, H, T, S).

    Args:
        scale: factor on every score; None: 1 / √Dh.
        upcast_scores: whether scores and weights are in float32 even where queries are not; the fused kernel, whose
            scores are its own affair, takes no notice.

    Raises:
        ValueError: `attention` is neither "eager" (written out) nor "sdpa" (torch's fused kernel).
    """

    def __init__(self, attention: str, *, scale: float | None = None, upcast_scores: bool = False) -> None:
        super().__init__()
        if attention not in ("eager", "sdpa"):
            raise ValueError(f"attention={attention!r} must be 'eager' (written out) or 'sdpa' (fused)")
        self.attention = attention
        self.scale = scale
        self.upcast_scores = upcast_scores
        self.scores = nn.Identity()
        self.weights = nn.Identity()

    def attend(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        value: Float[Tensor, "batch kv_heads keys head_dim"],
        mask: Mask,
        bias: Float[Tensor, "#batch heads queries keys"] | None = None,
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        """Mixes the values that each query may see; `bias` is added to the scaled scores.

        Texts that share a row are attended to one by one, without a bias.
        """
        if isinstance(mask, BlockDiagonal):
            assert bias is None
            texts = zip(*(heads.split(mask.lengths, dim=2) for heads in (query, key, value)), mask.blocks, strict=True)
            return torch.cat([query[:, :, :0], *(self.attend(*text) for text in texts)], dim=2)
        key, value = (repeat_key_value_heads(heads, query.shape[1]) for heads in (key, value))  # (B, H, S, Dh)
        if self.attention == "sdpa":
            return fused_attention(query, key, value, mask, self.scale, bias)
        if self.upcast_scores:
            working = torch.promote_types(query.dtype, torch.float32)
            query, key = query.to(working), key.to(working)
        scores = attention_scores(query, key, self.scale)
        scores = self.scores(scores if bias is None else scores + bias)
        weights: Tensor = self.weights(attention_weights(scores, mask))
        return weights.to(value.dtype) @ value


class GroupedQueryAttention(AttentionKernel):
    """Attention in which H / KV query heads share a key/value head, with rotary positions on queries and keys.

        Attention(Q, K, V) = softmax(Q Kᵀ / √Dh) V

    Vaswani et al. 2017 (arXiv:1706.03762), equation 1: d_k → `head_dim`, h → `num_attention_heads`; W^Q, W^K, W^V, W^O
    → q_proj, k_proj, v_proj, o_proj. Keys are rotated before they are cached.

    Children without weights show to forward hooks what no projection returns: `query_rotated` (B, H, T, Dh),
    `key_rotated` (B, KV, T, Dh), and those of `AttentionKernel`. Dropout is not implemented.

    Args:
        bias: whether all four projections have one.
        attention: "eager" (written out) or "sdpa" (torch's fused scaled_dot_product_attention).
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        bias: bool,
        attention: str = "eager",
    ) -> None:
        super().__init__(attention)
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=bias)
        self.query_rotated = nn.Identity()
        self.key_rotated = nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        cos: Float[Tensor, "#batch seq half"],
        sin: Float[Tensor, "#batch seq half"],
        mask: Mask,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """`cos`, `sin`: from `rotary.tables`, for the tokens of `x`. `mask`: True where a query may see a key."""
        query, key, value = self.project(x)
        query, key = self.turn(query, key, cos, sin)
        if cache is not None:
            key, value = cache.append(key, value)  # (B, KV, S, Dh)

        output: Tensor = self.o_proj(merge_heads(self.attend(query, key, value, mask)))
        return output

    def project(self, x: Float[Tensor, "batch seq hidden"]) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, T, Dh), key and value (B, KV, T, Dh), without positions."""
        query, key, value = (split_heads(proj(x), self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return query, key, value

    def turn(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key at their positions."""
        return self.query_rotated(rotary.rotate(query, cos, sin)), self.key_rotated(rotary.rotate(key, cos, sin))
