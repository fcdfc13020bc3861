"""Reference-conformance tests for sequence models.

`Case` reads a golden case, `check` judges one claim in this process, `run` judges an implementation as
`conformance run` does, and `Unsupported` is how an implementation declares that it does not do something.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conformance.api import check, run
    from conformance.cases import Case
    from conformance.implementation import Unsupported

__version__ = "0.1.0"
__all__ = ["Case", "Unsupported", "check", "run"]

_HOME = {
    "Case": "conformance.cases",
    "Unsupported": "conformance.implementation",
    "check": "conformance.api",
    "run": "conformance.api",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `conformance list` starts without torch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'conformance' has no attribute {name!r}")
