"""An implementation that runs in several processes, behind the contract that every implementation has.

    def load_rank(checkpoint):              # runs in every rank, torch.distributed being initialised
        return model                        # called there like any model; None as answer: this rank has none

    MyEngine = OverRanks(load_rank, name="my-engine, 2 ranks", families={"llama"}, ranks=2)

`load` starts the ranks (once), and has each load the checkpoint; whatever is then asked of the model is asked of every
rank's model alike: calls, `session`, `feed`, `state_bytes`.  So all claims of the family apply as they are.  Ranks that
answer must give the same bits; a pipeline's answer comes from its last stage, and the others return None.  Gradients
need `gradients(upstream)` of the rank's model: the loss's gradient for the logits of the last call in, a dict from hub
name to gradient out; of ranks that name the same parameter the first is believed.

A rank that dies or is silent is an error of the claim at hand and the end of all ranks; the next load starts new ones.
They end with this process: each ends when its connection does, and in the suite's worker they are of the process group
that is killed.
"""

import contextlib
import functools
import inspect
import itertools
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from conformance.bounds import same_bits
from conformance.implementation import Unsupported, precision
from conformance.worker import describe_status

# Seconds that a rank's answer may take; that one rank waits for another; that ranks have once one of them has failed.
ANSWER, COLLECTIVE, GRACE = 45.0, 30.0, 5.0
# Importing torch in a new process takes seconds, more on a busy machine.
STARTUP = 120.0


