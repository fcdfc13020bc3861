"""The bound checker passes at its limits, fails one rounding step above them, and nothing that is not finite passes.

The limits stand here as literals: who changes a constant of `conformance.bounds` changes them here too, on purpose.
The tensors are built so that every intermediate result is exact and just one of the two errors is at its limit.
"""

import math

import pytest
import torch
from torch import Tensor

from conformance.bounds import Error, measure, within

SEMANTIC = 1e-10
RMS_LIMIT, MAX_LIMIT = 2.0, 5.0
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
STEPS = [0, 1, 5, 50]
NOISE = {dtype: 1.3 * roundoff for dtype, roundoff in ROUNDOFF.items()}  # an oracle error above the floor


def ulps(x: float, steps: int) -> float:
    """The float64 number `steps` above x (below, if negative)."""
    for _ in range(abs(steps)):
        x = math.nextafter(x, math.copysign(math.inf, steps))
    return x


def spike(size: float) -> tuple[Tensor, Tensor]:
    """(got, truth) whose error is exactly `size` by maximum and size/√15 by RMS: one wrong element of sixteen."""
    truth = torch.ones(16, dtype=torch.float64)
    truth[7] = 0.0
    got = truth.clone()
    got[7] = size
    return got, truth


def spread(size: float) -> tuple[Tensor, Tensor]:
    """(got, truth) whose error is exactly `size` by RMS and half of it by maximum: four wrong elements, a peaked truth.

    RMS(got - truth) = √(4·(size/2)²/16) = size/4, RMS(truth) = √(1/16) = 1/4.
    """
    truth = torch.zeros(16, dtype=torch.float64)
    truth[3] = 1.0
    got = truth.clone()
    got[8:12] = size / 2
    return got, truth


def oracle(dtype: str) -> Error | None:
    return None if dtype == "float64" else Error(max=NOISE[dtype], rms=NOISE[dtype])


def limit(dtype: str, factor: float) -> float:
    return SEMANTIC if dtype == "float64" else factor * NOISE[dtype]


DTYPES = ["float64", "float32", "bfloat16", "float16"]


# --- measuring ------------------------------------------------------------------------------------------------------


def test_error_is_relative_to_the_truths_own_maximum_and_rms() -> None:
    truth = torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=torch.float64)  # maximum 4, RMS √(25/4)
    got = truth + torch.tensor([0.0, 0.0, -2.0, 0.0], dtype=torch.float64)  # off by 2 once, RMS √(4/4)
    error = measure(got, truth)
    assert (error.max, error.rms) == (0.5, 0.4)


