"""Judging in this process, without the search for a diagnosis, which takes seconds."""

from collections.abc import Callable
from functools import partial
from typing import Any

import conformance
from conformance.cases import Manifest
from conformance.judge import Result

Function = Callable[..., Any]

# What a claim comes to, as `conformance.check` says it, but for the diagnosis.
check = partial(conformance.check, diagnose=False)


def outputs(function: Function, case: str, dtype: str = "float64") -> Result:
    """What `component.outputs` comes to for a case."""
    return check(function, case, "component.outputs", dtype)


def not_passed(function: Function, component: str) -> dict[str, str]:
    """The claims of a component that a function does not pass, and why; for the right function there is none."""
    claims = [claim for claim in Manifest().claims() if claim.family == component]
    assert claims, f"there are no fixtures of {component}"
    results = [check(function, claim.case, claim.check, claim.dtype) for claim in claims]
    return {str(result.claim): result.message for result in results if result.outcome != "pass"}
