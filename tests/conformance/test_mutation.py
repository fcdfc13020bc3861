"""The kill matrix: it tells killed from survived, and says so; and the suite kills every mistake.

`conformance mutate` judges every mistake in every family; here each is judged in one of them.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from conformance import mistakes, mutation
from conformance.cli import main
from conformance.families import FAMILIES
from conformance.judge import judge
from conformance.mistakes import TOPICS, Mistake, Swap, catalogue, topic_mistakes
from conformance.mutation import Outcome, judge_mutant, mutant, ordered, pairs
from conformance.suite import checks
from reference_impl.nn import norm

RMS = "reference_impl.nn.norm:rms_norm"


def made(make: Callable[[Any], Any], **changes: Any) -> Mistake:
    """A mistake of RMSNorm."""
    return replace(catalogue()["norm-weight-plus-one"], id="test-mistake", swaps=(Swap(RMS, make),), **changes)


def harmless(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, weight, eps: original(x, weight, eps)


def doubled(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, weight, eps: 2 * original(x, weight, eps)


def raising(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise RuntimeError("not silent")

    return rms_norm


def be_the_catalogue(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mutation, mistakes):
        monkeypatch.setattr(module, "catalogue", lambda: {mistake.id: mistake})


# --- what a mutant comes to -------------------------------------------------------------------------------------------


def test_a_wrong_mutant_is_killed_by_the_named_check() -> None:
    outcome = judge_mutant(made(doubled), "rms_norm")
    assert (outcome.status, outcome.check, outcome.kind) == ("killed", "component.outputs", "value")
    assert outcome.claims == 1


def test_a_right_mutant_survives_every_claim() -> None:
    outcome = judge_mutant(made(harmless), "rms_norm")
    assert outcome.status == "survived"
    assert outcome.claims == len(ordered(made(harmless), "rms_norm"))


def test_a_kill_by_a_check_that_the_entry_does_not_name_is_another_matter() -> None:
    outcome = judge_mutant(made(doubled, killed_by=("component.gradients",)), "rms_norm")
    assert outcome.status == "killed"
    outcome = judge_mutant(made(doubled, killed_by=("component.chunks",)), "rms_norm")
    assert outcome.status == "killed unnamed"


def test_a_mutant_that_raises_proves_nothing() -> None:
    assert judge_mutant(made(raising), "rms_norm").status == "raised"


def test_a_declared_equivalent_that_is_killed_is_no_equivalent() -> None:
    declared = {"rms_norm": "so it is said"}
    assert judge_mutant(made(doubled, equivalent=declared), "rms_norm").status == "not equivalent"
    assert judge_mutant(made(harmless, equivalent=declared), "rms_norm").status == "equivalent"
    assert judge_mutant(made(harmless, equivalent=declared, precision="so it is"), "rms_norm").status == "policy"


def test_everything_lists_all_kills() -> None:
    outcome = judge_mutant(made(doubled), "rms_norm", everything=True)
    claims = ordered(made(doubled), "rms_norm")
    assert outcome.claims == len(claims)
    # What a doubled norm does not break: shapes, and the like
    assert set(outcome.kills) == {str(claim) for claim in claims if claim.check.startswith("component.")}


def test_named_claims_come_first_and_mistakes_of_precision_begin_with_the_lowest() -> None:
    mistake = made(doubled, killed_by=("cache.chunks",))
    assert ordered(mistake, "llama")[0].check == "cache.chunks"
    assert ordered(mistake, "llama")[0].dtype == "float64"
    assert ordered(replace(mistake, precision="so it is"), "llama")[0].dtype == "float32"


# --- where it is wrong ------------------------------------------------------------------------------------------------


def test_the_patch_is_in_force_only_while_the_mutant_runs() -> None:
    """Probes that a golden does not store come from the reference, which must be the right one."""
    right, seen = norm.rms_norm, []

    class Loaded:
        def __call__(self, input_ids: Tensor) -> Tensor:
            seen.append(norm.rms_norm)
            return torch.zeros(*input_ids.shape, 3)

        def session(self) -> Any:
            seen.append(norm.rms_norm)
            return self

        def feed(self, input_ids: Tensor) -> Tensor:
            seen.append(norm.rms_norm)
            return self(input_ids)

    from conformance.mistakes.patching import Patch

    patched = mutation.model_under(Patch(made(doubled)), Loaded())
    patched(torch.ones(1, 2))
    patched.session().feed(torch.ones(1, 2))
    assert len(seen) == 4
    assert right not in seen
    assert norm.rms_norm is right


def test_a_case_without_probes_is_localised_by_the_right_reference() -> None:
    mistake = catalogue()["rope-scaling-ignored"]
    claim = next(c for c in ordered(mistake, "llama") if c.case == "llama/field-rope_scaling-linear")
    result = judge(checks()["golden.logits"], claim, lambda: mutation.Judge(
        mutant(mistake), mutation._case(claim.case), "float64", "cpu"))  # fmt: skip
    assert result.divergence is not None
    assert result.divergence["probes_from"] == "reference"
    assert result.divergence["first_wrong"] == "layers.0.attention.query_rotated"


def test_a_mutant_declares_what_the_reference_declares() -> None:
    case = mutation._case("transformer/plain")
    candidate = mutation.Judge(mutant(catalogue()["encoder-causal"]), case, "float64", "cpu").candidate
    assert candidate.accepts("decoder_attention_mask")
    assert not candidate.accepts("position_ids")


# --- the command ------------------------------------------------------------------------------------------------------


def mutate(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["mutate", "--jobs", "1", *arguments])


def test_the_command_exits_0_when_all_are_killed(tmp_path: Path) -> None:
    done = mutate("--mistake", "gqa-tile", "--family", "llama", "--json", str(tmp_path / "out.json"))
    assert done.exit_code == 0
    assert "gqa-tile" in done.output
    assert "localised 1/1" in done.output
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["summary"]["killed"] == 1
    assert document["mutants"][0]["by"] == "llama/distinct · golden.logits · float64"
    assert document["mutants"][0]["first_wrong"] == "layers.0.attention.scores"


@pytest.mark.parametrize("make", [harmless, raising])
def test_the_command_exits_1_for_a_survivor(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake = made(make, families=("rms_norm",))
    be_the_catalogue(mistake, monkeypatch)
    done = mutate()
    assert done.exit_code == 1
    assert "PROBLEM" in done.output


@pytest.mark.parametrize("arguments", [("--mistake", "gqa-tilt"), ("--family", "lama"), (
    "--family", "lstm", "--mistake", "gqa-tile")])  # fmt: skip
def test_the_command_exits_2_when_there_is_nothing_to_run(arguments: tuple[str, ...]) -> None:
    done = mutate(*arguments)
    assert done.exit_code == 2
    assert "gqa-tile" in done.output or "llama" in done.output or "no mistake" in done.output


def test_the_command_exits_2_for_a_stale_target(monkeypatch: pytest.MonkeyPatch) -> None:
    mistake = replace(made(doubled), swaps=(Swap("reference_impl.nn.norm:rms", doubled),), families=("rms_norm",))
    be_the_catalogue(mistake, monkeypatch)
    done = mutate()
    assert done.exit_code == 2
    assert "mistake test-mistake: reference_impl has no reference_impl.nn.norm:rms" in done.output


def test_processes_find_what_one_process_finds() -> None:
    """A process of its own starts the pool: forking one that runs threads (this one) is not for the faint-hearted."""
    import subprocess
    import sys

    arguments = ["mutate", "--family", "rotary", "--mistake", "rope-layout", "--mistake", "rope-sign", "--jobs", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "conformance", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 mistakes, 2 mutants, 2 killed" in done.stdout


# --- the catalogue ----------------------------------------------------------------------------------------------------


def one_family(mistake: Mistake) -> str:
    """A family in which the mistake shows: models and components take turns."""
    shown = [family for family in mistake.families if family not in mistake.equivalent]
    return (shown or mistake.families)[sum(map(ord, mistake.id)) % len(shown or mistake.families)]


@pytest.mark.parametrize("topic", TOPICS)
def test_every_mistake_is_killed_where_it_says(topic: str) -> None:
    outcomes = [judge_mutant(mistake, one_family(mistake)) for mistake in topic_mistakes(topic)]
    assert [problem(outcome) for outcome in outcomes if outcome.status not in mutation.GOOD] == []
    assert [problem(outcome) for outcome in outcomes if outcome.localised is False] == []


def problem(outcome: Outcome) -> str:
    return f"{outcome.mistake}: " + "".join(mutation.problems(outcome))


def test_pairs_are_every_mistake_in_every_family_of_its() -> None:
    """Of a partition's in one."""
    assert len(pairs()) == sum(1 if m.partition else len(m.families) for m in catalogue().values())
    assert {family for _, family in pairs()} == set(FAMILIES)
