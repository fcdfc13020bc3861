"""RNNsearch and GNMT as one writes them with torch: batches, torch.nn's recurrent layers where it has them.

They tell how far a plain implementation strays in a working dtype: everything, states and softmax included, is in the
dtype of the weights.  No padding.  The equations decide what is right, and tests prove that these agree with them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Config = dict[str, Any]
Weights = dict[str, Tensor]

KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def rnn_search(config: Config, w: Weights, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
    """Logits (batch, target, vocab): torch.nn.GRU and GRUCell where the reset gate is theirs, else the same by hand."""
    after = config.get("reset_after", False)
    h, s = _gru_both_ways(w, F.embedding(input_ids, w["encoder.embedding.weight"]), after)
    s = F.linear(s, w["decoder.initial.weight"], w["decoder.initial.bias"]).tanh()
    keys = F.linear(h, w["decoder.attention.memory_weight"], w["decoder.attention.bias"])
    words = F.embedding(decoder_input_ids, w["decoder.embedding.weight"])
    read = []
    for word in words.unbind(1):
        context = _attend(w, s, h, keys)
        read.append(torch.cat([s, word, context], dim=-1))
        s = _gru_step(w, "decoder.rnn", "", torch.cat([word, context], dim=-1), s, after)
    readout = torch.cat([w[f"decoder.readout.{part}_weight"] for part in ("state", "word", "context")], dim=1)
    pieces = F.linear(torch.stack(read, dim=1), readout, w["decoder.readout.bias"])
    units = torch.maximum(pieces[..., ::2], pieces[..., 1::2])
    return F.linear(units, w["decoder.output.weight"], w["decoder.output.bias"])


def gnmt(config: Config, w: Weights, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
    """Logits (batch, target, vocab): torch.nn.LSTM for whole sequences, LSTMCell where attention comes in between."""
    x = F.embedding(input_ids, w["encoder.embedding.weight"])
    for layer in range(config["encoder_layers"]):
        x = _handed_on(layer, x, _lstm(w, f"encoder.layers.{layer}", x, both_ways=layer == 0))
    keys = F.linear(x, w["decoder.attention.memory_weight"], w["decoder.attention.bias"])
    tokens = F.embedding(decoder_input_ids, w["decoder.embedding.weight"])
    own = {kind: w[f"decoder.layers.0.{kind}_l0"] for kind in KINDS}
    cell = nn.LSTMCell(own["weight_ih"].shape[1], own["weight_hh"].shape[1], device="meta")
    m = c = x.new_zeros(len(x), cell.hidden_size)
    outputs, contexts = [], []
    for token in tokens.unbind(1):
        contexts.append(_attend(w, m, x, keys))
        m, c = torch.func.functional_call(cell, own, (torch.cat([token, contexts[-1]], dim=-1), (m, c)))
        outputs.append(m)
    out, context = torch.stack(outputs, dim=1), torch.stack(contexts, dim=1)
    for layer in range(1, config["decoder_layers"]):
        out = _handed_on(layer, out, _lstm(w, f"decoder.layers.{layer}", torch.cat([out, context], dim=-1)))
    return F.linear(out, w["decoder.output.weight"], w["decoder.output.bias"])


def _attend(w: Weights, query: Tensor, memory: Tensor, keys: Tensor) -> Tensor:
    inner = keys + F.linear(query, w["decoder.attention.query_weight"])[:, None]
    weights = (inner.tanh() @ w["decoder.attention.score_vector"]).softmax(dim=-1)
    return torch.bmm(weights[:, None], memory)[:, 0]


def _handed_on(layer: int, below: Tensor, m: Tensor) -> Tensor:
    """With the residual connection of the third layer and those above it; layers are numbered from 0."""
    return below + m if layer > 1 else m


def _lstm(w: Weights, name: str, x: Tensor, both_ways: bool = False) -> Tensor:
    own = {n.removeprefix(f"{name}."): tensor for n, tensor in w.items() if n.startswith(f"{name}.")}
    hidden = own["weight_hh_l0"].shape[1]
    module = nn.LSTM(x.shape[-1], hidden, batch_first=True, bidirectional=both_ways, device="meta")
    output, _ = torch.func.functional_call(module, own, (x,), strict=True)
    return output  # type: ignore[no-any-return]


def _gru_both_ways(w: Weights, x: Tensor, reset_after: bool) -> tuple[Tensor, Tensor]:
    """[→h; ←h] at every position, and ←h at the first."""
    hidden = w["encoder.rnn.weight_hh_l0"].shape[1]
    if reset_after:
        own = {n.removeprefix("encoder.rnn."): tensor for n, tensor in w.items() if n.startswith("encoder.rnn.")}
        module = nn.GRU(x.shape[-1], hidden, batch_first=True, bidirectional=True, device="meta")
        output, final = torch.func.functional_call(module, own, (x,), strict=True)
        return output, final[1]
    directions = []
    for suffix, inputs in (("", x), ("_reverse", x.flip(1))):
        h, states = x.new_zeros(len(x), hidden), []
        for x_t in inputs.unbind(1):
            h = _gru_step(w, "encoder.rnn", suffix, x_t, h, reset_after)
            states.append(h)
        directions.append(torch.stack(states, dim=1))
    output = torch.cat([directions[0], directions[1].flip(1)], dim=-1)
    return output, output[:, 0, hidden:]


def _gru_step(w: Weights, name: str, suffix: str, x: Tensor, h: Tensor, reset_after: bool) -> Tensor:
    own = {kind: w[f"{name}.{kind}_l0{suffix}"] for kind in KINDS}
    n = h.shape[1]
    if reset_after:
        cell = nn.GRUCell(x.shape[1], n, device="meta")
        return torch.func.functional_call(cell, own, (x, h), strict=True)  # type: ignore[no-any-return]
    gates = F.linear(x, own["weight_ih"], own["bias_ih"])
    both = (gates[:, : 2 * n] + F.linear(h, own["weight_hh"][: 2 * n], own["bias_hh"][: 2 * n])).sigmoid()
    r, z = both.chunk(2, dim=-1)
    new = (gates[:, 2 * n :] + F.linear(r * h, own["weight_hh"][2 * n :], own["bias_hh"][2 * n :])).tanh()
    return new + z * (h - new)
