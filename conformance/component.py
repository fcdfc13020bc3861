"""A candidate for a component: a plain function, called by keyword with the arguments that it declares.

    def rms_norm(x, weight, eps): ...

    conformance run my_norm.py:rms_norm --family rms_norm

Whatever the component, an argument called `weights` receives all weights of the case in a dict by name; layers and
directions decide how many there are.

An object with `load(checkpoint)` is given the settings (`checkpoint.config`) and the weights (`checkpoint.tensors()`);
what it returns is called with whatever it declares, the inputs alone or weights and settings as well.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conformance.implementation import Checkpoint, Implementation, Misbehaviour, as_tensor, precision, running

if TYPE_CHECKING:
    from conformance.cases import Case
    from conformance.families import Component

# Inputs that are the suite's own: what a return is contracted with, and where it is compared.
COTANGENT, COMPARED = "cotangent.", "compared."
# The argument that takes all weights at once.
WEIGHTS = "weights"


class ComponentCandidate:
    """A component behind the contract: passes what is declared, names what comes back.

    passed: the names of the arguments that the function declares.
    calls: how many times the function has been called.
    """

    def __init__(self, implementation: Implementation, family: "Component", case: "Case", dtype: str, device: str):
        self.family, self.case = family, case
        self.dtype, self.device, self.calls = getattr(torch, dtype), torch.device(device), 0
        if implementation.bare and not _is_load(implementation.load):
            self.function = implementation.load
        else:
            checkpoint = Checkpoint(case.config, case.weights, self.dtype, self.device)
            with precision(dtype), running("load(checkpoint)"):
                self.function = implementation.load(checkpoint)
        self.passed = self._declared()

    def _declared(self) -> list[str]:
        """Names of the arguments to pass.  Raises: Misbehaviour if the function wants one that the contract lacks."""
        known = [value.name for value in self.family.arguments]
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):
            return known
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return known
        known.append(WEIGHTS)
        wanted = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
        foreign = [p.name for p in parameters if p.default is p.empty and p.name in set(wanted) - set(known)]
        if foreign:
            raise Misbehaviour(
                "signature", f"the function wants {', '.join(foreign)}; {self.family.name} has {', '.join(known)}"
            )
        return [name for name in known if name in wanted]

    def takes(self, tensor: str) -> bool:
        """Whether the function is passed this input or weight, alone or among all weights."""
        return tensor in self.passed or (WEIGHTS in self.passed and tensor in self.case.weights)

    def tensors(self) -> dict[str, Tensor]:
        """Fresh copies of all inputs and weights that are passed, floats in the dtype under judgement."""
        stored = {**self.case.inputs, **self.case.weights}
        return {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in stored.items()
            if not name.startswith((COTANGENT, COMPARED))
        }

    def cotangents(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The fixed tensors that the returns are contracted with, for the returns that there are."""
        stored = {n.removeprefix(COTANGENT): t for n, t in self.case.inputs.items() if n.startswith(COTANGENT)}
        return {name: stored[name].to(self.device, self.dtype) for name in outputs if name in stored}

    def compared(self, name: str) -> Tensor | None:
        """Where a return is compared, True over its first axes; None: everywhere."""
        return self.case.inputs.get(COMPARED + name)

    def __call__(self, tensors: dict[str, Tensor], sizes: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """Returns by name, shapes and dtypes checked.

        sizes: axis -> its size in this call, where it is not the case's; −1: any.
        """
        self.calls += 1
        weights = {name: tensors[name] for name in self.case.weights if name in tensors}
        arguments = {WEIGHTS: weights, **self.case.config, **tensors}
        with running(f"{self.family.name}(…)"):
            returned = self.function(**{name: arguments[name] for name in self.passed if name in arguments})
        return {name: self._checked(name, value, sizes or {}) for name, value in self._named(returned).items()}

    def _named(self, returned: Any) -> dict[str, Any]:
        names = [value.name for value in self.family.returns if not value.optional]
        known = {value.name for value in self.family.returns}
        if set(names) <= set(getattr(returned, "_fields", ())):
            returned = returned._asdict()
        if isinstance(returned, Mapping):
            if missing := [name for name in names if name not in returned]:
                raise Misbehaviour(
                    "type", f"a dict with {sorted(returned)} was returned; {', '.join(missing)} is missing"
                )
            # An optional return that this case does not hold is nobody's business
            return {n: value for n, value in returned.items() if n in known and n in self.case.expected}
        values = list(flat(returned))
        if len(values) != len(names):
            raise Misbehaviour("type", f"{len(values)} values were returned, wanted {len(names)}: {', '.join(names)}")
        return dict(zip(names, values, strict=True))

    def _checked(self, name: str, value: Any, sizes: Mapping[str, int]) -> Tensor:
        tensor, wanted = as_tensor(value, name), tuple(self.case.expected[name].shape)
        axes = next(v.axes for v in self.family.returns if v.name == name)
        if sizes:
            shape = (*tensor.shape, *[-1] * len(wanted))  # there may be fewer axes than there should be
            named = zip((axes or "").split(), wanted, shape, strict=False)
            wanted = tuple(got if sizes.get(axis) == -1 else sizes.get(axis, size) for axis, size, got in named)
        if tuple(tensor.shape) != wanted:
            raise Misbehaviour("shape", f"{name} of shape {tuple(tensor.shape)}, wanted {wanted} ({axes})")
        if not tensor.is_floating_point() or torch.finfo(tensor.dtype).eps > torch.finfo(self.dtype).eps:
            raise Misbehaviour("dtype", f"{name} in {tensor.dtype}, wanted {self.dtype} or finer")
        return tensor.clone()  # the function may return the same buffer again and again


def _is_load(function: Any) -> bool:
    """Whether a bare function is a `load(checkpoint)`: that is what its only argument is called."""
    try:
        return list(inspect.signature(function).parameters) == ["checkpoint"]
    except (TypeError, ValueError):
        return False


def flat(value: Any) -> Any:
    """The leaves of nested tuples and lists: (output, (h, c)) is three values."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from flat(item)
    else:
        yield value
