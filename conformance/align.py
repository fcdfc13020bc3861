"""Find the first wrong tensor of a program that has no hooks: match what it computed against the oracle's probes.

A recorded tensor *matches* a probe if it holds the probe's values, element by element, with the axes in some order: the
layout (batch, seq, heads, head_dim) or (batch, heads, seq, head_dim), merged or split, is the program's own affair.
Comparing sorted values would be simpler and wrong: swapped batch rows and permuted time sort equal.

A single probe proves little.  What is computed *from* it may match, and then the difference was harmless (all positions
shifted by one, heads stored in another order): the probe is *healed*.  And a match proves the values, not their use:
heads merged without a transpose still match as a layout, and only the next probe is wrong.  So the verdict is an
interval in the graph of the probes: the first one that is wrong and that nothing downstream heals, and the nearest
matched ones that it is computed from.  The fault lies between them.  Where new values follow, a permutation of
heads or features before it counts as good (weights stored in another order permute them on purpose) and is noted as
the next suspect.

Alignment localises.  It never decides whether a program passes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

# Relative to the largest value of the probe.  Correct programs agree to about 1e-14 at true double precision, mistakes
# differ by 1e-6 and more; this lies between, nearer to rounding, so that a chance match does not happen.
TOLERANCE = 1e-9
# A probe with fewer distinct values is degenerate.  Eight real numbers that agree to nine digits, each in its place,
# are no accident; two or three (0, 1, a masked score) may be.
MIN_DISTINCT = 8
# Masks fill scores with -1e4, -1e9, float32's minimum or -inf.  Values from here down count as equal, and do not set
# the scale: a fill of -1e9 would make every score negligible.
MASK_FILL = -1e4
# In the worst case (a tensor of a few equal slices) all orders of the axes are tried: 6! = 720 is still fast.
MAX_AXES = 6

# matched     a recorded tensor holds the values, with the axes in some order.
# permuted    none does, but one would if the indices of some axes were reordered (heads or batch rows swapped, head_dim
#             interleaved); never concluded from ties.
# unmatched   tensors with as many elements were recorded, and none holds the values.
# unobserved  no tensor with as many elements was recorded: a fused kernel keeps its scores to itself.
# degenerate  zeros, a constant, a mask, a one-hot choice, NaN: a match would prove nothing, so the probe takes no part.
# Axes that no order of the weights can permute: batch rows or positions in another order are somebody's mistake.
BETWEEN_TOKENS = {"batch", "seq", "key", "source", "source_key"}

Status = Literal["matched", "permuted", "unmatched", "unobserved", "degenerate"]


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A named intermediate tensor of the oracle.

    value: float64, on the CPU.
    axes: one name per dimension of the value, as fine as any layout may split them ("kv_heads", "group").
    parents: the probes that it is directly computed from; each comes earlier in the list that is aligned.
    """

    name: str
    value: Tensor
    axes: tuple[str, ...]
    parents: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.axes) != self.value.ndim or self.value.ndim > MAX_AXES:
            raise ValueError(
                f"probe {self.name}: axes={self.axes} must name {self.value.ndim} <= {MAX_AXES} dimensions"
            )
        if self.value.dtype is not torch.float64:
            raise ValueError(f"probe {self.name}: value is {self.value.dtype}, must be float64")


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about one probe.

    distance: relative to the probe's largest value; from the matching tensor or, if unmatched, the least difference of
        sorted values from any tensor with as many elements (inf if none is finite).
    permuted_axes: the axes whose indices are in another order; two axes that only move together read "kv_heads×group".
    record: position of the matching tensor among the recorded ones (their number: it is the program's result).
    healed: not matched, but a probe computed from it is.
    """

    name: str
    status: Status
    distance: float | None = None
    permuted_axes: tuple[str, ...] = ()
    record: int | None = None
    healed: bool = False

    @property
    def diverges(self) -> bool:
        return self.status in ("unmatched", "permuted") and not self.healed

    @property
    def inside(self) -> bool:
        """Permuted inside a token's own values only, as weights in another order make it."""
        axes = {axis for merged in self.permuted_axes for axis in merged.split("×")}
        return self.status == "permuted" and axes.isdisjoint(BETWEEN_TOKENS)

    def __str__(self) -> str:
        if self.status == "permuted":
            return f"{self.name} (permuted along {', '.join(self.permuted_axes)})"
        if self.distance is None:
            return f"{self.name} ({self.status})"
        return f"{self.name} ({'differs, ' if self.status == 'unmatched' else ''}{self.distance:.0e})"


@dataclass(frozen=True, slots=True)
class Alignment:
    """The verdict.

    findings: by probe name, in computational order.
    first_divergence: the earliest probe that is wrong and not healed; None if there is none.
    last_good: the nearest matched probes that it is computed from, latest first; without a divergence, the matched
        probes after which nothing was matched.
    between: the probes between these and the divergence (unobserved, degenerate or healed).
    others: divergences that do not depend on the first: a second fault, or a harmless difference that nothing
        downstream heals because of the first.
    notes: what is different inside, and harmless.
    """

    findings: dict[str, Finding]
    first_divergence: Finding | None
    last_good: tuple[Finding, ...]
    between: tuple[Finding, ...]
    others: tuple[Finding, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        first = self.first_divergence or "none"
        parts = {"first divergence": [first], "last good": self.last_good, "between": self.between}
        return "; ".join(f"{part}: {', '.join(map(str, found)) or 'none'}" for part, found in parts.items())


def align(
    probes: Sequence[Probe], recorded: Sequence[Tensor], *, result: Tensor | None = None, tolerance: float = TOLERANCE
) -> Alignment:
    """Match probes, given in computational order, against everything that a program computed.

    recorded: float64, on the CPU (`Recorder.tensors`).
    result: what the program returned.  The last probe (the logits) is matched against it alone, and not against what
        the program had right before it, say, reordered the batch.
    Raises: ValueError if a name occurs twice or a parent does not come before its child.
    """
    seen: set[str] = set()
    for probe in probes:
        if probe.name in seen or not seen.issuperset(probe.parents):
            raise ValueError(f"probe {probe.name} must occur once, after its parents {probe.parents}")
        seen.add(probe.name)
    by_size: dict[int, list[int]] = {probe.value.numel(): [] for probe in probes}
    for record, tensor in enumerate(recorded):
        by_size.get(tensor.numel(), []).append(record)
    groups = {
        size: _Group(records, [recorded[i] for i in records]) for size, records in by_size.items() if size and records
    }
    found = [_find(probe, groups.get(probe.value.numel()), tolerance) for probe in probes]
    if probes and result is not None:
        same_size = result.numel() == probes[-1].value.numel()
        alone = _Group([len(recorded)], [result.detach().to("cpu", torch.float64)]) if same_size else None
        found[-1] = _find(probes[-1], alone, tolerance)
    return _verdict(probes, found)


class _Group:
    """The recorded tensors of one size, one a row."""

    def __init__(self, records: list[int], tensors: list[Tensor]) -> None:
        self.records = records
        self.values = torch.stack([tensor.flatten() for tensor in tensors]).clamp_(min=MASK_FILL)
        self.low, self.high = self.values.aminmax(dim=1)
        self._sorted: dict[int, Tensor] = {}

    def closest(self, values: Tensor, apart: Tensor) -> float:
        """Least difference of sorted values to any row; `apart`, that of the extremes, is a lower bound."""
        mine, best = values.sort().values, math.inf
        for row in apart.argsort().tolist():  # NaN comes last
            if not apart[row] < best:
                break
            if row not in self._sorted:
                self._sorted[row] = self.values[row].sort().values
            best = min(best, (self._sorted[row] - mine).abs().max().item())
        return best


def _find(probe: Probe, group: _Group | None, tolerance: float) -> Finding:
    value = probe.value.detach().squeeze().clamp(min=MASK_FILL)
    axes = tuple(axis for axis, size in zip(probe.axes, probe.value.shape, strict=True) if size != 1)
    scale = torch.where(value > MASK_FILL, value, 0.0).abs().max().item() if value.numel() else 0.0
    if not math.isfinite(value.sum().item()) or _is_degenerate(value.flatten(), tolerance * scale):
        return Finding(probe.name, "degenerate")
    if group is None:
        return Finding(probe.name, "unobserved")
    low, high = value.aminmax()
    apart = torch.maximum((group.low - low).abs(), (group.high - high).abs())
    permuted = None
    for row in (apart <= tolerance * scale).nonzero().flatten().tolist():
        for distance, moved in _arrangements(value / scale, axes, group.values[row] / scale, tolerance):
            if not moved:
                return Finding(probe.name, "matched", distance, record=group.records[row])
            permuted = permuted or Finding(probe.name, "permuted", distance, moved, group.records[row])
    return permuted or Finding(probe.name, "unmatched", group.closest(value.flatten(), apart) / scale)


def _is_degenerate(values: Tensor, slack: float) -> bool:
    """Whether the values form fewer than MIN_DISTINCT clusters; a hundred of them usually show that they form more."""
    sample = values[:: max(1, values.numel() // 100)]
    return all(int((some.sort().values.diff() > slack).sum()) + 1 < MIN_DISTINCT for some in (sample, values))


def _arrangements(
    value: Tensor, axes: tuple[str, ...], actual: Tensor, tolerance: float, merge: bool = True
) -> Iterator[tuple[float, tuple[str, ...]]]:
    """The ways in which `actual` (flat) holds the value: (largest difference, axes whose indices are in another order).

    A slice is known by its sum of cubes, which no order of the other axes changes, and which softmax and normalisation
    do not make equal, as they do with sums and sums of squares.  What the sums suggest is verified in full.
    """
    # Mask fills become -2; everything else is at most 1, so that |a³ - b³| <= 3 |a - b|.
    value, actual = value.clamp(min=-2), actual.clamp(min=-2)
    sums = [value.pow(3).movedim(axis, 0).reshape(size, -1).sum(1) for axis, size in enumerate(value.shape)]
    found = False
    for moves in _orders(sums, actual.pow(3), tolerance):
        layout = actual.view([value.shape[axis] for axis in moves])
        layout = layout.permute([list(moves).index(axis) for axis in range(value.ndim)])
        moved = [axis for axis, move in sorted(moves.items()) if move.diff().ne(1).any()]
        for axis in moved:
            layout = layout.index_select(axis, moves[axis])
        difference = (layout - value).abs().max().item()
        if difference <= tolerance and (value.ndim > 1 or not moved):  # any shuffle permutes a single axis
            found = True
            yield difference, tuple(axes[axis] for axis in moved)
    # Heads that are swapped across key-value groups are a permutation of kv_heads×group alone.
    for i in range(value.ndim - 1) if merge and not found else ():
        names = (*axes[:i], f"{axes[i]}×{axes[i + 1]}", *axes[i + 2 :])
        yield from _arrangements(value.flatten(i, i + 1), names, actual, tolerance, merge=False)


def _orders(
    sums: Sequence[Tensor], cubes: Tensor, tolerance: float, inside: int = 1, placed: tuple[int, ...] = ()
) -> Iterator[dict[int, Tensor]]:
    """Orders of the axes, outermost first, in which all slices along every axis are there: where each of them is."""
    if len(placed) == len(sums):
        yield {}
    for axis in set(range(len(sums))).difference(placed):
        size = len(sums[axis])
        slack = 3 * tolerance * cubes.numel() / size
        move = _move(sums[axis], cubes.view(-1, size, inside).sum((0, 2)), slack)
        if move is not None:
            for outside in _orders(sums, cubes, tolerance, inside * size, (*placed, axis)):
                yield {**outside, axis: move}


def _move(wanted: Tensor, found: Tensor, slack: float) -> Tensor | None:
    """Where each wanted slice is, by the sums of slices; None if nowhere.  Slices that tie may not move."""
    if (wanted - found).abs().max() <= slack:
        return torch.arange(len(wanted))
    (wanted, place), (found, source) = wanted.sort(), found.sort()
    if (wanted - found).abs().max() > slack or (wanted.diff() <= 2 * slack).any():
        return None
    return source[place.argsort()]


def _verdict(probes: Sequence[Probe], found: Sequence[Finding]) -> Alignment:
    healed: set[str] = set()  # what a matched probe is computed from
    for probe, f in zip(reversed(probes), reversed(found), strict=True):
        if f.status == "matched" or probe.name in healed:
            healed.update(probe.parents)
    unsure = ("permuted", "unmatched", "unobserved")
    findings = {f.name: replace(f, healed=f.status in unsure and f.name in healed) for f in found}
    parents = {probe.name: probe.parents for probe in probes}
    last_new = max((i for i, f in enumerate(findings.values()) if f.diverges and f.status == "unmatched"), default=-1)
    own_layout = {f.name for f in list(findings.values())[: last_new + 1] if f.diverges and f.inside}
    tainted: set[str] = set()  # what diverges, and everything after it
    roots = []
    for finding in findings.values():
        if not tainted.isdisjoint(parents[finding.name]):
            tainted.add(finding.name)
        elif finding.diverges and finding.name not in own_layout:
            tainted.add(finding.name)
            roots.append(finding)
    upstream = [f for f in findings.values() if f.status == "matched" and f.name not in healed]
    if roots:
        good = own_layout | {f.name for f in findings.values() if f.status == "matched"}
        upstream = _nearest(roots[0].name, parents, findings, good)
    return Alignment(
        findings=findings,
        first_divergence=roots[0] if roots else None,
        last_good=tuple(f for f in reversed(upstream) if f.status == "matched" or f.name in own_layout),
        between=tuple(f for f in upstream if f.status != "matched" and f.name not in own_layout),
        others=tuple(roots[1:]),
        notes=tuple(f"{f}: harmless" for f in findings.values() if f.healed)
        + tuple(
            f"{f}: a layout of its own, or the fault if it is not meant"
            for f in findings.values()
            if f.name in own_layout
        ),
    )


def _nearest(
    first: str, parents: dict[str, tuple[str, ...]], findings: dict[str, Finding], good: set[str]
) -> list[Finding]:
    """The nearest good probes that `first` is computed from, and what was passed on the way to them."""
    reached, waiting = set(), set(parents[first])
    while waiting:
        name = waiting.pop()
        reached.add(name)
        if name not in good:
            waiting |= set(parents[name]) - reached
    return [finding for name, finding in findings.items() if name in reached]
