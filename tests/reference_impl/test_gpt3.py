import math
from dataclasses import replace

import pytest
import torch

from reference_impl.models.gpt3 import GPT3, GPT3Config

CONFIG = GPT3Config(
    vocab_size=17, n_positions=11, n_embd=6, n_layer=3, n_head=3, n_inner=7, layer_norm_epsilon=0.01, window_size=4
)  # fmt: skip
SEQ = 9
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2], [0, 5, 7, 7, 2, 1, 5, 6, 6]])


def gpt3(config=CONFIG, attention="eager"):
    """A model whose norms and biases are random too, so that none can be left out unnoticed."""
    model = GPT3(config, attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.7)
    return model.double()


def gelu(x):
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


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

    def attend(layer, normed):
        joint = [project(f"transformer.h.{layer}.attn.c_attn", x) for x in normed]
        banded = config.attention_pattern[layer % len(config.attention_pattern)] == "banded"

        def part(t, third, head):
            start = third * config.n_embd + head * width
            return joint[t][start : start + width]

        outputs = []
        for t in range(len(normed)):
            context, first = [], max(0, t - config.window_size + 1) if banded else 0
            for head in range(config.n_head):
                query = part(t, 0, head)
                scores = [sum(map(float.__mul__, query, part(s, 1, head))) for s in range(first, t + 1)]
                powers = [math.exp(score / math.sqrt(width)) for score in scores]
                for d in range(width):
                    seen = [p * part(s, 2, head)[d] for s, p in enumerate(powers, start=first)]
                    context.append(sum(seen) / sum(powers))
            outputs.append(project(f"transformer.h.{layer}.attn.c_proj", context))
        return outputs

    def feed_forward(name, x):
        return project(f"{name}.c_proj", [gelu(u) for u in project(f"{name}.c_fc", x)])

    def add(xs, ys):
        return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(xs, ys, strict=True)]

    table, places = weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
    stream = add([table[i] for i in ids], [places[m] for m in positions or range(len(ids))])
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}"
        stream = add(stream, attend(layer, [norm(f"{name}.ln_1", x) for x in stream]))
        stream = add(stream, [feed_forward(f"{name}.mlp", norm(f"{name}.ln_2", x)) for x in stream])
    final = [norm("transformer.ln_f", x) for x in stream]
    logits = [[sum(map(float.__mul__, row, x)) for row in weights["lm_head.weight"]] for x in final]
    return torch.tensor(logits, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- the model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_inner": None},
        {"tie_word_embeddings": False},
        {"window_size": 1},
        {"attention_pattern": ("banded", "dense")},
        {"attention_pattern": ("dense", "banded", "banded")},
        {"attention_pattern": ("dense",), "window_size": None},
    ],
    ids=str,
)
def test_logits_follow_the_equations(changes, attention):
    model = gpt3(replace(CONFIG, **changes), attention)
    expected = torch.stack([equations(model, ids) for ids in IDS.tolist()])
    close(model(IDS), expected)


def test_given_positions_follow_the_equations():
    model, positions = gpt3(), [5, 0, 10, 3, 3, 7, 1, 2, 4]
    expected = torch.stack([equations(model, ids, positions) for ids in IDS.tolist()])
    close(model(IDS, position_ids=torch.tensor([positions])), expected)


def test_parameters_have_the_names_and_shapes_of_a_gpt_2_checkpoint():
    model = GPT3(replace(CONFIG, n_layer=1))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "transformer.wte.weight": (17, 6),
        "transformer.wpe.weight": (11, 6),
        "transformer.h.0.ln_1.weight": (6,),
        "transformer.h.0.ln_1.bias": (6,),
        "transformer.h.0.attn.c_attn.weight": (6, 18),
        "transformer.h.0.attn.c_attn.bias": (18,),
        "transformer.h.0.attn.c_proj.weight": (6, 6),
        "transformer.h.0.attn.c_proj.bias": (6,),
        "transformer.h.0.ln_2.weight": (6,),
        "transformer.h.0.ln_2.bias": (6,),
        "transformer.h.0.mlp.c_fc.weight": (6, 7),
        "transformer.h.0.mlp.c_fc.bias": (7,),
        "transformer.h.0.mlp.c_proj.weight": (7, 6),
        "transformer.h.0.mlp.c_proj.bias": (6,),
        "transformer.ln_f.weight": (6,),
        "transformer.ln_f.bias": (6,),
        "lm_head.weight": (17, 6),
    }


def test_a_tied_head_is_the_embedding_table():
    model = GPT3(CONFIG)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize(("changed", "moved"), [(2, range(2, 6)), (5, range(5, 9)), (8, range(8, 9))])
def test_a_banded_block_shows_a_token_to_window_size_queries(changed, moved):
    """One banded block, so that nothing reaches further through a second one."""
    model, other = gpt3(replace(CONFIG, n_layer=1, attention_pattern=("banded",))), IDS.clone()
    other[:, changed] += 1
    rows = (model(other) - model(IDS)).abs().amax(dim=(0, 2)).nonzero().flatten()
    assert rows.tolist() == list(moved)


# --- sessions


def test_a_session_holds_keys_and_values_of_every_layer():
    session = gpt3().session(max_length=SEQ)
    session.feed(IDS[:, :5])
    keys_and_values = 2 * 3 * 3 * 3 * SEQ * 2 * 8  # both, layers, batch, heads, tokens, head_dim, float64
    assert session.state_bytes() == keys_and_values + 3 * 5  # and which tokens are real


# --- the config


def test_defaults_are_those_of_the_papers_largest_model():
    assert GPT3Config.from_dict({"window_size": 128}) == GPT3Config(
        vocab_size=50257,
        n_positions=2048,
        n_embd=12288,
        n_layer=96,
        n_head=96,
        n_inner=49152,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        attention_pattern=("dense", "banded"),
        window_size=128,
    )


def test_the_pattern_is_repeated_over_the_blocks():
    config = replace(CONFIG, attention_pattern=("dense", "dense", "banded"))
    assert [config.kind(layer) for layer in range(7)] == ["dense", "dense", "banded"] * 2 + ["dense"]


def test_a_config_is_written_as_it_is_read():
    assert GPT3Config.from_dict(CONFIG.to_dict()) == CONFIG
    assert CONFIG.to_dict()["attention_pattern"] == ["dense", "banded"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_attn_weights": False}, r"unknown keys \['scale_attn_weights'\]"),
        ({"max_position_embeddings": 4}, r"unknown keys \['max_position_embeddings'\]"),
        ({"model_type": "gpt2"}, "model_type='gpt2' is not 'gpt3'"),
        ({"n_embd": 50}, "n_embd=50 must be divisible by n_head=96; give a divisor of it"),
        ({"attention_pattern": ["dense", "local"]}, r"attention_pattern=\['dense', 'local'\] must hold 'dense' and"),
        ({"attention_pattern": []}, r"attention_pattern=\[\] must hold 'dense' and 'banded' only"),
        ({"attention_pattern": "dense"}, "attention_pattern='dense' must be a list of 'dense' and 'banded'"),
        ({"window_size": None}, "attention_pattern has banded blocks: give window_size, the keys that a query sees"),
        ({"window_size": 0}, "window_size=0 must be greater than 0"),
        ({"window_size": 2.5}, r"window_size=2\.5 must be of type int"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value),
)
def test_a_config_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT3Config.from_dict({"window_size": 5} | changes)
