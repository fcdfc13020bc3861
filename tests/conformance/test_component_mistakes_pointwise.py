"""Norm, activations and feed-forward blocks: known mistakes fail, an independent right function passes every claim.

The ids are those of the catalogue of mistakes.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from judged import not_passed, outputs

# --- layer_norm


def right_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(z, dim=-1, correction=0, keepdim=True)
    return ((z - mean) / (variance + eps).sqrt() * weight + bias).to(x.dtype)


def bessel(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + eps).sqrt() * weight + bias


def eps_outside(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, correction=0, keepdim=True) + eps) * weight + bias


def eps_value(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return right_layer_norm(x, weight, bias, 1e-5)


def rms_for_layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def bias_ignored(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return right_layer_norm(x, weight, torch.zeros_like(weight), eps)


def inplace(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    y = right_layer_norm(x, weight, bias, eps)
    x -= x.mean(-1, keepdim=True)
    return y


def difference_of_means(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / (x.square().mean(-1, keepdim=True) - mean.square() + eps).sqrt() * weight + bias


LAYER_NORM = {
    "ln-bessel": (bessel, "plain"),
    "ln-eps-outside": (eps_outside, "small"),
    "norm-eps-value": (eps_value, "small"),
    "rms-for-layernorm": (rms_for_layernorm, "plain"),
    "norm-weight-or-bias-ignored": (bias_ignored, "plain"),
    "norm-inplace": (inplace, "plain"),
}


def test_right_layer_norm_passes_every_claim() -> None:
    assert not_passed(right_layer_norm, "layer_norm") == {}


@pytest.mark.parametrize("mistake", LAYER_NORM)
def test_layer_norm_mistake_fails(mistake: str) -> None:
    function, case = LAYER_NORM[mistake]
    assert outputs(function, f"layer_norm/{case}").outcome == "fail"


def test_ignored_epsilon_of_layer_norm_is_named() -> None:
    assert outputs(eps_value, "layer_norm/small").equals == "eps ignored"


def test_variance_as_a_difference_of_means_fails_in_float32_far_from_zero() -> None:
    assert outputs(difference_of_means, "layer_norm/plain", "float32").outcome == "pass"
    assert outputs(difference_of_means, "layer_norm/offset", "float32").outcome == "fail"


# --- activations


def right_activation(x: Tensor, name: str) -> Tensor:
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    if name == "relu":
        return x * (x > 0)
    if name == "silu":
        y = z / (1 + torch.exp(-z.clamp(min=-700.0 if z.dtype == torch.float64 else -80.0)))
    elif name == "gelu":
        y = z * torch.special.ndtr(z)
    else:
        # tanh(a) = 2 σ(2a) − 1
        y = z * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z.pow(3)))
    return y.to(x.dtype)


def gelu_swapped(x: Tensor, name: str) -> Tensor:
    return right_activation(x, {"gelu": "gelu_new", "gelu_new": "gelu"}.get(name, name))


def gelu_without_cube(x: Tensor, name: str) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * x * 1.044715))


def gelu_rounded_constant(x: Tensor, name: str) -> Tensor:
    return x / 2 * (1 + torch.tanh(0.7979 * (x + 0.0447 * x**3)))


def quick_gelu(x: Tensor, name: str) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def silu_of_exponentials(x: Tensor, name: str) -> Tensor:
    return x * torch.exp(x) / (1 + torch.exp(x))


def relu_below_zero(x: Tensor, name: str) -> Tensor:
    return F.leaky_relu(x, 0.01)


ACTIVATIONS = {
    "gelu-exact-for-tanh": (gelu_swapped, "gelu_new"),
    "gelu-tanh-for-exact": (gelu_swapped, "gelu"),
    "gelu-tanh-formula, no cube": (gelu_without_cube, "gelu_new"),
    "gelu-tanh-formula, rounded constants": (gelu_rounded_constant, "gelu_new"),
    "act-wrong-function, quick GELU": (quick_gelu, "gelu"),
    "act-wrong-function, quick GELU for SiLU": (quick_gelu, "silu"),
    "silu as a quotient of infinities": (silu_of_exponentials, "silu-large"),
    "relu with a slope": (relu_below_zero, "plain"),
}


def test_right_activations_pass_every_claim() -> None:
    assert not_passed(right_activation, "activations") == {}


@pytest.mark.parametrize("mistake", ACTIVATIONS)
def test_activation_mistake_fails(mistake: str) -> None:
    function, case = ACTIVATIONS[mistake]
    assert outputs(function, f"activations/{case}").outcome == "fail"


def test_the_other_gelu_is_named_and_fails_in_float32_as_well() -> None:
    result = outputs(gelu_swapped, "activations/gelu_new")
    assert result.equals == "the exact form instead of tanh"
    assert outputs(gelu_swapped, "activations/gelu_new", "float32").outcome == "fail"


# --- feed_forward


def right_feed_forward(
    x: Tensor, linear1_weight: Tensor, linear1_bias: Tensor, linear2_weight: Tensor, linear2_bias: Tensor,
    hidden_act: str,
) -> dict[str, Tensor]:  # fmt: skip
    projected = torch.einsum("bth,fh->btf", x, linear1_weight) + linear1_bias
    activated = right_activation(projected, hidden_act)
    y = torch.einsum("btf,hf->bth", activated, linear2_weight) + linear2_bias
    return {"y": y, "projected": projected, "activated": activated}


def first_bias_dropped(linear1_bias: Tensor, **given: Any) -> Tensor:
    return right_feed_forward(linear1_bias=torch.zeros_like(linear1_bias), **given)["y"]


def second_bias_dropped(linear2_bias: Tensor, **given: Any) -> Tensor:
    return right_feed_forward(linear2_bias=torch.zeros_like(linear2_bias), **given)["y"]


def always_relu(hidden_act: str, **given: Any) -> Tensor:
    return right_feed_forward(hidden_act="relu", **given)["y"]


def transposed_by_shape(linear1_weight: Tensor, linear2_weight: Tensor, **given: Any) -> Tensor:
    """Conv1D's layout is guessed where the shape allows it."""
    hidden = given["x"].shape[-1]
    first = linear1_weight.T if linear1_weight.shape[0] == hidden else linear1_weight
    return right_feed_forward(linear1_weight=first, linear2_weight=linear2_weight, **given)["y"]


