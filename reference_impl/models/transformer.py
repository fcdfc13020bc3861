"""The Transformer: an encoder and a decoder of post-norm blocks, sinusoidal positions, one embedding table for all.

Vaswani et al. 2017 (arXiv:1706.03762), section 3. Modules carry the names of Marian checkpoints (Junczys-Dowmunt et al.
2018, arXiv:1804.00344) on the hub, so that a checkpoint's names are the state dict's names. Marian lays positions out
in another order (`TransformerConfig.position_layout`) and adds a bias to the logits; both are the paper's model
otherwise. Dropout is not implemented: train() and eval() change nothing.

Shapes: B batch, N source, T tokens of the target in this call, S of its tokens so far (cached and new).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference_impl.config import WITHOUT_EFFECT, read_fields, require_divisible, require_positive
from reference_impl.nn import masks
from reference_impl.nn.absolute_positions import sinusoidal_positions
from reference_impl.nn.cross_attention import DecodingSession, Memory, MultiHeadAttention, all_real
from reference_impl.nn.feed_forward import activation
from reference_impl.nn.kv_cache import KVCache, LayerCache
from reference_impl.nn.norm import LayerNorm

# Keys of config.json that say nothing about what a forward pass in evaluation computes, beside those of every family.
KEYS_WITHOUT_EFFECT = WITHOUT_EFFECT | {
    "_num_labels", "activation_dropout", "add_bias_logits", "add_final_layer_norm", "bad_words_ids", "classif_dropout",
    "classifier_dropout", "decoder_layerdrop", "decoder_start_token_id", "dropout", "encoder_layerdrop",
    "extra_pos_embeddings", "forced_eos_token_id", "gradient_checkpointing", "init_std", "is_decoder",
    "is_encoder_decoder", "max_length", "normalize_before", "normalize_embedding", "num_beams", "num_hidden_layers",
    "static_position_embeddings",
}  # fmt: skip

# model_type → the order of sines and cosines.
POSITION_LAYOUTS = {"transformer": "interleaved", "marian": "concatenated"}
# torch's default, and that of the authors' code; the paper names none.
EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The keys of config.json that decide what the Transformer computes, with Hugging Face's defaults for Marian.

    Raises ValueError where a value is out of range or two do not fit together.
    """

    # "transformer", the paper's order of sines and cosines, or "marian".
    model_type: str = "marian"
    # Number of token ids of the source.
    vocab_size: int = 58101
    # Number of token ids of the target; null: those of the source.
    decoder_vocab_size: int | None = None
    # Width of the residual stream.
    d_model: int = 1024
    # Number of blocks of the encoder.
    encoder_layers: int = 12
    # Number of blocks of the decoder.
    decoder_layers: int = 12
    # Number of heads of the encoder, each d_model / encoder_attention_heads wide.
    encoder_attention_heads: int = 16
    # Number of heads of the decoder, for its own tokens and for the source.
    decoder_attention_heads: int = 16
    # Width inside the encoder's feed-forward blocks.
    encoder_ffn_dim: int = 4096
    # Width inside the decoder's feed-forward blocks.
    decoder_ffn_dim: int = 4096
    # Activation of the feed-forward blocks; "relu" in the paper.
    activation_function: str = "gelu"
    # Whether embeddings are multiplied by √d_model; true in the paper.
    scale_embedding: bool = False
    # Whether source and target have one embedding table.
    share_encoder_decoder_embeddings: bool = True
    # Whether the output projection is the target's embedding table.
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        require_positive(self)
        if self.model_type not in POSITION_LAYOUTS:
            raise ValueError(f"model_type={self.model_type!r} must be one of {sorted(POSITION_LAYOUTS)}")
        require_divisible(self, "d_model", "encoder_attention_heads", "give a divisor of it")
        require_divisible(self, "d_model", "decoder_attention_heads", "give a divisor of it")
        if self.share_encoder_decoder_embeddings:
            if self.target_vocab_size != self.vocab_size:
                raise ValueError(
                    f"decoder_vocab_size={self.decoder_vocab_size} must be vocab_size={self.vocab_size} where "
                    "share_encoder_decoder_embeddings is true"
                )
            if not self.tie_word_embeddings:
                raise ValueError(
                    "tie_word_embeddings=false needs share_encoder_decoder_embeddings=false: a table that is shared "
                    "is the output projection too"
                )
        activation(self.activation_function)

    @property
    def target_vocab_size(self) -> int:
        return self.vocab_size if self.decoder_vocab_size is None else self.decoder_vocab_size

    @property
    def position_layout(self) -> str:
        """The order of sines and cosines, as `sinusoidal_positions` calls it."""
        return POSITION_LAYOUTS[self.model_type]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "TransformerConfig":
        """Reads a parsed config.json.

        Raises:
            ValueError: not a Transformer, a key that could change the result is unknown, or a value is not valid.
        """
        require_the_papers_order(config)
        return cls(**read_fields(cls, config, elsewhere=KEYS_WITHOUT_EFFECT - {"model_type"}))

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        return {"architectures": ["MarianMTModel"], "is_encoder_decoder": True, **asdict(self)}


