"""The installed Hugging Face transformers as a candidate, loaded from the checkpoint directory as a user loads it."""

import inspect
from typing import Any

import torch
from torch import Tensor

# Families whose model the installed transformers has, and those of them that it has no SDPA kernel for.
HUB_FAMILIES = frozenset({"gpt", "gpt2", "llama", "phi"})
EAGER_ONLY = frozenset({"gpt"})


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

    def load(self, checkpoint: Any) -> "Model":
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=checkpoint.dtype, attn_implementation=self.attention
        )
        model = model.to(checkpoint.device).eval()
        # GPT would take a cache and ignore it
        has_cache = "past_key_values" in inspect.signature(model.forward).parameters
        return CachingModel(model) if has_cache else Model(model)


class Model(torch.nn.Module):
    """Calls without a cache."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.parameters = dict(model.named_parameters())  # type: ignore[assignment]  # by hub name

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
