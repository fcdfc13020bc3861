"""`reference_impl` over several processes: pipeline stages, and tensor parallel."""

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from conformance.implementation import Unsupported
from conformance.implementations.ranks import OverRanks
from conformance.implementations.reference import Model

FAMILIES = ("gpt", "gpt2", "gpt3", "llama", "mistral", "mixtral", "phi")


class Rank(Model):
    """One rank's part of a model, behind the contract of `OverRanks`."""

    output: Tensor

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        from reference_impl.nn.loss import next_token_loss

        self.output = self.model(input_ids, attention_mask, position_ids)
        logits = with_values(self.output)
        if logits is None or labels is None:
            return logits
        return {"logits": logits, "loss": next_token_loss(logits, labels)}

    def backward(self, upstream: Tensor) -> None:
        """From the last call's output; of a stage without logits, no gradient comes from there."""
        self.model.zero_grad()
        self.output.backward(upstream if with_values(self.output) is not None else torch.zeros_like(self.output))


class RankSession:
    """A session of one rank's part."""

    def __init__(self, session: Any):
        self.session = session
        self.state_bytes = session.state_bytes

    def feed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
        return with_values(self.session.feed(input_ids, attention_mask))


def with_values(logits: Tensor) -> Tensor | None:
    """None for the logits of an empty vocabulary, which is what stages return that have no output projection."""
    return logits if logits.shape[-1] else None


class PipelineRank(Rank):
    def __init__(self, model: torch.nn.Module):
        super().__init__(model)
        self.session = lambda: RankSession(model.session())  # type: ignore[assignment, operator]

    def gradients(self, upstream: Tensor) -> dict[str, Tensor]:
        from reference_impl.partition.pipeline import sum_tied_gradients

        self.backward(upstream)
        sum_tied_gradients(self.model)
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


class TensorParallelRank(Rank):
    def gradients(self, upstream: Tensor) -> dict[str, Tensor]:
        from reference_impl.partition.tensor_parallel import full_gradients

        self.backward(upstream)
        return full_gradients(self.model)


def load_pipeline_stage(checkpoint: Any, attention: str) -> PipelineRank:
    """This rank's stage, of blocks as evenly shared out as can be."""
    import torch.distributed as dist

    from reference_impl.partition.pipeline import even_split, load_stage, number_of_blocks

    blocks, stages = number_of_blocks(checkpoint.path), dist.get_world_size()
    if blocks < stages:
        raise Unsupported(f"{blocks} blocks cannot be shared out to {stages} stages")
    stage = load_stage(
        checkpoint.path, split=even_split(blocks, stages), stage=dist.get_rank(), dtype=checkpoint.dtype,
        device=checkpoint.device, attention=attention,
    )  # fmt: skip
    return PipelineRank(stage)


def load_tensor_parallel_rank(checkpoint: Any) -> TensorParallelRank:
    """This rank's columns and rows."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from reference_impl.partition.tensor_parallel import load_tensor_parallel

    ranks = dist.get_world_size()
    heads = checkpoint.config.get("n_head") or checkpoint.config["num_attention_heads"]
    if heads % ranks:
        raise Unsupported(f"{heads} attention heads cannot be shared out to {ranks} ranks")
    mesh = init_device_mesh(checkpoint.device.type, (ranks,))
    return TensorParallelRank(load_tensor_parallel(checkpoint.path, mesh, dtype=checkpoint.dtype))


def pipeline(stages: int, attention: str = "eager") -> OverRanks:
    name = f"reference_impl, pipeline of {stages} stages"
    settings = {"attention": attention}
    return OverRanks(load_pipeline_stage, name=name, families=FAMILIES, ranks=stages, settings=settings)


def tensor_parallel(ranks: int) -> OverRanks:
    name = f"reference_impl, tensor parallel over {ranks} ranks"
    return OverRanks(load_tensor_parallel_rank, name=name, families=FAMILIES, ranks=ranks)


@cache
def simulated(kind: Literal["pipeline", "tensor parallel"], ranks: int) -> OverRanks:
    """The same with threads of this process for ranks, so that a patch of `reference_impl` reaches them."""
    from conformance.implementations.threads import Threads  # imports much of torch.distributed

    made = pipeline(ranks) if kind == "pipeline" else tensor_parallel(ranks)
    made.group = Threads(ranks)
    return made


IMPLEMENTATIONS = {
    "reference-pipeline-2": pipeline(2),
    "reference-pipeline-3": pipeline(3),
    "reference-tensor-parallel-2": tensor_parallel(2),
    "reference-tensor-parallel-3": tensor_parallel(3),
}
