"""Normalisation of a vector: RMSNorm (Llama, Mistral, Mixtral) and LayerNorm (GPT, GPT-2, GPT-3, Phi)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def rms_norm(
    x: Float[Tensor, "*batch hidden"], weight: Float[Tensor, "hidden"], eps: float
) -> Float[Tensor, "*batch hidden"]:
    """Divides a vector by its root mean square, then scales each element.

        y_i = g_i · x_i / √(ε + (1/n) Σ_j x_j²)

    Zhang & Sennrich 2019 (arXiv:1910.07467), equation 4: a → `x`, g → `weight`, n → hidden. No mean is subtracted.
    `eps` (ε) is not in the paper; it is added to the mean square, inside the root.

    Arithmetic is in float32, or float64 for float64 input. The quotient is rounded to the dtype of `x` before the
    multiplication by `weight`; in bfloat16 the other order gives other numbers.
    """
    working = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = working.square().mean(dim=-1, keepdim=True)
    normalised = working * torch.rsqrt(mean_square + eps)
    return weight * normalised.to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale, `weight`, that starts at one."""

    def __init__(self, *, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        return rms_norm(x, self.weight, self.eps)


def layer_norm(
    x: Float[Tensor, "*batch hidden"], weight: Float[Tensor, "hidden"], bias: Float[Tensor, "hidden"], eps: float
) -> Float[Tensor, "*batch hidden"]:
    """Centres a vector and divides it by its standard deviation, then scales and shifts each element.

        μ = (1/n) Σ_j x_j,   σ² = (1/n) Σ_j (x_j − μ)²,   y_i = g_i · (x_i − μ) / √(σ² + ε) + b_i

    Ba et al. 2016 (arXiv:1607.06450), equation 4: a → `x`, g → `weight`, b → `bias`, H → hidden. The variance divides
    by n, not by n − 1. `eps` (ε) is not in the paper; it is added to the variance, inside the root.

    Arithmetic is in float32, or float64 for float64 input; only the result is rounded to the dtype of `x`.
    """
    working = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = working - working.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    normalised = centred * torch.rsqrt(variance + eps)
    return (normalised * weight + bias).to(x.dtype)


class LayerNorm(nn.Module):
    """`layer_norm` with a learned scale, `weight`, that starts at one, and a learned shift, `bias`, at zero."""

    def __init__(self, *, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        return layer_norm(x, self.weight, self.bias, self.eps)
