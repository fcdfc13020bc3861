"""Llama's recipes obey the config rules: what hides mistakes in other people's tests does not occur in these.

Sizes and sets of keys are stated here as literals, so that a change of a recipe that weakens it is noticed.
"""

from itertools import combinations, pairwise
from typing import Any

import pytest

from conformance.families import FAMILIES, MODELS, Recipe, get
from conformance.golden.model import draw_inputs, draw_weights
from conformance.probes import VOCABULARY
from conformance.suite import checks

transformers = pytest.importorskip("transformers")

FAMILY = get("llama")
RECIPES = {recipe.name: recipe for recipe in FAMILY.recipes}
FIELD_RECIPES = [recipe for recipe in FAMILY.recipes if recipe.field]
PLAIN, DISTINCT, SQUARE = (RECIPES[f"llama/{name}"] for name in ("plain", "distinct", "square"))
ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
padded_recipe = pytest.mark.parametrize(
    "recipe",
    [r for r in RECIPES.values() if {"golden.left_padding", "cache.ragged"} & r.claims.keys()],
    ids=lambda r: r.name,
)


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


def test_llama_1_case_leaves_num_key_value_heads_and_head_dim_out() -> None:
    assert {"num_key_value_heads", "head_dim"} & RECIPES["llama/mha"].config.keys() == set()


@every_recipe
def test_every_case_has_two_layers_or_more(recipe: Recipe) -> None:
    assert recipe.config["num_hidden_layers"] >= 2


@every_recipe
def test_every_case_has_dropout_in_its_config(recipe: Recipe) -> None:
    """A candidate that applies it in evaluation fails.  `field-absent` has nothing that has a default."""
    assert recipe.config.get("attention_dropout", 0.0) > 0 or recipe.name == "llama/field-absent"


# --- inputs and weights ---------------------------------------------------------------------------------------------


@padded_recipe
def test_padded_rows_have_all_different_unsorted_lengths_from_one_to_the_whole(recipe: Recipe) -> None:
    lengths = draw_inputs(recipe)["lengths"].tolist()
    assert len(lengths) == recipe.batch >= 3
    assert len(set(lengths)) == len(lengths)
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))
    assert (min(lengths), max(lengths)) == (1, recipe.seq)


@padded_recipe
def test_pads_hold_ids_that_no_real_token_has(recipe: Recipe) -> None:
    inputs = draw_inputs(recipe)
    real, junk = set(inputs["input_ids"].flatten().tolist()), set(inputs["padding_ids"].flatten().tolist())
    assert real & junk == set()
    assert len(junk) >= 2
    assert all(0 <= token < recipe.config["vocab_size"] for token in real | junk)


@every_recipe
def test_rows_of_a_batch_begin_with_different_tokens(recipe: Recipe) -> None:
    first = draw_inputs(recipe)["input_ids"][:, :2].tolist()
    assert len({tuple(tokens) for tokens in first}) == recipe.batch


POSITIONS = [r for r in RECIPES.values() if "positions" in r.store]


@pytest.mark.parametrize("recipe", POSITIONS, ids=lambda r: r.name)
def test_explicit_positions_start_with_0_and_1_in_a_row_and_pass_2000(recipe: Recipe) -> None:
    positions = draw_inputs(recipe)["position_ids"]
    assert positions[0, :2].tolist() == [0, 1]
    assert 2000 <= positions.max().item() < recipe.config["max_position_embeddings"]


@pytest.mark.parametrize("recipe", POSITIONS, ids=lambda r: r.name)
def test_explicit_positions_rise_jump_and_differ_from_row_to_row(recipe: Recipe) -> None:
    positions = draw_inputs(recipe)["position_ids"].tolist()
    assert all(earlier < later for row in positions for earlier, later in pairwise(row))
    assert all(max(later - earlier for earlier, later in pairwise(row)) > 1 for row in positions)
    assert len({tuple(row) for row in positions}) == recipe.batch


def test_long_case_reaches_position_2059_and_compares_16_rows() -> None:
    recipe = RECIPES["llama/long"]
    assert (recipe.seq, recipe.last_rows) == (2060, 16)
    assert recipe.seq <= recipe.config["max_position_embeddings"]


