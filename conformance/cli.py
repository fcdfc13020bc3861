"""The command line.  Nothing heavy is imported before a command needs it: `conformance list` starts in a blink."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from conformance import __version__

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class CannotRun(click.ClickException):
    """Something is wrong with what was asked for, not with the implementation: exit status 2."""

    exit_code = 2


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="conformance")
def main() -> None:
    """Prove that an implementation of a sequence model is right.

    Exit status: 0 all claims passed, 1 a claim failed, 2 could not run or ran less than it should.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"


LISTS = ("families", "cases", "checks", "implementations", "mistakes")


@main.command("list")
@click.argument("what", type=click.Choice(LISTS), default="families")
def list_command(what: str) -> None:
    """Show the families, cases, checks, implementations or mistakes there are."""
    from conformance import catalogue

    rows = getattr(catalogue, what)()
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        click.echo(f"{name:<{width}}  {text}")


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("implementation", metavar="IMPL")
@click.option("--family", multiple=True, help="Only this family (repeatable).")
@click.option(
    "--case", multiple=True, help="Only this case, e.g. llama/plain, or the directory of an exported one (repeatable)."
)
@click.option(
    "--check", multiple=True, help="Only this check or group of checks, e.g. golden.logits, cache (repeatable)."
)
@click.option("--dtype", multiple=True, help="Only claims in this dtype (repeatable).")
@click.option("--device", default="cpu", show_default=True, help="Torch device of the candidate.")
@click.option("-n", "workers", metavar="N", help="Processes, or `auto` (pytest-xdist).")
@click.option("--timeout", type=float, help="Seconds until a claim is a timeout.  [default: 60]  After 3 in a row the "
              "rest of the case is skipped, after 9 the rest of the run.")  # fmt: skip
@click.option(
    "--profile",
    type=click.Choice(("quick", "ci", "thorough")),
    help="How long properties are searched for an input that breaks them.  [default: quick]",
)
@click.option("--seed", type=int, help="Which examples are drawn for properties.  [default: 0]")
@click.option("--example", metavar="JSON", help="Replay one example of a property, as a failure prints it.")
@click.option("--save", type=click.Path(dir_okay=False), help="Write the run as JSON, for `conformance compare`.")
@click.argument("pytest_arguments", nargs=-1, type=click.UNPROCESSED)
def run(implementation: str, workers: str | None, pytest_arguments: tuple[str, ...], **options: Any) -> None:
    """Judge an implementation: every claim of the families that it declares.

    IMPL is a built-in name (`conformance list implementations`), package.module:Object or path/to/file.py:Object.
    Further arguments go to pytest: -k EXPRESSION, --junit-xml FILE, --lf, -x …
    """
    import pytest

    from conformance.report.terminal import TerminalReport

    settings = Path(__file__).parent / "suite" / "pytest.ini"
    arguments = [
        "--pyargs", "conformance.suite", "-c", str(settings), "-o", f"cache_dir={Path.cwd() / '.conformance_cache'}",
        "-p", "conformance.plugin", "-p", "xdist", f"--implementation={implementation}",
    ]  # fmt: skip
    for what in ("family", "case", "check", "dtype"):
        arguments += [f"--conformance-{what}={value}" for value in options[what]]
    for what in ("device", "timeout", "save", "profile", "seed", "example"):
        if options[what] is not None:
            arguments.append(f"--conformance-{what}={options[what]}")
    if workers:
        arguments += ["-n", workers]
    # Only the plugins and options named above: whatever else is installed or set has no say in a candidate's verdict.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
        os.environ.pop(name, None)
    status = pytest.main([*arguments, *pytest_arguments], plugins=[TerminalReport()])
    if status == pytest.ExitCode.USAGE_ERROR:
        raise CannotRun(_refused(pytest_arguments))
    sys.exit(status if status in (0, 1) else 2)


def _refused(arguments: tuple[str, ...]) -> str:
    """What to say when pytest, too, does not know an option or argument that was passed on to it."""
    from difflib import get_close_matches

    own = [option for parameter in run.params for option in parameter.opts if option.startswith("--")]
    for argument in arguments:
        if argument.startswith("--") and (near := get_close_matches(argument.split("=")[0], own, n=1, cutoff=0.7)):
            return f"no such option: {argument.split('=')[0]}; did you mean {near[0]}?"
    return f"pytest refuses what was passed on to it: {' '.join(arguments)}; see conformance run --help"


