"""The process in which candidates run, and the handle that the rest of the program holds on it.

    parent (pytest)  ──socket──  zygote: imports torch once, then forks
                                   └── child: loads the candidate, answers requests until it ends or dies

A candidate that hangs, segfaults or calls os._exit takes only the child with it: the parent kills or misses it, the
zygote forks the next one in milliseconds, and the run goes on.  The zygote reads nothing while a child lives, so both
can share one socket.  Messages are JSON.  Needs os.fork (Linux, macOS).

The child leads a process group of its own, so that whatever it started ends with it.  When the parent goes away, even
by SIGKILL, the socket closes and the zygote kills the child.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from conformance.search import journalled

STARTUP_TIMEOUT = 300.0
# How much of the end of a dead child's output is kept, in bytes.
KEPT_OUTPUT = 1 << 16
# Where checkpoints are written: a directory that outlives a child, which cannot clean up when it dies.
SCRATCH = "CONFORMANCE_SCRATCH"


@dataclass(frozen=True)
class Died:
    """The child ended without answering: how (signal name, exit status or "timeout"), and the end of its output."""

    how: str
    output: str

    @property
    def outcome(self) -> str:
        return "timeout" if self.how == "timeout" else "crash"


class Worker:
    """Handle on the worker process.  Requests go one at a time; a dead child is replaced on the next request."""

    def __init__(self, implementation: str, device: str = "cpu"):
        self.implementation, self.device = implementation, device
        self._process: subprocess.Popen[bytes] | None = None
        self._child: int | None = None

    def request(self, timeout: float, **message: Any) -> "dict[str, Any] | Died":
        """Send one request and wait for its answer.

        timeout: seconds until the child is killed.  The first request also waits for torch to be imported.
        """
        connection = self._start()
        os.lseek(self._log.fileno(), 0, os.SEEK_SET)  # the worker's place too: what is kept is this request's output
        os.ftruncate(self._log.fileno(), 0)
        try:
            connection.send_bytes(json.dumps(message).encode())
            while "child" not in (answer := self._receive(connection, STARTUP_TIMEOUT)):
                pass  # the death of an idle child; the next one takes the request, and announces itself first
            self._child = answer["child"]
            answer = self._receive(connection, timeout)
        except TimeoutError:
            death = Died("timeout", self._output())
            self._kill_child(connection)
            return death
        except (EOFError, OSError):
            assert self._process is not None
            death = Died(describe_status(self._process.wait()), self._output())
            self.close()
            return death
        if "died" in answer:
            self._child = None
            return Died(describe_status(answer["died"]), self._output())
        return answer

    def retire(self) -> None:
        """End the child, so that the next request gets a fresh one."""
        if self._child is not None:
            self._kill_child(self._connection)

    def journalled(self) -> dict[str, Any] | None:
        """The example of a property that the child was running, None if it was not running any."""
        return journalled(self._scratch.name) if self._process is not None else None

    def close(self) -> None:
        """End the worker.  A later request starts a new one."""
        if self._process is None:
            return
        self._connection.close()  # the zygote notices, kills its child and ends
        if self._child is None:
            self._process.kill()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = self._child = None
        self._log.close()
        self._scratch.cleanup()

    def _start(self) -> Connection:
        if self._process is None:
            import socket

            mine, theirs = socket.socketpair()
            self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
            self._scratch = tempfile.TemporaryDirectory(prefix="conformance-", ignore_cleanup_errors=True)
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "HF_HUB_OFFLINE": "1",
                SCRATCH: self._scratch.name,
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(_threads())),
                # Waiting threads that spin take the core from those they wait for, where others use the machine too.
                "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
            }
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-X", "faulthandler", "-m", "conformance.worker",
                 str(theirs.fileno()), self.implementation, self.device],
                pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL,
                stdout=self._log, stderr=subprocess.STDOUT,
            )  # fmt: skip
            theirs.close()
            self._connection = Connection(mine.detach())
        return self._connection

    def _receive(self, connection: Connection, timeout: float) -> dict[str, Any]:
        if not connection.poll(timeout):
            raise TimeoutError
        return json.loads(connection.recv_bytes())  # type: ignore[no-any-return]

    def _kill_child(self, connection: Connection) -> None:
        if self._child is None:  # torch itself took too long to import
            self.close()
            return
        try:
            _kill_group(self._child)
            while "died" not in self._receive(connection, STARTUP_TIMEOUT):
                pass  # an answer that came in the last moment
            self._child = None
        except (EOFError, OSError):
            self.close()

    def _output(self) -> str:
        descriptor = self._log.fileno()
        start = max(0, os.fstat(descriptor).st_size - KEPT_OUTPUT)
        return os.pread(descriptor, KEPT_OUTPUT, start).decode(errors="replace").strip()


def _threads() -> int:
    """This machine's cores shared among the pytest-xdist workers."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def describe_status(status: int) -> str:
    """How a process ended, for a person: subprocess's return code, or os.waitstatus_to_exitcode's."""
    if status < 0:
        known = -status in set(signal.Signals)  # real-time signals have no name
        name = signal.Signals(-status).name if known else f"signal {-status}"
        return f"killed by {name}" + (", perhaps out of memory" if name == "SIGKILL" else "")
    return f"exit status {status}"


# --- inside the worker ----------------------------------------------------------------------------------------------


