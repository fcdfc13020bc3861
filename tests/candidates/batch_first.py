"""Llama kept batch-first, (batch, seq, heads, head_dim): einsum throughout, modules with names of their own.

Axes in the einsum strings and shape comments: b batch, t query, s key, h query head, k key-value head, g query head
within its group (h = k · groups + g), e head_dim, d hidden, f intermediate.  Rotary pairs are half-split, as in the
hub's checkpoints: (0, e/2), (1, e/2 + 1), …  Norms, rotary positions and softmax are computed in float32 or wider.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MISTAKES = frozenset(
    {
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
    }
)
# Made in this file only.
MORE = frozenset(
    {
        "rotary_sign",
        "keys_not_rotated",
        "rotated_twice",
        "values_rotated",
        "eps_outside_root",
        "mean_subtracted",
        "gain_plus_one",
        "final_norm_missing",
        "both_activated",
        "relu_for_silu",
        "keys_values_swapped",
        "query_bias_dropped",
        "residual_from_block_input",
        "blocks_reversed",
        "embedding_scaled",
        "softmax_over_queries",
        "position_zero_is_one",
        "memory_values_forgotten",
        "memory_never_written",
    }
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class Checkpoint(Protocol):
    config: dict[str, Any]

    def tensors(self) -> Mapping[str, Tensor]: ...


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of delicate arithmetic: float32, or float64 where the model already runs in it."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `config.json` says, with the hub's defaults filled in."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    activation: str
    attention_bias: bool
    mlp_bias: bool
    tied: bool
    pad_id: int | None
    frequencies: tuple[float, ...]
    mistake: str | None

    @classmethod
    def read(cls, config: Mapping[str, Any], mistake: str | None) -> "Settings":
        hidden, heads = config.get("hidden_size", 4096), config.get("num_attention_heads", 32)
        head_dim = config.get("head_dim") or hidden // heads
        activation = config.get("hidden_act", "silu")
        if activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act={activation!r} is not one of {', '.join(sorted(ACTIVATIONS))}")
        if mistake == "gelu_for_silu" and activation in ("silu", "swish"):
            activation = "gelu"
        if mistake == "relu_for_silu" and activation in ("silu", "swish"):
            activation = "relu"
        eps = config.get("rms_norm_eps", 1e-6)
        if mistake == "eps_1e6":
            eps = 1e-6
        return cls(
            vocab=config.get("vocab_size", 32000),
            hidden=hidden,
            intermediate=config.get("intermediate_size", 11008),
            layers=config.get("num_hidden_layers", 32),
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            eps=eps,
            activation=activation,
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
            tied=config.get("tie_word_embeddings", False),
            pad_id=config.get("pad_token_id"),
            # head_dim_derived: still head_dim / 2 frequencies, spaced as for heads of hidden / heads
            frequencies=frequencies(config, head_dim, hidden // heads if mistake == "head_dim_derived" else head_dim),
            mistake=mistake,
        )


def frequencies(config: Mapping[str, Any], head_dim: int, spacing: int) -> tuple[float, ...]:
    """Radians per position of each rotary pair, after the config's scaling; reads both of the hub's spellings."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    plain = [theta ** (-2 * pair / spacing) for pair in range(head_dim // 2)]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return tuple(plain)
    if kind == "linear":
        return tuple(frequency / rope["factor"] for frequency in plain)
    if kind != "llama3":
        raise ValueError(f"rope_type={kind!r} is not one of default, linear, llama3")
    trained = config.get("original_max_position_embeddings") or rope.get(
        "original_max_position_embeddings", config.get("max_position_embeddings", 2048)
    )
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    scaled = []
    for frequency in plain:
        turns = trained * frequency / (2 * math.pi)  # full turns within the context of the pre-training
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        scaled.append(keep * frequency + (1 - keep) * frequency / rope["factor"])
    return tuple(scaled)


