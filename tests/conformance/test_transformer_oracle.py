"""The Transformer's two oracles agree, and what is right passes while every small mistake fails, at the right tensor.

Right: a candidate on `torch.nn.Transformer` (`tests/torch_nn_transformer.py`).  Wrong: that candidate with one mistake,
and the reference with one function replaced.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import reference_impl.models.transformer as model_module
from conformance.bounds import measure
from conformance.cases import Case, Manifest
from conformance.families import get
from conformance.golden.model import draw_inputs, draw_weights
from conformance.implementations.reference import Reference
from conformance.judge import Result
from conformance.oracles import torch_transformer
from conformance.oracles.hugging_face import HuggingFace
from conformance.oracles.marian import Marian
from conformance.oracles.true_double import TrueDouble
from conformance.suite.padding import padded
from judged import check
from reference_impl.models.transformer import DecoderLayer, EncoderDecoder, EncoderLayer, Stack, Transformer
from reference_impl.nn import absolute_positions, attention, cross_attention, masks
from torch_nn_transformer import MISTAKES, TorchTransformer

FAMILY = get("transformer")
RECIPES = {recipe.name.removeprefix("transformer/"): recipe for recipe in FAMILY.recipes}
DISTINCT = "transformer/distinct"
AGREEMENT = 1e-12


@functools.cache
def weights_of(case: str) -> dict[str, Tensor]:
    return draw_weights(FAMILY, RECIPES[case])


@functools.cache
def oracle(case: str) -> Marian:
    return Marian(FAMILY, RECIPES[case].config, weights_of(case))


def arguments(case: str) -> dict[str, Tensor]:
    inputs = draw_inputs(RECIPES[case])
    return {name: inputs[name] for name in ("input_ids", "decoder_input_ids")}


def error(got: Tensor, truth: Tensor) -> float:
    return measure(got, truth).max


def of_torch(case: str) -> Tensor:
    with TrueDouble():
        return torch_transformer.logits(RECIPES[case].config, oracle(case).weights, **arguments(case))


def of_the_library_alone(case: str) -> Tensor:
    return HuggingFace.logits(oracle(case), **arguments(case))


# --- the oracles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RECIPES)
def test_the_two_oracles_agree(case: str) -> None:
    truth = of_the_library_alone(case)
    assert truth.dtype == torch.float64
    assert error(of_torch(case), truth) < AGREEMENT


def off_by(factor: float) -> Callable[..., Tensor]:
    right = torch_transformer.logits
    return lambda *given, **named: right(*given, **named) * factor


def test_an_oracle_that_is_off_by_a_billionth_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_transformer, "logits", off_by(1 + 1e-9))
    with pytest.raises(AssertionError, match=r"MarianMTModel and torch\.nn\.Transformer differ by 1\.0e-09"):
        oracle("plain").logits(**arguments("plain"))


def test_an_oracle_that_is_off_by_rounding_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_transformer, "logits", off_by(1 + 1e-14))
    assert oracle("plain").logits(**arguments("plain")).isfinite().all()


def test_a_nan_of_one_oracle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_transformer, "logits", off_by(math.nan))
    with pytest.raises(AssertionError, match="differ by nan"):
        oracle("plain").logits(**arguments("plain"))


@pytest.mark.parametrize("name", ["final_logits_bias", "model.decoder.layers.2.encoder_attn.k_proj.weight"])
def test_an_oracle_that_reads_another_weight_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changed = oracle("plain").weights | {name: oracle("plain").weights[name] * 1.001}
    monkeypatch.setattr(oracle("plain"), "weights", changed)
    with pytest.raises(AssertionError, match="differ by"):
        oracle("plain").logits(**arguments("plain"))


def test_one_oracle_with_the_positions_of_the_other_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = {"interleaved": "concatenated", "concatenated": "interleaved"}
    right = torch_transformer.position_encoding
    monkeypatch.setattr(
        torch_transformer, "position_encoding", lambda place, size, layout: right(place, size, swapped[layout])
    )
    for case in ("plain", "paper"):
        with pytest.raises(AssertionError, match="differ by"):
            oracle(case).logits(**arguments(case))


def test_working_precision_is_the_librarys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is what is measured there; the second oracle is not asked."""
    monkeypatch.setattr(torch_transformer, "logits", lambda *_, **__: pytest.fail("asked"))
    model = Marian(FAMILY, RECIPES["plain"].config, weights_of("plain"), dtype=torch.float32)
    assert 1e-8 < error(model.logits(**arguments("plain")), of_the_library_alone("plain")) < 1e-5


