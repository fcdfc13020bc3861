"""Switch Transformer: T5, an encoder and a decoder, with a sparse feed-forward layer in every few blocks.

Fedus et al. 2021, Switch Transformers (arXiv:2101.03961), on the model of Raffel et al. 2020, T5 (arXiv:1910.10683),
section 2.1. A block normalises before each of its layers; the norm subtracts no mean and shifts nothing; attention has
no scale and no position but a bias on its scores; no projection has a bias.

Modules carry the names of Hugging Face checkpoints, so that a checkpoint's names are the state dict's names. Dropout
and router jitter are not implemented: train() and eval() change nothing.

Shapes: B batch, S source tokens, T target tokens of this call, K target tokens so far (cached and new).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference_impl.config import DERIVED, WITHOUT_EFFECT, read_fields, require_model_type
from reference_impl.nn import masks
from reference_impl.nn.cross_attention import DecodingSession, Memory
from reference_impl.nn.feed_forward import DenseFeedForward, activation
from reference_impl.nn.kv_cache import KVCache
from reference_impl.nn.moe import load_balancing_loss, router_z_loss
from reference_impl.nn.relative_bias import bucket_starts
from reference_impl.nn.switch import SwitchFeedForward
from reference_impl.nn.t5 import Block, Stack, T5Attention

# Keys of config.json that say nothing about the logits in evaluation, beside those of every family.
KEYS_WITHOUT_EFFECT = WITHOUT_EFFECT | {
    "add_cross_attention", "add_router_probs", "decoder_start_token_id", "dropout_rate", "initializer_factor",
    "is_decoder", "is_encoder_decoder", "n_positions", "output_past", "output_router_logits", "router_aux_loss_coef",
    "router_jitter_noise", "router_z_loss_coef", "task_specific_params",
}  # fmt: skip

# Keys of which one value is implemented. The library reads only router_dtype; the others stand in old files.
ONE_VALUE = {
    "is_gated_act": False,
    "router_dtype": "float32",
    "router_type": "tokens_masked",
    "num_selected_experts": 1,
}


@dataclass(frozen=True, kw_only=True)
class SwitchTransformerConfig:
    """The keys of config.json that decide what Switch Transformer computes, with Hugging Face's defaults.

    Raises ValueError where a value is out of range or two do not fit together.
    """

    # Number of token ids.
    vocab_size: int = 32128
    # Width of the residual stream.
    d_model: int = 768
    # Width of a head.
    d_kv: int = 64
    # Width inside a feed-forward layer or an expert.
    d_ff: int = 2048
    # Number of heads; num_heads · d_kv need not be d_model.
    num_heads: int = 12
    # Number of blocks of the encoder.
    num_layers: int = 12
    # Number of blocks of the decoder; null: num_layers, but a file that does not say means 12.
    num_decoder_layers: int = 12
    # How many blocks of the encoder are meant to be sparse; only encoder_sparse_step is derived from it.
    num_sparse_encoder_layers: int = 3
    # The same of the decoder.
    num_sparse_decoder_layers: int = 3
    # Block i of the encoder is sparse if i mod this is 1; 1: all are, 0: none; null: ⌊blocks / sparse blocks⌋.
    encoder_sparse_step: int = DERIVED
    # The same of the decoder.
    decoder_sparse_step: int = DERIVED
    # Number of experts of a sparse block, E.
    num_experts: int = 8
    # How many tokens of a row an expert takes, C.
    expert_capacity: int = 64
    # Whether the router's projection has a bias.
    router_bias: bool = False
    # Whether padding takes no room at an expert and is sent to none.
    router_ignore_padding_tokens: bool = False
    # Rows of a table of position biases.
    relative_attention_num_buckets: int = 32
    # Distance, in tokens, from which on all share the last bucket.
    relative_attention_max_distance: int = 128
    # Added to the mean square in every norm.
    layer_norm_epsilon: float = 1e-6
    # Activation of the feed-forward layers and experts.
    dense_act_fn: str = "relu"
    # Whether the output projection is the embedding table; if so, what enters it is divided by √d_model.
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for side, blocks in (("encoder", self.num_layers), ("decoder", self.num_decoder_layers)):
            if getattr(self, f"{side}_sparse_step") is None:
                object.__setattr__(self, f"{side}_sparse_step", _sparse_step(self, side, blocks))
        for name, value in asdict(self).items():
            least = 0 if "sparse" in name else 1
            if type(value) is int and value < least:
                raise ValueError(f"{name}={value} must be {least} or more")
        if self.layer_norm_epsilon <= 0:
            raise ValueError(f"layer_norm_epsilon={self.layer_norm_epsilon} must be greater than 0")
        bucket_starts(self.relative_attention_num_buckets // 2, self.relative_attention_max_distance)
        bucket_starts(self.relative_attention_num_buckets, self.relative_attention_max_distance)
        activation(self.dense_act_fn)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "SwitchTransformerConfig":
        """Reads a parsed config.json of transformers 4.x or 5.x.

        Raises:
            ValueError: not a Switch Transformer, a key that could change the result is unknown, or a value is not
                valid or not implemented.
        """
        require_model_type(config, "switch_transformers")
        implemented = ONE_VALUE | {"feed_forward_proj": config.get("dense_act_fn", cls.dense_act_fn)}
        for key, value in implemented.items():
            if config.get(key, value) != value:
                raise ValueError(f"{key}={config[key]!r} is not implemented; only {value!r} is")
        if config.get("num_decoder_layers", cls.num_decoder_layers) is None:
            config = {**config, "num_decoder_layers": config.get("num_layers", cls.num_layers)}
        return cls(**read_fields(cls, config, elsewhere=KEYS_WITHOUT_EFFECT | implemented.keys()))

    def to_dict(self) -> dict[str, Any]:
        """A config.json that transformers reads."""
        kind = {"architectures": ["SwitchTransformersForConditionalGeneration"], "model_type": "switch_transformers"}
        return {**kind, "is_encoder_decoder": True, **asdict(self)}


def _sparse_step(config: SwitchTransformerConfig, side: str, blocks: int) -> int:
    sparse = getattr(config, f"num_sparse_{side}_layers")
    if not 1 <= sparse <= blocks:
        raise ValueError(
            f"num_sparse_{side}_layers={sparse} must be 1 … {blocks}, the number of blocks, for a step to follow from "
            f"it; give {side}_sparse_step=0 if no block is sparse"
        )
    return int(blocks // sparse)


def is_sparse(block: int, sparse_step: int) -> bool:
    """Whether a block, counted from 0, has experts: of six blocks with step 2, these: – x – x – x.

    Fedus et al. 2021, table 9: an expert frequency of 1/2 is a step of 2. With a step of 4 blocks 1, 5, 9 … are sparse;
    the last block need not be.
    """
    return sparse_step == 1 or (sparse_step > 1 and block % sparse_step == 1)


def _stack(config: SwitchTransformerConfig, attention: str, embed_tokens: nn.Embedding, *, is_decoder: bool) -> Stack:
    """Encoder or decoder, with the blocks that the config names."""
    number = config.num_decoder_layers if is_decoder else config.num_layers
    step = config.decoder_sparse_step if is_decoder else config.encoder_sparse_step
    norm: Any = {"hidden_size": config.d_model, "eps": config.layer_norm_epsilon}
    blocks = [
        Block(
            _attention(config, attention, config.relative_attention_num_buckets if block == 0 else None),
            _attention(config, attention, None) if is_decoder else None,
            _feed_forward(config, sparse=is_sparse(block, step)),
            **norm,
        )
        for block in range(number)
    ]
    return Stack(
        embed_tokens,
        blocks,
        **norm,
        max_distance=config.relative_attention_max_distance,
        ignore_padding=config.router_ignore_padding_tokens,
        is_decoder=is_decoder,
    )


def _attention(config: SwitchTransformerConfig, attention: str, num_buckets: int | None) -> T5Attention:
    return T5Attention(
        hidden_size=config.d_model,
        head_dim=config.d_kv,
        num_heads=config.num_heads,
        num_buckets=num_buckets,
        attention=attention,
    )


def _feed_forward(config: SwitchTransformerConfig, *, sparse: bool) -> DenseFeedForward | SwitchFeedForward:
    sizes: Any = {"hidden_size": config.d_model, "intermediate_size": config.d_ff, "hidden_act": config.dense_act_fn}
    if not sparse:
        return DenseFeedForward(**sizes)
    return SwitchFeedForward(
        **sizes,
        num_experts=config.num_experts,
        expert_capacity=config.expert_capacity,
        router_bias=config.router_bias,
    )


class SwitchTransformer(nn.Module):
    """Switch Transformer with its output projection: source and target ids in, logits of the next target token out.

    Weights start at torch's defaults; `reference_impl.checkpoint` loads trained ones.
    """

    def __init__(self, config: SwitchTransformerConfig, attention: str = "eager") -> None:
        """`attention`: "eager" writes attention out, and its parts can be hooked; "sdpa" uses torch's fused kernel."""
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = _stack(config, attention, self.shared, is_decoder=False)
        self.decoder = _stack(config, attention, self.shared, is_decoder=True)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.shared.weight

    def forward(
        self,
        input_ids: Int[Tensor, "batch source"],
        attention_mask: masks.PaddingMask | None = None,
        *,
        decoder_input_ids: Int[Tensor, "batch target"],
        decoder_attention_mask: masks.PaddingMask | None = None,
    ) -> Float[Tensor, "batch target vocab"]:
        """Logits of the token after each of `decoder_input_ids`. Logits at padding mean nothing, but are finite.

        With `expert_capacity` smaller than a row, padding takes room at experts unless
        `router_ignore_padding_tokens` is set.

        Args:
            input_ids: the source.
            attention_mask: one number for each of `input_ids`, 1 real and 0 padding, on either side.
            decoder_input_ids: what the decoder reads; it begins with the config's decoder_start_token_id.
            decoder_attention_mask: one number for each of `decoder_input_ids`, in the same way.

        Raises:
            ValueError: a mask does not fit its ids.
        """
        source_real = masks.real_tokens(input_ids, attention_mask)
        memory = self.decoder.memory(self.encoder(input_ids, source_real))
        return self.decode(decoder_input_ids, decoder_attention_mask, memory, source_real)

    def decode(
        self,
        decoder_input_ids: Int[Tensor, "batch target"],
        decoder_attention_mask: masks.PaddingMask | None,
        memory: Sequence[Memory],
        source_real: Bool[Tensor, "batch source"],
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch target vocab"]:
        """Logits of the token after each of `decoder_input_ids`, which come after those in `cache`."""
        real = masks.real_tokens(decoder_input_ids, decoder_attention_mask)  # (B, T)
        tokens = masks.in_order(real) if cache is None else cache.tokens(real)  # (B, K)
        hidden = self.decoder(decoder_input_ids, tokens.real, memory, source_real, cache)
        if cache is not None:
            cache.commit(tokens)
        if self.config.tie_word_embeddings:
            hidden = hidden * self.config.d_model**-0.5  # as T5's code; embeddings on their way in are not scaled
        logits: Tensor = self.lm_head(hidden)
        return logits

    def router_losses(self, router_logits: Sequence[Float[Tensor, "batch _ experts"]]) -> dict[str, Float[Tensor, ""]]:
        """What training adds to the cross-entropy, before `router_aux_loss_coef` and `router_z_loss_coef`.

        Fedus et al. 2021, section 2.2: "for each Switch layer, this auxiliary loss is added to the total model loss",
        so both are summed over the layers of encoder and decoder; a layer's f and P are means over all its tokens.

        Args:
            router_logits: those of each router, as `recorded_router_logits` gives them; encoder and decoder may have
                read different numbers of tokens.
        """
        aux_losses = [load_balancing_loss([logits], 1) for logits in router_logits]
        z_losses = [router_z_loss(logits) for logits in router_logits]
        return {"aux_loss": torch.stack(aux_losses).sum(), "z_loss": torch.stack(z_losses).sum()}

    @torch.no_grad()
    def session(
        self,
        input_ids: Int[Tensor, "batch source"],
        attention_mask: masks.PaddingMask | None = None,
        max_length: int | None = None,
    ) -> DecodingSession:
        """Encodes a batch of sources, whose targets are then fed piece by piece.

        Experts have room for `expert_capacity` tokens of a call, not of a text: where that is too little for a whole
        text, pieces give other logits than the whole. `max_length` (tokens of the target, padding included) fixes the
        memory of the cache.
        """
        source_real = masks.real_tokens(input_ids, attention_mask)
        memory = self.decoder.memory(self.encoder(input_ids, source_real))

        def decode(ids: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
            return self.decode(ids, mask, memory, source_real, cache)

        cache = KVCache(num_hidden_layers=self.config.num_decoder_layers, max_length=max_length)
        return DecodingSession(decode, memory, cache)
