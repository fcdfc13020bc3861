import math

import pytest
import torch
from torch import nn

from reference_impl.nn.norm import LayerNorm, RMSNorm, layer_norm, rms_norm


def test_divides_by_the_root_mean_square_and_scales_each_element():
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)  # mean square 12.5
    weight = torch.tensor([2.0, -10.0], dtype=torch.float64)
    expected = torch.tensor([[6 / math.sqrt(12.5), -40 / math.sqrt(12.5)]], dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, eps=0.0), expected, rtol=1e-15, atol=0)


def test_eps_is_added_to_the_mean_square_inside_the_root():
    x = torch.tensor([1e-3, 3e-3], dtype=torch.float64)  # mean square 5e-6; with eps it is 9e-6, the square of 3e-3
    expected = torch.tensor([1 / 3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, torch.ones_like(x), eps=4e-6), expected, rtol=1e-15, atol=0)


def test_agrees_with_torch():
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    ours, theirs = RMSNorm(hidden_size=5, eps=0.1).double(), nn.RMSNorm(5, eps=0.1, dtype=torch.float64)
    with torch.no_grad():
        ours.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 3.0, 0.25]))
        theirs.weight.copy_(ours.weight)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-14, atol=0)


def test_float16_values_whose_squares_overflow_are_normalised():
    x = torch.tensor([3000.0, -3000.0, 3000.0], dtype=torch.float16)
    expected = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float16)
    assert torch.equal(rms_norm(x, torch.ones_like(x), eps=1e-6), expected)


def test_bfloat16_rounds_before_it_scales():
    # bfloat16 is spaced 1/128 here. 3/√5 = 1.3416 → 1.34375; · 1.0625 = 1.42773 → 1.4296875.
    # Scaled first: 3/√5 · 1.0625 = 1.42549 → 1.421875.
    x = torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    weight = torch.tensor([1.0, 1.0625], dtype=torch.bfloat16)
    assert rms_norm(x, weight, eps=0.0)[1].item() == 1.4296875


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype(dtype):
    assert RMSNorm(hidden_size=4, eps=1e-5).to(dtype)(torch.ones(2, 4, dtype=dtype)).dtype == dtype


def test_leaves_its_input_unchanged():
    x = torch.tensor([[3.0, 4.0]])
    rms_norm(x, torch.ones(2), eps=1e-5)
    assert torch.equal(x, torch.tensor([[3.0, 4.0]]))


# --- LayerNorm


def test_moves_to_mean_0_and_variance_1_then_scales_and_shifts_each_element():
    x = torch.tensor([[1.0, 3.0, 8.0]], dtype=torch.float64)  # mean 4, variance (9 + 1 + 16) / 3
    weight, bias = torch.tensor([3.0, -1.0, 2.0]).double(), torch.tensor([0.5, 7.0, -2.0]).double()
    deviation = math.sqrt(26 / 3)
    expected = torch.tensor([[-9 / deviation + 0.5, 1 / deviation + 7, 8 / deviation - 2]], dtype=torch.float64)
    torch.testing.assert_close(layer_norm(x, weight, bias, eps=0.0), expected, rtol=1e-15, atol=0)


def test_eps_is_added_to_the_variance_inside_the_root():
    x = torch.tensor([1e-3, 5e-3], dtype=torch.float64)  # variance 4e-6; with eps it is 16e-6, the square of 4e-3
    expected = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        layer_norm(x, torch.ones_like(x), torch.zeros_like(x), eps=12e-6), expected, rtol=1e-13, atol=0
    )


def test_layer_norm_agrees_with_torch():
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    ours, theirs = LayerNorm(hidden_size=5, eps=0.1).double(), nn.LayerNorm(5, eps=0.1, dtype=torch.float64)
    with torch.no_grad():
        ours.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 3.0, 0.25]))
        ours.bias.copy_(torch.tensor([4.0, 1.0, -0.5, 2.0, -3.0]))
        theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-13, atol=1e-13)


def test_layer_norm_starts_without_scale_and_shift():
    norm = LayerNorm(hidden_size=3, eps=1e-5)
    assert (norm.weight.tolist(), norm.bias.tolist()) == ([1.0] * 3, [0.0] * 3)


