"""Gradients: what backward gives is the slope that the loss really has."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from conformance import bounds, draws
from conformance.implementation import Misbehaviour, Unsupported, running
from conformance.strategies import SEEDS, plans
from conformance.suite import drawn
from conformance.suite.feeding import parts

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.implementation import Candidate
    from conformance.judge import Judge
    from conformance.search import Example

ROWS, TOKENS = 2, 7
# A direction's steps, the first one first.  Weights are integers times a power of two, below 2^8 of it; so is a
# direction, and a step of it is added in float32 without rounding.
STEPS = (2.0**-13, 2.0**-16)
# Losses of a call by name: the mean cross-entropy of the next tokens, and what routers add to it.
CROSS_ENTROPY, AUXILIARY = "loss", ("aux_loss", "z_loss")


def test_directions(judge: "Judge") -> None:
    """Along a random direction of all parameters the gradient of the next-token loss is the loss's slope.

    The slope is a central difference D(h) = (loss(θ + h d) − loss(θ − h d)) / 2h of two checkpoints, loaded like any
    other.  Gradient and slope may differ by |D(2h) − D(h)|, which is three times what h² terms leave in D(h), and by
    what either loss may be off in float64 (see docs/bounds.md), divided by h.  Where a kink or another choice of
    experts lies between the checkpoints a shorter step decides.
    """
    _check_slopes(judge, sorted(judge.case.weights.keys() - drawn.properties(judge).untrained), [CROSS_ENTROPY])


def test_tied(judge: "Judge") -> None:
    """The gradient of a table that is embedding and head at once is the sum of both; the direction is in it alone."""
    _check_slopes(judge, [drawn.table(judge)], [CROSS_ENTROPY])


def test_auxiliary(judge: "Judge") -> None:
    """The gradient of what the routers add to the loss is its slope, of each of these losses that the model returns.

    Along a direction of all parameters, as for `gradients.directions`.  How often an expert is chosen has no slope, so
    that what trains the router is the mean of its probabilities: a loss of the right value may have none.
    """
    names = sorted(judge.case.weights.keys() - drawn.properties(judge).untrained)
    text = drawn.text(judge, 0, ROWS, TOKENS)
    with judge.precision():
        losses = judge.candidate(**text.arguments(), labels=text.ids).losses
    found = [name for name in AUXILIARY if name in losses]
    if not found:
        raise Unsupported(f"the model returns no {' and no '.join(AUXILIARY)}")
    _check_slopes(judge, names, found)


def test_memory(judge: "Judge") -> None:
    """No gradient flows into a memory: a segment's are the same whether those before it were fed with gradients or not.

    The loss is a cross-entropy of the last segment's logits alone.  All gradients share one scale, the largest of them.
    """

    names = sorted(judge.case.weights.keys() - drawn.properties(judge).untrained)
    parameters = judge.candidate.parameters(names)
    if parameters is None:
        raise Unsupported("the model has no parameters by hub name")

    def holds(example: "Example") -> None:
        plan = [*example["plan"], TOKENS]
        text = drawn.text(judge, example["ids"], example["batch"], sum(plan))
        recorded, without = (_of_last_segment(judge, parameters, text.ids, plan, flag) for flag in (True, False))
        what = "gradients of a segment differ when those before it were fed with gradients being recorded"
        judge.same(recorded, without, what)

    judge.search(plans(drawn.usual(judge)), holds, [{"ids": 0, "batch": 2, "plan": [2, 3]}])


def _of_last_segment(
    judge: "Judge", parameters: "dict[str, Tensor]", ids: "Tensor", plan: list[int], recorded: bool
) -> "Tensor":
    """Gradients of the last segment's loss, all in one row; recorded: whether the others are fed with gradients."""
    import torch

    _forget(parameters)
    *before, last = parts(plan)
    with judge.precision(gradients=True):
        session = judge.candidate.session()
        with torch.set_grad_enabled(recorded):
            for part in before:
                session.feed(ids[:, part])
        logits = session.feed(ids[:, last])
        if not logits.requires_grad:
            raise Unsupported("the session carries no gradients")
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, last].flatten().to(logits.device))
        with running("loss.backward()"):
            loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
    return torch.cat([gradient.detach().flatten() for gradient in found])


