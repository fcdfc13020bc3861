import pytest
import torch

from reference_impl.nn import masks


def test_every_token_is_real_without_a_mask():
    real = masks.real_tokens(torch.zeros(2, 3, dtype=torch.long), None)
    assert torch.equal(real, torch.tensor([[True, True, True], [True, True, True]]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.int32])
def test_ones_in_the_mask_are_real(dtype):
    real = masks.real_tokens(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[0, 1, 1], [1, 1, 0]]).to(dtype))
    assert torch.equal(real, torch.tensor([[False, True, True], [True, True, False]]))


def test_a_mask_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 5\) and input_ids \(2, 3\)"):
        masks.real_tokens(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 5, dtype=torch.long))


def test_positions_count_real_tokens():
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    expected = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 1, 2, 3, 4]])
    assert torch.equal(masks.positions(real, num_queries=5), expected)


def test_positions_of_the_last_tokens_count_those_before():
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 1]]).bool()
    assert torch.equal(masks.positions(real, num_queries=2), torch.tensor([[1, 2], [2, 3]]))


def test_causal_mask_is_lower_triangular():
    expected = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    assert torch.equal(masks.causal(3, 3), expected)


def test_causal_mask_is_aligned_at_the_bottom_right():
    expected = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(masks.causal(2, 5), expected)


def test_left_padding_is_hidden_and_its_rows_see_nothing():
    real = torch.tensor([[0, 0, 1, 1]]).bool()
    expected = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]).bool()
    assert torch.equal(masks.visible_keys(real, num_queries=4), expected[None, None])


def test_right_padding_is_hidden_and_its_rows_see_the_text():
    real = torch.tensor([[1, 1, 0]]).bool()
    expected = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 0]]).bool()
    assert torch.equal(masks.visible_keys(real, num_queries=3), expected[None, None])


def test_each_row_of_a_batch_has_its_own_padding():
    real = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]]).bool()  # two cached tokens, two new ones
    expected = torch.tensor(
        [
            [[0, 1, 1, 0], [0, 1, 1, 1]],
            [[1, 1, 0, 0], [1, 1, 0, 1]],
            [[1, 1, 1, 0], [1, 1, 1, 1]],
        ]
    ).bool()
    assert torch.equal(masks.visible_keys(real, num_queries=2), expected[:, None])


def test_a_window_counts_the_query_itself():
    real = torch.ones(1, 6).bool()
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 0],
            [0, 0, 0, 1, 1, 1],
        ]
    ).bool()
    assert torch.equal(masks.visible_keys(real, num_queries=6, sliding_window=3), expected[None, None])


def test_a_window_of_one_shows_the_query_alone():
    real = torch.ones(2, 4).bool()
    expected = torch.eye(4).bool().expand(2, 1, 4, 4)
    assert torch.equal(masks.visible_keys(real, num_queries=4, sliding_window=1), expected)


def test_a_window_goes_back_into_the_cache():
    real = torch.ones(1, 5).bool()
    expected = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
    assert torch.equal(masks.visible_keys(real, num_queries=2, sliding_window=3), expected[None, None])


def test_padding_takes_no_place_in_a_window():
    """A row with padding inside, on the left, and none; the last two of six tokens, a window of 3."""
    real = torch.tensor([[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    expected = torch.tensor(
        [
            [[1, 1, 0, 0, 1, 0], [0, 1, 0, 0, 1, 1]],
            [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]],
            [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]],
        ]
    ).bool()
    assert torch.equal(masks.visible_keys(real, num_queries=2, sliding_window=3), expected[:, None])
