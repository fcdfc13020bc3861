"""Encoder–decoder models: who masks what, whose output is attended to, and what is kept while decoding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.attention import WEIGHED
from conformance.mistakes.making import instead, on_model

MODEL = "reference_impl.models.transformer:"
DECODER = MODEL + "DecoderLayer.forward"
ENCODE = MODEL + "EncoderDecoder.encode"
DECODE = MODEL + "EncoderDecoder.decode"
MEMORY = MODEL + "EncoderDecoder.memory"
EMBED = MODEL + "Stack.embed"
REAL = "reference_impl.nn.cross_attention:all_real"

A, L, F_ = "layers.N.attention.", "layers.N.", "layers.N.feed_forward."
READS = (A + "query", A + "key", A + "value", A + "scores", *WEIGHED)
STREAM = (A + "residual", A + "output_norm", F_ + "residual", F_ + "up", L + "output", A + "output")
PADDED = ("golden.left_padding", "golden.right_padding", "cache.ragged")


def entry(identifier: str, *swaps: Swap, **text: Any) -> Mistake:
    more = {"seen": "common knowledge", "killed_by": ("golden.logits",), "touches": (*READS, *STREAM)} | text
    return Mistake(id=identifier, families=("transformer",), swaps=swaps, **more)


def layer(rule: Callable[..., Tensor]) -> Callable[..., Any]:
    """A decoder block by another rule: rule(self, x, attend to itself, attend to the source, feed forward)."""

    def forward(self: Any, x: Tensor, mask: Tensor, memory: Any, source_mask: Tensor, cache: Any = None) -> Tensor:
        def own(states: Tensor) -> Tensor:
            key, value = self.self_attn.keys_values(states)
            if cache is not None:
                key, value = cache.append(key, value)
            return self.self_attn(states, key, value, mask)  # type: ignore[no-any-return]

        def source(states: Tensor) -> Tensor:
            return self.encoder_attn(states, *memory, source_mask)  # type: ignore[no-any-return]

        def feed(states: Tensor) -> Tensor:
            return self.fc2(self.activation_fn(self.fc1(states)))  # type: ignore[no-any-return]

        return rule(self, x, own, source, feed)

    return instead(forward)


def source_before_self(self: Any, x: Tensor, own: Any, source: Any, feed: Any) -> Tensor:
    m = self.encoder_attn_layer_norm(x + source(x))
    n = self.self_attn_layer_norm(m + own(m))
    return self.final_layer_norm(n + feed(n))  # type: ignore[no-any-return]


def without_source(self: Any, x: Tensor, own: Any, source: Any, feed: Any) -> Tensor:
    n = self.self_attn_layer_norm(x + own(x))
    m = self.encoder_attn_layer_norm(n)
    return self.final_layer_norm(m + feed(m))  # type: ignore[no-any-return]


def skip_from_input(self: Any, x: Tensor, own: Any, source: Any, feed: Any) -> Tensor:
    n = self.self_attn_layer_norm(x + own(x))
    m = self.encoder_attn_layer_norm(x + source(n))
    return self.final_layer_norm(m + feed(m))  # type: ignore[no-any-return]


def pre_norm(self: Any, x: Tensor, own: Any, source: Any, feed: Any) -> Tensor:
    n = x + own(self.self_attn_layer_norm(x))
    m = n + source(self.encoder_attn_layer_norm(n))
    return m + feed(self.final_layer_norm(m))  # type: ignore[no-any-return]


def norms_crossed(self: Any, x: Tensor, own: Any, source: Any, feed: Any) -> Tensor:
    n = self.encoder_attn_layer_norm(x + own(x))
    m = self.self_attn_layer_norm(n + source(n))
    return self.final_layer_norm(m + feed(m))  # type: ignore[no-any-return]


def one_norm(self: Any, x: Tensor, own: Any, source: Any, feed: Any) -> Tensor:
    n = self.self_attn_layer_norm(x + own(x))
    m = self.self_attn_layer_norm(n + source(n))
    return self.final_layer_norm(m + feed(m))  # type: ignore[no-any-return]


def encoder_without_second_norm(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, mask: Tensor) -> Tensor:
        n = self.self_attn_layer_norm(x + self.self_attn(x, *self.self_attn.keys_values(x), mask))
        return n + self.fc2(self.activation_fn(self.fc1(n)))  # type: ignore[no-any-return]

    return forward


def encoder_mask(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """The encoder's mask (B, 1, N, N), changed."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(self: Any, x: Tensor, mask: Tensor) -> Tensor:
            return original(self, x, change(mask.expand(-1, 1, x.shape[1], -1)))

        return forward

    return make


