"""What is special to the cases of Mistral and Mixtral, beside the rules for every family.

Sizes and sets of keys are stated here as literals, so that a change of a recipe that weakens it is noticed.
"""

from itertools import combinations

import pytest
import torch

from conformance.families import Family, Recipe, get
from conformance.golden.model import draw_inputs, draw_weights

MISTRAL, MIXTRAL = get("mistral"), get("mixtral")
RECIPES = {recipe.name: recipe for family in (MISTRAL, MIXTRAL) for recipe in family.recipes}

windowed_recipe = pytest.mark.parametrize(
    "recipe",
    [r for r in RECIPES.values() if (r.config.get("sliding_window") or 4096) < 4096],
    ids=lambda recipe: recipe.name,
)
distinct = pytest.mark.parametrize("name", ["mistral/distinct", "mixtral/distinct"])


def family_of(recipe: Recipe) -> Family:
    return get(recipe.name.split("/")[0])


def sizes(recipe: Recipe) -> dict[str, int]:
    """Every size that a tensor of the forward pass can have, by what it counts."""
    config = recipe.config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    counted = {
        "batch": recipe.batch,
        "seq": recipe.seq,
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "gate and up fused": 2 * config["intermediate_size"],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "half head_dim": head_dim // 2,
        "queries": heads * head_dim,
        "keys": kv_heads * head_dim,
        "queries, keys and values fused": (heads + 2 * kv_heads) * head_dim,
        "tokens": recipe.batch * recipe.seq,
    }
    if "num_local_experts" in config:
        counted |= {"experts": config["num_local_experts"], "chosen": config["num_experts_per_tok"]}
    return counted


def router_choices(recipe: Recipe) -> dict[str, torch.Tensor]:
    """How many tokens each expert gets, by layer, from the reference."""
    from conformance.implementations import reference

    probes = reference.probes(MIXTRAL, recipe.config, draw_weights(MIXTRAL, recipe), draw_inputs(recipe)["input_ids"])
    return {
        name.split(".")[1]: logits.topk(2).indices.flatten().bincount(minlength=logits.shape[-1])
        for name, logits in probes.items()
        if name.endswith("router_logits")
    }


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_distinct_has_the_sizes_that_are_meant() -> None:
    assert sizes(RECIPES["mistral/distinct"]) == {
        "batch": 4, "seq": 11, "vocab": 47, "hidden": 26, "intermediate": 20, "gate and up fused": 40, "heads": 6,
        "kv_heads": 3, "head_dim": 10, "half head_dim": 5, "queries": 60, "keys": 30,
        "queries, keys and values fused": 120, "tokens": 44,
    }  # fmt: skip
    assert sizes(RECIPES["mixtral/distinct"]) == {
        "batch": 4, "seq": 11, "vocab": 47, "hidden": 26, "intermediate": 16, "gate and up fused": 32, "heads": 6,
        "kv_heads": 3, "head_dim": 14, "half head_dim": 7, "queries": 84, "keys": 42,
        "queries, keys and values fused": 168, "tokens": 44, "experts": 5, "chosen": 2,
    }  # fmt: skip


@distinct
def test_distinct_has_no_two_sizes_that_could_be_confused(name: str) -> None:
    found = sizes(RECIPES[name])
    assert [pair for pair in combinations(found, 2) if found[pair[0]] == found[pair[1]]] == []


@distinct
def test_distinct_groups_queries_and_states_a_head_dim_that_cannot_be_derived(name: str) -> None:
    """1 < KV < H, and H / KV is not KV."""
    found = sizes(RECIPES[name])
    assert 1 < found["kv_heads"] < found["heads"]
    assert found["heads"] // found["kv_heads"] not in (1, found["kv_heads"])
    assert found["head_dim"] != found["hidden"] // found["heads"]


@pytest.mark.parametrize(
    ("family", "kept"),
    [
        (MISTRAL, ["hidden_act", "tie_word_embeddings"]),
        (MIXTRAL, ["num_experts_per_tok", "hidden_act", "tie_word_embeddings"]),
    ],
    ids=["mistral", "mixtral"],
)
def test_distinct_has_every_field_of_the_family_moved_but_these(family: Family, kept: list[str]) -> None:
    moved, plain = (RECIPES[f"{family.name}/{name}"].config for name in ("distinct", "plain"))
    assert [field.name for field in family.fields if moved.get(field.name) == plain.get(field.name)] == kept


