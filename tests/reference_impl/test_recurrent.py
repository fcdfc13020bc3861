import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from reference_impl.nn import recurrent
from reference_impl.nn.recurrent_modules import GRU, LSTM, RNN

BATCH, SEQ, INPUT, HIDDEN = 3, 5, 4, 6
LENGTHS = torch.tensor([3, 5, 1])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def theirs(kind: str, layers: int, bidirectional: bool, **more) -> nn.RNNBase:
    """torch.nn's module with weights and biases of ordinary size."""
    module = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[kind](
        INPUT, HIDDEN, layers, batch_first=True, bidirectional=bidirectional, dtype=torch.float64, **more
    )
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = 0.7 * random(*parameter.shape, seed=seed)
    return module


def ours(kind: str, x: Tensor, states: list[Tensor], module: nn.RNNBase, **more) -> recurrent.Recurrent:
    more = {"nonlinearity": getattr(module, "nonlinearity", None), **more} if kind == "rnn" else more
    return getattr(recurrent, kind)(
        x, *states, dict(module.named_parameters()), num_layers=module.num_layers, bidirectional=module.bidirectional,
        **more,
    )  # fmt: skip


def initial(kind: str, slots: int, batch: int = BATCH) -> list[Tensor]:
    return [random(slots, batch, HIDDEN, seed=100 + n) for n in range(2 if kind == "lstm" else 1)]


kinds = pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
stacks = pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (3, False), (1, True), (2, True)])


@kinds
@stacks
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
def test_agrees_with_torch(kind: str, layers: int, bidirectional: bool, lengths: Tensor | None):
    module, x = theirs(kind, layers, bidirectional), random(BATCH, SEQ, INPUT)
    states = initial(kind, layers * (1 + bidirectional))
    given = x if lengths is None else pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    output, final = module(given, tuple(states) if kind == "lstm" else states[0])
    if lengths is not None:
        output, _ = pad_packed_sequence(output, batch_first=True, total_length=SEQ)
    found = ours(kind, x, states, module, lengths=lengths)
    torch.testing.assert_close(found.output, output, rtol=0, atol=1e-13)
    for got, wanted in zip(found.final, final if kind == "lstm" else (final,), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


def test_rnn_by_hand():
    weights = {
        "weight_ih_l0": torch.tensor([[2.0]]),
        "weight_hh_l0": torch.tensor([[-1.0]]),
        "bias_ih_l0": torch.tensor([0.5]),
        "bias_hh_l0": torch.tensor([0.25]),
    }
    x, h0 = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[0.75]]])
    found = recurrent.rnn(x, h0, weights, num_layers=1, bidirectional=False, nonlinearity="relu")
    # 2·1 - 0.75 + 0.75 = 2;  2·3 - 2 + 0.75 = 4.75
    assert found.output.tolist() == [[[2.0], [4.75]]]
    assert found.final[0].tolist() == [[[4.75]]]


def test_lstm_by_hand():
    """One unit, no weights: the biases alone make the gates."""
    i, f, g, o = 0.1, 0.2, 0.3, 0.4
    weights = {
        "weight_ih_l0": torch.zeros(4, 1, dtype=torch.float64),
        "weight_hh_l0": torch.zeros(4, 1, dtype=torch.float64),
        "bias_ih_l0": torch.tensor([i, f, 0.0, 0.0], dtype=torch.float64),
        "bias_hh_l0": torch.tensor([0.0, 0.0, g, o], dtype=torch.float64),
    }
    x, state = torch.ones(1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1), 2.0, dtype=torch.float64)
    found = recurrent.lstm(x, state, state, weights, num_layers=1, bidirectional=False)
    sigma = [1 / (1 + math.exp(-v)) for v in (i, f, o)]
    c = sigma[1] * 2.0 + sigma[0] * math.tanh(g)
    assert found.final[1].item() == pytest.approx(c, rel=1e-15)
    assert found.final[0].item() == pytest.approx(sigma[2] * math.tanh(c), rel=1e-15)


def test_gru_forms_differ_by_where_the_reset_gate_stands():
    """One unit, r = σ(0) = ½, z = ½; h0 = 2, U = 3, b_hn = 1: ½·(3·2 + 1) = 3.5 or 3·(½·2) + 1 = 4."""
    weights = {
        "weight_ih_l0": torch.zeros(3, 1, dtype=torch.float64),
        "weight_hh_l0": torch.tensor([[0.0], [0.0], [3.0]], dtype=torch.float64),
        "bias_ih_l0": torch.zeros(3, dtype=torch.float64),
        "bias_hh_l0": torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64),
    }
    x, h0 = torch.ones(1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1), 2.0, dtype=torch.float64)
    for reset_after, inside in ((True, 3.5), (False, 4.0)):
        found = recurrent.gru(x, h0, weights, num_layers=1, bidirectional=False, reset_after=reset_after)
        assert found.output.item() == pytest.approx(0.5 * math.tanh(inside) + 0.5 * 2.0, rel=1e-15)


def test_gru_resets_before_the_product_in_every_unit():
    """Against the published equation, row by row."""
    weights = dict(theirs("gru", 1, False).named_parameters())
    x, h = random(BATCH, 1, INPUT), random(1, BATCH, HIDDEN, seed=1)
    found = recurrent.gru(x, h, weights, num_layers=1, bidirectional=False, reset_after=False)
    for b in range(BATCH):
        W, U, b_i, b_h = (weights[f"{kind}_l0"] for kind in recurrent.KINDS)
        r, z = (torch.sigmoid(W[s] @ x[b, 0] + b_i[s] + U[s] @ h[0, b] + b_h[s]) for s in (slice(6), slice(6, 12)))
        n = torch.tanh(W[12:] @ x[b, 0] + b_i[12:] + U[12:] @ (r * h[0, b]) + b_h[12:])
        torch.testing.assert_close(found.output[b, 0], (1 - z) * n + z * h[0, b], rtol=0, atol=1e-14)


