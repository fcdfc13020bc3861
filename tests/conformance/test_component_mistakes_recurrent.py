"""rnn, lstm, gru: an independent implementation passes every claim; each mistake of the catalogue fails.

Where the case knows the mistake, the verdict names it.  The implementation here reverses rows by gathering and works
with whole batches; the mistakes are switched on one at a time.
"""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")  # goldens note its version

from conformance import golden
from conformance.cases import Case, Claim, Manifest
from judged import check

FAMILIES = ("rnn", "lstm", "gru")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    directory: Path = tmp_path_factory.mktemp("fixtures")
    golden.make(FAMILIES, directory)
    return Manifest(directory)


# --- the independent implementation, and its mistakes ---------------------------------------------------------------

State = list[Tensor]
Cell = Callable[[Tensor, State, list[Tensor], str], State]


def rnn_cell(x: Tensor, state: State, w: list[Tensor], mistake: str, nonlinearity: str) -> State:
    z = joined(x, state[0], w, mistake)
    return [z.clamp(min=0) if nonlinearity == "relu" and mistake != "nonlinearity-ignored" else z.tanh()]


def lstm_cell(x: Tensor, state: State, w: list[Tensor], mistake: str) -> State:
    h, c = state
    z, n = joined(x, h, w, mistake), h.shape[-1]
    order = {"lstm-gate-order": "ifog", "lstm-gate-order-tf": "igfo"}.get(mistake, "ifgo")
    part = {gate: z[:, k * n : (k + 1) * n] for k, gate in enumerate(order)}
    if mistake == "lstm-forget-bias-added":
        part["f"] = part["f"] + 1
    sigma = (lambda v: (0.2 * v + 0.5).clamp(0, 1)) if mistake == "lstm-hard-sigmoid" else torch.sigmoid
    c = sigma(part["f"]) * c + sigma(part["i"]) * part["g"].tanh()
    return [sigma(part["o"]) * (c if mistake == "lstm-output-tanh-missing" else c.tanh()), c]


def gru_cell(x: Tensor, state: State, w: list[Tensor], mistake: str, reset_after: bool) -> State:
    (h,), (W, U, b, d) = state, w
    n = h.shape[-1]
    first = slice(2 * n)
    if mistake == "rnn-second-bias-dropped":
        d = torch.zeros_like(d)
    r, z = torch.sigmoid(x @ W[first].T + h @ U[first].T + b[first] + d[first]).chunk(2, dim=-1)
    if mistake == "gru-gate-order":
        r, z = z, r
    W, U, b, d = W[2 * n :], U[2 * n :], b[2 * n :], d[2 * n :]
    if mistake == "gru-n-bias-merged":
        candidate = x @ W.T + b + d + r * (h @ U.T)
    elif reset_after != (mistake == "gru-reset-placement"):
        candidate = x @ W.T + b + r * (h @ U.T + d)
    else:
        candidate = x @ W.T + b + (r * h) @ U.T + d
    if mistake == "gru-update-gate-flipped":
        z = 1 - z
    return [candidate.tanh() + z * (h - candidate.tanh())]


def joined(x: Tensor, h: Tensor, w: list[Tensor], mistake: str) -> Tensor:
    W, U, b, d = w
    if mistake == "rnn-kernel-concat-order" and W.shape == U.shape:
        W, U = U, W
    if mistake == "rnn-second-bias-dropped":
        d = d * 0
    if mistake == "rnn-bias-counted-twice":
        d = 2 * d + b
    return x @ W.T + h @ U.T + (b + d)