def test_square_has_every_size_equal() -> None:
    assert set(MISTRAL.tensor_shapes(RECIPES["mistral/square"].config).values()) == {(24, 24), (24,)}
    assert set(MIXTRAL.tensor_shapes(RECIPES["mixtral/square"].config).values()) == {(24, 24), (24,), (4, 24)}


# --- the window -----------------------------------------------------------------------------------------------------


@windowed_recipe
def test_windows_are_of_three_keys_or_more_and_shorter_than_half_the_sequence(recipe: Recipe) -> None:
    window = recipe.config["sliding_window"]
    assert window >= 3
    assert recipe.seq >= 2 * window + 1


@pytest.mark.parametrize("name", ["mistral/window", "mistral/field-sliding_window", "mixtral/field-sliding_window"])
def test_window_cases_are_three_windows_long_and_know_one_key_more_and_less(name: str) -> None:
    recipe = RECIPES[name]
    window = recipe.config["sliding_window"]
    assert recipe.seq >= 3 * window
    ignored, *others = [config["sliding_window"] for config in recipe.counterfactuals.values()]
    assert ignored in (None, 4096)
    assert others == [window + 1, window - 1]


def test_window_case_feeds_prompts_and_chunks_longer_than_the_window() -> None:
    """Prompt 13 of 17 tokens; chunks of 3, 4, 1 and 9."""
    recipe = RECIPES["mistral/window"]
    assert recipe.seq - 4 > recipe.config["sliding_window"]
    assert recipe.seq - 8 > recipe.config["sliding_window"]
    assert {"cache.prefill_decode", "cache.chunks", "cache.one_by_one", "cache.ragged"} <= recipe.claims.keys()


def test_long_case_is_longer_than_the_window_that_null_could_be_taken_for() -> None:
    recipe = RECIPES["mistral/long"]
    assert recipe.config["sliding_window"] is None
    assert recipe.counterfactuals["sliding_window at 4096"]["sliding_window"] == 4096
    assert 4096 + 8 < recipe.seq <= recipe.config["max_position_embeddings"]
    assert recipe.last_rows == 16


# --- experts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", MIXTRAL.recipes, ids=lambda recipe: recipe.name)
def test_more_experts_than_chosen_ones_and_more_than_one_chosen(recipe: Recipe) -> None:
    assert 1 < recipe.config.get("num_experts_per_tok", 2) < recipe.config.get("num_local_experts", 8)


def test_eleven_experts_sort_differently_as_strings() -> None:
    experts = range(RECIPES["mixtral/eleven-experts"].config["num_local_experts"])
    assert sorted(experts, key=str) != list(experts)


def test_unbalanced_case_leaves_one_expert_unused_and_sends_every_token_to_another() -> None:
    recipe = RECIPES["mixtral/unbalanced"]
    assert router_choices(recipe)["1"].tolist() == [0, 1, 9, 33, 23]
    assert recipe.batch * recipe.seq == 33


@pytest.mark.parametrize("recipe", MIXTRAL.recipes, ids=lambda recipe: recipe.name)
def test_coarse_dtypes_are_claimed_only_where_token_ids_were_chosen_for_it(recipe: Recipe) -> None:
    coarse = {d for dtypes in recipe.claims.values() for d in dtypes} - {"float64", "float32"}
    assert coarse == ({"bfloat16", "float16"} if recipe.input_ids else set())


# --- probes ---------------------------------------------------------------------------------------------------------


def test_probes_of_the_experts() -> None:
    specs = {spec.name: spec for spec in MIXTRAL.probes(RECIPES["mixtral/distinct"].config)}
    feed_forward = [name.removeprefix("layers.1.feed_forward.") for name in specs if "layers.1.feed_forward" in name]
    assert feed_forward == ["norm", "router_logits", "routing_weights", "expert_outputs", "output"]
    assert specs["layers.1.feed_forward.router_logits"].axes == ("batch", "seq", "expert")
    assert specs["layers.1.feed_forward.expert_outputs"].axes == ("batch", "seq", "choice", "hidden")
