"""What a failure prints: the claim, how wrong, where first, what it equals, and a command that repeats it."""

from typing import Any

import pytest

from conformance.report.text import counts_line, failure_lines, field_lines, print_summary, shortfall


def result(outcome: str, **more: Any) -> dict[str, Any]:
    return {
        "case": "llama/distinct", "check": "golden.logits", "dtype": "float64", "outcome": outcome, "message": "",
        "kind": "", "error": None, "bound": None, "ratio": None, "details": [], "divergence": None, "equals": None,
        "notes": [], "seconds": 0.25, "calls": 1,
    } | more  # fmt: skip


VALUE = result(
    "fail", kind="value", message="logits differ from the oracle's", error={"max": 1.25, "rms": 0.75},
    bound={"max": 1e-10, "rms": 1e-10}, details=["wrong in every batch row, first at position 1; 40 of 44 rows"],
)  # fmt: skip
REPRODUCE = "conformance run mod:Obj --case llama/distinct --check golden.logits --dtype"


def test_wrong_value_in_float64() -> None:
    assert failure_lines(VALUE, "mod:Obj") == [
        "FAIL  llama/distinct · golden.logits · float64    error 1.2e+00   bound 1e-10",
        "      where              wrong in every batch row, first at position 1; 40 of 44 rows",
        f"      reproduce          {REPRODUCE} float64",
    ]


def test_wrong_value_in_a_working_dtype_is_told_in_units_of_the_oracles_own_error() -> None:
    wrong = VALUE | {
        "dtype": "bfloat16", "error": {"max": 0.5, "rms": 0.25}, "bound": {"max": 0.125, "rms": 0.0625},
        "ratio": {"max": 16.0, "rms": 8.0}, "details": [],
    }  # fmt: skip
    assert failure_lines(wrong, "mod:Obj") == [
        "FAIL  llama/distinct · golden.logits · bfloat16    error 2.5e-01, 8 times the oracle's own (limit 2); "
        "by maximum 16 (limit 5)",
        f"      reproduce          {REPRODUCE} bfloat16",
    ]


def test_infinite_error_in_a_working_dtype_still_shows_the_limits() -> None:
    wrong = VALUE | {"dtype": "float32", "error": {"max": float("inf"), "rms": float("inf")}, "details": []}
    wrong |= {"bound": {"max": 1e-6, "rms": 1e-6}, "ratio": {"max": float("inf"), "rms": float("inf")}}
    assert failure_lines(wrong, "mod:Obj")[0].endswith(
        "error inf, inf times the oracle's own (limit 2); by maximum inf (limit 5)"
    )


def test_zero_error_by_one_measure_is_no_division_by_zero() -> None:
    wrong = VALUE | {"dtype": "float32", "error": {"max": 0.5, "rms": 0.0}, "ratio": {"max": 9.0, "rms": 0.0}}
    assert failure_lines(wrong, "mod:Obj")[0].endswith(
        "error 0.0e+00, 0 times the oracle's own (limit 2); by maximum 9 (limit 5)"
    )


def test_error_that_is_printed_in_float64_is_the_one_beyond_the_bound() -> None:
    wrong = VALUE | {"error": {"max": 8e-11, "rms": 1.6e-10}}
    assert failure_lines(wrong, "mod:Obj")[0].endswith("error 1.6e-10   bound 1e-10")


@pytest.mark.parametrize(
    "message",
    ["logits of block 1 alone differ from the oracle's", "gradients of lm_head.weight differ from the oracle's"],
)
def test_wrong_value_that_is_not_the_logits_is_named(message: str) -> None:
    assert f"      {message}" in failure_lines(VALUE | {"message": message}, "mod:Obj")


def test_value_wrong_in_kind_is_told_by_its_message() -> None:
    wrong = result("fail", kind="shape", message="logits of shape (4, 11), wanted (4, 11, 61) (batch, seq, vocab)")
    assert failure_lines(wrong, "mod:Obj") == [
        "FAIL  llama/distinct · golden.logits · float64",
        "      logits of shape (4, 11), wanted (4, 11, 61) (batch, seq, vocab)",
        f"      reproduce          {REPRODUCE} float64",
    ]


