"""Tiny deliberate fakes: each misbehaves in one way, or is right in an unusual one, so that the runner can be tested.

Named on a command line by file, `tests/fakes.py:Zeros`.  All declare the family llama unless they lie about that.
Those that answer rightly delegate to the reference.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from conformance import Unsupported

# Far beyond any timeout that a test gives.
FOREVER = 600.0


class Fake:
    """The reference with `answer` put in its way: what the model returns instead of, or made from, the right logits."""

    name = "fake"
    families: ClassVar[Any] = frozenset({"llama"})

    def load(self, checkpoint: Any) -> Callable[..., Any]:
        from conformance.implementations.reference import Reference

        right = Reference("eager").load(checkpoint)

        def model(input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Any:
            returned = right(input_ids, attention_mask=attention_mask, position_ids=position_ids)
            return self.answer(returned["logits"])

        return model

    def answer(self, logits: Tensor) -> Any:
        return logits


# --- right, in an unusual way ---------------------------------------------------------------------------------------


class ReturnsTuple(Fake):
    def answer(self, logits: Tensor) -> Any:
        return logits, logits[:, 0], None


class ReturnsObject(Fake):
    def answer(self, logits: Tensor) -> Any:
        return SimpleNamespace(logits=logits, past_key_values=None)


class ReturnsDict(Fake):
    def answer(self, logits: Tensor) -> Any:
        return {"logits": logits, "hidden_states": ()}


class ReturnsNumpy(Fake):
    def answer(self, logits: Tensor) -> Any:
        return logits.numpy()


class NotContiguous(Fake):
    """The right values with the vocabulary outermost in memory."""

    def answer(self, logits: Tensor) -> Any:
        return logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)


class Talks(Fake):
    """Prints 2 MB for every call, half of it to stderr."""

    def answer(self, logits: Tensor) -> Any:
        for stream in (sys.stdout, sys.stderr):
            print("blah " * 200_000, file=stream)
        return logits


class TalksAndDies(Talks):
    def answer(self, logits: Tensor) -> Any:
        super().answer(logits)
        print("the end")
        os._exit(0)


class StartsThread(Fake):
    """A thread that would keep the interpreter from ending."""

    def answer(self, logits: Tensor) -> Any:
        threading.Thread(target=time.sleep, args=(FOREVER,)).start()
        return logits


class MutatesInputs(Fake):
    """Overwrites everything that it was given, after use."""

    def load(self, checkpoint: Any) -> Callable[..., Any]:
        right = super().load(checkpoint)
        for tensor in checkpoint.tensors().values():
            tensor.zero_()
        checkpoint.config.clear()

        def model(input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Any:
            logits = right(input_ids, attention_mask, position_ids)
            for given in (input_ids, attention_mask, position_ids):
                if given is not None:
                    given.zero_()
            return logits

        return model


class OneBuffer(Fake):
    """Sessions return the same buffer again and again, as engines with captured graphs do."""

    def load(self, checkpoint: Any) -> Callable[..., Any]:
        from conformance.implementations.reference import Reference

        right = Reference("eager").load(checkpoint)

        class Session:
            def __init__(self) -> None:
                self.session, self.buffers = right.session(), {}  # type: ignore[operator, var-annotated]

            def feed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
                logits = self.session.feed(input_ids, attention_mask)
                return self.buffers.setdefault(logits.shape, logits).copy_(logits)  # type: ignore[no-any-return]

        class Model:
            def __call__(self, input_ids: Tensor) -> Tensor:
                return right(input_ids)["logits"]  # type: ignore[no-any-return]

            def session(self) -> Session:
                return Session()

        return Model()


def fused(checkpoint: Any) -> Any:
    """A bare function as implementation; fused projections, SDPA, in-place residual adds."""
    from candidates.fused_sdpa import FusedSDPA  # this file's directory is on the path when it is named by file

    return FusedSDPA().load(checkpoint)


# --- wrong values ---------------------------------------------------------------------------------------------------


class Zeros(Fake):
    def answer(self, logits: Tensor) -> Any:
        return torch.zeros_like(logits)


class NaN(Fake):
    """One NaN, in the second row at position 3."""

    def answer(self, logits: Tensor) -> Any:
        logits[1, 3, 5] = float("nan")
        return logits


class Inf(Fake):
    def answer(self, logits: Tensor) -> Any:
        return logits.fill_(float("inf"))


class SwapsRows(Fake):
    """Answers of the first two rows of the batch exchanged."""

    def answer(self, logits: Tensor) -> Any:
        return torch.cat([logits[1:2], logits[0:1], logits[2:]])


class ThroughFloat32(Fake):
    """Rounds to float32 on the way, and answers in float64."""

    def answer(self, logits: Tensor) -> Any:
        return logits.numpy().astype(np.float32).astype(np.float64)


class WrongLastLogit(Fake):
    """Only the very last logit of the last row is off, by a part in ten thousand of the largest."""

    def answer(self, logits: Tensor) -> Any:
        logits[-1, -1, -1] += 1e-4 * logits.abs().max()
        return logits


# --- wrong in kind --------------------------------------------------------------------------------------------------


class LastTokenOnly(Fake):
    def answer(self, logits: Tensor) -> Any:
        return logits[:, -1]


class Float32(Fake):
    """Computes in float64 and answers in float32, as a kernel that PyTorch's modes do not see."""

    def answer(self, logits: Tensor) -> Any:
        from torch.utils._python_dispatch import _disable_current_modes

        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return logits.to(torch.float32)


