"""A translator on `torch.nn.Transformer`, as people build it: an independent candidate for the Transformer of 2017.

It shares no code with the oracles or `reference_impl`.  Embeddings, positions, masks and the head are its own; encoder
and decoder are torch's.  Each mistake is one that the class invites, a visible branch at the place where it lives.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Mistake -> where it shows: the check, and the first wrong probe of the case `distinct`.  None: embeddings that are
# wrong in both stacks leave nothing right to stand on, and a check of padding is not localised.
MISTAKES: dict[str, tuple[str, str | None]] = {
    "final_norms": ("golden.logits", "decoder.layers.0.cross_attention.key"),
    "norm_first": ("golden.logits", "encoder.layers.0.attention.query"),
    "activation_left_at_relu": ("golden.logits", "encoder.layers.0.feed_forward.activation"),
    "no_causal_mask": ("golden.logits", "decoder.layers.0.attention.scores"),
    "unscaled_embedding": ("golden.logits", "encoder.embedding"),
    "alternating_positions": ("golden.logits", "encoder.embedding"),
    "heads_of_the_encoder": ("golden.logits", "decoder.layers.0.attention.context"),
    "no_logits_bias": ("golden.logits", "logits"),
    "head_is_the_embedding": ("golden.logits", "logits"),
    "padding_of_the_source_attended": ("golden.left_padding", None),
    "padding_of_the_memory_attended": ("golden.right_padding", None),
    "padding_of_the_target_attended": ("golden.left_padding", None),
    "positions_count_padding": ("golden.left_padding", None),
}
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "swish": F.silu, "silu": F.silu}


class TorchTransformer:
    """mistake: one of `MISTAKES`, or None for the correct model."""

    name, families = "torch.nn.Transformer", frozenset({"transformer"})

    def __init__(self, mistake: str | None = None) -> None:
        assert mistake is None or mistake in MISTAKES
        self.mistake = mistake

    def load(self, checkpoint: Any) -> "Translator":
        return Translator(checkpoint, self.mistake)


class Translator:
    """The model of a checkpoint: source and target ids in, logits out."""

    def __init__(self, checkpoint: Any, mistake: str | None) -> None:
        self.config, self.mistake, self.dtype = checkpoint.config, mistake, checkpoint.dtype
        self.tensors = {name: tensor.to(checkpoint.dtype) for name, tensor in checkpoint.tensors().items()}
        self.heads = self.config["decoder_attention_heads"]
        if mistake == "heads_of_the_encoder":
            self.heads = self.config["encoder_attention_heads"]
        stacks = {f"custom_{side}": self._stack(side) for side in ("encoder", "decoder")}
        self.model: Any = nn.Transformer(d_model=self.config["d_model"], batch_first=True, **stacks)
        self.model = self.model.to(checkpoint.dtype).eval()
        self._fill()

    def _stack(self, side: str) -> nn.Module:
        config, mistake = self.config, self.mistake
        act = ACTIVATIONS[config.get("activation_function", "gelu")]
        if mistake == "activation_left_at_relu":
            act = F.relu
        options: dict[str, Any] = {
            "d_model": config["d_model"],
            "nhead": config["encoder_attention_heads"] if side == "encoder" else self.heads,
            "dim_feedforward": config[f"{side}_ffn_dim"],
            "activation": lambda x: act(x),  # a function that torch does not know keeps it from its fused path
            "batch_first": True,
            "norm_first": mistake == "norm_first",
        }
        final = nn.LayerNorm(config["d_model"]) if mistake == "final_norms" else None
        layers = config[f"{side}_layers"]
        if side == "encoder":
            layer: Any = nn.TransformerEncoderLayer(**options)
            return nn.TransformerEncoder(layer, layers, norm=final, enable_nested_tensor=False)
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(**options), layers, norm=final)

    def _fill(self) -> None:
        names = {
            "encoder": {"self_attn": "self_attn", "norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"},
            "decoder": {
                "self_attn": "self_attn", "norm1": "self_attn_layer_norm", "multihead_attn": "encoder_attn",
                "norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm",
            },
        }  # fmt: skip
        with torch.no_grad():
            for side, theirs in names.items():
                for number, layer in enumerate(getattr(self.model, side).layers):
                    for ours, hub in (theirs | {"linear1": "fc1", "linear2": "fc2"}).items():
                        self._copy(getattr(layer, ours), f"model.{side}.layers.{number}.{hub}.")

    def _copy(self, module: Any, prefix: str) -> None:
        if isinstance(module, nn.MultiheadAttention):
            for kind, joint in (("weight", module.in_proj_weight), ("bias", module.in_proj_bias)):
                joint.copy_(torch.cat([self.tensors[f"{prefix}{part}_proj.{kind}"] for part in "qkv"]))
            module, prefix = module.out_proj, f"{prefix}out_proj."
        module.weight.copy_(self.tensors[f"{prefix}weight"])
        module.bias.copy_(self.tensors[f"{prefix}bias"])

    def table(self, side: str) -> Tensor:
        shared = self.tensors.get("model.shared.weight")
        return self.tensors[f"model.{side}.embed_tokens.weight"] if shared is None else shared

    def embed(self, side: str, ids: Tensor, real: Tensor) -> Tensor:
        scaled = self.config.get("scale_embedding", False) and self.mistake != "unscaled_embedding"
        tokens = F.embedding(ids, self.table(side)) * (math.sqrt(self.config["d_model"]) if scaled else 1.0)
        places = real.long().cumsum(-1) - 1
        if self.mistake == "positions_count_padding":
            places = torch.arange(ids.shape[1]).expand_as(ids)
        return tokens + self.positions(places.clamp(min=0))

    def positions(self, places: Tensor) -> Tensor:
        size = self.config["d_model"]
        column = torch.arange(0, size, 2, dtype=torch.float64)
        angles = places.double()[..., None] * torch.exp(column * (-math.log(10000.0) / size))
        sines, cosines = angles.sin(), angles.cos()[..., : size // 2]
        alternating = self.config["model_type"] == "transformer" or self.mistake == "alternating_positions"
        if not alternating:
            return torch.cat((sines, cosines), dim=-1).to(self.dtype)
        table = torch.zeros(*places.shape, size, dtype=self.dtype)
        table[..., 0::2], table[..., 1::2] = sines.to(self.dtype), cosines.to(self.dtype)
        return table

    def hidden(self, real: Tensor) -> Tensor:
        """True where a target token may not look, (B · H, T, T); padding sees itself, so that nothing is NaN."""
        steps = real.shape[1]
        later = torch.ones(steps, steps, dtype=torch.bool).triu(diagonal=1)
        if self.mistake == "no_causal_mask":
            later = torch.zeros_like(later)
        padding = torch.zeros_like(real) if self.mistake == "padding_of_the_target_attended" else ~real
        found = (later | padding[:, None]) & ~torch.eye(steps, dtype=torch.bool)
        return found.repeat_interleave(self.heads, dim=0)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert decoder_input_ids is not None
        source_real, real = (
            torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            for ids, mask in ((input_ids, attention_mask), (decoder_input_ids, decoder_attention_mask))
        )
        in_source = None if self.mistake == "padding_of_the_source_attended" else ~source_real
        in_memory = None if self.mistake == "padding_of_the_memory_attended" else ~source_real
        with torch.no_grad():
            states = self.model(
                self.embed("encoder", input_ids, source_real), self.embed("decoder", decoder_input_ids, real),
                tgt_mask=self.hidden(real), src_key_padding_mask=in_source, memory_key_padding_mask=in_memory,
            )  # fmt: skip
            head = self.tensors.get("lm_head.weight", self.table("decoder"))
            if self.mistake == "head_is_the_embedding":
                head = self.table("decoder")
            logits = states @ head.T
            return logits if self.mistake == "no_logits_bias" else logits + self.tensors["final_logits_bias"]