# --- padding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "distinct", "paper"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_the_oracle_count_real_tokens(case: str, side: str) -> None:
    """A padded row is as if it stood alone, with its source cut to its length."""
    inputs = draw_inputs(RECIPES[case])
    ids, decoded = inputs["input_ids"], inputs["decoder_input_ids"]
    rows = [
        oracle(case).logits(input_ids=ids[row : row + 1, :length], decoder_input_ids=decoded[row : row + 1])
        for row, length in enumerate(inputs["lengths"].tolist())
    ]
    batch = padded(inputs, torch.cat(rows), side)
    real = batch.mask.bool()
    assert error(oracle(case).logits(**batch.arguments)[real], batch.truth[real]) < AGREEMENT


def test_the_librarys_own_positions_count_padding() -> None:
    """Which is why the oracle mends them: a batch padded on the left would be another text."""
    inputs = draw_inputs(RECIPES["plain"])
    batch = padded(inputs, Case("transformer/plain").expected["source_cut.logits"], "left")
    model = oracle("plain").model
    with TrueDouble(), torch.no_grad():
        mended = oracle("plain").logits(**batch.arguments)
        for side in ("encoder", "decoder"):
            del getattr(model.model, side).embed_positions.forward
        try:
            own = model(**batch.arguments, use_cache=False).logits
        finally:
            for side in ("encoder", "decoder"):
                oracle("plain")._mend_positions(side, getattr(model.model, side).embed_positions)
    real = batch.mask.bool()
    assert error(mended[real], batch.truth[real]) < AGREEMENT
    assert error(own[real], batch.truth[real]) > 1e-2


# --- probes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_both() -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """The oracle's probes of `distinct`, and what torch's modules return, class by class in the order of calls."""
    seen: dict[str, list[Tensor]] = {}

    def keep(module: nn.Module, _inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        seen.setdefault(type(module).__name__, []).append(value.detach().clone())

    handle = nn.modules.module.register_module_forward_hook(keep)
    try:
        of_torch("distinct")
    finally:
        handle.remove()
    return oracle("distinct").probes(**arguments("distinct")), seen


def layers_of(side: str) -> Iterator[str]:
    return (f"{side}.layers.{layer}." for layer in range(RECIPES["distinct"].config[f"{side}_layers"]))


def test_norms_of_torch_give_the_probes_behind_them(of_both: Any) -> None:
    probes, seen = of_both
    names = [f"{layer}{name}" for layer in layers_of("encoder") for name in ("attention.output_norm", "output")]
    names += [
        f"{layer}{name}"
        for layer in layers_of("decoder")
        for name in ("attention.output_norm", "cross_attention.output_norm", "output")
    ]
    assert len(names) == len(seen["LayerNorm"]) == 2 * 2 + 3 * 3
    for name, got in zip(names, seen["LayerNorm"], strict=True):
        assert error(got, probes[name]) < AGREEMENT, name


def test_attentions_of_torch_give_the_probes_behind_them(of_both: Any) -> None:
    probes, seen = of_both
    names = [f"{layer}attention.output" for layer in layers_of("encoder")]
    names += [f"{layer}{name}.output" for layer in layers_of("decoder") for name in ("attention", "cross_attention")]
    assert len(names) == len(seen["MultiheadAttention"])
    for name, got in zip(names, seen["MultiheadAttention"], strict=True):
        assert error(got, probes[name]) < AGREEMENT, name


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("kind", ["attention", "cross_attention"])
def test_weights_of_torchs_attention_are_the_probes(of_both: Any, layer: int, kind: str) -> None:
    """torch's own weights, head by head, from the probes that the attention reads."""
    probes, _ = of_both
    config, at, last = (
        RECIPES["distinct"].config,
        f"decoder.layers.{layer}.",
        RECIPES["distinct"].config["encoder_layers"],
    )
    before = "decoder.embedding" if layer == 0 else f"decoder.layers.{layer - 1}.output"
    queries = probes[before if kind == "attention" else f"{at}attention.output_norm"]
    keys = queries if kind == "attention" else probes[f"encoder.layers.{last - 1}.output"]
    module: Any = nn.MultiheadAttention(config["d_model"], config["decoder_attention_heads"], batch_first=True).double()
    prefix = f"decoder.layers.{layer}.{'self_attn' if kind == 'attention' else 'multihead_attn'}."
    converted = torch_transformer._converted(config, {n: t.double() for n, t in weights_of("distinct").items()})
    module.load_state_dict({n.removeprefix(prefix): t for n, t in converted.items() if n.startswith(prefix)})
    hidden = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).triu(1) if kind == "attention" else None
    _, weights = module(queries, keys, keys, attn_mask=hidden, average_attn_weights=False)
    assert error(weights, probes[f"{at}{kind}.weights"]) < AGREEMENT


