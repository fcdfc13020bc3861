"""Property checks of components: two calls whose returns say the same, and sequences fed in pieces."""

from typing import TYPE_CHECKING, Any

from conformance.implementation import Misbehaviour, Unsupported
from conformance.strategies import SEEDS, floats

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.judge import Judge
    from conformance.search import Example

# Of an example, see `search`: a component is called in a fraction of a model's time.
COST = 1 / 2


def calls_agree(judge: "Judge", check: str) -> None:
    """Put the component's relation of that check to the candidate, on drawn inputs."""
    from hypothesis import strategies as st

    candidate, settings = judge.candidate, judge.case.config
    relation = candidate.family.relations[check]

    def holds(example: "Example") -> None:
        call = drawn_call(judge, example["inputs"])
        one, other = relation.make({**settings, **call}, example)
        for name in [*one, *other]:
            if name in settings and name not in candidate.passed:
                raise Unsupported(f"the function does not take {name}, which would have to change")
        with judge.precision():
            first = candidate({**call, **one})
            second = candidate({**call, **other}, relation.sizes(example))
        wanted, got = relation.expected(first, example), relation.compared(second, example)
        if not wanted.keys() & got.keys():
            raise Misbehaviour("type", f"nothing comparable was returned: {', '.join(first)}")
        for name in wanted.keys() & got.keys():
            judge.same(got[name], wanted[name], f"{name}: two calls that must agree do not")

    numbers = {key: st.integers(*between) for key, between in relation.draws.items()}
    judge.search(st.fixed_dictionaries({"inputs": SEEDS, **numbers}), holds, cost=COST)


def drawn_call(judge: "Judge", seed: int) -> "dict[str, Tensor]":
    """The case's tensors, with its float inputs drawn anew; masks, lengths, positions and weights stay."""
    call: dict[str, Any] = judge.candidate.tensors()
    for name in judge.case.inputs.keys() & call.keys():
        stored = judge.case.inputs[name]
        if stored.is_floating_point() and stored.any():
            new = floats(seed, name, stored.shape, max(stored.float().std().item(), 1e-3))
            call[name] = new.to(judge.candidate.device, judge.candidate.dtype)
    return call


def pieces_agree(judge: "Judge") -> None:
    """A sequence fed in pieces of any size, each with the state that the one before returned, equals the whole."""
    from hypothesis import strategies as st

    from conformance.strategies import plan_of
    from conformance.suite.test_component import fed

    seq = judge.case.inputs["x"].shape[1]

    def holds(example: "Example") -> None:
        call = drawn_call(judge, example["inputs"])
        with judge.precision():
            whole = judge.candidate(call)
        pieces = fed(judge, example["plan"], call)
        for name, value in whole.items():
            judge.same(pieces[name], value, f"{name} of a sequence in pieces differs from the whole one's")

    judge.search(st.fixed_dictionaries({"inputs": SEEDS, "plan": plan_of(seq)}), holds, cost=COST)
