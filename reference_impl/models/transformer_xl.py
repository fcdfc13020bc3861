"""Transformer-XL: a decoder with a memory of earlier segments, relative positions, and an adaptive softmax.

Dai et al. 2019, Transformer-XL: Attentive Language Models beyond a Fixed-Length Context (arXiv:1901.02860).

A text is fed in segments. What entered each layer for the last `mem_len` tokens is remembered, and later segments
attend to it without gradients. A batch is so many texts side by side, all segments of one length: there is no padding,
and since positions are distances there are no position ids.

Modules carry the names of Hugging Face checkpoints (model_type "transfo-xl"), so that a checkpoint's names are the
state dict's names. Dropout is not implemented: train() and eval() change nothing.

Shapes: B batch, T tokens of this segment, M tokens of memory, S = M + T keys.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference_impl.config import DERIVED, WITHOUT_EFFECT, read_fields, require_model_type, require_positive
from reference_impl.nn.adaptive import AdaptiveEmbedding, AdaptiveLogSoftmax, cluster_ids, cluster_width
from reference_impl.nn.feed_forward import NormedFeedForward
from reference_impl.nn.norm import LayerNorm
from reference_impl.nn.relative_attention import RelativePositions, RelativeSelfAttention
from reference_impl.nn.segment_memory import SegmentMemory, SegmentSession, visible_keys

# Keys of config.json that say nothing about what a forward pass computes, beside those of every family.
KEYS_WITHOUT_EFFECT = WITHOUT_EFFECT | {
    "dropatt", "dropout", "init", "init_range", "init_std", "proj_init_std", "task_specific_params", "tgt_len",
    "trainer_compatible",
}  # fmt: skip
# Keys that name what the published models do not use, and the value that says so.
NOT_IMPLEMENTED = {"adaptive": True, "attn_type": 0, "ext_len": 0, "sample_softmax": -1}
LISTS = {"cutoffs": int, "tie_projs": bool}


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig:
    """The keys of config.json that decide what Transformer-XL computes, with Hugging Face's defaults.

    Raises ValueError where a value is out of range or two do not fit together.
    """

    # Number of token ids, sorted by frequency.
    vocab_size: int = 267735
    # Where a new cluster of ids begins; none: an ordinary embedding and softmax.
    cutoffs: tuple[int, ...] = (20000, 40000, 200000)
    # Width of the residual stream; even, since half of a position's encoding are sines.
    d_model: int = 1024
    # Width of the embeddings of the first cluster.
    d_embed: int = 1024
    # What the width of the embeddings is divided by from cluster to cluster; 1: one table for all.
    div_val: int = 4
    # Number of blocks.
    n_layer: int = 18
    # Number of heads.
    n_head: int = 16
    # Width of a head; n_head · d_head need not be d_model.
    d_head: int = 64
    # Width inside the feed-forward block.
    d_inner: int = 4096
    # Tokens that each layer remembers.
    mem_len: int = 1600
    # Distances greater than this count as this; 0 or less: they all count as they are.
    clamp_len: int = 1000
    # Whether every query sees the last mem_len tokens, itself included, and not all of memory and segment before it.
    same_length: bool = True
    # Whether a norm stands before each half of a block, and not after the residual connection.
    pre_lnorm: bool = False
    # Whether each layer has a u and a v (r_w_bias, r_r_bias) of its own, and not one pair for all.
    untie_r: bool = True
    # Added to the variance in every norm.
    layer_norm_epsilon: float = 1e-5
    # Whether the softmax uses the embedding tables.
    tie_word_embeddings: bool = True
    # Whether the softmax uses the embedding's projections for all clusters but the first; says what tie_projs is.
    proj_share_all_but_first: bool = True
    # For each cluster, whether the softmax uses the embedding's projection; null: as proj_share_all_but_first says.
    tie_projs: tuple[bool, ...] = DERIVED

    def __post_init__(self) -> None:
        require_positive(self, but=("mem_len", "clamp_len"))
        clusters = len(cluster_ids(self.vocab_size, self.cutoffs))
        cluster_width(self.d_embed, self.div_val, clusters - 1)
        if self.tie_projs is None:
            object.__setattr__(self, "tie_projs", (False,) + (self.proj_share_all_but_first,) * (clusters - 1))
        if len(self.tie_projs) != clusters:
            raise ValueError(f"tie_projs={list(self.tie_projs)} must say something for each of {clusters} clusters")
        if self.d_model % 2:
            raise ValueError(f"d_model={self.d_model} must be even: half of a position's encoding are sines")
        if self.mem_len < self.same_length:
            raise ValueError(f"mem_len={self.mem_len} must be 0 or more, with same_length, which shows so many keys, 1")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "TransformerXLConfig":
        """Reads a parsed config.json.

        Raises:
            ValueError: not a Transformer-XL, a key that could change the result is unknown, or a value is not valid.
        """
        require_model_type(config, "transfo-xl")
        for key, value in NOT_IMPLEMENTED.items():
            if config.get(key, value) != value:
                raise ValueError(f"{key}={config[key]!r} is not implemented; only {value!r} is")
        tied = config.get("tie_word_embeddings", cls.tie_word_embeddings)
        if config.get("tie_weight", tied) != tied:
            raise ValueError(f"tie_weight={config['tie_weight']}, an old name, contradicts tie_word_embeddings={tied}")
        elsewhere = KEYS_WITHOUT_EFFECT | NOT_IMPLEMENTED.keys() | LISTS.keys() | {"tie_weight"}
        values = read_fields(cls, config, elsewhere=elsewhere)
        for key, kind in LISTS.items():
            if config.get(key) is not None:
                if not isinstance(config[key], list | tuple) or {type(item) for item in config[key]} - {kind}:
                    raise ValueError(f"{key}={config[key]!r} must be a list of {kind.__name__}")
                values[key] = tuple(config[key])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        lists = {key: list(getattr(self, key)) for key in LISTS}
        return {"architectures": ["TransfoXLLMHeadModel"], "model_type": "transfo-xl", **asdict(self), **lists}


class TransformerXLAttention(RelativeSelfAttention):
    """The first half of a block: y = LayerNorm(x + Attention([m ∘ x])), or with pre_lnorm x + Attention(LayerNorm(…)).

    Dai et al. 2019 (arXiv:1901.02860), section 3.3, where m is the memory and ∘ joins along the sequence.
    """

    def __init__(self, config: TransformerXLConfig, attention: str, biases: dict[str, nn.Parameter]) -> None:
        super().__init__(
            hidden_size=config.d_model,
            num_attention_heads=config.n_head,
            head_dim=config.d_head,
            attention=attention,
            **biases,
        )
        self.pre_lnorm = config.pre_lnorm
        self.layer_norm = LayerNorm(hidden_size=config.d_model, eps=config.layer_norm_epsilon)

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        memory: Float[Tensor, "batch memory hidden"] | None,
        distances: Float[Tensor, "keys hidden"],
        mask: Bool[Tensor, "1 1 seq keys"],
    ) -> Float[Tensor, "batch seq hidden"]:
        known = x if memory is None else torch.cat((memory, x), dim=1)  # (B, S, hidden)
        if self.pre_lnorm:
            return x + self.attend(self.layer_norm(known), distances, mask)
        y: Tensor = self.layer_norm(x + self.attend(known, distances, mask))
        return y


class TransformerXLLayer(nn.Module):
    """One block: attention, then feed-forward, each with its residual connection and norm."""

    def __init__(self, config: TransformerXLConfig, attention: str, biases: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.dec_attn = TransformerXLAttention(config, attention, biases)
        self.pos_ff = NormedFeedForward(
            hidden_size=config.d_model,
            intermediate_size=config.d_inner,
            eps=config.layer_norm_epsilon,
            pre_norm=config.pre_lnorm,
        )

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        memory: Float[Tensor, "batch memory hidden"] | None,
        distances: Float[Tensor, "keys hidden"],
        mask: Bool[Tensor, "1 1 seq keys"],
    ) -> Float[Tensor, "batch seq hidden"]:
        y: Tensor = self.pos_ff(self.dec_attn(x, memory, distances, mask))
        return y


class TransformerXLModel(nn.Module):
    """Embedding and blocks: everything but the softmax. No norm follows the last block, not even with pre_lnorm."""

    def __init__(self, config: TransformerXLConfig, attention: str) -> None:
        super().__init__()
        self.config = config
        sizes = {"vocab_size": config.vocab_size, "d_embed": config.d_embed, "d_model": config.d_model}
        self.word_emb = AdaptiveEmbedding(**sizes, cutoffs=config.cutoffs, div_val=config.div_val)
        self.pos_emb = RelativePositions(hidden_size=config.d_model, clamp_len=config.clamp_len)
        biases: dict[str, nn.Parameter] = {}
        if not config.untie_r:
            self.r_w_bias, self.r_r_bias = (nn.Parameter(torch.zeros(config.n_head, config.d_head)) for _ in "uv")
            biases = {"content_bias": self.r_w_bias, "position_bias": self.r_r_bias}
        self.layers = nn.ModuleList(TransformerXLLayer(config, attention, biases) for _ in range(config.n_layer))

    def forward(
        self, input_ids: Int[Tensor, "batch seq"], memory: SegmentMemory | None = None
    ) -> Float[Tensor, "batch seq hidden"]:
        config, queries = self.config, input_ids.shape[1]
        remembered = [None] * config.n_layer if memory is None else memory.of_batch(len(input_ids))
        keys = queries + (memory.length if memory is not None else 0)
        x: Tensor = self.word_emb(input_ids)  # (B, T, hidden)
        distances = self.pos_emb(x, keys)  # (S, hidden)
        mask = visible_keys(queries, keys, config.mem_len if config.same_length else None, x.device)  # (1, 1, T, S)
        entered = []
        for layer, its_memory in zip(self.layers, remembered, strict=True):
            entered.append(x)
            x = layer(x, its_memory, distances, mask)
        if memory is not None:
            memory.commit(entered)
        return x


class TransformerXL(nn.Module):
    """Transformer-XL with its adaptive softmax: token ids in, log-probabilities of the next token out.

    Weights start at torch's defaults; `reference_impl.checkpoint` loads trained ones.
    """

    def __init__(self, config: TransformerXLConfig, attention: str = "eager") -> None:
        """`attention`: "eager" writes attention out, and its parts can be hooked; "sdpa" uses torch's fused kernel."""
        super().__init__()
        self.config = config
        self.transformer = TransformerXLModel(config, attention)
        sizes = {"vocab_size": config.vocab_size, "d_embed": config.d_embed, "d_model": config.d_model}
        self.crit = AdaptiveLogSoftmax(**sizes, cutoffs=config.cutoffs, div_val=config.div_val)
        embedding = self.transformer.word_emb
        if config.tie_word_embeddings:
            for layer, table in zip(self.crit.out_layers, embedding.emb_layers, strict=True):
                layer.weight = table.weight
        for cluster in range(len(self.crit.out_projs)):
            if config.tie_projs[cluster]:
                self.crit.out_projs[cluster] = embedding.emb_projs[0 if config.div_val == 1 else cluster]

    def forward(
        self, input_ids: Int[Tensor, "batch seq"], memory: SegmentMemory | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Log-probabilities of the token after each of `input_ids`.

        Args:
            memory: of the segments before this one; this one is added to it. None: there are none. A first segment has
                an empty memory, as in the paper and the authors' PyTorch code; Hugging Face's model, called without
                `mems`, makes one of mem_len zero vectors and attends to them, which gives other values.

        Raises:
            ValueError: an id is not in the vocabulary, or the memory is of another batch.
        """
        logits: Tensor = self.crit(self.transformer(input_ids, memory))
        return logits

    def session(self) -> SegmentSession:
        """A batch of texts to be fed segment by segment, with a memory that begins empty."""
        return SegmentSession(self, SegmentMemory(num_layers=self.config.n_layer, mem_len=self.config.mem_len))