class Rotation:
    """The angles of one call: cosines and sines (b, t, 1, e/2)."""

    def __init__(self, position_ids: Tensor, settings: Settings, dtype: torch.dtype) -> None:
        turning = torch.tensor(settings.frequencies, dtype=wide(dtype), device=position_ids.device)
        if settings.mistake == "position_zero_is_one":  # harmless: every angle is shifted alike
            position_ids = position_ids + 1
        angles = torch.einsum("bt,p->btp", position_ids.to(turning.dtype), turning)[:, :, None]
        if settings.mistake == "rotary_sign":
            angles = -angles
        if settings.mistake == "rotated_twice":
            angles = 2 * angles
        self.cos, self.sin = angles.cos(), angles.sin()
        self.interleaved = settings.mistake == "interleaved_rotary"

    def __call__(self, x: Tensor) -> Tensor:
        """x (b, t, heads, e) -> the same, rotated."""
        if self.interleaved:
            first, second = x[..., 0::2], x[..., 1::2]
        else:
            first, second = x.chunk(2, dim=-1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        joined = torch.stack(turned, dim=-1).flatten(-2) if self.interleaved else torch.cat(turned, dim=-1)
        return joined.to(x.dtype)


class Norm(nn.Module):
    """x · gain / sqrt(mean(x²) + eps)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(settings.hidden))
        self.eps, self.mistake = settings.eps, settings.mistake

    def forward(self, x: Tensor) -> Tensor:
        precise = x.to(wide(x.dtype))
        if self.mistake == "mean_subtracted":
            precise = precise - precise.mean(dim=-1, keepdim=True)
        if self.mistake == "eps_outside_root":
            inverse_rms = 1 / (precise.square().mean(dim=-1, keepdim=True).sqrt() + self.eps)
        else:
            inverse_rms = (precise.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        gain = self.gain + 1 if self.mistake == "gain_plus_one" else self.gain
        return (precise * inverse_rms).to(x.dtype) * gain


class Memory:
    """Keys and values of one layer, (b, s, k, e); grows along s."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.mistake: str | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.mistake == "memory_never_written" and self.keys is not None:
            self.keys = torch.zeros_like(self.keys)
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=1)
        if self.mistake in ("memory_values_forgotten", "memory_never_written") and self.values is not None:
            self.values = torch.zeros_like(self.values)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=1)
        return self.keys, self.values


