import math
from dataclasses import replace

import pytest
import torch

from reference_impl.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=17, n_positions=11, n_embd=6, n_layer=2, n_head=3, layer_norm_epsilon=0.01)
SEQ = 9
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2], [0, 5, 7, 7, 2, 1, 5, 6, 6]])


def gpt(config=CONFIG, attention="eager"):
    """A model whose norms and biases are random too, so that none can be left out unnoticed."""
    model = GPT(config, attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.7)
    return model.double()


ACTIVATIONS = {
    "gelu": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(0.0, x),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
}


def equations(model, ids, positions=None):
    """Logits of one row, from the equations of the papers, number by number."""
    config, weights = model.config, {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    width = config.n_embd // config.n_head

    def project(name, x):
        outputs = list(weights[f"{name}.bias"])
        for value, row in zip(x, weights[f"{name}.weight"], strict=True):  # row i belongs to input i
            outputs = [total + value * w for total, w in zip(outputs, row, strict=True)]
        return outputs

    def norm(name, x):
        mean = sum(x) / len(x)
        root = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + config.layer_norm_epsilon)
        affine = zip(x, weights[f"{name}.weight"], weights[f"{name}.bias"], strict=True)
        return [(v - mean) / root * g + b for v, g, b in affine]

    def attend(layer, stream):
        joint = [project(f"transformer.h.{layer}.attn.c_attn", x) for x in stream]

        def part(t, third, head):
            start = third * config.n_embd + head * width
            return joint[t][start : start + width]

        outputs = []
        for t in range(len(stream)):
            context = []
            for head in range(config.n_head):
                query = part(t, 0, head)
                scores = [sum(map(float.__mul__, query, part(s, 1, head))) / math.sqrt(width) for s in range(t + 1)]
                powers = [math.exp(score) for score in scores]
                for d in range(width):
                    seen = [p * part(s, 2, head)[d] for s, p in enumerate(powers)]
                    context.append(sum(seen) / sum(powers))
            outputs.append(project(f"transformer.h.{layer}.attn.c_proj", context))
        return outputs

    def feed_forward(name, x):
        return project(f"{name}.c_proj", [ACTIVATIONS[config.afn](u) for u in project(f"{name}.c_fc", x)])

    def add(xs, ys):
        return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(xs, ys, strict=True)]

    table, places = weights["transformer.tokens_embed.weight"], weights["transformer.positions_embed.weight"]
    stream = add([table[i] for i in ids], [places[m] for m in positions or range(len(ids))])
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}"
        stream = [norm(f"{name}.ln_1", x) for x in add(stream, attend(layer, stream))]
        stream = [norm(f"{name}.ln_2", x) for x in add(stream, [feed_forward(f"{name}.mlp", x) for x in stream])]
    logits = [[sum(map(float.__mul__, row, x)) for row in weights["lm_head.weight"]] for x in stream]
    return torch.tensor(logits, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- the model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"afn": "relu"}, {"afn": "silu"}, {"afn": "swish"}],
    ids=str,
)
def test_logits_follow_the_equations(changes, attention):
    model = gpt(replace(CONFIG, **changes), attention)
    expected = torch.stack([equations(model, ids) for ids in IDS.tolist()])
    close(model(IDS), expected)


def test_given_positions_follow_the_equations():
    model, positions = gpt(), [5, 0, 10, 3, 3, 7, 1, 2, 4]
    expected = torch.stack([equations(model, ids, positions) for ids in IDS.tolist()])
    close(model(IDS, position_ids=torch.tensor([positions])), expected)


def test_parameters_have_the_names_and_shapes_of_a_hugging_face_checkpoint():
    model = GPT(replace(CONFIG, n_layer=1))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "transformer.tokens_embed.weight": (17, 6),
        "transformer.positions_embed.weight": (11, 6),
        "transformer.h.0.ln_1.weight": (6,),
        "transformer.h.0.ln_1.bias": (6,),
        "transformer.h.0.attn.c_attn.weight": (6, 18),
        "transformer.h.0.attn.c_attn.bias": (18,),
        "transformer.h.0.attn.c_proj.weight": (6, 6),
        "transformer.h.0.attn.c_proj.bias": (6,),
        "transformer.h.0.ln_2.weight": (6,),
        "transformer.h.0.ln_2.bias": (6,),
        "transformer.h.0.mlp.c_fc.weight": (6, 24),
        "transformer.h.0.mlp.c_fc.bias": (24,),
        "transformer.h.0.mlp.c_proj.weight": (24, 6),
        "transformer.h.0.mlp.c_proj.bias": (6,),
        "lm_head.weight": (17, 6),
    }


def test_a_tied_head_is_the_embedding_table():
    model = GPT(CONFIG)
    assert model.lm_head.weight is model.transformer.tokens_embed.weight


# --- sessions


def test_a_session_holds_keys_and_values_of_every_layer():
    session = gpt().session(max_length=SEQ)
    session.feed(IDS[:, :5])
    keys_and_values = 2 * 2 * 3 * 3 * SEQ * 2 * 8  # both, layers, batch, heads, tokens, head_dim, float64
    assert session.state_bytes() == keys_and_values + 3 * 5  # and which tokens are real


# --- the config


def test_defaults_are_those_of_hugging_face():
    assert GPTConfig.from_dict({}) == GPTConfig(
        vocab_size=40478,
        n_positions=512,
        n_embd=768,
        n_layer=12,
        n_head=12,
        afn="gelu",
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
    )


def test_the_config_of_the_hub_is_read():
    config = {
        "afn": "gelu", "architectures": ["OpenAIGPTLMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "openai-gpt", "n_ctx": 512, "n_embd": 768,
        "n_head": 12, "n_layer": 12, "n_positions": 512, "n_special": 0, "predict_special_tokens": True,
        "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 40478,
    }  # fmt: skip
    assert GPTConfig.from_dict(config) == GPTConfig()


def test_a_config_is_written_as_it_is_read():
    assert GPTConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert CONFIG.to_dict()["architectures"] == ["OpenAIGPTLMHeadModel"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_inner": 4}, r"unknown keys \['n_inner'\]"),
        ({"max_position_embeddings": 4}, r"unknown keys \['max_position_embeddings'\]"),
        ({"model_type": "gpt2"}, "model_type='gpt2' is not 'openai-gpt'"),
        ({"n_embd": 50}, "n_embd=50 must be divisible by n_head=12; give a divisor of it"),
        ({"afn": "gelu_new"}, r"afn='gelu_new' is not implemented; use one of \['gelu', 'relu', 'silu', 'swish'\]"),
        ({"n_layer": 1.0}, r"n_layer=1\.0 must be of type int"),
        ({"layer_norm_epsilon": -1.0}, r"layer_norm_epsilon=-1\.0 must be greater than 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value),
)
def test_a_config_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig.from_dict(changes)
