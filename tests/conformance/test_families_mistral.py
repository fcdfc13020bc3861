"""Mistral's and Mixtral's recipes obey the config rules: what hides mistakes in other people's tests does not occur.

Sizes and sets of keys are stated here as literals, so that a change of a recipe that weakens it is noticed.
"""

from itertools import combinations

import pytest
import torch

from conformance.families import Family, Recipe, get
from conformance.golden.model import draw_inputs, draw_weights
from conformance.probes import VOCABULARY
from conformance.suite import checks

transformers = pytest.importorskip("transformers")

MISTRAL, MIXTRAL = get("mistral"), get("mixtral")
RECIPES = {recipe.name: recipe for family in (MISTRAL, MIXTRAL) for recipe in family.recipes}
FIELD_RECIPES = [recipe for recipe in RECIPES.values() if recipe.field]
ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}

both_families = pytest.mark.parametrize("family", [MISTRAL, MIXTRAL], ids=lambda family: family.name)
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
every_field_recipe = pytest.mark.parametrize("recipe", FIELD_RECIPES, ids=lambda recipe: recipe.name)
windowed_recipe = pytest.mark.parametrize(
    "recipe",
    [r for r in RECIPES.values() if (r.config.get("sliding_window") or 4096) < 4096],
    ids=lambda recipe: recipe.name,
)
distinct = pytest.mark.parametrize("name", ["mistral/distinct", "mixtral/distinct"])


def family_of(recipe: Recipe) -> Family:
    return get(recipe.name.split("/")[0])


def plain_of(recipe: Recipe) -> Recipe:
    return RECIPES[f"{family_of(recipe).name}/plain"]


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


@every_recipe
def test_every_case_has_two_layers_or_more_and_dropout_that_evaluation_must_not_apply(recipe: Recipe) -> None:
    config = recipe.config
    assert config["num_hidden_layers"] >= 2
    if not recipe.name.endswith("/field-absent"):
        assert config["attention_dropout"] > 0
        assert config.get("router_jitter_noise", 0.1) > 0
        assert ("router_jitter_noise" in config) == (family_of(recipe) is MIXTRAL)


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


# --- inputs and weights ---------------------------------------------------------------------------------------------


@every_recipe
def test_rows_of_a_batch_begin_with_different_tokens_and_have_different_lengths(recipe: Recipe) -> None:
    inputs = draw_inputs(recipe)
    assert tuple(inputs["input_ids"].shape) == (recipe.batch, recipe.seq)
    assert len({tuple(tokens) for tokens in inputs["input_ids"][:, :2].tolist()}) == recipe.batch
    if recipe.batch > 1:
        lengths = inputs["lengths"].tolist()
        assert len(set(lengths)) == recipe.batch
        assert (min(lengths), max(lengths)) == (1, recipe.seq)


@every_recipe
def test_pads_hold_ids_that_no_real_token_has(recipe: Recipe) -> None:
    inputs = draw_inputs(recipe)
    real = set(inputs["input_ids"].flatten().tolist())
    assert max(real) < recipe.config["vocab_size"]
    assert real.isdisjoint(inputs.get("padding_ids", torch.tensor([])).flatten().tolist())


@every_recipe
def test_no_two_tensors_that_may_be_confused_are_equal(recipe: Recipe) -> None:
    weights = draw_weights(family_of(recipe), recipe)
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in weights.items():
        by_shape.setdefault(tuple(tensor.shape), []).append(name)
    pairs = (pair for names in by_shape.values() for pair in combinations(names, 2))
    assert [(a, b) for a, b in pairs if weights[a].equal(weights[b])] == []


# --- the checkpoint -------------------------------------------------------------------------------------------------


def library_model(recipe: Recipe) -> "transformers.PreTrainedModel":
    family = family_of(recipe)
    config_class = getattr(transformers, family.oracle.replace("ForCausalLM", "Config"))
    with torch.device("meta"):
        return getattr(transformers, family.oracle)(config_class.from_dict(dict(recipe.config)))


