"""When two tensors agree.  The only place in the project where a tolerance stands.

An error is measured against the float64 truth t in two ways: by maximum, max|c - t| / max|t|, and by root mean
square, RMS(c - t) / RMS(t).

*Semantic tier* (float64 under TrueDouble): both errors at most `SEMANTIC`.  Two correct implementations agree
to about 1e-14; the smallest mistake of the catalogue is orders of magnitude above 1e-10.

*Working tier* (float32, bfloat16, float16 as the candidate really runs): the candidate's error divided by the
oracle's own error in the same dtype (largest over eager, SDPA and row by row; stored in the golden; never taken
below the dtype's unit roundoff), `RMS_RATIO` by RMS and `MAX_RATIO` by maximum.  `benchmarks/calibrate_bounds.py`
measures both constants; docs/bounds.md shows what it printed.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SEMANTIC = 1e-10
RMS_RATIO = 2.0
MAX_RATIO = 5.0
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class Error:
    """Relative error by maximum and by root mean square.  Compares nothing; `within` does."""

    max: float
    rms: float

    def to_json(self) -> dict[str, float]:
        return {"max": self.max, "rms": self.rms}


def measure(got: "Tensor", truth: "Tensor", scale: "Error | None" = None) -> Error:
    """Error of `got` against `truth`, both of one shape, computed in float64.

    scale: what to divide by (max and RMS) instead of the truth's own; gradients share one scale over all
        parameters, since a single parameter's gradient may be zero.
    A truth that is zero everywhere has error 0 if it is met exactly and infinity otherwise.
    Raises: ValueError if the shapes differ (broadcasting would compare something else).
    """
    if got.shape != truth.shape:
        raise ValueError(f"values of shape {tuple(got.shape)} cannot be measured against {tuple(truth.shape)}")
    scale = scale or magnitude(truth)
    difference = magnitude(got.double() - truth.double())
    return Error(*(_ratio(d, s) for d, s in ((difference.max, scale.max), (difference.rms, scale.rms))))


def magnitude(x: "Tensor") -> Error:
    """Largest absolute value and root mean square of a tensor (0, 0 when it is empty)."""
    if x.numel() == 0:
        return Error(0.0, 0.0)
    x = x.double()
    return Error(x.abs().max().item(), x.square().mean().sqrt().item())


def _ratio(difference: float, scale: float) -> float:
    if scale:
        return difference / scale
    return 0.0 if difference == 0 else float("inf")


def rounding(terms: int) -> float:
    """What float64 may leave of a sum of so many terms that cancel, relative to what they are: n u with
    u = 2^-53 (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 4.2, to first order).

    For what is 0 in exact arithmetic and comes out of other arithmetic than a comparison's.
    """
    return terms * 2.0**-53


def same_bits(a: "Tensor", b: "Tensor") -> bool:
    """Whether two tensors are equal in shape, dtype and every bit: NaN equals itself, 0 is not −0."""
    import torch

    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(*(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def identical(got: "Tensor", wanted: "Tensor") -> "Judgement":
    """Judge whether two tensors have the same bits, where arithmetic is the same and nothing is to be tolerated."""
    return Judgement(same_bits(got, wanted), measure(got, wanted), Error(0.0, 0.0), None)


@dataclass(frozen=True)
class Judgement:
    """What a comparison came to: passed or not, the errors, the bound, and in the working tier the ratios."""

    passed: bool
    error: Error
    bound: Error
    ratio: Error | None

    def to_json(self) -> dict[str, Any]:
        return {
            "error": self.error.to_json(),
            "bound": self.bound.to_json(),
            "ratio": self.ratio.to_json() if self.ratio else None,
        }

    def __str__(self) -> str:
        if self.ratio is None:
            return f"error {max(self.error.max, self.error.rms):.1e}   bound {self.bound.max:.0e}"
        return (
            f"error {self.error.rms:.1e}   ratio {self.ratio.rms:.2f} by RMS (limit {RMS_RATIO:g}), "
            f"{self.ratio.max:.2f} by maximum (limit {MAX_RATIO:g})"
        )


def within(error: Error, dtype: str, oracle_error: Error | None = None) -> Judgement:
    """Judge an error in a dtype.  NaN never passes.

    oracle_error: the oracle's own error in that dtype; needed for every dtype but float64.
    Raises: ValueError if it is missing, or not finite: any candidate would pass.
    """
    if dtype == "float64":
        bound, ratio = Error(SEMANTIC, SEMANTIC), None
    else:
        if oracle_error is None:
            raise ValueError(f"judging {dtype} needs the oracle's own error in {dtype}; only float64 does without")
        if not (math.isfinite(oracle_error.max) and math.isfinite(oracle_error.rms)):
            raise ValueError(f"the oracle's own error in {dtype} is {oracle_error}: nothing can be judged by it")
        floor = UNIT_ROUNDOFF[dtype]
        noise = Error(max(oracle_error.max, floor), max(oracle_error.rms, floor))
        bound = Error(MAX_RATIO * noise.max, RMS_RATIO * noise.rms)
        ratio = Error(error.max / noise.max, error.rms / noise.rms)
    return Judgement(error.max <= bound.max and error.rms <= bound.rms, error, bound, ratio)
