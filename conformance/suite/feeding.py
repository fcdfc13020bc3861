"""Feeding a session in calls of planned sizes."""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.judge import Judge


def feed(
    judge: "Judge",
    plan: Sequence[int],
    ids: "Tensor",
    mask: "Tensor | None" = None,
    source: "dict[str, Tensor] | None" = None,
    masked: int | None = None,
) -> "Tensor":
    """The logits of all calls of a session of its own, joined along the sequence.

    source: what the session is opened with, of an encoder–decoder model.  masked: the first calls alone are given their
    part of the mask, so many of them; None: all are.
    """
    import torch

    assert sum(plan) == ids.shape[1]
    with judge.precision():
        session = judge.candidate.session(**(source or {}))
        pieces = []
        for call, part in enumerate(parts(plan)):
            told = mask is not None and (masked is None or call < masked)
            pieces.append(session.feed(ids[:, part], mask[:, part] if told else None))  # type: ignore[index]
        return torch.cat(pieces, dim=1)


def parts(plan: Sequence[int]) -> list[slice]:
    """Which tokens each call of a plan is fed."""
    return [slice(end - size, end) for size, end in zip(plan, accumulate(plan), strict=True)]


def equal_calls(total: int, size: int) -> list[int]:
    """A plan of calls of one size, and what is left."""
    return [size] * (total // size) + ([total % size] if total % size else [])
