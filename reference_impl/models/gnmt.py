"""GNMT: stacks of LSTM layers with residual connections, whose bottom decoder layer searches the source for all layers.

Wu et al. 2016, Google's Neural Machine Translation System (arXiv:1609.08144), section 3. No library ever had the
paper's model as it stands: the keys of config.json are this project's own, and every layer's weights have the names and
layouts of torch.nn.LSTM.

What the paper leaves open is fixed here: both stacks begin with states of zeros, so that y_0, what the first step
searches with, is zero; each direction of the bottom encoder layer is `hidden_size` wide; attention and output have
biases. The clipping of section 6, which is there for quantisation, is not implemented.

Shapes: B batch, S source, T target tokens, H hidden_size, A width of an annotation.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference_impl.config import DERIVED, WITHOUT_EFFECT, read_fields, require_model_type, require_positive
from reference_impl.nn import masks, recurrent
from reference_impl.nn.recurrent_cells import State
from reference_impl.nn.recurrent_modules import LSTM
from reference_impl.nn.sequence_attention import AdditiveAttention, Source
from reference_impl.nn.sequence_session import Session, decode

# Keys of config.json that say nothing about what a forward pass computes, beside those of every family.
KEYS_WITHOUT_EFFECT = WITHOUT_EFFECT | {"decoder_start_token_id", "dropout", "is_encoder_decoder"}

# "Residual connections start from the layer third from the bottom in the encoder and decoder" (figure 1).
FIRST_RESIDUAL_LAYER = 3


@dataclass(frozen=True, kw_only=True)
class GNMTConfig:
    """The keys of config.json that decide what GNMT computes; the defaults are the paper's, where it says.

    Raises ValueError where a value is out of range.
    """

    # Number of source token ids.
    vocab_size: int = 32000
    # Number of target token ids; null: as many as source ones. The languages never share a table.
    decoder_vocab_size: int = DERIVED
    # Width of a token's embedding, in both languages.
    embedding_size: int = 1024
    # Width of an LSTM layer, of each direction of the bottom encoder layer as well, H.
    hidden_size: int = 1024
    # Width inside the attention's feed-forward network.
    attention_size: int = 1024
    # Number of encoder layers; the bottom one, which runs in both directions, counts as one.
    encoder_layers: int = 8
    # Number of decoder layers.
    decoder_layers: int = 8

    def __post_init__(self) -> None:
        require_positive(self)
        if self.decoder_vocab_size is None:
            object.__setattr__(self, "decoder_vocab_size", self.vocab_size)

    @property
    def annotation_size(self) -> int:
        """Width of what the encoder returns: of two directions only if there is nothing above the bottom layer."""
        return self.hidden_size if self.encoder_layers > 1 else 2 * self.hidden_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GNMTConfig":
        """Reads a parsed config.json.

        Raises:
            ValueError: not a GNMT, a key that could change the result is unknown, or a value is not valid.
        """
        require_model_type(config, "gnmt")
        return cls(**read_fields(cls, config, elsewhere=KEYS_WITHOUT_EFFECT))

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        return {"architectures": ["GNMT"], "model_type": "gnmt", **asdict(self)}


def residual(number: int, below: Tensor, hidden: Tensor) -> Tensor:
    """x^i, what layer i hands on, from x^{i-1} and its own hidden states m^i; layers are numbered from 1.

        x^i = m^i + x^{i-1}     from the third layer on
        x^i = m^i               below

    Section 3.1, equations 5 and 6.
    """
    return hidden + below if number >= FIRST_RESIDUAL_LAYER else hidden


class Layer(LSTM):
    """One LSTM layer with its residual connection; it is the `number`-th of its stack, from the bottom.

    m^i passes through `hidden`, x^i through `output`.
    """

    def __init__(self, *, number: int, input_size: int, hidden_size: int, bidirectional: bool = False) -> None:
        super().__init__(input_size=input_size, hidden_size=hidden_size, num_layers=1, bidirectional=bidirectional)
        self.number = number
        self.hidden, self.output = nn.Identity(), nn.Identity()

    def over(
        self, x: Float[Tensor, "batch seq below"], real: Tensor | None, context: Tensor | None = None, state: State = ()
    ) -> tuple[Float[Tensor, "batch seq hidden"], State]:
        """x^i from x^{i-1} and, in the decoder, the contexts; and the state, h and c, (B, H), after the last step."""
        read = x if context is None else with_context(x, context)
        found = self(read, tuple(part[None] for part in state), real)
        handed_on: Tensor = self.output(residual(self.number, x, self.hidden(found.output)))
        return handed_on, tuple(part[0] for part in found.final)


class Encoder(nn.Module):
    """The bottom layer reads in both directions, [→x; ←x]; the others read from left to right (section 3.2)."""

    def __init__(self, config: GNMTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        below = [config.embedding_size, 2 * config.hidden_size] + [config.hidden_size] * config.encoder_layers
        self.layers = nn.ModuleList(
            Layer(number=number, input_size=size, hidden_size=config.hidden_size, bidirectional=number == 1)
            for number, size in enumerate(below[: config.encoder_layers], start=1)
        )
        self.left_to_right, self.right_to_left = nn.Identity(), nn.Identity()

    def forward(
        self, input_ids: Int[Tensor, "batch source"], real: Bool[Tensor, "batch source"]
    ) -> Float[Tensor, "batch source annotation"]:
        """What attention reads; padding leaves the states as they were."""
        x: Tensor = self.embedding(input_ids)
        layer: Any
        for layer in self.layers:
            x, _ = layer.over(x, real)
            if layer.bidirectional:
                for direction, m in zip((self.left_to_right, self.right_to_left), x.chunk(2, dim=-1), strict=True):
                    direction(m)
        return x


class Decoder(nn.Module):
    """A stack of LSTM layers; every one of them reads the context.

        a_i      = Σ_t p_t x_t,   p = softmax_t(vᵀ tanh(W y_{i-1} + U x_t + b))
        m_i^1    = LSTM_1([E token_{i-1}; a_i])
        m_i^l    = LSTM_l([x_i^{l-1}; a_i])           l ≥ 2
        logits_i = W_s x_i^L + b_s

    Section 3, equation 4, with x_t the top encoder layer's output and y_{i-1} = x_{i-1}^1 the bottom decoder layer's
    output of the step before. It needs no layer above it, so the others run over all steps at once (section 3.3).
    """

    def __init__(self, config: GNMTConfig) -> None:
        super().__init__()
        hidden, annotation = config.hidden_size, config.annotation_size
        self.embedding = nn.Embedding(config.decoder_vocab_size, config.embedding_size)
        self.attention = AdditiveAttention(
            query_size=hidden, memory_size=annotation, attention_size=config.attention_size
        )
        below = [config.embedding_size] + [hidden] * (config.decoder_layers - 1)
        self.layers = nn.ModuleList(
            Layer(number=number, input_size=size + annotation, hidden_size=hidden)
            for number, size in enumerate(below, start=1)
        )
        self.output = nn.Linear(hidden, config.decoder_vocab_size)

    def start(self, memory: Float[Tensor, "batch source annotation"]) -> State:
        """h and c of every layer, zero."""
        dtype = torch.promote_types(memory.dtype, torch.float32)
        shape = len(memory), self.output.in_features
        return tuple(memory.new_zeros(shape, dtype=dtype) for _ in self.layers for _ in "hc")

    def forward(
        self, ids: Int[Tensor, "batch target"], real: Bool[Tensor, "batch target"] | None, source: Source, state: State
    ) -> tuple[Float[Tensor, "batch target vocab"], State]:
        words: Tensor = self.embedding(ids)  # (B, T, embedding)
        if not ids.shape[1]:
            return self.output(words.new_empty(len(ids), 0, self.output.in_features)), state
        x, contexts, after = self.bottom(words, real, source, state[:2])
        layer: Any
        for layer in self.layers[1:]:
            x, own = layer.over(x, real, contexts, state[2 * layer.number - 2 : 2 * layer.number])
            after += own
        return self.output(x), after

    def bottom(
        self, words: Float[Tensor, "batch target embedding"], real: Tensor | None, source: Source, state: State
    ) -> tuple[Float[Tensor, "batch target hidden"], Float[Tensor, "batch target annotation"], State]:
        """Step by step: search with the output of the step before, then step. Outputs, contexts, the last state."""
        layer: Any = self.layers[0]
        outputs, contexts = [], []
        for t, word in enumerate(words.unbind(dim=1)):
            context = self.attention(search_query(state), source)  # (B, A)
            new = layer.step(with_context(word, context), state)
            outputs.append(layer.output(new[0]).to(words.dtype))
            contexts.append(context)
            state = recurrent.advance(recurrent.real_rows(t, real), state, new)
        return torch.stack(outputs, dim=1), torch.stack(contexts, dim=1), state


def search_query(before: State) -> Float[Tensor, "batch hidden"]:
    """y_{i-1}: the bottom layer's hidden state before the step, which is what it put out in the step before."""
    return before[0]


