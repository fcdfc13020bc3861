"""The probe vocabulary: one name and one meaning for every intermediate tensor, shared by all families.

A probe is a tensor that a reader of the paper would name.  Families pick from this vocabulary (`ProbeSpec`
says which, in computational order, with axes and parents); `docs/probes.md` is generated from it.

An encoder–decoder model's probes begin with `encoder.` or `decoder.`; a decoder layer's `cross_attention` has the words
of `attention`, and its keys and values are projections of the encoder's output.  A recurrent decoder that attends
before it steps shows its first steps one by one, `decoder.steps.0.…`: each is computed from the one before.
"""

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from conformance.families import Config, Family

# So many steps of a recurrent decoder are shown one by one: the first begins with the initial state, the second with
# what the first left, and from then on they are alike.
PROBED_STEPS = 3

VOCABULARY: dict[str, str] = {
    "embedding": "what enters the first block: the looked-up rows of the embedding table (positions added, scaled, "
    "where the family does so)",
    "distances": "relative positions: the encodings of the distances 0, 1, …",
    "layers.N.norm": "normalised input of the block, where attention and feed-forward layer share it (parallel blocks)",
    "layers.N.attention.norm": "normalised input of the attention",
    "layers.N.attention.query": "query projection, bias included, before rotary positions",
    "layers.N.attention.key": "key projection, bias included, before rotary positions",
    "layers.N.attention.value": "value projection, bias included",
    "layers.N.attention.query_normed": "query, each head normalised on its own, before rotary positions",
    "layers.N.attention.key_normed": "key, each head normalised on its own, before rotary positions",
    "layers.N.attention.query_rotated": "query after rotary positions, as the score kernel receives it",
    "layers.N.attention.key_rotated": "key after rotary positions, one per key-value head (not repeated)",
    "layers.N.attention.distance_key": "relative positions: projection of the encodings of the distances 0, 1, …",
    "layers.N.attention.content_scores": "relative positions: scaled scores of what keys are, (q + u) · k, before any "
    "mask",
    "layers.N.attention.position_scores": "relative positions: scaled scores of where keys are, (q + v) · distance "
    "key, by key, 0 after the query",
    "layers.N.attention.scores": "scaled scores, position bias included, before any mask",
    "layers.N.attention.weights": "attention weights: softmax of the masked scores over the keys",
    "layers.N.attention.context": "weighted sum of the values, before the output projection",
    "layers.N.attention.output": "output projection of the context, bias included",
    "layers.N.attention.residual": "residual stream after the attention was added",
    "layers.N.attention.output_norm": "post-norm only: the residual stream after the attention was added, normalised",
    "layers.N.feed_forward.norm": "normalised input of the feed-forward layer",
    "layers.N.feed_forward.gate": "gate projection, before the activation",
    "layers.N.feed_forward.up": "up projection, bias included",
    "layers.N.feed_forward.activation": "activation function applied to the gate (to the up projection where there "
    "is no gate)",
    "layers.N.feed_forward.product": "activation times up, the input of the down projection",
    "layers.N.feed_forward.router_logits": "scores of all experts, before any softmax",
    "layers.N.feed_forward.routing_weights": "weights of the experts that a token is sent to, the heaviest first",
    "layers.N.feed_forward.expert_outputs": "what a token's experts return, the heaviest first, not weighted",
    "layers.N.feed_forward.output": "what the layer returns: the down projection, or the weighted sum of the experts",
    "layers.N.feed_forward.residual": "post-norm only: residual stream after the feed-forward was added",
    "layers.N.forward": "of a recurrent layer in two directions: states of the one that reads from left to right",
    "layers.N.backward": "states of the one that reads from right to left, each at the position that it read last",
    "layers.N.hidden": "hidden states of a recurrent layer, before its residual connection",
    "layers.N.output": "residual stream after the block; what a recurrent layer hands on",
    "initial_state": "state of a recurrent decoder before its first step",
    "steps.N.attention.scores": "energies of all source positions in step N of a recurrent decoder, before any mask",
    "steps.N.attention.weights": "attention weights of step N: softmax of the masked energies over the source",
    "steps.N.attention.context": "what step N reads of the source: the weighted sum of the annotations",
    "steps.N.state": "hidden state after step N, of the layer that attends",
    "pieces": "values that a maxout layer chooses from",
    "maxout": "what a maxout layer returns: the larger of each two neighbours",
    "final_norm": "normalised output of the last block: the input of the head, or what a decoder attends to",
    "head_scores": "adaptive softmax: scores of the first cluster's tokens and, after them, of the other clusters",
    "logits": "scores over the vocabulary, before any softmax; of an adaptive softmax, log-probabilities",
}


