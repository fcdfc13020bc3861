"""Embeddings, absolute positions, and the head."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.groups import DECODERS, GPTS, LLAMAS, MODELS
from conformance.mistakes.making import instead, on_model
from conformance.mistakes.norms import READ
from reference_impl.nn import absolute_positions, masks

SINUSOID = "reference_impl.nn.absolute_positions:sinusoidal_positions"
ANGLES = "reference_impl.nn.absolute_positions:sinusoid_angles"
TABLE = "reference_impl.nn.absolute_positions:learned_positions"
LOOKUP = "reference_impl.nn.positions:LearnedPositions.forward"
STACK = "reference_impl.models.transformer:Stack.embed"
FORWARD = ("component.outputs", "golden.logits")
EMBEDDED = ("embedding", "distances", "layers.N.attention.distance_key")
SINUSOIDS = ("sinusoidal_positions", "transformer", "transformer_xl")


# --- sinusoids --------------------------------------------------------------------------------------------------------


def angles(exponent: Callable[[Tensor, int], Tensor]) -> Callable[..., Any]:
    """Angles pos / 10000^exponent(2i, d), one a pair."""

    def sinusoid_angles(position_ids: Tensor, hidden_size: int) -> Tensor:
        two_i = torch.arange(0, hidden_size, 2, dtype=torch.float64)
        return position_ids[..., None].to(torch.float64) / 10000.0 ** exponent(two_i, hidden_size)

    return instead(sinusoid_angles)


def other_layout(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    others = {"interleaved": "concatenated", "concatenated": "interleaved"}
    return lambda position_ids, hidden_size, layout, dtype=None: original(
        position_ids, hidden_size, others[layout], dtype
    )


def index_of_the_column(position_ids: Tensor, hidden_size: int, layout: str, dtype: Any = None) -> Tensor:
    """Every column i has its own exponent, 2i/d, where pairs of columns share one."""
    column = torch.arange(hidden_size, dtype=torch.float64)
    if layout == "concatenated":
        column = torch.cat((column[0::2], column[1::2]))
    angle = position_ids[..., None].to(torch.float64) / 10000.0 ** (2 * column / hidden_size)
    even = column % 2 == 0
    return torch.where(even, angle.sin(), angle.cos()).to(torch.get_default_dtype() if dtype is None else dtype)


def cosines_first(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """sin(x + π/2) = cos(x) and cos(x − π/2) = sin(x): even columns become cosines."""

    def swapped(position_ids: Tensor, hidden_size: int, layout: str, dtype: Any = None) -> Tensor:
        angle = absolute_positions.sinusoid_angles(position_ids, hidden_size)
        cosines, sines = angle.cos(), angle[..., : hidden_size // 2].sin()
        table = torch.cat((cosines, sines), dim=-1)
        if layout == "interleaved":
            table[..., 0::2], table[..., 1::2] = cosines, sines
        return table.to(torch.get_default_dtype() if dtype is None else dtype)

    return swapped


def embedded(rule: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Any]:
    """rule(embedding of the tokens, sinusoids, scale)."""

    def embed(self: Any, input_ids: Tensor, real: Tensor) -> Tensor:
        tokens = self.embed_tokens(input_ids)
        position_ids = masks.positions(real, num_queries=input_ids.shape[1])
        layout = self.position_layout
        positions = absolute_positions.sinusoidal_positions(position_ids, tokens.shape[-1], layout, tokens.dtype)
        return rule(tokens, positions, self.scale)

    return instead(embed)


_SINUSOIDS = (
    Mistake(
        id="pe-layout",
        families=SINUSOIDS,
        what="All sines and then all cosines (tensor2tensor, Marian) where they alternate (the paper), or the reverse.",
        why="The model was trained with one of the two orders.",
        shows="Everywhere but at width 2; the right numbers in other columns.",
        fix="Follow the model: interleaved in the paper, concatenated in Marian.",
        seen="tensorflow/text#1122, tensorflow/tensor2tensor#1423, allenai/allennlp#2993, TransformerX#115",
        swaps=(Swap(SINUSOID, other_layout),),
        killed_by=FORWARD,
        touches=EMBEDDED,
    ),
    Mistake(
        id="pe-exponent-doubled",
        families=SINUSOIDS,
        what="pos / 10000^(2i/d) with i the number of the column; the pair's number is meant.",
        why="Columns 2i and 2i + 1 share the exponent 2i/d.",
        shows="Column 0 is right, then it drifts.",
        fix="2 · floor(column / 2) / d.",
        seen="jadore801120/attention-is-all-you-need-pytorch#32, shenweichen/DeepCTR#379, PapersReimplementations#9",
        swaps=(Swap(SINUSOID, instead(index_of_the_column)),),
        killed_by=FORWARD,
        touches=EMBEDDED,
    ),
    Mistake(
        id="pe-n-minus-1",
        families=SINUSOIDS,
        what="Wavelengths are spaced over d/2 − 1 (tensor2tensor) instead of d/2.",
        why="The paper's last wavelength is 10000^((d−2)/d) · 2π.",
        shows="Small in the first columns.",
        fix="10000^(2i/d).",
        seen="tensorflow/tensor2tensor#1423",
        swaps=(Swap(ANGLES, angles(lambda two_i, d: two_i / max(d - 2, 1))),),
        killed_by=FORWARD,
        touches=EMBEDDED,
    ),
    Mistake(
        id="pe-exponent-halved",
        families=SINUSOIDS,
        what="pos / 10000^(i/d) with i the number of the pair.",
        why="The exponent is 2i/d.",
        shows="The first pair is right; the others turn too fast.",
        fix="2i/d.",
        seen="shenweichen/DeepCTR#379",
        swaps=(Swap(ANGLES, angles(lambda two_i, d: two_i / 2 / d)),),
        killed_by=FORWARD,
        touches=EMBEDDED,
    ),
    Mistake(
        id="pe-sin-cos-swapped",
        families=SINUSOIDS,
        what="Cosines in the even columns, sines in the odd ones.",
        why="Sines come first.",
        shows="At position 0 already: ones where zeros belong.",
        fix="sin at 2i, cos at 2i + 1.",
        seen="common knowledge",
        swaps=(Swap(SINUSOID, cosines_first),),
        killed_by=FORWARD,
        touches=EMBEDDED,
    ),
    Mistake(
        id="pe-one-based",
        families=SINUSOIDS,
        what="Positions count from 1.",
        why="PE(0) belongs to the first token.",
        shows="Everywhere.",
        fix="Count from 0.",
        seen="common knowledge",
        swaps=(Swap(ANGLES, lambda original: lambda ids, width: original(ids + 1, width)),),
        killed_by=FORWARD,
        touches=EMBEDDED,
    ),
    Mistake(
        id="pe-missing",
        families=("transformer",),
        what="No positions are added.",
        why="The encoder would not know the order of its tokens at all.",
        shows="Everywhere, also at position 0 (cosines of 0 are 1).",
        fix="Add them to the scaled embeddings.",
        seen="common knowledge",
        swaps=(Swap(STACK, embedded(lambda tokens, positions, scale: tokens * scale)),),
        killed_by=("golden.logits",),
        touches=EMBEDDED,
    ),
    Mistake(
        id="emb-scale-missing",
        families=("transformer",),
        what="Embeddings are not multiplied by √d_model.",
        why="Without it positions outweigh tokens.",
        shows="Everywhere; a norm behind it hides the size and leaves the ratio of tokens to positions.",
        fix="Multiply where scale_embedding is true.",
        seen="jadore801120/attention-is-all-you-need-pytorch#138, #168, harvardnlp/annotated-transformer#60",
        swaps=(Swap(STACK, embedded(lambda tokens, positions, scale: tokens + positions)),),
        killed_by=("golden.logits",),
        touches=EMBEDDED,
    ),
    Mistake(
        id="emb-scale-divided",
        families=("transformer",),
        what="Embeddings are divided by √d_model.",
        why="They are multiplied.",
        shows="Everywhere.",
        fix="E[id] · √d_model.",
        seen="pytorch/tutorials#2849",
        swaps=(Swap(STACK, embedded(lambda tokens, positions, scale: tokens / scale + positions)),),
        killed_by=("golden.logits",),
        touches=EMBEDDED,
    ),
    Mistake(
        id="emb-scale-on-positions",
        families=("transformer",),
        what="The sum of embedding and position is multiplied by √d_model.",
        why="Positions are added unscaled.",
        shows="Everywhere.",
        fix="E[id] · √d_model + PE.",
        seen="jadore801120/attention-is-all-you-need-pytorch#168",
        swaps=(Swap(STACK, embedded(lambda tokens, positions, scale: (tokens + positions) * scale)),),
        killed_by=("golden.logits",),
        touches=EMBEDDED,
    ),
)


# --- learned positions ------------------------------------------------------------------------------------------------


def rows(change: Callable[[Tensor, int], Tensor]) -> tuple[Swap, ...]:
    """Other rows of the table: change(position_ids, rows of the table)."""

    def forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda self, position_ids: original(self, change(position_ids, self.num_embeddings))

    def learned_positions(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def added(x: Tensor, weight: Tensor, attention_mask: Any = None) -> Tensor:
            order = change(torch.arange(len(weight)), len(weight))
            return original(x, weight[order], attention_mask)

        return added

    return Swap(LOOKUP, forward), Swap(TABLE, learned_positions)


def not_added(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, position_ids: torch.zeros_like(original(self, position_ids))


def mask_unread(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def learned_positions(x: Tensor, weight: Tensor, attention_mask: Any = None) -> Tensor:
        ones = None if attention_mask is None else torch.ones_like(attention_mask)
        return original(x, weight, ones)

    return learned_positions


def cache_unread(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def learned_positions(x: Tensor, weight: Tensor, attention_mask: Any = None) -> Tensor:
        own = None if attention_mask is None else attention_mask[:, -x.shape[1] :]
        return original(x, weight, own)

    return learned_positions


LEARNED = ("learned_positions", *GPTS)

_LEARNED = (
    Mistake(
        id="position-table-offset",
        families=LEARNED,
        what="Looks positions up two rows further down, as OPT does.",
        why="OPT's and BART's tables begin with two rows for padding; GPT's do not.",
        shows="Everywhere; out of range at the end of the context.",
        fix="Row p for position p.",
        seen="common knowledge",
        swaps=rows(lambda ids, size: (ids + 2).clamp(max=size - 1)),
        killed_by=FORWARD,
        touches=EMBEDDED,
    ),
    Mistake(
        id="position-table-reversed",
        families=LEARNED,
        what="Counts positions back from the end of the table.",
        why="Row 0 is the first position.",
        shows="Everywhere.",
        fix="Row p for position p.",
        seen="common knowledge",
        swaps=rows(lambda ids, size: size - 1 - ids),
        killed_by=FORWARD,
        touches=EMBEDDED,
    ),
    Mistake(
        id="position-not-added",
        families=GPTS,
        what="Learned positions are not added.",
        why="The blocks have no other source of order than the causal mask.",
        shows="Everywhere.",
        fix="wte[ids] + wpe[positions].",
        seen="common knowledge",
        swaps=(Swap(LOOKUP, not_added),),
        killed_by=("golden.logits",),
        touches=EMBEDDED,
    ),
    Mistake(
        id="position-table-mask-unread",
        families=("learned_positions",),
        what="Positions count padding.",
        why="The first real token has position 0.",
        shows="Only in rows with padding on the left.",
        fix="cumsum(attention_mask) − 1.",
        seen="transformers#33095, transformers#18478",
        swaps=(Swap(TABLE, mask_unread),),
        killed_by=("component.outputs",),
    ),
    Mistake(
        id="position-table-cache-unread",
        families=("learned_positions",),
        what="Positions restart with every call.",
        why="Cached tokens stand before these.",
        shows="Only from the second call on.",
        fix="Count the cached tokens.",
        seen="ml-explore/mlx-lm#93, dmlc/gluon-nlp#1015",
        swaps=(Swap(TABLE, cache_unread),),
        killed_by=("component.outputs",),
    ),
)


# --- the table of tokens and the head ---------------------------------------------------------------------------------


def table(model: Any) -> nn.Embedding:
    """The embedding table of a decoder."""
    inner = model.transformer if hasattr(model, "transformer") else model.model
    names = ("wte", "tokens_embed", "embed_tokens")
    found: nn.Embedding = next(getattr(inner, name) for name in names if hasattr(inner, name))
    return found


def head_as_at_birth(model: Any) -> None:
    """A head that no tensor of the file fills: it keeps what the constructor drew."""
    if model.config.tie_word_embeddings:
        drawn = torch.linspace(-1, 1, model.lm_head.weight.numel(), dtype=torch.float64).sin()
        model.lm_head.weight = nn.Parameter(drawn.view_as(model.lm_head.weight).to(model.lm_head.weight.dtype))


def head_always_tied(model: Any) -> None:
    embeddings = (
        table(model)
        if not hasattr(model.model if hasattr(model, "model") else model, "decoder")
        else (model.model.decoder.embed_tokens)
    )
    model.lm_head.weight = embeddings.weight


def head_bias_zero(model: Any) -> None:
    if getattr(model.lm_head, "bias", None) is not None:
        model.lm_head.bias.data.zero_()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.zero_()


def first_row_zero(model: Any) -> None:
    weight = table(model).weight.detach().clone()
    weight[0] = 0
    if model.lm_head.weight is table(model).weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    table(model).weight = nn.Parameter(weight)


def scaled_up(model: Any) -> None:
    embeddings = table(model)
    embeddings.register_forward_hook(lambda module, args, out: out * out.shape[-1] ** 0.5)


def unscaled_head(model: Any) -> None:
    """T5's and Gemma's relatives scale before a tied head."""
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * args[0].shape[-1] ** -0.5,))


def padded_vocabulary(model: Any) -> None:
    missing = -len(model.lm_head.weight) % 64
    model.lm_head.register_forward_hook(lambda module, args, out: torch.nn.functional.pad(out, (0, missing)))


def one_too_far(model: Any) -> None:
    def shifted(module: Any, args: Any) -> Any:
        return ((args[0] + 1) % module.num_embeddings,)

    table(model).register_forward_pre_hook(shifted)


def soft_maxed(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, out: out.log_softmax(dim=-1))


def capped(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, out: 30 * torch.tanh(out / 30))


TIED = MODELS
HEAD = ("logits",)


def last_row_unused(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def learned_positions(x: Tensor, weight: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return original(x, torch.cat((weight[:-1], weight[-2:-1])), attention_mask)

    return learned_positions


_TABLES = (
    Mistake(
        id="tied-head-random",
        families=TIED,
        what="The file holds no lm_head, since it is tied, and the head keeps its initial numbers.",
        why="A tied head is the embedding table.",
        shows="Everywhere; only through the loader.",
        fix="Tie after loading; no parameter may be left at its initial value.",
        seen="tinygrad#13796, transformers#43429, sglang#1508, vec2text#94",
        swaps=(on_model(head_as_at_birth),),
        killed_by=("golden.logits",),
        touches=HEAD,
    ),
    Mistake(
        id="tie-word-embeddings-assumed",
        families=("gpt", "gpt2", "gpt3", *LLAMAS, "phi", "transformer"),
        what="The head is tied to the embedding table although tie_word_embeddings is false.",
        why="The file holds a head of its own.",
        shows="Everywhere, in models that are not tied.",
        fix="Read tie_word_embeddings; check that every tensor of the file is used.",
        seen="transformers#43429 (the reverse)",
        swaps=(on_model(head_always_tied),),
        killed_by=("golden.logits",),
        touches=HEAD,
    ),
    Mistake(
        id="lm-head-bias-dropped",
        families=("phi", "transformer"),
        what="Logits without the head's bias (Phi's lm_head.bias, Marian's final_logits_bias).",
        why="It is part of the model.",
        shows="Exactly nothing while it is 0; otherwise one constant vector at every position.",
        fix='Add it; do not skip by the prefix "lm_head." when the weight is tied.',
        seen="vllm#46835, transformers#35650, BAAI-DCAI/Bunny#19, ferrox#237",
        swaps=(on_model(head_bias_zero),),
        killed_by=("golden.logits",),
        touches=HEAD,
    ),
    Mistake(
        id="logits-padded-vocab",
        families=DECODERS,
        what="Logits have the padded vocabulary's width: further columns of zeros.",
        why="Where all real logits are negative, a column of padding wins.",
        shows="The shape; in an engine's argmax only when all logits are negative.",
        fix="Cut logits to vocab_size, or fill the rest with −∞.",
        seen="mirage#751, mirage#752, tenstorrent/tt-metal#47021",
        swaps=(on_model(padded_vocabulary),),
        killed_by=("golden.logits",),
    ),
    Mistake(
        id="logits-are-log-probabilities",
        families=DECODERS,
        what="Returns log-softmax of the logits.",
        why="The contract is logits; temperatures and penalties need them raw.",
        shows="A constant in every row; no greedy token, no probability and no loss shows it.",
        fix="Return what the head computes.",
        seen="common knowledge",
        swaps=(on_model(soft_maxed),),
        killed_by=("golden.logits",),
        touches=HEAD,
    ),
    Mistake(
        id="logits-soft-capped",
        families=DECODERS,
        what="Logits pass 30 · tanh(x / 30), as Gemma's do.",
        why="These models have no cap.",
        shows="Small at small logits: 1e-3 at 2; no greedy token shows it.",
        fix="No cap.",
        seen="common knowledge",
        swaps=(on_model(capped),),
        killed_by=("golden.logits",),
        touches=HEAD,
    ),
    Mistake(
        id="emb-scale-extra",
        families=DECODERS,
        what="Embeddings are multiplied by √d, as in Gemma and in the Transformer of 2017.",
        why="GPT's, Llama's and Phi's are not.",
        shows="Everywhere, less so where a norm comes first.",
        fix="No factor.",
        seen="common knowledge",
        swaps=(on_model(scaled_up),),
        killed_by=("golden.logits",),
        touches=(*EMBEDDED, *READ),
    ),
    Mistake(
        id="head-input-scaled",
        families=DECODERS,
        what="The head's input is multiplied by d^(−1/2), as T5 does before a tied head.",
        why="These models do not.",
        shows="A constant ratio √d of all logits; no greedy token shows it.",
        fix="No factor.",
        seen="common knowledge",
        swaps=(on_model(unscaled_head),),
        killed_by=("golden.logits",),
        touches=("logits", "final_norm"),
    ),
    Mistake(
        id="embedding-padding-row",
        families=DECODERS,
        what="Token 0 is taken for padding and embedded as zeros (padding_idx=0).",
        why="Token 0 is a token like any other.",
        shows="Only texts with token 0.",
        fix="No padding_idx; padding is what attention_mask says.",
        seen="common knowledge",
        swaps=(on_model(first_row_zero),),
        killed_by=("golden.logits",),
        touches=EMBEDDED,
    ),
    Mistake(
        id="token-ids-off-by-one",
        families=DECODERS,
        what="Ids are looked up one row further down (ids that count from 1, a token inserted in front of the "
        "vocabulary).",
        why="Id i is row i.",
        shows="Everywhere.",
        fix="Row i for id i.",
        seen="common knowledge",
        swaps=(on_model(one_too_far),),
        killed_by=("golden.logits",),
        touches=EMBEDDED,
    ),
    Mistake(
        id="position-table-last-row",
        families=("learned_positions",),
        what="Positions are cut to rows − 2 instead of rows − 1: the last row of the table is never used.",
        why="A table of n rows has the positions 0 … n − 1.",
        shows="Only in the last token of a text as long as the table.",
        fix="Refuse positions beyond the table; cut nothing.",
        seen="common knowledge",
        swaps=(Swap("reference_impl.nn.absolute_positions:learned_positions", last_row_unused),),
        killed_by=("invariance.exact_table",),
    ),
)


MISTAKES = (*_SINUSOIDS, *_LEARNED, *_TABLES)
