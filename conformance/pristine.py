"""`reference_impl` as it stands in its files, although a candidate has replaced functions of it in this process.

A candidate may be the reference with something replaced.  What it has replaced would be in force in every simulation,
so that nothing could be told by one.

    with pristine():
        ...

A function or method that is not of its module's own file is taken from a second execution of that file.  A class or
constant that was replaced is not noticed.
"""

import contextlib
from collections.abc import Iterator
from functools import cache
from importlib.util import module_from_spec
from types import FunctionType, ModuleType
from typing import Any

from conformance.mistakes.patching import Place, modules


@contextlib.contextmanager
def pristine() -> Iterator[list[str]]:
    """While open, functions that were replaced are the files' own; gives their names."""
    found = [(place, own) for module in modules() for place, own in _replaced(module)]
    for place, own in found:
        place.put(own)
    try:
        yield [place.name for place, _ in found]
    finally:
        for place, _ in found:
            place.put(place.original)


def _replaced(module: ModuleType) -> Iterator[tuple[Place, Any]]:
    """The functions and methods of a module that are not of its file, and those that are."""
    for name, own in vars(_executed(module)).items():
        there = vars(module).get(name)
        if isinstance(own, type) and own.__module__ == module.__name__ and isinstance(there, type):
            for attribute, method in vars(own).items():
                if _is_of(method, module) and not _is_of(vars(there).get(attribute), module):
                    yield Place(there, attribute, vars(there).get(attribute)), method
        elif _is_of(own, module) and not _is_of(there, module):
            yield Place(vars(module), name, there), own


def _is_of(value: Any, module: ModuleType) -> bool:
    return isinstance(value, FunctionType) and value.__code__.co_filename == module.__file__


@cache
def _executed(module: ModuleType) -> ModuleType:
    """A second module of the same file, known to nobody."""
    assert module.__spec__ is not None
    assert module.__spec__.loader is not None
    second = module_from_spec(module.__spec__)
    module.__spec__.loader.exec_module(second)
    return second
