import pytest
import torch

from reference_impl.nn.positions import LearnedPositions


@pytest.fixture
def table():
    positions = LearnedPositions(num_positions=3, hidden_size=2)
    with torch.no_grad():
        positions.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    return positions


def test_a_position_is_the_row_of_its_number(table):
    assert table(torch.tensor([[2, 0], [1, 1]])).tolist() == [[[5.0, 6.0], [1.0, 2.0]], [[3.0, 4.0], [3.0, 4.0]]]


def test_a_position_beyond_the_table_is_refused_with_both_numbers(table):
    with pytest.raises(
        ValueError, match="position 3 needs a table of 4 positions, n_positions=3: feed at most 3 tokens"
    ):
        table(torch.tensor([[0, 3]]))


def test_a_negative_position_is_refused(table):
    with pytest.raises(ValueError, match="position -1 is negative; positions count from 0"):
        table(torch.tensor([[0, -1]]))


def test_no_positions_give_no_vectors(table):
    assert table(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 2)
