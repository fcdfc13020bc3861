"""What a golden case of a language model holds, derived from its recipe and the oracle.

Every value that is stored has been compared with the reference; the reference decides nothing.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from conformance import bounds, draws
from conformance.cases import forward_arguments
from conformance.families import Config, Family, Recipe, get
from conformance.golden import routing, segments
from conformance.golden.common import AGREEMENT, MOVEMENT, Derived, GoldenError
from conformance.implementation import vocabulary
from conformance.implementations import reference
from conformance.oracles import oracle_class
from conformance.suite.padding import padded


def draw_weights(family: Family, recipe: Recipe) -> dict[str, Tensor]:
    """The case's weights under hub names, float32."""
    shapes = family.tensor_shapes(recipe.config)
    return {
        name: draws.tensor(recipe.weights, family.copies.get(name, name), shapes[name], family.module_kinds)
        * _factor(recipe, name)
        for name in sorted(shapes)
    }


def _factor(recipe: Recipe, name: str) -> float:
    return math.prod(factor for ending, factor in recipe.scaled.items() if name.endswith(ending))


def draw_inputs(recipe: Recipe) -> dict[str, Tensor]:
    """Token ids (batch, seq), row lengths, junk ids for pads that no real token has, and positions that jump.

    An encoder–decoder model has ids, lengths and junk of its decoder too, and labels.  The ids are drawn, unless the
    recipe states them; a decoder's begin with `decoder_start_token_id`, and its labels are the ids one place later.
    """
    batch, seq = recipe.batch, recipe.seq

    def draw(what: str, low: int, high: int, seq: int) -> Tensor:
        return draws.integers(f"{recipe.name}/{what}", batch * seq, low, high).view(batch, seq)

    def tokens(prefix: str, vocab: int, seq: int, first: list[int]) -> dict[str, Tensor]:
        junk = max(2, vocab // 10)
        chosen = None if prefix else recipe.input_ids
        drawn = {"input_ids": torch.tensor(chosen) if chosen else draw(f"{prefix}input_ids", 0, vocab - junk - 1, seq)}
        if batch > 1:
            # all different, unsorted, the whole sequence and a single token among them
            drawn["lengths"] = torch.tensor([max(1, length) for length in first[:batch]])
            drawn["padding_ids"] = draw(f"{prefix}padding_ids", vocab - junk, vocab - 1, seq)
        return {prefix + name: tensor for name, tensor in drawn.items()}

    inputs = tokens("", recipe.config["vocab_size"], seq, [2 * seq // 3, seq, 1, seq // 3 + 1])
    if recipe.target is not None:
        target = recipe.target
        inputs |= tokens("decoder_", vocabulary(recipe.config), target, [target, 1, target // 3 + 1, 2 * target // 3])
        inputs["labels"] = inputs["decoder_input_ids"].roll(-1, dims=1)  # the last one is any token
        inputs["decoder_input_ids"][:, 0] = recipe.config["decoder_start_token_id"]
    if "positions" in recipe.store:
        longest = recipe.config[get(recipe.name.split("/")[0]).positions_key] // seq
        steps = draw("positions", 1, longest - 1, seq)
        steps[0, :2] = torch.tensor([0, 1])
        inputs["position_ids"] = steps.cumsum(-1)
    return inputs


def of_cut_sources(logits: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """Logits of each row with its source cut to its length, alone and so without padding."""
    ids, decoded = inputs["input_ids"], inputs["decoder_input_ids"]
    rows = enumerate(inputs["lengths"].tolist())
    return torch.cat([logits(input_ids=ids[r : r + 1, :n], decoder_input_ids=decoded[r : r + 1]) for r, n in rows])


def derive(recipe: Recipe) -> Derived:
    """Everything that the case holds.

    Raises: GoldenError if the case does not deserve to be a golden: oracle and reference differ at any value, the
    oracle differs from itself on padded batches, the case's field hardly moves the logits, or rounding could change
    which experts a token is sent to.
    """
    derivation = Derivation(recipe)
    derivation.logits()
    if "positions" in recipe.store:
        derivation.positions()
    if "loss" in recipe.store:
        derivation.loss_and_gradients()
    if "auxiliary" in recipe.store:
        derivation.auxiliary_losses()
    if recipe.last_rows is None:
        derivation.probes_and_blocks()
    if recipe.segments:
        segments.derive(derivation)
    if recipe.batch > 1:
        if recipe.target is not None:
            derivation.cut_sources()
        derivation.check_padding()
    movement = derivation.counterfactuals()
    provenance = {
        "oracle_error": derivation.noise,
        "agreement_with_reference": derivation.agreement,
        "movement": movement,
    } | ({"routing": derivation.routing} if derivation.routing else {})
    return Derived(derivation.weights, derivation.inputs, derivation.expected, provenance)


class Derivation:
    """One case in the making: what is expected, the oracle's noise, and how far the reference is from the oracle."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.config = recipe, recipe.config
        self.family: Family = get(recipe.name.split("/")[0])
        self.weights, self.inputs = draw_weights(self.family, recipe), draw_inputs(recipe)
        self.ids = self.inputs["input_ids"]
        self.arguments = forward_arguments(self.inputs)
        self.rows = slice(None) if recipe.last_rows is None else slice(-recipe.last_rows, None)
        self.oracle = oracle_class(self.family)(self.family, recipe.config, self.weights)
        self.truth = self.oracle.logits(**self.arguments)
        self.expected: dict[str, Tensor] = {}
        self.noise: dict[str, dict[str, dict[str, float]]] = {}
        self.agreement: dict[str, float] = {}
        self.routing: dict[str, Any] = {}
        # Where rounding may change the choice of experts, only what is claimed; elsewhere every dtype can be judged.
        self.routes = routing.has_router(self.family, recipe.config)
        self.dtypes = self._claimed(*recipe.claims) if self.routes else list(bounds.UNIT_ROUNDOFF)

    def agree(self, kind: str, what: str, ours: Tensor, oracles: Tensor, scale: bounds.Error | None = None) -> None:
        """Keep the largest difference between reference and oracle by kind of value."""
        error = bounds.measure(ours, oracles, scale).max
        if not error <= AGREEMENT:
            raise GoldenError(
                f"{self.recipe.name}: oracle and reference differ by {error:.1e} at {what}, wanted {AGREEMENT:g}"
            )
        self.agreement[kind] = max(self.agreement.get(kind, 0.0), error)

    def logits(self) -> None:
        self.expected["logits"] = self.truth[:, self.rows]
        self.agree("logits", "logits", reference.logits(self.config, self.weights, **self.arguments), self.truth)
        self.measure_noise("logits", self.truth)

    def measure_noise(self, what: str, truth: Tensor, logits: "Logits | None" = None) -> None:
        """Keep the oracle's own error in the working dtypes, of its logits or what else `logits` makes it compute."""
        self.noise[what] = measure_noise(
            self.family, self.config, self.weights, self.arguments, truth, self.dtypes, self.rows, logits or forward
        )

    def positions(self) -> None:
        arguments = self.arguments | {"position_ids": self.inputs["position_ids"]}
        truth = self.oracle.logits(**arguments)
        ours = reference.logits(self.config, self.weights, **arguments)
        self.agree("positions", "positions.logits", ours, truth)
        self.expected["positions.logits"] = truth

    def agree_gradients(self, kind: str, ours: dict[str, Tensor], oracles: dict[str, Tensor]) -> None:
        """Gradients share one scale over all parameters: a single parameter's may be zero."""
        if set(ours) != set(oracles):
            only = sorted(set(ours) ^ set(oracles))
            raise GoldenError(f"{self.recipe.name}: gradients for {only} on one side only")
        scale = bounds.magnitude(torch.cat([g.flatten() for g in oracles.values()]))
        for name, gradient in oracles.items():
            self.agree(kind, f"the gradient of {name}", ours[name], gradient, scale)

    def loss_and_gradients(self) -> None:
        labels = self.inputs.get("labels", self.ids)
        loss, gradients = self.oracle.loss_and_gradients(labels=labels, **self.arguments)
        our_loss, ours = reference.loss_and_gradients(self.config, self.weights, labels=labels, **self.arguments)
        self.agree("loss", "loss", our_loss, loss)
        self.agree_gradients("gradients", ours, gradients)
        self.expected["loss"] = loss
        if "gradients" in self.recipe.store:
            self.expected |= {f"gradient.{name}": gradient for name, gradient in gradients.items()}

    def auxiliary_losses(self) -> None:
        labels = self.inputs.get("labels", self.ids)
        losses = self.oracle.auxiliary_losses(labels=labels, **self.arguments)
        ours = reference.auxiliary_losses(self.config, self.weights, labels=labels, **self.arguments)
        for name, loss in losses.items():
            self.agree("auxiliary losses", name, ours[name], loss)
        self.expected |= losses

    def probes_and_blocks(self) -> None:
        theirs = self.oracle.probes(**self.arguments)
        ours = reference.probes(self.family, self.config, self.weights, **self.arguments)
        if missing := {spec.name for spec in self.family.probes(self.config)} - theirs.keys():
            raise GoldenError(f"{self.recipe.name}: the oracle shows no {', '.join(sorted(missing))}")
        for name, probe in theirs.items():
            self.agree("probes", name, ours[name], probe)
        self.routing = self._require_margins(self.config, self.weights, self.arguments, theirs, self.dtypes)
        if "probes" in self.recipe.store:
            self.expected |= {f"probe.{name}": probe for name, probe in theirs.items() if name != "logits"}
        if "blocks" in self.recipe.store:
            for layer, block in enumerate(self._blocks(theirs)):
                self._block(layer, *block)

    def _block(self, layer: int, config: Config, weights: dict[str, Tensor], ids: Tensor, block_input: Tensor) -> None:
        oracle, arguments = oracle_class(self.family)(self.family, config, weights), {"input_ids": ids}
        truth = oracle.logits(**arguments)
        self.agree("blocks", f"block {layer} alone", reference.logits(config, weights, **arguments), truth)
        self.expected |= {f"blocks.{layer}.input": block_input, f"blocks.{layer}.logits": truth}
        dtypes = self.dtypes
        if self.routes:
            dtypes = self._claimed("golden.blocks")
            self._require_margins(config, weights, arguments, oracle.probes(**arguments), dtypes)
        self.noise[f"blocks.{layer}"] = measure_noise(self.family, config, weights, arguments, truth, dtypes)

    def _claimed(self, *checks: str) -> list[str]:
        """The working dtypes in which one of the checks is claimed."""
        claimed = {dtype for check in checks for dtype in self.recipe.claims[check]}
        return [dtype for dtype in bounds.UNIT_ROUNDOFF if dtype in claimed]

    def _require_margins(
        self,
        config: Config,
        weights: dict[str, Tensor],
        arguments: dict[str, Tensor],
        probes: dict[str, Tensor],
        dtypes: list[str],
    ) -> dict[str, Any]:
        return routing.require_margins(self.recipe.name, self.family, config, weights, arguments, probes, dtypes)

    def _blocks(self, probes: dict[str, Tensor]) -> Iterator[tuple[Config, dict[str, Tensor], Tensor, Tensor]]:
        """One-layer checkpoints: (config, weights, ids, the block's input rounded to bfloat16, stored as float32)."""
        one_block = self.family.block_checkpoint
        if one_block is None:
            raise GoldenError(f"{self.recipe.name}: stores blocks, and {self.family.name} has no block_checkpoint")
        for layer in range(self.config[self.family.layers_key]):
            source = probes["embedding" if layer == 0 else f"layers.{layer - 1}.output"]
            block_input = source.to(torch.bfloat16).to(torch.float32)
            config, weights = one_block(self.config, self.weights, block_input, layer)
            ids = torch.arange(block_input.shape[0] * block_input.shape[1]).view(block_input.shape[:2])
            yield config, weights, ids, block_input

    def cut_sources(self) -> None:
        truth = of_cut_sources(self.oracle.logits, self.inputs)
        ours = of_cut_sources(reference.forward(self.config, self.weights), self.inputs)
        self.agree("logits", "logits of cut sources", ours, truth)
        self.expected["source_cut.logits"] = truth

    def check_padding(self) -> None:
        """The oracle's padded forwards must give the truth that the padding checks derive from rows without pads."""
        for side in ("left", "right"):
            if f"golden.{side}_padding" not in self.recipe.claims:
                continue
            batch = padded(self.inputs, self.expected.get("source_cut.logits", self.truth), side)
            real = batch.mask.bool()
            error = bounds.measure(self.oracle.logits(**batch.arguments)[real], batch.truth[real]).max
            if not error <= AGREEMENT:
                raise GoldenError(
                    f"{self.recipe.name}: the oracle padded on the {side} differs from its rows by {error:.1e}"
                )

    def counterfactuals(self) -> dict[str, float]:
        """Logits of each configuration that a mistaken candidate effectively runs; returns how far they are from the
        truth, by label.  Tensors that such a configuration does not know (an ignored bias) are left out.

        Of a case that is fed in segments, those of the segments too; what a mistake does not move is not stored then.
        """
        movement = {}
        for label, config in self.recipe.counterfactuals.items():
            known = self.family.tensor_shapes(config)
            weights = {name: weight for name, weight in self.weights.items() if name in known}
            oracle = oracle_class(self.family)(self.family, config, weights)
            wrong = {"logits": oracle.logits(**self.arguments)[:, self.rows]}
            if self.recipe.segments:
                wrong[segments.LOGITS] = segments.logits_of(oracle, self.recipe.segments)(self.ids)
            moved = {what: bounds.measure(values, self.expected[what]).max for what, values in wrong.items()}
            movement[label] = max(moved.values())
            if label == f"{self.recipe.field} ignored" and movement[label] < MOVEMENT:
                raise GoldenError(
                    f"{self.recipe.name}: ignoring {self.recipe.field} moves the logits by {movement[label]:.1e} only; "
                    f"a field case needs {MOVEMENT:g}; choose a value further from the default"
                )
            self.expected |= {
                f"counterfactual.{label}.{what}": values
                for what, values in wrong.items()
                if moved[what] > AGREEMENT or not self.recipe.segments
            }
        return movement


# An oracle -> its logits as a function of the arguments of a call.
Logits = Callable[[Any], Callable[..., Tensor]]


def forward(oracle: Any) -> Callable[..., Tensor]:
    """The logits of one full forward."""
    return oracle.logits  # type: ignore[no-any-return]


def measure_noise(
    family: Family,
    config: Config,
    weights: dict[str, Tensor],
    arguments: dict[str, Tensor],
    truth: Tensor,
    dtypes: Iterable[str] = tuple(bounds.UNIT_ROUNDOFF),
    rows: slice = slice(None),
    logits: Logits = forward,
) -> dict[str, Any]:
    """The oracle's own error in each of the dtypes: the largest over its kernels and over row by row.

    logits: what of the oracle is measured, a full forward unless told otherwise.
    Raises: GoldenError if an error is not finite (the case overflows the dtype).
    """
    noise = {}
    for name in dtypes:
        errors = []
        for kernel in family.oracle_kernels:
            model = oracle_class(family)(family, config, weights, dtype=getattr(torch, name), attention=kernel)
            call = logits(model)
            errors.append(bounds.measure(call(**arguments)[:, rows], truth[:, rows]))
            batch = len(arguments["input_ids"])
            if kernel == "eager" and batch > 1:
                alone = torch.cat([call(**{n: t[r : r + 1] for n, t in arguments.items()}) for r in range(batch)])
                errors.append(bounds.measure(alone[:, rows], truth[:, rows]))
        if not all(math.isfinite(error.max) and math.isfinite(error.rms) for error in errors):
            raise GoldenError(f"the oracle's error in {name} is not finite; draw smaller weights")
        noise[name] = {"max": max(e.max for e in errors), "rms": max(e.rms for e in errors)}
    return noise