def test_embeddings_are_scaled_tokens_and_positions(of_both: Any) -> None:
    probes, _ = of_both
    config = RECIPES["distinct"].config
    for side, name in (("encoder", "input_ids"), ("decoder", "decoder_input_ids")):
        ids = arguments("distinct")[name]
        with TrueDouble():
            table = weights_of("distinct")[f"model.{side}.embed_tokens.weight"].double()
            expected = torch_transformer._embedded(config, table, ids)
        assert error(probes[f"{side}.embedding"], expected) < AGREEMENT


# --- right and wrong candidates -------------------------------------------------------------------------------------

CLAIMS = [claim for claim in Manifest().claims() if claim.family == "transformer" and claim.dtype == "float64"]
SUPPORTED = {
    "golden.logits", "golden.left_padding", "golden.right_padding", "shapes.any", "shapes.inputs", "batching.alone",
    "batching.permutation", "batching.padding", "batching.source_padding", "sensitivity.weights", "determinism.repeat",
    "determinism.eval", "determinism.threads", "causality.prefix", "causality.source", "causality.encoder",
    "reach.last_row", "round_trip.storage", "invariance.absent",
}  # fmt: skip


def test_a_model_on_torchs_transformer_passes_every_claim_that_it_supports() -> None:
    """It has no sessions, losses or parameters by hub name, and says so by their absence."""
    results = {claim: check(TorchTransformer(), claim.case, claim.check, claim.dtype).outcome for claim in CLAIMS}
    assert results == {claim: "pass" if claim.check in SUPPORTED else "unsupported" for claim in CLAIMS}
    assert sum(claim.check in SUPPORTED for claim in CLAIMS) > 30


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_passes_in_working_precision(dtype: str) -> None:
    assert check(TorchTransformer(), DISTINCT, "golden.logits", dtype).outcome == "pass"


def first_wrong(result: Result) -> str | None:
    assert (result.outcome, result.kind) == ("fail", "value"), result
    return None if result.divergence is None else str(result.divergence["first_wrong"])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_that_torchs_transformer_invites_fails_at_its_first_wrong_tensor(mistake: str) -> None:
    failing, probe = MISTAKES[mistake]
    assert first_wrong(check(TorchTransformer(mistake), DISTINCT, failing)) == probe


@pytest.mark.parametrize("mistake", [m for m, (failing, _) in MISTAKES.items() if "padding" in failing])
def test_a_mistake_of_padding_leaves_whole_rows_right(mistake: str) -> None:
    assert check(TorchTransformer(mistake), DISTINCT, "golden.logits").outcome == "pass"


# --- the reference with one function replaced -----------------------------------------------------------------------

Patch = tuple[Any, str, Any]


def positions(self: Stack, real: Tensor, ids: Tensor, dtype: torch.dtype, *, shift: int = 0) -> Tensor:
    places = masks.positions(real, num_queries=ids.shape[1]) + shift
    return absolute_positions.sinusoidal_positions(places, self.embed_tokens.embedding_dim, self.position_layout, dtype)


def embed_unscaled(self: Stack, ids: Tensor, real: Tensor) -> Tensor:
    tokens = self.embed_tokens(ids)
    return tokens + positions(self, real, ids, tokens.dtype)


def embed_target_unscaled(self: Stack, ids: Tensor, real: Tensor) -> Tensor:
    decoder = isinstance(self.layers[0], DecoderLayer)
    tokens = self.embed_tokens(ids) * (1.0 if decoder else self.scale)
    return tokens + positions(self, real, ids, tokens.dtype)


def embed_and_scale_positions(self: Stack, ids: Tensor, real: Tensor) -> Tensor:
    tokens = self.embed_tokens(ids)
    return (tokens + positions(self, real, ids, tokens.dtype)) * self.scale


def embed_target_from_one(self: Stack, ids: Tensor, real: Tensor) -> Tensor:
    tokens = self.embed_tokens(ids) * self.scale
    return tokens + positions(self, real, ids, tokens.dtype, shift=int(isinstance(self.layers[0], DecoderLayer)))


