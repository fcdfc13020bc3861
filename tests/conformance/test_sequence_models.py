"""RNNsearch and GNMT: their oracles agree with torch's own layers, and their cases obey the config rules."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.families import Family, Recipe, get
from conformance.golden.model import draw_inputs, draw_weights
from conformance.oracles import oracle_class, sequence_mistakes, sequence_models
from conformance.oracles.equations.gnmt import GNMT
from conformance.oracles.equations.rnn_search import RNNSearch
from conformance.probes import PROBED_STEPS, at_module_boundaries, axis_sizes, step_of

FAMILIES = ("rnn_search", "gnmt")
RECIPES = {recipe.name: recipe for family in FAMILIES for recipe in get(family).recipes}
MISTAKES = {"rnn_search": sequence_mistakes.RNN_SEARCH, "gnmt": sequence_mistakes.GNMT_MISTAKES}

every_family = pytest.mark.parametrize("family", FAMILIES)
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def family_of(recipe: Recipe) -> Family:
    return get(recipe.name.split("/")[0])


def oracle(recipe: Recipe, **more: Any) -> Any:
    family = family_of(recipe)
    return oracle_class(family)(family, recipe.config, draw_weights(family, recipe), **more)


def arguments(recipe: Recipe) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in draw_inputs(recipe).items() if name.endswith("input_ids")}


# --- the oracles ----------------------------------------------------------------------------------------------------


@every_recipe
def test_loops_agree_with_the_composition_of_torch_layers(recipe: Recipe) -> None:
    """In float64 both say the same, so that in a working dtype the composition's error is that of its rounding."""
    loops, composed = oracle(recipe), oracle(recipe, dtype=torch.float64)
    torch.testing.assert_close(
        composed.logits(**arguments(recipe)), loops.logits(**arguments(recipe)), rtol=0, atol=1e-12
    )


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_composition_runs_in_the_dtype(recipe: Recipe, dtype: torch.dtype) -> None:
    """It rounds where the dtype does: by more than a hundredth of its unit roundoff, which nothing wider would."""
    got, truth = oracle(recipe, dtype=dtype).logits(**arguments(recipe)), oracle(recipe).logits(**arguments(recipe))
    assert got.dtype == dtype
    assert (got.double() - truth).abs().max() / truth.abs().max() > torch.finfo(dtype).eps / 100


def test_annotations_are_those_of_torchs_gru() -> None:
    recipe = RECIPES["rnn_search/field-reset_after"]
    weights = {name: weight.double() for name, weight in draw_weights(family_of(recipe), recipe).items()}
    library = nn.GRU(10, 12, bidirectional=True, batch_first=True, dtype=torch.float64)
    library.load_state_dict({n.removeprefix("encoder.rnn."): w for n, w in weights.items() if "encoder.rnn." in n})
    inputs = arguments(recipe)
    expected, final = library(weights["encoder.embedding.weight"][inputs["input_ids"]])
    found = oracle(recipe).probes(**inputs)
    torch.testing.assert_close(found["encoder.layers.0.output"].flatten(2), expected.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(found["encoder.layers.0.backward"][:, 0], final[1].detach(), rtol=0, atol=1e-13)


def test_the_search_is_torchs_softmax_over_every_position() -> None:
    found = oracle(RECIPES["gnmt/distinct"]).probes(**arguments(RECIPES["gnmt/distinct"]))
    step, memory = "decoder.steps.1.cross_attention.", found["encoder.layers.4.output"]
    torch.testing.assert_close(found[step + "weights"], found[step + "scores"].softmax(-1), rtol=0, atol=1e-15)
    context = torch.einsum("bs,bsh->bh", found[step + "weights"], memory)
    torch.testing.assert_close(found[step + "context"], context, rtol=0, atol=1e-14)


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_run_over_its_real_tokens(family: str, side: str) -> None:
    recipe = RECIPES[f"{family}/plain"]
    ids, run = arguments(recipe), oracle(recipe)
    mask, target_mask = torch.zeros_like(ids["input_ids"]), torch.zeros_like(ids["decoder_input_ids"])
    source, target = (slice(2, None), slice(4, None)) if side == "left" else (slice(0, 5), slice(0, 5))
    mask[:, source], target_mask[:, target] = 1, 1
    logits = run.logits(attention_mask=mask, decoder_attention_mask=target_mask, **ids)
    alone = run.logits(input_ids=ids["input_ids"][:, source], decoder_input_ids=ids["decoder_input_ids"][:, target])
    torch.testing.assert_close(logits[:, target], alone, rtol=0, atol=1e-15)
    assert not logits[target_mask == 0].any()


@every_family
def test_weights_that_the_family_does_not_want_are_refused_by_name(family: str) -> None:
    found, recipe = get(family), RECIPES[f"{family}/plain"]
    weights = draw_weights(found, recipe) | {"decoder.initial.gate": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"does not want exactly these weights: decoder\.initial\.gate differ"):
        oracle_class(found)(found, recipe.config, weights)


@every_family
def test_gradients_are_those_of_the_composition(family: str) -> None:
    """The loops' gradients, and those that autograd finds for torch's own layers."""
    recipe = RECIPES[f"{family}/distinct"]
    inputs = draw_inputs(recipe)
    labels = inputs["labels"]
    loss, gradients = oracle(recipe).loss_and_gradients(labels=labels, **arguments(recipe))
    other_loss, others = oracle(recipe, dtype=torch.float64).loss_and_gradients(labels=labels, **arguments(recipe))
    torch.testing.assert_close(other_loss, loss, rtol=1e-13, atol=0)
    scale = max(gradient.abs().max() for gradient in gradients.values())
    assert gradients.keys() == others.keys() == get(family).tensor_shapes(recipe.config).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name] / scale, gradient / scale, rtol=0, atol=1e-13)


