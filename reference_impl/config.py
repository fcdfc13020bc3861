"""What the configs of all families share: strict reading of config.json, and checks that name what cannot be right."""

import math
from collections.abc import Mapping
from dataclasses import Field, asdict, fields
from typing import Any, get_args

# Keys that say nothing about what a forward pass in evaluation computes, in any family.
WITHOUT_EFFECT = {
    "_attn_implementation_autoset", "_name_or_path", "_num_labels", "architectures", "attention_dropout", "auto_map",
    "bos_token_id", "dtype", "eos_token_id", "id2label", "initializer_range", "label2id", "max_position_embeddings",
    "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict",
    "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip

# The default of a field that __post_init__ derives from others.
DERIVED: Any = None


def require_model_type(config: Mapping[str, Any], model_type: str) -> None:
    """Raises ValueError if the file says that it is of another family; it need not say."""
    if config.get("model_type", model_type) != model_type:
        raise ValueError(f"model_type={config['model_type']!r} is not {model_type!r}")


def read_fields(cls: type, config: Mapping[str, Any], *, elsewhere: set[str]) -> dict[str, Any]:
    """The values that `config` gives to the fields of the dataclass `cls`, by name.

    A null where the field's default is null says nothing: the field is left to be derived.

    Args:
        elsewhere: keys that are known but not read here, because they have no effect or the caller reads them.

    Raises:
        ValueError: a key is neither a field nor in `elsewhere`, or a value has another type than its field.
    """
    unknown = config.keys() - {field.name for field in fields(cls)} - elsewhere
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)} may change the result; remove those that do not")
    given = [field for field in fields(cls) if field.name in config and field.name not in elsewhere]
    return {field.name: typed(field, config[field.name]) for field in given if config[field.name] is not field.default}


def typed(field: Field[Any], value: Any) -> Any:
    """A value of config.json as the type of its field, where 2 may stand for 2.0."""
    kinds = get_args(field.type) or (field.type,)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        raise ValueError(f"{field.name}={value!r} must be of type {getattr(field.type, '__name__', field.type)}")
    return value


def require_positive(config: Any, *, but: tuple[str, ...] = ()) -> None:
    """Raises ValueError if a number among the fields is not finite or, but for those named in `but`, not above 0."""
    for name, value in asdict(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value} must be finite")
        if name not in but and isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
            raise ValueError(f"{name}={value} must be greater than 0")


def require_divisible(config: Any, whole: str, part: str, way_out: str) -> None:
    """Raises ValueError if the field `whole` is not a multiple of the field `part`."""
    a, b = getattr(config, whole), getattr(config, part)
    if a % b:
        raise ValueError(f"{whole}={a} must be divisible by {part}={b}; {way_out}")
