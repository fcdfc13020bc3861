"""Record what a torch program computes, without hooks: every floating tensor that an operation returns, in order.

The records are what `conformance.align` matches against the oracle's probes.  A record is a copy, made when the
operation returns: a later `x += …` must not change what was recorded.

What an operation returns is not everything that a program makes.  A buffer that is filled piece by piece
(`states[:, t] = h`) is never returned whole, so a tensor whose storage was written to is recorded once more when the
next operation reads it.  A buffer that no operation reads afterwards (the result itself) is for the caller to `add`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from conformance.oracles.true_double import DispatchMode, TrueDouble

# Smaller tensors match too much by accident, and say too little, to be worth their copy.
MIN_NUMEL = 8

MAX_BYTES = 2 << 30

# Where the schema is not the whole truth: _unsafe_view does reshape its argument (a fresh matrix product), the argument
# of lift_fresh is a new constant that nothing else returns, and lazy negation and conjugation change the values.
_aten = torch.ops.aten
_VIEWS = {_aten._unsafe_view.default}
_NOT_VIEWS = {_aten.lift_fresh.default, _aten._conj.default, _aten._neg_view.default}
# What these return holds whatever was freed there, perhaps the very values of a probe: it is made zero, and counts once
# it is written to.
_UNINITIALISED = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass(frozen=True, slots=True)
class Record:
    """One tensor that an operation returned (or, for `read`, found in a buffer that had been written to).

    value: contiguous float64 copy on the CPU, detached; complex numbers are pairs in a last dimension of 2.
    shape: of the value.
    """

    op: str
    shape: tuple[int, ...]
    value: Tensor


class Recorder:
    """Context manager: runs torch code at true double precision and keeps `records` of it.  Not re-entrant.

    A view that shows a recorded tensor in the same order is not recorded again.

    min_numel: smaller tensors are left out.
    max_bytes: when the copies would take more, recording stops and `truncated` says so; the program goes on.
    """

    def __init__(self, *, min_numel: int = MIN_NUMEL, max_bytes: int = MAX_BYTES) -> None:
        self.records: list[Record] = []
        self.truncated = False
        self._min_numel = min_numel
        self._bytes_left = max_bytes
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(TrueDouble())
            stack.enter_context(_Observer(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def tensors(self) -> list[Tensor]:
        """The recorded values alone, as `align` takes them."""
        return [record.value for record in self.records]

    def add(self, op: str, tensor: Tensor) -> None:
        """Record a tensor, unless it is too small, holds no real numbers or would exceed max_bytes."""
        if tensor.numel() < self._min_numel or tensor.layout is not torch.strided or tensor.is_meta:
            return
        if not (tensor.is_floating_point() or tensor.is_complex()) or self.truncated:
            return
        value = tensor.detach()
        if value.is_complex():
            value = torch.view_as_real(value.resolve_conj())
        size = value.numel() * torch.float64.itemsize
        if size > self._bytes_left:
            self.truncated = True
            return
        self._bytes_left -= size
        copy = torch.empty(value.shape, dtype=torch.float64).copy_(value)
        self.records.append(Record(op, tuple(value.shape), copy))


class _Observer(DispatchMode):
    """Entered after TrueDouble, so that it sees each operation first and its double result last."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._add = recorder.add
        # Storages that were written to and not read since; kept, for a freed one's address would be another's.
        self._written: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            effects = _effects(func)
            if self._written and not effects.view:
                self._read(args, effects)
            result = func(*args, **kwargs)
            if effects.uninitialised:
                result.zero_()
            if effects.writes:
                self._wrote(args, kwargs, effects, result)
            if not effects.uninitialised and not (effects.view and _shows_the_same(args[0], result)):
                for tensor in _tensors(result):
                    self._add(str(func), tensor)
            return result

    def _read(self, args: tuple[Any, ...], effects: _Effects) -> None:
        """Record what an operation is about to read from storages that were written to."""
        for position, argument in enumerate(args):
            if position in effects.writes:
                continue
            for tensor in _tensors(argument):
                storage = tensor.untyped_storage()
                if storage._cdata in self._written:
                    self._add("read", tensor)
                    if _covers(tensor):
                        del self._written[storage._cdata]

    def _wrote(self, args: tuple[Any, ...], kwargs: dict[str, Any], effects: _Effects, result: Any) -> None:
        """Note the storages that were written to, unless what the operation returns shows all of them."""
        written = [args[position] for position in effects.writes if position < len(args)]
        for tensor in _tensors([*written, *kwargs.values()] if result is None else result):
            if result is None or not _covers(tensor):
                storage = tensor.untyped_storage()
                self._written[storage._cdata] = storage


@dataclass(frozen=True, slots=True)
class _Effects:
    """Of an operation: argument positions that it writes to; whether it returns a view, or memory that holds nothing
    yet."""

    writes: frozenset[int]
    view: bool
    uninitialised: bool


@cache
def _effects(func: Any) -> _Effects:
    aliases = [argument.alias_info for argument in func._schema.arguments]
    writes = frozenset(i for i, alias in enumerate(aliases) if alias is not None and alias.is_write)
    view = func in _VIEWS or (not writes and any(aliases) and func not in _NOT_VIEWS)
    return _Effects(writes, view, func.overloadpacket.__name__ in _UNINITIALISED)


def _shows_the_same(base: Tensor, view: Any) -> bool:
    """Whether a view only reshapes a tensor that was recorded when it was made (or will be when it is read)."""
    same_size = isinstance(view, Tensor) and view.numel() == base.numel()
    return same_size and view.is_contiguous() and base.is_contiguous()


def _covers(tensor: Tensor) -> bool:
    """Whether a tensor is all of its storage."""
    return tensor.numel() * tensor.element_size() >= tensor.untyped_storage().nbytes()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The strided tensors in a value or in (nested) lists and tuples."""
    if isinstance(value, Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
