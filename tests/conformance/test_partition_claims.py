"""Claims catch the mistakes that people make when they partition a model, and ranks that fail are errors, not hangs."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import partition_mistakes as mistakes
from conformance.bounds import same_bits
from conformance.cases import Case
from conformance.implementation import CandidateRaised, adopt, load_checkpoint, resolve
from conformance.implementations import ranks
from conformance.judge import Result
from conformance.suite import checks
from judged import check
from partitioned import PartitionedReference, group, in_ranks, over, pipeline, rank_of, tensor_parallel

PHI = "phi/distinct"  # biases of the row-parallel projections; two key/value heads


def wrong(result: Result) -> None:
    """The values are wrong: it did not merely crash."""
    assert (result.outcome, result.kind) == ("fail", "value"), (result.outcome, result.message, result.details)


# --- tensor parallel


def by_hand(mistake: str, name: str = "golden.logits") -> Result:
    return check(over(3, mistakes.load_by_hand, mistake=mistake), PHI, name)


@pytest.mark.parametrize("name", ["golden.logits", "golden.gradients"])
def test_tensor_parallel_by_hand_passes(name: str) -> None:
    assert by_hand("none", name).outcome == "pass"


@pytest.mark.parametrize(
    "mistake",
    [
        "tp-row-bias-per-rank",
        "tp-double-all-reduce",
        "tp-missing-all-reduce",
        "tp-vocab-embedding",
        "tp-vocab-embedding, offset off by one",
    ],
)
def test_wrong_sums_fail(mistake: str) -> None:
    wrong(by_hand(mistake))


def test_a_bias_shared_out_to_ranks_has_wrong_gradients_alone() -> None:
    assert by_hand("tp-row-bias-gradient").outcome == "pass"
    result = by_hand("tp-row-bias-gradient", "golden.gradients")
    wrong(result)
    assert "bias" in result.message


@pytest.mark.parametrize(
    ("mistake", "case", "name"),
    [
        ("tp-fused-shard-layout", "gpt2/plain", "golden.logits"),
        ("tp-fused-shard-layout, gathered", "gpt/distinct", "golden.gradients"),
        ("tp-kv-heads-fewer-than-ranks, tiled", "mistral/plain", "golden.logits"),
    ],
)
def test_a_wrong_layout_fails(mistake: str, case: str, name: str) -> None:
    wrong(check(over(3, mistakes.load_with_layouts, mistake=mistake), case, name))
    assert check(over(3, mistakes.load_with_layouts, mistake="none"), case, name).outcome == "pass"


def test_a_key_value_head_that_is_cut_does_not_load_or_run() -> None:
    mistake = over(3, mistakes.load_with_layouts, mistake="tp-kv-heads-fewer-than-ranks, cut")
    assert check(mistake, "mistral/plain").outcome in ("error", "fail")


def test_a_norm_of_a_slice_fails() -> None:
    wrong(check(over(3, mistakes.load_norm_on_shard), "mistral/plain"))


# --- pipeline


@pytest.mark.parametrize(
    ("what", "splits"),
    [
        ("lost", [[6, 5], [7, 4]]),
        ("doubled", [[6, 5], [5, 6]]),
        ("lost, of three stages", [[4, 4, 3], [5, 3, 3], [4, 4, 3]]),
    ],
)
def test_a_block_lost_or_doubled_where_stages_meet_fails(what: str, splits: list[list[int]]) -> None:
    wrong(check(over(len(splits), mistakes.load_split, splits=splits), "gpt2/deep"))


def test_a_norm_at_every_boundary_fails() -> None:
    wrong(check(over(2, mistakes.load_boundary_norm), "llama/mha"))


@pytest.mark.parametrize("times", [0, 2])
def test_gradients_of_a_tied_table_that_are_not_summed_once_fail(times: int) -> None:
    pipeline = over(2, mistakes.load_tied, times=times)
    assert check(pipeline, "gpt2/distinct", "golden.logits").outcome == "pass"
    wrong(check(pipeline, "gpt2/distinct", "golden.gradients"))
    assert check(over(2, mistakes.load_tied, times=1), "gpt2/distinct", "golden.gradients").outcome == "pass"


# --- partition.bit_equal


def test_hidden_states_sent_coarsely_are_not_bit_equal() -> None:
    wrong(check(PartitionedReference(mistakes.load_boundary_dtype), "llama/mha", "partition.bit_equal", "float32"))


def test_other_arithmetic_within_the_bounds_is_not_bit_equal() -> None:
    """The fused kernel in the partitioned model, and the one that is written out in one process."""
    result = check(PartitionedReference(attention="sdpa"), "llama/mha", "partition.bit_equal", "float32")
    wrong(result)
    assert "differ from one process's" in result.message
    assert result.judgement is not None
    assert result.judgement.error.max < 1e-5


def test_a_model_that_cannot_be_partitioned_is_unsupported() -> None:
    class Whole:
        def load(self, checkpoint: Any) -> Any:
            return PartitionedReference().load(checkpoint).model

    result = check(Whole(), "llama/mha", "partition.bit_equal")
    assert (result.outcome, result.message) == ("unsupported", "the model has no partitioned()")


def test_bits() -> None:
    assert same_bits(torch.tensor([torch.nan, 0.0]), torch.tensor([torch.nan, 0.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([0.0]).double())
    assert not same_bits(torch.zeros(1, 2), torch.zeros(2, 1))
    assert same_bits(torch.ones(2, 3).T, torch.ones(3, 2))


# --- ranks that fail


def dying(how: str) -> Result:
    return check(over(2, mistakes.load_dying, how=how), "llama/plain")


def test_a_rank_that_raises_is_an_error_of_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 waits for what will never come; it is not waited for."""
    monkeypatch.setattr(ranks, "GRACE", 0.5)
    result = dying("raise")
    assert result.outcome == "error"
    assert "in rank 1, " in result.message
    assert result.message.endswith(": ArithmeticError: rank 1 cannot count")


