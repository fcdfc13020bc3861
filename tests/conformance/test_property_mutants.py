"""Every property check catches a mistake by itself, and none in the reference."""

import pytest

from conformance import check
from conformance.suite import checks
from property_mutants import MUTANTS, Mutant

GOLDEN = ("golden.", "component.", "memory.", "packed.", "tokenizer.")
GOLDEN_CACHE = {f"cache.{name}" for name in ("prefill_decode", "one_by_one", "chunks", "ragged", "constant_state")}
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
    properties = {name for name in checks() if not name.startswith(GOLDEN)} - GOLDEN_CACHE
    assert properties == {mutant.check for mutant in MUTANTS}
