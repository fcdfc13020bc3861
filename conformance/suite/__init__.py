"""The shipped checks, as pytest modules.

    pytest --pyargs conformance.suite --implementation my_pkg.adapter:MyLlama -n auto

A check is a function `test_<name>(judge)` in `test_<group>.py`; its id is `<group>.<name>` and its docstring is what
`conformance explain` prints.  It runs in the worker process, beside the candidate: pytest only collects, schedules and
reports.  Which cases it is run on is in the manifest.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conformance.judge import Judge

GROUPS = (
    "golden", "cache", "memory", "packed", "partition", "component", "tokenizer",
    "shapes", "causality", "reach", "batching", "invariance", "sensitivity", "gradients", "determinism", "round_trip",
    "generation",
)  # fmt: skip


def checks() -> dict[str, "Callable[[Judge], None]"]:
    """Every check by id."""
    found = {}
    for group in GROUPS:
        module = import_module(f"conformance.suite.test_{group}")
        for name, function in vars(module).items():
            if name.startswith("test_"):
                found[f"{group}.{name.removeprefix('test_')}"] = function
    return found


def check_id(module: str, function: str) -> str:
    """`conformance.suite.test_golden`, `test_logits` -> `golden.logits`."""
    return f"{module.rpartition('.')[2].removeprefix('test_')}.{function.removeprefix('test_')}"
