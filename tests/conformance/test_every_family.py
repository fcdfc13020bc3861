"""What holds for every case of every model family: nothing in the cases hides what other people's tests hide.

A family is covered by being in `MODELS`.  What is special to one, its sizes for a start, is stated in a module of its
own.
"""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.draws import KINDS
from conformance.families import FAMILIES, MODELS, Config, Family, Recipe, claims, get
from conformance.families.decoders import FULL as FULL_DECODER
from conformance.families.encoder_decoders import FULL as FULL_ENCODER_DECODER
from conformance.golden.model import draw_inputs, draw_weights
from conformance.implementation import DTYPES
from conformance.probes import any_layer, word
from conformance.suite import checks

transformers = pytest.importorskip("transformers")

RECIPES: dict[str, Recipe] = {recipe.name: recipe for family in MODELS for recipe in get(family).recipes}
FIELD_RECIPES = {name: recipe for name, recipe in RECIPES.items() if recipe.field}
# Hugging Face never had the others.
HUB = [family for family in MODELS if hasattr(transformers, get(family).oracle)]
DECODERS = ("gpt", "gpt2", "gpt3", "llama", "mistral", "mixtral", "phi")

every_family = pytest.mark.parametrize("family", [get(family) for family in MODELS], ids=MODELS)
hub_family = pytest.mark.parametrize("family", [get(family) for family in HUB], ids=HUB)
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
every_field_recipe = pytest.mark.parametrize("recipe", FIELD_RECIPES.values(), ids=FIELD_RECIPES)


def recipes(chosen: Iterable[Recipe]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("recipe", list(chosen), ids=lambda recipe: recipe.name)


def family_of(recipe: Recipe) -> Family:
    found: Family = get(recipe.name.split("/")[0])
    return found


def plain_of(recipe: Recipe) -> Recipe:
    return RECIPES[f"{family_of(recipe).name}/plain"]


@functools.cache
def weights_of(name: str) -> dict[str, Tensor]:
    return draw_weights(family_of(RECIPES[name]), RECIPES[name])


@functools.cache
def inputs_of(name: str) -> dict[str, Tensor]:
    return draw_inputs(RECIPES[name])


def sides(recipe: Recipe) -> Iterator[tuple[dict[str, Tensor], int, int]]:
    """Ids, lengths and junk of the source (or of the only text) and of the target: with length and vocabulary."""
    inputs, config = inputs_of(recipe.name), recipe.config
    yield inputs, recipe.seq, config["vocab_size"]
    if recipe.target is not None:
        theirs = {name.removeprefix("decoder_"): t for name, t in inputs.items() if name.startswith("decoder_")}
        yield theirs, recipe.target, config.get("decoder_vocab_size") or config["vocab_size"]


@functools.cache
def specs_of(name: str) -> list[Any]:
    recipe = RECIPES[name]
    return family_of(recipe).probes(recipe.config)


def axes_of(family: Family, config: Config, recipe: Recipe) -> dict[str, int]:
    if recipe.target is None:
        return family.probe_sizes(config, recipe.batch, recipe.seq)
    return family.probe_sizes(config, recipe.batch, recipe.target, recipe.seq)


def config_of_the_library(family: Family, config: Config) -> Any:
    return getattr(transformers, family.oracle).config_class.from_dict(dict(config))


# --- what a recipe says ---------------------------------------------------------------------------------------------


@every_family
def test_family_is_found_by_its_name(family: Family) -> None:
    assert get(family.name) is family
    assert family.encoder_decoder == all(recipe.target is not None for recipe in family.recipes)


@every_family
def test_names_of_its_recipes_are_unique_and_begin_with_the_familys(family: Family) -> None:
    names = [recipe.name for recipe in family.recipes]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(rf"{family.name}/[\w.-]+", name) for name in names)
    assert all(recipe.summary for recipe in family.recipes)


@every_family
def test_there_is_a_plain_case_one_of_different_and_one_of_equal_sizes_and_one_without_optional_keys(
    family: Family,
) -> None:
    assert {f"{family.name}/{case}" for case in ("plain", "distinct", "square", "field-absent")} <= RECIPES.keys()