def test_a_rank_that_hangs_is_an_error_of_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    group(2).start()
    monkeypatch.setattr(group(2), "timeout", 2.0)
    result = dying("hang")
    assert result.outcome == "error"
    assert "of 2 gave no answer in 2 s" in result.message


def test_a_rank_that_dies_is_an_error_and_new_ranks_are_started() -> None:
    shared = over(2, mistakes.load_split, splits=[[1, 1], [1, 1]])
    case = Case("llama/plain")
    case.read()
    old = load_checkpoint(adopt("", shared), case.config, case.weights, "float32", "cpu")
    pids = in_ranks(2, pid)
    result = dying("kill")
    assert (result.outcome, result.message) == ("error", "model(…) raised Ended: rank 1 of 2 ended: killed by SIGKILL, "
                                                "perhaps out of memory")  # fmt: skip
    assert not any(Path(f"/proc/{process}").exists() for process in pids)
    with pytest.raises(CandidateRaised) as raised:
        old(input_ids=case.ids)
    assert "have ended" in str(raised.value.__cause__)
    new = load_checkpoint(adopt("", shared), case.config, case.weights, "float32", "cpu")
    assert new(input_ids=case.ids).logits.shape == (*case.ids.shape, case.config["vocab_size"])
    assert not set(in_ranks(2, pid)) & set(pids)


def pid(objects: dict[int, Any]) -> int:
    return os.getpid()


def test_ranks_that_differ_or_are_all_silent_are_errors() -> None:
    assert "ranks 0 and 1 returned different values" in dying("differ").message
    assert "none of 2 ranks returned anything" in dying("silent").message


def test_what_is_dropped_here_is_dropped_in_the_ranks() -> None:
    shared = over(2, mistakes.load_split, splits=[[1, 1], [1, 1]])
    case = Case("llama/plain")
    assert check(shared, case, "cache.chunks").outcome == "pass"
    in_ranks(2, rank_of)  # what is to be dropped travels with the next request
    before = in_ranks(2, held)
    for _ in range(3):
        assert check(shared, case, "cache.chunks").outcome == "pass"
    in_ranks(2, rank_of)
    assert in_ranks(2, held) == before
    assert in_ranks(2, rank_of) == [0, 1]


def held(objects: dict[int, Any]) -> int:
    return len(objects)


def test_what_cannot_be_shared_out_is_unsupported() -> None:
    stages = check(pipeline(3), "llama/plain")
    assert (stages.outcome, stages.message) == ("unsupported", "2 blocks cannot be shared out to 3 stages")
    heads = check(tensor_parallel(2), "llama/mha")
    assert (heads.outcome, heads.message) == ("unsupported", "5 attention heads cannot be shared out to 2 ranks")


def test_the_check_is_one_of_the_suite() -> None:
    assert "partition.bit_equal" in checks()
    for name in ("reference-pipeline-2", "reference-pipeline-3", "reference-tensor-parallel-2"):
        assert resolve(name).families == {"gpt", "gpt2", "gpt3", "llama", "mistral", "mixtral", "phi"}
