"""Multi-head, sliding-window and relative attention: known mistakes fail, a right function passes every claim.

The ids are those of the catalogue of mistakes. A mistake is a change of one step of the functions written here.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from judged import Function, not_passed, outputs

# --- multi_head_attention, in steps that a mistake replaces


def split(x: Tensor, heads: int) -> Tensor:
    return torch.stack(x.chunk(heads, -1), 1)


def repeat(x: Tensor, heads: int) -> Tensor:
    return x[:, [h * x.shape[1] // heads for h in range(heads)]]


def scale(scores: Tensor, head_dim: int, **_sizes: int) -> Tensor:
    return scores / head_dim**0.5


def see(queries: int, keys: int, causal: bool, real: Tensor) -> Tensor:
    """(batch, queries, keys)"""
    seen = real[:, None, :].expand(-1, queries, -1)
    return seen & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if causal else seen


def soften(scores: Tensor, seen: Tensor) -> Tensor:
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return wide.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0).to(scores.dtype)


def merge(x: Tensor) -> Tensor:
    return torch.cat(x.unbind(1), -1)


def attention(**steps: Callable[..., Any]) -> Function:
    """Multi-head attention with some steps replaced."""
    do = {"split": split, "repeat": repeat, "scale": scale, "see": see, "soften": soften, "merge": merge} | steps

    def multi_head_attention(
        query: Tensor, key: Tensor, value: Tensor, q_proj_weight: Tensor, q_proj_bias: Tensor, k_proj_weight: Tensor,
        k_proj_bias: Tensor, v_proj_weight: Tensor, v_proj_bias: Tensor, out_proj_weight: Tensor,
        out_proj_bias: Tensor, num_attention_heads: int, num_key_value_heads: int, causal: bool,
        attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        q = do["split"](query @ q_proj_weight.mT + q_proj_bias, num_attention_heads)
        k = do["split"](key @ k_proj_weight.mT + k_proj_bias, num_key_value_heads)
        v = do["split"](value @ v_proj_weight.mT + v_proj_bias, num_key_value_heads)
        k, v = do["repeat"](k, num_attention_heads), do["repeat"](v, num_attention_heads)
        real = torch.ones(key.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask == 1
        seen = do["see"](query.shape[1], key.shape[1], causal, real)[:, None]
        scores = do["scale"](q @ k.mT, q.shape[-1], hidden=query.shape[-1], heads=num_attention_heads)
        weights = do["soften"](scores, seen)
        context = do["merge"](weights @ v)
        y = context @ out_proj_weight.mT + out_proj_bias
        return {"y": y, "scores": scores, "weights": weights, "context": context}

    return multi_head_attention


def without(*names: str) -> Function:
    """These biases left out."""

    def multi_head_attention(**given: Any) -> Any:
        return attention()(**given | {name: torch.zeros_like(given[name]) for name in names})

    return multi_head_attention


def keys_and_values_swapped(**given: Any) -> Any:
    k = {n: t for n, t in given.items() if n.startswith("k_")}
    v = {n: t for n, t in given.items() if n.startswith("v_")}
    return attention()(**given | {n.replace("k_", "v_", 1): t for n, t in k.items()}
                       | {n.replace("v_", "k_", 1): t for n, t in v.items()})  # fmt: skip


def masked_afterwards(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.softmax(-1) * seen


def filled_with(number: float) -> Function:
    return lambda scores, seen: scores.masked_fill(~seen, number).softmax(-1)


def added(scores: Tensor, seen: Tensor) -> Tensor:
    """Two masks of the lowest number on top of each other."""
    lowest = torch.finfo(scores.dtype).min
    return (scores + torch.where(seen, 0.0, lowest) + torch.where(seen, 0.0, lowest)).softmax(-1)


def shifted_diagonal(by: int) -> Function:
    def shifted(queries: int, keys: int, causal: bool, real: Tensor) -> Tensor:
        seen = real[:, None, :].expand(-1, queries, -1)
        return seen & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries + by) if causal else seen

    return shifted


def top_left(queries: int, keys: int, causal: bool, real: Tensor) -> Tensor:
    return real[:, None, :] & torch.ones(queries, keys, dtype=torch.bool).tril()


def upside_down(queries: int, keys: int, causal: bool, real: Tensor) -> Tensor:
    return real[:, None, :] & torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries)


MULTI_HEAD: dict[str, tuple[Function, str]] = {
    "heads-split-by-view": (attention(split=lambda x, h: x.reshape(len(x), h, x.shape[1], -1)), "plain"),
    "heads side by side the wrong way": (attention(merge=lambda x: x.permute(0, 2, 3, 1).flatten(2)), "plain"),
    "attn-scale-nheads": (attention(scale=lambda s, head_dim, hidden, heads: s / heads**0.5), "plain"),
    "attn-scale missing": (attention(scale=lambda s, head_dim, **_: s), "plain"),
    "attn-scale twice": (attention(scale=lambda s, head_dim, **_: s / head_dim), "plain"),
    "attn-scale inverted": (attention(scale=lambda s, head_dim, **_: s * head_dim**0.5), "plain"),
    "head-dim-derived": (attention(scale=lambda s, head_dim, hidden, heads: s / (hidden // heads) ** 0.5), "head_dim"),
    "gqa-tile": (attention(repeat=lambda x, h: x.repeat(1, h // x.shape[1], 1, 1)), "field-num_key_value_heads"),
    "gqa-kv-index": (
        attention(repeat=lambda x, h: x[:, [i // x.shape[1] % x.shape[1] for i in range(h)]]),
        "field-num_key_value_heads",
    ),
    "qkv-k-v-swapped": (keys_and_values_swapped, "plain"),
    "ffn-or-qkv-bias-dropped, q": (without("q_proj_bias"), "plain"),
    "ffn-or-qkv-bias-dropped, v": (without("v_proj_bias"), "plain"),
    "ffn-or-qkv-bias-dropped, out": (without("out_proj_bias"), "plain"),
    "causal-diagonal-shift, future": (attention(see=shifted_diagonal(1)), "field-causal"),
    "causal-mask-inverted": (attention(see=upside_down), "field-causal"),
    "causal-mask-dropped": (attention(see=lambda q, k, c, real: see(q, k, False, real)), "padding"),
    "mask-top-left": (attention(see=top_left), "distinct"),
    "mask-bool-polarity": (attention(see=lambda q, k, c, real: see(q, k, c, ~real)), "cross"),
    "padding ignored": (attention(see=lambda q, k, c, real: see(q, k, c, real | True)), "cross"),
    "cross-mask-causal": (attention(see=lambda q, k, c, real: see(q, k, True, real)), "cross"),
    "s2s-mask-after-softmax": (attention(soften=masked_afterwards), "padding"),
    "mask-fill-too-small, 0": (attention(soften=filled_with(0.0)), "padding"),
    "mask-fill-too-small, -1e4": (attention(soften=filled_with(-1e4)), "large"),
}


def test_right_multi_head_attention_passes_every_claim() -> None:
    assert not_passed(attention(), "multi_head_attention") == {}


@pytest.mark.parametrize("mistake", MULTI_HEAD)
def test_multi_head_mistake_fails(mistake: str) -> None:
    function, case = MULTI_HEAD[mistake]
    result = outputs(function, f"multi_head_attention/{case}")
    assert (result.outcome, result.kind) == ("fail", "value")


def test_own_token_hidden_gives_no_number_for_the_first_query() -> None:
    hidden = attention(see=shifted_diagonal(-1), soften=lambda s, seen: s.masked_fill(~seen, -torch.inf).softmax(-1))
    assert outputs(hidden, "multi_head_attention/field-causal").kind == "not finite"


def test_no_number_for_queries_of_padding_that_see_nothing_is_passed() -> None:
    """They are not compared; in rows that see a key, the −∞ that two masks add up to is as good as one mask."""
    assert outputs(attention(soften=added), "multi_head_attention/left-padding").outcome == "pass"


def test_key_bias_is_invisible() -> None:
    """It adds one number to a whole row of scores: an equivalent mutant at y, and wrong at the scores."""
    dropped = without("k_proj_bias")
    assert outputs(lambda **given: dropped(**given)["y"], "multi_head_attention/plain").outcome == "pass"
    assert outputs(dropped, "multi_head_attention/plain").message == "scores differ from the oracle's"


def test_ignored_causality_is_named() -> None:
    dropped = attention(see=lambda q, k, c, real: see(q, k, False, real))
    assert outputs(dropped, "multi_head_attention/field-causal").equals == "causal ignored"


def test_index_of_shared_heads_is_right_by_luck_with_one_key_value_head() -> None:
    function, _ = MULTI_HEAD["gqa-tile"]
    assert outputs(function, "multi_head_attention/mqa").outcome == "pass"


# --- sliding_window_attention


def windowed(seen: Callable[[Tensor, int], Tensor]) -> Function:
    """seen: how far back each key lies from each query (negative: after it), window -> which keys are seen."""

    def sliding_window_attention(query: Tensor, key: Tensor, value: Tensor, sliding_window: int) -> Tensor:
        queries, keys = query.shape[2], key.shape[2]
        back = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        scores = query @ repeat(key, query.shape[1]).mT / query.shape[-1] ** 0.5
        return soften(scores, seen(back, sliding_window)) @ repeat(value, query.shape[1])

    return sliding_window_attention


def from_the_first_query(query: Tensor, key: Tensor, value: Tensor, sliding_window: int) -> Tensor:
    """The queries are taken for the first of the tokens."""
    queries = query.shape[2]
    return windowed(lambda back, w: (back >= 0) & (back < w))(
        query, key[:, :, :queries], value[:, :, :queries], sliding_window
    )


SLIDING: dict[str, tuple[Function, str]] = {
    "window-off-by-one, wide": (windowed(lambda back, w: (back >= 0) & (back <= w)), "field-sliding_window"),
    "window-off-by-one, narrow": (windowed(lambda back, w: (back >= 0) & (back < max(1, w - 1))), "distinct"),
    "window-ignored": (windowed(lambda back, w: back >= 0), "field-sliding_window"),
    "window-mask-direction": (windowed(lambda back, w: (back >= 0) & (back > -w)), "field-sliding_window"),
    "window on both sides": (windowed(lambda back, w: back.abs() < w), "field-sliding_window"),
    "window of one sees all": (windowed(lambda back, w: (back >= 0) & ((back < w) | (w == 1))), "one"),
    "mask-top-left": (from_the_first_query, "distinct"),
    "blocks instead of a sliding window": (
        windowed(lambda back, w: (back >= 0) & (torch.arange(len(back))[:, None] // w == torch.arange(len(back)) // w)),
        "field-sliding_window",
    ),
}


def test_right_sliding_window_passes_every_claim() -> None:
    assert not_passed(windowed(lambda back, w: (back >= 0) & (back < w)), "sliding_window_attention") == {}


@pytest.mark.parametrize("mistake", SLIDING)
def test_sliding_window_mistake_fails(mistake: str) -> None:
    function, case = SLIDING[mistake]
    assert outputs(function, f"sliding_window_attention/{case}").outcome == "fail"


@pytest.mark.parametrize(
    ("mistake", "label"),
    [
        ("window-ignored", "sliding_window ignored"),
        ("window-off-by-one, wide", "sliding_window one key too wide"),
        ("window-off-by-one, narrow", "sliding_window one key too narrow"),
    ],
)
def test_wrong_window_is_named(mistake: str, label: str) -> None:
    function, _ = SLIDING[mistake]
    assert outputs(function, "sliding_window_attention/field-sliding_window").equals == label


# --- relative_attention


def by_distance(scores: Tensor) -> Tensor:
    """From (…, queries, distances), distance 0 first, to (…, queries, keys); 0 after the query."""
    queries, keys = scores.shape[-2:]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return scores.gather(-1, distance.clamp(min=0).expand_as(scores)).masked_fill(distance < 0, 0.0)


def padded_and_cut(keep: slice) -> Callable[[Tensor], Tensor]:
    """The shift by padding a column, reading in other rows and cutting one: right with [1:]."""

    def shift(scores: Tensor) -> Tensor:
        *batch, queries, keys = scores.shape
        falling = torch.cat((scores.new_zeros(*batch, queries, 1), scores.flip(-1)), -1)
        return falling.reshape(*batch, keys + 1, queries)[..., keep, :].reshape(*batch, queries, keys)

    return shift


def relative(
    shift: Callable[[Tensor], Tensor] = by_distance,
    mask: Callable[[int, int], Tensor] = lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q),
    scale: Callable[[int], float] = lambda head_dim: head_dim**-0.5,
    biases: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda u, v: (u, v),
) -> Function:
    def relative_attention(
        x: Tensor, distances: Tensor, q_proj_weight: Tensor, k_proj_weight: Tensor, v_proj_weight: Tensor,
        r_proj_weight: Tensor, o_proj_weight: Tensor, content_bias: Tensor, position_bias: Tensor,
        num_attention_heads: int, memory: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        u, v = biases(content_bias[:, None], position_bias[:, None])
        known = x if memory is None else torch.cat((memory, x), 1)
        q = split(x @ q_proj_weight.mT, num_attention_heads)
        k, values = (split(known @ w.mT, num_attention_heads) for w in (k_proj_weight, v_proj_weight))
        r = split((distances[: known.shape[1]] @ r_proj_weight.mT)[None], num_attention_heads)
        factor, seen = scale(q.shape[-1]), mask(x.shape[1], known.shape[1])
        content = (q + u) @ k.mT * factor
        position = shift((q + v) @ r.mT * factor)
        weights = soften(content + position, seen)
        context = merge(weights @ values)
        return {"y": context @ o_proj_weight.mT, "content_scores": content, "weights": weights, "context": context}

    return relative_attention


def memory_ignored(memory: Tensor | None = None, **given: Any) -> Tensor:
    return relative()(**given)["y"]


def memory_alone(memory: Tensor, **given: Any) -> Tensor:
    """The segment's own keys are left out but for the last row's."""
    return relative(mask=lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(0))(memory=memory, **given)["y"]


def distances_reversed(distances: Tensor, **given: Any) -> Tensor:
    return relative()(distances=distances.flip(0), **given)["y"]


RELATIVE: dict[str, tuple[Function, str]] = {
    "txl-rel-shift-slice": (relative(padded_and_cut(slice(None, -1))), "memory"),
    "txl-rel-shift missing": (relative(lambda scores: scores.flip(-1)), "memory"),
    "txl-u-v-swapped": (relative(biases=lambda u, v: (v, u)), "memory"),
    "txl-u-v-missing, u": (relative(biases=lambda u, v: (u * 0, v)), "plain"),
    "txl-u-v-missing, v": (relative(biases=lambda u, v: (u, v * 0)), "plain"),
    "txl-u-v, both the same": (relative(biases=lambda u, v: (u, u)), "plain"),
    "txl-mask-memory-offset": (memory_alone, "memory"),
    "txl-mask, first place of memory hidden": (
        relative(mask=lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q).triu(1)),
        "memory",
    ),
    "txl-same-length": (
        relative(mask=lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q).triu(0)),
        "memory",
    ),
    "memory ignored": (memory_ignored, "memory"),
    "distances from far to near": (distances_reversed, "memory"),
    "attn-scale missing": (relative(scale=lambda head_dim: 1.0), "plain"),
}


@pytest.mark.parametrize("shift", [by_distance, padded_and_cut(slice(1, None))])
def test_right_relative_attention_passes_every_claim(shift: Callable[[Tensor], Tensor]) -> None:
    assert not_passed(relative(shift), "relative_attention") == {}


@pytest.mark.parametrize("mistake", RELATIVE)
def test_relative_attention_mistake_fails(mistake: str) -> None:
    function, case = RELATIVE[mistake]
    assert outputs(function, f"relative_attention/{case}").outcome == "fail"
