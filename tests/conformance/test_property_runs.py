"""Properties through the command line: profile and seed, replaying an example, crashes, two runs alike."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FAKES = Path(__file__).parents[1] / "fakes.py"


def run(tmp_path: Path, implementation: str, *options: str) -> tuple[subprocess.CompletedProcess, dict[str, Any]]:
    """`conformance run` on llama/plain; the process, and the run that it saved."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "conformance", "run", implementation, "--case", "llama/plain", "--save", "run.json",
         *options],
        cwd=tmp_path, env=inherited | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    saved = tmp_path / "run.json"
    return done, json.loads(saved.read_text()) if saved.exists() else {}


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, dict[str, Any]]:
    options = ("--check", "batching.alone", "--dtype", "float64", "--profile", "ci", "--seed", "3")
    return run(tmp_path_factory.mktemp("failed"), f"{FAKES}:SwapsRows", *options)


def test_profile_and_seed_are_printed_and_saved(failed: tuple[subprocess.CompletedProcess, dict[str, Any]]) -> None:
    done, document = failed
    assert document["search"] == {"profile": "ci", "seed": 3}
    examples = sum(claim["examples"] for claim in document["claims"])
    assert examples > 0
    assert f"properties: {examples} examples, --profile ci --seed 3" in done.stdout


def test_failure_prints_a_command_that_repeats_it(
    failed: tuple[subprocess.CompletedProcess, dict[str, Any]], tmp_path: Path
) -> None:
    done, document = failed
    assert done.returncode == 1
    (claim,) = document["claims"]
    assert claim["example"] == {"batch": 2, "length": 1, "row": 0, "ids": 0}
    printed = re.search(r"reproduce +conformance run (.*)", done.stdout)
    assert printed
    implementation, *options = shlex.split(printed[1])
    again, repeated = run(tmp_path, implementation, *options)
    assert again.returncode == 1
    assert [(c["message"], c["example"], c["examples"]) for c in repeated["claims"]] == [
        (claim["message"], claim["example"], 1)
    ]


def test_two_runs_are_alike(tmp_path: Path) -> None:
    options = ("--check", "batching", "--check", "cache.any_plan", "--dtype", "float64")
    runs = [run(tmp_path, "reference", *options)[1] for _ in range(2)]
    for document in runs:
        for claim in document["claims"]:
            assert (claim.pop("seconds") > 0, claim["outcome"]) == (True, "pass")
    assert runs[0]["claims"] == runs[1]["claims"]


def test_crash_is_reported_with_the_example_that_repeats_it(tmp_path: Path) -> None:
    done, document = run(tmp_path, f"{FAKES}:SegfaultsOnLongTexts", "--check", "batching.alone", "--dtype", "float64")
    (claim,) = document["claims"]
    assert (done.returncode, claim["outcome"]) == (1, "crash")
    assert claim["example"]["length"] >= 5
    assert f"--example '{json.dumps(claim['example'])}'" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--example", '{"ids": 0}'), "--example replays one claim, "),
        (("--example", "ids", "--check", "batching.alone", "--dtype", "float64"), "--example 'ids' is not JSON"),
        (("--example", "[1]", "--check", "batching.alone", "--dtype", "float64"), "is not a JSON object"),
    ],
)
def test_example_that_cannot_be_replayed_is_refused(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    done, _ = run(tmp_path, "reference", *options)
    assert (done.returncode, message in done.stdout + done.stderr) == (2, True), done.stdout + done.stderr
