"""Under TrueDouble every construct that names, or silently means, a low precision computes in float64.

A float32 detour leaves a relative error near 6e-8; float64 leaves 1e-16.  The expected values are Python floats, or
float64 tensors computed outside the mode from operations that name float64.
"""

import copy
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from conformance.oracles import true_double
from conformance.oracles.true_double import TrueDouble

LOW = [torch.float32, torch.float16, torch.bfloat16]
TENTH = 0.1  # no binary fraction: float32(0.1) is 1.5e-9 off


def exact(*shape: int) -> Tensor:
    """Values that float64 holds and float32 does not."""
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape) / 7


def leak(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A low-precision tensor from outside the mode; every value is exact in bfloat16."""
    return (torch.arange(math.prod(shape)) % 13 - 5).reshape(shape).to(dtype) / 4


def assert_exact(actual: Tensor, expected: Tensor | float | list[float]) -> None:
    assert actual.dtype in (torch.float64, torch.complex128)
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-15, atol=1e-16)


FACTORIES: dict[str, Callable[[], Tensor]] = {
    "tensor": lambda: torch.tensor([TENTH]),
    "tensor dtype": lambda: torch.tensor([TENTH], dtype=torch.float32),
    "tensor of numpy scalar": lambda: torch.tensor([np.float64(TENTH)], dtype=torch.float32),
    "as_tensor": lambda: torch.as_tensor([TENTH], dtype=torch.float32),
    "asarray": lambda: torch.asarray([TENTH], dtype=torch.float32),
    "asarray of double array": lambda: torch.asarray(np.array([TENTH]), dtype=torch.float32),
    "legacy Tensor": lambda: torch.Tensor([TENTH]),
    "legacy FloatTensor": lambda: torch.FloatTensor([TENTH]),
    "legacy HalfTensor": lambda: torch.HalfTensor([TENTH]),
    "legacy BFloat16Tensor": lambda: torch.BFloat16Tensor([TENTH]),
    "full": lambda: torch.full((1,), TENTH),
    "full dtype": lambda: torch.full((1,), TENTH, dtype=torch.bfloat16),
    "full_like dtype": lambda: torch.full_like(torch.zeros(1, dtype=torch.int64), TENTH, dtype=torch.float32),
    "linspace": lambda: torch.linspace(0, 1, 11)[1:2],
    "linspace dtype": lambda: torch.linspace(0, 1, 11, dtype=torch.float32)[1:2],
    "logspace dtype": lambda: torch.logspace(-1, 1, 3, dtype=torch.float32)[:1],
    "arange dtype": lambda: torch.arange(0, 1, TENTH, dtype=torch.float32)[1:2],
    "scalar_tensor": lambda: torch.scalar_tensor(TENTH, dtype=torch.float32)[None],
    "new_tensor": lambda: torch.zeros(1, dtype=torch.int64).new_tensor([TENTH], dtype=torch.float32),
    "new_full": lambda: torch.zeros(1, dtype=torch.int64).new_full((1,), TENTH, dtype=torch.float32),
    "zeros then fill": lambda: torch.zeros(1, dtype=torch.float32).fill_(TENTH),
    "empty out=": lambda: torch.full((1,), TENTH, out=torch.empty(1, dtype=torch.float32)),
    "nn.Parameter": lambda: nn.Parameter(torch.full((1,), TENTH, dtype=torch.float32)),
    "division of integers": lambda: torch.tensor([1]) / torch.tensor([10]),
    "float of one_hot": lambda: F.one_hot(torch.tensor([0]), 1).float()[0] / 10,
    "aten operation": lambda: torch.ops.aten.full([1], TENTH, dtype=torch.float32),
}


@pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)
def test_factory_keeps_the_double_value(make: Callable[[], Tensor]) -> None:
    with TrueDouble():
        assert_exact(make(), [TENTH])


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "to": lambda x: x.to(torch.float32),
    "to keyword": lambda x: x.to(dtype=torch.bfloat16),
    "to device and dtype": lambda x: x.to("cpu", torch.float32),
    "to low tensor": lambda x: x.to(leak(2)),
    "type dtype": lambda x: x.type(torch.float32),
    "type name": lambda x: x.type("torch.FloatTensor"),
    "type name keyword": lambda x: x.type(dtype="torch.HalfTensor"),
    "type class": lambda x: x.type(LEGACY_CLASS),
    "type_as low tensor": lambda x: x.type_as(leak(2)),
    "copy into new": lambda x: torch.empty(x.shape, dtype=torch.float32).copy_(x),
    "Module.to": lambda x: module_of(x).to(torch.float32).weight,
    "Module.half": lambda x: module_of(x).half().weight,
    "Module.type": lambda x: module_of(x).type(torch.bfloat16).weight,
    "aten operation": lambda x: torch.ops.aten._to_copy(x, dtype=torch.float32),
    "view as own dtype": lambda x: x.view(torch.float32),
    "numpy round trip": lambda x: torch.from_numpy(x.float().detach().numpy()),
}
LEGACY_CLASS = torch.FloatTensor  # taken before the mode redirects the name


def module_of(x: Tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(x.clone())
    return module


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_cast_rounds_nothing(cast: Callable[[Tensor], Tensor]) -> None:
    with TrueDouble():
        assert_exact(cast(exact(5)), exact(5))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_each_low_dtype_means_double(dtype: torch.dtype) -> None:
    with TrueDouble():
        assert torch.zeros(3, dtype=dtype).dtype is torch.float64


OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softmax dtype": (lambda x: F.softmax(x, -1, dtype=torch.float32), lambda x: x.softmax(-1)),
    "Tensor.softmax dtype": (lambda x: x.softmax(-1, torch.float32), lambda x: x.softmax(-1)),
    "log_softmax dtype": (lambda x: F.log_softmax(x, -1, dtype=torch.float32), lambda x: x.log_softmax(-1)),
    "cumsum dtype": (lambda x: torch.cumsum(x, -1, dtype=torch.float32), lambda x: x.cumsum(-1)),
    "sum dtype": (lambda x: x.sum(-1, dtype=torch.float32), lambda x: x.sum(-1)),
    "mean dtype": (lambda x: x.mean(-1, dtype=torch.float32), lambda x: x.mean(-1)),
    "norm dtype": (lambda x: torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32), lambda x: x.norm(dim=-1)),
    "index by tuple": (lambda x: x.float()[(slice(None), 0)], lambda x: x[:, 0]),
    "autocast": (lambda x: autocast_matmul(x), lambda x: x @ x.mT),
    "scripted function": (lambda x: scripted(x, name="scale"), lambda x: x * TENTH + TENTH),
    "checkpoint": (lambda x: checkpoint(lambda y: y.float().exp(), x, use_reentrant=False), lambda x: x.exp()),
    "vmap": (lambda x: torch.func.vmap(lambda row: row.float().softmax(-1))(x), lambda x: x.softmax(-1)),
}


def autocast_matmul(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x.float() @ x.float().mT


SCRIPT = """
def scale(x: Tensor):
    return x.to(torch.float32) * 0.1 + torch.full([1], 0.1, dtype=torch.float32)

def multiply(x: Tensor, y: Tensor):
    return x @ y
"""


def scripted(*args: Tensor, name: str) -> Tensor:
    result: Tensor = getattr(torch.jit.CompilationUnit(SCRIPT), name)(*args)
    return result


@pytest.mark.parametrize(("operation", "expected"), OPERATIONS.values(), ids=OPERATIONS)
def test_operation_accumulates_in_double(
    operation: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor]
) -> None:
    x = exact(3, 5) / 5
    with TrueDouble():
        actual = operation(x)
    assert actual.dtype is torch.float64
    torch.testing.assert_close(actual, expected(x), rtol=1e-14, atol=0)


def buffered(x: Tensor) -> Tensor:
    module = nn.Module()
    module.register_buffer("buffer", x)
    buffer: Tensor = module.buffer
    return buffer


def set_items(x: Tensor) -> Tensor:
    x[1:] = torch.full((3,), TENTH)
    return x


def attended(mask: Tensor) -> Tensor:
    query = exact(1, 1, 4, 4).float()
    return F.scaled_dot_product_attention(query, query, query, attn_mask=mask.expand(4, 4))


def attended_in_double(mask: Tensor) -> Tensor:
    query = exact(1, 1, 4, 4)
    return (query @ query.mT / 2 + mask).softmax(-1) @ query


# What is done with a low-precision tensor from outside the mode, and the same in float64.
LEAKS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "argument": (lambda x: x * TENTH, lambda x: x * TENTH),
    "in a list": (lambda x: torch.cat([x, x]) * TENTH, lambda x: torch.cat([x, x]) * TENTH),
    "in a nested list": (lambda x: torch.block_diag(*[x, x]) / 7, lambda x: torch.block_diag(x, x) / 7),
    "keyword": (lambda x: torch.exp(input=x), torch.exp),
    "Parameter": (lambda x: nn.Parameter(x) / 7, lambda x: x / 7),
    "buffer": (lambda x: buffered(x) / 7, lambda x: x / 7),
    "detached": (lambda x: x.detach().exp(), torch.exp),
    "data": (lambda x: x.data.exp(), torch.exp),
    "deepcopy": (lambda x: copy.deepcopy(x).exp(), torch.exp),
    "in-place": (lambda x: x.div_(7), lambda x: x / 7),
    "out=": (lambda x: torch.div(exact(4), 7, out=x), lambda x: exact(4) / 7),
    "out= in a tuple": (lambda x: torch.sort(exact(4), out=(x, torch.arange(4)))[0], lambda x: exact(4)),
    "argument of a scripted function": (lambda x: scripted(exact(3, 4), x, name="multiply"), lambda x: exact(3, 4) @ x),
    "in-place on a view": (lambda x: (x[1:].div_(7), x)[1], lambda x: x / torch.tensor([1, 7, 7, 7])),
    "setitem": (set_items, lambda x: torch.where(torch.arange(4) < 1, x, TENTH)),
    "mixed with double": (lambda x: x[:, None] @ exact(1, 4), lambda x: x[:, None] @ exact(1, 4)),
    "attention mask": (attended, attended_in_double),
    "from_dlpack": (lambda x: torch.from_dlpack(x).exp(), torch.exp),
    "linear": (lambda x: F.linear(exact(2, 4), x[None]), lambda x: F.linear(exact(2, 4), x[None])),
    "view as complex": (lambda x: x.view(torch.complex64).abs(), lambda x: x.view(torch.complex128).abs()),
}


@pytest.mark.parametrize(("operation", "expected"), LEAKS.values(), ids=LEAKS)
def test_leaked_tensor_is_double(operation: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor]) -> None:
    x = leak(4)
    want = expected(x.double())
    with TrueDouble():
        assert_exact(operation(x), want)


def test_leaked_tensors_that_share_storage_go_on_sharing_it() -> None:
    base = leak(4)
    view = base[2:]
    with TrueDouble():
        view.fill_(TENTH)
        assert_exact(base, [-1.25, -1.0, TENTH, TENTH])


def test_leaked_tensor_that_was_only_read_is_given_back() -> None:
    x = leak(4)
    with TrueDouble():
        assert x.dtype is torch.float64
    assert x.dtype is torch.float32
    torch.testing.assert_close(x, leak(4), rtol=0, atol=0)


def test_leaked_tensor_with_nan_is_given_back() -> None:
    x = torch.tensor([math.nan, 1.0])
    with TrueDouble():
        assert x.dtype is torch.float64
    assert x.dtype is torch.float32


def test_leaked_sparse_tensor_is_double() -> None:
    sparse = leak(3, 4).to_sparse()
    with TrueDouble():
        assert_exact(torch.sparse.mm(sparse, exact(4, 2)), leak(3, 4).double() @ exact(4, 2))


def test_leaked_tensor_that_was_written_to_is_not_rounded() -> None:
    x = leak(4)
    with TrueDouble():
        x.fill_(TENTH)
    assert_exact(x, [TENTH] * 4)


def test_leaked_parameter_receives_a_double_gradient() -> None:
    weight = nn.Parameter(leak(4))
    with TrueDouble():
        (weight * exact(4)).sum().backward()
    assert weight.grad is not None
    assert_exact(weight.grad, exact(4))


def test_leaked_gradient_is_accumulated_in_double() -> None:
    weight = nn.Parameter(leak(4))
    weight.sum().backward()
    with TrueDouble():
        (weight * exact(4)).sum().backward()
        assert weight.grad is not None
        assert_exact(weight.grad, exact(4) + 1)


def test_low_precision_module_from_outside_computes_in_double() -> None:
    module = nn.LSTM(4, 3)
    state = {name: value.double() for name, value in module.state_dict().items()}
    truth = nn.LSTM(4, 3, dtype=torch.float64)
    truth.load_state_dict(state)
    with TrueDouble():
        assert_exact(module(exact(2, 1, 4))[0], truth(exact(2, 1, 4))[0])


@pytest.mark.parametrize("load", ["torch.load", "safetensors.load_file", "safetensors.load", "frombuffer"])
def test_file_is_read_with_its_own_dtype(load: str, tmp_path: Path) -> None:
    path, tensors = tmp_path / "weights", {"a": leak(3), "b": leak(2, 3, dtype=torch.bfloat16)}
    if load == "torch.load":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    with TrueDouble():
        read = {
            "torch.load": lambda: torch.load(path),
            "safetensors.load_file": lambda: safetensors.torch.load_file(path),
            "safetensors.load": lambda: safetensors.torch.load(path.read_bytes()),
            "frombuffer": lambda: {"a": torch.frombuffer(bytearray(path.read_bytes()[-24:-12]), dtype=torch.float32)},
        }[load]()
        assert_exact(read["a"], tensors["a"].double())
        assert_exact(read.get("b", tensors["b"]), tensors["b"].double())


@pytest.mark.parametrize(
    "nothing",
    [lambda: torch.empty((0,), dtype=torch.float32), lambda: torch.tensor([], dtype=torch.float32)],
    ids=["empty", "tensor"],
)
def test_empty_tensor_that_is_told_where_its_bytes_are(nothing: Callable[[], Tensor]) -> None:
    storage = leak(3).untyped_storage()
    with TrueDouble():
        assert_exact(nothing().set_(storage), leak(3).double())


def test_array_of_float32_is_double() -> None:
    with TrueDouble():
        assert_exact(torch.from_numpy(np.array([0.5, 0.25], np.float32)) / 7, torch.tensor([0.5, 0.25]).double() / 7)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex32], ids=str)
def test_complex_rotation_is_double(dtype: torch.dtype) -> None:
    angle = exact(4)
    with TrueDouble():
        rotation = torch.polar(torch.ones_like(angle, dtype=torch.float32), angle.float()).to(dtype)
        turned = torch.view_as_real(torch.view_as_complex(exact(4, 2).float()) * rotation)
    cos, sin, (x, y) = angle.cos(), angle.sin(), exact(4, 2).unbind(-1)
    assert_exact(turned, torch.stack([x * cos - y * sin, x * sin + y * cos], -1))


@pytest.mark.parametrize("cast", [lambda x: x.cfloat(), lambda x: x.chalf()], ids=["cfloat", "chalf"])
def test_complex_cast_is_double(cast: Callable[[Tensor], Tensor]) -> None:
    with TrueDouble():
        assert_exact(cast(exact(4)), exact(4).to(torch.complex128))


def test_random_draw_of_a_low_dtype_is_double() -> None:
    with TrueDouble():
        draw = torch.rand(64, dtype=torch.float32)
    assert not torch.equal(draw, draw.float().double())


def test_default_dtype_set_inside_is_overruled() -> None:
    with TrueDouble():
        torch.set_default_dtype(torch.float32)
        assert_exact(torch.tensor([TENTH]), [TENTH])


def test_cast_aliases_as_in_a_float32_run() -> None:
    with TrueDouble():
        x = torch.zeros(2, dtype=torch.float32)
        x.float().add_(1)
        x.to(torch.float32).add_(1)
        assert_exact(x, [2.0, 2.0])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float64, torch.uint8], ids=str)
def test_other_dtypes_are_untouched(dtype: torch.dtype) -> None:
    with TrueDouble():
        assert torch.ones(2, dtype=dtype).dtype is dtype
        assert torch.ones(2).to(dtype).dtype is dtype


def test_bits_of_integers_are_still_read_as_float32() -> None:
    bits = torch.tensor([0x3F000000], dtype=torch.int32)  # 0.5
    with TrueDouble():
        assert_exact(bits.view(torch.float32) / 7, [0.5 / 7])


def test_bits_of_a_leaked_tensor_are_its_own() -> None:
    half = torch.tensor([0.5])
    with TrueDouble():
        assert half.view(torch.int32).item() == 0x3F000000


def test_backward_through_low_casts_is_double() -> None:
    def loss(x: Tensor) -> Tensor:
        return (x.to(torch.float32).softmax(-1, dtype=torch.float32) * exact(5)).sum()

    x = exact(5).requires_grad_()
    with TrueDouble():
        loss(x).backward()
    truth = exact(5).requires_grad_()
    (truth.softmax(-1) * exact(5)).sum().backward()
    assert x.grad is not None
    assert truth.grad is not None
    torch.testing.assert_close(x.grad, truth.grad, rtol=1e-14, atol=1e-15)


def test_optimizer_steps_in_double() -> None:
    weight = nn.Parameter(leak(4))
    with TrueDouble():
        (weight * exact(4)).sum().backward()
        torch.optim.SGD([weight], lr=TENTH).step()
        assert_exact(weight, leak(4).double() - TENTH * exact(4))


class LowNorm(nn.Module):
    """A normalisation as Hugging Face writes it: computes in float32, whatever the model's dtype."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), TENTH, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        given = x.dtype
        x = x.to(torch.float32)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(given)


def test_module_with_hard_coded_casts_is_exact_where_double_is_not() -> None:
    x = exact(3, 5)
    truth = TENTH * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    with TrueDouble():
        assert_exact(LowNorm(5)(x), truth)
    assert (LowNorm(5).double()(x) - truth).abs().max() > 1e-10


def test_everything_is_undone_on_exit() -> None:
    with TrueDouble():
        pass
    assert torch.get_default_dtype() is torch.float32
    assert torch.FloatTensor is LEGACY_CLASS
    assert torch.zeros(1, dtype=torch.float16).dtype is torch.float16
    assert torch.zeros(1).dtype is torch.float32


def test_everything_is_undone_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), TrueDouble():
        raise ZeroDivisionError
    assert torch.zeros(1).dtype is torch.float32


