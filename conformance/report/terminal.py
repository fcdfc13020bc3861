"""The output of `conformance run`: progress, a table, the failures, the field matrix, the counts."""

import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from conformance.implementation import DTYPES, EXACT
from conformance.report.text import counts_line, failure_lines, shortfall

WIDTH = 120
BAD = ("fail", "error", "timeout", "crash")
_VERDICT_STYLE = {"honoured": "green", "ignored": "bold red", "refused": "yellow", "wrong": "red"}


class TerminalReport:
    """A pytest plugin that takes the place of pytest's own terminal output."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        if not self.console.is_terminal:  # a file or a CI log has no width of its own
            self.console.width = WIDTH
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task("importing", total=None)
        self.config: pytest.Config | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Silence pytest's reporter (plugins still find one)."""
        from _pytest.terminal import TerminalReporter

        self.config = config
        loud = config.pluginmanager.getplugin("terminalreporter")
        if loud is not None and not config.option.help and not config.option.collectonly:
            config.pluginmanager.unregister(loud)
            config.pluginmanager.register(TerminalReporter(config, io.StringIO()), "terminalreporter")
            self.progress.start()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        run = self._run()
        if report.when == "call" and run is not None:
            name = (run.description or {}).get("implementation", {}).get("name", "")
            self.progress.update(self.task, description=name, total=len(run.expected), completed=len(run.results))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.progress.stop()
        run = self._run()
        if run is None or session.config.option.collectonly:
            return
        spec: str = session.config.getoption("implementation")
        document = run.to_json()
        if run.problem:
            self.console.print(Text(f"cannot run: {run.problem}", style="bold red"))
        if document["claims"]:
            print_run(self.console, document, spec)
        elif not run.problem:
            self.console.print(Text("cannot run: no claim was executed", style="bold red"))

    def _run(self) -> Any:
        return self.config and self.config.pluginmanager.getplugin("conformance-run")


def print_run(console: Console, run: dict[str, Any], spec: str) -> None:
    """Print a whole run."""
    environment = run["environment"] or {}
    versions = ", ".join(f"{k} {environment[k]}" for k in ("torch", "transformers") if environment.get(k))
    console.print(Text(f"{run['implementation']['name']}   ({versions}, {run['device']})", style="bold"))
    if (search := run.get("search")) and any(c.get("examples") for c in run["claims"]):
        examples = sum(c.get("examples", 0) for c in run["claims"])
        console.print(f"properties: {examples} examples, --profile {search['profile']} --seed {search['seed']}")
    console.print(table(run))
    for line in failures(run, spec):
        console.print(line)
    if run["fields"]:
        print_fields(console, run["fields"])
    for reason, count in Counter(c["message"] for c in run["claims"] if c["outcome"] == "skipped").items():
        console.print(Text(f"{count} skipped: {reason}", style="yellow"))
    short = shortfall(run)
    bad = short or any(run["counts"][outcome] for outcome in BAD)
    console.print(Text(counts_line(run), style="bold red" if bad else "bold green"))
    if short:
        console.print(Text(short, style="bold red"))


def table(run: dict[str, Any]) -> Table:
    """Cases against dtypes: passed of judged claims, and the largest error ratio of the working dtypes.

    A run over several families has a row a family, and below it a row for each of its cases in which a claim failed.
    """
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    several = len({c["case"].split("/")[0] for c in run["claims"]}) > 1
    shown.add_column("family" if several else "case", no_wrap=True)
    dtypes = [d for d in (*DTYPES, EXACT) if any(c["dtype"] == d for c in run["claims"])]
    for dtype in dtypes:
        shown.add_column(dtype, justify="right")
    shown.add_column("error, float64", justify="right")
    shown.add_column("largest ratio", justify="right")
    for name, claims in _rows(run["claims"], several):
        cells = [_cell([c for c in claims if c["dtype"] == dtype]) for dtype in dtypes]
        errors = [c["error"]["max"] for c in claims if c["dtype"] == "float64" and c["error"]]
        ratios = [c["ratio"]["rms"] for c in claims if c["ratio"]]
        shown.add_row(name, *cells, f"{max(errors):.0e}" if errors else "–", f"{max(ratios):.2f}" if ratios else "–")
    return shown


