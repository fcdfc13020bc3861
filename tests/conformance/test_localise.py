"""Localisation where the negative controls do not reach: engines that cannot be recorded, notes, and honest silence."""

from typing import Any

import pytest
import torch

from candidates import LAYOUTS
from conformance.cases import Case, Manifest
from conformance.localise import NoProbes, known_probes
from judged import check


class Float32Engine:
    """A candidate that is not torch as far as the suite can see: float32 only, nothing to record."""

    name, families, dtypes = "float32 engine", frozenset({"llama"}), frozenset({"float32"})

    def __init__(self, mistake: str | None = None) -> None:
        self.inner = LAYOUTS["batch_first"](mistake=mistake)

    def load(self, checkpoint: Any) -> Any:
        return self.inner.load(checkpoint)


class WrongAtDepth(Float32Engine):
    """Right in every layer but the second of a stack: alone, each block is right."""

    def load(self, checkpoint: Any) -> Any:
        tensors = checkpoint.tensors

        def changed() -> dict[str, torch.Tensor]:
            found = tensors()
            if "model.layers.1.mlp.down_proj.weight" in found:
                found["model.layers.1.mlp.down_proj.weight"] *= 1.5
            return dict(found)

        checkpoint.tensors = changed
        return self.inner.load(checkpoint)


@pytest.mark.parametrize("case", ["llama/distinct", "llama/mqa"])  # blocks from the golden, blocks from the reference
def test_an_engine_that_cannot_be_recorded_is_judged_block_by_block(case: str) -> None:
    result = check(Float32Engine("gate_up_swapped"), case, "golden.logits", "float32")
    assert result.divergence == {
        "first_wrong": "layers.0",
        "last_good": [],
        "how": "each block alone, teacher-forced: layers.0, layers.1 wrong",
        "probes_from": "blocks",
    }


def test_a_fault_outside_the_blocks_is_said_to_be_elsewhere() -> None:
    result = check(WrongAtDepth(), "llama/plain", "golden.logits", "float32")
    assert result.outcome == "fail"
    assert result.divergence is None
    assert result.notes[0].startswith("every block alone, teacher-forced, is right")


def test_a_long_case_is_not_recorded() -> None:
    result = check(LAYOUTS["heads_first"](mistake="scale_missing"), "llama/long")
    assert result.divergence is None
    assert result.notes == ["not localised: 2060 tokens; see the shorter cases"]


def test_a_broken_reference_supplies_no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    from reference_impl.nn import attention

    monkeypatch.setattr(attention, "score_scale", lambda head_dim: 1.0)
    with pytest.raises(NoProbes, match=r"reference_impl differs from the golden's logits by \d"):
        known_probes(Case("llama/mqa"))


def test_a_broken_reference_changes_no_verdict_of_a_failing_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    from reference_impl.nn import attention

    monkeypatch.setattr(attention, "score_scale", lambda head_dim: 1.0)
    result = check(LAYOUTS["batch_first"](mistake="gate_up_swapped"), "llama/mqa")
    assert (result.outcome, result.divergence) == ("fail", None)
    assert result.notes[0].startswith("not localised: NoProbes")


def test_probes_of_the_reference_are_those_that_the_golden_stores() -> None:
    case = Case("llama/distinct", Manifest())
    stored, source = known_probes(case)
    case.expected = {"logits": case.expected["logits"]}
    supplied, other = known_probes(case)
    assert (source, other) == ("golden", "reference")
    assert list(supplied) == sorted(stored, key=list(supplied).index)
    for name, probe in stored.items():
        assert (supplied[name] - probe).abs().max() <= 1e-12 * probe.abs().max(), name


@pytest.mark.parametrize(
    ("mistake", "equals"),
    [("gelu_for_silu", None), (None, None)],
)
def test_only_a_known_mistake_is_named(mistake: str | None, equals: str | None) -> None:
    assert check(LAYOUTS["batch_first"](mistake=mistake), "llama/field-rope_theta").equals == equals


def test_an_ignored_field_is_named() -> None:
    class IgnoresTheta(Float32Engine):
        dtypes = frozenset({"float64"})

        def load(self, checkpoint: Any) -> Any:
            checkpoint.config |= {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
            return self.inner.load(checkpoint)

    assert check(IgnoresTheta(), "llama/field-rope_theta").equals == "rope_theta ignored"


def test_ignored_positions_are_named() -> None:
    def load(checkpoint: Any) -> Any:
        model = LAYOUTS["heads_first"]().load(checkpoint)
        return lambda input_ids, attention_mask=None, position_ids=None: model(input_ids, attention_mask)

    assert check(load, "llama/plain", "golden.positions").equals == "position_ids ignored"


def test_padding_that_fails_while_the_forward_is_right_says_so() -> None:
    from conformance.cases import Claim
    from conformance.implementation import adopt
    from conformance.judge import Judge, judge
    from conformance.suite import checks

    def load(checkpoint: Any) -> Any:
        model = LAYOUTS["heads_first"]().load(checkpoint)
        return lambda input_ids, attention_mask=None: model(input_ids)

    case = Case("llama/plain")
    session = Judge(adopt("", load), case, "float64", "cpu")
    results = [
        judge(checks()[name], Claim("llama/plain", name, "float64"), lambda: session)
        for name in ("golden.logits", "golden.left_padding")
    ]
    assert [r.outcome for r in results] == ["pass", "fail"]
    assert results[1].notes == ["golden.logits passes: the same rows are right without left_padding"]
