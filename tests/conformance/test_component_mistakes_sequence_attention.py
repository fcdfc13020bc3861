"""additive_attention, luong_attention, lstmn: an independent implementation passes every claim, each mistake fails.

The implementations here are einsums over whole batches; the mistakes are switched on one at a time.
"""

import functools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, einsum

pytest.importorskip("transformers")  # goldens note its version

from conformance import golden
from conformance.cases import Case, Manifest
from judged import check

FAMILIES = ("additive_attention", "luong_attention", "lstmn")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    directory: Path = tmp_path_factory.mktemp("fixtures")
    golden.make(FAMILIES, directory)
    return Manifest(directory)


# --- the independent implementations, and their mistakes ------------------------------------------------------------


def normalised(scores: Tensor, mask: Tensor | None, mistake: str) -> Tensor:
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    if mask is None or mistake == "s2s-no-source-mask":
        return powers / powers.sum(-1, keepdim=True)
    if mistake == "s2s-mask-after-softmax":
        return powers / powers.sum(-1, keepdim=True) * mask
    if mistake == "mask-inverted":
        mask = ~mask | mask.all(-1, keepdim=True)
    return powers * mask / (powers * mask).sum(-1, keepdim=True)


def additive(
    query, memory, query_weight, memory_weight, score_vector, bias=None, source_mask=None, *, mistake=""
) -> dict[str, Tensor]:
    if mistake == "bahdanau-split" and query_weight.shape == memory_weight.shape:
        query_weight, memory_weight = memory_weight, query_weight
    if mistake == "bahdanau-transposed" and query_weight.shape[0] == query_weight.shape[1]:
        query_weight = query_weight.T
    inner = einsum("aq,bq->ba", query_weight, query)[:, None] + einsum("ah,bsh->bsa", memory_weight, memory)
    if bias is not None and mistake != "bahdanau-bias":
        inner = inner + bias
    energies = einsum("a,bsa->bs", score_vector, inner if mistake == "bahdanau-no-tanh" else inner.tanh())
    alpha = normalised(energies, source_mask, mistake)
    return {"context": einsum("bs,bsh->bh", alpha, memory), "energies": energies, "attention_weights": alpha}


def luong(
    query, memory, attentional_weight, score, score_weight=None, score_vector=None, source_mask=None, *, mistake=""
) -> dict[str, Tensor]:
    pairs = torch.cat(
        [query[:, :, None].expand(-1, -1, memory.shape[1], -1), memory[:, None].expand(-1, query.shape[1], -1, -1)], -1
    )
    if mistake == "luong-concat-order":
        pairs = pairs.roll(memory.shape[-1], dims=-1)
    if score == "dot" or mistake == "score-ignored":
        scores = einsum("bth,bsh->bts", query, memory)
    elif score == "general":
        form = "bts,sm->btm" if mistake != "luong-general-transposed" else "bts,ms->btm"
        scores = einsum("btm,bsm->bts", einsum(form, query, score_weight), memory)
    else:
        scores = einsum("a,btsa->bts", score_vector, (pairs @ score_weight.T).tanh())
    if mistake == "luong-scaled":
        scores = scores / query.shape[-1] ** 0.5
    alpha = normalised(scores, None if source_mask is None else source_mask[:, None], mistake)
    context = einsum("bts,bsh->bth", alpha, memory)
    both = [query, context] if mistake == "luong-h-before-c" else [context, query]
    attentional = torch.cat(both, -1) @ attentional_weight.T
    if mistake != "luong-no-attentional-tanh":
        attentional = attentional.tanh()
    return {"attentional": attentional, "context": context, "scores": scores, "attention_weights": alpha}