def test_exception_is_told_with_the_candidates_own_lines() -> None:
    raised = result(
        "error", kind="KeyError", message="load(checkpoint) raised KeyError: 'lm_head.weight'",
        details=["/x/mod.py:12 in load: head = t[name]", "/x/mod.py:40 in name: return d[k]"],
    )  # fmt: skip
    assert failure_lines(raised, "mod:Obj") == [
        "ERROR  llama/distinct · golden.logits · float64",
        "      load(checkpoint) raised KeyError: 'lm_head.weight'",
        "      where              /x/mod.py:12 in load: head = t[name]",
        "                         /x/mod.py:40 in name: return d[k]",
        f"      reproduce          {REPRODUCE} float64",
    ]


def test_crash_is_told_with_the_last_words_of_the_process() -> None:
    crashed = result(
        "crash", kind="signal SIGSEGV", message="the candidate's process died: signal SIGSEGV",
        details=["Fatal Python error: Segmentation fault"],
    )  # fmt: skip
    assert failure_lines(crashed, "mod:Obj") == [
        "CRASH  llama/distinct · golden.logits · float64",
        "      the candidate's process died: signal SIGSEGV",
        "      where              Fatal Python error: Segmentation fault",
        f"      reproduce          {REPRODUCE} float64",
    ]


def test_timeout_is_told() -> None:
    lines = failure_lines(result("timeout", kind="timeout", message="no answer after 60 s"), "mod:Obj")
    assert lines[:2] == ["TIMEOUT  llama/distinct · golden.logits · float64", "      no answer after 60 s"]


def divergence(first: str | None, *good: str, how: str = "") -> dict[str, Any]:
    return {"first_wrong": first, "last_good": list(good), "how": how, "probes_from": "golden"}


def test_first_divergence_stands_with_the_last_good_probes() -> None:
    wrong = VALUE | {"divergence": divergence("layers.0.attention.scores", "a.query_rotated", "a.key_rotated")}
    assert failure_lines(wrong, "mod:Obj")[1] == (
        "      first divergence   layers.0.attention.scores   last good: a.query_rotated, a.key_rotated"
    )


def test_first_divergence_at_the_first_probe_says_so() -> None:
    wrong = VALUE | {"divergence": divergence("embedding")}
    assert failure_lines(wrong, "mod:Obj")[1] == (
        "      first divergence   embedding   last good: none, it is the first probe"
    )


def test_first_divergence_in_a_block_alone_knows_no_last_good_probe() -> None:
    wrong = VALUE | {"divergence": divergence("layers.1.output") | {"probes_from": "blocks"}}
    assert failure_lines(wrong, "mod:Obj")[1] == "      first divergence   layers.1.output   last good: not known"


def test_what_is_known_of_the_divergence_stands_below_it() -> None:
    wrong = VALUE | {"divergence": divergence("final_norm", "layers.1.output", how="half as large as it should be")}
    assert failure_lines(wrong, "mod:Obj")[1:3] == [
        "      first divergence   final_norm   last good: layers.1.output",
        "                         half as large as it should be",
    ]


def test_divergence_that_was_not_found_says_why_alone() -> None:
    wrong = VALUE | {"divergence": divergence(None, how="no probe could be matched")}
    assert failure_lines(wrong, "mod:Obj")[1] == "                         no probe could be matched"


def test_everything_stands_in_its_order() -> None:
    wrong = VALUE | {
        "divergence": divergence("layers.0.attention.query_rotated", "layers.0.attention.query"),
        "equals": "rope_theta ignored",
        "notes": ["heads are permuted in layers.0.attention.key", "harmless"],
    }
    assert failure_lines(wrong, "mod:Obj") == [
        "FAIL  llama/distinct · golden.logits · float64    error 1.2e+00   bound 1e-10",
        "      first divergence   layers.0.attention.query_rotated   last good: layers.0.attention.query",
        "      reproduced by      the oracle with rope_theta ignored",
        "      where              wrong in every batch row, first at position 1; 40 of 44 rows",
        "      note               heads are permuted in layers.0.attention.key",
        "      note               harmless",
        f"      reproduce          {REPRODUCE} float64",
    ]


NAMED = {
    "kind": "mistake", "id": "rope-layout", "text": "Rotates neighbouring pairs.", "reproduced_to": 4.2e-15,
    "fix": "Rotate halves.",
}  # fmt: skip


