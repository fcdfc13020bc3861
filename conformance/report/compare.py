"""Two saved runs, claim by claim: what was fixed, what regressed, what moved, what is new or gone."""

import math
from dataclasses import dataclass
from typing import Any

KINDS = ("regressed", "fixed", "changed", "new", "gone", "not run")
# An error in a working dtype moves by rounding alone when a library changes its summation order; half as much again is
# more than that (the same case on other threads and SIMD levels moves by less, see docs/bounds.md).
MOVED = 1.5
_NOT_EXECUTED = ("unsupported", "skipped")


@dataclass(frozen=True)
class Change:
    """One claim that differs between two runs: which way (`KINDS`) and from what to what."""

    kind: str
    claim: str
    old: str
    new: str


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Every claim that differs, regressions first.

    regressed: passed, now fails, errs, hangs or crashes.  fixed: the other way round.  changed: another outcome
    among the failing ones, or (both executed) an error by RMS that moved by more than half, in float64 counted from
    1e-12 upwards.  not run: was executed and now is unsupported, skipped, or missing although the manifest may still
    have it (same manifest, other selection, or a run cut short).  new: was not executed before.  gone: the new
    manifest does not have it any more.
    """
    before, after = _by_claim(old), _by_claim(new)
    changes = []
    for claim in sorted(before.keys() | after.keys()):
        a, b = before.get(claim), after.get(claim)
        kind = _kind(a, b, old, new)
        if kind:
            changes.append(Change(kind, " · ".join(claim), _describe(a), _describe(b)))
    return sorted(changes, key=lambda change: KINDS.index(change.kind))


def _by_claim(run: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(c["case"], c["check"], c["dtype"]): c for c in run["claims"]}


def _kind(a: dict[str, Any] | None, b: dict[str, Any] | None, old: dict[str, Any], new: dict[str, Any]) -> str | None:
    same_fixtures = old["fixtures"]["sha256"] == new["fixtures"]["sha256"]
    if a is None:
        return "new"
    if b is None:
        cut_short = len(new["claims"]) < new["counts"]["selected"]
        if not (same_fixtures or cut_short or new["selection"] != old["selection"]):
            return "gone"
        return None if a["outcome"] in _NOT_EXECUTED else "not run"
    if b["outcome"] in _NOT_EXECUTED:
        return None if a["outcome"] in _NOT_EXECUTED else "not run"
    if a["outcome"] in _NOT_EXECUTED:
        return "new"
    if (a["outcome"] == "pass") != (b["outcome"] == "pass"):
        return "fixed" if b["outcome"] == "pass" else "regressed"
    return "changed" if a["outcome"] != b["outcome"] or _moved(a, b) else None


def _moved(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether the error is another one: beyond rounding in float64, by more than half in a working dtype."""
    if not (a["error"] and b["error"]):
        return bool(a["error"]) != bool(b["error"])
    first, second = a["error"]["rms"], b["error"]["rms"]
    if not (math.isfinite(first) and math.isfinite(second)):
        return math.isfinite(first) != math.isfinite(second)
    low, high = sorted((first, second))
    floor = 1e-12 if a["dtype"] == "float64" else 0.0
    return bool(high > floor and high > MOVED * max(low, floor))


def _describe(claim: dict[str, Any] | None) -> str:
    if claim is None:
        return "–"
    if claim["error"]:
        return f"{claim['outcome']} (error {claim['error']['rms']:.1e})"
    return f"{claim['outcome']}{': ' + claim['message'] if claim['message'] else ''}"
