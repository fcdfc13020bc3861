"""RNN, LSTM and GRU as modules with torch.nn's parameter names, over `recurrent`.

A state_dict of torch.nn's module of the same sizes (batch_first, with biases, no projection) loads as it is. `real` is
true where a position is no padding (B, T); None: everywhere.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reference_impl.nn import recurrent
from reference_impl.nn import recurrent_cells as cells
from reference_impl.nn.recurrent import Recurrent
from reference_impl.nn.recurrent_cells import State, Step


class RecurrentModule(nn.Module):
    """The parameters of `num_layers` layers in one or two directions; `gates` blocks of hidden_size rows each."""

    def __init__(
        self, *, input_size: int, hidden_size: int, num_layers: int, bidirectional: bool, gates: int, cell: Step
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_layers, self.bidirectional = hidden_size, num_layers, bidirectional
        self.cell = cell
        suffixes = ["", "_reverse"] if bidirectional else [""]
        for layer in range(num_layers):
            below = input_size if layer == 0 else len(suffixes) * hidden_size
            for suffix in suffixes:
                rows = gates * hidden_size
                shapes = ((rows, below), (rows, hidden_size), (rows,), (rows,))
                for kind, shape in zip(recurrent.KINDS, shapes, strict=True):
                    self.register_parameter(f"{kind}_l{layer}{suffix}", nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform between ±1/√hidden_size, as in torch.nn."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(self.hidden_size), 1 / math.sqrt(self.hidden_size))

    def initial(self, x: Tensor) -> Float[Tensor, "states batch hidden"]:
        """The state of zeros that stands for one that is not given."""
        return x.new_zeros(self.num_layers * (1 + self.bidirectional), len(x), self.hidden_size)

    def run(self, x: Tensor, initial: State, real: Tensor | None) -> Recurrent:
        """All layers over a whole sequence."""
        weights = dict(self.named_parameters())
        return recurrent.recurrent(self.cell, x, initial, weights, self.num_layers, self.bidirectional, real)

    def step(self, x: Float[Tensor, "batch input"], state: State) -> State:
        """The state, each part (B, H), after one more input, for a module of one layer in one direction.

        Arithmetic and the new state are in float32, or float64 for float64 parameters.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight_ih, weight_hh, bias_ih, bias_hh = (getattr(self, f"{kind}_l0").to(dtype) for kind in recurrent.KINDS)
        projected = F.linear(x.to(dtype), weight_ih, bias_ih)
        new, _ = self.cell(projected, tuple(part.to(dtype) for part in state), weight_hh, bias_hh)
        return new


class RNN(RecurrentModule):
    """`recurrent.rnn` with its weights."""

    def __init__(
        self, *, input_size: int, hidden_size: int, num_layers: int, bidirectional: bool, nonlinearity: str
    ) -> None:
        super().__init__(
            input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, bidirectional=bidirectional,
            gates=1, cell=cells.rnn_step(nonlinearity),
        )  # fmt: skip

    def forward(
        self,
        x: Float[Tensor, "batch seq input"],
        h0: Tensor | None = None,
        real: Bool[Tensor, "batch seq"] | None = None,
    ) -> Recurrent:
        return self.run(x, (self.initial(x) if h0 is None else h0,), real)


class LSTM(RecurrentModule):
    """`recurrent.lstm` with its weights; `state` is (h0, c0)."""

    def __init__(self, *, input_size: int, hidden_size: int, num_layers: int, bidirectional: bool) -> None:
        super().__init__(
            input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, bidirectional=bidirectional,
            gates=4, cell=cells.lstm_step,
        )  # fmt: skip

    def forward(
        self,
        x: Float[Tensor, "batch seq input"],
        state: tuple[Tensor, Tensor] | None = None,
        real: Bool[Tensor, "batch seq"] | None = None,
    ) -> Recurrent:
        return self.run(x, state or (self.initial(x), self.initial(x)), real)


class GRU(RecurrentModule):
    """`recurrent.gru` with its weights."""

    def __init__(
        self, *, input_size: int, hidden_size: int, num_layers: int, bidirectional: bool, reset_after: bool
    ) -> None:
        super().__init__(
            input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, bidirectional=bidirectional,
            gates=3, cell=cells.gru_step if reset_after else cells.gru_step_reset_before,
        )  # fmt: skip

    def forward(
        self,
        x: Float[Tensor, "batch seq input"],
        h0: Tensor | None = None,
        real: Bool[Tensor, "batch seq"] | None = None,
    ) -> Recurrent:
        return self.run(x, (self.initial(x) if h0 is None else h0,), real)
