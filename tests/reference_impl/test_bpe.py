"""Merging: the order of Algorithm 1, in less than its n² steps."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from reference_impl.tokenizer.bpe import merge


def merged_by_the_book(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """All pairs are looked at before each merge; the best rank, of equal ones the leftmost."""
    symbols = list(word)
    while True:
        found = [(ranks[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in ranks]
        if not found:
            return symbols
        at = min(found)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


pieces = st.text("ab", min_size=1, max_size=4)
# Ranks are drawn, not trained: equal ones, and merges whose parts can never be made.
any_ranks = st.dictionaries(st.tuples(pieces, pieces), st.integers(0, 5), max_size=16)


@given(st.text("ab", max_size=24), any_ranks)
def test_equals_algorithm_1(word: str, ranks: dict[tuple[str, str], int]) -> None:
    assert merge(word, lambda left, right: ranks.get((left, right))) == merged_by_the_book(word, ranks)


@given(st.text("ab", max_size=24), st.dictionaries(pieces, st.integers(0, 5), max_size=16))
def test_equals_algorithm_1_where_the_union_is_ranked(word: str, scores: dict[str, int]) -> None:
    """Two pairs with one union have one rank, as SentencePiece's scores give it."""
    every = {(p[:cut], p[cut:]): rank for p, rank in scores.items() for cut in range(1, len(p))}
    assert merge(word, lambda left, right: scores.get(left + right)) == merged_by_the_book(word, every)


def test_of_equal_pairs_the_leftmost_is_merged() -> None:
    assert merge("aaaaa", lambda left, right: {("a", "a"): 0}.get((left, right))) == ["aa", "aa", "a"]


def test_a_better_rank_comes_before_a_pair_further_left() -> None:
    assert merge("abc", lambda left, right: {("a", "b"): 1, ("b", "c"): 0}.get((left, right))) == ["a", "bc"]


def test_nothing_is_left_of_an_empty_word() -> None:
    assert merge("", lambda left, right: 0) == []


def test_a_letter_is_looked_at_a_few_times_however_long_the_word() -> None:
    """Once beside its neighbour, and after each merge on either side; Algorithm 1 asks for every pair before each."""
    asked = 0

    def rank(left: str, right: str) -> int | None:
        nonlocal asked
        asked += 1
        return len(left) if len(left) == len(right) <= 64 else None

    assert set(map(len, merge("a" * 12_800, rank))) == {128}
    assert asked <= 3 * 12_800
