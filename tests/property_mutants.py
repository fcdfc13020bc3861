"""For every property check at least one mistake that it catches by itself: small patches of the reference, wrong toys.

`tests/conformance/test_property_mutants.py` runs them, `docs/generate.py` lists them.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.implementations.reference import Reference
from reference_impl import stored_tensors
from reference_impl.models import gpt2, gpt3, mixtral, transformer, transformer_xl
from reference_impl.models.gpt2 import GPT2
from reference_impl.models.llama import Llama
from reference_impl.nn import (
    absolute_positions,
    attention,
    loss,
    masks,
    moe,
    multi_head_attention,
    norm,
    recurrent,
    recurrent_cells,
    relative_attention,
    rolling_cache,
    rotary,
    segment_memory,
    sequence_attention,
    sequence_session,
    switch,
)
from reference_impl.nn.kv_cache import KVCache, Session


@dataclass(frozen=True)
class Mutant:
    """A mistake and the property check that catches it.

    check, case: where it is caught.  what: the mistake in words.
    patch: makes it, in the reference, until the monkeypatch is undone; or the candidate itself.
    """

    check: str
    case: str
    what: str
    patch: Callable[[pytest.MonkeyPatch], Any]

    def candidate(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """The implementation to judge."""
        return self.patch(monkeypatch) or Reference("eager")

    def __str__(self) -> str:
        return f"{self.check}-{self.case}-{self.what}"


MUTANTS: list[Mutant] = []


def mutant(check: str, case: str, what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(patch: Callable[..., Any]) -> Callable[..., Any]:
        MUTANTS.append(Mutant(check, case, what, patch))
        return patch

    return add


class Around:
    """The reference with something done to what it is given or gives."""

    families = frozenset({"llama"})

    def __init__(self, answer: Callable[..., Any]):
        self.answer = answer

    def load(self, checkpoint: Any) -> Any:
        right, answer = Reference("eager").load(checkpoint), self.answer

        class Model:
            parameters = right.parameters

            def __call__(
                self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
            ) -> Any:
                def run(ids: Tensor = input_ids, mask: Tensor | None = attention_mask) -> Tensor:
                    return right(ids, mask, position_ids)["logits"]  # type: ignore[no-any-return]

                return answer(run, input_ids, attention_mask)

            def session(self) -> Any:
                return right.session()

        return Model()


class WithWeights:
    """The reference loaded with weights that were changed before."""

    families = frozenset({"llama"})

    def __init__(self, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]):
        self.change = change

    def load(self, checkpoint: Any) -> Any:
        from safetensors.torch import load_file, save_file

        path = checkpoint.path / "model.safetensors"
        save_file(self.change(load_file(path)), path, metadata={"format": "pt"})
        return Reference("eager").load(checkpoint)


# --- shapes ----------------------------------------------------------------------------------------------------------


@mutant("shapes.any", "llama/plain", "a standard deviation over the tokens, which is NaN for one token")
def _(_: Any) -> Any:
    def spread(logits: Tensor) -> Tensor:
        return ((logits - logits.mean(1, keepdim=True)).square().sum(1, keepdim=True) / (logits.shape[1] - 1)).sqrt()

    return Around(lambda run, ids, mask: run() / spread(run()))


@mutant("shapes.any", "gpt2/plain", "a table of positions that is one row short")
def _(patch: pytest.MonkeyPatch) -> None:
    right = masks.default_positions
    patch.setattr(masks, "default_positions", lambda tokens, *, num_queries: right(tokens, num_queries=num_queries) + 1)


@mutant("shapes.inputs", "llama/plain", "the ids are overwritten after use")
def _(_: Any) -> Any:
    def answer(run: Any, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = run()
        ids.zero_()
        return logits

    return Around(answer)


@mutant("shapes.inputs", "llama/plain", "the mask is inverted in place")
def _(_: Any) -> Any:
    def answer(run: Any, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = run()
        return logits if mask is None else (logits, mask.neg_())[0]

    return Around(answer)


@mutant("shapes.inputs", "transformer/plain", "the source's mask is inverted in place")
def _(_: Any) -> Any:
    class Inverts:
        families = frozenset({"transformer"})

        def load(self, checkpoint: Any) -> Any:
            right = Reference("eager").load(checkpoint)

            def model(
                input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Tensor
            ) -> Any:
                logits = right(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask)
                attention_mask.neg_()
                return logits

            return model

    return Inverts()


# --- causality -------------------------------------------------------------------------------------------------------


def _seen(change: Callable[[masks.Tokens, Tensor, int, int | None], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """Another mask: `change` gets tokens, the right mask (B, 1, T, S), T and the window."""

    def patched(patch: pytest.MonkeyPatch) -> None:
        right = masks.visible_in_rows

        def visible(tokens: masks.Tokens, *, num_queries: int, sliding_window: int | None = None) -> Tensor:
            mask = right(tokens, num_queries=num_queries, sliding_window=sliding_window)
            return change(tokens, mask, num_queries, sliding_window)

        patch.setattr(masks, "visible_in_rows", visible)

    return patched


def _places(tokens: masks.Tokens, queries: int) -> tuple[Tensor, Tensor]:
    """Places of queries (B, 1, T, 1) and of keys (B, 1, 1, S)."""
    return tokens.place[:, None, -queries:, None], tokens.place[:, None, None]


def _next_seen(tokens: masks.Tokens, mask: Tensor, queries: int, window: int | None) -> Tensor:
    query, key = _places(tokens, queries)
    return mask | (key == query + 1)


mutant("causality.prefix", "llama/plain", "the causal mask is off by one: a query sees the next key")(_seen(_next_seen))


@mutant("causality.prefix", "gpt2/plain", "the token itself is hidden, and its residual stream is dropped")
def _(_: Any) -> Any:
    return Around(lambda run, ids, mask: run(torch.cat([ids[:, :1], ids[:, :-1]], dim=1)))


@mutant("causality.gradient", "llama/plain", "hidden scores are lowered by 30 only: 1e-13 of a later token leaks")
def _(patch: pytest.MonkeyPatch) -> None:
    def weights(scores: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(torch.where(mask, scores, scores - 30), dim=-1)

    patch.setattr(attention, "attention_weights", weights)


def _encoder_sees(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """The encoder's blocks with another mask than theirs, (batch, 1, 1, source)."""

    def patched(patch: pytest.MonkeyPatch) -> None:
        right = transformer.EncoderLayer.forward
        patch.setattr(transformer.EncoderLayer, "forward", lambda layer, x, mask: right(layer, x, change(mask)))

    return patched


