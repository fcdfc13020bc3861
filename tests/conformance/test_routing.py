"""A case in which rounding could send a token to another expert is refused."""

import dataclasses

import pytest
import torch

from conformance.families import Recipe, get
from conformance.golden import GoldenError, routing
from conformance.golden.model import draw_inputs, draw_weights

pytest.importorskip("transformers")

from conformance.oracles.mixtral import Mixtral

MIXTRAL = get("mixtral")
RECIPES = {recipe.name: recipe for recipe in MIXTRAL.recipes}
ROUTERS = ["layers.0.feed_forward.router_logits", "layers.1.feed_forward.router_logits"]


def require(recipe: Recipe, *dtypes: str) -> dict[str, dict[str, object]]:
    weights, ids = draw_weights(MIXTRAL, recipe), draw_inputs(recipe)["input_ids"]
    truth = Mixtral(MIXTRAL, recipe.config, weights).probes(ids)
    return routing.require_margins(recipe.name, MIXTRAL, recipe.config, weights, {"input_ids": ids}, truth, dtypes)


def test_margin_is_the_smallest_gap_between_the_last_chosen_and_the_first_rejected() -> None:
    logits = torch.tensor([[[5.0, 1.0, 3.0, 2.5], [0.0, 9.0, -1.0, 8.0]]])
    truth = {"layers.0.feed_forward.router_logits": logits}
    for chosen, margin in ((1, 1.0), (2, 0.5), (3, 1.0)):
        truth["layers.0.feed_forward.routing_weights"] = torch.zeros(1, 2, chosen)
        assert routing.margins(truth) == {"layers.0.feed_forward.router_logits": margin}


@pytest.mark.parametrize("name", ["mixtral/plain", "mixtral/unbalanced"])
def test_chosen_token_ids_have_margins_that_suffice_with_a_quarter_to_spare(name: str) -> None:
    """The oracle's error is a little different on other machines."""
    found = require(RECIPES[name], "float32", "bfloat16", "float16")
    assert list(found["margin"]) == ROUTERS
    for errors in found["error"].values():
        for router, error in errors.items():
            assert found["margin"][router] > 1.25 * 10 * error > 0


def test_drawn_token_ids_are_refused_in_bfloat16_with_both_figures() -> None:
    plain = dataclasses.replace(RECIPES["mixtral/plain"], input_ids=None)
    with pytest.raises(GoldenError, match=r"mixtral/plain: two experts' logits differ by \S+ only at layers\.\d\.\S+, "
                       r"and are off by up to \S+ in bfloat16"):  # fmt: skip
        require(plain, "bfloat16")


def test_drawn_token_ids_are_accepted_in_float32() -> None:
    assert list(require(RECIPES["mixtral/distinct"], "float32")["error"]) == ["float32"]


def test_a_family_without_router_has_no_margins() -> None:
    assert routing.margins({"layers.0.feed_forward.gate": torch.zeros(1, 2, 3)}) == {}
    mistral = get("mistral")
    assert not routing.has_router(mistral, mistral.recipes[0].config)
    assert routing.has_router(MIXTRAL, RECIPES["mixtral/field-absent"].config)