@dataclass(frozen=True)
class RankCheckpoint:
    """`conformance.implementation.Checkpoint` as a rank gets it."""

    path: Path
    config: dict[str, Any]
    dtype: torch.dtype
    device: torch.device

    def tensors(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        stored = load_file(self.path / "model.safetensors")
        return {name: tensor.to(device=self.device, dtype=self.dtype, copy=True) for name, tensor in stored.items()}


class OverRanks:
    """An implementation: `ranks` processes, each with what `load_rank` makes of the checkpoint.

    load_rank: a function of a module, so that a new process can import it.
    settings: its further arguments, by name.
    backend: of torch.distributed.
    """

    def __init__(
        self,
        load_rank: Callable[..., Any],
        *,
        name: str,
        families: Iterable[str],
        ranks: int,
        backend: str = "gloo",
        settings: Mapping[str, Any] | None = None,
    ):
        self.name, self.families = name, frozenset(families)
        self.load_rank, self.settings = load_rank, dict(settings or {})
        self.group: Any = Ranks(ranks, backend)

    def load(self, checkpoint: Any) -> "RankedModel":
        shared = RankCheckpoint(checkpoint.path, checkpoint.config, checkpoint.dtype, checkpoint.device)
        return RankedModel(self.group, self.load_rank, shared, self.settings)


class Ended(RuntimeError):
    """The ranks are no more: one died, or did not answer."""


class Ranks:
    """The processes.  They are started when first needed, and again when they have ended."""

    def __init__(self, count: int, backend: str):
        self.count, self.backend, self.timeout = count, backend, ANSWER
        self.generation = 0
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._numbers = itertools.count()
        self._dropped: list[int] = []

    @property
    def running(self) -> bool:
        return bool(self._processes)

    def ask(self, task: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> list[Any]:
        """What `task(objects, *arguments)` returns in each rank; `objects` is the rank's own table.

        timeout: seconds that the ranks have; None: `self.timeout`.

        Raises: Ended if a rank dies or is silent; what the first rank to fail raised, if one fails.
        """
        message = pickle.dumps((task, arguments, self._dropped))
        self._dropped = []
        for connection in self._connections:
            with contextlib.suppress(OSError):  # a dead rank; it is missed below
                connection.send_bytes(message)
        answers, failure = self._collect(self.timeout if timeout is None else timeout)
        if failure is not None:
            raise failure
        return [answers[rank] for rank in range(self.count)]

    def _collect(self, timeout: float) -> tuple[dict[int, Any], Exception | None]:
        answers: dict[int, Any] = {}
        failure: Exception | None = None
        deadline = time.monotonic() + timeout
        while missing := set(range(self.count)) - set(answers):
            sources = {self._connections[rank]: rank for rank in missing}
            ready = wait([*sources, *(p.sentinel for p in self._processes)], max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = ", ".join(map(str, sorted(missing)))
                self.end()
                raise failure or Ended(f"rank {silent} of {self.count} gave no answer in {timeout:g} s")
            for connection in ready:
                if connection in sources:
                    rank = sources[connection]
                    try:
                        answers[rank], raised = pickle.loads(connection.recv_bytes())
                    except (EOFError, OSError):
                        continue  # it has died
                    if raised is not None and failure is None:
                        failure, deadline = raised, min(deadline, time.monotonic() + GRACE)
            if set(range(self.count)) - set(answers):
                self._raise_for_the_dead(failure)
        return answers, failure

    def _raise_for_the_dead(self, failure: Exception | None) -> None:
        dead = [rank for rank, process in enumerate(self._processes) if process.exitcode is not None]
        if dead:
            how = describe_status(self._processes[dead[0]].exitcode)
            self.end()
            # What the others then raise, because they wait for it, is no more than a consequence.
            raise Ended(f"rank {dead[0]} of {self.count} ended: {how}") from failure

    def number(self) -> int:
        """A new key of the ranks' tables of objects."""
        return next(self._numbers)

    def drop(self, number: int, generation: int) -> None:
        """Forget an object, with the next request: this one runs whenever Python collects garbage."""
        if generation == self.generation:
            self._dropped.append(number)

    def start(self) -> None:
        """Start the processes unless they run."""
        if self._processes:
            return
        self.generation += 1
        self._dropped = []
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, dead
        self._meeting = tempfile.TemporaryDirectory(prefix="conformance-ranks-", ignore_cleanup_errors=True)
        address = f"file://{self._meeting.name}/store"
        for rank in range(self.count):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(theirs, rank, self.count, self.backend, address), daemon=True, name=f"rank {rank}"
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(mine)
        self.ask(started, timeout=STARTUP)

    def end(self) -> None:
        """Kill the processes, if they run."""
        if not self.running:
            return
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        self._meeting.cleanup()


class Handle:
    """An object that every rank has under the same number, as long as somebody holds this."""

    def __init__(self, ranks: Ranks, dtype: torch.dtype):
        ranks.start()
        self.ranks, self.dtype = ranks, dtype
        self.number, self.generation = ranks.number(), ranks.generation
        weakref.finalize(self, ranks.drop, self.number, self.generation)

    def ask(self, task: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `task(objects, number, dtype, gradients, *arguments)` returns in each rank.

        Raises: what `Ranks.ask` raises, and Ended if these ranks have.
        """
        if self.generation != self.ranks.generation or not self.ranks.running:
            raise Ended("the ranks that held this model have ended")
        dtype = str(self.dtype).removeprefix("torch.")
        return self.ranks.ask(task, self.number, dtype, torch.is_grad_enabled(), *arguments)


class RankedModel:
    """The model that the ranks hold together.  It has `session` and `parameters` if theirs have what is needed."""

    def __init__(
        self, ranks: Ranks, load_rank: Callable[..., Any], checkpoint: RankCheckpoint, settings: dict[str, Any]
    ):
        self.handle = Handle(ranks, checkpoint.dtype)
        described = self.handle.ask(load, load_rank, checkpoint, settings)[0]
        self.__signature__ = _signature(described["arguments"])
        if described["session"]:
            self.session = functools.partial(RankedSession, self.handle)
        self.parameters = checkpoint.tensors() if described["gradients"] else None

    def __call__(self, input_ids: Any, **arguments: Any) -> Any:
        answer = one_answer(self.handle.ask(call, "__call__", input_ids, arguments))
        if not torch.is_grad_enabled() or self.parameters is None:
            return answer
        logits = answer["logits"] if isinstance(answer, Mapping) else answer
        logits = _Logits.apply(self, logits, *self.parameters.values())  # type: ignore[no-untyped-call]
        return {**answer, "logits": logits} if isinstance(answer, Mapping) else logits

    def gradients(self, upstream: Tensor) -> dict[str, Tensor]:
        """Hub name → gradient, from the first rank that names it."""
        gradients: dict[str, Tensor] = {}
        for answer in reversed(self.handle.ask(call, "gradients", upstream, {})):
            gradients |= answer
        return gradients


class RankedSession:
    """A session in every rank.  It has `state_bytes`, the sum over the ranks, if theirs have."""

    def __init__(self, model: Handle, **source: Tensor):
        self.handle = Handle(model.ranks, model.dtype)
        described = self.handle.ask(open_session, model.number, source)[0]
        self.feed = _Feed(self.handle, described["arguments"])
        if described["state_bytes"]:
            self.state_bytes = functools.partial(_state_bytes, self.handle)


class _Feed:
    def __init__(self, handle: Handle, arguments: list[str] | None):
        self.handle, self.__signature__ = handle, _signature(arguments)

    def __call__(self, input_ids: Any, **arguments: Any) -> Any:
        return one_answer(self.handle.ask(call, "feed", input_ids, arguments))


def _state_bytes(handle: Handle) -> int:
    return sum(handle.ask(call, "state_bytes", None, {}))


class _Logits(torch.autograd.Function):
    """Logits whose gradient is sent to the ranks, and comes back as those of the parameters."""

    @staticmethod
    def forward(ctx: Any, model: RankedModel, logits: Tensor, *parameters: Tensor) -> Tensor:
        ctx.model = model
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():  # what the ranks are told to do
            gradients = ctx.model.gradients(upstream[0])
        return (None, None, *(gradients.get(name) for name in ctx.model.parameters))


def one_answer(answers: list[Any]) -> Any:
    """The answer of the ranks that have one.

    Raises: RuntimeError if there is none, or two differ in a bit: nobody could say which counts.
    """
    given = {rank: answer for rank, answer in enumerate(answers) if answer is not None}
    if not given:
        raise RuntimeError(f"none of {len(answers)} ranks returned anything")
    first, *others = given
    for other in others:
        values = [_tensors(given[rank]) for rank in (first, other)]
        if values[0].keys() != values[1].keys() or not all(same_bits(values[0][k], values[1][k]) for k in values[0]):
            raise RuntimeError(
                f"ranks {first} and {other} returned different values; ranks without an answer return None"
            )
    return given[first]


def _tensors(answer: Any) -> dict[str, Tensor]:
    named = answer if isinstance(answer, Mapping) else {"logits": answer}
    return {name: torch.as_tensor(value) for name, value in named.items() if value is not None}


def _signature(arguments: list[str] | None) -> inspect.Signature:
    """What the ranks' function declares; None: anything."""
    if arguments is None:
        return inspect.Signature([inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)])
    return inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in arguments])


# --- inside a rank --------------------------------------------------------------------------------------------------

Objects = dict[int, Any]


def started(objects: Objects) -> None:
    """Nothing: the rank has joined the group."""


def load(
    objects: Objects, number: int, dtype: str, gradients: bool, load_rank: Any, checkpoint: Any, settings: Any
) -> dict[str, Any]:
    """Load the checkpoint, and say what the model can do."""
    with precision(dtype):
        model = objects[number] = load_rank(checkpoint, **settings)
    return {"arguments": _arguments(model), "session": hasattr(model, "session"),
            "gradients": hasattr(model, "gradients")}  # fmt: skip


def open_session(
    objects: Objects, number: int, dtype: str, gradients: bool, model: int, source: dict[str, Tensor]
) -> dict[str, Any]:
    with precision(dtype, gradients):
        session = objects[number] = objects[model].session(**source)
    return {"arguments": _arguments(session.feed), "state_bytes": hasattr(session, "state_bytes")}


def call(
    objects: Objects, number: int, dtype: str, gradients: bool, method: str, first: Any, further: dict[str, Any]
) -> Any:
    """What the method returns of one argument by place, if it takes any, and further ones by name."""
    with precision(dtype, gradients):
        return plain(getattr(objects[number], method)(*([] if first is None else [first]), **further))


def plain(answer: Any) -> Any:
    """The answer without what ties it to this process: graphs, devices."""
    if isinstance(answer, Tensor):
        return answer.detach().cpu()
    return {key: plain(value) for key, value in answer.items()} if isinstance(answer, Mapping) else answer


def _arguments(function: Any) -> list[str] | None:
    from conformance.implementation import _declared_arguments

    declared = _declared_arguments(function)
    return None if declared is None else sorted(declared)


def serve(connection: Connection, rank: int, count: int, backend: str, address: str) -> NoReturn:
    """Join the group, then answer until the connection ends."""
    import torch.distributed as dist

    objects: Objects = {}
    try:
        dist.init_process_group(
            backend, init_method=address, rank=rank, world_size=count, timeout=timedelta(seconds=COLLECTIVE)
        )
        while True:
            task, arguments, dropped = pickle.loads(connection.recv_bytes())
            for number in dropped:
                objects.pop(number, None)
            connection.send_bytes(answer(task, objects, arguments))
    except (EOFError, OSError):
        pass  # the parent is gone
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)  # at once: the group's threads would wait for each other


def answer(task: Callable[..., Any], objects: Objects, arguments: tuple[Any, ...]) -> bytes:
    """The pickled pair (returned, raised)."""
    try:
        return pickle.dumps((task(objects, *arguments), None))
    except Exception as error:
        raised = Unsupported(str(error)) if isinstance(error, Unsupported) else RuntimeError(_in_rank(error))
        return pickle.dumps((None, raised))


def _in_rank(error: Exception) -> str:
    """The error, where it was raised (the innermost line that is not torch's), and in which rank."""
    import torch.distributed as dist

    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(os.path.dirname(torch.__file__))]
    where = f"{own[-1].filename}:{own[-1].lineno}" if own else "torch"
    return f"in rank {dist.get_rank()}, {where}: {type(error).__name__}: {error}"