mutant("causality.encoder", "transformer/plain", "the encoder is causal")(
    _encoder_sees(lambda mask: mask & torch.ones(mask.shape[-1], mask.shape[-1], dtype=torch.bool).tril())
)
mutant("batching.source_padding", "transformer/plain", "the encoder attends to padding")(_encoder_sees(torch.ones_like))


@mutant("causality.source", "transformer/plain", "the last token of a source is cut off")
def _(_: Any) -> Any:
    class Cut:
        families = frozenset({"transformer"})

        def load(self, checkpoint: Any) -> Any:
            right = Reference("eager").load(checkpoint)
            return lambda input_ids, decoder_input_ids: right(input_ids[:, :-1], decoder_input_ids=decoder_input_ids)

    return Cut()


# --- reach -----------------------------------------------------------------------------------------------------------


def _wider(by: int) -> Callable[[pytest.MonkeyPatch], None]:
    def patched(patch: pytest.MonkeyPatch) -> None:
        right = masks.visible_in_rows

        def visible(tokens: masks.Tokens, *, num_queries: int, sliding_window: int | None = None) -> Tensor:
            window = None if sliding_window is None else sliding_window + by
            return right(tokens, num_queries=num_queries, sliding_window=window)

        patch.setattr(masks, "visible_in_rows", visible)

    return patched


mutant("reach.last_row", "mistral/distinct", "the window has one key more: the query's own is not counted")(_wider(1))
mutant("reach.last_row", "mixtral/distinct", "the window is ignored")(_wider(10_000))
mutant("reach.one_layer", "mistral/distinct", "the window has one key less")(_wider(-1))
mutant("reach.one_layer", "gpt3/plain", "every block is dense")(_wider(10_000))


def _without_first(tokens: masks.Tokens, mask: Tensor, queries: int, window: int | None) -> Tensor:
    query, key = _places(tokens, queries)
    return mask & ((key > 0) | (query == 0))


mutant("reach.last_row", "llama/plain", "no token sees the first one")(_seen(_without_first))


@mutant("reach.each_layer", "gpt3/plain", "the pattern begins with the banded block")
def _(patch: pytest.MonkeyPatch) -> None:
    right = gpt3.GPT3Config.kind
    patch.setattr(gpt3.GPT3Config, "kind", lambda config, layer: right(config, layer + 1))


mutant("reach.each_layer", "gpt3/distinct", "the band has one key more: the query's own is not counted")(_wider(1))


def _remembers(by: int) -> Callable[[pytest.MonkeyPatch], None]:
    """So many tokens more than mem_len."""

    def patched(patch: pytest.MonkeyPatch) -> None:
        right = segment_memory.remember
        patch.setattr(segment_memory, "remember", lambda old, new, mem_len: right(old, new, mem_len + by))

    return patched


