"""What the config classes of the families share: reading config.json strictly.

A key that is not understood may change the result, so it is refused by name rather than ignored.
"""

from collections.abc import Mapping, Set
from dataclasses import Field, asdict, fields
from typing import Any

# Keys of config.json that say nothing about what a forward pass of any decoder computes.
KEYS_WITHOUT_EFFECT = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype",
    "eos_token_id", "id2label", "initializer_range", "label2id", "max_position_embeddings", "model_type",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype",
    "transformers_version", "unk_token_id", "use_cache",
})  # fmt: skip

# The default of a field that __post_init__ derives from others.
DERIVED: Any = None


def read_fields(
    config_class: type[Any],
    config: Mapping[str, Any],
    *,
    model_type: str,
    without_effect: Set[str],
    elsewhere: Set[str],
) -> dict[str, Any]:
    """The keys of a parsed config.json that are fields of `config_class`, checked and typed.

    A null leaves a field whose default is `DERIVED` to be derived.

    Args:
        without_effect: the keys that change nothing.
        elsewhere: the keys, fields or not, that the caller reads itself; they are not returned.

    Raises:
        ValueError: another `model_type`, an unknown key, or a value of the wrong type.
    """
    if config.get("model_type", model_type) != model_type:
        raise ValueError(f"model_type={config['model_type']!r} is not {model_type!r}")
    unknown = config.keys() - {field.name for field in fields(config_class)} - without_effect - elsewhere
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)} may change the result; remove those that do not")
    given = [field for field in fields(config_class) if field.name in config and field.name not in elsewhere]
    return {field.name: typed(field, config[field.name]) for field in given if config[field.name] is not field.default}


def typed(field: Field[Any], value: Any) -> Any:
    """A value of config.json as the type of its field, where 2 may stand for 2.0."""
    if field.type is float and type(value) is int:
        return float(value)
    if type(value) is not field.type:
        raise ValueError(f"{field.name}={value!r} must be of type {getattr(field.type, '__name__', field.type)}")
    return value


def require_positive(config: Any) -> None:
    """Every number of the dataclass `config` is greater than 0."""
    for name, value in asdict(config).items():
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
            raise ValueError(f"{name}={value} must be greater than 0")


def require_divisible(config: Any, whole: str, part: str, way_out: str) -> None:
    """The field `whole` of `config` is a multiple of its field `part`."""
    a, b = getattr(config, whole), getattr(config, part)
    if a % b:
        raise ValueError(f"{whole}={a} must be divisible by {part}={b}; {way_out}")
