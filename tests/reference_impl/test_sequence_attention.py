import math

import pytest
import torch
from torch import Tensor

from reference_impl.nn.sequence_attention import additive_attention, luong_attention

BATCH, TARGET, SOURCE, QUERY, ANNOTATION, ATTENTION = 3, 2, 5, 4, 6, 7
MASK = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], dtype=torch.bool)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def additive_tensors() -> dict[str, Tensor]:
    return {
        "query": random(BATCH, QUERY),
        "memory": random(BATCH, SOURCE, ANNOTATION, seed=1),
        "query_weight": random(ATTENTION, QUERY, seed=2),
        "memory_weight": random(ATTENTION, ANNOTATION, seed=3),
        "score_vector": random(ATTENTION, seed=4),
        "bias": random(ATTENTION, seed=5),
    }


def luong_tensors(score: str) -> dict[str, Tensor]:
    query = ANNOTATION if score == "dot" else QUERY
    found = {
        "query": random(BATCH, TARGET, query),
        "memory": random(BATCH, SOURCE, ANNOTATION, seed=1),
        "attentional_weight": random(8, ANNOTATION + query, seed=2),
    }
    if score == "general":
        found["score_weight"] = random(query, ANNOTATION, seed=3)
    if score == "concat":
        found |= {"score_weight": random(ATTENTION, query + ANNOTATION, seed=3), "score_vector": random(ATTENTION)}
    return found


scores = pytest.mark.parametrize("score", ["dot", "general", "concat"])


def test_additive_energies_are_those_of_the_equation():
    t = additive_tensors()
    found = additive_attention(**t)
    for b in range(BATCH):
        for j in range(SOURCE):
            inner = t["query_weight"] @ t["query"][b] + t["memory_weight"] @ t["memory"][b, j] + t["bias"]
            wanted = t["score_vector"] @ inner.tanh()
            torch.testing.assert_close(found.energies[b, j], wanted, rtol=0, atol=1e-13)


def test_additive_attention_by_hand():
    """tanh(0) and tanh(atanh ½): energies 0 and 2·½ = 1, weights 1/(1+e) and e/(1+e)."""
    found = additive_attention(
        query=torch.tensor([[1.0]], dtype=torch.float64),
        memory=torch.tensor([[[-1.0], [math.atanh(0.5) - 1.0]]], dtype=torch.float64),
        query_weight=torch.tensor([[1.0]], dtype=torch.float64),
        memory_weight=torch.tensor([[1.0]], dtype=torch.float64),
        score_vector=torch.tensor([2.0], dtype=torch.float64),
    )
    wanted = torch.tensor([[1 / (1 + math.e), math.e / (1 + math.e)]], dtype=torch.float64)
    torch.testing.assert_close(found.attention_weights, wanted, rtol=0, atol=1e-15)


def test_additive_attention_reads_real_positions_alone():
    t = additive_tensors()
    found = additive_attention(**t, source_mask=MASK)
    for b in range(BATCH):
        real = {**t, "query": t["query"][b : b + 1], "memory": t["memory"][b : b + 1, MASK[b]]}
        alone = additive_attention(**real)
        torch.testing.assert_close(found.context[b], alone.context[0], rtol=0, atol=1e-14)
        torch.testing.assert_close(found.attention_weights[b, MASK[b]], alone.attention_weights[0], rtol=0, atol=1e-14)
    assert not found.attention_weights[~MASK].any()


@scores
def test_luong_scores_are_those_of_equation_8(score: str):
    t = luong_tensors(score)
    found = luong_attention(**t, score=score)
    for b in range(BATCH):
        for i in range(TARGET):
            for j in range(SOURCE):
                h, s = t["query"][b, i], t["memory"][b, j]
                wanted = {
                    "dot": lambda h, s: h.dot(s),
                    "general": lambda h, s: h.dot(t["score_weight"].mv(s)),
                    "concat": lambda h, s: t["score_vector"].dot(t["score_weight"].mv(torch.cat([h, s])).tanh()),
                }[score](h, s)
                torch.testing.assert_close(found.scores[b, i, j], wanted, rtol=0, atol=1e-13)


@scores
def test_luong_attentional_vector_puts_the_context_first(score: str):
    t = luong_tensors(score)
    found = luong_attention(**t, score=score)
    context, own = t["attentional_weight"][:, :ANNOTATION], t["attentional_weight"][:, ANNOTATION:]
    wanted = (found.context @ context.T + t["query"] @ own.T).tanh()
    torch.testing.assert_close(found.attentional, wanted, rtol=0, atol=1e-14)


@scores
def test_luong_attention_reads_real_positions_alone(score: str):
    t = luong_tensors(score)
    found = luong_attention(**t, score=score, source_mask=MASK)
    for b in range(BATCH):
        alone = luong_attention(
            **{**t, "query": t["query"][b : b + 1], "memory": t["memory"][b : b + 1, MASK[b]]}, score=score
        )
        torch.testing.assert_close(found.attentional[b], alone.attentional[0], rtol=0, atol=1e-14)
    assert not found.attention_weights[~MASK[:, None].expand(-1, TARGET, -1)].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_the_dtype(dtype: torch.dtype):
    additive = additive_attention(**{n: t.to(dtype) for n, t in additive_tensors().items()}, source_mask=MASK)
    luong = luong_attention(**{n: t.to(dtype) for n, t in luong_tensors("concat").items()}, score="concat")
    assert {tensor.dtype for tensor in (*additive, *luong)} == {dtype}


def test_an_unknown_score_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="score='cosine' is not implemented; use dot, general or concat"):
        luong_attention(**luong_tensors("dot"), score="cosine")


@pytest.mark.parametrize(("score", "name"), [("general", "score_weight"), ("concat", "score_vector")])
def test_a_missing_weight_is_named(score: str, name: str):
    tensors = {n: t for n, t in luong_tensors(score).items() if n != name}
    with pytest.raises(ValueError, match=f"score='{score}' needs {name}; none was given"):
        luong_attention(**tensors, score=score)
