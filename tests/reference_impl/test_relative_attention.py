import pytest
import torch

from reference_impl.nn.relative_attention import relative_attention, relative_shift


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(hidden, heads, head_dim, position=1.0):
    """position: factor of everything that has to do with positions."""
    features = heads * head_dim
    projections = {f"{n}_proj_weight": drawn(features, hidden, seed=i) for i, n in enumerate("qkvr")}
    projections["r_proj_weight"] *= position
    return projections | {
        "o_proj_weight": drawn(hidden, features, seed=5),
        "content_bias": drawn(heads, head_dim, seed=6),
        "position_bias": drawn(heads, head_dim, seed=7),
    }


def test_shift_puts_distance_m_plus_i_minus_j_at_key_j():
    """The docstring's example: 12 is query 1 at distance 2."""
    by_distance = torch.tensor([[[[2.0, 1.0, 0.0], [12.0, 11.0, 10.0]]]])
    assert relative_shift(by_distance).tolist() == [[[[1, 0, 0], [12, 11, 10]]]]


def test_shift_is_a_gather_up_to_the_query():
    queries, keys = 4, 9
    by_distance = drawn(2, 3, queries, keys)  # column c: distance S − 1 − c
    shifted = relative_shift(by_distance)
    for i in range(queries):
        for j in range(keys - queries + i + 1):
            distance = keys - queries + i - j
            assert torch.equal(shifted[..., i, j], by_distance[..., i, keys - 1 - distance])


def test_a_segment_after_its_memory_gives_the_last_rows_of_both_as_one_segment():
    whole, distances = drawn(2, 7, 6), drawn(7, 6, seed=1)
    together = relative_attention(whole, distances, **weights(6, 2, 3))["y"]
    apart = relative_attention(whole[:, 4:], distances, **weights(6, 2, 3), memory=whole[:, :4])["y"]
    torch.testing.assert_close(apart, together[:, 4:], rtol=1e-12, atol=1e-12)


def test_later_tokens_do_not_change_earlier_rows():
    x, distances = drawn(1, 5, 6), drawn(5, 6, seed=1)
    changed = x.clone()
    changed[:, 3] += 1
    before, after = (relative_attention(given, distances, **weights(6, 2, 3))["y"] for given in (x, changed))
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.isclose(before[:, 3:], after[:, 3:]).any(-1).all()


def test_without_positions_the_order_of_the_memory_does_not_matter():
    x, memory, distances = drawn(2, 3, 6), drawn(2, 4, 6, seed=2), drawn(7, 6, seed=1)
    plain, reordered = (
        relative_attention(x, distances, **weights(6, 2, 3, position=0.0), memory=m)["y"]
        for m in (memory, memory.flip(1))
    )
    torch.testing.assert_close(plain, reordered, rtol=1e-12, atol=1e-12)


def test_scores_are_content_and_position_together():
    x, distances = drawn(2, 4, 6), drawn(4, 6, seed=1)
    found = relative_attention(x, distances, **weights(6, 2, 3))
    scores = (found["content_scores"] + found["position_scores"]).masked_fill(torch.ones(4, 4).triu(1) > 0, -torch.inf)
    torch.testing.assert_close(found["weights"], scores.softmax(-1), rtol=1e-12, atol=1e-15)


def test_gradients_reach_the_memory():
    """Stopping them is the model's business."""
    memory = drawn(1, 2, 6).requires_grad_()
    relative_attention(drawn(1, 3, 6), drawn(5, 6), **weights(6, 2, 3), memory=memory)["y"].sum().backward()
    assert memory.grad is not None
    assert memory.grad.abs().min() > 0


def test_fewer_distances_than_keys_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="4 distances are too few for 5 keys"):
        relative_attention(drawn(1, 3, 6), drawn(4, 6), **weights(6, 2, 3), memory=drawn(1, 2, 6))
