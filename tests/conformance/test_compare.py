"""Two runs are compared claim by claim; every kind of change is named, and nothing that got worse exits 0.

The runs are the smallest documents that the schema allows, built here.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from conformance.cli import main
from conformance.report.compare import Change, compare

CLAIM = ("llama/plain", "golden.logits", "float64")
NAMED = "llama/plain · golden.logits · float64"


def claim(outcome: str, rms: float | None = None, *, dtype: str = "float64", **more: Any) -> dict[str, Any]:
    """One claim's result; `rms` gives it an error (the maximum is three times that)."""
    pair = None if rms is None else {"max": 3 * rms, "rms": rms}
    return {
        "case": "llama/plain", "check": "golden.logits", "dtype": dtype, "outcome": outcome, "message": "",
        "kind": "", "error": pair, "bound": pair, "ratio": None, "details": [], "divergence": None, "equals": None,
        "notes": [], "seconds": 0.25, "calls": 1,
    } | more  # fmt: skip


def run(
    *claims: dict[str, Any],
    sha256: str = "a",
    selection: dict[str, list[str]] | None = None,
    selected: int | None = None,
) -> dict[str, Any]:
    counts = dict.fromkeys(("pass", "fail", "error", "timeout", "crash", "unsupported", "skipped"), 0)
    return {
        "schema": "conformance.run/1",
        "implementation": None,
        "environment": None,
        "fixtures": {"sha256": sha256, "claims": 9},
        "selection": {"family": [], "case": [], "check": [], "dtype": []} | (selection or {}),
        "device": "cpu",
        "problem": None,
        "counts": {"selected": len(claims) if selected is None else selected, "executed": len(claims)} | counts,
        "claims": list(claims),
        "fields": {},
    }


