"""Padded batches made from a case's rows: every row cut to its own length, pads filled with junk."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.cases import Case


@dataclass(frozen=True)
class Batch:
    """What a model is fed, and the truth.

    ids, mask: the tokens that the logits belong to (an encoder–decoder model's decoder reads them), which are real.
    source: `input_ids` and `attention_mask` of the encoder; empty where there is none.
    truth: logits (batch, seq, vocab) of `ids`; rows of pads hold zeros.
    """

    ids: "Tensor"
    mask: "Tensor"
    source: "dict[str, Tensor]"
    truth: "Tensor"

    @property
    def arguments(self) -> "dict[str, Tensor]":
        """The arguments of one call."""
        if not self.source:
            return {"input_ids": self.ids, "attention_mask": self.mask}
        return {**self.source, "decoder_input_ids": self.ids, "decoder_attention_mask": self.mask}


def padded(inputs: "dict[str, Tensor]", truth: "Tensor", side: str) -> Batch:
    """A case's inputs with every row, and its source if there is one, cut to its length and padded on one side.

    truth: logits of the case's rows without padding, each with its own source.  Since decoders are causal, the truth of
    a row's first n tokens is the first n rows of it, moved to where they stand.
    """
    if "decoder_input_ids" not in inputs:
        ids, mask = padded_ids(inputs, side)
        return Batch(ids, mask, {}, moved(truth, inputs["lengths"], side))
    ids, mask = padded_ids(decoder_inputs(inputs), side)
    source_ids, source_mask = padded_ids(inputs, side)
    source = {"input_ids": source_ids, "attention_mask": source_mask}
    return Batch(ids, mask, source, moved(truth, inputs["decoder_lengths"], side))


def decoder_inputs(inputs: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Ids, lengths and junk of an encoder–decoder model's decoder, under the names that others have them."""
    return {name.removeprefix("decoder_"): tensor for name, tensor in inputs.items() if name.startswith("decoder_")}


def row_truth(case: "Case") -> "Tensor":
    """The logits of each row by itself: with its own source, if there is one, cut to its length."""
    return case.expected["source_cut.logits" if case.source else "logits"]


def padded_ids(
    inputs: "dict[str, Tensor]", side: str, lengths: "Tensor | None" = None, width: int | None = None
) -> "tuple[Tensor, Tensor]":
    """Ids and mask (batch, width), each row cut to its length, padded on one side with junk ids that no token has.

    lengths: (batch,), the case's own unless given; width: of the batch, the case's sequence unless given.
    """
    import torch

    ids = inputs["input_ids"]
    width = width or ids.shape[1]
    lengths = inputs["lengths"] if lengths is None else lengths
    out = inputs["padding_ids"][:, :width].clone()
    mask = torch.zeros_like(out)
    for row, (length, place) in enumerate(_places(lengths, width, side)):
        out[row, place], mask[row, place] = ids[row, :length], 1
    return out, mask


def moved(logits: "Tensor", lengths: "Tensor", side: str, width: int | None = None) -> "Tensor":
    """The first `length` rows of the logits of each row of the batch, where padding on one side puts them."""
    import torch

    width = width or logits.shape[1]
    truth = torch.zeros_like(logits[:, :width])
    for row, (length, place) in enumerate(_places(lengths, width, side)):
        truth[row, place] = logits[row, :length]
    return truth


def _places(lengths: "Tensor", width: int, side: str) -> list[tuple[int, slice]]:
    """Length of every row, and where its tokens stand."""
    return [
        (length, slice(width - length, width) if side == "left" else slice(0, length)) for length in lengths.tolist()
    ]
