"""What the library fuses in memory is judged under the names and in the layout of the checkpoint."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import get
from conformance.golden.model import draw_inputs, draw_weights
from conformance.implementation import Checkpoint
from conformance.oracles.true_double import TrueDouble

transformers = pytest.importorskip("transformers")

from conformance.implementations.hf import HuggingFaceModels  # noqa: E402
from conformance.oracles.mixtral import Mixtral  # noqa: E402

FAMILY = get("mixtral")
RECIPES = {recipe.name: recipe for recipe in FAMILY.recipes}
DISTINCT, ELEVEN = RECIPES["mixtral/distinct"], RECIPES["mixtral/eleven-experts"]
WEIGHTS, IDS = draw_weights(FAMILY, DISTINCT), draw_inputs(DISTINCT)["input_ids"]


def oracle() -> Mixtral:
    return Mixtral(FAMILY, DISTINCT.config, WEIGHTS)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def expert(weights: dict[str, Tensor], layer: int, number: int, x: Tensor) -> Tensor:
    w1, w2, w3 = (
        weights[f"model.layers.{layer}.block_sparse_moe.experts.{number}.{name}.weight"].double()
        for name in ("w1", "w2", "w3")
    )
    return (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def test_probes_of_the_experts_follow_from_each_other() -> None:
    probes = oracle().probes(IDS)
    for layer in range(2):
        at = f"layers.{layer}.feed_forward."
        gate = WEIGHTS[f"model.layers.{layer}.block_sparse_moe.gate.weight"].double()
        close(probes[at + "router_logits"], probes[at + "norm"] @ gate.T)
        top = probes[at + "router_logits"].topk(2)
        close(probes[at + "routing_weights"], top.values.softmax(-1))
        every = torch.stack([expert(WEIGHTS, layer, e, probes[at + "norm"]) for e in range(5)], dim=2)
        chosen = every.gather(2, top.indices[..., None].expand(-1, -1, -1, every.shape[-1]))
        close(probes[at + "expert_outputs"], chosen)
        close(probes[at + "output"], (probes[at + "routing_weights"][..., None] * chosen).sum(2))


def test_gradients_have_hub_names_and_shapes_in_the_order_of_numbers() -> None:
    """With eleven experts, 10 would come before 2 among strings: expert by expert, they equal finite differences."""
    weights, ids = draw_weights(FAMILY, ELEVEN), draw_inputs(ELEVEN)["input_ids"]
    loss, gradients = Mixtral(FAMILY, ELEVEN.config, weights).loss_and_gradients(ids)
    assert {name: tuple(g.shape) for name, g in gradients.items()} == FAMILY.tensor_shapes(ELEVEN.config)
    step = 2.0**-12
    for number in (2, 10):
        for matrix in ("w1", "w2", "w3"):
            name = f"model.layers.1.block_sparse_moe.experts.{number}.{matrix}.weight"
            moved = weights | {name: (weights[name].double() + step * gradients[name])}
            changed, _ = Mixtral(FAMILY, ELEVEN.config, moved).loss_and_gradients(ids)
            expected = step * gradients[name].square().sum()
            assert (changed - loss).item() == pytest.approx(expected.item(), rel=1e-2)


def load() -> Any:
    with TrueDouble():
        return HuggingFaceModels("eager").load(Checkpoint(DISTINCT.config, WEIGHTS, torch.float64, torch.device("cpu")))


def test_hub_parameters_of_the_candidate_receive_the_gradients_that_the_oracle_has() -> None:
    model = load()
    assert {n: tuple(p.shape) for n, p in model.parameters.items()} == FAMILY.tensor_shapes(DISTINCT.config)
    _, gradients = oracle().loss_and_gradients(IDS)
    for _ in range(2):  # the second time they must not add up
        for parameter in model.parameters.values():
            parameter.grad = None
        with TrueDouble():
            model(IDS, labels=IDS).loss.backward()
        for name, gradient in gradients.items():
            close(model.parameters[name].grad, gradient)


def test_load_balancing_loss_is_the_librarys() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from reference_impl.nn.moe import load_balancing_loss

    probes = oracle().probes(IDS)
    logits = [probes[f"layers.{layer}.feed_forward.router_logits"] for layer in range(2)]
    real = torch.arange(11) < draw_inputs(DISTINCT)["lengths"][:, None]
    flat = tuple(layer.flatten(0, 1) for layer in logits)
    with TrueDouble():
        close(load_balancing_loss(logits, 2), load_balancing_loss_func(flat, 5, 2))
        close(load_balancing_loss(logits, 2, real), load_balancing_loss_func(flat, 5, 2, real.long()))


def test_sessions_of_the_candidate_forget_what_the_window_hides_and_give_the_same() -> None:
    """DynamicCache made from the config keeps window - 1 = 4 keys of the 11."""
    model = load()
    truth = oracle().logits(IDS)
    with TrueDouble(), torch.no_grad():
        session = model.session()
        pieces = [session.feed(piece) for piece in IDS.split([7, 1, 3], dim=1)]
    close(torch.cat(pieces, dim=1), truth)
    assert session.state_bytes() == 2 * 2 * 4 * 3 * 4 * 14 * 8  # both, layers, batch, KV heads, keys, head_dim, float64
