"""Llama for serving: fused QKV and gate-up weights, scaled_dot_product_attention, preallocated cache, complex rotary.

Rotation multiplies by exp(i·angle), for which a pair must lie side by side: the rows of the query and key weights are
reordered once at load, from the hub's half-split (0, Dh/2), (1, Dh/2 + 1), … to interleaved (0, 1), (2, 3), …  Scores
do not change, as both sides are reordered alike.  Inference only: `+=` on the residual stream, no gradients.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Mistake = Literal[
    "interleaved_rotary",
    "gqa_tile",
    "scale_missing",
    "gate_up_swapped",
    "gelu_for_silu",
    "eps_1e6",
    "causal_off_by_one",
    "norms_crossed",
    "decode_position_restart",
    "head_dim_derived",
    "heads_merged_without_transpose",
    "batch_rows_swapped",
    # Made in this file only
    "llama3_blend_flipped",
    "llama3_without_2pi",
    "gqa_kv_index",
    "scale_by_hidden",
    "scale_by_width",
    "key_bias_dropped",
    "value_bias_dropped",
    "parallel_block",
    "halves_swapped",
    "feed_forward_not_normed",
    "qkv_read_as_qvk",
    "log_softmax_returned",
    "no_causality",
    "rms_over_tokens",
    "down_bias_dropped",
    "attention_skip_missing",
    "gate_plus_up",
    "positions_late",
    "store_of_first_row",
    "store_of_one_layer",
]

FIRST_CAPACITY = 16  # tokens; the cache doubles when full


def pairs_side_by_side(rows: Tensor, heads: int) -> Tensor:
    """Reorders the rows within each head: with Dh = 6, 0 1 2 3 4 5 -> 0 3 1 4 2 5.  Weights and biases alike."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])  # (heads, half, Dh/2, …)
    return halves.transpose(1, 2).reshape(rows.shape)


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    attention_norm: Tensor  # (D,)
    qkv: Tensor  # ((H + 2·KV)·Dh, D)
    qkv_bias: Tensor | None
    out: Tensor  # (D, H·Dh)
    out_bias: Tensor | None
    feed_forward_norm: Tensor  # (D,)
    gate_up: Tensor  # (2·F, D)
    gate_up_bias: Tensor | None
    down: Tensor  # (D, F)
    down_bias: Tensor | None


