import math

import pytest
import torch
from torch import nn

from reference_impl.nn.multi_head_attention import multi_head_attention, sliding_window_attention


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(hidden, features, key_features, key_size=None, value_size=None):
    sizes = {"q": (features, hidden), "k": (key_features, key_size or hidden),
             "v": (key_features, value_size or hidden), "out": (hidden, features)}  # fmt: skip
    drawn_weights = {f"{name}_proj_weight": drawn(*shape, seed=i) for i, (name, shape) in enumerate(sizes.items())}
    return drawn_weights | {f"{name}_proj_bias": drawn(shape[0], seed=9 + i)
                            for i, (name, shape) in enumerate(sizes.items())}  # fmt: skip


# --- multi_head_attention


@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_torchs_module(causal):
    module = nn.MultiheadAttention(6, 2, kdim=5, vdim=7, batch_first=True, dtype=torch.float64)
    ours = weights(6, 6, 6, 5, 7)
    names = {"q_proj_weight": "q_proj_weight", "k_proj_weight": "k_proj_weight", "v_proj_weight": "v_proj_weight",
             "out_proj_weight": "out_proj.weight", "out_proj_bias": "out_proj.bias"}  # fmt: skip
    state = {theirs: ours[name] for name, theirs in names.items()}
    module.load_state_dict(state | {"in_proj_bias": torch.cat([ours[f"{n}_proj_bias"] for n in "qkv"])})
    query, key, value = drawn(3, 4, 6), drawn(3, 4, 5), drawn(3, 4, 7)
    real = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    expected, shares = module(
        query, key, value, key_padding_mask=real == 0, average_attn_weights=False,
        attn_mask=torch.ones(4, 4, dtype=torch.bool).triu(1) if causal else None,
    )  # fmt: skip
    found = multi_head_attention(query, key, value, **ours, num_attention_heads=2, causal=causal, attention_mask=real)
    torch.testing.assert_close(found["y"], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["weights"], shares, rtol=1e-12, atol=1e-12)


def test_sharing_a_key_value_head_is_repeating_it():
    """With 6 query heads and 2 key/value heads, query heads 0 1 2 read head 0 and 3 4 5 read head 1."""
    shared = weights(5, 12, 4)
    rows = [r for head in (0, 0, 0, 1, 1, 1) for r in (2 * head, 2 * head + 1)]
    repeated = shared | {n: shared[n][rows] for n in shared if n[:2] in ("k_", "v_")}
    x = drawn(2, 3, 5)
    found, expected = (
        multi_head_attention(x, x, x, **w, num_attention_heads=6, causal=True)["y"] for w in (shared, repeated)
    )
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_scale_is_that_of_a_head_not_of_the_hidden_size():
    ours = {n: torch.zeros_like(t) for n, t in weights(1, 4, 4).items()}
    ours["q_proj_bias"], ours["k_proj_bias"] = torch.full((4,), 3.0).double(), torch.full((4,), 5.0).double()
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    found = multi_head_attention(one, one, one, **ours, num_attention_heads=1, causal=False)
    assert found["scores"].item() == 4 * 15 / math.sqrt(4)


def test_causal_queries_are_the_last_of_the_keys():
    x = drawn(1, 5, 6)
    whole, last = (
        multi_head_attention(query, x, x, **weights(6, 6, 6), num_attention_heads=2, causal=True)
        for query in (x, x[:, 3:])
    )
    torch.testing.assert_close(last["y"], whole["y"][:, 3:], rtol=1e-13, atol=1e-13)
    assert last["weights"][0, 0].gt(0).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_a_query_that_sees_nothing_gets_weights_of_0():
    x = drawn(1, 3, 6)
    mask = torch.tensor([[0, 0, 1]])
    found = multi_head_attention(x, x, x, **weights(6, 6, 6), num_attention_heads=2, causal=True, attention_mask=mask)
    assert found["weights"][0, 1].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_heads_that_do_not_divide_the_features_are_refused_with_both_numbers():
    x = drawn(1, 3, 6)
    with pytest.raises(ValueError, match="6 rows of q_proj must be divisible by num_attention_heads=4"):
        multi_head_attention(x, x, x, **weights(6, 6, 6), num_attention_heads=4, causal=False)


def test_key_value_heads_that_do_not_divide_the_query_heads_are_refused():
    x = drawn(1, 3, 6)
    with pytest.raises(ValueError, match="4 rows of k_proj must be heads of 2, as many as 3 query heads can share"):
        multi_head_attention(x, x, x, **weights(6, 6, 4), num_attention_heads=3, causal=False)


# --- sliding_window_attention


def seen(queries, keys, window):
    """Which keys have a weight, for the only head."""
    query, key = drawn(1, 1, queries, 4), drawn(1, 1, keys, 4)
    found = sliding_window_attention(query, key, key, window)
    assert torch.equal(found["y"], found["weights"] @ key)
    return found["weights"][0, 0].gt(0).int().tolist()


def test_a_window_of_2_holds_the_query_and_the_key_before_it():
    assert seen(4, 4, 2) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_the_window_of_the_last_queries_reaches_into_the_keys_before_them():
    assert seen(2, 5, 3) == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_a_window_of_1_gives_the_own_value():
    value = drawn(2, 3, 5, 4, seed=1)
    found = sliding_window_attention(drawn(2, 3, 5, 4), drawn(2, 3, 5, 4), value, 1)
    assert torch.equal(found["y"], value)


def test_neighbouring_query_heads_share_a_key_value_head():
    query, key, value = drawn(1, 6, 4, 3), drawn(1, 2, 4, 3, seed=1), drawn(1, 2, 4, 3, seed=2)
    every = [0, 0, 0, 1, 1, 1]
    shared = sliding_window_attention(query, key, value, 2)["y"]
    torch.testing.assert_close(shared, sliding_window_attention(query, key[:, every], value[:, every], 2)["y"])


def test_a_window_of_0_is_refused():
    with pytest.raises(ValueError, match="sliding_window=0 must be 1"):
        seen(3, 3, 0)
