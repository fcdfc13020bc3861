"""Refuses a mixture-of-experts case in which rounding could send a token to another expert.

The choice of experts jumps: where the last chosen and the first rejected expert score almost alike, two correct
implementations in a working dtype may choose differently, and everything after it differs by more than rounding.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conformance.bounds import MAX_RATIO
from conformance.golden.common import GoldenError
from conformance.oracles import oracle_class

if TYPE_CHECKING:
    from conformance.families import Config, Family

ROUTER_LOGITS = "router_logits"


def has_router(family: "Family", config: "Config") -> bool:
    """Whether the model chooses experts."""
    return any(spec.name.endswith(ROUTER_LOGITS) for spec in family.probes(config))


def margins(truth: dict[str, Tensor]) -> dict[str, float]:
    """Of every router: the smallest difference, over all tokens, of its k-th and (k+1)-th logit.

    truth: probes by name; as many experts are chosen as there are routing weights.
    """
    found = {}
    for name, logits in truth.items():
        if name.endswith(ROUTER_LOGITS):
            k = truth[name.replace(ROUTER_LOGITS, "routing_weights")].shape[-1]
            ordered = logits.sort(dim=-1, descending=True).values
            found[name] = (ordered[..., k - 1] - ordered[..., k]).min().item()
    return found


def require_margins(
    case: str,
    family: "Family",
    config: "Config",
    weights: dict[str, Tensor],
    arguments: dict[str, Tensor],
    truth: dict[str, Tensor],
    dtypes: Iterable[str],
) -> dict[str, Any]:
    """The margins, and the oracle's largest error of the router's logits in each working dtype that is claimed.

    A candidate may be `MAX_RATIO` times as far off as the oracle, and two logits may move towards each other.
    Raises: GoldenError if a margin is not greater than twice that.
    """
    found = margins(truth)
    errors: dict[str, dict[str, float]] = {}
    for dtype in dtypes if found else ():
        errors[dtype] = dict.fromkeys(found, 0.0)
        for kernel in family.oracle_kernels:
            oracle = oracle_class(family)(family, config, weights, dtype=getattr(torch, dtype), attention=kernel)
            for name, logits in oracle.at_boundaries(list(found), **arguments).items():
                error = (logits - truth[name]).abs().max().item()
                errors[dtype][name] = max(errors[dtype][name], error)
        for name, margin in found.items():
            if not margin > 2 * MAX_RATIO * errors[dtype][name]:
                raise GoldenError(
                    f"{case}: two experts' logits differ by {margin:.1e} only at {name}, and are off by up to "
                    f"{errors[dtype][name]:.1e} in {dtype}: rounding may send a token elsewhere; draw other weights or "
                    f"do not claim {dtype}"
                )
    return {"margin": found, "error": errors} if found else {}