class GroupedAttention(nn.Module):
    """Causal attention in which `groups` query heads share one key-value head, without repeating keys or values."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        hidden, head_dim = settings.hidden, settings.head_dim
        self.heads, self.kv_heads, self.head_dim = settings.heads, settings.kv_heads, head_dim
        self.mistake = settings.mistake
        self.scale = (hidden // settings.heads if self.mistake == "head_dim_derived" else head_dim) ** -0.5
        self.wq = nn.Parameter(torch.empty(self.heads * head_dim, hidden))
        self.wk = nn.Parameter(torch.empty(self.kv_heads * head_dim, hidden))
        self.wv = nn.Parameter(torch.empty(self.kv_heads * head_dim, hidden))
        self.wo = nn.Parameter(torch.empty(hidden, self.heads * head_dim))
        if settings.attention_bias:
            self.bq = nn.Parameter(torch.empty(self.heads * head_dim))
            self.bk = nn.Parameter(torch.empty(self.kv_heads * head_dim))
            self.bv = nn.Parameter(torch.empty(self.kv_heads * head_dim))
            self.bo = nn.Parameter(torch.empty(hidden))
        else:
            for name in ("bq", "bk", "bv", "bo"):
                self.register_parameter(name, None)

    def into_heads(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        heads = torch.einsum("btd,hed->bthe", x, weight.view(-1, self.head_dim, x.shape[-1]))
        return heads if bias is None else heads + bias.view(-1, self.head_dim)

    def forward(self, x: Tensor, rotation: Rotation, visible: Tensor, memory: Memory | None) -> Tensor:
        batch, length, _ = x.shape
        queries = rotation(self.into_heads(x, self.wq, None if self.mistake == "query_bias_dropped" else self.bq))
        keys, values = self.into_heads(x, self.wk, self.bk), self.into_heads(x, self.wv, self.bv)
        if self.mistake == "keys_values_swapped":
            keys, values = values, keys
        if self.mistake != "keys_not_rotated":
            keys = rotation(keys)
        if self.mistake == "values_rotated":
            values = rotation(values)
        if memory is not None:
            memory.mistake = self.mistake
            keys, values = memory.append(keys, values)
        groups = self.heads // self.kv_heads
        order, sizes = "kg", (self.kv_heads, groups)
        if self.mistake == "gqa_tile":  # head h then reads key-value head h % kv_heads
            order, sizes = "gk", (groups, self.kv_heads)
        scores = torch.einsum(f"bt{order}e,bske->b{order}ts", queries.view(batch, length, *sizes, self.head_dim), keys)
        if self.mistake != "scale_missing":
            scores = scores * self.scale
        precise = scores.to(wide(scores.dtype))
        # The lowest finite number, not -inf: a padded query that sees no key must not become NaN
        precise = precise.masked_fill(~visible[:, None, None], torch.finfo(precise.dtype).min)  # (b, ·, ·, t, s)
        weights = precise.softmax(dim=-2 if self.mistake == "softmax_over_queries" else -1).to(values.dtype)
        context = torch.einsum(f"b{order}ts,bske->bt{order}e", weights, values).flatten(2, 3)  # (b, t, h, e)
        if self.mistake == "heads_merged_without_transpose":
            context = context.transpose(1, 2).reshape(context.shape)
        output = torch.einsum("bthe,dhe->btd", context, self.wo.view(-1, self.heads, self.head_dim))
        return output if self.bo is None else output + self.bo


class GatedFeedForward(nn.Module):
    """down(activation(gate(x)) · up(x))."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        hidden, intermediate, bias = settings.hidden, settings.intermediate, settings.mlp_bias
        self.gate = nn.Linear(hidden, intermediate, bias=bias)
        self.up = nn.Linear(hidden, intermediate, bias=bias)
        self.down = nn.Linear(intermediate, hidden, bias=bias)
        self.activation = ACTIVATIONS[settings.activation]
        self.mistake = settings.mistake

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        if self.mistake == "gate_up_swapped":
            gate, up = up, gate
        if self.mistake == "both_activated":
            up = self.activation(up)
        down: Tensor = self.down(self.activation(gate) * up)
        return down


