"""What is special to the cases of Phi, beside the rules for every family.

Sizes and sets of keys are stated here as literals, so that a change of a recipe that weakens it is noticed.
"""

from itertools import combinations
from typing import Any

import pytest
import torch

from conformance.families import Recipe, get
from conformance.golden.model import draw_weights

transformers = pytest.importorskip("transformers")

FAMILY = get("phi")
RECIPES = {recipe.name: recipe for recipe in FAMILY.recipes}
PLAIN, DISTINCT, SQUARE = (RECIPES[f"phi/{name}"] for name in ("plain", "distinct", "square"))

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def turned(config: dict[str, Any]) -> int:
    """How many elements of a head turn, to the library itself."""
    settings = transformers.PhiConfig.from_dict(dict(config))
    with torch.device("meta"):
        return int(transformers.models.phi.modeling_phi.PhiAttention(settings, 0).rotary_ndims)


def sizes(recipe: Recipe) -> dict[str, int]:
    """Every size that a tensor of the forward pass can have, by what it counts."""
    config = recipe.config
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config["hidden_size"] // heads
    return {
        "batch": recipe.batch,
        "seq": recipe.seq,
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "half head_dim": head_dim // 2,
        "rotary_dim": turned(config),
        "half rotary_dim": turned(config) // 2,
        "keys": kv_heads * head_dim,
        "queries, keys and values fused": (heads + 2 * kv_heads) * head_dim,
        "tokens": recipe.batch * recipe.seq,
    }


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_distinct_has_the_sizes_that_are_meant() -> None:
    """The width of all queries is not in the list: the family has no head_dim, so that it is hidden_size."""
    assert sizes(DISTINCT) == {
        "batch": 3, "seq": 9, "vocab": 37, "hidden": 60, "intermediate": 34, "heads": 6, "kv_heads": 2, "head_dim": 10,
        "half head_dim": 5, "rotary_dim": 8, "half rotary_dim": 4, "keys": 20, "queries, keys and values fused": 100,
        "tokens": 27,
    }  # fmt: skip


@pytest.mark.parametrize(("first", "second"), list(combinations(sizes(DISTINCT), 2)))
def test_distinct_has_no_two_sizes_that_could_be_confused(first: str, second: str) -> None:
    assert sizes(DISTINCT)[first] != sizes(DISTINCT)[second]


@pytest.mark.parametrize("name", ["phi/distinct", "phi/gqa"])
def test_queries_are_grouped_so_that_tiling_and_repeating_differ(name: str) -> None:
    """1 < KV < H, and H / KV is not KV."""
    heads, kv_heads = sizes(RECIPES[name])["heads"], sizes(RECIPES[name])["kv_heads"]
    assert 1 < kv_heads < heads
    assert heads // kv_heads not in (1, kv_heads)


@every_recipe
def test_three_pairs_or_more_turn_and_something_passes(recipe: Recipe) -> None:
    assert 6 <= turned(recipe.config) < sizes(recipe)["head_dim"]


def test_a_factor_whose_rounding_would_be_seen_is_among_the_cases() -> None:
    config = RECIPES["phi/field-partial_rotary_factor"].config
    exact = config["partial_rotary_factor"] * sizes(PLAIN)["head_dim"]
    assert (turned(config), round(exact)) == (8, 9)


def test_distinct_has_every_field_of_the_family_moved_but_tying() -> None:
    config, plain = DISTINCT.config, PLAIN.config
    unmoved = [field.name for field in FAMILY.fields if config.get(field.name) == plain.get(field.name)]
    assert unmoved == ["tie_word_embeddings"]


def test_absent_case_leaves_out_the_end_of_the_context_too() -> None:
    assert "max_position_embeddings" not in RECIPES["phi/field-absent"].config


def test_square_has_every_size_equal() -> None:
    shapes = set(FAMILY.tensor_shapes(SQUARE.config).values())
    assert shapes == {(24, 24), (24,)}


# --- inputs and weights ---------------------------------------------------------------------------------------------


def test_epsilon_of_its_field_case_is_not_lost_beside_the_embeddings_variance() -> None:
    recipe = RECIPES["phi/field-layer_norm_eps"]
    variance = draw_weights(FAMILY, recipe)["model.embed_tokens.weight"].var(-1).mean().item()
    assert 1 < variance / recipe.config["layer_norm_eps"] < 10


# --- the checkpoint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_block_checkpoint_has_the_input_for_a_table_and_the_models_norm_and_head(layer: int) -> None:
    weights = draw_weights(FAMILY, DISTINCT)
    block_input = torch.arange(3 * 9 * 60.0).view(3, 9, 60)
    _, block = FAMILY.block_checkpoint(DISTINCT.config, weights, block_input, layer)
    assert block["model.embed_tokens.weight"].equal(torch.arange(27 * 60.0).view(27, 60))
    for part in ("weight", "bias"):
        assert block[f"lm_head.{part}"].equal(weights[f"lm_head.{part}"][:27])
        assert block[f"model.final_layernorm.{part}"].equal(weights[f"model.final_layernorm.{part}"])


# --- probes ---------------------------------------------------------------------------------------------------------


def test_both_halves_of_a_block_start_from_one_norm() -> None:
    children = [spec.name for spec in FAMILY.probes(DISTINCT.config) if "layers.1.norm" in spec.parents]
    assert children == [f"layers.1.{name}" for name in (
        "attention.query", "attention.key", "attention.value", "feed_forward.up",
    )]  # fmt: skip


def test_heads_that_are_normed_are_probed_between_projection_and_rotation() -> None:
    parents = {spec.name: spec.parents for spec in FAMILY.probes(DISTINCT.config)}
    for which in ("query", "key"):
        assert parents[f"layers.0.attention.{which}_normed"] == (f"layers.0.attention.{which}",)
        assert parents[f"layers.0.attention.{which}_rotated"] == (f"layers.0.attention.{which}_normed",)
    plain = {spec.name: spec.parents for spec in FAMILY.probes(PLAIN.config)}
    assert plain["layers.0.attention.query_rotated"] == ("layers.0.attention.query",)


def test_heads_are_split_into_key_value_heads_first_and_their_groups_second() -> None:
    """Query head h reads key-value head h // group: with 6 heads and 2 key-value heads, 0 0 0 1 1 1."""
    axis = FAMILY.probe_sizes(DISTINCT.config, 3, 9)
    assert (axis["kv_head"], axis["group"], axis["head_dim"]) == (2, 3, 10)
