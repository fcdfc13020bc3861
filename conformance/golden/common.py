"""What every kind of golden case shares: the limits, and the parts that a case is written from."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Oracle and reference are independent derivations in float64; they agree to about 1e-14.
AGREEMENT = 1e-12
# Expected values rebuilt on another machine may differ by the rounding of another summation order.
REBUILT = 1e-13
REBUILT_NOISE = 2.0
# A field case whose logits move by less than this when the field is ignored proves nothing in a working dtype.
MOVEMENT = 1e-3


class GoldenError(ValueError):
    """A case does not deserve to be a golden: names the case and the figure."""


@dataclass(frozen=True)
class Derived:
    """The parts of a case.

    weights, inputs: what the candidate is given; expected: the float64 truth by name.
    provenance: "oracle_error", "agreement_with_reference" and "movement".
    """

    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    provenance: dict[str, Any]
