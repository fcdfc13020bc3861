"""Mistakes of implementations that share no code with the reference are named; what no entry knows is not misnamed."""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from candidates import ENTRIES, FIRST_DIVERGENCE, HARMLESS, LAYOUTS, MISTAKES, MORE, SHOWN_BY
from conformance import check
from conformance.cases import Case, Claim
from conformance.diagnosis import ONE, Search, Simulator, _moves_on, difference, hypotheses, of_mistake, suspects
from conformance.families import get
from conformance.implementation import adopt
from conformance.judge import Compared, Judge, Result, judge
from conformance.localise import record_forward
from conformance.mistakes import Swap
from conformance.mistakes import get as get_mistake
from conformance.mutation import mutant
from conformance.suite import checks

CASES: dict[str, Case] = {}
# Layout and mistake of every candidate, and the first wrong probe.
RUNS = {
    (layout, mistake): FIRST_DIVERGENCE[layout].get(mistake, MORE[layout].get(mistake, ""))
    for layout in LAYOUTS
    for mistake in (*MISTAKES, *MORE[layout])
}


def case(name: str) -> Case:
    if name not in CASES:
        CASES[name] = Case(name)
    return CASES[name]


def judged(implementation: Any, name: str, check_name: str, dtype: str = "float64") -> Result:
    """The result of a claim, of cases that are read once."""
    found = adopt("", implementation)
    claim = Claim(name, check_name, dtype)
    return judge(checks()[check_name], claim, lambda: Judge(found, case(name), dtype, "cpu"))


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str], Result]:
    shown = {run: SHOWN_BY.get(run[1], ("llama/distinct", "golden.logits")) for run in RUNS}
    by_claim = sorted(RUNS, key=lambda run: shown[run])  # what is simulated for one candidate serves the next
    return {(layout, m): judged(LAYOUTS[layout](mistake=m), *shown[layout, m]) for layout, m in by_claim}


def identifier(result: Result) -> str | None:
    return result.diagnosis["id"] if result.diagnosis else None


def test_there_are_enough_mistakes() -> None:
    assert len(set(ENTRIES.values())) >= 40
    assert len(RUNS) >= 90
    assert not set(ENTRIES.values()) - {hypothesis.id for hypothesis in hypotheses("llama")}


def test_known_mistakes_are_named(results: dict[tuple[str, str], Result]) -> None:
    """At least 95 % of them rightly; at most 1 % wrongly."""
    known = {run: result for run, result in results.items() if run[1] in ENTRIES}
    missed = {run: identifier(result) for run, result in known.items() if identifier(result) != ENTRIES[run[1]]}
    wrong = {run: said for run, said in missed.items() if said is not None}
    assert len(wrong) <= 0.01 * len(known), wrong
    assert len(missed) <= 0.05 * len(known), missed


def test_a_named_mistake_is_reproduced(results: dict[tuple[str, str], Result]) -> None:
    named = [result.diagnosis for result in results.values() if result.diagnosis and result.diagnosis["id"]]
    assert all(diagnosis["reproduced_to"] <= 1e-9 and diagnosis["fix"] for diagnosis in named)


def test_the_first_wrong_tensor_is_right(results: dict[tuple[str, str], Result]) -> None:
    """At least 98 % of the time, where there is one (padded batches are not localised)."""
    found = {run: (result.divergence or {}).get("first_wrong", "") for run, result in results.items()}
    wrong = {run: (found[run], probe) for run, probe in RUNS.items() if found[run] != probe}
    assert len(wrong) <= 0.02 * len(RUNS), wrong


def test_a_mistake_of_no_entry_is_unknown(results: dict[tuple[str, str], Result]) -> None:
    foreign = {run: result.diagnosis for run, result in results.items() if run[1] not in ENTRIES}
    assert len(foreign) >= 5
    assert {diagnosis and diagnosis["kind"] for diagnosis in foreign.values()} == {"unknown"}
    swapped = foreign["batch_first", "batch_rows_swapped"]
    assert swapped is not None
    assert swapped["text"].startswith("the right values in another order along batch; none of ")
    late = foreign["batch_first", "memory_values_forgotten"]
    assert late is not None
    assert late["text"].startswith("the first call of the session is right, later ones are not")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_right_implementation_has_no_diagnosis(layout: str) -> None:
    for mistake in (None, *HARMLESS.get(layout, ())):
        for check_name in ("golden.logits", "golden.left_padding", "cache.chunks"):
            result = judged(LAYOUTS[layout](mistake=mistake), "llama/distinct", check_name)
            assert (result.outcome, result.diagnosis) == ("pass", None)


