"""What is special to the cases of Llama, beside the rules for every family.

Sizes and sets of keys are stated here as literals, so that a change of a recipe that weakens it is noticed.
"""

from itertools import combinations
from typing import Any

import pytest
import torch

from conformance.families import Recipe, get
from conformance.golden.model import draw_inputs, draw_weights

FAMILY = get("llama")
RECIPES = {recipe.name: recipe for recipe in FAMILY.recipes}
PLAIN, DISTINCT, SQUARE = (RECIPES[f"llama/{name}"] for name in ("plain", "distinct", "square"))


def sizes(recipe: Recipe) -> dict[str, int]:
    """Every size that a tensor of the forward pass can have, by what it counts."""
    config = recipe.config
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return {
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


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_distinct_has_the_sizes_that_are_meant() -> None:
    assert sizes(DISTINCT) == {
        "batch": 4, "seq": 11, "vocab": 61, "hidden": 42, "intermediate": 52, "gate and up fused": 104, "heads": 6,
        "kv_heads": 3, "head_dim": 10, "half head_dim": 5, "queries": 60, "keys": 30,
        "queries, keys and values fused": 120, "tokens": 44,
    }  # fmt: skip


@pytest.mark.parametrize(("first", "second"), list(combinations(sizes(DISTINCT), 2)))
def test_distinct_has_no_two_sizes_that_could_be_confused(first: str, second: str) -> None:
    assert sizes(DISTINCT)[first] != sizes(DISTINCT)[second]


def test_distinct_groups_queries_so_that_tiling_and_repeating_differ() -> None:
    """1 < KV < H, and H / KV is not KV."""
    heads, kv_heads = sizes(DISTINCT)["heads"], sizes(DISTINCT)["kv_heads"]
    assert 1 < kv_heads < heads
    assert heads // kv_heads not in (1, kv_heads)


def test_distinct_states_a_head_dim_that_cannot_be_derived() -> None:
    config = DISTINCT.config
    assert config["head_dim"] != config["hidden_size"] // config["num_attention_heads"]


def test_distinct_has_every_field_of_the_family_moved_but_activation_and_tying() -> None:
    """These two are left alone: tying would take the head away, the activation has three cases of its own."""
    config, plain = DISTINCT.config, PLAIN.config
    unmoved = [field.name for field in FAMILY.fields if config.get(field.name) == plain.get(field.name)]
    assert unmoved == ["hidden_act", "tie_word_embeddings"]


def test_square_has_every_size_equal() -> None:
    shapes = set(FAMILY.tensor_shapes(SQUARE.config).values())
    assert shapes == {(24, 24), (24,)}


def test_multi_query_case_has_one_key_value_head() -> None:
    assert sizes(RECIPES["llama/mqa"])["kv_heads"] == 1


def test_absent_case_leaves_out_the_end_of_the_context_too() -> None:
    assert "max_position_embeddings" not in RECIPES["llama/field-absent"].config


def test_llama_1_case_leaves_num_key_value_heads_and_head_dim_out() -> None:
    assert {"num_key_value_heads", "head_dim"} & RECIPES["llama/mha"].config.keys() == set()


# --- inputs and weights ---------------------------------------------------------------------------------------------

POSITIONS = [r for r in RECIPES.values() if "positions" in r.store]


@pytest.mark.parametrize("recipe", POSITIONS, ids=lambda r: r.name)
def test_explicit_positions_pass_2000(recipe: Recipe) -> None:
    assert draw_inputs(recipe)["position_ids"].max().item() >= 2000


def test_long_case_reaches_position_2059_and_compares_16_rows() -> None:
    recipe = RECIPES["llama/long"]
    assert (recipe.seq, recipe.last_rows) == (2060, 16)
    assert recipe.seq <= recipe.config["max_position_embeddings"]


def test_epsilon_of_its_field_case_is_not_lost_beside_the_embeddings_variance() -> None:
    """The mean square of what the first norm receives is 1 to 10 times ε."""
    recipe = RECIPES["llama/field-rms_norm_eps"]
    mean_square = draw_weights(FAMILY, recipe)["model.embed_tokens.weight"].square().mean().item()
    assert 1 < mean_square / recipe.config["rms_norm_eps"] < 10


# --- the checkpoint -------------------------------------------------------------------------------------------------


def as_4x(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters as transformers 4.x reads them; 10,000 is the default of Llama's rope_theta."""
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    return {"rope_theta": config.get("rope_theta", 10000.0)} | scaling


def as_5x(config: dict[str, Any]) -> dict[str, Any]:
    return dict(config["rope_parameters"])


def test_cases_with_one_spelling_move_theta_and_scaling_from_their_defaults() -> None:
    only_5x = RECIPES["llama/field-rope_parameters-only"].config
    only_4x = RECIPES["llama/field-rope_theta-rope_scaling-only"].config
    assert as_5x(only_5x) == as_4x(only_4x) == {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}


def test_multi_query_case_differs_from_plain_in_keys_and_values_alone() -> None:
    """All other tensors are stored once for both."""
    plain, mqa = draw_weights(FAMILY, PLAIN), draw_weights(FAMILY, RECIPES["llama/mqa"])
    differing = {name for name in plain if not plain[name].equal(mqa[name])}
    assert differing == {f"model.layers.{layer}.self_attn.{p}_proj.weight" for layer in (0, 1) for p in "kv"}


# --- probes ---------------------------------------------------------------------------------------------------------

# (batch, seq) tokens of 4 · 11 rows, hidden 42, 6 heads of 10 in 3 groups of 2, intermediate 52, vocabulary 61
DISTINCT_PROBES = {
    "embedding": 44 * 42,
    "attention.norm": 44 * 42,
    "attention.query": 44 * 60,
    "attention.key": 44 * 30,
    "attention.value": 44 * 30,
    "attention.query_rotated": 44 * 60,
    "attention.key_rotated": 44 * 30,
    "attention.scores": 4 * 6 * 11 * 11,
    "attention.weights": 4 * 6 * 11 * 11,
    "attention.context": 44 * 60,
    "attention.output": 44 * 42,
    "attention.residual": 44 * 42,
    "feed_forward.norm": 44 * 42,
    "feed_forward.gate": 44 * 52,
    "feed_forward.up": 44 * 52,
    "feed_forward.activation": 44 * 52,
    "feed_forward.product": 44 * 52,
    "feed_forward.output": 44 * 42,
    "output": 44 * 42,
    "final_norm": 44 * 42,
    "logits": 44 * 61,
}


def test_axes_multiply_to_the_number_of_elements_of_every_probe() -> None:
    axis = FAMILY.probe_sizes(DISTINCT.config, 4, 11)
    counted = {}
    for spec in FAMILY.probes(DISTINCT.config):
        count = 1
        for name in spec.axes:
            count *= axis[name]
        counted[spec.name] = count
    outside = {"embedding", "final_norm", "logits"}
    assert counted == {
        name if name in outside else f"layers.{layer}.{name}": count
        for name, count in DISTINCT_PROBES.items()
        for layer in ((0,) if name in outside else (0, 1))
    }


def test_heads_are_split_into_key_value_heads_first_and_their_groups_second() -> None:
    """Query head h reads key-value head h // group: with 6 heads and 3 key-value heads, 0 0 1 1 2 2."""
    axis = FAMILY.probe_sizes(DISTINCT.config, 4, 11)
    assert (axis["kv_head"], axis["group"]) == (3, 2)
    spec = next(s for s in FAMILY.probes(DISTINCT.config) if s.name == "layers.0.attention.query")
    assert spec.axes == ("batch", "seq", "kv_head", "group", "head_dim")


# --- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_block_checkpoint_has_the_input_for_a_table_and_the_models_norm_and_head(layer: int) -> None:
    weights = draw_weights(FAMILY, DISTINCT)
    block_input = torch.arange(4 * 11 * 42.0).view(4, 11, 42)
    _, block = FAMILY.block_checkpoint(DISTINCT.config, weights, block_input, layer)
    assert block["model.embed_tokens.weight"].equal(torch.arange(44 * 42.0).view(44, 42))
    assert block["lm_head.weight"].equal(weights["lm_head.weight"][:44])
    assert block["model.norm.weight"].equal(weights["model.norm.weight"])


def test_block_input_with_more_tokens_than_the_vocabulary_repeats_the_head() -> None:
    weights = draw_weights(FAMILY, DISTINCT)
    config, block = FAMILY.block_checkpoint(DISTINCT.config, weights, torch.zeros(2, 31, 42), 0)
    assert config["vocab_size"] == 62
    assert block["lm_head.weight"].equal(torch.cat([weights["lm_head.weight"], weights["lm_head.weight"][:1]]))


# --- the registry ---------------------------------------------------------------------------------------------------


def test_unknown_family_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"unknown family 'lama'; there is .*, llama"):
        get("lama")