@every_recipe
def test_no_two_tensors_that_may_be_confused_are_equal(recipe: Recipe) -> None:
    weights = draw_weights(FAMILY, recipe)
    equal = [
        (a, b)
        for a, b in combinations(weights, 2)
        if weights[a].shape == weights[b].shape and weights[a].equal(weights[b])
    ]
    assert equal == []


def test_epsilon_of_its_field_case_is_not_lost_beside_the_embeddings_variance() -> None:
    """The mean square of what the first norm receives is 1 to 10 times ε."""
    recipe = RECIPES["llama/field-rms_norm_eps"]
    mean_square = draw_weights(FAMILY, recipe)["model.embed_tokens.weight"].square().mean().item()
    assert 1 < mean_square / recipe.config["rms_norm_eps"] < 10


# --- the checkpoint -------------------------------------------------------------------------------------------------


@every_recipe
def test_checkpoint_holds_the_tensors_that_hugging_face_has(recipe: Recipe) -> None:
    import torch

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(dict(recipe.config)))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert FAMILY.tensor_shapes(recipe.config) == theirs


@every_recipe
def test_no_array_of_hugging_face_is_left_out_of_the_checkpoint(recipe: Recipe) -> None:
    """Buffers that a checkpoint would have to hold: there are none (the rotary frequencies are not persistent)."""
    import torch

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(dict(recipe.config)))
    assert set(model.state_dict()) - set(FAMILY.tensor_shapes(recipe.config)) <= {"lm_head.weight"}


def as_4x(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters as transformers 4.x reads them; 10,000 is the default of Llama's rope_theta."""
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    return {"rope_theta": config.get("rope_theta", 10000.0)} | scaling


def as_5x(config: dict[str, Any]) -> dict[str, Any]:
    return dict(config["rope_parameters"])


@pytest.mark.parametrize("recipe", [r for r in RECIPES.values() if r.config.keys() >= ROPE_KEYS], ids=lambda r: r.name)
def test_both_spellings_of_the_rotary_parameters_say_the_same(recipe: Recipe) -> None:
    assert as_4x(recipe.config) == as_5x(recipe.config)


def test_one_case_has_each_spelling_alone_and_all_others_have_both_or_none() -> None:
    spelt: dict[frozenset[str], list[str]] = {}
    for recipe in FAMILY.recipes:
        spelt.setdefault(frozenset(recipe.config.keys() & ROPE_KEYS), []).append(recipe.name)
    assert len(spelt.pop(frozenset(ROPE_KEYS))) == len(RECIPES) - 3
    assert spelt == {
        frozenset({"rope_parameters"}): ["llama/field-rope_parameters-only"],
        frozenset({"rope_theta", "rope_scaling"}): ["llama/field-rope_theta-rope_scaling-only"],
        frozenset(): ["llama/field-absent"],
    }


def test_cases_with_one_spelling_move_theta_and_scaling_from_their_defaults() -> None:
    only_5x = RECIPES["llama/field-rope_parameters-only"].config
    only_4x = RECIPES["llama/field-rope_theta-rope_scaling-only"].config
    assert as_5x(only_5x) == as_4x(only_4x) == {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}


# --- fields and keys ------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
}  # fmt: skip

# Keys of Hugging Face's LlamaConfig that cannot change a forward pass in evaluation, and why not.
WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "model_type", "transformers_version",  # what it is called
    "dtype",  # how it is stored; the implementation is told what to run in
    "attention_dropout",  # in training only
    "initializer_range",  # before training only
    "max_position_embeddings",  # a limit; llama3 scaling states its own original length
    "bos_token_id", "eos_token_id", "pad_token_id",  # in generation; a pad id only zeroes an embedding at its start
    "use_cache", "return_dict", "output_hidden_states", "output_attentions",  # what is returned
    "chunk_size_feed_forward",  # the order of computation; Llama ignores it
    "is_encoder_decoder", "pretraining_tp",  # no other value is a Llama here
    "id2label", "label2id", "problem_type",  # classification heads
}  # fmt: skip


