"""Packing: texts one behind the other in one row, and what keeps them apart."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.groups import DECODERS, TURNING
from reference_impl.nn import masks
from reference_impl.nn.masks import Tokens

VISIBLE = "reference_impl.nn.masks:visible"
POSITIONS = "reference_impl.nn.masks:default_positions"
PACKED = ("packed.logits", "packed.isolation")


def one_text(original: Callable[..., Any]) -> Callable[..., Any]:
    """A causal triangle over the whole row."""

    def visible(tokens: Tokens, **sizes: Any) -> Any:
        return original(tokens if tokens.lengths is None else masks.in_order(tokens.real), **sizes)

    return visible


def told_by_positions(original: Callable[..., Any]) -> Callable[..., Any]:
    """A text begins where positions fall: 0 1 | 0 0 1 2 for texts of 2, 1 and 3 tokens."""

    def visible(tokens: Tokens, **sizes: Any) -> Any:
        if tokens.lengths is None:
            return original(tokens, **sizes)
        starts = (tokens.place[0].diff() < 0).nonzero().flatten() + 1
        ends = [0, *starts.tolist(), tokens.place.shape[1]]
        lengths = tuple(end - start for start, end in pairwise(ends))
        return original(Tokens(tokens.real, tokens.place, lengths), **sizes)

    return visible


def running_on(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Positions of a packed row are counted from its beginning."""

    def default_positions(tokens: Tokens, *, num_queries: int) -> Tensor:
        if tokens.lengths is None:
            return original(tokens, num_queries=num_queries)
        return torch.arange(num_queries, device=tokens.place.device)[None]

    return default_positions


MISTAKES = (
    Mistake(
        id="pack-no-block-mask", families=DECODERS, swaps=(Swap(VISIBLE, one_text),), killed_by=PACKED,
        what="Texts that share a row see those before them: the mask is one triangle over the row.",
        why="They have nothing to do with each other; an end-of-text token between them, or positions that start "
        "again, do not hide one from the other.",
        shows="Only packed rows, from the second text on; a training loss still falls.",
        fix="A causal mask in blocks on the diagonal, or a kernel that is told the lengths.",
        seen="huggingface/trl#784, huggingface/nanoVLM#204, unsloth#1207",
    ),
    Mistake(
        id="pack-single-token-text", families=DECODERS, swaps=(Swap(VISIBLE, told_by_positions),), killed_by=PACKED,
        what="Texts are told apart where positions fall, so that a text of one token is one with the text behind it.",
        why="Positions 0 and 0 of two texts do not fall.",
        shows="Only behind a text of a single token.", fix="A text begins wherever the position is 0, or give lengths.",
        seen="ms-swift#9904, transformers#35861 (review)",
    ),
    Mistake(
        id="pack-positions-not-reset", families=DECODERS, swaps=(Swap(POSITIONS, running_on),), killed_by=PACKED[:1],
        what="Positions run on from one text to the next.", why="Each text begins at position 0.",
        shows="With learned positions from the second text on; with rotary ones nowhere, once texts do not see each "
        "other.",
        fix="Positions that start again with each text.", seen="huggingface/nanoVLM#201",
        equivalent=dict.fromkeys(TURNING, "rotary scores depend on distances alone, and those within a text are right"),
    ),
)  # fmt: skip
