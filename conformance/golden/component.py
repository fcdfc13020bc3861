"""What a golden case of a component holds, derived from its recipe and the oracle."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from conformance import bounds, draws
from conformance.component import COMPARED, COTANGENT
from conformance.families import Component, ComponentRecipe, Config, get
from conformance.golden.common import AGREEMENT, MOVEMENT, Derived, GoldenError
from conformance.implementations import reference
from conformance.oracles.true_double import TrueDouble

Run = Callable[[dict[str, Tensor], Config], dict[str, Tensor]]


def draw(recipe: ComponentRecipe, kind: str) -> dict[str, Tensor]:
    """The recipe's weights or inputs: drawn where it gives a shape, as it says where it gives values."""
    found = {}
    for name, what in (recipe.weights if kind == "weights" else recipe.inputs).items():
        label = f"{recipe.name.split('/')[0]}/{kind}"
        if not isinstance(what, tuple):
            found[name] = torch.tensor(what)
        elif kind == "weights":
            found[name] = draws.tensor(label, name, what)
        else:
            shape = "x".join(map(str, what))
            found[name] = draws.uniform(f"{label}/{name}/{shape}", what, recipe.deviation.get(name, 1.0))
    return found


def derive(recipe: ComponentRecipe) -> Derived:
    """Everything that the case holds.  Raises: GoldenError if it does not deserve to be a golden."""
    family: Component = get(recipe.name.split("/")[0])
    weights, inputs = draw(recipe, "weights"), draw(recipe, "inputs")
    tensors = {**inputs, **weights}
    truth = _double_run(family.truth, tensors, recipe.settings)
    ours = _double_run(partial(reference.component, family), tensors, recipe.settings)
    kept = {name: torch.tensor(where, dtype=torch.bool) for name, where in recipe.compared.items()}
    truth, ours = ({n: _zeroed(t, kept.get(n)) for n, t in values.items()} for values in (truth, ours))
    agreement = {name: _agree(recipe, name, ours[name], value) for name, value in truth.items() if name in ours}
    if missing := {value.name for value in family.returns if not value.optional} - ours.keys():
        raise GoldenError(f"{recipe.name}: the reference does not return {', '.join(sorted(missing))}")
    expected = dict(truth)
    if "component.gradients" in recipe.claims:
        for name, value in truth.items():
            if next(v for v in family.returns if v.name == name).optional:
                continue
            label = f"{recipe.name.split('/')[0]}/cotangent/{name}/{'x'.join(map(str, value.shape))}"
            inputs[COTANGENT + name] = _zeroed(draws.uniform(label, tuple(value.shape), 1.0), kept.get(name))
        expected |= _gradients(family, recipe, tensors, inputs)
    works = any(dtype in bounds.UNIT_ROUNDOFF for dtypes in recipe.claims.values() for dtype in dtypes)
    noise = {} if family.exact or not works else _noise(family, tensors, recipe.settings, truth, kept)
    movement, optional = {}, {value.name for value in family.returns if value.optional}
    for label, settings in recipe.counterfactuals.items():
        wrong = {n: _zeroed(t, kept.get(n)) for n, t in _double_run(family.truth, tensors, settings).items()}
        moved = {name: bounds.measure(wrong[name], value).max for name, value in truth.items()}
        movement[label] = max(moved.values())
        if label == f"{recipe.field} ignored" and movement[label] < MOVEMENT:
            raise GoldenError(
                f"{recipe.name}: ignoring {recipe.field} moves nothing by more than {movement[label]:.1e}"
            )
        # A mistake is recognised by what every candidate returns, and by what it changes of that
        told = [name for name in moved if name not in optional and moved[name] > AGREEMENT]
        expected |= {f"counterfactual.{label}.{name}": wrong[name] for name in told}
    inputs |= {COMPARED + name: where for name, where in kept.items()}
    provenance = {"oracle_error": noise, "agreement_with_reference": agreement, "movement": movement}
    return Derived(weights, inputs, expected, provenance)


def _zeroed(value: Tensor, kept: Tensor | None) -> Tensor:
    """The value with 0 wherever it is not compared."""
    return value if kept is None else value.masked_fill(~kept.view(*kept.shape, *[1] * (value.ndim - kept.ndim)), 0.0)


def _double_run(function: Run, tensors: dict[str, Tensor], settings: Config) -> dict[str, Tensor]:
    given = _double(tensors)
    with torch.no_grad(), TrueDouble():
        return dict(function(given, settings))


def _double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, made outside the mode: inside it a float32 tensor is double already, and `.double()` makes no copy."""
    return {n: t.to(torch.float64 if t.is_floating_point() else t.dtype, copy=True) for n, t in tensors.items()}


def _gradients(
    family: Component, recipe: ComponentRecipe, tensors: dict[str, Tensor], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Gradient of Σ return · cotangent for every float tensor, the oracle's, compared with the reference's."""
    cotangents = {n.removeprefix(COTANGENT): t.double() for n, t in inputs.items() if n.startswith(COTANGENT)}
    both = []
    for run in (family.truth, partial(reference.component, family)):
        leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in _double(tensors).items()}
        with TrueDouble(), torch.enable_grad():
            outputs = run(leaves, recipe.settings)
            torch.stack([(outputs[name] * c).sum() for name, c in cotangents.items()]).sum().backward()
        floats = {n: t for n, t in leaves.items() if t.is_floating_point()}
        both.append({n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in floats.items()})
    theirs, ours = both
    scale = bounds.magnitude(torch.cat([gradient.flatten() for gradient in theirs.values()]))
    for name, gradient in theirs.items():
        _agree(recipe, f"the gradient of {name}", ours[name], gradient, scale)
    return {f"gradient.{name}": gradient for name, gradient in theirs.items()}


def _noise(
    family: Component,
    tensors: dict[str, Tensor],
    settings: Config,
    truth: dict[str, Tensor],
    kept: dict[str, Tensor],
) -> dict[str, dict[str, Any]]:
    """The oracle's own error by return and working dtype.  Raises: GoldenError if it is not finite."""
    noise: dict[str, dict[str, Any]] = {name: {} for name in truth}
    for dtype in bounds.UNIT_ROUNDOFF:
        given = {n: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for n, t in tensors.items()}
        with torch.no_grad():
            outputs = family.truth(given, settings)
        for name, value in truth.items():
            error = bounds.measure(_zeroed(outputs[name], kept.get(name)), value)
            if not (math.isfinite(error.max) and math.isfinite(error.rms)):
                raise GoldenError(f"{family.name}: the oracle's error of {name} in {dtype} is not finite")
            noise[name][dtype] = error.to_json()
    return noise


def _agree(
    recipe: ComponentRecipe, what: str, ours: Tensor, oracles: Tensor, scale: bounds.Error | None = None
) -> float:
    error = bounds.measure(ours, oracles, scale).max
    if not error <= AGREEMENT:
        raise GoldenError(f"{recipe.name}: oracle and reference differ by {error:.1e} at {what}, wanted {AGREEMENT:g}")
    return error
