import math

import pytest
import torch

from reference_impl.nn.absolute_positions import learned_positions, sinusoidal_positions

# --- sinusoidal_positions


def row(position, hidden_size, layout="interleaved"):
    table = sinusoidal_positions(torch.tensor([[position]]), hidden_size, layout, dtype=torch.float64)
    return table[0, 0].tolist()


def test_sines_and_cosines_alternate_with_wavelengths_that_rise():
    # d = 4: 10000^(2i/4) is 1 and 100
    expected = [math.sin(7), math.cos(7), math.sin(0.07), math.cos(0.07)]
    assert row(7, 4) == pytest.approx(expected, rel=1e-14)


def test_concatenated_has_the_same_numbers_with_the_sines_first():
    a, b, c, d, e, f = row(7, 6)
    assert row(7, 6, "concatenated") == [a, c, e, b, d, f]


def test_an_odd_width_has_one_sine_more():
    assert row(0, 5) == [0, 1, 0, 1, 0]
    assert row(0, 5, "concatenated") == [0, 0, 0, 1, 1]


def test_float32_is_rounded_from_float64():
    positions = torch.tensor([[1999, 123457]])
    double = sinusoidal_positions(positions, 8, "interleaved", dtype=torch.float64)
    assert torch.equal(sinusoidal_positions(positions, 8, "interleaved", dtype=torch.float32), double.float())


def test_dtype_is_torchs_default_unless_given():
    assert sinusoidal_positions(torch.tensor([[1]]), 4, "interleaved").dtype == torch.float32


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout='alternating' is unknown; use 'interleaved' or 'concatenated'"):
        row(0, 4, "alternating")


# --- learned_positions: a table whose row p is (p, p), added to zeros, shows which rows were taken

TABLE = torch.arange(7.0)[:, None].expand(7, 2)


def rows_taken(seq, mask=None):
    x = torch.zeros(1 if mask is None else len(mask), seq, 2)
    y = learned_positions(x, TABLE, None if mask is None else torch.tensor(mask))
    return y[..., 0].tolist()


def test_without_a_mask_positions_count_from_0():
    assert rows_taken(4) == [[0, 1, 2, 3]]


def test_padding_is_not_counted():
    taken = rows_taken(4, [[0, 0, 1, 1], [1, 1, 1, 0]])
    assert taken[0][2:] == [0, 1]
    assert taken[1][:3] == [0, 1, 2]


def test_cached_tokens_are_counted():
    assert rows_taken(2, [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]) == [[3, 4], [1, 2]]


def test_positions_are_added_to_the_embeddings():
    x = torch.tensor([[[1.0, 10.0], [2.0, 20.0]]])
    assert learned_positions(x, torch.tensor([[0.5, 0.0], [0.0, -3.0]])).tolist() == [[[1.5, 10.0], [2.0, 17.0]]]


def test_a_position_beyond_the_table_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="position 7 is beyond the 7 rows of the table"):
        rows_taken(8)
