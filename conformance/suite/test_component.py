"""Component checks: one function alone, called with the arguments that it declares."""

from typing import TYPE_CHECKING

from conformance import bounds
from conformance.implementation import Misbehaviour, running

if TYPE_CHECKING:
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
    expected = {name: gradient for name, gradient in stored.items() if name in judge.candidate.passed}
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
