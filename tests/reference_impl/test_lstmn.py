import pytest
import torch
from torch import Tensor, nn

from reference_impl.nn.lstmn import lstmn

BATCH, SEQ, INPUT, HIDDEN, ATTENTION = 3, 5, 4, 6, 7


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensors() -> dict[str, Tensor]:
    return {
        "x": random(BATCH, SEQ, INPUT),
        "h0": random(BATCH, HIDDEN, seed=1),
        "c0": random(BATCH, HIDDEN, seed=2),
        "summary0": random(BATCH, HIDDEN, seed=3),
        "attention_hidden_weight": random(ATTENTION, HIDDEN, seed=4),
        "attention_input_weight": random(ATTENTION, INPUT, seed=5),
        "attention_summary_weight": random(ATTENTION, HIDDEN, seed=6),
        "score_vector": random(ATTENTION, seed=7),
        "gate_weight": random(4 * HIDDEN, HIDDEN + INPUT, seed=8),
        "gate_bias": random(4 * HIDDEN, seed=9),
    }


def test_its_first_step_is_an_lstms():
    """One entry on the tapes has weight 1, so that h0 and c0 are read as they are."""
    t = tensors()
    cell = nn.LSTMCell(INPUT, HIDDEN, dtype=torch.float64)
    i, f, o, g = t["gate_weight"].chunk(4)
    rows = torch.cat([i, f, g, o])
    bi, bf, bo, bg = t["gate_bias"].chunk(4)
    with torch.no_grad():
        cell.weight_hh.copy_(rows[:, :HIDDEN])
        cell.weight_ih.copy_(rows[:, HIDDEN:])
        cell.bias_ih.copy_(torch.cat([bi, bf, bg, bo]))
        cell.bias_hh.zero_()
        h, c = cell(t["x"][:, 0], (t["h0"], t["c0"]))
    found = lstmn(**t)
    torch.testing.assert_close(found.output[:, 0], h, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.cells[:, 0], c, rtol=0, atol=1e-14)


def test_summaries_are_the_weighted_sums_of_the_tape():
    t = tensors()
    found = lstmn(**t)
    tape = torch.cat([t["h0"][:, None], found.output], dim=1)[:, :SEQ]  # entries 0 … T-1
    torch.testing.assert_close(found.summaries, found.attention_weights @ tape, rtol=0, atol=1e-14)


def test_cells_come_from_the_memory_tape_under_the_same_weights():
    t = tensors()
    found = lstmn(**t)
    tape = torch.cat([t["c0"][:, None], found.cells], dim=1)[:, :SEQ]
    joined = torch.cat([found.summaries, t["x"]], dim=-1) @ t["gate_weight"].T + t["gate_bias"]
    i, f, o, g = joined.chunk(4, dim=-1)
    cells = f.sigmoid() * (found.attention_weights @ tape) + i.sigmoid() * g.tanh()
    torch.testing.assert_close(found.cells, cells, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.output, o.sigmoid() * cells.tanh(), rtol=0, atol=1e-14)


def test_weights_are_the_softmax_over_what_is_on_the_tape():
    t = tensors()
    found = lstmn(**t)
    tape = torch.cat([t["h0"][:, None], found.output], dim=1)
    before = torch.cat([t["summary0"][:, None], found.summaries], dim=1)
    for step in range(SEQ):
        scores = [
            torch.tanh(
                tape[:, i] @ t["attention_hidden_weight"].T
                + t["x"][:, step] @ t["attention_input_weight"].T
                + before[:, step] @ t["attention_summary_weight"].T
            )
            @ t["score_vector"]
            for i in range(step + 1)
        ]
        weights = torch.stack(scores, dim=-1).softmax(-1)
        torch.testing.assert_close(found.attention_weights[:, step, : step + 1], weights, rtol=0, atol=1e-14)
        assert not found.attention_weights[:, step, step + 1 :].any()


def test_a_later_input_changes_nothing_before_it():
    t = tensors()
    changed = t["x"].clone()
    changed[:, 3] += 1
    before, after = lstmn(**t), lstmn(**{**t, "x": changed})
    assert torch.equal(before.output[:, :3], after.output[:, :3])
    assert not torch.isclose(before.output[:, 3:], after.output[:, 3:]).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_the_dtype(dtype: torch.dtype):
    found = lstmn(**{name: tensor.to(dtype) for name, tensor in tensors().items()})
    assert {tensor.dtype for tensor in found} == {dtype}