@every_recipe
def test_checkpoint_holds_the_tensors_that_hugging_face_saves(recipe: Recipe) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    model = library_model(recipe)
    theirs = revert_weight_conversion(model, dict(model.named_parameters()))
    assert family_of(recipe).tensor_shapes(recipe.config) == {n: tuple(t.shape) for n, t in theirs.items()}


@every_recipe
def test_both_spellings_of_the_rotary_parameters_say_the_same(recipe: Recipe) -> None:
    config = recipe.config
    if config.keys() >= ROPE_KEYS:
        scaling = config["rope_scaling"] or {"rope_type": "default"}
        assert {"rope_theta": config["rope_theta"]} | scaling == config["rope_parameters"]
    else:
        assert recipe.name.split("/")[1] in {
            "field-rope_parameters-only", "field-rope_theta-rope_scaling-only", "field-absent",
        }  # fmt: skip


# --- fields and keys ------------------------------------------------------------------------------------------------

SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}

# Keys of Hugging Face's configs that cannot change the logits in evaluation, and why not.
WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "model_type", "transformers_version",  # what it is called
    "dtype",  # how it is stored; the implementation is told what to run in
    "attention_dropout", "router_jitter_noise",  # in training only
    "output_router_logits", "router_aux_loss_coef",  # in the loss only
    "initializer_range",  # before training only
    "max_position_embeddings",  # a limit
    "bos_token_id", "eos_token_id", "pad_token_id",  # in generation
    "use_cache", "return_dict", "output_hidden_states", "output_attentions",  # what is returned
    "chunk_size_feed_forward",  # the order of computation
    "is_encoder_decoder",  # no other value is one of these here
    "id2label", "label2id", "problem_type",  # classification heads
}  # fmt: skip


@both_families
def test_every_key_of_hugging_face_is_a_field_a_size_or_known_to_have_no_effect(family: Family) -> None:
    """A key that a new release adds must be sorted into one of the three."""
    keys = set(library_model(RECIPES[f"{family.name}/plain"]).config.to_dict())
    fields = {field.name for field in family.fields}
    assert keys - fields - {"rope_parameters"} - SIZES - WITHOUT_EFFECT == set()
    assert fields - keys == {"rope_theta", "rope_scaling"}


@both_families
def test_defaults_of_hugging_face_are_those_of_plain(family: Family) -> None:
    plain = RECIPES[f"{family.name}/plain"]
    config_class = getattr(transformers, family.oracle.replace("ForCausalLM", "Config"))
    defaults = config_class().to_dict()
    stated = {f.name for f in family.fields} - {"head_dim", "num_key_value_heads", "rope_theta", "rope_scaling"}
    assert {name: plain.config[name] for name in stated} == {name: defaults[name] for name in stated}
    assert plain.config["rope_parameters"] == defaults["rope_parameters"]


@both_families
def test_absent_case_is_plain_to_hugging_face(family: Family) -> None:
    absent, plain = (library_model(RECIPES[f"{family.name}/{n}"]).config.to_dict() for n in ("field-absent", "plain"))
    assert {key for key in plain if absent[key] != plain[key]} <= WITHOUT_EFFECT


@both_families
def test_every_field_has_a_case_that_moves_it_and_says_so(family: Family) -> None:
    for field in family.fields:
        moving = [r for r in FIELD_RECIPES if family_of(r) is family and r.field.split(" ")[0] == field.name]
        assert [r for r in moving if r.config.get(field.name) != plain_of(r).config.get(field.name)], field.name


# Not made from plain: sizes of its own.
OF_THEIR_OWN = {"mistral/window"}