@every_recipe
def test_every_stack_of_blocks_has_two_or_more(recipe: Recipe) -> None:
    """Unless the family has but one, and so no key for their number."""
    stacks = defaultdict(set)
    for spec in specs_of(recipe.name):
        if found := re.match(r"(.*)layers\.(\d+)\.", spec.name):
            stacks[found[1]].add(int(found[2]))
    if family_of(recipe).layers_key in recipe.config:
        assert stacks
        assert all(max(layers) >= 1 for layers in stacks.values())


DROPOUT = re.compile("drop|jitter")  # what is random in training


@every_recipe
def test_every_dropout_in_its_config_is_above_zero(recipe: Recipe) -> None:
    """A candidate that applies it in evaluation fails.  `field-absent` has nothing that has a default."""
    rates = {key: value for key, value in recipe.config.items() if DROPOUT.search(key)}
    assert all(rate > 0 for rate in rates.values())
    expected = set() if recipe.name.endswith("/field-absent") else set(filter(DROPOUT.search, plain_of(recipe).config))
    assert rates.keys() == expected
    assert expected or recipe.name.endswith("/field-absent")


@hub_family
def test_every_dropout_of_hugging_face_is_in_plain(family: Family) -> None:
    library = getattr(transformers, family.oracle).config_class().to_dict()
    of_other_heads = {"summary_first_dropout"}
    stated = RECIPES[f"{family.name}/plain"].config.keys() | of_other_heads
    assert set(filter(DROPOUT.search, library)) <= stated


# --- sizes ----------------------------------------------------------------------------------------------------------

# The first two are one thing seen twice; of the others the maths fixes the size, and no two of them are in one tensor.
EQUAL_AXES = ({"seq", "key"}, {"source", "source_key"})
FIXED_AXES = {"direction", "piece", "choice"}
# To be mended when the case is next made anew.
COINCIDENCES = {
    "phi/distinct": [{"batch", "group"}],
}


@every_family
def test_distinct_has_no_two_axes_that_could_be_confused(family: Family) -> None:
    recipe = RECIPES[f"{family.name}/distinct"]
    axes = {a: n for a, n in axes_of(family, recipe.config, recipe).items() if a not in FIXED_AXES}
    equal = [{a, b} for a, b in combinations(axes, 2) if axes[a] == axes[b] and {a, b} not in EQUAL_AXES]
    assert [pair for pair in equal if pair not in COINCIDENCES.get(recipe.name, [])] == []
    assert all(size > 1 for size in axes.values())


@every_family
def test_square_has_a_square_of_every_matrix_that_it_can(family: Family) -> None:
    """One that is not transposed must load without a shape error."""
    shapes = {any_layer(n): shape for n, shape in family.tensor_shapes(RECIPES[f"{family.name}/square"].config).items()}
    distinct = family.tensor_shapes(RECIPES[f"{family.name}/distinct"].config)
    square = {name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == shape[1]}
    before = {any_layer(name) for name, shape in distinct.items() if len(shape) == 2 and shape[0] == shape[1]}
    assert len(square) > len(before & shapes.keys())
    assert len(square) >= 2


# --- inputs ---------------------------------------------------------------------------------------------------------

PADDING = {"golden.left_padding", "golden.right_padding", "cache.ragged"}
with_lengths = [r for r in RECIPES.values() if "lengths" in inputs_of(r.name)]
padded_recipes = [r for r in with_lengths if r.batch >= 3]


@every_recipe
def test_a_case_that_is_padded_has_three_rows_or_more(recipe: Recipe) -> None:
    assert not PADDING & recipe.claims.keys() or recipe in padded_recipes


@recipes(padded_recipes)
def test_padded_rows_have_all_different_unsorted_lengths_from_one_to_the_whole(recipe: Recipe) -> None:
    for inputs, longest, _ in sides(recipe):
        lengths = inputs["lengths"].tolist()
        assert len(set(lengths)) == len(lengths) == recipe.batch
        assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))
        assert (min(lengths), max(lengths)) == (1, longest)


