"""Mistral's rolling buffer cache: memory that does not grow, for attention that looks back a fixed number of tokens.

Jiang et al. 2023, Mistral 7B (arXiv:2310.06825), section 2, "Rolling Buffer Cache" and "Pre-fill and Chunking": W →
`sliding_window`, i → the token's place. With a window of W keys a layer needs no more than the last W, so the buffer
has W slots and the token at place i goes into slot i mod W, where it overwrites the token at i − W.

One row, W = 4, fed 3, then 3, then 6 tokens, which stand at places 0 … 11:

    call           slots before     keys that the queries choose from   written, slot ← place          slots after
    0 1 2          ·  ·  ·  ·       | 0 1 2                             0 ← 0, 1 ← 1, 2 ← 2            0  1  2  ·
    3 4 5          0  1  2  ·       0 1 2 | 3 4 5                       3 ← 3, 0 ← 4, 1 ← 5            4  5  2  3
    6 7 … 11       4  5  2  3       4 5 2 3 | 6 7 8 9 10 11             0 ← 8, 1 ← 9, 2 ← 10, 3 ← 11   8  9 10 11

- A call reads before it writes: the query at 6 needs the key at 3, which stands in slot 3 until 11 takes it. The
  queries of a call choose from the slots and from the call's own keys, side by side; the call's keys are written
  afterwards. So a chunk may have any size, and its first queries lose nothing.
- Slots are not in the order of the text (4 5 2 3). Nothing has to be turned back: keys were rotated by their positions
  before they came here, and the mask compares places, not slots.
- 6 and 7 are never written: of a call longer than the window only the last W tokens are kept.
- A place counts the real tokens of its own row. Padding has no slot and overwrites nothing, on whichever side it is.

Shapes: B batch, KV key/value heads, T tokens of this call, W slots, Dh head_dim, N tokens written (at most B · W).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reference_impl.nn.kv_cache import Heads, require_no_gradients
from reference_impl.nn.masks import Tokens, in_order


class RollingCache:
    """The last `sliding_window` real tokens of every row, in every layer; memory does not depend on what was fed.

    Used like every `Cache`. A call remembers what it is going to write, at most W tokens a row, and writes it when it
    is committed.
    """

    def __init__(self, *, num_hidden_layers: int, sliding_window: int, max_length: int | None = None) -> None:
        """`max_length`: the most tokens, padding included, that a row may be fed; with fewer than W there are fewer
        slots. None: no end.
        """
        self.max_length = max_length
        self.slots = sliding_window if max_length is None else min(sliding_window, max_length)
        self.layers = [RollingLayer(self) for _ in range(num_hidden_layers)]
        self.length = 0  # tokens fed to every row so far, padding included
        self.count: Int[Tensor, " batch"] | None = None  # real ones among them
        # Row, column in the call, and slot of each token that the call at hand will write.
        self.writes: tuple[Int[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " n"]] | None = None

    @property
    def used(self) -> int:
        """Slots that can hold a token by now: they are filled from the left before the first is overwritten."""
        return min(self.length, self.slots)

    def tokens(self, real: Bool[Tensor, "batch seq"]) -> Tokens:
        """The tokens in the slots that are used, as they lie, then those of this call.

        Raises:
            ValueError: the batch is not that of the earlier calls, or `max_length` would be exceeded.
        """
        count = self._count_before(real)  # (B,)
        new = count[:, None] + in_order(real).place  # (B, T)
        # The latest place before `count` that falls into the slot: with count = 6 and W = 4, slot 2 holds 2 and slot 1
        # holds 5. In an empty slot it comes out negative.
        slot = torch.arange(self.used, device=real.device)
        held = count[:, None] - 1 - (count[:, None] - 1 - slot) % self.slots  # (B, used)
        after = count + real.sum(dim=1)
        rows, columns = (real & (new >= after[:, None] - self.slots)).nonzero(as_tuple=True)
        self.writes = rows, columns, new[rows, columns] % self.slots
        return Tokens(torch.cat((held >= 0, real), dim=1), torch.cat((held, new), dim=1))

    def commit(self, tokens: Tokens) -> None:
        """Ends a call: writes what its layers were given."""
        assert self.writes is not None
        rows, _, slots = self.writes
        for layer in self.layers:
            layer.write(rows, slots, batch=len(tokens.real))
        new = tokens.real[:, self.used :]  # (B, T)
        count = new.sum(dim=1)
        self.count = count if self.count is None else self.count + count
        self.length += new.shape[1]
        self.writes = None

    def state_bytes(self) -> int:
        """Memory held between calls, in bytes: all buffers, and the counts."""
        held = [layer.keys for layer in self.layers] + [layer.values for layer in self.layers] + [self.count]
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)

    def _count_before(self, real: Bool[Tensor, "batch seq"]) -> Int[Tensor, "batch"]:
        """Real tokens of each row in the calls before this one."""
        batch, seq = real.shape
        needed = self.length + seq
        if self.max_length is not None and needed > self.max_length:
            raise ValueError(
                f"{self.length} cached and {seq} new tokens need max_length={needed}, "
                f"got max_length={self.max_length}; make it larger or feed less"
            )
        if self.count is None:
            return torch.zeros(batch, dtype=torch.long, device=real.device)
        if len(self.count) != batch:
            raise ValueError(f"the cache holds a batch of {len(self.count)}, got {batch}; start a new one")
        return self.count


class RollingLayer:
    """Keys and values of one layer; made by `RollingCache`."""

    def __init__(self, cache: RollingCache) -> None:
        self._cache = cache
        self.keys: Float[Tensor, "batch kv_heads slots head_dim"] | None = None
        self.values: Float[Tensor, "batch kv_heads slots head_dim"] | None = None
        self._pending: tuple[Float[Tensor, "n kv_heads head_dim"], Float[Tensor, "n kv_heads head_dim"]] | None = None

    def append(self, key: Heads, value: Heads) -> tuple[Heads, Heads]:
        """Those in the used slots and the T new ones behind them; nothing is overwritten yet."""
        require_no_gradients(key, value)
        assert self._cache.writes is not None
        rows, columns, _ = self._cache.writes
        self._pending = key[rows, :, columns], value[rows, :, columns]
        if self.keys is None or self.values is None:
            return key, value
        used = self._cache.used
        return torch.cat((self.keys[:, :, :used], key), dim=2), torch.cat((self.values[:, :, :used], value), dim=2)

    def write(self, rows: Int[Tensor, "n"], slots: Int[Tensor, "n"], batch: int) -> None:
        """Puts what `append` was given last into its slots; nothing, if the layer's block runs in another process."""
        if self._pending is None:
            return
        key, value = self._pending  # (N, KV, Dh)
        if self.keys is None or self.values is None:
            # zeros: what was never written is hidden, but a NaN there would pass through a weight of 0
            shape = (batch, key.shape[1], self._cache.slots, key.shape[2])
            self.keys, self.values = key.new_zeros(shape), value.new_zeros(shape)
        self.keys[rows, :, slots], self.values[rows, :, slots] = key, value
        self._pending = None