# --- config fields ----------------------------------------------------------------------------------------------------


class WithoutField:
    """A right implementation that does not read a key of config.json, nor the weights that come with it."""

    name, families = "deaf", frozenset({"llama"})

    def __init__(self, field: str):
        self.field = field

    def load(self, checkpoint: Any) -> Any:
        family = get("llama")
        checkpoint.config.pop(self.field, None)
        checkpoint.config.get("rope_parameters", {}).pop(self.field, None)
        if self.field == "rope_scaling":
            checkpoint.config["rope_parameters"] = {
                "rope_type": "default", "rope_theta": checkpoint.config["rope_theta"]
            }  # fmt: skip
        known, tensors = family.tensor_shapes(checkpoint.config), checkpoint.tensors
        checkpoint.tensors = lambda: {name: tensor for name, tensor in tensors().items() if name in known}
        return LAYOUTS["batch_first"]().load(checkpoint)


# Field -> the catalogue's entry for it, where it has one.
IGNORED = {
    "rms_norm_eps": "field-epsilon-default", "rope_theta": "rope-theta-default",
    "rope_scaling": "rope-scaling-ignored", "attention_bias": None, "mlp_bias": None,
}  # fmt: skip


@pytest.mark.parametrize("field", IGNORED)
def test_an_ignored_field_is_named(field: str) -> None:
    """In a case that moves everything at once, whose golden stores no counterfactual of it."""
    result = judged(WithoutField(field), "llama/distinct", "golden.logits")
    assert result.diagnosis is not None
    assert result.equals is None
    assert result.diagnosis["id"] == (IGNORED[field] or field)
    assert result.diagnosis["kind"] == ("mistake" if IGNORED[field] else "field")


@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps", "attention_bias", "mlp_bias", "hidden_act-relu"])
def test_every_field_case_is_named(field: str) -> None:
    """By the golden's own counterfactual; then nothing else is looked for."""
    result = judged(WithoutField(field.split("-")[0]), f"llama/field-{field}", "golden.logits")
    assert result.equals == f"{field.split('-')[0]} ignored"
    assert result.diagnosis is None


# --- two mistakes, working dtypes, engines, memory --------------------------------------------------------------------


class Both:
    """Two mistakes of one layout at once."""

    name, families = "two mistakes", frozenset({"llama"})

    def load(self, checkpoint: Any) -> Any:
        tensors = checkpoint.tensors

        def crossed() -> dict[str, torch.Tensor]:
            found = dict(tensors())
            for layer in ("model.layers.0.", "model.layers.1."):
                names = [layer + "mlp.gate_proj.", layer + "mlp.up_proj."]
                for kind in ("weight", "bias"):
                    gate, up = (found[name + kind] for name in names)
                    found[names[0] + kind], found[names[1] + kind] = up, gate
            return found

        checkpoint.tensors = crossed
        return LAYOUTS["heads_first"](mistake="interleaved_rotary").load(checkpoint)


def test_two_mistakes_at_once_are_both_named() -> None:
    result = judged(Both(), "llama/distinct", "golden.logits")
    assert result.diagnosis is not None
    assert (result.diagnosis["kind"], result.diagnosis["id"]) == ("two at once", "rope-layout and swiglu-swap")
    assert result.diagnosis["reproduced_to"] <= 1e-9


