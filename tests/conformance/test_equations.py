"""The papers' equations as loops agree with torch.nn wherever both decide, in values and in gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import ComponentRecipe, get
from conformance.golden.component import draw
from conformance.oracles import torch_recurrent
from conformance.oracles.equations import attention, recurrent
from conformance.oracles.true_double import TrueDouble

RECIPES = [
    recipe
    for family in ("rnn", "lstm", "gru")
    for recipe in get(family).recipes
    if recipe.settings.get("reset_after", True)
]


def doubles(recipe: ComponentRecipe) -> dict[str, Tensor]:
    tensors = {**draw(recipe, "inputs"), **draw(recipe, "weights")}
    return {n: t.double().requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}


def run(oracle: Any, recipe: ComponentRecipe) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns, and the gradients of the sum of their squares."""
    tensors = doubles(recipe)
    with TrueDouble():
        found = getattr(oracle, recipe.name.split("/")[0])(tensors, recipe.settings)
        sum(found[name].square().sum() for name in ("output", "h_n")).backward()
    return found, {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_loops_agree_with_torch_nn(recipe: ComponentRecipe) -> None:
    (loops, loop_gradients), (library, library_gradients) = run(recurrent, recipe), run(torch_recurrent, recipe)
    assert library.keys() <= loops.keys()
    assert library_gradients.keys() == loop_gradients.keys()
    for name in library:
        torch.testing.assert_close(loops[name], library[name], rtol=0, atol=1e-12)
    for name in library_gradients:
        torch.testing.assert_close(loop_gradients[name], library_gradients[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_gates_explain_the_states(kind: str) -> None:
    """The gates that torch.nn does not return give back the states that it does return."""
    recipe = next(r for r in get(kind).recipes if r.name == f"{kind}/lengths")
    tensors = doubles(recipe)
    found = getattr(torch_recurrent, kind)(tensors, recipe.settings)
    for b, length in enumerate(tensors["lengths"].tolist()):
        h, c = tensors["h0"][0, b], tensors["c0"][0, b] if kind == "lstm" else None
        for t in range(length):
            gate = {name: value[b, t] for name, value in found.items() if name.endswith("_gate")}
            if kind == "lstm":
                c = gate["forget_gate"] * c + gate["input_gate"] * gate["cell_gate"]
                h = gate["output_gate"] * c.tanh()
            else:
                h = (1 - gate["update_gate"]) * gate["new_gate"] + gate["update_gate"] * h
            torch.testing.assert_close(found["output"][b, t], h, rtol=0, atol=1e-14)
        assert all(not value[b, length:].any() for name, value in found.items() if name.endswith("_gate"))


def test_gru_forms_agree_where_the_reset_gate_is_one() -> None:
    recipe = next(r for r in get("gru").recipes if r.name == "gru/plain")
    tensors = doubles(recipe)
    open_gate = torch.zeros(18, dtype=torch.float64)
    open_gate[:6] = 100.0  # r = σ(100 + …) is 1 to the last digit
    tensors["bias_ih_l0"] = tensors["bias_ih_l0"] + open_gate
    after, before = (recurrent.gru(tensors, {**recipe.settings, "reset_after": form}) for form in (True, False))
    torch.testing.assert_close(after["output"], before["output"], rtol=0, atol=1e-14)


def test_additive_attention_of_equal_energies_is_the_mean_of_the_real_annotations() -> None:
    tensors = {
        "query": torch.ones(1, 2, dtype=torch.float64),
        "memory": torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]], dtype=torch.float64),
        "query_weight": torch.ones(3, 2, dtype=torch.float64),
        "memory_weight": torch.zeros(3, 2, dtype=torch.float64),
        "score_vector": torch.ones(3, dtype=torch.float64),
        "source_mask": torch.tensor([[True, True, False]]),
    }
    found = attention.additive(tensors, {})
    assert found["context"].tolist() == [[2.0, 4.0]]
    assert found["attention_weights"].tolist() == [[0.5, 0.5, 0.0]]


def test_luong_dot_score_agrees_with_torchs_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    query, memory = (torch.randn(2, n, 4, dtype=torch.float64, generator=generator) for n in (3, 5))
    identity = torch.cat([torch.eye(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)], dim=1)
    found = attention.luong({"query": query, "memory": memory, "attentional_weight": identity}, {"score": "dot"})
    context = torch.nn.functional.scaled_dot_product_attention(query, memory, memory, scale=1.0)
    torch.testing.assert_close(found["context"], context, rtol=0, atol=1e-14)
    torch.testing.assert_close(found["attentional"], context.tanh(), rtol=0, atol=1e-14)
