"""The pytest plugin: options, one test item a claim, remote execution in the worker, honest exit status.

    pytest --pyargs conformance.suite --implementation my_pkg.adapter:MyLlama -n auto

The plugin is loaded in every pytest run of the environment; it does nothing unless a check of `conformance.suite` is
collected.  Exit status: 0 all selected claims passed or are declared unsupported, at least one passed; 1 a claim
failed; 2 could not run, or ran less than it should.  A run that stops early because -x or --maxfail asked for it is 1.

An implementation that hangs is not waited for claim after claim: once three claims of a case have timed out in a row,
the rest of the case is skipped, and after nine in a row the rest of the run.  Any answer starts the count again.  Those
claims are reported as `skipped`, with the reason, since nothing was asked of the implementation.
"""

import dataclasses
import json
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from conformance.cases import Case, Claim, Manifest
from conformance.search import DEFAULT_PROFILE, DEFAULT_SEED, PROFILES
from conformance.suite import GROUPS, checks

PROPERTY = "conformance"
NO_IMPLEMENTATION = "conformance.suite needs --implementation IMPL (`conformance list implementations` shows some)"
DEFAULT_TIMEOUT = 60.0
# Timeouts in a row after which a case, and the whole run, is given up.
HANGS_OF_CASE, HANGS_OF_RUN = 3, 9
# The part of a claim's time in which further examples of a property are begun.
SEARCHING = 1 / 3
# How pytest names a claim, below whatever rootdir: test_golden.py::test_logits[llama/plain-float64]
_CLAIM_ID = re.compile(rf"(^|/)test_({'|'.join(GROUPS)})\.py::test_\w+\[(?P<case>.+)-\w+\]$")
_SELECTION = ("family", "case", "check", "dtype")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance", "conformance of a sequence model's implementation")
    group.addoption("--implementation", metavar="IMPL", help="built-in name, package.module:Object or file.py:Object")
    for what in _SELECTION:
        group.addoption(
            f"--conformance-{what}", action="append", default=[], metavar=what.upper(),
            help=f"only claims of this {what} (may be given several times)",
        )  # fmt: skip
    group.addoption("--conformance-device", default="cpu", metavar="DEVICE", help="torch device of the candidate")
    group.addoption("--conformance-timeout", type=float, default=DEFAULT_TIMEOUT, metavar="S",
                    help=f"seconds until a claim is a timeout (%(default)s); after {HANGS_OF_CASE} in a row the rest "
                    f"of the case is skipped, after {HANGS_OF_RUN} the rest of the run")  # fmt: skip
    group.addoption(
        "--conformance-profile",
        choices=tuple(PROFILES),
        default=DEFAULT_PROFILE,
        help="how long properties are searched (%(default)s)",
    )
    group.addoption(
        "--conformance-seed",
        type=int,
        default=DEFAULT_SEED,
        metavar="N",
        help="which examples of properties are drawn (%(default)s)",
    )
    group.addoption("--conformance-example", metavar="JSON", help="replay this example of the one check selected")
    group.addoption("--conformance-save", metavar="FILE", help="write the run as JSON")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Should a process of pytest-xdist's die (the candidate's are others), the run ends: its replacement can hang."""
    if config.getoption("implementation") and getattr(config.option, "maxworkerrestart", "") is None:
        config.option.maxworkerrestart = "0"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "conformance_claim: a claim of the conformance suite")
    if config.getoption("implementation"):
        config.pluginmanager.register(Run(config), "conformance-run")
    elif any(_names_the_suite(argument) for argument in config.args):
        pytest.exit(NO_IMPLEMENTATION, returncode=2)


def _names_the_suite(argument: str) -> bool:
    """Whether a command-line argument is `conformance.suite`, one of its modules or files."""
    suite = str(Path(__file__).parent / "suite")
    return argument.startswith("conformance.suite") or os.path.abspath(argument).startswith(suite)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise a check with the claims of the manifest that are selected."""
    from conformance.suite import check_id

    if not _is_check(metafunc.module.__name__):
        return
    run: Run | None = metafunc.config.pluginmanager.getplugin("conformance-run")
    if run is None:
        pytest.exit(NO_IMPLEMENTATION, returncode=2)
    check = check_id(metafunc.module.__name__, metafunc.function.__name__)
    claims = [claim for claim in run.selected if claim.check == check]
    metafunc.parametrize(
        "judge",
        [pytest.param(c, id=f"{c.case}-{c.dtype}") for c in claims],
    )


