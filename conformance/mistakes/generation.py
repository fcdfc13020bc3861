"""Generation: which logits the next token comes from, and what becomes of the token that ends a text."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.groups import DECODERS


def by_count(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Column n - 1 of a row with n real tokens."""

    def of_next(logits: Tensor, real: Tensor) -> Tensor:
        return logits[torch.arange(len(logits)), real.sum(dim=1) - 1]

    return of_next


def without_stop_token(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate(*arguments: Any, stop_tokens: Collection[int] = (), **options: Any) -> Any:
        rows = original(*arguments, stop_tokens=stop_tokens, **options)
        return [replace(row, ids=row.ids[:-1]) if row.stopped else row for row in rows]

    return generate


MISTAKES = (
    Mistake(
        id="last-token-index-left-pad", families=DECODERS, swaps=(Swap("reference_impl.generation:of_next", by_count),),
        killed_by=("generation.greedy",),
        what="The next token comes from column n - 1 of a row with n real tokens.",
        why="That is the last real token only where padding is on the right; on the left the last column is.",
        shows="Batches of prompts of different lengths that are padded on the left, all rows but the longest.",
        fix="The last column for padding on the left; in general the largest column that is real.",
        seen="transformers#46782, transformers#35911",
    ),
    Mistake(
        id="stop-token-left-out", families=DECODERS,
        swaps=(Swap("reference_impl.generation:generate", without_stop_token),),
        killed_by=("generation.stop_token",),
        what="The token that ends a text is not among its new tokens.",
        why="The model generated it: whoever scores or continues the text needs it; printing may leave it out.",
        shows="Only rows that stop before the limit.", fix="End the row behind the stop token.",
        seen="common knowledge",
    ),
)  # fmt: skip
