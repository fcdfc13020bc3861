"""What is special to the cases of the Transformer, beside the rules for every family.

Sizes are stated here as literals, so that a change of a recipe that weakens it is noticed.
"""

from itertools import combinations

import pytest

from conformance.families import Recipe, get
from conformance.golden.model import draw_inputs

FAMILY = get("transformer")
RECIPES = {recipe.name.removeprefix("transformer/"): recipe for recipe in FAMILY.recipes}
PLAIN, DISTINCT = RECIPES["plain"], RECIPES["distinct"]

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def sizes(recipe: Recipe) -> dict[str, int]:
    """Every size that a weight or a stream of the model can have, by what it counts."""
    config = recipe.config
    size = config["d_model"]
    return {
        "source": recipe.seq,
        "target": recipe.target or 0,
        "source vocabulary": config["vocab_size"],
        "target vocabulary": config.get("decoder_vocab_size") or config["vocab_size"],
        "hidden": size,
        "inside the encoder": config["encoder_ffn_dim"],
        "inside the decoder": config["decoder_ffn_dim"],
        "queries, keys and values fused": 3 * size,
        "heads of the encoder": config["encoder_attention_heads"],
        "heads of the decoder": config["decoder_attention_heads"],
        "head_dim of the encoder": size // config["encoder_attention_heads"],
    }


def test_distinct_has_the_sizes_that_are_meant() -> None:
    assert list(sizes(DISTINCT).values()) == [9, 11, 47, 45, 30, 37, 43, 90, 5, 3, 6]
    assert (DISTINCT.config["encoder_layers"], DISTINCT.config["decoder_layers"]) == (2, 3)


def test_distinct_has_no_two_sizes_that_could_be_confused() -> None:
    found = sizes(DISTINCT)
    assert [(a, b) for a, b in combinations(found, 2) if found[a] == found[b]] == []


def test_plain_has_no_two_sizes_that_could_be_confused_but_the_vocabularies() -> None:
    found = sizes(PLAIN)
    equal = [(a, b) for a, b in combinations(found, 2) if found[a] == found[b]]
    assert equal == [("source vocabulary", "target vocabulary")]


def test_distinct_has_every_field_of_the_family_moved_but_these() -> None:
    """Its embeddings are scaled in plain, and field-scale_embedding has them unscaled."""
    moved = [f.name for f in FAMILY.fields if DISTINCT.config.get(f.name) == PLAIN.config.get(f.name)]
    assert moved == ["model_type", "scale_embedding", "decoder_attention_heads"]


def test_square_has_every_size_equal() -> None:
    shapes = set(FAMILY.tensor_shapes(RECIPES["square"].config).values())
    assert shapes == {(24, 24), (24,), (1, 24)}


@every_recipe
def test_stacks_are_of_unequal_depth_and_heads_unless_sizes_are_equal(recipe: Recipe) -> None:
    config = recipe.config
    for what in ("layers", "attention_heads"):
        if recipe.name != "transformer/square":
            assert config[f"encoder_{what}"] != config[f"decoder_{what}"]


@every_recipe
def test_the_pad_id_is_no_real_token_of_source_or_target(recipe: Recipe) -> None:
    """The library zeroes its gradient, whatever the mask says."""
    inputs = draw_inputs(recipe)
    for name in ("input_ids", "decoder_input_ids"):
        assert recipe.config["pad_token_id"] not in inputs[name]


@every_recipe
def test_positions_fit_the_librarys_table(recipe: Recipe) -> None:
    assert max(recipe.seq, recipe.target or 0) <= recipe.config["max_position_embeddings"]


def test_paper_is_plain_with_positions_in_another_order() -> None:
    paper = RECIPES["paper"]
    assert paper.config == PLAIN.config | {"model_type": "transformer"}
    assert paper.weights == PLAIN.weights
    assert [PLAIN.config] == list(paper.counterfactuals.values())
    assert [paper.config] == list(PLAIN.counterfactuals.values())


def test_long_case_has_hundreds_of_tokens_of_both_and_compares_16() -> None:
    long = RECIPES["long"]
    assert (long.seq, long.target, long.last_rows) == (300, 280, 16)


def test_keys_and_values_of_the_source_are_projections_of_the_encoders_output() -> None:
    parents = {spec.name: spec.parents for spec in FAMILY.probes(DISTINCT.config)}
    for layer in range(3):
        at = f"decoder.layers.{layer}."
        assert parents[f"{at}cross_attention.query"] == (f"{at}attention.output_norm",)
        for part in ("key", "value"):
            assert parents[f"{at}cross_attention.{part}"] == ("encoder.layers.1.output",)
            before = "decoder.embedding" if layer == 0 else f"decoder.layers.{layer - 1}.output"
            assert parents[f"{at}attention.{part}"] == (before,)


def test_encoder_and_decoder_have_axes_of_their_own() -> None:
    axes = {spec.name: spec.axes for spec in FAMILY.probes(DISTINCT.config)}
    assert axes["encoder.layers.0.attention.scores"] == ("batch", "head", "source", "source_key")
    assert axes["decoder.layers.0.attention.scores"] == ("batch", "decoder_head", "seq", "key")
    assert axes["decoder.layers.0.cross_attention.scores"] == ("batch", "decoder_head", "seq", "source_key")
