"""Recurrent layers: gates, biases, states, directions, lengths; and the LSTM over tapes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.making import instead
from reference_impl.nn import recurrent_cells as cells

LSTM = "reference_impl.nn.recurrent_cells:lstm_step"
GRU = "reference_impl.nn.recurrent_cells:gru_step"
BEFORE = "reference_impl.nn.recurrent_cells:gru_step_reset_before"
RNN = "reference_impl.nn.recurrent_cells:rnn_step"
MIX = "reference_impl.nn.recurrent_cells:gru_mix"
SCAN = "reference_impl.nn.recurrent:scan"
RECURRENT = "reference_impl.nn.recurrent:recurrent"
ORDER = "reference_impl.nn.recurrent:time_order"
REAL = "reference_impl.nn.recurrent:real_rows"
ADVANCE = "reference_impl.nn.recurrent:advance"
PADS = "reference_impl.nn.recurrent:zero_at_pads"
TAPES = "reference_impl.nn.lstmn:"

ALL = ("rnn", "lstm", "gru")
CHECKS = ("component.outputs",)

State = tuple[Tensor, ...]
Gates = dict[str, Tensor]
Step = Callable[..., tuple[State, Gates]]


def entry(identifier: str, families: tuple[str, ...], *swaps: Swap, **text: Any) -> Mistake:
    more = {"seen": "common knowledge", "killed_by": CHECKS} | text
    return Mistake(id=identifier, families=families, swaps=swaps, **more)


# --- LSTM cells -------------------------------------------------------------------------------------------------------


def gates_named(i: Tensor, f: Tensor, g: Tensor, o: Tensor) -> Gates:
    return {"input_gate": i, "forget_gate": f, "cell_gate": g, "output_gate": o}


def lstm(
    *,
    order: str = "ifgo",
    sigmoid: Callable[[Tensor], Tensor] = torch.sigmoid,
    candidate: Callable[[Tensor], Tensor] = torch.tanh,
    squash: Callable[[Tensor], Tensor] = torch.tanh,
    forget_bias: float = 0.0,
    bias: Callable[[Tensor], Tensor] = lambda b: b,
    coupled: bool = False,
    output_from_old: bool = False,
) -> Callable[..., Any]:
    """An LSTM step with something changed; `order`: how the rows are read."""

    def lstm_step(projected: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor) -> tuple[State, Gates]:
        h, c = state
        rows = dict(zip(order, (projected + F.linear(h, weight_hh, bias(bias_hh))).chunk(4, dim=-1), strict=True))
        i, o = sigmoid(rows["i"]), sigmoid(rows["o"])
        f = 1 - i if coupled else sigmoid(rows["f"] + forget_bias)
        g = candidate(rows["g"])
        new = f * c + i * g
        return (o * squash(c if output_from_old else new), new), gates_named(i, f, g, o)

    return instead(lstm_step)


def hard_sigmoid(x: Tensor) -> Tensor:
    return (0.2 * x + 0.5).clamp(0, 1)


def peeping(original: Step) -> Step:
    """Peepholes of ones: gates see the cell."""

    def lstm_step(projected: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor) -> tuple[State, Gates]:
        c = state[1]
        zero = torch.zeros_like(c)
        return original(projected + torch.cat((c, c, zero, zero), dim=-1), state, weight_hh, bias_hh)

    return lstm_step


_LSTM = (
    entry(
        "lstm-gate-order", ("lstm",), Swap(LSTM, lstm(order="ifog")),
        what="The four blocks of rows are read as i, f, o, g.",
        why="torch and cuDNN store i, f, g, o; others store i, o, f, g (ONNX) or i, g, f, o (TensorFlow).",
        shows="Large everywhere, from the first step on.",
        fix="Permute while converting; the 24 orders are few to try.",
        seen="CrispStrobe/CrispASR#106, tensorflow#29308, keras-team/keras#3088, apple/coremltools#93",
    ),
    entry(
        "lstm-gate-order-tensorflow", ("lstm",), Swap(LSTM, lstm(order="igfo")),
        what="The four blocks of rows are read as i, g, f, o (TensorFlow's BasicLSTMCell).",
        why="The file stores i, f, g, o.",
        shows="Large everywhere, from the first step on.", fix="Permute while converting.",
        seen="tensorflow#29308, keras-team/keras#3088",
    ),
    entry(
        "lstm-gate-order-onnx", ("lstm",), Swap(LSTM, lstm(order="iofg")),
        what="The four blocks of rows are read as i, o, f, g (ONNX).",
        why="The file stores i, f, g, o.",
        shows="Large everywhere, from the first step on.", fix="Permute while converting.",
        seen="apple/coremltools#93",
    ),
    entry(
        "lstm-forget-bias-added", ("lstm",), Swap(LSTM, lstm(forget_bias=1.0)),
        what="1 is added to the forget gate at run time.",
        why="A trained bias contains it already (TensorFlow's files do not).",
        shows="Exactly nothing in the first step if c_0 = 0, then everywhere.",
        fix="Add it while converting, if at all.",
        seen="tensorflow#5090, apple/coremltools#309",
    ),
    entry(
        "lstm-hard-sigmoid", ("lstm",), Swap(LSTM, lstm(sigmoid=hard_sigmoid)),
        what="Gates use clip(0.2 x + 0.5), the old default of Keras.",
        why="They are σ.", shows="2e-4 at tiny weights, 9e-2 at real scale.", fix="Gates are σ: 1 / (1 + e^−x).",
        seen="tensorflow#47495, minimaxir/textgenrnn#153, onnx/tensorflow-onnx#2001",
    ),
    entry(
        "lstm-candidate-sigmoid", ("lstm",), Swap(LSTM, lstm(candidate=torch.sigmoid)),
        what="σ on all four blocks.", why="The candidate g has tanh.", shows="Everywhere.", fix="tanh on g.",
    ),
    entry(
        "lstm-output-not-squashed", ("lstm",), Swap(LSTM, lstm(squash=lambda c: c)),
        what="h = o ⊙ c.", why="h = o ⊙ tanh(c).", shows="Small while c is small, then everywhere.", fix="tanh(c).",
    ),
    entry(
        "lstm-output-from-old-cell", ("lstm",), Swap(LSTM, lstm(output_from_old=True)),
        what="h = o ⊙ tanh(c_{t−1}).", why="The new cell is read.", shows="From the first step on.", fix="tanh(c_t).",
        seen="tensorflow#34171 (o looks at the wrong cell)",
    ),
    entry(
        "lstm-coupled-gates", ("lstm",), Swap(LSTM, lstm(coupled=True)),
        what="f = 1 − i.", why="The forget gate has rows of its own.", shows="Everywhere if c_0 ≠ 0.",
        fix="σ of its rows.",
    ),
    entry(
        "lstm-peephole", ("lstm",), Swap(LSTM, peeping),
        what="Gates see the cell through peepholes that the file does not have.",
        why="torch's LSTM has none.", shows="Exactly nothing in the first step if c_0 = 0, then everywhere.",
        fix="Peepholes only where the file has weights for them.",
        seen="tensorflow#34171, webmachinelearning/webnn#385, NervanaSystems/ngraph#3733",
    ),
)  # fmt: skip


# --- GRU cells --------------------------------------------------------------------------------------------------------


def merged_new_bias(projected: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor) -> tuple[State, Gates]:
    (h,) = state
    x_r, x_z, x_n = (projected + bias_hh).chunk(3, dim=-1)
    h_r, h_z, h_n = F.linear(h, weight_hh).chunk(3, dim=-1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return ((1 - z) * n + z * h,), {"reset_gate": r, "update_gate": z, "new_gate": n}


def two_first_crossed(original: Step) -> Step:
    """The rows are z, r, n."""

    def gru_step(projected: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor) -> tuple[State, Gates]:
        x_r, x_z, x_n = projected.chunk(3, dim=-1)
        w_r, w_z, w_n = weight_hh.chunk(3)
        b_r, b_z, b_n = bias_hh.chunk(3)
        return original(torch.cat((x_z, x_r, x_n), -1), state, torch.cat((w_z, w_r, w_n)), torch.cat((b_z, b_r, b_n)))

    return gru_step


def not_reset(original: Step) -> Step:
    def gru_step(projected: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor) -> tuple[State, Gates]:
        (h,) = state
        gates = original(projected, state, weight_hh, bias_hh)[1]
        n = (projected.chunk(3, -1)[2] + F.linear(h, weight_hh.chunk(3)[2], bias_hh.chunk(3)[2])).tanh()
        z = gates["update_gate"]
        return ((1 - z) * n + z * h,), {**gates, "new_gate": n}

    return gru_step


def new_bias_reset(projected: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor) -> tuple[State, Gates]:
    """Reset before the product, b_hn reset as well."""
    (h,) = state
    x_r, x_z, x_n = projected.chunk(3, dim=-1)
    (w_r, w_z, w_n), (b_r, b_z, b_n) = weight_hh.chunk(3), bias_hh.chunk(3)
    r, z = (x_r + F.linear(h, w_r, b_r)).sigmoid(), (x_z + F.linear(h, w_z, b_z)).sigmoid()
    n = (x_n + F.linear(r * h, w_n) + r * b_n).tanh()
    return ((1 - z) * n + z * h,), {"reset_gate": r, "update_gate": z, "new_gate": n}


_GRU = (
    entry(
        "gru-reset-placement", ("gru",),
        Swap(GRU, lambda original: cells.gru_step_reset_before), Swap(BEFORE, lambda original: cells.gru_step),
        what="The reset gate comes before the product, U(r ⊙ h), where it comes after it, r ⊙ (Uh + b), or the "
        "reverse.",
        why="Cho et al. version 3 and Keras 1 have the first, cuDNN, torch and Keras 2's reset_after the second.",
        shows="Exactly nothing in the first step if h_0 = 0; 5e-5 at tiny weights, where r ≈ ½ for all units.",
        fix="Follow the model; test with h_0 ≠ 0 and real weights.",
        seen="tensorflow#8311, keras-team/keras#8307, nntrainer#1644, microsoft/onnxruntime#3797",
    ),
    entry(
        "gru-n-bias-merged", ("gru",), Swap(GRU, instead(merged_new_bias)),
        what="b_hn is added to b_in, outside the reset gate.",
        why="n = tanh(Wx + b_in + r ⊙ (Uh + b_hn)). The biases of r and z may be merged, this one may not.",
        shows="Exactly nothing while biases are 0.", fix="Keep b_hn inside.",
        seen="nntrainer#1768, keras-team/keras#8720",
    ),
    entry(
        "gru-n-bias-reset-before", ("gru",), Swap(BEFORE, instead(new_bias_reset)),
        what="In the form that resets before the product, b_hn is reset as well.",
        why="U(r ⊙ h) + b_hn: the bias stands outside.",
        shows="Exactly nothing while biases are 0.", fix="Add b_hn unreset.", seen="nntrainer#1768",
    ),
    entry(
        "gru-update-gate-flipped", ("gru",), Swap(MIX, lambda original: lambda z, n, h: original(1 - z, n, h)),
        what="h' = z ⊙ n + (1 − z) ⊙ h.",
        why="torch has (1 − z) ⊙ n + z ⊙ h; papers disagree.",
        shows="Everywhere.", fix="Follow the file, or negate the rows of z.",
        seen="pytorch#20129, keras-team/keras#14649, microsoft/CNTK#3292, mindspore#149",
    ),
    entry(
        "gru-gate-order", ("gru",), Swap(GRU, two_first_crossed), Swap(BEFORE, two_first_crossed),
        what="The blocks of rows are read as z, r, n (Keras).", why="torch stores r, z, n.",
        shows="Everywhere.", fix="Permute while converting.", seen="keras-team/keras#785 (family)",
    ),
    entry(
        "gru-reset-missing", ("gru",), Swap(GRU, not_reset), Swap(BEFORE, not_reset),
        what="The reset gate is computed and not used.", why="It scales what n sees of the state.",
        shows="Exactly nothing in the first step if h_0 = 0 and b_hn = 0.", fix="r ⊙ (Uh + b_hn).",
    ),
)  # fmt: skip


# --- biases, weights, states ------------------------------------------------------------------------------------------


def weights_changed(change: Callable[[str, Tensor], Tensor]) -> Callable[..., Any]:
    """The layers' weights, each changed by its name."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def recurrent(step: Step, x: Tensor, initial: State, weights: Mapping[str, Tensor], *rest: Any) -> Any:
            return original(step, x, initial, {name: change(name, w) for name, w in weights.items()}, *rest)

        return recurrent

    return make


