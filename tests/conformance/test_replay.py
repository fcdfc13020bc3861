"""An example that kills or hangs the candidate's process is replayed in a fresh one, and made smaller."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from conformance.cases import Claim
from conformance.replay import _size, replayed
from conformance.worker import Died, Worker

FAKES = Path(__file__).parents[1] / "fakes.py"
Judged = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judged]:
    """(fake, check, timeout, settings) -> the result of llama/plain with a fake whose process dies or hangs."""
    chosen = tmp_path_factory.mktemp("fake") / "name"
    with pytest.MonkeyPatch.context() as patch, closing(Worker(f"{FAKES}:Chosen")) as worker:
        patch.setenv("FAKE", str(chosen))

        def judged(fake: str, check: str, timeout: float = 30.0, **settings: Any) -> dict[str, Any]:
            chosen.write_text(fake)
            worker.retire()
            answer = worker.request(timeout, op="judge", case="llama/plain", check=check, dtype="float64", **settings)
            assert isinstance(answer, Died), answer
            return replayed(worker, Claim("llama/plain", check, "float64"), answer, timeout, settings)

        yield judged


def test_crash_is_named_by_the_smallest_example_found(judged: Judged) -> None:
    result = judged("SegfaultsOnLongTexts", "batching.alone")
    assert (result["outcome"], result["kind"]) == ("crash", "killed by SIGSEGV")
    assert result["example"]["length"] in (5, 6)  # the smallest is 5; a dozen tries come near
    assert result["example"]["batch"] == 2
    assert f"tokens a row: {result['example']['length']}" in result["message"]


def test_crash_in_an_example_that_was_asked_for_stays_that_example(judged: Judged) -> None:
    asked = {"batch": 2, "length": 5, "row": 0, "ids": 0}
    result = judged("SegfaultsOnLongTexts", "batching.alone", example=asked)
    assert (result["outcome"], result["example"]) == ("crash", asked)


def test_hang_is_named_by_the_smallest_example_found(judged: Judged) -> None:
    result = judged("HangsOnThreeRows", "shapes.any", timeout=8.0)
    assert result["outcome"] == "timeout"
    assert result["example"] == {"batch": 3, "length": 1, "ids": 0}


def test_crash_that_no_example_repeats_is_a_crash_and_says_so(judged: Judged) -> None:
    result = judged("DiesInItsNinthCall", "batching.alone", profile="ci")
    assert (result["outcome"], result["example"]) == ("crash", None)
    assert "alone in a fresh process, was not repeated" in result["notes"][0]


def test_crash_outside_a_property_has_no_example(judged: Judged) -> None:
    result = judged("SegfaultsOnLongTexts", "golden.logits")
    assert (result["outcome"], result["example"], result["notes"]) == ("crash", None, [])


def test_size_counts_what_a_person_sees_and_seeds_last() -> None:
    small = {"batch": 1, "length": 2, "ids": 9999}
    assert _size(small) < _size({"batch": 1, "length": 3, "ids": 0}) < _size({"batch": 2, "length": 3, "ids": 0})
    assert _size(small) > _size({"batch": 1, "length": 2, "ids": 1})
