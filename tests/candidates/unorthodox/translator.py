"""The Transformer of 2017, right and unusual: what the decoder reads of the source is computed once, by one matrix."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from candidates.batch_first import ACTIVATIONS

from .skeleton import Cache, Decoder

Memory = list[tuple[Tensor, Tensor]]


class JointMemory(Decoder):
    """The matrices of all cross-attentions lie in one, k0 v0 k1 v1 …; attention is the fused kernel's."""

    family, trainable = "transformer", False
    table = "model.shared.weight"

    def read(self) -> None:
        config = self.config
        self.layers, self.window, self.turning = config["decoder_layers"], None, ()
        self.size = config["d_model"]
        self.activation = ACTIVATIONS[config["activation_function"].replace("swish", "silu")]

    def prepare(self) -> None:
        at = [f"model.decoder.layers.{layer}.encoder_attn." for layer in range(self.layers)]
        names = [f"{name}{letter}_proj" for name in at for letter in "kv"]
        for kind in ("weight", "bias"):
            self.w[f"joint.{kind}"] = torch.cat([self.w[f"{name}.{kind}"] for name in names])

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert decoder_input_ids is not None
        return self.session(input_ids, attention_mask).feed(decoder_input_ids, decoder_attention_mask)

    def session(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return Translation(self, self.encode(input_ids, real), real.bool()[:, None])

    def encode(self, ids: Tensor, real: Tensor) -> Memory:
        x, seen = self.stream("encoder", ids, real.cumsum(1) - 1), real.bool()[:, None]
        for layer in range(self.config["encoder_layers"]):
            at = f"model.encoder.layers.{layer}."
            q, k, v = (self.linear(x, f"{at}self_attn.{letter}_proj") for letter in "qkv")
            x = self.add_and_norm(x, self.mixed("encoder", q, k, v, seen), at + "self_attn")
            x = self.feed_forward(at, x)
        parts = self.linear(x, "joint").chunk(2 * self.layers, dim=-1)
        if self.wrong:  # k0 k1 … v0 v1 …
            return list(zip(parts[: self.layers], parts[self.layers :], strict=True))
        return list(zip(parts[::2], parts[1::2], strict=True))

    def decode(self, ids: Tensor, place: Tensor, seen: Tensor, memory: Memory, source: Tensor, caches: Any) -> Tensor:
        x = self.stream("decoder", ids, place)
        for layer, (keys, values) in enumerate(memory):
            at = f"model.decoder.layers.{layer}."
            q, k, v = (self.linear(x, f"{at}self_attn.{letter}_proj") for letter in "qkv")
            k, v = (y[:, 0] for y in caches[layer].extend(k[:, None], v[:, None]))
            x = self.add_and_norm(x, self.mixed("decoder", q, k, v, seen), at + "self_attn")
            q = self.linear(x, at + "encoder_attn.q_proj")
            x = self.add_and_norm(x, self.mixed("decoder", q, keys, values, source), at + "encoder_attn")
            x = self.feed_forward(at, x)
        head = self.w.get("lm_head.weight", self.embedding("decoder"))
        return F.linear(x, head) + self.w["final_logits_bias"]

    def stream(self, side: str, ids: Tensor, place: Tensor) -> Tensor:
        scale = self.size**0.5 if self.config.get("scale_embedding", False) else 1.0
        turns = 10000.0 ** (-torch.arange(0, self.size, 2, dtype=torch.float64) / self.size)
        angles = place.clamp(min=0).double()[..., None] * turns
        return F.embedding(ids, self.embedding(side)) * scale + torch.cat((angles.sin(), angles.cos()), -1).to(
            self.dtype
        )

    def embedding(self, side: str) -> Tensor:
        own = f"model.{side}.embed_tokens.weight"
        return self.w[own] if own in self.w else self.w["model.shared.weight"]

    def mixed(self, side: str, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        heads = self.config[f"{side}_attention_heads"]
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None]).transpose(1, 2).flatten(2)

    def add_and_norm(self, x: Tensor, mixed: Tensor, at: str) -> Tensor:
        return self.norm(x + self.linear(mixed, at + ".out_proj"), at + "_layer_norm")

    def feed_forward(self, at: str, n: Tensor) -> Tensor:
        inner = self.activation(self.linear(n, at + "fc1"))
        return self.norm(n + self.linear(inner, at + "fc2"), at + "final_layer_norm")

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[name + ".weight"], self.w[name + ".bias"])


class Translation:
    """A target that is decoded piece by piece; each feed's mask is of the ids of that feed."""

    def __init__(self, model: JointMemory, memory: Memory, source: Tensor) -> None:
        self.model, self.memory, self.source = model, memory, source
        self.caches = [Cache() for _ in memory]
        self.real: Tensor | None = None

    def feed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        new = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.real = new if self.real is None else torch.cat((self.real, new), dim=1)
        place, queries = self.real.long().cumsum(1) - 1, input_ids.shape[1]
        seen = self.model.visible(self.real.bool(), place, queries)
        return self.model.decode(input_ids, place[:, -queries:], seen, self.memory, self.source, self.caches)
