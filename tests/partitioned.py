"""Processes that all tests of partitions in a worker share, and models over them, right ones and mistaken ones.

Starting a process costs seconds (torch is imported), so that there is one group of two and one of three.
"""

import atexit
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from conformance.implementations import partition
from conformance.implementations.ranks import OverRanks, Ranks
from conformance.implementations.reference import Reference


@cache
def group(count: int) -> Ranks:
    ranks = Ranks(count, "gloo")
    atexit.register(ranks.end)
    return ranks


def over(ranks: int, load_rank: Callable[..., Any], **settings: Any) -> OverRanks:
    """An implementation over the shared processes; `load_rank` is a function of a module in tests/."""
    made = OverRanks(load_rank, name="test", families=partition.FAMILIES, ranks=ranks, settings=settings)
    made.group = group(ranks)
    return made


def pipeline(stages: int) -> OverRanks:
    return over(stages, partition.load_pipeline_stage, attention="eager")


def tensor_parallel(ranks: int) -> OverRanks:
    return over(ranks, partition.load_tensor_parallel_rank)


class PartitionedReference(Reference):
    """The reference whose `partitioned` uses the shared processes, and perhaps another loader."""

    def __init__(self, load_rank: Callable[..., Any] | None = None, attention: str = "eager"):
        super().__init__("eager")
        settings = {} if load_rank else {"attention": attention}
        self.pipelines = {n: over(n, load_rank or partition.load_pipeline_stage, **settings) for n in (2, 3)}


def in_ranks(count: int, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `task(objects, *arguments)` returns in each of the shared processes."""
    ranks = group(count)
    ranks.start()
    return ranks.ask(task, *arguments)


def rank_of(objects: dict[int, Any]) -> int:
    return torch.distributed.get_rank()
