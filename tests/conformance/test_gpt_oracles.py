"""The oracles of GPT, GPT-2 and GPT-3 say what the equations say, whatever is done to the library's models.

The probes are checked by the equations that lead from one to the next, written out here; what is compared with the
reference value by value is in the goldens.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.bounds import measure
from conformance.families import Recipe, get
from conformance.golden.model import draw_inputs, draw_weights
from conformance.oracles import oracle_class

transformers = pytest.importorskip("transformers")

from conformance.oracles.gpt import EXACT_GELU  # noqa: E402
from conformance.oracles.hugging_face import HuggingFace  # noqa: E402

NAMES = ("gpt", "gpt2", "gpt3")
RECIPES = {recipe.name: recipe for name in NAMES for recipe in get(name).recipes}
AGREEMENT = 1e-12

every_family = pytest.mark.parametrize("family", NAMES)


def family_of(recipe: Recipe) -> Any:
    return get(recipe.name.split("/")[0])


def oracle(recipe: Recipe, config: dict[str, Any] | None = None, **options: Any) -> HuggingFace:
    family = family_of(recipe)
    return oracle_class(family)(family, config or recipe.config, draw_weights(family, recipe), **options)


def ids_of(recipe: Recipe) -> Tensor:
    return draw_inputs(recipe)["input_ids"]


def error(got: Tensor, truth: Tensor) -> float:
    return measure(got, truth).max


class Probed:
    """Probes and weights of a family's `distinct` case, with what the equations need to lead from one to the next."""

    def __init__(self, family: str):
        self.recipe = RECIPES[f"{family}/distinct"]
        self.weights = {n: t.double() for n, t in draw_weights(get(family), self.recipe).items()}
        self.probes = oracle(self.recipe).probes(ids_of(self.recipe))
        self.eps = self.recipe.config["layer_norm_epsilon"]

    def linear(self, module: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"transformer.{module}.weight"] + self.weights[f"transformer.{module}.bias"]

    def norm(self, module: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return unit * self.weights[f"transformer.{module}.weight"] + self.weights[f"transformer.{module}.bias"]

    def check(self, name: str, expected: Tensor) -> None:
        assert error(self.probes[name], expected.reshape(self.probes[name].shape)) < AGREEMENT, name


@pytest.fixture(scope="module", params=NAMES)
def probed(request: Any) -> Probed:
    return Probed(request.param)


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())


# --- probes ---------------------------------------------------------------------------------------------------------


def test_embedding_is_token_plus_position(probed: Probed) -> None:
    token, place = ("tokens_embed", "positions_embed") if probed.recipe.name == "gpt/distinct" else ("wte", "wpe")
    tokens = probed.weights[f"transformer.{token}.weight"][ids_of(probed.recipe)]
    probed.check("embedding", tokens + probed.weights[f"transformer.{place}.weight"][: probed.recipe.seq])


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_probes_follow_from_each_other(probed: Probed, layer: int) -> None:
    p, config = probed.probes, probed.recipe.config
    a, block = f"layers.{layer}.attention.", f"h.{layer}."
    source = p["embedding"] if layer == 0 else p[f"layers.{layer - 1}.output"]
    if a + "norm" in p:
        probed.check(a + "norm", probed.norm(block + "ln_1", source))
    joint = probed.linear(block + "attn.c_attn", p.get(a + "norm", source))
    batch, seq, heads = *source.shape[:2], config["n_head"]
    for part, name in zip(joint.chunk(3, dim=-1), ("query", "key", "value"), strict=True):
        probed.check(a + name, part.view(batch, seq, heads, -1).transpose(1, 2).contiguous())
    divisor = p[a + "query"].shape[-1] ** 0.5
    if config.get("scale_attn_by_inverse_layer_idx"):
        divisor *= layer + 1
    probed.check(a + "scores", torch.einsum("bhte,bhse->bhts", p[a + "query"], p[a + "key"]) / divisor)
    distance = torch.arange(seq)[:, None] - torch.arange(seq)
    pattern = config.get("attention_pattern", ["dense"])
    reach = config["window_size"] if pattern[layer % len(pattern)] == "banded" else seq
    hidden = (distance < 0) | (distance >= reach)
    probed.check(a + "weights", p[a + "scores"].masked_fill(hidden, -torch.inf).softmax(-1))
    probed.check(a + "context", torch.einsum("bhts,bhse->bthe", p[a + "weights"], p[a + "value"]))
    probed.check(a + "output", probed.linear(block + "attn.c_proj", p[a + "context"].flatten(2)))
    probed.check(a + "residual", source + p[a + "output"])


@pytest.mark.parametrize("layer", [0, 1])
def test_feed_forward_probes_follow_from_each_other(probed: Probed, layer: int) -> None:
    p, block = probed.probes, f"h.{layer}."
    a, f = f"layers.{layer}.attention.", f"layers.{layer}.feed_forward."
    if probed.recipe.name == "gpt/distinct":
        probed.check(a + "output_norm", probed.norm(block + "ln_1", p[a + "residual"]))
        source = stream = p[a + "output_norm"]
    else:
        probed.check(f + "norm", probed.norm(block + "ln_2", p[a + "residual"]))
        source, stream = p[f + "norm"], p[a + "residual"]
    probed.check(f + "up", probed.linear(block + "mlp.c_fc", source))
    probed.check(f + "activation", gelu(p[f + "up"]))
    probed.check(f + "output", probed.linear(block + "mlp.c_proj", p[f + "activation"]))
    total = stream + p[f + "output"]
    if probed.recipe.name == "gpt/distinct":
        probed.check(f + "residual", total)
        total = probed.norm(block + "ln_2", total)
    probed.check(f"layers.{layer}.output", total)


