"""The reference's caches give, call by call, what Hugging Face's caches give: dynamic, static, and both that slide."""

import pytest
import torch

from conformance.families import get
from conformance.golden.model import draw_inputs, draw_weights
from conformance.implementations import reference
from conformance.oracles.true_double import TrueDouble

transformers = pytest.importorskip("transformers")

from conformance.implementations.hf import cache_argument  # noqa: E402
from conformance.oracles.hugging_face import HuggingFace, real_positions  # noqa: E402
from conformance.oracles.mixtral import Mixtral  # noqa: E402

# 17 tokens. With a window of 5: shorter, longer, as long, one by one, one large call and a rest.
PLANS = [(17,), (1,) * 17, (3, 1, 4, 9), (5, 5, 5, 2), (13, 1, 1, 1, 1), (2, 15)]
# Library's cache -> its layers' class with a window and without.
CACHES = {
    "dynamic": (lambda config: transformers.DynamicCache(), "DynamicLayer", "DynamicLayer"),
    "dynamic, sliding": (
        lambda config: transformers.DynamicCache(config=config), "DynamicSlidingWindowLayer", "DynamicLayer"
    ),
    "static": (
        lambda config: transformers.StaticCache(config=config, max_cache_len=17), "StaticSlidingWindowLayer",
        "StaticLayer",
    ),
}  # fmt: skip


def case(name):
    """Family, config, weights and ids of a small model with a window of 5 keys, or with none."""
    family = get(name)
    recipes = {recipe.name: recipe for recipe in family.recipes}
    recipe = recipes.get(f"{name}/window") or recipes[f"{name}/distinct"]
    config = recipe.config | ({} if name == "llama" else {"sliding_window": 5})
    ids = draw_inputs(recipe)["input_ids"]
    ids = torch.cat((ids, ids.flip(1)), dim=1)[:3, :17]
    assert ids.shape == (3, 17)
    return family, config, draw_weights(family, recipe), ids


def theirs(family, config, weights, make_cache, plan, ids, mask):
    """The library's logits of every call, joined, and the class of its cache's layers."""
    oracle = (Mixtral if family.name == "mixtral" else HuggingFace)(family, config, weights)
    cache, outputs, start = make_cache(oracle.model.config), [], 0
    with TrueDouble(), torch.no_grad():
        for size in plan:
            piece, seen = slice(start, start + size), mask[:, : start + size]
            outputs.append(oracle.model(
                ids[:, piece], attention_mask=seen, position_ids=real_positions(seen)[:, piece], use_cache=True,
                **{cache_argument(oracle.model): cache},
            ).logits)  # fmt: skip
            start += size
    return torch.cat(outputs, dim=1), {type(layer).__name__ for layer in cache.layers}


def ours(config, weights, plan, ids, mask):
    session, outputs, start = reference.build(config, weights).session(), [], 0
    with TrueDouble():
        for size in plan:
            outputs.append(session.feed(ids[:, start : start + size], mask[:, start : start + size]))
            start += size
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral"])
def test_every_call_gives_what_the_library_gives(family, cache, plan):
    family, config, weights, ids = case(family)
    make_cache, with_window, without = CACHES[cache]
    mask = torch.ones_like(ids)
    expected, layers = theirs(family, config, weights, make_cache, plan, ids, mask)
    assert layers == {without if family.name == "llama" else with_window}
    torch.testing.assert_close(ours(config, weights, plan, ids, mask), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_padded_on_the_left_do_too(family, cache):
    family, config, weights, ids = case(family)
    mask = (torch.arange(17) >= torch.tensor([[0], [6], [2]])).long()
    plan, real = (9, 1, 1, 1, 1, 1, 1, 1, 1), mask.bool()
    expected, _ = theirs(family, config, weights, CACHES[cache][0], plan, ids, mask)
    torch.testing.assert_close(ours(config, weights, plan, ids, mask)[real], expected[real], rtol=1e-11, atol=1e-11)