def layers(
    cell: Cell, x: Tensor, states: State, weights: dict[str, Tensor], num_layers: int, bidirectional: bool,
    lengths: Tensor | None, mistake: str,
) -> tuple[Tensor, State]:  # fmt: skip
    batch, seq, _ = x.shape
    directions, time, rows = 1 + bidirectional, torch.arange(seq), torch.arange(batch)
    if lengths is None or mistake == "lengths-ignored":
        lengths = torch.full((batch,), seq)
    unsorted = torch.arange(batch)
    if mistake == "rnn-unsort-wrong":  # sorts rows as packing does, and puts the outputs back but not the states
        order = lengths.argsort(descending=True)
        x, lengths, states, unsorted = x[order], lengths[order], [s[:, order] for s in states], order.argsort()
    if mistake == "rnn-state-view":
        states = [s.view(batch, -1, s.shape[-1]).transpose(0, 1) for s in states]
    real = time < lengths[:, None]
    flip = torch.where(real, lengths[:, None] - 1 - time, time)
    last = [lengths - 1, lengths - 1]
    if mistake == "birnn-reverse-over-padding":
        flip, last[1] = (seq - 1 - time).expand(batch, seq), torch.full((batch,), seq - 1)
    if mistake == "rnn-final-state-at-pad":
        last = [torch.full((batch,), seq - 1)] * 2
    finals: list[State] = []
    for layer in range(num_layers):
        halves = []
        for d in range(directions):
            suffix = f"_l{layer}" + "_reverse" * d
            own = [weights[kind + suffix] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            state, history = [s[layer * directions + d] for s in states], []
            sequence = x[rows[:, None], flip] if d else x
            for t in range(seq):
                state = cell(sequence[:, t], state, own, mistake)
                history.append(state)
            over_time = [torch.stack(kind, dim=1) for kind in zip(*history, strict=True)]
            halves.append(over_time[0][rows[:, None], flip] if d else over_time[0])
            final = [kind[rows, last[d]] for kind in over_time]
            finals.append([halves[1][:, -1], *final[1:]] if d and mistake == "birnn-last-step-backward" else final)
        x = torch.cat(halves, dim=-1) * real[..., None]
    return x[unsorted], [torch.stack(kind) for kind in zip(*finals, strict=True)]


def rnn(x, h0, weights, num_layers, bidirectional, nonlinearity, lengths=None, *, mistake=""):
    cell = partial(rnn_cell, nonlinearity=nonlinearity)
    output, (h_n,) = layers(cell, x, [h0], weights, num_layers, bidirectional, lengths, mistake)
    return output, h_n


def lstm(x, h0, c0, weights, num_layers, bidirectional, lengths=None, *, mistake=""):
    states = [c0, h0] if mistake == "rnn-state-tuple-order" else [h0, c0]
    output, (h_n, c_n) = layers(lstm_cell, x, states, weights, num_layers, bidirectional, lengths, mistake)
    return output, (h_n, c_n)


def gru(x, h0, weights, num_layers, bidirectional, reset_after, lengths=None, *, mistake=""):
    cell = partial(gru_cell, reset_after=reset_after)
    output, (h_n,) = layers(cell, x, [h0], weights, num_layers, bidirectional, lengths, mistake)
    return output, h_n


RIGHT: dict[str, Any] = {"rnn": rnn, "lstm": lstm, "gru": gru}


# --- verdicts -------------------------------------------------------------------------------------------------------


def claims(manifest: Manifest, family: str) -> Iterator[Claim]:
    return (claim for claim in manifest.claims() if claim.family == family)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_independent_implementation_passes_every_claim(manifest: Manifest, family: str) -> None:
    results = [check(RIGHT[family], Case(c.case, manifest), c.check, c.dtype) for c in claims(manifest, family)]
    assert {str(r.claim): r.outcome for r in results if r.outcome != "pass"} == {}
    assert len(results) == sum(1 for _ in claims(manifest, family))


# family, mistake, the case that shows it, what the verdict calls it
MISTAKES = [
    ("rnn", "rnn-second-bias-dropped", "plain", "bias_hh ignored"),
    ("rnn", "rnn-bias-counted-twice", "plain", None),
    ("rnn", "nonlinearity-ignored", "field-nonlinearity", "nonlinearity ignored"),
    ("rnn", "rnn-kernel-concat-order", "layers", None),
    ("rnn", "birnn-reverse-over-padding", "bidirectional-lengths", "reverse direction over the pads"),
    ("rnn", "birnn-last-step-backward", "bidirectional", "reverse final state at the last position"),
    ("rnn", "rnn-final-state-at-pad", "lengths", "final states at the last position"),
    ("rnn", "rnn-state-view", "bidirectional", None),
    ("rnn", "rnn-unsort-wrong", "lengths", None),
    ("rnn", "lengths-ignored", "distinct", "lengths ignored"),
    ("lstm", "rnn-second-bias-dropped", "plain", "bias_hh ignored"),
    ("lstm", "lstm-gate-order", "plain", "gates in the order i, f, o, g"),
    ("lstm", "lstm-gate-order-tf", "plain", "gates in the order i, g, f, o"),
    ("lstm", "lstm-forget-bias-added", "plain", "1 added to the forget gate"),
    ("lstm", "lstm-hard-sigmoid", "plain", None),
    ("lstm", "lstm-output-tanh-missing", "plain", None),
    ("lstm", "rnn-state-tuple-order", "plain", "h0 and c0 exchanged"),
    ("lstm", "rnn-kernel-concat-order", "layers", None),
    ("lstm", "birnn-reverse-over-padding", "bidirectional-lengths", "reverse direction over the pads"),
    ("lstm", "birnn-last-step-backward", "bidirectional", "reverse final state at the last position"),
    ("lstm", "rnn-final-state-at-pad", "lengths", "final states at the last position"),
    ("lstm", "rnn-unsort-wrong", "distinct", None),
    ("gru", "rnn-second-bias-dropped", "plain", "bias_hh ignored"),
    ("gru", "gru-reset-placement", "plain", "reset gate before the product"),
    ("gru", "gru-reset-placement", "field-reset_after", "reset_after ignored"),
    ("gru", "gru-n-bias-merged", "plain", "b_hn outside the reset gate"),
    ("gru", "gru-update-gate-flipped", "plain", "update gate flipped"),
    ("gru", "gru-update-gate-flipped", "field-reset_after", "update gate flipped"),
    ("gru", "gru-gate-order", "plain", "gates in the order z, r, n"),
    ("gru", "birnn-reverse-over-padding", "bidirectional-lengths", "reverse direction over the pads"),
    ("gru", "rnn-final-state-at-pad", "lengths", "final states at the last position"),
    ("gru", "rnn-state-view", "bidirectional", None),
]


@pytest.mark.parametrize(("family", "mistake", "case", "name"), MISTAKES)
def test_a_mistake_fails(manifest: Manifest, family: str, mistake: str, case: str, name: str | None) -> None:
    wrong = partial(RIGHT[family], mistake=mistake)
    result = check(wrong, Case(f"{family}/{case}", manifest), "component.outputs")
    assert (result.outcome, result.kind, result.equals) == ("fail", "value", name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_function_without_initial_states_fails_by_name(manifest: Manifest, family: str) -> None:
    def stateless(x, weights, num_layers, bidirectional, nonlinearity="tanh", reset_after=True):
        zeros = x.new_zeros(num_layers, len(x), weights["weight_hh_l0"].shape[1])
        more = {"rnn": {"nonlinearity": nonlinearity}, "lstm": {"c0": zeros}, "gru": {"reset_after": reset_after}}
        return RIGHT[family](x, zeros, weights=weights, num_layers=1, bidirectional=False, **more[family])

    result = check(stateless, Case(f"{family}/plain", manifest), "component.outputs")
    assert (result.outcome, result.equals) == ("fail", "initial states ignored")


# --- feeding in pieces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_that_leaks_from_call_to_call_passes_once_and_fails_in_pieces(manifest: Manifest, family: str) -> None:
    kept: list[Tensor] = []

    @functools.wraps(RIGHT[family])
    def leaking(**arguments):
        """Starts from the first call's state for ever."""
        kept.append(arguments["h0"])
        return RIGHT[family](**{**arguments, "h0": kept[0]})

    case = Case(f"{family}/plain", manifest)
    assert check(leaking, case, "component.outputs").outcome == "pass"
    kept.clear()
    result = check(leaking, case, "component.chunks")
    assert (result.outcome, result.kind) == ("fail", "value")
    assert "in pieces of [1, 1, 1, 1, 1]" in result.message


def test_a_piece_of_one_position_that_loses_its_axis_fails_in_pieces(manifest: Manifest) -> None:
    def squeezing(x, h0, weights, num_layers, bidirectional, nonlinearity):
        output, h_n = rnn(x, h0, weights, num_layers, bidirectional, nonlinearity)
        return output.squeeze(1), h_n

    case = Case("rnn/plain", manifest)
    assert check(squeezing, case, "component.outputs").outcome == "pass"
    result = check(squeezing, case, "component.chunks")
    assert (result.outcome, result.kind) == ("fail", "shape")
    assert "wanted (3, 1, 6)" in result.message
