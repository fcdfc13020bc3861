import math
from dataclasses import replace

import pytest
import torch

from reference_impl.models.gpt2 import GPT2, GPT2Config

CONFIG = GPT2Config(
    vocab_size=17, n_positions=11, n_embd=6, n_layer=2, n_head=3, n_inner=7, layer_norm_epsilon=0.01
)  # fmt: skip
SEQ = 9
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2], [0, 5, 7, 7, 2, 1, 5, 6, 6]])


def gpt2(config=CONFIG, attention="eager", dtype=torch.float64):
    """A model whose norms and biases are random too, so that none can be left out unnoticed."""
    model = GPT2(config, attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.7)
    return model.to(dtype)


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
        divisor = (math.sqrt(width) if config.scale_attn_weights else 1) * (
            layer + 1 if config.scale_attn_by_inverse_layer_idx else 1
        )

        def part(t, third, head):
            start = third * config.n_embd + head * width
            return joint[t][start : start + width]

        outputs = []
        for t in range(len(normed)):
            context = []
            for head in range(config.n_head):
                query = part(t, 0, head)
                scores = [sum(map(float.__mul__, query, part(s, 1, head))) / divisor for s in range(t + 1)]
                powers = [math.exp(score) for score in scores]
                for d in range(width):
                    seen = [p * part(s, 2, head)[d] for s, p in enumerate(powers)]
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
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
    ],
    ids=str,
)
def test_logits_follow_the_equations(changes, attention):
    model = gpt2(replace(CONFIG, **changes), attention)
    expected = torch.stack([equations(model, ids) for ids in IDS.tolist()])
    close(model(IDS), expected)


def test_given_positions_follow_the_equations():
    model, positions = gpt2(), [5, 0, 10, 3, 3, 7, 1, 2, 4]
    expected = torch.stack([equations(model, ids, positions) for ids in IDS.tolist()])
    close(model(IDS, position_ids=torch.tensor([positions])), expected)


def test_parameters_have_the_names_and_shapes_of_a_hugging_face_checkpoint():
    model = GPT2(replace(CONFIG, n_layer=1))
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
    model = GPT2(CONFIG)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_upcast_scores_run_in_working_precision(dtype, attention):
    logits = gpt2(replace(CONFIG, reorder_and_upcast_attn=True), attention, dtype)(IDS)
    assert logits.dtype == dtype
    assert logits.isfinite().all()


# --- sessions


def test_a_session_holds_keys_and_values_of_every_layer():
    session = gpt2().session(max_length=SEQ)
    session.feed(IDS[:, :5])
    keys_and_values = 2 * 2 * 3 * 3 * SEQ * 2 * 8  # both, layers, batch, heads, tokens, head_dim, float64
    assert session.state_bytes() == keys_and_values + 3 * 5  # and which tokens are real


# --- the config


def test_defaults_are_those_of_hugging_face():
    assert GPT2Config.from_dict({}) == GPT2Config(
        vocab_size=50257,
        n_positions=1024,
        n_embd=768,
        n_layer=12,
        n_head=12,
        n_inner=3072,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        tie_word_embeddings=True,
    )


def test_null_derives_n_inner():
    assert GPT2Config.from_dict({"n_embd": 24, "n_inner": None}).n_inner == 96


def test_the_config_of_the_hub_is_read():
    config = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 1280, "n_head": 20, "n_layer": 36,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
    }  # fmt: skip
    assert GPT2Config.from_dict(config) == GPT2Config(n_embd=1280, n_head=20, n_layer=36)


def test_a_config_is_written_as_it_is_read():
    assert GPT2Config.from_dict(CONFIG.to_dict()) == CONFIG
    assert CONFIG.to_dict()["architectures"] == ["GPT2LMHeadModel"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 4, "qk_norm": True}, r"unknown keys \['hidden_size', 'qk_norm'\]"),
        ({"max_position_embeddings": 4}, r"unknown keys \['max_position_embeddings'\]"),
        ({"model_type": "gpt_neo"}, "model_type='gpt_neo' is not 'gpt2'"),
        ({"n_embd": 50}, "n_embd=50 must be divisible by n_head=12; give a divisor of it"),
        ({"n_positions": 0}, "n_positions=0 must be greater than 0"),
        ({"vocab_size": "9"}, "vocab_size='9' must be of type int"),
        ({"activation_function": "quick_gelu"}, "'quick_gelu' is not implemented"),
        ({"scale_attn_weights": 1}, "scale_attn_weights=1 must be of type bool"),
        ({"layer_norm_epsilon": -1.0}, r"layer_norm_epsilon=-1\.0 must be greater than 0"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not implemented"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value),
)
def test_a_config_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config.from_dict(changes)