@recipes(r for r in padded_recipes if r.target)
def test_most_rows_have_more_or_less_of_the_source_than_of_the_target(recipe: Recipe) -> None:
    """So that the target's mask taken for the source's is seen, and the other way round."""
    source, target = (inputs["lengths"] for inputs, *_ in sides(recipe))
    assert (source != target).float().mean() > 0.5


@recipes(with_lengths)
def test_pads_hold_ids_that_no_real_token_has(recipe: Recipe) -> None:
    for inputs, _, vocab in sides(recipe):
        real, junk = (set(inputs[name].flatten().tolist()) for name in ("input_ids", "padding_ids"))
        assert real & junk == set()
        assert len(junk) >= 2
        assert all(0 <= token < vocab for token in real | junk)


@every_recipe
def test_ids_are_in_the_vocabulary_and_rows_of_a_batch_begin_differently(recipe: Recipe) -> None:
    for side, (inputs, length, vocab) in enumerate(sides(recipe)):
        ids = inputs["input_ids"]
        assert tuple(ids.shape) == (recipe.batch, length)
        assert 0 <= ids.min() <= ids.max() < vocab
        beginnings = ids[:, side : side + 2].tolist()  # all targets begin with the same token
        assert len({tuple(tokens) for tokens in beginnings}) == recipe.batch


@recipes(r for r in RECIPES.values() if r.target)
def test_targets_begin_with_the_start_token_and_labels_are_what_follows(recipe: Recipe) -> None:
    inputs = inputs_of(recipe.name)
    assert set(inputs["decoder_input_ids"][:, 0].tolist()) == {recipe.config["decoder_start_token_id"]}
    assert inputs["labels"][:, :-1].equal(inputs["decoder_input_ids"][:, 1:])
    assert recipe.seq != recipe.target or recipe.name.endswith("/square")


@recipes(r for r in RECIPES.values() if "positions" in r.store)
def test_explicit_positions_rise_jump_and_differ_from_row_to_row(recipe: Recipe) -> None:
    positions = inputs_of(recipe.name)["position_ids"].tolist()
    assert positions[0][:2] == [0, 1]
    assert all(earlier < later for row in positions for earlier, later in pairwise(row))
    assert all(max(later - earlier for earlier, later in pairwise(row)) > 1 for row in positions)
    assert len({tuple(row) for row in positions}) == recipe.batch
    assert recipe.seq < max(map(max, positions)) < recipe.config[family_of(recipe).positions_key]


# --- weights --------------------------------------------------------------------------------------------------------


@functools.cache
def norms_of(name: str) -> set[str]:
    """The weights of norms, which begin at 1: by the classes of the reference's modules, not by their names."""
    from reference_impl.checkpoint import FAMILIES as MODULES

    config = RECIPES[name].config
    module, config_class, model_class = MODULES[config["model_type"]]
    home = import_module(module)
    with torch.device("meta"):
        model = getattr(home, model_class)(getattr(home, config_class).from_dict(config))
    return {f"{path}.weight" for path, found in model.named_modules() if "Norm" in type(found).__name__}


@every_recipe
def test_nothing_keeps_the_value_that_a_library_starts_it_at(recipe: Recipe) -> None:
    """Norm weights start at 1, everything else at 0 or around it; that names do not say which is which must not matter.

    A mean is within 4 standard errors of where it should be; a norm has few weights, and its draws a known deviation.
    """
    for name, tensor in weights_of(recipe.name).items():
        initial = 1.0 if name in norms_of(recipe.name) else 0.0
        assert (tensor == initial).sum() <= max(2, 0.1 * tensor.numel()), name
        assert tensor.unique().numel() >= 2, name
        deviation = KINDS["norm"] if initial else tensor.std().item()
        assert abs(tensor.mean() - initial) < 4 * deviation / tensor.numel() ** 0.5, name


