"""What a case adds that is fed in segments to a model with a memory: `segments.logits` and, where asked for, gradients.

The oracle is fed the recipe's segments one after the other and hands its memory on.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch

from conformance.golden.common import GoldenError
from conformance.implementations import reference

if TYPE_CHECKING:
    from conformance.golden.model import Derivation

LOGITS = "segments.logits"


def logits_of(oracle: Any, segments: tuple[int, ...]) -> Any:
    """The oracle's logits of all segments, as a function of `input_ids`."""
    return functools.partial(oracle.segments, lengths=list(segments))


def derive(derivation: "Derivation") -> None:
    """Add what is expected of the segments.

    Raises: GoldenError if they are not the whole sequence, or oracle and reference differ at any value.
    """
    recipe = derivation.recipe
    if sum(recipe.segments) != recipe.seq:
        raise GoldenError(f"{recipe.name}: segments of {recipe.segments} tokens do not make up seq={recipe.seq}")
    lengths = list(recipe.segments)
    derivation.inputs["segments"] = torch.tensor(lengths)
    oracle: Any = derivation.oracle
    truth = oracle.segments(derivation.ids, lengths)
    ours = reference.segments(derivation.config, derivation.weights, derivation.ids, lengths)
    derivation.agree("segments", LOGITS, ours, truth)
    derivation.expected[LOGITS] = truth
    derivation.measure_noise("segments", truth, functools.partial(logits_of, segments=recipe.segments))
    if "segment_gradients" in recipe.store:
        _gradients(derivation, lengths)


def _gradients(derivation: "Derivation", lengths: list[int]) -> None:
    """The last segment's loss and gradients, the segments before it being memory."""
    arguments = (derivation.config, derivation.weights, derivation.ids, lengths)
    our_loss, ours = reference.last_loss_and_gradients(*arguments)
    oracle: Any = derivation.oracle
    loss, gradients = oracle.last_loss_and_gradients(derivation.ids, lengths)
    derivation.agree("segment loss", "the last segment's loss", our_loss, loss)
    derivation.agree_gradients("segment gradients", ours, gradients)
    derivation.expected |= {f"segments.gradient.{name}": gradient for name, gradient in gradients.items()}