def states_changed(change: Callable[[State], State]) -> Callable[..., Any]:
    """The initial states, changed."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda step, x, initial, *rest: original(step, x, change(initial), *rest)

    return make


def result_changed(change: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """change(what is returned, x)."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def recurrent(step: Step, x: Tensor, *rest: Any) -> Any:
            return change(original(step, x, *rest), rest)

        return recurrent

    return make


def first_state_for_all(initial: State) -> State:
    return tuple(states[:1].expand_as(states) for states in initial)


def blocks_transposed(name: str, weight: Tensor) -> Tensor:
    return torch.cat([block.T for block in weight.split(weight.shape[1])]) if "weight_hh" in name else weight


def merged_twice(name: str, weight: Tensor) -> Tensor:
    """b_ih + b_hh in both: known only together, so that each is doubled."""
    return 2 * weight if name.startswith("bias") else weight


def as_directions_first(found: Any, rest: Any) -> Any:
    """(L, D) read as (D, L)."""
    layers, bidirectional = rest[2], rest[3]
    if not bidirectional:
        return found
    moved = tuple(s.unflatten(0, (layers, 2)).transpose(0, 1).flatten(0, 1) for s in found.final)
    return found._replace(final=moved)


def batch_and_layers_viewed(found: Any, rest: Any) -> Any:
    """The final states as a batch-first view would have them: the same memory read as (B, L·D)."""
    return found._replace(final=tuple(s.reshape(s.shape[1], s.shape[0], -1).transpose(0, 1) for s in found.final))


