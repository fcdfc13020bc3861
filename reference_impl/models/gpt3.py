"""GPT-3: GPT-2 in which blocks of dense and of locally banded attention alternate.

Brown et al. 2020, Language Models are Few-Shot Learners (arXiv:2005.14165), section 2.1, which refers to Child et al.
2019, Sparse Transformers (arXiv:1904.10509). No weights were published: the config's keys are GPT-2's and two of our
own, `attention_pattern` and `window_size`. The paper does not state the width of the band; here it has no default.

Modules carry the names of GPT-2's checkpoints; a projection's weight is stored (in, out). Dropout is not implemented:
train() and eval() change nothing.

Shapes: B batch, T tokens of this call, S tokens so far (cached and new).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from reference_impl.config import DERIVED, read_fields, require_divisible, require_model_type, require_positive
from reference_impl.nn import masks
from reference_impl.nn.feed_forward import Conv1DFeedForward, activation
from reference_impl.nn.kv_cache import Cache, KVCache, LayerCache, Session, tokens_of_call
from reference_impl.nn.norm import LayerNorm
from reference_impl.nn.positions import LearnedPositions
from reference_impl.nn.self_attention import SelfAttention

# Keys of config.json that say nothing about what a forward pass computes.
KEYS_WITHOUT_EFFECT = {
    "architectures", "attn_pdrop", "bos_token_id", "embd_pdrop", "eos_token_id", "initializer_range", "model_type",
    "pad_token_id", "resid_pdrop", "torch_dtype",
}  # fmt: skip

# What a block's queries may see: all tokens before them, or the last `window_size`.
KINDS = ("dense", "banded")


@dataclass(frozen=True, kw_only=True)
class GPT3Config:
    """The keys of config.json that decide what GPT-3 computes; the defaults are the paper's largest model.

    Raises ValueError where a value is out of range or two do not fit together.
    """

    # Number of token ids.
    vocab_size: int = 50257
    # Rows of the position table: the most tokens a text may have (n_ctx in the paper).
    n_positions: int = 2048
    # Width of the residual stream (d_model in the paper).
    n_embd: int = 12288
    # Number of blocks.
    n_layer: int = 96
    # Number of heads, each n_embd / n_head wide.
    n_head: int = 96
    # Width inside the feed-forward block; null: 4 · n_embd.
    n_inner: int = DERIVED
    # Activation of the feed-forward block.
    activation_function: str = "gelu_new"
    # Added to the variance in every norm.
    layer_norm_epsilon: float = 1e-5
    # Whether the output projection is the embedding table.
    tie_word_embeddings: bool = True
    # Kinds of attention, one a block, repeated until there are enough: block n has pattern[n % len(pattern)].
    attention_pattern: tuple[str, ...] = ("dense", "banded")
    # Keys that a query of a banded block sees, itself included; null: no block is banded.
    window_size: int = DERIVED

    def __post_init__(self) -> None:
        require_positive(self)
        require_divisible(self, "n_embd", "n_head", "give a divisor of it")
        if self.n_inner is None:
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        if not self.attention_pattern or not set(self.attention_pattern) <= set(KINDS):
            raise ValueError(f"attention_pattern={list(self.attention_pattern)} must hold 'dense' and 'banded' only")
        if "banded" in self.attention_pattern and self.window_size is None:
            raise ValueError("attention_pattern has banded blocks: give window_size, the keys that a query sees")
        activation(self.activation_function)

    def kind(self, layer: int) -> str:
        """What block `layer`, counted from 0, attends to: "dense" or "banded"."""
        return self.attention_pattern[layer % len(self.attention_pattern)]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GPT3Config":
        """Reads a parsed config.json.

        Raises:
            ValueError: not a GPT-3, a key that could change the result is unknown, or a value is not valid.
        """
        require_model_type(config, "gpt3")
        values = read_fields(cls, config, elsewhere=KEYS_WITHOUT_EFFECT | {"attention_pattern"})
        pattern = config.get("attention_pattern", cls.attention_pattern)
        if not isinstance(pattern, list | tuple):
            raise ValueError(f"attention_pattern={pattern!r} must be a list of 'dense' and 'banded'")
        return cls(**values, attention_pattern=tuple(pattern))

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        pattern = list(self.attention_pattern)
        return {
            "architectures": ["GPT3LMHeadModel"],
            "model_type": "gpt3",
            **asdict(self),
            "attention_pattern": pattern,
        }


class GPT3Block(nn.Module):
    """GPT-2's block; whether its attention is dense or banded is in the mask that it is given.

    h = x + Attention(LayerNorm(x))
    y = h + FeedForward(LayerNorm(h))
    """

    def __init__(self, config: GPT3Config, attention: str) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(hidden_size=config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = SelfAttention(hidden_size=config.n_embd, num_attention_heads=config.n_head, attention=attention)
        self.ln_2 = LayerNorm(hidden_size=config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = Conv1DFeedForward(
            hidden_size=config.n_embd,
            intermediate_size=config.n_inner,
            hidden_act=config.activation_function,
        )

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        mask: masks.Mask,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        h: Tensor = x + self.attn(self.ln_1(x), mask, cache)
        y: Tensor = h + self.mlp(self.ln_2(h))
        return y


def block_masks(config: GPT3Config, tokens: masks.Tokens, *, num_queries: int) -> dict[str, masks.Mask]:
    """What queries of a dense and of a banded block may see.

    A band slides: it ends at each query. Blocks of window_size tokens that see only themselves would be another model.
    """
    dense = masks.visible(tokens, num_queries=num_queries)  # (B, 1, T, S)
    banded = masks.visible(tokens, num_queries=num_queries, sliding_window=config.window_size)
    return {"dense": dense, "banded": banded}


class GPT3Model(nn.Module):
    """Embeddings, blocks and final norm: everything but the output projection."""

    def __init__(self, config: GPT3Config, attention: str) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = LearnedPositions(num_positions=config.n_positions, hidden_size=config.n_embd)
        self.h = nn.ModuleList(GPT3Block(config, attention) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(hidden_size=config.n_embd, eps=config.layer_norm_epsilon)

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: masks.PaddingMask | None = None,
        position_ids: Int[Tensor, "#batch #seq"] | None = None,
        cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        tokens = tokens_of_call(input_ids, attention_mask, lengths, cache)  # (B, S)
        position_ids = masks.resolve_positions(position_ids, input_ids, tokens)  # (B, T)
        mask_of = block_masks(self.config, tokens, num_queries=input_ids.shape[1])

        x: Tensor = self.wte(input_ids) + self.wpe(position_ids)  # (B, T, hidden)
        layer_caches = [None] * len(self.h) if cache is None else cache.layers
        for layer, (block, layer_cache) in enumerate(zip(self.h, layer_caches, strict=True)):
            x = block(x, mask_of[self.config.kind(layer)], layer_cache)
        if cache is not None:
            cache.commit(tokens)
        hidden: Tensor = self.ln_f(x)
        return hidden


class GPT3(nn.Module):
    """GPT-3 with its output projection: token ids in, logits of the next token out.

    Weights start at torch's defaults; `reference_impl.checkpoint` loads others. A cache keeps every key, also of banded
    blocks.
    """

    def __init__(self, config: GPT3Config, attention: str = "eager") -> None:
        """`attention`: "eager" writes attention out, and its parts can be hooked; "sdpa" uses torch's fused kernel."""
        super().__init__()
        self.config = config
        self.transformer = GPT3Model(config, attention)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

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
                choose rows of the position table: what a token may see follows from its place. One row may serve all.
            cache: earlier tokens of the same rows; these are added to it. Needs torch.no_grad().
            lengths: where the one row of `input_ids` is several texts, one behind the other, how many tokens each has.
                Each sees itself alone, and positions start again. `reference_impl.packing` puts them so.

        Raises:
            ValueError: the mask or the positions do not fit `input_ids`, these do not fit `cache`, or a position is
                beyond `n_positions`.
        """
        logits: Tensor = self.lm_head(self.transformer(input_ids, attention_mask, position_ids, cache, lengths))
        return logits

    def session(self, max_length: int | None = None) -> Session:
        """A batch of texts to be fed piece by piece; `max_length` (tokens, padding included) fixes its memory."""
        return Session(self, KVCache(num_hidden_layers=self.config.n_layer, max_length=max_length))