def embed_counting_padding(self: Stack, ids: Tensor, real: Tensor) -> Tensor:
    tokens = self.embed_tokens(ids) * self.scale
    return tokens + positions(self, torch.ones_like(real), ids, tokens.dtype)


def embed_restarting(self: Stack, ids: Tensor, real: Tensor) -> Tensor:
    tokens = self.embed_tokens(ids) * self.scale
    return tokens + positions(self, real[:, -ids.shape[1] :], ids, tokens.dtype)


def encoder_pre_norm(self: EncoderLayer, x: Tensor, mask: Tensor) -> Tensor:
    normed = self.self_attn_layer_norm(x)
    n = x + self.self_attn(normed, *self.self_attn.keys_values(normed), mask)
    return n + self.fc2(self.activation_fn(self.fc1(self.final_layer_norm(n))))


def encoder_residual_behind_the_norm(self: EncoderLayer, x: Tensor, mask: Tensor) -> Tensor:
    n = x + self.self_attn_layer_norm(self.self_attn(x, *self.self_attn.keys_values(x), mask))
    return self.final_layer_norm(n + self.fc2(self.activation_fn(self.fc1(n))))


def encode_causally(self: EncoderDecoder, ids: Tensor, real: Tensor) -> Tensor:
    x = self.encoder.embed(ids, real)
    for layer in self.encoder.layers:
        x = layer(x, masks.visible_keys(real, num_queries=ids.shape[1]))
    return x


def encode_padding(self: EncoderDecoder, ids: Tensor, real: Tensor) -> Tensor:
    x = self.encoder.embed(ids, real)
    for layer in self.encoder.layers:
        x = layer(x, cross_attention.all_real(torch.ones_like(real)))
    return x