def lstmn(
    x, h0, c0, summary0, attention_hidden_weight, attention_input_weight, attention_summary_weight, score_vector,
    gate_weight, gate_bias, *, mistake="",
):  # fmt: skip
    hiddens, cells, summary = [h0], [c0], summary0
    if mistake == "lstmn-tape-from-zero":
        hiddens, cells, summary = [h0 * 0], [c0 * 0], summary0 * 0
    for t in range(x.shape[1]):
        tape, memory, x_t = torch.stack(hiddens, 1), torch.stack(cells, 1), x[:, t]
        before = hiddens[-1] if mistake == "lstmn-state-for-summary" else summary
        inner = (tape @ attention_hidden_weight.T) + (x_t @ attention_input_weight.T)[:, None]
        if mistake != "lstmn-no-summary":
            inner = inner + (before @ attention_summary_weight.T)[:, None]
        s = (inner.tanh() @ score_vector).softmax(0 if mistake == "lstmn-softmax-axis" else -1)[..., None]
        summary = hiddens[-1] if mistake == "lstmn-no-attention" else (s * tape).sum(1)
        cell = cells[-1] if mistake in ("lstmn-no-attention", "lstmn-cell-not-attended") else (s * memory).sum(1)
        z = torch.cat([summary, x_t], -1) @ gate_weight.T + gate_bias
        i, f, o, g = z.chunk(4, -1)
        if mistake == "lstmn-gate-order":
            o, g = g, o
        cells.append(f.sigmoid() * cell + i.sigmoid() * g.tanh())
        hiddens.append(o.sigmoid() * cells[-1].tanh())
    return torch.stack(hiddens[1:], 1), torch.stack(cells[1:], 1)


RIGHT: dict[str, Any] = {"additive_attention": additive, "luong_attention": luong, "lstmn": lstmn}


# --- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_independent_implementation_passes_every_claim(manifest: Manifest, family: str) -> None:
    claims = [claim for claim in manifest.claims() if claim.family == family]
    results = [check(RIGHT[family], Case(c.case, manifest), c.check, c.dtype) for c in claims]
    assert {str(r.claim): r.outcome for r in results if r.outcome != "pass"} == {}


# family, mistake, the case that shows it, what the verdict calls it
MISTAKES = [
    ("additive_attention", "s2s-no-source-mask", "mask", "source_mask ignored"),
    ("additive_attention", "s2s-mask-after-softmax", "mask", "source_mask applied after the softmax"),
    ("additive_attention", "s2s-no-source-mask", "distinct", "source_mask ignored"),
    ("additive_attention", "mask-inverted", "mask", None),
    ("additive_attention", "bahdanau-bias", "bias", "bias ignored"),
    ("additive_attention", "bahdanau-split", "square", "W_a and U_a exchanged"),
    ("additive_attention", "bahdanau-transposed", "square", "W_a transposed"),
    ("additive_attention", "bahdanau-no-tanh", "plain", None),
    ("luong_attention", "s2s-no-source-mask", "mask", "source_mask ignored"),
    ("luong_attention", "s2s-mask-after-softmax", "mask", None),
    ("luong_attention", "luong-scaled", "plain", None),
    ("luong_attention", "luong-h-before-c", "plain", "[h; c] in place of [c; h]"),
    ("luong_attention", "luong-no-attentional-tanh", "plain", None),
    ("luong_attention", "score-ignored", "field-score-general", "score ignored"),
    ("luong_attention", "score-ignored", "field-score-concat", "score ignored"),
    ("luong_attention", "luong-general-transposed", "field-score-general", "W_a transposed"),
    ("luong_attention", "luong-concat-order", "field-score-concat", "[h̄; h] in place of [h; h̄]"),
    ("luong_attention", "luong-concat-order", "distinct-concat", None),
    ("lstmn", "lstmn-no-attention", "plain", None),
    ("lstmn", "lstmn-cell-not-attended", "plain", None),
    ("lstmn", "lstmn-no-summary", "plain", "h̃_{t-1} left out of the score"),
    ("lstmn", "lstmn-state-for-summary", "plain", None),
    ("lstmn", "lstmn-softmax-axis", "plain", None),
    ("lstmn", "lstmn-gate-order", "plain", "gates in the order i, f, ĉ, o"),
    ("lstmn", "lstmn-tape-from-zero", "distinct", "initial tapes ignored"),
]


@pytest.mark.parametrize(("family", "mistake", "case", "name"), MISTAKES)
def test_a_mistake_fails(manifest: Manifest, family: str, mistake: str, case: str, name: str | None) -> None:
    result = check(partial(RIGHT[family], mistake=mistake), Case(f"{family}/{case}", manifest), "component.outputs")
    assert (result.outcome, result.kind, result.equals) == ("fail", "value", name)


def test_energies_that_are_right_but_masked_fail_when_they_are_returned(manifest: Manifest) -> None:
    @functools.wraps(additive)
    def masked(**arguments):
        found = additive(**arguments)
        return {**found, "energies": found["energies"] * arguments["source_mask"]}

    result = check(masked, Case("additive_attention/mask", manifest), "component.outputs")
    assert (result.outcome, result.message) == ("fail", "energies differ from the oracle's")
