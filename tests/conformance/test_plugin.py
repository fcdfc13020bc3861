"""The suite as users run it: exit statuses, selection, reports, pytest's own options, and several processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from conformance.cases import Claim, Manifest, fixtures_directory, write_json
from conformance.plugin import Run
from conformance.report.model import read_run
from conformance.worker import Died

FAKES = Path(__file__).parents[1] / "fakes.py"
CASE, OTHER = "llama/plain", "llama/mha"
SMALL, SMALLER = "llama/field-head_dim", "llama/field-rms_norm_eps"  # with few claims
Done = subprocess.CompletedProcess


def execute(*command: str, cwd: Path, **environment: str) -> Done:
    """Run a command as a user does, elsewhere than in the checkout.  `conformance` and `pytest` are this Python's."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def suite(implementation: str, case: str, *options: str) -> tuple[str, ...]:
    """The suite through plain pytest."""
    chosen = ("--implementation", implementation, "--conformance-case", case)
    return ("pytest", "--pyargs", "conformance.suite", *chosen, *options)


def fake(name: str, *options: str) -> tuple[str, ...]:
    """`conformance run` of a fake on one case, saved as run.json."""
    return ("conformance", "run", f"{FAKES}:{name}", "--case", CASE, "--save", "run.json", *options)


COMMANDS: dict[str, tuple[str, ...]] = {
    # right implementations
    "pass": suite("reference", SMALL, "--conformance-case", SMALLER, "--conformance-save", "run.json"),
    "pass, two processes": suite(
        "reference", SMALL, "--conformance-case", SMALLER, "--conformance-save", "run.json", "-n", "2", "-v"
    ),
    "cli": ("conformance", "run", "reference", "--case", SMALL, "--save", "run.json"),
    "-k": ("conformance", "run", "reference", "--case", SMALL, "--save", "run.json", "-k", "logits and float32"),
    "one dtype supported": fake("OnlyFloat16"),
    # failing ones
    "fail": fake("Zeros", "--check", "golden", "--junit-xml", "junit.xml"),
    "fail, pytest": suite(
        f"{FAKES}:Zeros", CASE, "--conformance-check", "golden.logits", "--conformance-check", "cache", "-rs"
    ),
    "some fail": fake("CrashesInPadding", "--check", "golden.logits", "--check", "golden.left_padding", "-n", "2"),
    "fail, -x": fake("Zeros", "--check", "golden.logits", "-x"),
    "fail, -x, two processes": fake("Zeros", "--check", "golden.logits", "-x", "-n", "2"),
    "hang": fake("HangsInPadding", "--check", "golden", "--timeout", "2"),
    # nothing executed
    "nothing supported": fake("NothingSupported"),
    "-k nothing": fake("Zeros", "-k", "no_such_claim"),
    # cannot run
    "import raises": ("conformance", "run", "raises.py:X", "--save", "run.json"),
    "import exits": ("conformance", "run", "exits.py:X", "--save", "run.json"),
    "import hangs": ("conformance", "run", "hangs.py:X", "--save", "run.json", "--timeout", "1"),
    "import lacks a package": ("conformance", "run", "lacks.py:X"),
    "no such family declared": fake("NoSuchFamily"),
    "no family declared": fake("NoFamily"),
    "runner killed": fake("KillsTheRunner", "--case", OTHER, "--check", "golden.logits", "-n", "2"),
}
# Each of these is refused before the implementation is even imported.
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown family": (("--family", "lama"), r"unknown family lama; there is (.*, )?llama\b"),
    "unknown case": (("--case", "llama/plane"), r"unknown case llama/plane; there is (.*, )?llama/plain\b"),
    "unknown check": (("--check", "golden.logit"), r"unknown check golden.logit; there is .*\bgolden.logits\b"),
    "unknown dtype": (("--dtype", "int8"), r"unknown dtype int8; there is bfloat16, exact, float16, float32, float64"),
    "no such claim": (
        ("--case", CASE, "--check", "golden.gradients"),
        rf"no claim matches the selection: case {CASE}, check golden.gradients",
    ),
    "no place to save": (("--save", "/dev/null/run.json"), r"the run cannot be saved as /dev/null/run.json"),
    "misspelt option": (("--famly", "llama"), r"no such option: --famly; did you mean --family\?"),
    "unknown option": (("--no-such-option",), r"pytest refuses what was passed on to it: --no-such-option"),
}