def reverse_first(found: Any, rest: Any) -> Any:
    if not rest[3]:
        return found
    return found._replace(output=torch.cat(found.output.chunk(2, dim=-1)[::-1], dim=-1))


def last_output_as_state(found: Any, rest: Any) -> Any:
    """h_n is the output at the last index, in both directions."""
    top = found.output[:, -1]
    sides = top.chunk(2, dim=-1) if rest[3] else (top,)
    final = found.final[0].clone()
    final[-len(sides) :] = torch.stack(sides)
    return found._replace(final=(final, *found.final[1:]))


def cell_is_hidden(found: Any, rest: Any) -> Any:
    return found._replace(final=(found.final[0],) * len(found.final))


def leaking() -> Swap:
    known: dict[Any, State] = {}

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def recurrent(step: Step, x: Tensor, initial: State, *rest: Any) -> Any:
            key = tuple(initial[0].shape), len(initial)
            found = original(step, x, known.get(key, initial), *rest)
            known[key] = tuple(states.detach() for states in found.final)
            return found

        return recurrent

    return Swap(RECURRENT, make)


_STATES = (
    entry(
        "rnn-second-bias-dropped", ALL,
        Swap(RECURRENT, weights_changed(lambda n, w: torch.zeros_like(w) if n.startswith("bias_hh") else w)),
        what="Only b_ih is added; b_hh is left out.", why="torch and cuDNN carry two biases, and add both.",
        shows="Nothing while biases are 0.", fix="b_ih + b_hh.",
        seen="pytorch#36905, keras-team/keras#8860, onnx/onnx#1127",
    ),
    entry(
        "rnn-bias-counted-twice", ALL, Swap(RECURRENT, weights_changed(merged_twice)),
        what="The merged bias is copied into both b_ih and b_hh, so that twice its value is added.",
        why="One of them takes it, the other is 0.", shows="Nothing while biases are 0.", fix="Halve it, or fill one.",
        seen="soumith/cudnn.torch#181",
    ),
    entry(
        "rnn-recurrent-weight-transposed", ALL,
        Swap(RECURRENT, weights_changed(blocks_transposed)),
        what="Each recurrent matrix is transposed: h W for W h.", why="torch stores (gates · hidden, hidden).",
        shows="Shapes agree, since each block is square; nothing in the first step if h_0 = 0.", fix="F.linear.",
        seen="tensorflow#29622, keras-team/keras#10179 (layouts of kernels)",
    ),
    entry(
        "rnn-initial-state-ignored", ALL, Swap(RECURRENT, states_changed(lambda s: tuple(map(torch.zeros_like, s)))),
        what="The given initial state is not used: zeros are.", why="A decoder starts from its encoder's state.",
        shows="Only where one is given.", fix="Use it.", killed_by=("component.outputs", "component.chunks"),
    ),
    entry(
        "lstm-cell-state-ignored", ("lstm",),
        Swap(RECURRENT, states_changed(lambda s: (s[0], *map(torch.zeros_like, s[1:])))),
        what="h_0 is used, and c_0 is taken for 0.", why="Both are state.", shows="Only where c_0 ≠ 0.",
        fix="Use both.",
    ),
    entry(
        "rnn-state-tuple-order", ("lstm",), Swap(RECURRENT, states_changed(lambda s: s[::-1])),
        what="(c, h) where (h, c) is expected.", why="torch has (h, c); Keras and TensorFlow differ among themselves.",
        shows="Nothing while both are 0.", fix="Name them.",
    ),
    entry(
        "rnn-state-of-first-layer", ALL, Swap(RECURRENT, states_changed(first_state_for_all)),
        what="All layers and directions start from the first one's initial state.", why="Each has its own.",
        shows="Nothing with one layer and direction.", fix="states[layer · directions + direction].",
    ),
    entry(
        "rnn-state-layout", ALL, Swap(RECURRENT, result_changed(as_directions_first)),
        what="Final states are ordered by direction, then by layer.", why="torch has layers, then directions.",
        shows="Only with several layers and two directions.", fix="(layers, directions, batch, hidden).",
        seen="songyingxin/Bert-TextClassification#16",
    ),
    entry(
        "rnn-state-view", ALL, Swap(RECURRENT, result_changed(batch_and_layers_viewed)),
        what="Final states (layers, batch, hidden) are reshaped to batch first by view instead of by a transpose.",
        why="batch_first does not move the states' batch axis.", shows="Nothing at batch 1 or one layer and direction.",
        fix="transpose(0, 1).", seen="timbmg/Sentence-VAE#20, songyingxin/Bert-TextClassification#16",
    ),
    entry(
        "lstm-final-cell-is-hidden", ("lstm",), Swap(RECURRENT, result_changed(cell_is_hidden)),
        what="h_n is returned twice.", why="c_n is the cell.", shows="In c_n only.", fix="(h_n, c_n).",
    ),
    entry(
        "rnn-state-leak", ALL, leaking(),
        what="A batch starts from the state that the one before it left.",
        why="Batches have nothing to do with each other.",
        shows="Only from the second call on.", fix="Reset the state.", seen="EleutherAI/gpt-neox#532 (in a cache)",
        killed_by=("component.gradients", "component.chunks", "component.outputs"),
    ),
    entry(
        "rnn-nonlinearity-ignored", ("rnn",), Swap(RNN, lambda original: lambda nonlinearity: original("tanh")),
        what="tanh, whatever nonlinearity says.", why="It may be relu.", shows="Only with relu.", fix="Read it.",
    ),
)  # fmt: skip


