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
    batch padded on the left, and a session fed in chunks and token by token are compared.  The arithmetic is the same,
    operation for operation, so that there is nothing to tolerate.  More stages than blocks are not asked for.
    """
    blocks = judge.case.config[get(judge.case.family).layers_key]
    one = _answers(judge, judge.candidate)
    for stages in (stages for stages in STAGES if stages <= blocks):
        several = _answers(judge, judge.candidate.partitioned(stages))
        for what, logits in one.items():
            judge.same(several[what], logits, f"logits of {stages} stages, {what},")


def _answers(judge: "Judge", candidate: "Candidate") -> "dict[str, Tensor]":
    """Logits by what was asked."""
    import torch

    ids = judge.case.ids
    batch = padded(judge.case.inputs, row_truth(judge.case), "left")
    plan = [3, 4, *[1] * 2, ids.shape[1] - 9]
    with judge.precision():
        answers = {"in one call": candidate(input_ids=ids).logits}
        if candidate.accepts("attention_mask"):
            answers["padded"] = candidate(**batch.arguments).logits[batch.mask.bool()]
        if hasattr(candidate.model, "session"):
            session = candidate.session()
            answers["in pieces"] = torch.cat([session.feed(piece) for piece in ids.split(plan, dim=1)], dim=1)
    return answers
