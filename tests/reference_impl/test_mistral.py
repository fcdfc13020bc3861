import cmath
import math
from dataclasses import replace

import pytest
import torch

from reference_impl.models.mistral import Mistral, MistralConfig
from reference_impl.nn.rotary import LinearScaling

CONFIG = MistralConfig(
    vocab_size=17,
    hidden_size=10,
    intermediate_size=7,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=4,
    rms_norm_eps=0.01,
    rope_theta=50.0,
    sliding_window=3,
)
SEQ = 9
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2], [0, 5, 7, 7, 2, 1, 5, 6, 6]])


def mistral(config=CONFIG, attention="eager"):
    """A model whose norms are random too, so that none can be left out unnoticed."""
    model = Mistral(config, attention)
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

    def feed_forward(name, x):
        gate, up = project(f"{name}.gate_proj", x), project(f"{name}.up_proj", x)
        return project(f"{name}.down_proj", [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)])

    def add(xs, ys):
        return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(xs, ys, strict=True)]

    stream = [weights["model.embed_tokens.weight"][i] for i in ids]
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"
        stream = add(stream, attend(f"{layer}.self_attn", [norm(f"{layer}.input_layernorm", x) for x in stream]))
        normed = [norm(f"{layer}.post_attention_layernorm", x) for x in stream]
        stream = add(stream, [feed_forward(f"{layer}.mlp", x) for x in normed])
    return torch.tensor([project("lm_head", norm("model.norm", x)) for x in stream], dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- the model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"sliding_window": None}, {"sliding_window": 1}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1}],
    ids=["window", "no-window", "sees-itself-alone", "tied", "one-key-value-head"],
)
def test_logits_follow_the_equations(changes, attention):
    model = mistral(replace(CONFIG, **changes), attention)
    expected = torch.stack([equations(model, ids) for ids in IDS.tolist()])
    close(model(IDS), expected)


def test_linear_scaling_is_a_division_of_positions():
    scaled = mistral(replace(CONFIG, rope_scaling=LinearScaling(factor=2.0)))
    positions = torch.arange(0, 2 * SEQ, 2)[None]
    close(scaled(IDS, position_ids=positions), mistral()(IDS))


def test_parameters_have_the_names_and_shapes_of_a_hugging_face_checkpoint():
    model = Mistral(replace(CONFIG, num_hidden_layers=1))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "model.embed_tokens.weight": (17, 10),
        "model.layers.0.input_layernorm.weight": (10,),
        "model.layers.0.self_attn.q_proj.weight": (24, 10),
        "model.layers.0.self_attn.k_proj.weight": (12, 10),
        "model.layers.0.self_attn.v_proj.weight": (12, 10),
        "model.layers.0.self_attn.o_proj.weight": (10, 24),
        "model.layers.0.post_attention_layernorm.weight": (10,),
        "model.layers.0.mlp.gate_proj.weight": (7, 10),
        "model.layers.0.mlp.up_proj.weight": (7, 10),
        "model.layers.0.mlp.down_proj.weight": (10, 7),
        "model.norm.weight": (10,),
        "lm_head.weight": (17, 10),
    }


def test_a_tied_head_is_the_embedding_table():
    model = Mistral(replace(CONFIG, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(("layers", "last"), [(1, 5), (2, 7), (3, 9)])
def test_a_token_reaches_as_far_as_layers_times_window_allow(layers, last):
    """A token at 3 is seen by 3, 4 and 5 with a window of 3; two more for each further layer."""
    model, changed = mistral(replace(CONFIG, num_hidden_layers=layers)), IDS.clone()
    changed[:, 3] += 1
    moved = (model(changed) - model(IDS)).abs().amax(dim=-1).gt(1e-9)
    expected = torch.tensor([3 <= place <= last for place in range(SEQ)])
    assert torch.equal(moved, expected.expand(3, SEQ))


def test_a_window_as_long_as_the_text_is_none():
    assert torch.equal(
        mistral(replace(CONFIG, sliding_window=SEQ))(IDS), mistral(replace(CONFIG, sliding_window=None))(IDS)
    )


# --- sessions


@pytest.mark.parametrize("tokens", [1, SEQ])
def test_a_fixed_length_holds_its_memory_from_the_first_token_on(tokens):
    session = mistral().session(max_length=SEQ)
    session.feed(IDS[:, :tokens])
    keys_and_values = 2 * 2 * 3 * 3 * 3 * 4 * 8  # both, layers, batch, key/value heads, window, head_dim, float64
    assert session.state_bytes() == keys_and_values + 3 * 8  # and how many tokens each row has


# --- the config


def test_defaults_are_those_of_hugging_face():
    assert MistralConfig.from_dict({}) == MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=False,
        sliding_window=4096,
    )


def test_a_window_of_null_is_none_and_not_the_default():
    assert MistralConfig.from_dict({"sliding_window": None}).sliding_window is None


def test_null_derives_head_dim():
    config = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": None}
    assert MistralConfig.from_dict(config).head_dim == 8


def test_an_explicit_head_dim_need_not_divide_hidden_size():
    config = {"hidden_size": 50, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 14}
    assert MistralConfig.from_dict(config).head_dim == 14


def test_an_int_may_stand_for_a_float():
    assert MistralConfig.from_dict({"rope_theta": 500, "rms_norm_eps": 1}) == MistralConfig(
        rope_theta=500.0, rms_norm_eps=1.0
    )


def test_keys_without_effect_are_accepted():
    config = {"model_type": "mistral", "use_cache": False, "torch_dtype": "float16", "max_position_embeddings": 99}
    assert MistralConfig.from_dict(config) == MistralConfig()


def test_a_config_is_written_as_it_is_read():
    config = replace(CONFIG, rope_scaling=LinearScaling(factor=2.0))
    assert config.to_dict() == {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
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
        "sliding_window": 3,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True, "qk_norm": True}, r"unknown keys \['attention_bias', 'qk_norm'\]"),
        ({"model_type": "llama"}, "model_type='llama' is not 'mistral'"),
        ({"hidden_size": 50}, "hidden_size=50 must be divisible by num_attention_heads=32; or give head_dim"),
        ({"num_key_value_heads": 5}, "num_attention_heads=32 must be divisible by num_key_value_heads=5"),
        ({"num_key_value_heads": None}, "num_key_value_heads=None must be of type int"),
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
        MistralConfig.from_dict(changes)
