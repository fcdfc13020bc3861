"""Mistakes of caches, written into implementations that share no code with the reference, are named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from candidates import LAYOUTS, batch_first, fused_sdpa, heads_first
from conformance.cases import Case, Claim
from conformance.implementation import adopt
from conformance.judge import Judge, Result, judge
from conformance.suite import checks

CASE = Case("llama/distinct")


def judged(layout: str, check: str) -> Result:
    found = adopt("", LAYOUTS[layout](mistake=None))
    return judge(checks()[check], Claim(CASE.name, check, "float64"), lambda: Judge(found, CASE, "float64", "cpu"))


def values_not_kept(self: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Only the keys were thought of; what values are missing is filled up."""
    past = 0 if self.keys is None else self.keys.shape[1]
    self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=1)
    self.values = torch.cat([values[:, :1].expand(-1, past, -1, -1), values], dim=1)
    return self.keys, self.values


def grown_by_what_is_needed(self: Any, real: Tensor, dtype: torch.dtype) -> None:
    """A new buffer each time, and what the old one held is left there."""
    self.real = real if self.real is None else torch.cat((self.real, real), dim=1)
    self.length += real.shape[1]
    shape = self.shape
    self.store = torch.zeros(self.layers, 2, len(real), shape.kv_heads, self.length, shape.head_dim, dtype=dtype)


def rows_of_the_first(right: Callable[..., Any]) -> Callable[..., Any]:
    """Batch rows share the first one's cached keys, their values are their own."""

    def attention(h: Any, w: Any, name: str, x: Tensor, tables: Any, mask: Tensor, past: Any) -> Any:
        if past is not None:
            past = tuple(t[:1].expand_as(t) for t in past)
        return right(h, w, name, x, tables, mask, past)

    return attention


# Mistake -> layout, what is replaced in it, by what, and the entry.
MISTAKES: dict[str, tuple[str, Any, str, Any, str]] = {
    "values not kept": ("batch_first", batch_first.Memory, "append", values_not_kept, "cache-values-not-kept"),
    "an empty buffer each time": (
        "fused_sdpa", fused_sdpa.KVCache, "reserve", grown_by_what_is_needed, "cache-written-as-zeros"),
    "rows of the first": ("heads_first", heads_first, "attention", rows_of_the_first(heads_first.attention),
                          "cache-rows-mixed"),
}  # fmt: skip


@pytest.mark.parametrize("check", ["cache.prefill_decode", "cache.chunks"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_a_cache_is_named(mistake: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, owner, attribute, wrong, entry = MISTAKES[mistake]
    assert judged(layout, check).outcome == "pass"
    monkeypatch.setattr(owner, attribute, wrong)
    result = judged(layout, check)
    assert result.outcome == "fail"
    assert result.diagnosis is not None
    assert (result.diagnosis["kind"], result.diagnosis["id"]) == ("mistake", entry)
    assert result.diagnosis["reproduced_to"] <= 1e-9
