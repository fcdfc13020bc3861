import cmath
import math
from dataclasses import replace

import pytest
import torch

from reference_impl.models.mixtral import Mixtral, MixtralConfig
from reference_impl.nn.moe import recorded_router_logits
from reference_impl.nn.rotary import LinearScaling

CONFIG = MixtralConfig(
    vocab_size=17,
    hidden_size=10,
    intermediate_size=7,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=4,
    rms_norm_eps=0.01,
    rope_theta=50.0,
    sliding_window=5,
    num_local_experts=5,
    num_experts_per_tok=2,
)
SEQ = 9
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2], [0, 5, 7, 7, 2, 1, 5, 6, 6]])


def mixtral(config=CONFIG, attention="eager"):
    """A model whose norms are random too, so that none can be left out unnoticed."""
    model = Mixtral(config, attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.7)
    return model.double()


def equations(model, ids):
    """Logits of one row, from the equations of the papers, number by number; the window is a range of Python."""
    config, weights = model.config, {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    half, group = config.head_dim // 2, config.num_attention_heads // config.num_key_value_heads

    def project(name, x):
        return [sum(map(float.__mul__, row, x)) for row in weights[f"{name}.weight"]]

    def norm(name, x):
        root = math.sqrt(sum(v * v for v in x) / len(x) + config.rms_norm_eps)
        return [v / root * g for v, g in zip(x, weights[f"{name}.weight"], strict=True)]

    def head(x, index):
        return x[index * config.head_dim : (index + 1) * config.head_dim]

    def turned(x, position):
        angles = [position * config.rope_theta ** (-2 * j / config.head_dim) for j in range(half)]
        return [complex(x[j], x[j + half]) * cmath.exp(1j * angle) for j, angle in enumerate(angles)]

    def dot(q, k):
        return sum((a * b.conjugate()).real for a, b in zip(q, k, strict=True))

    def attend(name, normed):
        queries, keys, values = ([project(f"{name}.{p}_proj", x) for x in normed] for p in "qkv")
        outputs = []
        for t in range(len(normed)):
            context = []
            for h in range(config.num_attention_heads):
                query = turned(head(queries[t], h), t)
                visible = range(max(0, t - config.sliding_window + 1) if config.sliding_window else 0, t + 1)
                scores = [dot(query, turned(head(keys[s], h // group), s)) / config.head_dim**0.5 for s in visible]
                powers = [math.exp(score) for score in scores]
                seen = [head(values[s], h // group) for s in visible]
                context += [
                    sum(p * v[d] for p, v in zip(powers, seen, strict=True)) / sum(powers) for d in range(2 * half)
                ]
            outputs.append(project(f"{name}.o_proj", context))
        return outputs

    def expert(name, x):
        gate, up = project(f"{name}.w1", x), project(f"{name}.w3", x)
        return project(f"{name}.w2", [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)])

    def mixture(name, x):
        logits = project(f"{name}.gate", x)
        chosen = sorted(range(config.num_local_experts), key=lambda e: -logits[e])[: config.num_experts_per_tok]
        total = sum(math.exp(logits[e]) for e in chosen)
        outputs = [(math.exp(logits[e]) / total, expert(f"{name}.experts.{e}", x)) for e in chosen]
        return [sum(weight * output[i] for weight, output in outputs) for i in range(config.hidden_size)]

    def add(xs, ys):
        return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(xs, ys, strict=True)]

    stream = [weights["model.embed_tokens.weight"][i] for i in ids]
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"
        stream = add(stream, attend(f"{layer}.self_attn", [norm(f"{layer}.input_layernorm", x) for x in stream]))
        normed = [norm(f"{layer}.post_attention_layernorm", x) for x in stream]
        stream = add(stream, [mixture(f"{layer}.block_sparse_moe", x) for x in normed])
    return torch.tensor([project("lm_head", norm("model.norm", x)) for x in stream], dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- the model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": None},
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 5},
        {"num_local_experts": 11, "num_experts_per_tok": 3},
        {"tie_word_embeddings": True},
    ],
    ids=["2-of-5", "no-window", "1-of-5", "5-of-5", "3-of-11", "tied"],
)
def test_logits_follow_the_equations(changes, attention):
    model = mixtral(replace(CONFIG, **changes), attention)
    expected = torch.stack([equations(model, ids) for ids in IDS.tolist()])
    close(model(IDS), expected)


def test_linear_scaling_is_a_division_of_positions():
    scaled = mixtral(replace(CONFIG, rope_scaling=LinearScaling(factor=2.0)))
    positions = torch.arange(0, 2 * SEQ, 2)[None]
    close(scaled(IDS, position_ids=positions), mixtral()(IDS))


def test_parameters_have_the_names_and_shapes_of_a_hugging_face_checkpoint():
    model = Mixtral(replace(CONFIG, num_hidden_layers=1, num_local_experts=2))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "model.embed_tokens.weight": (17, 10),
        "model.layers.0.input_layernorm.weight": (10,),
        "model.layers.0.self_attn.q_proj.weight": (24, 10),
        "model.layers.0.self_attn.k_proj.weight": (12, 10),
        "model.layers.0.self_attn.v_proj.weight": (12, 10),
        "model.layers.0.self_attn.o_proj.weight": (10, 24),
        "model.layers.0.post_attention_layernorm.weight": (10,),
        "model.layers.0.block_sparse_moe.gate.weight": (2, 10),
        "model.layers.0.block_sparse_moe.experts.0.w1.weight": (7, 10),
        "model.layers.0.block_sparse_moe.experts.0.w2.weight": (10, 7),
        "model.layers.0.block_sparse_moe.experts.0.w3.weight": (7, 10),
        "model.layers.0.block_sparse_moe.experts.1.w1.weight": (7, 10),
        "model.layers.0.block_sparse_moe.experts.1.w2.weight": (10, 7),
        "model.layers.0.block_sparse_moe.experts.1.w3.weight": (7, 10),
        "model.norm.weight": (10,),
        "lm_head.weight": (17, 10),
    }


def test_a_tied_head_is_the_embedding_table():
    model = Mixtral(replace(CONFIG, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- sessions


@pytest.mark.parametrize("tokens", [1, SEQ])
def test_a_fixed_length_holds_its_memory_from_the_first_token_on(tokens):
    session = mixtral().session(max_length=SEQ)
    session.feed(IDS[:, :tokens])
    keys_and_values = 2 * 2 * 3 * 3 * 5 * 4 * 8  # both, layers, batch, key/value heads, window, head_dim, float64
    assert session.state_bytes() == keys_and_values + 3 * 8  # and how many tokens each row has


# --- the config


def test_defaults_are_those_of_hugging_face():
    assert MixtralConfig.from_dict({}) == MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        rope_scaling=None,
        tie_word_embeddings=False,
        sliding_window=None,
        num_local_experts=8,
        num_experts_per_tok=2,
    )


def test_null_derives_head_dim():
    config = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": None}
    assert MixtralConfig.from_dict(config).head_dim == 8


def test_an_explicit_head_dim_need_not_divide_hidden_size():
    config = {"hidden_size": 50, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 14}
    assert MixtralConfig.from_dict(config).head_dim == 14


def test_an_int_may_stand_for_a_float():
    assert MixtralConfig.from_dict({"rope_theta": 500, "rms_norm_eps": 1}) == MixtralConfig(
        rope_theta=500.0, rms_norm_eps=1.0
    )


def test_keys_without_effect_are_accepted():
    config = {
        "model_type": "mixtral",
        "router_jitter_noise": 0.1,
        "output_router_logits": True,
        "torch_dtype": "float16",
        "max_position_embeddings": 99,
    }
    assert MixtralConfig.from_dict(config) == MixtralConfig()


def test_a_config_is_written_as_it_is_read():
    config = replace(CONFIG, rope_scaling=LinearScaling(factor=2.0))
    assert config.to_dict() == {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 17,
        "hidden_size": 10,
        "intermediate_size": 7,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 0.01,
        "rope_theta": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0},
        "tie_word_embeddings": False,
        "sliding_window": 5,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True, "qk_norm": True}, r"unknown keys \['attention_bias', 'qk_norm'\]"),
        ({"model_type": "llama"}, "model_type='llama' is not 'mixtral'"),
        ({"hidden_size": 50}, "hidden_size=50 must be divisible by num_attention_heads=32; or give head_dim"),
        ({"num_key_value_heads": 5}, "num_attention_heads=32 must be divisible by num_key_value_heads=5"),
        ({"num_key_value_heads": None}, "num_key_value_heads=None must be of type int"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must not be greater than num_local_experts=8"),
        ({"num_local_experts": 0}, "num_local_experts=0 must be greater than 0"),
        ({"sliding_window": 0}, "sliding_window=0 must be greater than 0"),
        ({"sliding_window": 4.5}, r"sliding_window=4\.5 must be of type int \| None"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"vocab_size": 0}, "vocab_size=0 must be greater than 0"),
        ({"vocab_size": "9"}, "vocab_size='9' must be of type int"),
        ({"hidden_act": None}, "hidden_act=None must be of type str"),
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' is not implemented"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be of type bool"),
        ({"rms_norm_eps": -1.0}, r"rms_norm_eps=-1\.0 must be greater than 0"),
        ({"rope_theta": None}, "rope_theta=None must be a positive float"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value),
)
def test_a_config_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MixtralConfig.from_dict(changes)


def test_router_losses_are_those_of_all_layers_together():
    model = mixtral()
    with recorded_router_logits(model) as recorded:
        model(IDS)
    tokens = [token for layer in recorded for row in layer.tolist() for token in row]
    share, probability = [0.0] * 5, [0.0] * 5
    for token in tokens:
        for expert in sorted(range(5), key=lambda e: -token[e])[:2]:
            share[expert] += 1 / len(tokens)
        total = sum(map(math.exp, token))
        probability = [p + math.exp(v) / total / len(tokens) for p, v in zip(probability, token, strict=True)]
    expected = 5 * sum(f * p for f, p in zip(share, probability, strict=True))
    assert len(tokens) == 2 * 3 * SEQ
    assert model.router_losses(recorded)["aux_loss"].item() == pytest.approx(expected, rel=1e-12)
