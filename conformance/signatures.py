"""How wrong values are wrong, when no known mistake gives them: what a person looks at first.

Each signature is a function of one failed comparison that says in a few words what holds, or None.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conformance.align import MASK_FILL, Probe, align

# Where each batch row or feature looks random, so many rows are enough to speak of all of them.
ENOUGH_ROWS = 3


@dataclass(frozen=True)
class Wrong:
    """A failed comparison.

    got, truth: float64; with 3 dimensions or more the first two are batch and sequence.
    bound: relative error that is still right.
    real: (batch, seq) mask of the rows that count; None: all.
    calls: sizes of the calls that a session was fed in; empty if it was none.
    window: how many keys a query sees, where the configuration says so.
    rows: whether the first two dimensions are batch and sequence.
    causal: whether a row depends on nothing but itself and the rows before it, so that the first one sees itself alone.
    """

    got: Tensor
    truth: Tensor
    bound: float
    real: Tensor | None = None
    calls: tuple[int, ...] = ()
    window: int | None = None
    rows: bool = True
    causal: bool = True

    @property
    def slack(self) -> float:
        return self.bound * self.truth.abs().max().item()

    def errors(self) -> Tensor | None:
        """(batch, seq) largest error of each row, 0 where none counts; None if there are no such rows."""
        if self.got.ndim < 3 or not self.rows:
            return None
        error = (self.got - self.truth).abs().flatten(2).amax(-1).nan_to_num(math.inf)
        return error if self.real is None else error.masked_fill(~self.real, 0.0)

    def kept(self) -> tuple[Tensor, Tensor]:
        """The values that count, one row of a sequence after the other."""
        return (self.got, self.truth) if self.real is None else (self.got[self.real], self.truth[self.real])


def not_finite(wrong: Wrong) -> str | None:
    got, _ = wrong.kept()
    if got.isfinite().all():
        return None
    kind = "NaN" if got.isnan().any() else "infinite values"
    share = (~got.isfinite()).double().mean().item()
    return (
        f"{kind} in {share:.0%} of the values: rows that see no key, a mask added twice, overflow, memory never filled"
    )


def constant_ratio(wrong: Wrong) -> str | None:
    got, truth = wrong.kept()
    if not got.any():
        return "every value is 0"
    ratio = ((got * truth).sum() / truth.square().sum()).item()
    if not (got - ratio * truth).abs().max() <= wrong.slack * max(1.0, abs(ratio)):
        return None
    return f"every value is {ratio:.6g} times the right one"


def another_order(wrong: Wrong) -> str | None:
    if wrong.real is not None or wrong.got.ndim < 2 or not wrong.got.isfinite().all() or wrong.got.min() <= MASK_FILL:
        return None
    names = ("batch", "seq", "feature", "a", "b", "c")[: wrong.got.ndim]
    found = align([Probe("values", wrong.truth, names)], [wrong.got], tolerance=max(wrong.bound, 1e-12))
    finding = found.findings["values"]
    if finding.status == "permuted":
        return f"the right values in another order along {', '.join(finding.permuted_axes)}"
    return "the right values, their axes in another order" if finding.status == "matched" else None


def one_position_late(wrong: Wrong) -> str | None:
    """Or early."""
    if not wrong.rows or wrong.got.ndim < 3 or wrong.got.shape[1] <= ENOUGH_ROWS or wrong.real is not None:
        return None
    for by, said in ((1, "before"), (-1, "after")):
        early, late = slice(None, -1), slice(1, None)
        mine, theirs = (late, early) if by == 1 else (early, late)
        if (wrong.got[:, mine] - wrong.truth[:, theirs]).abs().max() <= wrong.slack:
            return f"every row is that of the position {said} it"
    return None


def same_error_everywhere(wrong: Wrong) -> str | None:
    if not wrong.rows or wrong.got.ndim < 3:
        return None
    got, truth = wrong.kept()
    error = (got - truth).flatten(0, -2)
    if len(error) < ENOUGH_ROWS or not (error - error[0]).abs().max() <= wrong.slack:
        return None
    return "the error is one vector, the same at all positions: a bias of the head or of the last layers"


def constant_in_every_row(wrong: Wrong) -> str | None:
    if wrong.got.ndim < 3:
        return None
    got, truth = wrong.kept()
    error = got - truth
    if not (error - error.mean(-1, keepdim=True)).abs().max() <= wrong.slack:
        return None
    return "the error is one number in every row: a softmax over what is returned, or a shift that softmax would hide"


def only_after_the_first_call(wrong: Wrong) -> str | None:
    errors = wrong.errors()
    if errors is None or len(wrong.calls) < 2:
        return None
    bad = errors > wrong.slack
    if bad[:, : wrong.calls[0]].any() or not bad[:, wrong.calls[0] :].any():
        return None
    return "the first call of the session is right, later ones are not: positions, mask or state of the cache"


def only_beyond_the_window(wrong: Wrong) -> str | None:
    errors = wrong.errors()
    if errors is None or not wrong.window or wrong.window >= errors.shape[1]:
        return None
    bad = (errors > wrong.slack).any(0)
    if bad[: wrong.window].any() or not bad[wrong.window :].any():
        return None
    return f"right up to the {wrong.window} positions of the window, wrong beyond"


def only_short_rows(wrong: Wrong) -> str | None:
    errors = wrong.errors()
    if errors is None or wrong.real is None:
        return None
    bad = (errors > wrong.slack).any(-1)
    short = ~wrong.real.all(-1)
    if not bad.any() or bad[~short].any() or not (~short).any():
        return None
    return "only rows with padding are wrong: their mask, positions, last token or direction"


def grows_with_position(wrong: Wrong) -> str | None:
    errors = wrong.errors()
    if errors is None or errors.shape[1] < 2 * ENOUGH_ROWS or wrong.real is not None:
        return None
    by_position = errors.mean(0)
    if by_position[0] > wrong.slack or not by_position.isfinite().all():
        return None
    third = len(by_position) // 3
    if (by_position[1:] <= wrong.slack).any() or by_position[-third:].mean() < 1.5 * by_position[1 : 1 + third].mean():
        return None
    return "position 0 is right, and the error grows from there: positions, or what is carried along"


def only_position_zero_right(wrong: Wrong) -> str | None:
    errors = wrong.errors()
    if errors is None or errors.shape[1] < ENOUGH_ROWS or wrong.real is not None:
        return None
    bad = errors > wrong.slack
    if bad[:, 0].any() or not bad[:, 1:].all():
        return None
    said = "position 0 is right, all others are wrong"
    return said if not wrong.causal else f"{said}: what passes between tokens (scores, masks, positions, state)"


def only_some_rows(wrong: Wrong) -> str | None:
    errors = wrong.errors()
    if errors is None or len(errors) < 2:
        return None
    bad = (errors > wrong.slack).any(-1)
    if bad.all() or not bad.any():
        return None
    return f"only batch rows {', '.join(map(str, bad.nonzero().flatten().tolist()))} are wrong"


def only_some_tokens(wrong: Wrong) -> str | None:
    errors = wrong.errors()
    if errors is None:
        return None
    counted = errors.numel() if wrong.real is None else int(wrong.real.sum())
    bad = int((errors > wrong.slack).sum())
    if not 0 < bad < counted / 2:
        return None
    return f"only {bad} of {counted} tokens are wrong: a choice of experts, dropped tokens, one end of the vocabulary"


def wrong_from_the_start(wrong: Wrong) -> str | None:
    errors = wrong.errors()
    if errors is None or wrong.real is not None or not (errors > wrong.slack).all():
        return None
    said = "wrong from position 0 on in every row"
    return said if not wrong.causal else f"{said}: embedding, norm, bias, feed-forward or weights rather than positions"


# The most telling first.
SIGNATURES: tuple[Callable[[Wrong], str | None], ...] = (
    not_finite, constant_ratio, another_order, one_position_late, same_error_everywhere, constant_in_every_row,
    only_after_the_first_call, only_beyond_the_window, only_short_rows, grows_with_position, only_position_zero_right,
    only_some_rows, only_some_tokens, wrong_from_the_start,
)  # fmt: skip


def signature(wrong: Wrong, signatures: Sequence[Callable[[Wrong], str | None]] = SIGNATURES) -> str | None:
    """The most telling signature that holds, or None."""
    if not torch.isfinite(wrong.truth).all():
        return None
    return next((said for sign in signatures if (said := sign(wrong))), None)
