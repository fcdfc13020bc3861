"""Padded batches made from a case's rows: every row cut to its own length, pads filled with junk."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def padded(
    inputs: "dict[str, Tensor]", logits: "Tensor", side: str, lengths: "Tensor | None" = None, width: int | None = None
) -> "tuple[Tensor, Tensor, Tensor]":
    """(input_ids, attention_mask, truth) of a case with each row cut to its length, padded on one side.

    inputs: the case's; logits: of its full forward, (batch, seq, vocab).
    lengths: (batch,), the case's own unless given; width: of the batch, the case's sequence unless given.
    The pads hold junk ids that no real token has.  Since the models are causal, the truth of a row's first n tokens
    is the first n rows of the full forward's logits, moved to where they stand; rows of pads hold zeros.
    """
    import torch

    ids = inputs["input_ids"]
    width = width or ids.shape[1]
    out, truth = inputs["padding_ids"][:, :width].clone(), torch.zeros_like(logits[:, :width])
    mask = torch.zeros_like(out)
    for row, length in enumerate((inputs["lengths"] if lengths is None else lengths).tolist()):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        out[row, place], truth[row, place], mask[row, place] = ids[row, :length], logits[row, :length], 1
    return out, mask, truth
