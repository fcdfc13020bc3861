"""Cache checks: decoding in any number of calls equals one full forward, row by row."""

from typing import TYPE_CHECKING

from conformance.implementation import Misbehaviour
from conformance.strategies import interleaved, plans, ragged_plans
from conformance.suite import drawn
from conformance.suite.feeding import equal_calls, feed, parts
from conformance.suite.padding import moved, padded_ids, row_truth
from conformance.suite.related import pieces_agree
from conformance.suite.test_batching import DECODED as RAGGED_STEPS
from conformance.suite.test_batching import ragged_session

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.judge import Judge
    from conformance.search import Example

# How many tokens are decoded one at a time after a prefill.
DECODED = 4
# What two sessions are tried with first.
TWO_TEXTS = ({"ids": 0, "other": 10_000, "plan": [2, 1]},)


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
        logits = feed(judge, plan, judge.case.ids[:, : len(plan)], source=source)
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
    logits = feed(judge, [longest] + [1] * DECODED, ids, mask)
    judge.compare(logits, truth, real=mask.bool())


def test_constant_state(judge: "Judge") -> None:
    """Decoding beyond a sliding window takes no more memory: `state_bytes()` no longer grows once two windows are fed.

    Keys that no query can see again need not be kept.  Fed token by token, to the end of the case.  Of a model with a
    memory of segments its length is the window.
    """
    key = "mem_len" if drawn.properties(judge).memory else "sliding_window"
    window, ids = judge.case.config[key], judge.case.ids
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
                f"with {key}={window} no key older than that is seen again"
            )  # fmt: skip


def _feed_and_compare(judge: "Judge", plan: list[int]) -> None:
    judge.plan = plan
    logits = feed(judge, plan, judge.case.ids, source=judge.case.source)
    judge.compare(logits[:, judge.case.rows], judge.case.expected["logits"])


# --- any plan --------------------------------------------------------------------------------------------------------


def test_any_plan(judge: "Judge") -> None:
    """Fed in calls of any sizes, a session gives what one full forward gives.

    First one row, token by token, and two; a prompt and then single tokens; and where there is a window, calls of
    its size, of one token less and of one more, three windows long, and calls of its size after a single token.  A
    recurrent component is fed a sequence in pieces, each with the state that the one before returned.
    """
    if judge.is_component:
        pieces_agree(judge)
        return

    def holds(example: "Example") -> None:
        plan = example["plan"]
        text = drawn.text(judge, example["ids"], example["batch"], sum(plan))
        what = "logits of a session differ from a full forward's"
        judge.same(drawn.fed(judge, plan, text), drawn.logits(judge, text), what)

    most = drawn.usual(judge)
    chosen = [[1] * most, [most - 3, 1, 1, 1]]
    for window in {window for window in drawn.windows(judge) if window is not None}:
        chosen += [equal_calls(most, size) for size in (window - 1, window, window + 1) if size > 1]
        chosen.append([1, *equal_calls(most - 1, window)])
    first = [
        {"ids": 0, "batch": batch, "plan": plan} for batch, plan in [(1, chosen[0]), *((2, plan) for plan in chosen)]
    ]
    judge.search(plans(most), holds, first)


def test_fresh_session(judge: "Judge") -> None:
    """A second session starts clean: fed another text than the first, it gives that text's full forward."""

    def holds(example: "Example") -> None:
        plan = example["plan"]
        text, other = (drawn.text(judge, example[key], 1, sum(plan)) for key in ("ids", "other"))
        drawn.fed(judge, plan, text)
        what = "logits of a second session differ from a full forward's"
        judge.same(drawn.fed(judge, plan, other), drawn.logits(judge, other), what)

    judge.search(interleaved(drawn.usual(judge)), holds, TWO_TEXTS)


def test_interleaved(judge: "Judge") -> None:
    """Two sessions that are fed in turns do not touch each other."""
    import torch

    def holds(example: "Example") -> None:
        plan = example["plan"]
        texts = [drawn.text(judge, example[key], 1, sum(plan)) for key in ("ids", "other")]
        got: list[list[Tensor]] = [[], []]
        with judge.precision():
            sessions = [drawn.session(judge, text) for text in texts]
            for part in parts(plan):
                for pieces, session, text in zip(got, sessions, texts, strict=True):
                    pieces.append(session.feed(text.ids[:, part]))
        for pieces, text in zip(got, texts, strict=True):
            what = "logits of two sessions fed in turns differ from full forwards'"
            judge.same(torch.cat(pieces, dim=1), drawn.logits(judge, text), what)

    judge.search(interleaved(drawn.usual(judge)), holds, TWO_TEXTS)


def test_ragged_plan(judge: "Judge") -> None:
    """Prompts of different lengths, padded on the left with junk, fed in calls of any sizes, then decoded together."""

    def holds(example: "Example") -> None:
        ragged_session(judge, example, example["plan"])

    first = [{"ids": 0, "lengths": [2, 1, 5], "extra": 1, "plan": [2, 3, 1]}]
    judge.search(ragged_plans(drawn.usual(judge), RAGGED_STEPS), holds, first)
