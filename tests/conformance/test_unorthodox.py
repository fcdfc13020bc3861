"""Right implementations that look nothing like the reference: no failure, no false localisation, no diagnosis."""

import shutil
from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor

from candidates.unorthodox import COMPILED, COMPONENTS, VARIANTS, Adapter, Variant
from candidates.unorthodox.llama import InPlace, Numpy, TokenByToken
from conformance.align import Alignment
from conformance.cases import Case, Claim, Manifest
from conformance.families.decoders import CONSTANT_STATE, FULL
from conformance.implementation import Implementation, adopt
from conformance.judge import Judge, Result, judge
from conformance.localise import _align_forward, _align_session, known_probes
from conformance.search import Settings
from conformance.suite import checks

# What an implementation without parameters by hub name cannot be asked.
NEED_PARAMETERS = {
    "golden.gradients", "gradients.directions", "gradients.tied", "round_trip.parameters", "causality.gradient",
}  # fmt: skip
# What is compared with values that a case stores; the other checks are properties, and take most of the time.
GOLDEN = FULL.keys() | CONSTANT_STATE.keys()
# What no variant returns or does.
NEVER = {
    "golden.auxiliary_losses",
    "gradients.auxiliary",
    "partition.bit_equal",
    "generation.greedy",
    "generation.stop_token",
}
VARIANT = pytest.mark.parametrize("variant", VARIANTS, ids=str)


@cache
def case(name: str) -> Case:
    return Case(name)


@cache
def claims(name: str) -> list[Claim]:
    return [claim for claim in Manifest().claims() if claim.case == name]


def prepared(found: Implementation, name: str, dtype: str, diagnose: bool = False) -> Judge:
    made = Judge(found, case(name), dtype, "cpu")
    made.settings = Settings(diagnose=diagnose)
    return made


def judged(implementation: object, wanted: list[Claim], diagnose: bool = False) -> list[Result]:
    """Each case is loaded once in each dtype, as a run does it."""
    made = cache(prepared)
    found = adopt("", implementation)
    return [
        judge(checks()[claim.check], claim, lambda c=claim: made(found, c.case, c.dtype, diagnose))  # type: ignore[misc]
        for claim in wanted
    ]


def alarms(results: list[Result]) -> list[Result]:
    return [r for r in results if r.outcome not in ("pass", "unsupported") or r.diagnosis or r.divergence or r.notes]


def cannot(variant: Variant, claim: Claim) -> bool:
    """Whether a variant declares, by what it lacks, that it does not do what a claim asks."""
    model = variant.model
    labels = "labels" in model.__call__.__annotations__
    return (
        claim.dtype not in model.dtypes
        or claim.check in NEVER
        or (claim.check in NEED_PARAMETERS and not model.trainable)
        or (claim.check in ("golden.loss", "invariance.loss") and not labels)
    )


@VARIANT
def test_a_right_implementation_raises_no_alarm(variant: Variant) -> None:
    """The claims of its cases pass, but for what it declares not to do."""
    wanted = [
        claim
        for name in variant.cases
        for claim in claims(f"{variant.model.family}/{name}")
        if variant.properties or claim.check in GOLDEN
    ]
    results = judged(variant(), wanted)
    assert alarms(results) == []
    left_out = {str(r.claim) for r in results if r.outcome == "unsupported"}
    assert left_out == {str(claim) for claim in wanted if cannot(variant, claim)}
    assert Counter(r.outcome for r in results)["pass"] >= 15


def test_there_are_enough_of_every_kind() -> None:
    assert len(VARIANTS) + len(COMPONENTS) >= 30
    properties = [variant for variant in VARIANTS if variant.properties]
    assert len(properties) >= 10
    assert {variant.model.family for variant in properties} >= {"llama", "mistral", "mixtral", "gpt2"}
    assert {claim.dtype for claim in claims("llama/distinct")} == {"float64", "float32", "bfloat16", "float16"}


@VARIANT
def test_its_mistake_is_found(variant: Variant) -> None:
    """With one line wrong it fails, and the first wrong tensor is the right one: passing is no accident."""
    name, check = variant.shown
    claim = Claim(f"{variant.model.family}/{name}", check, "float64")
    (right,), (wrong,) = judged(variant(), [claim]), judged(variant(wrong=True), [claim])
    assert (right.outcome, wrong.outcome) == ("pass", "fail"), wrong
    if variant.first is not None:
        assert (wrong.divergence or {}).get("first_wrong", "") == variant.first, wrong.divergence


# Those whose values a recorder sees least of, or in the strangest order.
NAMED = ("RepeatedKeyValues", "AbsorbedOutput", "InPlace", "Convolutions", "HeadByHead", "Numpy")


