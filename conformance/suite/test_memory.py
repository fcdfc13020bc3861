"""Memory checks: a text fed in segments to a model whose memory is bounded and carries no gradients."""

from typing import TYPE_CHECKING

from conformance.implementation import Unsupported
from conformance.suite.feeding import feed
from conformance.suite.gradients import compare_gradients

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.judge import Judge


def test_segments(judge: "Judge") -> None:
    """The logits of all segments, fed one after the other, equal the oracle's.

    A session begins with nothing to remember.  Each layer then remembers what entered it for the last tokens, as many
    as the configuration says, over several segments if these are shorter.
    """
    logits = feed(judge, judge.case.inputs["segments"].tolist(), judge.case.ids)
    mistakes = judge.case.counterfactuals("segments.logits") | {
        "the memory never forgetting": judge.case.expected["logits"]
    }
    judge.compare(logits, judge.case.expected["segments.logits"], noise="segments", known_mistakes=mistakes)


def test_second_session(judge: "Judge") -> None:
    """Sessions of one model share nothing: one that is opened and fed in between neither sees nor disturbs another.

    The second is fed the rows of the batch in another order.
    """
    import torch

    segments = _segments(judge)
    with judge.precision():
        first, second = judge.candidate.session(), None
        pieces: list[tuple[Tensor, Tensor]] = []
        for segment in segments:
            of_first = first.feed(segment)
            second = second or judge.candidate.session()
            pieces.append((of_first, second.feed(segment.roll(1, dims=0))))
    truth = judge.case.expected["segments.logits"]
    for which, parts, wanted in zip(("first", "second"), zip(*pieces, strict=True), (truth, truth.roll(1, dims=0)),
                                    strict=True):  # fmt: skip
        judge.compare(torch.cat(parts, dim=1), wanted, noise="segments", what=f"logits of the {which} session")


def test_gradients(judge: "Judge") -> None:
    """The gradient of the last segment's loss for every parameter equals the oracle's: none flows into the memory.

    All segments are fed with gradients being recorded.  The loss is the mean next-token cross-entropy within the last
    segment, computed here.  One scale for all parameters: the largest gradient.
    """
    import torch

    def last_loss() -> "Tensor":
        session = judge.candidate.session()
        for segment in _segments(judge):
            logits = session.feed(segment)
        if not logits.requires_grad:
            raise Unsupported("the session carries no gradients")
        labels = segment[:, 1:].to(logits.device)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())

    compare_gradients(judge, "segments.gradient.", last_loss)


def _segments(judge: "Judge") -> "tuple[Tensor, ...]":
    """The pieces of the case's ids."""
    pieces: tuple[Tensor, ...] = judge.case.ids.split(judge.case.inputs["segments"].tolist(), dim=1)
    return pieces