def cross_mask(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """The mask of cross attention, changed: change(source mask (B, 1, 1, N), own mask (B, 1, T, S))."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(self: Any, x: Tensor, mask: Tensor, memory: Any, source_mask: Tensor, cache: Any = None) -> Tensor:
            return original(self, x, mask, memory, change(source_mask, mask), cache)

        return forward

    return make


def triangle(source: Tensor, own: Tensor) -> Tensor:
    queries, keys = own.shape[-2], source.shape[-1]
    start = own.shape[-1] - queries
    return source & (torch.arange(keys) <= torch.arange(queries)[:, None] + start)


def of_the_target(source: Tensor, own: Tensor) -> Tensor:
    """The last target row's mask, cut or stretched to the source's length."""
    seen = own[:, :, -1:]
    missing = max(0, source.shape[-1] - seen.shape[-1])
    return torch.nn.functional.pad(seen, (0, missing), value=True)[..., : source.shape[-1]]


def target_unmasked(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, mask: Tensor, memory: Any, source_mask: Tensor, cache: Any = None) -> Tensor:
        return original(self, x, torch.ones_like(mask), memory, source_mask, cache)

    return forward


def encoded_at(place: int) -> Callable[..., Any]:
    """The decoder attends to what the encoder has before block `place`."""

    def encode(self: Any, input_ids: Tensor, real: Tensor) -> Tensor:
        x: Tensor = self.encoder.embed(input_ids, real)
        for block in self.encoder.layers[:place]:
            x = block(x, real[:, None, None])
        return x

    return instead(encode)


def first_memory_for_all(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, encoded: [original(self, encoded)[0]] * len(self.decoder.layers)


def own_projections(self: Any, encoded: Tensor) -> list[Any]:
    return [block.self_attn.keys_values(encoded) for block in self.decoder.layers]


def values_are_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, encoded: [(value, key) for key, value in original(self, encoded)]


def sessions_unmasked(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def decode(self: Any, ids: Tensor, mask: Any, memory: Any, source_real: Tensor, cache: Any = None) -> Tensor:
        seen = source_real if cache is None else torch.ones_like(source_real)
        return original(self, ids, mask, memory, seen, cache)

    return decode


def source_positions_slots(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Positions count padding."""
    return lambda self, ids, real: original(self, ids, torch.ones_like(real))


def decoder_table_is_encoders(model: Any) -> None:
    table = model.model.encoder.embed_tokens
    if table.weight.shape == model.model.decoder.embed_tokens.weight.shape:
        model.model.decoder.embed_tokens = table


def attentions_crossed(model: Any) -> None:
    for block in model.model.decoder.layers:
        block.self_attn, block.encoder_attn = block.encoder_attn, block.self_attn


def loss_shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


MISTAKES = (
    entry(
        "cross-mask-from-target", Swap(DECODER, cross_mask(of_the_target)),
        what="Cross attention is masked with the target's mask.", why="Its keys are the source's.",
        shows="A shape error unless both are equally long; then only with padded sources.",
        fix="The source's key mask.",
        seen="Kamichanw/SeekDeeper#3 (text), keras-team/keras-io#1046, lucidrains/x-transformers#174",
        killed_by=PADDED, touches=WEIGHED,
    ),
    entry(
        "cross-mask-causal", Swap(DECODER, cross_mask(triangle)),
        what="A causal triangle is applied to cross attention.", why="Every target token sees the whole source.",
        shows="Early target rows miss late source tokens.", fix="Only padding is hidden.",
        seen="keras-team/keras-io#1046", touches=WEIGHED,
    ),
    entry(
        "cross-mask-missing", Swap(DECODER, cross_mask(lambda source, own: torch.ones_like(source))),
        what="The source's padding is seen by cross attention.", why="Pads are no input.",
        shows="Only with padded sources: the output changes with the amount of padding.", fix="The source's key mask.",
        seen="NVIDIA/FasterTransformer#270", killed_by=PADDED, touches=WEIGHED,
    ),
    entry(
        "encdec-cross-padding-leak", Swap(DECODE, sessions_unmasked),
        what="While decoding from cached keys and values of the source its lengths are forgotten.",
        why="Pads are no input.", shows="Only in sessions over padded sources.",
        fix="Keep the source's mask with them.",
        seen="NVIDIA/FasterTransformer#270", killed_by=("cache.ragged",), touches=WEIGHED,
    ),
    entry(
        "encoder-causal", Swap(MODEL + "EncoderLayer.forward", encoder_mask(lambda mask: mask & torch.ones(
            mask.shape[-2:], dtype=torch.bool).tril())),
        what="The encoder is causal.", why="It sees the whole source.", shows="All source rows but the last.",
        fix="Only padding is hidden.", touches=WEIGHED,
    ),
    entry(
        "encoder-padding-seen", Swap(MODEL + "EncoderLayer.forward", encoder_mask(torch.ones_like)),
        what="The encoder attends to padding.", why="Pads are no input.", shows="Only with padded sources.",
        fix="The source's key mask.", seen="tensorflow#512 (in recurrent models)", killed_by=PADDED, touches=WEIGHED,
    ),
    entry(
        "decoder-not-causal", Swap(DECODER, target_unmasked),
        what="The decoder attends to later target tokens.", why="They are what is to be predicted.",
        shows="Everywhere but in the last row.", fix="A causal mask.", seen="pytorch/examples#649", touches=WEIGHED,
    ),
    entry(
        "cross-attends-to-embedding", Swap(ENCODE, encoded_at(0)),
        what="The decoder attends to the source's embeddings.", why="It attends to the encoder's output.",
        shows="Everywhere.", fix="The last encoder block's output.",
    ),
    entry(
        "cross-attends-one-block-early", Swap(ENCODE, encoded_at(-1)),
        what="The decoder attends to the input of the encoder's last block.", why="It attends to its output.",
        shows="Everywhere.", fix="The last encoder block's output.",
    ),
    entry(
        "cross-memory-of-first-block", Swap(MEMORY, first_memory_for_all),
        what="All decoder blocks share the first one's projected keys and values of the source.",
        why="Each projects with its own weights.", shows="From the second decoder block on.", fix="One pair a block.",
    ),
    entry(
        "cross-projected-by-self", Swap(MEMORY, instead(own_projections)),
        what="The source is projected with the weights of self-attention.", why="encoder_attn has its own.",
        shows="Everywhere.", fix="encoder_attn.k_proj, v_proj.",
    ),
    entry(
        "cross-keys-values-swapped", Swap(MEMORY, values_are_keys),
        what="Keys and values of the source change places.", why="They have projections of their own.",
        shows="Everywhere.", fix="(key, value).", seen="tenstorrent/tt-mlir#8958",
    ),
    entry(
        "decoder-source-before-self", Swap(DECODER, layer(source_before_self)),
        what="A decoder block attends to the source first and to itself afterwards.", why="Itself first.",
        shows="Everywhere.", fix="Self, source, feed-forward.",
    ),
    entry(
        "decoder-without-source", Swap(DECODER, layer(without_source)),
        what="Cross attention is not added.", why="The source would have no say.", shows="Everywhere.", fix="Add it.",
    ),
    entry(
        "decoder-skip-from-input", Swap(DECODER, layer(skip_from_input)),
        what="The skip path around cross attention starts at the block's input.",
        why="It starts at what self-attention left.", shows="Everywhere.", fix="LN(n + Attention(n, …)).",
    ),
    entry(
        "decoder-pre-norm", Swap(DECODER, layer(pre_norm)),
        what="Decoder blocks are pre-norm.", why="Those of 2017 are post-norm.", shows="Everywhere.",
        fix="LN(x + f(x)).", seen="harvardnlp/harvardnlp.github.io#6",
    ),
    entry(
        "decoder-norms-crossed", Swap(DECODER, layer(norms_crossed)),
        what="The norms of self- and cross attention change places.", why="Each has weights of its own.",
        shows="Nothing while norm weights are 1.", fix="Follow the names.", seen="allenai/OLMo#222",
    ),
    entry(
        "decoder-norm-used-twice", Swap(DECODER, layer(one_norm)),
        what="One norm serves self- and cross attention.", why="Each has its own.",
        shows="Nothing while norm weights are 1.", fix="Two norms.", seen="allenai/OLMo#222",
    ),
    entry(
        "encoder-second-norm-missing", Swap(MODEL + "EncoderLayer.forward", encoder_without_second_norm),
        what="The norm after the encoder's feed-forward layer is missing.", why="Post-norm blocks end with one.",
        shows="Everywhere.", fix="final_layer_norm.",
    ),
    entry(
        "decoder-attentions-crossed", on_model(attentions_crossed),
        what="Weights of self-attention and cross attention change places (names: self_attn, encoder_attn, src_attn).",
        why="Shapes agree, meanings do not.", shows="Everywhere.", fix="Follow the names.",
    ),
    entry(
        "decoder-table-is-encoders", on_model(decoder_table_is_encoders),
        what="The target is embedded with the source's table.", why="share_encoder_decoder_embeddings may be false.",
        shows="Only where tables differ.", fix="Read the field.", touches=("embedding",),
    ),
    entry(
        "source-positions-count-padding", Swap(EMBED, source_positions_slots),
        what="Positions count the padding.", why="The first real token has position 0.",
        shows="Only with padding on the left.", fix="cumsum(attention_mask) − 1.",
        seen="transformers#33095, transformers#18478", killed_by=("golden.left_padding",), touches=("embedding",),
    ),
    entry(
        "decoder-loss-shifted", Swap("reference_impl.nn.loss:token_loss", instead(loss_shifted)),
        what="Labels of an encoder–decoder model are shifted once more in the loss.",
        why="The decoder's input is shifted already: labels stand in the place of the logits that predict them.",
        shows="The loss only.", fix="No shift in the loss.", killed_by=("golden.loss",), touches=(),
    ),
)  # fmt: skip
