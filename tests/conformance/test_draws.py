"""Draws are the same bytes everywhere, exact in the narrowest dtype, and leave nothing at its initial value.

The expected bytes are derived here a second time, from the description in `conformance.draws`, in plain Python:
hashlib, struct and integers, no torch.  Their digests are pinned as literals, so that both cannot drift together.
"""

import hashlib
import math
import struct

import pytest
import torch

from conformance import draws
from conformance.families import get


def words(label: str, count: int) -> list[int]:
    """16-bit little-endian words of the label's SHAKE-256 stream."""
    return list(struct.unpack(f"<{count}H", hashlib.shake_256(label.encode("utf-8")).digest(2 * count)))


def drawn(label: str, count: int, low: int, high: int) -> list[int]:
    return [low + (word * (high - low + 1) >> 16) for word in words(label, count)]


def float32_bytes(values: list[float]) -> bytes:
    """Little-endian float32; every value must be exact."""
    packed = struct.pack(f"<{len(values)}f", *values)
    assert list(struct.unpack(f"<{len(values)}f", packed)) == values
    return packed


def stored_bytes(tensor: torch.Tensor) -> bytes:
    assert tensor.dtype == torch.float32
    return tensor.numpy().astype("<f4").tobytes()


# name and shape -> (half-width as integer m, shift s, mean): √3 · deviation ≈ m · 2^-s, worked out by hand
KINDS = {
    ("model.layers.0.self_attn.q_proj.weight", (6, 10)): (105, 7, 0),  # √3 · 1.5/√10 = 0.8216 = 105.2 / 128
    ("model.layers.1.mlp.down_proj.bias", (7,)): (67, 7, 0),  # √3 · 0.3 = 0.5196 = 66.5 / 128
    ("model.layers.1.input_layernorm.weight", (9,)): (89, 7, 1),  # √3 · 0.4 = 0.6928 = 88.7 / 128
    ("model.embed_tokens.weight", (4, 5)): (111, 7, 0),  # √3 · 0.5 = 0.8660 = 110.9 / 128
    ("lm_head.weight", (3, 48)): (96, 8, 0),  # √3 · 1.5/√48 = 0.375 = 96 / 256
}
DIGESTS = {
    "model.layers.0.self_attn.q_proj.weight": "dfd15f795f9fec067932a268e9ba2315e160b172d9020596a088d82c632c0a69",
    "model.layers.1.mlp.down_proj.bias": "069518d80f723e75d8940e3be5fae9f9aa9f162412c5cbce3df0065d7236bb91",
    "model.layers.1.input_layernorm.weight": "72b4fdf9572a5f994ffc0290006dfdc703c57b3b9feac10138fcefd01439d9db",
    "model.embed_tokens.weight": "fa3c8cf888e29226e27f5a5cbae468d948e3e9ada92ee3c28c8a477608e1bacc",
    "lm_head.weight": "5c2f4e0c60fb98168858c2980581049e4bd53cbb1e42c20a7ace829b61e12057",
}


@pytest.mark.parametrize(("name", "shape"), KINDS)
def test_weight_is_reproduced_byte_for_byte_from_its_description(name: str, shape: tuple[int, ...]) -> None:
    limit, shift, mean = KINDS[name, shape]
    stream = f"pinned/{name}/{'x'.join(str(size) for size in shape)}"
    expected = float32_bytes([mean + k / 2**shift for k in drawn(stream, math.prod(shape), -limit, limit)])
    got = stored_bytes(draws.tensor("pinned", name, shape))
    assert got == expected
    assert hashlib.sha256(got).hexdigest() == DIGESTS[name]


def test_integers_are_reproduced_from_their_description() -> None:
    got = draws.integers("pinned/ids", 12, 3, 60).tolist()
    assert got == drawn("pinned/ids", 12, 3, 60)
    assert got == [9, 7, 29, 57, 24, 46, 19, 24, 21, 57, 25, 37]


def test_words_are_read_little_endian_whatever_the_machine() -> None:
    low_byte, high_byte = hashlib.shake_256(b"pinned/order").digest(2)
    assert low_byte != high_byte
    assert draws.integers("pinned/order", 1, 0, 2**16 - 1).tolist() == [256 * high_byte + low_byte]


def test_integers_reach_both_ends_and_nothing_beyond() -> None:
    got = draws.integers("ends", 2000, -3, 7)
    assert sorted(set(got.tolist())) == list(range(-3, 8))


def test_integers_are_int64() -> None:
    assert draws.integers("dtype", 3, 0, 9).dtype == torch.int64


def test_longer_draw_begins_with_the_shorter_one() -> None:
    assert draws.integers("prefix", 13, 0, 99)[:5].equal(draws.integers("prefix", 5, 0, 99))


# --- properties of the weights --------------------------------------------------------------------------------------

RECIPES = {recipe.name: recipe for recipe in get("llama").recipes}