class Loader:
    """Fuses the hub's tensors."""

    def __init__(
        self, config: dict[str, Any], tensors: dict[str, Tensor], shape: Shape, mistake: Mistake | None
    ) -> None:
        self.config, self.tensors, self.shape, self.mistake = config, tensors, shape, mistake

    def qkv(self, prefix: str, kind: str) -> Tensor:
        q, k, v = (
            self.tensors[f"{prefix}.{letter}_proj.{kind}"]
            for letter in ("qvk" if self.mistake == "qkv_read_as_qvk" else "qkv")
        )
        if self.mistake != "interleaved_rotary":
            q, k = pairs_side_by_side(q, self.shape.heads), pairs_side_by_side(k, self.shape.kv_heads)
        return torch.cat((q, k, v))

    def gate_up(self, prefix: str, kind: str) -> Tensor:
        return torch.cat([self.tensors[f"{prefix}.{part}_proj.{kind}"] for part in ("gate", "up")])

    def layer(self, index: int) -> LayerWeights:
        at = f"model.layers.{index}"
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        norms = [self.tensors[f"{at}.input_layernorm.weight"], self.tensors[f"{at}.post_attention_layernorm.weight"]]
        if self.mistake == "norms_crossed":
            norms.reverse()
        attention_bias, mlp_bias = self.config.get("attention_bias", False), self.config.get("mlp_bias", False)
        qkv_bias = self.qkv(attention, "bias") if attention_bias else None
        if qkv_bias is not None and self.mistake in ("key_bias_dropped", "value_bias_dropped"):
            sizes = [heads * self.shape.head_dim for heads in (self.shape.heads, *2 * [self.shape.kv_heads])]
            qkv_bias.split(sizes)[1 if self.mistake == "key_bias_dropped" else 2].zero_()
        return LayerWeights(
            attention_norm=norms[0],
            qkv=self.qkv(attention, "weight"),
            qkv_bias=qkv_bias,
            out=self.tensors[f"{attention}.o_proj.weight"],
            out_bias=self.tensors[f"{attention}.o_proj.bias"] if attention_bias else None,
            feed_forward_norm=norms[1],
            gate_up=self.gate_up(mlp, "weight"),
            gate_up_bias=self.gate_up(mlp, "bias") if mlp_bias else None,
            down=self.tensors[f"{mlp}.down_proj.weight"],
            down_bias=self.tensors[f"{mlp}.down_proj.bias"]
            if mlp_bias and self.mistake != "down_bias_dropped"
            else None,
        )


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the attention; `nominal` is the head size from which scale and frequencies are computed."""

    heads: int
    kv_heads: int
    head_dim: int
    nominal: int

    @classmethod
    def of(cls, config: dict[str, Any], mistake: Mistake | None) -> Shape:
        heads = config.get("num_attention_heads", 32)
        quotient = config.get("hidden_size", 4096) // heads
        head_dim = config.get("head_dim") or quotient
        # The silent form of the mistake: tensors are cut by the right head_dim, arithmetic uses the quotient
        nominal = quotient if mistake == "head_dim_derived" else head_dim
        return cls(heads, config.get("num_key_value_heads") or heads, head_dim, nominal)


class Rotary:
    """exp(i · position · frequency), applied to neighbouring pairs."""

    def __init__(self, config: dict[str, Any], shape: Shape, mistake: Mistake | None) -> None:
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        base = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
        kind = rope.get("rope_type") or rope.get("type") or "default"
        self.mistake = mistake
        step = math.log(base) / shape.nominal
        self.frequencies = [math.exp(-index * step) for index in range(0, shape.head_dim, 2)]
        if kind == "linear":
            self.frequencies = [f / rope["factor"] for f in self.frequencies]
        elif kind == "llama3":
            context = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
            context = context or config.get("max_position_embeddings", 2048)
            self.frequencies = [self.llama3(f, rope, context) for f in self.frequencies]
        elif kind != "default":
            raise ValueError(f"rope_type={kind!r} is unknown; use default, linear or llama3")

    def llama3(self, frequency: float, rope: dict[str, Any], context: int) -> float:
        wavelength = (1.0 if self.mistake == "llama3_without_2pi" else math.tau) / frequency
        factor: float = rope["factor"]
        low: float = rope["low_freq_factor"]
        high: float = rope["high_freq_factor"]
        if wavelength < context / high:
            return frequency
        if wavelength > context / low:
            return frequency / factor
        blend = (context / wavelength - low) / (high - low)
        if self.mistake == "llama3_blend_flipped":
            blend = 1 - blend
        return blend * frequency + (1 - blend) * frequency / factor

    def phases(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, 1, Dh/2) complex, of float32 parts or wider."""
        precise = torch.promote_types(dtype, torch.float32)
        frequencies = torch.tensor(self.frequencies, dtype=precise, device=position_ids.device)
        angles = position_ids[..., None, None].to(precise) * frequencies
        return torch.polar(torch.ones_like(angles), angles)

    @staticmethod
    def turn(x: Tensor, phases: Tensor) -> Tensor:
        """x (B, T, heads, Dh)"""
        pairs = torch.view_as_complex(x.to(phases.real.dtype).view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * phases).flatten(-2).to(x.dtype)


