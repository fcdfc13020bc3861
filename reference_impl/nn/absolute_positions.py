"""Positions that are added to the token embeddings: sinusoids, and a learned table.

Shapes: B batch, T tokens of this call, S tokens so far (cached and new, S ≥ T), d hidden.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reference_impl.nn import masks


def sinusoid_angles(position_ids: Int[Tensor, "*batch"], hidden_size: int) -> Float[Tensor, "*batch pairs"]:
    """pos / 10000^(2i/d) for i = 0 … ⌈d/2⌉ − 1, in float64: at position 2,000 float32 would be off by 1e-4."""
    two_i = torch.arange(0, hidden_size, 2, dtype=torch.float64, device=position_ids.device)
    return position_ids[..., None].to(torch.float64) / 10000.0 ** (two_i / hidden_size)


def sinusoidal_positions(
    position_ids: Int[Tensor, "batch seq"], hidden_size: int, layout: str, dtype: torch.dtype | None = None
) -> Float[Tensor, "batch seq hidden"]:
    """A fixed vector for each position: sines and cosines whose wavelengths rise from 2π to almost 10000 · 2π.

        PE(pos, 2i) = sin(pos / 10000^(2i/d)),   PE(pos, 2i+1) = cos(pos / 10000^(2i/d))

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.5: pos → `position_ids`, d_model → `hidden_size`.

    Args:
        layout: "interleaved", the paper's, for an equation above; "concatenated", Marian's (arXiv:1804.00344): the same
            numbers, all sines first, then all cosines. An odd `hidden_size` has one sine more than cosines.
        dtype: of the result, None for torch's default; arithmetic is in float64.

    Raises:
        ValueError: the layout is unknown.
    """
    if layout not in ("interleaved", "concatenated"):
        raise ValueError(f"layout={layout!r} is unknown; use 'interleaved' or 'concatenated'")
    angles = sinusoid_angles(position_ids, hidden_size)  # (B, T, ⌈d/2⌉)
    sines, cosines = angles.sin(), angles[..., : hidden_size // 2].cos()
    table = angles.new_empty(*position_ids.shape, hidden_size)  # (B, T, d)
    if layout == "interleaved":
        table[..., 0::2], table[..., 1::2] = sines, cosines
    else:
        table = torch.cat((sines, cosines), dim=-1)
    return table.to(torch.get_default_dtype() if dtype is None else dtype)


def learned_positions(
    x: Float[Tensor, "batch seq hidden"],
    weight: Float[Tensor, "positions hidden"],
    attention_mask: Int[Tensor, "batch keys"] | Bool[Tensor, "batch keys"] | None = None,
) -> Float[Tensor, "batch seq hidden"]:
    """Adds to each token embedding the vector of its position, row p of a learned table.

        y_t = x_t + W_p[p_t],   p_t = how many real tokens stand before t in its row

    Gehring et al. 2017 (arXiv:1705.03122), section 3.1; Radford et al. 2018 (GPT), equation 2: W_p → `weight`.
    Arithmetic is in the dtype of `x`.

    Args:
        attention_mask: 1 real, 0 padding, for all tokens so far: the last T are those of `x`, those before them are
            cached. None: `x` is all there is, and real.

    Raises:
        ValueError: there are more tokens than rows in the table.
    """
    if attention_mask is None:
        attention_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    position_ids = masks.positions(attention_mask != 0, num_queries=x.shape[1])  # (B, T)
    if position_ids.numel() and position_ids.max() >= len(weight):
        raise ValueError(f"position {int(position_ids.max())} is beyond the {len(weight)} rows of the table")
    return x + weight[position_ids]
