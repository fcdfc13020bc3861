from dataclasses import dataclass

import pytest

from reference_impl import config
from reference_impl.models.gpt2 import GPT2Config
from reference_impl.models.phi import PhiConfig


@dataclass(frozen=True, kw_only=True)
class Sizes:
    width: int = 12
    scale: float = 0.5
    window: int | None = 4
    part: int = config.DERIVED


def read(values):
    return config.read_fields(Sizes, values, elsewhere={"note"})


def test_only_given_fields_are_read():
    assert read({"width": 3, "note": "anything"}) == {"width": 3}


def test_a_null_is_a_value_where_the_type_allows_it():
    assert read({"window": None}) == {"window": None}


def test_a_null_leaves_a_derived_field_to_be_derived():
    assert read({"part": None}) == {}


def test_an_int_may_stand_for_a_float():
    assert type(read({"scale": 2})["scale"]) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"breadth": 3}, r"unknown keys \['breadth'\]"),
        ({"width": None}, "width=None must be of type int"),
        ({"width": True}, "width=True must be of type int"),
        ({"width": 3.0}, r"width=3\.0 must be of type int"),
        ({"window": "4"}, r"window='4' must be of type int \| None"),
        ({"window": False}, r"window=False must be of type int \| None"),
    ],
    ids=str,
)
def test_what_is_not_a_field_or_not_of_its_type_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        read(values)


def test_a_file_of_another_family_is_refused_and_one_that_does_not_say_is_not():
    config.require_model_type({}, "llama")
    with pytest.raises(ValueError, match="model_type='gpt2' is not 'llama'"):
        config.require_model_type({"model_type": "gpt2"}, "llama")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("but", [(), ("scale",)], ids=str)
def test_numbers_must_be_finite(value, but):
    """json reads NaN, Infinity and 1e999."""
    with pytest.raises(ValueError, match=f"scale={value} must be finite"):
        config.require_positive(Sizes(scale=value, part=1), but=but)


@pytest.mark.parametrize("changes", [{"width": 0}, {"scale": -0.5}, {"window": 0}], ids=str)
def test_numbers_must_be_positive(changes):
    config.require_positive(Sizes())
    with pytest.raises(ValueError, match="must be greater than 0"):
        config.require_positive(Sizes(**changes))


def test_numbers_that_are_named_may_be_anything():
    config.require_positive(Sizes(scale=-0.5), but=("scale",))
    with pytest.raises(ValueError, match="width=0 must be greater than 0"):
        config.require_positive(Sizes(width=0, scale=-0.5), but=("scale",))


def test_division_with_a_rest_is_refused_with_both_numbers():
    config.require_divisible(Sizes(part=4), "width", "part", "")
    with pytest.raises(ValueError, match="width=12 must be divisible by part=5; give a divisor of it"):
        config.require_divisible(Sizes(part=5), "width", "part", "give a divisor of it")


def test_keys_that_the_hub_s_files_have_are_known():
    """distilgpt2 has `_num_labels`, Phi's first releases have `auto_map`."""
    assert GPT2Config.from_dict({"model_type": "gpt2", "_num_labels": 1, "n_layer": 6}).n_layer == 6
    auto_map = {"AutoConfig": "configuration_phi.PhiConfig"}
    assert PhiConfig.from_dict({"model_type": "phi", "auto_map": auto_map, "vocab_size": 51200}).vocab_size == 51200
