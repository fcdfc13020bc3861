"""Phi-1, 1.5 and 2: a decoder of parallel blocks with LayerNorm, rotary positions on part of each head, and biases.

Gunasekar et al. 2023, Textbooks Are All You Need (arXiv:2306.11644), section 2.3; Li et al. 2023, phi-1.5
(arXiv:2309.05463), section 2.1. Phi-2 (Microsoft Research, December 2023) is the same architecture, larger. The papers
give sizes; biases, the tanh form of GELU and the one norm of a block stand in the published code and checkpoints only.

Modules carry the names of Hugging Face checkpoints, so that a checkpoint's names are the state dict's names. Dropout is
not implemented: train() and eval() change nothing.

Shapes: B batch, T tokens of this call, S tokens so far (cached, new), H query heads, KV key/value heads, Dh head_dim.
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
from reference_impl.nn.attention import AttentionKernel, merge_heads, split_heads
from reference_impl.nn.feed_forward import BiasedFeedForward, activation
from reference_impl.nn.kv_cache import Cache, KVCache, LayerCache, Session, tokens_of_call
from reference_impl.nn.norm import LayerNorm

# Keys of Phi's config.json that say nothing about what a forward pass computes, beside those of every family.
KEYS_WITHOUT_EFFECT = WITHOUT_EFFECT | {"embd_pdrop", "resid_pdrop"}


@dataclass(frozen=True, kw_only=True)
class PhiConfig:
    """The keys of config.json that decide what Phi computes, with Hugging Face's defaults (Phi-1 and 1.5)."""

    # Number of token ids.
    vocab_size: int = 51200
    # Width of the residual stream.
    hidden_size: int = 2048
    # Width inside the feed-forward block.
    intermediate_size: int = 8192
    # Number of blocks.
    num_hidden_layers: int = 24
    # Number of query heads, H.
    num_attention_heads: int = 32
    # Number of key/value heads, KV; null: as many as query heads. Each serves H / KV query heads.
    num_key_value_heads: int = DERIVED
    # Activation of the feed-forward block.
    hidden_act: str = "gelu_new"
    # Added to the variance in every norm.
    layer_norm_eps: float = 1e-5
    # Base of the rotary frequencies.
    rope_theta: float = 10000.0
    # How rotary frequencies are stretched for longer contexts; null: not at all.
    rope_scaling: rotary.RopeScaling = None
    # The part of each head, its first elements, that rotary positions turn.
    partial_rotary_factor: float = 0.5
    # Whether each query and key head is normalised by a LayerNorm, before it is turned.
    qk_layernorm: bool = False
    # Whether the weight of the output projection is the embedding table; its bias is its own.
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        require_positive(self)
        require_divisible(self, "hidden_size", "num_attention_heads", "give a divisor of it")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        require_divisible(self, "num_attention_heads", "num_key_value_heads", "give a divisor of it")
        if self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"partial_rotary_factor={self.partial_rotary_factor} of a head of {self.head_dim} elements turns "
                f"{self.rotary_dim}: give a factor that turns an even number of them, from 2 to {self.head_dim}"
            )
        activation(self.hidden_act)

    @property
    def head_dim(self) -> int:
        """Dh."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """How many elements of a head are turned."""
        return rotary.rotary_dim(self.head_dim, self.partial_rotary_factor)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "PhiConfig":
        """Reads a parsed config.json of transformers 4.x or 5.x.

        Raises:
            ValueError: not a Phi, a key that could change the result is unknown, or a value is not valid.
        """
        require_model_type(config, "phi")
        partial = {"partial_rotary_factor"}
        values = read_fields(cls, config, elsewhere=KEYS_WITHOUT_EFFECT | rotary.KEYS | partial)
        theta, scaling = rotary.read_rope(config, default_theta=cls.rope_theta, elsewhere=partial)
        factor = rotary.read_number(config, "partial_rotary_factor", default=cls.partial_rotary_factor)
        return cls(**values, rope_theta=theta, rope_scaling=scaling, partial_rotary_factor=factor)

    def to_dict(self) -> dict[str, Any]:
        """A config.json that transformers 4.x and 5.x both read: all about rotary positions stands in it twice."""
        rope = rotary.write_rope(self.rope_theta, self.rope_scaling, partial_rotary_factor=self.partial_rotary_factor)
        return {"architectures": ["PhiForCausalLM"], "model_type": "phi", **asdict(self), **rope}


class PhiAttention(AttentionKernel):
    """Causal self-attention with grouped queries; only the first `rotary_dim` elements of a head know their position.

        Attention(Q, K, V) = softmax(Q Kᵀ / √Dh) V

    Vaswani et al. 2017 (arXiv:1706.03762), equation 1: W^Q, W^K, W^V, W^O → q_proj, k_proj, v_proj, dense, all with a
    bias; d_k → Dh, all of the head. With `qk_layernorm` (Dehghani et al. 2023, arXiv:2302.05442, section 2) queries and
    keys pass a LayerNorm, one for all heads of a layer, before they are turned. Keys are cached as they are scored.

    Hooks can read the children `query_rotated` (B, H, T, Dh), `key_rotated` (B, KV, T, Dh) and `AttentionKernel`'s.
    """

    def __init__(self, config: PhiConfig, attention: str) -> None:
        super().__init__(attention)
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries)
        self.k_proj = nn.Linear(config.hidden_size, keys)
        self.v_proj = nn.Linear(config.hidden_size, keys)
        self.dense = nn.Linear(queries, config.hidden_size)
        self.q_layernorm, self.k_layernorm = (
            LayerNorm(hidden_size=config.head_dim, eps=config.layer_norm_eps) if config.qk_layernorm else nn.Identity()
            for _ in range(2)
        )
        self.query_rotated = nn.Identity()
        self.key_rotated = nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        cos: Float[Tensor, "#batch seq half"],
        sin: Float[Tensor, "#batch seq half"],
        mask: masks.Mask,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """`cos`, `sin`: from `rotary.tables` for `rotary_dim`. `mask`: True where a query may see a key."""
        query, key, value = self.project(x)
        query, key = self.turn(query, key, cos, sin)
        if cache is not None:
            key, value = cache.append(key, value)  # (B, KV, S, Dh)

        output: Tensor = self.dense(merge_heads(self.attend(query, key, value, mask)))
        return output

    def project(self, x: Float[Tensor, "batch seq hidden"]) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, T, Dh), key and value (B, KV, T, Dh), without positions."""
        query, key, value = (split_heads(proj(x), self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.q_layernorm(query), self.k_layernorm(key), value

    def turn(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key at their positions."""
        query, key = rotary.rotate_partly(query, cos, sin), rotary.rotate_partly(key, cos, sin)
        return self.query_rotated(query), self.key_rotated(key)


class PhiDecoderLayer(nn.Module):
    """One block: attention and feed-forward read the same normalised input, and both are added to the residual stream.

        n = LayerNorm(x)
        y = x + Attention(n) + FeedForward(n)

    The parallel form of Wang & Komatsuzaki 2021 (GPT-J); PaLM (arXiv:2204.02311), section 2. One norm serves both.
    """

    def __init__(self, config: PhiConfig, attention: str) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(hidden_size=config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = PhiAttention(config, attention)
        self.mlp = BiasedFeedForward(
            hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, hidden_act=config.hidden_act
        )

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        cos: Float[Tensor, "#batch seq half"],
        sin: Float[Tensor, "#batch seq half"],
        mask: masks.Mask,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        normed = self.input_layernorm(x)
        y: Tensor = x + self.self_attn(normed, cos, sin, mask, cache) + self.mlp(normed)
        return y


class PhiModel(nn.Module):
    """Embedding, blocks and final norm: everything but the output projection."""

    def __init__(self, config: PhiConfig, attention: str) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PhiDecoderLayer(config, attention) for _ in range(config.num_hidden_layers))
        self.final_layernorm = LayerNorm(hidden_size=config.hidden_size, eps=config.layer_norm_eps)

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
        mask = masks.visible(tokens, num_queries=seq)  # (B, 1, T, S)
        x: Tensor = self.embed_tokens(input_ids)  # (B, T, hidden)
        cos, sin = rotary.tables(position_ids, config.rotary_dim, config.rope_theta, config.rope_scaling, dtype=x.dtype)
        layer_caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, layer_cache in zip(self.layers, layer_caches, strict=True):
            x = layer(x, cos, sin, mask, layer_cache)
        if cache is not None:
            cache.commit(tokens)
        hidden: Tensor = self.final_layernorm(x)
        return hidden


class Phi(nn.Module):
    """Phi with its output projection: token ids in, logits of the next token out; `checkpoint` loads the weights."""

    def __init__(self, config: PhiConfig, attention: str = "eager") -> None:
        """`attention`: "eager" writes attention out, and its parts can be hooked; "sdpa" uses torch's fused kernel."""
        super().__init__()
        self.config = config
        self.model = PhiModel(config, attention)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
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
        """Logits of the token after each of `input_ids`; arguments and errors are those of `models.llama.Llama`."""
        logits: Tensor = self.lm_head(self.model(input_ids, attention_mask, position_ids, cache, lengths))
        return logits

    def session(self, max_length: int | None = None) -> Session:
        """A batch of texts to be fed piece by piece; `max_length` (tokens, padding included) fixes its memory."""
        return Session(self, KVCache(num_hidden_layers=self.config.num_hidden_layers, max_length=max_length))
