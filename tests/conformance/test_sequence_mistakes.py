"""Mistakes in RNNsearch and GNMT fail, are named, and are found at their first wrong tensor.

Each is a patch of one function of the reference.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reference_impl.models.gnmt as gnmt
import reference_impl.models.rnn_search as rnn_search
from conformance.implementations.reference import Reference
from conformance.judge import Result
from judged import check
from reference_impl.nn import recurrent, recurrent_cells, sequence_attention, sequence_session

Mistake = tuple[Any, str, Callable[..., Any]]

RNN_SEARCH: dict[str, tuple[Mistake, str, str | None]] = {
    "deep output reads s_i": (
        (rnn_search, "read_state", lambda before, after: after),
        "decoder.pieces",
        "s_i in the deep output, where the appendix has s_{i-1}",
    ),
    "update gate flipped": (
        (recurrent_cells, "gru_mix", lambda z, n, h: z * n + (1 - z) * h),
        "encoder.layers.0.forward",
        "the update gates the other way round, as the paper writes them",
    ),
    "maxout over halves": (
        (rnn_search, "maxout", lambda pieces: torch.maximum(*pieces.chunk(2, dim=-1))),
        "decoder.maxout",
        "maxout over the halves, not over neighbours",
    ),
    "s_0 from the forward direction": (
        (rnn_search, "first_backward", lambda found: found.final[0][0]),
        "decoder.initial_state",
        "s_0 from the forward state",
    ),
    "context before the word": (
        (rnn_search, "step_input", lambda word, context: torch.cat([context, word], dim=-1)),
        "decoder.steps.0.state",
        None,
    ),
}

GNMT: dict[str, tuple[Mistake, str, str | None]] = {
    "no residual connections": (
        (gnmt, "residual", lambda number, below, hidden: hidden),
        "encoder.layers.2.output",
        "no residual connections",
    ),
    "residual connections one layer later": (
        (gnmt, "residual", lambda number, below, hidden: hidden + below if number > 3 else hidden),
        "encoder.layers.2.output",
        "residual connections from the fourth layer on",
    ),
    "the search with the cell state": (
        (gnmt, "search_query", lambda before: before[1]),
        "decoder.steps.1.cross_attention.scores",
        None,
    ),
    "context before the input": (
        (gnmt, "with_context", lambda x, context: torch.cat([context, x], dim=-1)),
        "decoder.steps.0.state",
        None,
    ),
}

CASES = [
    pytest.param(family, *found, id=f"{family}: {name}")
    for family, mistakes in (("rnn_search", RNN_SEARCH), ("gnmt", GNMT))
    for name, found in mistakes.items()
]
families = pytest.mark.parametrize("family", ["rnn_search", "gnmt"])


def judged(family: str, case: str, claim: str) -> Result:
    return check(Reference("eager"), f"{family}/{case}", claim)


@pytest.mark.parametrize(("family", "mistake", "first_wrong", "label"), CASES)
def test_a_mistake_is_found_and_named(
    family: str, mistake: Mistake, first_wrong: str, label: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*mistake)
    result = judged(family, "distinct", "golden.logits")
    assert result.outcome == "fail"
    assert result.divergence is not None
    assert result.divergence["first_wrong"] == first_wrong
    assert judged(family, "plain", "golden.logits").equals == label


PADDING: dict[str, Mistake] = {
    "softmax over the pads": (sequence_attention, "masked_softmax", lambda scores, mask: scores.softmax(-1)),
    "states run over the pads": (recurrent, "real_rows", lambda t, real: None),
}


@families
@pytest.mark.parametrize("mistake", PADDING.values(), ids=PADDING)
@pytest.mark.parametrize("claim", ["golden.left_padding", "golden.right_padding", "cache.ragged"])
def test_a_mistake_with_pads_fails_where_there_are_pads(
    family: str, mistake: Mistake, claim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*mistake)
    assert judged(family, "plain", "golden.logits").outcome == "pass"
    assert judged(family, "plain", claim).outcome == "fail"


@families
def test_a_state_that_is_not_carried_is_found_in_the_second_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def feed(self: Any, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return sequence_session.decode(self._decoder, ids, attention_mask, self._source, self._state)[0]

    monkeypatch.setattr(sequence_session.Session, "feed", feed)
    assert judged(family, "distinct", "golden.logits").outcome == "pass"
    result = judged(family, "distinct", "cache.one_by_one")
    assert result.outcome == "fail"
    assert result.divergence is not None
    assert result.divergence["first_wrong"] == "decoder.steps.1.cross_attention.scores"
