"""Learned absolute positions: one row of a table for each place in the context."""

from jaxtyping import Float, Int
from torch import Tensor, nn


class LearnedPositions(nn.Embedding):
    """The vector of each position, looked up in a table of `num_positions` rows.

    Gehring et al. 2017 (arXiv:1705.03122), section 3.1; W_p in Radford et al. 2018 (GPT), equation 2. There is no row
    for a position beyond the table: the context has an end, which nothing can be extrapolated past.
    """

    def __init__(self, *, num_positions: int, hidden_size: int) -> None:
        super().__init__(num_positions, hidden_size)

    def forward(self, position_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq hidden"]:
        """Raises ValueError if a position is not in the table; on an accelerator the lookup itself would not say."""
        require_in_table(position_ids, self.num_embeddings)
        return super().forward(position_ids)


def require_in_table(position_ids: Int[Tensor, "batch seq"], num_positions: int) -> None:
    """Raises ValueError, with both numbers, unless all positions are in 0 … num_positions − 1."""
    if position_ids.numel() == 0:
        return
    lowest, highest = (int(position) for position in position_ids.aminmax())
    if lowest < 0:
        raise ValueError(f"position {lowest} is negative; positions count from 0")
    if highest >= num_positions:
        raise ValueError(
            f"position {highest} needs a table of {highest + 1} positions, n_positions={num_positions}: "
            f"feed at most {num_positions} tokens a row, cached ones included"
        )