def activated_at_the_end(
    x: Tensor, linear1_weight: Tensor, linear1_bias: Tensor, linear2_weight: Tensor, linear2_bias: Tensor,
    hidden_act: str,
) -> Tensor:  # fmt: skip
    return F.relu(F.linear(F.linear(x, linear1_weight, linear1_bias), linear2_weight, linear2_bias))


FEED_FORWARD = {
    "ffn-bias-dropped, first": (first_bias_dropped, "plain"),
    "ffn-bias-dropped, second": (second_bias_dropped, "plain"),
    "act-wrong-function": (always_relu, "field-hidden_act-silu"),
    "transpose-guessed-by-shape": (transposed_by_shape, "square"),
    "activation after the second projection": (activated_at_the_end, "plain"),
}


def test_right_feed_forward_passes_every_claim() -> None:
    assert not_passed(right_feed_forward, "feed_forward") == {}


@pytest.mark.parametrize("mistake", FEED_FORWARD)
def test_feed_forward_mistake_fails(mistake: str) -> None:
    function, case = FEED_FORWARD[mistake]
    assert outputs(function, f"feed_forward/{case}").outcome == "fail"


def test_ignored_activation_is_named() -> None:
    assert outputs(always_relu, "feed_forward/field-hidden_act-gelu").equals == "hidden_act ignored"


def test_transposing_by_shape_is_seen_only_where_all_sizes_are_equal() -> None:
    assert outputs(transposed_by_shape, "feed_forward/plain").outcome == "pass"


