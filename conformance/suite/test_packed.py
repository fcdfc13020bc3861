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

    ids, lengths = _texts(judge)
    truth = torch.cat([judge.case.expected["logits"][row, :n] for row, n in enumerate(lengths.tolist())])[None]
    judge.compare(_packed(judge, ids, lengths), truth)


def test_isolation(judge: "Judge") -> None:
    """Changing the ids of one text moves no logits of the texts beside it, for each of them in turn."""
    import torch

    ids, lengths = _texts(judge)
    before, start = _packed(judge, ids, lengths).detach().to(device="cpu", dtype=torch.float64), 0
    for text, length in enumerate(lengths.tolist()):
        own = slice(start, start + length)
        changed, others = ids.clone(), torch.ones_like(ids, dtype=torch.bool)
        changed[:, own] = (ids[:, own] + 1) % judge.case.config["vocab_size"]
        others[:, own] = False
        what = f"logits of the others when text {text} changes"
        judge.compare(_packed(judge, changed, lengths), before, real=others, what=what)
        start += length


def _texts(judge: "Judge") -> "tuple[Tensor, Tensor]":
    """The rows of the case, each cut to its length, as one row (1, tokens), and the lengths."""
    import torch

    inputs = judge.case.inputs
    rows = [inputs["input_ids"][row, :length] for row, length in enumerate(inputs["lengths"].tolist())]
    return torch.cat(rows)[None], inputs["lengths"]


def _packed(judge: "Judge", ids: "Tensor", lengths: "Tensor") -> "Tensor":
    with judge.precision():
        return judge.candidate.packed(ids, lengths)  # type: ignore[no-any-return]