mutant("reach.memory", "transformer_xl/distinct", "the memory is one token shorter")(_remembers(-1))
mutant("reach.memory", "transformer_xl/distinct", "the memory is one token longer")(_remembers(1))
mutant("reach.memory", "transformer_xl/plain", "nothing is remembered")(_remembers(-10_000))


def _of_layer(which: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[pytest.MonkeyPatch], None]:
    """Memories of other layers than their own; `which` gets what entered each layer and what left the last one."""

    def patched(patch: pytest.MonkeyPatch) -> None:
        right, left = segment_memory.SegmentMemory.commit, []
        block = transformer_xl.TransformerXLLayer.forward

        def forward(*arguments: Any) -> Tensor:
            left[:] = [block(*arguments)]
            return left[0]

        patch.setattr(transformer_xl.TransformerXLLayer, "forward", forward)
        patch.setattr(
            segment_memory.SegmentMemory, "commit", lambda memory, entered: right(memory, which([*entered, *left]))
        )

    return patched


mutant("reach.memory", "transformer_xl/distinct", "a layer remembers what left it: memories that reach back for ever")(
    _of_layer(lambda streams: streams[1:])
)
mutant("reach.memory", "transformer_xl/distinct", "every layer remembers what entered the first one")(
    _of_layer(lambda streams: streams[:1] * (len(streams) - 1))
)


@mutant("reach.memory", "transformer_xl/distinct", "only the last segment is remembered")
def _(patch: pytest.MonkeyPatch) -> None:
    right = segment_memory.remember
    patch.setattr(segment_memory, "remember", lambda old, new, mem_len: right(None, new, mem_len))


mutant(
    "reach.memory", "transformer_xl/field-mem_len-window", "the window has one key more: the query's own is not counted"
)(_wider(1))
mutant("reach.last_row", "transformer_xl/field-mem_len-window", "same_length is ignored")(_wider(10_000))


# --- cache -----------------------------------------------------------------------------------------------------------


def _top_left(tokens: masks.Tokens, mask: Tensor, queries: int, window: int | None) -> Tensor:
    query, key = _places(tokens, queries)
    return mask & (key <= query - (key.shape[-1] - queries)) if queries > 1 else mask


mutant("cache.any_plan", "llama/plain", "the mask of several tokens onto a cache is aligned at the top left")(
    _seen(_top_left)
)


def _written_first(tokens: masks.Tokens, mask: Tensor, queries: int, window: int | None) -> Tensor:
    """Only a chunk of several tokens onto a full cache loses keys that its first queries need."""
    query, key = _places(tokens, queries)
    if window is None or key.shape[-1] == queries:
        return mask
    return mask & (key > query[:, :, -1:] - max(window, queries))


mutant("cache.any_plan", "mistral/distinct", "a cache of `window` slots, written before the chunk's queries read it")(
    _seen(_written_first)
)


@mutant("cache.any_plan", "mistral/distinct", "a call of exactly the window's size is written from the first slot on")
def _(patch: pytest.MonkeyPatch) -> None:
    right = rolling_cache.RollingCache.tokens

    def tokens(cache: rolling_cache.RollingCache, real: Tensor) -> masks.Tokens:
        found = right(cache, real)
        assert cache.writes is not None
        rows, columns, slots = cache.writes
        cache.writes = rows, columns, columns if real.shape[1] == cache.slots else slots
        return found

    patch.setattr(rolling_cache.RollingCache, "tokens", tokens)


@mutant("cache.fresh_session", "llama/plain", "all sessions of a model share one cache")
def _(patch: pytest.MonkeyPatch) -> None:
    def session(model: Any) -> Session:
        if not hasattr(model, "only"):
            model.only = Session(model, KVCache(num_hidden_layers=model.config.num_hidden_layers))
        return model.only  # type: ignore[no-any-return]

    patch.setattr(Llama, "session", session)


@mutant("cache.interleaved", "llama/plain", "a new session empties the cache that all sessions share")
def _(patch: pytest.MonkeyPatch) -> None:
    class Shared(Session):
        def feed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            self._cache = self._model.current
            return super().feed(input_ids, attention_mask)

    def session(model: Any) -> Session:
        model.current = KVCache(num_hidden_layers=model.config.num_hidden_layers)
        return Shared(model, model.current)

    patch.setattr(Llama, "session", session)


@mutant("cache.ragged_plan", "llama/plain", "the padding of earlier calls is forgotten")
def _(patch: pytest.MonkeyPatch) -> None:
    right = KVCache.extended
    patch.setattr(
        KVCache, "extended",
        lambda cache, real: real if cache.real is None else right(cache, real).index_fill(
            1, torch.arange(cache.length), True
        ),
    )  # fmt: skip


