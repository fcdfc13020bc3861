"""Batching: what a row gets does not depend on the rows and the padding beside it."""

from typing import TYPE_CHECKING

from conformance.strategies import packed_texts, permuted_texts, ragged_plans, ragged_texts, rows_of_texts
from conformance.suite import drawn
from conformance.suite.related import calls_agree

if TYPE_CHECKING:
    from conformance.judge import Judge
    from conformance.search import Example

# Tokens decoded one at a time after prompts.
DECODED = 3
# Tokens that are decoded for padded sources.
TARGET_TOKENS = 3


def test_alone(judge: "Judge") -> None:
    """A row of a batch gets what it gets alone."""
    if judge.is_component:
        calls_agree(judge, "batching.alone")
        return

    def holds(example: "Example") -> None:
        text, row = drawn.text(judge, example["ids"], example["batch"], example["length"]), example["row"]
        together = drawn.logits(judge, text)[row : row + 1]
        alone = drawn.logits(judge, text[row : row + 1])
        judge.same(together, alone, f"logits of row {row} in a batch differ from those of the row alone")

    judge.search(rows_of_texts(drawn.usual(judge)), holds)


def test_permutation(judge: "Judge") -> None:
    """When the rows of a batch change places, so do their logits, and nothing else happens."""

    def holds(example: "Example") -> None:
        order = example["order"]
        text = drawn.text(judge, example["ids"], len(order), example["length"])
        again, once = drawn.logits(judge, text[order]), drawn.logits(judge, text)
        judge.same(again, once[order], "logits of rows in another order differ")

    first = [{"ids": 0, "length": 3, "order": [2, 0, 1]}]
    judge.search(permuted_texts(drawn.usual(judge)), holds, first)


def test_padding(judge: "Judge") -> None:
    """Rows of different lengths, padded with junk on the left or on the right, get the logits they get without padding.

    Lengths of 1 and columns that hold nothing but padding are among them.  A component returns the same whatever stands
    in the masked places of its input.
    """
    if judge.is_component:
        calls_agree(judge, "batching.padding")
        return
    judge.candidate.need("decoder_attention_mask" if drawn.family(judge).encoder_decoder else "attention_mask")

    def holds(example: "Example") -> None:
        side = example["side"]
        batch = drawn.ragged(judge, example["ids"], example["lengths"], example["extra"], side)
        got = drawn.logits(judge, batch.padded, batch.mask)
        what = f"logits in a batch padded on the {side} differ from those without padding"
        judge.same(got, batch.in_place(drawn.logits(judge, batch.whole)), what, real=batch.mask.bool())

    first = [{"ids": 0, "lengths": [3, 1, 5], "side": side, "extra": 1} for side in ("left", "right")]
    judge.search(ragged_texts(drawn.usual(judge)), holds, first)


def test_source_padding(judge: "Judge") -> None:
    """Sources of different lengths, padded with junk on the left or on the right, give what each gives alone.

    The rows that are decoded have one length.
    """
    import torch

    judge.candidate.need("attention_mask")

    def holds(example: "Example") -> None:
        lengths = example["lengths"]
        source = drawn.ragged_source(judge, example["ids"], lengths, example["extra"], example["side"])
        ids = drawn.ids(judge, example["ids"], len(lengths), TARGET_TOKENS)
        got = judge.logits(input_ids=source.padded, attention_mask=source.mask, decoder_input_ids=ids)
        alone = [
            judge.logits(input_ids=row[None, :length], decoder_input_ids=target[None])
            for row, target, length in zip(source.whole, ids, lengths, strict=True)
        ]
        what = f"logits of sources padded on the {example['side']} differ from those of each alone"
        judge.same(got, torch.cat(alone), what)

    first = [{"ids": 0, "lengths": [3, 1, 5], "side": side, "extra": 1} for side in ("left", "right")]
    judge.search(ragged_texts(drawn.SOURCE_TOKENS + 3), holds, first)


def test_packed(judge: "Judge") -> None:
    """Texts of any lengths, one behind the other in one row, get what each gets alone."""
    import torch

    def holds(example: "Example") -> None:
        rows = drawn.ragged(judge, example["ids"], example["lengths"], 0, "right").whole.ids
        texts = [row[:length] for row, length in zip(rows, example["lengths"], strict=True)]
        with judge.precision():
            got = judge.candidate.packed(torch.cat(texts)[None], torch.tensor(example["lengths"]))
        alone = [drawn.logits(judge, drawn.Text(text[None], None)) for text in texts]
        judge.same(got, torch.cat(alone, dim=1), "logits of texts packed in one row differ from those of each alone")

    first = [{"ids": 0, "lengths": [3, 1, 5]}]
    judge.search(packed_texts(drawn.usual(judge)), holds, first)


def test_decoding(judge: "Judge") -> None:
    """After prompts of different lengths, padded on the left with junk, three tokens are decoded one by one.

    Every row gets the logits of a full forward without padding; so also where the calls after the prompt give no mask,
    since what they feed is real in every row.
    """

    def holds(example: "Example") -> None:
        width = max(example["lengths"]) + example["extra"]
        ragged_session(judge, example, [width])

    first = [{"ids": 0, "lengths": [3, 1, 5], "extra": 0, "plan": [5]}]
    judge.search(ragged_plans(drawn.usual(judge), DECODED), holds, first)


def ragged_session(judge: "Judge", example: "Example", prompt: list[int]) -> None:
    """Feed padded prompts in calls of these sizes, then single tokens; compare with full forwards without padding."""
    batch = drawn.ragged(judge, example["ids"], example["lengths"], example["extra"], "left", after=DECODED)
    wanted = batch.in_place(drawn.logits(judge, batch.whole))
    what = "logits of ragged prompts in a session differ from a full forward's"
    for masked, how in ((len(prompt) + DECODED, ""), (len(prompt), "; the tokens after the prompt were given no mask")):
        got = drawn.fed(judge, prompt + [1] * DECODED, batch.padded, batch.mask, masked)
        judge.same(got, wanted, what + how, real=batch.mask.bool())
