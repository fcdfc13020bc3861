"""The catalogue of mistakes: well-formed, every patch goes on and comes off, and what is called equivalent is."""

import contextlib
import re
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance import catalogue as texts
from conformance import mutation
from conformance.cases import Case, Manifest
from conformance.families import FAMILIES, Component, get
from conformance.implementation import load_checkpoint, precision
from conformance.mistakes import TOPICS, Mistake, Swap, catalogue, topic_mistakes
from conformance.mistakes.patching import Patch, StaleTarget, modules
from conformance.probes import VOCABULARY
from conformance.suite import checks
from reference_impl.nn import rotary, rotary_layouts

ALL = tuple(catalogue().values())
every = pytest.mark.parametrize("mistake", ALL, ids=[mistake.id for mistake in ALL])
MANIFEST = Manifest()
EQUIVALENT = [(mistake.id, family) for mistake in ALL for family in mistake.equivalent]


# --- entries ----------------------------------------------------------------------------------------------------------


def test_ids_are_unique() -> None:
    counts = Counter(mistake.id for topic in TOPICS for mistake in topic_mistakes(topic))
    assert [identifier for identifier, count in counts.items() if count > 1] == []


def test_ids_are_nobody_elses() -> None:
    """`explain` finds them behind families, cases, checks and probes."""
    assert catalogue().keys().isdisjoint({*FAMILIES, *MANIFEST.cases, *checks(), *VOCABULARY})


def test_there_are_two_hundred() -> None:
    assert len(ALL) >= 200


@every
def test_an_entry_is_whole(mistake: Mistake) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", mistake.id)
    for text in (mistake.what, mistake.why, mistake.shows, mistake.fix, *mistake.equivalent.values()):
        assert text.strip()
    assert mistake.seen
    assert mistake.swaps
    assert mistake.families
    assert len(set(mistake.families)) == len(mistake.families)
    assert set(mistake.families) <= set(FAMILIES)
    assert mistake.equivalent.keys() <= set(mistake.families)


@every
def test_the_checks_and_probes_that_an_entry_names_exist_in_its_families(mistake: Mistake) -> None:
    assert mistake.killed_by
    assert set(mistake.killed_by) <= checks().keys()
    assert set(mistake.touches) <= VOCABULARY.keys()
    for family in mistake.families:
        claimed = {claim.check for claim in MANIFEST.claims() if claim.family == family}
        assert claimed & set(mistake.killed_by), f"{family} claims none of {mistake.killed_by}"


def test_every_component_and_model_has_mistakes() -> None:
    assert {family for mistake in ALL for family in mistake.families} == set(FAMILIES)


# --- patches ----------------------------------------------------------------------------------------------------------


def everything() -> dict[tuple[str, str], Any]:
    """What every name of reference_impl refers to, in modules, tables and classes."""
    found: dict[tuple[str, str], Any] = {}
    for module in modules():
        for name, value in vars(module).items():
            found[module.__name__, name] = value
            inside = value if type(value) is dict and not name.startswith("__") else {}
            if isinstance(value, type) and value.__module__.startswith("reference_impl"):
                inside = vars(value)
            found |= {(f"{module.__name__}:{name}", str(key)): held for key, held in dict(inside).items()}
    return found


@every
def test_a_patch_goes_on_and_comes_off(mistake: Mistake) -> None:
    before = everything()
    with Patch(mistake):
        under = everything()
    after = everything()
    changed = [key for key in before if under[key] is not before[key]]
    assert changed
    assert [key for key in before if after.get(key) is not before[key]] == []
    assert after.keys() == before.keys()


def test_a_patch_comes_off_after_an_exception() -> None:
    right, under = rotary.rotate, Patch(catalogue()["rope-layout"])
    with contextlib.suppress(ZeroDivisionError), under:
        assert rotary.rotate is not right
        raise ZeroDivisionError
    assert rotary.rotate is right


def test_a_patch_reaches_names_that_were_imported_and_tables() -> None:
    from reference_impl.nn import cross_attention

    swapped = catalogue()["heads-split-by-view"]
    right = cross_attention.split_heads
    with Patch(swapped), Patch(catalogue()["rope-layout"]):
        assert cross_attention.split_heads is not right
        assert rotary_layouts.LAYOUTS["halves"] is rotary_layouts.rotate_interleaved
    assert rotary_layouts.LAYOUTS["halves"] is rotary.rotate


def test_patches_may_be_nested() -> None:
    patch, right = Patch(catalogue()["rope-layout"]), rotary.rotate
    with patch:
        with patch:
            pass
        assert rotary.rotate is not right
    assert rotary.rotate is right


def test_two_mistakes_are_made_one_on_top_of_the_other() -> None:
    x, cos, sin = torch.rand(1, 1, 2, 6), torch.rand(1, 2, 3), torch.rand(1, 2, 3)
    with Patch(catalogue()["rope-layout"], catalogue()["rope-sign"]):
        both = rotary.rotate(x, cos, sin)
    assert torch.equal(both, rotary_layouts.rotate_interleaved(x, cos, -sin))