def _rows(claims: list[dict[str, Any]], several: bool) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Name of each row of the table, and its claims."""
    for family in dict.fromkeys(c["case"].split("/")[0] for c in claims):
        of_family = [c for c in claims if c["case"].split("/")[0] == family]
        if several:
            yield family, of_family
        for case in dict.fromkeys(c["case"] for c in of_family):
            of_case = [c for c in of_family if c["case"] == case]
            if not several or any(c["outcome"] in BAD for c in of_case):
                yield f"  {case}" if several else case, of_case


def _cell(claims: list[dict[str, Any]]) -> Text:
    """`7/7`; claims that were not put to the candidate are not counted: `+2u` unsupported, `+3s` skipped."""
    judged = [c for c in claims if c["outcome"] not in ("unsupported", "skipped")]
    passed = sum(c["outcome"] == "pass" for c in judged)
    text = f"{passed}/{len(judged)}" if judged else ""
    for outcome in ("unsupported", "skipped"):
        count = sum(c["outcome"] == outcome for c in claims)
        text += f" +{count}{outcome[0]}" if count else ""
    return Text(text.strip() or "–", style="red" if passed < len(judged) else "green" if judged else "yellow")


def failures(run: dict[str, Any], spec: str) -> list[Text]:
    """For each case its first failure in full, and the others in a line for each kind; repeats are named only."""
    lines: list[Text] = []
    seen: dict[tuple[Any, ...], str] = {}
    for case in dict.fromkeys(c["case"] for c in run["claims"]):
        bad = [c for c in run["claims"] if c["case"] == case and c["outcome"] in BAD]
        if not bad:
            continue
        first = bad[0]
        same = (first["outcome"], first["kind"], first["message"]) if first["kind"] != "value" else (case,)
        lines.append(Text())
        if same in seen:
            lines.append(
                Text(f"{first['outcome'].upper()}  {case}: {len(bad)} claims, first as in {seen[same]}", "red")
            )
        else:
            head, *rest = failure_lines(first, spec)
            lines += [Text(head, style="bold red"), *map(Text, rest)]
        seen.setdefault(same, case)
        lines += [Text(line) for line in _others(bad[1:])]
    return [*lines, Text()] if lines else []


def _others(claims: list[dict[str, Any]]) -> list[str]:
    """`also fail: cache.chunks float64, float32 · …`, a line for each outcome."""
    lines = []
    for outcome in dict.fromkeys(c["outcome"] for c in claims):
        checks: dict[str, list[str]] = {}
        for claim in claims:
            if claim["outcome"] == outcome:
                checks.setdefault(claim["check"], []).append(claim["dtype"])
        text = " · ".join(f"{check} {', '.join(dtypes)}" for check, dtypes in checks.items())
        lines.append(f"      also {outcome:<13} {text}")
    return lines


def print_fields(console: Console, fields: dict[str, dict[str, str]]) -> None:
    """The field matrix: what becomes of each config field.  Over several families, honoured fields are only counted."""
    several = len({case.split("/")[0] for case in fields}) > 1
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("config field", "", ""):
        shown.add_column(title)
    for case, row in fields.items():
        if several and row["verdict"] == "honoured":
            continue
        name = case if several else case.partition("/field-")[2] or f"{case} ({row['field']})"
        shown.add_row(name, Text(row["verdict"], style=_VERDICT_STYLE[row["verdict"]]), Text(row["detail"]))
    if shown.row_count:
        console.print(shown)
    if several:
        honoured = sum(row["verdict"] == "honoured" for row in fields.values())
        console.print(f"{honoured} of {len(fields)} config fields honoured")
