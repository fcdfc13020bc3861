import math

import pytest
import torch

from reference_impl.nn import feed_forward
from reference_impl.nn.activations import ACTIVATIONS, activate

EQUATIONS = {
    "relu": lambda x: max(0.0, x),
    "gelu": lambda x: x * math.erfc(-x / math.sqrt(2)) / 2,
    "gelu_new": lambda x: x / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


def test_every_activation_is_tested():
    assert ACTIVATIONS.keys() == EQUATIONS.keys()


@pytest.mark.parametrize("name", EQUATIONS)
def test_follows_its_equation(name):
    grid = [step / 8 for step in range(-32, 33)]
    expected = torch.tensor([EQUATIONS[name](x) for x in grid], dtype=torch.float64)
    y = activate(torch.tensor(grid, dtype=torch.float64), name)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("name", EQUATIONS)
def test_is_the_function_of_the_module_by_that_name(name):
    x = torch.linspace(-6, 6, 41, dtype=torch.float64)
    torch.testing.assert_close(activate(x, name), feed_forward.activation(name)(x), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize("x", [-3e4, 3e4])
def test_far_from_zero_it_is_zero_or_the_identity(name, x):
    y = activate(torch.tensor(x, dtype=torch.float16), name)
    assert y.item() == max(0.0, x)


@pytest.mark.parametrize("name", EQUATIONS)
def test_bfloat16_is_rounded_once(name):
    x = torch.linspace(-4, 4, 65).bfloat16()
    assert torch.equal(activate(x, name), activate(x.float(), name).bfloat16())


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="name='swish' is not implemented; use one of"):
        activate(torch.ones(1), "swish")
