"""The long short-term memory-network of Cheng et al. 2016: an LSTM that reads its state from tapes by attention."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class LSTMN(NamedTuple):
    """output h_1 … h_T, cells c_1 … c_T, summaries h̃_1 … h̃_T, attention_weights over the tape's entries 0 … T-1."""

    output: Float[Tensor, "batch seq hidden"]
    cells: Float[Tensor, "batch seq hidden"]
    summaries: Float[Tensor, "batch seq hidden"]
    attention_weights: Float[Tensor, "batch seq slots"]


def lstmn(
    x: Float[Tensor, "batch seq input"],
    h0: Float[Tensor, "batch hidden"],
    c0: Float[Tensor, "batch hidden"],
    summary0: Float[Tensor, "batch hidden"],
    attention_hidden_weight: Float[Tensor, "attention hidden"],
    attention_input_weight: Float[Tensor, "attention input"],
    attention_summary_weight: Float[Tensor, "attention hidden"],
    score_vector: Float[Tensor, "attention"],
    gate_weight: Float[Tensor, "4*hidden hidden+input"],
    gate_bias: Float[Tensor, "4*hidden"],
) -> LSTMN:
    """Reads a sequence from left to right, attending at every step to all earlier hidden states.

        a_i     = vᵀ tanh(W_h h_i + W_x x_t + W_h̃ h̃_{t-1})          i = 0 … t-1
        s       = softmax(a)
        h̃_t     = Σ_i s_i h_i,   c̃_t = Σ_i s_i c_i
        i, f, o = σ(W [h̃_t, x_t] + b),   ĉ = tanh(W [h̃_t, x_t] + b)
        c_t     = f ⊙ c̃_t + i ⊙ ĉ
        h_t     = o ⊙ tanh(c_t)

    Cheng et al. 2016 (arXiv:1601.06733), section 3.2, equations 4 to 9: W_h → `attention_hidden_weight`, W_x →
    `attention_input_weight`, W_h̃ → `attention_summary_weight`, v → `score_vector`, W → `gate_weight`, whose rows lie in
    the order i, f, o, ĉ. b → `gate_bias` is not in the paper. Nor does it say what there is before the first step: the
    tapes begin with `h0` and `c0`, h̃_0 is `summary0`; zeros are usual.

    Arithmetic is in float32, or float64 for float64 input; results have the dtype of `x`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weights = [
        w.to(dtype) for w in (attention_hidden_weight, attention_input_weight, attention_summary_weight, score_vector)
    ]
    gate_weight, gate_bias, summary = gate_weight.to(dtype), gate_bias.to(dtype), summary0.to(dtype)
    hidden_tape, memory_tape = h0.to(dtype)[:, None], c0.to(dtype)[:, None]  # (B, entries, hidden)
    summaries, attended = [], []
    for x_t in x.to(dtype).unbind(dim=1):
        s = intra_attention(hidden_tape, x_t, summary, *weights)  # (B, entries)
        summary, cell = read(s, hidden_tape), read(s, memory_tape)
        h, c = step(summary, cell, x_t, gate_weight, gate_bias)
        hidden_tape, memory_tape = append(hidden_tape, h), append(memory_tape, c)
        summaries.append(summary)
        attended.append(F.pad(s, (0, x.shape[1] - s.shape[1])))
    found = (hidden_tape[:, 1:], memory_tape[:, 1:], torch.stack(summaries, dim=1), torch.stack(attended, dim=1))
    return LSTMN(*(tensor.to(x.dtype) for tensor in found))


def intra_attention(
    hidden_tape: Tensor, x_t: Tensor, summary: Tensor, W_h: Tensor, W_x: Tensor, W_s: Tensor, v: Tensor
) -> Tensor:
    """s, the weights of the tape's entries at one step; `summary` is the previous step's."""
    inner = hidden_tape @ W_h.T + (x_t @ W_x.T + summary @ W_s.T)[:, None]  # (B, entries, attention)
    return (inner.tanh() @ v).softmax(-1)


def read(s: Tensor, tape: Tensor) -> Tensor:
    """Σ_i s_i · entry i."""
    return (s[:, None] @ tape)[:, 0]


def step(summary: Tensor, cell: Tensor, x_t: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """h_t and c_t: an LSTM's step from what was read instead of the last state. Rows in the order i, f, o, ĉ."""
    i, f, o, candidate = F.linear(torch.cat([summary, x_t], dim=-1), weight, bias).chunk(4, dim=-1)
    c = f.sigmoid() * cell + i.sigmoid() * candidate.tanh()
    return o.sigmoid() * c.tanh(), c


def append(tape: Tensor, entry: Tensor) -> Tensor:
    return torch.cat([tape, entry[:, None]], dim=1)
