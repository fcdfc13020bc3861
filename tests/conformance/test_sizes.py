"""The published sizes are those of Hugging Face's models and of the reference, and what the papers print.

Everything is built on the meta device: no memory is used for the 175 billion parameters.
"""

import json
import math
from importlib import import_module
from typing import Any

import pytest
import torch

from conformance.families import FAMILIES, get
from conformance.oracles import oracle_missing
from conformance.sizes import PUBLISHED, Published, read_figure

every_model = pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.name)

Shapes = dict[str, tuple[int, ...]]

# Hugging Face has no GPT-3.  Which keys a query sees is no parameter: GPT-2 at its sizes has the same tensors.
GPT3_AS_GPT2 = {"model_type": "gpt2", "attention_pattern": None, "window_size": None}


def shapes_of(model: torch.nn.Module) -> Shapes:
    """Every parameter once, by its first name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def reference(model: Published) -> Shapes:
    from reference_impl.checkpoint import FAMILIES

    module_name, config_class, model_class = FAMILIES[model.config["model_type"]]
    module = import_module(module_name)
    config = getattr(module, config_class).from_dict(model.config)
    with torch.device("meta"):
        return shapes_of(getattr(module, model_class)(config))


def hugging_face(model: Published) -> Shapes:
    """By the names that the library saves: those of the hub, also where it fuses tensors in memory (Mixtral)."""
    transformers = pytest.importorskip("transformers")
    if missing := oracle_missing(model.family):
        pytest.skip(f"{model.family} {missing}")
    from transformers.core_model_loading import revert_weight_conversion

    name, config = get(model.family).oracle, dict(model.config)
    if model.family == "gpt3":
        name, config = "GPT2LMHeadModel", {k: v for k, v in (config | GPT3_AS_GPT2).items() if v is not None}
    architecture: Any = getattr(transformers, name, None)
    if architecture is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with torch.device("meta"):
        built = architecture(architecture.config_class.from_dict(config))
        saved = revert_weight_conversion(built, dict(built.named_parameters()))
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}


# --- the models -----------------------------------------------------------------------------------------------------


@every_model
def test_reference_has_the_parameters_of_hugging_face_by_name_and_shape(model: Published) -> None:
    assert reference(model) == hugging_face(model)


@every_model
def test_reference_has_as_many_parameters_as_are_stated(model: Published) -> None:
    assert count(reference(model)) == model.parameters


@every_model
def test_hugging_face_has_as_many_parameters_as_are_stated(model: Published) -> None:
    assert count(hugging_face(model)) == model.parameters


@every_model
def test_family_says_that_a_checkpoint_holds_these_tensors(model: Published) -> None:
    assert get(model.family).tensor_shapes(dict(model.config)) == reference(model)


@pytest.mark.parametrize("model", [m for m in PUBLISHED if m.printed], ids=lambda model: model.name)
def test_paper_prints_this_number_rounded_or_cut(model: Published) -> None:
    shapes = reference(model)
    assert model.printed is not None
    printed, last_digit = read_figure(model.printed)
    counted = model.parameters - sum(math.prod(shapes[name]) for name in model.omitted)
    assert abs(counted - printed) < last_digit


@pytest.mark.parametrize(
    ("model", "figure"),
    [pytest.param(m, figure, id=f"{m.name}-{figure}") for m in PUBLISHED for figure in m.contradicted],
)
def test_contradicted_figure_is_another_number(model: Published, figure: str) -> None:
    printed, last_digit = read_figure(figure)
    assert abs(model.parameters - printed) >= last_digit


@pytest.mark.parametrize("model", [m for m in PUBLISHED if m.omitted], ids=lambda model: model.name)
def test_nothing_is_omitted_without_need(model: Published) -> None:
    assert model.printed is not None
    printed, last_digit = read_figure(model.printed)
    assert abs(model.parameters - printed) >= last_digit


@pytest.mark.parametrize("model", [m for m in PUBLISHED if m.family == "llama"], ids=lambda model: model.name)
def test_llama_feed_forward_width_is_two_thirds_of_four_times_the_width_rounded_up(model: Published) -> None:
    width = 2 * 4 * model.config["hidden_size"] // 3
    multiple = 256
    if model.name == "Llama 2 70B":
        width, multiple = int(1.3 * width), 4096
    assert model.config["intermediate_size"] == -(-width // multiple) * multiple


@pytest.mark.parametrize("model", [m for m in PUBLISHED if m.family.startswith("gpt")], ids=lambda model: model.name)
def test_gpt_has_as_many_parameters_as_its_equations(model: Published) -> None:
    c = model.config
    d = c["n_embd"]
    attention = 3 * (d * d + d) + (d * d + d)
    feed_forward = (d * 4 * d + 4 * d) + (4 * d * d + d)
    norm = 2 * d
    blocks = c["n_layer"] * (attention + feed_forward + 2 * norm)
    final_norm = 0 if model.family == "gpt" else norm
    assert (c["vocab_size"] + c["n_positions"]) * d + blocks + final_norm == model.parameters


@pytest.mark.parametrize("model", [m for m in PUBLISHED if m.family == "gpt2"], ids=lambda model: model.name)
def test_figures_of_gpt2s_paper_are_those_with_the_vocabulary_of_gpt(model: Published) -> None:
    (gpt,) = (m for m in PUBLISHED if m.family == "gpt")
    missing_rows = model.config["vocab_size"] - gpt.config["vocab_size"]
    figure = round((model.parameters - missing_rows * model.config["n_embd"]) / 1e6)
    assert (f"{figure}M",) == model.contradicted


def test_mixtral_uses_as_many_parameters_for_a_token_as_are_announced() -> None:
    (model,) = (m for m in PUBLISHED if m.family == "mixtral")
    experts = range(model.config["num_experts_per_tok"], model.config["num_local_experts"])
    idle = {n: s for n, s in reference(model).items() if any(f".experts.{e}." in n for e in experts)}
    active, last_digit = read_figure("12.9B")
    assert abs(model.parameters - count(idle) - active) < last_digit


@pytest.mark.parametrize(
    ("figure", "width", "inside", "heads", "layers", "step", "experts"),
    [("26B", 1024, 4096, 16, 24, 2, 128), ("1571B", 2080, 6144, 32, 15, 1, 2048)],
    ids=["Switch-Large", "Switch-C"],
)
def test_larger_switches_have_as_many_parameters_as_are_printed(
    figure: str, width: int, inside: int, heads: int, layers: int, step: int, experts: int
) -> None:
    """Fedus et al. 2021, table 9.  They have too many modules to be built, so the tensors are counted."""
    config = {
        "vocab_size": 32128, "d_model": width, "d_kv": 64, "d_ff": inside, "num_heads": heads, "num_layers": layers,
        "num_decoder_layers": layers, "encoder_sparse_step": step, "decoder_sparse_step": step, "num_experts": experts,
    }  # fmt: skip
    printed, last_digit = read_figure(figure)
    assert abs(count(get("switch_transformer").tensor_shapes(config)) - printed) < last_digit


# --- the table ------------------------------------------------------------------------------------------------------


@every_model
def test_entry_belongs_to_a_family_names_its_source_and_is_json(model: Published) -> None:
    assert model.family in FAMILIES
    assert model.source
    assert json.loads(json.dumps(dict(model.config))) == dict(model.config)


def test_names_are_unique() -> None:
    assert len({model.name for model in PUBLISHED}) == len(PUBLISHED)


@pytest.mark.parametrize(
    ("printed", "number", "last_digit"),
    [
        ("6.7B", 6.7e9, 1e8), ("13.0B", 13e9, 1e8), ("13B", 13e9, 1e9), ("70B", 70e9, 1e10), ("175.0B", 175e9, 1e8),
        ("124M", 124e6, 1e6), ("174600M", 174.6e9, 1e8), ("1.5T", 1.5e12, 1e11),
    ],
)  # fmt: skip
def test_figure_is_read_with_its_precision(printed: str, number: float, last_digit: float) -> None:
    assert read_figure(printed) == pytest.approx((number, last_digit), rel=1e-12)
