"""Benchmarks of property checks: what is counted, and what is an alarm."""

import argparse
from typing import Any

import pytest
from torch import Tensor

from benchmark_programs import program
from conformance.implementation import adopt, resolve

count_alarms = program("false_alarms").count_alarms
seconds = program("properties").seconds


def asked(**arguments: object) -> argparse.Namespace:
    usual = {"seeds": 3, "first": 0, "profile": "quick", "family": ["rms_norm"], "dtype": "float64", "by_check": False}
    return argparse.Namespace(**usual | arguments)


def test_seconds_tell_properties_from_goldens() -> None:
    properties, goldens = seconds("reference", "rms_norm", "quick")
    assert set(properties) == {"batching.alone", "invariance.scale"}
    assert all(spent > 0 for spent in (goldens, *properties.values()))


def test_right_implementation_gives_no_alarm(capsys: pytest.CaptureFixture[str]) -> None:
    assert count_alarms(resolve("reference"), asked()) == 0
    assert "0 alarms in 3 seeds of the profile quick: 6 verdicts ({'pass': 6})" in capsys.readouterr().out


def test_wrong_implementation_gives_one_for_every_seed(capsys: pytest.CaptureFixture[str]) -> None:
    """The mean of the whole batch is added to every row."""

    class Wrong:
        families = frozenset({"rms_norm"})

        def load(self, checkpoint: Any) -> Any:
            def call(x: Tensor, **arguments: Any) -> Tensor:
                return x / (x.square().mean(-1, keepdim=True) + arguments["eps"]).sqrt() + x.mean()

            return call

    assert count_alarms(adopt("wrong", Wrong()), asked()) == 6
    assert capsys.readouterr().out.count("rms_norm/plain · batching.alone · float64") == 3