@every_recipe
def test_no_two_tensors_that_may_be_confused_are_equal(recipe: Recipe) -> None:
    """Unless the checkpoint holds one of them twice."""
    weights, copies = weights_of(recipe.name), getattr(family_of(recipe), "copies", {})
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in weights.items():
        if name not in copies:
            by_shape.setdefault(tuple(tensor.shape), []).append(name)
    pairs = (pair for names in by_shape.values() for pair in combinations(names, 2))
    assert [(a, b) for a, b in pairs if weights[a].equal(weights[b])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_recipe
def test_weights_are_exact_in_low_precision(recipe: Recipe, dtype: torch.dtype) -> None:
    weights = weights_of(recipe.name)
    assert [name for name, tensor in weights.items() if not tensor.to(dtype).float().equal(tensor)] == []


@every_family
def test_recipes_that_share_a_label_share_their_tensors(family: Family) -> None:
    """Equal label, name and shape give equal tensors, so that fixtures store them once."""
    first: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
    for recipe in family.recipes:
        for name, tensor in weights_of(recipe.name).items():
            factors = tuple(factor for ending, factor in recipe.scaled.items() if name.endswith(ending))
            key = (recipe.weights, factors, name, tuple(tensor.shape))
            owner, expected = first.setdefault(key, (recipe.name, tensor))
            assert tensor.equal(expected), f"{name} of {recipe.name} is not that of {owner}"
    assert len(first) < sum(len(weights_of(recipe.name)) for recipe in family.recipes)


# --- the checkpoint -------------------------------------------------------------------------------------------------


@recipes(r for r in RECIPES.values() if family_of(r).name in HUB)
def test_checkpoint_holds_the_tensors_that_hugging_face_saves(recipe: Recipe) -> None:
    """All parameters, and the buffers that belong into a file."""
    from transformers.core_model_loading import revert_weight_conversion

    family = family_of(recipe)
    with torch.device("meta"):
        model = getattr(transformers, family.oracle)(config_of_the_library(family, recipe.config))
    saved, left_out = model.state_dict().keys(), set(model._keys_to_ignore_on_save or ())
    tensors = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in saved}
    theirs = revert_weight_conversion(model, {n: t for n, t in tensors.items() if n not in left_out})
    assert family.tensor_shapes(recipe.config) == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


WITH_BLOCKS = [r for r in RECIPES.values() if "blocks" in r.store]


@recipes(WITH_BLOCKS)
def test_block_checkpoint_is_a_one_layer_checkpoint_of_that_block(recipe: Recipe) -> None:
    family, weights = family_of(recipe), weights_of(recipe.name)
    axes, tokens = axes_of(family, recipe.config, recipe), recipe.batch * recipe.seq
    block_input = torch.arange(float(tokens * axes["hidden"])).view(recipe.batch, recipe.seq, axes["hidden"])
    for layer in range(recipe.config[family.layers_key]):
        config, block = family.block_checkpoint(recipe.config, weights, block_input, layer)
        assert {name: tuple(tensor.shape) for name, tensor in block.items()} == family.tensor_shapes(config)
        assert (config[family.layers_key], config["vocab_size"]) == (1, tokens)
        here, there = re.compile(r"\.(h|layers)\.0\."), re.compile(rf"\.(h|layers)\.{layer}\.")
        inside = {name: here.sub(rf".\1.{layer}.", name) for name in block if here.search(name)}
        assert set(inside.values()) == set(filter(there.search, weights))
        changed = {ours for ours, theirs in inside.items() if not block[ours].equal(weights[theirs])}
        scaled = recipe.config.get("scale_attn_by_inverse_layer_idx") and layer  # its number is folded into queries
        assert changed == ({f"transformer.h.0.attn.c_attn.{part}" for part in ("weight", "bias")} if scaled else set())


# --- fields and keys ------------------------------------------------------------------------------------------------

