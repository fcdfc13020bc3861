"""`benchmarks/other_methods.py`, and that docs/sharpness.md is what it writes."""

from pathlib import Path

import pytest
import torch

from benchmark_programs import program
from conformance import mutation
from conformance.implementation import adopt, resolve
from conformance.mistakes import get

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sharpness.md").read_text()
# Mistakes that are far from every limit, of each kind; one that every method catches, one that some do.
SAMPLE = (
    ("llama", "residual-attention-missing"),
    ("llama", "rope-layout"),
    ("llama", "rope-linear-multiplied"),
    ("llama", "chunk-ignores-cache"),
    ("phi", "gelu-exact-for-tanh"),
    ("phi", "loss-summed"),
    ("phi", "pack-no-block-mask"),
    ("phi", "positions-argument-ignored"),
    ("phi", "weights-half-misread"),
    ("phi", "last-token-index-left-pad"),
)


other_methods = program("other_methods")


def _cells(text):
    """The lines of the first table in the text, without its head."""
    return [line[1:-1].strip().split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]


def _every_mutant():
    """The lines of the page's last table, by family and mistake."""
    lines = _cells(PAGE.split("## Every mutant")[1])
    return {(family, mistake.strip("`")): [family, mistake, *others] for family, mistake, *others in lines}


def _totals(family):
    """The page's first table of a family: name of the line -> numbers."""
    title = other_methods.get_family(family).title
    lines = _cells(PAGE.split(f"## {title}\n")[1].split("\n## ")[0])
    return {name: list(map(int, numbers)) for name, *numbers in lines}


@pytest.mark.parametrize("family", other_methods.FAMILIES)
def test_another_right_implementation_passes_every_method(family):
    found = other_methods.by_methods(resolve("reference-sdpa"), family)
    assert set(found) == set(other_methods.COLUMNS)
    verdicts = {verdict for verdicts in found.values() for verdict in verdicts}
    assert other_methods.CAUGHT not in verdicts
    assert other_methods.WITHIN in verdicts  # it is another one


@pytest.mark.parametrize("family", other_methods.FAMILIES)
def test_every_method_catches_an_obvious_mistake(family):
    found = other_methods.by_methods(mutation.mutant(get("token-ids-off-by-one")), family)
    assert {key for key, verdicts in found.items() if other_methods.CAUGHT not in verdicts} == set()


def _seen(logits, *steps):
    return other_methods.Seen(logits, steps)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("all logits", 1e-4), ("mean of logits", 1e-3), ("slice of logits", 1e-3)]
)
def test_tolerances(name, tolerance):
    method = next(method for method in other_methods.METHODS if method.name == name)
    right = torch.full((2, 4, 5), 3.0, dtype=torch.float64)
    limit = tolerance + 3 * tolerance
    assert method.verdict(_seen(right), _seen(right.clone())) == other_methods.SAME
    assert method.verdict(_seen(right), _seen(right + 0.99 * limit)) == other_methods.WITHIN
    assert method.verdict(_seen(right), _seen(right - 1.01 * limit)) == other_methods.CAUGHT
    assert method.verdict(_seen(right), _seen(right * torch.nan)) == other_methods.CAUGHT
    assert method.verdict(_seen(right), other_methods.Seen(None, None)) == other_methods.CAUGHT


def test_what_each_method_looks_at():
    everything, mean, corner, greedy = other_methods.METHODS
    right = torch.arange(40.0).view(2, 4, 5)
    elsewhere = right.clone()
    elsewhere[1, 3, 4] += 0.1
    elsewhere[1, 3, 3] -= 0.1
    right, elsewhere = _seen(right, right[:, 0]), _seen(elsewhere, right[:, 0] + 0.1)
    assert everything.verdict(right, elsewhere) == other_methods.CAUGHT
    assert mean.verdict(right, elsewhere) != other_methods.CAUGHT
    assert mean.verdict(right, _seen(torch.cat((right.logits[:1], right.logits[1:] + 1)))) == other_methods.CAUGHT
    assert corner.verdict(right, elsewhere) == other_methods.SAME
    assert greedy.verdict(right, elsewhere) == other_methods.WITHIN
    other_token = _seen(right.logits, right.logits[:, 0].flip(-1))
    assert greedy.verdict(right, other_token) == other_methods.CAUGHT


def test_a_session_that_raises_is_caught_by_greedy_decoding_alone():
    def load(checkpoint):
        model = resolve("reference").load(checkpoint)

        def forward_alone(input_ids):
            return model(input_ids)

        def session():
            raise RuntimeError("not enough memory")

        forward_alone.session = session
        return forward_alone

    found = other_methods.by_methods(adopt("half", load), "llama")
    caught = {column for column, verdicts in found.items() if other_methods.CAUGHT in verdicts}
    assert caught == {("greedy tokens", "initial"), ("greedy tokens", "drawn")}


def test_the_page_lists_the_mutants_of_the_catalogue():
    assert set(_every_mutant()) == {
        (family, mistake) for mistake, family in other_methods.mutants(other_methods.FAMILIES)
    }


def test_the_page_says_that_the_suite_kills_them_all():
    for (_, mistake), cells in _every_mutant().items():
        assert cells[-1] in get(mistake).killed_by
    assert all(
        _totals(family)["this suite"] == [0] * (2 + len(other_methods.KINDS)) for family in other_methods.FAMILIES
    )


@pytest.mark.parametrize("family", other_methods.FAMILIES)
def test_the_totals_are_those_of_the_mutants(family):
    own = [cells for (of, _), cells in _every_mutant().items() if of == family]
    totals = _totals(family)
    assert totals["mutants"][0] == len(own)
    for number, column in enumerate(other_methods.COLUMNS, start=3):
        passed = [cells for cells in own if cells[number].startswith(("0/", "–"))]
        by_kind = [sum(cells[2] == kind for cells in passed) for kind in other_methods.KINDS]
        assert totals[other_methods.key(column)][:1] == [len(passed)]
        assert totals[other_methods.key(column)][2:] == by_kind


@pytest.mark.parametrize(("family", "mistake"), SAMPLE)
def test_the_page_says_what_is_found(family, mistake):
    row = other_methods.judged((mistake, family))
    assert row.suite == "killed"
    assert other_methods.line(row) == _every_mutant()[family, mistake]


def test_every_kind_is_in_the_sample():
    kinds = {_every_mutant()[mutant][2] for mutant in SAMPLE}
    assert kinds == set(other_methods.KINDS) - {"dtype"}  # those take long


def test_a_mistake_of_no_known_kind_is_refused():
    from dataclasses import replace

    with pytest.raises(ValueError, match=r"no kind of mistake is killed by partition\.stages in llama"):
        other_methods.kind(replace(get("rope-layout"), killed_by=("partition.stages",)), "llama")