def word(probe: str) -> str:
    """The vocabulary's name of a probe: of `decoder.layers.3.cross_attention.key` it is `layers.N.attention.key`.

    Raises: KeyError if it has none.
    """
    name = re.sub(r"^(encoder|decoder)\.", "", probe)
    name = re.sub(r"^(layers|steps)\.(\d+|N)\.(cross_(?=attention\.))?", r"\1.N.", name)
    if name not in VOCABULARY:
        raise KeyError(f"{probe} is not in the vocabulary of probes")
    return name


def any_layer(probe: str) -> str:
    """The probe's name with N for the number of its layer or step."""
    return re.sub(r"(^|\.)(layers|steps)\.\d+\.", r"\1\2.N.", probe)


def step_of(probe: str) -> int | None:
    """The step of a recurrent decoder that the probe belongs to alone; None if it belongs to none, or to all."""
    found = re.search(r"(^|\.)steps\.(\d+)\.", probe)
    return None if found is None else int(found[2])


@dataclass(frozen=True, kw_only=True)
class ProbeSpec:
    """One probe of one model: where it stands in the computation and how its values are laid out.

    name: a name of the vocabulary, N replaced by the layer.
    axes: names of its dimensions in canonical order, the last one contiguous.  Axes are as fine as any layout
        may split them (`group` is the query heads that share one key-value head).
    parents: the probes it is computed from; they make the graph in which a fault is localised.
    """

    name: str
    axes: tuple[str, ...]
    parents: tuple[str, ...]


@contextlib.contextmanager
def at_module_boundaries(model: "Module", where: dict[str, tuple[str, str]]) -> "Iterator[dict[str, Tensor]]":
    """Collect the probes that module boundaries show while the context is open; values are copied as they pass.

    where: probe -> (module path, "input" or "output"); "path[2]" is the third call of a module that is called step by
        step, a path alone the last one.
    """
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def keep(probe: str, number: str, value: Any) -> None:
        calls[probe] = calls.get(probe, -1) + 1
        if number in ("", str(calls[probe])):
            value = getattr(value, "logits", value)  # what a whole model returns
            found[probe] = (value[0] if isinstance(value, tuple) else value).detach().clone()

    handles = []
    for probe, (place, side) in where.items():
        path, _, number = place.removesuffix("]").partition("[")
        keep_it, module = functools.partial(keep, probe, number), modules[path]
        if side == "input":
            handles.append(module.register_forward_pre_hook(lambda _m, args, keep=keep_it: keep(args[0])))
        else:
            handles.append(module.register_forward_hook(lambda _m, _args, out, keep=keep_it: keep(out)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def axis_sizes(family: "Family", config: "Config", arguments: "Mapping[str, Any]") -> dict[str, int]:
    """Size of every axis that the probes name, in a call of the model."""
    batch, length = arguments["input_ids"].shape
    if not family.encoder_decoder:
        return family.probe_sizes(config, batch, length)
    return family.probe_sizes(config, batch, arguments["decoder_input_ids"].shape[1], length)


def canonical(
    family: "Family", config: "Config", values: "dict[str, Tensor]", arguments: "Mapping[str, Any]"
) -> "dict[str, Tensor]":
    """Bring the collected probes into canonical order and axes (merged heads are split), float64 on the CPU.

    arguments: what the model was called with; its ids say how long the sequences are.
    """
    sizes = axis_sizes(family, config, arguments)
    return {
        spec.name: values[spec.name].reshape([sizes[axis] for axis in spec.axes]).double().cpu()
        for spec in family.probes(config)
        if spec.name in values
    }