def test_every_key_of_hugging_face_is_a_field_a_size_or_known_to_have_no_effect() -> None:
    """A key that a new release adds must be sorted into one of the three."""
    keys = set(transformers.LlamaConfig().to_dict())
    fields = {field.name for field in FAMILY.fields} | {"rope_parameters"}  # rope_theta and rope_scaling in 5.x
    assert keys - fields - SIZES - WITHOUT_EFFECT == set()


def test_every_field_is_a_key_that_hugging_face_knows() -> None:
    keys = set(transformers.LlamaConfig().to_dict()) | {"rope_theta", "rope_scaling"}
    assert {field.name for field in FAMILY.fields} - keys == set()


@pytest.mark.parametrize("field", [field.name for field in FAMILY.fields])
def test_every_field_has_a_case_that_moves_it_and_says_so(field: str) -> None:
    moving = [
        r for r in FIELD_RECIPES if r.config.get(field) != PLAIN.config.get(field) and r.field.split(" ")[0] == field
    ]
    assert moving


MOVED_TOGETHER = {"rope_theta", "rope_scaling", "rope_parameters"}


@pytest.mark.parametrize("recipe", FIELD_RECIPES, ids=lambda r: r.name)
def test_field_case_moves_its_field_alone(recipe: Recipe) -> None:
    """All rotary keys count as one: their two spellings move together.  `field-absent` moves nothing: it leaves out."""
    keys = recipe.config.keys() | PLAIN.config.keys()
    moved = {key for key in keys if recipe.config.get(key) != PLAIN.config.get(key)}
    if recipe.name == "llama/field-absent":
        assert recipe.config.items() <= PLAIN.config.items()
    elif recipe.field.split(" ")[0] in MOVED_TOGETHER:
        assert moved <= MOVED_TOGETHER
    else:
        assert moved == {recipe.field}


def test_absent_case_leaves_out_every_key_that_has_a_default() -> None:
    assert set(RECIPES["llama/field-absent"].config) == SIZES | {
        "architectures", "model_type", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype",
    }  # fmt: skip


def test_absent_case_is_plain_to_hugging_face() -> None:
    absent, plain = (
        transformers.LlamaConfig.from_dict(dict(RECIPES[f"llama/{n}"].config)) for n in ("field-absent", "plain")
    )
    differing = {key for key, value in absent.to_dict().items() if plain.to_dict()[key] != value}
    assert differing <= WITHOUT_EFFECT


CANNOT_BE_IGNORED = {"head_dim", "num_key_value_heads", "tie_word_embeddings"}  # the tensors' shapes or names forbid it


@pytest.mark.parametrize("recipe", FIELD_RECIPES, ids=lambda r: r.name)
def test_field_case_knows_what_ignoring_its_field_gives(recipe: Recipe) -> None:
    ignored = [label for label in recipe.counterfactuals if label == f"{recipe.field} ignored"]
    assert ignored or recipe.field in CANNOT_BE_IGNORED | {"absent keys"}


# --- claims ---------------------------------------------------------------------------------------------------------


@every_recipe
def test_every_claim_is_of_a_check_that_exists_in_dtypes_that_exist(recipe: Recipe) -> None:
    assert recipe.claims
    assert set(recipe.claims) <= set(checks())
    for dtypes in recipe.claims.values():
        assert dtypes
        assert len(set(dtypes)) == len(dtypes)
        assert set(dtypes) <= {"float64", "float32", "bfloat16", "float16"}


def test_every_check_is_claimed_by_some_case() -> None:
    assert {check for name in FAMILIES for recipe in get(name).recipes for check in recipe.claims} == set(checks())


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
def test_names_are_unique_and_belong_to_the_family(recipe: Recipe) -> None:
    assert recipe.name.startswith("llama/")
    assert [r.name for r in FAMILY.recipes].count(recipe.name) == 1
    assert recipe.summary


