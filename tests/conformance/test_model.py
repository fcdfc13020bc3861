"""The JSON of a run: valid by its own schema whatever happened, written whole or not at all, and refused by name."""

import copy
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from conformance.cases import Claim
from conformance.report.model import (
    OUTCOMES,
    died,
    executed,
    field_matrix,
    not_run,
    read_run,
    run_document,
    schema,
    write_run,
)
from conformance.worker import Died

DESCRIPTION = {
    "implementation": {"spec": "mod:Obj", "name": "mine 1.2", "families": ["llama"], "dtypes": ["float64", "float32"]},
    "environment": {"python": "3.11.7", "transformers": None},
}
NO_FILTER: dict[str, list[str]] = {"family": [], "case": [], "check": [], "dtype": []}
CLAIMS = {
    "llama/plain": {"golden.logits": ["float64", "float32"], "cache.chunks": ["float64"]},
    "llama/field-rope_theta": {"golden.logits": ["float64", "float32"]},
}


@pytest.fixture(autouse=True)
def fixtures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest of two cases for the document to refer to; their files are not opened."""
    names = ("config.json", "model.safetensors", "inputs.safetensors", "expected.safetensors", "provenance.json")
    files = {name: {"sha256": "0", "bytes": 0} for name in names}
    cases = {name: {"claims": claims, "files": files} for name, claims in CLAIMS.items()}
    directory = tmp_path / "fixtures"
    directory.mkdir()
    (directory / "MANIFEST.json").write_text(json.dumps({"format": 1, "claims": 5, "cases": cases}))
    monkeypatch.setenv("CONFORMANCE_FIXTURES", str(directory))


def result(outcome: str, case: str = "llama/plain", check: str = "golden.logits", **more: Any) -> dict[str, Any]:
    return {
        "case": case, "check": check, "dtype": "float64", "outcome": outcome, "message": "", "kind": "", "error": None,
        "bound": None, "ratio": None, "details": [], "divergence": None, "equals": None, "notes": [], "seconds": 0.25,
        "calls": 2,
    } | more  # fmt: skip


def pair(value: float) -> dict[str, float]:
    return {"max": value, "rms": value / 3}


def document(*results: dict[str, Any], **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "description": DESCRIPTION, "selected": len(results), "selection": NO_FILTER, "device": "cpu", "problem": None,
    }  # fmt: skip
    return run_document(results=copy.deepcopy(list(results)), **(settings | changes))


EXAMPLES = {
    "pass": result("pass", error=pair(2e-15), bound=pair(1e-10)),
    "fail": result(
        "fail", dtype="float32", kind="value", message="logits differ from the oracle's", error=pair(0.5),
        bound=pair(1e-6), ratio=pair(1e6), details=["wrong in every row and position"], equals="rope_theta ignored",
        divergence={"first_wrong": "final_norm", "last_good": ["embedding"], "how": "", "probes_from": "golden"},
        notes=["permuted along heads"],
    ),
    "error": result(
        "error", kind="KeyError", message="load(checkpoint) raised KeyError: 'x'", details=["a.py:3 in f: g()"]
    ),
    "timeout": died(Claim("llama/plain", "golden.logits", "float64"), Died("timeout", ""), 2.5),
    "crash": died(Claim("llama/plain", "golden.logits", "float64"), Died("signal SIGSEGV", "a\n\nb\n"), 2.5),
    "unsupported": result("unsupported", message="declares to run in float32 only"),
    "skipped": result("skipped", message="no GPU"),
}  # fmt: skip


# --- the document ---------------------------------------------------------------------------------------------------


def test_there_is_an_example_of_every_outcome() -> None:
    assert tuple(EXAMPLES) == OUTCOMES


@pytest.mark.parametrize("outcome", EXAMPLES)
def test_document_with_this_outcome_is_valid(outcome: str) -> None:
    jsonschema.validate(document(EXAMPLES[outcome]), schema())


@pytest.mark.parametrize("outcome", EXAMPLES)
def test_outcome_is_counted_as_itself_alone(outcome: str) -> None:
    counts = document(EXAMPLES[outcome])["counts"]
    assert {name: counts[name] for name in EXAMPLES} == {name: int(name == outcome) for name in EXAMPLES}


@pytest.mark.parametrize(("outcome", "expected"), [*((o, 1) for o in OUTCOMES[:5]), ("unsupported", 0), ("skipped", 0)])
def test_executed_are_the_claims_that_the_candidate_was_put_to(outcome: str, expected: int) -> None:
    assert executed([EXAMPLES[outcome]]) == expected
    assert document(EXAMPLES[outcome])["counts"]["executed"] == expected


def test_selected_counts_what_should_have_been_judged() -> None:
    counts = document(EXAMPLES["pass"], selected=5)["counts"]
    assert (counts["selected"], counts["executed"]) == (5, 1)


def test_run_that_could_not_be_made_is_valid_and_says_why() -> None:
    made = document(description=None, problem="no module named 'mine'")
    jsonschema.validate(made, schema())
    assert (made["implementation"], made["environment"], made["problem"]) == (None, None, "no module named 'mine'")


def test_document_names_the_fixtures_it_was_judged_by() -> None:
    manifest = Path(os.environ["CONFORMANCE_FIXTURES"], "MANIFEST.json")
    assert document()["fixtures"] == {"sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(), "claims": 5}


def test_run_without_readable_fixtures_is_valid_and_says_that_there_are_none() -> None:
    Path(os.environ["CONFORMANCE_FIXTURES"], "MANIFEST.json").write_text("{")
    made = document(problem="MANIFEST.json: cannot be read as a manifest")
    jsonschema.validate(made, schema())
    assert made["fixtures"] == {"sha256": "", "claims": 0}


def test_claims_stand_in_the_manifests_order_however_they_arrived() -> None:
    arrived = [
        result("pass", "llama/field-rope_theta", dtype="float32"),
        result("pass", check="cache.chunks"),
        result("pass", "llama/field-rope_theta"),
        result("pass"),
        result("pass", dtype="float32"),
    ]
    ordered = [(c["case"], c["check"], c["dtype"]) for c in document(*arrived)["claims"]]
    assert ordered == [(case, check, d) for case, checks in CLAIMS.items() for check, ds in checks.items() for d in ds]


def test_selection_and_device_are_recorded() -> None:
    made = document(selection=NO_FILTER | {"dtype": ["float32"]}, device="cuda:1")
    jsonschema.validate(made, schema())
    assert (made["selection"]["dtype"], made["device"]) == (["float32"], "cuda:1")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"outcome": "passed"}, "outcome"),
        ({"dtype": "int8"}, "dtype"),
        ({"error": {"max": 1.0}}, "'rms' is a required property"),
        ({"seconds": -1.0}, "seconds"),
        ({"calls": 1.5}, "calls"),
        ({"surprise": 1}, "surprise"),
        ({"divergence": {"first_wrong": None}}, "divergence"),
    ],
)
def test_schema_refuses_a_claim_that_is_none(change: dict[str, Any], place: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=place):
        jsonschema.validate(document(EXAMPLES["pass"] | change), schema())


def test_schema_is_itself_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


# --- claims during which the process died ---------------------------------------------------------------------------


def test_timeout_says_how_long_was_waited() -> None:
    made = EXAMPLES["timeout"]
    assert (made["outcome"], made["message"], made["seconds"]) == ("timeout", "no answer after 2.5 s", 2.5)


def test_crash_says_how_the_process_died_and_what_it_said_last() -> None:
    output = "\n".join(["one", "two", "", "three", "four", "  ", "five", "six"]) + "\n"
    made = died(Claim("llama/mha", "cache.chunks", "bfloat16"), Died("exit status 3", output), 60.0)
    assert (made["case"], made["check"], made["dtype"]) == ("llama/mha", "cache.chunks", "bfloat16")
    assert (made["outcome"], made["message"]) == ("crash", "the candidate's process died: exit status 3")
    assert made["details"] == ["two", "three", "four", "five", "six"]


def test_fatal_signal_is_told_by_the_innermost_frames_of_its_traceback() -> None:
    """Python's fault handler prints the most recent call first: the beginning says where, the end is the suite."""
    frames = ["File a.py, line 3 in kernel", "File b.py, line 5 in forward", "File c.py, line 7 in call"]
    older = [f"File d.py, line {line} in main" for line in range(9)]
    output = "\n".join(["Segmentation fault", "", "Current thread 0x1 (most recent call first):", *frames, *older])
    made = died(Claim("llama/mha", "cache.chunks", "bfloat16"), Died("signal SIGSEGV", output), 60.0)
    assert made["details"] == frames