# Keys of Hugging Face's configs that cannot change the logits of these models in evaluation, and why not.
WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "model_type", "transformers_version",  # what it is called
    "dtype", "torch_dtype",  # how it is stored; the implementation is told what to run in
    "output_router_logits", "router_aux_loss_coef", "router_z_loss_coef", "add_router_probs",  # in the loss only
    "initializer_range", "init_std", "initializer_factor",  # before training only
    "max_position_embeddings",  # a limit; llama3 scaling states its own original length
    # in generation; a pad id only zeroes an embedding at its start
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_eos_token_id",
    "use_cache", "return_dict", "output_hidden_states", "output_attentions",  # what is returned
    "chunk_size_feed_forward",  # the order of computation; all of them ignore it
    "is_encoder_decoder", "is_decoder", "add_cross_attention", "pretraining_tp",  # no other value is one of these here
    "id2label", "label2id", "problem_type",  # classification heads
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "reorder_and_upcast_attn", "router_dtype",  # precision only; the first has a case that stresses float16
    "adaptive", "attn_type", "sample_softmax",  # no other value is a Transformer-XL here, or in training only
}  # fmt: skip
ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}


def fields_of(family: Family) -> set[str]:
    return {field.name for field in family.fields}


def named(recipe: Recipe) -> set[str]:
    """The keys that a field case says it moves: "rope_theta and rope_scaling (4.x spelling)" are two."""
    assert recipe.field
    return set(re.split(r", | and ", recipe.field.partition(" (")[0]))


def sizes_of(family: Family) -> set[str]:
    """The keys that say how large something is: another number in `plain` or `field-absent` gives other shapes."""

    def shapes(config: Config) -> Any:
        return family.tensor_shapes(config), axes_of(family, config, recipe)

    found = set()
    for recipe in (RECIPES[f"{family.name}/{case}"] for case in ("plain", "field-absent")):
        for key, value in recipe.config.items():
            if isinstance(value, int | list) and not isinstance(value, bool):
                other = value[:-1] if isinstance(value, list) else 2 * value
                if shapes(recipe.config | {key: other}) != shapes(recipe.config):
                    found.add(key)
    return found


@hub_family
def test_every_key_of_hugging_face_is_a_field_a_size_or_known_to_have_no_effect(family: Family) -> None:
    """A key that a new release adds must be sorted into one of the three."""
    keys = set(getattr(transformers, family.oracle).config_class().to_dict())
    rotary = {"rope_parameters"} if "rope_theta" in fields_of(family) else set()  # all about rotary positions in 5.x
    others = keys - fields_of(family) - sizes_of(family) - rotary - WITHOUT_EFFECT
    assert {key for key in others if not DROPOUT.search(key)} == set()


@hub_family
def test_every_field_is_a_key_that_hugging_face_knows(family: Family) -> None:
    keys = set(getattr(transformers, family.oracle).config_class().to_dict())
    assert fields_of(family) - keys <= ROPE_KEYS
    assert bool(fields_of(family) & ROPE_KEYS) == ("rope_parameters" in keys)


@every_family
def test_every_key_of_plain_that_decides_the_maths_is_a_field(family: Family) -> None:
    plain = RECIPES[f"{family.name}/plain"].config
    others = plain.keys() - fields_of(family) - sizes_of(family) - {"rope_parameters"} - WITHOUT_EFFECT
    assert {key for key in others if not DROPOUT.search(key)} == set()


def stated_default(family: Family, name: str) -> Any:
    """A field's default as the family states it: a value; … where it is a sentence, or there is none."""
    default = next(field.default for field in family.fields if field.name == name)
    try:
        return json.loads(default)
    except ValueError:
        sentence = " " in default or default in {"none", *RECIPES[f"{family.name}/plain"].config}
        return ... if sentence else default


@hub_family
def test_defaults_that_a_family_states_are_those_of_hugging_face(family: Family) -> None:
    library = getattr(transformers, family.oracle).config_class().to_dict()
    library |= {"rope_scaling": None} | library.get("rope_parameters", {})
    stated = {name: stated_default(family, name) for name in fields_of(family)}
    stated = {name: value for name, value in stated.items() if value is not ...}
    assert stated
    assert stated == {name: library[name] for name in stated}