def require_the_papers_order(config: Mapping[str, Any]) -> None:
    """Raises ValueError if old keys of config.json ask for a variant that Marian never had."""
    for key in ("normalize_before", "normalize_embedding", "add_final_layer_norm"):
        if config.get(key):
            raise ValueError(f"{key}={config[key]} is not implemented: norms stand after each residual connection only")


class EncoderLayer(nn.Module):
    """One block of the encoder; each part adds to its input and normalises the sum.

        n = LayerNorm(x + SelfAttention(x))
        y = LayerNorm(n + FeedForward(n)),   FeedForward(n) = act(n W₁ + b₁) W₂ + b₂

    Vaswani et al. 2017, section 3.1 and equation 2: W₁, b₁ → fc1, W₂, b₂ → fc2.
    """

    def __init__(self, config: TransformerConfig, attention: str) -> None:
        super().__init__()
        size, heads, inside = config.d_model, config.encoder_attention_heads, config.encoder_ffn_dim
        self.self_attn = MultiHeadAttention(hidden_size=size, num_attention_heads=heads, attention=attention)
        self.self_attn_layer_norm = LayerNorm(hidden_size=size, eps=EPSILON)
        self.fc1 = nn.Linear(size, inside)
        self.activation_fn = activation(config.activation_function)
        self.fc2 = nn.Linear(inside, size)
        self.final_layer_norm = LayerNorm(hidden_size=size, eps=EPSILON)

    def forward(
        self, x: Float[Tensor, "batch source hidden"], mask: Bool[Tensor, "batch 1 1 source"]
    ) -> Float[Tensor, "batch source hidden"]:
        n: Tensor = self.self_attn_layer_norm(x + self.self_attn(x, *self.self_attn.keys_values(x), mask))
        y: Tensor = self.final_layer_norm(n + self.fc2(self.activation_fn(self.fc1(n))))
        return y


class DecoderLayer(nn.Module):
    """One block of the decoder, which also attends to the encoder's output.

        n = LayerNorm(x + CausalSelfAttention(x))
        m = LayerNorm(n + Attention(n, encoder output))
        y = LayerNorm(m + FeedForward(m))

    Vaswani et al. 2017, section 3.1.
    """

    def __init__(self, config: TransformerConfig, attention: str) -> None:
        super().__init__()
        size, heads, inside = config.d_model, config.decoder_attention_heads, config.decoder_ffn_dim
        self.self_attn = MultiHeadAttention(hidden_size=size, num_attention_heads=heads, attention=attention)
        self.self_attn_layer_norm = LayerNorm(hidden_size=size, eps=EPSILON)
        self.encoder_attn = MultiHeadAttention(hidden_size=size, num_attention_heads=heads, attention=attention)
        self.encoder_attn_layer_norm = LayerNorm(hidden_size=size, eps=EPSILON)
        self.fc1 = nn.Linear(size, inside)
        self.activation_fn = activation(config.activation_function)
        self.fc2 = nn.Linear(inside, size)
        self.final_layer_norm = LayerNorm(hidden_size=size, eps=EPSILON)

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        mask: Bool[Tensor, "#batch 1 seq keys"],
        memory: Memory,
        source_mask: Bool[Tensor, "batch 1 1 source"],
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        key, value = self.self_attn.keys_values(x)  # (B, H, T, Dh)
        if cache is not None:
            key, value = cache.append(key, value)  # (B, H, S, Dh)
        n: Tensor = self.self_attn_layer_norm(x + self.self_attn(x, key, value, mask))
        m: Tensor = self.encoder_attn_layer_norm(n + self.encoder_attn(n, *memory, source_mask))
        y: Tensor = self.final_layer_norm(m + self.fc2(self.activation_fn(self.fc1(m))))
        return y


