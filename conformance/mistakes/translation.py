"""Recurrent translation models: RNNsearch and GNMT."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.making import instead, on_load, on_model
from reference_impl.nn import recurrent_cells

SEARCH = "reference_impl.models.rnn_search:"
GNMT = "reference_impl.models.gnmt:"
ATTENTION = "reference_impl.nn.sequence_attention:"
RECURRENT = "reference_impl.nn.recurrent:"
CELLS = "reference_impl.nn.recurrent_cells:"
STEPS = ("steps.N.attention.scores", "steps.N.attention.weights", "steps.N.attention.context", "steps.N.state")
LAYERS = ("layers.N.forward", "layers.N.backward", "layers.N.hidden", "layers.N.output")
BOTH = ("rnn_search", "gnmt")
PADDED = ("golden.left_padding", "golden.right_padding", "cache.ragged")
DECODING = ("cache.prefill_decode", "cache.one_by_one", "cache.chunks")


def entry(identifier: str, families: tuple[str, ...], *swaps: Swap, **text: Any) -> Mistake:
    more = {"seen": "common knowledge", "killed_by": ("golden.logits",), "touches": STEPS} | text
    return Mistake(id=identifier, families=families, swaps=swaps, **more)


def search(identifier: str, *swaps: Swap, **text: Any) -> Mistake:
    return entry(identifier, ("rnn_search",), *swaps, **text)


def gnmt(identifier: str, *swaps: Swap, **text: Any) -> Mistake:
    return entry(identifier, ("gnmt",), *swaps, **text)


# --- both -------------------------------------------------------------------------------------------------------------


def swapped_inputs(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([second, first], dim=-1)


def over_padding(original: Callable[..., Any]) -> Callable[..., Any]:
    def scan(step: Any, x: Tensor, state: Any, weights: Any, real: Any, *, reverse: bool) -> Any:
        return original(step, x, state, weights, None if reverse else real, reverse=reverse)

    return scan


def through_padding(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda rows, old, new: new


def state_restarts(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Every feed begins with the initial state."""

    def feed(self: Any, decoder_input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if not hasattr(self, "initial"):
            self.initial = self._state
        self._state = self.initial
        logits: Tensor = original(self, decoder_input_ids, attention_mask)
        return logits

    return feed


def bias_dropped(name: str, tensor: Tensor, config: Any) -> Tensor | None:
    return torch.zeros_like(tensor) if name.endswith("attention.bias") else None


def output_bias_dropped(name: str, tensor: Tensor, config: Any) -> Tensor | None:
    return torch.zeros_like(tensor) if name.endswith("output.bias") else None


def encoders_table(model: Any) -> None:
    if model.encoder.embedding.weight.shape == model.decoder.embedding.weight.shape:
        model.decoder.embedding = model.encoder.embedding


def flat(original: Callable[..., Any]) -> Callable[..., Any]:
    """Every position of the source weighs the same."""

    def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
        weights: Tensor = original(torch.zeros_like(scores), mask)
        return weights

    return masked_softmax


_BOTH = (
    entry(
        "translation-input-order", BOTH, Swap(SEARCH + "step_input", instead(swapped_inputs)),
        Swap(GNMT + "with_context", instead(swapped_inputs)),
        what="[context; word] where the matrix was trained on [word; context].",
        why="Columns belong to what they were trained on.",
        shows="Everywhere; shapes agree.", fix="The word first.", seen="tensorflow#29622 (kernels of LSTMs)",
    ),
    entry(
        "encoder-reverse-over-padding", BOTH, Swap(RECURRENT + "scan", over_padding),
        what="The encoder's backward direction starts in the padding.", why="Pads are no input.",
        shows="Only in short sources.", fix="Start at the last real token.",
        seen="pytorch#1811, pytorch#517, lmnt-com/haste#12", killed_by=PADDED, touches=LAYERS,
    ),
    entry(
        "translation-state-through-padding", BOTH, Swap(RECURRENT + "advance", through_padding),
        what="Padding moves the state on.", why="It leaves it as it was.",
        shows="Only with padding before real tokens.",
        fix="Keep the old state at pads.", seen="bentrevett/pytorch-seq2seq#90", killed_by=PADDED,
    ),
    entry(
        "translation-state-restarts", BOTH, Swap("reference_impl.nn.sequence_session:Session.feed", state_restarts),
        what="Every call begins with the initial state.", why="The state goes on.",
        shows="Only from the second call on.",
        fix="Keep it.", killed_by=DECODING, touches=(*STEPS, *LAYERS, "pieces"),
    ),
    entry(
        "attention-bias-dropped", BOTH, on_load(bias_dropped),
        what="The bias inside the energy is not added.", why="It is in the file.", shows="Nothing while it is 0.",
        fix="Add it.", seen="OpenNMT-py#110, tensorflow#6597",
    ),
    entry(
        "output-bias-dropped", BOTH, on_load(output_bias_dropped),
        what="The bias of the output layer is not added.", why="It is in the file.",
        shows="Nothing while it is 0; otherwise one vector at every position.", fix="Add it.",
        seen="vllm#46835 (the same seam)",
        touches=("logits",),
    ),
    entry(
        "target-embedded-as-source", BOTH, on_model(encoders_table),
        what="The target is embedded with the source's table.", why="Each language has its own.",
        shows="A shape error, or silence where vocabularies are equally large.", fix="decoder.embedding.",
        touches=("embedding", *STEPS),
    ),
    entry(
        "attention-uniform", BOTH, Swap(ATTENTION + "masked_softmax", flat),
        what="Every source position weighs the same (scores are lost on the way).", why="Weights are their softmax.",
        shows="Everywhere; nothing with one source token.", fix="softmax(scores).",
    ),
)  # fmt: skip


# --- RNNsearch --------------------------------------------------------------------------------------------------------


def first_forward(found: Any) -> Tensor:
    return found.final[0][0]  # type: ignore[no-any-return]


def last_output(found: Any) -> Tensor:
    return found.output[:, -1].chunk(2, -1)[1]  # type: ignore[no-any-return]


def zero_start(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, backward: tuple(map(torch.zeros_like, original(self, backward)))


def unsquashed_start(original: Callable[..., Any]) -> Callable[..., Any]:
    def start(self: Any, backward: Tensor) -> Any:
        s = self.initial_state(self.initial(backward))
        return (s.to(torch.promote_types(s.dtype, torch.float32)),)

    return start


def halves(pieces: Tensor) -> Tensor:
    first, second = pieces.chunk(2, dim=-1)
    return torch.maximum(first, second)


def smaller(pieces: Tensor) -> Tensor:
    return torch.amin(pieces.unflatten(-1, (-1, 2)), dim=-1)


def mean(pieces: Tensor) -> Tensor:
    averaged: Tensor = pieces.unflatten(-1, (-1, 2)).mean(dim=-1)
    return averaged


def state_after_searches(self: Any, ids: Tensor, real: Tensor, source: Any, state: Any) -> Any:
    """The word alone makes the step, and the state after it searches: Luong's order."""
    from reference_impl.nn import recurrent

    words = self.embedding(ids)
    states, contexts = [], []
    for t, word in enumerate(words.unbind(dim=1)):
        (before,) = state
        nothing = torch.zeros_like(source.memory[:, 0])
        (guess,) = self.rnn.step(torch.cat([word, nothing], dim=-1), state)
        context = self.attention(guess, source)
        (after,) = self.rnn.step(torch.cat([word, context], dim=-1), state)
        state = recurrent.advance(recurrent.real_rows(t, real), state, (self.state(after),))
        states.append(before.to(words.dtype))
        contexts.append(context)
    return self.output(self.readout(torch.stack(states, dim=1), words, torch.stack(contexts, dim=1))), state


def readout_without(part: str) -> Swap:
    return on_load(lambda name, tensor, config: torch.zeros_like(tensor) if name.endswith(f"readout.{part}") else None)


_SEARCH = (
    search(
        "bahdanau-uses-current-state", Swap(SEARCH + "Decoder.forward", instead(state_after_searches)),
        what="The search is made with the state after the step.",
        why="s_{i−1} searches, and the step reads what it found.",
        shows="Everywhere.", fix="Search, then step.",
        seen="OpenNMT-py#668, OpenNMT-py#296, thushv89/attention_keras#33",
    ),
    search(
        "readout-of-new-state", Swap(SEARCH + "read_state", instead(lambda before, after: after)),
        what="The deep output reads the state after the step (equation 4).",
        why="The published appendix and the authors' "
        "code read s_{i−1}.", shows="Everywhere.", fix="Follow the weights.", touches=("pieces", "maxout"),
    ),
    search(
        "initial-state-from-forward", Swap(SEARCH + "first_backward", instead(first_forward)),
        what="The decoder starts from the forward direction's last state.", why="From ←h_1, the backward one's.",
        shows="Everywhere.", fix="W_s ←h_1.", touches=("initial_state", *STEPS),
    ),
    search(
        "initial-state-last-position", Swap(SEARCH + "first_backward", instead(last_output)),
        what="←h is taken at the last position.", why="The backward direction ends at the first.",
        shows="Everywhere; nothing with one source token.", fix="←h_1.",
        seen="yunjey/pytorch-tutorial#174, yalesong/pvse#13", touches=("initial_state", *STEPS),
    ),
    search(
        "initial-state-zero", Swap(SEARCH + "Decoder.start", zero_start),
        what="The decoder starts from zeros.", why="s_0 = tanh(W_s ←h_1 + b_s).", shows="Everywhere.",
        fix="Compute it.",
        touches=("initial_state", *STEPS, "pieces"),
    ),
    search(
        "initial-state-not-squashed", Swap(SEARCH + "Decoder.start", unsquashed_start),
        what="s_0 without tanh.", why="tanh(W_s ←h_1 + b_s).", shows="Small while it is small.", fix="tanh.",
        touches=("initial_state", *STEPS),
    ),
    search(
        "maxout-of-halves", Swap(SEARCH + "maxout", instead(halves)),
        what="Unit j takes the larger of pieces j and j + l.", why="Of neighbours, 2j − 1 and 2j.", shows="Everywhere.",
        fix="unflatten(−1, (l, 2)).", touches=("maxout",),
    ),
    search(
        "maxout-smaller", Swap(SEARCH + "maxout", instead(smaller)),
        what="The smaller of two pieces.", why="The larger.", shows="Everywhere.", fix="max.", touches=("maxout",),
    ),
    search(
        "maxout-averaged", Swap(SEARCH + "maxout", instead(mean)),
        what="The mean of two pieces.", why="The larger.", shows="Everywhere.", fix="max.", touches=("maxout",),
    ),
    search(
        "readout-without-context", readout_without("context_weight"),
        what="The deep output does not read the context.", why="t̃ = U s + V E y + C c.", shows="Everywhere.",
        fix="Add C c.",
        touches=("pieces",),
    ),
    search(
        "readout-without-word", readout_without("word_weight"),
        what="The deep output does not read the last word.", why="t̃ = U s + V E y + C c.", shows="Everywhere.",
        fix="Add V E y.", touches=("pieces",),
    ),
    search(
        "gru-reset-placement-in-model",
        Swap(CELLS + "gru_step", instead(recurrent_cells.gru_step_reset_before)),
        what="The reset gate comes before the product where reset_after says after it, or the reverse.",
        why="reset_after is a field.", shows="Only where the model has the other form.", fix="Read reset_after.",
        seen="tensorflow#8311, keras-team/keras#8307", touches=(*LAYERS, *STEPS),
    ),
)  # fmt: skip


# --- GNMT -------------------------------------------------------------------------------------------------------------


def residual_from(first: int) -> Callable[..., Any]:
    def residual(number: int, below: Tensor, hidden: Tensor) -> Tensor:
        return hidden + below if number >= first and below.shape == hidden.shape else hidden

    return instead(residual)


def new_state_searches(before: Any) -> Tensor:
    return before[1]  # type: ignore[no-any-return]


def bottom_alone_reads(original: Callable[..., Any]) -> Callable[..., Any]:
    """Layers above the bottom get zeros for the context."""

    def over(self: Any, x: Tensor, real: Tensor, context: Tensor | None = None, state: Any = ()) -> Any:
        return original(self, x, real, None if context is None else torch.zeros_like(context), state)

    return over


def earlier_context(original: Callable[..., Any]) -> Callable[..., Any]:
    """Layers above the bottom get the context of the step before."""

    def over(self: Any, x: Tensor, real: Tensor, context: Tensor | None = None, state: Any = ()) -> Any:
        if context is not None:
            context = torch.cat((torch.zeros_like(context[:, :1]), context[:, :-1]), dim=1)
        return original(self, x, real, context, state)

    return over


def all_one_way(model: Any) -> None:
    """The bottom layer's backward weights are its forward ones."""
    layer = model.encoder.layers[0]
    for name, parameter in list(layer.named_parameters()):
        if name.endswith("_reverse"):
            parameter.data = getattr(layer, name.removesuffix("_reverse")).detach().clone()


_GNMT = (
    gnmt(
        "gnmt-residual-missing", Swap(GNMT + "residual", residual_from(99)),
        what="No residual connections.", why="From the third layer on there are.",
        shows="Only with three layers or more.",
        fix="x^i = m^i + x^{i−1}.", touches=(*LAYERS, *STEPS, "logits"),
    ),
    gnmt(
        "gnmt-residual-from-second", Swap(GNMT + "residual", residual_from(2)),
        what="Residual connections from the second layer on.", why="From the third.",
        shows="Everywhere where widths agree.",
        fix="From the third layer.", touches=(*LAYERS, *STEPS, "logits"),
    ),
    gnmt(
        "gnmt-residual-from-fourth", Swap(GNMT + "residual", residual_from(4)),
        what="Residual connections from the fourth layer on.", why="From the third.",
        shows="Only with three layers or more.",
        fix="From the third layer.", touches=(*LAYERS, *STEPS, "logits"),
    ),
    gnmt(
        "gnmt-search-with-cell", Swap(GNMT + "search_query", instead(new_state_searches)),
        what="The cell searches, c_{i−1}.", why="The output does, y_{i−1}: state tuples are (h, c).",
        shows="Everywhere but in "
        "the first step, where both are 0.", fix="h.", seen="common knowledge (state tuples of LSTMs)",
    ),
    gnmt(
        "gnmt-context-bottom-only", Swap(GNMT + "Layer.over", bottom_alone_reads),
        what="Only the bottom decoder layer reads the context.", why="Every layer does.",
        shows="Only with two decoder layers or more.", fix="[x; context] in every layer.",
        seen="OpenNMT-py#668 (family)", touches=(*LAYERS, "logits"),
    ),
    gnmt(
        "gnmt-context-of-last-step", Swap(GNMT + "Layer.over", earlier_context),
        what="Layers above the bottom read the context of the step before.", why="Of the same step.",
        shows="Only with two decoder layers or more.", fix="The current context.", touches=(*LAYERS, "logits"),
    ),
    gnmt(
        "gnmt-backward-is-forward", on_model(all_one_way),
        what="The bottom encoder layer's backward direction uses the forward one's weights.", why="It has its own.",
        shows="Everywhere.", fix="…_reverse.", touches=LAYERS,
    ),
)  # fmt: skip

MISTAKES = (*_BOTH, *_SEARCH, *_GNMT)
