"""How sharp other ways of testing a model are: which mistakes of the catalogue they let pass.

    python benchmarks/other_methods.py                                  # a table
    python benchmarks/other_methods.py --json found.json --write docs/sharpness.md

Every mistake that can be made in Llama or Phi, except those that no output shows (declared equivalent or policy), is
made in `reference_impl`, and the mutant is compared with the right model by each method, both in float32 on the same
machine, so that rounding never decides.  The methods are our own, written after what is customary; `METHODS` and
`INPUTS` say how.  Beside them the suite judges the same mutant.
"""

import json
import multiprocessing
import os
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from conformance import bounds, draws, mutation
from conformance.cases import Case, Manifest
from conformance.families import get as get_family
from conformance.implementation import (
    Candidate,
    CandidateRaised,
    Implementation,
    Misbehaviour,
    load_checkpoint,
    resolve,
)
from conformance.judge import Judge
from conformance.mistakes import Mistake, catalogue
from conformance.mistakes import get as get_mistake

FAMILIES = ("llama", "phi")
SEEDS = (0, 1, 2)
NEW_TOKENS = 8
DTYPE = "float32"

# --- what is compared -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What one model shows on one input.

    logits: (batch, seq, vocab) of a full forward.
    steps: the logits from which greedy decoding took each token, (batch, vocab) each.
    None: it raised, or what it returned were no logits.
    """

    logits: Tensor | None
    steps: tuple[Tensor, ...] | None


Values = Sequence[Tensor]


@dataclass(frozen=True)
class Method:
    """A way of testing.

    what: the comparison, for the page.  used: by what kind of project.
    part: the values that it looks at; None where the candidate gave none.
    agrees: (right, got) -> whether it lets the candidate pass.
    """

    name: str
    what: str
    used: str
    part: Callable[[Seen], Values | None]
    agrees: Callable[[Tensor, Tensor], bool]

    def verdict(self, truth: Seen, seen: Seen) -> str:
        """What the method makes of what is seen."""
        wanted, got = self.part(truth), self.part(seen)
        assert wanted is not None
        if got is None or not all(map(self.agrees, wanted, got)):
            return CAUGHT
        return SAME if all(map(torch.equal, wanted, got)) else WITHIN


# What a method makes of a mutant on one input.
CAUGHT, WITHIN, SAME = "caught", "within tolerance", "identical"


def of_logits(part: Callable[[Tensor], Tensor]) -> Callable[[Seen], Values | None]:
    return lambda seen: None if seen.logits is None else (part(seen.logits),)


def within(tolerance: float) -> Callable[[Tensor, Tensor], bool]:
    """rtol = atol, as most write it; NaN never agrees."""
    return lambda right, got: torch.allclose(got, right, rtol=tolerance, atol=tolerance)


METHODS = (
    Method(
        "all logits",
        "every logit of one forward pass, `allclose` with rtol = atol = 1e-4",
        "ports of models compared with the original on a small random model (litgpt has one such test a family)",
        of_logits(lambda logits: logits), within(1e-4),
    ),
    Method(
        "mean of logits",
        "one number, the mean of all logits, rtol = atol = 1e-3",
        "training libraries that keep golden numbers in the test's source (torchtune's style)",
        of_logits(lambda logits: logits.mean()), within(1e-3),
    ),
    Method(
        "slice of logits",
        "nine numbers, logits[0, :3, :3], rtol = atol = 1e-3",
        "model libraries that keep a golden slice in the test's source; common knowledge",
        of_logits(lambda logits: logits[0, :3, :3]), within(1e-3),
    ),
    Method(
        "greedy tokens",
        f"the ids of {NEW_TOKENS} tokens decoded greedily with a cache: of one prompt, then of three prompts of "
        "different lengths in one batch, padded on the left; equal or not",
        "serving engines compared with the library whose checkpoints they load; common knowledge",
        lambda seen: seen.steps, lambda right, got: torch.equal(right.argmax(-1), got.argmax(-1)),
    ),
)  # fmt: skip

INPUTS = {
    "initial": "A model of the size and weights customary in such tests: hidden 32, 2 layers, 4 heads, 37 inner units, "
    "99 tokens, every field at its default; matrices N(0, 0.02), norm weights 1, biases 0; 13 rows of 7 random tokens. "
    "Three seeds; the third has 2 key-value heads, the others 4.",
    "drawn": "The same three models and tokens, with weights drawn as those of the suite's cases, so that attention is "
    "far from uniform and activations far from linear: matrices of standard deviation 1.5/√fan_in, norm weights around "
    "1, random biases.",
    "cases": "All cases of the suite but the `long` one: their configurations, weights and tokens.",
}
# On the suite's own cases, one method is enough to tell what its inputs do from what its bounds and checks do.
COLUMNS = (*((method.name, inputs) for inputs in ("initial", "drawn") for method in METHODS), ("all logits", "cases"))

# --- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """A checkpoint and what it is given."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    arguments: dict[str, Tensor]
    prompts: tuple[tuple[Tensor, Tensor], ...] = field(default=())  # ids and mask, (batch, seq) each


