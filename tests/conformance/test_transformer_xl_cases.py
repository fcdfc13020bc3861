"""Transformer-XL's recipes obey the config rules: what hides mistakes in other tests does not occur in these."""

from itertools import combinations

import pytest
import torch

from conformance.families import Recipe, get
from conformance.golden.model import draw_inputs, draw_weights

FAMILY = get("transformer_xl")
RECIPES = {recipe.name: recipe for recipe in FAMILY.recipes}
DISTINCT, PLAIN = RECIPES["transformer_xl/distinct"], RECIPES["transformer_xl/plain"]
SEGMENTED = [recipe for recipe in FAMILY.recipes if recipe.segments]
WHOLE = [recipe for recipe in FAMILY.recipes if "cache.chunks" in recipe.claims]

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def cluster_of(ids: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    return torch.bucketize(ids.contiguous(), torch.tensor(recipe.config["cutoffs"]), right=True)


def test_distinct_has_no_two_sizes_that_could_be_confused() -> None:
    config = DISTINCT.config
    sizes = {
        "batch": DISTINCT.batch, "seq": DISTINCT.seq, "vocab": config["vocab_size"], "hidden": config["d_model"],
        "intermediate": config["d_inner"], "heads": config["n_head"], "head_dim": config["d_head"],
        "features": config["n_head"] * config["d_head"], "fused": 3 * config["n_head"] * config["d_head"],
        "embedding": config["d_embed"], "second cluster": config["d_embed"] // config["div_val"],
        "memory": config["mem_len"], "clamp": config["clamp_len"], "layers": config["n_layer"],
        "head entries": config["cutoffs"][0] + len(config["cutoffs"]),
    }  # fmt: skip
    equal = [(a, b) for a, b in combinations(sizes, 2) if sizes[a] == sizes[b]]
    assert equal == []


def test_distinct_has_every_field_moved_but_pre_lnorm() -> None:
    """Post-norm is what the published weights are; pre-norm has cases of its own."""
    unmoved = [f.name for f in FAMILY.fields if DISTINCT.config.get(f.name) == PLAIN.config.get(f.name)]
    assert unmoved == ["pre_lnorm", "proj_share_all_but_first"]  # the latter is what tie_projs says again


@pytest.mark.parametrize("name", ["distinct", "field-mem_len"])
def test_memory_spans_segments_and_cuts_the_older(name: str) -> None:
    """seg < mem < 2 · seg, three segments or more, and queries that would see further."""
    recipe = RECIPES[f"transformer_xl/{name}"]
    memory = recipe.config["mem_len"]
    assert len(recipe.segments) >= 3
    assert all(segment < memory < 2 * segment for segment in recipe.segments)
    assert not recipe.config["same_length"]


@pytest.mark.parametrize("recipe", SEGMENTED, ids=lambda r: r.name)
def test_segments_make_up_the_sequence_and_are_an_input(recipe: Recipe) -> None:
    assert sum(recipe.segments) == recipe.seq
    assert {"memory.segments", "memory.second_session"} <= recipe.claims.keys()


def test_one_case_has_segments_shorter_and_longer_than_its_memory() -> None:
    recipe = RECIPES["transformer_xl/uneven-segments"]
    memory = recipe.config["mem_len"]
    assert min(recipe.segments) < memory < max(recipe.segments)


@pytest.mark.parametrize("recipe", WHOLE, ids=lambda r: r.name)
def test_cache_checks_are_claimed_only_where_the_memory_holds_what_a_query_may_see(recipe: Recipe) -> None:
    config = recipe.config
    assert config.get("same_length", True) or config["mem_len"] >= recipe.seq


def test_distances_are_clamped_in_the_whole_and_with_memory() -> None:
    for recipe in (DISTINCT, RECIPES["transformer_xl/field-clamp_len"]):
        assert 1 < recipe.config["clamp_len"] < recipe.seq - 1
    longest = min(sum(DISTINCT.segments[:2]), DISTINCT.config["mem_len"]) + DISTINCT.segments[2] - 1
    assert longest > DISTINCT.config["clamp_len"]


@every_recipe
def test_every_cluster_is_read_and_predicted(recipe: Recipe) -> None:
    """Also within the last segment where its gradient is compared: the library leaves clusters without labels out."""
    clusters = set(range(len(recipe.config["cutoffs"]) + 1))
    ids = draw_inputs(recipe)["input_ids"]
    assert set(cluster_of(ids, recipe).flatten().tolist()) == clusters
    if "segment_gradients" in recipe.store:
        last = ids[:, -recipe.segments[-1] :]
        assert set(cluster_of(last[:, 1:], recipe).flatten().tolist()) == clusters


@pytest.mark.parametrize("layer", [0, 1])
def test_a_block_alone_is_fed_its_input_up_to_rounding(layer: int) -> None:
    weights = draw_weights(FAMILY, DISTINCT)
    block_input = torch.randn(3, 11, 14, generator=torch.Generator().manual_seed(0))
    config, one = FAMILY.block_checkpoint(DISTINCT.config, weights, block_input, layer)  # type: ignore[misc]
    assert {name: tuple(tensor.shape) for name, tensor in one.items()} == FAMILY.tensor_shapes(config)
    table = one["transformer.word_emb.emb_layers.0.weight"]
    torch.testing.assert_close(table * 14**0.5, block_input.flatten(0, 1), rtol=2**-8, atol=0)
    kept = "dec_attn.qkv_net.weight"
    assert one[f"transformer.layers.0.{kept}"].equal(weights[f"transformer.layers.{layer}.{kept}"])