@mutant("cache.any_plan", "lstm/plain", "the state that a piece begins with is not used")
def _(patch: pytest.MonkeyPatch) -> None:
    right = recurrent.scan

    def scan(step: Any, x: Tensor, state: Any, *rest: Any, **more: Any) -> Any:
        return right(step, x, tuple(part * 0 for part in state), *rest, **more)

    patch.setattr(recurrent, "scan", scan)


@mutant("cache.any_plan", "gnmt/plain", "only the first of the decoder's states is carried from call to call")
def _(patch: pytest.MonkeyPatch) -> None:
    right = sequence_session.decode

    def decode(*arguments: Any) -> Any:
        logits, (first, *others) = right(*arguments)
        return logits, (first, *(state * 0 for state in others))

    patch.setattr(sequence_session, "decode", decode)


@mutant("cache.interleaved", "rnn_search/plain", "the state lives in the decoder, not in the session")
def _(patch: pytest.MonkeyPatch) -> None:
    right = sequence_session.Session.feed

    def feed(session: Any, *arguments: Any) -> Tensor:
        if session.__dict__.setdefault("began", False):
            session._state = session._decoder.current
        logits = right(session, *arguments)
        session.began, session._decoder.current = True, session._state
        return logits

    patch.setattr(sequence_session.Session, "feed", feed)


# --- batching --------------------------------------------------------------------------------------------------------


@mutant("batching.alone", "llama/plain", "the norm's mean square is taken over the batch too")
def _(patch: pytest.MonkeyPatch) -> None:
    right = norm.rms_norm
    patch.setattr(
        norm, "rms_norm",
        lambda x, weight, eps: right(x, weight, eps) * (1 + 1e-3 * x.square().mean(dim=0, keepdim=True).sqrt()),
    )  # fmt: skip


@mutant("batching.alone", "switch_ffn/plain", "an expert's capacity is counted over the whole batch")
def _(patch: pytest.MonkeyPatch) -> None:
    right = switch.switch_ffn

    @functools.wraps(right)
    def over_batch(x: Tensor, *rest: Any, **more: Any) -> Any:
        returned = right(x.flatten(0, 1)[None], *rest, **more)
        return {name: value.view(*x.shape[:2], -1) for name, value in returned.items()}

    patch.setattr(switch, "switch_ffn", over_batch)


@mutant("batching.permutation", "llama/plain", "the first row of a batch is answered for all of its kind")
def _(_: Any) -> Any:
    return Around(lambda run, ids, mask: run() * (1 + 1e-6 * torch.arange(len(ids))[:, None, None]))


def _positions_from_columns(patch: pytest.MonkeyPatch) -> None:
    def positions(tokens: masks.Tokens, *, num_queries: int) -> Tensor:
        return torch.arange(tokens.place.shape[1]).expand(tokens.place.shape)[:, -num_queries:]

    patch.setattr(masks, "default_positions", positions)


mutant("batching.padding", "gpt2/plain", "positions count columns, padding included")(_positions_from_columns)
mutant("batching.decoding", "gpt/plain", "positions of decoded tokens count columns, padding included")(
    _positions_from_columns
)


def _padding_seen(tokens: masks.Tokens, mask: Tensor, queries: int, window: int | None) -> Tensor:
    query, key = _places(tokens, queries)
    return key <= query


mutant("batching.padding", "llama/distinct", "padding is not masked")(_seen(_padding_seen))


@mutant("batching.packed", "gpt2/plain", "positions run on over the texts of a row")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(masks, "default_positions", lambda tokens, *, num_queries: torch.arange(num_queries)[None])


@mutant("batching.packed", "llama/plain", "a packed text sees the text before it")
def _(patch: pytest.MonkeyPatch) -> None:
    right = masks.visible

    def visible(tokens: masks.Tokens, *, num_queries: int, sliding_window: int | None = None) -> masks.Mask:
        if tokens.lengths is None:
            return right(tokens, num_queries=num_queries, sliding_window=sliding_window)
        return masks.causal(num_queries, num_queries)[None, None]

    patch.setattr(masks, "visible", visible)


@mutant("batching.padding", "multi_head_attention/cross", "the mask is ignored")
def _(patch: pytest.MonkeyPatch) -> None:
    right = multi_head_attention.visible
    patch.setattr(
        multi_head_attention, "visible",
        lambda queries, keys, causal, mask, device: right(queries, keys, causal, None, device),
    )  # fmt: skip


@mutant("batching.padding", "gru/lengths", "the state runs on over the padding")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recurrent, "advance", lambda real, old, new: new)


@mutant("batching.padding", "additive_attention/mask", "the mask is ignored")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sequence_attention, "masked_softmax", lambda scores, mask: scores.softmax(-1))


# --- invariance ------------------------------------------------------------------------------------------------------


