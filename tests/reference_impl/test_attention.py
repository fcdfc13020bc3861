import math

import pytest
import torch
from torch import nn

from reference_impl.nn import attention, masks, rotary
from reference_impl.nn.attention import AttentionKernel, GroupedQueryAttention

BATCH, SEQ, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 3, 5, 10, 6, 2, 4


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def block(kv_heads=KV_HEADS, backend="eager", bias=True):
    module = GroupedQueryAttention(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        bias=bias,
        attention=backend,
    ).double()
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed) / 2)
    return module


def tables(seq=SEQ):
    return rotary.tables(torch.arange(seq)[None], HEAD_DIM, 100.0, dtype=torch.float64)


def causal(seq=SEQ):
    return masks.causal(seq, seq)[None, None]


# --- parts


def test_a_head_is_a_run_of_neighbouring_features():
    x = torch.arange(12.0).view(1, 2, 6)  # two tokens
    expected = torch.tensor([[[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]], dtype=torch.float32)
    assert torch.equal(attention.split_heads(x, 3), expected)


def test_merging_puts_heads_side_by_side():
    x = torch.tensor([[[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]], dtype=torch.float32)
    assert torch.equal(attention.merge_heads(x), torch.arange(12.0).view(1, 2, 6))


def test_neighbouring_query_heads_share_a_key_value_head():
    x = torch.tensor([10.0, 20.0])[None, :, None, None]
    expected = torch.tensor([10.0, 10.0, 10.0, 20.0, 20.0, 20.0])[None, :, None, None]
    assert torch.equal(attention.repeat_key_value_heads(x, 6), expected)


def test_scores_are_dot_products_over_the_root_of_head_dim():
    query = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]], dtype=torch.float64)
    key = torch.tensor([[[[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, -1.0]]]], dtype=torch.float64)
    assert torch.equal(attention.attention_scores(query, key), torch.tensor([[[[0.5, 1.0]]]], dtype=torch.float64))


