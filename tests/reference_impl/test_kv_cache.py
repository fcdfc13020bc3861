import pytest
import torch

from reference_impl.nn.kv_cache import KVCache, next_capacity

BATCH, KV_HEADS, HEAD_DIM = 2, 3, 4


def chunk(seq, first):
    """`seq` tokens of keys or values; token i is filled with the number first + i."""
    numbers = torch.arange(first, first + seq, dtype=torch.float32)
    return numbers[None, None, :, None].expand(BATCH, KV_HEADS, seq, HEAD_DIM).clone()


def feed(cache, seq, first):
    """One call of a model with one layer; values are the negated keys."""
    tokens = cache.tokens(torch.ones(BATCH, seq, dtype=torch.bool))
    keys, values = cache.layers[0].append(chunk(seq, first), -chunk(seq, first))
    cache.commit(tokens)
    return keys, values


def test_returns_all_keys_and_values_in_the_order_they_were_fed():
    cache = KVCache(num_hidden_layers=1)
    feed(cache, 3, first=0)
    feed(cache, 2, first=3)
    keys, values = feed(cache, 4, first=5)
    assert torch.equal(keys, chunk(9, first=0))
    assert torch.equal(values, -chunk(9, first=0))


def test_capacity_doubles_when_it_is_exceeded():
    cache = KVCache(num_hidden_layers=1)
    capacities = []
    for seq in (3, 2, 4, 1):
        feed(cache, seq, first=0)
        capacities.append(cache.layers[0].keys.shape[2])
    assert capacities == [3, 6, 12, 12]


def test_a_chunk_larger_than_twice_the_capacity_gets_what_it_needs():
    assert next_capacity(3, needed=11, max_length=None) == 11


def test_max_length_is_allocated_at_once():
    cache = KVCache(num_hidden_layers=1, max_length=7)
    feed(cache, 1, first=0)
    assert cache.layers[0].keys.shape == (BATCH, KV_HEADS, 7, HEAD_DIM)


def test_exceeding_max_length_is_refused_with_both_numbers():
    cache = KVCache(num_hidden_layers=1, max_length=7)
    feed(cache, 5, first=0)
    with pytest.raises(ValueError, match="5 cached and 3 new tokens need max_length=8, got max_length=7"):
        cache.extended(torch.ones(BATCH, 3, dtype=torch.bool))


def test_another_batch_size_is_refused_with_both_numbers():
    cache = KVCache(num_hidden_layers=1)
    feed(cache, 5, first=0)
    with pytest.raises(ValueError, match="the cache holds a batch of 2, got 3"):
        cache.extended(torch.ones(3, 1, dtype=torch.bool))


def test_remembers_which_tokens_were_real():
    cache = KVCache(num_hidden_layers=1)
    cache.commit(cache.tokens(torch.tensor([[False, True], [True, True]])))
    extended = cache.extended(torch.tensor([[True], [False]]))
    assert torch.equal(extended, torch.tensor([[False, True, True], [True, True, False]]))


def test_a_call_that_was_not_committed_leaves_no_trace():
    cache = KVCache(num_hidden_layers=1)
    feed(cache, 3, first=0)
    cache.extended(torch.ones(BATCH, 2, dtype=torch.bool))
    cache.layers[0].append(chunk(2, first=100), -chunk(2, first=100))
    keys, _ = feed(cache, 2, first=3)
    assert torch.equal(keys, chunk(5, first=0))


def test_all_layers_of_a_call_write_at_the_same_place():
    cache = KVCache(num_hidden_layers=2)
    tokens = cache.tokens(torch.ones(BATCH, 3, dtype=torch.bool))
    cache.layers[0].append(chunk(3, first=0), chunk(3, first=0))
    keys, _ = cache.layers[1].append(chunk(3, first=10), chunk(3, first=10))
    cache.commit(tokens)
    assert torch.equal(keys, chunk(3, first=10))


def test_keys_that_record_gradients_are_refused():
    cache = KVCache(num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"call the model under torch\.no_grad\(\)"):
        cache.layers[0].append(chunk(1, first=0).requires_grad_(), chunk(1, first=0))


def test_state_bytes_count_the_buffers():
    cache = KVCache(num_hidden_layers=1, max_length=7)
    feed(cache, 5, first=0)
    keys_and_values = 2 * BATCH * KV_HEADS * 7 * HEAD_DIM * 4  # float32
    assert cache.state_bytes() == keys_and_values + BATCH * 5


def test_an_empty_cache_holds_nothing():
    assert KVCache(num_hidden_layers=3).state_bytes() == 0
