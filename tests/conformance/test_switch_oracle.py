"""Where Hugging Face's Switch differs from the paper, and what the oracle makes of it."""

import dataclasses
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import Recipe, get
from conformance.golden import GoldenError, routing
from conformance.golden.model import draw_inputs, draw_weights
from conformance.implementation import Checkpoint, Unsupported
from conformance.oracles.equations.switch import balancing_loss, z_loss
from conformance.oracles.true_double import TrueDouble
from conformance.suite.padding import padded

transformers = pytest.importorskip("transformers")

from conformance.implementations.hf import HuggingFaceModels  # noqa: E402
from conformance.oracles.hugging_face import HuggingFace  # noqa: E402
from conformance.oracles.switch import SwitchTransformers  # noqa: E402

FAMILY = get("switch_transformer")
RECIPES = {recipe.name.split("/")[1]: recipe for recipe in FAMILY.recipes}
DISTINCT, CAPACITY, IGNORING_PADS = (
    RECIPES[name] for name in ("distinct", "capacity", "field-router_ignore_padding_tokens")
)
ROUTERS = ["encoder.layers.1.feed_forward.router_logits", "decoder.layers.1.feed_forward.router_logits"]


@cache
def oracle(recipe: str) -> SwitchTransformers:
    return SwitchTransformers(FAMILY, RECIPES[recipe].config, draw_weights(FAMILY, RECIPES[recipe]))


def calls(recipe: Recipe) -> dict[str, Tensor]:
    inputs = draw_inputs(recipe)
    return {name: inputs[name] for name in ("input_ids", "decoder_input_ids")}


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


# --- probes ---------------------------------------------------------------------------------------------------------


def test_probes_of_a_sparse_layer_follow_from_each_other() -> None:
    """Token by token; a token is dropped where its expert has 3 of its row."""
    weights, probes = draw_weights(FAMILY, DISTINCT), oracle("distinct").probes(**calls(DISTINCT))
    at, path = "encoder.layers.3.feed_forward.", "encoder.block.3.layer.1.mlp."
    norm, dropped = probes[at + "norm"], 0
    classifier = (weights[f"{path}router.classifier.{name}"].double() for name in ("weight", "bias"))
    close(probes[at + "router_logits"], torch.nn.functional.linear(norm, *classifier))
    for row in range(4):
        held = [0] * 6
        for place in range(11):
            share, best = probes[at + "router_logits"][row, place].softmax(-1).max(-1)
            close(probes[at + "routing_weights"][row, place, 0], share)
            wi, wo = (weights[f"{path}experts.expert_{best}.{name}.weight"].double() for name in ("wi", "wo"))
            expected = wo @ (wi @ norm[row, place]).relu()
            held[best] += 1
            if held[best] > 3:
                expected, dropped = torch.zeros_like(expected), dropped + 1
            close(probes[at + "expert_outputs"][row, place, 0], expected)
            close(probes[at + "output"][row, place], share * expected)
    assert dropped >= 4


def test_scores_are_products_and_one_table_of_biases_for_all_blocks_of_a_stack() -> None:
    probes = oracle("distinct").probes(**calls(DISTINCT))
    products = [
        torch.einsum("bqhd,bkhd->bhqk", probes[f"{at}.query"], probes[f"{at}.key"])
        for at in ("encoder.layers.0.attention", "encoder.layers.2.attention", "decoder.layers.0.attention",
                   "decoder.layers.2.attention", "decoder.layers.1.cross_attention")
    ]  # fmt: skip
    first, third, decoder, decoders_third, cross = products
    bias = probes["encoder.layers.0.attention.scores"] - first
    close(probes["encoder.layers.2.attention.scores"] - third, bias)
    assert bias.std() > 0.1
    close(
        probes["decoder.layers.2.attention.scores"] - decoders_third,
        probes["decoder.layers.0.attention.scores"] - decoder,
    )
    close(probes["decoder.layers.1.cross_attention.scores"], cross)


