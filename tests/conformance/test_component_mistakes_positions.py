"""Rotary, sinusoidal and learned positions: known mistakes fail, an independent right function passes every claim.

The ids are those of the catalogue of mistakes.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from judged import not_passed, outputs

# --- rotary: complex numbers, so that nothing is shared with the reference or with the oracle

Settings = dict[str, Any]


def frequencies(rope_theta: float, width: int, scaling: Settings | None) -> list[float]:
    found = [math.exp(-math.log(rope_theta) * 2 * j / width) for j in range(width // 2)]
    if scaling is None:
        return found
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return [f / factor for f in found]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    kept = [min(1.0, max(0.0, (context * f / (2 * math.pi) - low) / (high - low))) for f in found]
    return [f * (share + (1 - share) / factor) for f, share in zip(found, kept, strict=True)]


def turned(x: Tensor, position_ids: Tensor, angular: list[float], layout: str) -> Tensor:
    """All elements of x, in pairs."""
    pairs = torch.stack(x.chunk(2, -1), -1) if layout == "halves" else x.unflatten(-1, (-1, 2))
    wide = torch.promote_types(x.dtype, torch.float32)
    angles = position_ids[:, None, :, None].to(wide) * torch.tensor(angular, dtype=wide)
    z = torch.view_as_complex(pairs.to(wide).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    y = torch.view_as_real(z)
    return (torch.cat(y.unbind(-1), -1) if layout == "halves" else y.flatten(-2)).to(x.dtype)


def right_rotary(
    x: Tensor, position_ids: Tensor, rope_theta: float, rotary_dim: int, layout: str, rope_scaling: Any = None
) -> Tensor:
    angular = frequencies(rope_theta, rotary_dim, rope_scaling)
    return torch.cat((turned(x[..., :rotary_dim], position_ids, angular, layout), x[..., rotary_dim:]), -1)


def other_layout(layout: str, **given: Any) -> Tensor:
    return right_rotary(layout="halves" if layout == "interleaved" else "interleaved", **given)


def theta_default(rope_theta: float, **given: Any) -> Tensor:
    return right_rotary(rope_theta=10000.0, **given)


def partial_ignored(rotary_dim: int, **given: Any) -> Tensor:
    return right_rotary(rotary_dim=given["x"].shape[-1], **given)


def partial_pairing(x: Tensor, position_ids: Tensor, rope_theta: float, rotary_dim: int) -> Tensor:
    """Angles padded with zeros to the width of the head, pairs half a head apart."""
    angular = frequencies(rope_theta, rotary_dim, None) + [0.0] * ((x.shape[-1] - rotary_dim) // 2)
    return turned(x, position_ids, angular, "halves")


def partial_frequencies(x: Tensor, position_ids: Tensor, rope_theta: float, rotary_dim: int) -> Tensor:
    """The exponent is divided by head_dim."""
    angular = frequencies(rope_theta, x.shape[-1], None)[: rotary_dim // 2]
    return torch.cat((turned(x[..., :rotary_dim], position_ids, angular, "halves"), x[..., rotary_dim:]), -1)


def sign(position_ids: Tensor, **given: Any) -> Tensor:
    return right_rotary(position_ids=-position_ids, **given)


def positions_restarted(position_ids: Tensor, **given: Any) -> Tensor:
    return right_rotary(position_ids=torch.arange(position_ids.shape[1]).expand_as(position_ids), **given)


def scaling_ignored(rope_scaling: Any = None, **given: Any) -> Tensor:
    return right_rotary(rope_scaling=None, **given)


def interpolated_the_wrong_way(x: Tensor, position_ids: Tensor, rope_theta: float, rope_scaling: Any) -> Tensor:
    """Llama 3's share of the unscaled frequency and of the scaled one exchanged."""
    plain = frequencies(rope_theta, x.shape[-1], None)
    scaled = frequencies(rope_theta, x.shape[-1], rope_scaling)
    factor = rope_scaling["factor"]
    angular = [p + p / factor - s if p / factor < s < p else s for p, s in zip(plain, scaled, strict=True)]
    return turned(x, position_ids, angular, "halves")


