"""What decides: the truth that candidates are measured against (TrueDouble, Hugging Face, torch.nn, equations)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conformance.families import Family
    from conformance.oracles.hugging_face import HuggingFace


def oracle_class(family: "Family") -> "type[HuggingFace]":
    """The class that runs the family's oracle."""
    module, _, name = family.oracle_class.partition(":")
    return getattr(import_module(module), name)  # type: ignore[no-any-return]