def test_default_dtype_of_the_caller_comes_back() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with TrueDouble():
            assert torch.zeros(1).dtype is torch.float64
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_threads_that_overlap_leave_the_default_dtype_as_it_was() -> None:
    """The first to enter is the first to leave."""
    entered, left = threading.Event(), threading.Event()
    seen: list[torch.dtype] = []

    def second() -> None:
        with TrueDouble():
            entered.set()
            left.wait(10)
            seen.append(torch.get_default_dtype())

    with TrueDouble():
        thread = threading.Thread(target=second)
        thread.start()
        assert entered.wait(10)
    left.set()
    thread.join()
    assert seen == [torch.float64]
    assert torch.get_default_dtype() is torch.float32
    assert torch.FloatTensor is LEGACY_CLASS


@pytest.mark.parametrize("inner_is_outer", [True, False])
def test_nested_mode_leaves_the_outer_one_in_force(inner_is_outer: bool) -> None:
    outer = TrueDouble()
    with outer:
        with outer if inner_is_outer else TrueDouble():
            assert torch.zeros(1).dtype is torch.float64
        assert_exact(torch.tensor([TENTH], dtype=torch.float32), [TENTH])
    assert torch.zeros(1).dtype is torch.float32


def test_mode_can_be_used_again() -> None:
    mode = TrueDouble()
    for _ in range(2):
        with mode:
            assert torch.zeros(1, dtype=torch.float32).dtype is torch.float64
        assert torch.zeros(1).dtype is torch.float32


