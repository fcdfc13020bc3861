"""The oracle of GPT-3, which Hugging Face never had: its GPT-2 where all blocks are dense, else its GPT-Neo.

GPT-Neo's local attention is GPT-3's band: `torch.bitwise_xor(tril, tril(-window_size))` shows a query exactly
`window_size` keys, itself included.  Two things are different, and made equal here:

- it does not divide scores by √head_dim: the query weights are multiplied by 1/√head_dim in its stead;
- its query, key and value projections have no bias: they are replaced by ones that do.

Its projections are stored (out, in), GPT-3's are (in, out) and hold query, key and value side by side.
"""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from conformance.oracles.gpt import tapped_methods
from conformance.oracles.hugging_face import HuggingFace

GPT_NEO_KINDS = {"dense": "global", "banded": "local"}
# GPT-3's name of a projection -> GPT-Neo's, for those that are only transposed
TRANSPOSED = {"attn.c_proj": "attn.attention.out_proj", "mlp.c_fc": "mlp.c_fc", "mlp.c_proj": "mlp.c_proj"}


class GPT3(HuggingFace):
    """GPT-3's checkpoint in GPT-2 or GPT-Neo, and their gradients and probes in GPT-3's names again."""

    @property
    def kinds(self) -> list[str]:
        """The kind of attention of each block."""
        pattern = self.config.get("attention_pattern", ["dense", "banded"])
        return [pattern[layer % len(pattern)] for layer in range(self.config["n_layer"])]

    @property
    def dense(self) -> bool:
        return set(self.kinds) == {"dense"}

    @property
    def query_factor(self) -> float:
        """What GPT-Neo's query weights are multiplied by."""
        return float((self.config["n_embd"] // self.config["n_head"]) ** -0.5)

    def architecture(self) -> Any:
        import transformers

        return transformers.GPT2LMHeadModel if self.dense else _gpt_neo_with_biases()

    def checkpoint(
        self, config: dict[str, Any], weights: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.dense:
            shared = {key: value for key, value in config.items() if key not in ("attention_pattern", "window_size")}
            return shared | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, weights
        renamed = {
            "n_positions": "max_position_embeddings", "n_embd": "hidden_size", "n_layer": "num_layers",
            "n_head": "num_heads", "n_inner": "intermediate_size", "attn_pdrop": "attention_dropout",
            "embd_pdrop": "embed_dropout", "resid_pdrop": "resid_dropout",
        }  # fmt: skip
        shared = {renamed.get(key, key): value for key, value in config.items() if key != "attention_pattern"}
        kinds = [GPT_NEO_KINDS[kind] for kind in self.kinds]
        its_own = {"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"], "attention_types": [[kinds, 1]]}
        return shared | its_own, self._to_gpt_neo(weights)

    def _to_gpt_neo(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if ".attn.c_attn." in name:
                query, key, value = weight.chunk(3, dim=-1)
                query = query.double() * self.query_factor  # in float32 the product would be rounded
                for part, tensor in (("q", query), ("k", key), ("v", value)):
                    theirs[name.replace("attn.c_attn", f"attn.attention.{part}_proj")] = tensor.t().contiguous()
            else:
                its_name, transposed = _plain_name(name)
                theirs[its_name] = weight.t().contiguous() if transposed else weight
        return theirs

    def gradients(self) -> dict[str, Tensor]:
        """The transpose of `_to_gpt_neo`, since gradients flow the other way."""
        theirs = super().gradients()
        if self.dense:
            return theirs
        ours: dict[str, Tensor] = {}
        for name in self.family.tensor_shapes(self.config):
            if ".attn.c_attn." in name:
                parts = [theirs[name.replace("attn.c_attn", f"attn.attention.{part}_proj")].t() for part in "qkv"]
                ours[name] = torch.cat([parts[0] * self.query_factor, *parts[1:]], dim=-1)
            else:
                its_name, transposed = _plain_name(name)
                ours[name] = theirs[its_name].t() if transposed else theirs[its_name]
        return ours

    def module_probes(self) -> dict[str, tuple[str, str]]:
        ours = super().module_probes()
        return ours if self.dense else {probe: (_plain_name(path)[0], side) for probe, (path, side) in ours.items()}

    def tapped(self) -> contextlib.AbstractContextManager[dict[int, dict[str, Tensor]]]:
        if self.dense:
            return super().tapped()

        def read(_: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return query / self.query_factor, key, query @ key.transpose(-1, -2)

        return tapped_methods([block.attn.attention for block in self.model.transformer.h], read)


def _plain_name(name: str) -> tuple[str, bool]:
    """GPT-Neo's name of a tensor or module of GPT-3, and whether it is a weight that is stored transposed."""
    for ours, theirs in TRANSPOSED.items():
        if f".{ours}." in f"{name}.":
            return name.replace(ours, theirs), name.endswith(".weight")
    return name, False


@functools.cache
def _gpt_neo_with_biases() -> Any:
    """The library's GPT-Neo with a bias on the query, key and value projections; nothing else is its own."""
    import transformers

    class GPTNeoWithBiases(transformers.GPTNeoForCausalLM):  # type: ignore[misc]
        def __init__(self, config: Any):
            super().__init__(config)
            for block in self.transformer.h:
                for part in "qkv":
                    biased = torch.nn.Linear(config.hidden_size, config.hidden_size)
                    setattr(block.attn.attention, f"{part}_proj", biased)

    return GPTNeoWithBiases
