"""The commands: what they print, what they exit with, and what they do with bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import conformance
from conformance.cases import Manifest
from conformance.cli import main
from conformance.families import FAMILIES
from conformance.report.model import OUTCOMES
from conformance.suite import checks

CASE = "llama/plain"


def command(*arguments: str) -> Result:
    """A command in this process."""
    return CliRunner().invoke(main, arguments)


def python(program: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


# --- list ------------------------------------------------------------------------------------------------------------


def names(listed: Result) -> list[str]:
    assert listed.exit_code == 0, listed.output
    return [line.split()[0] for line in listed.output.splitlines()]


def test_list_shows_families_unless_told_otherwise() -> None:
    assert names(command("list")) == names(command("list", "families"))


def test_list_families_shows_every_family_of_the_manifest() -> None:
    assert set(names(command("list", "families"))) >= set(Manifest().families)


def test_list_cases_shows_every_case_of_the_manifest() -> None:
    assert names(command("list", "cases")) == list(Manifest().cases)


def test_list_checks_shows_every_check() -> None:
    assert names(command("list", "checks")) == list(checks())


def test_list_implementations_shows_the_built_in_ones() -> None:
    assert names(command("list", "implementations")) == [
        "reference", "reference-sdpa", "reference-pipeline-2", "reference-pipeline-3", "reference-tensor-parallel-2",
        "reference-tensor-parallel-3", "hf", "hf-sdpa",
    ]  # fmt: skip


def test_list_of_something_else_exits_2_and_says_what_there_is() -> None:
    listed = command("list", "models")
    assert (listed.exit_code, "'families', 'cases', 'checks', 'implementations'" in listed.output) == (2, True)


@pytest.mark.parametrize("arguments", [["list"], ["list", "cases"], ["list", "checks"], ["list", "implementations"]])
def test_list_does_without_torch(arguments: list[str]) -> None:
    done = python(
        "import sys; from conformance.cli import main\n"
        f"main({arguments}, standalone_mode=False)\n"
        "print('heavy:', *sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert done.stdout.splitlines()[-1] == "heavy:", done.stderr


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["run"], ["list"], ["explain"], ["compare"], ["export"], ["golden"]])
def test_help_is_there(arguments: list[str]) -> None:
    shown = command(*arguments, "--help")
    assert (shown.exit_code, shown.output.startswith("Usage: ")) == (0, True)


def test_help_says_what_exit_statuses_mean() -> None:
    assert "0 all claims passed, 1 a claim failed, 2 could not run" in " ".join(command("--help").output.split())


def test_help_of_run_says_what_becomes_of_a_candidate_that_hangs() -> None:
    assert "After 3 in a row the rest of the case is skipped" in " ".join(command("run", "--help").output.split())


def test_version_is_the_packages() -> None:
    assert command("--version").output == f"conformance, version {conformance.__version__}\n"


def test_unknown_command_exits_2() -> None:
    assert command("lsit").exit_code == 2


# --- explain ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identifier", ["llama", CASE, "golden.logits", "layers.N.attention.key", "rope_theta"])
def test_explain_begins_with_what_it_explains(identifier: str) -> None:
    explained = command("explain", identifier)
    assert explained.exit_code == 0
    assert explained.output.splitlines()[0].split(" (")[0].split(":")[0].endswith(identifier)


def test_explain_takes_a_probe_with_its_layer() -> None:
    assert command("explain", "layers.1.attention.key").output == command("explain", "layers.N.attention.key").output


def test_explain_case_names_every_check_of_the_case() -> None:
    explained = command("explain", CASE).output
    assert [check for check in Manifest().cases[CASE]["claims"] if f"  {check} " not in explained] == []


@pytest.mark.parametrize("case", Manifest().cases)
def test_every_case_can_be_explained(case: str) -> None:
    assert command("explain", case).exit_code == 0


@pytest.mark.parametrize("check", checks())
def test_every_check_can_be_explained(check: str) -> None:
    assert command("explain", check).exit_code == 0


def test_explain_of_something_unknown_exits_2_and_names_the_nearest() -> None:
    explained = command("explain", "golden.logit")
    assert explained.exit_code == 2
    assert re.fullmatch(
        r"Error: nothing is called 'golden\.logit'; did you mean golden\.logits\b.*\?\n", explained.output
    )


# --- run -------------------------------------------------------------------------------------------------------------


def test_run_without_implementation_exits_2() -> None:
    assert command("run").exit_code == 2


# --- compare ---------------------------------------------------------------------------------------------------------


def claim(outcome: str, rms: float | None = None) -> dict[str, Any]:
    error = None if rms is None else {"max": rms, "rms": rms}
    return {
        "case": CASE, "check": "golden.logits", "dtype": "float64", "outcome": outcome, "message": "", "kind": "",
        "error": error, "bound": error, "ratio": None, "details": [], "divergence": None, "equals": None, "notes": [],
        "seconds": 0.1, "calls": 1,
    }  # fmt: skip


@pytest.fixture
def run_file(tmp_path: Path) -> Callable[..., str]:
    """Writes a saved run with one claim, or none, and returns its path."""

    def run_file(outcome: str | None, rms: float | None = None) -> str:
        counts = {"selected": 1, "executed": 1} | {o: int(o == outcome) for o in OUTCOMES}
        document = {
            "schema": "conformance.run/1", "implementation": None, "environment": None,
            "fixtures": {"sha256": "0", "claims": 1},
            "selection": {what: [] for what in ("family", "case", "check", "dtype")},
            "device": "cpu", "problem": None, "counts": counts, "fields": {},
            "claims": [] if outcome is None else [claim(outcome, rms)],
        }  # fmt: skip
        path = tmp_path / f"{outcome}-{rms}.json"
        path.write_text(json.dumps(document))
        return str(path)

    return run_file


@pytest.mark.parametrize(
    ("old", "new", "status", "headline"),
    [
        (("pass", 1e-15), ("pass", 2e-15), 0, "no claim differs"),
        (("pass", 1e-15), ("fail", 1.0), 1, "regressed (1)"),
        (("pass", 1e-15), ("crash", None), 1, "regressed (1)"),
        (("fail", 1.0), ("pass", 1e-15), 0, "fixed (1)"),
        (("fail", 1.0), ("timeout", None), 0, "changed (1)"),
        (("pass", 1e-15), ("pass", 1e-11), 0, "changed (1)"),
        (("pass", 1e-15), ("unsupported", None), 2, "not run (1)"),
        (("pass", 1e-15), (None, None), 2, "not run (1)"),
        ((None, None), ("pass", 1e-15), 0, "new (1)"),
    ],
)
def test_compare(
    run_file: Callable[..., str], old: tuple[Any, Any], new: tuple[Any, Any], status: int, headline: str
) -> None:
    compared = command("compare", run_file(*old), run_file(*new))
    assert (compared.exit_code, compared.output.splitlines()[0]) == (status, headline)


def test_compare_names_claim_and_both_outcomes(run_file: Callable[..., str]) -> None:
    compared = command("compare", run_file("pass", 1e-15), run_file("fail", 1.0))
    assert compared.output.splitlines()[1] == (
        f"  {CASE} · golden.logits · float64    pass (error 1.0e-15)  →  fail (error 1.0e+00)"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "cannot be read as JSON"),
        ("{}", "not a saved run: the document: 'schema' is a required property"),
        ('{"schema": "conformance.run/1"}', "not a saved run: the document: 'implementation' is a required property"),
    ],
)
def test_compare_refuses_what_is_no_saved_run(
    run_file: Callable[..., str], tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "bad.json").write_text(content)
    compared = command("compare", run_file("pass"), str(tmp_path / "bad.json"))
    assert (compared.exit_code, f"bad.json: {message}" in compared.output) == (2, True), compared.output


def test_compare_with_a_missing_file_exits_2(run_file: Callable[..., str]) -> None:
    assert command("compare", run_file("pass"), "nowhere.json").exit_code == 2


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exported") / "llama" / "distinct"
    done = command("export", "llama/distinct", str(directory))
    assert done.exit_code == 0, done.output
    return directory


def test_export_writes_a_checkpoint_with_inputs_and_expected_values(exported: Path) -> None:
    assert sorted(os.listdir(exported)) == [
        "config.json", "expected.safetensors", "inputs.safetensors", "model.safetensors", "provenance.json",
    ]  # fmt: skip


def test_exported_checkpoint_holds_all_weights(exported: Path) -> None:
    from safetensors.torch import load_file

    assert load_file(exported / "model.safetensors").keys() == conformance.Case("llama/distinct").weights.keys()


def test_exported_case_can_be_opened_from_its_directory(exported: Path) -> None:
    import torch

    opened, original = conformance.Case(exported), conformance.Case("llama/distinct")
    assert opened.name == "llama/distinct"
    assert torch.equal(opened.expected["logits"], original.expected["logits"])


def test_an_exported_case_is_judged_from_its_directory_and_said_to_be_there(exported: Path, tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    done = subprocess.run(
        [sys.executable, "-m", "conformance", "run", "fakes.py:Zeros", "--case", str(exported), "--check",
         "golden.logits", "--dtype", "float64", "--save", str(saved)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert f"--case {exported} --check golden.logits" in done.stdout
    assert [claim["directory"] for claim in json.loads(saved.read_text())["claims"]] == [str(exported)]
    assert done.returncode == 1


@pytest.mark.parametrize("missing", ["recipe", "claims"])
def test_a_directory_that_does_not_say_what_it_claims_is_refused(exported: Path, tmp_path: Path, missing: str) -> None:
    shutil.copytree(exported, tmp_path / "case")
    provenance = tmp_path / "case" / "provenance.json"
    content = json.loads(provenance.read_text())
    del content[missing]
    provenance.write_text(json.dumps(content))
    done = python(f"from conformance.cli import main; main(['run', 'reference', '--case', {str(tmp_path / 'case')!r}])")
    assert (done.returncode, "says neither recipe nor claims" in done.stdout + done.stderr) == (2, True)


def test_transformers_loads_an_export_and_agrees_in_true_double(exported: Path) -> None:
    import torch

    from conformance.oracles.true_double import TrueDouble

    transformers = pytest.importorskip("transformers")
    case = conformance.Case(exported)
    with TrueDouble(), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            exported, dtype=torch.float64, attn_implementation="eager"
        ).eval()
        logits = model(case.inputs["input_ids"], use_cache=False).logits
    error = (logits - case.expected["logits"]).abs().max() / case.expected["logits"].abs().max()
    assert error <= 1e-10


def test_reference_loads_an_export_and_agrees_in_true_double(exported: Path) -> None:
    import torch

    from conformance.oracles.true_double import TrueDouble
    from reference_impl.checkpoint import load_model

    case = conformance.Case(exported)
    with TrueDouble(), torch.no_grad():
        model = load_model(exported, dtype=torch.float64, device=torch.device("cpu"), attention="eager").eval()
        returned = model(case.inputs["input_ids"])
    logits = returned if isinstance(returned, torch.Tensor) else returned["logits"]
    error = (logits - case.expected["logits"]).abs().max() / case.expected["logits"].abs().max()
    assert error <= 1e-10


def test_export_of_an_unknown_case_exits_2(tmp_path: Path) -> None:
    done = command("export", "llama/plane", str(tmp_path / "new"))
    assert (done.exit_code, "no case 'llama/plane'" in done.output) == (2, True)


def test_export_of_an_unknown_case_writes_nothing(tmp_path: Path) -> None:
    command("export", "llama/plane", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_export_into_a_directory_in_use_exits_2(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    done = command("export", CASE, str(tmp_path))
    assert (done.exit_code, "is not empty" in done.output) == (2, True)


def test_export_into_a_directory_in_use_leaves_it_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    command("export", CASE, str(tmp_path))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config.json": "mine"}


# --- golden ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["make", "verify"])
def test_golden_of_an_unknown_family_exits_2_and_says_what_there_is(what: str, tmp_path: Path) -> None:
    done = command("golden", what, "lama", "--fixtures", str(tmp_path))
    assert done.exit_code == 2
    assert re.search(r"unknown family lama; there is .*\bllama\b", done.output)


NEEDS = "needs transformers<=4.37.2, this is 5.23.0"


@pytest.fixture
def another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release of transformers that has no Transformer-XL, whatever is installed."""
    pytest.importorskip("transformers")
    monkeypatch.setattr("conformance.oracles.version", lambda _: "5.23.0")