class Stack(nn.Module):
    """An embedding table and the blocks above it: the encoder's or the decoder's."""

    def __init__(self, config: TransformerConfig, embed_tokens: nn.Embedding, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.position_layout = config.position_layout

    def embed(
        self, input_ids: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch keys"]
    ) -> Float[Tensor, "batch seq hidden"]:
        """√d_model · E[id] + PE[position]: sections 3.4 and 3.5. `real`: of all tokens so far, those of this call last.

        A position is the number of real tokens before.
        """
        tokens: Tensor = self.embed_tokens(input_ids) * self.scale  # (B, T, hidden)
        position_ids = masks.positions(real, num_queries=input_ids.shape[1])
        positions = sinusoidal_positions(position_ids, tokens.shape[-1], self.position_layout, tokens.dtype)
        return tokens + positions


class EncoderDecoder(nn.Module):
    """Everything but the output projection."""

    def __init__(self, config: TransformerConfig, attention: str) -> None:
        super().__init__()
        source = target = nn.Embedding(config.vocab_size, config.d_model)
        if config.share_encoder_decoder_embeddings:
            self.shared = source
        else:
            target = nn.Embedding(config.target_vocab_size, config.d_model)
        self.encoder = Stack(config, source, [EncoderLayer(config, attention) for _ in range(config.encoder_layers)])
        self.decoder = Stack(config, target, [DecoderLayer(config, attention) for _ in range(config.decoder_layers)])

    def encode(
        self, input_ids: Int[Tensor, "batch source"], real: Bool[Tensor, "batch source"]
    ) -> Float[Tensor, "batch source hidden"]:
        x = self.encoder.embed(input_ids, real)
        for layer in self.encoder.layers:
            x = layer(x, all_real(real))
        return x

    def memory(self, encoded: Float[Tensor, "batch source hidden"]) -> list[Memory]:
        """The keys and values of the encoder's output for each block of the decoder."""
        attentions: list[Any] = [layer.encoder_attn for layer in self.decoder.layers]
        return [attention.keys_values(encoded) for attention in attentions]

    def decode(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: masks.PaddingMask | None,
        memory: list[Memory],
        source_real: Bool[Tensor, "batch source"],
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        real = masks.real_tokens(input_ids, attention_mask)  # (B, T)
        tokens = masks.in_order(real) if cache is None else cache.tokens(real)  # (B, S)
        x = self.decoder.embed(input_ids, tokens.real)
        mask = masks.visible(tokens, num_queries=input_ids.shape[1])  # (B, 1, T, S)
        layer_caches = [None] * len(self.decoder.layers) if cache is None else cache.layers
        for layer, pair, layer_cache in zip(self.decoder.layers, memory, layer_caches, strict=True):
            x = layer(x, mask, pair, all_real(source_real), layer_cache)
        if cache is not None:
            cache.commit(tokens)
        return x


class Transformer(nn.Module):
    """The Transformer with its output projection: source and target ids in, logits of the next target token out.

    Weights start at torch's defaults; `reference_impl.checkpoint` loads trained ones. `final_logits_bias` is Marian's;
    the paper has none, and it starts at zero.
    """

    final_logits_bias: Tensor

    def __init__(self, config: TransformerConfig, attention: str = "eager") -> None:
        """`attention`: "eager" writes attention out, and its parts can be hooked; "sdpa" uses torch's fused kernel."""
        super().__init__()
        self.config = config
        self.model = EncoderDecoder(config, attention)
        self.lm_head = nn.Linear(config.d_model, config.target_vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.decoder.embed_tokens.weight
        self.register_buffer("final_logits_bias", torch.zeros(1, config.target_vocab_size))

    def forward(
        self,
        input_ids: Int[Tensor, "batch source"],
        attention_mask: masks.PaddingMask | None = None,
        *,
        decoder_input_ids: Int[Tensor, "batch seq"],
        decoder_attention_mask: masks.PaddingMask | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the token after each of `decoder_input_ids`. Logits at padding mean nothing, but are finite.

        Args:
            attention_mask: one number for each of `input_ids`, the source, 1 real and 0 padding, on either side.
            decoder_attention_mask: the same for `decoder_input_ids`.

        Raises:
            ValueError: a mask does not fit its ids.
        """
        source_real = masks.real_tokens(input_ids, attention_mask)
        memory = self.model.memory(self.model.encode(input_ids, source_real))
        return self.logits(self.model.decode(decoder_input_ids, decoder_attention_mask, memory, source_real))

    def logits(self, x: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq vocab"]:
        logits: Tensor = self.lm_head(x)
        return logits + self.final_logits_bias

    @torch.no_grad()
    def session(
        self,
        input_ids: Int[Tensor, "batch source"],
        attention_mask: masks.PaddingMask | None = None,
        max_length: int | None = None,
    ) -> DecodingSession:
        """Encodes a batch of sources, whose targets are then fed piece by piece.

        `max_length` (tokens of the target, padding included) fixes the memory of the cache.
        """
        source_real = masks.real_tokens(input_ids, attention_mask)
        memory = self.model.memory(self.model.encode(input_ids, source_real))

        def decode(ids: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
            return self.logits(self.model.decode(ids, mask, memory, source_real, cache))

        cache = KVCache(num_hidden_layers=self.config.decoder_layers, max_length=max_length)
        return DecodingSession(decode, memory, cache)
