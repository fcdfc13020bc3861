import math

import pytest
import torch

from reference_impl.nn import moe
from reference_impl.nn.moe import MixtureOfExperts, Router

LOGITS = torch.tensor([[0.5, -1.0, 2.0, 0.0, 1.5], [3.0, 0.1, 0.2, 2.9, -4.0]], dtype=torch.float64)
SIZES = {"hidden_size": 6, "intermediate_size": 7, "hidden_act": "silu", "num_local_experts": 5}


def mixture(num_experts_per_tok=2, dtype=torch.float64):
    layer = MixtureOfExperts(**SIZES, num_experts_per_tok=num_experts_per_tok)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer.to(dtype)


def tokens(*shape):
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- routing


def test_the_heaviest_experts_are_chosen_in_order():
    _, chosen = moe.route(LOGITS, 3)
    assert chosen.tolist() == [[2, 4, 0], [0, 3, 2]]


def test_weights_are_a_softmax_over_the_chosen_logits():
    weights, _ = moe.route(LOGITS, 2)
    close(weights, torch.tensor([[2.0, 1.5], [3.0, 2.9]], dtype=torch.float64).softmax(-1))


def test_one_expert_has_all_the_weight():
    weights, _ = moe.route(LOGITS, 1)
    close(weights, torch.ones(2, 1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_router_computes_in_float32(dtype):
    router = Router(hidden_size=6, num_local_experts=5).to(dtype)
    x = tokens(4).to(dtype)
    logits = router(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, x.float() @ router.weight.float().T)


# --- the layer


@pytest.mark.parametrize("num_experts_per_tok", [1, 2, 5])
def test_a_token_gets_the_weighted_sum_of_its_experts(num_experts_per_tok):
    """One token after another, one expert after another."""
    layer, x = mixture(num_experts_per_tok), tokens(2, 3)
    output = layer(x)
    for row in range(2):
        for place in range(3):
            token = x[row, place]
            logits = [(token @ weight).item() for weight in layer.gate.weight]
            chosen = sorted(range(5), key=lambda e: -logits[e])[:num_experts_per_tok]
            total = sum(math.exp(logits[e]) for e in chosen)
            expected = torch.zeros(6, dtype=torch.float64)
            for e in chosen:
                w1, w2, w3 = (getattr(layer.experts[e], name).weight for name in ("w1", "w2", "w3"))
                gate = w1 @ token
                expected += math.exp(logits[e]) / total * (w2 @ (gate / (1 + torch.exp(-gate)) * (w3 @ token)))
            close(output[row, place], expected)


def test_an_expert_that_no_token_chose_gets_a_gradient_of_zero():
    layer = mixture()
    with torch.no_grad():
        layer.gate.weight[3] = -100.0
    layer(tokens(4).abs()).sum().backward()
    assert not layer.experts[3].w1.weight.grad.any()
    assert layer.experts[3].w1.weight.grad is not None


def test_no_token_is_dropped_when_all_choose_one_expert():
    layer = mixture(num_experts_per_tok=1)
    with torch.no_grad():
        layer.gate.weight[2] = 100.0
    x = tokens(40).abs()
    close(layer(x), layer.experts[2](x))


def test_outputs_can_be_read_by_token_and_place_in_its_choice():
    layer, x, seen = mixture(), tokens(2, 3), {}
    layer.expert_outputs.register_forward_hook(lambda m, args, out: seen.update(outputs=out))
    layer.weights.register_forward_hook(lambda m, args, out: seen.update(weights=out))
    layer(x)
    _, chosen = moe.route(layer.gate(x), 2)
    close(seen["outputs"][1, 2, 1], layer.experts[int(chosen[1, 2, 1])](x[1, 2]))
    close(seen["weights"].sum(-1), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weighted_sums_are_rounded_once(dtype):
    outputs, weights = tokens(3, 2).to(dtype), torch.tensor([[0.7, 0.3], [0.51, 0.49], [0.9, 0.1]])
    exact = (weights[..., None].double() * outputs.double()).sum(1)
    combined = moe.combine(outputs, weights)
    assert combined.dtype == dtype
    assert torch.equal(combined, exact.to(dtype))


def test_no_tokens_give_no_outputs():
    assert mixture()(tokens(3, 0)).shape == (3, 0, 6)


# --- the loss


def test_load_balancing_loss_follows_its_equation():
    """Two layers of three tokens, counted token by token."""
    layers = [tokens(1, 3)[..., :5], tokens(1, 5)[:, 2:, 1:]]
    frequency, probability = [0.0] * 5, [0.0] * 5
    for logits in layers:
        for token in logits[0].tolist():
            powers = [math.exp(logit) for logit in token]
            for expert in range(5):
                probability[expert] += powers[expert] / sum(powers) / 6
                frequency[expert] += (sorted(token, reverse=True).index(token[expert]) < 2) / 6
    expected = 5 * sum(f * p for f, p in zip(frequency, probability, strict=True))
    assert moe.load_balancing_loss(layers, 2).item() == pytest.approx(expected, rel=1e-12)


def test_padding_does_not_count_in_the_load_balancing_loss():
    logits, real = tokens(2, 4)[..., :5], torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]).bool()
    expected = moe.load_balancing_loss([logits[real][None]], 2)
    close(moe.load_balancing_loss([logits], 2, real), expected)


def test_even_use_of_all_experts_has_a_loss_of_k():
    assert moe.load_balancing_loss([10 * torch.eye(5)[None]], 1).item() == pytest.approx(1.0)


# --- the router's bias, and its losses


def test_bias_of_a_router_is_added_in_float32():
    router = Router(hidden_size=6, num_local_experts=5, bias=True).to(torch.bfloat16)
    with torch.no_grad():
        router.bias.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0, 1.0]))
    x = tokens(4).to(torch.bfloat16)
    assert torch.equal(router(x), x.float() @ router.weight.float().T + router.bias.float())
    assert list(dict(Router(hidden_size=6, num_local_experts=5).named_parameters())) == ["weight"]


def test_z_loss_is_the_mean_of_squared_log_sums():
    expected = sum(math.log(sum(math.exp(v) for v in token)) ** 2 for token in LOGITS.tolist()) / 2
    assert moe.router_z_loss(LOGITS[None]).item() == pytest.approx(expected, rel=1e-14)


def test_router_logits_are_recorded_in_their_order_and_only_inside():
    layers = torch.nn.Sequential(mixture(), mixture(1))
    x = tokens(2, 3)
    with moe.recorded_router_logits(layers) as recorded:
        layers(x)
    layers(x)
    assert len(recorded) == 2
    close(recorded[0], layers[0].gate(x))
    close(recorded[1], layers[1].gate(layers[0](x)))
