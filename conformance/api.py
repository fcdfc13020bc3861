"""The Python interface: `check` one claim in this process, `run` a whole implementation as the command line does."""

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.cases import Case, Claim
from conformance.report.model import read_run
from conformance.search import DEFAULT_PROFILE, DEFAULT_SEED, PROFILES, Settings

if TYPE_CHECKING:
    from conformance.judge import Result


def check(
    implementation: Any,
    case: str | Case,
    check: str = "golden.logits",
    dtype: str = "float64",
    device: str = "cpu",
    *,
    profile: str = DEFAULT_PROFILE,
    seed: int = DEFAULT_SEED,
    example: dict[str, Any] | None = None,
    diagnose: bool = True,
) -> "Result":
    """Judge one claim in this process (a hang or a crash is then this process's).

    implementation: an object or function of the contract, or what a command line would name (`reference`, `mod:Obj`).
    profile, seed, example: how many examples of a property are drawn ("quick", "ci", "thorough"), which, or this one.
    diagnose: on a failure, simulate known mistakes, which takes seconds.
    Raises: ValueError for an unknown check, dtype or profile, FixtureError for a damaged case.
    """
    from conformance.implementation import DTYPES, EXACT, adopt, resolve
    from conformance.judge import Judge, judge
    from conformance.suite import checks

    known = checks()
    if check not in known:
        raise ValueError(f"unknown check {check!r}; there is {', '.join(known)}")
    if dtype not in (*DTYPES, EXACT):
        raise ValueError(f"unknown dtype {dtype!r}; there is {', '.join((*DTYPES, EXACT))}")
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; there is {', '.join(PROFILES)}")
    found = resolve(implementation) if isinstance(implementation, str) else adopt("", implementation)
    opened = Case(case) if isinstance(case, str) else case

    def prepare() -> Judge:
        prepared = Judge(found, opened, dtype, device)
        prepared.settings = Settings(profile=profile, seed=seed, example=example, diagnose=diagnose)
        return prepared

    return judge(known[check], Claim(opened.name, check, dtype), prepare)


def run(
    implementation: str,
    *,
    families: Iterable[str] = (),
    cases: Iterable[str] = (),
    checks: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    device: str = "cpu",
    workers: int = 0,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Judge an implementation as `conformance run` does, in processes of its own; returns the run (its JSON schema is
    `conformance/report/run.schema.json`).

    Raises: ValueError with the command's own message if it could not run at all.
    """
    chosen = {"--family": families, "--case": cases, "--check": checks, "--dtype": dtypes}
    arguments = [text for option, values in chosen.items() for value in values for text in (option, value)]
    arguments += ["-n", str(workers)] if workers else []
    arguments += ["--timeout", str(timeout)] if timeout else []
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch, "run.json")
        command = [sys.executable, "-m", "conformance", "run", implementation, *arguments]
        done = subprocess.run(
            [*command, "--device", device, "--save", str(saved)], capture_output=True, text=True, check=False
        )
        if not saved.exists():
            raise ValueError((done.stderr or done.stdout).strip())
        document = read_run(saved)
    if document["problem"]:
        raise ValueError(document["problem"])
    return document
