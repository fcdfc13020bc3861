import math

import pytest
import torch
from torch import nn

from reference_impl.nn.feed_forward import GatedFeedForward, feed_forward, swiglu


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_feed_forward_agrees_with_torchs_encoder_layer(activation):
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0, activation=activation).double()
    weights = {n.replace(".", "_"): p for n, p in layer.named_parameters() if n.startswith("linear")}
    x = drawn(2, 3, 4)
    torch.testing.assert_close(feed_forward(x, **weights, hidden_act=activation)["y"], layer._ff_block(x))


def test_feed_forward_returns_what_is_on_the_way():
    first, second = torch.tensor([[1.0], [-1.0]]), torch.tensor([[10.0, 100.0]])
    found = feed_forward(torch.tensor([[2.0]]), first, torch.tensor([1.0, 1.0]), second, torch.tensor([0.5]), "relu")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "projected": [[3.0, -1.0]], "activated": [[3.0, 0.0]], "y": [[30.5]],
    }  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_is_the_module_as_a_function(bias):
    block = GatedFeedForward(hidden_size=4, intermediate_size=5, hidden_act="silu", bias=bias).double()
    weights = {name.replace(".", "_"): parameter for name, parameter in block.named_parameters()}
    x = drawn(2, 3, 4)
    assert torch.equal(swiglu(x, **weights)["y"], block(x))


def test_swiglu_activates_the_gate():
    one = torch.ones(1, 1, dtype=torch.float64)
    found = swiglu(one, 2 * one, 3 * one, one)
    assert (found["gate"].item(), found["up"].item()) == (2, 3)
    assert found["y"].item() == found["product"].item() == pytest.approx(2 / (1 + math.exp(-2)) * 3, rel=1e-15)
