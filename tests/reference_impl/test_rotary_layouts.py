import cmath

import pytest
import torch

from reference_impl.nn import rotary
from reference_impl.nn.rotary_layouts import apply_rotary, rotate_interleaved

POSITIONS = torch.tensor([[0, 1, 7], [3, 2000, 5]])


def heads(width):
    return torch.randn(2, 4, 3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_interleaved_pairs_turn_as_complex_numbers():
    x = heads(6)
    expected = torch.empty_like(x)
    for b in range(2):
        for h in range(4):
            for t in range(3):
                for j, frequency in enumerate((1, 1 / 2, 1 / 4)):  # 8^(-2j/6)
                    angle = frequency * int(POSITIONS[b, t])
                    z = complex(*x[b, h, t, 2 * j : 2 * j + 2].tolist()) * cmath.exp(1j * angle)
                    expected[b, h, t, 2 * j], expected[b, h, t, 2 * j + 1] = z.real, z.imag
    torch.testing.assert_close(apply_rotary(x, POSITIONS, 8.0, 6, "interleaved"), expected, rtol=0, atol=1e-12)


def test_the_layouts_differ_by_a_permutation():
    x, order = heads(6), [0, 2, 4, 1, 3, 5]
    interleaved = apply_rotary(x, POSITIONS, 500.0, 6, "interleaved")
    halves = apply_rotary(x[..., order], POSITIONS, 500.0, 6, "halves")
    assert torch.equal(interleaved[..., order], halves)


def test_halves_are_turned_by_rotate():
    cos, sin = rotary.tables(POSITIONS, 6, 500.0, dtype=torch.float64)
    assert torch.equal(apply_rotary(heads(6), POSITIONS, 500.0, 6, "halves"), rotary.rotate(heads(6), cos, sin))


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_elements_after_rotary_dim_pass(layout):
    x = heads(10)
    y = apply_rotary(x, POSITIONS, 500.0, 6, layout)
    assert torch.equal(y[..., 6:], x[..., 6:])
    assert torch.equal(y[..., :6], apply_rotary(x[..., :6], POSITIONS, 500.0, 6, layout))


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_products_depend_on_distances_alone(layout):
    query, key = heads(6), heads(6).flip(0)

    def products(positions):
        turned = (apply_rotary(x, positions, 500.0, 6, layout) for x in (query, key))
        return torch.einsum("bhqd,bhkd->bhqk", *turned)

    torch.testing.assert_close(products(POSITIONS), products(POSITIONS + 1000), rtol=1e-10, atol=1e-10)


def test_scaling_is_read_as_config_json_has_it():
    x = heads(6)
    halved = apply_rotary(x, POSITIONS * 2, 500.0, 6, "halves", {"rope_type": "linear", "factor": 2})
    torch.testing.assert_close(halved, apply_rotary(x, POSITIONS, 500.0, 6, "halves"), rtol=1e-12, atol=1e-12)


def test_arithmetic_keeps_the_dtype():
    cos = torch.ones(1, 3, 3, dtype=torch.bfloat16)
    assert rotate_interleaved(heads(6).bfloat16(), cos, cos).dtype == torch.bfloat16


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout='pairs' is unknown; use one of"):
        apply_rotary(heads(6), POSITIONS, 500.0, 6, "pairs")


@pytest.mark.parametrize("rotary_dim", [0, 5, 8])
def test_a_rotary_dim_that_does_not_fit_is_refused_with_both_numbers(rotary_dim):
    with pytest.raises(ValueError, match=rf"rotary_dim={rotary_dim} must be even and in 2 … head_dim=6"):
        apply_rotary(heads(6), POSITIONS, 500.0, rotary_dim, "halves")
