"""What is special to the cases of GPT, GPT-2 and GPT-3, beside the rules for every family.

Sizes and sets of keys are stated here as literals, so that a change of a recipe that weakens it is noticed.
"""

from itertools import combinations
from typing import Any

import pytest
import torch

from conformance.families import Recipe, get
from conformance.golden.model import draw_inputs, draw_weights

transformers = pytest.importorskip("transformers")

from conformance.oracles import oracle_class  # noqa: E402

NAMES = ("gpt", "gpt2", "gpt3")
RECIPES = {recipe.name: recipe for name in NAMES for recipe in get(name).recipes}

every_family = pytest.mark.parametrize("family", NAMES)


def family_of(recipe: Recipe) -> Any:
    return get(recipe.name.split("/")[0])


def sizes(recipe: Recipe) -> dict[str, int]:
    """Every size that a tensor of the forward pass can have, by what it counts."""
    config = recipe.config
    return {
        "batch": recipe.batch,
        "seq": recipe.seq,
        "vocab": config["vocab_size"],
        "positions": config["n_positions"],
        "hidden": config["n_embd"],
        "intermediate": config.get("n_inner") or 4 * config["n_embd"],
        "heads": config["n_head"],
        "head_dim": config["n_embd"] // config["n_head"],
        "queries, keys and values fused": 3 * config["n_embd"],
        "tokens": recipe.batch * recipe.seq,
    }


# --- sizes ----------------------------------------------------------------------------------------------------------

DISTINCT_SIZES = {
    "gpt": (4, 11, 47, 67, 27, 108, 3, 9, 81, 44),
    "gpt2": (4, 11, 47, 67, 30, 40, 5, 6, 90, 44),
    "gpt3": (3, 13, 41, 67, 28, 36, 7, 4, 84, 39),
}


@every_family
def test_distinct_has_the_sizes_that_are_meant(family: str) -> None:
    assert tuple(sizes(RECIPES[f"{family}/distinct"]).values()) == DISTINCT_SIZES[family]


@every_family
@pytest.mark.parametrize("case", ["plain", "distinct"])
def test_no_two_sizes_could_be_confused(family: str, case: str) -> None:
    counted = sizes(RECIPES[f"{family}/{case}"])
    equal = [(a, b) for a, b in combinations(counted, 2) if counted[a] == counted[b]]
    assert equal == []


