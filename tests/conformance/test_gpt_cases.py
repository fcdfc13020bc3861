"""The recipes of GPT, GPT-2 and GPT-3 obey the config rules: nothing in them hides what other people's tests hide.

Sizes and sets of keys are stated here as literals, so that a change of a recipe that weakens it is noticed.
"""

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch

from conformance.families import Recipe, get
from conformance.golden.model import draw_inputs, draw_weights
from conformance.probes import VOCABULARY
from conformance.suite import checks

transformers = pytest.importorskip("transformers")

from conformance.oracles import oracle_class  # noqa: E402

NAMES = ("gpt", "gpt2", "gpt3")
RECIPES = {recipe.name: recipe for name in NAMES for recipe in get(name).recipes}
FIELD_RECIPES = {name: recipe for name, recipe in RECIPES.items() if recipe.field}

every_family = pytest.mark.parametrize("family", NAMES)
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
every_field_case = pytest.mark.parametrize("recipe", FIELD_RECIPES.values(), ids=FIELD_RECIPES)


def family_of(recipe: Recipe) -> Any:
    return get(recipe.name.split("/")[0])


def plain_of(recipe: Recipe) -> Recipe:
    return RECIPES[recipe.name.split("/")[0] + "/plain"]


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


@every_recipe
def test_every_case_has_two_layers_or_more(recipe: Recipe) -> None:
    assert recipe.config["n_layer"] >= 2


@every_recipe
def test_every_case_has_dropout_in_its_config(recipe: Recipe) -> None:
    """A candidate that applies it in evaluation fails.  `field-absent` has nothing that has a default."""
    dropouts = [recipe.config.get(key, 0.0) for key in ("attn_pdrop", "embd_pdrop", "resid_pdrop")]
    assert min(dropouts) > 0 or recipe.name.endswith("/field-absent")


@every_family
def test_deep_case_fills_the_context(family: str) -> None:
    recipe = RECIPES[f"{family}/deep"]
    assert recipe.seq == recipe.config["n_positions"]


BANDED = {n: r for n, r in RECIPES.items() if "banded" in r.config.get("attention_pattern", []) and r.seq > 11}


@pytest.mark.parametrize("recipe", BANDED.values(), ids=BANDED)
def test_a_text_is_twice_as_long_as_the_band_and_longer(recipe: Recipe) -> None:
    assert recipe.seq > 2 * recipe.config["window_size"] >= 6


# --- inputs and weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES.values() if "positions" in r.store], ids=lambda recipe: recipe.name
)
def test_explicit_positions_rise_jump_and_stay_in_the_table(recipe: Recipe) -> None:
    positions = draw_inputs(recipe)["position_ids"].tolist()
    assert positions[0][:2] == [0, 1]
    assert all(earlier < later for row in positions for earlier, later in pairwise(row))
    assert all(max(later - earlier for earlier, later in pairwise(row)) > 1 for row in positions)
    assert len({tuple(row) for row in positions}) == recipe.batch
    assert recipe.seq < max(map(max, positions)) < recipe.config["n_positions"]


@every_recipe
def test_pads_hold_ids_that_no_real_token_has(recipe: Recipe) -> None:
    inputs = draw_inputs(recipe)
    real, junk = set(inputs["input_ids"].flatten().tolist()), set(inputs["padding_ids"].flatten().tolist())
    assert real & junk == set()
    assert len(junk) >= 2
    assert all(0 <= token < recipe.config["vocab_size"] for token in real | junk)


@every_recipe
def test_nothing_keeps_the_value_that_a_library_starts_it_at(recipe: Recipe) -> None:
    """Norm weights start at 1, biases at 0; that the modules' names do not say what they are must not matter."""
    for name, tensor in draw_weights(family_of(recipe), recipe).items():
        initial = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        assert (tensor == initial).float().mean() < 0.1, name
        assert recipe.scaled or tensor.mean().item() == pytest.approx(initial, abs=0.25), name


