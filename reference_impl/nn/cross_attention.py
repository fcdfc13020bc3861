"""Attention whose queries and keys may come from different sequences, and decoding over an encoder's output.

Shapes: B batch, T queries, S keys, N source, H heads, Dh head_dim, hidden = H · Dh.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference_impl.nn.attention import AttentionKernel, merge_heads, split_heads
from reference_impl.nn.kv_cache import KVCache
from reference_impl.nn.masks import PaddingMask

# Keys and values (B, H, N, Dh) of an encoder's output, for one layer of a decoder.
Memory = tuple[Tensor, Tensor]


class MultiHeadAttention(AttentionKernel):
    """Attention of one sequence to itself or to another, every projection with a bias.

        MultiHead(Q, K, V) = Concat(head_1 … head_H) W^O,   head_h = softmax(Q W^Q_h (K W^K_h)ᵀ / √Dh) V W^V_h

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.2: W^Q, W^K, W^V, W^O → q_proj, k_proj, v_proj, out_proj. Keys
    and values are projected on their own (`keys_values`), so that those of a source are projected only once.
    """

    def __init__(self, *, hidden_size: int, num_attention_heads: int, attention: str) -> None:
        super().__init__(attention)
        self.head_dim = hidden_size // num_attention_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def keys_values(self, states: Float[Tensor, "batch keys hidden"]) -> Memory:
        """What queries look for, and what they get: keys and values (B, H, S, Dh) of `states`."""
        return split_heads(self.k_proj(states), self.head_dim), split_heads(self.v_proj(states), self.head_dim)

    def forward(
        self,
        x: Float[Tensor, "batch queries hidden"],
        key: Float[Tensor, "batch heads keys head_dim"],
        value: Float[Tensor, "batch heads keys head_dim"],
        mask: Bool[Tensor, "#batch 1 #queries keys"],
    ) -> Float[Tensor, "batch queries hidden"]:
        """`mask`: True where a query may see a key."""
        query = split_heads(self.q_proj(x), self.head_dim)  # (B, H, T, Dh)
        output: Tensor = self.out_proj(merge_heads(self.attend(query, key, value, mask)))
        return output


def all_real(real: Bool[Tensor, "batch source"]) -> Bool[Tensor, "batch 1 1 source"]:
    """The mask of an encoder, and of a decoder that looks at it: every query sees every real token of the source."""
    return real[:, None, None]


class DecodingSession:
    """Feeds a decoder one batch of targets in pieces of any size; the source has been encoded once."""

    def __init__(self, decode: Callable[..., Tensor], memory: list[Memory], cache: KVCache) -> None:
        """`decode` takes (input_ids, attention_mask, cache) and returns logits; `cache` is empty and fits it."""
        self._decode = decode
        self._memory = memory
        self._cache = cache

    @torch.no_grad()
    def feed(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: PaddingMask | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits of these ids, given all that was fed before; `attention_mask` speaks of these ids only."""
        return self._decode(input_ids, attention_mask, self._cache)

    def state_bytes(self) -> int:
        """Memory that the session holds, in bytes: the source's keys and values, and the cache."""
        held = sum(tensor.numel() * tensor.element_size() for pair in self._memory for tensor in pair)
        return held + self._cache.state_bytes()
