"""Mistral: Llama's decoder with a sliding window, so that a token attends to the last few keys only.

Jiang et al. 2023, Mistral 7B (arXiv:2310.06825), section 2. Blocks are pre-norm with RMSNorm, rotary positions, grouped
queries and SwiGLU, without biases. The window is `sliding_window` keys, self included.

The session keeps all keys and masks those beyond the window; the paper's rolling buffer, which forgets them, computes
the same. Modules carry the names of Hugging Face checkpoints, so that a checkpoint's names are the state dict's names.
Dropout is not implemented: train() and eval() change nothing.

Shapes: B batch, T tokens of this call, S tokens so far (cached and new).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from reference_impl.config import (
    DERIVED,
    WITHOUT_EFFECT,
    read_fields,
    require_divisible,
    require_model_type,
    require_positive,
)
from reference_impl.nn import masks, rotary
from reference_impl.nn.attention import GroupedQueryAttention
from reference_impl.nn.feed_forward import GatedFeedForward, activation
from reference_impl.nn.kv_cache import Cache, KVCache, LayerCache, Session, tokens_of_call
from reference_impl.nn.norm import RMSNorm
from reference_impl.nn.rolling_cache import RollingCache


@dataclass(frozen=True, kw_only=True)
class MistralConfig:
    """The keys of config.json that decide what Mistral computes, with Hugging Face's defaults.

    Raises ValueError where a value is out of range or two do not fit together.
    """

    # Number of token ids.
    vocab_size: int = 32000
    # Width of the residual stream.
    hidden_size: int = 4096
    # Width inside the feed-forward block.
    intermediate_size: int = 14336
    # Number of blocks.
    num_hidden_layers: int = 32
    # Number of query heads, H.
    num_attention_heads: int = 32
    # Number of key/value heads, KV. Each serves H / KV query heads.
    num_key_value_heads: int = 8
    # Width of a head, Dh; null: hidden_size / num_attention_heads.
    head_dim: int = DERIVED
    # Activation on the gate of the feed-forward block.
    hidden_act: str = "silu"
    # Added to the mean square in every norm.
    rms_norm_eps: float = 1e-6
    # Base of the rotary frequencies.
    rope_theta: float = 10000.0
    # How rotary frequencies are stretched for longer contexts; null: not at all.
    rope_scaling: rotary.RopeScaling = None
    # Whether the output projection is the embedding table.
    tie_word_embeddings: bool = False
    # How many keys a query sees, its own included; null: all before it.
    sliding_window: int | None = 4096

    def __post_init__(self) -> None:
        require_positive(self)
        if self.head_dim is None:
            require_divisible(self, "hidden_size", "num_attention_heads", "or give head_dim")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        require_divisible(self, "num_attention_heads", "num_key_value_heads", "give a divisor of it")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of elements")
        activation(self.hidden_act)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "MistralConfig":
        """Reads a parsed config.json of transformers 4.x or 5.x.

        Raises:
            ValueError: not a Mistral, a key that could change the result is unknown, or a value is not valid.
        """
        require_model_type(config, "mistral")
        values = read_fields(cls, config, elsewhere=WITHOUT_EFFECT | rotary.KEYS)
        rope_theta, rope_scaling = rotary.read_rope(config, default_theta=cls.rope_theta)
        return cls(**values, rope_theta=rope_theta, rope_scaling=rope_scaling)

    def to_dict(self) -> dict[str, Any]:
        """A config.json that transformers 4.x and 5.x both read: theta and scaling stand in it in both spellings."""
        rope = rotary.write_rope(self.rope_theta, self.rope_scaling)
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **asdict(self), **rope}


class MistralDecoderLayer(nn.Module):
    """One block; each half normalises its input and adds to the residual stream.

        h = x + Attention(RMSNorm(x))
        y = h + FeedForward(RMSNorm(h))

    Both norms have weights of their own, as in LLaMA (arXiv:2302.13971), section 2.2.
    """

    def __init__(self, config: MistralConfig, attention: str) -> None:
        super().__init__()
        self.self_attn = GroupedQueryAttention(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=False,
            attention=attention,
        )
        self.mlp = GatedFeedForward(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            bias=False,
        )
        self.input_layernorm = RMSNorm(hidden_size=config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(hidden_size=config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        cos: Float[Tensor, "#batch seq half"],
        sin: Float[Tensor, "#batch seq half"],
        mask: masks.Mask,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        h: Tensor = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        y: Tensor = h + self.mlp(self.post_attention_layernorm(h))
        return y


class MistralModel(nn.Module):
    """Embedding, blocks and final norm: everything but the output projection."""

    def __init__(self, config: MistralConfig, attention: str) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MistralDecoderLayer(config, attention) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(hidden_size=config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: masks.PaddingMask | None = None,
        position_ids: Int[Tensor, "#batch #seq"] | None = None,
        cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        config, seq = self.config, input_ids.shape[1]
        tokens = tokens_of_call(input_ids, attention_mask, lengths, cache)  # (B, S)
        position_ids = masks.resolve_positions(position_ids, input_ids, tokens)  # (B or 1, T)
        mask = masks.visible(tokens, num_queries=seq, sliding_window=config.sliding_window)  # (B, 1, T, S)

        x: Tensor = self.embed_tokens(input_ids)  # (B, T, hidden)
        cos, sin = rotary.tables(position_ids, config.head_dim, config.rope_theta, config.rope_scaling, dtype=x.dtype)
        layer_caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, layer_cache in zip(self.layers, layer_caches, strict=True):
            x = layer(x, cos, sin, mask, layer_cache)
        if cache is not None:
            cache.commit(tokens)
        hidden: Tensor = self.norm(x)
        return hidden


class Mistral(nn.Module):
    """Mistral with its output projection: token ids in, logits of the next token out.

    Weights start at torch's defaults; `reference_impl.checkpoint` loads trained ones.
    """

    def __init__(self, config: MistralConfig, attention: str = "eager") -> None:
        """`attention`: "eager" writes attention out, and its parts can be hooked; "sdpa" uses torch's fused kernel."""
        super().__init__()
        self.config = config
        self.model = MistralModel(config, attention)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: masks.PaddingMask | None = None,
        position_ids: Int[Tensor, "#batch #seq"] | None = None,
        cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the token after each of `input_ids`. Logits at padding mean nothing, but are finite.

        Args:
            attention_mask: one number for each of `input_ids`, 1 real and 0 padding, on either side.
            position_ids: by default the number of real tokens before each in its row, cached ones included. They
                only turn queries and keys: what a token may see follows from its place. One row may serve all.
            cache: earlier tokens of the same rows; these are added to it. Needs torch.no_grad().
            lengths: where the one row of `input_ids` is several texts, one behind the other, how many tokens each has.
                Each sees itself alone, and positions start again. `reference_impl.packing` puts them so.

        Raises:
            ValueError: the mask or the positions do not fit `input_ids`, or these do not fit `cache`.
        """
        logits: Tensor = self.lm_head(self.model(input_ids, attention_mask, position_ids, cache, lengths))
        return logits

    def session(self, max_length: int | None = None) -> Session:
        """A batch of texts to be fed piece by piece; `max_length` (tokens, padding included) fixes its memory.

        With a window it is the window that does: no more than `sliding_window` tokens are kept.
        """
        layers, window = self.config.num_hidden_layers, self.config.sliding_window
        if window is None:
            return Session(self, KVCache(num_hidden_layers=layers, max_length=max_length))
        return Session(self, RollingCache(num_hidden_layers=layers, sliding_window=window, max_length=max_length))
