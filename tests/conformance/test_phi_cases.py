"""Phi's recipes obey the config rules: what hides mistakes in other people's tests does not occur in these.

Sizes and sets of keys are stated here as literals, so that a change of a recipe that weakens it is noticed.
"""

from itertools import combinations
from typing import Any

import pytest
import torch

from conformance.families import Recipe, get
from conformance.golden.model import draw_inputs, draw_weights
from conformance.probes import VOCABULARY
from conformance.suite import checks

transformers = pytest.importorskip("transformers")

FAMILY = get("phi")
RECIPES = {recipe.name: recipe for recipe in FAMILY.recipes}
FIELD_RECIPES = [recipe for recipe in FAMILY.recipes if recipe.field]
PLAIN, DISTINCT, SQUARE = (RECIPES[f"phi/{name}"] for name in ("plain", "distinct", "square"))
ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}

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


def test_square_has_every_size_equal() -> None:
    shapes = set(FAMILY.tensor_shapes(SQUARE.config).values())
    assert shapes == {(24, 24), (24,)}


@every_recipe
def test_every_case_has_two_layers_and_dropout_in_its_config(recipe: Recipe) -> None:
    """A candidate that applies dropout in evaluation fails.  `field-absent` has nothing that has a default."""
    assert recipe.config["num_hidden_layers"] >= 2
    dropouts = [recipe.config.get(key, 0.0) for key in ("attention_dropout", "embd_pdrop", "resid_pdrop")]
    assert min(dropouts) > 0 or recipe.name == "phi/field-absent"


# --- inputs and weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [r for r in RECIPES.values() if r.batch > 1], ids=lambda r: r.name)
def test_padded_rows_have_unsorted_lengths_from_one_to_the_whole_and_junk_in_the_pads(recipe: Recipe) -> None:
    inputs = draw_inputs(recipe)
    lengths = inputs["lengths"].tolist()
    assert len(set(lengths)) == len(lengths) == recipe.batch >= 3
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))
    assert (min(lengths), max(lengths)) == (1, recipe.seq)
    real, junk = set(inputs["input_ids"].flatten().tolist()), set(inputs["padding_ids"].flatten().tolist())
    assert real & junk == set()
    assert len(junk) >= 2


@every_recipe
def test_no_two_tensors_are_equal_and_none_is_at_its_initial_value(recipe: Recipe) -> None:
    weights = draw_weights(FAMILY, recipe)
    equal = [(a, b) for a, b in combinations(weights, 2) if torch.equal(weights[a], weights[b])]
    assert equal == []
    assert [name for name, tensor in weights.items() if tensor.unique().numel() < 2] == []


def test_epsilon_of_its_field_case_is_not_lost_beside_the_embeddings_variance() -> None:
    recipe = RECIPES["phi/field-layer_norm_eps"]
    variance = draw_weights(FAMILY, recipe)["model.embed_tokens.weight"].var(-1).mean().item()
    assert 1 < variance / recipe.config["layer_norm_eps"] < 10


# --- the checkpoint -------------------------------------------------------------------------------------------------


@every_recipe
def test_checkpoint_holds_the_tensors_that_hugging_face_has(recipe: Recipe) -> None:
    with torch.device("meta"):
        model = transformers.PhiForCausalLM(transformers.PhiConfig.from_dict(dict(recipe.config)))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert FAMILY.tensor_shapes(recipe.config) == theirs
    assert set(model.state_dict()) - set(theirs) <= {"lm_head.weight"}


@pytest.mark.parametrize("recipe", [r for r in RECIPES.values() if r.config.keys() >= ROPE_KEYS], ids=lambda r: r.name)
def test_both_spellings_of_the_rotary_parameters_say_the_same(recipe: Recipe) -> None:
    config = recipe.config
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    apart = {key: config[key] for key in ("rope_theta", "partial_rotary_factor")}
    assert apart | scaling == config["rope_parameters"]


def test_one_case_has_each_spelling_alone_and_all_others_have_both_or_none() -> None:
    spelt: dict[frozenset[str], list[str]] = {}
    for recipe in FAMILY.recipes:
        spelt.setdefault(frozenset(recipe.config.keys() & ROPE_KEYS), []).append(recipe.name)
    assert len(spelt.pop(frozenset(ROPE_KEYS))) == len(RECIPES) - 3
    assert spelt == {
        frozenset({"rope_parameters"}): ["phi/field-rope_parameters-only"],
        frozenset(ROPE_KEYS - {"rope_parameters"}): ["phi/field-partial_rotary_factor-4.x-only"],
        frozenset(): ["phi/field-absent"],
    }


@pytest.mark.parametrize("layer", [0, 1])
def test_block_checkpoint_is_a_one_layer_checkpoint_of_that_block(layer: int) -> None:
    weights = draw_weights(FAMILY, DISTINCT)
    block_input = torch.arange(3 * 9 * 60.0).view(3, 9, 60)
    config, block = FAMILY.block_checkpoint(DISTINCT.config, weights, block_input, layer)
    assert {name: tuple(t.shape) for name, t in block.items()} == FAMILY.tensor_shapes(config)
    assert block["model.embed_tokens.weight"].equal(torch.arange(27 * 60.0).view(27, 60))
    assert block["lm_head.bias"].equal(weights["lm_head.bias"][:27])
    moved = [n for n in block if ".layers." in n]
    assert all(block[n].equal(weights[n.replace("layers.0.", f"layers.{layer}.")]) for n in moved)
    assert len(moved) == sum(f".layers.{layer}." in name for name in weights)


