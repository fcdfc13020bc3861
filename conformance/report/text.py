"""A run as plain text: the block that a failure prints, and the summary.  The terminal report colours these."""

import json
import re
import shlex
from collections.abc import Callable
from typing import Any

from conformance.bounds import MAX_RATIO, RMS_RATIO
from conformance.report.model import OUTCOMES

_LABEL = {"fail": "FAIL", "error": "ERROR", "timeout": "TIMEOUT", "crash": "CRASH"}
_INDENT = " " * 6
# What every wrong forward says; other comparisons name a parameter, a block, the loss.
_EXPECTED_MESSAGE = "logits differ from the oracle's"


def failure_lines(result: dict[str, Any], spec: str) -> list[str]:
    """The lines that one failed claim prints: what, how large, where first, and how to repeat it."""
    head = f"{_LABEL[result['outcome']]}  {result['case']} · {result['check']} · {result['dtype']}"
    lines = [f"{head}    {_size(result)}".rstrip()]
    if result["message"] != _EXPECTED_MESSAGE:
        lines.append(f"{_INDENT}{result['message']}")
    divergence = result["divergence"]
    if divergence and divergence["first_wrong"]:
        nothing = "not known" if divergence["probes_from"] == "blocks" else "none, it is the first probe"
        good = ", ".join(divergence["last_good"]) or nothing
        lines.append(_entry("first divergence", f"{divergence['first_wrong']}   last good: {good}"))
    if divergence and divergence["how"]:
        lines.append(_entry("", divergence["how"]))
    if result["equals"]:
        lines.append(_entry("reproduced by", f"the oracle with {result['equals']}"))
    if diagnosis := result.get("diagnosis"):
        lines += _diagnosis_lines(diagnosis)
    for index, detail in enumerate(result["details"]):
        lines.append(_entry("where" if index == 0 else "", detail))
    lines += [_entry("note", note) for note in result["notes"]]
    case = shlex.quote(result.get("directory", result["case"]))
    options = f"--case {case} --check {result['check']} --dtype {result['dtype']}"
    if example := result.get("example"):
        options += f" --example {shlex.quote(json.dumps(example))}"
    lines.append(_entry("reproduce", f"conformance run {shlex.quote(spec)} {options}"))
    return lines


def _diagnosis_lines(diagnosis: dict[str, Any]) -> list[str]:
    if diagnosis["id"] is None:
        return [_entry("diagnosis", f"unknown mistake: {diagnosis['text']}")]
    how = f"to {diagnosis['reproduced_to']:.0e}" if diagnosis["reproduced_to"] else "exactly"
    shown = f"{diagnosis['id']}: {diagnosis['text']}   [reproduced {how}]"
    asked = "; ".join(f"conformance explain {identifier}" for identifier in re.split(r" or | and ", diagnosis["id"]))
    return [_entry("diagnosis", shown), _entry("fix", f"{diagnosis['fix']}   {asked}")]


def _size(result: dict[str, Any]) -> str:
    if result["kind"] != "value" or not result["error"]:
        return ""
    if result["ratio"] is None:
        worse = max(("max", "rms"), key=lambda kind: result["error"][kind])
        return f"error {result['error'][worse]:.1e}   bound {result['bound'][worse]:.0e}"
    return (
        f"error {result['error']['rms']:.1e}, {result['ratio']['rms']:.3g} times the oracle's own "
        f"(limit {RMS_RATIO:g}); by maximum {result['ratio']['max']:.3g} (limit {MAX_RATIO:g})"
    )


def _entry(label: str, text: str) -> str:
    return f"{_INDENT}{label:<18} {text}".rstrip()


def counts_line(run: dict[str, Any]) -> str:
    """`324 of 324 claims executed: 320 pass, 4 fail` and, when there are any, the declared unsupported ones."""
    counts = run["counts"]
    said = ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o])
    return f"{counts['executed']} of {counts['selected']} claims executed: {said or 'nothing'}"


def shortfall(run: dict[str, Any]) -> str:
    """Why a run is less than it should be, though no claim need have failed; empty when it is not."""
    counts = run["counts"]
    if missing := counts["selected"] - sum(counts[o] for o in OUTCOMES):
        return f"{missing} of {counts['selected']} claims have no outcome: the run was stopped, or a test process died"
    if not counts["executed"]:
        return "nothing was executed, so nothing is proved"
    return ""


def field_lines(run: dict[str, Any]) -> list[str]:
    """The field matrix, a line a field case."""
    width = max((len(name) for name in run["fields"]), default=0)
    return [f"{name:<{width}}  {row['verdict']:<8}  {row['detail']}".rstrip() for name, row in run["fields"].items()]


def print_summary(run: dict[str, Any], write: Callable[[str], None]) -> None:
    """Counts and field matrix, for the summary of an ordinary pytest run."""
    if run["implementation"]:
        write(run["implementation"]["name"])
    for line in field_lines(run):
        write("  " + line)
    write(counts_line(run))
    if short := shortfall(run):
        write(short)
