import cmath
import math

import pytest
import torch

from reference_impl.nn import rotary
from reference_impl.nn.rotary import LinearScaling, Llama3Scaling

LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=100)
LLAMA3_JSON = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 100,
}


def read(**config):
    return rotary.read_rope(config, default_theta=10000.0)


def frequency_of(turns):
    """The frequency that makes so many turns in LLAMA3's context of 100 tokens."""
    return 2 * math.pi * turns / 100


# --- frequencies


def test_frequencies_are_powers_of_theta():
    assert rotary.inverse_frequencies(6, 8.0) == pytest.approx((1, 1 / 2, 1 / 4), rel=1e-15)


def test_theta_changes_frequencies():
    assert rotary.inverse_frequencies(6, 27.0) == pytest.approx((1, 1 / 3, 1 / 9), rel=1e-15)


def test_linear_scaling_divides_every_frequency():
    scaled = rotary.inverse_frequencies(6, 8.0, LinearScaling(factor=5.0))
    assert scaled == pytest.approx((1 / 5, 1 / 10, 1 / 20), rel=1e-15)


def test_llama3_scaling_keeps_fast_frequencies():
    assert rotary.llama3_frequency(frequency_of(turns=5), LLAMA3) == frequency_of(turns=5)


def test_llama3_scaling_divides_slow_frequencies():
    scaled = rotary.llama3_frequency(frequency_of(turns=0.5), LLAMA3)
    assert scaled == pytest.approx(frequency_of(turns=0.5) / 8, rel=1e-15)


def test_llama3_scaling_interpolates_between():
    # 2 turns lie a third of the way from 1 to 4: two thirds of θ/8 and one third of θ
    scaled = rotary.llama3_frequency(frequency_of(turns=2), LLAMA3)
    assert scaled == pytest.approx(frequency_of(turns=2) * (2 / 3 / 8 + 1 / 3), rel=1e-14)


def test_llama3_scaling_reaches_the_model_frequencies():
    # 100 tokens: θ = 1 and 1/2 make 16 and 8 turns and are kept, 1/32 makes 0.5 and is divided
    scaled = rotary.inverse_frequencies(4, 1024.0, LLAMA3)
    assert scaled == pytest.approx((1, 1 / 256), rel=1e-15)


# --- tables and rotation