@mutant("invariance.shift", "llama/plain", "queries are turned by half the angle that keys are")
def _(patch: pytest.MonkeyPatch) -> None:
    right, turned = rotary.rotate, iter(range(10**9))

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if next(turned) % 2:
            return right(x, cos, sin)
        half = torch.atan2(sin, cos) / 2
        return right(x, half.cos(), half.sin())

    patch.setattr(rotary, "rotate", rotate)


@mutant("invariance.shift", "rotary/plain", "sines are added where they should be subtracted")
def _(patch: pytest.MonkeyPatch) -> Any:
    def rotate(x: Tensor, position_ids: Tensor, rope_theta: float, rotary_dim: int) -> Tensor:
        frequencies = rope_theta ** (-torch.arange(0, rotary_dim, 2, dtype=x.dtype) / rotary_dim)
        angles = position_ids[:, None, :, None] * frequencies
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            [first * angles.cos() + second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )

    return rotate


@mutant("invariance.repeated_key_values", "mistral/plain", "query head h reads key-value head h mod KV")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "repeat_key_value_heads", lambda x, heads: x.repeat(1, heads // x.shape[1], 1, 1))


@mutant("invariance.repeated_key_values", "multi_head_attention/distinct", "query head h reads key-value head h mod KV")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        multi_head_attention, "repeat_key_value_heads", lambda x, heads: x.repeat(1, heads // x.shape[1], 1, 1)
    )


mutant("invariance.wide_window", "mixtral/plain", "the window has one key less")(_wider(-1))
mutant("invariance.wide_window", "gpt3/plain", "the window has one key less")(_wider(-1))
mutant("invariance.wide_window", "sliding_window_attention/plain", "the window has one key less")(_wider(-1))


def _not_renormalised(patch: pytest.MonkeyPatch) -> None:
    def route(logits: Tensor, chosen: int) -> Any:
        return logits.softmax(-1).topk(chosen, dim=-1)

    patch.setattr(moe, "route", route)


mutant("invariance.one_expert", "mixtral/plain", "the chosen experts' weights are not renormalised")(_not_renormalised)
mutant("invariance.one_expert", "sparse_moe/plain", "the chosen experts' weights are not renormalised")(
    _not_renormalised
)


def _farther_is_less(patch: pytest.MonkeyPatch) -> None:
    right = attention.attention_weights

    def weights(scores: Tensor, mask: Tensor) -> Tensor:
        return right(scores + 0.1 * torch.arange(scores.shape[-1], dtype=scores.dtype), mask)

    for module in (attention, multi_head_attention):
        patch.setattr(module, "attention_weights", weights)


mutant("invariance.order", "gpt2/plain", "a bias on scores that grows with the key's place")(_farther_is_less)
mutant("invariance.order", "multi_head_attention/plain", "a bias on scores that grows with the key's place")(
    _farther_is_less
)


@mutant("invariance.order", "luong_attention/plain", "the first position of the source weighs twice")
def _(patch: pytest.MonkeyPatch) -> None:
    def softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
        twice = torch.cat([scores[..., :1] + 0.7, scores[..., 1:]], -1)
        return twice.softmax(-1)

    patch.setattr(sequence_attention, "masked_softmax", softmax)


def _one_more(patch: pytest.MonkeyPatch) -> None:
    def weights(scores: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([scores.masked_fill(~mask, -torch.inf), scores[..., :1] * 0], -1).softmax(-1)[..., :-1]

    for module in (attention, relative_attention):
        patch.setattr(module, "attention_weights", weights)


for _case in ("llama/plain", "gpt2/plain", "transformer_xl/distinct"):
    mutant("invariance.weights_sum_to_one", _case, "a one is added to the softmax's denominator")(_one_more)


@mutant("invariance.weights_sum_to_one", "multi_head_attention/plain", "the softmax runs over the queries")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(multi_head_attention, "attention_weights", lambda scores, mask: scores.softmax(-2))


@mutant("invariance.weights_sum_to_one", "sliding_window_attention/distinct", "keys are hidden after the softmax")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(multi_head_attention, "attention_weights", lambda scores, mask: scores.softmax(-1) * mask)


@mutant("invariance.weights_sum_to_one", "additive_attention/distinct", "pads are hidden after the softmax")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        sequence_attention, "masked_softmax",
        lambda scores, mask: scores.softmax(-1) * (1 if mask is None else mask),
    )  # fmt: skip


@mutant("invariance.scale", "rms_norm/plain", "ε outside the root")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        norm, "rms_norm", lambda x, weight, eps: x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight
    )


@mutant("invariance.scale", "layer_norm/plain", "ε is added after the division")
def _(_: Any) -> Any:
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True).sqrt() + eps) * weight + bias

    return layer_norm


