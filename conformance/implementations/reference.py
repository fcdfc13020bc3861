"""`reference_impl` as a candidate, and as the supplier of probes that a golden does not store."""

import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from conformance.component import WEIGHTS, flat
from conformance.families import FAMILIES, get
from conformance.oracles.true_double import TrueDouble
from conformance.probes import at_module_boundaries, canonical

if TYPE_CHECKING:
    from conformance.families import Component, Config, Family


class Reference:
    """This project's own models, loaded from the checkpoint directory.

    attention: "eager" writes attention out, "sdpa" uses torch's fused kernel.
    """

    families = frozenset(FAMILIES)

    def __init__(self, attention: Literal["eager", "sdpa"]):
        self.attention = attention
        self.name = f"reference_impl, {attention}"

    def load(self, checkpoint: Any) -> Any:
        from reference_impl.checkpoint import load_model

        if name := checkpoint.config.get("component"):
            return self._component(name, checkpoint)
        return Model(
            load_model(checkpoint.path, dtype=checkpoint.dtype, device=checkpoint.device, attention=self.attention)
        )

    def _component(self, name: str, checkpoint: Any) -> Any:
        return lambda **arguments: component(get(name), arguments, checkpoint.config)


class Model:
    """A model of `reference_impl` behind the contract, with its loss."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.session = model, model.session
        self.parameters = dict(model.named_parameters())

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        from reference_impl.nn.loss import next_token_loss

        logits = self.model(input_ids, attention_mask, position_ids)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": next_token_loss(logits, labels)}


def build(config: "Config", weights: dict[str, Tensor]) -> torch.nn.Module:
    """The reference model with these weights, in float64, written-out attention."""
    from conformance.implementation import Checkpoint

    model: torch.nn.Module = (
        Reference("eager").load(Checkpoint(config, weights, torch.float64, torch.device("cpu"))).model
    )
    return model


def logits(
    config: "Config", weights: dict[str, Tensor], input_ids: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """The reference's float64 logits."""
    model = build(config, weights)
    with TrueDouble(), torch.no_grad():
        return model(input_ids, position_ids=position_ids)  # type: ignore[no-any-return]


def probes(family: "Family", config: "Config", weights: dict[str, Tensor], input_ids: Tensor) -> dict[str, Tensor]:
    """Every probe of the family from the reference, in canonical axes, float64."""
    inside = {probe: (path, "output") for probe, (path, _) in family.kernel_probes(config).items()}
    where = family.module_probes(config) | inside
    model = build(config, weights)
    with TrueDouble(), torch.no_grad(), at_module_boundaries(model, where) as found:
        model(input_ids)
    return canonical(family, config, found, *input_ids.shape)


def loss_and_gradients(
    config: "Config", weights: dict[str, Tensor], input_ids: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean next-token cross-entropy and its gradient for every parameter by hub name, float64."""
    from reference_impl.nn.loss import next_token_loss

    model = build(config, weights).requires_grad_(True)
    with TrueDouble():
        loss = next_token_loss(model(input_ids), input_ids)
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def component(family: "Component", tensors: dict[str, Tensor], settings: "Config") -> dict[str, Tensor]:
    """The returns of the reference's function for a component, by name, in the dtype of the tensors."""
    module, _, function = family.reference.partition(":")
    found = getattr(import_module(module), function)
    weights = {name: tensor for name, tensor in tensors.items() if name in family.weights}
    arguments = {WEIGHTS: weights, **settings, **tensors}
    declared = inspect.signature(found).parameters
    returned = found(**{name: value for name, value in arguments.items() if name in declared})
    if hasattr(returned, "named"):
        returned = returned.named()
    elif hasattr(returned, "_asdict"):
        returned = returned._asdict()
    if isinstance(returned, dict):
        return returned
    names = [value.name for value in family.returns if not value.optional]
    return dict(zip(names, flat(returned), strict=True))


IMPLEMENTATIONS = {"reference": Reference("eager"), "reference-sdpa": Reference("sdpa")}
