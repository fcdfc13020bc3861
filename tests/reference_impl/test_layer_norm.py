import math

import pytest
import torch
from torch import nn

from reference_impl.nn.norm import LayerNorm, layer_norm


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_centres_divides_by_the_deviation_scales_and_shifts():
    # mean 4, variance (9 + 1 + 16) / 3
    root = math.sqrt(26 / 3)
    y = layer_norm(double(1.0, 3.0, 8.0), double(2.0, -10.0, 1.0), double(0.5, 0.0, -1.0), eps=0.0)
    torch.testing.assert_close(y, double(-6 / root + 0.5, 10 / root, 4 / root - 1), rtol=1e-15, atol=0)


def test_eps_is_added_to_the_variance_inside_the_root():
    x = double(-1e-3, 1e-3)  # variance 1e-6; with eps it is 4e-6, the square of 2e-3
    y = layer_norm(x, torch.ones_like(x), torch.zeros_like(x), eps=3e-6)
    torch.testing.assert_close(y, double(-0.5, 0.5), rtol=1e-15, atol=0)


def test_agrees_with_torch():
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    ours, theirs = LayerNorm(hidden_size=5, eps=0.1).double(), nn.LayerNorm(5, eps=0.1, dtype=torch.float64)
    with torch.no_grad():
        for parameter, values in ((ours.weight, (0.5, -1, 2, 3, 0.25)), (ours.bias, (1, 2, -3, 0.5, 0))):
            parameter.copy_(double(*values))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-13, atol=1e-15)


def test_float16_values_whose_squares_overflow_are_normalised():
    x = torch.tensor([3000.0, -3000.0], dtype=torch.float16)
    y = layer_norm(x, torch.ones_like(x), torch.zeros_like(x), eps=1e-5)
    assert torch.equal(y, torch.tensor([1.0, -1.0], dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype(dtype):
    assert LayerNorm(hidden_size=4, eps=1e-5).to(dtype)(torch.ones(2, 4, dtype=dtype)).dtype == dtype


def test_leaves_its_input_unchanged():
    x = torch.tensor([[3.0, 4.0]])
    layer_norm(x, torch.ones(2), torch.ones(2), eps=1e-5)
    assert torch.equal(x, torch.tensor([[3.0, 4.0]]))
