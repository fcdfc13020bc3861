"""Rotary positions in either layout, on whole heads or on their first elements, from positions to rotated heads.

The functions of `rotary` put together; what is added here is the interleaved layout.

Shapes: B batch, T tokens, H heads, Dh head_dim, R rotary_dim (the elements of a head that turn).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reference_impl.nn import rotary


def rotate_interleaved(
    x: Float[Tensor, "batch heads seq head_dim"],
    cos: Float[Tensor, "#batch seq half"],
    sin: Float[Tensor, "#batch seq half"],
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turns each pair (x_2j, x_{2j+1}) by its angle φ_j = position · θ_j.

        y_2j     = x_2j · cos φ_j     − x_{2j+1} · sin φ_j
        y_{2j+1} = x_{2j+1} · cos φ_j + x_2j     · sin φ_j

    Su et al. 2021 (arXiv:2104.09864), equation 34, with the paper's own pairs: neighbours. Meta's original Llama files
    and GPT-J store them so. `rotary.rotate` pairs j with j + Dh/2. Arithmetic is in the dtype of `x`.
    """
    cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, Dh/2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(dim=-1)  # (B, H, T, Dh/2) each
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(start_dim=-2)


# layout → what turns a head
LAYOUTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "halves": rotary.rotate,
    "interleaved": rotate_interleaved,
}


def apply_rotary(
    x: Float[Tensor, "batch heads seq head_dim"],
    position_ids: Int[Tensor, "batch seq"],
    rope_theta: float,
    rotary_dim: int,
    layout: str,
    rope_scaling: Mapping[str, Any] | None = None,
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turns the first `rotary_dim` elements of each head by angles that grow with the position; the others pass.

    The turned part is a small head of its own: θ_j = rope_theta^(−2j / rotary_dim), and with `layout` "halves" j is
    paired with j + rotary_dim/2. Angles are computed in float32, or float64 for float64 `x`; cosine, sine and the
    rotation are in the dtype of `x`.

    Args:
        layout: "halves" (Hugging Face, GPT-NeoX) or "interleaved" (the paper, Meta, GPT-J).
        rope_scaling: {"rope_type": "linear", "factor": …} or {"rope_type": "llama3", …} as in config.json; None: none.

    Raises:
        ValueError: the layout is unknown, `rotary_dim` is odd or larger than a head, or the scaling is not understood.
    """
    head_dim = x.shape[-1]
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; use one of {sorted(LAYOUTS)}")
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(f"rotary_dim={rotary_dim} must be even and in 2 … head_dim={head_dim}")
    scaling = rotary.read_scaling(rope_scaling, "rope_scaling") if rope_scaling else None
    cos, sin = rotary.tables(position_ids, rotary_dim, rope_theta, scaling, dtype=x.dtype)
    turned = LAYOUTS[layout](x[..., :rotary_dim], cos, sin)
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)
