"""The memory checks: a right candidate passes, each mistake is caught by the check that it is for, and named."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.implementations.reference import Reference, SegmentModel
from conformance.judge import Result
from judged import check
from reference_impl.nn import segment_memory

CASE = "transformer_xl/field-mem_len"
CHECKS = ("memory.segments", "memory.second_session", "memory.gradients")


class Candidate:
    """The reference, with sessions changed by the test."""

    name = "candidate"
    families = frozenset({"transformer_xl"})

    def __init__(self, session: Any = None, **attributes: Any):
        self.session, self.attributes = session, attributes

    def load(self, checkpoint: Any) -> Any:
        model = Reference("eager").load(checkpoint)
        if self.session is not None:
            original = model.session
            model.session = lambda: self.session(model, original)
        for name, value in self.attributes.items():
            setattr(model, name, value)
        return model


class WithoutMemory:
    def __init__(self, model: SegmentModel, original: Any):
        self.model = model

    def feed(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids)["logits"]


class FedAgain:
    """The whole text again and again."""

    def __init__(self, model: SegmentModel, original: Any):
        self.model, self.fed = model, torch.empty(0)

    def feed(self, input_ids: Tensor) -> Tensor:
        self.fed = torch.cat([self.fed, input_ids], dim=1) if self.fed.numel() else input_ids
        return self.model(self.fed)["logits"][:, -input_ids.shape[1] :]


class WithoutGradients:
    def __init__(self, model: SegmentModel, original: Any):
        self.session = original()

    def feed(self, input_ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.session.feed(input_ids)  # type: ignore[no-any-return]


def one_for_all() -> Any:
    kept: list[Any] = []

    def session(model: SegmentModel, original: Any) -> Any:
        kept[:] = kept or [original()]
        return kept[0]

    return session


def judged(candidate: Candidate, name: str) -> Result:
    return check(candidate, CASE, name)


@pytest.mark.parametrize("name", CHECKS)
def test_a_right_candidate_passes(name: str) -> None:
    assert judged(Candidate(), name).outcome == "pass"


@pytest.mark.parametrize(
    ("session", "named"),
    [(WithoutMemory, "no memory at all"), (FedAgain, "mem_len ignored")],
)
def test_a_memory_that_is_not_there_or_forgets_nothing_fails_and_is_named(session: Any, named: str) -> None:
    result = judged(Candidate(session), "memory.segments")
    assert (result.outcome, result.kind, result.equals) == ("fail", "value", named)


def test_rows_of_the_first_segment_are_right_without_memory() -> None:
    result = judged(Candidate(WithoutMemory), "memory.segments")
    assert result.details == ["wrong in every batch row, first at position 4; 21 of 33 rows"]


def test_one_session_for_all_fails_only_where_there_are_two() -> None:
    assert judged(Candidate(one_for_all()), "memory.segments").outcome == "pass"
    result = judged(Candidate(one_for_all()), "memory.second_session")
    assert (result.outcome, result.message) == ("fail", "logits of the first session differ from the oracle's")


def test_gradients_that_flow_into_the_memory_fail_although_all_logits_are_right(monkeypatch: Any) -> None:
    remember = segment_memory.remember

    def with_gradients(old: Tensor | None, new: Tensor, mem_len: int) -> Tensor:
        known = new if old is None else torch.cat([old, new], dim=1)
        kept = known[:, max(0, known.shape[1] - mem_len) :]
        assert kept.equal(remember(old, new, mem_len))
        return kept

    monkeypatch.setattr(segment_memory, "remember", with_gradients)
    assert judged(Candidate(), "memory.segments").outcome == "pass"
    result = judged(Candidate(), "memory.gradients")
    assert (result.outcome, result.kind) == ("fail", "value")
    assert result.message.startswith("gradients of transformer.")


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (Candidate(WithoutGradients), "the session carries no gradients"),
        (Candidate(parameters={}), "the model has no parameters by hub name"),
    ],
)
def test_gradients_are_unsupported_where_there_are_none(candidate: Candidate, reason: str) -> None:
    result = judged(candidate, "memory.gradients")
    assert (result.outcome, result.message) == ("unsupported", reason)


@pytest.mark.parametrize("name", CHECKS)
def test_a_model_without_sessions_is_unsupported(name: str) -> None:
    class Bare:
        name, families = "bare", frozenset({"transformer_xl"})

        def load(self, checkpoint: Any) -> Any:
            model = Reference("eager").load(checkpoint)
            return lambda input_ids: model(input_ids)

    assert check(Bare(), CASE, name).outcome == "unsupported"
