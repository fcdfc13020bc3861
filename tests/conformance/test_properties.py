"""The table of capabilities: what each family claims, and that its exceptions are real."""

import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from conformance import Case, check
from conformance.families import COMPONENTS, FAMILIES, MODELS, claims, get
from conformance.families.properties import (
    DECODER,
    ENCODER_DECODER,
    EVERY,
    Properties,
    reach,
    remembered,
)
from conformance.implementation import Unsupported, resolve
from conformance.judge import Judge
from conformance.search import Listed, Settings
from conformance.suite import checks


def test_reach_adds_up_what_each_layer_hands_on() -> None:
    assert reach((5, 5)) == 9
    assert reach((3, 1, 4)) == 6
    assert reach((5, None)) is None
    assert reach(()) == 1


@pytest.mark.parametrize(
    ("layers", "memory", "plan", "first"),
    [
        (1, 2, (3, 3, 3), 4),  # the segment begins with 6
        (2, 2, (3, 3, 3), 1),  # 4 stands in the segment that begins with 3
        (3, 2, (3, 3, 3), 0),
        (1, 2, (9,), 0),
        (2, 2, (1,) * 9, 4),  # M a layer
        (2, 3, (3, 3, 3, 3), 3),  # segments as long as the memory: N · L before the last one
        (2, 5, (1, 4, 4, 4), 0),  # the memory spans two segments: 9 sees 4, which stands behind 1 and saw all
        (2, 5, (5, 1, 4, 4), 0),
        (2, 1, (4, 1, 4, 4), 4),  # 9 sees 8, in the segment that begins with 5, which saw 4
        (2, 0, (4, 5), 4),
    ],
)
def test_what_a_memory_holds_is_reached_through_the_segments_of_its_time(
    layers: int, memory: int, plan: tuple[int, ...], first: int
) -> None:
    assert remembered((None,) * layers, memory, plan) == first


def test_a_window_hides_what_is_remembered() -> None:
    assert remembered((4, 4), 4, (9,)) == remembered((4, 4), 4, (1,) * 9) == remembered((4, 4), 4, (2, 3, 4)) == 2
    assert remembered((None, 2), 3, (3, 3, 3)) == 3  # the upper layer shows 7, whose segment begins with 6