def test_weights_are_a_softmax_over_the_visible_keys():
    scores = torch.tensor([[[[math.log(1.0), math.log(3.0), 50.0]]]], dtype=torch.float64)
    weights = attention.attention_weights(scores, torch.tensor([[[[True, True, False]]]]))
    expected = torch.tensor([[[[0.25, 0.75, 0.0]]]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-15, atol=0)


def test_hidden_keys_get_exactly_nothing_whatever_the_scores():
    scores = torch.tensor([[[[-1e30, 1e30]]]])
    weights = attention.attention_weights(scores, torch.tensor([[[[True, False]]]]))
    assert torch.equal(weights, torch.tensor([[[[1.0, 0.0]]]]))


def test_a_query_that_sees_nothing_has_no_weights():
    weights = attention.attention_weights(torch.ones(1, 1, 2, 2), torch.tensor([[[[False, False], [True, True]]]]))
    assert torch.equal(weights, torch.tensor([[[[0.0, 0.0], [0.5, 0.5]]]]))


def test_float16_weights_are_rounded_once():
    scores = torch.tensor([[[[0.0, -7.0]]]], dtype=torch.float16)
    weights = attention.attention_weights(scores, torch.tensor([[[[True, True]]]]))
    exact = [1 / (1 + math.exp(-7)), math.exp(-7) / (1 + math.exp(-7))]
    assert torch.equal(weights, torch.tensor([[[exact]]], dtype=torch.float64).half())


# --- the whole block


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("bias", [False, True])
def test_agrees_with_torch_when_every_query_head_has_its_own_keys_and_nothing_is_rotated(backend, bias):
    ours = GroupedQueryAttention(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        bias=bias,
        attention=backend,
    ).double()
    theirs = nn.MultiheadAttention(HEADS * HEAD_DIM, HEADS, bias=bias, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for seed, parameter in enumerate(theirs.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed) / 2)
        ours.o_proj.load_state_dict(theirs.out_proj.state_dict())
        for third, projection in enumerate((ours.q_proj, ours.k_proj, ours.v_proj)):
            projection.weight.copy_(theirs.in_proj_weight.chunk(3)[third])
            if bias:
                projection.bias.copy_(theirs.in_proj_bias.chunk(3)[third])
    x = random(BATCH, SEQ, HEADS * HEAD_DIM, seed=9)
    cos, sin = torch.ones(1, SEQ, HEAD_DIM // 2).double(), torch.zeros(1, SEQ, HEAD_DIM // 2).double()
    expected, _ = theirs(x, x, x, attn_mask=~causal()[0, 0], need_weights=False)
    torch.testing.assert_close(ours(x, cos, sin, causal()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_follows_the_equation_with_grouped_queries(backend):
    module, x = block(backend=backend), random(BATCH, SEQ, HIDDEN, seed=9)
    cos, sin = tables()
    query = (x @ module.q_proj.weight.T + module.q_proj.bias).view(BATCH, SEQ, HEADS, HEAD_DIM)
    key = (x @ module.k_proj.weight.T + module.k_proj.bias).view(BATCH, SEQ, KV_HEADS, HEAD_DIM)
    value = (x @ module.v_proj.weight.T + module.v_proj.bias).view(BATCH, SEQ, KV_HEADS, HEAD_DIM)

    def turned(vector, t):  # half-split pairs as complex numbers
        return torch.complex(vector[:2], vector[2:]) * torch.complex(cos[0, t], sin[0, t])

    expected = torch.empty_like(x)
    for b in range(BATCH):
        for t in range(SEQ):
            heads = []
            for h in range(HEADS):
                group = h // 3
                scores = [
                    (turned(query[b, t, h], t) * turned(key[b, s, group], s).conj()).real.sum().item() / math.sqrt(4)
                    for s in range(t + 1)
                ]
                exponentials = [math.exp(score) for score in scores]
                heads.append(sum(e * value[b, s, group] for s, e in enumerate(exponentials)) / sum(exponentials))
            expected[b, t] = module.o_proj.weight @ torch.cat(heads) + module.o_proj.bias
    torch.testing.assert_close(module(x, cos, sin, causal()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_fused_and_written_out_agree_under_padding(kv_heads):
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    mask = masks.visible_keys(real, num_queries=SEQ)
    x = random(BATCH, SEQ, HIDDEN, seed=9)
    written_out = block(kv_heads)(x, *tables(), mask)
    fused = block(kv_heads, backend="sdpa")(x, *tables(), mask)
    torch.testing.assert_close(fused, written_out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_query_that_sees_nothing_returns_the_output_bias(backend):
    module = block(backend=backend)
    mask = causal().clone()
    mask[..., 0, :] = False
    output = module(random(BATCH, SEQ, HIDDEN, seed=9), *tables(), mask)
    torch.testing.assert_close(output[:, 0], module.o_proj.bias.expand(BATCH, HIDDEN), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_gradients_are_finite_when_a_query_sees_nothing(backend):
    module, x = block(backend=backend), random(BATCH, SEQ, HIDDEN, seed=9).requires_grad_()
    mask = causal().clone()
    mask[..., 0, :] = False
    module(x, *tables(), mask).sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, *module.parameters()))


def test_hooks_read_what_no_projection_returns():
    module, shapes = block(), {}
    for name in ("query_rotated", "key_rotated", "scores", "weights"):
        module.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: shapes.update({name: tuple(output.shape)})
        )
    module(random(BATCH, SEQ, HIDDEN, seed=9), *tables(), causal())
    assert shapes == {
        "query_rotated": (3, 6, 5, 4),
        "key_rotated": (3, 2, 5, 4),
        "scores": (3, 6, 5, 5),
        "weights": (3, 6, 5, 5),
    }


def test_hooked_scores_are_not_masked_yet():
    module, seen = block(), {}
    for name in ("query_rotated", "key_rotated", "scores"):
        module.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: seen.update({name: output})
        )
    module(random(BATCH, SEQ, HIDDEN, seed=9), *tables(), causal())
    key = torch.stack([seen["key_rotated"][:, h // 3] for h in range(HEADS)], dim=1)
    expected = torch.einsum("bhtd,bhsd->bhts", seen["query_rotated"], key) / 2
    torch.testing.assert_close(seen["scores"], expected, rtol=1e-12, atol=1e-12)


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="attention='flash' must be 'eager'"):
        block(backend="flash")


def test_a_bias_is_added_to_the_scaled_scores_by_both_kernels():
    """The last query sees nothing: its result is 0 whatever its bias."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (5, 6, 6))
    bias = torch.randn(1, 3, 5, 6, generator=generator, dtype=torch.float64)
    mask = torch.ones(2, 1, 5, 6, dtype=torch.bool).tril(1)
    mask[:, :, -1] = False
    weights = ((query @ key.transpose(2, 3)) * 0.3 + bias).masked_fill(~mask, -1e9).softmax(-1)
    expected = weights.masked_fill(~mask, 0.0) @ value
    for kernel in ("eager", "sdpa"):
        found = AttentionKernel(kernel, scale=0.3).attend(query, key, value, mask, bias)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