# --- directions and lengths -------------------------------------------------------------------------------------------


def over_the_padding(original: Callable[..., Any]) -> Callable[..., Any]:
    """The reverse direction runs from the end of the batch, pads included."""

    def scan(step: Step, x: Tensor, state: State, weights: Any, real: Any, *, reverse: bool) -> Any:
        if not reverse or real is None:
            return original(step, x, state, weights, real, reverse=reverse)
        outputs, final, gates = original(step, x, state, weights, None, reverse=True)
        kept = real[..., None]
        return torch.where(kept, outputs, 0.0), final, {n: torch.where(kept, g, 0.0) for n, g in gates.items()}

    return scan


def left_reversed(original: Callable[..., Any]) -> Callable[..., Any]:
    """The reverse direction's outputs stay in the order in which they were computed."""

    def scan(step: Step, x: Tensor, state: State, weights: Any, real: Any, *, reverse: bool) -> Any:
        outputs, final, gates = original(step, x, state, weights, real, reverse=reverse)
        return (outputs.flip(1) if reverse else outputs), final, gates

    return scan


def both_forward(original: Callable[..., range]) -> Callable[..., range]:
    return lambda seq, reverse: original(seq, False)


def one_weight_for_both(original: Callable[..., Any]) -> Callable[..., Any]:
    def recurrent(step: Step, x: Tensor, initial: State, weights: Mapping[str, Tensor], *rest: Any) -> Any:
        same = {name: weights[name.removesuffix("_reverse")] for name in weights}
        return original(step, x, initial, same, *rest)

    return recurrent