def _forget(parameters: "dict[str, Tensor]") -> None:
    """Parameters that want a gradient and have none yet."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
        parameter.grad = None


def _check_slopes(judge: "Judge", names: list[str], losses: Sequence[str]) -> None:
    """Of each of these losses, along directions of the named parameters."""
    from hypothesis import strategies as st

    parameters = judge.candidate.parameters(names)
    if parameters is None:
        raise Unsupported("the model has no parameters by hub name")

    def holds(example: "Example") -> None:
        text = drawn.text(judge, example["ids"], ROWS, TOKENS)
        direction = {name: _direction(judge, example["other"], name) for name in names}
        slopes = {loss: _slope_by_gradient(judge, parameters, direction, text, loss) for loss in losses}
        found: dict[str, list[str]] = {loss: [] for loss in losses}
        for step in STEPS:
            for loss, (difference, bound) in _slopes_by_difference(judge, direction, text, step, list(found)).items():
                if abs(slopes[loss] - difference) <= bound:
                    del found[loss]
                else:
                    found[loss].append(f"{difference:.9g} ± {bound:.1g} in steps of {step:.1g}")
            if not found:
                return
        loss, differences = next(iter(found.items()))
        raise Misbehaviour("slope", f"by the gradient the {loss} rises by {slopes[loss]:.9g} along a direction, "
                           f"by differences by {', '.join(differences)}")  # fmt: skip

    judge.search(st.fixed_dictionaries({"ids": SEEDS, "other": SEEDS}), holds, cost=4)


def _direction(judge: "Judge", seed: int, name: str) -> "Tensor":
    """About as large as the tensor's own largest value; integers times a power of two, float32."""
    import torch

    weight = judge.case.weights[name]
    quantum = 2.0 ** math.floor(math.log2(weight.abs().max().item() / 128)) if weight.any() else 0.0
    drawn_ = draws.integers(f"property/direction/{name}/{seed}", weight.numel(), -draws.LARGEST, draws.LARGEST)
    return drawn_.view(weight.shape).to(torch.float32) * quantum


def _slope_by_gradient(
    judge: "Judge", parameters: "dict[str, Tensor]", direction: "dict[str, Tensor]", text: drawn.Text, loss: str
) -> float:
    _forget(parameters)
    with judge.precision(gradients=True):
        value = _losses(judge.candidate, text, [loss])[loss]
        if not value.requires_grad:
            return 0.0
        with running("backward()"):
            value.backward()
    slopes = [
        (parameter.grad.cpu().double() * direction[name].double()).sum()
        for name, parameter in parameters.items()
        if parameter.grad is not None
    ]
    for parameter in parameters.values():
        parameter.grad = None
    return float(sum(slopes))


def _slopes_by_difference(
    judge: "Judge", direction: "dict[str, Tensor]", text: drawn.Text, step: float, losses: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """D(h) of each loss, and how far its true slope may be from it."""

    def at(distance: float) -> dict[str, float]:
        weights = {name: weight + distance * direction[name] if name in direction else weight
                   for name, weight in judge.case.weights.items()}  # fmt: skip
        other = judge.load_other(judge.case.config, weights)
        with judge.precision():
            return {loss: float(value) for loss, value in _losses(other, text, losses).items()}

    places = {times: at(times * step) for times in (-2, -1, 1, 2)}
    slopes = {}
    for loss in losses:
        value = {times: found[loss] for times, found in places.items()}
        once, twice = (value[1] - value[-1]) / (2 * step), (value[2] - value[-2]) / (4 * step)
        rounding = bounds.SEMANTIC * max(abs(one) for one in value.values()) / step
        slopes[loss] = once, abs(twice - once) + rounding
    return slopes


def _losses(candidate: "Candidate", text: drawn.Text, losses: Sequence[str]) -> "dict[str, Tensor]":
    """The named losses of one call, the cross-entropy computed here from its logits."""
    import torch

    if CROSS_ENTROPY not in losses:
        found = candidate(**text.arguments(), labels=text.ids).losses
        return {loss: found[loss] for loss in losses}
    logits, ids = candidate(**text.arguments()).logits, text.ids
    following = ids[:, 1:].to(logits.device)
    return {CROSS_ENTROPY: torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), following.flatten())}
