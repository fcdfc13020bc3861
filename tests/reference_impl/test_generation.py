"""Generation: what one row would get alone, stopping, drawing, log-probabilities, refusals."""

from types import SimpleNamespace

import pytest
import torch

from reference_impl.generation import Generated, Sampling, choose, generate, keep_top_k, keep_top_p, left_padded, stream
from reference_impl.models.gpt2 import GPT2, GPT2Config
from reference_impl.models.llama import Llama, LlamaConfig
from reference_impl.models.mistral import Mistral, MistralConfig

VOCAB = 23
PROMPTS = [[3, 1, 4, 1, 5], [7, 2], [1, 8, 6, 4, 2, 9, 3, 5]]
SHARED = {
    "vocab_size": VOCAB, "hidden_size": 10, "intermediate_size": 7, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 4,
}  # fmt: skip
MODELS = {
    "llama": lambda: Llama(LlamaConfig(**SHARED)),
    "mistral": lambda: Mistral(MistralConfig(**SHARED, sliding_window=3)),
    "gpt2": lambda: GPT2(
        GPT2Config(vocab_size=VOCAB, n_embd=12, n_head=3, n_layer=2, n_positions=20, tie_word_embeddings=False)
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def model_of(name="llama", dtype=torch.float64):
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # large biases would let one token win everywhere
            parameter.normal_(generator=generator).mul_(0.05 if parameter_name.endswith("bias") else 0.7)
    return model.to(dtype).eval()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def full_forward(model, row):
    with torch.no_grad():
        return model(torch.tensor([row]))[0]


# --- greedy


@every_model
def test_each_row_is_what_it_would_be_alone(name):
    model = model_of(name)
    together = generate(model, PROMPTS, max_new_tokens=9)
    assert [row.ids for row in together] == [generate(model, [p], max_new_tokens=9)[0].ids for p in PROMPTS]


@every_model
def test_greedy_takes_the_largest_logit_of_a_full_forward(name):
    model = model_of(name)
    for prompt, row in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=9), strict=True):
        assert full_forward(model, prompt + row.ids)[len(prompt) - 1 : -1].argmax(-1).tolist() == row.ids


def test_of_equal_logits_the_first_is_taken():
    assert choose(torch.tensor([[0.0, 2.0, 2.0]]), None)[0].tolist() == [1]


@pytest.mark.parametrize("chunk", [1, 2, 3, 8, 100])
def test_chunks_of_the_prompts_change_nothing(chunk):
    """Some of the chunks are padding alone in some of the rows."""
    model = model_of("mistral")
    whole = generate(model, PROMPTS, max_new_tokens=6)
    pieces = generate(model, PROMPTS, max_new_tokens=6, prefill_chunk=chunk)
    assert [row.ids for row in pieces] == [row.ids for row in whole]
    assert [row.log_probs for row in pieces] == [pytest.approx(row.log_probs, rel=1e-12) for row in whole]


# --- stopping


def test_a_row_ends_with_its_stop_token_and_stays_stopped():
    model = model_of()
    free = [row.ids for row in generate(model, PROMPTS, max_new_tokens=9)]
    stop = free[0][3]
    ends = [row.index(stop) + 1 if stop in row else 9 for row in free]
    assert len(set(ends)) > 1
    rows = generate(model, PROMPTS, max_new_tokens=9, stop_tokens={stop})
    assert [row.ids for row in rows] == [row[:end] for row, end in zip(free, ends, strict=True)]
    assert [row.stopped for row in rows] == [stop in row for row in free]


def test_steps_of_a_stopped_row_are_inactive_to_the_end():
    model = model_of()
    stop = generate(model, PROMPTS, max_new_tokens=9)[0].ids[3]
    active = torch.stack([s.active for s in stream(model, PROMPTS, max_new_tokens=9, stop_tokens={stop})])
    assert torch.equal(active, active.cummin(dim=0).values)
    assert not active.all()


def test_generation_ends_when_all_rows_have_stopped():
    model = model_of()
    firsts = {row.ids[0] for row in generate(model, PROMPTS, max_new_tokens=1)}
    assert len(list(stream(model, PROMPTS, max_new_tokens=9, stop_tokens=firsts))) == 1


def test_no_new_tokens_are_none():
    assert generate(model_of(), PROMPTS, max_new_tokens=0) == [Generated()] * 3


def test_a_stream_computes_a_step_when_it_is_asked():
    model, calls = model_of(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    steps = stream(model, PROMPTS, max_new_tokens=9)
    assert calls == []
    next(steps)
    next(steps)
    assert len(calls) == 2


# --- log-probabilities


@every_model
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.5, top_k=9)], ids=["greedy", "drawn"])
def test_log_probabilities_are_those_of_one_full_forward(name, sampling):
    """Of the model's own distribution, whatever the sampling makes of it."""
    model = model_of(name)
    rows = generate(model, PROMPTS, max_new_tokens=9, stop_tokens={2}, sampling=sampling, generator=seeded(3))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        log_probs = full_forward(model, prompt + row.ids).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = log_probs.gather(-1, torch.tensor(row.ids)[:, None])[:, 0].tolist()
        assert row.log_probs == pytest.approx(expected, rel=1e-12)


def test_low_precision_logits_are_processed_in_float32():
    logits = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.bfloat16)
    _, log_probs = choose(logits, None)
    assert torch.equal(log_probs, logits.float().log_softmax(-1)[:, 0])


# --- drawing


def test_the_same_seed_draws_the_same_tokens():
    model, sampling = model_of(), Sampling(temperature=2.0)
    first, again, other = (
        generate(model, PROMPTS, max_new_tokens=9, sampling=sampling, generator=seeded(s)) for s in (7, 7, 8)
    )
    assert first == again
    assert first != other


