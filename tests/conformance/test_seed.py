"""What the suite says of the code of the document that this project started from (`docs/seed.md`)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import seed_code
from conformance.cases import Case, Manifest
from judged import check, outputs

HIDDEN, HEADS, SEQ = 12, 3, 5


def passed(function: Callable[..., Any], case: str) -> bool:
    """Whether a function passes every golden claim of a case."""
    claims = [c for c in Manifest().claims() if c.case == case and c.check.startswith("component.")]
    assert claims
    return all(check(function, claim.case, claim.check, claim.dtype).outcome == "pass" for claim in claims)


# --- everything together


def embedded() -> Tensor:
    return torch.rand(SEQ, HIDDEN, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def repaired(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], Tensor]:
    """The document's script with the function that it must mean, and without dropout."""
    torch.manual_seed(0)
    seed_code.set_globals(HIDDEN, SEQ)
    seed_code.ffn_drop.eval()
    monkeypatch.setattr(
        seed_code, "feed_forward_add_and_norm_naive", seed_code.feed_forward_add_norm_naive, raising=False
    )
    return lambda x: seed_code.everything_together(x, HEADS)


def test_everything_together_calls_a_function_that_is_not_defined() -> None:
    seed_code.set_globals(HIDDEN, SEQ)
    with pytest.raises(NameError, match="'feed_forward_add_and_norm_naive' is not defined"):
        seed_code.everything_together(embedded(), HEADS)


def test_with_the_right_name_the_shapes_fit(repaired: Callable[[Tensor], Tensor]) -> None:
    assert repaired(embedded()).shape == (SEQ, HIDDEN)


def test_the_first_token_sees_the_last(repaired: Callable[[Tensor], Tensor]) -> None:
    """No causal mask: what would be generated next changes what was computed before."""
    other = embedded()
    other[-1] += 1
    assert (repaired(other)[0] - repaired(embedded())[0]).abs().max() > 1e-3


# --- positional encoding


@pytest.mark.parametrize("case", ["plain", "odd"])
def test_positional_encoding_has_the_column_for_i(case: str) -> None:
    result = outputs(seed_code.positional_encoding, f"sinusoidal_positions/{case}")
    assert result.outcome == "fail"
    assert result.equals == "exponent 2·column/d, not 2i/d: doubled, and a cosine at another frequency than its sine"


def table_and_truth() -> tuple[Tensor, Tensor, Tensor]:
    """The document's table, the right one and the position of each row."""
    case = Case("sinusoidal_positions/plain")
    position_ids = case.inputs["position_ids"]
    return seed_code.positional_encoding(position_ids, 10, "interleaved"), case.expected["y"].float(), position_ids


def test_positional_encoding_is_right_at_position_0_alone() -> None:
    found, right, position_ids = table_and_truth()
    assert ((found - right).abs().amax(-1) < 1e-6).equal(position_ids == 0)


def test_positional_encoding_is_right_in_the_first_column_alone() -> None:
    found, right, _ = table_and_truth()
    assert ((found - right).abs().amax((0, 1)) < 1e-3).tolist() == [True] + [False] * 9


def test_positional_encoding_with_2i_over_d_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sine and cosine stand where the paper has them: with `arange(d) // 2` nothing else is wrong."""
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda n: arange(n) // 2 if n == seed_code.embedding_dim else arange(n))
    assert passed(seed_code.positional_encoding, "sinusoidal_positions/plain")


# --- attention


def test_attention_has_neither_causal_mask_nor_output_projection() -> None:
    result = outputs(seed_code.attention, "multi_head_attention/self")
    assert result.outcome == "fail"
    assert result.equals == "causal ignored and out_proj ignored"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_is_otherwise_right_in_the_working_dtypes_too(dtype: str) -> None:
    """Projections, heads, scale and softmax: with these two mistakes the oracle gives the same values."""
    assert outputs(seed_code.attention, "multi_head_attention/self", dtype).equals == (
        "causal ignored and out_proj ignored"
    )


def test_attention_with_an_output_projection_has_no_causal_mask() -> None:
    def projected(out_proj_weight: Tensor, **given: Any) -> Tensor:
        inputs = {name: given[name] for name in given if name not in ("out_proj_bias", "num_key_value_heads", "causal")}
        return seed_code.attention(**inputs) @ out_proj_weight.mT

    assert outputs(projected, "multi_head_attention/self").equals == "causal ignored"


@pytest.mark.parametrize("case", ["plain", "padding", "cross", "mqa"])
def test_attention_of_other_kinds_is_not_supported(case: str) -> None:
    assert outputs(seed_code.attention, f"multi_head_attention/{case}").outcome == "unsupported"


# --- norm


@pytest.mark.parametrize("case", ["plain", "offset"])
def test_norm_is_right_at_the_default_epsilon(case: str) -> None:
    assert passed(seed_code.norm, f"layer_norm/{case}")


def test_norm_has_no_epsilon_to_set() -> None:
    assert outputs(seed_code.norm, "layer_norm/small").equals == "eps ignored"


def test_add_and_norm_adds_nothing() -> None:
    assert outputs(seed_code.add_and_norm, "add_and_norm/plain").equals == "residual ignored"


# --- feed-forward


def test_feed_forward_drops_out_when_it_is_judged() -> None:
    torch.manual_seed(0)
    assert outputs(seed_code.feed_forward, "feed_forward/plain").outcome == "fail"


def test_feed_forward_gives_other_values_at_every_call() -> None:
    torch.manual_seed(0)
    seed_code.set_globals(HIDDEN, SEQ)
    x = embedded()
    assert not seed_code.feed_forward_naive(x).equal(seed_code.feed_forward_naive(x))


def test_feed_forward_without_dropout_is_right() -> None:
    assert passed(seed_code.feed_forward_without_dropout, "feed_forward/plain")


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "silu"])
def test_feed_forward_with_another_activation_is_not_supported(act: str) -> None:
    result = outputs(seed_code.feed_forward_without_dropout, f"feed_forward/field-hidden_act-{act}")
    assert result.outcome == "unsupported"