def low_precision(position_ids: Tensor, x: Tensor, **given: Any) -> Tensor:
    return right_rotary(x=x, position_ids=position_ids.to(x.dtype).float(), **given)


ROTARY = {
    "rope-layout, neighbours": (other_layout, "plain"),
    "rope-layout, halves": (other_layout, "distinct"),
    "rope-theta-default": (theta_default, "field-rope_theta"),
    "rope-partial-ignored": (partial_ignored, "field-rotary_dim"),
    "rope-partial-pairing": (partial_pairing, "field-rotary_dim"),
    "rope-partial-frequencies": (partial_frequencies, "field-rotary_dim"),
    "rope-sign": (sign, "plain"),
    "positions restarted": (positions_restarted, "plain"),
    "scaling ignored, linear": (scaling_ignored, "field-rope_scaling-linear"),
    "scaling ignored, llama3": (scaling_ignored, "field-rope_scaling-llama3"),
    "llama3 interpolated the wrong way": (interpolated_the_wrong_way, "field-rope_scaling-llama3"),
}


def test_right_rotary_passes_every_claim() -> None:
    assert not_passed(right_rotary, "rotary") == {}


@pytest.mark.parametrize("mistake", ROTARY)
def test_rotary_mistake_fails(mistake: str) -> None:
    function, case = ROTARY[mistake]
    assert outputs(function, f"rotary/{case}").outcome == "fail"


@pytest.mark.parametrize(
    ("function", "case", "label"),
    [
        (other_layout, "field-layout", "layout ignored"),
        (theta_default, "field-rope_theta", "rope_theta ignored"),
        (partial_ignored, "field-rotary_dim", "rotary_dim ignored"),
        (scaling_ignored, "field-rope_scaling-llama3", "rope_scaling ignored"),
    ],
)
def test_ignored_setting_of_rotary_is_named(function: Any, case: str, label: str) -> None:
    assert outputs(function, f"rotary/{case}").equals == label


def test_positions_in_bfloat16_fail_in_bfloat16() -> None:
    """rope-low-precision: bfloat16 has no 2049."""
    assert outputs(low_precision, "rotary/plain", "float32").outcome == "pass"
    assert outputs(low_precision, "rotary/plain", "bfloat16").outcome == "fail"


# --- sinusoidal_positions


def right_sinusoid(position_ids: Tensor, hidden_size: int, layout: str) -> Tensor:
    column = torch.arange(hidden_size, dtype=torch.float64)
    angles = position_ids.double()[..., None] * 10000 ** (-2 * (column // 2) / hidden_size)
    table = torch.where(column % 2 == 0, angles.sin(), angles.cos())
    return table if layout == "interleaved" else torch.cat((table[..., 0::2], table[..., 1::2]), -1)


def layout_ignored(position_ids: Tensor, hidden_size: int) -> Tensor:
    return right_sinusoid(position_ids, hidden_size, "interleaved")


def concatenated(position_ids: Tensor, hidden_size: int) -> Tensor:
    return right_sinusoid(position_ids, hidden_size, "concatenated")


def exponent_doubled(position_ids: Tensor, hidden_size: int) -> Tensor:
    column = torch.arange(hidden_size, dtype=torch.float64)
    angles = position_ids.double()[..., None] / 10000 ** (2 * column / hidden_size)
    return torch.where(column % 2 == 0, angles.sin(), angles.cos())


def n_minus_1(position_ids: Tensor, hidden_size: int) -> Tensor:
    half = hidden_size // 2
    scale = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, dtype=torch.float64))
    angles = position_ids.double()[..., None] * scale
    return torch.cat((angles.sin(), angles.cos()), -1)


