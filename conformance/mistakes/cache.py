"""Key-value caches and sessions: what is kept, where it is written, and what later calls see of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.attention import WEIGHED
from conformance.mistakes.groups import DECODERS, GPTS, MODELS, TURNING
from conformance.mistakes.making import each
from conformance.mistakes.rotary import TURNED
from reference_impl.nn import rotary
from reference_impl.nn.masks import Tokens

APPENDS = ("reference_impl.nn.kv_cache:ContiguousLayer.append", "reference_impl.nn.rolling_cache:RollingLayer.append")
WRITE = "reference_impl.nn.kv_cache:write"
EXTENDED = "reference_impl.nn.kv_cache:KVCache.extended"
CACHE = "reference_impl.nn.kv_cache:KVCache.__init__"
SESSION = "reference_impl.nn.kv_cache:Session.__init__"
ROWS = "reference_impl.nn.masks:visible_in_rows"
ROLLING = "reference_impl.nn.rolling_cache:RollingCache."
TABLES = "reference_impl.nn.rotary:tables"
TURNS = ("reference_impl.nn.attention:GroupedQueryAttention.forward", "reference_impl.models.phi:PhiAttention.forward")

DECODING = ("cache.prefill_decode", "cache.one_by_one", "cache.chunks")
ANY = (*DECODING, "cache.ragged")
# Families with sessions over a cache of keys and values, and over a rolling one.
CACHING = (*MODELS, "switch_transformer")
ROLLERS = ("mistral", "mixtral")
A = "layers.N.attention."
CACHED = (*TURNED, A + "key", A + "value", A + "scores", A + "context", *WEIGHED)
Pair = tuple[Tensor, Tensor]


def returned(change: Callable[[Tensor, Tensor, int], Pair]) -> Callable[..., Any]:
    """What attention gets from the cache: change(keys, values, new tokens), both (B, KV, S, Dh)."""

    def make(original: Callable[..., Pair]) -> Callable[..., Pair]:
        def append(self: Any, key: Tensor, value: Tensor) -> Pair:
            keys, values = original(self, key, value)
            return change(keys, values, key.shape[2])

        return append

    return make


def first_rows(keys: Tensor, values: Tensor, new: int) -> Pair:
    """Cached tokens are those of the batch's first row, for all rows."""
    kept = keys.shape[2] - new
    return tuple(  # type: ignore[return-value]
        torch.cat((heads[:1, :, :kept].expand(len(heads), -1, -1, -1), heads[:, :, kept:]), dim=2)
        for heads in (keys, values)
    )


def values_of_this_call(original: Callable[..., Pair]) -> Callable[..., Pair]:
    """Values of earlier calls are lost: the new ones are repeated in their place."""

    def append(self: Any, key: Tensor, value: Tensor) -> Pair:
        keys, _ = original(self, key, value)
        kept = keys.shape[2] - key.shape[2]
        return keys, torch.cat((value[:, :, :1].expand(-1, -1, kept, -1), value), dim=2)

    return append


def nothing_kept(keys: Tensor, values: Tensor, new: int) -> Pair:
    kept = keys.shape[2] - new
    return tuple(  # type: ignore[return-value]
        torch.cat((torch.zeros_like(heads[:, :, :kept]), heads[:, :, kept:]), dim=2) for heads in (keys, values)
    )


def newest_first(keys: Tensor, values: Tensor, new: int) -> Pair:
    """The new tokens stand before the cached ones, while the mask has them behind."""
    return keys.roll(new, dims=2), values.roll(new, dims=2)


def keys_alone_reversed(keys: Tensor, values: Tensor, new: int) -> Pair:
    kept = keys.shape[2] - new
    return torch.cat((keys[:, :, :kept].flip(2), keys[:, :, kept:]), dim=2), values


