"""GPT: a decoder of post-norm blocks with LayerNorm, learned positions and a tied output projection.

Radford et al. 2018, Improving Language Understanding by Generative Pre-Training, sections 3.1 and 4.1.

Modules carry the names of Hugging Face checkpoints, so that a checkpoint's names are the state dict's names; what
OpenAI's projections call W is stored (in, out). Dropout is not implemented: train() and eval() change nothing.

Shapes: B batch, T tokens of this call, S tokens so far (cached and new).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from reference_impl.config import read_fields, require_divisible, require_model_type, require_positive
from reference_impl.nn import masks
from reference_impl.nn.feed_forward import Conv1DFeedForward
from reference_impl.nn.kv_cache import Cache, KVCache, LayerCache, Session, tokens_of_call
from reference_impl.nn.norm import LayerNorm
from reference_impl.nn.positions import LearnedPositions
from reference_impl.nn.self_attention import SelfAttention

# Keys of config.json that say nothing about what a forward pass computes; n_ctx is an old name of n_positions.
KEYS_WITHOUT_EFFECT = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attn_pdrop", "bos_token_id", "dtype",
    "embd_pdrop", "eos_token_id", "id2label", "initializer_range", "label2id", "model_type", "n_ctx", "n_special",
    "output_attentions", "output_hidden_states", "pad_token_id", "predict_special_tokens", "problem_type",
    "resid_pdrop", "return_dict", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip

# afn → the activation that it means. Here "gelu" is the tanh form, which other families call "gelu_new".
ACTIVATION_OF = {"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "silu"}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The keys of config.json that decide what GPT computes, with Hugging Face's defaults.

    Raises ValueError where a value is out of range or two do not fit together.
    """

    # Number of token ids.
    vocab_size: int = 40478
    # Rows of the position table: the most tokens a text may have.
    n_positions: int = 512
    # Width of the residual stream; the feed-forward block is four times as wide inside.
    n_embd: int = 768
    # Number of blocks.
    n_layer: int = 12
    # Number of heads, each n_embd / n_head wide.
    n_head: int = 12
    # Activation of the feed-forward block, by a name of ACTIVATION_OF.
    afn: str = "gelu"
    # Added to the variance in every norm.
    layer_norm_epsilon: float = 1e-5
    # Whether the output projection is the embedding table.
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        require_positive(self)
        require_divisible(self, "n_embd", "n_head", "give a divisor of it")
        if self.afn not in ACTIVATION_OF:
            raise ValueError(f"afn={self.afn!r} is not implemented; use one of {sorted(ACTIVATION_OF)}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GPTConfig":
        """Reads a parsed config.json.

        Raises:
            ValueError: not a GPT, a key that could change the result is unknown, or a value is not valid.
        """
        require_model_type(config, "openai-gpt")
        return cls(**read_fields(cls, config, elsewhere=KEYS_WITHOUT_EFFECT))

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        return {"architectures": ["OpenAIGPTLMHeadModel"], "model_type": "openai-gpt", **asdict(self)}


class GPTBlock(nn.Module):
    """One block; each half adds to its input and normalises the sum.

        n = LayerNorm(x + Attention(x))
        y = LayerNorm(n + FeedForward(n))

    Radford et al. 2018, equation 2 (transformer_block), as in Vaswani et al. 2017 (arXiv:1706.03762), section 3.1. The
    residual stream itself is normalised, so that there is no norm after the last block.
    """

    def __init__(self, config: GPTConfig, attention: str) -> None:
        super().__init__()
        self.attn = SelfAttention(hidden_size=config.n_embd, num_attention_heads=config.n_head, attention=attention)
        self.ln_1 = LayerNorm(hidden_size=config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = Conv1DFeedForward(
            hidden_size=config.n_embd,
            intermediate_size=4 * config.n_embd,
            hidden_act=ACTIVATION_OF[config.afn],
        )
        self.ln_2 = LayerNorm(hidden_size=config.n_embd, eps=config.layer_norm_epsilon)

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        mask: masks.Mask,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        n: Tensor = self.ln_1(x + self.attn(x, mask, cache))
        y: Tensor = self.ln_2(n + self.mlp(n))
        return y


class GPTModel(nn.Module):
    """Embeddings and blocks: everything but the output projection."""

    def __init__(self, config: GPTConfig, attention: str) -> None:
        super().__init__()
        self.tokens_embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions_embed = LearnedPositions(num_positions=config.n_positions, hidden_size=config.n_embd)
        self.h = nn.ModuleList(GPTBlock(config, attention) for _ in range(config.n_layer))

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
        mask = masks.visible(tokens, num_queries=input_ids.shape[1])  # (B, 1, T, S)

        x: Tensor = self.tokens_embed(input_ids) + self.positions_embed(position_ids)  # (B, T, hidden)
        layer_caches = [None] * len(self.h) if cache is None else cache.layers
        for block, layer_cache in zip(self.h, layer_caches, strict=True):
            x = block(x, mask, layer_cache)
        if cache is not None:
            cache.commit(tokens)
        return x


class GPT(nn.Module):
    """GPT with its output projection: token ids in, logits of the next token out.

    Weights start at torch's defaults; `reference_impl.checkpoint` loads trained ones.
    """

    def __init__(self, config: GPTConfig, attention: str = "eager") -> None:
        """`attention`: "eager" writes attention out, and its parts can be hooked; "sdpa" uses torch's fused kernel."""
        super().__init__()
        self.config = config
        self.transformer = GPTModel(config, attention)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.tokens_embed.weight

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