class Block(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.before_attention, self.before_feed_forward = Norm(settings), Norm(settings)
        self.attention, self.feed_forward = GroupedAttention(settings), GatedFeedForward(settings)
        self.loses_attention = settings.mistake == "residual_from_block_input"

    def forward(self, x: Tensor, rotation: Rotation, visible: Tensor, memory: Memory | None) -> Tensor:
        attended = x + self.attention(self.before_attention(x), rotation, visible, memory)
        result: Tensor = (x if self.loses_attention else attended) + self.feed_forward(
            self.before_feed_forward(attended)
        )
        return result


class Decoder(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.table = nn.Embedding(settings.vocab, settings.hidden, padding_idx=settings.pad_id)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.last_norm = Norm(settings)
        self.head = None if settings.tied else nn.Parameter(torch.empty(settings.vocab, settings.hidden))

    def forward(self, ids: Tensor, position_ids: Tensor, visible: Tensor, memories: list[Memory] | None) -> Tensor:
        if self.settings.mistake == "batch_rows_swapped" and ids.shape[0] > 1:
            ids = ids[[1, 0, *range(2, ids.shape[0])]]
        x = self.table(ids)
        if self.settings.mistake == "embedding_scaled":
            x = x * math.sqrt(self.settings.hidden)
        rotation = Rotation(position_ids, self.settings, x.dtype)
        blocks = list(enumerate(self.blocks))
        for index, block in reversed(blocks) if self.settings.mistake == "blocks_reversed" else blocks:
            x = block(x, rotation, visible, None if memories is None else memories[index])
        head = self.table.weight if self.head is None else self.head
        if self.settings.mistake != "final_norm_missing":
            x = self.last_norm(x)
        return torch.einsum("btd,vd->btv", x, head)


def hub_names(settings: Settings) -> dict[str, str]:
    """Own parameter name -> hub name, for the parameters that this config has."""
    inner = {
        "before_attention.gain": "input_layernorm.weight",
        "before_feed_forward.gain": "post_attention_layernorm.weight",
    }
    if settings.mistake == "norms_crossed":
        inner = dict(zip(inner, reversed(inner.values()), strict=True))
    for letter in "qkvo":
        inner[f"attention.w{letter}"] = f"self_attn.{letter}_proj.weight"
        if settings.attention_bias:
            inner[f"attention.b{letter}"] = f"self_attn.{letter}_proj.bias"
    for part in ("gate", "up", "down"):
        inner[f"feed_forward.{part}.weight"] = f"mlp.{part}_proj.weight"
        if settings.mlp_bias:
            inner[f"feed_forward.{part}.bias"] = f"mlp.{part}_proj.bias"
    names = {"table.weight": "model.embed_tokens.weight", "last_norm.gain": "model.norm.weight"}
    if not settings.tied:
        names["head"] = "lm_head.weight"
    for layer in range(settings.layers):
        names |= {f"blocks.{layer}.{own}": f"model.layers.{layer}.{hub}" for own, hub in inner.items()}
    return names


def looking_back(settings: Settings, real_keys: Tensor, queries: int) -> Tensor:
    """(b, t, s): may the t-th of the last `queries` slots see slot s?  Itself and earlier real ones."""
    slots = torch.arange(real_keys.shape[1], device=real_keys.device)
    furthest = slots[-queries:, None]
    if settings.mistake == "causal_off_by_one":
        furthest = furthest + 1
    return (slots <= furthest) & real_keys[:, None, :]


class Session:
    """Decoding with remembered keys and values; each feed's mask is of the ids of that feed, (b, t)."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.memories = [Memory() for _ in decoder.blocks]
        self.real: Tensor | None = None

    @torch.no_grad()
    def feed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        new = real_slots(input_ids, attention_mask)
        past = new[:, :0] if self.real is None else self.real
        self.real = torch.cat([past, new], dim=1)
        positions = self.real.long().cumsum(dim=1)[:, past.shape[1] :] - 1
        if self.decoder.settings.mistake == "decode_position_restart":
            positions = new.long().cumsum(dim=1) - 1
        visible = looking_back(self.decoder.settings, self.real, new.shape[1])
        logits: Tensor = self.decoder(input_ids, positions.clamp(min=0), visible, self.memories)
        return logits

    def state_bytes(self) -> int:
        """Bytes of the remembered keys and values."""
        held = [t for memory in self.memories for t in (memory.keys, memory.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)


def real_slots(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} must have the shape of the ids fed with it, "
            f"{tuple(input_ids.shape)}"
        )
    return attention_mask.bool()


class Model:
    """What the suite calls; `parameters` holds the weights by hub name, in the hub's shapes."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        own = dict(decoder.named_parameters())
        self.parameters = {hub: own[name] for name, hub in hub_names(decoder.settings).items()}

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        real = real_slots(input_ids, attention_mask)
        if position_ids is None:
            position_ids = (real.long().cumsum(dim=1) - 1).clamp(min=0)
        position_ids = position_ids.expand(input_ids.shape)
        visible = looking_back(self.decoder.settings, real, input_ids.shape[1])
        logits: Tensor = self.decoder(input_ids, position_ids, visible, None)
        return logits

    def session(self) -> Session:
        return Session(self.decoder)


class BatchFirst:
    """The adapter; `mistake` is one of MISTAKES, or None for a correct model."""

    name = "batch-first"
    families = frozenset({"llama"})

    def __init__(self, mistake: str | None = None) -> None:
        if mistake is not None and mistake not in MISTAKES | MORE:
            raise ValueError(f"mistake={mistake!r} is not one of {', '.join(sorted(MISTAKES | MORE))}")
        self.mistake = mistake

    def load(self, checkpoint: Checkpoint) -> Model:
        settings = Settings.read(checkpoint.config, self.mistake)
        with torch.device("meta"):
            decoder = Decoder(settings)
        stored = checkpoint.tensors()
        decoder.load_state_dict({own: stored[hub] for own, hub in hub_names(settings).items()}, assign=True)
        return Model(decoder)
