"""The oracle says what Llama is in real float64, whatever the library's traps; three independent derivations agree.

`tests/candidates` share no code with Hugging Face, with `reference_impl` or with each other.
"""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from candidates import LAYOUTS
from conformance.bounds import measure
from conformance.families import Recipe, get
from conformance.golden.model import draw_inputs, draw_weights
from conformance.oracles.true_double import TrueDouble
from conformance.probes import at_module_boundaries

transformers = pytest.importorskip("transformers")

from conformance.oracles.hugging_face import HuggingFace, real_positions  # noqa: E402

FAMILY = get("llama")
RECIPES = {recipe.name: recipe for recipe in FAMILY.recipes}
DISTINCT = RECIPES["llama/distinct"]
SHORT = {name: recipe for name, recipe in RECIPES.items() if recipe.last_rows is None}
AGREEMENT = 1e-12


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only lose time to threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_recipe = pytest.mark.parametrize("recipe", SHORT.values(), ids=SHORT)


def ids_of(recipe: Recipe) -> Tensor:
    return draw_inputs(recipe)["input_ids"]


def oracle(recipe: Recipe, **options: Any) -> HuggingFace:
    return HuggingFace(FAMILY, recipe.config, draw_weights(FAMILY, recipe), **options)


class Checkpoint:
    """As much of a checkpoint as the candidates ask for."""

    dtype = torch.float64

    def __init__(self, recipe: Recipe) -> None:
        self.config, self._weights = copy.deepcopy(recipe.config), draw_weights(FAMILY, recipe)

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.double() for name, tensor in self._weights.items()}


def candidate(layout: str, recipe: Recipe) -> Any:
    """The correct candidate of that layout; call it under TrueDouble."""
    checkpoint = Checkpoint(recipe)
    with TrueDouble():
        return LAYOUTS[layout](None).load(checkpoint)


