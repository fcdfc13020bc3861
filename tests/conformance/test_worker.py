"""The worker process and the handle on it: deaths, replacement, timeouts, output, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from conformance.worker import KEPT_OUTPUT, Died, Worker, describe_status

FAKES = Path(__file__).parents[1] / "fakes.py"
TIMEOUT = 30.0
JUDGE = {"op": "judge", "case": "llama/plain", "check": "golden.logits", "dtype": "float64"}
PADDED = JUDGE | {"check": "golden.right_padding"}
Start = Callable[[str], Worker]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """One worker for all tests, which takes the part of the named fake in a new child."""
    chosen = tmp_path_factory.mktemp("fake") / "name"
    with pytest.MonkeyPatch.context() as patch, closing(Worker(f"{FAKES}:Chosen")) as worker:
        patch.setenv("FAKE", str(chosen))

        def start(fake: str) -> Worker:
            chosen.write_text(fake)
            if worker._child is not None:
                worker._kill_child(worker._connection)
            return worker

        yield start


def outcome(answer: "dict[str, Any] | Died") -> str:
    return answer.outcome if isinstance(answer, Died) else answer["outcome"]


# --- one child after another -----------------------------------------------------------------------------------------


def test_description_holds_what_is_declared(start: Start) -> None:
    described = start("OnlyFloat16").request(TIMEOUT, op="describe")
    assert not isinstance(described, Died)
    assert described["implementation"] == {
        "spec": f"{FAKES}:Chosen",
        "name": "fake",
        "families": ["llama"],
        "dtypes": ["float16"],
    }


@pytest.mark.parametrize(("said", "wanted"), [(None, "passive"), ("active", "active")])
def test_threads_that_wait_do_not_spin_unless_the_user_says_so(
    said: str | None, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if said:
        monkeypatch.setenv("OMP_WAIT_POLICY", said)
    named = tmp_path / "named.py"
    named.write_text("import os\nclass Named:\n    name, load = os.environ['OMP_WAIT_POLICY'], print\n")
    with closing(Worker(f"{named}:Named")) as worker:
        described = worker.request(TIMEOUT, op="describe")
    assert not isinstance(described, Died)
    assert described["implementation"]["name"] == wanted


def test_one_child_answers_request_after_request(start: Start) -> None:
    worker = start("CountsCalls")
    worker.request(TIMEOUT, **PADDED)
    first = worker._child
    worker.request(TIMEOUT, **PADDED)
    assert worker._child == first


def test_claim_after_a_crash_is_judged_by_a_new_child(start: Start) -> None:
    worker = start("CrashesInPadding")
    assert [outcome(worker.request(TIMEOUT, **m)) for m in (JUDGE, PADDED, JUDGE)] == ["pass", "crash", "pass"]


def test_claim_after_a_timeout_is_judged_by_a_new_child(start: Start) -> None:
    worker = start("HangsInPadding")
    answers = [worker.request(timeout, **m) for timeout, m in ((TIMEOUT, JUDGE), (1, PADDED), (TIMEOUT, JUDGE))]
    assert [outcome(answer) for answer in answers] == ["pass", "timeout", "pass"]


def test_timeout_is_kept_to(start: Start) -> None:
    worker = start("Sleeps")
    begun = time.monotonic()
    worker.request(1, **PADDED)
    assert 1 <= time.monotonic() - begun < 10


def test_death_of_an_idle_child_is_not_the_next_claims(start: Start) -> None:
    worker = start("DiesIdle")
    answers = []
    for _ in range(3):
        answers.append(worker.request(TIMEOUT, **PADDED))
        time.sleep(0.6)
    assert [outcome(answer) for answer in answers] == ["pass", "pass", "pass"]


def test_death_of_an_idle_child_leaves_room_for_a_crash(start: Start) -> None:
    worker = start("DiesIdle")
    worker.request(TIMEOUT, **PADDED)
    time.sleep(0.6)
    start("Exits3")
    assert worker.request(TIMEOUT, **PADDED) == Died("exit status 3", "")


def test_worker_whose_zygote_was_killed_starts_again(start: Start) -> None:
    worker = start("Exits3")
    worker.request(TIMEOUT, **PADDED)
    assert worker._process is not None
    worker._process.kill()
    worker._process.wait()
    assert outcome(worker.request(TIMEOUT, **PADDED)) == "crash"
    start("CountsCalls")
    assert outcome(worker.request(TIMEOUT, **PADDED)) == "pass"


# --- output ----------------------------------------------------------------------------------------------------------


def test_output_belongs_to_the_claim_that_made_it(start: Start) -> None:
    worker = start("Talks")
    worker.request(TIMEOUT, **PADDED)
    start("ExitsWell")
    assert worker.request(TIMEOUT, **PADDED) == Died("exit status 0", "good bye")


def test_output_of_megabytes_does_not_hold_up_the_candidate(start: Start) -> None:
    assert outcome(start("Talks").request(TIMEOUT, **PADDED)) == "pass"


def test_only_the_end_of_a_long_output_is_kept(start: Start) -> None:
    died = start("TalksAndDies").request(TIMEOUT, **PADDED)
    assert isinstance(died, Died)
    assert len(died.output) <= KEPT_OUTPUT
    assert died.output.endswith("the end")


# --- nothing left behind ---------------------------------------------------------------------------------------------


def ended(pid: int) -> bool:
    """Whether a process is gone within some seconds (a zombie, which nobody waits for, is)."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


