"""The JSON of a run: made here, written here, read and validated here; its schema is `run.schema.json` beside this."""

import json
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.cases import Claim, FixtureError, Manifest

if TYPE_CHECKING:
    from conformance.worker import Died

SCHEMA = "conformance.run/1"
# The checks that the field matrix is read off.
FORWARD = ("golden.logits", "component.outputs", "tokenizer.encode")
OUTCOMES = ("pass", "fail", "error", "timeout", "crash", "unsupported", "skipped")


def died(claim: Claim, death: "Died", timeout: float) -> dict[str, Any]:
    """The result of a claim during which the candidate's process hung or died."""
    message = (
        f"no answer after {timeout:g} s" if death.outcome == "timeout" else f"the candidate's process died: {death.how}"
    )
    return {
        "case": claim.case, "check": claim.check, "dtype": claim.dtype, "outcome": death.outcome, "message": message,
        "kind": death.how, "error": None, "bound": None, "ratio": None, "details": _last_words(death.output),
        "divergence": None, "equals": None, "diagnosis": None, "notes": [],
        "seconds": timeout if death.outcome == "timeout" else 0.0, "calls": 0, "example": None, "examples": 0,
    }  # fmt: skip


def _last_words(output: str) -> list[str]:
    """The end of a dead process's output; of a fatal signal's traceback, which ends at the oldest call, the start."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    fatal = [index for index, line in enumerate(lines) if line.endswith("(most recent call first):")]
    return lines[fatal[-1] + 1 :][:3] if fatal else lines[-5:]


def not_run(claim: Claim, reason: str) -> dict[str, Any]:
    """The result of a claim that the implementation was not put to."""
    return {
        "case": claim.case, "check": claim.check, "dtype": claim.dtype, "outcome": "skipped", "message": reason,
        "kind": "", "error": None, "bound": None, "ratio": None, "details": [], "divergence": None, "equals": None,
        "diagnosis": None, "notes": [], "seconds": 0.0, "calls": 0, "example": None, "examples": 0,
    }  # fmt: skip


def run_document(
    description: dict[str, Any] | None,
    results: list[dict[str, Any]],
    selected: int,
    selection: dict[str, list[str]],
    device: str,
    problem: str | None,
    search: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The run as one JSON document.

    description: the worker's answer to "describe".  selected: how many claims should have been judged.
    search: profile and seed with which properties were searched.
    """
    try:
        manifest = Manifest()
    except FixtureError:  # the run could not start
        order, fixtures = {}, {"sha256": "", "claims": 0}
    else:
        order = {claim: index for index, claim in enumerate(manifest.claims())}
        fixtures = {"sha256": manifest.sha256, "claims": len(order)}
    results = sorted(results, key=lambda r: order.get(Claim(r["case"], r["check"], r["dtype"]), -1))
    counts = Counter(r["outcome"] for r in results)
    described = description or {"implementation": None, "environment": None}
    return {
        "schema": SCHEMA,
        "implementation": described["implementation"],
        "environment": described["environment"],
        "fixtures": fixtures,
        "selection": selection,
        "device": device,
        "problem": problem,
        "search": search,
        "counts": {"selected": selected, "executed": executed(results)} | {o: counts[o] for o in OUTCOMES},
        "claims": results,
        "fields": field_matrix(results),
    }


def executed(results: list[dict[str, Any]]) -> int:
    """Claims that the candidate was really put to: neither unsupported nor skipped."""
    return sum(r["outcome"] not in ("unsupported", "skipped") for r in results)


def field_matrix(results: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Field case -> field and verdict: honoured, ignored, refused, or wrong.

    Read off `golden.logits` or `component.outputs` in the finest dtype that ran.  *ignored*: the values are those of a
    counterfactual, a configuration in which the field was not (or not rightly) read.  *refused*: declared unsupported,
    or an exception while loading.  *wrong*: anything else that is not right.
    """
    from conformance.families import get

    rows: dict[str, dict[str, str]] = {}
    for family in dict.fromkeys(r["case"].split("/")[0] for r in results):
        for recipe in get(family).recipes:
            logits = [r for r in results if r["case"] == recipe.name and r["check"] in FORWARD]
            logits = [r for r in logits if r["outcome"] != "skipped"]  # says nothing about the field
            if recipe.field is None or not logits:
                continue
            ran = [r for r in logits if r["outcome"] != "unsupported"]
            rows[recipe.name] = {"field": recipe.field, **_field_verdict((ran or logits)[0])}
    return rows


def _field_verdict(result: dict[str, Any]) -> dict[str, str]:
    if result["outcome"] == "pass":
        return {"verdict": "honoured", "detail": ""}
    if result["outcome"] == "unsupported":
        return {"verdict": "refused", "detail": result["message"]}
    if result["equals"]:
        return {"verdict": "ignored", "detail": f"equals the oracle with {result['equals']}"}
    if result["outcome"] == "error" and result["message"].startswith("load("):
        return {"verdict": "refused", "detail": result["message"]}
    return {"verdict": "wrong", "detail": result["message"]}


def schema() -> dict[str, Any]:
    """The published JSON schema of a run."""
    return json.loads(files("conformance.report").joinpath("run.schema.json").read_text("utf-8"))  # type: ignore[no-any-return]


def write_run(path: str | Path, document: dict[str, Any]) -> None:
    """Write a run, complete or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    try:
        # A lone surrogate (an undecodable file name in a candidate's message) becomes its JSON escape.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_run(path: str | Path) -> dict[str, Any]:
    """Read a run and validate it.

    Raises: ValueError saying which file, and what in it is not as the schema says.
    """
    import jsonschema

    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    try:
        jsonschema.validate(document, schema())
    except jsonschema.ValidationError as error:
        place = "/".join(map(str, error.absolute_path)) or "the document"
        raise ValueError(f"{path}: not a saved run: {place}: {error.message[:200]}") from error
    return document  # type: ignore[no-any-return]