@every_family
def test_projections_are_drawn_for_the_inputs_that_they_have(family: str) -> None:
    """Standard deviation 1.5 / √inputs, and a projection is stored (in, out)."""
    recipe = RECIPES[f"{family}/plain"]
    weights = draw_weights(get(family), recipe)
    for name, inputs in (("attn.c_attn", recipe.config["n_embd"]), ("mlp.c_proj", 4 * recipe.config["n_embd"])):
        weight = weights[f"transformer.h.0.{name}.weight"]
        assert weight.shape[0] == inputs
        assert weight.std().item() == pytest.approx(1.5 / inputs**0.5, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_recipe
def test_weights_are_exact_in_low_precision(recipe: Recipe, dtype: torch.dtype) -> None:
    weights = draw_weights(family_of(recipe), recipe)
    assert [name for name, tensor in weights.items() if not tensor.to(dtype).float().equal(tensor)] == []


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

HUB = {name: recipe for name, recipe in RECIPES.items() if not name.startswith("gpt3/")}  # Hugging Face never had GPT-3


@pytest.mark.parametrize("recipe", HUB.values(), ids=HUB)
def test_checkpoint_holds_the_tensors_that_hugging_face_has(recipe: Recipe) -> None:
    architecture = getattr(transformers, family_of(recipe).oracle)
    with torch.device("meta"):
        model = architecture(architecture.config_class.from_dict(dict(recipe.config)))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert family_of(recipe).tensor_shapes(recipe.config) == theirs


@every_family
def test_gpt3_holds_the_tensors_of_gpt2(family: str) -> None:
    if family == "gpt3":
        config = RECIPES["gpt3/plain"].config
        assert get("gpt3").tensor_shapes(config) == get("gpt2").tensor_shapes(config)


@every_family
@pytest.mark.parametrize("layer", [0, 1])
def test_block_checkpoint_is_a_one_layer_checkpoint_of_that_block(family: str, layer: int) -> None:
    found, recipe = get(family), RECIPES[f"{family}/distinct"]
    weights = draw_weights(found, recipe)
    hidden, tokens = recipe.config["n_embd"], recipe.batch * recipe.seq
    block_input = torch.arange(float(tokens * hidden)).view(recipe.batch, recipe.seq, hidden)
    config, block = found.block_checkpoint(recipe.config, weights, block_input, layer)
    assert {name: tuple(t.shape) for name, t in block.items()} == found.tensor_shapes(config)
    assert (config["n_layer"], config["vocab_size"]) == (1, tokens)
    table, places = ("tokens_embed", "positions_embed") if family == "gpt" else ("wte", "wpe")
    assert block[f"transformer.{table}.weight"].equal(block_input.flatten(0, 1))
    assert not block[f"transformer.{places}.weight"].any()
    changed = [
        name
        for name, tensor in block.items()
        if ".h." in name and not tensor.equal(weights[name.replace("h.0.", f"h.{layer}.")])
    ]
    scaled = family == "gpt2" and layer == 1  # the layer's number is folded into its queries
    assert set(changed) == ({f"transformer.h.0.attn.c_attn.{kind}" for kind in ("weight", "bias")} if scaled else set())


def test_a_block_of_its_own_head_needs_a_vocabulary_of_as_many_ids() -> None:
    recipe = RECIPES["gpt2/field-tie_word_embeddings"]
    weights = draw_weights(get("gpt2"), recipe)
    with pytest.raises(ValueError, match="52 block inputs need a vocabulary of as many, the case has 47"):
        get("gpt2").block_checkpoint(recipe.config, weights, torch.zeros(4, 13, 30), 0)


# --- fields and keys ------------------------------------------------------------------------------------------------

SIZE_KEYS = {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head"}

# Keys of Hugging Face's configs that cannot change a forward pass in evaluation, and why not.
WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "model_type", "transformers_version",  # what it is called
    "dtype",  # how it is stored; the implementation is told what to run in
    "attn_pdrop", "embd_pdrop", "resid_pdrop",  # in training only
    "initializer_range",  # before training only
    "bos_token_id", "eos_token_id", "pad_token_id",  # in generation
    "use_cache", "return_dict", "output_hidden_states", "output_attentions",  # what is returned
    "chunk_size_feed_forward",  # the order of computation; both ignore it
    "is_encoder_decoder", "add_cross_attention",  # no other value is a decoder that stands alone
    "id2label", "label2id", "problem_type",  # classification heads
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "reorder_and_upcast_attn",  # precision only: it has a case that stresses float16, and is no field
}  # fmt: skip


@pytest.mark.parametrize("family", ["gpt", "gpt2"])
def test_every_key_of_hugging_face_is_a_field_a_size_or_known_to_have_no_effect(family: str) -> None:
    """A key that a new release adds must be sorted into one of the three."""
    keys = set(getattr(transformers, get(family).oracle).config_class().to_dict())
    assert keys - {field.name for field in get(family).fields} - SIZE_KEYS - WITHOUT_EFFECT == set()


@every_family
def test_every_field_has_a_case_that_moves_it_and_says_so(family: str) -> None:
    plain = RECIPES[f"{family}/plain"].config
    moved = {r.field for r in get(family).recipes if r.field and r.config.get(r.field) != plain.get(r.field)}
    assert {field.name for field in get(family).fields} == moved


@every_field_case
def test_field_case_moves_its_field_alone(recipe: Recipe) -> None:
    plain = plain_of(recipe).config
    moved = {key for key in recipe.config.keys() | plain.keys() if recipe.config.get(key) != plain.get(key)}
    if recipe.name.endswith("/field-absent"):
        assert recipe.config.items() <= plain.items()
    else:
        assert moved <= {recipe.field}


# The tensors' shapes forbid to ignore n_inner; GELU's two forms differ by less than a working dtype shows, and say so.
TOLD_OTHERWISE = {"n_inner", "absent keys"}
GELU_FORMS = {"gpt/field-afn-gelu", "gpt2/field-activation_function-gelu"}


@every_field_case
def test_field_case_knows_what_ignoring_its_field_gives(recipe: Recipe) -> None:
    ignored = f"{recipe.field} ignored" in recipe.counterfactuals
    assert ignored != (recipe.field in TOLD_OTHERWISE or recipe.name in GELU_FORMS)
    assert recipe.counterfactuals or recipe.field == "n_inner"


@every_family
def test_absent_case_leaves_out_every_key_that_has_a_default(family: str) -> None:
    kept = {"architectures", "model_type", "bos_token_id", "eos_token_id", "torch_dtype", "window_size"}
    assert SIZE_KEYS <= set(RECIPES[f"{family}/field-absent"].config) <= SIZE_KEYS | kept


# --- claims and probes ----------------------------------------------------------------------------------------------

STORED_FOR = {
    "golden.positions": "positions",
    "golden.loss": "loss",
    "golden.gradients": "gradients",
    "golden.blocks": "blocks",
}


@every_recipe
def test_every_claim_is_of_a_check_that_exists_in_dtypes_that_exist(recipe: Recipe) -> None:
    assert recipe.claims
    assert set(recipe.claims) <= set(checks())
    for dtypes in recipe.claims.values():
        assert dtypes
        assert set(dtypes) <= {"float64", "float32", "bfloat16", "float16"}


@every_family
def test_every_check_of_models_is_claimed_by_some_case(family: str) -> None:
    llama = {check for recipe in get("llama").recipes for check in recipe.claims}
    assert {check for recipe in get(family).recipes for check in recipe.claims} == llama


@every_recipe
def test_what_a_check_needs_is_stored_and_nothing_is_stored_for_no_check(recipe: Recipe) -> None:
    claimed = {needed for check, needed in STORED_FOR.items() if check in recipe.claims}
    assert recipe.store - {"probes"} == claimed


@every_recipe
def test_probes_have_vocabulary_names_stand_after_their_parents_and_lead_to_the_logits(recipe: Recipe) -> None:
    specs = family_of(recipe).probes(recipe.config)
    known = {name.replace("layers.N.", f"layers.{n}.") for name in VOCABULARY for n in range(recipe.config["n_layer"])}
    seen: set[str] = set()
    for spec in specs:
        assert spec.name in known - seen
        assert set(spec.parents) <= seen
        assert bool(spec.parents) == (spec.name != "embedding")
        seen.add(spec.name)
    needed = {"logits"}
    for spec in reversed(specs):
        assert spec.name in needed
        needed |= set(spec.parents)


@every_recipe
def test_every_probe_is_at_a_module_boundary_or_in_the_kernel_and_not_in_both(recipe: Recipe) -> None:
    family = family_of(recipe)
    boundaries, kernel = family.module_probes(recipe.config), family.kernel_probes(recipe.config)
    assert boundaries.keys() & kernel.keys() == set()
    assert boundaries.keys() | kernel.keys() == {spec.name for spec in family.probes(recipe.config)}