def sorted_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """Rows are sorted by length, and the outputs are not put back."""

    def recurrent(step: Step, x: Tensor, initial: State, weights: Any, layers: int, both: bool, real: Any) -> Any:
        found = original(step, x, initial, weights, layers, both, real)
        if real is None:
            return found
        order = real.sum(dim=1).argsort(descending=True, stable=True)
        return found._replace(output=found.output[order])

    return recurrent


def one_short(real: Tensor) -> Tensor:
    """The last real position of every row is taken for padding."""
    return real & (real.cumsum(dim=1) < real.sum(dim=1, keepdim=True))


def through_pads(original: Callable[..., State]) -> Callable[..., State]:
    return lambda real, old, new: new


LENGTHS = ("component.outputs",)

_DIRECTIONS = (
    entry(
        "birnn-reverse-over-padding", ALL, Swap(SCAN, over_the_padding),
        what="The reverse direction starts in the padding (the whole row is flipped), not at the last real token.",
        why="Pads are no input.", shows="Nothing if biases and h_0 are 0 and pads embed to 0; only in short rows.",
        fix="Flip each row within its length.",
        seen="pytorch#1811, pytorch#517, deeplearning4j#1030, tensorflow#6633, lmnt-com/haste#12",
    ),
    entry(
        "rnn-final-state-at-pad", ALL, Swap(ADVANCE, through_pads),
        what="The state runs on through the padding, and the final one is taken at the end of the batch.",
        why="The final state is that of the row's own last step.", shows="Only in rows shorter than the longest.",
        fix="Take it at length − 1.", seen="bentrevett/pytorch-seq2seq#90, bentrevett/pytorch-pos-tagging#8",
    ),
    entry(
        "rnn-lengths-ignored", ALL, Swap(REAL, instead(lambda t, real: None)),
        Swap(PADS, instead(lambda real, value: value)),
        what="lengths are accepted and not used.", why="Pads are no input.",
        shows="Only in rows shorter than the longest.",
        fix="Use them.", seen="bentrevett/pytorch-seq2seq#90",
    ),
    entry(
        "rnn-length-one-short", ALL,
        Swap(REAL, lambda original: lambda t, real: original(t, None if real is None else one_short(real))),
        Swap(PADS, lambda original: lambda real, value: original(None if real is None else one_short(real), value)),
        what="A row's last real step is taken for padding.", why="Positions 0 … length − 1 are real.",
        shows="Only where lengths are given.", fix="t < length.",
    ),
    entry(
        "rnn-pads-not-zeroed", ALL, Swap(PADS, instead(lambda real, value: value)),
        what="Outputs at pads are whatever was computed there.",
        why="The contract says 0, as torch's packed sequences do.",
        shows="Only in pads.", fix="Zero them.",
    ),
    entry(
        "birnn-last-step-backward", ALL, Swap(RECURRENT, result_changed(last_output_as_state)),
        what="The summary of both directions is the output at the last index.",
        why="The reverse direction ends at index 0; and a short row's last index is a pad.",
        shows="In the reverse half, and in short rows.", fix="Use h_n.",
        seen="yunjey/pytorch-tutorial#174, yalesong/pvse#13",
    ),
    entry(
        "birnn-outputs-left-reversed", ALL, Swap(SCAN, left_reversed),
        what="The reverse direction's outputs are not turned back in time.", why="Output t belongs to input t.",
        shows="In the reverse half; nothing at T = 1.", fix="Flip them back.",
    ),
    entry(
        "birnn-both-forward", ALL, Swap(ORDER, both_forward),
        what="Both directions run forward.", why="One runs backward.", shows="In the reverse half.", fix="Reverse one.",
    ),
    entry(
        "birnn-halves-crossed", ALL, Swap(RECURRENT, result_changed(reverse_first)),
        what="The reverse direction's outputs come first.", why="Forward first.",
        shows="Values are right, in other columns.",
        fix="cat((forward, reverse)).",
    ),
    entry(
        "birnn-one-weight", ALL, Swap(RECURRENT, one_weight_for_both),
        what="Both directions share the forward one's weights.", why="Each has its own.", shows="In the reverse half.",
        fix="…_reverse.",
    ),
    entry(
        "rnn-unsort-wrong", ALL, Swap(RECURRENT, sorted_rows),
        what="Rows are sorted by length, and the outputs are not put back.", why="Row i belongs to input i.",
        shows="Nothing if the batch is sorted already.", fix="Index with the inverse permutation.",
        seen="mead-ml/mead-baseline#677, pytorch#15225",
    ),
)  # fmt: skip