@cache
def tiny(family: str, inputs: str, seed: int) -> Input:
    """A tiny model at the family's defaults, with initial or drawn weights."""
    found = get_family(family)
    config = found.recipes[0].config | {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2 if seed == 2 else 4,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: initial(name, shape, generator) if inputs == "initial" else draws.tensor(f"tiny/{seed}", name, shape)
        for name, shape in found.tensor_shapes(config).items()
    }
    ids = torch.randint(99, (13, 7), generator=generator)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, :2] = mask[2, :4] = 0  # padded on the left
    padded = torch.where(mask.bool(), ids[1:4], 0)
    return Input(config, weights, {"input_ids": ids}, ((ids[:1], mask[:1]), (padded, mask)))


def initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    kind = draws.kind_of(name, {})
    if kind in ("norm", "bias"):
        return torch.full(shape, 1.0 if kind == "norm" else 0.0)
    return torch.randn(shape, generator=generator) * 0.02


@cache
def cases(family: str) -> tuple[Input, ...]:
    """The suite's cases as inputs, the one with everything first."""
    names = [name for name in Manifest().cases if name.split("/")[0] == family and not name.endswith("/long")]
    found = [Case(name) for name in sorted(names, key=lambda name: not name.endswith("/distinct"))]
    return tuple(Input(case.config, case.weights, case.arguments) for case in found)


# --- running ----------------------------------------------------------------------------------------------------------


def observe(implementation: Implementation, given: Input) -> Seen:
    """What an implementation shows on an input; what it could not do to the end is missing."""
    try:
        candidate = load_checkpoint(implementation, given.config, given.weights, DTYPE, "cpu")
        with torch.no_grad():
            logits = candidate(**given.arguments).logits
    except (CandidateRaised, Misbehaviour):
        return Seen(None, None)
    try:
        with torch.no_grad():
            return Seen(logits, tuple(step for prompt in given.prompts for step in decoded(candidate, *prompt)))
    except (CandidateRaised, Misbehaviour):
        return Seen(logits, None)


