"""The rolling cache: its worked example, and equality with the full forward for every way of feeding a text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_impl.models.mistral import Mistral, MistralConfig
from reference_impl.models.mixtral import Mixtral, MixtralConfig
from reference_impl.nn.kv_cache import Session
from reference_impl.nn.rolling_cache import RollingCache

SEQ, VOCAB = 14, 23


def small(config_class, **changes):
    return config_class(
        vocab_size=VOCAB, hidden_size=10, intermediate_size=7, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, head_dim=4, rope_theta=50.0, **changes,
    )  # fmt: skip


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.7)
    return model.double().eval()


def mistral(window):
    return randomised(Mistral(small(MistralConfig, sliding_window=window)))


def mixtral(window):
    return randomised(Mixtral(small(MixtralConfig, sliding_window=window, num_local_experts=5, num_experts_per_tok=2)))


IDS = torch.randint(VOCAB, (3, SEQ), generator=torch.Generator().manual_seed(1))


def in_pieces(session, plan, ids=IDS, mask=None):
    outputs, start = [], 0
    for size in plan:
        piece = slice(start, start + size)
        outputs.append(session.feed(ids[:, piece], None if mask is None else mask[:, piece]))
        start += size
    return torch.cat(outputs, dim=1)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- the worked example of the module


def numbered(first, seq):
    """Keys of one row and one head whose only element is the token's place; as floats."""
    return torch.arange(first, first + seq, dtype=torch.float32).view(1, 1, seq, 1)


def fed(cache, first, seq):
    """One call: the places that the cache names and the keys that it returns, which must agree."""
    tokens = cache.tokens(torch.ones(1, seq, dtype=torch.bool))
    keys, values = cache.layers[0].append(numbered(first, seq), -numbered(first, seq))
    cache.commit(tokens)
    assert torch.equal(values, -keys)
    assert keys.flatten().long().tolist() == tokens.place.flatten().tolist()
    assert tokens.real.all()
    return tokens.place.flatten().tolist()


def test_the_worked_example():
    cache = RollingCache(num_hidden_layers=1, sliding_window=4)
    assert fed(cache, 0, 3) == [0, 1, 2]
    assert fed(cache, 3, 3) == [0, 1, 2, 3, 4, 5]
    assert cache.layers[0].keys.flatten().tolist() == [4, 5, 2, 3]
    assert fed(cache, 6, 6) == [4, 5, 2, 3, 6, 7, 8, 9, 10, 11]
    assert cache.layers[0].keys.flatten().tolist() == [8, 9, 10, 11]


def test_padding_has_no_slot():
    cache = RollingCache(num_hidden_layers=1, sliding_window=4)
    fed(cache, 0, 3)
    tokens = cache.tokens(torch.tensor([[False, True, False, False, False]]))
    cache.layers[0].append(numbered(90, 5), numbered(90, 5))
    cache.commit(tokens)
    assert tokens.place.tolist() == [[0, 1, 2, 2, 3, 3, 3, 3]]
    assert cache.layers[0].keys.flatten().tolist() == [0, 1, 2, 91]


def test_a_call_that_was_not_committed_leaves_no_trace():
    cache = RollingCache(num_hidden_layers=1, sliding_window=4)
    fed(cache, 0, 3)
    cache.tokens(torch.ones(1, 9, dtype=torch.bool))
    cache.layers[0].append(numbered(90, 9), numbered(90, 9))
    assert fed(cache, 3, 2) == [0, 1, 2, 3, 4]
    assert cache.layers[0].keys.flatten().tolist() == [4, 1, 2, 3]


# --- equality with the full forward


@st.composite
def feedings(draw):
    """A window, a split of SEQ tokens into calls, and which tokens of each of three rows are real."""
    plan, left = [], SEQ
    while left:
        plan.append(draw(st.integers(1, left)))
        left -= plan[-1]
    real = draw(st.lists(st.lists(st.booleans(), min_size=SEQ, max_size=SEQ), min_size=3, max_size=3))
    return draw(st.integers(1, 6)), plan, torch.tensor(real)


@pytest.mark.parametrize("make", [mistral, mixtral])
@settings(deadline=None, max_examples=150)
@given(feeding=feedings())
def test_any_plan_and_any_padding_gives_the_logits_of_the_whole(make, feeding):
    """Padding anywhere: on the left, on the right, inside, whole rows and whole calls of it."""
    window, plan, real = feeding
    model = make(window)
    with torch.no_grad():
        whole = model(IDS, real)
    close(in_pieces(model.session(), plan, mask=real)[real], whole[real])