class Server:
    """Answers requests in the child.  Loaded candidates of the case at hand are kept, one a dtype."""

    def __init__(self, implementation: str, device: str):
        self.spec, self.device = implementation, device
        self._implementation: Any = None
        self._manifest: Any = None
        self._case: Any = None
        self._loaded: tuple[str, str | None] | None = None
        self._judges: dict[str, Any] = {}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """What a message asks for.

        {"op": "describe"}: the implementation.  {"op": "judge", "case", "check", "dtype", …}: the result, or with
        "listing" {"examples": […]}; "directory" says where a case lies that is not in the manifest, and everything else
        is a field of `search.Settings`.
        """
        if message["op"] == "describe":
            return self._describe()
        apart = ("op", "case", "check", "dtype", "directory")
        settings = {key: value for key, value in message.items() if key not in apart}
        return self._judge(message["case"], message["check"], message["dtype"], message.get("directory"), settings)

    def implementation(self) -> Any:
        from conformance.implementation import resolve

        if self._implementation is None:
            self._implementation = resolve(self.spec)
        return self._implementation

    def _describe(self) -> dict[str, Any]:
        from conformance.implementation import CannotResolve
        from conformance.report.environment import environment

        try:
            described = self.implementation().to_json()
        except CannotResolve as error:
            return {"cannot": str(error)}
        except Exception as error:
            return {"cannot": f"importing {self.spec} raised {type(error).__name__}: {error}",
                    "traceback": traceback.format_exc()}  # fmt: skip
        return {"implementation": described, "environment": environment()}

    def _judge(
        self, case_name: str, check: str, dtype: str, directory: str | None, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """directory: where a case lies that is not in the manifest."""
        from conformance.cases import Case, Claim, FixtureError, Manifest
        from conformance.judge import Judge, judge
        from conformance.search import Listed, Settings, journal
        from conformance.suite import checks

        def prepare() -> Judge:
            if self._loaded != (case_name, directory):
                self._judges.clear()
                self._manifest = self._manifest or Manifest()
                if directory is not None:
                    self._manifest.adopt(Path(directory))
                self._case = Case(case_name, self._manifest)
                self._loaded = case_name, directory
            if dtype not in self._judges:
                self._judges[dtype] = Judge(self.implementation(), self._case, dtype, self.device)
            self._judges[dtype].settings = Settings(**settings)
            return self._judges[dtype]  # type: ignore[no-any-return]

        journal(None)
        try:
            return judge(checks()[check], Claim(case_name, check, dtype), prepare).to_json()
        except Listed as listed:
            return {"examples": listed.examples}
        except FixtureError as error:
            return {"fixture": str(error)}
        finally:
            journal(None)


def serve(connection: Connection, server: Server) -> None:
    """Announce this process, then answer until the parent goes away."""
    with contextlib.suppress(EOFError):
        while True:
            message = json.loads(connection.recv_bytes())
            connection.send_bytes(json.dumps({"child": os.getpid()}).encode())
            answer = server.answer(message)
            sys.stdout.flush()
            connection.send_bytes(json.dumps(answer).encode())


def become_child(connection: Connection, server: Server) -> NoReturn:
    """Serve until the parent goes away or the candidate ends this process, by whatever means; never returns."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: should the zygote be killed, we go too
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        serve(connection, server)
        status = 0
    except SystemExit as error:  # the candidate called sys.exit: neither threads nor exit handlers may keep us
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status & 0xFF)


class Zygote:
    """Forks a child when there is a request and none is alive, and says how it died."""

    def __init__(self, connection: Connection, implementation: str, device: str):
        self.connection, self.server = connection, Server(implementation, device)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # meant for the parent; the zygote ends when the parent does
        self.wake, write = os.pipe()
        for end in (self.wake, write):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(write)

    def run(self) -> None:
        while self.wait(select.POLLIN):
            child = os.fork()
            if child == 0:
                become_child(self.connection, self.server)
            status = self.watch(child)
            if status is None:
                return
            try:
                self.connection.send_bytes(json.dumps({"died": status}).encode())
            except OSError:  # the parent is gone
                return

    def watch(self, child: int) -> int | None:
        """Wait for the child's end and return its exit code; None if the parent went away first."""
        while True:
            dead, status = os.waitpid(child, os.WNOHANG)
            if dead:
                _kill_group(child)  # what it has started
                return os.waitstatus_to_exitcode(status)
            if not self.wait(0, self.wake):
                _kill_group(child)
                return None

    def wait(self, events: int, *others: int) -> bool:
        """Wait for these events of the socket, or for something to read elsewhere; False if the parent is gone."""
        poller = select.poll()
        poller.register(self.connection, events)
        for other in others:
            poller.register(other, select.POLLIN)
        ready = dict(poller.poll())
        for other in ready.keys() & set(others):
            os.read(other, 4096)
        return not ready.get(self.connection.fileno(), 0) & (select.POLLHUP | select.POLLERR)


def main() -> None:
    descriptor, implementation, device = sys.argv[1:]
    # Once, before any fork.
    import hypothesis  # noqa: F401
    import safetensors.torch  # noqa: F401

    import conformance.judge
    import conformance.localise
    import conformance.report.environment  # noqa: F401

    Zygote(Connection(int(descriptor)), implementation, device).run()
    shutil.rmtree(os.environ[SCRATCH], ignore_errors=True)  # the parent may have been killed
    os._exit(0)  # taking the interpreter down in good order takes seconds


if __name__ == "__main__":
    main()