def sin_cos_swapped(position_ids: Tensor, hidden_size: int) -> Tensor:
    column = torch.arange(hidden_size, dtype=torch.float64)
    angles = position_ids.double()[..., None] * 10000 ** (-2 * (column // 2) / hidden_size)
    return torch.where(column % 2 == 1, angles.sin(), angles.cos())


def counted_from_1(position_ids: Tensor, hidden_size: int) -> Tensor:
    return right_sinusoid(position_ids + 1, hidden_size, "interleaved")


SINUSOID = {
    "pe-concat-not-interleaved": (concatenated, "plain"),
    "pe-exponent-doubled": (exponent_doubled, "plain"),
    "pe-n-minus-1": (n_minus_1, "field-layout"),
    "pe-sin-cos-swapped": (sin_cos_swapped, "plain"),
    "positions counted from 1": (counted_from_1, "plain"),
}


def test_right_sinusoid_passes_every_claim() -> None:
    assert not_passed(right_sinusoid, "sinusoidal_positions") == {}


@pytest.mark.parametrize("mistake", SINUSOID)
def test_sinusoid_mistake_fails(mistake: str) -> None:
    function, case = SINUSOID[mistake]
    assert outputs(function, f"sinusoidal_positions/{case}").outcome == "fail"


def test_ignored_layout_of_sinusoids_is_named() -> None:
    assert outputs(layout_ignored, "sinusoidal_positions/field-layout").equals == "layout ignored"


# --- learned_positions


def right_learned(x: Tensor, weight: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    if attention_mask is None:
        return x + weight[: x.shape[1]]
    position = attention_mask.cumsum(1) - attention_mask
    return x + weight[position[:, -x.shape[1] :]]


def padding_counted(x: Tensor, weight: Tensor, attention_mask: Tensor) -> Tensor:
    keys, seq = attention_mask.shape[1], x.shape[1]
    return x + weight[keys - seq : keys]


def cache_forgotten(x: Tensor, weight: Tensor, attention_mask: Tensor) -> Tensor:
    return right_learned(x, weight, attention_mask[:, -x.shape[1] :])


def offset_of_two(x: Tensor, weight: Tensor) -> Tensor:
    return x + weight[2 : 2 + x.shape[1]]


def one_length_for_all_rows(x: Tensor, weight: Tensor, attention_mask: Tensor) -> Tensor:
    """The cached length of the longest row, and from there on one position a column."""
    past = int(attention_mask[:, : -x.shape[1]].sum(1).max())
    return x + weight[past : past + x.shape[1]]


LEARNED = {
    "pad-left-positions": (padding_counted, "left-padding"),
    "abs-position-cache-offset": (cache_forgotten, "cached"),
    "ragged-decode-position": (one_length_for_all_rows, "distinct"),
    "offset of two rows": (offset_of_two, "plain"),
}


def test_right_learned_positions_pass_every_claim() -> None:
    assert not_passed(right_learned, "learned_positions") == {}


@pytest.mark.parametrize("mistake", LEARNED)
def test_learned_positions_mistake_fails(mistake: str) -> None:
    function, case = LEARNED[mistake]
    assert outputs(function, f"learned_positions/{case}").outcome == "fail"


def test_what_padding_gets_is_not_compared() -> None:
    """Even NaN there passes; where tokens are real it does not."""

    def nan_in_padding(x: Tensor, weight: Tensor, attention_mask: Tensor) -> Tensor:
        padding = attention_mask[:, -x.shape[1] :, None] == 0
        return right_learned(x, weight, attention_mask).masked_fill(padding, torch.nan)

    def nan_in_a_token(x: Tensor, weight: Tensor, attention_mask: Tensor) -> Tensor:
        y = right_learned(x, weight, attention_mask)
        y[0, -1] = torch.nan
        return y

    assert outputs(nan_in_padding, "learned_positions/left-padding").outcome == "pass"
    assert outputs(nan_in_a_token, "learned_positions/left-padding").kind == "not finite"