def _is_check(module: str) -> bool:
    return module.startswith("conformance.suite.")


class ClaimNotMet(Exception):
    """Carries a claim's result to pytest's report."""

    def __init__(self, result: dict[str, Any]):
        super().__init__(result["message"])
        self.result = result


class Run:
    """One run of the suite: the worker, the selection, and the results as they come in."""

    def __init__(self, config: pytest.Config):
        from conformance.worker import Worker

        self.config = config
        self.is_xdist_worker = hasattr(config, "workerinput")
        self.timeout: float = config.getoption("conformance_timeout")
        self.worker = Worker(config.getoption("implementation"), config.getoption("conformance_device"))
        self.description: dict[str, Any] | None = None
        if self.is_xdist_worker:
            self.description = json.loads(config.workerinput["conformance_description"])  # type: ignore[attr-defined]
        self.selected: list[Claim] = []
        self.settings: dict[str, Any] = {}  # of the search for examples, see `search.Settings`
        self.directories: dict[str, str] = {}  # the cases that were given as directories
        self.results: dict[str, dict[str, Any]] = {}
        self.expected: set[str] = set()
        self.problem: str | None = None
        self.hung: list[str] = []  # the cases of the timeouts in a row, up to now

    # --- selection ---------------------------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Select before anything is collected or any xdist worker starts; what cannot be run is said once, here."""
        try:
            self._prepare_to_save()
            self.selected = self._select()
        except ValueError as error:  # a FixtureError is one
            self.problem = str(error)
            self.worker.close()
            self.save()
            pytest.exit(f"conformance: {error}", returncode=2)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell an xdist worker what the implementation declares, so that it need not ask again."""
        self.worker.close()  # the xdist workers have their own
        node.workerinput["conformance_description"] = json.dumps(self.description)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """Under -n, claims of one case stay on one worker: the case is loaded once, and hangs in a row are counted.

        Our own, since --dist loadgroup does not group under pytest 9.2 (pytest-xdist issue 1386).
        """
        from xdist.scheduler import LoadScopeScheduling

        class CaseScheduling(LoadScopeScheduling):  # type: ignore[misc]
            def _split_scope(self, nodeid: str) -> str:
                claim = _CLAIM_ID.search(nodeid)
                return claim["case"] if claim else str(super()._split_scope(nodeid))

        return CaseScheduling(config, log) if config.getoption("dist") == "load" else None

    def _select(self) -> list[Claim]:
        """The claims to judge.  What is wrong with the question is said before the implementation is imported."""
        option = {what: self.config.getoption(f"conformance_{what}") for what in _SELECTION}
        self.settings = self._search_settings()
        manifest = Manifest()
        given = [Path(case) for case in option["case"] if Path(case, "provenance.json").is_file()]
        self.directories = {manifest.adopt(directory): str(directory.resolve()) for directory in given}
        if len(self.directories) < len(given):
            raise ValueError(f"two of the cases {', '.join(map(str, given))} have the same name; judge them apart")
        named = [case for case in option["case"] if Path(case) not in given]
        asked = manifest.select(
            families=option["family"], cases=[*named, *self.directories], checks=option["check"], dtypes=option["dtype"]
        )
        if not asked:
            wanted = ", ".join(f"{what} {' or '.join(values)}" for what, values in option.items() if values)
            raise ValueError(f"no claim matches the selection: {wanted}")
        if unknown := sorted({claim.check for claim in asked} - set(checks())):
            raise ValueError(f"the manifest has claims of {', '.join(unknown)}, checks that this version does not have")
        if not self.is_xdist_worker:
            for name in dict.fromkeys(claim.case for claim in asked):
                for source in set(Case(name, manifest).shared.values()):
                    Case(source, manifest)  # opening a case verifies its files
        of_cases = sorted({claim.family for claim in asked}) if option["case"] else []
        declared = self._declared(manifest, option["family"], of_cases)
        claims = [claim for claim in asked if claim.family in declared]
        if not claims:
            raise ValueError(f"no claim matches the selection and the families declared: {', '.join(sorted(declared))}")
        if self.settings.get("example") is not None and len(claims) > 1:
            raise ValueError(f"--example replays one claim, {len(claims)} are selected: give --case, --check, --dtype")
        return claims

    def _search_settings(self) -> dict[str, Any]:
        """What every request for a verdict says of the search for examples."""
        settings = {what: self.config.getoption(f"conformance_{what}") for what in ("profile", "seed")}
        settings["seconds"] = self.timeout * SEARCHING
        if text := self.config.getoption("conformance_example"):
            try:
                settings["example"] = json.loads(text)
            except ValueError as error:
                raise ValueError(f"--example {text!r} is not JSON: {error}") from error
            if not isinstance(settings["example"], dict):
                raise ValueError(f"--example {text!r} is not a JSON object")
        return settings

    def _declared(self, manifest: Manifest, wanted: list[str], of_cases: list[str]) -> set[str]:
        """The families that the implementation declares; a bare function's are those that are asked for.

        wanted: by name.  of_cases: by the cases that were named.
        """
        described = self.describe()["implementation"]
        name = described["name"]
        if described["families"] is None and not (wanted or of_cases):
            raise ValueError(
                f"{name} is a bare function and declares no family; say which: --family {' | '.join(manifest.families)}"
            )
        declared = set((wanted or of_cases) if described["families"] is None else described["families"])
        if not declared:
            raise ValueError(f"{name} declares no family; this suite has {', '.join(manifest.families)}")
        if unknown := sorted(declared - set(manifest.families)):
            raise ValueError(
                f"{name} declares families {', '.join(unknown)}, which this suite does not have; "
                f"it has {', '.join(manifest.families)}"
            )
        if undeclared := sorted(set(wanted) - declared):
            raise ValueError(
                f"{name} does not declare family {', '.join(undeclared)}; it declares {', '.join(sorted(declared))}"
            )
        return declared

    def describe(self) -> dict[str, Any]:
        """The implementation's name, families and dtypes, asked of the worker once."""
        from conformance.worker import Died

        if self.description is None:
            answer = self.worker.request(self.timeout, op="describe")
            if isinstance(answer, Died):
                how = f"no answer after {self.timeout:g} s" if answer.outcome == "timeout" else answer.how
                raise ValueError(f"the implementation did not survive its import: {how}\n{answer.output}".strip())
            if "cannot" in answer:
                raise ValueError("\n".join(filter(None, [answer["cannot"], answer.get("traceback")])))
            self.description = answer
        return self.description

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Case after case, so that a checkpoint stays loaded for all its claims; checks keep their order.

        A check of which no claim is selected has got one empty item from pytest, which goes.
        """
        items[:] = [item for item in items if _claim(item) or not _is_check(_module(item))]
        order: dict[Claim | None, int] = {claim: index for index, claim in enumerate(self.selected)}
        items.sort(key=lambda item: order.get(_claim(item), -1))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.expected = {item.nodeid for item in session.items if _claim(item)}

    # --- execution ---------------------------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        """Run a check in the worker instead of here."""
        claim = _claim(pyfuncitem)
        if claim is None:
            return None
        result = self.judge(claim)
        pyfuncitem.user_properties.append((PROPERTY, json.dumps(result)))
        if result["outcome"] in ("unsupported", "skipped"):
            pytest.skip(f"{result['outcome']}: {result['message']}")
        if result["outcome"] != "pass":
            raise ClaimNotMet(result)
        return True

    def judge(self, claim: Claim) -> dict[str, Any]:
        """The result of one claim, whatever happens to the worker."""
        result = self._judge(claim)
        if directory := self.directories.get(claim.case):
            result["directory"] = directory
        return result

    def _judge(self, claim: Claim) -> dict[str, Any]:
        from conformance.replay import replayed
        from conformance.report.model import not_run
        from conformance.worker import Died

        if len(self.hung) >= HANGS_OF_RUN:
            return not_run(claim, f"not run: {len(self.hung)} claims in a row were timeouts")
        if self.hung.count(claim.case) >= HANGS_OF_CASE:
            return not_run(claim, f"not run: {HANGS_OF_CASE} claims of this case in a row were timeouts")
        asked = {**self.settings, "directory": self.directories.get(claim.case)}
        answer = self.worker.request(self.timeout, op="judge", **dataclasses.asdict(claim), **asked)
        if isinstance(answer, Died):
            self.hung = [*self.hung, claim.case] if answer.outcome == "timeout" else []
            return replayed(self.worker, claim, answer, self.timeout, asked)
        self.hung = []
        if "fixture" in answer:
            self.problem = answer["fixture"]
            pytest.exit(f"conformance: {answer['fixture']}", returncode=2)
        return answer

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report = yield
        if call.excinfo is not None and isinstance(call.excinfo.value, ClaimNotMet):
            from conformance.report.text import failure_lines

            spec = self.config.getoption("implementation")
            report.longrepr = "\n".join(failure_lines(call.excinfo.value.result, spec))
        return report

    # --- results -----------------------------------------------------------------------------------------------------

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == PROPERTY and report.when == "call":
                self.results[report.nodeid] = json.loads(str(value))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.expected = {i for i in ids if _CLAIM_ID.search(i)}

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.worker.close()
        if self.is_xdist_worker or session.config.option.collectonly:
            return
        session.exitstatus = self.exit_status(int(session.exitstatus))
        try:
            self.save()
        except OSError as error:
            self.problem = f"the run cannot be saved: {error}"
            session.exitstatus = 2

    def _prepare_to_save(self) -> None:
        """Find out before the run, not after it, that there is no place for its JSON."""
        if path := self.config.getoption("conformance_save"):
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                self.config.option.conformance_save = None
                raise ValueError(f"the run cannot be saved as {path}: {error.strerror}") from error

    def save(self) -> None:
        """Write the run, also one that could not start, where it is wanted."""
        from conformance.report.model import write_run

        if (path := self.config.getoption("conformance_save")) and not self.is_xdist_worker:
            write_run(path, self.to_json())

    def exit_status(self, pytest_status: int) -> int:
        """0, 1 or 2 (see the module); pytest's own statuses above 1 (interrupted, usage, internal, empty) are 2."""
        outcomes = [r["outcome"] for r in self.results.values()]
        bad = [o for o in outcomes if o not in ("pass", "unsupported", "skipped")]
        if not self.problem and 0 < (self.config.getoption("maxfail") or 0) <= len(bad):
            return 1  # it was asked for to run no further
        if self.problem or pytest_status > 1 or set(self.results) != self.expected:
            return 2
        if bad or pytest_status == 1:
            return 1
        return 0 if "pass" in outcomes and "skipped" not in outcomes else 2

    def to_json(self) -> dict[str, Any]:
        from conformance.report.model import run_document

        selection = {what: self.config.getoption(f"conformance_{what}") for what in _SELECTION}
        return run_document(
            self.description, list(self.results.values()), len(self.expected), selection,
            self.config.getoption("conformance_device"), self.problem,
            {what: self.config.getoption(f"conformance_{what}") for what in ("profile", "seed")},
        )  # fmt: skip

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.results and not self.is_xdist_worker and not os.environ.get("CONFORMANCE_OWN_OUTPUT"):
            from conformance.report.text import print_summary

            terminalreporter.section("conformance")
            print_summary(self.to_json(), terminalreporter.write_line)


def _module(item: pytest.Item) -> str:
    return getattr(getattr(item, "module", None), "__name__", "")


def _claim(item: pytest.Item) -> Claim | None:
    callspec = getattr(item, "callspec", None)
    claim = callspec.params.get("judge") if callspec else None
    return claim if isinstance(claim, Claim) else None