# Modules that go wrong while they are imported.
AT_IMPORT = {
    "raises": "raise RuntimeError('no GPU here')",
    "exits": "import sys; print('licence expired'); sys.exit(4)",
    "hangs": "import time; print('connecting'); time.sleep(600)",
    "lacks": "import a_package_that_nobody_has",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The working directory of the command of that name."""
    root = tmp_path_factory.mktemp("runs")

    def directory(name: str) -> Path:
        made = root / re.sub(r"\W+", "-", name)
        if not made.exists():
            made.mkdir()
            for module, source in AT_IMPORT.items():
                (made / f"{module}.py").write_text(source)
        return made

    return directory


@pytest.fixture(scope="module")
def ran(directory: Callable[[str], Path]) -> Iterator[Callable[[str], Done]]:
    """What became of the command of that name.  They run in the background, two at a time."""
    pool = ThreadPoolExecutor(2)
    futures = {name: pool.submit(execute, *command, cwd=directory(name)) for name, command in COMMANDS.items()}
    yield lambda name: futures[name].result()
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def saved(ran: Callable[[str], Done], directory: Callable[[str], Path]) -> Callable[[str], dict[str, Any]]:
    """The run that the command of that name saved; reading it validates it against the schema."""

    def saved(name: str) -> dict[str, Any]:
        done = ran(name)
        assert (directory(name) / "run.json").exists(), done.stdout + done.stderr
        return read_run(directory(name) / "run.json")

    return saved


def number_of_claims(*cases: str) -> int:
    return sum(claim.case in cases for claim in Manifest().claims())


# --- exit status -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("pass", 0),
        ("pass, two processes", 0),
        ("cli", 0),
        ("-k", 0),
        ("one dtype supported", 0),
        ("fail", 1),
        ("fail, pytest", 1),
        ("some fail", 1),
        ("fail, -x", 1),
        ("fail, -x, two processes", 1),
        ("hang", 1),
        ("nothing supported", 2),
        ("-k nothing", 2),
        ("import raises", 2),
        ("import exits", 2),
        ("import hangs", 2),
        ("import lacks a package", 2),
        ("no such family declared", 2),
        ("no family declared", 2),
        ("runner killed", 2),
    ],
)
def test_exit_status(ran: Callable[[str], Done], name: str, status: int) -> None:
    done = ran(name)
    assert done.returncode == status, done.stdout + done.stderr


def test_every_command_has_its_exit_status_tested() -> None:
    (mark,) = test_exit_status.pytestmark  # type: ignore[attr-defined]
    assert {name for name, _ in mark.args[1]} == set(COMMANDS)


# --- what cannot run says why ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", REFUSED)
def test_impossible_question_exits_2_and_says_what_there_is(tmp_path: Path, what: str) -> None:
    options, message = REFUSED[what]
    done = execute("conformance", "run", "no_such_module:X", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(message, done.stdout + done.stderr), done.stdout + done.stderr


def test_impossible_question_is_saved_as_the_problem(tmp_path: Path) -> None:
    execute("conformance", "run", "reference", "--family", "lama", "--save", "run.json", cwd=tmp_path)
    assert read_run(tmp_path / "run.json")["problem"].startswith("unknown family lama")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("import raises", "importing raises.py:X raised RuntimeError: no GPU here"),
        ("import exits", "the implementation did not survive its import: exit status 4\nlicence expired"),
        ("import hangs", "the implementation did not survive its import: no answer after 1 s\nconnecting"),
        ("import lacks a package", "No module named 'a_package_that_nobody_has'"),
        ("no such family declared", "fake declares families llama-9, which this suite does not have; it has "),
        ("no family declared", "fake declares no family; this suite has "),
    ],
)
def test_what_cannot_run_says_why(ran: Callable[[str], Done], name: str, message: str) -> None:
    done = ran(name)
    assert message in done.stdout + done.stderr


def test_a_case_says_what_a_bare_function_is(tmp_path: Path) -> None:
    """What a report prints after *reproduce* has no --family."""
    body = "return __import__('torch').nn.functional.rms_norm(x, weight.shape, weight, eps)"
    (tmp_path / "norm.py").write_text(f"def norm(x, weight, eps):\n    {body}\n")
    done = execute("conformance", "run", "norm.py:norm", "--case", "rms_norm/plain", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("options", [(), ("-n", "2")])
def test_missing_implementation_exits_2_with_the_option_to_give(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = execute("pytest", "--pyargs", "conformance.suite", *options, cwd=tmp_path)
    assert (done.returncode, "conformance.suite needs --implementation IMPL" in done.stderr) == (2, True)


@pytest.fixture
def fixtures(tmp_path: Path) -> Path:
    """A directory of fixtures with one case, its manifest's content to be rewritten at will."""
    copy = tmp_path / "fixtures"
    shutil.copytree(fixtures_directory() / CASE, copy / CASE)
    entry = Manifest().cases[CASE]
    write_json(copy / "MANIFEST.json", {"format": 1, "claims": number_of_claims(CASE), "cases": {CASE: entry}})
    return copy


def test_damaged_fixture_exits_2_naming_the_file(tmp_path: Path, fixtures: Path) -> None:
    file = fixtures / CASE / "expected.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = execute("conformance", "run", "reference", cwd=tmp_path, CONFORMANCE_FIXTURES=str(fixtures))
    assert (done.returncode, f"{file}: not the file of the manifest" in done.stderr) == (2, True)


def test_claims_of_a_check_that_does_not_exist_exit_2(tmp_path: Path, fixtures: Path) -> None:
    manifest = json.loads((fixtures / "MANIFEST.json").read_text())
    claims = manifest["cases"][CASE]["claims"]
    claims["golden.new"] = claims.pop("golden.logits")
    write_json(fixtures / "MANIFEST.json", manifest)
    done = execute("conformance", "run", "reference", cwd=tmp_path, CONFORMANCE_FIXTURES=str(fixtures))
    assert (done.returncode, "the manifest has claims of golden.new" in done.stderr) == (2, True)


def test_missing_manifest_is_saved_as_the_problem(tmp_path: Path) -> None:
    execute("conformance", "run", "reference", "--save", "run.json", cwd=tmp_path, CONFORMANCE_FIXTURES=str(tmp_path))
    assert "MANIFEST.json: cannot be read as a manifest" in read_run(tmp_path / "run.json")["problem"]


# --- counts ----------------------------------------------------------------------------------------------------------


def test_all_claims_of_the_case_are_judged(saved: Callable[[str], dict[str, Any]]) -> None:
    counts = saved("cli")["counts"]
    assert (counts["selected"], counts["executed"], counts["pass"]) == (number_of_claims(SMALL),) * 3


def test_two_processes_judge_the_same_claims_as_one(saved: Callable[[str], dict[str, Any]]) -> None:
    one, two = saved("pass"), saved("pass, two processes")
    judged = [[(c["case"], c["check"], c["dtype"], c["outcome"]) for c in run["claims"]] for run in (one, two)]
    assert judged[0] == judged[1]
    assert one["counts"] == two["counts"]


def test_claims_of_a_case_stay_in_one_of_two_processes(ran: Callable[[str], Done]) -> None:
    where = set(re.findall(r"^\[(gw\d)\].* PASSED .*\[(.+)-\w+\]", ran("pass, two processes").stdout, re.MULTILINE))
    assert sorted(case for _, case in where) == [SMALL, SMALLER]


@pytest.mark.parametrize("name", ["pass", "pass, two processes"])
def test_pytest_prints_executed_and_selected_claims(ran: Callable[[str], Done], name: str) -> None:
    total = number_of_claims(SMALL, SMALLER)
    assert f"{total} of {total} claims executed: {total} pass" in ran(name).stdout


def test_command_prints_executed_and_selected_claims(ran: Callable[[str], Done]) -> None:
    total = number_of_claims(SMALL)
    assert f"{total} of {total} claims executed: {total} pass" in ran("cli").stdout


def test_unsupported_claims_are_not_counted_as_executed(saved: Callable[[str], dict[str, Any]]) -> None:
    counts = saved("one dtype supported")["counts"]
    assert (counts["executed"], counts["pass"], counts["unsupported"]) == (1, 1, number_of_claims(CASE) - 1)


def test_everything_unsupported_is_zero_of_the_claims(ran: Callable[[str], Done]) -> None:
    total = number_of_claims(CASE)
    assert f"0 of {total} claims executed: {total} unsupported\nnothing was executed" in ran("nothing supported").stdout


def test_killed_runner_leaves_claims_without_outcome(saved: Callable[[str], dict[str, Any]]) -> None:
    counts = saved("runner killed")["counts"]
    assert counts["selected"] == 8
    assert counts["executed"] == counts["pass"] < 8


def test_claims_without_outcome_are_said(ran: Callable[[str], Done]) -> None:
    assert re.search(r"^[1-8] of 8 claims have no outcome: ", ran("runner killed").stdout, re.MULTILINE)


# --- hangs -----------------------------------------------------------------------------------------------------------


def outcomes(run: dict[str, Any]) -> dict[str, int]:
    return {k: v for k, v in run["counts"].items() if v and k not in ("selected", "executed")}


def test_after_three_timeouts_in_a_row_the_rest_of_the_case_is_skipped(saved: Callable[[str], dict[str, Any]]) -> None:
    run = saved("hang")
    assert outcomes(run) == {"pass": 4, "timeout": 3, "skipped": run["counts"]["selected"] - 7}


def test_skipped_claims_are_printed_with_their_reason(ran: Callable[[str], Done]) -> None:
    reason = "not run: 3 claims of this case in a row were timeouts"
    assert re.search(rf"^\d+ skipped: {reason}$", ran("hang").stdout, re.MULTILINE)


def test_skipped_claims_are_not_counted_as_executed(saved: Callable[[str], dict[str, Any]]) -> None:
    assert saved("hang")["counts"]["executed"] == 7


class Answers:
    """In the worker's place: an answer for each claim that is asked, True, False for a timeout, None for a crash."""

    def __init__(self, answers: Iterable[bool | None]):
        self.answers = iter(answers)

    def request(self, timeout: float, **message: Any) -> dict[str, Any] | Died:
        answer = next(self.answers)
        return (
            {"outcome": "pass", "message": ""} if answer else Died("exit status 1" if answer is None else "timeout", "")
        )

    def journalled(self) -> None:
        """No claim was running an example."""


def judged(claims: list[Claim], answers: Iterable[bool | None]) -> list[tuple[str, str]]:
    """Outcome and message of each claim, when the worker answers so."""
    run = Run.__new__(Run)
    run.timeout, run.hung, run.worker = 1.0, [], Answers(answers)  # type: ignore[assignment]
    run.settings, run.directories = {}, {}
    results = [run.judge(claim) for claim in claims]
    return [(result["outcome"], result["message"]) for result in results]


HUNG = ("timeout", "no answer after 1 s")
CASE_GIVEN_UP = ("skipped", "not run: 3 claims of this case in a row were timeouts")
RUN_GIVEN_UP = ("skipped", "not run: 9 claims in a row were timeouts")


def test_next_case_is_tried_after_one_was_given_up() -> None:
    claims = [Claim(case, str(check), "float64") for case in ("a", "b") for check in range(5)]
    assert judged(claims, [False] * 6) == [*[HUNG] * 3, *[CASE_GIVEN_UP] * 2, *[HUNG] * 3, *[CASE_GIVEN_UP] * 2]


def test_run_is_given_up_after_nine_timeouts_in_a_row() -> None:
    claims = [Claim(case, str(check), "float64") for case in "abcd" for check in range(3)]
    assert judged(claims, [False] * 9) == [*[HUNG] * 9, *[RUN_GIVEN_UP] * 3]


@pytest.mark.parametrize("answer", [True, None])
def test_answer_or_crash_starts_the_count_again(answer: bool | None) -> None:
    claims = [Claim("a", str(check), "float64") for check in range(6)]
    outcomes = [outcome for outcome, _ in judged(claims, [False, False, answer, False, False, answer])]
    assert outcomes[0:2] == outcomes[3:5] == ["timeout", "timeout"]


# --- reports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if "run.json" in command])
def test_saved_run_is_valid_under_the_schema(saved: Callable[[str], dict[str, Any]], name: str) -> None:
    assert saved(name)["schema"] == "conformance.run/1"


def test_saved_run_that_could_not_start_has_a_problem_and_no_claim(saved: Callable[[str], dict[str, Any]]) -> None:
    run = saved("import raises")
    assert run["problem"].startswith("importing raises.py:X raised RuntimeError: no GPU here\n")
    assert (run["implementation"], run["claims"]) == (None, [])


def test_junit_holds_every_claim_with_its_failure_or_skip(
    saved: Callable[[str], dict[str, Any]], directory: Callable[[str], Path]
) -> None:
    counts = saved("fail")["counts"]
    (suite,) = ElementTree.parse(directory("fail") / "junit.xml").getroot()
    assert {k: int(suite.attrib[k]) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": counts["selected"],
        "failures": counts["fail"],
        "errors": 0,
        "skipped": counts["unsupported"],
    }


def test_junit_failure_holds_the_failure_lines(ran: Callable[[str], Done], directory: Callable[[str], Path]) -> None:
    ran("fail")
    failure = ElementTree.parse(directory("fail") / "junit.xml").find(".//failure")
    assert failure is not None
    assert (failure.text or "").startswith(f"FAIL  {CASE} · golden.logits · float64    error ")


def test_pytest_shows_the_failure_lines_and_no_traceback_of_the_suite(ran: Callable[[str], Done]) -> None:
    printed = ran("fail, pytest").stdout
    assert re.search(
        rf"^FAIL  {CASE} · golden.logits · float64    error [\d.e+]+   bound 1e-10$", printed, re.MULTILINE
    )
    assert "Traceback" not in printed
    assert "ClaimNotMet" not in printed


def test_pytest_shows_how_to_repeat_a_failure(ran: Callable[[str], Done]) -> None:
    command = f"conformance run {FAKES}:Zeros --case {CASE} --check golden.logits --dtype float64"
    assert re.search(rf"^ +reproduce +{re.escape(command)}$", ran("fail, pytest").stdout, re.MULTILINE)


def test_pytest_shows_why_claims_are_unsupported(ran: Callable[[str], Done]) -> None:
    assert re.search(
        r"^SKIPPED \[\d+\] .*: unsupported: the model has no session\(\)$", ran("fail, pytest").stdout, re.MULTILINE
    )


@pytest.mark.parametrize("name", ["fail", "fail, pytest", "hang", "some fail"])
def test_no_line_ends_in_blanks(ran: Callable[[str], Done], name: str) -> None:
    about_failures = [line for line in ran(name).stdout.splitlines() if re.match(r"[A-Z]+  llama/| {6}\S", line)]
    assert about_failures
    assert [line for line in about_failures if line != line.rstrip()] == []


# --- pytest's own options --------------------------------------------------------------------------------------------


def test_k_selects_claims(saved: Callable[[str], dict[str, Any]]) -> None:
    selected = [(c["check"], c["dtype"]) for c in saved("-k")["claims"]]
    assert selected == [("golden.logits", "float32")]


@pytest.mark.parametrize("name", ["fail, -x", "fail, -x, two processes"])
def test_x_stops_at_the_first_failure(saved: Callable[[str], dict[str, Any]], name: str) -> None:
    assert saved(name)["counts"]["fail"] < 4


def test_lf_judges_only_what_failed(ran: Callable[[str], Done], directory: Callable[[str], Path]) -> None:
    ran("some fail")
    command = [option for option in COMMANDS["some fail"] if option not in ("-n", "2")]
    execute(*command, "--save", "again.json", "--lf", cwd=directory("some fail"))
    assert outcomes(read_run(directory("some fail") / "again.json")) == {"crash": 2}


def test_command_does_not_take_options_from_the_environment(tmp_path: Path) -> None:
    command = ("conformance", "run", "reference", "--case", CASE, "--check", "golden.logits", "--save", "run.json")
    execute(*command, cwd=tmp_path, PYTEST_ADDOPTS="-k float32")
    assert read_run(tmp_path / "run.json")["counts"]["executed"] == 4


# --- the plugin in other people's runs -------------------------------------------------------------------------------


def test_plugin_does_nothing_in_an_ordinary_run(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import sys\n\ndef test_other(request):\n"
        "    assert request.config.pluginmanager.has_plugin('conformance')\n"
        "    assert 'conformance.worker' not in sys.modules\n"
    )
    done = execute("pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path)
    assert (done.returncode, done.stdout.split("\n")[-2][:8]) == (0, "1 passed"), done.stdout


def test_python_interface_returns_the_run() -> None:
    from conformance import run

    document = run("reference", cases=[CASE], checks=["golden.logits"], dtypes=["float64"])
    assert outcomes(document) == {"pass": 1}


def test_python_interface_raises_what_the_command_says() -> None:
    from conformance import run

    with pytest.raises(ValueError, match=r"^unknown case llama/plane; there is "):
        run("reference", cases=["llama/plane"])
