"""Run unmodified torch code in real float64.

`model.double()` does not make a computation double: Llama, Mistral, Mixtral, Phi, GPT-Neo and Switch hard-code casts
to float32 (norms, rotary tables, softmax, router), which leave errors of 1e-6 and more.  Inside `with TrueDouble():`
float32, float16 and bfloat16 *mean* float64, and complex64 and complex32 mean complex128, forward and backward, so that
two correct implementations agree to about 1e-14 and every mathematical mistake stands out.  Integers, booleans and
float8 are untouched.

Three layers, because each sees what the others cannot:

- the default dtype is float64, for factories that name none (`torch.tensor(0.1)`);
- a function mode, above autograd, rewrites the dtypes that Python code names *before* a value is rounded or a tensor
  copied, and promotes in place every low-precision tensor it sees (a weight loaded outside, `frombuffer`, `out=` …);
- a dispatch mode, below autograd, does the same for what C++ asks for (scripted functions, derivative formulas);
  functions known to ask for nothing (`_CLOSED`) go past it.

What code written for float32 may notice:

- `x.float()` returns `x` itself, as it does in a float32 run (in a bfloat16 run it would be a copy).
- `x.dtype` is float64, so `assert x.dtype == torch.float32` fails; `torch.finfo(x.dtype).eps` is double's, and so is
  the eps of `nn.RMSNorm(eps=None)`.
- Random draws are double draws, not the float32 draws of the same seed.
- A low-precision tensor from outside is double while the mode is active, and itself again afterwards, unless it was
  written to: then it keeps its double values.  Run the backward inside the mode as well.

What cannot be closed: values that were rounded before torch sees them (numpy float32 arithmetic, a float32 constant
computed when a module was imported); bit tricks (`x.view(torch.int32)`); `torch.compile`d code, which is judged outside
the mode; custom operators whose implementation is Python; writing through a numpy array; a graph that was recorded
outside the mode.  A cache filled inside the mode (`lru_cache` of rotary tables) stays double after it.  The default
dtype belongs to the process: other torch threads have it too while one is in the mode.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Parameter, functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PROMOTED: dict[torch.dtype, torch.dtype] = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}

# Casts that carry the dtype in their own name.  The replacement returns a tensor that is double already unchanged.
_CASTS: dict[Any, Any] = {
    getattr(Tensor, name): getattr(Tensor, double)
    for double, names in {"double": ("float", "half", "bfloat16"), "cdouble": ("cfloat", "chalf")}.items()
    for name in names
}

# Legacy constructors round before any mode sees the values, so their names in the torch module are redirected.
_LEGACY_NAMES = ("FloatTensor", "HalfTensor", "BFloat16Tensor")

# Factories of nothing keep their dtype: torch.load makes an empty tensor and tells it with .set_() where its bytes are.
_aten = torch.ops.aten
_NOTHING: dict[Any, tuple[Any, ...]] = {
    torch.empty: (0, (0,), [0]),
    torch.tensor: ([], ()),
    _aten.empty.memory_format: ([0],),
}
_BIT_CASTS = frozenset([Tensor.view, _aten.view.dtype])

# Functions that, given nothing of low precision, ask for nothing of low precision in C++ either: most of what a model
# calls.  The dispatch mode costs more than a small operation does, so these go past it.
_CLOSED = frozenset(
    getattr(owner, name)
    for owner, names in {
        Tensor: """add sub mul div neg pow square sqrt exp sin cos tanh sigmoid relu softmax clamp sum mean cumsum
            matmul mm bmm eq ne lt le gt ge __and__ __or__ __invert__ __getitem__ __setitem__ view reshape transpose
            permute unsqueeze squeeze expand contiguous flatten chunk split unbind clone detach to masked_fill
            repeat_interleave nonzero index_put index_add_ gather topk""",
        torch: "add mul matmul bmm addmm where rsqrt cat stack softmax outer empty zeros ones arange",
        functional: "linear embedding silu gelu relu softmax layer_norm",
    }.items()
    for name in names.split()
)
# Arguments that are neither tensors nor dtypes.  Of tensors only Tensor and Parameter have no dispatch of their own.
_PLAIN = frozenset([int, float, bool, str, slice, type(None), type(...), torch.device])
_BOXES = (tuple, list, torch.Size)

_state = threading.local()


class TrueDouble:
    """Context manager under which every torch computation is float64.  Re-entrant; nesting costs nothing."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._depth = 0

    def __enter__(self) -> Self:
        self._depth += 1
        if not getattr(_state, "active", False):
            with ExitStack() as stack:  # undoes what was done so far if a step fails
                _activate(stack)
                self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._stack.close()


