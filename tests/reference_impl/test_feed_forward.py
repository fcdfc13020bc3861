import math

import pytest
import torch

from reference_impl.nn import feed_forward
from reference_impl.nn.feed_forward import (
    BiasedFeedForward,
    Conv1DFeedForward,
    DenseFeedForward,
    GatedFeedForward,
    NormedFeedForward,
)


def gelu_tanh(x):
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


EQUATIONS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": lambda x: max(0.0, x),
}


@pytest.mark.parametrize("hidden_act", EQUATIONS)
def test_activation_follows_its_equation(hidden_act):
    grid = [step / 8 for step in range(-32, 33)]
    expected = torch.tensor([EQUATIONS[hidden_act](x) for x in grid], dtype=torch.float64)
    ours = feed_forward.activation(hidden_act)(torch.tensor(grid, dtype=torch.float64))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)


def test_every_activation_is_tested():
    assert feed_forward.ACTIVATIONS.keys() == EQUATIONS.keys()


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(ValueError, match="hidden_act='quick_gelu' is not implemented; use one of"):
        feed_forward.activation("quick_gelu")


@pytest.mark.parametrize("bias", [False, True])
def test_follows_the_equation(bias):
    block = GatedFeedForward(hidden_size=3, intermediate_size=4, hidden_act="silu", bias=bias).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(generator=generator)
    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)

    def project(linear, vector):
        rows, biases = linear.weight.tolist(), linear.bias.tolist() if bias else [0.0] * linear.out_features
        return [sum(w * v for w, v in zip(row, vector, strict=True)) + b for row, b in zip(rows, biases, strict=True)]

    expected = torch.empty_like(x)
    for b in range(2):
        for t in range(5):
            vector = x[b, t].tolist()
            gate, up = project(block.gate_proj, vector), project(block.up_proj, vector)
            product = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
            expected[b, t] = torch.tensor(project(block.down_proj, product), dtype=torch.float64)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_the_activation_is_a_module_that_hooks_can_read():
    block = GatedFeedForward(hidden_size=3, intermediate_size=4, hidden_act="relu", bias=False)
    seen = []
    block.act_fn.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    block(x)
    ((gate, activated),) = seen
    assert torch.equal(gate, x @ block.gate_proj.weight.T)
    assert torch.equal(activated, gate.clamp(min=0))


def test_the_plain_block_follows_its_equation():
    block = BiasedFeedForward(hidden_size=3, intermediate_size=4, hidden_act="gelu_new").double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(generator=generator)
    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)

    def project(linear, vector):
        rows = zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)
        return [sum(w * v for w, v in zip(row, vector, strict=True)) + bias for row, bias in rows]

    expected = torch.empty_like(x)
    for b in range(2):
        for t in range(5):
            activated = [gelu_tanh(u) for u in project(block.fc1, x[b, t].tolist())]
            expected[b, t] = torch.tensor(project(block.fc2, activated), dtype=torch.float64)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_the_activation_of_the_plain_block_is_a_module_that_hooks_can_read():
    block = BiasedFeedForward(hidden_size=3, intermediate_size=4, hidden_act="relu")
    seen = []
    block.activation_fn.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    block(x)
    ((up, activated),) = seen
    assert torch.equal(up, block.fc1(x))
    assert torch.equal(activated, up.clamp(min=0))


def test_the_conv1d_block_follows_the_equation():
    block = Conv1DFeedForward(hidden_size=3, intermediate_size=4, hidden_act="silu").double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(generator=generator)
    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)

    def project(conv1d, vector):
        columns, biases = conv1d.weight.T.tolist(), conv1d.bias.tolist()
        return [
            sum(w * v for w, v in zip(col, vector, strict=True)) + b for col, b in zip(columns, biases, strict=True)
        ]

    expected = torch.empty_like(x)
    for b in range(2):
        for t in range(5):
            inner = [u / (1 + math.exp(-u)) for u in project(block.c_fc, x[b, t].tolist())]
            expected[b, t] = torch.tensor(project(block.c_proj, inner), dtype=torch.float64)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_norm_and_residual_connection_are_part_of_the_normed_block(pre_norm):
    block = NormedFeedForward(hidden_size=4, intermediate_size=6, eps=0.01, pre_norm=pre_norm).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(generator=generator)
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    w = block.state_dict()

    def norm(values):
        centred = values - values.mean(-1, keepdim=True)
        root = (centred.square().mean(-1, keepdim=True) + 0.01).sqrt()
        return centred / root * w["layer_norm.weight"] + w["layer_norm.bias"]

    def feed(values):
        inner = (values @ w["CoreNet.0.weight"].T + w["CoreNet.0.bias"]).clamp(min=0)
        return inner @ w["CoreNet.3.weight"].T + w["CoreNet.3.bias"]

    expected = x + feed(norm(x)) if pre_norm else norm(x + feed(x))
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hidden_act", ["relu", "silu"])
def test_the_block_without_biases_follows_its_equation(hidden_act):
    block = DenseFeedForward(hidden_size=3, intermediate_size=4, hidden_act=hidden_act).double()
    x = torch.tensor([[0.3, -1.2, 0.5]], dtype=torch.float64)
    act = {"relu": lambda v: max(v, 0.0), "silu": lambda v: v / (1 + math.exp(-v))}[hidden_act]
    inside = [act(sum(map(float.__mul__, row, x[0].tolist()))) for row in block.wi.weight.tolist()]
    expected = [sum(map(float.__mul__, row, inside)) for row in block.wo.weight.tolist()]
    torch.testing.assert_close(block(x), torch.tensor([expected], dtype=torch.float64), rtol=1e-13, atol=1e-13)
    assert [name for name, _ in block.named_parameters()] == ["wi.weight", "wo.weight"]