@every_family
def test_every_mistake_is_a_counterfactual_of_plain_and_moves_the_logits(family: str) -> None:
    recipe = RECIPES[f"{family}/plain"]
    labels = [label for label, config in recipe.counterfactuals.items() if sequence_models.MISTAKE in config]
    assert sorted(labels) == sorted(MISTAKES[family])
    truth = oracle(recipe).logits(**arguments(recipe))
    wrong = {}
    for label, config in recipe.counterfactuals.items():
        found = get(family)
        weights = draw_weights(found, recipe)
        wrong[label] = oracle_class(found)(found, config, weights).logits(**arguments(recipe))
        assert (wrong[label] - truth).abs().max() > 0.01 * truth.abs().max(), label
    for one, other in combinations(wrong, 2):
        assert (wrong[one] - wrong[other]).abs().max() > 0.01 * truth.abs().max(), (one, other)


@every_family
def test_a_mistake_changes_one_equation(family: str) -> None:
    base = {"rnn_search": RNNSearch, "gnmt": GNMT}[family]
    for label, mistaken in MISTAKES[family].items():
        assert mistaken.__bases__ == (base,), label


# --- the cases ------------------------------------------------------------------------------------------------------


def test_distinct_rnn_search_has_no_two_sizes_that_could_be_confused() -> None:
    recipe = RECIPES["rnn_search/distinct"]
    m, n, inner, l = (recipe.config[f"{s}_size"] for s in ("embedding", "hidden", "attention", "maxout"))  # noqa: E741
    sizes = [
        recipe.batch, recipe.seq, recipe.target, recipe.config["vocab_size"], recipe.config["decoder_vocab_size"],
        m, n, 2 * n, 3 * n, m + 2 * n, inner, l, 2 * l,
    ]  # fmt: skip
    assert sizes == [4, 15, 9, 31, 23, 11, 13, 26, 39, 37, 17, 10, 20]
    assert len(set(sizes)) == len(sizes)


def test_distinct_gnmt_has_no_two_sizes_that_could_be_confused() -> None:
    recipe = RECIPES["gnmt/distinct"]
    config = recipe.config
    embedding, hidden = config["embedding_size"], config["hidden_size"]
    sizes = [
        recipe.batch, recipe.seq, recipe.target, config["vocab_size"], config["decoder_vocab_size"], embedding, hidden,
        2 * hidden, 4 * hidden, embedding + hidden, config["attention_size"], config["encoder_layers"],
        config["decoder_layers"],
    ]  # fmt: skip
    assert sizes == [4, 15, 9, 31, 23, 13, 11, 22, 44, 24, 17, 5, 3]
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("rnn_search", "decoder.initial.weight"),
        *[(family, f"decoder.{name}") for family in FAMILIES for name in ("attention.query_weight", "output.weight")],
        ("rnn_search", "decoder.readout.context_weight"),
        ("rnn_search", "decoder.rnn.weight_ih_l0"),
    ],
)
def test_square_matrices_load_either_way(family: str, name: str) -> None:
    rows, columns = get(family).tensor_shapes(RECIPES[f"{family}/square"].config)[name]
    assert rows == columns


@every_recipe
def test_a_checkpoint_holds_the_references_parameters(recipe: Recipe) -> None:
    from reference_impl.models.gnmt import GNMT, GNMTConfig
    from reference_impl.models.rnn_search import RNNSearch, RNNSearchConfig

    with torch.device("meta"):
        model: nn.Module = (
            GNMT(GNMTConfig.from_dict(recipe.config))
            if recipe.config["model_type"] == "gnmt"
            else RNNSearch(RNNSearchConfig.from_dict(recipe.config))
        )
    ours = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert family_of(recipe).tensor_shapes(recipe.config) == ours


# --- the probes -----------------------------------------------------------------------------------------------------


@every_recipe
def test_axes_multiply_to_what_the_oracle_shows(recipe: Recipe) -> None:
    found = oracle(recipe).probes(**arguments(recipe))
    sizes = axis_sizes(family_of(recipe), recipe.config, arguments(recipe))
    specs = {spec.name: spec for spec in family_of(recipe).probes(recipe.config)}
    assert list(found) == list(specs)
    for name, value in found.items():
        assert tuple(value.shape) == tuple(sizes[axis] for axis in specs[name].axes)


def test_the_first_steps_are_shown_and_no_more() -> None:
    for family in FAMILIES:
        specs = get(family).probes(RECIPES[f"{family}/plain"].config)
        assert {step_of(spec.name) for spec in specs} == {None, *range(PROBED_STEPS)}


@pytest.mark.parametrize(
    ("probe", "step"), [("decoder.steps.2.state", 2), ("steps.12.state", 12), ("decoder.layers.1.output", None)]
)
def test_a_probe_knows_its_step(probe: str, step: int | None) -> None:
    assert step_of(probe) == step


def test_each_call_of_a_module_can_be_shown_alone() -> None:
    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            for t in range(3):
                x = self.state(x + t)
            return x

    where = {"first": ("state[0]", "output"), "second in": ("state[1]", "input"), "last": ("state", "output")}
    model = Stepped()
    with at_module_boundaries(model, where) as found:
        model(torch.zeros(1))
    assert {name: value.item() for name, value in found.items()} == {"first": 0.0, "second in": 1.0, "last": 3.0}
