"""Invariances of the maths: what may change in a checkpoint or in its input without any effect."""

from typing import TYPE_CHECKING

from conformance.strategies import permuted_texts, texts
from conformance.suite import drawn
from conformance.suite.related import calls_agree

if TYPE_CHECKING:
    from conformance.implementation import Candidate
    from conformance.judge import Judge
    from conformance.search import Example

# Positions are shifted by at most so much: beyond what models are trained for, and float64 still knows the angles.
FARTHEST = 20_000


def test_shift(judge: "Judge") -> None:
    """With rotary positions only distances count: all positions moved by the same number give the same logits.

    Of the component alone, the products of rotated vectors are compared.  A mask of ones goes along where the model
    takes one, so that the positions are not read as those of packed texts.
    """
    import torch
    from hypothesis import strategies as st

    if judge.is_component:
        calls_agree(judge, "invariance.shift")
        return
    judge.candidate.need("position_ids")

    def holds(example: "Example") -> None:
        text = drawn.text(judge, example["ids"], example["batch"], example["length"])
        positions = torch.arange(example["length"]).expand(text.ids.shape) + example["shift"]
        moved = judge.logits(**text.arguments(torch.ones_like(text.ids)), position_ids=positions)
        judge.same(
            moved, drawn.logits(judge, text), f"logits move when all positions are {example['shift']} further on"
        )

    drawn_ = st.builds(
        lambda text, shift: {**text, "shift": shift}, texts(drawn.usual(judge)), st.integers(1, FARTHEST)
    )
    judge.search(drawn_, holds, [{"ids": 0, "batch": 1, "length": drawn.USUAL_TOKENS, "shift": FARTHEST}])


def test_repeated_key_values(judge: "Judge") -> None:
    """Grouped-query attention is multi-head attention whose key and value heads are repeated.

    A checkpoint that repeats them, and says that it has as many as query heads, gives the same logits.
    """
    if judge.is_component:
        calls_agree(judge, "invariance.repeated_key_values")
        return
    _twins(judge, "repeated_key_values", "logits differ when every query head has a copy of its key and value head")


def test_wide_window(judge: "Judge") -> None:
    """A window that no text outgrows is no window: the checkpoint without one gives the same logits."""
    if judge.is_component:
        calls_agree(judge, "invariance.wide_window")
        return
    _twins(judge, "wide_window", "logits with a window as long as the text differ from those without a window")


def test_narrow_window(judge: "Judge") -> None:
    """In a window of one key a query sees itself alone: which one it would prefer does not matter.

    Of the component alone: keys before the window of the last query might as well not be there.
    """
    if judge.is_component:
        calls_agree(judge, "invariance.narrow_window")
        return
    _twins(judge, "narrow_window", "logits in a window of one key depend on the queries")


def test_spelling(judge: "Judge") -> None:
    """What config.json says can be said in two ways: an activation by either of its names, and in older files `type`
    for the `rope_type` of a scaling (here by a factor of 2.5)."""
    _twins(judge, "spelling", "logits differ when config.json says the same in another way")


def test_layer_scale(judge: "Judge") -> None:
    """Scores divided by the block's number are those of queries that are so much smaller, in each of four blocks."""
    _twins(judge, "layer_scale", "logits of queries that grow with the block, scores divided by its number, differ")


def test_one_expert(judge: "Judge") -> None:
    """Experts that are all alike are one expert, whatever the router says: its weights add up to 1."""
    if judge.is_component:
        calls_agree(judge, "invariance.one_expert")
        return
    _twins(judge, "one_expert", "logits of experts that are all alike differ from those of that expert alone")


def test_order(judge: "Judge") -> None:
    """Without positions attention is blind to order.

    Keys may change places with their values; in a model of one layer whose table of positions is zero the last token's
    logits stay when the tokens before it change places.
    """
    import torch

    if judge.is_component:
        calls_agree(judge, "invariance.order")
        return
    other, tokens = _without_positions(judge)

    def holds(example: "Example") -> None:
        order = example["order"]
        text = drawn.ids(judge, example["ids"], 1, len(order) + 1) % tokens
        changed = torch.cat([text[:, order], text[:, -1:]], dim=1)
        got, wanted = (drawn.logits_of(judge, other, drawn.Text(ids, None))[:, -1:] for ids in (changed, text))
        judge.same(got, wanted, "without positions, the order of earlier tokens moves the last one's logits")

    judge.search(permuted_texts(1), holds, [{"ids": 0, "length": 1, "order": [2, 0, 1]}])


def test_weights_sum_to_one(judge: "Judge") -> None:
    """Attention weights add up to 1: where all values are alike, the result is that value, whatever the scores.

    So of a text that is one token over and over all rows are alike, in a model whose positions only tell distances; of
    a model with a table of positions in one layer of it alone, where the table is zero.
    """
    if judge.is_component:
        calls_agree(judge, "invariance.weights_sum_to_one")
        return
    candidate, tokens = judge.candidate, judge.candidate.vocab
    if drawn.properties(judge).positions is not None:
        candidate, tokens = _without_positions(judge)

    def holds(example: "Example") -> None:
        ids = drawn.ids(judge, example["ids"], example["batch"], 1) % tokens
        got = drawn.logits_of(judge, candidate, drawn.Text(ids.repeat(1, example["length"]), None))
        judge.same(got, got[:, :1].expand_as(got), "one token over and over gets other logits from place to place")

    judge.search(texts(drawn.usual(judge)), holds, [{"ids": 0, "batch": 2, "length": 3}])


def _without_positions(judge: "Judge") -> "tuple[Candidate, int]":
    """One dense layer of the case's alone, where the table of positions is zero, and how many ids the model has."""
    layer = drawn.windows(judge).index(None)
    tokens = min(judge.candidate.vocab, 4 * drawn.USUAL_TOKENS)
    return drawn.one_layer(judge, judge.case.weights[drawn.table(judge)][:tokens], layer), tokens


def test_scale(judge: "Judge") -> None:
    """A norm does not see the scale of its input: n times the input with n² times ε gives the same."""
    calls_agree(judge, "invariance.scale")


def test_offset(judge: "Judge") -> None:
    """LayerNorm takes the mean away: the same number added to all elements changes nothing."""
    calls_agree(judge, "invariance.offset")


def test_reversal(judge: "Judge") -> None:
    """A bidirectional layer reads a sequence backwards as well as forwards, the directions' weights exchanged."""
    calls_agree(judge, "invariance.reversal")


def _twins(judge: "Judge", name: str, what: str) -> None:
    """Compare the two checkpoints that the family makes of the case's."""
    most = drawn.usual(judge)
    pair = drawn.properties(judge).twins[name].make(judge.case.config, judge.case.weights, most)
    first, second = (judge.load_other(config, weights) for config, weights in pair)

    def holds(example: "Example") -> None:
        text = drawn.text(judge, example["ids"], example["batch"], example["length"])
        judge.same(drawn.logits_of(judge, first, text), drawn.logits_of(judge, second, text), what)

    judge.search(texts(most), holds, [{"ids": 0, "batch": 2, "length": most}])