@every_field_recipe
def test_field_case_moves_its_field_alone(recipe: Recipe) -> None:
    """All rotary keys count as one: their two spellings move together.  `field-absent` moves nothing: it leaves out."""
    config, plain = recipe.config, plain_of(recipe).config
    moved = {key for key in config.keys() | plain.keys() if config.get(key) != plain.get(key)}
    if recipe.name.endswith("/field-absent"):
        assert config.items() <= plain.items()
    elif recipe.field.split(" ")[0] in ROPE_KEYS:
        assert moved <= ROPE_KEYS
    elif recipe.name not in OF_THEIR_OWN:
        assert moved == {recipe.field.split(" ")[0]}


# The shapes or names of the tensors forbid it; up to 4,096 tokens a null window is the default one.
CANNOT_BE_IGNORED = {"head_dim", "num_key_value_heads", "num_local_experts", "tie_word_embeddings"}


@every_field_recipe
def test_field_case_knows_what_ignoring_its_field_gives(recipe: Recipe) -> None:
    assert f"{recipe.field} ignored" in recipe.counterfactuals or recipe.field in CANNOT_BE_IGNORED | {
        "absent keys", "sliding_window (null)",
    }  # fmt: skip


# --- claims and probes ----------------------------------------------------------------------------------------------

STORED_FOR = {
    "golden.positions": "positions",
    "golden.loss": "loss",
    "golden.gradients": "gradients",
    "golden.blocks": "blocks",
}


@every_recipe
def test_claims_are_of_checks_that_exist_and_what_they_need_is_stored(recipe: Recipe) -> None:
    assert set(recipe.claims) <= set(checks())
    assert all(recipe.claims.values())
    assert recipe.store - {"probes"} == {needed for check, needed in STORED_FOR.items() if check in recipe.claims}


@both_families
def test_every_check_is_claimed_by_some_case(family: Family) -> None:
    of_models = {check for check in checks() if not check.startswith("component.")}
    assert {check for recipe in family.recipes for check in recipe.claims} == of_models


@every_recipe
def test_probes_have_vocabulary_names_stand_after_their_parents_and_lead_to_the_logits(recipe: Recipe) -> None:
    specs = family_of(recipe).probes(recipe.config)
    layers = range(recipe.config["num_hidden_layers"])
    known = {name.replace("layers.N.", f"layers.{n}.") for name in VOCABULARY for n in layers}
    axes = family_of(recipe).probe_sizes(recipe.config, recipe.batch, recipe.seq)
    seen: set[str] = set()
    for spec in specs:
        assert spec.name in known - seen
        assert set(spec.parents) <= seen
        assert all(axes[axis] > 0 for axis in spec.axes)
        seen.add(spec.name)
    needed = {"logits"}
    for spec in reversed(specs):
        assert spec.name in needed
        needed |= set(spec.parents)


def test_probes_of_the_experts() -> None:
    specs = {spec.name: spec for spec in MIXTRAL.probes(RECIPES["mixtral/distinct"].config)}
    feed_forward = [name.removeprefix("layers.1.feed_forward.") for name in specs if "layers.1.feed_forward" in name]
    assert feed_forward == ["norm", "router_logits", "routing_weights", "expert_outputs", "output"]
    assert specs["layers.1.feed_forward.router_logits"].axes == ("batch", "seq", "expert")
    assert specs["layers.1.feed_forward.expert_outputs"].axes == ("batch", "seq", "choice", "hidden")


@distinct
@pytest.mark.parametrize("layer", [0, 1])
def test_block_checkpoint_is_a_one_layer_checkpoint_of_that_block(name: str, layer: int) -> None:
    recipe = RECIPES[name]
    family, weights = family_of(recipe), draw_weights(family_of(recipe), recipe)
    config, block = family.block_checkpoint(recipe.config, weights, torch.zeros(4, 11, 26), layer)
    assert {name: tuple(t.shape) for name, t in block.items()} == family.tensor_shapes(config)
    moved = [n for n in block if ".layers." in n]
    assert all(block[n].equal(weights[n.replace("layers.0.", f"layers.{layer}.")]) for n in moved)
