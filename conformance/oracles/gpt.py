"""The oracle of GPT: `OpenAIGPTLMHeadModel`, whose attention is not on the library's attention interface."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from conformance.oracles.hugging_face import HuggingFace

# What a candidate runs that takes afn's "gelu" for what it means everywhere else.  Not a name of the library: only the
# counterfactuals of cases use it.
EXACT_GELU = "gelu, exact"

# What an attention method received: (module, query, key) -> query, key, scores, as the probes want them
Read = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class OpenAIGPT(HuggingFace):
    """GPT of Hugging Face; it also runs a configuration whose afn is `EXACT_GELU`."""

    def checkpoint(
        self, config: dict[str, Any], weights: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return config | {"afn": config.get("afn", "gelu").removesuffix(", exact")}, weights

    def _load(self, directory: str, attention: str) -> Any:
        model = super()._load(directory, attention)
        if self.config.get("afn") == EXACT_GELU:
            for block in model.transformer.h:
                block.mlp.act = torch.nn.GELU()
        return model

    def tapped(self) -> contextlib.AbstractContextManager[dict[int, dict[str, Tensor]]]:
        def read(module: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return query, key.transpose(-1, -2), query @ key / query.shape[-1] ** 0.5  # keys arrive transposed

        return tapped_methods([block.attn for block in self.model.transformer.h], read, output_attentions=True)


@contextlib.contextmanager
def tapped_methods(attentions: list[Any], read: Read, **asked: Any) -> Iterator[dict[int, dict[str, Tensor]]]:
    """Let the `_attn` methods of models outside the attention interface tell what they receive and return.

    The scores that `read` computes, hidden where the module's own `bias` says, must give the method's own weights.

    asked: what the method must be told, beside its inputs, to return its weights.
    """
    tapped: dict[int, dict[str, Tensor]] = {}

    def listen(layer: int, module: Any) -> None:
        method = module._attn

        def tap(query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *_: Any) -> Any:
            returned = method(query, key, value, attention_mask, **asked)
            weights = returned[1]
            query, key, scores = read(module, query, key)
            visible = module.bias[..., : scores.shape[-2], : scores.shape[-1]].bool()
            if not torch.allclose(scores.masked_fill(~visible, -torch.inf).softmax(-1), weights, rtol=0, atol=1e-14):
                raise AssertionError("the recomputed scores do not give the method's own weights")
            values = {"query": query, "key": key, "value": value, "scores": scores, "weights": weights}
            tapped[layer] = {quantity: tensor.detach().clone() for quantity, tensor in values.items()}
            return returned[:1] if asked else returned

        module._attn = tap

    for layer, module in enumerate(attentions):
        listen(layer, module)
    try:
        yield tapped
    finally:
        for module in attentions:
            del module._attn
