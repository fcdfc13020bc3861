"""One step of each recurrent cell: Elman's, LSTM, GRU in both of its forms.

A step takes the projected input W_ih x_t + b_ih (batch, gates·hidden), which is computed for all steps at once, the
state (h,), in an LSTM (h, c), each (batch, hidden), weight_hh (gates·hidden, hidden) and bias_hh (gates·hidden). It
gives the new state and its gates by name, each (batch, hidden). The equations are in `recurrent`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Gates = dict[str, Tensor]
State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Tensor, Tensor], tuple[State, Gates]]

# nonlinearity → φ of a simple recurrent network
NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


def rnn_step(nonlinearity: str) -> Step:
    """The step of a simple recurrent network: φ of input, state and both biases.

    Raises:
        ValueError: `nonlinearity` is not implemented.
    """
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"nonlinearity={nonlinearity!r} is not implemented; use one of {sorted(NONLINEARITIES)}")
    phi = NONLINEARITIES[nonlinearity]

    def step(projected: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor) -> tuple[State, Gates]:
        return (phi(projected + F.linear(state[0], weight_hh, bias_hh)),), {}

    return step


def lstm_step(projected: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor) -> tuple[State, Gates]:
    """Rows in the order i, f, g, o."""
    h, c = state
    i, f, g, o = (projected + F.linear(h, weight_hh, bias_hh)).chunk(4, dim=-1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return (o * c.tanh(), c), {"input_gate": i, "forget_gate": f, "cell_gate": g, "output_gate": o}


def gru_step(projected: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor) -> tuple[State, Gates]:
    """Rows in the order r, z, n; the reset gate comes after the product and scales b_hn as well."""
    (h,) = state
    x_r, x_z, x_n = projected.chunk(3, dim=-1)
    h_r, h_z, h_n = F.linear(h, weight_hh, bias_hh).chunk(3, dim=-1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return (gru_mix(z, n, h),), {"reset_gate": r, "update_gate": z, "new_gate": n}


def gru_step_reset_before(projected: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor) -> tuple[State, Gates]:
    """Rows in the order r, z, n; the reset gate comes before the product and leaves b_hn alone."""
    (h,) = state
    x_r, x_z, x_n = projected.chunk(3, dim=-1)
    (W_r, W_z, W_n), (b_r, b_z, b_n) = weight_hh.chunk(3), bias_hh.chunk(3)
    r, z = (x_r + F.linear(h, W_r, b_r)).sigmoid(), (x_z + F.linear(h, W_z, b_z)).sigmoid()
    n = (x_n + F.linear(r * h, W_n, b_n)).tanh()
    return (gru_mix(z, n, h),), {"reset_gate": r, "update_gate": z, "new_gate": n}


def gru_mix(z: Tensor, n: Tensor, h: Tensor) -> Tensor:
    """(1 - z) ⊙ n + z ⊙ h: an update gate near one keeps the old state."""
    return (1 - z) * n + z * h
