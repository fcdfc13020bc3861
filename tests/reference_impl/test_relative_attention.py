import math

import pytest
import torch

from reference_impl.nn.relative_attention import (
    RelativePositions,
    RelativeSelfAttention,
    relative_attention,
    relative_shift,
)
from reference_impl.nn.segment_memory import visible_keys


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


# --- as a module


def module(attention="eager", **biases):
    made = RelativeSelfAttention(
        hidden_size=6, num_attention_heads=2, head_dim=3, attention=attention, **biases
    ).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
    return made


def functional(made, x, memory):
    parts = dict(zip(("q", "k", "v"), made.qkv_net.weight.chunk(3), strict=True))
    parts |= {"r": made.r_net.weight, "o": made.o_net.weight}
    return relative_attention(
        x, drawn(7, 6, seed=1), content_bias=made.r_w_bias, position_bias=made.r_r_bias, memory=memory,
        **{f"{name}_proj_weight": weight for name, weight in parts.items()},
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_module_computes_the_function(attention):
    made, x, memory = module(attention), drawn(2, 3, 6), drawn(2, 4, 6, seed=2)
    got = made.attend(torch.cat((memory, x), dim=1), drawn(7, 6, seed=1), visible_keys(3, 7, None))
    torch.testing.assert_close(got, functional(made, x, memory)["y"], rtol=1e-12, atol=1e-12)


def test_what_no_projection_returns_can_be_hooked():
    made, x, memory, seen = module(), drawn(2, 3, 6), drawn(2, 4, 6, seed=2), {}
    for name in ("query", "key", "value", "content_scores", "position_scores", "weights"):
        made.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    made.attend(torch.cat((memory, x), dim=1), drawn(7, 6, seed=1), visible_keys(3, 7, None))
    wanted = functional(made, x, memory)
    for name in ("content_scores", "position_scores", "weights"):
        torch.testing.assert_close(seen[name], wanted[name], rtol=1e-12, atol=1e-12)
    assert {name: tuple(seen[name].shape) for name in ("query", "key", "value")} == {
        "query": (2, 2, 3, 3), "key": (2, 2, 7, 3), "value": (2, 2, 7, 3),
    }  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_window_hides_what_is_far(attention):
    made, known, distances = module(attention), drawn(2, 7, 6), drawn(7, 6, seed=1)
    changed = known.clone()
    changed[:, 3] += 1
    before, after = (made.attend(x, distances, visible_keys(3, 7, 2)) for x in (known, changed))
    assert torch.equal(before[:, 1:], after[:, 1:])
    assert not torch.isclose(before[:, 0], after[:, 0]).any()


def test_biases_may_be_shared():
    u, v = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in "uv")
    made = RelativeSelfAttention(hidden_size=6, num_attention_heads=2, head_dim=3, content_bias=u, position_bias=v)
    assert made.r_w_bias is u
    assert made.r_r_bias is v


@pytest.mark.parametrize("clamp_len", [0, -1, 2, 9])
def test_positions_are_sinusoids_of_distances_up_to_the_clamp(clamp_len):
    rows = RelativePositions(hidden_size=4, clamp_len=clamp_len)(drawn(1, 1, 4), 5)
    for distance in range(5):
        place = min(distance, clamp_len) if clamp_len > 0 else distance
        expected = [math.sin(place), math.sin(place / 100), math.cos(place), math.cos(place / 100)]
        torch.testing.assert_close(rows[distance], torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-13)