def kinds(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [change.kind for change in compare(old, new)]


FAILING = ["fail", "error", "timeout", "crash"]
NOT_EXECUTED = ["unsupported", "skipped"]


# --- outcomes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["pass", *FAILING, *NOT_EXECUTED])
def test_run_does_not_differ_from_itself(outcome: str) -> None:
    assert compare(run(claim(outcome, 1e-3)), run(claim(outcome, 1e-3))) == []


@pytest.mark.parametrize("outcome", FAILING)
def test_pass_that_is_one_no_more_regressed(outcome: str) -> None:
    changes = compare(run(claim("pass", 2e-15)), run(claim(outcome, message="it is broken")))
    assert changes == [Change("regressed", NAMED, "pass (error 2.0e-15)", f"{outcome}: it is broken")]


@pytest.mark.parametrize("outcome", FAILING)
def test_failure_that_passes_now_is_fixed(outcome: str) -> None:
    changes = compare(run(claim(outcome, 0.25)), run(claim("pass", 3e-15)))
    assert changes == [Change("fixed", NAMED, f"{outcome} (error 2.5e-01)", "pass (error 3.0e-15)")]


@pytest.mark.parametrize(("before", "after"), [(a, b) for a in FAILING for b in FAILING if a != b])
def test_failure_of_another_kind_is_changed(before: str, after: str) -> None:
    assert kinds(run(claim(before)), run(claim(after))) == ["changed"]


@pytest.mark.parametrize("before", ["pass", *FAILING])
@pytest.mark.parametrize("after", NOT_EXECUTED)
def test_claim_that_is_not_executed_any_more_was_not_run(before: str, after: str) -> None:
    changes = compare(run(claim(before)), run(claim(after, message="no float64")))
    assert changes == [Change("not run", NAMED, before, f"{after}: no float64")]


@pytest.mark.parametrize("before", NOT_EXECUTED)
@pytest.mark.parametrize("after", ["pass", *FAILING])
def test_claim_that_is_executed_for_the_first_time_is_new(before: str, after: str) -> None:
    assert kinds(run(claim(before)), run(claim(after))) == ["new"]


@pytest.mark.parametrize(("before", "after"), [("unsupported", "skipped"), ("skipped", "unsupported")])
def test_claim_that_neither_run_executed_does_not_differ(before: str, after: str) -> None:
    assert kinds(run(claim(before)), run(claim(after))) == []


# --- presence -------------------------------------------------------------------------------------------------------


def test_claim_that_only_the_new_manifest_has_is_new() -> None:
    assert compare(run(), run(claim("pass"), sha256="b")) == [Change("new", NAMED, "–", "pass")]


def test_claim_that_the_new_manifest_has_no_more_is_gone() -> None:
    assert compare(run(claim("pass")), run(sha256="b")) == [Change("gone", NAMED, "pass", "–")]


def test_missing_claim_of_the_same_manifest_was_not_run() -> None:
    assert compare(run(claim("pass")), run()) == [Change("not run", NAMED, "pass", "–")]


def test_missing_claim_of_another_manifest_and_another_selection_was_not_run() -> None:
    assert kinds(run(claim("pass")), run(sha256="b", selection={"dtype": ["float32"]})) == ["not run"]


def test_missing_claim_of_another_manifest_and_a_run_cut_short_was_not_run() -> None:
    new = run(claim("pass", dtype="float32"), sha256="b", selected=2)
    assert kinds(run(claim("pass"), claim("pass", dtype="float32")), new) == ["not run"]


@pytest.mark.parametrize("before", NOT_EXECUTED)
def test_missing_claim_that_was_not_executed_before_does_not_differ(before: str) -> None:
    assert kinds(run(claim(before)), run()) == []


def test_claims_are_told_apart_by_case_check_and_dtype() -> None:
    def four(first: str, *others: str) -> dict[str, Any]:
        elsewhere = ({"dtype": "float32"}, {"case": "llama/mha"}, {"check": "golden.loss"})
        return run(claim(first), *(claim(o, **place) for o, place in zip(others, elsewhere, strict=True)))

    old, new = four("pass", "fail", "pass", "pass"), four("pass", "pass", "fail", "fail")
    assert [(change.kind, change.claim) for change in compare(old, new)] == [
        ("regressed", "llama/mha · golden.logits · float64"),
        ("regressed", "llama/plain · golden.loss · float64"),
        ("fixed", "llama/plain · golden.logits · float32"),
    ]


def test_changes_are_sorted_regressions_first_and_what_was_not_run_last() -> None:
    def cases(*outcomes: str) -> list[dict[str, Any]]:
        return [claim(o, case=f"llama/{i}") for i, o in enumerate(outcomes) if o]

    old = run(*cases("pass", "", "fail", "fail", "pass"))
    new = run(*cases("skipped", "pass", "pass", "error", "fail"))
    assert kinds(old, new) == ["regressed", "fixed", "changed", "new", "not run"]


# --- errors that moved ----------------------------------------------------------------------------------------------


def moved(before: float | None, after: float | None, dtype: str, outcome: str = "pass") -> bool:
    found = kinds(run(claim(outcome, before, dtype=dtype)), run(claim(outcome, after, dtype=dtype)))
    assert found in ([], ["changed"])
    return bool(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("factor", "expected"), [(1.49, False), (1.51, True)])
def test_error_in_a_working_dtype_has_moved_beyond_half_as_much_again(
    dtype: str, factor: float, expected: bool
) -> None:
    assert moved(1e-6, factor * 1e-6, dtype) == expected
    assert moved(factor * 1e-6, 1e-6, dtype) == expected


@pytest.mark.parametrize(("factor", "expected"), [(1.49, False), (1.51, True)])
def test_error_in_float64_above_1e_12_has_moved_beyond_half_as_much_again(factor: float, expected: bool) -> None:
    assert moved(2e-12, factor * 2e-12, "float64") == expected
    assert moved(factor * 2e-12, 2e-12, "float64") == expected


@pytest.mark.parametrize(("after", "expected"), [(1.49e-12, False), (1.51e-12, True)])
@pytest.mark.parametrize("before", [0.0, 1e-16, 9e-13])
def test_error_in_float64_below_1e_12_counts_as_1e_12(before: float, after: float, expected: bool) -> None:
    assert moved(before, after, "float64") == expected
    assert moved(after, before, "float64") == expected


def test_error_in_a_working_dtype_that_was_zero_has_moved_by_any_amount() -> None:
    assert moved(0.0, 1e-9, "float32")


def test_failure_whose_error_moved_is_changed() -> None:
    assert moved(0.25, 1.0, "float64", "fail")


@pytest.mark.parametrize("unmeasured", [math.inf, math.nan])
def test_error_that_became_or_ceased_to_be_finite_has_moved(unmeasured: float) -> None:
    assert moved(0.25, unmeasured, "float32", "fail")
    assert moved(unmeasured, 0.25, "float32", "fail")


@pytest.mark.parametrize(("before", "after"), [(math.inf, math.inf), (math.nan, math.nan), (math.inf, math.nan)])
def test_errors_that_are_both_not_finite_do_not_differ(before: float, after: float) -> None:
    assert not moved(before, after, "float32", "fail")


def test_error_that_is_measured_on_one_side_only_has_moved() -> None:
    """A wrong value became a wrong shape."""
    assert moved(0.25, None, "float64", "fail")
    assert moved(None, 0.25, "float64", "fail")


# --- the command ----------------------------------------------------------------------------------------------------


def command(tmp_path: Path, old: dict[str, Any], new: dict[str, Any]) -> tuple[int, str]:
    for name, document in (("old.json", old), ("new.json", new)):
        (tmp_path / name).write_text(json.dumps(document))
    result = CliRunner().invoke(main, ["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    return result.exit_code, result.output


PASS, FAIL, SKIP = claim("pass", 2e-15), claim("fail", 0.5), claim("unsupported", message="no")
OTHER = claim("pass", 2e-15, case="llama/mha")


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        (run(PASS), run(PASS), 0),
        (run(FAIL), run(PASS), 0),
        (run(FAIL), run(claim("error")), 0),
        (run(PASS), run(PASS, OTHER, sha256="b"), 0),
        (run(PASS, OTHER), run(PASS, sha256="b"), 0),
        (run(PASS), run(FAIL), 1),
        (run(PASS), run(SKIP), 2),
        (run(PASS, OTHER), run(PASS), 2),
        (run(PASS, OTHER), run(claim("fail", case="llama/mha")), 1),
    ],
    ids=[
        "equal",
        "fixed",
        "changed",
        "new",
        "gone",
        "regressed",
        "unsupported",
        "not selected",
        "regressed and not run",
    ],
)
def test_exit_status(tmp_path: Path, old: dict[str, Any], new: dict[str, Any], status: int) -> None:
    assert command(tmp_path, old, new)[0] == status


def test_changes_are_printed_by_kind_with_both_sides(tmp_path: Path) -> None:
    _, output = command(
        tmp_path, run(PASS, OTHER), run(FAIL, claim("unsupported", case="llama/mha", message="no cache"))
    )
    assert output.splitlines() == [
        "regressed (1)",
        "  llama/plain · golden.logits · float64    pass (error 2.0e-15)  →  fail (error 5.0e-01)",
        "not run (1)",
        "  llama/mha · golden.logits · float64    pass (error 2.0e-15)  →  unsupported: no cache",
    ]


def test_equal_runs_are_said_to_be_equal(tmp_path: Path) -> None:
    assert command(tmp_path, run(PASS), run(PASS))[1] == "no claim differs\n"


@pytest.mark.parametrize("damaged", ["old.json", "new.json"])
def test_file_that_is_no_run_exits_2_and_is_named(tmp_path: Path, damaged: str) -> None:
    for name in ("old.json", "new.json"):
        (tmp_path / name).write_text("{}" if name == damaged else json.dumps(run(PASS)))
    result = CliRunner().invoke(main, ["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    assert result.exit_code == 2
    assert f"{tmp_path / damaged}: not a saved run" in result.output


def test_file_that_is_missing_exits_2_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(run(PASS)))
    result = CliRunner().invoke(main, ["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    assert result.exit_code == 2
    assert "new.json" in result.output
