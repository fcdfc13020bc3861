"""Rotary positions: queries and keys are turned by an angle that grows with their position.

Convention: *half-split*. Element j of a head pairs with element j + Dh/2, as in Hugging Face checkpoints; Meta's
original files pair 2j with 2j + 1. The two differ by a permutation of the rows of q_proj and k_proj.

Shapes: B batch, T tokens, H heads, Dh head_dim.
"""

import math
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595, section 3): every position is divided by `factor`."""

    # How many times longer the context becomes.
    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling: slow frequencies are divided by `factor`, fast ones kept, those between interpolated."""

    # What the slow frequencies are divided by.
    factor: float
    # Wavelengths above original_max_position_embeddings / low_freq_factor, in tokens, are slow.
    low_freq_factor: float
    # Wavelengths below original_max_position_embeddings / high_freq_factor, in tokens, are fast.
    high_freq_factor: float
    # Context length of the pre-training, in tokens.
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be greater than low_freq_factor={self.low_freq_factor}"
            )


RopeScaling = LinearScaling | Llama3Scaling | None

# Keys of config.json that `read_rope` reads.
KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}

# rope_type in config.json → the class that holds its parameters
SCALINGS: dict[str, type[LinearScaling] | type[Llama3Scaling] | None] = {
    "default": None,
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
}


