"""Ranks that are threads of this process: what `ranks.Ranks` does, within milliseconds and within reach of a patch.

Good for simulating a partition in `reference_impl` with a mistake.  What is judged runs in processes of its own.

torch's own tests of DTensor run in threads, on a process group that copies between them; that one is used, with `send`
and `recv`, which it lacks.
"""

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from conformance.implementations.ranks import Ended

# Sender and receiver -> what is under way.
Mail = dict[tuple[int, int], "queue.SimpleQueue[Any]"]
BACKEND = "conformance_threads"
# Seconds that a thread's answer may take, once another has failed, and that one which is woken has to end.
ANSWER, SOON, GRACE = 30.0, 0.5, 5.0
# What belongs to the thread that asks.
_here = threading.local()
_world = threaded.ThreadLocalWorld()
_isolate: Callable[[bool], None] = getattr(torch._C._distributed_c10d, "_set_thread_isolation_mode")  # noqa: B009


class Group(threaded.ProcessLocalGroup):
    """torch's group of threads, with messages from one to another."""

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Any:
        _here.mail[self.rank(), to].put([tensor.detach().clone() for tensor in tensors])
        return threaded.ret_work(tensors)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Any:
        for tensor, sent in zip(tensors, _here.mail[source, self.rank()].get(), strict=True):
            tensor.detach().copy_(sent)
        return threaded.ret_work(tensors)


def _group(store: Any, rank: int, count: int, timeout: Any) -> Group:
    group: Group = Group(rank, count)  # type: ignore[no-untyped-call]
    c10d._store_based_barrier(rank, store, c10d.GroupName(""), count, timeout)
    return group


dist.Backend.register_backend(BACKEND, _group, devices=["cpu"])


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Every thread has a world of process groups of its own; what this process has itself is put aside."""
    own = c10d._world
    c10d._world = _world  # type: ignore[assignment]
    _isolate(True)
    try:
        yield
    finally:
        _isolate(False)
        c10d._world = own


class Threads:
    """The threads.  They are started when first needed, and again after one has failed."""

    def __init__(self, count: int):
        self.count, self.generation = count, 0
        self._numbers = itertools.count()
        self._asked: list[queue.SimpleQueue[Any]] = []
        self._answers: queue.SimpleQueue[tuple[int, Any, Exception | None]] = queue.SimpleQueue()
        self._objects: list[dict[int, Any]] = []
        self._threads: list[threading.Thread] = []
        self._mail: Mail = {}

    @property
    def running(self) -> bool:
        return bool(self._asked)

    def start(self) -> None:
        if self.running:
            return
        self.generation += 1
        self._answers = queue.SimpleQueue()
        self._asked = [queue.SimpleQueue() for _ in range(self.count)]
        self._objects = [{} for _ in range(self.count)]
        ranks = range(self.count)
        self._mail = {(rank, other): queue.SimpleQueue() for rank in ranks for other in ranks}
        store = torch._C._distributed_c10d.HashStore()
        for rank in ranks:
            arguments = (rank, self.count, store, self._mail, self._asked[rank], self._answers, self._objects[rank])
            self._threads.append(threading.Thread(target=serve, args=arguments, daemon=True))
            self._threads[-1].start()
        self.ask(_started)

    def ask(self, task: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `task(objects, *arguments)` returns in each thread.

        Raises: what the first to fail raised; Ended if one is silent.
        """
        if not self.running:
            raise Ended("the threads have ended")
        answers: dict[int, Any] = {}
        failure: Exception | None = None
        with isolated():
            for asked in self._asked:
                asked.put((task, arguments))
            while len(answers) < self.count:
                try:
                    rank, answers[rank], raised = self._answers.get(timeout=ANSWER if failure is None else SOON)
                except queue.Empty:  # it waits for one that has failed
                    self.end()
                    raise failure or Ended(f"a thread gave no answer in {ANSWER:g} s") from None
                failure = failure or raised
        if failure is not None:
            raise failure
        return [answers[rank] for rank in range(self.count)]

    def number(self) -> int:
        return next(self._numbers)

    def drop(self, number: int, generation: int) -> None:
        if generation == self.generation:
            for objects in self._objects:
                objects.pop(number, None)

    def end(self) -> None:
        """Let the threads go: those that wait for another are woken, and none is asked again."""
        threaded.ProcessLocalGroup.exception_handle(None)
        for waiting in (*self._asked, *self._mail.values()):
            waiting.put(None)
        for thread in self._threads:
            thread.join(GRACE)
        threaded.ProcessLocalGroup.reset()  # other groups go on
        self._asked, self._objects, self._threads = [], [], []


def _started(objects: dict[int, Any]) -> None:
    pass


def serve(
    rank: int,
    count: int,
    store: Any,
    mail: Mail,
    asked: "queue.SimpleQueue[Any]",
    answers: Any,
    objects: dict[int, Any],
) -> None:
    """One thread: join the group, then answer until asked for nothing."""
    _here.mail = mail
    joined = False
    while (request := asked.get()) is not None:
        task, arguments = request
        try:
            if not joined:
                dist.init_process_group(BACKEND, rank=rank, world_size=count, store=store)
                joined = True
            answers.put((rank, task(objects, *arguments), None))
        except SystemExit:  # how a waiting collective is woken
            return
        except Exception as error:
            answers.put((rank, None, error))
