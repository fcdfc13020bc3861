"""Packing checks: prompts of different lengths in one row, without padding, give what each would give alone."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.judge import Judge


def test_logits(judge: "Judge") -> None:
    """Texts of different lengths, one behind the other in one row, give the logits that each gives alone.

    Positions start again with each text, and none sees another: a causal (and windowed) mask in blocks on the
    diagonal.  One text is a single token, and it stands between others.
    """
    import torch

    rows = _rows(judge)
    ids, lengths = _texts(judge, rows)
    expected = judge.case.expected["logits"]
    truth = torch.cat([expected[row, :length] for row, length in zip(rows, lengths.tolist(), strict=True)])[None]
    judge.compare(_packed(judge, ids, lengths), truth)


def test_isolation(judge: "Judge") -> None:
    """Changing the ids of one text moves no logits of the texts beside it, for each of them in turn."""
    import torch

    ids, lengths = _texts(judge, _rows(judge))
    before, start = _packed(judge, ids, lengths).detach().to(device="cpu", dtype=torch.float64), 0
    for text, length in enumerate(lengths.tolist()):
        own = slice(start, start + length)
        changed, others = ids.clone(), torch.ones_like(ids, dtype=torch.bool)
        changed[:, own] = (ids[:, own] + 1) % judge.case.config["vocab_size"]
        others[:, own] = False
        what = f"logits of the others when text {text} changes"
        judge.compare(_packed(judge, changed, lengths), before, real=others, what=what)
        start += length


def _rows(judge: "Judge") -> list[int]:
    """The rows of the case in the order in which they are packed: the longest, then from the shortest upwards.

    In whatever order the case has them, the text of a single token has others on both sides.
    """
    *others, longest = judge.case.inputs["lengths"].argsort(stable=True).tolist()
    return [longest, *others]


def _texts(judge: "Judge", rows: list[int]) -> "tuple[Tensor, Tensor]":
    """These rows of the case, each cut to its length, as one row (1, tokens), and the lengths."""
    import torch

    inputs = judge.case.inputs
    lengths = inputs["lengths"][rows]
    texts = [inputs["input_ids"][row, :length] for row, length in zip(rows, lengths.tolist(), strict=True)]
    return torch.cat(texts)[None], lengths


def _packed(judge: "Judge", ids: "Tensor", lengths: "Tensor") -> "Tensor":
    with judge.precision():
        return judge.candidate.packed(ids, lengths)  # type: ignore[no-any-return]
