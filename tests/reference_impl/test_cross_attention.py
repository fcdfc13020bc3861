import math

import pytest
import torch

from reference_impl.nn.cross_attention import DecodingSession, MultiHeadAttention, all_real
from reference_impl.nn.kv_cache import KVCache

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(2, 5, 6, dtype=torch.float64, generator=GENERATOR)
STATES = torch.randn(2, 4, 6, dtype=torch.float64, generator=GENERATOR)
REAL = torch.tensor([[False, True, True, True], [True, True, False, False]])


def attention(backend="eager"):
    """3 heads of 2, random weights and biases."""
    module = MultiHeadAttention(hidden_size=6, num_attention_heads=3, attention=backend).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module


def equation(module, x, states, visible):
    """One row, number by number; `visible`: the keys that each query may see."""

    def project(name, vector):
        layer = getattr(module, f"{name}_proj")
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        return [sum(w * v for w, v in zip(row, vector, strict=True)) + bias for row, bias in rows]

    queries = [project("q", vector) for vector in x.tolist()]
    keys, values = ([project(name, vector) for vector in states.tolist()] for name in "kv")
    outputs = []
    for query, seen in zip(queries, visible, strict=True):
        context = []
        for start in (0, 2, 4):
            scores = [sum(query[start + d] * keys[s][start + d] for d in range(2)) / math.sqrt(2) for s in seen]
            powers = [math.exp(score) for score in scores]
            for d in range(2):
                mixed = sum(p * values[s][start + d] for p, s in zip(powers, seen, strict=True))
                context.append(mixed / sum(powers))
        outputs.append(project("out", context))
    return torch.tensor(outputs, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_every_query_sees_every_real_token_of_the_source(backend):
    module = attention(backend)
    expected = [
        equation(module, x, s, [r.nonzero()[:, 0].tolist()] * 5) for x, s, r in zip(X, STATES, REAL, strict=True)
    ]
    close(module(X, *module.keys_values(STATES), all_real(REAL)), torch.stack(expected))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_causal_mask_hides_what_comes_later(backend):
    module, causal = attention(backend), torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    expected = torch.stack([equation(module, x, x, [range(t + 1) for t in range(5)]) for x in X])
    close(module(X, *module.keys_values(X), causal), expected)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_source_without_a_real_token_gives_the_output_bias(backend):
    module = attention(backend)
    output = module(X, *module.keys_values(STATES), all_real(torch.zeros_like(REAL)))
    close(output, module.out_proj.bias.expand(2, 5, 6))


def test_the_mask_of_a_source_is_that_of_all_heads_and_queries():
    mask = all_real(REAL)
    assert mask.shape == (2, 1, 1, 4)
    assert mask[:, 0, 0].equal(REAL)


def test_keys_and_values_are_heads_of_neighbouring_features():
    module = attention()
    key, value = module.keys_values(STATES)
    assert key.shape == value.shape == (2, 3, 4, 2)
    close(key[1, 2, 3], module.k_proj(STATES)[1, 3, 4:6])
    close(value[0, 1, 2], module.v_proj(STATES)[0, 2, 2:4])


def test_order_of_the_sources_tokens_does_not_matter():
    """A set of keys and values: only positions in the states could say which comes first."""
    module, order = attention(), torch.tensor([2, 0, 3, 1])
    output = module(X, *module.keys_values(STATES), all_real(REAL))
    close(module(X, *module.keys_values(STATES[:, order]), all_real(REAL[:, order])), output)


def test_parameters_have_the_names_of_the_hub_and_biases():
    names = {name: tuple(tensor.shape) for name, tensor in attention().named_parameters()}
    assert names == {
        f"{part}_proj.{kind}": shape for part in ("q", "k", "v", "out")
        for kind, shape in (("weight", (6, 6)), ("bias", (6,)))
    }  # fmt: skip


def test_scores_and_weights_are_shown_to_hooks():
    module, shown = attention(), {}
    for name in ("scores", "weights"):
        getattr(module, name).register_forward_hook(lambda _m, _x, y, name=name: shown.update({name: y}))
    module(X, *module.keys_values(STATES), all_real(REAL))
    hidden = shown["weights"].masked_select(~all_real(REAL))
    assert shown["scores"].shape == shown["weights"].shape == (2, 3, 5, 4)
    close(shown["weights"].sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    assert not hidden.any()
    assert shown["scores"].masked_select(~all_real(REAL)).all()  # not yet masked


def test_padding_gets_no_gradient():
    states = STATES.clone().requires_grad_()
    module = attention()
    module(X, *module.keys_values(states), all_real(REAL)).sum().backward()
    assert states.grad.isfinite().all()
    assert not states.grad[~REAL].any()
    assert states.grad[REAL].any(dim=-1).all()


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="attention='flash' must be 'eager'"):
        attention("flash")


# --- sessions


def test_a_session_hands_on_ids_mask_and_its_cache():
    cache, calls = KVCache(num_hidden_layers=1), []

    def decode(*given):
        calls.append(given)
        return "logits"

    session = DecodingSession(decode, [], cache)
    assert session.feed("ids", "mask") == session.feed("more") == "logits"
    assert calls == [("ids", "mask", cache), ("more", None, cache)]


def test_a_session_holds_its_memory_and_its_cache():
    cache = KVCache(num_hidden_layers=2, max_length=7)
    memory = [(torch.zeros(2, 3, 4, 2), torch.zeros(2, 3, 4, 2, dtype=torch.float64))] * 2
    session = DecodingSession(lambda *_: None, memory, cache)
    assert session.state_bytes() == 2 * (2 * 3 * 4 * 2) * (4 + 8) + cache.state_bytes()
