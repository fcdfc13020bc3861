"""Causal self-attention whose queries, keys and values come out of one projection (GPT, GPT-2, GPT-3).

Shapes: B batch, T tokens of this call (queries), S tokens so far (keys), H heads, Dh head_dim, hidden = H · Dh.
"""

from jaxtyping import Float
from torch import Tensor, nn

from reference_impl.nn import attention as core
from reference_impl.nn.conv1d import Conv1D
from reference_impl.nn.kv_cache import LayerCache
from reference_impl.nn.masks import Mask


def split_query_key_value(
    x: Float[Tensor, "batch seq three_hidden"],
) -> tuple[Float[Tensor, "batch seq hidden"], Float[Tensor, "batch seq hidden"], Float[Tensor, "batch seq hidden"]]:
    """The thirds of a joint projection: all heads of the query, then all of the key, then all of the value."""
    query, key, value = x.chunk(3, dim=-1)
    return query, key, value


class SelfAttention(core.AttentionKernel):
    """Every head has a query, a key and a value of its own; positions are not its concern.

        Attention(Q, K, V) = softmax(Q Kᵀ · scale) V

    Vaswani et al. 2017 (arXiv:1706.03762), equation 1, where scale = 1 / √d_k: d_k → Dh, h → `num_attention_heads`;
    W^Q, W^K, W^V side by side → c_attn, W^O → c_proj.

    Children without weights show to forward hooks what no projection returns: `query`, `key` and `value`, (B, H, T, Dh)
    of this call, and those of `AttentionKernel`. Dropout is not implemented.

    Args:
        scale, upcast_scores: as in `AttentionKernel`.
        attention: "eager" (written out) or "sdpa" (torch's fused scaled_dot_product_attention).
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        scale: float | None = None,
        upcast_scores: bool = False,
        attention: str = "eager",
    ) -> None:
        super().__init__(attention, scale=scale, upcast_scores=upcast_scores)
        self.head_dim = hidden_size // num_attention_heads
        self.c_attn = Conv1D(in_features=hidden_size, out_features=3 * hidden_size)
        self.c_proj = Conv1D(in_features=hidden_size, out_features=hidden_size)
        self.query = nn.Identity()
        self.key = nn.Identity()
        self.value = nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        mask: Mask,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """`mask`: True where a query may see a key."""
        query, key, value = self.project(x)
        if cache is not None:
            key, value = cache.append(key, value)  # (B, H, S, Dh)
        output: Tensor = self.c_proj(core.merge_heads(self.attend(query, key, value, mask)))
        return output

    def project(self, x: Float[Tensor, "batch seq hidden"]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (B, H, T, Dh)."""
        query, key, value = (core.split_heads(part, self.head_dim) for part in split_query_key_value(self.c_attn(x)))
        return self.query(query), self.key(key), self.value(value)