def weights(case: str) -> dict[str, torch.Tensor]:
    recipe = RECIPES[case]
    return {
        name: draws.tensor(recipe.weights, name, shape)
        for name, shape in get("llama").tensor_shapes(recipe.config).items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", RECIPES)
def test_weights_of_every_case_are_exact_in_low_precision(case: str, dtype: torch.dtype) -> None:
    rounded = [name for name, tensor in weights(case).items() if not tensor.to(dtype).to(torch.float32).equal(tensor)]
    assert rounded == []


@pytest.mark.parametrize("fan_in", [1, 2, 3, 4, 7, 48, 61, 128, 1000, 4096, 11008])
def test_matrices_of_any_fan_in_are_exact_in_low_precision(fan_in: int) -> None:
    tensor = draws.tensor("exact", "weight", (3, fan_in))
    assert tensor.to(torch.bfloat16).to(torch.float32).equal(tensor)
    assert tensor.to(torch.float16).to(torch.float32).equal(tensor)


@pytest.mark.parametrize("deviation", [0.01, 0.1, 0.4, 0.57])
def test_draws_around_one_are_exact_in_low_precision(deviation: float) -> None:
    tensor = draws.uniform("around one", (501,), deviation, mean=1.0)
    assert tensor.to(torch.bfloat16).to(torch.float32).equal(tensor)
    assert tensor.to(torch.float16).to(torch.float32).equal(tensor)


@pytest.mark.parametrize("case", RECIPES)
def test_no_two_tensors_of_a_case_hold_the_same_numbers(case: str) -> None:
    flat = {name: tuple(tensor.flatten().tolist()) for name, tensor in weights(case).items()}
    assert len(set(flat.values())) == len(flat)


def test_tensors_of_equal_shape_differ_almost_everywhere() -> None:
    gate, up = (draws.tensor("a", f"mlp.{part}_proj.weight", (52, 48)) for part in ("gate", "up"))
    assert (gate == up).float().mean() < 0.05


def test_same_name_under_another_label_is_another_tensor() -> None:
    first, second = (draws.tensor(label, "mlp.gate_proj.weight", (52, 48)) for label in ("a", "b"))
    assert (first == second).float().mean() < 0.05


def test_same_name_in_another_shape_is_no_reshape() -> None:
    first, second = (draws.tensor("a", "mlp.gate_proj.bias", shape) for shape in ((6, 35), (35, 6)))
    assert (first.flatten() == second.flatten()).float().mean() < 0.1


@pytest.mark.parametrize("case", RECIPES)
def test_nothing_keeps_the_value_that_a_library_starts_it_at(case: str) -> None:
    """Norm weights start at 1, biases at 0; a mistake that leaves them there must show in nearly every element."""
    for name, tensor in weights(case).items():
        initial = 1.0 if "norm" in name else 0.0
        assert (tensor == initial).float().mean() < 0.1, name


@pytest.mark.parametrize(
    ("name", "shape", "deviation", "mean"),
    [
        ("mlp.up_proj.weight", (301, 48), 1.5 / math.sqrt(48), 0.0),
        ("mlp.up_proj.weight", (48, 301), 1.5 / math.sqrt(301), 0.0),
        ("self_attn.q_proj.bias", (15000,), 0.3, 0.0),
        ("input_layernorm.weight", (15000,), 0.4, 1.0),
        ("embed_tokens.weight", (301, 48), 0.5, 0.0),
    ],
)
def test_scale_is_the_documented_one(name: str, shape: tuple[int, ...], deviation: float, mean: float) -> None:
    """Within 2.5 %: 14,000 draws leave 0.4 % of sampling error, rounding the half-width to 64…127 steps 0.8 %."""
    tensor = draws.tensor("scale", name, shape).double()
    assert tensor.std().item() == pytest.approx(deviation, rel=0.025)
    assert tensor.mean().item() == pytest.approx(mean, abs=0.05 * deviation)


@pytest.mark.parametrize(
    ("name", "kind", "shape", "deviation", "mean"),
    [
        ("h.0.attn.c_attn.weight", "conv1d", (48, 301), 1.5 / math.sqrt(48), 0.0),
        ("h.0.attn.c_attn.bias", "conv1d", (15000,), 0.3, 0.0),
        ("h.0.ln_1.weight", "norm", (15000,), 0.4, 1.0),
        ("wte.weight", "embedding", (301, 48), 0.5, 0.0),
    ],
)
def test_family_may_say_what_a_module_is_whose_name_does_not(
    name: str, kind: str, shape: tuple[int, ...], deviation: float, mean: float
) -> None:
    module = name.split(".")[-2]
    tensor = draws.tensor("scale", name, shape, {module: kind}).double()
    assert tensor.std().item() == pytest.approx(deviation, rel=0.025)
    assert tensor.mean().item() == pytest.approx(mean, abs=0.05 * deviation)


def test_draw_is_a_whole_multiple_of_a_power_of_two_and_at_most_127_of_them() -> None:
    steps = draws.uniform("steps", (3000,), 0.1).double() * 2**9  # √3 · 0.1 = 0.1732 = 88.7 / 512
    assert steps.equal(steps.round())
    assert steps.abs().max().item() == 89


def test_draws_leave_torchs_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    draws.tensor("state", "mlp.up_proj.weight", (5, 7))
    assert torch.random.get_rng_state().equal(before)


def test_a_few_integers_are_the_same_without_torch() -> None:
    for low, high in ((0, 1), (-5, 7), (0, 0x7FFF), (3, 3)):
        assert draws.few_integers("label", 500, low, high) == draws.integers("label", 500, low, high).tolist()
