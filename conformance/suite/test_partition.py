"""Partition checks: a model over several processes gives, bit for bit, what it gives in one."""

from typing import TYPE_CHECKING

from conformance.families import get
from conformance.suite.padding import padded, row_truth

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.implementation import Candidate
    from conformance.judge import Judge

STAGES = (2, 3)


def test_bit_equal(judge: "Judge") -> None:
    """A pipeline of two stages, and of three, gives the very bits that the model gives in one process.

    `model.partitioned(stages)` is the same model with its blocks shared out to so many processes.  One full forward, a
    batch padded on the left, and a session fed in chunks and token by token are compared, as far as both models take
    masks and have sessions.  The arithmetic is the same, operation for operation, so that there is nothing to tolerate.
    More stages than blocks are not asked for.
    """
    blocks = judge.case.config[get(judge.case.family).layers_key]
    several = {stages: judge.candidate.partitioned(stages) for stages in STAGES if stages <= blocks}
    one = _answers(judge, judge.candidate)
    for stages, candidate in several.items():
        answers = _answers(judge, candidate)
        for what in [what for what in one if what in answers]:
            judge.identical(answers[what], one[what], f"logits of {stages} stages, {what},")


def _answers(judge: "Judge", candidate: "Candidate") -> "dict[str, Tensor]":
    """Logits by what was asked."""
    import torch

    ids = judge.case.ids
    batch = padded(judge.case.inputs, row_truth(judge.case), "left")
    seq = ids.shape[1]
    plan = [3, seq - 5, 1, 1]  # a prompt, a chunk onto it, two tokens one by one
    with judge.precision():
        answers = {"in one call": candidate(input_ids=ids).logits}
        if candidate.accepts("attention_mask"):
            answers["padded"] = candidate(**batch.arguments).logits[batch.mask.bool()]
        if hasattr(candidate.model, "session"):
            session = candidate.session()
            answers["in pieces"] = torch.cat([session.feed(piece) for piece in ids.split(plan, dim=1)], dim=1)
    return answers