PARENT = f"""
import os, sys, time
from conformance.worker import Worker
worker = Worker({f"{FAKES}:HangsInPadding"!r})
worker.request({TIMEOUT}, **{JUDGE!r})
print(os.getpid(), worker._process.pid, worker._child, worker._scratch.name, flush=True)
if sys.argv[1] == "busy":
    worker.request(600, **{PADDED!r})
elif sys.argv[1] == "idle":
    time.sleep(600)
worker.close()
"""


def parent(doing: str) -> tuple["subprocess.Popen[str]", list[int], Path]:
    """A process that holds a worker, which is idle, hangs in a claim, or is closed: (it, [zygote, child], scratch)."""
    process = subprocess.Popen([sys.executable, "-c", PARENT, doing], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    _, zygote, child, scratch = process.stdout.readline().split()
    process.stdout.close()
    return process, [int(zygote), int(child)], Path(scratch)


@pytest.fixture(scope="module")
def closed() -> tuple[list[int], Path]:
    process, pids, scratch = parent("close")
    assert process.wait(30) == 0
    return pids, scratch


def test_closed_worker_leaves_no_process(closed: tuple[list[int], Path]) -> None:
    assert [ended(pid) for pid in closed[0]] == [True, True]


def test_closed_worker_leaves_no_file(closed: tuple[list[int], Path]) -> None:
    assert not closed[1].exists()


@pytest.fixture(scope="module", params=["idle", "busy"])
def killed(request: pytest.FixtureRequest) -> tuple[list[int], Path]:
    """Zygote, child and scratch directory of a parent that was killed."""
    process, pids, scratch = parent(request.param)
    if request.param == "busy":
        time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return pids, scratch


def test_killed_parent_leaves_no_process(killed: tuple[list[int], Path]) -> None:
    assert [ended(pid) for pid in killed[0]] == [True, True]


def test_killed_parent_leaves_no_file(killed: tuple[list[int], Path]) -> None:
    assert ended(killed[0][0])
    assert not killed[1].exists()


def test_zygote_outlives_the_keyboard_interrupt_that_its_parent_handles() -> None:
    process, pids, _ = parent("idle")
    os.kill(pids[0], signal.SIGINT)
    time.sleep(0.2)
    still_there = Path(f"/proc/{pids[0]}").exists()
    process.kill()
    process.wait()
    assert still_there


def test_close_of_a_worker_that_never_started_does_nothing() -> None:
    worker = Worker("reference")
    worker.close()
    assert worker._process is None


# --- how a process ended ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "description"),
    [
        (0, "exit status 0"),
        (3, "exit status 3"),
        (-signal.SIGSEGV, "killed by SIGSEGV"),
        (-signal.SIGABRT, "killed by SIGABRT"),
        (-signal.SIGKILL, "killed by SIGKILL, perhaps out of memory"),
        (-(signal.SIGRTMIN + 1), f"killed by signal {signal.SIGRTMIN + 1}"),
    ],
)
def test_status_is_described_for_a_person(status: int, description: str) -> None:
    assert describe_status(status) == description


@pytest.mark.parametrize(("how", "expected"), [("timeout", "timeout"), ("exit status 0", "crash")])
def test_death_is_a_timeout_or_a_crash(how: str, expected: str) -> None:
    assert Died(how, "").outcome == expected