@pytest.mark.parametrize(
    "target",
    [
        "reference_impl.nn.rotary:rotated",
        "reference_impl.nn.rotor:rotate",
        "reference_impl.nn.norm:RMSNorm.backward",
        "reference_impl.nn.norm:RMSNom.forward",
        "reference_impl.nn.norm:RMSNorm.parameters",
    ],
)
def test_a_target_that_is_gone_is_an_error_that_names_the_mistake(target: str) -> None:
    """An inherited method is not the class's own: swapping it there would change nothing that is restored."""
    stale = replace(catalogue()["rope-layout"], swaps=(Swap(target, lambda original: original),))
    with pytest.raises(StaleTarget, match=rf"mistake rope-layout: reference_impl has no {re.escape(target)}"):
        Patch(stale)


def test_all_of_reference_impl_is_imported_before_anything_is_swapped() -> None:
    assert {module.__name__ for module in modules()} == {
        name for name in sys.modules if name.split(".")[0] == "reference_impl"
    }


# --- equivalents ------------------------------------------------------------------------------------------------------
#
# The proofs are in the entries; here each is put to the test on weights and inputs that no golden has.


@pytest.mark.parametrize(("identifier", "family"), EQUIVALENT)
def test_an_equivalent_computes_the_same_of_other_weights_and_inputs(identifier: str, family: str) -> None:
    mistake = catalogue()[identifier]
    case = Case(mutation.ordered(mistake, family)[0].case, MANIFEST)
    case.read()
    right, wrong = (values(family, case, *mistakes) for mistakes in ((), (mistake,)))
    assert right.keys() == wrong.keys()
    for name, tensor in right.items():
        torch.testing.assert_close(wrong[name], tensor, rtol=1e-11, atol=1e-11)


def test_the_proof_would_see_a_difference() -> None:
    case = Case("llama/plain", MANIFEST)
    case.read()
    right, wrong = (values("llama", case, *mistakes) for mistakes in ((), (catalogue()["rope-layout"],)))
    assert all((right[name] - wrong[name]).abs().max() > 1e-3 for name in right)


def values(family: str, case: Case, *mistakes: Mistake) -> dict[str, Tensor]:
    """What the reference with some mistakes makes of the case's sizes filled with other numbers."""
    generator = torch.Generator().manual_seed(20)
    weights = {n: t * (1 + 0.5 * torch.rand(t.shape, generator=generator)) for n, t in case.weights.items()}
    implementation = mutation.mutant(*mistakes)
    if isinstance(get(family), Component):
        return component_values(implementation, case, weights, generator)
    candidate = load_checkpoint(implementation, case.config, weights, "float64", "cpu")
    arguments = {name: ids.roll(1, dims=-1) for name, ids in case.arguments.items()}
    lengths = torch.arange(len(case.ids)) % 4
    mask = (torch.arange(case.ids.shape[1]) >= lengths[:, None]).long()  # padding on the left
    masks = {"decoder_attention_mask" if case.source else "attention_mask": mask}
    found: dict[str, Tensor] = {}
    with precision("float64"):
        found["plain"] = candidate(**arguments).logits
        padded = candidate(**arguments, **masks).logits
        found["padded"] = padded[mask.bool()]
        if not case.source:
            labels = arguments["input_ids"]
            found["loss"] = candidate(**arguments, labels=labels).losses["loss"]
        session = candidate.session(**({"input_ids": arguments["input_ids"]} if case.source else {}))
        fed = arguments["decoder_input_ids" if case.source else "input_ids"]
        pieces = [session.feed(fed[:, :3]), session.feed(fed[:, 3:4]), session.feed(fed[:, 4:7])]
        found["fed"] = torch.cat(pieces, dim=1)
    return found


def component_values(implementation: Any, case: Case, weights: dict[str, Tensor], generator: Any) -> dict[str, Tensor]:
    from conformance.component import COMPARED, COTANGENT, ComponentCandidate

    candidate = ComponentCandidate(implementation, get(case.family), case, "float64", "cpu")
    inputs = {
        name: torch.rand(t.shape, generator=generator) - 0.5 if t.is_floating_point() else t
        for name, t in case.inputs.items()
        if not name.startswith((COTANGENT, COMPARED))
    }
    with precision("float64"):
        return candidate({name: t.double() if t.is_floating_point() else t for name, t in (weights | inputs).items()})


# --- texts ------------------------------------------------------------------------------------------------------------


def test_an_entry_is_explained() -> None:
    text = texts.explain("rope-layout")
    for part in ("What it does: Rotates neighbouring pairs", "Fix: ", "Seen in: ", "Killed by: ", "lmdeploy#2639"):
        assert part in text


def test_a_misspelt_entry_is_found_by_its_neighbour() -> None:
    with pytest.raises(KeyError, match="rope-layout"):
        texts.explain("rope-layot")


def test_mistakes_are_listed() -> None:
    rows = dict(texts.mistakes())
    assert rows.keys() == catalogue().keys()
    assert rows["gqa-tile"].startswith("Tiles the key-value heads")
