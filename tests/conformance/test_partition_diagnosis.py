"""Mistakes of partitions, made by hand, are named; what no entry knows is not misnamed.

The candidates' ranks are threads too, which start at once: values, and so diagnoses, are those of processes.
"""

from typing import Any
from unittest import mock

import pytest

import partition_mistakes as mistakes
from conformance import mutation
from conformance.cases import Case, Claim
from conformance.diagnosis import Ranks, hypotheses
from conformance.families import get
from conformance.implementation import adopt
from conformance.implementations import partition
from conformance.implementations.partition import load_pipeline_stage, load_tensor_parallel_rank
from conformance.implementations.ranks import OverRanks
from conformance.implementations.threads import Threads
from conformance.judge import Judge, Result, judge
from conformance.mistakes import catalogue, topic_mistakes
from conformance.suite import checks
from partitioned import PartitionedReference
from partitioned import over as over_processes
from reference_impl.partition import tensor_parallel
from reference_impl.partition.tensor_parallel import Layout

GROUPS = {count: Threads(count) for count in (2, 3)}
CASES: dict[str, Case] = {}
PHI, BITS, GRADIENTS = "phi/distinct", "partition.bit_equal", "golden.gradients"


def over(ranks: int, load_rank: Any, **settings: Any) -> OverRanks:
    made = over_processes(ranks, load_rank, **settings)
    made.group = GROUPS[ranks]
    return made


def pipeline(stages: int) -> OverRanks:
    return over(stages, load_pipeline_stage, attention="eager")


def partitioned(load_rank: Any, **settings: Any) -> PartitionedReference:
    """The reference that such ranks share out."""
    made = PartitionedReference()
    made.pipelines = {stages: over(stages, load_rank, **settings) for stages in GROUPS}
    return made


def judged(implementation: Any, name: str, check: str = "golden.logits", dtype: str = "float64") -> Result:
    found = adopt("", implementation)
    known = CASES.setdefault(name, Case(name))
    return judge(checks()[check], Claim(name, check, dtype), lambda: Judge(found, known, dtype, "cpu"))


def said(result: Result) -> str | None:
    assert result.outcome == "fail"
    return result.diagnosis["id"] if result.diagnosis else None


def by_hand(mistake: str, check: str = "golden.logits") -> str | None:
    return said(judged(over(3, mistakes.load_by_hand, mistake=mistake), PHI, check))


def with_layouts(layouts: Any, name: str, check: str = "golden.logits") -> str | None:
    """A candidate that replaces a function of the reference: for simulations it is put back."""
    with mock.patch.object(tensor_parallel, "layouts", layouts):
        return said(judged(over(3, load_tensor_parallel_rank), name, check))


def tiled(model: Any, ranks: int) -> dict[str, Layout]:
    """0 1 0 1 0 1 for 0 0 0 1 1 1."""
    return {name: Layout(lambda x: x.repeat(ranks, 1), lambda x: x) for name in right_layouts(model, ranks)}


def not_put_back(model: Any, ranks: int) -> dict[str, Layout]:
    return {name: Layout(layout.there, lambda x: x) for name, layout in right_layouts(model, ranks).items()}


right_layouts = tensor_parallel.layouts


@pytest.mark.parametrize(
    ("mistake", "entry"),
    [
        ("tp-row-bias-per-rank", "tp-row-bias-per-rank"),
        ("tp-double-all-reduce", "tp-double-all-reduce"),
        ("tp-missing-all-reduce", "tp-missing-all-reduce"),
        ("tp-vocab-embedding", "tp-vocab-embedding"),
        ("tp-vocab-embedding, offset off by one", "tp-vocab-embedding-offset"),
    ],
)
def test_wrong_sums_are_named(mistake: str, entry: str) -> None:
    assert by_hand(mistake) == entry


def test_wrong_gradients_are_named() -> None:
    assert with_layouts(not_put_back, "gpt/distinct", GRADIENTS) == "tp-fused-gathered-by-rank"