@kinds
def test_a_row_in_a_batch_is_as_it_is_alone(kind: str):
    module, x, states = theirs(kind, 2, True), random(BATCH, SEQ, INPUT), initial(kind, 4)
    found = ours(kind, x, states, module, lengths=LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        alone = ours(kind, x[b : b + 1, :length], [s[:, b : b + 1] for s in states], module)
        torch.testing.assert_close(found.output[b : b + 1, :length], alone.output, rtol=0, atol=1e-14)
        for together, single in zip(found.final, alone.final, strict=True):
            torch.testing.assert_close(together[:, b : b + 1], single, rtol=0, atol=1e-14)
        for name, gate in alone.gates[0].items():
            torch.testing.assert_close(found.gates[0][name][b : b + 1, :length], gate, rtol=0, atol=1e-14)


@kinds
def test_pads_change_nothing_whatever_they_hold(kind: str):
    module, x, states = theirs(kind, 2, True), random(BATCH, SEQ, INPUT), initial(kind, 4)
    pads = torch.arange(SEQ) >= LENGTHS[:, None]
    found, junk = (
        ours(kind, value, states, module, lengths=LENGTHS).named()
        for value in (x, x.masked_fill(pads[..., None], float("nan")))
    )
    for name in found:
        assert torch.equal(found[name], junk[name])
    assert not found["output"][pads].any()


@kinds
def test_fed_in_pieces_it_gives_what_the_whole_gives(kind: str):
    module, x, states = theirs(kind, 2, False), random(BATCH, SEQ, INPUT), initial(kind, 2)
    whole = ours(kind, x, states, module)
    first = ours(kind, x[:, :2], states, module)
    second = ours(kind, x[:, 2:], list(first.final), module)
    torch.testing.assert_close(torch.cat([first.output, second.output], 1), whole.output, rtol=0, atol=1e-14)
    torch.testing.assert_close(second.final, whole.final, rtol=0, atol=1e-14)


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_the_dtype(kind: str, dtype: torch.dtype):
    module, states = theirs(kind, 1, True).to(dtype), [s.to(dtype) for s in initial(kind, 2)]
    found = ours(kind, random(BATCH, SEQ, INPUT).to(dtype), states, module, lengths=LENGTHS)
    assert {tensor.dtype for tensor in found.named().values()} == {dtype}


def test_bfloat16_is_computed_in_float32():
    module = theirs("lstm", 2, True).to(torch.bfloat16)
    x, states = random(BATCH, SEQ, INPUT).bfloat16(), [s.bfloat16() for s in initial("lstm", 4)]
    found = ours("lstm", x, states, module)
    single = ours("lstm", x.float(), [s.float() for s in states], module.float())
    assert torch.equal(found.output, single.output.bfloat16())


@kinds
def test_leaves_its_arguments_unchanged(kind: str):
    module, x, states = theirs(kind, 1, False), random(BATCH, SEQ, INPUT), initial(kind, 1)
    ours(kind, x, states, module, lengths=LENGTHS)
    assert torch.equal(x, random(BATCH, SEQ, INPUT))
    assert all(torch.equal(now, before) for now, before in zip(states, initial(kind, 1), strict=True))


def test_a_state_for_other_layers_is_refused_with_both_numbers():
    module = theirs("gru", 2, True)
    with pytest.raises(ValueError, match="has 3 entries; num_layers=2 and 2 directions need 4"):
        ours("gru", random(BATCH, SEQ, INPUT), initial("gru", 3), module)


def test_an_unknown_nonlinearity_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"nonlinearity='gelu' is not implemented; use one of \['relu', 'tanh'\]"):
        ours("rnn", random(1, 1, INPUT), initial("rnn", 1, 1), theirs("rnn", 1, False), nonlinearity="gelu")


# --- modules --------------------------------------------------------------------------------------------------------


@kinds
@stacks
def test_a_module_loads_torchs_state_dict_and_agrees(kind: str, layers: int, bidirectional: bool):
    sizes = {"input_size": INPUT, "hidden_size": HIDDEN, "num_layers": layers, "bidirectional": bidirectional}
    module = {
        "rnn": lambda: RNN(**sizes, nonlinearity="tanh"),
        "lstm": lambda: LSTM(**sizes),
        "gru": lambda: GRU(**sizes, reset_after=True),
    }[kind]().double()
    library, x = theirs(kind, layers, bidirectional), random(BATCH, SEQ, INPUT)
    module.load_state_dict(library.state_dict())
    states = initial(kind, layers * (1 + bidirectional))
    state = tuple(states) if kind == "lstm" else states[0]
    torch.testing.assert_close(module(x, state).output, library(x, state)[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(module(x).output, library(x)[0], rtol=0, atol=1e-13)


def test_a_module_begins_within_the_bounds_of_torch():
    module = LSTM(input_size=INPUT, hidden_size=HIDDEN, num_layers=2, bidirectional=True)
    bound = 1 / math.sqrt(HIDDEN)
    for parameter in module.parameters():
        assert 0.5 * bound < parameter.abs().max() <= bound