@pytest.mark.parametrize("plan", [(14,), (1,) * 14, (3, 3, 3, 5), (5, 5, 4), (2, 12), (9, 1, 1, 1, 1, 1)], ids=str)
def test_pieces_give_the_logits_of_the_whole_without_padding(plan):
    model = mistral(5)
    with torch.no_grad():
        close(in_pieces(model.session(), plan), model(IDS))


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_prompts_then_decoding_give_the_logits_of_each_row_alone(side):
    """Prompts of 2, 9 and 5 tokens in one batch, then five tokens one at a time."""
    model, lengths, longest = mistral(4), (2, 9, 5), 9
    prompt, mask = torch.full((3, longest), VOCAB - 1), torch.zeros(3, longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(longest - length, longest) if side == "left" else slice(0, length)
        prompt[row, place], mask[row, place] = IDS[row, :length], 1
    session = model.session()
    logits = session.feed(prompt, mask)
    steps = [session.feed(torch.stack([IDS[r, n + i : n + i + 1] for r, n in enumerate(lengths)])) for i in range(5)]
    for row, length in enumerate(lengths):
        with torch.no_grad():
            alone = model(IDS[row : row + 1, : length + 5])[0]
        close(torch.cat([logits[row, mask[row].bool()], *(step[row] for step in steps)]), alone)


def test_every_session_of_a_windowed_model_rolls():
    assert isinstance(mistral(4).session()._cache, RollingCache)
    assert isinstance(mixtral(4).session()._cache, RollingCache)
    assert not isinstance(mistral(None).session()._cache, RollingCache)


# --- memory and refusals


@pytest.mark.parametrize("plan", [(1,) * 14, (4, 4, 4, 2), (14,)], ids=str)
def test_memory_does_not_depend_on_what_was_fed(plan):
    session, sizes, start = mistral(4).session(), [], 0
    for size in plan:
        session.feed(IDS[:, start : start + size])
        start += size
        sizes.append(session.state_bytes())
    keys_and_values = 2 * 3 * 3 * 3 * 4 * 4 * 8  # both, layers, batch, key/value heads, slots, head_dim, float64
    assert sizes == [keys_and_values + 3 * 8] * len(plan)  # and a count a row


def test_a_call_remembers_no_more_than_the_window():
    """However long a prompt is, what waits for the commit is what the slots can hold."""
    cache = RollingCache(num_hidden_layers=1, sliding_window=4)
    cache.tokens(torch.ones(2, 50, dtype=torch.bool))
    assert [len(part) for part in cache.writes] == [2 * 4] * 3


def tensors_in(thing):
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from tensors_in(part)
    elif hasattr(thing, "__dict__"):
        yield from tensors_in([held for name, held in vars(thing).items() if name != "_cache"])  # layer → its cache


@pytest.mark.parametrize("window", [4, None])
def test_what_is_held_between_calls_is_what_is_counted(window):
    """What waited for the commit is gone."""
    session = mistral(window).session()
    session.feed(IDS[:, :9])
    held = list(tensors_in(session._cache))
    assert len(held) == 3 * 2 + 1  # keys and values of three layers; how many tokens, or which of them, are real
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == session.state_bytes()


def test_a_buffer_is_never_replaced():
    session = mistral(4).session()
    session.feed(IDS[:, :3])
    keys = session._cache.layers[0].keys
    in_pieces(session, (5, 1), IDS[:, 3:])
    assert session._cache.layers[0].keys is keys


def test_a_length_shorter_than_the_window_needs_fewer_slots():
    cache = RollingCache(num_hidden_layers=1, sliding_window=100, max_length=7)
    fed(cache, 0, 5)
    assert cache.layers[0].keys.shape == (1, 1, 7, 1)
    with pytest.raises(ValueError, match="5 cached and 3 new tokens need max_length=8, got max_length=7"):
        fed(cache, 5, 3)
    assert fed(cache, 5, 2) == [0, 1, 2, 3, 4, 5, 6]


def test_another_batch_size_is_refused_with_both_numbers():
    cache = RollingCache(num_hidden_layers=1, sliding_window=4)
    fed(cache, 0, 1)
    with pytest.raises(ValueError, match="the cache holds a batch of 1, got 2"):
        cache.tokens(torch.ones(2, 1, dtype=torch.bool))


def test_keys_that_record_gradients_are_refused():
    model = mistral(4)
    with pytest.raises(ValueError, match=r"call the model under torch\.no_grad\(\)"):
        model(IDS, cache=RollingCache(num_hidden_layers=3, sliding_window=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_have_the_dtype_of_the_keys(dtype):
    session = mistral(4).to(dtype).session()
    assert session.feed(IDS).dtype == dtype
    assert session._cache.layers[0].keys.dtype == dtype


def test_a_model_may_be_given_its_cache():
    model = mistral(4)
    session = Session(model, RollingCache(num_hidden_layers=3, sliding_window=4))
    with torch.no_grad():
        close(in_pieces(session, (6, 8)), model(IDS))
