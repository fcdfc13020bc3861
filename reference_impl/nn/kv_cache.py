"""Key/value caches: what attention has computed for earlier tokens, kept for later ones; here the contiguous one.

Each layer holds its keys (already rotated) in one contiguous buffer (B, KV, capacity, Dh), filled from the left, and
its values in another. A full buffer is replaced by one of twice the size, so that a token is copied O(1) times on
average; with `max_length` the buffer is allocated once.

Feeding 3, then 2, then 4 tokens:

    call      length before   slots written   capacity
    3 tokens  0               0 1 2           3
    2 tokens  3               3 4             6   (5 needed > 3: twice 3)
    4 tokens  5               5 6 7 8         12  (9 needed > 6: twice 6)

Padding takes a slot like any token; `real` says which slots hold real tokens, and attention never looks at the others.

Shapes: B batch, KV key/value heads, T tokens of this call, S tokens so far, Dh head_dim.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference_impl.nn.masks import PaddingMask, Tokens, end_to_end, in_order, real_tokens

Heads = Float[Tensor, "batch kv_heads seq head_dim"]


class LayerCache(Protocol):
    """What a cache keeps of one layer."""

    def append(self, key: Heads, value: Heads) -> tuple[Heads, Heads]:
        """Takes the keys and values of a call; returns those kept and these, in the order of the cache's `tokens`."""
        ...


class Cache(Protocol):
    """What a model needs of a cache. For inference only: gradients do not pass through it.

    One call of a model is `tokens` (before the layers), `append` in each layer, `commit` (after them). Nothing counts
    until the commit: a call that fails half way leaves the cache as it was.
    """

    @property
    def layers(self) -> Sequence[LayerCache]:
        """One a layer of the model."""
        ...

    def tokens(self, real: Bool[Tensor, "batch seq"]) -> Tokens:
        """The tokens that are kept, then those of this call. Changes nothing that later calls see."""
        ...

    def commit(self, tokens: Tokens) -> None:
        """Ends a call: `tokens` is what the method of that name returned."""
        ...

    def state_bytes(self) -> int:
        """Memory held between calls, in bytes."""
        ...


def tokens_of_call(
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: PaddingMask | None,
    lengths: Sequence[int] | None,
    cache: Cache | None,
) -> Tokens:
    """What a model's call may look at: the tokens of `cache`, if there is one, then those of the call.

    Raises:
        ValueError: the mask or the lengths do not fit `input_ids`, these do not fit `cache`, or lengths are given with
            a mask or a cache.
    """
    if lengths is not None:
        if attention_mask is not None or cache is not None:
            raise ValueError("lengths are for texts one behind the other, without padding: give no mask and no cache")
        return end_to_end(input_ids, lengths)
    real = real_tokens(input_ids, attention_mask)
    return in_order(real) if cache is None else cache.tokens(real)


class KVCache:
    """The contiguous cache: the layers' buffers, and the facts that they share.

    All layers write at the same `length`, which moves only at the commit.
    """

    def __init__(self, *, num_hidden_layers: int, max_length: int | None = None) -> None:
        """`max_length`: the most tokens, padding included, that a row may hold; None: as many as memory allows."""
        self.max_length = max_length
        self.layers = [ContiguousLayer(self) for _ in range(num_hidden_layers)]
        self.real: Bool[Tensor, "batch keys"] | None = None

    @property
    def length(self) -> int:
        """Tokens stored so far in every row, padding included."""
        return 0 if self.real is None else self.real.shape[1]

    def extended(self, real: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch keys"]:
        """Which tokens are real: those stored, then those of this call. Changes nothing.

        Raises:
            ValueError: the batch is not that of the earlier calls, or `max_length` would be exceeded.
        """
        needed = self.length + real.shape[1]
        if self.max_length is not None and needed > self.max_length:
            raise ValueError(
                f"{self.length} cached and {real.shape[1]} new tokens need max_length={needed}, "
                f"got max_length={self.max_length}; make it larger or feed less"
            )
        if self.real is None:
            return real
        if self.real.shape[0] != real.shape[0]:
            raise ValueError(f"the cache holds a batch of {self.real.shape[0]}, got {real.shape[0]}; start a new one")
        return torch.cat((self.real, real), dim=1)

    def tokens(self, real: Bool[Tensor, "batch seq"]) -> Tokens:
        """All tokens so far, in order; raises what `extended` raises."""
        return in_order(self.extended(real))

    def commit(self, tokens: Tokens) -> None:
        """Ends a call."""
        self.real = tokens.real

    def state_bytes(self) -> int:
        """Memory held, in bytes: all buffers at their capacity, and `real`."""
        held = [layer.keys for layer in self.layers] + [layer.values for layer in self.layers] + [self.real]
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


class ContiguousLayer:
    """Keys and values of one layer; made by `KVCache`."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.keys: Float[Tensor, "batch kv_heads capacity head_dim"] | None = None
        self.values: Float[Tensor, "batch kv_heads capacity head_dim"] | None = None

    def append(self, key: Heads, value: Heads) -> tuple[Heads, Heads]:
        """Writes the T new keys and values behind the stored ones; returns all S of both, as views of the buffers."""
        require_no_gradients(key, value)
        start, max_length = self._cache.length, self._cache.max_length
        self.keys = write(self.keys, key, start=start, max_length=max_length)
        self.values = write(self.values, value, start=start, max_length=max_length)
        stop = start + key.shape[2]
        return self.keys[:, :, :stop], self.values[:, :, :stop]


def require_no_gradients(key: Heads, value: Heads) -> None:
    """Raises ValueError if gradients are recorded: a buffer that is overwritten in place cannot carry them."""
    if key.requires_grad or value.requires_grad:
        raise ValueError("a cache carries no gradients: call the model under torch.no_grad(), or without a cache")


def write(
    buffer: Float[Tensor, "batch kv_heads capacity head_dim"] | None,
    chunk: Float[Tensor, "batch kv_heads seq head_dim"],
    *,
    start: int,
    max_length: int | None,
) -> Float[Tensor, "batch kv_heads new_capacity head_dim"]:
    """Puts `chunk` at slots start … start + T − 1 of `buffer`, or of a larger copy of it if it does not fit."""
    batch, heads, seq, head_dim = chunk.shape
    held = 0 if buffer is None else buffer.shape[2]
    capacity = next_capacity(held, needed=start + seq, max_length=max_length)
    if buffer is None or capacity > held:
        larger = chunk.new_empty(batch, heads, capacity, head_dim)
        if buffer is not None:
            larger[:, :, :start] = buffer[:, :, :start]
        buffer = larger
    buffer[:, :, start : start + seq] = chunk
    return buffer


def next_capacity(capacity: int, *, needed: int, max_length: int | None) -> int:
    """Slots to hold: those there are if they suffice, else twice as many (or all that is needed, if that is more)."""
    if max_length is not None:
        return max_length
    return capacity if needed <= capacity else max(needed, 2 * capacity)


class Session:
    """Feeds a model one batch of texts in pieces of any size; what was computed is kept, not computed again."""

    def __init__(self, model: nn.Module, cache: Cache) -> None:
        """`model` takes (input_ids, attention_mask, cache=…) and returns logits; `cache` is empty and fits it."""
        self._model = model
        self._cache = cache

    @torch.no_grad()
    def feed(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: PaddingMask | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits of these ids, given all that was fed before; `attention_mask` speaks of these ids only."""
        logits: Tensor = self._model(input_ids, attention_mask, cache=self._cache)
        return logits

    def state_bytes(self) -> int:
        """Memory that the session holds, in bytes."""
        return self._cache.state_bytes()
