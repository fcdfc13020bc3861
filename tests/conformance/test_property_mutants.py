"""Every property check catches a mistake by itself, and none in the reference."""

import pytest

from conformance.families import FAMILIES, claims, get
from judged import check
from property_mutants import MUTANTS, Mutant

# Mistakes that show as an exception of the candidate's own.
RAISE = {"a table of positions that is one row short"}


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_killed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    result = check(mutant.candidate(monkeypatch), mutant.case, mutant.check)
    wanted = "error" if mutant.what in RAISE else "fail"
    assert (result.outcome, result.example is not None) == (wanted, True), result


@pytest.mark.parametrize(("case", "name"), sorted({(mutant.case, mutant.check) for mutant in MUTANTS}))
def test_reference_passes(case: str, name: str) -> None:
    result = check("reference", case, name)
    assert (result.outcome, result.examples > 0) == ("pass", True), result


def test_every_property_has_a_mutant() -> None:
    recipes = [recipe for family in FAMILIES for recipe in get(family).recipes]
    properties = {name for recipe in recipes for name in claims(recipe) if name not in recipe.claims}
    assert properties == {mutant.check for mutant in MUTANTS}