def test_float16_values_whose_squares_overflow_are_normalised_around_their_mean():
    x = torch.tensor([4000.0, 2000.0, 4000.0, 2000.0], dtype=torch.float16)
    expected = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float16)
    assert torch.equal(layer_norm(x, torch.ones_like(x), torch.zeros_like(x), eps=1e-6), expected)


def test_layer_norm_rounds_once_after_scale_and_shift():
    # The normalised vector is (−√2, √2, 0, 0). Rounding √2 before the scale, or the product before the shift, gives
    # another number for some of these scales.
    x = torch.tensor([-1.0, 1.0, 0.0, 0.0], dtype=torch.bfloat16)
    for weight in torch.arange(1, 2, 1 / 128):
        exact = math.sqrt(2) * weight.item() + 1
        scale, shift = weight.bfloat16().expand(4), torch.ones(4, dtype=torch.bfloat16)
        assert layer_norm(x, scale, shift, eps=0.0)[1] == torch.tensor(exact).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_keeps_the_dtype(dtype):
    assert LayerNorm(hidden_size=4, eps=1e-5).to(dtype)(torch.ones(2, 4, dtype=dtype)).dtype == dtype


def test_layer_norm_centres_divides_by_the_deviation_scales_and_shifts():
    x = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)  # mean 3, variance (4 + 1 + 9) / 3
    weight = torch.tensor([2.0, -10.0, 1.0], dtype=torch.float64)
    bias = torch.tensor([0.5, 0.0, -7.0], dtype=torch.float64)
    deviation = math.sqrt(14 / 3)
    expected = torch.tensor([[-4 / deviation + 0.5, 10 / deviation, 3 / deviation - 7]], dtype=torch.float64)
    torch.testing.assert_close(layer_norm(x, weight, bias, eps=0.0), expected, rtol=1e-15, atol=0)


def test_layer_norm_adds_eps_to_the_variance_inside_the_root():
    x = torch.tensor([1e-3, 5e-3], dtype=torch.float64)  # variance 4e-6; with eps it is 16e-6, the square of 4e-3
    expected = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        layer_norm(x, torch.ones_like(x), torch.zeros_like(x), eps=12e-6), expected, rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_agrees_with_torch_in_every_dtype(dtype):
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).add(0.5).to(dtype)
    ours, theirs = LayerNorm(hidden_size=5, eps=0.1).to(dtype), nn.LayerNorm(5, eps=0.1, dtype=dtype)
    with torch.no_grad():
        ours.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 3.0, 0.25]))
        ours.bias.copy_(torch.tensor([1.0, 0.0, -3.0, 0.125, 2.0]))
        theirs.weight.copy_(ours.weight)
        theirs.bias.copy_(ours.bias)
    roundoff = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours(x), theirs(x), rtol=roundoff, atol=roundoff)


def test_layer_norm_normalises_float16_values_whose_squares_overflow():
    x = torch.tensor([3000.0, -3000.0], dtype=torch.float16)
    expected = torch.tensor([1.0, -1.0], dtype=torch.float16)
    assert torch.equal(layer_norm(x, torch.ones_like(x), torch.zeros_like(x), eps=1e-5), expected)


def test_layer_norm_rounds_only_its_result():
    # bfloat16 is spaced 1/128 here. √(3/2) · 1.125 = 1.37784 → 1.375.
    # Rounded before it is scaled: √(3/2) = 1.22474 → 1.2265625; · 1.125 = 1.37988 → 1.3828125.
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.bfloat16)
    weight = torch.full((3,), 1.125, dtype=torch.bfloat16)
    assert layer_norm(x, weight, torch.zeros_like(x), eps=0.0)[2].item() == 1.375


def test_layer_norm_leaves_its_input_unchanged():
    x = torch.tensor([[3.0, 4.0]])
    layer_norm(x, torch.ones(2), torch.zeros(2), eps=1e-5)
    assert torch.equal(x, torch.tensor([[3.0, 4.0]]))
