"""Independent implementations with one mistake each fail, at the right tensor; their correct twins pass everything."""

from itertools import groupby

import pytest

from candidates import FIRST_DIVERGENCE, LAYOUTS, MISTAKES, SESSION_ONLY
from conformance.cases import Case, Manifest
from conformance.implementation import adopt
from conformance.judge import Judge, Result, judge
from conformance.suite import checks
from judged import check

MANIFEST = Manifest()
CASE = "llama/distinct"
CLAIMS = [claim for claim in MANIFEST.claims() if claim.family == "llama"]

layouts = pytest.mark.parametrize("layout", LAYOUTS)
# What none of them has, and what needs parameters by hub name.
LACKING = {
    "golden.loss", "invariance.loss", "packed.logits", "packed.isolation", "batching.packed", "partition.bit_equal",
    "generation.greedy", "generation.stop_token",
}  # fmt: skip
WITHOUT_PARAMETERS = {
    "golden.gradients", "gradients.directions", "gradients.tied", "round_trip.parameters", "causality.gradient",
}  # fmt: skip


@layouts
def test_a_correct_twin_passes_every_claim(layout: str) -> None:
    implementation, known, results = adopt("", LAYOUTS[layout]()), checks(), []
    claims = sorted(CLAIMS, key=lambda claim: (claim.case, claim.dtype))
    for (case, dtype), group in groupby(claims, key=lambda claim: (claim.case, claim.dtype)):
        session = Judge(implementation, Case(case, MANIFEST), dtype, "cpu")
        results += [judge(known[claim.check], claim, lambda session=session: session) for claim in group]
    unsupported = LACKING | (WITHOUT_PARAMETERS if layout == "fused_sdpa" else set())
    wanted = {claim: "unsupported" if claim.check in unsupported else "pass" for claim in CLAIMS}
    assert {result.claim: result.outcome for result in results} == wanted


def failing_result(layout: str, mistake: str) -> Result:
    failing = "cache.prefill_decode" if mistake in SESSION_ONLY else "golden.logits"
    return check(LAYOUTS[layout](mistake=mistake), CASE, failing)


@layouts
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_fails_at_its_first_wrong_tensor(layout: str, mistake: str) -> None:
    result = failing_result(layout, mistake)
    assert (result.outcome, result.kind) == ("fail", "value")
    assert result.divergence is not None
    assert result.divergence["first_wrong"] == FIRST_DIVERGENCE[layout][mistake]


@layouts
@pytest.mark.parametrize("mistake", sorted(SESSION_ONLY))
def test_a_mistake_of_decoding_leaves_the_full_forward_right(layout: str, mistake: str) -> None:
    assert check(LAYOUTS[layout](mistake=mistake), CASE, "golden.logits").outcome == "pass"


@layouts
@pytest.mark.parametrize("mistake", sorted(MISTAKES.keys() - SESSION_ONLY))
def test_a_mistake_fails_in_float32_as_well(layout: str, mistake: str) -> None:
    assert check(LAYOUTS[layout](mistake=mistake), CASE, "golden.logits", "float32").outcome == "fail"


def test_swapped_batch_rows_are_called_a_permutation() -> None:
    divergence = failing_result("batch_first", "batch_rows_swapped").divergence
    assert divergence is not None
    assert "permuted along batch" in divergence["how"]


def test_a_fused_kernel_widens_the_interval_and_says_so() -> None:
    divergence = failing_result("fused_sdpa", "scale_missing").divergence
    assert divergence is not None
    assert "not observed in between: layers.0.attention.scores, layers.0.attention.weights" in divergence["how"]