@every_family
def test_every_field_has_a_case_that_moves_it_and_says_so(family: Family) -> None:
    """Where leaving a key out gives other shapes, `field-absent` is that case."""
    plain, absent = (RECIPES[f"{family.name}/{case}"].config for case in ("plain", "field-absent"))
    moved = {
        field
        for recipe in family.recipes
        if recipe.field
        for field in named(recipe)
        if recipe.config.get(field) != plain.get(field)
    }
    shapes = family.tensor_shapes(plain)
    for field in fields_of(family) & (plain.keys() - absent.keys()):
        if family.tensor_shapes({key: value for key, value in plain.items() if key != field}) != shapes:
            moved.add(field)
    assert fields_of(family) <= moved


@every_field_recipe
def test_field_case_is_of_a_field(recipe: Recipe) -> None:
    known = fields_of(family_of(recipe)) | {"rope_parameters", "absent keys"}
    assert named(recipe) <= known
    assert (recipe.field == "absent keys") == recipe.name.endswith("/field-absent")


def moved(config: Config, base: Config) -> set[str]:
    """The keys that differ, all rotary ones as one: their two spellings move together."""
    keys = {key for key in config.keys() | base.keys() if config.get(key) != base.get(key)}
    return {"rotary"} | keys - ROPE_KEYS if keys & ROPE_KEYS else keys


# They follow from numbers of blocks, which the library writes beside them.
FOLLOWING = {"encoder_sparse_step", "decoder_sparse_step"}


# Its label says that ignoring same_length gives plain; ignoring mem_len does.  To be mended when it is next made anew.
@recipes(FIELD_RECIPES.values())
def test_field_case_moves_its_field_alone(recipe: Recipe) -> None:
    """From what ignoring it gives; if nothing can ignore it, from plain or another case.

    `field-absent` moves nothing.
    """
    if recipe.name.endswith("/field-absent"):
        assert recipe.config.items() <= plain_of(recipe).config.items()
        return
    if recipe.config == plain_of(recipe).config:  # told apart from what a mistake gives
        assert recipe.counterfactuals
        return
    wanted = moved(dict.fromkeys(named(recipe), 1), {})
    ignored = recipe.counterfactuals.get(f"{recipe.field} ignored")
    others = [other.config for other in family_of(recipe).recipes if other.weights == recipe.weights]
    bases = [ignored] if ignored else [plain_of(recipe).config, *others]
    beside = (WITHOUT_EFFECT | FOLLOWING) - wanted
    assert wanted in [moved(recipe.config, base) - beside for base in bases]


# Not made from plain: sizes of its own; tables that must be unshared before they can differ.
NOT_OF_PLAIN = {
    "mistral/window", "transformer/field-decoder_vocab_size", "transformer/field-tie_word_embeddings",
}  # fmt: skip


@recipes(
    r for r in FIELD_RECIPES.values() if family_of(r).name in (*DECODERS, "transformer") and r.name not in NOT_OF_PLAIN
)
def test_field_case_of_these_families_is_plain_with_its_field_moved(recipe: Recipe) -> None:
    config, plain = recipe.config, plain_of(recipe).config
    if recipe.name.endswith("/field-absent"):
        assert config.items() <= plain.items()
    else:
        assert moved(config, plain) in (moved(dict.fromkeys(named(recipe), 1), {}), set())


def loads_where_the_field_is_ignored(recipe: Recipe) -> bool:
    """A tensor that is in the file and not read does not stop it; a missing one, or one of another shape, does."""
    shapes = family_of(recipe).tensor_shapes
    ours = shapes(recipe.config)
    return all(ours.get(name) == shape for name, shape in shapes(plain_of(recipe).config).items())


# Up to 4,096 tokens a null window is the default one; the longer case of null says what that one gives.
TOLD_OTHERWISE = {"mistral/window-null"}


@every_field_recipe
def test_field_case_knows_what_ignoring_its_field_gives(recipe: Recipe) -> None:
    """By that name, or by another where it gives plain; unless the tensors' shapes or names forbid to ignore it."""
    told = f"{recipe.field} ignored" in recipe.counterfactuals
    told |= plain_of(recipe).config in recipe.counterfactuals.values()
    told |= recipe.config.items() <= plain_of(recipe).config.items() and bool(recipe.counterfactuals)
    told |= not loads_where_the_field_is_ignored(recipe)
    assert told != (recipe.name in TOLD_OTHERWISE)


