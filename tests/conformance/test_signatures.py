"""Each signature on a failure that was made to have it, and on one that was not."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conformance import signatures
from conformance.signatures import SIGNATURES, Wrong, signature

BATCH, SEQ, WIDTH = 3, 9, 7
TRUTH = torch.randn(BATCH, SEQ, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NOISE = torch.randn(BATCH, SEQ, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
REAL = torch.ones(BATCH, SEQ, dtype=torch.bool)
REAL[1, 5:] = False


def wrong(got: Tensor, **more: object) -> Wrong:
    return replace(Wrong(got, TRUTH, 1e-10), **more)  # type: ignore[arg-type]


def at(positions: Tensor | slice, rows: slice = slice(None), size: Tensor | float = 1.0) -> Tensor:
    """The truth, with errors at some positions of some rows."""
    error = torch.zeros_like(TRUTH)
    error[rows, positions] = NOISE[rows, positions]
    return TRUTH + error * size


GROWING = torch.arange(SEQ, dtype=torch.float64)[:, None]
NOT_A_NUMBER = TRUTH.masked_fill(torch.arange(SEQ)[:, None] == 2, torch.nan)
OUTSIDE = [1, 4, 5]
CONSTRUCTED: dict[str, tuple[Wrong, str]] = {
    "not_finite": (wrong(NOT_A_NUMBER), "NaN in 11% of the values"),
    "constant_ratio": (wrong(1.5 * TRUTH), "every value is 1.5 times the right one"),
    "another_order": (wrong(TRUTH[:, :, torch.randperm(WIDTH, generator=torch.Generator().manual_seed(3))]),
                      "the right values in another order along feature"),
    "one_position_late": (wrong(torch.cat((NOISE[:, :1], TRUTH[:, :-1]), 1)), "every row is that of the position"),
    "same_error_everywhere": (wrong(TRUTH + NOISE[0, 0]), "the error is one vector, the same at all positions"),
    "constant_in_every_row": (wrong(TRUTH + NOISE[:, :, :1]), "the error is one number in every row"),
    "only_after_the_first_call": (wrong(at(slice(5, None)), calls=(5, 1, 1, 1, 1)), "the first call of the session is"),
    "only_beyond_the_window": (wrong(at(slice(4, None)), window=4), "right up to the 4 positions of the window"),
    "only_short_rows": (wrong(at(slice(None), slice(1, 2)), real=REAL), "only rows with padding are wrong"),
    "grows_with_position": (wrong(at(slice(1, None), size=GROWING)), "position 0 is right, and the error grows"),
    "only_position_zero_right": (wrong(at(slice(1, None), size=1 / (1 + GROWING))), "position 0 is right, all others"),
    "only_some_rows": (wrong(at(slice(None), slice(0, 2))), "only batch rows 0, 1 are wrong"),
    "only_some_tokens": (wrong(at(torch.tensor([3]))), "only 3 of 27 tokens are wrong"),
    "wrong_from_the_start": (wrong(at(slice(None))), "wrong from position 0 on in every row"),
}  # fmt: skip


def test_every_signature_is_constructed() -> None:
    assert [sign.__name__ for sign in SIGNATURES] == list(CONSTRUCTED)


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_a_failure_is_told_by_its_signature(name: str) -> None:
    failure, beginning = CONSTRUCTED[name]
    said = getattr(signatures, name)(failure)
    assert said is not None
    assert said.startswith(beginning)
    assert signature(failure) == said  # and by no other that comes before it


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_a_failure_without_features_has_no_signature_but_its_extent(name: str) -> None:
    """Noise everywhere: only that it begins at the start can be said; and of scattered noise, nothing."""
    expected = name == "wrong_from_the_start"
    assert (getattr(signatures, name)(wrong(at(slice(None)))) is not None) == expected
    scattered = at(torch.tensor([0, 1, 3, 5, 6, 7]))
    assert signature(wrong(scattered)) is None


def test_values_without_rows_have_no_positions() -> None:
    assert signature(wrong(at(slice(1, None)), rows=False)) is None
    assert signature(wrong(2 * TRUTH, rows=False)) == "every value is 2 times the right one"


def test_zeros_are_called_zeros() -> None:
    assert signature(wrong(torch.zeros_like(TRUTH))) == "every value is 0"


def test_pads_do_not_count() -> None:
    pads = TRUTH.clone()
    pads[~REAL] = torch.nan
    assert signature(wrong(2 * pads, real=REAL)) == "every value is 2 times the right one"


def test_what_sees_other_rows_is_not_explained_by_where_it_begins() -> None:
    truth = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    all_wrong, first_right = truth + noise, truth + noise * (torch.arange(5) > 0)[:, None]
    for got, said, cause in (
        (all_wrong, "wrong from position 0 on in every row", "norm"),
        (first_right, "position 0 is right, all others are wrong", "scores"),
    ):
        causal, other = (signature(Wrong(got, truth, 1e-10, causal=flag)) or "" for flag in (True, False))
        assert causal.startswith(said)
        assert cause in causal
        assert other == said