def test_what_looks_like_a_mistake_of_one_process_is_named_with_it() -> None:
    """Values alone cannot tell them apart."""
    heads = with_layouts(tiled, "mistral/plain")
    assert heads == "tp-kv-heads-tiled or gqa-tile"


@pytest.mark.parametrize(("times", "entry"), [(0, "pp-tied-embedding"), (2, "pp-tied-embedding-twice")])
def test_gradients_of_a_tied_table_are_named(times: int, entry: str) -> None:
    assert said(judged(over(2, mistakes.load_tied, times=times), "gpt2/distinct", GRADIENTS)) == entry


def test_a_doubled_block_is_named() -> None:
    split = partitioned(mistakes.load_split, splits=[[2, 1], [1, 2]])
    split.pipelines[3] = pipeline(3)
    assert said(judged(split, "llama/mha", BITS)) == "pp-block-doubled"


def test_what_a_partition_gives_otherwise_than_one_process_is_named() -> None:
    result = judged(partitioned(mistakes.load_boundary_dtype), "llama/mha", BITS, "float32")
    assert said(result) == "pp-boundary-dtype"


def test_a_mistake_of_no_entry_is_unknown() -> None:
    norm = judged(partitioned(mistakes.load_boundary_norm), "llama/mha", BITS)  # one without a gain
    assert norm.diagnosis is not None
    assert norm.diagnosis["kind"] == "unknown"
    kernel = judged(partitioned(load_pipeline_stage, attention="sdpa"), "llama/mha", BITS, "float32")
    assert kernel.diagnosis is not None
    assert kernel.diagnosis["kind"] == "unknown"
    assert kernel.diagnosis["text"].startswith("as small as float32 allows: other arithmetic")


# --- the entries ------------------------------------------------------------------------------------------------------


def test_only_what_can_be_at_fault_is_a_hypothesis() -> None:
    parted = {mistake.id for mistake in topic_mistakes("partition")}
    assert parted.isdisjoint(h.id for h in hypotheses("llama"))
    over_three = {h.id for h in hypotheses("llama", Ranks(3))}
    assert {"tp-double-all-reduce", "pp-block-lost", "rope-layout", "rope_theta"} <= over_three
    of_stages = {h.id for h in hypotheses("llama", Ranks(1, stages=True))}
    assert "pp-block-lost" in of_stages
    assert {catalogue()[identifier].partition for identifier in of_stages} == {"pipeline"}


def test_a_mistake_of_a_partition_is_judged_in_its_first_family_unless_asked() -> None:
    mistake = catalogue()["pp-boundary-dtype"]
    assert mutation.pairs((), [mistake.id]) == [(mistake.id, mistake.families[0])]
    assert mutation.pairs(["phi"], [mistake.id]) == [(mistake.id, "phi")]


def test_a_partition_without_a_mistake_survives() -> None:
    """The matrix can tell: what kills is the mistake, not the simulation."""
    for kind, name, check in (("pipeline", "llama/mha", BITS), ("pipeline", "gpt/distinct", GRADIENTS),
                              ("tensor parallel", PHI, GRADIENTS)):  # fmt: skip
        right = mutation.staged() if check == BITS else partition.simulated(kind, mutation.RANKS[kind])
        implementation = mutation.mutant(of=right)
        result = judge(checks()[check], Claim(name, check, "float64"),
                       lambda: Judge(implementation, CASES.setdefault(name, Case(name)), "float64", "cpu"))  # fmt: skip  # noqa: B023
        assert result.outcome == "pass"


def test_families_of_a_partition_can_be_partitioned() -> None:
    from conformance.implementations.partition import FAMILIES

    for mistake in topic_mistakes("partition"):
        assert set(mistake.families) <= set(FAMILIES)
        assert get(mistake.families[0]).name in FAMILIES
        assert "Only over several processes" in mistake.to_text()
