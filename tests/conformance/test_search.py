"""Searching for examples: what is run, how a failure becomes small, what a replay does, what runs have in common."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st

from conformance import Unsupported, check, search
from conformance.implementation import Misbehaviour
from conformance.search import Example, Listed, NotAnExample, Settings

NUMBERS = st.fixed_dictionaries({"n": st.integers(0, 1000), "m": st.integers(0, 1000)})


def judge(**settings: Any) -> Any:
    """As much of a judge as a search needs."""
    return SimpleNamespace(settings=Settings(**settings), example=None, examples=0, also=[], out_of_time=False)


def seen(strategy: Any, first: Any = (), **settings: Any) -> list[Example]:
    """The examples that a search puts to a property that holds."""
    found: list[Example] = []
    search.search(judge(**settings), strategy, found.append, first)
    return found


def at_most(limit: int) -> Callable[[Example], None]:
    def holds(example: Example) -> None:
        if example["n"] > limit:
            raise Misbehaviour("value", f"{example['n']} is too large")

    return holds


@pytest.mark.parametrize("profile", ["quick", "ci", "thorough"])
def test_profile_says_how_many_examples_are_drawn(profile: str) -> None:
    assert len(seen(NUMBERS, profile=profile)) == search.PROFILES[profile]


def test_of_dear_examples_fewer_are_drawn_but_one_and_of_cheap_ones_more() -> None:
    for cost, wanted in ((5, 5), (1000, 1), (1 / 4, 100)):
        found: list[Example] = []
        search.search(judge(profile="ci"), NUMBERS, found.append, cost=cost)
        assert len(found) == wanted


def test_nothing_to_try_is_no_pass() -> None:
    with pytest.raises(Unsupported, match="nothing that this could be tried with"):
        search.each(judge(), [], lambda example: None)


def test_first_examples_come_first_and_are_not_drawn_again() -> None:
    first = [{"n": 5, "m": 5}, {"n": 0, "m": 0}]
    found = seen(NUMBERS, first)
    assert found[:2] == first
    assert found.count(first[1]) == 1


def test_one_seed_gives_one_series_and_another_seed_another() -> None:
    assert seen(NUMBERS, seed=1) == seen(NUMBERS, seed=1)
    assert seen(NUMBERS, seed=1) != seen(NUMBERS, seed=2)


def test_what_is_drawn_does_not_depend_on_the_constants_of_loaded_code(tmp_path: Path) -> None:
    """Hypothesis mixes constants of local modules into its draws; the seed alone is to say what is drawn."""
    import importlib.util

    before = seen(NUMBERS, profile="thorough")
    (tmp_path / "constants.py").write_text("\n".join(f"X{n} = {n}" for n in range(500, 600)))
    spec = importlib.util.spec_from_file_location("constants_of_a_test", tmp_path / "constants.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, spec.name, module)
        spec.loader.exec_module(module)
        assert seen(NUMBERS, profile="thorough") == before


def test_nothing_is_written_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Misbehaviour):
        search.search(judge(profile="ci"), NUMBERS, at_most(100))
    assert not list(tmp_path.iterdir())


def test_failure_is_raised_for_the_smallest_example() -> None:
    at = judge(profile="ci")
    with pytest.raises(Misbehaviour, match="101 is too large"):
        search.search(at, NUMBERS, at_most(100))
    assert at.example == {"n": 101, "m": 0}


def test_making_it_smaller_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SHRINK_RUNS", 3)
    at = judge(profile="ci")
    with pytest.raises(Misbehaviour):
        search.search(at, NUMBERS, at_most(10))
    before_failure = next(i for i, e in enumerate(seen(NUMBERS, profile="ci")) if e["n"] > 10) + 1
    assert at.examples <= before_failure + 3


def test_failure_that_comes_and_goes_is_a_failure_of_the_example_that_failed() -> None:
    calls: list[Example] = []

    def holds(example: Example) -> None:
        calls.append(example)
        if len(calls) == 4:
            raise Misbehaviour("value", "once")

    at = judge(profile="ci")
    with pytest.raises(Misbehaviour, match="once"):
        search.search(at, NUMBERS, holds)
    assert at.example == calls[3]


def test_unsupported_ends_the_search_at_once() -> None:
    calls: list[Example] = []

    def holds(example: Example) -> None:
        calls.append(example)
        raise Unsupported("no")

    with pytest.raises(Unsupported, match="no"):
        search.search(judge(profile="ci"), NUMBERS, holds)
    assert len(calls) == 1


def test_no_example_is_begun_when_time_is_up() -> None:
    at = judge(profile="thorough", seconds=0.0)
    search.search(at, NUMBERS, at_most(1000))
    assert at.out_of_time
    assert at.examples < 5


def test_replay_runs_that_example_alone() -> None:
    asked = {"m": 3, "n": 7}
    assert seen(NUMBERS, example=asked) == [asked]
    at = judge(example={"n": 2000, "m": 0})
    with pytest.raises(Misbehaviour, match="2000"):
        search.search(at, NUMBERS, at_most(1000))
    assert at.example == {"n": 2000, "m": 0}


@pytest.mark.parametrize("wrong", [{"n": 1}, {"n": 1, "m": 1, "k": 1}, {"n": "one", "m": 0}, {}])
def test_replay_refuses_what_is_no_example(wrong: Example) -> None:
    with pytest.raises(NotAnExample):
        search.search(judge(example=wrong), NUMBERS, at_most(1000))


def test_listing_runs_nothing_and_gives_examples() -> None:
    with pytest.raises(Listed) as listed:
        search.search(judge(listing=True), NUMBERS, at_most(-1), [{"n": 1, "m": 1}])
    assert listed.value.examples[0] == {"n": 1, "m": 1}
    assert len(listed.value.examples) == 1 + search.LISTED


def test_each_runs_all_and_names_the_others_that_fail() -> None:
    at = judge()
    with pytest.raises(Misbehaviour, match="11 is too large"):
        search.each(at, [{"n": n} for n in (1, 11, 2, 12)], at_most(10))
    assert (at.example, at.examples, at.also) == ({"n": 11}, 4, ["also: 12 is too large"])


def test_example_is_in_the_journal_before_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFORMANCE_SCRATCH", str(tmp_path))
    at_that_time: list[tuple[Example, Example | None]] = []
    search.search(judge(), NUMBERS, lambda example: at_that_time.append((example, search.journalled(str(tmp_path)))))
    assert at_that_time
    assert all(example == journalled for example, journalled in at_that_time)
    search.journal(None)
    assert search.journalled(str(tmp_path)) is None


# --- through the suite ----------------------------------------------------------------------------------------------


def test_failure_names_its_example_in_words_and_can_be_replayed() -> None:
    from property_mutants import Around

    wrong = Around(lambda run, ids, mask: run() * (1 + 1e-6 * (len(ids) > 2)))
    result = check(wrong, "llama/plain", "batching.alone", profile="ci")
    assert (result.outcome, result.kind) == ("fail", "value")
    assert result.example == {"batch": 3, "length": 1, "row": 0, "ids": 0}
    assert "[rows: 3, tokens a row: 1, row 0, ids from seed 0]" in result.message
    again = check(wrong, "llama/plain", "batching.alone", example=json.loads(json.dumps(result.example)))
    assert (again.outcome, again.message, again.examples) == ("fail", result.message, 1)
    smaller = check(wrong, "llama/plain", "batching.alone", example={**result.example, "batch": 2})
    assert smaller.outcome == "pass"


def test_example_that_does_not_fit_is_an_error_of_whoever_gave_it() -> None:
    result = check("reference", "llama/plain", "batching.alone", example={"batch": 2})
    assert (result.outcome, result.kind) == ("error", "example")
    assert "an example of this check has batch, ids, length, row" in result.message


def test_unknown_profile_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown profile 'deep'; there is quick, ci, thorough"):
        check("reference", "llama/plain", "batching.alone", profile="deep")


def test_one_row_is_not_judged_by_the_average_over_a_case() -> None:
    """A right model's single row that is off by twice the oracle's RMS over the case, in two runs, is no alarm.

    Found by `benchmarks/false_alarms.py` at seed 500.
    """
    example = {"batch": 4, "length": 1, "row": 1, "ids": 3149}
    assert check("reference", "transformer_xl/distinct", "batching.alone", "float32", example=example).outcome == "pass"


def test_difference_in_a_working_dtype_is_a_failure_beyond_twice_five_times_the_largest_error() -> None:
    from conformance import Case
    from property_mutants import Around

    case = Case("llama/plain")
    noise = case.provenance["oracle_error"]["logits"]["float32"]["max"]
    size = case.expected["logits"].abs().max().item()
    example = {"batch": 2, "length": 3, "row": 0, "ids": 0}
    for times, outcome in ((8, "pass"), (13, "fail")):
        shifted = Around(lambda run, ids, mask, times=times: run() + times * noise * size * (len(ids) > 1))
        result = check(shifted, "llama/plain", "batching.alone", "float32", example=example)
        assert result.outcome == outcome, (times, result)
