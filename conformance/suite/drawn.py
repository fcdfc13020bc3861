"""What property checks share: how long their texts are, and a candidate run on drawn ones."""

from itertools import accumulate
from typing import TYPE_CHECKING

from conformance import strategies
from conformance.families.properties import WIDEST_WINDOW

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.families import Family
    from conformance.implementation import Candidate, Session
    from conformance.judge import Judge

# No text is longer, though a model without a table of positions knows no end.
MOST_TOKENS = 128
# Texts are this long at most, unless a window asks for more, so that an example is run in a few milliseconds.
USUAL_TOKENS = 12


def family(judge: "Judge") -> "Family":
    from conformance.families import get

    return get(judge.case.family)  # type: ignore[no-any-return]


def longest(judge: "Judge") -> int:
    """The most tokens that a text may have: the rows of the position table, if it is not larger than `MOST_TOKENS`."""
    return min(judge.case.config.get(family(judge).positions_key, MOST_TOKENS), MOST_TOKENS)


def windows(judge: "Judge") -> tuple[int | None, ...]:
    """For each layer the keys that a query sees, None where it sees all of any text that is drawn."""
    found = family(judge).properties.windows(judge.case.config)
    return tuple(None if window is None or window > WIDEST_WINDOW else window for window in found)


def usual(judge: "Judge") -> int:
    """The most tokens that ordinary examples have: more than three windows, where there is one."""
    widest = max((window for window in windows(judge) if window is not None), default=0)
    return min(longest(judge), max(USUAL_TOKENS, 3 * widest + 2))


def ids(judge: "Judge", seed: int, batch: int, length: int) -> "Tensor":
    """(batch, length) drawn token ids."""
    return strategies.token_ids(seed, batch, length, judge.case.config["vocab_size"])


def changed(judge: "Judge", id_: "Tensor", by: int) -> "Tensor":
    """Other ids than these, none of them junk; `by` says which."""
    usable = judge.case.config["vocab_size"] - strategies.junk(judge.case.config["vocab_size"])
    return (id_ + 1 + by % (usable - 1)) % usable


def ragged(
    judge: "Judge", seed: int, lengths: list[int], extra: int, side: str, after: int = 0
) -> "tuple[Tensor, Tensor, Tensor, Tensor]":
    """Rows of different lengths in a padded batch, each with `after` more tokens that follow the padded part.

    (ids of the rows without padding; padded ids; mask; (batch, width + after) index of each column's token in its row).
    """
    import torch

    width, batch = max(lengths) + extra, len(lengths)
    whole = ids(judge, seed, batch, max(lengths) + after)
    vocab = judge.case.config["vocab_size"]
    padded = strategies.padding_ids(seed, batch, width + after, vocab)
    mask, place = torch.zeros_like(padded), torch.zeros_like(padded)
    for row, length in enumerate(lengths):
        start = width - length if side == "left" else 0
        columns = [*range(start, start + length), *range(width, width + after)]
        place[row, columns] = torch.arange(length + after)
        padded[row, columns], mask[row, columns] = whole[row, : length + after], 1
    return whole, padded, mask, place


def at_places(values: "Tensor", place: "Tensor") -> "Tensor":
    """(batch, columns, …): for every column of a padded batch the value of its token."""
    import torch

    return values[torch.arange(len(place))[:, None], place]


def fed(judge: "Judge", plan: list[int], text: "Tensor", mask: "Tensor | None" = None) -> "Tensor":
    """Logits of a text that a session of its own is fed in calls of the planned sizes."""
    import torch

    with judge.precision():
        session = judge.candidate.session()
        return torch.cat([feed(session, text, part, mask) for part in parts(plan)], dim=1)


def feed(session: "Session", text: "Tensor", part: slice, mask: "Tensor | None" = None) -> "Tensor":
    return session.feed(text[:, part], None if mask is None else mask[:, part])


def parts(plan: list[int]) -> list[slice]:
    """Which tokens each call of a plan is fed."""
    return [slice(end - size, end) for size, end in zip(plan, accumulate(plan), strict=True)]


def logits_of(judge: "Judge", candidate: "Candidate", text: "Tensor") -> "Tensor":
    """Logits that another candidate than the judge's own gives."""
    with judge.precision():
        return candidate(text).logits
