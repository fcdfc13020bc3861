"""RNN, LSTM and GRU as modules with torch.nn's parameter names, over the functions of `recurrent`.

A state_dict of torch.nn's module of the same sizes (batch_first, with biases, no projection) loads as it is.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reference_impl.nn import recurrent
from reference_impl.nn.recurrent import Recurrent


class RecurrentModule(nn.Module):
    """The parameters of `num_layers` layers in one or two directions; `gates` blocks of hidden_size rows each."""

    def __init__(self, *, input_size: int, hidden_size: int, num_layers: int, bidirectional: bool, gates: int) -> None:
        super().__init__()
        self.hidden_size, self.num_layers, self.bidirectional = hidden_size, num_layers, bidirectional
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


class RNN(RecurrentModule):
    """`recurrent.rnn` with its weights."""

    def __init__(
        self, *, input_size: int, hidden_size: int, num_layers: int, bidirectional: bool, nonlinearity: str
    ) -> None:
        super().__init__(
            input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, bidirectional=bidirectional, gates=1
        )
        self.nonlinearity = nonlinearity

    def forward(
        self, x: Float[Tensor, "batch seq input"], h0: Tensor | None = None, lengths: Int[Tensor, "batch"] | None = None
    ) -> Recurrent:
        return recurrent.rnn(
            x, self.initial(x) if h0 is None else h0, dict(self.named_parameters()), num_layers=self.num_layers,
            bidirectional=self.bidirectional, nonlinearity=self.nonlinearity, lengths=lengths,
        )  # fmt: skip


class LSTM(RecurrentModule):
    """`recurrent.lstm` with its weights; `state` is (h0, c0)."""

    def __init__(self, *, input_size: int, hidden_size: int, num_layers: int, bidirectional: bool) -> None:
        super().__init__(
            input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, bidirectional=bidirectional, gates=4
        )

    def forward(
        self,
        x: Float[Tensor, "batch seq input"],
        state: tuple[Tensor, Tensor] | None = None,
        lengths: Int[Tensor, "batch"] | None = None,
    ) -> Recurrent:
        h0, c0 = state or (self.initial(x), self.initial(x))
        return recurrent.lstm(
            x, h0, c0, dict(self.named_parameters()), num_layers=self.num_layers,
            bidirectional=self.bidirectional, lengths=lengths,
        )  # fmt: skip


class GRU(RecurrentModule):
    """`recurrent.gru` with its weights."""

    def __init__(
        self, *, input_size: int, hidden_size: int, num_layers: int, bidirectional: bool, reset_after: bool
    ) -> None:
        super().__init__(
            input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, bidirectional=bidirectional, gates=3
        )
        self.reset_after = reset_after

    def forward(
        self, x: Float[Tensor, "batch seq input"], h0: Tensor | None = None, lengths: Int[Tensor, "batch"] | None = None
    ) -> Recurrent:
        return recurrent.gru(
            x, self.initial(x) if h0 is None else h0, dict(self.named_parameters()), num_layers=self.num_layers,
            bidirectional=self.bidirectional, reset_after=self.reset_after, lengths=lengths,
        )  # fmt: skip