@pytest.mark.parametrize(
    ("family", "modules"),
    [("gpt", {"attn.c_proj"}), ("gpt2", {"attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
     ("gpt3", {"attn.c_proj", "mlp.c_fc", "mlp.c_proj"})],
)  # fmt: skip
def test_square_has_square_projections(family: str, modules: set[str]) -> None:
    """One that is not transposed must load without a shape error; GPT's feed-forward layer cannot be square."""
    shapes = get(family).tensor_shapes(RECIPES[f"{family}/square"].config)
    first = {name: shape for name, shape in shapes.items() if name.startswith("transformer.h.0.") and len(shape) == 2}
    square = {name for name, (rows, columns) in first.items() if rows == columns}
    assert square == {f"transformer.h.0.{module}.weight" for module in modules}


@every_family
def test_deep_case_fills_the_context(family: str) -> None:
    recipe = RECIPES[f"{family}/deep"]
    assert recipe.seq == recipe.config["n_positions"]


BANDED = {n: r for n, r in RECIPES.items() if "banded" in r.config.get("attention_pattern", []) and r.seq > 11}


@pytest.mark.parametrize("recipe", BANDED.values(), ids=BANDED)
def test_a_text_is_twice_as_long_as_the_band_and_longer(recipe: Recipe) -> None:
    assert recipe.seq > 2 * recipe.config["window_size"] >= 6


# --- inputs and weights ---------------------------------------------------------------------------------------------


@every_family
def test_projections_are_drawn_for_the_inputs_that_they_have(family: str) -> None:
    """Standard deviation 1.5 / √inputs, and a projection is stored (in, out)."""
    recipe = RECIPES[f"{family}/plain"]
    weights = draw_weights(get(family), recipe)
    for name, inputs in (("attn.c_attn", recipe.config["n_embd"]), ("mlp.c_proj", 4 * recipe.config["n_embd"])):
        weight = weights[f"transformer.h.0.{name}.weight"]
        assert weight.shape[0] == inputs
        assert weight.std().item() == pytest.approx(1.5 / inputs**0.5, rel=0.05)


def test_stress_case_has_scores_that_float16_cannot_hold_before_they_are_scaled() -> None:
    recipe = RECIPES["gpt2/reorder_and_upcast_attn"]
    family = get("gpt2")
    probes = oracle_class(family)(family, recipe.config, draw_weights(family, recipe)).probes(
        draw_inputs(recipe)["input_ids"]
    )
    head_dim = recipe.config["n_embd"] // recipe.config["n_head"]
    for layer in (0, 1):
        scores = probes[f"layers.{layer}.attention.scores"].abs().max()
        assert scores * head_dim**0.5 > torch.finfo(torch.float16).max


# --- the checkpoint -------------------------------------------------------------------------------------------------


def test_gpt3_holds_the_tensors_of_gpt2() -> None:
    config = RECIPES["gpt3/plain"].config
    assert get("gpt3").tensor_shapes(config) == get("gpt2").tensor_shapes(config)


def test_gpt3_has_the_keys_of_gpt2_but_three_and_two_of_its_own() -> None:
    gpt2, gpt3 = RECIPES["gpt2/plain"].config.keys(), RECIPES["gpt3/plain"].config.keys()
    assert gpt3 - gpt2 == {"attention_pattern", "window_size"}
    assert gpt2 - gpt3 == {"scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"}


@every_family
@pytest.mark.parametrize("layer", [0, 1])
def test_block_checkpoint_has_the_input_for_a_table_and_no_positions(family: str, layer: int) -> None:
    found, recipe = get(family), RECIPES[f"{family}/distinct"]
    weights = draw_weights(found, recipe)
    hidden, tokens = recipe.config["n_embd"], recipe.batch * recipe.seq
    block_input = torch.arange(float(tokens * hidden)).view(recipe.batch, recipe.seq, hidden)
    _, block = found.block_checkpoint(recipe.config, weights, block_input, layer)
    table, places = ("tokens_embed", "positions_embed") if family == "gpt" else ("wte", "wpe")
    assert block[f"transformer.{table}.weight"].equal(block_input.flatten(0, 1))
    assert not block[f"transformer.{places}.weight"].any()
    kept = {name for name in block if ".ln_f." in name}
    assert kept == (set() if family == "gpt" else {f"transformer.ln_f.{part}" for part in ("weight", "bias")})
    assert all(block[name].equal(weights[name]) for name in kept)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_number_of_a_block_alone_is_folded_into_its_queries(layer: int) -> None:
    """Scores are divided by the layer's number, which becomes 1."""
    recipe = RECIPES["gpt2/distinct"]
    weights = draw_weights(get("gpt2"), recipe)
    _, block = get("gpt2").block_checkpoint(recipe.config, weights, torch.zeros(4, 11, 30), layer)
    for part in ("weight", "bias"):
        ours, theirs = (
            block[f"transformer.h.0.attn.c_attn.{part}"],
            weights[f"transformer.h.{layer}.attn.c_attn.{part}"],
        )
        assert ours[..., :30].equal(theirs[..., :30] / (layer + 1))
        assert ours[..., 30:].equal(theirs[..., 30:])


def test_a_block_with_more_inputs_than_ids_repeats_its_own_head() -> None:
    recipe = RECIPES["gpt2/field-tie_word_embeddings"]
    weights = draw_weights(get("gpt2"), recipe)
    config, block = get("gpt2").block_checkpoint(recipe.config, weights, torch.zeros(4, 13, 30), 0)
    assert config["vocab_size"] == 52
    assert block["lm_head.weight"].equal(torch.cat([weights["lm_head.weight"], weights["lm_head.weight"][:5]]))