@every_recipe
def test_no_counterfactual_is_the_case_itself_and_no_two_are_the_same(recipe: Recipe) -> None:
    configs = [recipe.config, *recipe.counterfactuals.values()]
    assert [(a, b) for a, b in combinations(range(len(configs)), 2) if configs[a] == configs[b]] == []


# The library's table of positions has as many rows; a default one would be large.
KEPT = {"transformer/field-absent": {"max_position_embeddings"}}
NO_DEFAULT = {"gpt3/field-absent": {"window_size"}}


@every_family
def test_absent_case_leaves_out_every_key_that_has_a_default(family: Family) -> None:
    """What is left: sizes, what the model is called, the tokens of generation."""
    recipe = RECIPES[f"{family.name}/field-absent"]
    ids = {key for key in recipe.config if key.endswith("_token_id")}
    names = {"architectures", "model_type", "is_encoder_decoder", "torch_dtype"}
    more = KEPT.get(recipe.name, set()) | NO_DEFAULT.get(recipe.name, set())
    assert recipe.config.keys() - sizes_of(family) == (names & plain_of(recipe).config.keys()) | ids | more


def plain_is_default(family: Family) -> bool:
    """Whether every field of `plain` but sizes is at the default that the family states, as far as it states one."""
    plain = RECIPES[f"{family.name}/plain"].config
    stated = {name: stated_default(family, name) for name in fields_of(family) & plain.keys() - sizes_of(family)}
    return all(value is ... or value == plain[name] for name, value in stated.items())


AT_DEFAULTS = [family for family in HUB if plain_is_default(get(family))]


def test_plain_of_these_families_is_at_the_defaults() -> None:
    assert {"gpt", "gpt2", "llama", "mistral", "mixtral", "phi"} <= set(AT_DEFAULTS)


@pytest.mark.parametrize("family", AT_DEFAULTS)
def test_absent_case_is_plain_to_hugging_face(family: str) -> None:
    absent, plain = (
        config_of_the_library(get(family), RECIPES[f"{family}/{case}"].config).to_dict()
        for case in ("field-absent", "plain")
    )
    differing = {key for key in plain if absent[key] != plain[key] and not DROPOUT.search(key)}
    assert differing <= WITHOUT_EFFECT


@recipes(r for r in RECIPES.values() if {"rope_parameters", "rope_theta"} <= r.config.keys())
def test_both_spellings_of_the_rotary_parameters_say_the_same(recipe: Recipe) -> None:
    """transformers 4.x reads rope_theta, rope_scaling and partial_rotary_factor, 5.x rope_parameters."""
    config = recipe.config
    apart = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}
    assert apart | (config["rope_scaling"] or {"rope_type": "default"}) == config["rope_parameters"]


@pytest.mark.parametrize("family", [family for family in MODELS if "rope_theta" in fields_of(get(family))])
def test_one_case_has_each_spelling_alone_and_all_others_have_both_or_none(family: str) -> None:
    spelt: dict[frozenset[str], list[str]] = defaultdict(list)
    for recipe in get(family).recipes:
        spelt[frozenset(recipe.config.keys() & ROPE_KEYS)].append(recipe.name)
    both = max(spelt, key=len)
    assert {keys: len(names) for keys, names in spelt.items()} == {
        both: len(get(family).recipes) - 3,
        frozenset({"rope_parameters"}): 1,
        both - {"rope_parameters"}: 1,
        frozenset(): 1,
    }
    assert {"rope_theta", "rope_scaling", "rope_parameters"} <= both
    assert spelt[frozenset()] == [f"{family}/field-absent"]


# --- claims ---------------------------------------------------------------------------------------------------------

# What every family claims in some case.
BASIC = {
    "golden.logits", "golden.loss", "golden.gradients", "cache.prefill_decode", "cache.one_by_one", "cache.chunks",
}  # fmt: skip