def decoded(candidate: Candidate, ids: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """The logits of each step of greedy decoding."""
    session = candidate.session()
    logits = session.feed(ids, attention_mask=None if mask.all() else mask)
    for _ in range(NEW_TOKENS - 1):
        yield logits[:, -1]
        logits = session.feed(logits[:, -1:].argmax(-1))
    yield logits[:, -1]


@cache
def right(family: str, inputs: str, number: int) -> tuple[Input, Seen]:
    """An input and what the right model shows on it."""
    given = cases(family)[number] if inputs == "cases" else tiny(family, inputs, number)
    return given, observe(resolve("reference"), given)


def by_methods(implementation: Implementation, family: str) -> dict[tuple[str, str], list[str]]:
    """What each method on each kind of input makes of an implementation, seed by seed; of the cases, all together."""
    found: dict[tuple[str, str], list[str]] = {column: [] for column in COLUMNS}
    for inputs in ("initial", "drawn"):
        for seed in SEEDS:
            given, truth = right(family, inputs, seed)
            seen = observe(implementation, given)
            for method in METHODS:
                found[method.name, inputs].append(method.verdict(truth, seen))
    found["all logits", "cases"].append(on_cases(implementation, family))
    return found


def on_cases(implementation: Implementation, family: str) -> str:
    worst = SAME
    for number in range(len(cases(family))):
        given, truth = right(family, "cases", number)
        if (one := METHODS[0].verdict(truth, observe(implementation, given))) == CAUGHT:
            return CAUGHT
        worst = WITHIN if one == WITHIN else worst
    return worst


# --- mutants ----------------------------------------------------------------------------------------------------------

KINDS = {
    "forward": "shows in a plain forward pass of the default configuration",
    "field": "shows in a forward pass once a field or a size is not the default",
    "padding": "needs padding, or positions that are given",
    "cache": "needs a cache",
    "packing": "needs texts that share a row without padding",
    "generation": "shows in the implementation's own loop that generates tokens",
    "training": "shows in the loss or the gradients alone",
    "loading": "needs files of another dtype than the model's",
    "dtype": "is a matter of precision: shows in float32, bfloat16 or float16 alone",
}
# Checks that see a mistake in a forward pass, in a configuration or with positions of their own.
SEEN_FORWARD = (
    "golden.logits",
    "invariance.shift",
    "invariance.spelling",
    "invariance.absent",
    "sensitivity.fractions",
)


def kind(mistake: Mistake, family: str) -> str:
    """What it takes to see a mistake: by the checks of the suite that it names, and by a forward of the plain case."""
    if mistake.precision:
        return "dtype"
    if set(mistake.killed_by) & set(SEEN_FORWARD):
        return "forward" if wrong_in_plain(mistake, family) else "field"
    if any("padding" in check or check == "golden.positions" for check in mistake.killed_by):
        return "padding"
    if any(check.startswith("cache.") for check in mistake.killed_by):
        return "cache"
    if any(check.startswith("packed.") for check in mistake.killed_by):
        return "packing"
    if any(check.startswith("generation.") for check in mistake.killed_by):
        return "generation"
    if any("loss" in check or "gradients" in check for check in mistake.killed_by):
        return "training"
    if "round_trip.storage" in mistake.killed_by:
        return "loading"
    raise ValueError(f"no kind of mistake is killed by {', '.join(mistake.killed_by)} in {family}; add one to KINDS")


def wrong_in_plain(mistake: Mistake, family: str) -> bool:
    case = Case(f"{family}/plain")
    try:
        logits = Judge(mutation.mutant(mistake), case, "float64", "cpu").logits(**case.arguments)
    except (CandidateRaised, Misbehaviour):
        return True
    return not bounds.within(bounds.measure(logits, case.expected["logits"]), "float64").passed


@dataclass(frozen=True)
class Row:
    """One mutant: what the suite and the methods make of it."""

    mistake: str
    family: str
    kind: str
    suite: str
    by: str
    methods: dict[str, list[str]]

    def passes(self, column: tuple[str, str]) -> bool:
        """Whether no seed shows the mistake: the reading that is kindest to the method."""
        return CAUGHT not in self.methods[key(column)]


def key(column: tuple[str, str]) -> str:
    return " · ".join(column)


def mutants(families: Iterable[str]) -> list[tuple[str, str]]:
    """Mistake and family of every mutant that some output of one process shows."""
    shown = [mistake for mistake in catalogue().values() if not mistake.partition]
    return [(m.id, f) for f in families for m in shown if f in m.families and f not in m.equivalent]


def judged(task: tuple[str, str]) -> Row:
    identifier, family = task
    mistake = get_mistake(identifier)
    methods = {key(column): found for column, found in by_methods(mutation.mutant(mistake), family).items()}
    outcome = mutation.judge_mutant(mistake, family)
    return Row(identifier, family, kind(mistake, family), outcome.status, outcome.by, methods)


def run(tasks: list[tuple[str, str]], jobs: int) -> list[Row]:
    torch.set_num_threads(1)
    if jobs == 1:
        return list(map(judged, tasks))
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(judged, tasks))


# --- reporting --------------------------------------------------------------------------------------------------------


HEAD = ["pass", "same"]


def counts(rows: list[Row]) -> dict[str, list[int]]:
    """How many mutants there are, and each column and the suite lets pass: all, with the same values, by kind."""
    nothing = [row for row in rows if row.suite != "killed"]
    found = {"mutants": numbers(rows, [])}
    for column in COLUMNS:
        passed = [row for row in rows if row.passes(column)]
        found[key(column)] = numbers(passed, [row for row in passed if set(row.methods[key(column)]) == {SAME}])
    return found | {"this suite": numbers(nothing, [])}


def numbers(rows: list[Row], same: list[Row]) -> list[int]:
    of = Counter(row.kind for row in rows)
    return [len(rows), len(same), *(of[name] for name in KINDS)]


def show(rows: list[Row]) -> None:
    console = Console(width=max(Console().width, 90))
    for family in dict.fromkeys(row.family for row in rows):
        table = Table(title=f"{family}: mistakes that pass", box=None, padding=(0, 1, 0, 0), title_justify="left")
        table.add_column()
        for title in (*HEAD, *KINDS):
            table.add_column(title, justify="right")
        for name, found in counts([row for row in rows if row.family == family]).items():
            table.add_row(name, *map(str, found))
            if name == "mutants" or name in (key(("greedy tokens", inputs)) for inputs in INPUTS):
                table.add_row()
        console.print(table, "")