@pytest.mark.parametrize(
    ("first", "second"),
    [("rope-sign", "swiglu-swap"), ("gqa-tile", "norm-used-twice"), ("swiglu-sum", "final-norm-missing")],
)
def test_two_mistakes_of_the_catalogue_at_once_are_both_named(first: str, second: str) -> None:
    result = judged(mutant(get_mistake(first), get_mistake(second)), "llama/distinct", "golden.logits")
    assert set((identifier(result) or "").split(" and ")) == {first, second}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mistake_is_named_in_a_working_dtype(dtype: str) -> None:
    result = judged(LAYOUTS["fused_sdpa"](mistake="scale_missing"), "llama/distinct", "golden.logits", dtype)
    assert identifier(result) == "attn-scale-missing"


def test_a_rounding_error_is_not_taken_for_a_mistake() -> None:
    """In bfloat16 many mistakes are as small as rounding; none of them explains noise."""

    class Noisy:
        name, families = "noisy", frozenset({"llama"})

        def load(self, checkpoint: Any) -> Any:
            model = LAYOUTS["batch_first"]().load(checkpoint)
            noise = torch.randn(4, 11, 61, generator=torch.Generator().manual_seed(0))
            return lambda input_ids: model(input_ids) * (1 + 0.05 * noise.to(checkpoint.dtype))

    result = judged(Noisy(), "llama/distinct", "golden.logits", "bfloat16")
    assert result.outcome == "fail"
    assert result.diagnosis is not None
    assert result.diagnosis["id"] is None


def rms_norm_less(mean: float) -> Any:
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x - mean * x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + eps) ** 0.5 * weight

    return rms_norm


def test_a_mistake_near_a_known_one_is_not_called_by_its_name() -> None:
    assert identifier(judged(rms_norm_less(1.0), "rms_norm/plain", "component.outputs")) == "layernorm-for-rms"
    near = judged(rms_norm_less(0.9999), "rms_norm/plain", "component.outputs").diagnosis
    assert near is not None
    assert near["id"] is None
    assert "near, and not the same: layernorm-for-rms" in near["text"]


def test_an_error_below_what_counts_as_reproduced_is_not_reproduced_by_mistakes_that_do_nothing() -> None:
    class Hardly:
        name, families = "hardly wrong", frozenset({"llama"})

        def load(self, checkpoint: Any) -> Any:
            model = LAYOUTS["batch_first"]().load(checkpoint)
            return lambda input_ids: model(input_ids) * (1 + 5e-10)

    result = judged(Hardly(), "llama/distinct", "golden.logits")
    assert result.outcome == "fail"
    assert result.diagnosis is not None
    assert result.diagnosis["id"] is None
    assert result.diagnosis["text"].startswith("every value is 1 times the right one")


class Losing:
    """Its loss is computed by a function of logits and labels."""

    name, families = "losing", frozenset({"llama"})

    def load(self, checkpoint: Any) -> Any:
        model = LAYOUTS["batch_first"]().load(checkpoint)

        def call(input_ids: Tensor, labels: Tensor | None = None) -> Any:
            logits = model(input_ids)
            targets = input_ids if labels is None else labels
            return {
                "logits": logits,
                "loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()),
            }

        return call


def test_a_mistake_that_leaves_a_probe_out_does_not_end_the_search() -> None:
    """Without the norm of the feed-forward its input is no module's, and cannot be compared."""
    made = Judge(adopt("", LAYOUTS["batch_first"](mistake="gqa_tile")), case("llama/distinct"), "float64", "cpu")
    leaves_out = of_mistake(get_mistake("feed-forward-not-normed"))
    assert _moves_on(made, leaves_out, "layers.0.attention.scores", *record_forward(made)) is None


def test_a_mistake_of_the_loss_is_named() -> None:
    assert identifier(judged(Losing(), "llama/distinct", "golden.loss")) == "loss-not-shifted"


def test_what_was_found_is_tried_first_in_other_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    found = adopt("", LAYOUTS["batch_first"](mistake="gelu_for_silu"))

    def run(name: str) -> Result:
        return judge(checks()["golden.logits"], Claim(name, "golden.logits", "float64"),
                     lambda: Judge(found, case(name), "float64", "cpu"))  # fmt: skip

    assert identifier(run("llama/distinct")) == "act-gelu-for-silu"

    def no_search(_: Search) -> Iterator[Any]:
        raise AssertionError("searched again")

    monkeypatch.setattr(Search, "stages", no_search)
    assert identifier(run("llama/plain")) == "act-gelu-for-silu"


