"""What decides: the truth that candidates are measured against (TrueDouble, Hugging Face, torch.nn, equations)."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from conformance.families import Family, get

if TYPE_CHECKING:
    from conformance.oracles.hugging_face import HuggingFace


def oracle_class(family: Family) -> "type[HuggingFace]":
    """The class that runs the family's oracle."""
    module, _, name = family.oracle_class.partition(":")
    return getattr(import_module(module), name)  # type: ignore[no-any-return]


def oracle_missing(name: str) -> str | None:
    """What the oracle of a family needs that is not installed; None if it can run (a component's always can)."""
    family = get(name)
    if not isinstance(family, Family) or family.oracle_requires is None:
        return None
    needed = Requirement(family.oracle_requires)
    try:
        installed = version(needed.name)
    except PackageNotFoundError:
        return f"needs {needed}, which is not installed"
    if needed.specifier.contains(installed, prereleases=True):
        return None
    return f"needs {needed}, this is {installed}"
