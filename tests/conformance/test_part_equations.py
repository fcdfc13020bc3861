"""The loops that decide where no library does, against what is known without them."""

import math

import pytest
import torch
import torch.nn.functional as F

from conformance.oracles.equations import relative_attention, switch
from conformance.oracles.equations.sinusoid import position_encoding


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_sinusoids_are_the_papers_at_a_position_worked_out_by_hand() -> None:
    # d = 4: the divisors are 10000^0 = 1 and 10000^(2/4) = 100
    expected = [math.sin(300), math.cos(300), math.sin(3), math.cos(3)]
    assert position_encoding(300, 4, "interleaved") == pytest.approx(expected, rel=1e-15)


def test_concatenated_sinusoids_are_those_of_marian_in_transformers() -> None:
    """To float32, in which Marian's table is."""
    marian = pytest.importorskip("transformers.models.marian.modeling_marian")
    table = marian.MarianSinusoidalPositionalEmbedding(50, 7)
    with torch.no_grad():
        table.weight.copy_(table.create_weight())
    ours = torch.tensor([position_encoding(position, 7, "concatenated") for position in range(50)])
    torch.testing.assert_close(ours, table.weight.detach(), rtol=0, atol=1e-6)


def test_relative_attention_without_positions_is_plain_causal_attention() -> None:
    x, nothing = drawn(5, 6), torch.zeros(2, 3, dtype=torch.float64)
    w = {name: drawn(6, 6, seed=i) for i, name in enumerate("qkvo")} | {"r": drawn(6, 6, seed=8) * 0, "R": drawn(5, 6)}
    found = relative_attention.one_row(x, x[:0], w, nothing, nothing, 2)
    q, k, v = ((x @ w[name].T).view(5, 2, 3).transpose(0, 1) for name in "qkv")
    context = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found["y"], context @ w["o"].T, rtol=1e-12, atol=1e-12)


def test_relative_attention_with_unit_distances_finds_the_key_at_that_distance() -> None:
    """One head, R_2 alone is not 0 and meets v: all weight goes to the key two places back, memory included."""
    w = {name: torch.eye(2, dtype=torch.float64) for name in "qkvro"} | {"R": torch.zeros(5, 2, dtype=torch.float64)}
    w["q"], w["k"] = w["q"] * 0, w["k"] * 0
    w["R"][2, 0] = 1000.0
    known, v = drawn(5, 2), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    found = relative_attention.one_row(known[3:], known[:3], w, v * 0, v, 1)
    torch.testing.assert_close(found["y"], known[1:3], rtol=1e-12, atol=1e-12)


def test_switch_agrees_with_transformers_at_true_double() -> None:
    modeling = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    from transformers import SwitchTransformersConfig

    from conformance.oracles.true_double import TrueDouble

    x, W_r, wi, wo = drawn(3, 8, 7), drawn(4, 7, seed=1), drawn(4, 5, 7, seed=2), drawn(4, 7, 5, seed=3)
    config = SwitchTransformersConfig(d_model=7, d_ff=5, num_experts=4, expert_capacity=2, router_jitter_noise=0.0)
    with TrueDouble(), torch.no_grad():
        block = modeling.SwitchTransformersSparseMLP(config).eval()
        state = {"router.classifier.weight": W_r}
        state |= {f"experts.expert_{e}.wi.weight": wi[e] for e in range(4)}
        state |= {f"experts.expert_{e}.wo.weight": wo[e] for e in range(4)}
        block.load_state_dict(state)
        theirs = block(x)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    ours = [switch.one_row(row, W_r, wi, wo, 2) for row in x]
    sent = torch.stack([row["dispatched"] for row in ours]) > 0
    assert sent.sum() < 24
    torch.testing.assert_close(torch.stack([row["y"] for row in ours]), theirs, rtol=1e-12, atol=1e-12)
