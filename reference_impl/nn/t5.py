"""The blocks of T5, encoder and decoder, on which Switch Transformer is built.

Raffel et al. 2020 (arXiv:1910.10683), section 2.1: the Transformer of 2017, but a norm before each layer that neither
subtracts a mean nor shifts, no biases, no scale in attention, and no positions but a bias on the scores.

Shapes: B batch, T tokens of this call (queries), K keys (cached and new, or a decoder's source), H heads, Dh head_dim.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference_impl.nn import masks
from reference_impl.nn.attention import AttentionKernel, merge_heads, split_heads
from reference_impl.nn.cross_attention import Memory, all_real
from reference_impl.nn.feed_forward import DenseFeedForward
from reference_impl.nn.kv_cache import KVCache, LayerCache
from reference_impl.nn.norm import RMSNorm
from reference_impl.nn.relative_bias import relative_position_bias
from reference_impl.nn.switch import SwitchFeedForward


class T5Attention(AttentionKernel):
    """Self-attention, or attention over the states of an encoder.

        Attention(Q, K, V) = softmax(Q Kᵀ + b) V

    Raffel et al. 2020, section 2.1: b → `bias`, made by `relative_position_bias` from the table
    `relative_attention_bias`, which only the first self-attention of a stack has. Scores are not divided by √Dh: T5
    folds that into the scale at which it initialises q.

    Children without weights show to forward hooks what no projection returns, as in `AttentionKernel`.

    Args:
        num_buckets: rows of the table; None: it has none.
    """

    def __init__(
        self, *, hidden_size: int, head_dim: int, num_heads: int, num_buckets: int | None, attention: str = "eager"
    ) -> None:
        super().__init__(attention, scale=1.0)
        self.head_dim = head_dim
        self.q = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.v = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.o = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        if num_buckets is not None:
            self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)

    def keys_values(self, states: Float[Tensor, "batch keys hidden"]) -> Memory:
        """Keys and values (B, H, K, Dh). Those of an encoder's states serve all target tokens: once is enough."""
        return split_heads(self.k(states), self.head_dim), split_heads(self.v(states), self.head_dim)

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        mask: Bool[Tensor, "#batch 1 #seq keys"],
        bias: Float[Tensor, "#batch heads seq keys"] | None = None,
        memory: Memory | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """`mask`: True where a query may see a key. `memory`: of an encoder; None: the keys and values are those of
        `x`, after the ones in `cache`."""
        query = split_heads(self.q(x), self.head_dim)  # (B, H, T, Dh)
        key, value = self.keys_values(x) if memory is None else memory  # (B, H, K, Dh)
        if cache is not None:
            key, value = cache.append(key, value)
        output: Tensor = self.o(merge_heads(self.attend(query, key, value, mask, bias)))
        return output


class Sublayer(nn.Module):
    """A layer between its norm and its residual connection: y = x + f(RMSNorm(x)).

    Args:
        name: what the hub calls f.
        function: f; it gets what else `forward` is given.
    """

    def __init__(self, name: str, function: nn.Module, *, hidden_size: int, eps: float) -> None:
        super().__init__()
        self._name = name
        self.add_module(name, function)
        self.layer_norm = RMSNorm(hidden_size=hidden_size, eps=eps)

    def forward(self, x: Float[Tensor, "batch seq hidden"], *more: Any) -> Float[Tensor, "batch seq hidden"]:
        y: Tensor = x + self.get_submodule(self._name)(self.layer_norm(x), *more)
        return y


class Block(nn.Module):
    """Self-attention, in a decoder attention over the encoder's states, and a feed-forward layer, dense or sparse."""

    def __init__(
        self,
        self_attention: T5Attention,
        cross_attention: T5Attention | None,
        feed_forward: DenseFeedForward | SwitchFeedForward,
        *,
        hidden_size: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.is_sparse = isinstance(feed_forward, SwitchFeedForward)
        named = {"SelfAttention": self_attention, "EncDecAttention": cross_attention, "mlp": feed_forward}
        self.layer = nn.ModuleList(
            Sublayer(name, function, hidden_size=hidden_size, eps=eps)
            for name, function in named.items()
            if function is not None
        )

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        mask: Bool[Tensor, "#batch 1 #seq keys"],
        bias: Float[Tensor, "#batch heads seq keys"],
        counted: Bool[Tensor, "batch seq"] | None = None,
        memory: Memory | None = None,
        source_mask: Bool[Tensor, "batch 1 1 source"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """`mask`, `bias`, `cache`: of the self-attention. `counted`: as in `SwitchFeedForward`."""
        x = self.layer[0](x, mask, bias, None, cache)
        if memory is not None:
            x = self.layer[1](x, source_mask, None, memory)  # no bias: positions of source and target do not compare
        y: Tensor = self.layer[-1](x, counted) if self.is_sparse else self.layer[-1](x)
        return y


class Stack(nn.Module):
    """An encoder or a decoder: embedding, blocks, final norm. The first block's position bias serves all of them.

    Args:
        max_distance: distance from which on all share the last bucket.
        ignore_padding: whether padding takes no room at experts and is sent to none.
        is_decoder: whether a token sees only itself and what came before it, and a source beside.
    """

    def __init__(
        self,
        embed_tokens: nn.Embedding,
        blocks: Sequence[Block],
        *,
        hidden_size: int,
        eps: float,
        max_distance: int,
        ignore_padding: bool,
        is_decoder: bool,
    ) -> None:
        super().__init__()
        self.max_distance, self.ignore_padding, self.is_decoder = max_distance, ignore_padding, is_decoder
        self.embed_tokens = embed_tokens
        self.block = nn.ModuleList(blocks)
        self.final_layer_norm = RMSNorm(hidden_size=hidden_size, eps=eps)

    def memory(self, states: Float[Tensor, "batch source hidden"]) -> list[Memory]:
        """The keys and values of an encoder's states for each block of this decoder."""
        attentions: Any = [block.get_submodule("layer.1.EncDecAttention") for block in self.block]
        return [attention.keys_values(states) for attention in attentions]

    def position_bias(
        self, real: Bool[Tensor, "batch keys"], num_queries: int
    ) -> Float[Tensor, "batch heads queries keys"]:
        """For the last tokens of `real`. Positions count real tokens, so that padding moves nothing apart."""
        positions = masks.positions(real, num_queries=real.shape[1])  # (B, K)
        table: Tensor = self.get_parameter("block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        queries = positions[:, real.shape[1] - num_queries :]
        return relative_position_bias(table, queries, positions, self.max_distance, bidirectional=not self.is_decoder)

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        real: Bool[Tensor, "batch keys"],
        memory: Sequence[Memory] | None = None,
        source_real: Bool[Tensor, "batch source"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """`real`: of the tokens in `cache`, then of `input_ids`. `memory`, `source_real`: a decoder's source."""
        seq = input_ids.shape[1]
        mask = masks.visible_keys(real, num_queries=seq) if self.is_decoder else all_real(real)
        bias = self.position_bias(real, seq)  # (B, H, T, K)
        counted = real[:, real.shape[1] - seq :] if self.ignore_padding else None
        source_mask = None if source_real is None else all_real(source_real)

        x: Tensor = self.embed_tokens(input_ids)
        for number, block in enumerate(self.block):
            of_source = None if memory is None else memory[number]
            layer_cache = None if cache is None else cache.layers[number]
            x = block(x, mask, bias, counted, of_source, source_mask, layer_cache)
        hidden: Tensor = self.final_layer_norm(x)
        return hidden
