"""GPT-2: a decoder of pre-norm blocks with LayerNorm, learned positions and a tied output projection.

Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3.

Modules carry the names of Hugging Face checkpoints, so that a checkpoint's names are the state dict's names; what
OpenAI's projections call W is stored (in, out). Dropout is not implemented: train() and eval() change nothing.

Shapes: B batch, T tokens of this call, S tokens so far (cached and new).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from reference_impl.config import DERIVED, read_fields, require_divisible, require_model_type, require_positive
from reference_impl.nn import attention as core
from reference_impl.nn import masks
from reference_impl.nn.feed_forward import Conv1DFeedForward, activation
from reference_impl.nn.kv_cache import Cache, KVCache, LayerCache, Session, tokens_of_call
from reference_impl.nn.norm import LayerNorm
from reference_impl.nn.positions import LearnedPositions
from reference_impl.nn.self_attention import SelfAttention

# Keys of config.json that say nothing about what a forward pass computes; n_ctx is an old name of n_positions.
KEYS_WITHOUT_EFFECT = {
    "_attn_implementation_autoset", "_name_or_path", "_num_labels", "architectures", "attn_pdrop", "bos_token_id",
    "dtype", "embd_pdrop", "eos_token_id", "gradient_checkpointing", "id2label", "initializer_range", "label2id",
    "model_type", "n_ctx", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "resid_pdrop",
    "return_dict", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "task_specific_params", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """The keys of config.json that decide what GPT-2 computes, with Hugging Face's defaults.

    Raises ValueError where a value is out of range or two do not fit together.
    """

    # Number of token ids.
    vocab_size: int = 50257
    # Rows of the position table: the most tokens a text may have.
    n_positions: int = 1024
    # Width of the residual stream.
    n_embd: int = 768
    # Number of blocks.
    n_layer: int = 12
    # Number of heads, each n_embd / n_head wide.
    n_head: int = 12
    # Width inside the feed-forward block; null: 4 · n_embd.
    n_inner: int = DERIVED
    # Activation of the feed-forward block.
    activation_function: str = "gelu_new"
    # Added to the variance in every norm.
    layer_norm_epsilon: float = 1e-5
    # Whether scores are divided by √(n_embd / n_head).
    scale_attn_weights: bool = True
    # Whether scores of block n, counted from 0, are divided by n + 1 as well.
    scale_attn_by_inverse_layer_idx: bool = False
    # Whether scores are computed and kept in float32; in float32 and float64 it changes nothing.
    reorder_and_upcast_attn: bool = False
    # Whether the output projection is the embedding table.
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        require_positive(self)
        require_divisible(self, "n_embd", "n_head", "give a divisor of it")
        if self.n_inner is None:
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        activation(self.activation_function)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GPT2Config":
        """Reads a parsed config.json.

        Raises:
            ValueError: not a GPT-2, a key that could change the result is unknown, or a value is not valid.
        """
        require_model_type(config, "gpt2")
        if config.get("add_cross_attention", False):
            raise ValueError("add_cross_attention=True is not implemented; only a decoder that stands alone is")
        return cls(**read_fields(cls, config, elsewhere=KEYS_WITHOUT_EFFECT | {"add_cross_attention"}))

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **asdict(self)}


def score_scale(config: GPT2Config, layer: int) -> float:
    """The factor on the scores of block `layer`, counted from 0: 1 / √Dh, and 1 / (layer + 1) if the config says so.

    The second is not in the paper; it came with stanford-crfm/mistral's training of GPT-2.
    """
    head_dim = config.n_embd // config.n_head
    scale = core.score_scale(head_dim) if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


class GPT2Block(nn.Module):
    """One block; each half normalises its input and adds to the residual stream.

        h = x + Attention(LayerNorm(x))
        y = h + FeedForward(LayerNorm(h))

    Radford et al. 2019, section 2.3: GPT's norms moved to the input of each half.
    """

    def __init__(self, config: GPT2Config, layer: int, attention: str) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(hidden_size=config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = SelfAttention(
            hidden_size=config.n_embd,
            num_attention_heads=config.n_head,
            scale=score_scale(config, layer),
            upcast_scores=config.reorder_and_upcast_attn,
            attention=attention,
        )
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


class GPT2Model(nn.Module):
    """Embeddings, blocks and final norm: everything but the output projection."""

    def __init__(self, config: GPT2Config, attention: str) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = LearnedPositions(num_positions=config.n_positions, hidden_size=config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config, layer, attention) for layer in range(config.n_layer))
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
        mask = masks.visible(tokens, num_queries=input_ids.shape[1])  # (B, 1, T, S)

        x: Tensor = self.wte(input_ids) + self.wpe(position_ids)  # (B, T, hidden)
        layer_caches = [None] * len(self.h) if cache is None else cache.layers
        for block, layer_cache in zip(self.h, layer_caches, strict=True):
            x = block(x, mask, layer_cache)
        if cache is not None:
            cache.commit(tokens)
        hidden: Tensor = self.ln_f(x)
        return hidden


class GPT2(nn.Module):
    """GPT-2 with its output projection: token ids in, logits of the next token out.

    Weights start at torch's defaults; `reference_impl.checkpoint` loads trained ones.
    """

    def __init__(self, config: GPT2Config, attention: str = "eager") -> None:
        """`attention`: "eager" writes attention out, and its parts can be hooked; "sdpa" uses torch's fused kernel."""
        super().__init__()
        self.config = config
        self.transformer = GPT2Model(config, attention)
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
