"""Component checks: one function alone, called with the arguments that it declares."""

from itertools import accumulate
from typing import TYPE_CHECKING

from conformance import bounds
from conformance.implementation import Misbehaviour, running

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.judge import Judge


def test_outputs(judge: "Judge") -> None:
    """Every value that the function returns equals the oracle's, and its inputs are left as they were."""
    with judge.precision():
        given = judge.candidate.tensors()
        outputs = judge.candidate(given)
    for name, tensor in judge.candidate.tensors().items():
        if not given[name].detach().cpu().equal(tensor.detach().cpu()):
            raise Misbehaviour("input changed", f"the function changed its argument {name} in place")
    for name, got in outputs.items():
        known = judge.case.counterfactuals(name)
        real = judge.candidate.compared(name)
        judge.compare(got, judge.case.expected[name], real=real, noise=name, what=name, known_mistakes=known)


def test_gradients(judge: "Judge") -> None:
    """Gradients flow back to every float argument that the function declares as the oracle's do.

    The returns are contracted with fixed cotangents; one scale for all gradients of the case.
    """
    import torch

    stored = {n.removeprefix("gradient."): t for n, t in judge.case.expected.items() if n.startswith("gradient.")}
    expected = {name: gradient for name, gradient in stored.items() if judge.candidate.takes(name)}
    with judge.precision(gradients=True):
        given = judge.candidate.tensors()
        for name in expected:
            given[name].requires_grad_(True)
        outputs = judge.candidate(given)
        with running("backward()"):
            contracted = [(outputs[n] * c).sum() for n, c in judge.candidate.cotangents(outputs).items()]
            torch.stack(contracted).sum().backward()
    scale = bounds.magnitude(torch.cat([gradient.flatten() for gradient in expected.values()]))
    for name, truth in expected.items():
        gradient = given[name].grad
        got = torch.zeros_like(given[name]) if gradient is None else gradient
        judge.compare(got, truth, what=f"gradients of {name}", scale=scale)


def test_chunks(judge: "Judge") -> None:
    """A sequence fed in pieces, each with the state that the piece before returned, gives what the whole one gives.

    Plans: position by position; two, one and the rest.  What is returned along the sequence is joined; of every other
    return the last piece's counts.
    """
    seq = judge.case.inputs["x"].shape[1]
    for plan in ([1] * seq, [2, 1, seq - 3]):
        for name, got in fed(judge, plan, judge.candidate.tensors()).items():
            judge.compare(got, judge.case.expected[name], noise=name, what=f"{name} in pieces of {plan}")


def fed(judge: "Judge", plan: list[int], given: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """The returns by name of a sequence that is fed in pieces of the planned sizes.

    given: all tensors of a call with the whole sequence.
    """
    import torch

    family = judge.candidate.family
    along = {v.name: v.axes.split().index("seq") for v in (*family.arguments, *family.returns)
             if v.axes and "seq" in v.axes.split()}  # fmt: skip
    pieces: list[dict[str, Tensor]] = []
    with judge.precision():
        for start, size in zip(accumulate([0, *plan[:-1]]), plan, strict=True):
            part = {n: t.narrow(along[n], start, size).clone() if n in along else t for n, t in given.items()}
            pieces.append(judge.candidate(part, {"seq": size}))
            given = given | {argument: pieces[-1][name] for name, argument in family.carried.items()}
        return {
            name: torch.cat([piece[name] for piece in pieces], along[name]) if name in along else last
            for name, last in pieces[-1].items()
        }
