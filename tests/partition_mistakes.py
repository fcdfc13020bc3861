"""Mistakes that people make when they partition a model, as loaders of one rank's part (`OverRanks`).

Tensor parallel by hand (`ByHand`, `TableByHand`) is right unless it is told to make a mistake.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from conformance.implementations.partition import (
    PipelineRank,
    TensorParallelRank,
    load_pipeline_stage,
    load_tensor_parallel_rank,
)
from conformance.mistakes.partition import Total
from reference_impl.nn.norm import RMSNorm
from reference_impl.partition import pipeline, tensor_parallel
from reference_impl.partition.tensor_parallel import Layout

# --- tensor parallel


def total(x: Tensor) -> Tensor:
    return Total.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class ByHand(nn.Module):
    """A row-parallel projection without DTensor's arithmetic: partial sums, one all-reduce, then the bias."""

    def __init__(self, of: nn.Module, mistake: str):
        super().__init__()
        self.weight, self.bias, self.mistake = of.weight, of.bias, mistake

    def forward(self, x: Any) -> Tensor:
        x = x.to_local() if hasattr(x, "to_local") else x
        weight, bias = self.weight.to_local(), self.bias.to_local()
        partial = F.linear(x, weight)
        match self.mistake:
            case "tp-row-bias-per-rank":
                return total(partial + bias)
            case "tp-row-bias-gradient":
                return total(partial + bias / dist.get_world_size())
            case "tp-double-all-reduce":
                return total(total(partial)) + bias
            case "tp-missing-all-reduce":
                return partial + bias
        return total(partial) + bias


class TableByHand(nn.Module):
    """An embedding table cut by token ids: own rows, zeros for the ids of others, one all-reduce."""

    def __init__(self, of: nn.Module, mistake: str):
        super().__init__()
        self.weight, self.mistake = of.weight, mistake

    def forward(self, ids: Tensor) -> Tensor:
        own = self.weight.to_local()
        rows = -(-self.weight.shape[0] // dist.get_world_size())  # DTensor's cut: all but the last are of this size
        place = ids - rows * dist.get_rank() - int(self.mistake == "tp-vocab-embedding, offset off by one")
        elsewhere = (place < 0) | (place >= len(own))
        found = F.embedding(place.clamp(0, len(own) - 1), own)
        return total(found if self.mistake == "tp-vocab-embedding" else found.masked_fill(elsewhere[..., None], 0.0))


ROWS = ("self_attn.dense", "mlp.fc2")


def load_by_hand(checkpoint: Any, mistake: str) -> TensorParallelRank:
    """A Phi whose row-parallel projections and table are `ByHand`."""
    rank = load_tensor_parallel_rank(checkpoint)
    for layer in rank.model.model.layers:
        for path in ROWS:
            layer.set_submodule(path, ByHand(layer.get_submodule(path), mistake))
    rank.model.model.embed_tokens = TableByHand(rank.model.model.embed_tokens, mistake)
    return rank


def load_with_layouts(checkpoint: Any, mistake: str) -> TensorParallelRank:
    """Tensors laid out as the mistake has it when they are loaded."""
    right = tensor_parallel.layouts

    def wrong(model: nn.Module, ranks: int) -> dict[str, Layout]:
        same = Layout(lambda x: x, lambda x: x)
        match mistake:
            case "tp-fused-shard-layout":
                return {}
            case "tp-fused-shard-layout, gathered":
                return {name: Layout(layout.there, same.back) for name, layout in right(model, ranks).items()}
            case "tp-kv-heads-fewer-than-ranks, cut":
                return {}
            case "tp-kv-heads-fewer-than-ranks, tiled":  # 0 1 0 1 0 1 for 0 0 0 1 1 1
                copies = ranks
                return {name: Layout(lambda x: x.repeat(copies, 1), same.back) for name in right(model, ranks)}
        return right(model, ranks)

    with mock.patch.object(tensor_parallel, "layouts", wrong):
        return load_tensor_parallel_rank(checkpoint)


def load_norm_on_shard(checkpoint: Any) -> TensorParallelRank:
    """tp-norm-on-shard: every rank's slice of the hidden states is normalised by its own statistics."""
    rank = load_tensor_parallel_rank(checkpoint)

    class OnShards(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            slices = x.chunk(dist.get_world_size(), dim=-1)
            scaled = [s * torch.rsqrt(s.square().mean(dim=-1, keepdim=True) + self.eps) for s in slices]
            return self.weight * torch.cat(scaled, dim=-1)

    for layer in rank.model.model.layers:
        layer.input_layernorm.__class__ = OnShards
    return rank


# --- pipeline


def load_split(checkpoint: Any, splits: list[list[int]]) -> PipelineRank:
    """Each stage goes by a split of its own; a right pipeline's are all the same."""
    number = dist.get_rank()
    return PipelineRank(
        pipeline.load_stage(checkpoint.path, split=splits[number], stage=number, dtype=checkpoint.dtype)
    )


def load_boundary_norm(checkpoint: Any) -> PipelineRank:
    """pp-boundary-norm: the final norm of every stage, not of the last alone."""
    return _before_sending(checkpoint, lambda x: x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True)))


def load_boundary_dtype(checkpoint: Any) -> PipelineRank:
    """Hidden states are sent in bfloat16."""
    return _before_sending(checkpoint, lambda x: x.to(torch.bfloat16).to(x.dtype))


def _before_sending(checkpoint: Any, change: Callable[[Tensor], Tensor]) -> PipelineRank:
    rank = load_pipeline_stage(checkpoint, "eager")
    for module in rank.model.modules():
        if isinstance(module, pipeline.Send):
            module.register_forward_pre_hook(lambda module, inputs: (change(inputs[0]), *inputs[1:]))
    return rank


def load_tied(checkpoint: Any, times: int) -> PipelineRank:
    """pp-tied-embedding: the gradients of the tied table are summed so many times; once is right."""
    rank = load_pipeline_stage(checkpoint, "eager")

    def gradients(upstream: Tensor) -> dict[str, Tensor]:
        rank.backward(upstream)
        for _ in range(times):
            pipeline.sum_tied_gradients(rank.model)
        return {name: p.grad for name, p in rank.model.named_parameters() if p.grad is not None}

    rank.gradients = gradients  # type: ignore[method-assign]
    return rank


# --- ranks that misbehave


def load_dying(checkpoint: Any, how: str) -> Any:
    """A model of which rank 1 fails when it is called."""
    import os
    import time

    def model(input_ids: Tensor) -> Tensor | None:
        if dist.get_rank() == 1:
            match how:
                case "kill":
                    os.kill(os.getpid(), 9)
                case "hang":
                    time.sleep(600)
                case "raise":
                    raise ArithmeticError("rank 1 cannot count")
        if how == "differ":
            return torch.full((*input_ids.shape, checkpoint.config["vocab_size"]), float(dist.get_rank()))
        if how == "silent":
            return None
        x = torch.zeros(1)
        dist.recv(x, src=1)  # what will never come
        return x

    return model