@pytest.mark.parametrize("variant", [v for v in VARIANTS if str(v) in NAMED], ids=str)
def test_its_mistake_is_named_rightly(variant: Variant) -> None:
    claim = Claim(f"{variant.model.family}/{variant.shown[0]}", variant.shown[1], "float64")
    (result,) = judged(variant(wrong=True), [claim], diagnose=True)
    assert result.diagnosis is not None, result.notes
    assert result.diagnosis["id"] == variant.entry


# --- localisation -----------------------------------------------------------------------------------------------------


def aligned(variant: Variant, plan: list[int]) -> Alignment:
    """What is matched of a forward, or of a session's feed."""
    made = prepared(adopt("", variant()), f"{variant.model.family}/distinct", "float64")
    values, source = known_probes(made.case)
    assert source == "golden"
    made.plan = plan
    return _align_session(made, values) if plan else _align_forward(made, values)


# Where too little is made in the sizes of the probes to say anything.
HARDLY_OBSERVED = (Numpy, TokenByToken)


@VARIANT
def test_nothing_diverges_in_a_right_implementation(variant: Variant) -> None:
    alignment = aligned(variant, [3, 4, 1, 1] if variant.shown[1].startswith("cache.") else [])
    assert alignment.first_divergence is None, alignment
    assert alignment.others == ()
    matched = sum(finding.status == "matched" for finding in alignment.findings.values())
    if variant.model not in HARDLY_OBSERVED:
        assert matched > len(alignment.findings) / 2


# --- components -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_right_component_raises_no_alarm(component: str) -> None:
    wanted = [claim for claim in Manifest().claims() if claim.family == component]
    results = judged(COMPONENTS[component](), wanted)
    assert alarms(results) == []
    assert Counter(r.outcome for r in results) == {"pass": len(wanted)}
    assert len(wanted) >= 30


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_wrong_component_fails(component: str) -> None:
    cases = [Claim(f"{component}/{name}", "component.outputs", "float64") for name in ("plain", "distinct")]
    assert [r.outcome for r in judged(COMPONENTS[component](wrong=True), cases)] == ["fail", "fail"]


# --- buffers that are returned again and again ------------------------------------------------------------------------


class OneBuffer(Adapter):
    """Logits come in the same memory at every call; wrong: positions are absolute."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__(InPlace)
        self.absolute = wrong

    def load(self, checkpoint: object) -> object:
        model = super().load(checkpoint)

        @torch.inference_mode()
        def call(input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
            logits: Tensor = model(input_ids, attention_mask, position_ids)
            if self.absolute and position_ids is not None:
                logits += position_ids[..., None]
            return logits

        return call


def test_a_buffer_is_not_compared_with_itself() -> None:
    """The logits of two calls may lie in the same memory: what is wrong with either of them still shows."""
    wanted = [Claim("llama/plain", "invariance.shift", "float64"), Claim("llama/plain", "batching.padding", "float64")]
    assert [r.outcome for r in judged(OneBuffer(), wanted)] == ["pass", "pass"]
    assert judged(OneBuffer(wrong=True), wanted[:1])[0].outcome == "fail"


def same_buffer(outside: bool) -> object:
    """RMSNorm that writes into one buffer; outside: ε is outside the root."""
    board: dict[torch.dtype, Tensor] = {}

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype not in board or board[x.dtype].numel() < x.numel():
            board[x.dtype] = x.new_empty(x.numel())
        square = x.pow(2).mean(-1, keepdim=True)
        y = x / (square.sqrt() + eps if outside else (square + eps).sqrt()) * weight
        return board[x.dtype][: x.numel()].view(x.shape).copy_(y)

    return rms_norm


def test_a_component_s_buffer_is_not_compared_with_itself() -> None:
    wanted = [claim for claim in claims("rms_norm/plain") if claim.check != "component.gradients"]
    assert {r.outcome for r in judged(same_buffer(outside=False), wanted)} == {"pass"}
    scale = Claim("rms_norm/plain", "invariance.scale", "float64")
    assert scale in wanted
    assert judged(same_buffer(outside=True), [scale])[0].outcome == "fail"


# --- compiled code ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it imports its compiler
@pytest.mark.parametrize("dtype", COMPILED.model.dtypes)
def test_compiled_code_raises_no_alarm(dtype: str) -> None:
    claim = Claim("llama/plain", "golden.logits", dtype)
    assert alarms(judged(COMPILED(), [claim])) == []
    assert judged(COMPILED(wrong=True), [claim])[0].outcome == "fail"