@pytest.mark.parametrize("family", MODELS)
def test_every_model_states_its_properties(family: str) -> None:
    found = get(family).properties
    assert isinstance(found, Properties)
    plain = found.of(f"{family}/plain", next(r.config for r in get(family).recipes if r.name == f"{family}/plain"))
    wanted = EVERY | (ENCODER_DECODER if get(family).encoder_decoder else DECODER)
    assert [name for name in wanted if name not in plain] == [name for name in wanted if name in found.exceptions]
    assert all(reason.strip() for reason in found.exceptions.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_claims_are_of_checks_that_there_are(family: str) -> None:
    known = checks()
    for recipe in get(family).recipes:
        assert set(claims(recipe)) <= set(known), recipe.name


def test_only_the_cases_that_are_searched_claim_properties() -> None:
    claimed = {r.name for r in get("llama").recipes if set(claims(r)) - set(r.claims)}
    assert claimed == {"llama/plain", "llama/distinct", "llama/field-tie_word_embeddings"}  # the last for its tied head


def test_claims_follow_from_the_configuration() -> None:
    def of(family: str, case: str) -> set[str]:
        return set(claims(next(r for r in get(family).recipes if r.name == f"{family}/{case}")))

    assert "invariance.repeated_key_values" in of("llama", "distinct")
    assert "invariance.repeated_key_values" not in of("llama", "plain")  # as many key-value heads as query heads
    assert "gradients.tied" in of("gpt2", "plain")
    assert "gradients.tied" not in of("llama", "plain")
    assert "invariance.reversal" in of("rnn", "bidirectional")
    assert "invariance.reversal" not in of("rnn", "plain")
    assert "cache.any_plan" in of("gru", "layers")


def test_component_has_its_properties_in_plain_and_where_they_apply() -> None:
    assert [name for name in COMPONENTS if not get(name).relations] == ["activations"]
    for name in COMPONENTS:
        for relation in get(name).relations:
            assert any(relation in get(name).relations_of(recipe) for recipe in get(name).recipes), (name, relation)


KEY_BIASES = [
    f"model.{attention}.k_proj.bias"
    for attention in ("encoder.layers.0.self_attn", "decoder.layers.1.self_attn", "decoder.layers.2.encoder_attn")
]


# --- what quick tries ------------------------------------------------------------------------------------------------


def tried(case: str, name: str, **settings: Any) -> list[str]:
    """The tensors or keys that a check puts to a case."""
    session = Judge(resolve("reference"), Case(case), "float64", "cpu")
    session.settings = Settings(listing=True, **settings)
    with pytest.raises(Listed) as listed:
        checks()[name](session)
    return [thing for example in listed.value.examples for thing in example.values()]


def kinds(names: Iterable[str]) -> set[str]:
    return {re.sub(r"\d+", "N", name) for name in names}


def test_quick_tries_each_kind_of_tensor_once_and_in_a_second_case_what_is_new() -> None:
    plain, distinct = (tried(f"llama/{case}", "sensitivity.weights") for case in ("plain", "distinct"))
    assert kinds(plain) == kinds(Case("llama/plain").weights)
    assert kinds(distinct) == kinds(Case("llama/distinct").weights) - kinds(plain)
    assert len(plain) == len(kinds(plain)) == 12
    assert len(distinct) == 7  # biases


def test_quick_tries_six_of_a_second_case_that_has_nothing_new_and_twenty_at_most() -> None:
    assert len(tried("gpt2/distinct", "sensitivity.weights")) == 6
    assert len(tried("transformer/plain", "sensitivity.weights")) == 20
    assert len(tried("switch_transformer/plain", "invariance.absent")) == 10
    assert len(tried("switch_transformer/distinct", "invariance.absent")) == 6


def test_the_seed_says_which_are_tried_and_in_time_all_are() -> None:
    runs = [tried("transformer/plain", "sensitivity.weights", seed=seed) for seed in range(12)]
    assert runs[0] != runs[1]
    assert set().union(*map(kinds, runs)) == kinds(Case("transformer/plain").weights)


def test_other_profiles_try_everything_in_every_case() -> None:
    assert tried("gpt2/distinct", "sensitivity.weights", profile="ci") == list(Case("gpt2/distinct").weights)
    assert set(tried("gpt2/distinct", "invariance.absent", profile="ci")) == {
        "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings",
    }  # fmt: skip


# --- exceptions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_exceptions_are_of_claims_that_would_be_made(family: str) -> None:
    found = get(family).properties
    bare = Properties(**{**vars(found), "exceptions": {}})
    for exception, reason in found.exceptions.items():
        name, _, which = exception.partition(" ")
        assert reason
        made = {r.name: bare.of(r.name, r.config).get(name, ()) for r in get(family).recipes}
        assert any(dtypes and which in ("", *dtypes, case.split("/")[1]) for case, dtypes in made.items()), exception


def test_nothing_can_be_left_out_of_gnmts_configurations() -> None:
    """Its exception of `invariance.absent` is real; of a family without it there is something in every case."""
    for case in ("gnmt/plain", "gnmt/distinct"):
        session = Judge(resolve("reference"), Case(case), "float64", "cpu")
        with pytest.raises(Unsupported, match="nothing that this could be tried with"):
            checks()["invariance.absent"](session)


OF_A_CASE = [
    (f"{family}/{exception.split()[1]}", exception.split()[0])
    for family in MODELS
    for exception in get(family).properties.exceptions
    if exception.endswith(" distinct")
]


@pytest.mark.parametrize(("case", "name"), OF_A_CASE)
def test_exception_of_a_case_is_real(case: str, name: str) -> None:
    """Capacity-limited experts and a short memory break what the family says they break; `plain` has it."""
    assert check("reference", case, name, profile="ci").outcome == "fail"
    assert check("reference", case.replace("distinct", "plain"), name).outcome == "pass"


def test_routing_margins_of_drawn_texts_come_as_near_to_zero_as_there_are_tokens() -> None:
    """Mixtral makes an exception of float32: of n drawn tokens one has a margin of about 1/n, and none is too small.

    With the goldens' ids, which were chosen for wide margins, it needs none.
    """
    from conformance.implementations import reference
    from conformance.strategies import token_ids

    case = Case("mixtral/plain")
    chosen = case.config["num_experts_per_tok"]

    def margins(ids: torch.Tensor) -> torch.Tensor:
        probes = reference.probes(get("mixtral"), case.config, case.weights, ids)
        logits = torch.cat([v.flatten(0, 1) for name, v in probes.items() if re.search("router_logits", name)])
        ranked = logits.sort(dim=-1, descending=True).values
        return ranked[:, chosen - 1] - ranked[:, chosen]

    drawn = margins(token_ids(0, 200, 12, case.config["vocab_size"]))
    assert len(drawn) == 200 * 12 * 2
    assert drawn.min() < 10 / len(drawn)
    assert margins(case.inputs["input_ids"]).min() > 10 / len(drawn)


def test_key_bias_without_rotary_positions_may_change_without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check demands that a tensor stays without effect where the family says so; a wrong exception fails."""
    monkeypatch.setattr("conformance.suite.test_sensitivity._chosen", lambda judge: KEY_BIASES)
    result = check("reference", "transformer/plain", "sensitivity.weights")
    assert result.examples == len(KEY_BIASES)
    assert result.outcome == "pass", result


def test_exception_that_is_not_real_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = get("gpt2").properties
    monkeypatch.setitem(stated.__dict__, "unmoved", {r"ln_f\.weight": "said without reason"})
    result = check("reference", "gpt2/plain", "sensitivity.weights")
    assert (result.outcome, result.kind) == ("fail", "effect")
    assert "they must not: said without reason" in result.message
