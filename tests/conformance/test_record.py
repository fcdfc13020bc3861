"""The recorder copies, in order, every floating tensor that an operation makes, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from conformance.oracles.true_double import TrueDouble
from conformance.record import Recorder


def values(*shape: int, start: int = 1) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.arange(start, start + count, dtype=torch.float64).reshape(shape) / 7


def holds(recorder: Recorder, expected: Tensor) -> bool:
    """Whether some record has this shape and exactly these values."""
    return any(r.shape == tuple(expected.shape) and torch.equal(r.value, expected) for r in recorder.records)


def test_results_are_recorded_in_the_order_of_the_operations() -> None:
    x = values(2, 5)
    with Recorder() as recorder:
        (x + 1).exp()
    assert [record.op for record in recorder.records] == ["aten.add.Tensor", "aten.exp.default"]
    assert [torch.equal(a, b) for a, b in zip(recorder.tensors, [x + 1, (x + 1).exp()], strict=True)] == [True, True]


def test_record_is_a_copy_that_in_place_operations_do_not_change() -> None:
    with Recorder() as recorder:
        x = values(2, 5) + 1
        x += 100
    assert holds(recorder, values(2, 5) + 1)
    assert holds(recorder, values(2, 5) + 1 + 100)


def test_record_is_contiguous_in_the_shape_of_the_result() -> None:
    with Recorder() as recorder:
        values(3, 4).transpose(0, 1)
    assert recorder.records[-1].shape == (4, 3)
    assert recorder.records[-1].value.is_contiguous()
    assert holds(recorder, values(3, 4).T)


def test_record_is_double_where_the_program_asks_for_float32() -> None:
    with Recorder() as recorder:
        values(2, 5).to(torch.float32).exp()
    assert holds(recorder, values(2, 5).exp())


def test_record_has_no_graph() -> None:
    with Recorder() as recorder:
        values(2, 5).requires_grad_().exp()
    assert not any(tensor.requires_grad for tensor in recorder.tensors)


def test_backward_is_recorded_too() -> None:
    x = values(2, 5).requires_grad_()
    with Recorder() as recorder:
        (x * values(2, 5, start=20)).sum().backward()
    assert holds(recorder, values(2, 5, start=20))


def test_complex_is_recorded_as_pairs() -> None:
    angle = values(2, 4)
    with Recorder() as recorder:
        torch.polar(torch.ones_like(angle), angle).conj()
    assert holds(recorder, torch.stack([angle.cos(), angle.sin()], -1))
    assert holds(recorder, torch.stack([angle.cos(), -angle.sin()], -1))


def test_every_result_of_an_operation_is_recorded() -> None:
    x = values(4, 6)
    with Recorder() as recorder:
        x.split(2, dim=1)
    assert [record.shape for record in recorder.records] == [(4, 2)] * 3


@pytest.mark.parametrize("run", [lambda: torch.arange(20).cumsum(0), lambda: torch.arange(20) > 3], ids=["int", "bool"])
def test_integers_are_not_recorded(run: Callable[[], Tensor]) -> None:
    with Recorder() as recorder:
        run()
    assert recorder.records == []


@pytest.mark.parametrize(("numel", "expected"), [(7, 0), (8, 1)])
def test_small_tensors_are_not_recorded(numel: int, expected: int) -> None:
    x = values(numel)
    with Recorder() as recorder:
        x.exp()
    assert len(recorder.records) == expected


def test_smallest_size_can_be_chosen() -> None:
    x = values(3)
    with Recorder(min_numel=3) as recorder:
        x.exp()
    assert len(recorder.records) == 1


def test_reshaping_a_recorded_tensor_records_nothing_new() -> None:
    x = values(2, 12)
    with Recorder() as recorder:
        x.exp().view(2, 3, 4).unsqueeze(0).detach()
    assert len(recorder.records) == 1


def test_part_of_a_tensor_is_recorded() -> None:
    x = values(4, 6)
    with Recorder() as recorder:
        x[:2].neg()
    assert holds(recorder, values(4, 6)[:2])


def test_view_that_straightens_a_transposed_tensor_is_recorded() -> None:
    x = values(4, 3).T
    with Recorder() as recorder:
        x.transpose(0, 1)
    assert holds(recorder, values(4, 3))


def test_tensor_changed_as_a_whole_is_recorded_once_for_each_change() -> None:
    with Recorder() as recorder:
        x = values(2, 5) + 1
        x += 1
        x.exp()
    assert [record.op for record in recorder.records[-3:]] == [
        "aten.add.Tensor",
        "aten.add_.Tensor",
        "aten.exp.default",
    ]


def test_linear_layer_is_recorded_once() -> None:
    x, weight = values(2, 3, 5), values(4, 5)
    with Recorder() as recorder:
        torch.matmul(x, weight.mT)
    assert sum(torch.equal(t.flatten(), (x @ weight.mT).flatten()) for t in recorder.tensors) == 1


def test_constant_of_the_program_is_recorded() -> None:
    with Recorder() as recorder:
        torch.tensor([TENTH * i for i in range(9)])
    assert holds(recorder, torch.tensor([TENTH * i for i in range(9)], dtype=torch.float64))


TENTH = 0.1


def filled(x: Tensor, write: Callable[[Tensor, int, Tensor], object]) -> Tensor:
    states = torch.zeros_like(x)
    for t in range(x.shape[1]):
        write(states, t, x[:, t] * 3)
    return states


WRITES: dict[str, Callable[[Tensor, int, Tensor], object]] = {
    "setitem": lambda states, t, h: states.__setitem__((slice(None), t), h),
    "select and copy": lambda states, t, h: states.select(1, t).copy_(h),
    "narrow and add": lambda states, t, h: states[:, t : t + 1].add_(h[:, None]),
    "out=": lambda states, t, h: torch.mul(h, 1, out=states[:, t]),
    "foreach": lambda states, t, h: torch._foreach_add_([states[:, t]], [h]),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_buffer_that_was_filled_piece_by_piece_is_recorded_when_it_is_read(
    write: Callable[[Tensor, int, Tensor], object],
) -> None:
    with Recorder() as recorder:
        filled(values(2, 3, 4), write).exp()
    assert holds(recorder, values(2, 3, 4) * 3)
    assert [record.op for record in recorder.records].count("read") == 1


def test_what_a_foreach_operation_only_reads_is_not_taken_for_written() -> None:
    """Its operands are lists; a freed operand's address may be the next tensor's."""
    states, operand = torch.zeros(3, 4, dtype=torch.float64), values(3, 4)
    with Recorder() as recorder:
        torch._foreach_add_([states], [operand])
        operand.exp()
    assert [record.op for record in recorder.records].count("read") == 0


MAKERS: list[Callable[[Tensor], Tensor]] = [
    lambda x: torch.empty(3, 4),
    torch.empty_like,
    lambda x: x.new_empty(3, 4),
    lambda x: torch.empty_strided((3, 4), (4, 1)),
]


@pytest.mark.parametrize("make", MAKERS)
def test_memory_that_holds_nothing_yet_is_not_recorded(make: Callable[[Tensor], Tensor]) -> None:
    """It may hold the values of a tensor that was freed there: a probe would match by accident."""
    x = values(3, 4)
    with Recorder() as recorder:
        buffer = make(x)
        assert not recorder.records
        buffer.copy_(x)
        buffer + 1
    assert holds(recorder, x)


def test_buffer_is_recorded_when_it_is_read_through_a_view() -> None:
    with Recorder() as recorder:
        filled(values(2, 3, 4), WRITES["setitem"]).view(6, 4).exp()
    assert holds(recorder, (values(2, 3, 4) * 3).view(6, 4))


def test_buffer_is_recorded_although_a_part_of_it_was_read_before() -> None:
    with Recorder() as recorder:
        states = filled(values(2, 3, 4), WRITES["setitem"])
        states[:, -1].exp()
        states.exp()
    assert holds(recorder, values(2, 3, 4) * 3)


def test_buffer_is_recorded_when_an_in_place_operation_reads_it() -> None:
    with Recorder() as recorder:
        states = filled(values(2, 3, 4), WRITES["setitem"])
        torch.ones(2, 3, 4).add_(states)
    assert holds(recorder, values(2, 3, 4) * 3)


def test_tensor_that_an_operation_changed_and_did_not_return_is_recorded() -> None:
    x = values(2, 5)
    with Recorder() as recorder:
        torch._foreach_exp_([x])
        x.neg()
    assert holds(recorder, values(2, 5).exp())


def test_recording_inside_true_double() -> None:
    x = values(2, 5)
    with TrueDouble(), Recorder() as recorder:
        x.to(torch.float32).exp()
    assert holds(recorder, values(2, 5).exp())


def test_buffer_is_recorded_from_a_list() -> None:
    with Recorder() as recorder:
        states = filled(values(2, 3, 4), WRITES["setitem"])
        torch.cat([states, states])
    assert holds(recorder, values(2, 3, 4) * 3)


def test_caller_adds_what_no_operation_returned() -> None:
    with Recorder() as recorder:
        states = filled(values(2, 3, 4), WRITES["setitem"])
    assert not holds(recorder, values(2, 3, 4) * 3)
    recorder.add("result", states.requires_grad_())
    assert holds(recorder, values(2, 3, 4) * 3)
    assert not recorder.records[-1].value.requires_grad


def test_nothing_is_recorded_outside() -> None:
    with Recorder() as recorder:
        pass
    values(2, 5).exp()
    assert recorder.records == []


def test_recording_stops_at_the_memory_limit_and_says_so() -> None:
    x = values(10)
    with Recorder(max_bytes=2 * 10 * 8) as recorder:
        y = x.exp().exp()
        assert not recorder.truncated
        y = y.neg()
    assert len(recorder.records) == 2
    assert recorder.truncated
    torch.testing.assert_close(y, -x.exp().exp())


def test_mode_is_undone_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), Recorder():
        raise ZeroDivisionError
    assert torch.zeros(1).dtype is torch.float32


def test_recurrent_layer_is_recorded() -> None:
    layer = nn.LSTM(4, 3, dtype=torch.float64)
    x = values(5, 2, 4)
    with Recorder() as recorder:
        layer(x)
    assert holds(recorder, layer(x)[0].detach())


def test_of_a_buffer_that_is_read_half_written_the_rest_is_zero() -> None:
    """Not what was freed there, which may be the very values that are looked for; torch fills it with NaN here."""
    torch.use_deterministic_algorithms(True)
    try:
        with Recorder() as recorder:
            buffer = torch.empty(2, 8)
            buffer[0] = 1.0
            buffer * 2
    finally:
        torch.use_deterministic_algorithms(False)
    assert recorder.tensors[-2].equal(torch.tensor([[1.0] * 8, [0.0] * 8], dtype=torch.float64))