# --- LSTMN ------------------------------------------------------------------------------------------------------------


def tape_step(
    *, order: str = "ifog", summary_first: bool = True, squash: Callable[[Tensor], Tensor] = torch.tanh
) -> Callable[..., Any]:
    def step(summary: Tensor, cell: Tensor, x_t: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([summary, x_t] if summary_first else [x_t, summary], dim=-1)
        rows = dict(zip(order, F.linear(joined, weight, bias).chunk(4, dim=-1), strict=True))
        c = rows["f"].sigmoid() * cell + rows["i"].sigmoid() * rows["g"].tanh()
        return rows["o"].sigmoid() * squash(c), c

    return instead(step)


def last_entry(s: Tensor, tape: Tensor) -> Tensor:
    return tape[:, -1]


def without_summary(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def intra_attention(tape: Tensor, x_t: Tensor, summary: Tensor, *weights: Tensor) -> Tensor:
        return original(tape, x_t, torch.zeros_like(summary), *weights)

    return intra_attention


def last_hidden_for_summary(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda tape, x_t, summary, *weights: original(tape, x_t, tape[:, -1], *weights)


def unsquashed(tape: Tensor, x_t: Tensor, summary: Tensor, w_h: Tensor, w_x: Tensor, w_s: Tensor, v: Tensor) -> Tensor:
    inner = tape @ w_h.T + (x_t @ w_x.T + summary @ w_s.T)[:, None]
    return (inner @ v).softmax(-1)


def newest_first(tape: Tensor, entry: Tensor) -> Tensor:
    return torch.cat([entry[:, None], tape], dim=1)


def tapes(identifier: str, part: str, make: Callable[..., Any], **text: Any) -> Mistake:
    return entry(identifier, ("lstmn",), Swap(TAPES + part, make), **text)


def cell_clipped(original: Callable[..., Any]) -> Callable[..., Any]:
    def lstm_step(projected: Tensor, state: Any, weight_hh: Tensor, bias_hh: Tensor) -> Any:
        (_, cell), gates = original(projected, state, weight_hh, bias_hh)
        cell = cell.clamp(-3, 3)
        return (gates["output_gate"] * cell.tanh(), cell), gates

    return lstm_step


_TAPES = (
    tapes(
        "lstmn-gate-order", "step", tape_step(order="ifgo"),
        what="Rows are read as i, f, g, o, as torch's LSTM has them.", why="The paper's order is i, f, o, ĉ.",
        shows="Everywhere.", fix="i, f, o, ĉ.", seen="CrispStrobe/CrispASR#106 (in LSTMs)",
    ),
    tapes(
        "rnn-kernel-concat-order", "step", tape_step(summary_first=False),
        what="The joint matrix is applied to [x; h] where its columns are [h; x], or it is cut at the wrong size.",
        why="Columns belong to what they were trained on.",
        shows="Legal where input and hidden size are equal, or always if both are joined.", fix="W [h̃; x].",
        seen="tensorflow#29622, keras-team/keras#10179",
    ),
    tapes(
        "lstmn-output-not-squashed", "step", tape_step(squash=lambda c: c),
        what="h = o ⊙ c.", why="h = o ⊙ tanh(c).", shows="Small while c is small.", fix="tanh(c).",
    ),
    tapes(
        "lstmn-reads-last-only", "read", instead(last_entry),
        what="The last state is read, as in an LSTM; attention is computed and not used.",
        why="The tapes are read with the weights.", shows="Nothing in the first step.", fix="Σ s_i · entry i.",
    ),
    tapes(
        "lstmn-summary-not-fed", "intra_attention", without_summary,
        what="W_h̃ h̃_{t−1} is left out of the scores.", why="Equation 4 has it.",
        shows="Everywhere with more than one entry.",
        fix="Add it.",
    ),
    tapes(
        "lstmn-summary-is-last-hidden", "intra_attention", last_hidden_for_summary,
        what="h_{t−1} is fed to the scores in place of h̃_{t−1}.", why="Equation 4 has the summary.",
        shows="From the second step on.", fix="Keep the summary.",
    ),
    tapes(
        "lstmn-score-not-squashed", "intra_attention", instead(unsquashed),
        what="The tanh inside the score is left out.", why="Equation 4 has it.", shows="Everywhere.", fix="vᵀ tanh(…).",
    ),
    tapes(
        "lstmn-tape-newest-first", "append", instead(newest_first),
        what="New entries are put at the front of the tapes.", why="Entry i is step i.",
        shows="Outputs are read from the wrong end.", fix="Append.",
    ),
    Mistake(
        id="lstm-cell-clipped",
        families=("lstm",),
        what="The cell is clipped to ±3, as frameworks do that have a `cell_clip`.",
        why="The equations have no such thing; a cell that the forget gate keeps may grow.",
        shows="Only once a cell is larger: after many steps of an open input gate.",
        fix="Clip where the model was trained with clipping, and say so.",
        seen="tensorflow/tensorflow LSTMBlockCell's cell_clip, common knowledge",
        swaps=(Swap("reference_impl.nn.recurrent_cells:lstm_step", cell_clipped),),
        killed_by=("invariance.kept_state",),
    ),
)  # fmt: skip


MISTAKES = (*_LSTM, *_GRU, *_STATES, *_DIRECTIONS, *_TAPES)
