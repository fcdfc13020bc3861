"""The activations of feed-forward blocks, written out. Each acts on every element alone.

Arithmetic is in float32, or float64 for float64 input; only the result is rounded to the dtype of `x`.
`feed_forward.activation` gives the same functions as modules, by torch's fused kernels.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def working(x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """`x` in the dtype of the arithmetic."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def relu(x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """max(0, x). Vaswani et al. 2017 (arXiv:1706.03762), equation 2."""
    return x.clamp(min=0)


def gelu(x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """x · Φ(x), Φ(x) = (1 + erf(x / √2)) / 2: exact. Hendrycks & Gimpel 2016 (arXiv:1606.08415), section 2."""
    z = working(x)
    return (z * (1 + torch.erf(z / math.sqrt(2))) / 2).to(x.dtype)


def gelu_new(x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))): GELU's approximation, up to 4.7e-4 off. The same section 2."""
    z = working(x)
    return (z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))).to(x.dtype)


def silu(x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """x · σ(x), σ(x) = 1 / (1 + e^−x). Swish₁ in Ramachandran et al. 2017 (arXiv:1710.05941), section 4."""
    z = working(x)
    return (z * torch.sigmoid(z)).to(x.dtype)


# the hub's name → the function
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "gelu": gelu, "gelu_new": gelu_new, "silu": silu}


def activate(x: Float[Tensor, "*axes"], name: str) -> Float[Tensor, "*axes"]:
    """The activation called `name`, applied to every element.

    Raises:
        ValueError: the name is not implemented.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"name={name!r} is not implemented; use one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name](x)