# --- functions that go past the dispatch mode -------------------------------------------------------------------------

X, Y, INDEX = exact(2, 3, 4), exact(2, 4, 3), torch.tensor([1, 0])
WHOLE, YES = torch.arange(24).reshape(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)
# What each is called with; some are called with integers too, since that is where C++ takes the default dtype.
CLOSED: dict[str, list[Callable[[], Any]]] = {}


def called_with(names: str, *samples: tuple[Any, ...]) -> None:
    """Methods of Tensor, each to be called with each of these."""
    for name in names.split():
        CLOSED.setdefault(name, []).extend(
            lambda name=name, with_=with_: getattr(Tensor, name)(*with_) for with_ in samples
        )


called_with("neg square relu sum mean flatten clone detach nonzero unbind", (X,))
called_with("sqrt exp sin cos tanh sigmoid", (X,), (WHOLE,))
called_with("add sub mul div pow eq ne lt le gt ge", (X, X + 1), (WHOLE, 2.5))
called_with("matmul bmm", (X, Y))
called_with("__and__ __or__", (YES, YES))
CLOSED["sum"] += [lambda: WHOLE.sum(-1), lambda: WHOLE.sum(dtype=torch.float64)]
CLOSED["mean"] += [lambda: WHOLE.mean(-1, dtype=torch.float64)]
CLOSED |= {
    "to": [lambda: X.to(torch.float64, copy=True), lambda: WHOLE.to(X), lambda: YES.to("cpu", torch.float64)],
    "unsqueeze": [lambda: X.unsqueeze(0)],
    "expand": [lambda: X[:1].expand(2, -1, -1)],
    "contiguous": [lambda: X.transpose(0, 1).contiguous()],
    "softmax": [lambda: X.softmax(-1), lambda: WHOLE.softmax(-1, dtype=torch.float64)],
    "clamp": [lambda: X.clamp(min=1.0), lambda: WHOLE.clamp(0.5, 2)],
    "cumsum": [lambda: X.cumsum(-1), lambda: WHOLE.cumsum(0)],
    "mm": [lambda: X[0].mm(Y[0])],
    "__invert__": [lambda: ~YES],
    "__getitem__": [lambda: X[0], lambda: X[INDEX], lambda: X[YES], lambda: X[..., None, 1:3]],
    "__setitem__": [lambda: X.clone().__setitem__(0, 0.1), lambda: X.clone().__setitem__(YES, X.view(-1))],
    "view": [lambda: X.view(-1)],
    "reshape": [lambda: X.transpose(0, 1).reshape(-1)],
    "transpose": [lambda: X.transpose(0, 1)],
    "permute": [lambda: X.permute(2, 0, 1)],
    "squeeze": [lambda: X[:1].squeeze(0)],
    "chunk": [lambda: X.chunk(2, -1)],
    "split": [lambda: X.split(2, -1), lambda: X.split([1, 3], -1)],
    "masked_fill": [lambda: X.masked_fill(YES, -math.inf)],
    "repeat_interleave": [lambda: X.repeat_interleave(2, 1), lambda: X.repeat_interleave(INDEX, 0)],
    "index_put": [lambda: X.index_put((INDEX,), X)],
    "index_add_": [lambda: X.clone().index_add_(0, INDEX, X)],
    "gather": [lambda: X.gather(0, WHOLE[:1] * 0)],
    "topk": [lambda: X.topk(2)],
    "torch.add": [lambda: torch.add(X, X), lambda: torch.add(WHOLE, 0.1)],
    "torch.mul": [lambda: torch.mul(X, X), lambda: torch.mul(WHOLE, 0.1)],
    "torch.matmul": [lambda: torch.matmul(X, Y)],
    "torch.bmm": [lambda: torch.bmm(X, Y)],
    "torch.addmm": [lambda: torch.addmm(X[0, 0, :3], X[0], Y[0])],
    "torch.where": [lambda: torch.where(YES, X, 0.1), lambda: torch.where(YES, 0.1, 0.2), lambda: torch.where(YES)],
    "torch.rsqrt": [lambda: torch.rsqrt(X), lambda: torch.rsqrt(WHOLE + 1)],
    "torch.cat": [lambda: torch.cat([X, X]), lambda: torch.cat([X, WHOLE])],
    "torch.stack": [lambda: torch.stack([X, X])],
    "torch.softmax": [lambda: torch.softmax(X, -1), lambda: torch.softmax(WHOLE, -1, dtype=torch.float64)],
    "torch.outer": [lambda: torch.outer(X[0, 0], Y[0, 0])],
    "torch.empty": [lambda: torch.empty(2, 3), lambda: torch.empty((2,), dtype=torch.float64)],
    "torch.zeros": [lambda: torch.zeros(2, 3), lambda: torch.zeros(2, dtype=torch.int64)],
    "torch.ones": [lambda: torch.ones(2, 3), lambda: torch.ones(2, dtype=torch.bool)],
    "torch.arange": [lambda: torch.arange(3), lambda: torch.arange(0, 1, 0.25)],
    "F.linear": [lambda: F.linear(X, Y[0].T, Y[0, 0]), lambda: F.linear(X[0], Y[0].T)],
    "F.embedding": [lambda: F.embedding(INDEX, X[0], padding_idx=0)],
    "F.silu": [lambda: F.silu(X)],
    "F.gelu": [lambda: F.gelu(X), lambda: F.gelu(X, approximate="tanh")],
    "F.relu": [lambda: F.relu(X)],
    "F.softmax": [lambda: F.softmax(X, -1), lambda: F.softmax(X, -1, dtype=torch.float64)],
    "F.layer_norm": [lambda: F.layer_norm(X, (4,), X[0, 0], X[0, 0])],
}