@main.command()
@click.argument("implementation", metavar="IMPL")
@click.option("--family", multiple=True, help="Only this family (repeatable).")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True,
              help="How long to look for a failure in each family.")  # fmt: skip
@click.option("--examples", type=click.IntRange(min=1), default=10_000, show_default=True,
              help="The most examples of each family.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed draws other examples.")
@click.option("--device", default="cpu", show_default=True, help="Torch device of the candidate.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), default=Path("fuzzed"), show_default=True,
              help="Where the cases of failures are written.")  # fmt: skip
def fuzz(implementation: str, family: tuple[str, ...], examples: int, **options: Any) -> None:
    """Compare an implementation with reference_impl on random valid configurations, in float64.

    The reference itself is compared with the live oracle (needs transformers, and fuzzes those families whose oracle
    the installed release has).  A failure is shrunk; its case is kept
    and replayed by `conformance run IMPL --case DIR`.

    Exit status: 0 no failure, 1 a family failed, 2 could not run or judged nothing.
    """
    from conformance.fuzz import fuzz
    from conformance.report.fuzz import lines

    def show(each: Any) -> None:
        click.echo("\n".join(lines(each, implementation)))

    try:
        found = fuzz(implementation, family, most=examples, progress=show, **options)
    except ValueError as error:
        raise CannotRun(str(error)) from error
    sys.exit(1 if any(each.failure for each in found) else 0 if all(each.passed for each in found) else 2)


@main.command()
@click.argument("identifier", metavar="ID")
def explain(identifier: str) -> None:
    """Explain a family, case, check, probe, config field or mistake."""
    from conformance import catalogue

    try:
        click.echo(catalogue.explain(identifier))
    except KeyError as error:
        raise CannotRun(str(error.args[0])) from error


@main.command()
@click.option("--family", "families", multiple=True, help="Only in this family (repeatable).")
@click.option("--mistake", "mistakes", multiple=True, help="Only this mistake (repeatable).")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes.  [default: one a core]")
@click.option("--all", "everything", is_flag=True, help="Run every claim, not only up to the first kill.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write what was found.")
def mutate(
    families: tuple[str, ...], mistakes: tuple[str, ...], jobs: int | None, everything: bool, file: Path | None
) -> None:
    """Run the suite on the mistakes of its catalogue, each made in `reference_impl`: it must fail them all.

    Exit status: 0 all killed by a check that they name (or equivalent, as declared), 1 one was not, 2 could not run.
    """
    from itertools import groupby

    from conformance import mutation
    from conformance.cases import FixtureError, write_json

    try:
        outcomes = []
        found = mutation.run(mutation.pairs(families, mistakes), jobs or mutation.default_jobs(), everything)
        for mistake, of_mistake in groupby(found, key=lambda outcome: outcome.mistake):
            own = list(of_mistake)
            outcomes += own
            click.echo(mutation.line(mistake, own))
            for outcome in own:
                for problem in mutation.problems(outcome):
                    click.echo(problem)
    except (ValueError, LookupError, FixtureError) as error:
        raise CannotRun(str(error)) from error
    click.echo(", ".join(f"{count} {what}" for what, count in mutation.summary(outcomes).items()))
    if file:
        write_json(file, mutation.to_json(outcomes))
    sys.exit(0 if all(outcome.status in mutation.GOOD for outcome in outcomes) else 1)


@main.command()
@click.argument("old", type=click.Path(exists=True, dir_okay=False))
@click.argument("new", type=click.Path(exists=True, dir_okay=False))
def compare(old: str, new: str) -> None:
    """Compare two saved runs: regressed, fixed, changed, new, gone, not run.

    Exit status: 0 nothing got worse, 1 a claim regressed, 2 a file cannot be read or a claim was not run any more.
    """
    from conformance.report.compare import KINDS, compare
    from conformance.report.model import read_run

    try:
        changes = compare(read_run(old), read_run(new))
    except ValueError as error:
        raise CannotRun(str(error)) from error
    for kind in KINDS:
        of_kind = [change for change in changes if change.kind == kind]
        if of_kind:
            click.echo(f"{kind} ({len(of_kind)})")
        for change in of_kind:
            click.echo(f"  {change.claim}    {change.old}  →  {change.new}")
    if not changes:
        click.echo("no claim differs")
    kinds = {change.kind for change in changes}
    sys.exit(1 if "regressed" in kinds else 2 if "not run" in kinds else 0)