# --- fields and keys ------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
}  # fmt: skip

# Keys of Hugging Face's PhiConfig that cannot change a forward pass in evaluation, and why not.
WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "model_type", "transformers_version",  # what it is called
    "dtype",  # how it is stored; the implementation is told what to run in
    "attention_dropout", "embd_pdrop", "resid_pdrop",  # in training only
    "initializer_range",  # before training only
    "max_position_embeddings",  # a limit; llama3 scaling states its own original length
    "bos_token_id", "eos_token_id", "pad_token_id",  # in generation; a pad id only zeroes an embedding at its start
    "use_cache", "return_dict", "output_hidden_states", "output_attentions",  # what is returned
    "chunk_size_feed_forward",  # the order of computation; Phi ignores it
    "is_encoder_decoder",  # no other value is a Phi here
    "id2label", "label2id", "problem_type",  # classification heads
}  # fmt: skip


def test_every_key_of_hugging_face_is_a_field_a_size_or_known_to_have_no_effect() -> None:
    """A key that a new release adds must be sorted into one of the three."""
    keys = set(transformers.PhiConfig().to_dict())
    fields = {field.name for field in FAMILY.fields} | {"rope_parameters"}  # all about rotary positions in 5.x
    assert keys - fields - SIZES - WITHOUT_EFFECT == set()


def test_every_field_is_a_key_that_hugging_face_knows() -> None:
    keys = set(transformers.PhiConfig().to_dict()) | ROPE_KEYS
    assert {field.name for field in FAMILY.fields} - keys == set()


@pytest.mark.parametrize("field", [field.name for field in FAMILY.fields])
def test_every_field_has_a_case_that_moves_it_and_says_so(field: str) -> None:
    moving = [
        r for r in FIELD_RECIPES if r.config.get(field) != PLAIN.config.get(field) and r.field.split(" ")[0] == field
    ]
    assert moving


@pytest.mark.parametrize("recipe", FIELD_RECIPES, ids=lambda r: r.name)
def test_field_case_moves_its_field_alone(recipe: Recipe) -> None:
    """All rotary keys count as one: their spellings move together.  `field-absent` moves nothing: it leaves out."""
    keys = recipe.config.keys() | PLAIN.config.keys()
    moved = {key for key in keys if recipe.config.get(key) != PLAIN.config.get(key)}
    if recipe.name == "phi/field-absent":
        assert recipe.config.items() <= PLAIN.config.items()
    elif recipe.field.split(" ")[0].rstrip(",") in ROPE_KEYS:
        assert moved <= ROPE_KEYS
    else:
        assert moved == {recipe.field}


def test_absent_case_leaves_out_every_key_that_has_a_default() -> None:
    assert set(RECIPES["phi/field-absent"].config) == SIZES | {
        "architectures", "model_type", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype",
    }  # fmt: skip


def test_absent_case_is_plain_to_hugging_face() -> None:
    absent, plain = (
        transformers.PhiConfig.from_dict(dict(RECIPES[f"phi/{n}"].config)) for n in ("field-absent", "plain")
    )
    differing = {key for key, value in absent.to_dict().items() if plain.to_dict()[key] != value}
    assert differing <= WITHOUT_EFFECT


CANNOT_BE_IGNORED = {"num_key_value_heads", "tie_word_embeddings"}  # the tensors' shapes or names forbid it


@pytest.mark.parametrize("recipe", FIELD_RECIPES, ids=lambda r: r.name)
def test_field_case_knows_what_ignoring_its_field_gives(recipe: Recipe) -> None:
    ignored = [label for label in recipe.counterfactuals if label == f"{recipe.field} ignored"]
    assert ignored or recipe.field in CANNOT_BE_IGNORED | {"absent keys"}


# --- claims and probes ----------------------------------------------------------------------------------------------


def test_every_check_is_claimed_by_some_case() -> None:
    of_models = {check for check in checks() if not check.startswith("component.")}
    assert {check for recipe in FAMILY.recipes for check in recipe.claims} == of_models


STORED_FOR = {
    "golden.positions": "positions",
    "golden.loss": "loss",
    "golden.gradients": "gradients",
    "golden.blocks": "blocks",
}


@every_recipe
def test_what_a_check_needs_is_stored_and_nothing_is_stored_for_no_check(recipe: Recipe) -> None:
    claimed = {needed for check, needed in STORED_FOR.items() if check in recipe.claims}
    assert recipe.store - {"probes"} == claimed


@every_recipe
def test_probes_have_vocabulary_names_stand_after_their_parents_and_lead_to_the_logits(recipe: Recipe) -> None:
    specs = FAMILY.probes(recipe.config)
    layers = range(recipe.config["num_hidden_layers"])
    known = {name.replace("layers.N.", f"layers.{n}.") for name in VOCABULARY for n in layers}
    assert {spec.name for spec in specs} <= known
    seen: set[str] = set()
    for spec in specs:
        assert spec.name not in seen
        assert set(spec.parents) <= seen
        assert bool(spec.parents) == (spec.name != "embedding")
        seen.add(spec.name)
    needed = {"logits"}
    for spec in reversed(specs):
        assert spec.name in needed
        needed |= set(spec.parents)


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
