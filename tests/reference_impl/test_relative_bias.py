import math

import pytest
import torch

from reference_impl.nn.relative_bias import bucket_starts, buckets, relative_position_bias


def bucket(relative_position, num_buckets, max_distance, bidirectional):
    """The formula of T5's code, for one pair, with exact powers in place of logarithms."""
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = num_buckets if relative_position > 0 else 0
        distance = abs(relative_position)
    else:
        distance = max(-relative_position, 0)
    exact = num_buckets // 2
    if distance < exact:
        return offset + distance
    logarithmic = num_buckets - exact
    steps = 0  # the largest j with (distance / exact)^logarithmic >= (max_distance / exact)^j
    while distance**logarithmic * exact ** (steps + 1) >= max_distance ** (steps + 1) * exact**logarithmic:
        steps += 1
        if steps == logarithmic:
            break
    return offset + min(num_buckets - 1, exact + steps)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (7, 9), (13, 200)])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["encoder", "decoder"])
def test_buckets_follow_the_formula(num_buckets, max_distance, bidirectional):
    relative = torch.arange(-300, 301)[None]
    expected = [[bucket(r, num_buckets, max_distance, bidirectional) for r in range(-300, 301)]]
    assert buckets(relative, num_buckets, max_distance, bidirectional).tolist() == expected


def test_starts_of_the_docstring():
    assert bucket_starts(8, 20) == [0, 1, 2, 3, 4, 6, 9, 14]


def test_a_distance_at_an_exact_power_begins_a_bucket():
    """(8/4)^5 = (128/4)^1: the logarithms' quotient, rounded, is less than 1, and would put 8 one bucket too low."""
    assert math.log(8 / 4) / math.log(128 / 4) * 5 < 1
    assert buckets(torch.tensor([[-7, -8]]), 9, 128, False).tolist() == [[4, 5]]


def test_defaults_of_t5_begin_buckets_where_its_paper_ends_them():
    assert bucket_starts(16, 128)[-2:] == [64, 91]
    assert buckets(torch.tensor([[-1, 0, 1, -127, -128, -5000, 5000]]), 32, 128, True).tolist() == [
        [1, 0, 17, 15, 15, 15, 31]
    ]


def test_a_decoder_does_not_tell_later_keys_apart():
    assert buckets(torch.tensor([[0, 1, 7]]), 8, 20, False).tolist() == [[0, 0, 0]]


def test_bias_is_a_row_of_the_table_a_column_a_head():
    table = torch.arange(24, dtype=torch.float64).view(8, 3)
    queries, keys = torch.tensor([[2, 3], [0, 5]]), torch.tensor([[0, 1, 2, 3], [0, 0, 4, 5]])
    bias = relative_position_bias(table, queries, keys, 9, bidirectional=True)
    assert bias.shape == (2, 3, 2, 4)
    for row in range(2):
        for t in range(2):
            for s in range(4):
                expected = table[bucket(int(keys[row, s] - queries[row, t]), 8, 9, True)]
                assert bias[row, :, t, s].tolist() == expected.tolist()


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(1, 9), (0, 9), (8, 4), (8, 0)])
def test_buckets_that_do_not_fit_are_refused(num_buckets, max_distance):
    with pytest.raises(ValueError, match=f"{num_buckets} buckets of one direction and max_distance={max_distance}"):
        bucket_starts(num_buckets, max_distance)
