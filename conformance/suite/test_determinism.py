"""Determinism: the same call gives the same answer, and nothing that belongs to training alone is on."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from conformance.implementation import Misbehaviour
from conformance.strategies import texts
from conformance.suite import drawn

if TYPE_CHECKING:
    from conformance.judge import Judge
    from conformance.search import Example

# A batch that is large enough for torch to divide it among threads, and takes few steps of a recurrence.
ROWS, LENGTH = 64, 2


def test_repeat(judge: "Judge") -> None:
    """The same call twice gives the same logits, bit for bit."""

    def holds(example: "Example") -> None:
        text = drawn.text(judge, example["ids"], example["batch"], example["length"])
        once = drawn.logits(judge, text).detach().clone()
        if not drawn.logits(judge, text).detach().equal(once):
            raise Misbehaviour("not repeatable", "the same call twice gives different logits")

    judge.search(texts(drawn.usual(judge)), holds)


def test_eval(judge: "Judge") -> None:
    """Dropout and jitter are for training: a checkpoint whose config.json says 0.9 for them gives the same logits."""
    config = {key: 0.9 if _of_training(key, value) else value for key, value in judge.case.config.items()}
    other = judge.load_other(config, judge.case.weights)

    def holds(example: "Example") -> None:
        text = drawn.text(judge, example["ids"], example["batch"], example["length"])
        judge.same(
            drawn.logits_of(judge, other, text),
            drawn.logits(judge, text),
            "logits depend on dropout or jitter in config.json",
        )

    judge.search(texts(drawn.usual(judge)), holds)


def test_threads(judge: "Judge") -> None:
    """One and two threads of torch give the same logits, but for the order of sums."""

    def holds(example: "Example") -> None:
        text = drawn.text(judge, example["ids"], ROWS, LENGTH)
        with _threads(1):
            one = drawn.logits(judge, text).detach().clone()
        with _threads(2):
            two = drawn.logits(judge, text)
        judge.same(two, one, "logits with two threads differ from those with one")

    judge.each([{"ids": judge.settings.seed}], holds)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _of_training(key: str, value: Any) -> bool:
    return isinstance(value, float) and re.search("drop|jitter", key) is not None