def page(rows: list[Row]) -> str:
    """docs/sharpness.md"""
    families = list(dict.fromkeys(row.family for row in rows))
    parts = [_intro(rows)]
    for family in families:
        own = [row for row in rows if row.family == family]
        lines = [[name, *map(str, line)] for name, line in counts(own).items()]
        parts.append(f"## {get_family(family).title}\n\n" + _table(["method · inputs", *HEAD, *KINDS], lines))
    parts.append(_definitions())
    parts.append("## What each lets pass\n")
    parts += [_passed(column, rows) for column in COLUMNS]
    parts.append(_every(rows))
    return "\n".join(parts)


def _intro(rows: list[Row]) -> str:
    mistakes, survivors = len({row.mistake for row in rows}), sum(row.suite != "killed" for row in rows)
    kinds = "".join(f"- **{name}**: {what}.\n" for name, what in KINDS.items())
    return f"""\
<!-- written by `python benchmarks/other_methods.py --write docs/sharpness.md`; do not edit -->

# How sharp other methods are

{mistakes} mistakes of the [catalogue](mistakes.md) make {len(rows)} mutants of the reference's Llama and Phi. Left out
are those that no output can show (declared equivalent, or a policy of precision) and those of partition. Each is
compared with the right model by methods that are customary elsewhere, and judged by this suite, which lets
{survivors or "none"} pass.

- **pass**: mutants that the method lets pass, whatever the seed.
- **same**: those of them for which all that the method looks at (for greedy tokens: the logits they are taken from) is
  bit for bit what the right model gives, in every seed. No tolerance would have shown them; the others differ by less
  than the method sees.

The other columns split the mutants by what it takes to see them. A forward pass alone cannot see what needs padding, a
cache, packing or a loss, and is not to be blamed for it: compare within a column. Projects usually have further tests.

{kinds}
Both models run in float32 on the same machine: rounding can neither hide a mistake nor show one.
"""


def _definitions() -> str:
    methods = [[method.name, method.what, method.used] for method in METHODS]
    return f"""\
## Methods

Written for this comparison, after what is customary; no project's own tests were run. All load the mutant from the same
checkpoint directory as the right model, so that mistakes of loading can be seen.

{_table(["method", "passes if these agree", "where its like is used"], methods)}
## Inputs

{_table(["inputs", "what they are"], [[name, what] for name, what in INPUTS.items()])}
`all logits` on the suite's cases shows what these inputs do without the suite's bounds and its other checks.
"""


def _passed(column: tuple[str, str], rows: list[Row]) -> str:
    lines = [f"### {column[0]}, {column[1]}\n"]
    for family in dict.fromkeys(row.family for row in rows):
        passed = [row for row in rows if row.family == family and row.passes(column)]
        lines.append(f"{get_family(family).title}, {len(passed)}:\n")
        for name in KINDS:
            found = [f"`{row.mistake}`" for row in passed if row.kind == name]
            if found:
                text = f"- {name} ({len(found)}): {', '.join(found)}"
                lines += textwrap.wrap(text, 120, subsequent_indent="  ", break_on_hyphens=False)
        lines.append("")
    return "\n".join(lines)


def _every(rows: list[Row]) -> str:
    """All mutants with the number of seeds in which each method catches them."""
    head = ["family", "mistake", "kind", *map(key, COLUMNS), "killed by"]
    return (
        "## Every mutant\n\nSeeds in which each method catches it; – where all that the method sees is identical.\n\n"
        + _table(head, list(map(line, rows)))
    )


def line(row: Row) -> list[str]:
    found = [caught(row.methods[key(column)]) for column in COLUMNS]
    return [row.family, f"`{row.mistake}`", row.kind, *found, row.by.split(" · ")[1] if row.by else ""]


def caught(found: list[str]) -> str:
    return "–" if set(found) == {SAME} else f"{found.count(CAUGHT)}/{len(found)}"


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *lines])


@click.command()
@click.option("--family", "families", multiple=True, type=click.Choice(FAMILIES), help="Only this (repeatable).")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes.  [default: one a core]")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write what was found.")
@click.option("--write", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the page.")
def main(families: tuple[str, ...], jobs: int | None, file: Path | None, target: Path | None) -> None:
    """Which mistakes of the catalogue other ways of testing let pass."""
    if target and families:
        raise click.UsageError("the page is about all families: leave --family out")
    started = time.perf_counter()
    rows = run(mutants(families or FAMILIES), jobs or mutation.default_jobs())
    show(rows)
    print(f"{len(rows)} mutants in {time.perf_counter() - started:.0f} s")
    if file:
        file.write_text(json.dumps({"format": 1, "mutants": [asdict(row) for row in rows]}, indent=2) + "\n")
    if target:
        target.write_text(page(rows))


if __name__ == "__main__":
    main()