def _activate(stack: ExitStack) -> None:
    """Enter everything that makes torch double; `stack` is to undo it in reverse order."""
    _state.active = True
    stack.callback(setattr, _state, "active", False)
    leaked = _LeakedTensors()
    stack.callback(leaked.restore)
    stack.enter_context(_process)
    stack.enter_context(_Operations())  # type: ignore[no-untyped-call]
    stack.enter_context(_Functions(leaked))


class _Process:
    """What belongs to the process, not to a thread: the first thread that enters changes it, the last restores it."""

    def __init__(self) -> None:
        self._lock, self._inside, self._stack = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            self._stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
            for name in _LEGACY_NAMES:
                self._stack.callback(setattr, torch, name, getattr(torch, name))
                setattr(torch, name, torch.DoubleTensor)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stack.close()


_process = _Process()


class _LeakedTensors:
    """Low-precision tensors that reached the mode, promoted in place; those that share storage go on sharing it."""

    def __init__(self) -> None:
        self._storages: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}  # whole storage: before, as double
        self._tensors: list[tuple[weakref.ref[Tensor], Tensor, tuple[int, torch.dtype]]] = []

    def promote(self, tensor: Tensor) -> None:
        """Make this very object double, as `Module.double()` does with a parameter."""
        with _past_dispatch(tensor):
            self._promote(tensor)

    def _promote(self, tensor: Tensor) -> None:
        original = tensor.data
        if tensor.layout is not torch.strided:
            tensor.data = original.to(PROMOTED[original.dtype])
            return
        if tensor.is_leaf and tensor.grad is not None and tensor.grad.dtype in PROMOTED:
            self.promote(tensor.grad)
        storage = original.untyped_storage()
        key = (storage._cdata, original.dtype)
        if key not in self._storages:
            whole = torch.empty(0, dtype=original.dtype, device=original.device).set_(storage)
            self._storages[key] = whole, whole.to(PROMOTED[original.dtype])
        double = self._storages[key][1]
        tensor.data = double.as_strided(original.shape, original.stride(), original.storage_offset())
        self._tensors.append((weakref.ref(tensor), original, key))

    def restore(self) -> None:
        """Give back what was only read.  A promoted storage that was written to stays double: nothing is rounded."""
        alive = [(tensor, original, key) for ref, original, key in self._tensors if (tensor := ref()) is not None]
        unchanged = {key for key in {key for _, _, key in alive} if _unchanged(*self._storages[key])}
        for tensor, original, key in alive:
            if key in unchanged and tensor.dtype is PROMOTED[original.dtype]:
                tensor.data = original
        self._storages.clear()
        self._tensors.clear()


def _unchanged(before: Tensor, now: Tensor) -> bool:
    """Whether a storage's double values still are what it held before, bit for bit, NaN too; on meta it holds none."""
    return before.is_meta or torch.equal(before.to(now.dtype).view(torch.int64), now.view(torch.int64))


