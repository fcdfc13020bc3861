"""Cache checks: decoding in any number of calls equals one full forward, row by row."""

from typing import TYPE_CHECKING

from conformance.implementation import Misbehaviour
from conformance.suite.padding import moved, padded_ids, row_truth

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.judge import Judge

# How many tokens are decoded one at a time after a prefill.
DECODED = 4


def test_prefill_decode(judge: "Judge") -> None:
    """A prompt in one call, then four tokens one by one: every row equals the full forward's."""
    seq = judge.case.ids.shape[1]
    _feed_and_compare(judge, [seq - DECODED] + [1] * DECODED)


def test_one_by_one(judge: "Judge") -> None:
    """Every token in a call of its own."""
    _feed_and_compare(judge, [1] * judge.case.ids.shape[1])


def test_chunks(judge: "Judge") -> None:
    """Several tokens a call onto a cache that is not empty: chunks of 3, 4, 1 and the rest."""
    _feed_and_compare(judge, [3, 4, 1, judge.case.ids.shape[1] - 8])


def test_ragged(judge: "Judge") -> None:
    """Prompts of different lengths, padded with junk, then decoded together, each at its own position.

    Prompts of a decoder are padded on its left.  An encoder's sources are padded on the right, and all rows begin to
    decode at once.
    """
    import torch

    case = judge.case
    if case.source:
        ids, mask = padded_ids(case.inputs, "right")
        plan = [1] * (DECODED + 1)
        source = {"input_ids": ids, "attention_mask": mask}
        logits = _feed(judge, plan, judge.case.ids[:, : len(plan)], source=source)
        judge.compare(logits, row_truth(case)[:, : len(plan)])
        return
    longest = case.inputs["input_ids"].shape[1] - DECODED
    lengths = case.inputs["lengths"].clamp(max=longest)
    prompt, mask = padded_ids(case.inputs, "left", lengths, longest)
    truth = moved(case.expected["logits"], lengths, "left", longest)
    steps = lengths[:, None] + torch.arange(DECODED)  # (batch, DECODED): where each row's decoded tokens stand
    row = torch.arange(len(lengths))[:, None]
    ids = torch.cat([prompt, case.inputs["input_ids"][row, steps]], dim=1)
    truth = torch.cat([truth, case.expected["logits"][row, steps]], dim=1)
    mask = torch.cat([mask, torch.ones_like(steps)], dim=1)
    logits = _feed(judge, [longest] + [1] * DECODED, ids, mask)
    judge.compare(logits, truth, real=mask.bool())


def test_constant_state(judge: "Judge") -> None:
    """Decoding beyond a sliding window takes no more memory: `state_bytes()` no longer grows once two windows are fed.

    Keys that no query can see again need not be kept.  Fed token by token, to the end of the case.
    """
    window, ids = judge.case.config["sliding_window"], judge.case.ids
    with judge.precision():
        session, sizes = judge.candidate.session(), []
        for place in range(ids.shape[1]):
            session.feed(ids[:, place : place + 1])
            sizes.append(session.state_bytes())
    full = sizes[2 * window - 1]
    for fed, size in enumerate(sizes[2 * window :], start=2 * window + 1):
        if size > full:
            raise Misbehaviour(
                "state grows", f"the session holds {full:,} bytes after {2 * window} tokens and {size:,} after {fed}; "
                f"with sliding_window={window} no key older than that is seen again"
            )  # fmt: skip


def _feed_and_compare(judge: "Judge", plan: list[int]) -> None:
    judge.plan = plan
    logits = _feed(judge, plan, judge.case.ids, source=judge.case.source)
    judge.compare(logits[:, judge.case.rows], judge.case.expected["logits"])


def _feed(
    judge: "Judge",
    plan: list[int],
    ids: "Tensor",
    mask: "Tensor | None" = None,
    source: "dict[str, Tensor] | None" = None,
) -> "Tensor":
    """Feed the ids in calls of the planned sizes; the logits of all calls, joined along the sequence."""
    import torch

    assert sum(plan) == ids.shape[1]
    pieces, start = [], 0
    with judge.precision():
        session = judge.candidate.session(**(source or {}))
        for size in plan:
            part = slice(start, start + size)
            pieces.append(session.feed(ids[:, part], None if mask is None else mask[:, part]))
            start += size
        return torch.cat(pieces, dim=1)