@every_recipe
def test_every_claim_is_of_a_check_that_exists_in_dtypes_that_exist(recipe: Recipe) -> None:
    assert recipe.claims
    assert set(recipe.claims) <= set(checks())
    for dtypes in recipe.claims.values():
        assert dtypes
        assert len(set(dtypes)) == len(dtypes)
        assert set(dtypes) <= set(DTYPES)


def test_every_check_is_claimed_by_some_case() -> None:
    assert {check for name in FAMILIES for recipe in get(name).recipes for check in claims(recipe)} == set(checks())


@every_family
def test_every_check_that_applies_is_claimed_by_some_case(family: Family) -> None:
    claimed = {check for recipe in family.recipes for check in recipe.claims}
    assert claimed >= BASIC
    assert claimed & PADDING in (PADDING, set())
    assert ("golden.blocks" in claimed) == (family.block_checkpoint is not None)
    if family.name in (*DECODERS, "transformer"):
        assert claimed >= (FULL_ENCODER_DECODER if family.encoder_decoder else FULL_DECODER).keys()


# What golden make stores for a check.
STORED_FOR = {
    "golden.positions": "positions",
    "golden.loss": "loss",
    "golden.gradients": "gradients",
    "golden.blocks": "blocks",
    "golden.auxiliary_losses": "auxiliary",
    "memory.gradients": "segment_gradients",
}


@every_recipe
def test_what_a_check_needs_is_stored_and_nothing_is_stored_for_no_check(recipe: Recipe) -> None:
    claimed = {needed for check, needed in STORED_FOR.items() if check in recipe.claims}
    assert recipe.store - {"probes"} == claimed


@every_family
def test_probes_are_stored_once_and_with_them_the_gradients(family: Family) -> None:
    assert [r.name for r in family.recipes if "probes" in r.store] == [f"{family.name}/distinct"]
    assert "gradients" in RECIPES[f"{family.name}/distinct"].store


# --- probes ---------------------------------------------------------------------------------------------------------


@every_recipe
def test_probes_have_names_of_the_vocabulary_and_each_name_once(recipe: Recipe) -> None:
    names = [spec.name for spec in specs_of(recipe.name)]
    assert len(set(names)) == len(names)
    assert all(word(name) for name in names)  # raises where there is none
    prefixed = [name.startswith(("encoder.", "decoder.")) for name in names if name != "logits"]
    assert set(prefixed) == {family_of(recipe).encoder_decoder}


@every_recipe
def test_probes_stand_after_their_parents_and_only_embeddings_have_none(recipe: Recipe) -> None:
    """And what follows from positions alone, whatever the batch is."""
    seen: set[str] = set()
    for spec in specs_of(recipe.name):
        assert set(spec.parents) <= seen, spec.name
        embedding, positions = spec.name.endswith("embedding"), "batch" not in spec.axes
        assert positions or bool(spec.parents) != embedding, spec.name
        assert len(set(spec.parents)) == len(spec.parents), spec.name
        seen.add(spec.name)


@every_recipe
def test_every_probe_leads_to_the_logits(recipe: Recipe) -> None:
    specs = specs_of(recipe.name)
    assert specs[-1].name == "logits"
    needed = {"logits"}
    for spec in reversed(specs):
        assert spec.name in needed, spec.name
        needed |= set(spec.parents)


@every_recipe
def test_axes_of_a_probe_are_distinct_and_have_sizes(recipe: Recipe) -> None:
    axis = axes_of(family_of(recipe), recipe.config, recipe)
    for spec in specs_of(recipe.name):
        assert len(set(spec.axes)) == len(spec.axes), spec.name
        assert all(axis[name] > 0 for name in spec.axes), spec.name


@every_recipe
def test_every_probe_is_at_a_module_boundary_or_in_the_kernel_and_not_in_both(recipe: Recipe) -> None:
    family = family_of(recipe)
    boundaries, kernel = family.module_probes(recipe.config), family.kernel_probes(recipe.config)
    assert boundaries.keys() & kernel.keys() == set()
    assert boundaries.keys() | kernel.keys() == {spec.name for spec in specs_of(recipe.name)}
    assert len(set(boundaries.values())) == len(boundaries)
