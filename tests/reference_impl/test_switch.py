import pytest
import torch

from reference_impl.nn.switch import route_to_one, switch_ffn, within_capacity


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {"router_weight": drawn(3, 5), "wi_weight": drawn(3, 4, 5, seed=1), "wo_weight": drawn(3, 5, 4, seed=2)}


def test_an_expert_takes_the_first_tokens_of_each_row():
    """The docstring's example, beside a row whose tokens take no room from it."""
    sent = within_capacity(torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]]), 2, 2)
    assert sent[..., 0].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert sent[..., 1].tolist() == [[0, 0, 1, 0], [0, 1, 1, 0]]


def test_the_likeliest_expert_is_chosen_with_its_softmax_probability():
    probabilities, chosen = route_to_one(torch.tensor([[[1.0, 3.0, 2.0]]], dtype=torch.float64).log())
    assert chosen.tolist() == [[1]]
    torch.testing.assert_close(probabilities, torch.tensor([[[1, 3, 2]]], dtype=torch.float64) / 6, rtol=1e-15, atol=0)


def test_output_is_the_expert_times_its_probability():
    x = drawn(2, 6, 5, seed=3)
    found = switch_ffn(x, **WEIGHTS, expert_capacity=6)
    for row in range(2):
        for place in range(6):
            token = x[row, place]
            share, best = torch.softmax(WEIGHTS["router_weight"] @ token, 0).max(0)
            expected = share * (WEIGHTS["wo_weight"][best] @ torch.relu(WEIGHTS["wi_weight"][best] @ token))
            torch.testing.assert_close(found["y"][row, place], expected, rtol=1e-12, atol=1e-13)


def test_a_token_without_room_gets_0():
    x = drawn(1, 1, 5).expand(1, 4, 5)  # all choose the same expert
    found = switch_ffn(x, **WEIGHTS, expert_capacity=3)
    assert torch.equal(found["y"][:, :3], found["y"][:, :1].expand(1, 3, 5))
    assert found["y"][0, 3].tolist() == [0] * 5
    assert found["dispatched"][0, 3].tolist() == [0] * 3


def test_a_row_does_not_depend_on_the_others():
    x = drawn(3, 6, 5, seed=3)
    together = switch_ffn(x, **WEIGHTS, expert_capacity=2)["y"]
    alone = torch.cat([switch_ffn(row[None], **WEIGHTS, expert_capacity=2)["y"] for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-13)


def test_router_is_in_float32_for_bfloat16():
    weights = {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    found = switch_ffn(drawn(1, 2, 5).bfloat16(), **weights, expert_capacity=2)
    assert (found["probabilities"].dtype, found["y"].dtype) == (torch.float32, torch.bfloat16)


def test_a_capacity_of_0_is_refused():
    with pytest.raises(ValueError, match="expert_capacity=0 must be 1 token or more"):
        switch_ffn(drawn(1, 2, 5), **WEIGHTS, expert_capacity=0)