def test_equal_tensors_have_error_zero() -> None:
    truth = torch.arange(-5.0, 6.0, dtype=torch.float64)
    assert measure(truth.clone(), truth) == Error(0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_difference_is_taken_in_float64(dtype: torch.dtype) -> None:
    truth = torch.tensor([1.0, 1.0 + 2.0**-30], dtype=torch.float64)
    error = measure(torch.ones(2, dtype=dtype), truth)
    assert error.max == 2.0**-30 / (1.0 + 2.0**-30)


def test_spike_and_spread_have_one_error_at_the_size_and_the_other_below() -> None:
    assert (measure(*spike(SEMANTIC)).max, measure(*spread(SEMANTIC)).rms) == (SEMANTIC, SEMANTIC)
    assert measure(*spike(SEMANTIC)).rms < SEMANTIC / 3
    assert measure(*spread(SEMANTIC)).max == SEMANTIC / 2


def test_zero_truth_that_is_met_has_error_zero() -> None:
    assert measure(torch.zeros(3, 5), torch.zeros(3, 5)) == Error(0.0, 0.0)


def test_zero_truth_that_is_missed_by_the_smallest_number_has_infinite_error() -> None:
    got = torch.zeros(3, 5, dtype=torch.float64)
    got[2, 4] = 5e-324
    assert measure(got, torch.zeros(3, 5)).max == math.inf


def test_empty_tensors_have_error_zero() -> None:
    assert measure(torch.zeros(0, 5), torch.zeros(0, 5)) == Error(0.0, 0.0)


def test_shared_scale_replaces_the_truths_own() -> None:
    error = measure(torch.full((5,), 3.0), torch.full((5,), 1.0), scale=Error(max=8.0, rms=4.0))
    assert error == Error(max=0.25, rms=0.5)


def test_shared_scale_makes_a_zero_truth_finite() -> None:
    error = measure(torch.full((7,), 1.0), torch.zeros(7), scale=Error(max=8.0, rms=4.0))
    assert error == Error(max=0.125, rms=0.25)


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (3,), ()])
def test_shapes_that_would_broadcast_are_refused_with_both(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape .* against \(2, 3\)"):
        measure(torch.ones(shape), torch.ones(2, 3))


# --- limits, two-sided ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_maximum_at_or_ulps_below_its_limit_passes(dtype: str, steps: int) -> None:
    error = measure(*spike(ulps(limit(dtype, MAX_LIMIT), -steps)))
    assert error.max == ulps(limit(dtype, MAX_LIMIT), -steps)
    assert within(error, dtype, oracle(dtype)).passed


@pytest.mark.parametrize("steps", STEPS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_maximum_ulps_above_its_limit_fails(dtype: str, steps: int) -> None:
    error = measure(*spike(ulps(limit(dtype, MAX_LIMIT), steps)))
    assert error.rms < limit(dtype, RMS_LIMIT)
    assert not within(error, dtype, oracle(dtype)).passed


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_at_or_ulps_below_its_limit_passes(dtype: str, steps: int) -> None:
    error = measure(*spread(ulps(limit(dtype, RMS_LIMIT), -steps)))
    assert error.rms == ulps(limit(dtype, RMS_LIMIT), -steps)
    assert within(error, dtype, oracle(dtype)).passed


@pytest.mark.parametrize("steps", STEPS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_ulps_above_its_limit_fails(dtype: str, steps: int) -> None:
    error = measure(*spread(ulps(limit(dtype, RMS_LIMIT), steps)))
    assert error.max < limit(dtype, MAX_LIMIT)
    assert not within(error, dtype, oracle(dtype)).passed


@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_maximum_is_held_against_the_oracles_maximum_and_rms_against_its_rms(dtype: str) -> None:
    noise = Error(max=32 * ROUNDOFF[dtype], rms=8 * ROUNDOFF[dtype])
    at_both = Error(max=MAX_LIMIT * noise.max, rms=RMS_LIMIT * noise.rms)
    assert within(at_both, dtype, noise).passed
    assert not within(Error(at_both.max, ulps(at_both.rms, 1)), dtype, noise).passed
    assert not within(Error(ulps(at_both.max, 1), at_both.rms), dtype, noise).passed


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_oracle_error_below_the_unit_roundoff_counts_as_the_unit_roundoff(dtype: str, noise: float) -> None:
    lucky = Error(max=noise * ROUNDOFF[dtype], rms=noise * ROUNDOFF[dtype])
    at_both = Error(max=MAX_LIMIT * ROUNDOFF[dtype], rms=RMS_LIMIT * ROUNDOFF[dtype])
    assert within(at_both, dtype, lucky).passed
    assert not within(Error(at_both.max, ulps(at_both.rms, 1)), dtype, lucky).passed
    assert not within(Error(ulps(at_both.max, 1), at_both.rms), dtype, lucky).passed


@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_ratio_is_the_error_in_units_of_the_oracles_own(dtype: str) -> None:
    noise = Error(max=16 * ROUNDOFF[dtype], rms=8 * ROUNDOFF[dtype])
    judgement = within(Error(max=24 * ROUNDOFF[dtype], rms=6 * ROUNDOFF[dtype]), dtype, noise)
    assert judgement.ratio == Error(max=1.5, rms=0.75)


def test_float64_takes_no_account_of_an_oracle_error() -> None:
    assert not within(Error(max=1e-9, rms=1e-9), "float64", Error(max=1.0, rms=1.0)).passed


def test_judgement_is_reported_with_error_bound_and_ratio() -> None:
    json = within(Error(max=3.0, rms=0.75), "float32", Error(max=1.5, rms=0.25)).to_json()
    assert json == {
        "error": {"max": 3.0, "rms": 0.75},
        "bound": {"max": 1.5 * MAX_LIMIT, "rms": 0.25 * RMS_LIMIT},
        "ratio": {"max": 2.0, "rms": 3.0},
    }


def test_float64_is_reported_without_ratio() -> None:
    json = within(Error(max=3.0, rms=0.75), "float64").to_json()
    assert json == {"error": {"max": 3.0, "rms": 0.75}, "bound": {"max": 1e-10, "rms": 1e-10}, "ratio": None}


def test_what_is_printed_of_a_float64_failure_exceeds_the_bound_that_is_printed() -> None:
    text = str(within(measure(*spread(1.6e-10)), "float64"))  # by maximum it is 8e-11 only
    assert text == "error 1.6e-10   bound 1e-10"


# --- what never passes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["max", "rms"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_that_is_not_finite_never_passes(dtype: str, which: str, bad: float) -> None:
    error = Error(**({"max": 0.0, "rms": 0.0} | {which: bad}))
    assert not within(error, dtype, oracle(dtype)).passed


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_that_is_not_finite_never_passes(dtype: str, bad: float) -> None:
    truth = torch.linspace(-1, 1, 15, dtype=torch.float64)
    got = truth.clone()
    got[4] = bad
    assert not within(measure(got, truth), dtype, oracle(dtype)).passed


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_truth_that_is_not_finite_is_met_by_nothing(bad: float) -> None:
    truth = torch.linspace(-1, 1, 15, dtype=torch.float64)
    truth[4] = bad
    assert not within(measure(truth.clone(), truth), "float64").passed


def test_values_whose_squares_overflow_never_pass() -> None:
    truth = torch.linspace(-1, 1, 15, dtype=torch.float64)
    assert not within(measure(truth * 1e200, truth), "float64").passed


@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_working_dtype_without_the_oracles_error_is_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"judging {dtype} needs the oracle's own error"):
        within(Error(0.0, 0.0), dtype)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["max", "rms"])
def test_oracle_error_that_is_not_finite_is_refused(which: str, bad: float) -> None:
    noise = Error(**({"max": 1e-3, "rms": 1e-3} | {which: bad}))
    with pytest.raises(ValueError, match=r"own error in float16 is .* nothing can be judged"):
        within(Error(0.0, 0.0), "float16", noise)