def with_context(x: Float[Tensor, "*rows below"], context: Float[Tensor, "*rows annotation"]) -> Tensor:
    """What a decoder layer reads: its input first, then the context."""
    return torch.cat([x, context], dim=-1)


class GNMT(nn.Module):
    """GNMT: a source and the target so far in, logits of the next target token out.

    Weights start at ordinary random values; `reference_impl.checkpoint` loads trained ones.
    """

    def __init__(self, config: GNMTConfig, attention: str = "eager") -> None:
        """`attention`: "eager" or "sdpa", for the sake of other families; additive attention has one form only."""
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(
        self,
        input_ids: Int[Tensor, "batch source"],
        attention_mask: masks.PaddingMask | None = None,
        decoder_input_ids: Int[Tensor, "batch target"] | None = None,
        decoder_attention_mask: masks.PaddingMask | None = None,
    ) -> Float[Tensor, "batch target vocab"]:
        """Logits of the token after each of `decoder_input_ids`. Logits at padding mean nothing, but are finite.

        Args:
            attention_mask: one number for each of `input_ids`, 1 real and 0 padding, on either side.
            decoder_input_ids: what the decoder reads; the first one is the beginning-of-sentence symbol.
            decoder_attention_mask: the same for `decoder_input_ids`; padding leaves the states as they were.

        Raises:
            ValueError: a mask does not fit its ids, `decoder_input_ids` are missing or of another batch, or a source
                is all padding.
        """
        source, state = self.read(input_ids, attention_mask)
        return decode(self.decoder, decoder_input_ids, decoder_attention_mask, source, state)[0]

    def read(
        self, input_ids: Int[Tensor, "batch source"], attention_mask: masks.PaddingMask | None
    ) -> tuple[Source, State]:
        """What the decoder needs of the source, and its initial state."""
        real = masks.real_tokens(input_ids, attention_mask)
        memory = self.encoder(input_ids, real)
        return self.decoder.attention.read(memory, real), self.decoder.start(memory)

    @torch.no_grad()
    def session(
        self, input_ids: Int[Tensor, "batch source"], attention_mask: masks.PaddingMask | None = None
    ) -> Session:
        """Reads the sources once; the targets are then fed piece by piece."""
        return Session(self.decoder, *self.read(input_ids, attention_mask))
