"""Root mean square normalisation, the only norm of Llama, Mistral and Mixtral."""

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