class KVCache:
    """One tensor for all layers, (layers, 2, B, KV, capacity, Dh), of which the first `length` tokens are filled."""

    def __init__(self, layers: int, shape: Shape, mistake: Mistake | None) -> None:
        self.layers, self.shape, self.length, self.mistake = layers, shape, 0, mistake
        self.store: Tensor | None = None
        self.real: Tensor | None = None  # (B, length) bool

    def reserve(self, real: Tensor, dtype: torch.dtype) -> None:
        """Makes room for the tokens of `real` (B, T) in every layer and counts them as present."""
        self.real = real if self.real is None else torch.cat((self.real, real), dim=1)
        needed = self.length + real.shape[1]
        held = 0 if self.store is None else self.store.shape[4]
        if self.store is None or needed > held:
            capacity = max(FIRST_CAPACITY, 2 * held, needed)
            sizes = (self.layers, 2, real.shape[0], self.shape.kv_heads, capacity, self.shape.head_dim)
            larger = torch.zeros(sizes, dtype=dtype, device=real.device)
            if self.store is not None:
                larger[..., : self.length, :] = self.store[..., : self.length, :]
            self.store = larger
        self.length = needed

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, KV, T, Dh) of the newest tokens -> those of all tokens."""
        assert self.store is not None
        newest = slice(self.length - k.shape[2], self.length)
        if self.mistake == "store_of_one_layer":
            layer = 0
        self.store[layer, 0, :, :, newest], self.store[layer, 1, :, :, newest] = k, v
        if self.mistake == "store_of_first_row" and newest.start:
            past = self.store[layer, :, :1, :, : newest.start].expand(-1, k.shape[0], -1, -1, -1)
            return torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        return self.store[layer, 0, :, :, : self.length], self.store[layer, 1, :, :, : self.length]


class Engine:
    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], mistake: Mistake | None) -> None:
        self.mistake = mistake
        self.shape = Shape.of(config, mistake)
        self.rotary = Rotary(config, self.shape, mistake)
        self.eps = 1e-6 if mistake == "eps_1e6" else config.get("rms_norm_eps", 1e-6)
        self.act = config.get("hidden_act", "silu")
        if mistake == "gelu_for_silu" and self.act in ("silu", "swish"):
            self.act = "gelu"
        loader = Loader(config, tensors, self.shape, mistake)
        self.layers = [loader.layer(index) for index in range(config.get("num_hidden_layers", 32))]
        self.embedding = tensors["model.embed_tokens.weight"]
        self.final_norm = tensors["model.norm.weight"]
        self.head = self.embedding if config.get("tie_word_embeddings", False) else tensors["lm_head.weight"]

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.mistake == "rms_over_tokens":
            return x * (x.square().mean((-2, -1), keepdim=True) + self.eps).rsqrt() * weight
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def mask(self, real: Tensor | None, queries: int) -> Tensor | None:
        """(B, 1, T, S), true where a key is seen; None stands for plain causality, which the kernel has built in."""
        if real is None:
            return None
        index = torch.arange(real.shape[1], device=real.device)
        now = index[-queries:, None]
        until = now + 1 if self.mistake == "causal_off_by_one" else now
        # A pad sees itself, lest the softmax of its row be over nothing
        earlier = torch.ones_like(index <= now) if self.mistake == "no_causality" else index <= until
        return ((earlier & real[:, None]) | (index == now))[:, None]

    def attend(self, at: int, x: Tensor, phases: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        layer, shape = self.layers[at], self.shape
        fused = F.linear(x, layer.qkv, layer.qkv_bias).view(*x.shape[:2], -1, shape.head_dim)
        q, k, v = fused.split_with_sizes((shape.heads, shape.kv_heads, shape.kv_heads), dim=2)
        q, k = self.rotary.turn(q, phases), self.rotary.turn(k, phases)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, Dh)
        if cache is not None:
            k, v = cache.write(at, k, v)
        group = shape.heads // shape.kv_heads
        if self.mistake == "gqa_tile":
            k, v = k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)
        elif self.mistake == "gqa_kv_index":
            read = [head // shape.kv_heads for head in range(shape.heads)]
            k, v = k[:, read], v[:, read]
        else:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scale = 1.0 if self.mistake == "scale_missing" else 1 / math.sqrt(shape.nominal)
        if self.mistake == "scale_by_hidden":
            scale = 1 / math.sqrt(x.shape[-1])
        if self.mistake == "scale_by_width":
            scale = 1 / math.sqrt(shape.heads * shape.head_dim)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
        if self.mistake != "heads_merged_without_transpose":
            y = y.transpose(1, 2)
        return F.linear(y.reshape(*x.shape[:2], -1), layer.out, layer.out_bias)

    def feed_forward(self, at: int, x: Tensor) -> Tensor:
        layer = self.layers[at]
        gate, up = F.linear(x, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        if self.mistake == "gate_up_swapped":
            gate, up = up, gate
        joined = self.activate(gate) + up if self.mistake == "gate_plus_up" else self.activate(gate) * up
        return F.linear(joined, layer.down, layer.down_bias)

    def activate(self, x: Tensor) -> Tensor:
        match self.act:
            case "silu" | "swish":
                return F.silu(x)
            case "gelu":
                return F.gelu(x)
            case "gelu_new" | "gelu_pytorch_tanh":
                return F.gelu(x, approximate="tanh")
            case "relu":
                return F.relu(x)
        raise ValueError(f"hidden_act={self.act!r} is unknown; use silu, gelu, gelu_new, gelu_pytorch_tanh or relu")

    @torch.no_grad()
    def run(self, ids: Tensor, position_ids: Tensor, real: Tensor | None, cache: KVCache | None = None) -> Tensor:
        """real: (B, S) bool over all tokens up to the last of `ids`; None when there are neither pads nor a past."""
        if self.mistake == "batch_rows_swapped" and ids.shape[0] > 1:
            ids = torch.cat((ids[:2].flip(0), ids[2:]))
        if self.mistake in ("causal_off_by_one", "no_causality") and real is None:
            real = torch.ones_like(ids, dtype=torch.bool)
        x = F.embedding(ids, self.embedding)
        phases = self.rotary.phases(position_ids, x.dtype)
        mask = self.mask(real, ids.shape[1])
        for at, layer in enumerate(self.layers):
            if self.mistake == "halves_swapped":
                x += self.feed_forward(at, self.norm(x, layer.feed_forward_norm))
                x += self.attend(at, self.norm(x, layer.attention_norm), phases, mask, cache)
                continue
            entered = x.clone()
            x += self.attend(at, self.norm(x, layer.attention_norm), phases, mask, cache)
            if self.mistake == "attention_skip_missing":
                x -= entered
            read = entered if self.mistake == "parallel_block" else x
            x += self.feed_forward(
                at, read if self.mistake == "feed_forward_not_normed" else self.norm(read, layer.feed_forward_norm)
            )
        logits = F.linear(self.norm(x, self.final_norm), self.head)
        return logits.log_softmax(-1) if self.mistake == "log_softmax_returned" else logits


class Stream:
    """A session: ids and their mask (B, T) go in, logits of those ids come out."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cache = KVCache(len(engine.layers), engine.shape, engine.mistake)

    def feed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ValueError(f"feed: attention_mask {[*mask.shape]} and input_ids {[*input_ids.shape]} must agree")
        positions = mask.long().cumsum(1) - 1
        if self.cache.real is not None and self.engine.mistake != "decode_position_restart":
            positions = positions + self.cache.real.sum(1, keepdim=True)
            if self.engine.mistake == "positions_late":
                positions = positions + 1
        self.cache.reserve(mask.bool(), self.engine.embedding.dtype)
        return self.engine.run(input_ids, positions.clamp_min(0), self.cache.real, self.cache)

    def state_bytes(self) -> int:
        """What is allocated, filled or not."""
        return 0 if self.cache.store is None else self.cache.store.numel() * self.cache.store.element_size()


class FusedModel:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        real = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        if position_ids is None:
            counted = torch.ones_like(input_ids) if real is None else real.long()
            position_ids = (counted.cumsum(1) - 1).clamp_min(0)
        return self.engine.run(input_ids, position_ids.view(-1, input_ids.shape[1]), real)

    def session(self) -> Stream:
        return Stream(self.engine)


class FusedSDPA:
    """The adapter.  FusedSDPA() is correct, FusedSDPA("gqa_tile") makes that mistake."""

    name = "fused-sdpa"
    families = frozenset({"llama"})

    def __init__(self, mistake: Mistake | None = None) -> None:
        if mistake not in (None, *get_args(Mistake)):
            raise ValueError(f"mistake={mistake!r} is unknown; use one of {get_args(Mistake)}")
        self.mistake: Mistake | None = mistake

    def load(self, checkpoint: Any) -> FusedModel:
        return FusedModel(Engine(checkpoint.config, checkpoint.tensors(), self.mistake))
