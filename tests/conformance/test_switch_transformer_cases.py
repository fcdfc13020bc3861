"""Switch Transformer's recipes obey the config rules: what hides mistakes elsewhere does not occur in these."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import Recipe, get
from conformance.golden.model import draw_inputs, draw_weights
from conformance.implementations import reference
from conformance.probes import word

transformers = pytest.importorskip("transformers")

FAMILY = get("switch_transformer")
RECIPES = {recipe.name.split("/")[1]: recipe for recipe in FAMILY.recipes}
FIELD_RECIPES = [recipe for recipe in FAMILY.recipes if recipe.field]
PLAIN, DISTINCT, SQUARE, CAPACITY = (RECIPES[name] for name in ("plain", "distinct", "square", "capacity"))
IGNORING_PADS = RECIPES["field-router_ignore_padding_tokens"]

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def sizes(recipe: Recipe) -> dict[str, int | None]:
    """Every size that a tensor of the forward pass can have, by what it counts."""
    config = recipe.config
    return {
        "batch": recipe.batch, "source": recipe.seq, "target": recipe.target, "vocab": config["vocab_size"],
        "hidden": config["d_model"], "ffn": config["d_ff"], "heads": config["num_heads"], "head_dim": config["d_kv"],
        "inner": config["num_heads"] * config["d_kv"], "experts": config["num_experts"],
        "buckets": config["relative_attention_num_buckets"],
    }  # fmt: skip


def calls(recipe: Recipe) -> dict[str, Tensor]:
    inputs = draw_inputs(recipe)
    return {name: inputs[name] for name in ("input_ids", "decoder_input_ids")}


def demand(recipe: Recipe) -> dict[str, Tensor]:
    """Of each router: how many tokens of each row choose each expert, (batch, experts)."""
    probes = reference.probes(FAMILY, recipe.config, draw_weights(FAMILY, recipe), **calls(recipe))
    return {
        name: torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).sum(1)
        for name, logits in probes.items()
        if name.endswith("router_logits")
    }


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_distinct_has_the_sizes_that_are_meant() -> None:
    assert sizes(DISTINCT) == {
        "batch": 4, "source": 11, "target": 9, "vocab": 47, "hidden": 18, "ffn": 13, "heads": 3, "head_dim": 7,
        "inner": 21, "experts": 6, "buckets": 10,
    }  # fmt: skip


@pytest.mark.parametrize(("first", "second"), list(combinations(sizes(DISTINCT), 2)))
def test_distinct_has_no_two_sizes_that_could_be_confused(first: str, second: str) -> None:
    assert sizes(DISTINCT)[first] != sizes(DISTINCT)[second]


def test_square_has_every_matrix_square_but_for_tables_of_heads_and_experts() -> None:
    assert set(FAMILY.tensor_shapes(SQUARE.config).values()) == {(24, 24), (24,), (32, 4), (4, 24)}


def test_distinct_has_blocks_of_both_kinds_and_another_step_in_encoder_and_decoder() -> None:
    names = FAMILY.tensor_shapes(DISTINCT.config)
    assert [f"encoder.block.{n}.layer.1.mlp.wi.weight" in names for n in range(4)] == [True, False, True, False]
    assert [f"decoder.block.{n}.layer.2.mlp.wi.weight" in names for n in range(3)] == [True, False, True]


def test_a_step_of_3_and_one_of_the_last_block_of_three_differ() -> None:
    """Block 1 is sparse (i mod step = 1), not block 2 ((i + 1) mod step = 0)."""
    names = FAMILY.tensor_shapes(PLAIN.config)
    assert [f"encoder.block.{n}.layer.1.mlp.wi.weight" in names for n in range(3)] == [True, False, True]


@every_recipe
def test_dropout_and_jitter_are_in_every_config(recipe: Recipe) -> None:
    """A candidate that applies them in evaluation fails.  `field-absent` leaves them at their defaults."""
    absent = {"dropout_rate": 0.1, "router_jitter_noise": 0.01}
    assert all((recipe.config | absent if recipe.name.endswith("absent") else recipe.config)[key] > 0 for key in absent)


# --- capacity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [CAPACITY, DISTINCT], ids=["capacity", "distinct"])
def test_experts_are_asked_for_too_much_in_several_rows_of_encoder_and_decoder(recipe: Recipe) -> None:
    routers = demand(recipe)
    assert {name.split(".")[0] for name in routers} == {"encoder", "decoder"}
    for wanted in routers.values():
        overfull = (wanted > recipe.config["expert_capacity"]).any(dim=1)
        assert overfull.sum() >= 2
        assert (wanted.sum(0) > 0).sum() >= 2  # not all tokens go to one expert


@every_recipe
def test_padding_and_decoding_are_claimed_only_where_no_token_can_be_dropped(recipe: Recipe) -> None:
    claimed = {check for check in recipe.claims if "padding" in check or check.startswith("cache.")}
    room_for_all = recipe.config.get("expert_capacity", 64) >= max(recipe.seq, recipe.target or 0)
    if recipe is IGNORING_PADS:
        assert claimed == {"golden.left_padding", "golden.right_padding"}
    else:
        assert bool(claimed) == room_for_all


def test_pads_that_take_room_change_the_rows_of_the_case_that_ignores_them() -> None:
    from conformance.suite.padding import padded

    inputs = draw_inputs(IGNORING_PADS)
    weights = draw_weights(FAMILY, IGNORING_PADS)
    batch = padded(inputs, torch.zeros(4, 9, 61), "left")
    routed = reference.logits(CAPACITY.config, weights, **batch.arguments)
    ignored = reference.logits(IGNORING_PADS.config, weights, **batch.arguments)
    moved = (routed - ignored)[batch.mask.bool()].abs().amax(-1) / ignored.abs().max()
    assert (moved > 1e-3).sum() >= 10


# --- fields ---------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers",
}  # fmt: skip

# Keys of Hugging Face's config that cannot change a forward pass in evaluation, and why not.
WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "model_type", "transformers_version",  # what it is called
    "dtype",  # how it is stored; the implementation is told what to run in
    "dropout_rate", "router_jitter_noise",  # in training only
    "router_aux_loss_coef", "router_z_loss_coef",  # of losses
    "router_dtype",  # a policy of precision; the paper's is float32
    "initializer_factor",  # before training only
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",  # in generation
    "use_cache", "return_dict", "output_hidden_states", "output_attentions", "add_router_probs",  # what is returned
    "chunk_size_feed_forward",  # the order of computation; Switch ignores it
    "is_encoder_decoder", "is_decoder", "add_cross_attention",  # no other value is a whole Switch
    "id2label", "label2id", "problem_type",  # classification heads
}  # fmt: skip


def test_every_key_of_hugging_face_is_a_field_a_size_or_known_to_have_no_effect() -> None:
    """A key that a new release adds must be sorted into one of the three."""
    keys = set(transformers.SwitchTransformersConfig().to_dict())
    assert keys - {field.name for field in FAMILY.fields} - SIZES - WITHOUT_EFFECT == set()


def test_every_field_is_a_key_that_hugging_face_knows() -> None:
    keys = set(transformers.SwitchTransformersConfig().to_dict())
    assert {field.name for field in FAMILY.fields} - keys == set()


@pytest.mark.parametrize("field", [field.name for field in FAMILY.fields])
def test_every_field_has_a_case_that_moves_it_and_says_so(field: str) -> None:
    moving = [r for r in FIELD_RECIPES if field in (r.field or "").split(" ")]
    assert [r for r in moving if r.config.get(field) != PLAIN.config.get(field)]


@pytest.mark.parametrize("recipe", FIELD_RECIPES, ids=lambda r: r.name)
def test_field_case_moves_its_field_and_what_follows_from_it(recipe: Recipe) -> None:
    keys = recipe.config.keys() | PLAIN.config.keys()
    moved = {key for key in keys if recipe.config.get(key) != PLAIN.config.get(key)}
    steps = {
        "num_sparse_encoder_layers": {"encoder_sparse_step"},
        "num_sparse_decoder_layers": {"decoder_sparse_step"},
        "num_decoder_layers": {"decoder_sparse_step"},
        "expert_capacity": {"num_experts"},  # so few that they overflow
        "router_ignore_padding_tokens": {"num_experts", "expert_capacity"},
    }
    if recipe.field == "absent keys":
        assert recipe.config.items() <= PLAIN.config.items()
    else:
        fields = set((recipe.field or "").split(" and "))
        assert moved == fields | set().union(*(steps.get(field, set()) for field in fields))


def test_absent_case_is_plain_to_hugging_face() -> None:
    absent, plain = (
        transformers.SwitchTransformersConfig.from_dict(dict(RECIPES[n].config)).to_dict()
        for n in ("field-absent", "plain")
    )
    assert {key for key, value in absent.items() if plain[key] != value} <= WITHOUT_EFFECT


# What forbids that a candidate that ignores the field loads the checkpoint, or sees a difference in one full forward.
CANNOT_BE_IGNORED = {
    "num_experts", "num_sparse_encoder_layers", "num_sparse_decoder_layers",
    "encoder_sparse_step and decoder_sparse_step", "relative_attention_num_buckets", "absent keys",
    "router_ignore_padding_tokens",
}  # fmt: skip


@pytest.mark.parametrize("recipe", FIELD_RECIPES, ids=lambda r: r.name)
def test_field_case_knows_what_ignoring_its_field_gives(recipe: Recipe) -> None:
    ignored = f"{recipe.field} ignored" in recipe.counterfactuals
    assert ignored != (recipe.field in CANNOT_BE_IGNORED)


# --- checkpoint and probes ------------------------------------------------------------------------------------------


@every_recipe
def test_checkpoint_holds_the_tensors_that_hugging_face_has(recipe: Recipe) -> None:
    with torch.device("meta"):
        config = transformers.SwitchTransformersConfig.from_dict(dict(recipe.config))
        model = transformers.SwitchTransformersForConditionalGeneration(config)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert FAMILY.tensor_shapes(recipe.config) == theirs


def test_untied_tables_of_encoder_and_decoder_are_copies_of_the_shared_one() -> None:
    weights = draw_weights(FAMILY, RECIPES["field-tie_word_embeddings"])
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        assert weights[name].equal(weights["shared.weight"])
    assert not weights["lm_head.weight"].equal(weights["shared.weight"])


@every_recipe
def test_no_other_two_tensors_are_equal_and_none_is_at_its_initial_value(recipe: Recipe) -> None:
    weights = {n: t for n, t in draw_weights(FAMILY, recipe).items() if not n.endswith("embed_tokens.weight")}
    assert [(a, b) for a, b in combinations(weights, 2) if torch.equal(weights[a], weights[b])] == []
    assert [name for name, tensor in weights.items() if tensor.unique().numel() < 2] == []


@every_recipe
def test_probes_have_vocabulary_names_stand_after_their_parents_and_lead_to_the_logits(recipe: Recipe) -> None:
    specs = FAMILY.probes(recipe.config)
    seen: set[str] = set()
    for spec in specs:
        word(spec.name)
        assert spec.name not in seen
        assert set(spec.parents) <= seen
        assert bool(spec.parents) == (not spec.name.endswith("embedding"))
        seen.add(spec.name)
    needed: set[str] = {"logits"}
    for spec in reversed(specs):
        assert spec.name in needed
        needed |= set(spec.parents)


@every_recipe
def test_every_probe_has_one_place_where_it_is_seen(recipe: Recipe) -> None:
    places: dict[str, Any] = FAMILY.module_probes(recipe.config)
    inside = FAMILY.kernel_probes(recipe.config)
    assert not places.keys() & inside.keys()
    assert places.keys() | inside.keys() == {spec.name for spec in FAMILY.probes(recipe.config)}


STORED_FOR = {
    "golden.loss": "loss", "golden.gradients": "gradients", "golden.auxiliary_losses": "auxiliary",
}  # fmt: skip


@every_recipe
def test_what_a_check_needs_is_stored_and_nothing_is_stored_for_no_check(recipe: Recipe) -> None:
    claimed = {needed for check, needed in STORED_FOR.items() if check in recipe.claims}
    assert recipe.store - {"probes"} == claimed
