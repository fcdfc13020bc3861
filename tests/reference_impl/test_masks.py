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


# --- positions that are given, and windows


def all_real(batch, seq):
    return masks.in_order(torch.ones(batch, seq, dtype=torch.bool))


def test_given_positions_are_used():
    given = torch.tensor([[7, 3]])
    ids = torch.zeros(1, 2, dtype=torch.long)
    assert masks.resolve_positions(given, ids, all_real(1, 5)) is given


def test_one_row_of_positions_may_serve_all():
    given = torch.tensor([[7, 3]])
    ids = torch.zeros(4, 2, dtype=torch.long)
    assert masks.resolve_positions(given, ids, all_real(4, 2)) is given


def test_absent_positions_count_real_tokens():
    real = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    ids = torch.zeros(2, 2, dtype=torch.long)
    assert masks.resolve_positions(None, ids, masks.in_order(real)).tolist() == [[1, 2], [2, 3]]


def test_positions_of_another_shape_are_refused_with_both_shapes():
    ids = torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"position_ids has shape \(2, 2\) and input_ids \(3, 2\)"):
        masks.resolve_positions(torch.zeros(2, 2, dtype=torch.long), ids, all_real(3, 2))


def windowed(real, *, num_queries, sliding_window):
    """What the last queries see, as 0 and 1."""
    return masks.visible_keys(real, num_queries=num_queries, sliding_window=sliding_window).long().tolist()


def test_a_window_holds_that_many_keys_the_query_included():
    assert windowed(torch.ones(1, 5, dtype=torch.bool), num_queries=5, sliding_window=2) == [
        [
            [
                [1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [0, 1, 1, 0, 0],
                [0, 0, 1, 1, 0],
                [0, 0, 0, 1, 1],
            ]
        ]
    ]


def test_the_window_of_the_last_queries_is_aligned_at_the_bottom_right():
    assert windowed(torch.ones(1, 5, dtype=torch.bool), num_queries=2, sliding_window=3) == [
        [[[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]]
    ]


def test_padding_inside_a_text_does_not_narrow_the_window():
    real = torch.tensor([[1, 1, 0, 0, 1]]).bool()
    assert windowed(real, num_queries=1, sliding_window=2) == [[[[0, 1, 0, 0, 1]]]]


def test_left_padding_does_not_move_the_window():
    real = torch.tensor([[0, 0, 1, 1, 1]]).bool()
    assert windowed(real, num_queries=2, sliding_window=2) == [[[[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]]]


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


# --- several texts in a row, and keys in another order


def blocks(lengths, **options):
    """What the texts of one row see, as 0 and 1, text by text."""
    tokens = masks.end_to_end(torch.zeros(1, sum(lengths), dtype=torch.long), lengths)
    mask = masks.visible(tokens, num_queries=sum(lengths), **options)
    assert mask.lengths == list(lengths)
    return [block[0, 0].long().tolist() for block in mask.blocks]


def test_places_start_again_with_each_text():
    tokens = masks.end_to_end(torch.zeros(1, 6, dtype=torch.long), [2, 1, 3])
    assert tokens.place.tolist() == [[0, 1, 0, 0, 1, 2]]
    assert tokens.real.all()


def test_a_text_sees_itself_alone():
    assert blocks([2, 1, 3]) == [[[1, 0], [1, 1]], [[1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]


def test_a_window_lies_inside_a_text():
    assert blocks([1, 3], sliding_window=2) == [[[1]], [[1, 0, 0], [1, 1, 0], [0, 1, 1]]]


@pytest.mark.parametrize(
    ("shape", "lengths"), [((1, 5), [2, 2]), ((1, 5), [5, 0]), ((2, 5), [5]), ((1, 5), [6, -1]), ((1, 0), [0])]
)
def test_texts_that_do_not_fill_one_row_are_refused_with_both_numbers(shape, lengths):
    with pytest.raises(
        ValueError, match=rf"have {sum(lengths)} tokens, input_ids has shape \({shape[0]}, {shape[1]}\)"
    ):
        masks.end_to_end(torch.zeros(shape, dtype=torch.long), lengths)


def test_keys_may_be_stored_in_any_order():
    """Slots hold the tokens at 4, 5, 2, 3 and one is empty; the queries stand at 6 and 7, with a window of 4."""
    tokens = masks.Tokens(torch.tensor([[1, 1, 1, 1, 0, 1, 1]]).bool(), torch.tensor([[4, 5, 2, 3, -1, 6, 7]]))
    expected = torch.tensor([[1, 1, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1, 1]]).bool()
    assert torch.equal(masks.visible(tokens, num_queries=2, sliding_window=4), expected[None, None])
