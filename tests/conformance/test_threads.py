"""Threads for ranks give what processes give, and what one of them raises is raised at once."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from conformance import check
from conformance.implementations import partition
from conformance.implementations.ranks import Ended
from conformance.implementations.threads import Threads


@pytest.fixture(scope="module")
def three() -> Any:
    threads = Threads(3)
    yield threads
    threads.end()


def rank(objects: dict[int, Any]) -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def summed(objects: dict[int, Any]) -> list[float]:
    x = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(x)
    return x.tolist()


def passed_on(objects: dict[int, Any]) -> float:
    """Rank r sends r to the next one; twice, so that messages keep their order."""
    x, number, count = torch.zeros(1), dist.get_rank(), dist.get_world_size()
    for times in (1.0, 10.0):
        dist.send(torch.tensor([times * number]), dst=(number + 1) % count)
    dist.recv(x, src=(number - 1) % count)
    first = x.item()
    dist.recv(x, src=(number - 1) % count)
    return first + x.item()


def kept(objects: dict[int, Any], number: int) -> int:
    objects[number] = dist.get_rank()
    return len(objects)


def failing(objects: dict[int, Any], who: int) -> None:
    if dist.get_rank() == who:
        raise ArithmeticError(f"rank {who} cannot count")
    dist.barrier()


def all_failing(objects: dict[int, Any]) -> None:
    raise ArithmeticError("nobody can count")


def test_threads_are_ranks_of_one_group(three: Threads) -> None:
    three.start()
    assert three.ask(rank) == [(0, 3), (1, 3), (2, 3)]
    assert three.ask(summed) == [[3.0]] * 3
    assert three.ask(passed_on) == [22.0, 0.0, 11.0]


def test_this_process_is_in_no_group(three: Threads) -> None:
    three.start()
    assert not dist.is_initialized()


def test_what_is_dropped_is_dropped(three: Threads) -> None:
    three.start()
    number = three.number()
    before = three.ask(kept, number)
    three.drop(number, three.generation)
    assert three.ask(kept, three.number()) == before


@pytest.mark.parametrize("who", [0, 2])
def test_a_thread_that_fails_ends_all_of_them_and_new_ones_start(three: Threads, who: int) -> None:
    """The others wait for it in a collective, in which they would wait for ever."""
    three.start()
    other = Threads(2)
    other.start()
    with pytest.raises(ArithmeticError, match=f"rank {who} cannot count"):
        three.ask(failing, who)
    assert not three.running
    with pytest.raises(Ended):
        three.ask(rank)
    three.start()
    assert three.ask(summed) == [[3.0]] * 3
    assert other.ask(summed) == [[1.0]] * 2  # another group goes on
    other.end()


def test_what_all_of_them_raise_ends_none(three: Threads) -> None:
    three.start()
    generation = three.generation
    with pytest.raises(ArithmeticError, match="nobody can count"):
        three.ask(all_failing)
    assert three.ask(summed) == [[3.0]] * 3
    assert three.generation == generation


@pytest.mark.parametrize(
    ("kind", "ranks", "case", "name"),
    [
        ("pipeline", 2, "gpt2/distinct", "golden.gradients"),
        ("pipeline", 3, "llama/mha", "cache.chunks"),
        ("tensor parallel", 3, "phi/distinct", "golden.gradients"),
    ],
)
def test_a_simulated_partition_is_right(kind: Any, ranks: int, case: str, name: str) -> None:
    assert check(partition.simulated(kind, ranks), case, name).outcome == "pass"