def test_logits_are_the_last_output_through_the_tied_table(probed: Probed) -> None:
    last = probed.probes["layers.1.output"]
    if "final_norm" in probed.probes:
        probed.check("final_norm", probed.norm("ln_f", last))
        last = probed.probes["final_norm"]
    table = "tokens_embed" if probed.recipe.name == "gpt/distinct" else "wte"
    probed.check("logits", last @ probed.weights[f"transformer.{table}.weight"].T)
    assert probed.probes["logits"].equal(oracle(probed.recipe).logits(ids_of(probed.recipe)))


@every_family
def test_model_is_as_before_after_its_probes_were_taken(family: str) -> None:
    recipe = RECIPES[f"{family}/distinct"]
    model, ids = oracle(recipe), ids_of(recipe)
    before = model.logits(ids)
    model.probes(ids)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
    assert not any("_attn" in vars(m) for m in model.model.modules())
    assert model.logits(ids).equal(before)


# --- GPT ------------------------------------------------------------------------------------------------------------


def test_gelu_of_gpt_is_the_tanh_form_and_its_counterfactual_the_exact_one() -> None:
    recipe = RECIPES["gpt/plain"]
    ids, truth = ids_of(recipe), oracle(recipe).logits(ids_of(recipe))
    exact = oracle(recipe, recipe.config | {"afn": EXACT_GELU})
    assert [type(block.mlp.act).__name__ for block in exact.model.transformer.h] == ["GELU", "GELU"]
    assert 1e-5 < error(exact.logits(ids), truth) < 1e-2


# --- GPT-2 ----------------------------------------------------------------------------------------------------------


def test_scores_in_float32_are_not_another_truth() -> None:
    recipe = RECIPES["gpt2/reorder_and_upcast_attn"]
    ids = ids_of(recipe)
    ignored = oracle(recipe, recipe.config | {"reorder_and_upcast_attn": False}).logits(ids)
    assert oracle(recipe).logits(ids).equal(ignored)


def test_library_obeys_in_float16_what_it_cannot_obey_in_true_double() -> None:
    recipe = RECIPES["gpt2/reorder_and_upcast_attn"]
    ids = ids_of(recipe)
    assert oracle(recipe, dtype=torch.float16).logits(ids).isfinite().all()
    ignored = recipe.config | {"reorder_and_upcast_attn": False}
    assert not oracle(recipe, ignored, dtype=torch.float16).logits(ids).isfinite().all()


# --- GPT-3 ----------------------------------------------------------------------------------------------------------


def test_gpt_neo_with_every_block_dense_is_gpt_2() -> None:
    """A band as wide as the text hides nothing, so that the two models of the library must agree."""
    recipe = RECIPES["gpt3/dense"]
    wide = recipe.config | {"attention_pattern": ["banded"], "window_size": recipe.seq}
    dense, banded = oracle(recipe), oracle(recipe, wide)
    assert type(dense.model) is transformers.GPT2LMHeadModel
    assert isinstance(banded.model, transformers.GPTNeoForCausalLM)
    ids = ids_of(recipe)
    assert error(banded.logits(ids), dense.logits(ids)) < AGREEMENT


def test_gradients_of_gpt_neo_are_those_of_gpt_2() -> None:
    recipe = RECIPES["gpt3/dense"]
    wide = recipe.config | {"attention_pattern": ["banded"], "window_size": recipe.seq}
    (loss, gradients), (same_loss, same) = (
        oracle(recipe, config).loss_and_gradients(ids_of(recipe)) for config in (recipe.config, wide)
    )
    assert error(same_loss, loss) < AGREEMENT
    assert set(same) == set(gradients) == set(get("gpt3").tensor_shapes(recipe.config))
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert max((same[n] - gradients[n]).abs().max().item() for n in gradients) < AGREEMENT * largest


@pytest.mark.parametrize(("changed", "moved"), [(2, range(2, 7)), (8, range(8, 13)), (12, range(12, 13))])
def test_a_banded_block_shows_a_token_to_window_size_queries(changed: int, moved: range) -> None:
    """One banded block, so that nothing reaches further through a second one: 5 queries see the token, itself one."""
    recipe = RECIPES["gpt3/plain"]
    weights = {n: t for n, t in draw_weights(get("gpt3"), recipe).items() if ".h.1." not in n and ".h.2." not in n}
    config = recipe.config | {"n_layer": 1, "attention_pattern": ["banded"]}
    model = oracle_class(get("gpt3"))(get("gpt3"), config, weights)
    ids = ids_of(recipe)
    other = ids.clone()
    other[:, changed] = (other[:, changed] + 1) % 30
    rows = (model.logits(other) - model.logits(ids)).abs().amax(dim=(0, 2)).nonzero().flatten()
    assert rows.tolist() == list(moved)