@pytest.mark.usefixtures("another_release")
@pytest.mark.parametrize(("what", "done"), [("make", "made"), ("verify", "verified")])
def test_golden_whose_oracle_is_in_another_release_exits_2_and_says_which(what: str, done: str, tmp_path: Path) -> None:
    shutil.copy(Manifest().directory / "MANIFEST.json", tmp_path)
    before = (tmp_path / "MANIFEST.json").read_bytes()
    result = command("golden", what, "transformer_xl", "--fixtures", str(tmp_path))
    assert result.exit_code == 2
    assert f"transformer_xl: not {done} here: {NEEDS}" in result.output.splitlines()
    assert "goldens verified" not in result.output
    assert (tmp_path / "MANIFEST.json").read_bytes() == before


@pytest.mark.usefixtures("another_release")
@pytest.mark.parametrize(
    ("arguments", "problems", "exit_code", "last"),
    [
        ((), [], 0, "all other goldens verified"),
        (("gpt", "transformer_xl"), [], 2, "all other goldens verified"),
        (("gpt", "transformer_xl"), ["gpt/plain: differs"], 1, "1 differences"),
        (("gpt",), [], 0, "all goldens verified"),
    ],
)
def test_golden_verify_counts_apart_what_it_cannot_verify(
    arguments: tuple[str, ...], problems: list[str], exit_code: int, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[str] = []
    monkeypatch.setattr("conformance.golden.verify", lambda names, *_: verified.extend(names) or problems)
    result = command("golden", "verify", *arguments)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (exit_code, last)
    assert "transformer_xl" not in verified
    asked = list(arguments) or list(FAMILIES)
    apart = f"1 of {len(asked)} families not verified here: transformer_xl"
    assert (apart in result.output) == ("transformer_xl" in asked)
    assert (f"transformer_xl: not verified here: {NEEDS}" in result.output) == ("transformer_xl" in asked)


@pytest.mark.parametrize(
    ("release", "declared"),
    [("5.23.0", "llama and others"), ("4.35.2", "transformer_xl"), ("4.37.2", "transformer_xl"), ("4.38.0", "neither")],
)
def test_hf_declares_families_whose_model_the_release_has(
    release: str, declared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conformance.implementations.hf import IMPLEMENTATIONS

    monkeypatch.setattr("conformance.oracles.version", lambda _: release)
    families = IMPLEMENTATIONS["hf"].families
    wanted = {"llama and others": (True, False), "transformer_xl": (False, True), "neither": (False, False)}
    assert ("llama" in families, "transformer_xl" in families) == wanted[declared]
    assert "transformer_xl" not in IMPLEMENTATIONS["hf-sdpa"].families


def test_oracle_of_a_component_needs_no_release(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    from conformance.oracles import oracle_missing

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("conformance.oracles.version", absent)
    assert oracle_missing("rms_norm") is None
    assert oracle_missing("transformer_xl") == "needs transformers<=4.37.2, which is not installed"