@mutant("invariance.offset", "layer_norm/plain", "the variance is the mean square: the mean is not taken away from it")
def _(_: Any) -> Any:
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias

    return layer_norm


@mutant("invariance.reversal", "rnn/bidirectional", "the reverse direction's outputs are not turned back")
def _(patch: pytest.MonkeyPatch) -> None:
    right = recurrent.scan

    def scan(*arguments: Any, reverse: bool) -> Any:
        outputs, state, gates = right(*arguments, reverse=reverse)
        return (outputs.flip(1) if reverse else outputs), state, gates

    patch.setattr(recurrent, "scan", scan)


# --- sensitivity, gradients ------------------------------------------------------------------------------------------


@mutant("sensitivity.weights", "llama/distinct", "the biases of the key projections are never loaded")
def _(_: Any) -> Any:
    return WithWeights(
        lambda weights: {name: tensor * (not name.endswith("k_proj.bias")) for name, tensor in weights.items()}
    )


@mutant("sensitivity.weights", "gpt2/plain", "one norm serves for both of a block")
def _(_: Any) -> Any:
    return WithWeights(lambda weights: {name: weights[name.replace("ln_2", "ln_1")].clone() for name in weights})


@mutant("gradients.directions", "llama/plain", "no gradient through the root of a norm")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        norm, "rms_norm",
        lambda x, weight, eps: weight * x * torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + eps),
    )  # fmt: skip


@mutant("gradients.directions", "mixtral/plain", "no gradient through the router")
def _(patch: pytest.MonkeyPatch) -> None:
    right = moe.route

    def route(logits: Tensor, chosen: int) -> Any:
        weights, experts = right(logits, chosen)
        return weights.detach(), experts

    patch.setattr(moe, "route", route)


@mutant("gradients.memory", "transformer_xl/plain", "gradients flow into the memory")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        segment_memory, "remember",
        lambda old, new, mem_len: new if old is None else torch.cat((old, new), dim=1)[:, -mem_len:],
    )  # fmt: skip


@mutant("gradients.tied", "gpt2/plain", "the head is a copy of the table: its share of the gradient is lost")
def _(patch: pytest.MonkeyPatch) -> None:
    right = GPT2.__init__

    def untied(model: Any, *arguments: Any, **more: Any) -> None:
        right(model, *arguments, **more)
        model.lm_head.forward = lambda x: torch.nn.functional.linear(x, model.transformer.wte.weight.detach())

    patch.setattr(GPT2, "__init__", untied)


# --- determinism, round trip -----------------------------------------------------------------------------------------


@mutant("determinism.repeat", "llama/plain", "a buffer of the last call is mixed in, at 1e-15")
def _(_: Any) -> Any:
    calls: list[int] = []

    def answer(run: Any, ids: Tensor, mask: Tensor) -> Tensor:
        calls.append(0)
        return run() * (1 + 1e-15 * len(calls))  # type: ignore[no-any-return]

    return Around(answer)


@mutant("determinism.eval", "gpt2/plain", "what dropout would keep is scaled, in evaluation too")
def _(_: Any) -> Any:
    class Scaled:
        families = frozenset({"gpt2"})

        def load(self, checkpoint: Any) -> Any:
            right = Reference("eager").load(checkpoint)
            return lambda input_ids: right(input_ids)["logits"] / (1 - checkpoint.config["resid_pdrop"])

    return Scaled()


@mutant("determinism.threads", "llama/plain", "a sum that depends on how many threads there are")
def _(_: Any) -> Any:
    return Around(lambda run, ids, mask: run() * (1 + 1e-6 * torch.get_num_threads()))


@mutant("round_trip.parameters", "llama/plain", "gate and up are exchanged among the parameters")
def _(_: Any) -> Any:
    def swapped(name: str) -> str:
        return name.replace("gate_", "X").replace("up_", "gate_").replace("X", "up_")

    class Exchanged:
        families = frozenset({"llama"})

        def load(self, checkpoint: Any) -> Any:
            model = Reference("eager").load(checkpoint)
            model.parameters = {swapped(name): tensor for name, tensor in model.parameters.items()}
            return model

    return Exchanged()


@mutant("round_trip.parameters", "gpt2/plain", "projections are stored transposed")
def _(_: Any) -> Any:
    class Transposed:
        families = frozenset({"gpt2"})

        def load(self, checkpoint: Any) -> Any:
            model = Reference("eager").load(checkpoint)
            model.parameters = {n: t.T if n.endswith("c_attn.weight") else t for n, t in model.parameters.items()}
            return model

    return Transposed()


# --- generation ------------------------------------------------------------------------------------------------------