def test_outputs_that_do_not_give_what_the_experts_returned_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SwitchTransformers(FAMILY, CAPACITY.config, draw_weights(FAMILY, CAPACITY))
    experts = model.model.encoder.block[1].layer[1].mlp.experts
    right, called = experts.forward, []

    def forward(*args: Any) -> Tensor:
        called.append(1)
        returned: Tensor = right(*args)
        return returned * (1 + 1e-9 * (len(called) == 2))

    monkeypatch.setattr(experts, "forward", forward)
    with pytest.raises(AssertionError, match="experts' outputs, weighted, do not give what the module returned"):
        model.probes(**calls(CAPACITY))


def test_kernels_are_what_they_were_after_probing() -> None:
    model = oracle("distinct")
    model.probes(**calls(DISTINCT))
    for config in (model.model.config, model.model.encoder.config, model.model.decoder.config):
        assert config._attn_implementation == "eager"


def test_expert_that_no_token_was_sent_to_has_a_gradient_of_0() -> None:
    recipe = dataclasses.replace(CAPACITY, batch=1, seq=2, target=2, name="switch_transformer/two-tokens")
    labels = draw_inputs(recipe)["labels"]
    _, gradients = oracle("capacity").loss_and_gradients(labels=labels, **calls(recipe))
    shapes = FAMILY.tensor_shapes(CAPACITY.config)
    assert {name: tuple(g.shape) for name, g in gradients.items()} == shapes
    unused = [n for n, g in gradients.items() if ".experts." in n and n.endswith("wi.weight") and not g.any()]
    assert 4 <= len(unused) <= 6  # of 8, two tokens at most use two in either stack


def test_margins_are_guarded_in_encoder_and_decoder() -> None:
    """The first and the second choice of every token; what bfloat16 rounds off is more than their difference."""
    arguments, weights = calls(CAPACITY), draw_weights(FAMILY, CAPACITY)
    truth = oracle("capacity").probes(**arguments)
    found = routing.require_margins("capacity", FAMILY, CAPACITY.config, weights, arguments, truth, ["float32"])
    assert list(found["margin"]) == ROUTERS
    for router in ROUTERS:
        first, second = truth[router].topk(2).values.unbind(-1)
        assert found["margin"][router] == (first - second).min().item() > 0
        assert 0 < found["error"]["float32"][router] < 1e-5
    with pytest.raises(GoldenError, match=r"encoder.layers.1.feed_forward.router_logits.* in bfloat16: rounding may"):
        routing.require_margins("capacity", FAMILY, CAPACITY.config, weights, arguments, truth, ["bfloat16"])


# --- losses of the routers ------------------------------------------------------------------------------------------


def own_losses(model: HuggingFace, recipe: Recipe) -> Any:
    with torch.no_grad(), TrueDouble():
        return model.model(**calls(recipe), output_router_logits=True)


def rows_and_layers_averaged(layers: list[Tensor]) -> float:
    """The library's balancing loss: E Σ f P for the tokens of a row in all layers, and the mean over rows."""
    rows = [torch.cat(row) for row in zip(*layers, strict=True)]
    return sum(balancing_loss(row.tolist()) for row in rows) / len(rows)


def test_librarys_losses_are_averages_where_the_papers_are_sums() -> None:
    model = oracle("distinct")
    theirs = own_losses(model, DISTINCT)
    ours = model.auxiliary_losses(labels=draw_inputs(DISTINCT)["labels"], **calls(DISTINCT))
    encoder = model.at_boundaries([f"encoder.layers.{n}.feed_forward.router_logits" for n in (1, 3)], **calls(DISTINCT))
    decoder = model.at_boundaries(["decoder.layers.1.feed_forward.router_logits"], **calls(DISTINCT))
    close(ours["z_loss"], 2 * theirs.encoder_z_loss + theirs.decoder_z_loss)
    assert theirs.encoder_aux_loss.item() == pytest.approx(rows_and_layers_averaged(list(encoder.values())), rel=1e-12)
    assert theirs.decoder_aux_loss.item() == pytest.approx(rows_and_layers_averaged(list(decoder.values())), rel=1e-12)
    summed = 2 * theirs.encoder_aux_loss + theirs.decoder_aux_loss
    assert abs(ours["aux_loss"] - summed) > 1e-2


