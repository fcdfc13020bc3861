import math

import pytest
import torch

from reference_impl.nn import self_attention
from reference_impl.nn.self_attention import SelfAttention

CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
X = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def attention(**options):
    """3 heads of 2, random weights and biases."""
    module = SelfAttention(hidden_size=6, num_attention_heads=3, **options).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module


def equation(module, x, scale):
    """One row, by loops."""
    joint = (x @ module.c_attn.weight + module.c_attn.bias).tolist()
    outputs = []
    for t, row in enumerate(joint):
        context = []
        for head in range(3):
            query = row[2 * head : 2 * head + 2]
            keys = [joint[s][6 + 2 * head : 8 + 2 * head] for s in range(t + 1)]
            values = [joint[s][12 + 2 * head : 14 + 2 * head] for s in range(t + 1)]
            powers = [math.exp(scale * sum(q * k for q, k in zip(query, key, strict=True))) for key in keys]
            context += [sum(p * v[d] for p, v in zip(powers, values, strict=True)) / sum(powers) for d in range(2)]
        outputs.append(context)
    return torch.tensor(outputs, dtype=torch.float64) @ module.c_proj.weight + module.c_proj.bias


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("scale", [None, 0.3, 1.0])
def test_follows_the_equation(scale, backend):
    module = attention(scale=scale, attention=backend)
    expected = torch.stack([equation(module, x, 2**-0.5 if scale is None else scale) for x in X])
    torch.testing.assert_close(module(X, CAUSAL), expected, rtol=1e-12, atol=1e-12)


def test_the_joint_projection_holds_all_queries_then_all_keys_then_all_values():
    query, key, value = self_attention.split_query_key_value(torch.arange(9)[None, None])
    assert (query.tolist(), key.tolist(), value.tolist()) == ([[[0, 1, 2]]], [[[3, 4, 5]]], [[[6, 7, 8]]])


def test_its_parts_can_be_hooked():
    module, seen = attention(), {}
    for name in ("query", "key", "value", "scores", "weights"):
        getattr(module, name).register_forward_hook(lambda _m, _args, out, name=name: seen.update({name: out}))
    module(X, CAUSAL)
    assert {name: tuple(value.shape) for name, value in seen.items()} == {
        "query": (2, 3, 4, 2), "key": (2, 3, 4, 2), "value": (2, 3, 4, 2), "scores": (2, 3, 4, 4),
        "weights": (2, 3, 4, 4),
    }  # fmt: skip
    torch.testing.assert_close(seen["scores"], seen["query"] @ seen["key"].mT / 2**0.5)


def overflowing(upcast_scores):
    """Queries and keys of 200 in both elements: scores of 80,000 before they are scaled; float16 ends at 65,504."""
    module = attention(scale=0.001, upcast_scores=upcast_scores).half()
    with torch.no_grad():
        module.c_attn.weight.zero_()
        module.c_attn.bias.copy_(torch.tensor([200.0] * 12 + [1.0] * 6))
    return module(X.half(), CAUSAL)


def test_upcast_scores_do_not_overflow():
    assert overflowing(upcast_scores=True).isfinite().all()


def test_scores_that_are_not_upcast_do():
    assert overflowing(upcast_scores=False).isnan().all()


def test_upcasting_changes_nothing_in_float64():
    assert torch.equal(attention(upcast_scores=True)(X, CAUSAL), attention()(X, CAUSAL))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="attention='flash' must be 'eager'"):
        SelfAttention(hidden_size=6, num_attention_heads=3, attention="flash")