def test_tables_hold_cosine_and_sine_of_position_times_frequency():
    cos, sin = rotary.tables(torch.tensor([[0, 3]]), 4, 4.0, dtype=torch.float64)  # frequencies 1 and 1/2
    expected_cos = [[[1.0, 1.0], [math.cos(3), math.cos(1.5)]]]
    expected_sin = [[[0.0, 0.0], [math.sin(3), math.sin(1.5)]]]
    torch.testing.assert_close(cos, torch.tensor(expected_cos, dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(sin, torch.tensor(expected_sin, dtype=torch.float64), rtol=1e-14, atol=0)


def test_bfloat16_tables_are_exact_to_rounding_at_far_positions():
    cos, _ = rotary.tables(torch.tensor([[3001]]), 4, 4.0, dtype=torch.bfloat16)
    expected = torch.tensor([[[math.cos(3001), math.cos(1500.5)]]], dtype=torch.float64)
    torch.testing.assert_close(cos.double(), expected, rtol=2**-8, atol=1e-3)


def test_rotation_multiplies_complex_pairs_that_are_half_a_head_apart():
    batch, heads, seq, head_dim = 2, 3, 5, 4
    x = torch.randn(batch, heads, seq, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    position_ids = torch.tensor([[0, 1, 2, 7, 2000], [5, 4, 3, 2, 1]])
    frequencies = (1.0, 1 / 10)  # theta 100
    expected = torch.empty_like(x)
    for b in range(batch):
        for h in range(heads):
            for t in range(seq):
                for j in range(2):
                    pair = complex(x[b, h, t, j], x[b, h, t, j + 2])
                    turned = pair * cmath.exp(1j * position_ids[b, t].item() * frequencies[j])
                    expected[b, h, t, j], expected[b, h, t, j + 2] = turned.real, turned.imag
    cos, sin = rotary.tables(position_ids, head_dim, 100.0, dtype=torch.float64)
    torch.testing.assert_close(rotary.rotate(x, cos, sin), expected, rtol=1e-12, atol=1e-12)


def test_position_0_changes_nothing():
    x = torch.randn(1, 2, 1, 6, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary.tables(torch.tensor([[0]]), 6, 500.0, dtype=torch.float32)
    assert torch.equal(rotary.rotate(x, cos, sin), x)


def test_rotation_leaves_its_input_unchanged():
    x = torch.ones(1, 1, 1, 4)
    cos, sin = rotary.tables(torch.tensor([[3]]), 4, 100.0, dtype=torch.float32)
    rotary.rotate(x, cos, sin)
    assert torch.equal(x, torch.ones(1, 1, 1, 4))


# --- part of a head


@pytest.mark.parametrize(
    ("head_dim", "factor", "turned"), [(64, 0.5, 32), (80, 0.4, 32), (12, 0.72, 8), (10, 1.0, 10), (100, 0.29, 28)]
)
def test_the_part_that_turns_is_cut_to_an_integer(head_dim, factor, turned):
    # 0.29 has no float64 of its own: 100 · 0.29 is 28.999999999999996, and Hugging Face cuts it as well.
    assert rotary.rotary_dim(head_dim, factor) == turned


def test_partial_rotation_turns_pairs_that_are_half_of_the_turned_part_apart_and_passes_the_rest():
    x = torch.randn(2, 3, 5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    position_ids = torch.tensor([[0, 1, 2, 7, 2000], [5, 4, 3, 2, 1]])
    cos, sin = rotary.tables(position_ids, 6, 1000.0, dtype=torch.float64)  # frequencies 1, 1/10, 1/100
    expected = x.clone()
    for b in range(2):
        for t in range(5):
            for j in range(3):
                for h in range(3):
                    pair = complex(x[b, h, t, j], x[b, h, t, j + 3])
                    turned = pair * cmath.exp(1j * position_ids[b, t].item() / 10**j)
                    expected[b, h, t, j], expected[b, h, t, j + 3] = turned.real, turned.imag
    torch.testing.assert_close(rotary.rotate_partly(x, cos, sin), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(rotary.rotate_partly(x, cos, sin)[..., 6:], x[..., 6:])


def test_partial_rotation_of_the_whole_head_is_rotation():
    x = torch.randn(1, 2, 3, 6, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary.tables(torch.tensor([[0, 1, 2]]), 6, 100.0, dtype=torch.float32)
    assert torch.equal(rotary.rotate_partly(x, cos, sin), rotary.rotate(x, cos, sin))


# --- config.json


def test_reads_the_spelling_of_transformers_4():
    assert read(rope_theta=500.0, rope_scaling={"rope_type": "linear", "factor": 2.0}) == (
        500.0,
        LinearScaling(factor=2.0),
    )


def test_reads_the_spelling_of_transformers_5():
    assert read(rope_parameters={"rope_theta": 500.0, **LLAMA3_JSON}) == (500.0, LLAMA3)


def test_reads_the_older_name_of_rope_type():
    assert read(rope_scaling={"type": "linear", "factor": 2.0}) == (10000.0, LinearScaling(factor=2.0))


def test_reads_both_spellings_when_they_agree():
    scaling = {"rope_type": "linear", "factor": 2.0}
    both = read(rope_theta=500.0, rope_scaling=scaling, rope_parameters={"rope_theta": 500, **scaling})
    assert both == (500.0, LinearScaling(factor=2.0))


def test_default_theta_and_no_scaling_when_nothing_is_said():
    assert read() == (10000.0, None)


@pytest.mark.parametrize("empty", [{"rope_scaling": None}, {"rope_parameters": None}, {"rope_scaling": {}}])
def test_empty_parameters_mean_no_scaling(empty):
    assert read(rope_theta=500.0, **empty) == (500.0, None)


def test_refuses_thetas_that_disagree():
    with pytest.raises(ValueError, match=r"rope_theta=500\.0 and rope_parameters\.rope_theta=10000\.0 disagree"):
        read(rope_theta=500.0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})


def test_refuses_scalings_that_disagree():
    with pytest.raises(ValueError, match=r"rope_scaling=.*factor=2\.0.* and rope_parameters=.*factor=3\.0.* disagree"):
        read(
            rope_scaling={"rope_type": "linear", "factor": 2.0},
            rope_parameters={"rope_type": "linear", "factor": 3.0},
        )


def test_refuses_null_beside_a_scaling():
    with pytest.raises(ValueError, match=r"rope_scaling=None and rope_parameters=.* disagree"):
        read(rope_scaling=None, rope_parameters={"rope_type": "linear", "factor": 3.0})


def test_refuses_an_unknown_rope_type_by_name():
    with pytest.raises(ValueError, match=r"rope_type='yarn' is not implemented; use one of"):
        read(rope_scaling={"rope_type": "yarn", "factor": 2.0})


def test_refuses_missing_and_unknown_parameters_by_name():
    with pytest.raises(ValueError, match=r"missing \['factor'\], unknown \['beta_fast'\]"):
        read(rope_parameters={"rope_type": "linear", "beta_fast": 32})


def test_refuses_parameters_of_a_rope_type_that_is_not_named():
    with pytest.raises(ValueError, match=r"rope_type='default' takes the parameters \[\]; .*unknown \['factor'\]"):
        read(rope_scaling={"factor": 2.0})


@pytest.mark.parametrize("factor", [0, -1.0, "2", None, True])
def test_refuses_a_factor_that_is_not_a_positive_number(factor):
    with pytest.raises(ValueError, match=r"rope_scaling\.factor=.* must be a positive float"):
        read(rope_scaling={"rope_type": "linear", "factor": factor})


def test_refuses_llama3_bands_out_of_order():
    with pytest.raises(ValueError, match=r"high_freq_factor=1\.0 must be greater than low_freq_factor=1\.0"):
        read(rope_scaling={**LLAMA3_JSON, "high_freq_factor": 1.0})


def test_refuses_a_rotary_factor_where_no_one_reads_it():
    with pytest.raises(ValueError, match=r"unknown \['partial_rotary_factor'\]"):
        read(rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5})


def test_parameters_that_another_function_reads_are_left_to_it():
    config = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}
    scaling = rotary.read_rope(config, default_theta=10000.0, elsewhere={"partial_rotary_factor"})
    assert scaling == (10000.0, LinearScaling(factor=2.0))
    assert rotary.read_number(config, "partial_rotary_factor", default=1.0) == 0.5


def test_writes_the_rotary_factor_in_both_spellings():
    assert rotary.write_rope(500.0, None, partial_rotary_factor=0.5) == {
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_type": "default"},
    }


def test_writes_both_spellings():
    assert rotary.write_rope(500.0, LinearScaling(factor=2.0)) == {
        "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0},
    }


def test_writes_no_scaling_as_null_and_default():
    assert rotary.write_rope(500.0, None) == {
        "rope_theta": 500.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    }
