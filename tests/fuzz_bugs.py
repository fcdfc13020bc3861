"""The reference with mistakes that only some configurations show; `conformance fuzz` must find every one of them.

    conformance fuzz fuzz_bugs:window_off_by_one --family mistral

Each runs another configuration than it was given, in the cases that its function says.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

from conformance.implementation import Checkpoint
from conformance.implementations.reference import Reference

Config = dict[str, Any]


class Misread(Reference):
    """Reads config.json wrongly: `misread` gives the keys that it takes for others."""

    def __init__(self, misread: Callable[[Config], Config]):
        super().__init__("eager")
        self.name, self.misread = misread.__name__, misread

    def load(self, checkpoint: Any) -> Any:
        config = checkpoint.config | self.misread(checkpoint.config)
        return super().load(Checkpoint(config, checkpoint.tensors(), checkpoint.dtype, checkpoint.device))


def rope(config: Config, **changes: Any) -> Config:
    """Other rotary parameters, in both spellings."""
    both = {"rope_parameters": config["rope_parameters"] | changes}
    if config["rope_scaling"] is not None:
        both["rope_scaling"] = config["rope_scaling"] | changes
    return both


@Misread
def window_off_by_one(config: Config) -> Config:
    return {"sliding_window": config["sliding_window"] + 1} if config["sliding_window"] else {}


@Misread
def long_window_ignored(config: Config) -> Config:
    return {"sliding_window": None} if (config["sliding_window"] or 0) > 10 else {}


@Misread
def one_expert_fewer(config: Config) -> Config:
    chosen = config["num_experts_per_tok"]
    return {"num_experts_per_tok": chosen - 1} if chosen > 3 else {}


@Misread
def layer_scale_ignored(config: Config) -> Config:
    return {"scale_attn_by_inverse_layer_idx": False}


@Misread
def scale_forgotten_with_layer_scale(config: Config) -> Config:
    return {"scale_attn_weights": True} if config["scale_attn_by_inverse_layer_idx"] else {}


@Misread
def small_epsilon_raised(config: Config) -> Config:
    return {"rms_norm_eps": max(1e-5, config["rms_norm_eps"])}


@Misread
def low_frequencies_at_their_default(config: Config) -> Config:
    scaled = config["rope_parameters"]["rope_type"] == "llama3"
    return rope(config, low_freq_factor=1.0) if scaled else {}


@Misread
def pattern_not_repeated(config: Config) -> Config:
    pattern = config["attention_pattern"]
    return {"attention_pattern": [*pattern, *["dense"] * config["n_layer"]]}


@Misread
def decoder_heads_of_the_encoder(config: Config) -> Config:
    return {"decoder_attention_heads": config["encoder_attention_heads"]}


@Misread
def unscaled_when_not_shared(config: Config) -> Config:
    return {} if config["share_encoder_decoder_embeddings"] else {"scale_embedding": False}


@Misread
def swish_taken_for_relu(config: Config) -> Config:
    return {"afn": "relu"} if config["afn"] == "swish" else {}


@Misread
def nothing(config: Config) -> Config:
    """No mistake at all: the control."""
    return {}


class Dies(Reference):
    """Ends its process on configurations with tied embeddings."""

    def __init__(self) -> None:
        super().__init__("eager")
        self.name = "dies"

    def load(self, checkpoint: Any) -> Any:
        if checkpoint.config["tie_word_embeddings"]:
            os._exit(3)
        return super().load(checkpoint)


class Refuses(Reference):
    """Declares that it does no biases."""

    def __init__(self) -> None:
        super().__init__("eager")
        self.name, self.families = "refuses", frozenset({"llama"})  # type: ignore[misc]

    def load(self, checkpoint: Any) -> Any:
        from conformance.implementation import Unsupported

        if checkpoint.config["mlp_bias"]:
            raise Unsupported("no biases")
        return super().load(checkpoint)


def bare(checkpoint: Any) -> Any:
    """A load function that declares nothing."""
    return lambda input_ids: torch.zeros(*input_ids.shape, checkpoint.config["vocab_size"], dtype=checkpoint.dtype)