def test_claim_that_was_not_run_is_skipped_with_the_reason_and_valid() -> None:
    made = not_run(Claim("llama/plain", "cache.chunks", "float64"), "the implementation could not be loaded")
    assert (made["outcome"], made["message"], made["calls"]) == ("skipped", "the implementation could not be loaded", 0)
    jsonschema.validate(document(made), schema())


# --- the field matrix -----------------------------------------------------------------------------------------------

FIELD = "llama/field-rope_theta"


def verdict(*results: dict[str, Any]) -> tuple[str, str]:
    row = field_matrix(list(results))[FIELD]
    assert row["field"] == "rope_theta"
    return row["verdict"], row["detail"]


def test_field_of_a_case_that_passes_is_honoured() -> None:
    assert verdict(result("pass", FIELD)) == ("honoured", "")


def test_field_whose_counterfactual_is_reproduced_is_ignored() -> None:
    wrong = result("fail", FIELD, kind="value", message="logits differ", equals="rope_theta ignored")
    assert verdict(wrong) == ("ignored", "equals the oracle with rope_theta ignored")


def test_field_declared_unsupported_is_refused_with_the_reason() -> None:
    assert verdict(result("unsupported", FIELD, message="theta is fixed")) == ("refused", "theta is fixed")


def test_field_that_raises_while_loading_is_refused_with_the_exception() -> None:
    message = "load(checkpoint) raised ValueError: rope_theta"
    assert verdict(result("error", FIELD, kind="ValueError", message=message)) == ("refused", message)


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        ("fail", "logits differ from the oracle's"),
        ("error", "model(…) raised IndexError: 3"),
        ("timeout", "no answer after 60 s"),
        ("crash", "the candidate's process died: signal SIGSEGV"),
    ],
)
def test_anything_else_that_is_not_right_is_wrong(outcome: str, message: str) -> None:
    assert verdict(result(outcome, FIELD, message=message)) == ("wrong", message)