def test_wrong_intermediate_value_fails_where_the_output_is_right() -> None:
    def wrong_on_the_way(**given: Any) -> dict[str, Tensor]:
        returned = right_feed_forward(**given)
        return returned | {"projected": returned["activated"]}

    result = outputs(wrong_on_the_way, "feed_forward/plain")
    assert (result.outcome, result.message) == ("fail", "projected differ from the oracle's")


# --- swiglu


def right_swiglu(
    x: Tensor, gate_proj_weight: Tensor, up_proj_weight: Tensor, down_proj_weight: Tensor,
    gate_proj_bias: Tensor | float = 0.0, up_proj_bias: Tensor | float = 0.0, down_proj_bias: Tensor | float = 0.0,
) -> dict[str, Tensor]:  # fmt: skip
    gate = x @ gate_proj_weight.mT + gate_proj_bias
    up = x @ up_proj_weight.mT + up_proj_bias
    product = right_activation(gate, "silu") * up
    return {"y": product @ down_proj_weight.mT + down_proj_bias, "gate": gate, "up": up, "product": product}


def swiglu_swapped(
    gate_proj_weight: Tensor, up_proj_weight: Tensor, gate_proj_bias: Tensor | float = 0.0,
    up_proj_bias: Tensor | float = 0.0, **given: Any,
) -> Tensor:  # fmt: skip
    return right_swiglu(
        gate_proj_weight=up_proj_weight, up_proj_weight=gate_proj_weight,
        gate_proj_bias=up_proj_bias, up_proj_bias=gate_proj_bias, **given,
    )["y"]  # fmt: skip


def roles_in_file_order(
    x: Tensor, gate_proj_weight: Tensor, up_proj_weight: Tensor, down_proj_weight: Tensor
) -> Tensor:
    """w1, w2, w3 taken for gate, up, down: what is w2 is the way down."""
    return right_swiglu(x, gate_proj_weight, down_proj_weight, up_proj_weight)["y"]


def swiglu_down_transposed(down_proj_weight: Tensor, **given: Any) -> Tensor:
    return right_swiglu(down_proj_weight=down_proj_weight.T, **given)["y"]


def gated_by_gelu(x: Tensor, gate_proj_weight: Tensor, up_proj_weight: Tensor, down_proj_weight: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, gate_proj_weight)) * F.linear(x, up_proj_weight), down_proj_weight)


def gated_by_sigmoid(x: Tensor, gate_proj_weight: Tensor, up_proj_weight: Tensor, down_proj_weight: Tensor) -> Tensor:
    return F.linear(torch.sigmoid(F.linear(x, gate_proj_weight)) * F.linear(x, up_proj_weight), down_proj_weight)


def swiglu_biases_dropped(
    x: Tensor, gate_proj_weight: Tensor, up_proj_weight: Tensor, down_proj_weight: Tensor
) -> Tensor:
    return right_swiglu(x, gate_proj_weight, up_proj_weight, down_proj_weight)["y"]


SWIGLU = {
    "swiglu-swap": (swiglu_swapped, "plain"),
    "swiglu-swap, with biases": (swiglu_swapped, "distinct"),
    "expert-role-map": (roles_in_file_order, "square"),
    "transpose-guessed-by-shape": (swiglu_down_transposed, "square"),
    "act-wrong-function, GELU": (gated_by_gelu, "plain"),
    "act-wrong-function, sigmoid": (gated_by_sigmoid, "plain"),
    "ffn-bias-dropped": (swiglu_biases_dropped, "distinct"),
}


def test_right_swiglu_passes_every_claim() -> None:
    assert not_passed(right_swiglu, "swiglu") == {}


@pytest.mark.parametrize("mistake", SWIGLU)
def test_swiglu_mistake_fails(mistake: str) -> None:
    function, case = SWIGLU[mistake]
    assert outputs(function, f"swiglu/{case}").outcome == "fail"