def test_values_that_change_from_call_to_call_are_said_to() -> None:
    calls = iter(range(1, 100))

    class Drifting:
        name, families = "drifting", frozenset({"llama"})

        def load(self, checkpoint: Any) -> Any:
            model = LAYOUTS["batch_first"]().load(checkpoint)
            return lambda input_ids: model(input_ids) + next(calls)

    result = judged(Drifting(), "llama/distinct", "golden.logits")
    assert result.diagnosis is not None
    assert result.diagnosis["text"].startswith("the same call gives other values when it is repeated")


def test_no_number_is_diagnosed_as_well() -> None:
    class Nothing:
        name, families = "nan", frozenset({"llama"})

        def load(self, checkpoint: Any) -> Any:
            model = LAYOUTS["batch_first"]().load(checkpoint)
            return lambda input_ids: model(input_ids) * torch.nan

    result = judged(Nothing(), "llama/distinct", "golden.logits")
    assert (result.kind, result.diagnosis and result.diagnosis["id"]) == ("not finite", None)
    assert result.diagnosis is not None
    assert result.diagnosis["text"].startswith("NaN in 100% of the values")


def test_a_candidate_that_patches_the_reference_is_compared_with_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from reference_impl.nn import attention

    def unscaled(head_dim: int) -> float:
        return 1.0

    monkeypatch.setattr(attention, "score_scale", unscaled)
    found = check("reference", "llama/distinct")
    assert identifier(found) == "attn-scale-missing"
    assert attention.score_scale is unscaled
    method = attention.GroupedQueryAttention.turn
    monkeypatch.setattr(attention, "score_scale", lambda head_dim: head_dim**-0.5)
    monkeypatch.setattr(attention.GroupedQueryAttention, "turn", lambda *a: (method(*a)[0], a[2]))
    assert identifier(check("reference", "llama/distinct")) == "rope-keys-not-rotated"


def test_a_reference_that_cannot_be_had_right_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced class is not put right; what is simulated with it proves nothing."""
    from reference_impl.models import llama

    class Unscaled(llama.GroupedQueryAttention):  # type: ignore[name-defined,misc]
        def turn(self, query: Tensor, key: Tensor, *_: Any) -> Any:
            return query, key

    monkeypatch.setattr(llama, "GroupedQueryAttention", Unscaled)
    result = check(LAYOUTS["batch_first"](mistake="scale_missing"), "llama/distinct")
    assert result.diagnosis is None
    assert result.notes[-1].startswith("not diagnosed: reference_impl itself does not pass this claim")


def test_a_diagnosis_that_breaks_changes_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr("conformance.diagnosis.diagnose", broken)
    result = check(LAYOUTS["batch_first"](mistake="scale_missing"), "llama/distinct")
    assert (result.outcome, result.diagnosis) == ("fail", None)
    assert result.notes == ["not diagnosed: RuntimeError: no"]


# --- the parts --------------------------------------------------------------------------------------------------------


def scaling_its_weight(original: Any) -> Any:
    """Every call leaves a larger weight behind."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.weight.data *= 2
        return original(self, x)  # type: ignore[no-any-return]

    return forward


def test_what_a_mistake_leaves_behind_does_not_stay() -> None:
    entry = replace(
        get_mistake("norm-weight-plus-one"), id="lasting",
        swaps=(Swap("reference_impl.nn.norm:RMSNorm.forward", scaling_its_weight),),
    )  # fmt: skip
    simulator = Simulator(checks()["golden.logits"], case("llama/distinct"), "float64")
    first = simulator.simulate(of_mistake(entry))
    again = simulator.simulate(of_mistake(replace(entry, id="the same")))
    assert difference(first, simulator.right, case("llama/distinct"), "float64")[0] > 0.1
    assert difference(first, again, case("llama/distinct"), "float64") == (0.0, True)