def test_verdict_is_of_the_finest_dtype_that_ran() -> None:
    made = document(
        result("pass", FIELD, dtype="float32"), result("fail", FIELD, equals="rope_theta ignored", kind="value")
    )
    assert made["fields"][FIELD]["verdict"] == "ignored"


def test_dtype_that_is_unsupported_leaves_the_verdict_to_the_next() -> None:
    declared = result("unsupported", FIELD, message="no float64")
    assert verdict(declared, result("pass", FIELD, dtype="float32")) == ("honoured", "")


def test_skipped_claim_says_nothing_about_its_field() -> None:
    skipped = result("skipped", FIELD, message="no GPU")
    assert field_matrix([skipped]) == {}
    assert verdict(skipped, result("pass", FIELD, dtype="float32"))[0] == "honoured"


def test_matrix_reads_the_logits_alone() -> None:
    assert field_matrix([result("fail", FIELD, check="cache.chunks")]) == {}


def test_case_that_moves_no_field_has_no_row() -> None:
    assert field_matrix([result("fail", "llama/plain"), result("pass", "llama/distinct")]) == {}


# --- files ----------------------------------------------------------------------------------------------------------


def test_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = document(*EXAMPLES.values())
    write_run(tmp_path / "new" / "run.json", made)
    assert read_run(tmp_path / "new" / "run.json") == made
    assert os.listdir(tmp_path / "new") == ["run.json"]


