"""What stands in a pipeline stage for the modules of other stages: it receives, sends, or lets through.

Hidden states go forward by `send` and `recv`, and so do their gradients, backward.

Shapes: B batch, T tokens of this call.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn


class Elsewhere(nn.Module):
    """What another stage computes; here its input goes through."""

    def forward(self, x: Float[Tensor, "batch seq hidden"], *unused: object) -> Float[Tensor, "batch seq hidden"]:
        return x


class EmbeddingElsewhere(nn.Module):
    """Zeros in the place of embeddings: what says their shape and dtype to `Receive`.

    It refuses the ids that a table of the first stage refuses, so that no stage waits for one that has given up.
    """

    def __init__(self, num_embeddings: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.hidden_size, self.dtype = num_embeddings, hidden_size, dtype

    def forward(self, ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq hidden"]:
        """Raises ValueError if an id is not in the table."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_embeddings:
            raise ValueError(f"ids from {int(ids.min())} to {int(ids.max())} are not in 0 … {self.num_embeddings - 1}")
        shape = (*ids.shape, self.hidden_size)
        return torch.zeros(shape, dtype=self.dtype, device=ids.device, requires_grad=torch.is_grad_enabled())


class Receive(nn.Module):
    """All that earlier stages compute: the hidden states that the one before this one sends."""

    def __init__(self, source: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.source, self.group = source, group

    def forward(self, x: Float[Tensor, "batch seq hidden"], *unused: object) -> Float[Tensor, "batch seq hidden"]:
        """`x` lends its shape and dtype."""
        received: Tensor = _Received.apply(x, self.source, self.group)  # type: ignore[no-untyped-call]
        return received


class Send(nn.Module):
    """All that later stages compute: hands them the hidden states."""

    def __init__(self, target: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.target, self.group = target, group

    def forward(self, x: Float[Tensor, "batch seq hidden"], *unused: object) -> Float[Tensor, "batch seq hidden"]:
        sent: Tensor = _Sent.apply(x, self.target, self.group)  # type: ignore[no-untyped-call]
        return sent


class NoLogits(nn.Module):
    """The output projection of a stage that has none: onto a vocabulary of no tokens."""

    def forward(self, x: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq nothing"]:
        return x[..., :0]


class _Received(torch.autograd.Function):
    """Hidden states come in; on the way back their gradient goes out."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, source: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.source, ctx.group = source, group
        received = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(received, group=group, group_src=source)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        dist.send(gradients[0].contiguous(), group=ctx.group, group_dst=ctx.source)
        return None, None, None


class _Sent(torch.autograd.Function):
    """Hidden states go out; on the way back their gradient comes in. What is handed on here counts for nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.target, ctx.group = target, group
        dist.send(x.contiguous(), group=group, group_dst=target)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = torch.empty_like(gradients[0], memory_format=torch.contiguous_format)
        dist.recv(gradient, group=ctx.group, group_src=ctx.target)
        return gradient, None, None