@main.command()
@click.argument("case", metavar="CASE")
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
def export(case: str, directory: Path) -> None:
    """Write CASE to DIR as a complete Hugging Face checkpoint, with inputs and expected values beside it."""
    from conformance.cases import Case, FixtureError

    if directory.exists() and any(directory.iterdir()):
        raise CannotRun(f"{directory} is not empty; name a new or empty directory")
    try:
        Case(case).export(directory)
    except FixtureError as error:
        raise CannotRun(str(error)) from error
    click.echo(f"{case} written to {directory}: {', '.join(sorted(p.name for p in directory.iterdir()))}")


@main.group()
def golden() -> None:
    """Make or verify the golden fixtures (needs transformers: the `oracle` extra)."""


@golden.command("make")
@click.argument("families", nargs=-1)
@click.option(
    "--fixtures", type=click.Path(file_okay=False, path_type=Path), help="Where to; default: the installed ones."
)
def golden_make(families: tuple[str, ...], fixtures: Path | None) -> None:
    """Rebuild the goldens of FAMILIES (default: all) from recipes and oracle."""
    module, names, directory = _golden(families, fixtures)
    names, missing = _without_oracle(names, "made")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        module.make(names, directory, click.echo)
    except ValueError as error:
        raise CannotRun(str(error)) from error
    sys.exit(2 if families and missing else 0)


@golden.command("claims")
@click.option(
    "--fixtures", type=click.Path(file_okay=False, path_type=Path), help="Where; default: the installed ones."
)
def golden_claims(fixtures: Path | None) -> None:
    """Write the recipes' claims into the manifest; the goldens stay as they are."""
    module, _, directory = _golden((), fixtures)
    try:
        click.echo(f"{module.write_claims(directory)} claims")
    except ValueError as error:
        raise CannotRun(str(error)) from error


@golden.command("verify")
@click.argument("families", nargs=-1)
@click.option(
    "--fixtures", type=click.Path(file_okay=False, path_type=Path), help="Which; default: the installed ones."
)
def golden_verify(families: tuple[str, ...], fixtures: Path | None) -> None:
    """Rebuild the goldens of FAMILIES (default: all) beside the stored ones and compare.

    A family whose oracle needs another release of transformers is not verified, which is said; if it was named, the
    exit status is 2.
    """
    module, names, directory = _golden(families, fixtures)
    names, missing = _without_oracle(names, "verified")
    try:
        problems = module.verify(names, directory, click.echo)
    except ValueError as error:
        raise CannotRun(str(error)) from error
    for problem in problems:
        click.echo(problem, err=True)
    if missing:
        click.echo(f"{len(missing)} of {len(names) + len(missing)} families not verified here: {', '.join(missing)}")
    if names:
        click.echo(f"{len(problems)} differences" if problems else "all other goldens verified" if missing else
                   "all goldens verified")  # fmt: skip
    sys.exit(1 if problems else 2 if families and missing else 0)


def _without_oracle(families: list[str], done: str) -> tuple[list[str], list[str]]:
    """The families whose oracle can run here, and those whose cannot, of which it is said why.

    done: what is not done with these.
    """
    from conformance.oracles import oracle_missing

    missing = {family: reason for family in families if (reason := oracle_missing(family))}
    for family, reason in missing.items():
        click.echo(f"{family}: not {done} here: {reason}")
    return [family for family in families if family not in missing], list(missing)


def _golden(families: tuple[str, ...], fixtures: Path | None) -> tuple[Any, list[str], Path]:
    """The golden module, the chosen families and the directory."""
    from importlib.util import find_spec

    from conformance.cases import fixtures_directory
    from conformance.families import FAMILIES

    if unknown := set(families) - set(FAMILIES):
        raise CannotRun(f"unknown family {', '.join(sorted(unknown))}; there is {', '.join(FAMILIES)}")
    if find_spec("transformers") is None:
        raise CannotRun("goldens need the oracle, which is not installed: pip install transformers")
    from conformance import golden as module

    return module, list(families or FAMILIES), fixtures or fixtures_directory()
