"""RNNsearch: a bidirectional gated encoder, and a gated decoder that searches the source before every step.

Bahdanau, Cho and Bengio 2015, Neural Machine Translation by Jointly Learning to Align and Translate (arXiv:1409.0473),
section 3 and appendix A. No library ever had this model: the keys of config.json are this project's own, and recurrent
weights have the names and layouts of torch.nn.GRU.

The paper leaves the biases out; here every layer has one. It calls the update gate z where torch.nn's z is 1 − z: with
torch.nn's, which is used here, a gate near one keeps the old state, and the paper's rows W_z, U_z are minus the ones
in the file.

Shapes: B batch, S source, T target tokens, m embedding_size, n hidden_size, l maxout_size.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference_impl.config import DERIVED, WITHOUT_EFFECT, read_fields, require_model_type, require_positive
from reference_impl.nn import masks, recurrent
from reference_impl.nn.recurrent_cells import State
from reference_impl.nn.recurrent_modules import GRU
from reference_impl.nn.sequence_attention import AdditiveAttention, Source
from reference_impl.nn.sequence_session import Session, decode

# Keys of config.json that say nothing about what a forward pass computes, beside those of every family.
KEYS_WITHOUT_EFFECT = WITHOUT_EFFECT | {"decoder_start_token_id", "dropout", "is_encoder_decoder"}


@dataclass(frozen=True, kw_only=True)
class RNNSearchConfig:
    """The keys of config.json that decide what RNNsearch computes; the defaults are the paper's (appendix A.2.3).

    Raises ValueError where a value is out of range.
    """

    # Number of source token ids, K_x.
    vocab_size: int = 30000
    # Number of target token ids, K_y; null: as many as source ones. The languages never share a table.
    decoder_vocab_size: int = DERIVED
    # Width of a word's embedding, m, in both languages.
    embedding_size: int = 620
    # Width of the decoder's state and of each of the encoder's two directions, n.
    hidden_size: int = 1000
    # Width inside the alignment model, n'.
    attention_size: int = 1000
    # Number of maxout units before the output, l; each is the larger of two values.
    maxout_size: int = 500
    # Whether the reset gates stand after the product U s (torch.nn.GRU) and not before it, U (r ⊙ s), as in the paper.
    reset_after: bool = False

    def __post_init__(self) -> None:
        require_positive(self)
        if self.decoder_vocab_size is None:
            object.__setattr__(self, "decoder_vocab_size", self.vocab_size)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "RNNSearchConfig":
        """Reads a parsed config.json.

        Raises:
            ValueError: not an RNNsearch, a key that could change the result is unknown, or a value is not valid.
        """
        require_model_type(config, "rnn_search")
        return cls(**read_fields(cls, config, elsewhere=KEYS_WITHOUT_EFFECT))

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        return {"architectures": ["RNNSearch"], "model_type": "rnn_search", **asdict(self)}


class Encoder(nn.Module):
    """Annotations of the source: a gated network in each direction, h_j = [→h_j; ←h_j].

    Section 3.2, equation 7, and appendix A.2.1. Both directions begin with a state of zeros and share the embedding.
    """

    def __init__(self, config: RNNSearchConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.rnn = GRU(
            input_size=config.embedding_size, hidden_size=config.hidden_size, num_layers=1, bidirectional=True,
            reset_after=config.reset_after,
        )  # fmt: skip
        self.left_to_right, self.right_to_left = nn.Identity(), nn.Identity()

    def forward(
        self, input_ids: Int[Tensor, "batch source"], real: Bool[Tensor, "batch source"]
    ) -> tuple[Float[Tensor, "batch source annotation"], Float[Tensor, "batch hidden"]]:
        """The annotations, zero at padding, and ←h_1, the backward state at the first real position."""
        found = self.rnn(self.embedding(input_ids), real=real)
        for direction, states in zip((self.left_to_right, self.right_to_left), found.output.chunk(2, -1), strict=True):
            direction(states)
        return found.output, first_backward(found)


def first_backward(found: recurrent.Recurrent) -> Float[Tensor, "batch hidden"]:
    """←h_1: the backward direction reads from right to left, so that its last state is at the first position."""
    (h_n,) = found.final  # (2, B, n): forward, backward
    return h_n[1]


class MaxoutReadout(nn.Module):
    """The hidden layer of the deep output.

        t̃_i   = U_o s_{i-1} + V_o E y_{i-1} + C_o c_i + b
        t_i,j = max(t̃_i,2j-1, t̃_i,2j)         j = 1 … l

    Appendix A.2.2: U_o → `state_weight`, V_o → `word_weight`, C_o → `context_weight`. It reads the state *before* the
    step, s_{i-1}, as the published appendix and the authors' own code (GroundHog) do, where equation 4 writes
    g(y_{i-1}, s_i, c_i).
    """

    def __init__(self, config: RNNSearchConfig) -> None:
        super().__init__()
        rows = 2 * config.maxout_size
        self.state_weight = nn.Parameter(torch.empty(rows, config.hidden_size))
        self.word_weight = nn.Parameter(torch.empty(rows, config.embedding_size))
        self.context_weight = nn.Parameter(torch.empty(rows, 2 * config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(rows))
        for weight in (self.state_weight, self.word_weight, self.context_weight):
            nn.init.uniform_(weight, -1 / math.sqrt(weight.shape[1]), 1 / math.sqrt(weight.shape[1]))
        self.pieces = nn.Identity()

    def forward(
        self,
        state: Float[Tensor, "batch target hidden"],
        word: Float[Tensor, "batch target embedding"],
        context: Float[Tensor, "batch target annotation"],
    ) -> Float[Tensor, "batch target maxout"]:
        read = F.linear(state, self.state_weight) + F.linear(word, self.word_weight)
        pieces: Tensor = self.pieces(read + F.linear(context, self.context_weight, self.bias))
        return maxout(pieces)


def maxout(pieces: Float[Tensor, "*rows two_l"]) -> Float[Tensor, "*rows l"]:
    """The larger of each two neighbours: [1, 3, 5, 2] gives [3, 5].

    Goodfellow et al. 2013 (arXiv:1302.4389), section 2, with two pieces a unit.
    """
    return torch.amax(pieces.unflatten(-1, (-1, 2)), dim=-1)


class Decoder(nn.Module):
    """At every step: search with the state before it, step with what was found in all gates, and predict.

        c_i = Σ_j α_ij h_j,   α_i = softmax_j(v_aᵀ tanh(W_a s_{i-1} + U_a h_j + b_a))
        s_i = GRU([E y_{i-1}; c_i], s_{i-1})
        logits_i = W_o t_i + b_o

    Sections 3.1 and A.2.2. With [E y; c] as the input of a gated unit its input matrices are [W C], [W_z C_z] and
    [W_r C_r].
    """

    def __init__(self, config: RNNSearchConfig) -> None:
        super().__init__()
        n = config.hidden_size
        self.embedding = nn.Embedding(config.decoder_vocab_size, config.embedding_size)
        self.initial = nn.Linear(n, n)
        self.initial_state = nn.Identity()
        self.attention = AdditiveAttention(query_size=n, memory_size=2 * n, attention_size=config.attention_size)
        self.rnn = GRU(
            input_size=config.embedding_size + 2 * n, hidden_size=n, num_layers=1, bidirectional=False,
            reset_after=config.reset_after,
        )  # fmt: skip
        self.state = nn.Identity()
        self.readout = MaxoutReadout(config)
        self.output = nn.Linear(config.maxout_size, config.decoder_vocab_size)

    def start(self, backward: Float[Tensor, "batch hidden"]) -> State:
        """s_0 = tanh(W_s ←h_1 + b_s), appendix A.2.2."""
        s: Tensor = self.initial_state(self.initial(backward).tanh())
        return (s.to(torch.promote_types(s.dtype, torch.float32)),)

    def forward(
        self, ids: Int[Tensor, "batch target"], real: Bool[Tensor, "batch target"] | None, source: Source, state: State
    ) -> tuple[Float[Tensor, "batch target vocab"], State]:
        words: Tensor = self.embedding(ids)  # (B, T, m)
        if not ids.shape[1]:
            return self.output(words.new_empty(len(ids), 0, self.output.in_features)), state
        states, contexts = [], []
        for t, word in enumerate(words.unbind(dim=1)):
            (before,) = state
            context = self.attention(before, source)  # (B, 2n)
            (after,) = self.rnn.step(step_input(word, context), state)
            state = recurrent.advance(recurrent.real_rows(t, real), state, (self.state(after),))
            states.append(read_state(before, after).to(words.dtype))
            contexts.append(context)
        t_i = self.readout(torch.stack(states, dim=1), words, torch.stack(contexts, dim=1))  # (B, T, l)
        return self.output(t_i), state


def step_input(word: Float[Tensor, "batch embedding"], context: Float[Tensor, "batch annotation"]) -> Tensor:
    """[E y_{i-1}; c_i]: the word comes first."""
    return torch.cat([word, context], dim=-1)


def read_state(before: Tensor, after: Tensor) -> Tensor:
    """Of the states before and after the step the one that the deep output reads, s_{i-1}."""
    return before


class RNNSearch(nn.Module):
    """RNNsearch: a source and the target so far in, logits of the next target token out.

    Weights start at ordinary random values; `reference_impl.checkpoint` loads trained ones.
    """

    def __init__(self, config: RNNSearchConfig, attention: str = "eager") -> None:
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
            decoder_input_ids: what the decoder reads, y_0 … y_{T-1}; the first one is a start symbol.
            decoder_attention_mask: the same for `decoder_input_ids`; padding leaves the state as it was.

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
        memory, backward = self.encoder(input_ids, real)
        return self.decoder.attention.read(memory, real), self.decoder.start(backward)

    @torch.no_grad()
    def session(
        self, input_ids: Int[Tensor, "batch source"], attention_mask: masks.PaddingMask | None = None
    ) -> Session:
        """Reads the sources once; the targets are then fed piece by piece."""
        return Session(self.decoder, *self.read(input_ids, attention_mask))