def test_the_diagnosis_says_to_what_it_reproduces_the_values_and_what_to_do() -> None:
    assert failure_lines(VALUE | {"diagnosis": NAMED}, "mod:Obj")[1:3] == [
        "      diagnosis          rope-layout: Rotates neighbouring pairs.   [reproduced to 4e-15]",
        "      fix                Rotate halves.   conformance explain rope-layout",
    ]


@pytest.mark.parametrize("word", ["or", "and"])
def test_several_mistakes_are_explained_one_by_one(word: str) -> None:
    lines = failure_lines(VALUE | {"diagnosis": NAMED | {"id": f"rope-layout {word} swiglu-swap"}}, "mod:Obj")
    assert lines[2].endswith("   conformance explain rope-layout; conformance explain swiglu-swap")


def test_an_unknown_mistake_has_no_fix() -> None:
    unknown = {"kind": "unknown", "id": None, "text": "grows with the position", "reproduced_to": None, "fix": ""}
    lines = failure_lines(VALUE | {"diagnosis": unknown}, "mod:Obj")
    assert lines[1] == "      diagnosis          unknown mistake: grows with the position"
    assert not any(line.startswith("      fix") for line in lines)


@pytest.mark.parametrize(
    ("spec", "written"),
    [
        ("my_pkg.adapter:MyLlama", "my_pkg.adapter:MyLlama"),
        ("my models/a.py:Obj", "'my models/a.py:Obj'"),
        ("reference", "reference"),
    ],
)
def test_command_that_repeats_it_can_be_pasted_into_a_shell(spec: str, written: str) -> None:
    assert failure_lines(VALUE, spec)[-1].startswith(
        f"      reproduce          conformance run {written} --case llama/"
    )


# --- summaries ------------------------------------------------------------------------------------------------------


def run(selected: int, executed: int, fields: dict[str, Any] | None = None, **counts: int) -> dict[str, Any]:
    outcomes = dict.fromkeys(("pass", "fail", "error", "timeout", "crash", "unsupported", "skipped"), 0)
    return {
        "implementation": {"name": "mine 1.2"},
        "counts": {"selected": selected, "executed": executed} | outcomes | counts,
        "fields": fields or {},
    }


def test_counts_name_every_outcome_that_occurred_apart_from_the_others() -> None:
    line = counts_line(run(19, 14, **{"pass": 7, "fail": 4, "error": 2, "crash": 1, "unsupported": 3, "skipped": 2}))
    assert line == "14 of 19 claims executed: 7 pass, 4 fail, 2 error, 1 crash, 3 unsupported, 2 skipped"


def test_run_of_nothing_says_nothing() -> None:
    assert counts_line(run(5, 0)) == "0 of 5 claims executed: nothing"


FIELDS = {
    "llama/field-rope_theta": {"field": "rope_theta", "verdict": "ignored", "detail": "equals the oracle with …"},
    "llama/field-head_dim": {"field": "head_dim", "verdict": "honoured", "detail": ""},
}


def test_field_matrix_has_a_line_for_each_field_case() -> None:
    assert field_lines(run(2, 2, FIELDS)) == [
        "llama/field-rope_theta  ignored   equals the oracle with …",
        "llama/field-head_dim    honoured",
    ]


def test_summary_has_the_name_the_fields_and_the_counts() -> None:
    lines: list[str] = []
    print_summary(run(2, 2, FIELDS, **{"pass": 1, "fail": 1}), lines.append)
    assert lines == [
        "mine 1.2",
        "  llama/field-rope_theta  ignored   equals the oracle with …",
        "  llama/field-head_dim    honoured",
        "2 of 2 claims executed: 1 pass, 1 fail",
    ]


def test_summary_of_a_run_that_was_stopped_says_how_many_claims_are_missing() -> None:
    lines: list[str] = []
    print_summary(run(5, 2, **{"pass": 2}) | {"implementation": None}, lines.append)
    assert lines == [
        "2 of 5 claims executed: 2 pass",
        "3 of 5 claims have no outcome: the run was stopped, or a test process died",
    ]


def test_run_with_nothing_but_declared_gaps_proves_nothing() -> None:
    assert shortfall(run(5, 0, unsupported=3, skipped=2)) == "nothing was executed, so nothing is proved"


def test_run_with_an_outcome_for_every_claim_lacks_nothing() -> None:
    assert shortfall(run(5, 4, **{"pass": 1, "crash": 3, "unsupported": 1})) == ""