def test_recipes_that_share_a_label_share_their_tensors() -> None:
    """Equal label, name and shape give equal tensors, so that fixtures store them once."""
    plain, mqa = draw_weights(FAMILY, PLAIN), draw_weights(FAMILY, RECIPES["llama/mqa"])
    differing = {n for n in plain if plain[n].shape != mqa[n].shape}
    assert differing == {f"model.layers.{layer}.self_attn.{p}_proj.weight" for layer in (0, 1) for p in "kv"}
    assert [n for n in plain if n not in differing and not plain[n].equal(mqa[n])] == []


# --- probes ---------------------------------------------------------------------------------------------------------


@every_recipe
def test_probes_have_vocabulary_names_and_each_name_once(recipe: Recipe) -> None:
    names = [spec.name for spec in FAMILY.probes(recipe.config)]
    assert len(set(names)) == len(names)
    layers = range(recipe.config["num_hidden_layers"])
    known = {name.replace("layers.N.", f"layers.{n}.") for name in VOCABULARY for n in layers}
    assert set(names) <= known


@every_recipe
def test_probes_stand_after_their_parents_and_only_the_embedding_has_none(recipe: Recipe) -> None:
    seen: set[str] = set()
    for spec in FAMILY.probes(recipe.config):
        assert set(spec.parents) <= seen, spec.name
        assert bool(spec.parents) == (spec.name != "embedding")
        assert len(set(spec.parents)) == len(spec.parents)
        seen.add(spec.name)


@every_recipe
def test_every_probe_leads_to_the_logits(recipe: Recipe) -> None:
    specs = FAMILY.probes(recipe.config)
    assert specs[-1].name == "logits"
    needed = {"logits"}
    for spec in reversed(specs):
        assert spec.name in needed
        needed |= set(spec.parents)


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


@every_recipe
def test_axes_of_a_probe_are_distinct_and_have_sizes(recipe: Recipe) -> None:
    axis = FAMILY.probe_sizes(recipe.config, recipe.batch, recipe.seq)
    for spec in FAMILY.probes(recipe.config):
        assert len(set(spec.axes)) == len(spec.axes)
        assert all(axis[name] > 0 for name in spec.axes)


def test_heads_are_split_into_key_value_heads_first_and_their_groups_second() -> None:
    """Query head h reads key-value head h // group: with 6 heads and 3 key-value heads, 0 0 1 1 2 2."""
    axis = FAMILY.probe_sizes(DISTINCT.config, 4, 11)
    assert (axis["kv_head"], axis["group"]) == (3, 2)
    spec = next(s for s in FAMILY.probes(DISTINCT.config) if s.name == "layers.0.attention.query")
    assert spec.axes == ("batch", "seq", "kv_head", "group", "head_dim")


# --- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_block_checkpoint_is_a_one_layer_checkpoint_of_that_block(layer: int) -> None:
    import torch

    weights = draw_weights(FAMILY, DISTINCT)
    block_input = torch.arange(4 * 11 * 42.0).view(4, 11, 42)
    config, block = FAMILY.block_checkpoint(DISTINCT.config, weights, block_input, layer)
    assert {name: tuple(t.shape) for name, t in block.items()} == FAMILY.tensor_shapes(config)
    assert config["num_hidden_layers"] == 1
    assert block["model.embed_tokens.weight"].equal(torch.arange(44 * 42.0).view(44, 42))
    moved = [n for n in block if ".layers." in n]
    assert all(block[n].equal(weights[n.replace("layers.0.", f"layers.{layer}.")]) for n in moved)
    assert len(moved) == sum(f".layers.{layer}." in name for name in weights)


def test_block_input_with_more_tokens_than_the_vocabulary_is_refused_with_both_numbers() -> None:
    import torch

    with pytest.raises(ValueError, match="62 block inputs need a vocabulary of as many, the case has 61"):
        FAMILY.block_checkpoint(DISTINCT.config, draw_weights(FAMILY, DISTINCT), torch.zeros(2, 31, 42), 0)


# --- the registry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_family_is_found_by_its_name(name: str) -> None:
    assert get(name).name == name


def test_unknown_family_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"unknown family 'lama'; there is .*, llama"):
        get("lama")
