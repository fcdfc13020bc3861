"""Short ways to write what a swap makes."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn

from conformance.mistakes import Replace, Swap

LOAD = "reference_impl.checkpoint:load_weights"


def instead(replacement: Any) -> Replace:
    """Something else, whatever the original is."""
    return lambda original: replacement


def after(change: Callable[..., Any]) -> Replace:
    """The original, and then `change` of what it returns."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)  # what it declares is what components are passed
        def then_changed(*args: Any, **kwargs: Any) -> Any:
            return change(original(*args, **kwargs))

        return then_changed

    return make


def on_load(change: Callable[[str, Tensor, Any], Tensor | None]) -> Swap:
    """A mistake of conversion: every parameter is replaced by change(name, tensor, config), unless that is None."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def load_weights(model: nn.Module, *args: Any, **kwargs: Any) -> None:
            original(model, *args, **kwargs)
            for name, parameter in model.state_dict(keep_vars=True).items():
                changed = change(name, parameter.detach(), model.config)
                if changed is not None:
                    parameter.data = changed.clone()

        return load_weights

    return Swap(LOAD, make)


def on_model(change: Callable[[nn.Module], None]) -> Swap:
    """A mistake of building: `change` works on the loaded model."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def load_weights(model: nn.Module, *args: Any, **kwargs: Any) -> None:
            original(model, *args, **kwargs)
            change(model)

        return load_weights

    return Swap(LOAD, make)


def each(targets: tuple[str, ...], make: Replace) -> tuple[Swap, ...]:
    """The same in several places."""
    return tuple(Swap(target, make) for target in targets)
