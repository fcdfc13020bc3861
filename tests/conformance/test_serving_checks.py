"""The checks of memory and of packing can fail, and do so for the right reason."""

from types import SimpleNamespace
from typing import Any

import pytest

from conformance import check
from conformance.implementations.reference import Reference
from reference_impl.nn.kv_cache import KVCache, Session

WINDOWED = "mistral/window"


class Changed:
    """The reference whose model has been tampered with."""

    def __init__(self, change: Any):
        self.change = change

    def load(self, checkpoint: Any) -> Any:
        model = Reference("eager").load(checkpoint)
        self.change(model)
        return model


# --- memory


def keeps_everything(model: Any) -> None:
    model.session = lambda: Session(model.model, KVCache(num_hidden_layers=3))


def says(size: Any) -> Any:
    def change(model: Any) -> None:
        session = model.session
        model.session = lambda: SimpleNamespace(feed=session().feed, state_bytes=lambda: size)

    return change


def says_nothing(model: Any) -> None:
    session = model.session
    model.session = lambda: SimpleNamespace(feed=session().feed)


def constant_state(change: Any) -> Any:
    return check(Changed(change), WINDOWED, "cache.constant_state", "float32")


def test_a_cache_that_keeps_everything_fails() -> None:
    result = constant_state(keeps_everything)
    assert (result.outcome, result.kind) == ("fail", "state grows")
    assert "after 10 tokens" in result.message
    assert "sliding_window=5" in result.message


def test_a_rolling_cache_passes() -> None:
    assert constant_state(lambda model: None).outcome == "pass"


def test_a_session_that_does_not_say_is_unsupported() -> None:
    result = constant_state(says_nothing)
    assert (result.outcome, result.message) == ("unsupported", "the session has no state_bytes()")


@pytest.mark.parametrize("size", [None, 1.5, -1, True, "much"], ids=str)
def test_what_is_no_number_of_bytes_fails(size: Any) -> None:
    result = constant_state(says(size))
    assert (result.outcome, result.kind) == ("fail", "type")


def test_the_smallest_growth_fails() -> None:
    fed = []

    def change(model: Any) -> None:
        session = model.session()
        feed = lambda input_ids: (fed.append(1), session.feed(input_ids))[1]  # noqa: E731
        model.session = lambda: SimpleNamespace(feed=feed, state_bytes=lambda: 1000 + (len(fed) == 17))

    result = constant_state(change)
    assert (result.outcome, result.kind) == ("fail", "state grows")
    assert "1,000 bytes after 10 tokens and 1,001 after 17" in result.message
