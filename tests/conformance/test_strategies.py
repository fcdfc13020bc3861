"""Strategies draw what they say, and what is made of an example is the same everywhere."""

from typing import Any

import pytest
import torch
from hypothesis import given

from conformance import strategies
from conformance.strategies import describe, different_ids, in_order, junk, padding_ids, token_ids

LONGEST = 9


@given(strategies.texts(LONGEST, shortest=2, rows=3))
def test_texts(example: Any) -> None:
    assert 1 <= example["batch"] <= 3
    assert 2 <= example["length"] <= LONGEST


@given(strategies.changed_texts(LONGEST))
def test_changed_token_is_in_the_text(example: Any) -> None:
    assert 0 <= example["at"] < example["length"] <= LONGEST


@given(strategies.rows_of_texts(LONGEST))
def test_row_is_in_the_batch(example: Any) -> None:
    assert 0 <= example["row"] < example["batch"]
    assert example["batch"] >= 2


@given(strategies.permuted_texts(LONGEST))
def test_order_is_a_permutation(example: Any) -> None:
    assert sorted(example["order"]) == list(range(len(example["order"])))
    assert len(example["order"]) >= 2


@given(strategies.ragged_texts(LONGEST))
def test_ragged_rows_fit_the_width(example: Any) -> None:
    assert min(example["lengths"]) >= 1
    assert max(example["lengths"]) + example["extra"] <= LONGEST
    assert example["side"] in ("left", "right")


@given(strategies.plans(LONGEST))
def test_plan_feeds_at_most_the_longest_text(example: Any) -> None:
    assert min(example["plan"]) >= 1
    assert sum(example["plan"]) <= LONGEST


@given(strategies.packed_texts(LONGEST))
def test_packed_texts_fill_the_row(example: Any) -> None:
    assert min(example["lengths"]) >= 1
    assert sum(example["lengths"]) == LONGEST


@given(strategies.ragged_plans(LONGEST, 3))
def test_ragged_plan_feeds_the_padded_prompts(example: Any) -> None:
    assert sum(example["plan"]) == max(example["lengths"]) + example["extra"] <= LONGEST - 3


@given(strategies.ragged_prompts(LONGEST, 3))
def test_ragged_prompts_leave_room_for_new_tokens(example: Any) -> None:
    assert max(example["lengths"]) + example["extra"] + 3 <= LONGEST
    assert len(example["lengths"]) >= 2


@given(strategies.interleaved(LONGEST))
def test_interleaved_texts_differ(example: Any) -> None:
    assert example["ids"] != example["other"]


def test_ids_leave_room_for_junk() -> None:
    vocab = 37
    ids, pads = token_ids(5, 40, 30, vocab), padding_ids(5, 40, 30, vocab)
    assert set(ids.unique().tolist()) == set(range(vocab - junk(vocab)))
    assert set(pads.unique().tolist()) == set(range(vocab - junk(vocab), vocab))


def test_ids_are_the_same_on_every_machine() -> None:
    assert token_ids(0, 1, 6, 61).tolist() == token_ids(0, 1, 6, 61).tolist()
    assert token_ids(0, 1, 60, 61).tolist() != token_ids(1, 1, 60, 61).tolist()


def test_different_ids_are_all_different() -> None:
    ids = different_ids(3, 20, 37)
    assert len(ids.unique()) == 20
    with pytest.raises(ValueError, match="38 different ids were asked for, the vocabulary has 37"):
        different_ids(3, 38, 37)


def test_floats_have_the_deviation_and_are_exact_in_bfloat16() -> None:
    drawn = strategies.floats(0, "x", (100, 100), 0.7)
    assert drawn.std().item() == pytest.approx(0.7, rel=0.02)
    assert drawn.to(torch.bfloat16).float().equal(drawn)


def test_description_says_every_key_in_a_fixed_order() -> None:
    assert describe(in_order({"ids": 3, "length": 4, "batch": 2})) == "rows: 2, tokens a row: 4, ids from seed 3"
    assert describe({"plan": [1, 2], "unheard": 1}) == "calls of 1, 2 tokens, unheard 1"