def inverse_frequencies(head_dim: int, rope_theta: float, rope_scaling: RopeScaling = None) -> tuple[float, ...]:
    """The angle, in radians a token, by which each of the Dh/2 pairs turns.

        θ_j = rope_theta^(−2j / Dh),   j = 0 … Dh/2 − 1

    Su et al. 2021 (arXiv:2104.09864), section 3.2.2 (there j counts from 1): 10000 → `rope_theta`, d → `head_dim`.

    Python floats, so float64: there is no buffer that loading through the meta device could leave uninitialised.
    """
    frequencies = tuple(rope_theta ** (-2 * j / head_dim) for j in range(head_dim // 2))
    match rope_scaling:
        case LinearScaling():
            return tuple(frequency / rope_scaling.factor for frequency in frequencies)
        case Llama3Scaling():
            return tuple(llama3_frequency(frequency, rope_scaling) for frequency in frequencies)
        case None:
            return frequencies


def llama3_frequency(frequency: float, scaling: Llama3Scaling) -> float:
    """One frequency θ under Llama 3.1's scaling.

        c = original_max_position_embeddings · θ / 2π
        c > high_freq_factor  →  θ              fast: kept
        c < low_freq_factor   →  θ / factor     slow: stretched as by LinearScaling
        between               →  (1 − s) · θ / factor + s · θ,   s = (c − low_freq_factor) / (high − low)

    There is no paper: the rule was published as code with Llama 3.1. c is the number of turns that the pair makes in
    the pre-training context.
    """
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    if turns > scaling.high_freq_factor:
        return frequency
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def tables(
    position_ids: Int[Tensor, "batch seq"],
    head_dim: int,
    rope_theta: float,
    rope_scaling: RopeScaling = None,
    *,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "batch seq half"], Float[Tensor, "batch seq half"]]:
    """Cosine and sine of position · θ_j, for the Dh/2 pairs of a head.

    Angles are computed in float32, or float64 for a float64 `dtype`; only cosine and sine are rounded to `dtype`.
    bfloat16 has no number between 256 and 258, so that positions themselves would collide in it.
    """
    working = torch.promote_types(dtype, torch.float32)
    frequencies = torch.tensor(
        inverse_frequencies(head_dim, rope_theta, rope_scaling), dtype=working, device=position_ids.device
    )
    angles = position_ids[..., None].to(working) * frequencies  # (B, T, Dh/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(
    x: Float[Tensor, "batch heads seq head_dim"],
    cos: Float[Tensor, "#batch seq half"],
    sin: Float[Tensor, "#batch seq half"],
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turns each pair (x_j, x_{j + Dh/2}) by its angle φ_j = position · θ_j.

        y_j        = x_j · cos φ_j        − x_{j + Dh/2} · sin φ_j
        y_{j+Dh/2} = x_{j + Dh/2} · cos φ_j + x_j        · sin φ_j

    Su et al. 2021 (arXiv:2104.09864), equation 34, with half-split pairs. Arithmetic is in the dtype of `x`.
    """
    cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, Dh/2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotary_dim(head_dim: int, partial_rotary_factor: float) -> int:
    """How many elements of a head turn, the first ones: partial_rotary_factor · Dh, cut to an integer (10.5 is 10)."""
    return int(head_dim * partial_rotary_factor)


def rotate_partly(
    x: Float[Tensor, "batch heads seq head_dim"],
    cos: Float[Tensor, "#batch seq half"],
    sin: Float[Tensor, "#batch seq half"],
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turns the first elements of each head, two for each angle, and passes the others on.

    Black et al. 2022, GPT-NeoX-20B (arXiv:2204.06745), section 2.1.1, and Wang & Komatsuzaki 2021, GPT-J. The turned
    part is a small head of its own: its pairs are half of *it* apart, and its frequencies are those of its width. With
    Dh = 10 and 3 angles, elements (0, 3) (1, 4) (2, 5) are pairs and 6 7 8 9 pass.
    """
    width = 2 * cos.shape[-1]
    turned, passed = x[..., :width], x[..., width:]
    return torch.cat((rotate(turned, cos, sin), passed), dim=-1)


# Where 5.x and 4.x keep the parameters of rotary positions, beside the top level of config.json.
ROPE_OBJECTS = ("rope_scaling", "rope_parameters")


def read_rope(
    config: Mapping[str, Any], *, default_theta: float, elsewhere: Set[str] = frozenset()
) -> tuple[float, RopeScaling]:
    """Base and scaling from a config.json, in either spelling that Hugging Face has used.

    transformers 4.x writes `rope_theta` and `rope_scaling`, 5.x both of them inside `rope_parameters`.

    Args:
        elsewhere: parameters that may stand beside the scaling's own and are read by another function.

    Raises:
        ValueError: the spellings disagree, or a rope type, or a parameter of it, is unknown or absent.
    """
    scalings = {}
    for key in ROPE_OBJECTS:
        parameters = config.get(key)
        if isinstance(parameters, Mapping):
            scalings[key] = read_scaling(parameters, key, elsewhere)
        elif parameters is not None:
            raise ValueError(f"{key}={parameters!r} must be an object or null")
        elif key == "rope_scaling" and key in config:
            scalings[key] = None  # how 4.x says "not scaled"; in 5.x a null says nothing
    return read_number(config, "rope_theta", default=default_theta), _agreed(scalings, default=None)


def read_number(config: Mapping[str, Any], name: str, *, default: float) -> float:
    """A number that 4.x writes at the top level of config.json and 5.x inside `rope_parameters`.

    Raises:
        ValueError: it is not positive, or is stated twice and the two disagree.
    """
    places = {"": config} | {f"{key}.": config[key] for key in ROPE_OBJECTS if isinstance(config.get(key), Mapping)}
    stated = {
        f"{place}{name}": _number(f"{place}{name}", values[name]) for place, values in places.items() if name in values
    }
    number: float = _agreed(stated, default=default)
    return number


def read_scaling(parameters: Mapping[str, Any], key: str, elsewhere: Set[str] = frozenset()) -> RopeScaling:
    """The scaling in `rope_scaling` or `rope_parameters` (`key` says which): {"rope_type": "linear", "factor": 2.0}.

    Older files write `type` for `rope_type`; with neither, the type is "default": not scaled.
    """
    types = {f"{key}.{name}": parameters[name] for name in ("rope_type", "type") if name in parameters}
    rope_type = _agreed(types, default="default")
    if rope_type not in SCALINGS:
        raise ValueError(f"{key}: rope_type={rope_type!r} is not implemented; use one of {sorted(SCALINGS)}")
    scaling = SCALINGS[rope_type]
    wanted = {field.name: field.type for field in fields(scaling)} if scaling else {}
    apart = {"rope_type", "type", "rope_theta", *elsewhere}
    given = {name: value for name, value in parameters.items() if name not in apart}
    if wanted.keys() != given.keys():
        raise ValueError(
            f"{key}: rope_type={rope_type!r} takes the parameters {sorted(wanted)}; "
            f"missing {sorted(wanted.keys() - given.keys())}, unknown {sorted(given.keys() - wanted.keys())}"
        )
    numbers = {name: _number(f"{key}.{name}", given[name], kind) for name, kind in wanted.items()}
    return scaling(**numbers) if scaling else None


def write_rope(
    rope_theta: float, rope_scaling: RopeScaling, *, partial_rotary_factor: float | None = None
) -> dict[str, Any]:
    """What `read_rope` and `read_number` read, in both spellings: at the top level, and again in `rope_parameters`."""
    names = {scaling: rope_type for rope_type, scaling in SCALINGS.items()}
    scaling = {"rope_type": names[type(rope_scaling)], **asdict(rope_scaling)} if rope_scaling else None
    numbers = {"rope_theta": rope_theta}
    if partial_rotary_factor is not None:
        numbers["partial_rotary_factor"] = partial_rotary_factor
    return {
        **numbers,
        "rope_scaling": scaling,
        "rope_parameters": {**numbers, **(scaling or {"rope_type": "default"})},
    }


def _agreed(stated: Mapping[str, Any], *, default: Any) -> Any:
    """The one value that was stated, by whichever names; `default` when none was."""
    (first, value), *others = stated.items() or [("default", default)]
    for name, other in others:
        if other != value:
            raise ValueError(f"{first}={value!r} and {name}={other!r} disagree; make them equal or keep one")
    return value


def _number(name: str, value: Any, kind: Any = float) -> Any:
    """A positive number of config.json as a `kind`, int or float; 2 may stand for 2.0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or kind(value) != value:
        raise ValueError(f"{name}={value!r} must be a positive {kind.__name__}")
    return kind(value)
