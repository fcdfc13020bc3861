"""Shape properties: any batch of any length gets finite logits of its own shape, and nothing given is changed."""

from typing import TYPE_CHECKING

from conformance.implementation import Misbehaviour
from conformance.strategies import ragged_texts, texts
from conformance.suite import drawn

if TYPE_CHECKING:
    from conformance.judge import Judge
    from conformance.search import Example


def test_any(judge: "Judge") -> None:
    """Any number of rows and tokens, 1 and the longest text among them, gets finite logits (batch, seq, vocab).

    They are in the dtype of the model, or a finer one, and on its device.
    """
    most = drawn.longest(judge)

    def holds(example: "Example") -> None:
        logits = drawn.logits(judge, drawn.text(judge, example["ids"], example["batch"], example["length"]))
        if logits.device.type != judge.candidate.device.type:
            raise Misbehaviour("device", f"logits on {logits.device}, wanted {judge.candidate.device}")
        if wrong := int((~logits.isfinite()).sum()):
            raise Misbehaviour("not finite", f"{wrong} of {logits.numel()} logits are NaN or infinite")

    first = [{"ids": 0, "batch": batch, "length": length} for batch, length in ((1, 1), (3, 1), (1, most))]
    judge.search(texts(drawn.usual(judge)), holds, first)


def test_inputs(judge: "Judge") -> None:
    """The tensors that a call is given are left as they were: ids, mask and positions.

    Targets of a source are padded on the right, which every model with a mask takes.
    """
    import torch

    of_source = drawn.family(judge).encoder_decoder

    def holds(example: "Example") -> None:
        side = "right" if of_source else example["side"]
        batch = drawn.ragged(judge, example["ids"], example["lengths"], example["extra"], side)
        arguments = batch.padded.arguments(batch.mask)
        if batch.padded.source is not None:
            arguments["attention_mask"] = torch.ones_like(batch.padded.source)
        else:
            arguments["position_ids"] = (batch.mask.cumsum(-1) - 1).clamp(min=0)
        judge.logits(**arguments)
        for name, given in judge.candidate.given.items():
            if not given.cpu().equal(arguments[name]):
                raise Misbehaviour("input changed", f"the model changed its argument {name} in place")

    judge.search(ragged_texts(drawn.usual(judge)), holds)
