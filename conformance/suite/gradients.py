"""Gradients of a candidate's parameters, compared with the oracle's."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from conformance import bounds
from conformance.implementation import Unsupported, running

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.judge import Judge


def compare_gradients(judge: "Judge", prefix: str, loss: "Callable[[], Tensor]") -> None:
    """Compare the gradients of what `loss` computes with the expected values whose names begin with `prefix`.

    They are read from the candidate's parameters by hub name, and share one scale, the largest gradient: a single
    parameter's may be zero.
    Raises: Unsupported if the candidate has not all of these parameters.
    """
    import torch

    truth = {name.removeprefix(prefix): t for name, t in judge.case.expected.items() if name.startswith(prefix)}
    parameters = judge.candidate.parameters(list(truth))
    if parameters is None:
        raise Unsupported("the model has no parameters by hub name")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    with judge.precision(gradients=True):
        value = loss()
        with running("loss.backward()"):
            value.backward()
    scale = bounds.magnitude(torch.cat([gradient.flatten() for gradient in truth.values()]))
    for name, wanted in truth.items():
        gradient = parameters[name].grad
        got = torch.zeros_like(parameters[name]) if gradient is None else gradient
        judge.compare(got, wanted, what=f"gradients of {name}", scale=scale)