class _Functions(TorchFunctionMode):
    """Above autograd: rewrites the dtypes that Python code names, promotes the tensors that it passes."""

    def __init__(self, leaked: _LeakedTensors) -> None:
        super().__init__()
        self._promote = leaked.promote

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.get_default_dtype() is not torch.float64:  # the code inside called set_default_dtype
            torch.set_default_dtype(torch.float64)
        closed = func in _CLOSED
        if not (closed and _ready(args) and _ready(kwargs.values())):
            if _keeps_dtype(func, args, kwargs):
                with _past_dispatch(args[0] if args else None):
                    return func(*args, **kwargs)
            if self._promote_all(args):
                args = tuple([_double(value) for value in args])
            if kwargs and self._promote_all(kwargs.values()):
                kwargs = {name: _double(value) for name, value in kwargs.items()}
            closed = closed and _ready(args) and _ready(kwargs.values())
        if closed and _nobody_else_looks():
            with torch._C._DisableTorchDispatch():
                return func(*args, **kwargs)
        return _CASTS.get(func, func)(*args, **kwargs)

    def _promote_all(self, values: Iterable[Any]) -> bool:
        """Promote every tensor among the values; say whether a low-precision dtype is among them."""
        names_dtype = False
        for value in values:
            if isinstance(value, Tensor):
                if value.dtype in PROMOTED:
                    self._promote(value)
            elif isinstance(value, torch.dtype):
                names_dtype = names_dtype or value in PROMOTED
            elif isinstance(value, (list, tuple)):
                self._promote_all(value)
        return names_dtype


class DispatchMode(TorchDispatchMode):
    """A dispatch mode that torch does not wrap for its compiler, whose import takes more than a second."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Operations(DispatchMode):
    """Below autograd: the same for operations that do not come from Python code.

    Here a tensor cannot be promoted in place.  Operations that write to or alias a low-precision tensor keep it: the
    function mode sees it next.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # autograd calls from outside the function mode
            if _keeps_dtype(func, args, kwargs):
                return func(*args, **kwargs)
            convert = _double if _aliases(func) else _double_copy
            if any(map(_is_low, args)):
                args = tuple([convert(value) for value in args])
            if kwargs and any(map(_is_low, kwargs.values())):
                kwargs = {name: convert(value) for name, value in kwargs.items()}
            return func(*args, **kwargs)


def _keeps_dtype(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a dtype among the arguments names no precision of values, but how to read bytes."""
    if func in _NOTHING:
        size = args[0] if args else None
        return type(size) in (int, tuple, list, torch.Size) and size in _NOTHING[func]
    if func in _BIT_CASTS:
        target = args[1] if len(args) > 1 else kwargs.get("dtype")
        if isinstance(target, torch.dtype):
            return not (_is_real(args[0].dtype) and _is_real(target))
    return False


def _nobody_else_looks() -> bool:
    """Whether `_Operations` is the only dispatch mode, and autocast does not ask for low precision in its place."""
    return torch._C._len_torch_dispatch_stack() == 1 and not torch._C._is_any_autocast_enabled()


def _past_dispatch(value: Any) -> AbstractContextManager[None]:
    """Where operations on a value go past `_Operations`, unless it has a dispatch of its own or somebody else looks."""
    plain = not isinstance(value, Tensor) or type(value) in (Tensor, Parameter)
    return torch._C._DisableTorchDispatch() if plain and _nobody_else_looks() else nullcontext()


def _ready(values: Iterable[Any]) -> bool:
    """Whether nothing among the values is of low precision, nor has a dispatch of its own."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if value.dtype in PROMOTED:
                return False
        elif kind is torch.dtype:
            if value in PROMOTED:
                return False
        elif kind not in _PLAIN and not (kind in _BOXES and _ready(value)):
            return False
    return True


def _is_real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


@functools.cache
def _aliases(func: Any) -> bool:
    """Whether an operation writes to an argument or returns a view of it."""
    return any(argument.alias_info is not None for argument in func._schema.arguments)


def _is_low(value: Any) -> bool:
    """Whether a value is, or holds, a low-precision tensor or dtype."""
    if isinstance(value, Tensor):
        return value.dtype in PROMOTED
    if isinstance(value, torch.dtype):
        return value in PROMOTED
    return isinstance(value, (list, tuple)) and any(map(_is_low, value))


def _double(value: Any) -> Any:
    """The dtype that stands for a dtype; anything else as it is."""
    return PROMOTED.get(value, value) if isinstance(value, torch.dtype) else value


def _double_copy(value: Any) -> Any:
    """The same for dtypes, tensors, and lists and tuples of them."""
    if isinstance(value, Tensor) and value.dtype in PROMOTED:
        return value.to(PROMOTED[value.dtype])
    if isinstance(value, (list, tuple)):
        return type(value)([_double_copy(item) for item in value])
    return _double(value)