class Operations(TorchDispatchMode):
    """Collects the dtypes of everything that C++ is given and gives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            self.dtypes |= {value} if isinstance(value, torch.dtype) else {getattr(value, "dtype", torch.int64)}
        return result


class Called(TorchFunctionMode):
    """Collects the functions that Python code calls."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.add(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CLOSED)
def test_what_goes_past_the_dispatch_mode_asks_for_no_low_precision(name: str) -> None:
    """Outside the mode, but with its default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        for call in CLOSED[name]:
            with Operations() as seen:
                call()
            assert seen.dtypes, "no operation was seen"
            assert not seen.dtypes & set(true_double.PROMOTED)
    finally:
        torch.set_default_dtype(torch.float32)


def test_every_function_that_goes_past_the_dispatch_mode_is_tried() -> None:
    called = Called()
    with called:
        for calls in CLOSED.values():
            for call in calls:
                call()
    assert not true_double._CLOSED - called.functions


def test_a_tensor_without_memory_may_come_from_outside() -> None:
    outside = torch.empty(2, 3, device="meta")
    with TrueDouble():
        assert (outside + 1).dtype is torch.float64
    assert outside.dtype is torch.float32


def test_autocast_is_overruled() -> None:
    with TrueDouble(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_exact(F.linear(exact(2, 3), exact(2, 3)), exact(2, 3) @ exact(2, 3).T)


def test_another_dispatch_mode_sees_every_operation() -> None:
    with TrueDouble(), Operations() as seen:
        exact(2, 3).add(1)
    assert torch.float64 in seen.dtypes


class Logged(Tensor):
    """A tensor whose operations are its own affair, as a DTensor's are."""

    seen: ClassVar[list[str]] = []
    value: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, value: Tensor) -> Any:
        wrapper = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype)
        wrapper.value = value
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func._overloadpacket.__name__)
        return func(*tree_map_only(Logged, lambda wrapper: wrapper.value, args), **(kwargs or {}))


def test_a_tensor_with_a_dispatch_of_its_own_keeps_it() -> None:
    wrapped = Logged(exact(2, 3))
    Logged.seen.clear()
    with TrueDouble():
        torch.add(wrapped, 1)
        torch.stack([wrapped, wrapped])
    assert Logged.seen == ["add", "stack"]