def decode_attending_padding(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def decode(self: EncoderDecoder, ids: Tensor, mask: Any, memory: Any, real: Tensor, cache: Any = None) -> Tensor:
        return right(self, ids, mask, memory, torch.ones_like(real), cache)

    return decode


def memory_of_layer_0(self: EncoderDecoder, encoded: Tensor) -> list[Any]:
    return [self.decoder.layers[0].encoder_attn.keys_values(encoded)] * len(self.decoder.layers)


def memory_swapped(self: EncoderDecoder, encoded: Tensor) -> list[Any]:
    return [layer.encoder_attn.keys_values(encoded)[::-1] for layer in self.decoder.layers]


def decoder_cross_attention_first(
    self: DecoderLayer, x: Tensor, mask: Tensor, memory: Any, source_mask: Tensor, cache: Any = None
) -> Tensor:
    m = self.encoder_attn_layer_norm(x + self.encoder_attn(x, *memory, source_mask))
    key, value = self.self_attn.keys_values(m)
    if cache is not None:
        key, value = cache.append(key, value)
    n = self.self_attn_layer_norm(m + self.self_attn(m, key, value, mask))
    return self.final_layer_norm(n + self.fc2(self.activation_fn(self.fc1(n))))


def decoder_cross_attention_from_its_input(
    self: DecoderLayer, x: Tensor, mask: Tensor, memory: Any, source_mask: Tensor, cache: Any = None
) -> Tensor:
    key, value = self.self_attn.keys_values(x)
    if cache is not None:
        key, value = cache.append(key, value)
    n = self.self_attn_layer_norm(x + self.self_attn(x, key, value, mask))
    m = self.encoder_attn_layer_norm(n + self.encoder_attn(x, *memory, source_mask))
    return self.final_layer_norm(m + self.fc2(self.activation_fn(self.fc1(m))))


def logits_behind_a_norm(self: Transformer, x: Tensor) -> Tensor:
    return self.lm_head(nn.functional.layer_norm(x, x.shape[-1:])) + self.final_logits_bias


def logits_scaled(self: Transformer, x: Tensor) -> Tensor:
    return self.lm_head(x) * self.config.d_model**-0.5 + self.final_logits_bias


def heads_merged_without_transpose(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[2], -1)


def heads_interleaved(x: Tensor, head_dim: int) -> Tensor:
    return x.view(*x.shape[:2], head_dim, -1).permute(0, 3, 1, 2)


def angles_by_column(places: Tensor, size: int) -> Tensor:
    return places[..., None].double() / 10000.0 ** (torch.arange((size + 1) // 2) / size)


E, D = "encoder.layers.0.", "decoder.layers.0."
# Mistake -> what is replaced, the check that fails, the first wrong probe (None: nothing before it is right, or a check
# that is not localised).
PATCHES: dict[str, tuple[Patch, str, str | None]] = {
    "embeddings not scaled": ((Stack, "embed", embed_unscaled), "golden.logits", "encoder.embedding"),
    "target not scaled": ((Stack, "embed", embed_target_unscaled), "golden.logits", "decoder.embedding"),
    "positions scaled as well": ((Stack, "embed", embed_and_scale_positions), "golden.logits", "encoder.embedding"),
    "positions of the target from 1": ((Stack, "embed", embed_target_from_one), "golden.logits", "decoder.embedding"),
    "positions count padding": ((Stack, "embed", embed_counting_padding), "golden.left_padding", None),
    "positions restart in each feed": ((Stack, "embed", embed_restarting), "cache.prefill_decode", "decoder.embedding"),
    "exponent i/d": ((absolute_positions, "sinusoid_angles", angles_by_column), "golden.logits", "encoder.embedding"),
    "encoder with norms before": ((EncoderLayer, "forward", encoder_pre_norm), "golden.logits", E + "attention.query"),
    "residual added behind the norm": (
        (EncoderLayer, "forward", encoder_residual_behind_the_norm), "golden.logits", E + "attention.residual",
    ),
    "encoder causal": ((EncoderDecoder, "encode", encode_causally), "golden.logits", E + "attention.weights"),
    "encoder attends padding": ((EncoderDecoder, "encode", encode_padding), "golden.right_padding", None),
    "decoder attends padding of the source": (
        (EncoderDecoder, "decode", decode_attending_padding(EncoderDecoder.decode)), "golden.left_padding", None,
    ),
    "keys of layer 0 for all": (
        (EncoderDecoder, "memory", memory_of_layer_0), "golden.logits", "decoder.layers.1.cross_attention.key",
    ),
    "keys and values of the source swapped": (
        (EncoderDecoder, "memory", memory_swapped), "golden.logits", D + "cross_attention.scores",
    ),
    "source before its own tokens": (
        (DecoderLayer, "forward", decoder_cross_attention_first), "golden.logits", D + "attention.query",
    ),
    "queries of the source from the block's input": (
        (DecoderLayer, "forward", decoder_cross_attention_from_its_input), "golden.logits", D + "cross_attention.query",
    ),
    "a norm before the head": ((Transformer, "logits", logits_behind_a_norm), "golden.logits", "logits"),
    "logits divided by √d": ((Transformer, "logits", logits_scaled), "golden.logits", "logits"),
    "no bias on the logits": ((Transformer, "logits", lambda self, x: self.lm_head(x)), "golden.logits", "logits"),
    "scores divided by √d": ((attention, "score_scale", lambda _: 30**-0.5), "golden.logits", E + "attention.scores"),
    "scores not divided": ((attention, "score_scale", lambda _: 1.0), "golden.logits", E + "attention.scores"),
    "ε of 1e-6": ((model_module, "EPSILON", 1e-6), "golden.logits", E + "attention.output_norm"),
    "decoder not causal": (
        (masks, "visible_in_rows", lambda tokens, **_: tokens.real[:, None, None]),
        "golden.logits", D + "attention.weights",
    ),
    "heads merged without transposing": (
        (cross_attention, "merge_heads", heads_merged_without_transpose), "golden.logits", E + "attention.output",
    ),
    "heads of every n-th feature": (
        (cross_attention, "split_heads", heads_interleaved), "golden.logits", E + "attention.scores",
    ),
}  # fmt: skip


def judged(name: str, monkeypatch: pytest.MonkeyPatch, claim: str | None = None) -> Result:
    patch, failing, _ = PATCHES[name]
    monkeypatch.setattr(*patch)
    return check(Reference("eager"), DISTINCT, claim or failing)


def test_the_reference_is_right_without_a_patch() -> None:
    for failing in {failing for _, failing, _ in PATCHES.values()}:
        assert check(Reference("eager"), DISTINCT, failing).outcome == "pass"


@pytest.mark.parametrize("name", PATCHES)
def test_a_mistake_fails_at_its_first_wrong_tensor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_wrong(judged(name, monkeypatch)) == PATCHES[name][2]


@pytest.mark.parametrize("name", [n for n, (_, failing, _) in PATCHES.items() if failing != "golden.logits"])
def test_what_padding_or_a_session_shows_is_not_seen_in_a_forward_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judged(name, monkeypatch, "golden.logits").outcome == "pass"
