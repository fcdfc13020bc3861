"""Packing: texts in one row give what each gives alone, and nothing outside the blocks is computed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_impl.models.gpt2 import GPT2, GPT2Config
from reference_impl.models.gpt3 import GPT3, GPT3Config
from reference_impl.models.llama import Llama, LlamaConfig
from reference_impl.models.mistral import Mistral, MistralConfig
from reference_impl.models.mixtral import Mixtral, MixtralConfig
from reference_impl.packing import pack, packed, unpack

VOCAB = 23
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 10, "intermediate_size": 7, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 4, "rope_theta": 50.0,
}  # fmt: skip
GPT = {"vocab_size": VOCAB, "n_embd": 12, "n_head": 3, "n_layer": 2, "n_positions": 20}
MODELS = {
    "llama": lambda attention: Llama(LlamaConfig(**LLAMA), attention),
    "mistral": lambda attention: Mistral(MistralConfig(**LLAMA, sliding_window=3), attention),
    "mixtral": lambda attention: Mixtral(
        MixtralConfig(**LLAMA, sliding_window=2, num_local_experts=5, num_experts_per_tok=2), attention
    ),
    "gpt2": lambda attention: GPT2(GPT2Config(**GPT), attention),
    "gpt3": lambda attention: GPT3(GPT3Config(**GPT, window_size=3), attention),
}
PROMPTS = [[3, 1, 4, 1, 5], [7], [1, 8, 6, 4, 2, 9, 3, 5], [2], [2], [5, 6]]
prompt = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)


def model_of(name, attention="eager"):
    model = MODELS[name](attention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.7)
    return model.double().eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def assert_each_is_alone(model, prompts):
    ids, lengths = pack(prompts)
    for text, logits in zip(prompts, unpack(packed(model, ids, lengths), lengths), strict=True):
        close(logits, model(torch.tensor([text]))[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_each_text_is_what_it_would_be_alone(name, attention):
    """Texts of a single token first, last, and side by side among them."""
    assert_each_is_alone(model_of(name, attention), PROMPTS)
    assert_each_is_alone(model_of(name, attention), PROMPTS[1:])


@settings(deadline=None, max_examples=60)
@given(prompts=st.lists(prompt, min_size=1, max_size=5))
def test_any_texts_are(prompts):
    assert_each_is_alone(model_of("mistral"), prompts)


@pytest.mark.parametrize("name", MODELS)
def test_a_text_moves_no_other(name):
    """Bit by bit, but for experts, which multiply other numbers of tokens at once."""
    model = model_of(name)
    ids, lengths = pack(PROMPTS)
    changed = ids.clone()
    changed[0, 6:14] = (changed[0, 6:14] + 1) % VOCAB
    with torch.no_grad():
        moved = (packed(model, changed, lengths) - packed(model, ids, lengths))[0].abs().amax(-1)
    own = torch.zeros(18, dtype=torch.bool)
    own[6:14] = True
    assert torch.all(moved[own] > 1e-9)
    assert torch.all(moved[~own] < (1e-12 if name == "mixtral" else 1e-300))


def test_no_score_between_two_texts_is_computed():
    model, shapes = model_of("llama"), []
    for layer in model.model.layers:
        layer.self_attn.scores.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    packed(model, *pack(PROMPTS))
    assert shapes == [(1, 6, len(prompt), len(prompt)) for prompt in PROMPTS] * 2


def test_lengths_may_be_a_tensor():
    model = model_of("llama")
    ids, lengths = pack(PROMPTS)
    assert torch.equal(packed(model, ids, torch.tensor(lengths)), packed(model, ids, lengths))


def test_gradients_are_the_sum_of_the_separate_texts():
    model = model_of("llama")
    ids, lengths = pack(PROMPTS)
    packed(model, ids, lengths).square().sum().backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for text in PROMPTS:
        model(torch.tensor([text])).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-10, atol=1e-10)


def test_prompts_stand_one_behind_the_other():
    ids, lengths = pack([[7, 8, 9], [5], [3, 1]])
    assert (ids.tolist(), lengths) == ([[7, 8, 9, 5, 3, 1]], [3, 1, 2])


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        pack([[1], [], [2]])


def test_no_prompts_are_an_empty_row():
    ids, lengths = pack([])
    assert packed(model_of("llama"), ids, lengths).shape == (1, 0, VOCAB)


@pytest.mark.parametrize("more", [{"attention_mask": torch.ones(1, 3)}, {"cache": object()}], ids=["mask", "cache"])
def test_lengths_go_with_neither_a_mask_nor_a_cache(more):
    with pytest.raises(ValueError, match="give no mask and no cache"):
        model_of("llama")(torch.tensor([[1, 2, 3]]), lengths=[1, 2], **more)
