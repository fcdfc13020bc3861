"""The installed Hugging Face transformers as a candidate, loaded from the checkpoint directory as a user loads it."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from conformance.implementation import Unsupported

# Families whose model the installed transformers has, and those of them that it has no SDPA kernel for.
HUB_FAMILIES = frozenset({"gpt", "gpt2", "llama", "mistral", "mixtral", "phi", "transformer"})
EAGER_ONLY = frozenset({"gpt"})
# Encoder–decoder models whose positions count pads, and that take no positions of ours.
COUNTS_PADS = frozenset({"marian"})
# model_type -> how to load it. The default kernel of experts, grouped_mm, has no float64.
SETTINGS = {"mixtral": {"experts_implementation": "eager"}}


class HuggingFaceModels:
    """`AutoModelForCausalLM.from_pretrained` behind the contract.

    attention: the kernel, "eager" or "sdpa".
    """

    def __init__(self, attention: str):
        self.attention = attention
        self.families = HUB_FAMILIES if attention == "eager" else HUB_FAMILIES - EAGER_ONLY

    @property
    def name(self) -> str:
        from importlib.metadata import version

        return f"transformers {version('transformers')}, {self.attention}"

    def load(self, checkpoint: Any) -> "Model | EncoderDecoderModel":
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        model_type = checkpoint.config["model_type"]
        if model_type == "transformer":
            raise Unsupported("MarianMTModel has all sines before all cosines, not the paper's alternating order")
        loader = AutoModelForSeq2SeqLM if checkpoint.config.get("is_encoder_decoder") else AutoModelForCausalLM
        model = loader.from_pretrained(
            checkpoint.path, dtype=checkpoint.dtype, attn_implementation=self.attention, **SETTINGS.get(model_type, {})
        )
        model = model.to(checkpoint.device).eval()
        if loader is AutoModelForSeq2SeqLM:
            return EncoderDecoderModel(model, counts_pads=model_type in COUNTS_PADS)
        # GPT would take a cache and ignore it
        has_cache = "past_key_values" in inspect.signature(model.forward).parameters
        return CachingModel(model) if has_cache else Model(model)


class Model(torch.nn.Module):
    """Calls without a cache."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.parameters = by_hub_name(model)  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, labels=labels, use_cache=False
        )


class CachingModel(Model):
    """Opens sessions with a cache too."""

    def session(self) -> "Session":
        return Session(self.model)


class EncoderDecoderModel(torch.nn.Module):
    """An encoder and a decoder that attends to it.

    counts_pads: whether its positions count pads; tokens after pads are then beyond it.
    """

    def __init__(self, model: Any, counts_pads: bool):
        super().__init__()
        self.model, self.counts_pads = model, counts_pads
        self.parameters = by_hub_name(model)  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        self.refuse_left_padding(attention_mask, decoder_attention_mask)
        return self.model(
            input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask, labels=labels, use_cache=False,
        )  # fmt: skip

    def refuse_left_padding(self, *masks: Tensor | None) -> None:
        if self.counts_pads and any(mask is not None and (mask.diff(dim=1) > 0).any() for mask in masks):
            raise Unsupported("its positions count pads, so that a token's position depends on the pads before it")

    def session(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> "EncoderDecoderSession":
        self.refuse_left_padding(attention_mask)
        return EncoderDecoderSession(self.model, input_ids, attention_mask)


class EncoderDecoderSession:
    """The encoder's output, computed once, and the library's own dynamic caches."""

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor | None):
        from transformers import DynamicCache, EncoderDecoderCache

        self.model, self.source_mask = model, attention_mask
        self.encoded = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        self.cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))

    def feed(self, input_ids: Tensor) -> Tensor:
        return self.model(  # type: ignore[no-any-return]
            encoder_outputs=self.encoded, attention_mask=self.source_mask, decoder_input_ids=input_ids,
            past_key_values=self.cache, use_cache=True,
        ).logits  # fmt: skip

    def state_bytes(self) -> int:
        caches = (self.cache.self_attention_cache, self.cache.cross_attention_cache)
        held = [t for cache in caches for layer in cache.layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in [self.encoded.last_hidden_state, *held])


def by_hub_name(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters under the names of the checkpoint.

    Where the library fuses several into one in memory (experts), parameters with the parts' names stand for it: they
    receive their share of its gradient as soon as it has one, cut up as the library does for saving.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, torch.nn.Parameter] = {}

    def distribute(name: str, fused: torch.nn.Parameter) -> None:
        for part, gradient in revert_weight_conversion(model, {name: fused.grad}).items():
            found[part].grad = gradient.clone()
        fused.grad = None

    for name, parameter in model.named_parameters():
        parts = revert_weight_conversion(model, {name: parameter.detach()})
        if len(parts) == 1:
            found[next(iter(parts))] = parameter
        else:
            found |= {part: torch.nn.Parameter(value) for part, value in parts.items()}
            parameter.register_post_accumulate_grad_hook(functools.partial(distribute, name))
    return found


class Session:
    """Decoding through the library's own dynamic cache; the mask of everything fed so far goes with each call."""

    def __init__(self, model: Any):
        from transformers import DynamicCache

        self.model, self.cache = model, DynamicCache(config=model.config)
        self.mask: Tensor | None = None

    def feed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        return self.model(  # type: ignore[no-any-return]
            input_ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).logits

    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.cache.layers for t in (layer.keys, layer.values))


IMPLEMENTATIONS = {"hf": HuggingFaceModels("eager"), "hf-sdpa": HuggingFaceModels("sdpa")}
