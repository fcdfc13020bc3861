"""`reference_impl` as a candidate, and as the supplier of probes that a golden does not store."""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from conformance.component import WEIGHTS, flat
from conformance.families import FAMILIES, get
from conformance.implementation import Unsupported
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
        self.pipelines: dict[int, Any] = {}  # their processes serve all checkpoints

    def load(self, checkpoint: Any) -> Any:
        from reference_impl.checkpoint import load_model

        if name := checkpoint.config.get("component"):
            return self._component(name, checkpoint)
        if "tokenizer" in checkpoint.config:
            return self._tokenizer(checkpoint)
        model = adapted(
            load_model(checkpoint.path, dtype=checkpoint.dtype, device=checkpoint.device, attention=self.attention)
        )
        if isinstance(model, Model):
            model.partitioned = lambda stages: self._pipeline(stages).load(checkpoint)
        return model

    def _pipeline(self, stages: int) -> Any:
        from conformance.implementations.partition import pipeline

        if stages not in self.pipelines:
            self.pipelines[stages] = pipeline(stages, self.attention)
        return self.pipelines[stages]

    def _tokenizer(self, checkpoint: Any) -> Any:
        from reference_impl.tokenizer import load_tokenizer

        if (checkpoint.path / "tokenizer.model").exists() and find_spec("sentencepiece") is None:
            raise Unsupported("reading tokenizer.model needs the `tokenizer` extra: sentencepiece and protobuf")
        return load_tokenizer(checkpoint.path)

    def _component(self, name: str, checkpoint: Any) -> Any:
        return lambda **arguments: component(get(name), arguments, checkpoint.config)


def adapted(model: torch.nn.Module) -> "Model | EncoderDecoderModel | SegmentModel":
    """A model of `reference_impl` behind the contract."""
    declared = inspect.signature(model.forward).parameters
    if "memory" in declared:
        return SegmentModel(model)
    return EncoderDecoderModel(model) if "decoder_input_ids" in declared else Model(model)


class Model:
    """A decoder-only model behind the contract, with its loss."""

    partitioned: Callable[[int], Any]

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

        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return (
            {"logits": self.model(**arguments)}
            if labels is None
            else with_losses(self.model, arguments, labels, next_token_loss)
        )

    def packed(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        from reference_impl.packing import packed

        return packed(self.model, input_ids, lengths)

    def greedy(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, stop_token: int | None
    ) -> list[list[int]]:
        from reference_impl.generation import generate

        prompts = [ids[real].tolist() for ids, real in zip(input_ids, attention_mask.bool(), strict=True)]
        stop_tokens = set() if stop_token is None else {stop_token}
        rows = generate(self.model, prompts, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
        return [row.ids for row in rows]


class EncoderDecoderModel:
    """An encoder–decoder model behind the contract, with its loss."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.session = model, model.session
        self.parameters = dict(model.named_parameters())

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        from reference_impl.nn.loss import token_loss

        arguments = {
            "input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
        }  # fmt: skip
        return (
            {"logits": self.model(**arguments)}
            if labels is None
            else with_losses(self.model, arguments, labels, token_loss)
        )


def with_losses(
    model: Any, arguments: dict[str, Tensor | None], labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Logits, their loss, and what the routers, if there are any, add to it, before the coefficients, by name."""
    from reference_impl.nn.moe import recorded_router_logits

    with recorded_router_logits(model) as router_logits:
        logits = model(**arguments)
    router_losses = model.router_losses(router_logits) if router_logits else {}
    return {"logits": logits, "loss": loss(logits, labels), **router_losses}


class SegmentModel:
    """A model with a memory of earlier segments, which knows neither padding nor positions, with its loss."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.session = model, model.session
        self.parameters = dict(model.named_parameters())

    def __call__(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        from reference_impl.nn.loss import next_token_loss

        logits = self.model(input_ids)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": next_token_loss(logits, labels)}


def build(config: "Config", weights: dict[str, Tensor]) -> torch.nn.Module:
    """The reference model with these weights, in float64, written-out attention."""
    from conformance.implementation import Checkpoint

    model: torch.nn.Module = (
        Reference("eager").load(Checkpoint(config, weights, torch.float64, torch.device("cpu"))).model
    )
    return model


def forward(config: "Config", weights: dict[str, Tensor]) -> Callable[..., Tensor]:
    """The reference's float64 logits as a function of the contract's arguments."""
    model = build(config, weights)

    def call(**arguments: Tensor) -> Tensor:
        with TrueDouble(), torch.no_grad():
            return model(**arguments)  # type: ignore[no-any-return]

    return call


def logits(config: "Config", weights: dict[str, Tensor], input_ids: Tensor, **optional: Tensor) -> Tensor:
    """The reference's float64 logits."""
    return forward(config, weights)(input_ids=input_ids, **optional)


def probes(
    family: "Family", config: "Config", weights: dict[str, Tensor], input_ids: Tensor, **optional: Tensor
) -> dict[str, Tensor]:
    """Every probe of the family from the reference, in canonical axes, float64."""
    inside = {probe: (path, "output") for probe, (path, _) in family.kernel_probes(config).items()}
    where = family.module_probes(config) | inside
    model = build(config, weights)
    with TrueDouble(), torch.no_grad(), at_module_boundaries(model, where) as found:
        model(input_ids, **optional)
    return canonical(family, config, found, {"input_ids": input_ids, **optional})


def loss_and_gradients(
    config: "Config", weights: dict[str, Tensor], input_ids: Tensor, labels: Tensor | None = None, **optional: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference's loss and its gradient for every parameter by hub name, float64; labels as for the oracle."""
    model = build(config, weights).requires_grad_(True)
    with TrueDouble():
        loss = adapted(model)(input_ids, labels=input_ids if labels is None else labels, **optional)["loss"]
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def segments(config: "Config", weights: dict[str, Tensor], input_ids: Tensor, lengths: list[int]) -> Tensor:
    """The reference's float64 logits of all segments, fed one after the other."""
    session: Any = build(config, weights).session()  # type: ignore[operator]
    with TrueDouble(), torch.no_grad():
        return torch.cat([session.feed(segment) for segment in input_ids.split(lengths, dim=1)], dim=1)


def last_loss_and_gradients(
    config: "Config", weights: dict[str, Tensor], input_ids: Tensor, lengths: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the last segment after the others, all of them run with gradients, and its gradients, float64."""
    from reference_impl.nn.loss import next_token_loss

    model: Any = build(config, weights).requires_grad_(True)
    session = model.session()
    with TrueDouble():
        for segment in input_ids.split(lengths, dim=1):
            loss = next_token_loss(session.feed(segment), segment)
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def auxiliary_losses(
    config: "Config", weights: dict[str, Tensor], input_ids: Tensor, labels: Tensor, **optional: Tensor
) -> dict[str, Tensor]:
    """What the reference's routers add to its loss, before the coefficients, by name, float64."""
    with TrueDouble(), torch.no_grad():
        returned = adapted(build(config, weights))(input_ids, labels=labels, **optional)
    return {name: value for name, value in returned.items() if name not in ("logits", "loss")}


def tokenizer(config: "Config", files: dict[str, bytes]) -> Any:
    """The reference's tokenizer of these files."""
    from conformance.implementation import Checkpoint

    return Reference("eager").load(
        Checkpoint({"tokenizer": "", **config}, {}, torch.float32, torch.device("cpu"), files)
    )


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
