"""Generation gives what Hugging Face's `generate` gives, token for token, and processes logits as its warpers do."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conformance.families import get
from conformance.golden.model import draw_weights
from conformance.implementations import reference
from conformance.oracles import oracle_class
from conformance.oracles.true_double import TrueDouble
from reference_impl.generation import Sampling, generate, keep_top_k, keep_top_p, left_padded

transformers = pytest.importorskip("transformers")

NEW = 12
PROMPTS = [[3, 1, 4, 1, 5], [7, 2], [1, 8, 6, 4, 2, 9, 3, 5]]
# A family, and a token that its greedy continuations stop at: after different numbers of tokens, or not at all.
STOPS = {"gpt": 16, "gpt2": 20, "llama": 33, "mistral": 30, "mixtral": 2, "phi": 13}


def both(name):
    """The reference and the library's model of the case with everything on, both in float64."""
    family = get(name)
    recipe = next(recipe for recipe in family.recipes if recipe.name == f"{name}/distinct")
    weights = draw_weights(family, recipe)
    return reference.build(recipe.config, weights), oracle_class(family)(family, recipe.config, weights).model


def theirs(model, vocab_size, stop, **options):
    """The library's new tokens, row by row, up to and with the stop token."""
    ids, mask = left_padded(PROMPTS, vocab_size=vocab_size)
    with TrueDouble():
        rows = model.generate(
            ids, attention_mask=mask.long(), max_new_tokens=NEW, eos_token_id=stop, pad_token_id=0, **options
        )[:, ids.shape[1] :].tolist()
    ends = [row.index(stop) + 1 if stop in row else NEW for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def ours(model, stop, **options):
    with TrueDouble():
        return generate(model, PROMPTS, max_new_tokens=NEW, stop_tokens={stop}, **options)


@pytest.mark.parametrize("name", STOPS)
def test_greedy_tokens_are_the_library_s(name):
    """Prompts of 5, 2 and 8 tokens in one batch."""
    model, library = both(name)
    rows = ours(model, STOPS[name])
    assert [row.ids for row in rows] == theirs(library, model.config.vocab_size, STOPS[name], do_sample=False)
    assert len({len(row.ids) for row in rows}) > 1
    assert [row.stopped for row in rows] == [row.ids[-1] == STOPS[name] for row in rows]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_the_same_seed_draws_the_library_s_tokens(name):
    """Both draw with torch.multinomial, one call a step, from the same stream of random numbers."""
    model, library = both(name)
    torch.manual_seed(5)
    settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    expected = theirs(library, model.config.vocab_size, STOPS[name], do_sample=True, **settings)
    generator = torch.Generator().manual_seed(5)
    assert [row.ids for row in ours(model, STOPS[name], sampling=Sampling(**settings), generator=generator)] == expected
    greedy = theirs(library, model.config.vocab_size, STOPS[name], do_sample=False)
    assert expected != greedy


# --- what is drawn from

# Few different values, so that rows are full of ties, also at the border; and ordinary ones.
tied = st.lists(st.sampled_from([-1.5, 0.0, 0.25, 2.0]), min_size=7, max_size=7)
ordinary = st.lists(st.floats(-8, 8, allow_subnormal=False), min_size=7, max_size=7)
rows = st.lists(tied | ordinary, min_size=1, max_size=3).map(lambda rows: torch.tensor(rows, dtype=torch.float64))
probabilities = st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9, 0.999, 1.0]) | st.floats(0.01, 0.99)


def warped(logits, *warpers):
    for warper in warpers:
        logits = warper(None, logits)
    return logits


@settings(deadline=None, max_examples=200)
@given(logits=rows, temperature=st.floats(0.05, 5))
def test_temperature_is_the_library_s(logits, temperature):
    assert torch.equal(
        Sampling(temperature=temperature).process(logits),
        warped(logits, transformers.TemperatureLogitsWarper(temperature)),
    )


@settings(deadline=None, max_examples=200)
@given(logits=rows, top_k=st.integers(1, 9))
def test_top_k_is_the_library_s(logits, top_k):
    assert torch.equal(keep_top_k(logits, top_k), warped(logits, transformers.TopKLogitsWarper(top_k)))


@settings(deadline=None, max_examples=300)
@given(logits=rows, top_p=probabilities, keep=st.integers(1, 8))
@example(logits=torch.zeros(1, 4, dtype=torch.float64), top_p=0.5, keep=1)  # two have exactly 0.5 together
def test_top_p_is_the_library_s(logits, top_p, keep):
    expected = warped(logits, transformers.TopPLogitsWarper(top_p, min_tokens_to_keep=keep))
    assert torch.equal(keep_top_p(logits, top_p, min_tokens_to_keep=keep), expected)


@settings(deadline=None, max_examples=300)
@given(
    logits=rows, temperature=st.floats(0.2, 3), top_k=st.none() | st.integers(1, 9), top_p=st.none() | probabilities,
    keep=st.integers(1, 4),
)  # fmt: skip
def test_all_of_them_in_the_library_s_order(logits, temperature, top_k, top_p, keep):
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    if top_k is not None:
        warpers.append(transformers.TopKLogitsWarper(top_k, min_tokens_to_keep=keep))
    if top_p is not None:
        warpers.append(transformers.TopPLogitsWarper(top_p, min_tokens_to_keep=keep))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_tokens_to_keep=keep)
    assert torch.equal(sampling.process(logits), warped(logits, *warpers))


def test_another_order_would_show():
    """The order matters: after a temperature of 3 the nucleus is larger, after top k it is smaller."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    temperature = transformers.TemperatureLogitsWarper(3.0)
    top_k, top_p = transformers.TopKLogitsWarper(3), transformers.TopPLogitsWarper(0.8)
    kept = {
        order: warped(logits, *order).isfinite().sum().item()
        for order in itertools.permutations([temperature, top_k, top_p])
    }
    assert len(set(kept.values())) > 1
    mine = Sampling(temperature=3.0, top_k=3, top_p=0.8).process(logits)
    assert mine.isfinite().sum() == kept[temperature, top_k, top_p]