class Integers(Fake):
    def answer(self, logits: Tensor) -> Any:
        return logits.to(torch.int64)


class ReturnsNone(Fake):
    def answer(self, logits: Tensor) -> Any:
        return None


class ReturnsString(Fake):
    def answer(self, logits: Tensor) -> Any:
        return "the answer is 42"


class ReturnsTwo(Fake):
    def answer(self, logits: Tensor) -> Any:
        return logits, logits.clone()


class DictWithoutLogits(Fake):
    def answer(self, logits: Tensor) -> Any:
        return {"scores": logits}


class OnMeta(Fake):
    def answer(self, logits: Tensor) -> Any:
        return logits.to("meta")


class LossPerToken(Fake):
    def answer(self, logits: Tensor) -> Any:
        return {"logits": logits, "loss": logits[..., 0]}


class LoadsNone(Fake):
    def load(self, checkpoint: Any) -> Any:
        return None


# --- goes wrong while it runs ---------------------------------------------------------------------------------------


class RaisesInLoad(Fake):
    def load(self, checkpoint: Any) -> Any:
        raise KeyError("model.layers.0.mlp.weight")


class RaisesInCall(Fake):
    def answer(self, logits: Tensor) -> Any:
        raise IndexError("no such head\nsecond line")


class OutOfMemory(Fake):
    def answer(self, logits: Tensor) -> Any:
        return torch.empty(10**15)


class PythonOutOfMemory(Fake):
    def answer(self, logits: Tensor) -> Any:
        raise MemoryError


class Sleeps(Fake):
    def answer(self, logits: Tensor) -> Any:
        print("going to sleep")
        time.sleep(FOREVER)


class SleepsWithChild(Fake):
    """Starts a process of its own, says its id, and hangs."""

    def answer(self, logits: Tensor) -> Any:
        child = os.fork()
        if child == 0:
            time.sleep(FOREVER)
            os._exit(0)
        print("child", child)
        time.sleep(FOREVER)


class DiesLeavingChild(Fake):
    """Starts a process of its own, says its id, and ends without it."""

    def answer(self, logits: Tensor) -> Any:
        child = os.fork()
        if child == 0:
            time.sleep(FOREVER)
        print("child", child)
        os._exit(0)


class ExitsWell(Fake):
    def answer(self, logits: Tensor) -> Any:
        print("good bye")
        os._exit(0)


class Exits3(Fake):
    def answer(self, logits: Tensor) -> Any:
        os._exit(3)


class SysExit(Fake):
    """sys.exit with a thread that would keep the interpreter alive."""

    def answer(self, logits: Tensor) -> Any:
        threading.Thread(target=time.sleep, args=(FOREVER,)).start()
        sys.exit("licence expired")


class Segfaults(Fake):
    def answer(self, logits: Tensor) -> Any:
        ctypes.string_at(0)


