import pytest
import torch

from reference_impl.nn.segment_memory import SegmentMemory, remember, visible_keys


def tokens(first, last):
    """One row of width 1 whose token n is the number n."""
    return torch.arange(first, last + 1, dtype=torch.float64).view(1, -1, 1)


def test_memory_spans_segments_and_holds_the_last_tokens():
    """The docstring's example: mem_len 6, segments of 4."""
    memory, held = None, []
    for start in (0, 4, 8):
        memory = remember(memory, tokens(start, start + 3), 6)
        held.append(memory.flatten().tolist())
    assert held == [[0, 1, 2, 3], [2, 3, 4, 5, 6, 7], [6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("mem_len", "held"), [(0, []), (1, [8]), (3, [6, 7, 8]), (4, [5, 6, 7, 8]), (9, [1, 2, 3, 4, 5, 6, 7, 8])]
)
def test_a_segment_may_be_shorter_or_longer_than_the_memory(mem_len, held):
    old = remember(None, tokens(1, 5), mem_len)
    assert remember(old, tokens(6, 8), mem_len).flatten().tolist() == held


def test_an_empty_segment_changes_nothing():
    old = remember(None, tokens(1, 5), 3)
    assert remember(old, tokens(1, 5)[:, :0], 3).flatten().tolist() == [3, 4, 5]


def test_memory_carries_no_gradient_and_no_larger_tensor():
    memory = remember(None, tokens(1, 5).requires_grad_(), 2)
    assert not memory.requires_grad
    assert memory.untyped_storage().nbytes() == 2 * 8


def test_memory_is_a_copy():
    segment = tokens(1, 5)
    memory = remember(None, segment, 9)
    segment += 1
    assert memory.flatten().tolist() == [1, 2, 3, 4, 5]


def test_layers_move_together_at_the_commit():
    memory = SegmentMemory(num_layers=2, mem_len=3)
    assert (memory.length, memory.state_bytes()) == (0, 0)
    memory.commit([tokens(1, 4), tokens(11, 14)])
    assert (memory.length, memory.state_bytes()) == (3, 2 * 3 * 8)
    assert [layer.flatten().tolist() for layer in memory.of_batch(1)] == [[2, 3, 4], [12, 13, 14]]


def test_without_window_a_query_sees_memory_and_all_before_it():
    assert visible_keys(3, 5, None)[0, 0].long().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_same_length_shows_so_many_keys_the_querys_own_among_them():
    """The docstring's example: after a full memory of 2 the first query does not see the first remembered token."""
    assert visible_keys(3, 5, 2)[0, 0].long().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_same_length_hides_keys_of_a_first_segment_too():
    assert visible_keys(4, 4, 2)[0, 0].long().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
