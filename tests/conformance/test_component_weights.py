"""How a component's function may take its weights, and what it may return."""

from collections import namedtuple
from pathlib import Path

import pytest

pytest.importorskip("transformers")  # goldens note its version

import torch

from conformance import check, golden
from conformance.cases import Case, Manifest
from conformance.component import ComponentCandidate
from conformance.families import COMPONENTS, get
from conformance.implementation import adopt


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    directory: Path = tmp_path_factory.mktemp("fixtures")
    golden.make(["lstm"], directory)
    return Manifest(directory)


def lstm_by_name(x, h0, c0, weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0):
    """One layer in one direction, weights one by one."""
    h, c, outputs = h0[0], c0[0], []
    for t in range(x.shape[1]):
        i, f, g, o = (x[:, t] @ weight_ih_l0.T + h @ weight_hh_l0.T + bias_ih_l0 + bias_hh_l0).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs, 1), h[None], c[None]


def lstm_at_once(x, h0, c0, weights):
    return lstm_by_name(x, h0, c0, **weights)


@pytest.mark.parametrize("function", [lstm_by_name, lstm_at_once])
@pytest.mark.parametrize("what", ["component.outputs", "component.gradients", "component.chunks"])
def test_weights_may_be_taken_by_name_or_all_at_once(manifest: Manifest, function, what: str) -> None:
    assert check(function, Case("lstm/plain", manifest), what).outcome == "pass"


def test_weights_at_once_are_those_of_the_case_and_nothing_else(manifest: Manifest) -> None:
    seen = {}

    def spy(x, h0, c0, weights):
        seen.update(weights)
        return lstm_at_once(x, h0, c0, weights)

    check(spy, Case("lstm/plain", manifest))
    check(spy, Case("lstm/plain", manifest), "component.outputs", "bfloat16")
    assert sorted(seen) == ["bias_hh_l0", "bias_ih_l0", "weight_hh_l0", "weight_ih_l0"]
    assert {tensor.dtype for tensor in seen.values()} == {torch.bfloat16}


def test_gradients_of_weights_taken_at_once_are_judged(manifest: Manifest) -> None:
    def detached(x, h0, c0, weights):
        return lstm_at_once(x, h0, c0, {n: w.detach() if n == "weight_hh_l0" else w for n, w in weights.items()})

    result = check(detached, Case("lstm/plain", manifest), "component.gradients")
    assert (result.outcome, result.message) == ("fail", "gradients of weight_hh_l0 differ from the oracle's")


def test_a_weight_changed_in_the_dict_is_noticed(manifest: Manifest) -> None:
    def changing(x, h0, c0, weights):
        found = lstm_at_once(x, h0, c0, weights)
        weights["bias_ih_l0"].zero_()
        return found

    result = check(changing, Case("lstm/plain", manifest), "component.outputs")
    assert (result.outcome, result.message) == ("fail", "the function changed its argument bias_ih_l0 in place")


def test_a_function_of_arbitrary_keywords_gets_the_weights_by_name(manifest: Manifest) -> None:
    def keywords(**arguments):
        wanted = ("x", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        assert "weights" not in arguments
        return lstm_by_name(**{name: arguments[name] for name in wanted})

    assert check(keywords, Case("lstm/plain", manifest), "component.outputs").outcome == "pass"


def test_a_named_tuple_of_the_returns_counts_as_a_dict(manifest: Manifest) -> None:
    named = namedtuple("named", "c_n h_n cell_gate output")

    def returning(x, h0, c0, weights):
        output, h_n, c_n = lstm_at_once(x, h0, c0, weights)
        return named(c_n, h_n, output * 0, output)

    result = check(returning, Case("lstm/plain", manifest), "component.outputs")
    assert (result.outcome, result.message) == ("fail", "cell_gate differ from the oracle's")


def test_an_optional_return_that_the_case_does_not_hold_is_ignored(manifest: Manifest) -> None:
    case = Case("lstm/bidirectional", manifest)
    candidate = ComponentCandidate(adopt("", lstm_at_once), get("lstm"), case, "float64", "cpu")
    candidate.function = lambda **_: {**case.expected, "cell_gate": "anything"}
    assert set(candidate(candidate.tensors())) == {"output", "h_n", "c_n"}


@pytest.mark.parametrize("name", COMPONENTS)
def test_no_component_has_an_argument_of_its_own_called_weights(name: str) -> None:
    assert "weights" not in {value.name for value in get(name).arguments}


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_stored_tensor_and_setting_is_an_argument(name: str) -> None:
    family = get(name)
    declared = {value.name for value in family.arguments}
    for recipe in family.recipes:
        assert set(recipe.inputs) | set(recipe.weights) | set(recipe.settings) <= declared


@pytest.mark.parametrize("name", [name for name in COMPONENTS if get(name).carried])
def test_a_component_that_is_fed_in_pieces_says_how_its_state_is_carried(name: str) -> None:
    family = get(name)
    assert family.carried.keys() <= {value.name for value in family.returns if not value.optional}
    assert set(family.carried.values()) <= {value.name for value in family.arguments}
    chunked = [recipe for recipe in family.recipes if "component.chunks" in recipe.claims]
    assert chunked
    assert not any(recipe.settings.get("bidirectional") or "lengths" in recipe.inputs for recipe in chunked)