def test_librarys_losses_are_0_where_every_layer_is_sparse() -> None:
    recipe = RECIPES["field-num_sparse_encoder_layers"]
    theirs = own_losses(oracle("field-num_sparse_encoder_layers"), recipe)
    assert (theirs.encoder_z_loss, theirs.encoder_aux_loss) == (0, 0)
    assert theirs.decoder_z_loss > 0
    ours = oracle("field-num_sparse_encoder_layers").auxiliary_losses(labels=torch.tensor(0), **calls(recipe))
    assert ours["z_loss"] > theirs.decoder_z_loss


def test_losses_of_the_equations() -> None:
    """Even use of two experts by four tokens gives 1; all tokens with one expert, surely, E."""
    even = [[math.log(3), 0.0], [0.0, math.log(3)]] * 2
    assert balancing_loss(even) == pytest.approx(1.0, rel=1e-15)
    assert balancing_loss([[50.0, 0.0, 0.0]] * 5) == pytest.approx(3.0, rel=1e-15)
    assert balancing_loss([[math.log(3), 0.0]] * 3 + [[0.0, math.log(7)]]) == pytest.approx(
        2 * (3 / 4 * (3 * 3 / 4 + 1 / 8) / 4 + 1 / 4 * (3 * 1 / 4 + 7 / 8) / 4), rel=1e-15
    )
    assert z_loss([[0.0, math.log(3)], [math.log(2), math.log(5)]]) == pytest.approx(
        (math.log(4) ** 2 + math.log(7) ** 2) / 2, rel=1e-15
    )


# --- padding --------------------------------------------------------------------------------------------------------


def test_library_ignores_router_ignore_padding_tokens_and_the_oracle_does_not() -> None:
    inputs, weights = draw_inputs(IGNORING_PADS), draw_weights(FAMILY, IGNORING_PADS)
    model = SwitchTransformers(FAMILY, IGNORING_PADS.config, weights)
    batch = padded(inputs, torch.zeros(4, 9, 61), "left")
    real = batch.mask.bool()
    ignored = HuggingFace.logits(model, **batch.arguments)
    routed = SwitchTransformers(FAMILY, CAPACITY.config, weights).logits(**batch.arguments)
    assert torch.equal(ignored, routed)
    right = model.logits(**batch.arguments)
    assert (ignored - right)[real].abs().max() > 1e-2 * right.abs().max()
    for row in range(4):
        source = batch.source["input_ids"][row][batch.source["attention_mask"][row].bool()]
        alone = model.logits(source[None], decoder_input_ids=batch.ids[row][real[row]][None])
        close(right[row][real[row]], alone[0])
    assert not right[~real].any()


def test_adapter_declares_it(tmp_path: Any) -> None:
    checkpoint = Checkpoint(
        IGNORING_PADS.config, draw_weights(FAMILY, IGNORING_PADS), torch.float32, torch.device("cpu")
    )
    model = HuggingFaceModels("eager").load(checkpoint)
    left = padded(draw_inputs(IGNORING_PADS), torch.zeros(4, 9, 61), "left")
    with pytest.raises(Unsupported, match="router_ignore_padding_tokens is ignored"):
        model(**left.arguments)
    right = padded(draw_inputs(IGNORING_PADS), torch.zeros(4, 9, 61), "right")
    assert model(**right.arguments).logits.shape == (4, 9, 61)


# --- checkpoint -----------------------------------------------------------------------------------------------------


def test_library_does_not_give_the_shared_table_to_encoder_and_decoder_of_an_untied_checkpoint() -> None:
    """4.x wrote only "shared.weight"; 5.23.0 misses the other two, and would draw them anew."""
    recipe = RECIPES["field-tie_word_embeddings"]
    weights = {n: t for n, t in draw_weights(FAMILY, recipe).items() if not n.endswith("embed_tokens.weight")}
    with pytest.raises(ValueError, match=r"'missing_keys': \['decoder.embed_tokens.weight', 'encoder.embed_tokens"):
        SwitchTransformers(FAMILY, recipe.config, weights)
