"""Applying mistakes: replace what a swap names, wherever `reference_impl` refers to it, and put it back.

    with Patch(mistake):
        model(ids)

A name that was imported with `from … import` refers to the function itself, so that a function or class is replaced
wherever it is found: in every module of `reference_impl`, and in the module's tables (`{"halves": rotate}`).  Another
value (a constant) is replaced under its own name only, since equal numbers may be one object.
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from conformance.mistakes import Mistake, Swap


class StaleTarget(LookupError):
    """A mistake names something that `reference_impl` does not have (any more)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Somewhere that refers to what is swapped: a module's namespace or table, or an attribute of a class."""

    owner: Any
    name: Any
    original: Any

    def put(self, value: Any) -> None:
        if isinstance(self.owner, type):
            setattr(self.owner, self.name, value)
        else:
            self.owner[self.name] = value


class Patch:
    """Context manager under which `reference_impl` makes some mistakes.  May be entered again and again, also nested.

    Of several mistakes, later ones are made on top of earlier ones.

    Raises: StaleTarget naming the mistake whose target does not exist.
    """

    def __init__(self, *mistakes: Mistake):
        swaps = [(mistake.id, swap) for mistake in mistakes for swap in mistake.swaps]
        self._places: dict[tuple[int, Any], Place] = {}
        self._values: dict[tuple[int, Any], Any] = {}
        self._depth = 0
        for identifier, swap in swaps:
            self._add(identifier, swap)

    def _add(self, identifier: str, swap: Swap) -> None:
        places = list(_places(identifier, swap))
        first = (id(places[0].owner), places[0].name)
        made = _remade(self._values.get(first, places[0].original), swap.make)
        for place in places:
            key = (id(place.owner), place.name)
            self._places[key], self._values[key] = place, made

    @property
    def originals(self) -> list[Any]:
        """What is replaced."""
        return [place.original for place in self._places.values()]

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            for key, place in self._places.items():
                place.put(self._values[key])

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for place in self._places.values():
                place.put(place.original)


@cache
def modules() -> tuple[ModuleType, ...]:
    """All modules of `reference_impl`, imported: one that is imported under a patch would keep what it saw."""
    package = importlib.import_module("reference_impl")
    for found in pkgutil.walk_packages(package.__path__, "reference_impl."):
        importlib.import_module(found.name)
    return tuple(
        module for name, module in sys.modules.items() if name == "reference_impl" or name.startswith("reference_impl.")
    )


def _places(identifier: str, swap: Swap) -> Iterator[Place]:
    """Where what the swap names is referred to, its own place first."""
    module_name, _, path = swap.target.partition(":")
    *classes, name = path.split(".")
    by_name = {module.__name__: module for module in modules()}
    owner: Any = by_name.get(module_name)
    for part in classes:
        owner = vars(owner).get(part) if owner is not None else None
    if owner is None or name not in vars(owner):
        raise StaleTarget(f"mistake {identifier}: reference_impl has no {swap.target}")
    original = vars(owner)[name]
    if isinstance(owner, type):
        yield Place(owner, name, original)
        return
    yield Place(vars(owner), name, original)
    for space in _namespaces(modules()):
        for other, value in space.items():
            if (
                value is original
                and not (space is vars(owner) and other == name)
                and (callable(value) or other == name)
            ):
                yield Place(space, other, original)


def _namespaces(found: Iterable[ModuleType]) -> Iterator[MutableMapping[Any, Any]]:
    """The modules' own names, and the tables among what these refer to."""
    for module in found:
        yield vars(module)
        yield from (table for key, table in vars(module).items() if type(table) is dict and not key.startswith("__"))


def _remade(original: Any, make: Callable[[Any], Any]) -> Any:
    """The replacement, of the kind that the original is; a method's or property's maker gets the plain function."""
    if isinstance(original, classmethod | staticmethod):
        return type(original)(make(original.__func__))
    if isinstance(original, property):
        return property(make(original.fget))
    return make(original)
