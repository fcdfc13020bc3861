import cmath
import math
from dataclasses import replace

import pytest
import torch

from reference_impl.models.phi import Phi, PhiConfig
from reference_impl.nn.rotary import LinearScaling

CONFIG = PhiConfig(
    vocab_size=17,
    hidden_size=30,
    intermediate_size=7,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    layer_norm_eps=0.01,
    rope_theta=50.0,
    partial_rotary_factor=0.9,  # 4.5 of a head of 5 elements: 4 turn
    qk_layernorm=True,
)
SEQ = 9
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2], [0, 5, 7, 7, 2, 1, 5, 6, 6]])


def phi(config=CONFIG, attention="eager"):
    """A model whose norms and biases are random too, so that none can be left out unnoticed."""
    model = Phi(config, attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.7)
    return model.double()


def equations(model, ids):
    """Logits of one row, from the equations of the papers, number by number."""
    config, weights = model.config, {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    group = heads // config.num_key_value_heads
    half = math.floor(config.partial_rotary_factor * head_dim) // 2

    def project(name, x):
        rows, biases = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return [sum(map(float.__mul__, row, x)) + b for row, b in zip(rows, biases, strict=True)]

    def norm(name, x):
        mean = sum(x) / len(x)
        root = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + config.layer_norm_eps)
        scaled = zip(x, weights[f"{name}.weight"], weights[f"{name}.bias"], strict=True)
        return [(v - mean) / root * g + b for v, g, b in scaled]

    def head(x, index):
        return x[index * head_dim : (index + 1) * head_dim]

    def turned(x, position):
        """The first 2 · half elements as complex numbers, turned; the others behind them as they are."""
        angles = [position * config.rope_theta ** (-j / half) for j in range(half)]
        pairs = [complex(x[j], x[j + half]) * cmath.exp(1j * angle) for j, angle in enumerate(angles)]
        return pairs + x[2 * half :]

    def dot(q, k):
        return sum((a * b.conjugate()).real for a, b in zip(q, k, strict=True))

    def attend(name, normed):
        queries, keys, values = ([project(f"{name}.{p}_proj", x) for x in normed] for p in "qkv")

        def part(which, vectors, index, position):
            vector = head(vectors[position], index)
            return turned(norm(f"{name}.{which}_layernorm", vector) if config.qk_layernorm else vector, position)

        outputs = []
        for t in range(len(normed)):
            context = []
            for h in range(heads):
                query = part("q", queries, h, t)
                scores = [dot(query, part("k", keys, h // group, s)) / head_dim**0.5 for s in range(t + 1)]
                powers = [math.exp(score) for score in scores]
                seen = [head(values[s], h // group) for s in range(t + 1)]
                context += [
                    sum(p * v[d] for p, v in zip(powers, seen, strict=True)) / sum(powers) for d in range(head_dim)
                ]
            outputs.append(project(f"{name}.dense", context))
        return outputs

    def gelu(x):
        return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def feed_forward(name, x):
        return project(f"{name}.fc2", [gelu(u) for u in project(f"{name}.fc1", x)])

    def add(*vectors):
        return [[sum(elements) for elements in zip(*rows, strict=True)] for rows in zip(*vectors, strict=True)]

    stream = [weights["model.embed_tokens.weight"][i] for i in ids]
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"
        normed = [norm(f"{layer}.input_layernorm", x) for x in stream]
        fed = [feed_forward(f"{layer}.mlp", x) for x in normed]
        stream = add(stream, attend(f"{layer}.self_attn", normed), fed)
    return torch.tensor([project("lm_head", norm("model.final_layernorm", x)) for x in stream], dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- the model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_layernorm": False},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 6, "partial_rotary_factor": 0.4},
        {"num_attention_heads": 5, "num_key_value_heads": 5, "partial_rotary_factor": 1.0},
    ],
    ids=["normed-heads", "plain-heads", "tied", "one-key-value-head", "one-pair-turns", "whole-heads-turn"],
)
def test_logits_follow_the_equations(changes, attention):
    model = phi(replace(CONFIG, **changes), attention)
    expected = torch.stack([equations(model, ids) for ids in IDS.tolist()])
    close(model(IDS), expected)


def test_linear_scaling_is_a_division_of_positions():
    scaled = phi(replace(CONFIG, rope_scaling=LinearScaling(factor=2.0)))
    positions = torch.arange(0, 2 * SEQ, 2)[None]
    close(scaled(IDS, position_ids=positions), phi()(IDS))


def test_parameters_have_the_names_and_shapes_of_a_hugging_face_checkpoint():
    model = Phi(replace(CONFIG, num_hidden_layers=1))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "model.embed_tokens.weight": (17, 30),
        "model.layers.0.input_layernorm.weight": (30,),
        "model.layers.0.input_layernorm.bias": (30,),
        "model.layers.0.self_attn.q_proj.weight": (30, 30),
        "model.layers.0.self_attn.q_proj.bias": (30,),
        "model.layers.0.self_attn.k_proj.weight": (15, 30),
        "model.layers.0.self_attn.k_proj.bias": (15,),
        "model.layers.0.self_attn.v_proj.weight": (15, 30),
        "model.layers.0.self_attn.v_proj.bias": (15,),
        "model.layers.0.self_attn.dense.weight": (30, 30),
        "model.layers.0.self_attn.dense.bias": (30,),
        "model.layers.0.self_attn.q_layernorm.weight": (5,),
        "model.layers.0.self_attn.q_layernorm.bias": (5,),
        "model.layers.0.self_attn.k_layernorm.weight": (5,),
        "model.layers.0.self_attn.k_layernorm.bias": (5,),
        "model.layers.0.mlp.fc1.weight": (7, 30),
        "model.layers.0.mlp.fc1.bias": (7,),
        "model.layers.0.mlp.fc2.weight": (30, 7),
        "model.layers.0.mlp.fc2.bias": (30,),
        "model.final_layernorm.weight": (30,),
        "model.final_layernorm.bias": (30,),
        "lm_head.weight": (17, 30),
        "lm_head.bias": (17,),
    }


def test_heads_that_are_not_normed_have_no_parameters_for_it():
    names = [name for name, _ in Phi(replace(CONFIG, qk_layernorm=False)).named_parameters()]
    assert [name for name in names if "q_layernorm" in name or "k_layernorm" in name] == []


def test_a_tied_head_is_the_embedding_table_and_has_its_own_bias():
    model = Phi(replace(CONFIG, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.bias.shape == (17,)


# --- sessions


def test_a_fixed_length_holds_the_memory_of_the_key_value_heads_alone():
    session = phi().session(max_length=SEQ)
    session.feed(IDS[:, :4])
    keys_and_values = 2 * 2 * 3 * 3 * SEQ * 5 * 8  # both, layers, batch, key/value heads, tokens, head_dim, float64
    assert session.state_bytes() == keys_and_values + 3 * 4  # and which tokens are real


# --- the config


def test_defaults_are_those_of_hugging_face():
    assert PhiConfig.from_dict({}) == PhiConfig(
        vocab_size=51200,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        partial_rotary_factor=0.5,
        qk_layernorm=False,
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize(
    "config",
    [
        {"partial_rotary_factor": 0.25},
        {"rope_parameters": {"partial_rotary_factor": 0.25}},
        {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.25}},
        {"partial_rotary_factor": 0.25, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
    ],
    ids=["4.x", "5.x", "scaling", "both"],
)
def test_the_rotary_factor_is_read_wherever_it_stands(config):
    assert PhiConfig.from_dict(config) == PhiConfig(partial_rotary_factor=0.25)


def test_keys_without_effect_are_accepted():
    config = {"model_type": "phi", "resid_pdrop": 0.1, "embd_pdrop": 0.2, "attention_dropout": 0.3, "use_cache": False}
    assert PhiConfig.from_dict(config) == PhiConfig()


def test_a_config_is_written_as_it_is_read():
    config = replace(CONFIG, rope_scaling=LinearScaling(factor=2.0))
    assert config.to_dict() == {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "vocab_size": 17,
        "hidden_size": 30,
        "intermediate_size": 7,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 0.01,
        "rope_theta": 50.0,
        "partial_rotary_factor": 0.9,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {
            "rope_type": "linear", "factor": 2.0, "rope_theta": 50.0, "partial_rotary_factor": 0.9,
        },
        "qk_layernorm": True,
        "tie_word_embeddings": False,
    }  # fmt: skip
    assert PhiConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 80, "rotary_dim": 32}, r"unknown keys \['head_dim', 'rotary_dim'\]"),
        ({"model_type": "phi3"}, "model_type='phi3' is not 'phi'"),
        ({"hidden_size": 50}, "hidden_size=50 must be divisible by num_attention_heads=32"),
        ({"num_key_value_heads": 5}, "num_attention_heads=32 must be divisible by num_key_value_heads=5"),
        (
            {"partial_rotary_factor": 0.3},
            r"partial_rotary_factor=0\.3 of a head of 64 elements turns 19: give a factor",
        ),
        ({"partial_rotary_factor": 1.5}, r"turns 96: give a factor that turns an even number of them, from 2 to 64"),
        ({"partial_rotary_factor": 0.02}, "turns 1: give"),
        ({"partial_rotary_factor": None}, "partial_rotary_factor=None must be a positive float"),
        (
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}},
            r"partial_rotary_factor=0\.5 and rope_parameters\.partial_rotary_factor=0\.25 disagree",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not implemented"),
        ({"vocab_size": 0}, "vocab_size=0 must be greater than 0"),
        ({"qk_layernorm": None}, "qk_layernorm=None must be of type bool"),
        ({"hidden_act": "gelu_fast"}, "hidden_act='gelu_fast' is not implemented"),
        ({"layer_norm_eps": -1.0}, r"layer_norm_eps=-1\.0 must be greater than 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value),
)
def test_a_config_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PhiConfig.from_dict(changes)
