"""The projection of GPT and GPT-2 checkpoints, whose weight is stored (in, out)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def conv1d(
    x: Float[Tensor, "*batch in_features"],
    weight: Float[Tensor, "in_features out_features"],
    bias: Float[Tensor, "out_features"],
) -> Float[Tensor, "*batch out_features"]:
    """y = x W + b. The weight is the transpose of `nn.Linear`'s; a square one loads either way, so mind the layout.

    The name is historical: OpenAI's code wrote the projection as a convolution of width 1.
    """
    return F.linear(x, weight.T, bias)


class Conv1D(nn.Module):
    """`conv1d` with its parameters. `weight` starts as a normal draw of deviation 0.02, `bias` at 0."""

    def __init__(self, *, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        return conv1d(x, self.weight, self.bias)
