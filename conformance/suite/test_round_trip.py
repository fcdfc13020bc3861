"""Round trips: what was loaded is found again."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from conformance.implementation import Misbehaviour, Unsupported
from conformance.suite import drawn

if TYPE_CHECKING:
    from conformance.judge import Judge
    from conformance.search import Example


# Dtypes in which the weights of every case are exact, so that it does not matter in which of them they are stored.
STORED = ("bfloat16", "float16")
ROWS, LENGTH = 2, 7


def test_storage(judge: "Judge") -> None:
    """A checkpoint that is stored in bfloat16 or float16 holds the same numbers, and gives the same logits."""
    import torch

    config, text = judge.case.config, drawn.text(judge, 0, ROWS, LENGTH)
    before = drawn.logits(judge, text)

    def holds(example: "Example") -> None:
        dtype = getattr(torch, example["stored"])
        said = dict.fromkeys({"dtype", "torch_dtype"} & config.keys(), example["stored"])
        other = judge.load_other(config | said, {name: weight.to(dtype) for name, weight in judge.case.weights.items()})
        what = f"logits differ when the same weights are stored in {example['stored']}"
        judge.same(drawn.logits_of(judge, other, text), before, what)

    judge.each([{"stored": dtype} for dtype in STORED], holds)


def test_parameters(judge: "Judge") -> None:
    """The model's parameters by hub name have the names, shapes and values of the checkpoint."""
    names = sorted(judge.case.weights.keys() - drawn.properties(judge).untrained)
    declared = getattr(judge.candidate.model, "parameters", None)
    found = declared if isinstance(declared, Mapping) else judge.candidate.parameters(names)
    if not found:
        raise Unsupported("the model has no parameters by hub name")

    def holds(example: "Example") -> None:
        name = example["tensor"]
        stored = judge.case.weights[name]
        if name not in found:
            raise Misbehaviour("missing", f"there is no parameter {name}")
        got = found[name].detach().cpu()
        if got.shape != stored.shape:
            raise Misbehaviour("shape", f"{name} has shape {tuple(got.shape)}, the checkpoint {tuple(stored.shape)}")
        if not got.double().equal(stored.double()):
            wrong = int((got.double() != stored.double()).sum())
            raise Misbehaviour("value", f"{name} does not hold the checkpoint's values: {wrong} of {got.numel()}")

    judge.each([{"tensor": name} for name in names], holds)