class Generating:
    """The reference, whose `greedy` does something else."""

    families = frozenset({"llama", "gpt2", "mistral"})

    def __init__(self, greedy: Callable[..., list[list[int]]]):
        self.greedy = greedy

    def load(self, checkpoint: Any) -> Any:
        model = Reference("eager").load(checkpoint)
        model.greedy = functools.partial(self.greedy, model, model.greedy)
        return model


@mutant("generation.greedy", "gpt2/plain", "prompts are padded on the right, and continued behind the padding")
def _(_: Any) -> Any:
    def greedy(model: Any, right: Any, ids: Tensor, mask: Tensor, new: int, stop: int | None) -> list[list[int]]:
        width = mask.sum(1).max()
        rows = [
            torch.nn.functional.pad(row[real], (0, width - real.sum()))
            for row, real in zip(ids, mask.bool(), strict=True)
        ]
        text, found = torch.stack(rows), []
        for _ in range(new):
            found.append(model(text)["logits"][:, -1].argmax(-1))
            text = torch.cat([text, found[-1][:, None]], dim=1)
        return torch.stack(found, dim=1).tolist()  # type: ignore[no-any-return]

    return Generating(greedy)


@mutant("generation.greedy", "llama/plain", "padding is attended to")
def _(_: Any) -> Any:
    return Generating(lambda model, right, ids, mask, new, stop: right(ids, torch.ones_like(mask), new, stop))


@mutant("generation.greedy", "llama/plain", "the prompt's last token is fed twice")
def _(_: Any) -> Any:
    def greedy(model: Any, right: Any, ids: Tensor, mask: Tensor, new: int, stop: int | None) -> list[list[int]]:
        return right(torch.cat([ids, ids[:, -1:]], 1), torch.cat([mask, mask[:, -1:]], 1), new, stop)  # type: ignore[no-any-return]

    return Generating(greedy)


@mutant("generation.stop_token", "llama/plain", "the stop token is left out")
def _(_: Any) -> Any:
    def greedy(model: Any, right: Any, ids: Tensor, mask: Tensor, new: int, stop: int | None) -> list[list[int]]:
        return [row[:-1] if row[-1] == stop else row for row in right(ids, mask, new, stop)]

    return Generating(greedy)


@mutant("generation.stop_token", "llama/plain", "the first row that stops ends all")
def _(_: Any) -> Any:
    def greedy(model: Any, right: Any, ids: Tensor, mask: Tensor, new: int, stop: int | None) -> list[list[int]]:
        rows = right(ids, mask, new, stop)
        return [row[: min(map(len, rows))] for row in rows]

    return Generating(greedy)


@mutant("generation.stop_token", "gpt2/plain", "the stop token is ignored")
def _(_: Any) -> Any:
    return Generating(lambda model, right, ids, mask, new, stop: right(ids, mask, new, None))


# --- what config.json and files may say in other ways ----------------------------------------------------------------


@mutant("sensitivity.fractions", "llama/plain", "the base is read as an integer")
def _(patch: pytest.MonkeyPatch) -> None:
    right = rotary.inverse_frequencies
    patch.setattr(rotary, "inverse_frequencies", lambda width, theta, scaling=None: right(width, int(theta), scaling))


@mutant("invariance.spelling", "mistral/plain", "`type` is not read, and the scaling ignored")
def _(patch: pytest.MonkeyPatch) -> None:
    right = rotary.read_scaling
    patch.setattr(
        rotary, "read_scaling", lambda found, *more: right(found, *more) if "rope_type" in found else None
    )  # fmt: skip


@mutant("invariance.absent", "llama/distinct", "an absent rms_norm_eps is 0.1")
def _(_: Any) -> Any:
    class Other:
        families = frozenset({"llama"})

        def load(self, checkpoint: Any) -> Any:
            config = {"rms_norm_eps": 0.1, **json.loads((checkpoint.path / "config.json").read_text())}
            (checkpoint.path / "config.json").write_text(json.dumps(config))
            return Reference("eager").load(checkpoint)

    return Other()


@mutant("round_trip.storage", "gpt2/plain", "float16 is read as bfloat16")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(stored_tensors.READABLE_DTYPES, "F16", torch.bfloat16)


@mutant("invariance.loss", "llama/plain", "the last id of the vocabulary is taken for padding")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        loss, "token_loss",
        lambda logits, labels: torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=logits.shape[-1] - 1
        ),
    )  # fmt: skip


# --- what no ordinary case shows -------------------------------------------------------------------------------------


@mutant("gradients.auxiliary", "mixtral/plain", "the balance loss has no gradient")
def _(patch: pytest.MonkeyPatch) -> None:
    right = moe.load_balancing_loss
    patch.setattr(mixtral, "load_balancing_loss", lambda *arguments: right(*arguments).detach())