@pytest.mark.parametrize("value", [math.inf, 1e-320, 0.0, 1.7976931348623157e308, 0.1 + 0.2])
def test_numbers_survive_the_file(tmp_path: Path, value: float) -> None:
    write_run(tmp_path / "run.json", document(result("fail", error={"max": value, "rms": -value})))
    assert read_run(tmp_path / "run.json")["claims"][0]["error"] == {"max": value, "rms": -value}


def test_nan_survives_the_file(tmp_path: Path) -> None:
    write_run(
        tmp_path / "run.json", document(result("fail", error={"max": math.nan, "rms": 0.5}, ratio=pair(math.nan)))
    )
    read = read_run(tmp_path / "run.json")["claims"][0]
    assert math.isnan(read["error"]["max"])
    assert math.isnan(read["ratio"]["rms"])
    assert read["error"]["rms"] == 0.5


@pytest.mark.parametrize(
    "message", ["ε · – 漢 \N{OK HAND SIGN}", 'a "quoted" \\ line\nbreak\t\0', "caf\udce9.py, \ud83d alone"]
)
def test_text_survives_the_file(tmp_path: Path, message: str) -> None:
    """Lone surrogates stand for bytes of file names that are no UTF-8; a candidate's exception may quote them."""
    write_run(tmp_path / "run.json", document(result("error", message=message)))
    assert read_run(tmp_path / "run.json")["claims"][0]["message"] == message


def test_run_that_cannot_be_json_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_run(tmp_path / "run.json", document(result("pass", notes=[{1, 2}])))
    assert not (tmp_path / "run.json").exists()
    assert list(tmp_path.glob("run*")) == []


def test_run_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(OSError, match=r"run\.json"):
        write_run(tmp_path / "run.json", document())
    assert [path.name for path in tmp_path.glob("run*")] == ["run.json"]


def test_full_disk_leaves_the_earlier_run_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run.json", document(EXAMPLES["pass"]))
    before = (tmp_path / "run.json").read_bytes()
    real = Path.write_text

    def cut_short(self: Path, text: str, **options: Any) -> int:
        real(self, text[:20], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", cut_short)
    with pytest.raises(OSError, match="No space left"):
        write_run(tmp_path / "run.json", document(EXAMPLES["fail"]))
    assert (tmp_path / "run.json").read_bytes() == before
    assert [path.name for path in tmp_path.glob("run*")] == ["run.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"schema": '])
def test_file_that_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json: cannot be read as JSON"):
        read_run(tmp_path / "run.json")


def test_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.json: cannot be read as JSON .*No such file"):
        read_run(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (lambda d: d["claims"][1].update(outcome="passed"), "claims/1/outcome: 'passed' is not one of"),
        (lambda d: d["claims"][2].pop("notes"), "claims/2: 'notes' is a required property"),
        (lambda d: d["counts"].update(selected=-1), "counts/selected: -1 is less than"),
        (lambda d: d["fixtures"].update(sha256=7), "fixtures/sha256: 7 is not of type 'string'"),
        (lambda d: d["fields"].update(x={"field": "y", "verdict": "?", "detail": ""}), "fields/x/verdict: '\\?'"),
        (lambda d: d.update(schema="conformance.run/2"), "schema: 'conformance.run/1' was expected"),
        (lambda d: d.pop("problem"), "the document: 'problem' is a required property"),
        (lambda d: d.update(surprise=1), "the document: .*'surprise' was unexpected"),
    ],
)
def test_run_that_the_schema_refuses_is_named_with_the_place(tmp_path: Path, edit: Any, place: str) -> None:
    made = document(*EXAMPLES.values())
    edit(made)
    (tmp_path / "run.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match=rf"run\.json: not a saved run: {place}"):
        read_run(tmp_path / "run.json")


def test_json_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[3]")
    with pytest.raises(ValueError, match=r"run\.json: not a saved run: the document: \[3\] is not of type 'object'"):
        read_run(tmp_path / "run.json")