def overwritten(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A chunk is written one slot too early: over the last cached token."""

    def write(buffer: Tensor | None, chunk: Tensor, *, start: int, max_length: int | None) -> Tensor:
        whole = original(buffer, chunk, start=start, max_length=max_length)
        if start:
            whole[:, :, start - 1 : start - 1 + chunk.shape[2]] = chunk
        return whole

    return write


def grown_empty(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A larger buffer begins with zeros, not with what the smaller one held."""

    def write(buffer: Tensor | None, chunk: Tensor, *, start: int, max_length: int | None) -> Tensor:
        whole = original(buffer, chunk, start=start, max_length=max_length)
        if buffer is not None and whole.shape != buffer.shape:
            whole[:, :, :start] = 0
        return whole

    return write


def last_not_stored(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The last token of a chunk is not written: the loop ends too early."""

    def write(buffer: Tensor | None, chunk: Tensor, *, start: int, max_length: int | None) -> Tensor:
        stored = chunk.clone()
        if chunk.shape[2] > 1:
            stored[:, :, -1] = 0
        return original(buffer, stored, start=start, max_length=max_length)

    return write


def only_in_float16(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def write(buffer: Tensor | None, chunk: Tensor, *, start: int, max_length: int | None) -> Tensor:
        return original(buffer, chunk.to(torch.float16).to(chunk.dtype), start=start, max_length=max_length)

    return write


def padding_forgotten(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def extended(self: Any, real: Tensor) -> Tensor:
        whole = original(self, real)
        return torch.cat((torch.ones_like(whole[:, : -real.shape[1]]), real), dim=1)

    return extended


def one_layer_for_all(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, *, num_hidden_layers: int, max_length: int | None = None) -> None:
        original(self, num_hidden_layers=num_hidden_layers, max_length=max_length)
        self.layers = [self.layers[0]] * num_hidden_layers

    return init


def kept_session(original: Callable[..., None]) -> Callable[..., None]:
    """The model keeps the cache of its first session, for all."""

    def init(self: Any, model: Any, cache: Any) -> None:
        if not hasattr(model, "kept_cache") or model.kept_cache.length > 40:
            object.__setattr__(model, "kept_cache", cache)
        original(self, model, model.kept_cache)

    return init


# --- rotary positions in the cache ------------------------------------------------------------------------------------


def stored_raw(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keys are stored as they are projected, and never turned when they are read."""

    def forward(self: Any, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        if cache is None:
            return original(self, x, cos, sin, mask)
        query, key, value = self.project(x)
        keys, value = cache.append(key, value)
        query, key = self.turn(query, key, cos, sin)
        keys = torch.cat((keys[:, :, : -x.shape[1]], key), dim=2)
        project_out = self.o_proj if hasattr(self, "o_proj") else self.dense
        output: Tensor = project_out(self.attend(query, keys, value, mask).transpose(1, 2).flatten(2))
        return output

    return forward


def angles_known(use: Callable[..., Any]) -> Callable[[], tuple[Swap, ...]]:
    """`append` and the like do not know how keys are turned: what makes the tables leaves it here.

    use: (state, original forward) -> forward; state holds the arguments of `rotary.tables`.
    """

    def swaps() -> tuple[Swap, ...]:
        state: dict[str, Any] = {}

        def tables(original: Callable[..., Any]) -> Callable[..., Any]:
            def noted(position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
                state.update(position_ids=position_ids, args=args, kwargs=kwargs)
                return original(position_ids, *args, **kwargs)

            return noted

        return Swap(TABLES, tables), *(Swap(target, lambda original: use(state, original)) for target in TURNS)

    return swaps


def turned_again(state: dict[str, Any], original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        if cache is None:
            return original(self, x, cos, sin, mask)
        query, key = (tensor for tensor in self.project(x)[:2])
        value = self.project(x)[2]
        query, key = self.turn(query, key, cos, sin)
        keys, value = cache.append(key, value)
        kept = keys.shape[2] - x.shape[1]
        places = torch.arange(kept).expand(len(x), -1)
        again = rotary.rotate_partly(keys[:, :, :kept], *rotary.tables(places, *state["args"], **state["kwargs"]))
        keys = torch.cat((again, keys[:, :, kept:]), dim=2)
        project_out = self.o_proj if hasattr(self, "o_proj") else self.dense
        output: Tensor = project_out(self.attend(query, keys, value, mask).transpose(1, 2).flatten(2))
        return output

    return forward


def repeated_again(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of cached tokens query head h reads key-value head (h // g) // g, where g query heads share one."""

    def forward(self: Any, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        if cache is None:
            return original(self, x, cos, sin, mask)
        query, key, value = self.project(x)
        query, key = self.turn(query, key, cos, sin)
        heads, shared, kept = query.shape[1], query.shape[1] // key.shape[1], -x.shape[1]
        keys, values = (
            torch.cat((once[:, :, :kept].repeat_interleave(shared, dim=1)[:, :heads], once[:, :, kept:]), dim=2)
            for once in (kv.repeat_interleave(shared, dim=1) for kv in cache.append(key, value))
        )
        project_out = self.o_proj if hasattr(self, "o_proj") else self.dense
        output: Tensor = project_out(self.attend(query, keys, values, mask).transpose(1, 2).flatten(2))
        return output

    return forward


def advanced_early(state: dict[str, Any], original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        upper = cache is not None and cache._cache.length and cache is not cache._cache.layers[0]
        if upper:
            cos, sin = rotary.tables(state["position_ids"] + 1, *state["args"], **state["kwargs"])
        return original(self, x, cos, sin, mask, cache)

    return forward


# --- rolling buffers: the reference keeps every key, so that a buffer's faults are written as what is seen ------------


def slots_lost(when_cached: bool) -> Callable[..., Any]:
    """Keys whose slots this call overwrites are gone before its first queries have seen them."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def visible_in_rows(tokens: Tokens, *, num_queries: int, sliding_window: int | None = None) -> Tensor:
            mask = original(tokens, num_queries=num_queries, sliding_window=sliding_window)
            cached = num_queries < tokens.place.shape[1]
            if sliding_window is not None and num_queries > 1 and cached == when_cached:
                last = tokens.place[:, -1:]  # (B, 1)
                mask = mask & (tokens.place > last - sliding_window)[:, None, None]
            return mask

        return visible_in_rows

    return make


def only_in_sessions(swap: Swap) -> tuple[Swap, ...]:
    """The swapped mask is that of calls with a rolling cache."""
    state = {"cached": False}

    def tokens(original: Callable[..., Tokens]) -> Callable[..., Tokens]:
        def noted(self: Any, real: Tensor) -> Tokens:
            state["cached"] = True
            return original(self, real)

        return noted

    def visible_in_rows(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        changed = swap.make(original)

        def chosen(tokens: Tokens, **sizes: Any) -> Tensor:
            cached, state["cached"] = state["cached"], False
            found: Tensor = (changed if cached else original)(tokens, **sizes)
            return found

        return chosen

    return Swap(ROLLING + "tokens", tokens), Swap(swap.target, visible_in_rows)


def places(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """The places of the tokens in the slots (B, used), changed."""

    def make(original: Callable[..., Tokens]) -> Callable[..., Tokens]:
        def tokens(self: Any, real: Tensor) -> Tokens:
            found, used = original(self, real), self.used
            return Tokens(found.real, torch.cat((change(found.place[:, :used]), found.place[:, used:]), dim=1))

        return tokens

    return make


def written(change: Callable[[Any, Any, Any, Any], Any]) -> Callable[..., Any]:
    """What a call will write, changed: change(cache, rows, columns, slots)."""

    def make(original: Callable[..., Tokens]) -> Callable[..., Tokens]:
        def tokens(self: Any, real: Tensor) -> Tokens:
            found = original(self, real)
            self.writes = change(self, *self.writes)
            return found

        return tokens

    return make


def next_slot(cache: Any, rows: Tensor, columns: Tensor, slots: Tensor) -> Any:
    return rows, columns, (slots + 1) % cache.slots


def by_column(cache: Any, rows: Tensor, columns: Tensor, slots: Tensor) -> Any:
    """Every call begins at slot 0."""
    return rows, columns, columns % cache.slots


def one_slot_fewer(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, *, num_hidden_layers: int, sliding_window: int, max_length: int | None = None) -> None:
        window = max(sliding_window - 1, 1)
        original(self, num_hidden_layers=num_hidden_layers, sliding_window=window, max_length=max_length)

    return init


def one_slot_more(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, *, num_hidden_layers: int, sliding_window: int, max_length: int | None = None) -> None:
        original(self, num_hidden_layers=num_hidden_layers, sliding_window=sliding_window + 1, max_length=max_length)

    return init


def entry(
    identifier: str, families: tuple[str, ...], swaps: tuple[Swap, ...], killed_by: tuple[str, ...], **text: Any
) -> Mistake:
    seen = text.pop("seen", "common knowledge")
    return Mistake(
        id=identifier, families=families, swaps=swaps, killed_by=killed_by, seen=seen,
        touches=text.pop("touches", CACHED), **text,
    )  # fmt: skip


def shown_without_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    def tokens_of_call(input_ids: Tensor, attention_mask: Any, lengths: Any, cache: Any) -> Any:
        if attention_mask is None and getattr(cache, "real", None) is not None:
            cache.real = torch.ones_like(cache.real)
        return original(input_ids, attention_mask, lengths, cache)

    return tokens_of_call


MISTAKES = (
    entry(
        "cache-not-reset", DECODERS, (Swap(SESSION, kept_session),), ANY,
        what="A second text sees the first one's keys: the cache is kept between sessions.",
        why="Texts have nothing to do with each other.",
        shows="Only from the second session on.", fix="A cache for each session.",
        seen="Lightning-AI/litgpt#1596, EleutherAI/gpt-neox#532", touches=("embedding", *CACHED),
    ),
    entry(
        "cache-reorder", CACHING, each(APPENDS, returned(keys_alone_reversed)), DECODING,
        what="Cached keys are reordered (beams, slots, blocks) and values are not.",
        why="They belong together.",
        shows="Only when something moves; here: from the third token on.", fix="Move both.",
        seen="transformers#46612, transformers#34232",
    ),
    entry(
        "cache-rows-mixed", CACHING, each(APPENDS, returned(first_rows)), DECODING,
        what="All rows of a batch get the cached keys and values of its first row.",
        why="Every row has its own text.",
        shows="Only in batches of different rows.", fix="Index the cache by row.",
        seen="transformers#46612 (rows that move)",
    ),
    entry(
        "cache-values-not-kept", CACHING, each(APPENDS, values_of_this_call), DECODING,
        what="Keys are cached and values are not.",
        why="Both are needed.", shows="Only from the second call on: scores are right, contexts are not.",
        fix="Cache both.",
    ),
    entry(
        "cache-written-as-zeros", CACHING, each(APPENDS, returned(nothing_kept)), DECODING,
        what="What is read back is the empty buffer: writing went to a copy.",
        why="x[index] with a list, .to(device), .contiguous() copy.",
        shows="Only from the second call on.", fix="Write into the buffer itself, and test that it changed.",
    ),
    entry(
        "cache-new-keys-first", CACHING, each(APPENDS, returned(newest_first)), ("cache.chunks",),
        what="New keys are put before the cached ones: cat((new, past)).",
        why="The mask counts from the past.",
        shows="Nothing when a single token is decoded without padding, since it sees all; chunks are wrong.",
        fix="cat((past, new), dim=seq).",
    ),
    entry(
        "cache-write-off-by-one", CACHING, (Swap(WRITE, overwritten),), DECODING,
        what="New keys are written one slot too early, over the last cached token.",
        why="The next free slot is number length.",
        shows="Only from the second call on.", fix="Slots length … length + T − 1.",
        seen="Integral2u/SharpMind#57 (the same seam)",
    ),
    entry(
        "cache-growth-loses", CACHING, (Swap(WRITE, grown_empty),), DECODING,
        what="When the buffer grows, what it held is not copied.",
        why="It is still needed.", shows="Only when the buffer grows.", fix="Copy the old slots.",
    ),
    entry(
        "chunk-tokens-skipped", CACHING, (Swap(WRITE, last_not_stored),), ("cache.prefill_decode", "cache.chunks"),
        what="The last token of a chunk is not stored: the loop runs over whole blocks only.",
        why="Every token is part of the text.",
        shows="Only chunks of more than one token; a test by whole blocks does not see it.",
        fix="Store the rest of the last block.",
        seen="Integral2u/SharpMind#57, cactus#716",
    ),
    entry(
        "cache-low-precision", CACHING, (Swap(WRITE, only_in_float16),), DECODING,
        what="The cache is float16 whatever the model is.",
        why="Decoding then differs from the full forward by float16's rounding.",
        shows="5e-4 while decoding; nothing in float16.", fix="Keep the model's dtype, or say so.",
        precision="under true double precision float16 is float64 as well",
    ),
    entry(
        "cache-padding-forgotten", DECODERS, (Swap(EXTENDED, padding_forgotten),), ("cache.ragged",),
        what="Padding of earlier calls is taken for real once it is cached.",
        why="It must stay hidden, and must not count in positions.",
        shows="Only when decoding after a padded prompt.", fix="Keep the mask with the keys.",
        seen="NVIDIA/FasterTransformer#270 (in cross attention)",
    ),
    entry(
        "cache-shared-by-layers", CACHING, (Swap(CACHE, one_layer_for_all),), DECODING,
        what="[LayerCache()] * n is one cache: each layer overwrites what the one before it wrote.",
        why="Every layer has keys of its own.",
        shows="Only from the second call on; nothing with one layer.", fix="[LayerCache() for _ in range(n)].",
    ),
    entry(
        "cache-keys-never-turned", TURNING, tuple(Swap(t, stored_raw) for t in TURNS), DECODING,
        what="Keys are stored as they are projected, and are not turned when they are read.",
        why="Every key has its position.",
        shows="Only from the second call on.", fix="Store turned keys, or turn all of them on every call.",
        seen="NeuraLegion/shainet#110",
    ),
    entry(
        "cache-heads-repeated-again", TURNING, tuple(Swap(t, repeated_again) for t in TURNS), DECODING,
        what="Keys and values are cached with their heads repeated for all query heads, and repeated again when read.",
        why="Each query head then reads another head of what is cached than of what is new.",
        shows="Only from the second call on, and only where heads are shared; with one key-value head it is right.",
        fix="Cache key-value heads, and repeat what is read.", seen="candle-vllm#52 (the same seam)",
    ),
    entry(
        "rope-cached-keys-rotated-again", TURNING, angles_known(turned_again)(), DECODING,
        what="Keys are stored turned, and turned again whenever they are read.",
        why="Once is enough.", shows="Only from the second call on.", fix="Turn before storing, or after reading.",
        seen="NeuraLegion/shainet#110",
    ),
    entry(
        "rope-offset-advanced-early", TURNING, angles_known(advanced_early)(), DECODING,
        what="Layer 0 advances the shared length, so that upper layers turn new tokens one position too far.",
        why="One call has one set of positions.",
        shows="Only while decoding, and only from layer 1 on.", fix="Advance after the last layer.",
        seen="fla-org/flash-linear-attention#766",
    ),
    entry(
        "rolling-write-before-read", ROLLERS, (Swap(ROWS, slots_lost(when_cached=True)),),
        ("cache.chunks",),
        what="A chunk overwrites the slots whose keys its first queries still need.",
        why="With w slots and n new tokens, the oldest of w + n − 1 keys are gone.",
        shows="Token by token everything is right; every call with n > 1 that overflows the buffer is wrong.",
        fix="Attend to the old keys and the new ones, and write afterwards.",
        seen="pytorch/executorch#20346, transformers#30642 (review)",
    ),
    entry(
        "prefill-longer-than-window", ROLLERS,
        only_in_sessions(Swap(ROWS, slots_lost(when_cached=False))), ("cache.prefill_decode",),
        what="Of a prompt longer than the window only the last w keys are kept before its queries attend.",
        why="The earlier queries have nothing to see.",
        shows="Only prompts longer than the window; zeros or NaN in their first rows.",
        fix="Attend first, then keep the last w.",
        seen="transformers#30642, mlxcel#413, mlxcel#418",
    ),
    entry(
        "rolling-slot-order", ROLLERS, (Swap(ROLLING + "tokens", places(lambda held: held.sort(dim=1).values)),),
        ("cache.chunks", "cache.prefill_decode"),
        what="The order of slots is taken for the order of time when masks are built.",
        why="After the buffer has wrapped, slot 0 holds a newer key than slot 1.",
        shows="Nothing in one shot, before the wrap, or for a single token that sees the whole buffer.",
        fix="Keep each slot's position, or unroll the buffer.",
        seen="ollama#14912, ollama#15591, mlx-examples#1000",
    ),
    entry(
        "rolling-slot-off-by-one", ROLLERS, (Swap(ROLLING + "tokens", written(next_slot)),), DECODING,
        what="The token at place i is written to slot i + 1 mod w, and looked for in slot i mod w.",
        why="Both must agree.", shows="From the second call on, wherever the mask tells slots apart.",
        fix="Slot i mod w.", seen="mlx-examples#1000 (the same seam)",
    ),
    entry(
        "rolling-restarts-at-slot-0", ROLLERS, (Swap(ROLLING + "tokens", written(by_column)),), DECODING,
        what="Every call writes from slot 0 on.", why="The buffer goes on where the last call ended.",
        shows="From the second call on.", fix="Slot = place mod w, places counted over all calls.",
        seen="VeloxQuant-MLX#389 (places that restart)",
    ),
    entry(
        "rolling-one-slot-fewer", ROLLERS, (Swap(ROLLING + "__init__", one_slot_fewer),), DECODING,
        what="The buffer has w − 1 slots (\"the query brings its own key\").",
        why="It is right for single tokens: the query sees w − 1 kept keys and its own.",
        shows="Nowhere, as long as the mask goes by places: the w-th key back is never needed.", fix="None.",
        seen="mistral-inference one_file_ref.py (w against w + 1)",
        equivalent=dict.fromkeys(
            ROLLERS, "the first query of a call needs the w − 1 keys before it; later ones fewer of the kept ones"
        ),
    ),
    entry(
        "rolling-one-slot-more", ROLLERS, (Swap(ROLLING + "__init__", one_slot_more),), DECODING,
        what="The buffer has w + 1 slots.", why="It keeps a key that nothing sees.",
        shows="Nowhere, as long as the mask goes by places; memory is larger.", fix="None needed.",
        seen="mistral-inference one_file_ref.py (w against w + 1)",
        equivalent=dict.fromkeys(ROLLERS, "the mask hides what is w or more places back, wherever it is kept"),
    ),
    entry(
        "cache-padding-shown-without-mask", (*GPTS, "llama", "phi"),
        (Swap("reference_impl.nn.kv_cache:tokens_of_call", shown_without_mask),),
        ("batching.decoding", "cache.ragged_plan"),
        what="A call without a mask is read as: nothing is padding, also of what is cached.",
        why="The mask of a call speaks of that call; padding stays hidden for ever.",
        shows="Only when prompts are padded and the calls after them, which feed real tokens alone, give no mask.",
        fix="Extend the kept mask by ones.",
    ),
)  # fmt: skip