@mutant("invariance.layer_scale", "gpt2/plain", "the third block's scores are divided as the second's")
def _(patch: pytest.MonkeyPatch) -> None:
    right = gpt2.score_scale
    patch.setattr(gpt2, "score_scale", lambda config, layer: right(config, min(layer, 1)))


def _one_is_none(patch: pytest.MonkeyPatch) -> None:
    right = masks.visible_in_rows

    def visible_in_rows(tokens: Any, *, num_queries: int, sliding_window: int | None = None) -> Any:
        return right(tokens, num_queries=num_queries, sliding_window=None if sliding_window == 1 else sliding_window)

    patch.setattr(masks, "visible_in_rows", visible_in_rows)


mutant("invariance.narrow_window", "mistral/plain", "a window of 1 is taken for none")(_one_is_none)


@mutant("invariance.narrow_window", "sliding_window_attention/plain", "one key more than the window holds is shown")
def _(patch: pytest.MonkeyPatch) -> None:
    right = masks.visible_in_rows

    def visible_in_rows(tokens: Any, *, num_queries: int, sliding_window: int | None = None) -> Any:
        fits = sliding_window is not None and tokens.place.shape[1] <= sliding_window + 1
        return right(tokens, num_queries=num_queries, sliding_window=None if fits else sliding_window)

    patch.setattr(masks, "visible_in_rows", visible_in_rows)


def _alone_is_sharper(patch: pytest.MonkeyPatch) -> None:
    right, dot = attention.attention_scores, sequence_attention.raw_scores
    patch.setattr(
        multi_head_attention, "attention_scores", lambda query, key: right(query, key) * (1 + (query.shape[2] == 1))
    )
    patch.setattr(
        sequence_attention,
        "raw_scores",
        lambda score, query, *more: dot(score, query, *more) * (1 + (query.shape[1] == 1)),
    )


for _case in ("multi_head_attention/plain", "sliding_window_attention/plain", "luong_attention/plain"):
    mutant("invariance.one_query", _case, "the scores of a single query are doubled")(_alone_is_sharper)


@mutant("causality.prefix", "relative_attention/plain", "distances are counted from the end of what is given")
def _(patch: pytest.MonkeyPatch) -> None:
    right = relative_attention.relative_attention

    def wrong(x: Tensor, distances: Tensor, *weights: Tensor, memory: Tensor | None = None, **named: Tensor) -> Any:
        keys = x.shape[1] + (0 if memory is None else memory.shape[1])
        return right(x, distances[-keys:], *weights, memory=memory, **named)

    patch.setattr(relative_attention, "relative_attention", functools.wraps(right)(wrong))


@mutant("invariance.order", "rotary/plain", "positions are taken in rising order")
def _(patch: pytest.MonkeyPatch) -> None:
    right = rotary.tables
    patch.setattr(
        rotary, "tables", lambda positions, *more, **named: right(positions.sort(dim=-1).values, *more, **named)
    )


@mutant("invariance.exact_table", "learned_positions/plain", "the last row of the table is never used")
def _(patch: pytest.MonkeyPatch) -> None:
    right = absolute_positions.learned_positions

    def wrong(x: Tensor, weight: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return right(x, torch.cat([weight[:-1], weight[-2:-1]]), attention_mask)

    patch.setattr(absolute_positions, "learned_positions", wrong)


@mutant("invariance.kept_state", "lstm/plain", "the cell is clipped to ±3")
def _(patch: pytest.MonkeyPatch) -> None:
    right = recurrent_cells.lstm_step

    def lstm_step(*arguments: Any) -> Any:
        (hidden, cell), gates = right(*arguments)
        return (hidden, cell.clamp(-3, 3)), gates

    patch.setattr(recurrent_cells, "lstm_step", lstm_step)


@mutant("invariance.kept_state", "gru/plain", "the state is clipped to ±1")
def _(patch: pytest.MonkeyPatch) -> None:
    right = recurrent_cells.gru_mix
    patch.setattr(recurrent_cells, "gru_mix", lambda z, n, h: right(z, n, h).clamp(-1, 1))


@mutant("batching.decoding", "llama/plain", "a call without a mask shows the padding of the calls before it")
def _(patch: pytest.MonkeyPatch) -> None:
    right = KVCache.tokens

    def tokens(cache: KVCache, real: Tensor) -> Any:
        if getattr(cache, "maskless", False) and cache.real is not None:
            cache.real = torch.ones_like(cache.real)
        return right(cache, real)

    feed = Session.feed

    def told(session: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        session._cache.maskless = attention_mask is None
        return feed(session, input_ids, attention_mask)

    patch.setattr(KVCache, "tokens", tokens)
    patch.setattr(Session, "feed", told)
