"""torch.nn.RNN, LSTM and GRU as oracles, with packed sequences where a case has lengths.

The library does not return its gates: those of a single layer in one direction are computed from its own states, which
are its output.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

Tensors = dict[str, Tensor]


def rnn(tensors: Tensors, settings: dict[str, Any]) -> Tensors:
    """output, h_n."""
    return _run(nn.RNN, ("h",), tensors, settings, nonlinearity=settings["nonlinearity"])


def lstm(tensors: Tensors, settings: dict[str, Any]) -> Tensors:
    """output, h_n, c_n; of a single layer in one direction the four gates as well."""
    found = _run(nn.LSTM, ("h", "c"), tensors, settings)
    if len(found["h_n"]) > 1:
        return found
    i, f, g, o = (_from_input(tensors) + _from_state(tensors, found["output"])).chunk(4, dim=-1)
    gates = {"input_gate": i.sigmoid(), "forget_gate": f.sigmoid(), "cell_gate": g.tanh(), "output_gate": o.sigmoid()}
    return found | {name: gate * _real(tensors) for name, gate in gates.items()}


def gru(tensors: Tensors, settings: dict[str, Any]) -> Tensors:
    """output, h_n; of a single layer in one direction the three gates as well."""
    found = _run(nn.GRU, ("h",), tensors, settings)
    if len(found["h_n"]) > 1:
        return found
    r, z, n = _from_input(tensors).chunk(3, dim=-1)
    state_r, state_z, state_n = _from_state(tensors, found["output"]).chunk(3, dim=-1)
    reset = (r + state_r).sigmoid()
    gates = {"reset_gate": reset, "update_gate": (z + state_z).sigmoid(), "new_gate": (n + reset * state_n).tanh()}
    return found | {name: gate * _real(tensors) for name, gate in gates.items()}


def _run(kind: Any, states: tuple[str, ...], tensors: Tensors, settings: dict[str, Any], **more: Any) -> Tensors:
    x, lengths = tensors["x"], tensors.get("lengths")
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith(("weight_", "bias_"))}
    layers, both = settings["num_layers"], settings["bidirectional"]
    module = kind(
        x.shape[-1], tensors["h0"].shape[-1], layers, batch_first=True, bidirectional=both, device="meta", **more
    )
    given: Tensor | PackedSequence = x
    if lengths is not None:
        given = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    initial = tuple(tensors[f"{state}0"] for state in states)
    state = initial if len(states) > 1 else initial[0]
    with without_onednn():
        output, final = torch.func.functional_call(module, weights, (given, state), strict=True)
    if lengths is not None:
        output, _ = pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])
    final = final if len(states) > 1 else (final,)
    return {"output": output, **{f"{state}_n": value for state, value in zip(states, final, strict=True)}}


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """Torch's own kernels: oneDNN's round differently from machine to machine, and less than most implementations."""
    backend: Any = torch.backends.mkldnn  # its context manager warns of TF32 where there is none
    before, backend.enabled = backend.enabled, False
    try:
        yield
    finally:
        backend.enabled = before


def _from_input(tensors: Tensors) -> Tensor:
    """W_ih x_t + b_ih."""
    return F.linear(tensors["x"], tensors["weight_ih_l0"], tensors["bias_ih_l0"])


def _from_state(tensors: Tensors, after: Tensor) -> Tensor:
    """W_hh h_{t-1} + b_hh; `after` is h_1 … h_T."""
    before = torch.cat([tensors["h0"][0][:, None], after[:, :-1]], dim=1)
    return F.linear(before, tensors["weight_hh_l0"], tensors["bias_hh_l0"])


def _real(tensors: Tensors) -> Tensor:
    """(batch, seq, 1): 1 at real positions, 0 at pads."""
    x = tensors["x"]
    if "lengths" not in tensors:
        return torch.ones_like(x[..., :1])
    return (torch.arange(x.shape[1]) < tensors["lengths"][:, None])[..., None].to(x.dtype)
