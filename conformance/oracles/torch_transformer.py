"""`torch.nn.Transformer` with a Marian checkpoint's weights: a second oracle beside Hugging Face's Marian.

torch's encoder and decoder add a norm after the last layer that neither the paper nor Marian has; it is left out.
Embeddings and positions are not in torch's module: they are put together here, positions by the loops of `equations`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from conformance.oracles.equations.sinusoid import position_encoding

ACTIVATIONS: dict[str, Any] = {
    "relu": torch.relu, "gelu": nn.functional.gelu, "swish": nn.functional.silu, "silu": nn.functional.silu,
    "gelu_new": lambda x: nn.functional.gelu(x, approximate="tanh"),
}  # fmt: skip
# torch's name of an attention -> Marian's
ATTENTIONS = {"self_attn": "self_attn", "multihead_attn": "encoder_attn"}
# torch's name of anything else -> Marian's, in the encoder and in the decoder
PLAIN = {
    "encoder": {"linear1": "fc1", "linear2": "fc2", "norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"},
    "decoder": {
        "linear1": "fc1", "linear2": "fc2", "norm1": "self_attn_layer_norm", "norm2": "encoder_attn_layer_norm",
        "norm3": "final_layer_norm",
    },
}  # fmt: skip


def logits(config: dict[str, Any], weights: dict[str, Tensor], input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
    """Logits (batch, seq, vocab) of sources and targets without padding, float64.  Call it under TrueDouble."""
    model = nn.Transformer(
        d_model=config["d_model"], batch_first=True, custom_encoder=_stack(config, "encoder"),
        custom_decoder=_stack(config, "decoder"),
    )  # fmt: skip
    model.load_state_dict(_converted(config, weights))
    model.eval()
    shared = weights.get("model.shared.weight")
    tables = [weights[f"model.{side}.embed_tokens.weight"] if shared is None else shared for side in PLAIN]
    source, target = (
        _embedded(config, table, ids) for table, ids in zip(tables, (input_ids, decoder_input_ids), strict=True)
    )
    causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
    with torch.no_grad():
        states: Tensor = model(source, target, tgt_mask=causal)
        return states @ weights.get("lm_head.weight", tables[1]).T + weights["final_logits_bias"]


def _stack(config: dict[str, Any], side: str) -> Any:
    """torch's encoder or decoder, post-norm, without the norm at the end."""
    layer_class, stack_class = {
        "encoder": (nn.TransformerEncoderLayer, nn.TransformerEncoder),
        "decoder": (nn.TransformerDecoderLayer, nn.TransformerDecoder),
    }[side]
    layer: Any = layer_class(
        config["d_model"], config[f"{side}_attention_heads"], config[f"{side}_ffn_dim"],
        activation=ACTIVATIONS[config.get("activation_function", "gelu")], batch_first=True, norm_first=False,
    )  # fmt: skip
    more = {"enable_nested_tensor": False} if side == "encoder" else {}
    return stack_class(layer, config[f"{side}_layers"], norm=None, **more)


def _embedded(config: dict[str, Any], table: Tensor, ids: Tensor) -> Tensor:
    """√d · E[id] + PE[position], in the order of sines and cosines that the checkpoint's kind has."""
    scale = math.sqrt(config["d_model"]) if config.get("scale_embedding", False) else 1.0
    layout = "interleaved" if config["model_type"] == "transformer" else "concatenated"
    rows = [position_encoding(place, config["d_model"], layout) for place in range(ids.shape[1])]
    return table[ids] * scale + torch.tensor(rows, dtype=torch.float64)


def _converted(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Marian's tensors under torch's names; torch keeps the projections of query, key and value in one."""
    found: dict[str, Tensor] = {}
    for side, plain in PLAIN.items():
        for layer in range(config[f"{side}_layers"]):
            ours, theirs = f"{side}.layers.{layer}.", f"model.{side}.layers.{layer}."
            for kind in ("weight", "bias"):
                found |= {f"{ours}{a}.{kind}": weights[f"{theirs}{b}.{kind}"] for a, b in plain.items()}
                for a, b in list(ATTENTIONS.items())[: 1 if side == "encoder" else 2]:
                    parts = [weights[f"{theirs}{b}.{part}_proj.{kind}"] for part in "qkv"]
                    found[f"{ours}{a}.in_proj_{kind}"] = torch.cat(parts)
                    found[f"{ours}{a}.out_proj.{kind}"] = weights[f"{theirs}{b}.out_proj.{kind}"]
    return found
