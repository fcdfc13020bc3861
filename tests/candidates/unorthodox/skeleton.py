"""A plain pre-norm decoder over the hub's tensors, cut into small methods of which each variant replaces some.

Shapes: b batch, t tokens of this call, s tokens so far, h query heads, k key-value heads, e head_dim, d hidden.  Unless
a variant says otherwise the stream is (b, t, d), and queries, keys, values are (b, heads, t, e).  Llama, Mistral and
Mixtral share it; whatever is delicate is computed in float32 or wider.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from candidates.batch_first import ACTIVATIONS, frequencies, wide


class Cache:
    """Keys and values of one layer; `extend` takes the newest and gives all that may still be seen."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.held is not None:
            keys, values = torch.cat((self.held[0], keys), dim=2), torch.cat((self.held[1], values), dim=2)
        self.held = keys, values
        return self.held

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.held or ())


class Decoder:
    """wrong: whether the variant makes its one mistake."""

    family, table = "llama", "model.embed_tokens.weight"
    default_eps = 1e-6  # of its norms, where config.json says nothing
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    # Whether what is computed comes from the hub's tensors at every call, so that gradients reach them.
    trainable = True

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], wrong: bool) -> None:
        self.config, self.wrong, self.w = config, wrong, dict(tensors)
        if self.trainable:
            self.parameters = dict(tensors)
        if config.get("tie_word_embeddings", False) and self.table in self.w:
            self.w["lm_head.weight"] = self.w[self.table]
        self.dtype = next(iter(tensors.values())).dtype
        self.read()
        self.prepare()

    def read(self) -> None:
        config = self.config
        self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps, self.window = config.get("rms_norm_eps", self.default_eps), config.get("sliding_window")
        self.activation = ACTIVATIONS[config.get("hidden_act", "silu")]
        self.turning = frequencies(config, self.head_dim, self.head_dim)

    def prepare(self) -> None:
        """What is done with the weights once."""

    # --- calls ---

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        place = real.long().cumsum(1) - 1
        positions = place.clamp(min=0) if position_ids is None else position_ids
        logits = self.run(input_ids, positions, self.visible(real.bool(), place, input_ids.shape[1]), None)
        if labels is None:
            return logits
        return {"logits": logits, "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}

    def packed(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        text = torch.arange(len(lengths)).repeat_interleave(lengths)[None]
        place = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
        visible = self.visible(torch.ones_like(text, dtype=torch.bool), place, input_ids.shape[1])
        return self.run(input_ids, place, visible & self.same_text(text), None)

    def same_text(self, text: Tensor) -> Tensor:
        return text[:, :, None] == text[:, None]

    def session(self) -> "Session":
        return Session(self)

    def cache(self) -> Any:
        return Cache()

    def visible(self, real: Tensor, place: Tensor, queries: int) -> Tensor:
        """(b, t, s).  Padding sees itself, lest its softmax be over nothing."""
        index = torch.arange(real.shape[1])
        seen = (place[:, None] <= place[:, -queries:, None]) & real[:, None]
        if self.window is not None:
            seen &= place[:, None] > place[:, -queries:, None] - self.window
        return seen | (index == index[-queries:, None])

    # --- the model ---

    def run(self, ids: Tensor, positions: Tensor, seen: Tensor, caches: list[Any] | None) -> Any:
        x, angles = self.embed(ids, positions), self.angles(positions)
        for layer in range(self.layers):
            x = self.block(layer, x, angles, seen, None if caches is None else caches[layer])
        return self.logits(x)

    def embed(self, ids: Tensor, positions: Tensor) -> Any:
        return F.embedding(ids, self.w[self.table])

    def block(self, layer: int, x: Any, angles: Any, seen: Tensor, cache: Any) -> Any:
        at = f"model.layers.{layer}."
        x = x + self.attention(at, self.norm(x, at + "input_layernorm"), angles, seen, cache)
        return x + self.feed_forward(at, self.norm(x, at + "post_attention_layernorm"))

    def attention(self, at: str, n: Any, angles: Any, seen: Tensor, cache: Any) -> Any:
        q, k, v = self.project(at + "self_attn.", n)
        q, k = self.turn(q, angles), self.turn(k, angles)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.linear(self.merge(self.attend(q, k, v, seen)), at + "self_attn.o_proj")

    def project(self, at: str, n: Any) -> tuple[Any, Any, Any]:
        q, k, v = (self.split(self.linear(n, f"{at}{letter}_proj")) for letter in "qkv")
        return q, k, v

    def attend(self, q: Any, k: Any, v: Any, seen: Tensor) -> Any:
        k, v = self.repeat(k), self.repeat(v)
        scores = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).to(wide(q.dtype))
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).to(v.dtype) @ v

    def feed_forward(self, at: str, n: Any) -> Any:
        gate, up = self.linear(n, at + "mlp.gate_proj"), self.linear(n, at + "mlp.up_proj")
        return self.linear(self.activation(gate) * up, at + "mlp.down_proj")

    def logits(self, x: Any) -> Any:
        return self.linear(self.norm(x, "model.norm"), "lm_head")

    # --- parts ---

    def norm(self, x: Any, name: str) -> Any:
        precise = x.to(wide(x.dtype))
        return (precise * (precise.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.gain(name)

    def gain(self, name: str) -> Tensor:
        return self.w[name + ".weight"]

    def linear(self, x: Any, name: str) -> Any:
        return F.linear(x, self.w[name + ".weight"], self.w.get(name + ".bias"))

    def split(self, x: Any) -> Any:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def merge(self, y: Any) -> Any:
        return y.transpose(1, 2).flatten(2)

    def repeat(self, x: Any) -> Any:
        return x.repeat_interleave(self.heads // self.kv_heads, dim=1)

    def angles(self, positions: Tensor) -> Any:
        """(b, t, e/2)"""
        turning = torch.tensor(self.turning, dtype=wide(self.dtype))
        return positions[..., None].to(turning.dtype) * turning

    def turn(self, x: Any, angles: Any) -> Any:
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Session:
    """Each feed's mask is of the ids of that feed, (b, t)."""

    def __init__(self, model: Any) -> None:
        self.model, self.caches = model, [model.cache() for _ in range(model.layers)]
        self.real: Tensor | None = None

    def feed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        new = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.real = new if self.real is None else torch.cat((self.real, new), dim=1)
        place, queries = self.real.long().cumsum(1) - 1, input_ids.shape[1]
        seen = self.model.visible(self.real.bool(), place, queries)
        return self.model.run(input_ids, place[:, -queries:].clamp(min=0), seen, self.caches)

    def state_bytes(self) -> int:
        return sum(cache.bytes() for cache in self.caches)


class Adapter:
    """What the suite loads: a variant, right or wrong."""

    def __init__(self, variant: type[Decoder], wrong: bool = False) -> None:
        self.variant, self.wrong = variant, wrong
        self.name = variant.__name__
        self.families, self.dtypes = frozenset({variant.family}), frozenset(variant.dtypes)

    def load(self, checkpoint: Any) -> Decoder:
        return self.variant(checkpoint.config, checkpoint.tensors(), self.wrong)