def test_drawing_from_one_token_is_greedy():
    model = model_of()
    greedy = generate(model, PROMPTS, max_new_tokens=9)
    assert generate(model, PROMPTS, max_new_tokens=9, sampling=Sampling(top_k=1), generator=seeded(0)) == greedy


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    """200,000 draws from four tokens; a standard deviation of a frequency is at most 0.0012."""
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(200_000, 4)
    tokens, _ = choose(logits, Sampling(top_k=3), seeded(0))
    frequencies = tokens.bincount(minlength=4) / len(tokens)
    assert frequencies.tolist() == pytest.approx([0, 0.2 / 0.9, 0.3 / 0.9, 0.4 / 0.9], abs=0.006)


def finite(logits):
    return logits.isfinite().long().tolist()


def test_top_k_keeps_what_ties_with_the_last():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    assert finite(keep_top_k(logits, 2)) == [[1, 0, 1, 1, 0]]
    assert finite(keep_top_k(logits, 9)) == [[1, 1, 1, 1, 1]]


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = torch.tensor([[0.15, 0.5, 0.1, 0.25]]).log()
    assert finite(keep_top_p(logits, 0.7)) == [[0, 1, 0, 1]]
    assert finite(keep_top_p(logits, 0.4)) == [[0, 1, 0, 0]]
    assert finite(keep_top_p(logits, 0.8)) == [[1, 1, 0, 1]]
    assert finite(keep_top_p(logits, 1.0)) == [[1, 1, 1, 1]]
    assert finite(keep_top_p(logits, 0.4, min_tokens_to_keep=3)) == [[1, 1, 0, 1]]
    assert finite(keep_top_p(torch.zeros(1, 4), 0.5)) == [[0, 0, 1, 1]]  # exactly 0.5: no third is needed


def test_kept_logits_are_unchanged():
    logits = torch.tensor([[3.0, 1.0, 2.0]])
    assert keep_top_k(logits, 2).tolist() == [[3.0, -torch.inf, 2.0]]


# --- refusals


def test_prompts_are_padded_on_the_left():
    ids, mask = left_padded([[7, 8, 9], [5]], vocab_size=10)
    assert ids.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert mask.long().tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there is no prompt"),
        ([[1], []], "prompt 1 is empty"),
        ([[1], [2, 23]], r"prompt 1 holds 23; token ids are 0 … 22 \(vocab_size=23\)"),
        ([[-1]], "prompt 0 holds -1"),
    ],
    ids=["none", "empty", "beyond", "negative"],
)
def test_prompts_that_cannot_be_right_are_refused_at_once(prompts, message):
    with pytest.raises(ValueError, match=message):
        stream(model_of(), prompts, max_new_tokens=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0\.0 must be greater than 0; leave sampling out to be greedy"),
        ({"temperature": float("nan")}, "temperature=nan must be greater than 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be greater than 0"),
        ({"top_p": 1.1}, r"top_p=1\.1 must be greater than 0 and at most 1"),
        ({"min_tokens_to_keep": 0}, "min_tokens_to_keep=0 must be at least 1"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value),
)
def test_sampling_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**changes)


@pytest.mark.parametrize("options", [{"max_new_tokens": -1}, {"max_new_tokens": 1, "prefill_chunk": 0}], ids=str)
def test_numbers_out_of_range_are_refused_at_once(options):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0 and prefill_chunk at least 1"):
        stream(model_of(), PROMPTS, **options)


def test_a_text_longer_than_the_positions_ends_in_an_error_that_says_so():
    with pytest.raises(ValueError, match="n_positions=20"):
        generate(model_of("gpt2"), PROMPTS, max_new_tokens=14)


def test_a_stopped_row_takes_no_positions():
    """A row of 19 tokens that stops at once, beside one that goes on for 15 steps, in a table of 20 positions."""
    model = model_of("gpt2")
    long, short = [21] * 19, [0]
    stop = generate(model, [long], max_new_tokens=1)[0].ids[0]
    rows = generate(model, [long, short], max_new_tokens=15, stop_tokens={stop})
    assert rows[0].ids == [stop]
    assert rows[1].ids == generate(model, [short], max_new_tokens=15, stop_tokens={stop})[0].ids
    assert len(rows[1].ids) == 15


# --- a family that knows no padding, and whose memory is of one size


class Unpadded(torch.nn.Module):
    """A Llama whose sessions take neither a mask nor a length."""

    def __init__(self):
        super().__init__()
        self.llama = model_of()
        self.config = self.llama.config

    def session(self):
        session = self.llama.session()
        return SimpleNamespace(feed=lambda input_ids: session.feed(input_ids))


def test_prompts_of_one_length_need_no_padding():
    prompts = [prompt[:2] for prompt in PROMPTS]
    stop = generate(model_of(), prompts, max_new_tokens=9)[0].ids[2]
    expected = generate(model_of(), prompts, max_new_tokens=9, stop_tokens={stop})
    assert generate(Unpadded(), prompts, max_new_tokens=9, stop_tokens={stop}) == expected


def test_padding_that_a_model_does_not_know_is_refused():
    with pytest.raises(ValueError, match="Unpadded knows no padding: give one prompt, or prompts of the same length"):
        generate(Unpadded(), PROMPTS, max_new_tokens=2)


def test_no_gradients_are_recorded():
    """Some sessions leave that to their caller."""
    model = Unpadded()
    model.session = lambda: SimpleNamespace(feed=lambda input_ids: model.llama(input_ids))
    (step,) = stream(model, [PROMPTS[0]], max_new_tokens=1)
    assert not step.log_probs.requires_grad