def library(recipe: Recipe) -> Any:
    """The library's model with the recipe's weights, as a user makes it: float32."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(copy.deepcopy(recipe.config)))
    model.load_state_dict(draw_weights(FAMILY, recipe), strict=False)
    return model.eval()


def error(got: Tensor, truth: Tensor) -> float:
    return measure(got, truth).max


# --- the truth ------------------------------------------------------------------------------------------------------


@every_layout
@every_recipe
def test_logits_equal_an_independent_derivation(recipe: Recipe, layout: str) -> None:
    with TrueDouble(), torch.no_grad():
        theirs = candidate(layout, recipe)(ids_of(recipe))
    assert error(theirs, oracle(recipe).logits(ids_of(recipe))) < AGREEMENT


def test_logits_are_float64_of_batch_seq_vocab() -> None:
    logits = oracle(DISTINCT).logits(ids_of(DISTINCT))
    assert (logits.dtype, tuple(logits.shape)) == (torch.float64, (4, 11, 61))


@every_layout
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_equal_an_independent_derivation(layout: str, side: str) -> None:
    ids, lengths = ids_of(DISTINCT), torch.tensor([7, 11, 1, 4])
    slots = torch.arange(11)
    mask = ((slots >= 11 - lengths[:, None]) if side == "left" else (slots < lengths[:, None])).long()
    with TrueDouble(), torch.no_grad():
        theirs = candidate(layout, DISTINCT)(ids, attention_mask=mask)
    real = mask.bool()
    assert error(theirs[real], oracle(DISTINCT).logits(ids, attention_mask=mask)[real]) < AGREEMENT


@every_layout
def test_logits_at_given_positions_equal_an_independent_derivation(layout: str) -> None:
    positions = draw_inputs(DISTINCT)["position_ids"]
    with TrueDouble(), torch.no_grad():
        theirs = candidate(layout, DISTINCT)(ids_of(DISTINCT), position_ids=positions)
    assert error(theirs, oracle(DISTINCT).logits(ids_of(DISTINCT), position_ids=positions)) < AGREEMENT


def test_loss_is_the_mean_over_all_rows_of_the_next_tokens_negative_log_probability() -> None:
    ids = ids_of(DISTINCT)
    with TrueDouble(), torch.no_grad():
        log_probabilities = candidate("batch_first", DISTINCT)(ids).log_softmax(-1)
    chosen = [log_probabilities[row, place, ids[row, place + 1]].item() for row in range(4) for place in range(10)]
    loss, _ = oracle(DISTINCT).loss_and_gradients(ids)
    assert loss.item() == pytest.approx(-sum(chosen) / 40, rel=1e-13)


@pytest.mark.parametrize("layout", ["batch_first", "heads_first"])  # the fused one holds no parameters by hub name
def test_gradients_equal_an_independent_derivation(layout: str) -> None:
    ids = ids_of(DISTINCT)
    _, gradients = oracle(DISTINCT).loss_and_gradients(ids)
    with TrueDouble():
        model = candidate(layout, DISTINCT)
        for parameter in model.parameters.values():
            parameter.requires_grad_(True)
        logits = model(ids)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert gradients.keys() == FAMILY.tensor_shapes(DISTINCT.config).keys()
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        difference = (model.parameters[name].grad - gradient).abs().max().item()
        assert difference < AGREEMENT * largest, name


def test_gradients_of_a_second_call_do_not_add_up() -> None:
    model, ids = oracle(DISTINCT), ids_of(DISTINCT)
    _, first = model.loss_and_gradients(ids)
    _, second = model.loss_and_gradients(ids)
    assert [name for name in first if not first[name].equal(second[name])] == []


def test_dropout_of_the_config_is_not_applied() -> None:
    assert DISTINCT.config["attention_dropout"] > 0
    model = oracle(DISTINCT)
    assert model.logits(ids_of(DISTINCT)).equal(model.logits(ids_of(DISTINCT)))


# --- the library's traps --------------------------------------------------------------------------------------------


def test_double_of_the_library_is_not_float64_but_the_oracle_is() -> None:
    """Norms and rotary tables of the library are computed in float32 whatever the parameters are."""
    ids, truth = ids_of(DISTINCT), oracle(DISTINCT).logits(ids_of(DISTINCT))
    with torch.no_grad():
        doubled = library(DISTINCT).double()(ids).logits
    with TrueDouble(), torch.no_grad():
        independent = candidate("batch_first", DISTINCT)(ids)
    assert doubled.dtype == torch.float64
    assert 1e-9 < error(doubled, truth) < 1e-4
    assert error(independent, truth) < AGREEMENT


def test_jumping_positions_without_mask_are_packed_documents_to_the_library_but_not_to_the_oracle() -> None:
    ids, positions = ids_of(DISTINCT), draw_inputs(DISTINCT)["position_ids"]
    truth = oracle(DISTINCT).logits(ids, position_ids=positions)
    with TrueDouble(), torch.no_grad():
        fooled = library(DISTINCT)(ids, position_ids=positions, use_cache=False).logits
        independent = candidate("batch_first", DISTINCT)(ids, position_ids=positions)
    assert error(fooled, truth) > 1e-2
    assert error(independent, truth) < AGREEMENT


def test_positions_of_left_padded_rows_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    assert real_positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]


def test_positions_stop_where_right_padding_begins() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    assert real_positions(mask).tolist() == [[0, 1, 2, 2, 2], [0, 0, 0, 0, 0]]


def test_library_turns_queries_and_keys_by_the_positions_of_real_tokens() -> None:
    """Left to itself it counts slots, which no logits show: rotary positions may be offset row by row."""
    model, seen = oracle(DISTINCT), []
    rotary = model.model.model.rotary_emb
    rotary.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    model.logits(
        torch.tensor([[9, 9, 3, 5, 7], [2, 4, 6, 8, 1]]),
        attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    )
    [(args, kwargs)] = seen
    positions = kwargs.get("position_ids", args[-1])
    assert positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def respelt(recipe: Recipe, *kept: str) -> Recipe:
    written = {key: value for key, value in recipe.config.items() if not key.startswith("rope_") or key in kept}
    return dataclasses.replace(recipe, config=written)


@pytest.mark.parametrize("name", ["llama/distinct", "llama/field-rope_theta", "llama/field-rope_scaling-linear"])
@pytest.mark.parametrize("kept", [("rope_theta", "rope_scaling"), ("rope_parameters",)], ids=["4.x", "5.x"])
def test_either_spelling_of_the_rotary_parameters_alone_is_read_like_both(name: str, kept: tuple[str, ...]) -> None:
    both, one = RECIPES[name], respelt(RECIPES[name], *kept)
    assert one.config.keys() & {"rope_theta", "rope_scaling", "rope_parameters"} == set(kept)
    assert oracle(one).logits(ids_of(both)).equal(oracle(both).logits(ids_of(both)))


def test_neither_spelling_gives_other_logits() -> None:
    neither = respelt(RECIPES["llama/field-rope_theta"])
    ids = ids_of(neither)
    assert error(oracle(neither).logits(ids), oracle(RECIPES["llama/field-rope_theta"]).logits(ids)) > 1e-2


@every_recipe
def test_config_is_not_touched(recipe: Recipe) -> None:
    config = copy.deepcopy(recipe.config)
    model = HuggingFace(FAMILY, config, draw_weights(FAMILY, recipe))
    model.probes(ids_of(recipe))
    assert config == recipe.config


def test_weights_and_ids_are_not_touched() -> None:
    weights, ids = draw_weights(FAMILY, DISTINCT), ids_of(DISTINCT)
    model = HuggingFace(FAMILY, DISTINCT.config, weights)
    model.loss_and_gradients(ids)
    fresh = draw_weights(FAMILY, DISTINCT)
    assert [n for n in fresh if weights[n].dtype != torch.float32 or not weights[n].equal(fresh[n])] == []
    assert ids.equal(ids_of(DISTINCT))


def test_missing_weight_is_refused_by_name() -> None:
    weights = draw_weights(FAMILY, DISTINCT)
    del weights["model.layers.1.mlp.up_proj.bias"]
    with pytest.raises(ValueError, match=r"'missing_keys': \['model.layers.1.mlp.up_proj.bias'\]"):
        HuggingFace(FAMILY, DISTINCT.config, weights)


def test_weight_that_the_architecture_does_not_have_is_refused_by_name() -> None:
    weights = draw_weights(FAMILY, DISTINCT) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(10)}
    with pytest.raises(ValueError, match=r"'unexpected_keys': \['model.layers.0.self_attn.q_norm.weight'\]"):
        HuggingFace(FAMILY, DISTINCT.config, weights)


def test_missing_head_is_refused_unless_it_is_tied() -> None:
    weights = draw_weights(FAMILY, DISTINCT)
    del weights["lm_head.weight"]
    with pytest.raises(ValueError, match=r"'missing_keys': \['lm_head.weight'\]"):
        HuggingFace(FAMILY, DISTINCT.config, weights)


def test_tied_head_is_the_embedding_table() -> None:
    recipe = RECIPES["llama/field-tie_word_embeddings"]
    probes = oracle(recipe).probes(ids_of(recipe))
    table = draw_weights(FAMILY, recipe)["model.embed_tokens.weight"].double()
    assert error(probes["final_norm"] @ table.T, probes["logits"]) < AGREEMENT


# --- probes ---------------------------------------------------------------------------------------------------------


@every_recipe
def test_every_probe_is_delivered_in_order_with_the_sizes_of_its_axes(recipe: Recipe) -> None:
    probes = oracle(recipe).probes(ids_of(recipe))
    sizes = FAMILY.probe_sizes(recipe.config, recipe.batch, recipe.seq)
    wanted = {spec.name: tuple(sizes[axis] for axis in spec.axes) for spec in FAMILY.probes(recipe.config)}
    assert list(probes) == list(wanted)
    assert {name: tuple(probe.shape) for name, probe in probes.items()} == wanted
    assert {probe.dtype for probe in probes.values()} == {torch.float64}


@pytest.fixture(scope="module")
def probes() -> dict[str, Tensor]:
    return oracle(DISTINCT).probes(ids_of(DISTINCT))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in draw_weights(FAMILY, DISTINCT).items()}


def test_logits_among_the_probes_are_the_logits(probes: dict[str, Tensor]) -> None:
    assert probes["logits"].equal(oracle(DISTINCT).logits(ids_of(DISTINCT)))


def test_embedding_probe_is_the_looked_up_table(probes: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    assert probes["embedding"].equal(weights["model.embed_tokens.weight"][ids_of(DISTINCT)])


# probe, weight and bias that make it, the probe that goes in, how the result's rows are cut
PROJECTIONS = {
    "attention.query": ("self_attn.q_proj", "attention.norm", (3, 2, 10)),
    "attention.key": ("self_attn.k_proj", "attention.norm", (3, 10)),
    "attention.value": ("self_attn.v_proj", "attention.norm", (3, 10)),
    "feed_forward.gate": ("mlp.gate_proj", "feed_forward.norm", (52,)),
    "feed_forward.up": ("mlp.up_proj", "feed_forward.norm", (52,)),
    "feed_forward.output": ("mlp.down_proj", "feed_forward.product", (42,)),
}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_projection_probe_is_its_input_through_its_weight(
    probes: dict[str, Tensor], weights: dict[str, Tensor], name: str, layer: int
) -> None:
    module, source, cut = PROJECTIONS[name]
    weight, bias = (weights[f"model.layers.{layer}.{module}.{kind}"] for kind in ("weight", "bias"))
    expected = (probes[f"layers.{layer}.{source}"] @ weight.T + bias).view(4, 11, *cut)
    assert error(probes[f"layers.{layer}.{name}"], expected) < AGREEMENT


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()


@pytest.mark.parametrize(
    ("name", "weight", "source"),
    [
        ("layers.0.attention.norm", "layers.0.input_layernorm", "embedding"),
        ("layers.0.feed_forward.norm", "layers.0.post_attention_layernorm", "layers.0.attention.residual"),
        ("layers.1.attention.norm", "layers.1.input_layernorm", "layers.0.output"),
        ("final_norm", "norm", "layers.1.output"),
    ],
)
def test_norm_probe_is_its_input_over_its_root_mean_square(
    probes: dict[str, Tensor], weights: dict[str, Tensor], name: str, weight: str, source: str
) -> None:
    assert error(probes[name], rms(probes[source]) * weights[f"model.{weight}.weight"]) < AGREEMENT


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_probes_follow_from_each_other(
    probes: dict[str, Tensor], weights: dict[str, Tensor], layer: int
) -> None:
    """Scores are scaled and unmasked, weights are causal, query head (k, g) reads key-value head k."""
    p = {name.rsplit(".", 1)[1]: x for name, x in probes.items() if name.startswith(f"layers.{layer}.attention.")}
    scores = torch.einsum("bkgte,bkse->bkgts", p["query_rotated"], p["key_rotated"]) / 10**0.5
    assert error(p["scores"], scores) < AGREEMENT
    future = torch.ones(11, 11, dtype=torch.bool).triu(1)
    assert error(p["weights"], scores.masked_fill(future, -torch.inf).softmax(-1)) < AGREEMENT
    assert error(p["context"], torch.einsum("bkgts,bske->btkge", p["weights"], p["value"])) < AGREEMENT
    merged = p["context"].reshape(4, 11, 60)
    weight, bias = (weights[f"model.layers.{layer}.self_attn.o_proj.{kind}"] for kind in ("weight", "bias"))
    assert error(p["output"], merged @ weight.T + bias) < AGREEMENT


@pytest.mark.parametrize("layer", [0, 1])
def test_rotation_turns_pairs_and_leaves_position_0_alone(probes: dict[str, Tensor], layer: int) -> None:
    """Half-split pairs (i, i + 5) keep their length; what is rotated stands as (…, seq, head_dim)."""
    for what, order in (("query", (0, 2, 3, 1, 4)), ("key", (0, 2, 1, 3))):
        before = probes[f"layers.{layer}.attention.{what}"].permute(order)
        after = probes[f"layers.{layer}.attention.{what}_rotated"]
        assert after[..., 0, :].equal(before[..., 0, :])
        assert error(after[..., 1:, :], before[..., 1:, :]) > 0.1
        assert error(after[..., :5].hypot(after[..., 5:]), before[..., :5].hypot(before[..., 5:])) < AGREEMENT


@pytest.mark.parametrize("layer", [0, 1])
def test_residual_and_feed_forward_probes_follow_from_each_other(probes: dict[str, Tensor], layer: int) -> None:
    stream = probes["embedding" if layer == 0 else f"layers.{layer - 1}.output"]
    p = {name.removeprefix(f"layers.{layer}."): x for name, x in probes.items() if name.startswith(f"layers.{layer}.")}
    assert error(p["attention.residual"], stream + p["attention.output"]) < AGREEMENT
    gate = p["feed_forward.gate"]
    assert error(p["feed_forward.activation"], gate / (1 + (-gate).exp())) < AGREEMENT
    assert error(p["feed_forward.product"], p["feed_forward.activation"] * p["feed_forward.up"]) < AGREEMENT
    assert error(p["output"], p["attention.residual"] + p["feed_forward.output"]) < AGREEMENT


def test_head_probe_is_the_final_norm_through_the_head(probes: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    assert error(probes["logits"], probes["final_norm"] @ weights["lm_head.weight"].T) < AGREEMENT


def test_probe_is_a_copy_that_a_later_operation_in_place_does_not_change() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU(inplace=True))
    where = {"before": ("0", "output"), "into": ("1", "input"), "after": ("1", "output")}
    with at_module_boundaries(model, where) as found:
        model(torch.tensor([-3.0, 5.0]))
    assert {name: value.tolist() for name, value in found.items()} == {
        "before": [-3.0, 5.0],
        "into": [-3.0, 5.0],
        "after": [0.0, 5.0],
    }


def test_model_is_as_before_after_its_probes_were_taken() -> None:
    model, ids = oracle(DISTINCT), ids_of(DISTINCT)
    before = model.logits(ids)
    model.probes(ids)
    assert model.model.config._attn_implementation == "eager"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
    assert model.logits(ids).equal(before)


# --- working dtypes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("dtype", "roundoff"), [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)]
)
def test_working_dtype_is_really_run_in(dtype: torch.dtype, roundoff: float, attention: str) -> None:
    """The error is that of the dtype: neither double in disguise nor a coarser one."""
    logits = oracle(DISTINCT, dtype=dtype, attention=attention).logits(ids_of(DISTINCT))
    assert logits.dtype == dtype
    truth = oracle(DISTINCT).logits(ids_of(DISTINCT))
    assert 0.1 * roundoff < measure(logits, truth).rms < 50 * roundoff
