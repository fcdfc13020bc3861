"""Every component says what it takes and gives, and its cases keep to the rules for cases."""

from pathlib import Path

import pytest

from conformance import Case, check
from conformance.cases import Manifest, fixtures_directory
from conformance.families import COMPONENTS, Component, ComponentRecipe, get
from conformance.golden.component import derive

RECIPES = {recipe.name: recipe for name in COMPONENTS for recipe in get(name).recipes}

every_component = pytest.mark.parametrize("family", [get(name) for name in COMPONENTS], ids=COMPONENTS)
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@every_recipe
def test_all_that_a_case_gives_is_declared_in_the_contract(recipe: ComponentRecipe) -> None:
    given = {*recipe.inputs, *recipe.weights, *recipe.settings}
    assert given <= {value.name for value in get(recipe.name.split("/")[0]).arguments}


@every_component
def test_arguments_are_inputs_then_weights_then_settings(family: Component) -> None:
    kinds = []
    for value in family.arguments:
        kind = {("inputs", "weights", "settings").index(k) for recipe in family.recipes
                for k in ("inputs", "weights", "settings") if value.name in getattr(recipe, k)}  # fmt: skip
        assert len(kind) == 1, f"{value.name} is given as {kind}"
        kinds += kind
    assert kinds == sorted(kinds)


@every_component
def test_axes_say_the_rank_of_every_tensor(family: Component) -> None:
    for recipe in family.recipes:
        case = Case(recipe.name)
        for value in (*family.arguments, *family.returns):
            tensors = {**case.inputs, **case.weights, **case.expected}
            if value.name in tensors:
                assert tensors[value.name].ndim == len((value.axes or "").split()), value.name
    assert all(value.axes for value in family.returns)


@every_component
def test_an_axis_has_one_size_in_a_case(family: Component) -> None:
    for recipe in family.recipes:
        case, sizes = Case(recipe.name), dict[str, int]()
        tensors = {**case.inputs, **case.weights, **case.expected}
        for value in (*family.arguments, *family.returns):
            if value.name in tensors:
                for axis, size in zip((value.axes or "").split(), tensors[value.name].shape, strict=True):
                    assert sizes.setdefault(axis, size) == size, f"{recipe.name}: {value.name} {axis}"


@every_component
def test_first_case_is_plain(family: Component) -> None:
    assert family.recipes[0].name == f"{family.name}/plain"


@every_recipe
def test_a_field_case_names_a_field_that_explain_knows(recipe: ComponentRecipe) -> None:
    fields = {field.name for field in get(recipe.name.split("/")[0]).fields}
    assert recipe.field is None or recipe.field in fields


@every_component
def test_fixtures_of_a_component_stay_small(family: Component) -> None:
    directory = Path(fixtures_directory(), family.name)
    assert sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) <= 102_400


# --- returns that are compared in part

PARTLY = "learned_positions/left-padding"


def test_gradients_come_only_from_what_is_compared() -> None:
    """The cotangent is 0 in padding, so that no gradient depends on what padding gets."""
    case = Case(PARTLY)
    where = case.inputs["compared.y"]
    assert where.tolist() == (case.inputs["attention_mask"][:, -5:] == 1).tolist()
    assert case.inputs["cotangent.y"][~where].abs().max() == 0
    assert case.inputs["cotangent.y"][where].abs().max() > 0
    assert case.expected["y"][~where].abs().max() == 0


def test_where_a_return_is_compared_is_not_passed_to_the_function() -> None:
    passed = {}

    def learned_positions(**given: object) -> object:
        passed.update(given)
        return given["x"]

    check(learned_positions, PARTLY, "component.outputs")
    assert passed.keys() == {"x", "weight", "attention_mask"}


def test_a_case_without_working_dtypes_has_no_oracle_error() -> None:
    """Scores of many thousands overflow float16, in which nothing is claimed there."""
    large = RECIPES["multi_head_attention/large"]
    assert large.claims == {"component.outputs": ("float64",)}
    assert derive(large).provenance["oracle_error"] == {}


def test_every_component_has_claims() -> None:
    claimed = {claim.family for claim in Manifest().claims()}
    assert set(COMPONENTS) <= claimed