class KillsItself(Fake):
    """As the kernel does to a process that takes too much memory."""

    def answer(self, logits: Tensor) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class CrashesInPadding(Fake):
    """Right without a mask; with one it ends the process, and with success at that."""

    def load(self, checkpoint: Any) -> Callable[..., Any]:
        right = super().load(checkpoint)

        def model(input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            if attention_mask is not None:
                os._exit(0)
            return right(input_ids)

        return model


class HangsInPadding(Fake):
    """Right without a mask, hangs with one."""

    def load(self, checkpoint: Any) -> Callable[..., Any]:
        right = super().load(checkpoint)

        def model(input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            if attention_mask is not None:
                time.sleep(FOREVER)
            return right(input_ids)

        return model


class WithSessions(Fake):
    """Right, and opens sessions; `before` is called with the ids of every call."""

    def before(self, input_ids: Tensor) -> None: ...

    def load(self, checkpoint: Any) -> Callable[..., Any]:
        from conformance.implementations.reference import Reference

        right, before = Reference("eager").load(checkpoint), self.before

        class Model:
            def __call__(
                self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
            ) -> Any:
                before(input_ids)
                return right(input_ids, attention_mask, position_ids)

            def session(self) -> Any:
                return right.session()  # type: ignore[operator]

        return Model()


class SegfaultsOnLongTexts(WithSessions):
    """Ends the process when a row has five tokens or more."""

    def before(self, input_ids: Tensor) -> None:
        if input_ids.shape[1] >= 5:
            ctypes.string_at(0)


class HangsOnThreeRows(WithSessions):
    """Does not answer when there are three rows or more."""

    def before(self, input_ids: Tensor) -> None:
        if len(input_ids) >= 3:
            time.sleep(FOREVER)


class DiesInItsNinthCall(WithSessions):
    """Ends the process in the ninth call, whatever it is."""

    calls = 0

    def before(self, input_ids: Tensor) -> None:
        self.calls += 1
        if self.calls == 9:
            os._exit(3)


class DiesIdle(Fake):
    """Answers rightly, and dies a moment later."""

    def answer(self, logits: Tensor) -> Any:
        threading.Timer(0.2, os._exit, args=(7,)).start()
        return logits


class CountsCalls(Fake):
    """Says how many calls this process has answered."""

    calls = 0

    def answer(self, logits: Tensor) -> Any:
        self.calls += 1
        print(f"call {self.calls}")
        return logits


def _parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


class KillsTheRunner(Fake):
    """Kills the pytest-xdist process that judges it, when it is to load float32.

    Only a process whose own parent was started for this fake: once that is dead, its place may be another's.
    """

    def load(self, checkpoint: Any) -> Any:
        if checkpoint.dtype == torch.float32:
            runner = _parent_of(os.getppid())
            if b"KillsTheRunner" in Path(f"/proc/{_parent_of(runner)}/cmdline").read_bytes():
                os.kill(runner, signal.SIGKILL)
            time.sleep(FOREVER)
        return super().load(checkpoint)


# --- what it declares -----------------------------------------------------------------------------------------------


class NoSuchFamily(Fake):
    families = frozenset({"llama", "llama-9"})


class NoFamily(Fake):
    families = frozenset()


class FamiliesAsString(Fake):
    families = "llama"  # set("llama") would be five families


class DtypesAsString(Fake):
    dtypes = "float32"


class UnknownDtype(Fake):
    dtypes = frozenset({"float32", "int4"})


class OnlyFloat16(Fake):
    """Declares one working dtype; everything else is unsupported."""

    dtypes = frozenset({"float16"})


class NothingSupported(Fake):
    def load(self, checkpoint: Any) -> Any:
        raise Unsupported("no licence for weights")


class CannotLoadLlama(Fake):
    """Declares llama, and cannot load it."""

    def load(self, checkpoint: Any) -> Any:
        raise NotImplementedError(f"model_type {checkpoint.config['model_type']!r}")


class Chosen:
    """The fake whose name is in the file `$FAKE`, so that one worker process can take the part of many."""

    def __new__(cls) -> Any:
        fake = globals()[Path(os.environ["FAKE"]).read_text()]
        return fake() if isinstance(fake, type) else SimpleNamespace(load=fake)


NOT_AN_IMPLEMENTATION = 42