def test_no_number_differs_from_zero() -> None:
    truth = torch.ones(2, 3, 4, dtype=torch.float64)
    nothing, zero = truth * torch.nan, truth * 0
    values = [{("logits", 0): Compared("logits", got, truth)} for got in (nothing, zero)]
    assert difference(values[0], values[0], case("llama/distinct"), "float64") == (0.0, True)
    assert difference(values[0], values[1], case("llama/distinct"), "float64") == (math.inf, False)
    assert difference(values[1], values[0], case("llama/distinct"), "float64") == (math.inf, False)


def test_what_touches_the_first_wrong_tensor_is_tried_first_and_everything_once() -> None:
    failing: Any = SimpleNamespace(judge=SimpleNamespace(case=case("llama/distinct")))
    touched = frozenset({"layers.N.attention.scores"})
    simulator: Any = SimpleNamespace(hypotheses=hypotheses("llama"), ranks=ONE)
    none, first, second, third = Search(simulator, failing, touched, "golden.logits").stages()
    assert none == []  # of a partition
    assert {h.id for h in first} == {h.id for h in hypotheses("llama") if "layers.N.attention.scores" in h.touches}
    assert "attn-scale-missing" in {h.id for h in first}
    assert "loss-not-shifted" in {h.id for h in third}
    assert sorted(h.id for h in (*first, *second, *third)) == sorted(h.id for h in hypotheses("llama"))


def test_suspects_reach_from_the_first_wrong_tensor_to_the_good_ones() -> None:
    seen = {"first_wrong": "layers.1.attention.context", "last_good": ["layers.1.attention.value (1e-15)",
            "layers.1.attention.query_rotated (1e-15)", "layers.1.attention.key_rotated (2e-15)"],
            "probes_from": "golden"}  # fmt: skip
    wanted = {"layers.N.attention.context", "layers.N.attention.weights", "layers.N.attention.scores"}
    assert suspects(case("llama/distinct"), seen) == wanted
    block = {"first_wrong": "layers.1", "last_good": [], "probes_from": "blocks"}
    assert {"layers.N.attention.query", "layers.N.output"} <= suspects(case("llama/distinct"), block)
    assert "embedding" not in suspects(case("llama/distinct"), block)
    assert suspects(case("llama/distinct"), None) == frozenset()


# --- components -------------------------------------------------------------------------------------------------------


def component_mistakes() -> dict[tuple[str, str, str], Any]:
    """Wrong functions of other tests whose name is that of an entry: family, entry, case -> function."""
    import test_component_mistakes_attention as attention
    import test_component_mistakes_experts as experts
    import test_component_mistakes_pointwise as pointwise
    import test_component_mistakes_positions as positions

    tables: dict[str, Any] = {
        "multi_head_attention": attention.MULTI_HEAD, "relative_attention": attention.RELATIVE,
        "sparse_moe": experts.MIXTRAL, "switch_ffn": experts.SWITCH, "layer_norm": pointwise.LAYER_NORM,
        "feed_forward": pointwise.FEED_FORWARD, "swiglu": pointwise.SWIGLU, "rotary": positions.ROTARY,
        "sinusoidal_positions": positions.SINUSOID,
    }  # fmt: skip
    return {
        (family, name, f"{family}/{where}"): function
        for family, table in tables.items()
        for name, (function, where) in table.items()
        if name in {hypothesis.id for hypothesis in hypotheses(family)}
    }


# A variant that has an entry of its own.
VARIANTS = {
    "gqa-kv-index": "gqa-kv-index-wrapped", "route-weights-unused": "route-weights-constant",
    "switch-capacity-scope": "switch-capacity-shared",
}  # fmt: skip


def test_mistakes_of_components_are_named() -> None:
    wrong = component_mistakes()
    said = {run: judged(function, run[2], "component.outputs") for run, function in wrong.items()}
    named = {run: identifier(result) or result.equals for run, result in said.items()}
    wanted = {run: VARIANTS.get(run[1], run[1]) for run in wrong}
    assert len(named) >= 20
    assert {run: name for run, name in named.items() if name != wanted[run] and said[run].equals is None} == {}
