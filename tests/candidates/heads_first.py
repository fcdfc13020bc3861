"""Llama as plain functions over the checkpoint's own dict of tensors: no nn.Module, heads first, (B, H, T, Dh).

Written as most published code is: norms, rotary tables and the softmax say `.float()` and `dtype=torch.float32`
whatever the weights are in, the rotation is x·cos + rotate_half(x)·sin, masks are added to the scores, key-value heads
are repeated, and the cache is concatenated.  So it is exact to float32 only, unless those casts are rewritten.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

MISTAKES = [
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
]
# Made in this file only.
MORE = [
    "exponent_halved",
    "half_without_minus",
    "scaling_ignored",
    "theta_default",
    "frequencies_reversed",
    "scale_twice",
    "scale_by_heads",
    "heads_split_by_view",
    "mask_after_softmax",
    "up_bias_dropped",
    "output_bias_dropped",
    "first_kv_head_for_all",
    "silu_is_sigmoid",
    "residual_from_normed",
    "last_layer_missing",
    "tied_anyway",
    "logits_capped",
    "padding_seen",
    "cache_new_first",
    "square_weight_transposed",
]

Weights = dict[str, torch.Tensor]
Cache = list[tuple[torch.Tensor, torch.Tensor]]  # one (keys, values) a layer, both (B, KV, S, Dh), keys rotated


class Hyper(NamedTuple):
    config: dict[str, Any]
    n_layer: int
    n_head: int
    n_kv: int
    d_head: int
    d_rope: int  # the head size that scale and rotary frequencies are computed from: d_head, but for a mistake
    eps: float
    mistake: str | None


def read_config(config: dict[str, Any], mistake: str | None) -> Hyper:
    n_head = config.get("num_attention_heads", 32)
    derived = config.get("hidden_size", 4096) // n_head
    d_head = derived if config.get("head_dim") is None else config["head_dim"]
    return Hyper(
        config=config,
        n_layer=config.get("num_hidden_layers", 32),
        n_head=n_head,
        n_kv=n_head if config.get("num_key_value_heads") is None else config["num_key_value_heads"],
        d_head=d_head,
        # silent form of the mistake: weights are still split by the config's head_dim, so that shapes agree
        d_rope=derived if mistake == "head_dim_derived" else d_head,
        eps=1e-6 if mistake == "eps_1e6" else config.get("rms_norm_eps", 1e-6),
        mistake=mistake,
    )


def weight_names(h: Hyper) -> list[str]:
    """The tensors that this config computes with; others in the file (old rotary buffers) are left alone."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    if not h.config.get("tie_word_embeddings", False):
        names.append("lm_head.weight")
    groups = (
        ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"), h.config.get("attention_bias", False)),
        ("mlp", ("gate_proj", "up_proj", "down_proj"), h.config.get("mlp_bias", False)),
    )
    for i in range(h.n_layer):
        names += [f"model.layers.{i}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
        for part, projections, bias in groups:
            for kind in ("weight", "bias") if bias else ("weight",):
                names += [f"model.layers.{i}.{part}.{projection}.{kind}" for projection in projections]
    return names


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """One dict with rope_type and rope_theta, from either of the spellings that hub configs have used."""
    settings = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    settings.setdefault("rope_type", settings.get("type", "default"))
    settings.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if "original_max_position_embeddings" in config:
        settings["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    settings.setdefault("original_max_position_embeddings", config.get("max_position_embeddings", 2048))
    return settings


def inverse_frequencies(h: Hyper, device: torch.device) -> torch.Tensor:
    """(Dh / 2,)"""
    rope = rope_settings(h.config)
    exponents = torch.arange(0, h.d_head, 2, device=device).float() / h.d_rope
    if h.mistake == "exponent_halved":
        exponents = exponents / 2
    if h.mistake == "frequencies_reversed":
        exponents = exponents.flip(0)
    inv_freq: torch.Tensor = 1.0 / ((10000.0 if h.mistake == "theta_default" else rope["rope_theta"]) ** exponents)
    if rope["rope_type"] == "default" or h.mistake == "scaling_ignored":
        return inv_freq
    factor: float = rope.get("factor", 1.0)
    if rope["rope_type"] == "linear":
        return inv_freq / factor
    if rope["rope_type"] != "llama3":
        raise ValueError(f"rope_type {rope['rope_type']!r}: only default, linear and llama3 exist here")
    # Llama 3.1: short wavelengths stay, long ones are stretched by the factor, those between are blended
    low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    stretched = inv_freq / factor
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * stretched + smooth * inv_freq
    long_or_blended = torch.where(wavelength > original / low, stretched, blended)
    return torch.where(wavelength < original / high, inv_freq, long_or_blended)


def rotary_tables(h: Hyper, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (B, 1, T, Dh) float32"""
    angles = position_ids[:, None, :, None].float() * inverse_frequencies(h, position_ids.device)
    # half-split: dimension j turns with dimension j + Dh/2; the mistaken layout pairs 2j with 2j + 1
    angles = (
        angles.repeat_interleave(2, dim=-1) if h.mistake == "interleaved_rotary" else torch.cat((angles, angles), -1)
    )
    return angles.cos(), angles.sin()


def rotate_half(h: Hyper, x: torch.Tensor) -> torch.Tensor:
    if h.mistake == "interleaved_rotary":
        return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    if h.mistake == "half_without_minus":
        return torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rotary(h: Hyper, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return (x.float() * cos + rotate_half(h, x.float()) * sin).type_as(x)


def rms_norm(w: Weights, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    xf = x.float()
    xf = xf / torch.sqrt(xf.pow(2).mean(-1, keepdim=True) + eps)
    return w[name + ".weight"] * xf.type_as(x)


def linear(w: Weights, name: str, x: torch.Tensor, has_bias: bool) -> torch.Tensor:
    y = x @ w[name + ".weight"].T
    return y + w[name + ".bias"] if has_bias else y


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))


def activation(h: Hyper, x: torch.Tensor) -> torch.Tensor:
    kind = h.config.get("hidden_act", "silu")
    if kind in ("silu", "swish"):
        if h.mistake == "silu_is_sigmoid":
            return torch.sigmoid(x)
        return gelu_erf(x) if h.mistake == "gelu_for_silu" else x * torch.sigmoid(x)
    if kind == "gelu":
        return gelu_erf(x)
    if kind in ("gelu_new", "gelu_pytorch_tanh"):
        return gelu_tanh(x)
    if kind == "relu":
        return torch.relu(x)
    raise ValueError(f"hidden_act {kind!r}: only silu, gelu, gelu_new, gelu_pytorch_tanh and relu exist here")


def repeat_kv(h: Hyper, x: torch.Tensor) -> torch.Tensor:
    """(B, KV, S, Dh) -> (B, H, S, Dh): each key-value head serves H / KV neighbouring query heads."""
    times = h.n_head // h.n_kv
    if h.mistake == "gqa_tile":
        return x.repeat(1, times, 1, 1)
    if h.mistake == "first_kv_head_for_all":
        return x[:, :1].repeat(1, h.n_head, 1, 1)
    batch, n_kv, length, d_head = x.shape
    return x[:, :, None].expand(batch, n_kv, times, length, d_head).reshape(batch, n_kv * times, length, d_head)


def additive_mask(h: Hyper, keep: torch.Tensor, n_new: int) -> torch.Tensor:
    """0 where the last n_new tokens may look, the most negative float32 elsewhere; (B, 1, T, S).

    keep: (B, S), false at padding.  With S = 4, n_new = 2 the causal part is [[1,1,1,0], [1,1,1,1]].
    """
    n_all = keep.shape[1]
    diagonal = n_all - n_new + (1 if h.mistake == "causal_off_by_one" else 0)
    causal = torch.ones(n_new, n_all, dtype=torch.bool, device=keep.device).tril(diagonal)
    if h.mistake == "padding_seen":
        keep = torch.ones_like(keep)
    allowed = causal & keep[:, None, None, :]
    zeros = torch.zeros(allowed.shape, dtype=torch.float32, device=keep.device)
    return zeros.masked_fill(~allowed, torch.finfo(torch.float32).min)


def attention(
    h: Hyper,
    w: Weights,
    name: str,
    x: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    batch, length, _ = x.shape
    bias = h.config.get("attention_bias", False)

    def heads(projection: str, count: int) -> torch.Tensor:
        y = linear(w, f"{name}.{projection}", x, bias)
        if h.mistake == "heads_split_by_view":
            return y.view(batch, count, length, h.d_head)
        return y.view(batch, length, count, h.d_head).transpose(1, 2)

    q, k, v = heads("q_proj", h.n_head), heads("k_proj", h.n_kv), heads("v_proj", h.n_kv)  # (B, heads, T, Dh)
    q, k = apply_rotary(h, q, *tables), apply_rotary(h, k, *tables)
    if past is not None:
        k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        if h.mistake == "cache_new_first":
            k, v = k.roll(length, 2), v.roll(length, 2)
    scores = q @ repeat_kv(h, k).transpose(-1, -2)  # (B, H, T, S)
    if h.mistake != "scale_missing":
        scores = scores / math.sqrt(h.n_head if h.mistake == "scale_by_heads" else h.d_rope)
    if h.mistake == "scale_twice":
        scores = scores / math.sqrt(h.d_rope)
    if h.mistake == "mask_after_softmax":
        probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(x) * (mask == 0)
    else:
        probabilities = F.softmax(scores + mask, dim=-1, dtype=torch.float32).type_as(x)
    context = probabilities @ repeat_kv(h, v)  # (B, H, T, Dh)
    if h.mistake != "heads_merged_without_transpose":
        context = context.transpose(1, 2)  # (B, T, H, Dh)
    merged = context.reshape(batch, length, h.n_head * h.d_head)
    return linear(w, f"{name}.o_proj", merged, bias and h.mistake != "output_bias_dropped"), (k, v)


def feed_forward(h: Hyper, w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    bias = h.config.get("mlp_bias", False)
    gate = linear(w, f"{name}.gate_proj", x, bias and h.mistake != "up_bias_dropped")
    up = linear(w, f"{name}.up_proj", x, bias and h.mistake != "up_bias_dropped")
    product = gate * activation(h, up) if h.mistake == "gate_up_swapped" else activation(h, gate) * up
    return linear(w, f"{name}.down_proj", product, bias)


def layer(
    h: Hyper,
    w: Weights,
    index: int,
    x: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    name = f"model.layers.{index}"
    first, second = "input_layernorm", "post_attention_layernorm"
    if h.mistake == "norms_crossed":
        first, second = second, first
    normed = rms_norm(w, f"{name}.{first}", x, h.eps)
    attended, present = attention(h, w, f"{name}.self_attn", normed, tables, mask, past)
    x = (normed if h.mistake == "residual_from_normed" else x) + attended
    normed = rms_norm(w, f"{name}.{second}", x, h.eps)
    skipped = normed if h.mistake == "residual_from_normed" else x
    return skipped + feed_forward(h, w, f"{name}.mlp", normed), present


def forward(
    h: Hyper,
    w: Weights,
    ids: torch.Tensor,
    position_ids: torch.Tensor,
    keep: torch.Tensor,
    past: Cache | None = None,
) -> tuple[torch.Tensor, Cache]:
    """Logits of `ids` (B, T, V), and the cache that includes them.  keep: (B, past + T), false at padding."""
    if h.mistake == "batch_rows_swapped" and len(ids) > 1:
        ids = torch.cat((ids[1:2], ids[0:1], ids[2:]))
    x = F.embedding(ids, w["model.embed_tokens.weight"], padding_idx=h.config.get("pad_token_id"))
    tables = rotary_tables(h, position_ids)
    mask = additive_mask(h, keep, ids.shape[1])
    presents: Cache = []
    for index in range(h.n_layer - 1 if h.mistake == "last_layer_missing" else h.n_layer):
        x, present = layer(h, w, index, x, tables, mask, past[index] if past else None)
        presents.append(present)
    x = rms_norm(w, "model.norm", x, h.eps)
    tied = h.config.get("tie_word_embeddings", False) or h.mistake == "tied_anyway"
    logits = x @ w["model.embed_tokens.weight" if tied else "lm_head.weight"].T
    return 30 * torch.tanh(logits / 30) if h.mistake == "logits_capped" else logits, presents


def as_keep(ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if attention_mask is None:
        attention_mask = torch.ones_like(ids)
    if attention_mask.shape != ids.shape:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, input_ids are {tuple(ids.shape)}")
    return attention_mask != 0


def count_positions(keep: torch.Tensor, before: torch.Tensor | int = 0) -> torch.Tensor:
    """Index of each real token among the real tokens of its row, `before` of them having come earlier."""
    return torch.clamp(keep.long().cumsum(-1) + before - 1, min=0)


class Session:
    """feed(ids, mask of those ids) -> logits of those ids; a row may take part in a feed with fewer real tokens."""

    def __init__(self, h: Hyper, weights: Weights) -> None:
        self.h, self.weights = h, weights
        self.cache: Cache = []
        self.keep: torch.Tensor | None = None

    @torch.no_grad()
    def feed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        keep = as_keep(input_ids, attention_mask)
        if self.keep is None or self.h.mistake == "decode_position_restart":
            positions = count_positions(keep)
        else:
            positions = count_positions(keep, before=self.keep.sum(-1, keepdim=True))
        self.keep = keep if self.keep is None else torch.cat((self.keep, keep), dim=1)
        logits, self.cache = forward(self.h, self.weights, input_ids, positions, self.keep, self.cache)
        return logits

    def state_bytes(self) -> int:
        return sum(t.nbytes for pair in self.cache for t in pair)


class FunctionalLlama:
    """`parameters` is the dict that the functions compute from, in hub names and shapes."""

    def __init__(self, h: Hyper, weights: Weights) -> None:
        self.h = h
        self.parameters = weights

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        keep = as_keep(input_ids, attention_mask)
        if position_ids is None:
            position_ids = count_positions(keep)
        elif position_ids.dim() == 1:
            position_ids = position_ids[None]
        return forward(self.h, self.parameters, input_ids, position_ids, keep)[0]

    def session(self) -> Session:
        return Session(self.h, self.parameters)


class HeadsFirst:
    """Adapter.  `mistake`: one of MISTAKES; None is the correct model."""

    name = "heads-first"
    families = frozenset({"llama"})

    def __init__(self, mistake: str | None = None) -> None:
        if mistake is not None and mistake not in MISTAKES + MORE:
            raise ValueError(f"unknown mistake {mistake!r}; there are {MISTAKES + MORE}")
        self.mistake = mistake

    def load(self, checkpoint: Any) -> FunctionalLlama:
        h = read_config(checkpoint.config, self.mistake)
        stored = checkpoint.tensors()
        if self.mistake == "square_weight_transposed":
            square = [
                name for name, t in stored.items() if "_proj" in name and t.ndim == 2 and t.shape[0] == t.shape[1]
            ]
            stored = stored | {name: stored[name].T for name in square}
        return FunctionalLlama(h, {name: stored[name].detach().requires_grad_() for name in weight_names(h)})
