import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from reference_impl.checkpoint import CheckpointError, load_model, save_model
from reference_impl.models import transformer as module
from reference_impl.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    model_type="transformer",
    vocab_size=17,
    d_model=12,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=3,
    decoder_attention_heads=2,
    encoder_ffn_dim=7,
    decoder_ffn_dim=5,
    activation_function="relu",
    scale_embedding=True,
)
UNSHARED = {"share_encoder_decoder_embeddings": False}
SOURCE = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8], [0, 5, 7, 7, 2, 1]])
TARGET = torch.tensor([[1, 6, 1, 8, 0, 3, 3], [1, 1, 4, 2, 9, 6, 10], [1, 10, 5, 7, 7, 2, 0]])
SOURCE_REAL = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
TARGET_REAL = torch.tensor([[0, 0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
SIDES = {"left": lambda mask: mask, "right": lambda mask: mask.flip(1)}


def transformer(config=CONFIG, attention="eager"):
    """A model whose norms and biases are random too, so that none can be left out unnoticed."""
    model = Transformer(config, attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), model.final_logits_bias):
            tensor.normal_(generator=generator).mul_(0.7)
    return model.double()


ACTIVATIONS = {
    "relu": lambda x: max(0.0, x),
    "gelu": lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
    "swish": lambda x: x / (1 + math.exp(-x)),
}


def position(place, size, model_type):
    """Section 3.5, column by column; Marian has the even columns first, then the odd ones."""
    angles = [place / 10000 ** (2 * (column // 2) / size) for column in range(size)]
    paper = [math.cos(angle) if column % 2 else math.sin(angle) for column, angle in enumerate(angles)]
    return paper if model_type == "transformer" else paper[0::2] + paper[1::2]


def equations(model, source, target):
    """Logits of one row, from the equations of the paper, number by number."""
    config, weights = model.config, {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    size = config.d_model

    def project(name, x):
        rows, biases = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return [sum(map(float.__mul__, row, x)) + b for row, b in zip(rows, biases, strict=True)]

    def norm(name, x):
        mean = sum(x) / size
        root = math.sqrt(sum((v - mean) ** 2 for v in x) / size + 1e-5)
        affine = zip(x, weights[f"{name}.weight"], weights[f"{name}.bias"], strict=True)
        return [(v - mean) / root * g + b for v, g, b in affine]

    def attend(name, queries, memory, heads, causal):
        width = size // heads
        query, key, value = ([project(f"{name}.{part}_proj", x) for x in xs]
                             for part, xs in (("q", queries), ("k", memory), ("v", memory)))  # fmt: skip
        outputs = []
        for t, q in enumerate(query):
            context, visible = [], range(t + 1 if causal else len(memory))
            for start in range(0, size, width):
                part = slice(start, start + width)
                scores = [sum(map(float.__mul__, q[part], key[s][part])) / math.sqrt(width) for s in visible]
                powers = [math.exp(score) for score in scores]
                seen = [value[s][part] for s in visible]
                context += [sum(map(float.__mul__, powers, column)) / sum(powers) for column in zip(*seen, strict=True)]
            outputs.append(project(f"{name}.out_proj", context))
        return outputs

    def add_and_norm(name, xs, ys):
        return [norm(name, [a + b for a, b in zip(x, y, strict=True)]) for x, y in zip(xs, ys, strict=True)]

    def feed_forward(name, x):
        act = ACTIVATIONS[config.activation_function]
        return project(f"{name}.fc2", [act(u) for u in project(f"{name}.fc1", x)])

    def embed(side, ids):
        table, scale = weights[f"model.{side}.embed_tokens.weight"], math.sqrt(size) if config.scale_embedding else 1.0
        places = [position(place, size, config.model_type) for place in range(len(ids))]
        return [
            [scale * e + p for e, p in zip(table[i], place, strict=True)] for i, place in zip(ids, places, strict=True)
        ]

    x = embed("encoder", source)
    for n in range(config.encoder_layers):
        layer = f"model.encoder.layers.{n}"
        attended = attend(f"{layer}.self_attn", x, x, config.encoder_attention_heads, causal=False)
        x = add_and_norm(f"{layer}.self_attn_layer_norm", x, attended)
        x = add_and_norm(f"{layer}.final_layer_norm", x, [feed_forward(layer, row) for row in x])
    y, heads = embed("decoder", target), config.decoder_attention_heads
    for n in range(config.decoder_layers):
        layer = f"model.decoder.layers.{n}"
        y = add_and_norm(f"{layer}.self_attn_layer_norm", y, attend(f"{layer}.self_attn", y, y, heads, causal=True))
        attended = attend(f"{layer}.encoder_attn", y, x, heads, causal=False)
        y = add_and_norm(f"{layer}.encoder_attn_layer_norm", y, attended)
        y = add_and_norm(f"{layer}.final_layer_norm", y, [feed_forward(layer, row) for row in y])
    (biases,) = weights["final_logits_bias"]
    logits = [
        [sum(map(float.__mul__, row, state)) + b for row, b in zip(weights["lm_head.weight"], biases, strict=True)]
        for state in y
    ]
    return torch.tensor(logits, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- the model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "marian"},
        {"scale_embedding": False},
        {"activation_function": "gelu"},
        {"activation_function": "swish"},
        UNSHARED,
        UNSHARED | {"decoder_vocab_size": 11},
        UNSHARED | {"decoder_vocab_size": 11, "tie_word_embeddings": False},
        {"d_model": 15, "decoder_attention_heads": 5},
        {"d_model": 15, "decoder_attention_heads": 5, "model_type": "marian"},
    ],
    ids=[
        "paper", "marian", "unscaled", "gelu", "swish", "two-tables", "two-vocabularies", "head-of-its-own", "odd-size",
        "odd-size-marian",
    ],
)  # fmt: skip
def test_logits_follow_the_equations(changes, attention):
    model = transformer(replace(CONFIG, **changes), attention)
    rows = zip(SOURCE.tolist(), TARGET.tolist(), strict=True)
    expected = torch.stack([equations(model, source, target) for source, target in rows])
    close(model(SOURCE, decoder_input_ids=TARGET), expected)


@pytest.mark.parametrize(
    ("model_type", "columns"),
    [("transformer", ["sin 1", "cos 1", "sin .01", "cos .01"]), ("marian", ["sin 1", "sin .01", "cos 1", "cos .01"])],
)
def test_sines_and_cosines_alternate_in_the_paper_and_stand_apart_in_marian(model_type, columns):
    """With a size of 4 the two frequencies are 1 and 1/100."""
    config = replace(
        CONFIG, model_type=model_type, d_model=4, encoder_attention_heads=2, decoder_attention_heads=2
    )  # fmt: skip
    model = transformer(config)
    torch.nn.init.zeros_(model.model.encoder.embed_tokens.weight)
    found = model.model.encoder.embed(SOURCE, torch.ones_like(SOURCE).bool())
    words = [column.split() for column in columns]
    expected = [[getattr(math, wave)(place * float(frequency)) for wave, frequency in words] for place in range(6)]
    close(found, torch.tensor(expected, dtype=torch.float64).expand(3, 6, 4))


def test_the_positions_are_not_scaled():
    model = transformer()
    torch.nn.init.zeros_(model.model.shared.weight)
    real = torch.ones_like(TARGET).bool()
    assert model.model.decoder.embed(TARGET, real).abs().max() <= 1


def test_parameters_have_the_names_and_shapes_of_a_marian_checkpoint():
    model = Transformer(replace(CONFIG, encoder_layers=1, decoder_layers=1))
    attention = {
        f"{part}_proj.{kind}": shape for part in ("q", "k", "v", "out") for kind, shape in
        (("weight", (12, 12)), ("bias", (12,)))
    }  # fmt: skip
    norm = {"weight": (12,), "bias": (12,)}
    expected = {"model.shared.weight": (17, 12), "lm_head.weight": (17, 12), "final_logits_bias": (1, 17)}
    for side, width in (("encoder", 7), ("decoder", 5)):
        layer = f"model.{side}.layers.0."
        expected |= {
            f"model.{side}.embed_tokens.weight": (17, 12),
            f"{layer}fc1.weight": (width, 12), f"{layer}fc1.bias": (width,),
            f"{layer}fc2.weight": (12, width), f"{layer}fc2.bias": (12,),
        }  # fmt: skip
        for name in ("self_attn", "encoder_attn") if side == "decoder" else ("self_attn",):
            expected |= {f"{layer}{name}.{part}": shape for part, shape in attention.items()}
            expected |= {f"{layer}{name}_layer_norm.{kind}": shape for kind, shape in norm.items()}
        expected |= {f"{layer}final_layer_norm.{kind}": shape for kind, shape in norm.items()}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def test_one_table_serves_source_target_and_head():
    model = Transformer(CONFIG)
    tables = (model.model.encoder.embed_tokens.weight, model.model.decoder.embed_tokens.weight, model.lm_head.weight)
    assert all(table is model.model.shared.weight for table in tables)


def test_unshared_tables_are_two_and_the_head_is_the_targets():
    model = Transformer(replace(CONFIG, **UNSHARED, decoder_vocab_size=11))
    names = [name for name, _ in model.named_parameters()]
    assert "model.shared.weight" not in names
    assert model.model.encoder.embed_tokens.weight.shape == (17, 12)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert model.lm_head.weight.shape == (11, 12)


# --- the bias on the logits


def test_the_logits_bias_is_added_and_is_no_parameter():
    model = transformer()
    before = model(SOURCE, decoder_input_ids=TARGET)
    model.final_logits_bias += torch.arange(17.0)
    close(model(SOURCE, decoder_input_ids=TARGET), before + torch.arange(17.0))
    assert "final_logits_bias" not in dict(model.named_parameters())


def test_the_logits_bias_starts_at_zero_since_the_paper_has_none():
    assert not Transformer(CONFIG).final_logits_bias.any()


@pytest.mark.parametrize("changes", [{}, UNSHARED | {"decoder_vocab_size": 11}], ids=["shared", "two-vocabularies"])
def test_a_checkpoint_keeps_the_logits_bias_and_all_else(tmp_path, changes):
    model = transformer(replace(CONFIG, **changes))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert loaded.final_logits_bias.equal(model.final_logits_bias)
    assert loaded(SOURCE, decoder_input_ids=TARGET).equal(model(SOURCE, decoder_input_ids=TARGET))


def test_a_checkpoint_without_the_logits_bias_is_refused_by_name(tmp_path, monkeypatch):
    model = transformer()
    monkeypatch.setitem(model._buffers, "final_logits_bias", None)
    save_model(model, tmp_path)
    with pytest.raises(CheckpointError, match="final_logits_bias"):
        load_model(tmp_path)


# --- padding


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("source_side", SIDES)
@pytest.mark.parametrize("target_side", SIDES)
def test_padding_on_either_side_of_source_and_target_changes_no_row(source_side, target_side, attention):
    model = transformer(attention=attention)
    source_mask, mask = SIDES[source_side](SOURCE_REAL), SIDES[target_side](TARGET_REAL)
    logits = model(SOURCE, source_mask, decoder_input_ids=TARGET, decoder_attention_mask=mask)
    assert logits.isfinite().all()
    for row in range(3):
        source, real = SOURCE[row : row + 1, source_mask[row].bool()], mask[row].bool()
        close(logits[row, real], model(source, decoder_input_ids=TARGET[row : row + 1, real])[0])


def test_the_two_masks_are_not_confused():
    """Source and target of one length: each mask hides tokens of its own text."""
    model, source = transformer(), TARGET.flip(0)
    given = {"decoder_input_ids": TARGET}
    of_source = model(source, TARGET_REAL, **given)
    of_target = model(source, decoder_attention_mask=TARGET_REAL, **given)
    other = source.clone()
    other[0, 0] += 1  # padding of the source in the first call, real in the second
    close(model(other, TARGET_REAL, **given), of_source)
    assert (model(other, decoder_attention_mask=TARGET_REAL, **given) - of_target)[0].abs().max() > 1e-3


def test_a_mask_that_does_not_fit_its_ids_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(3, 7\).*\(3, 6\)"):
        transformer()(SOURCE, TARGET_REAL, decoder_input_ids=TARGET)
    with pytest.raises(ValueError, match=r"\(3, 6\).*\(3, 7\)"):
        transformer()(SOURCE, decoder_input_ids=TARGET, decoder_attention_mask=SOURCE_REAL)


# --- sessions


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("source_side", SIDES)
@pytest.mark.parametrize("target_side", SIDES)
@pytest.mark.parametrize("cuts", [(0, 7), (0, 1, 2, 3, 4, 5, 6, 7), (0, 3, 4, 7), (0, 1, 7)], ids=str)
def test_pieces_of_a_padded_target_give_the_logits_of_the_whole(cuts, source_side, target_side, attention):
    model = transformer(attention=attention)
    source_mask, mask = SIDES[source_side](SOURCE_REAL), SIDES[target_side](TARGET_REAL)
    session = model.session(SOURCE, source_mask)
    pieces = [session.feed(TARGET[:, a:b], mask[:, a:b]) for a, b in pairwise(cuts)]
    whole = model(SOURCE, source_mask, decoder_input_ids=TARGET, decoder_attention_mask=mask)
    close(torch.cat(pieces, dim=1)[mask.bool()], whole[mask.bool()])


def test_a_session_encodes_its_source_once(monkeypatch):
    model, calls = transformer(), []
    encode = model.model.encode
    monkeypatch.setattr(model.model, "encode", lambda *given: calls.append(1) or encode(*given))
    session = model.session(SOURCE)
    for place in range(7):
        session.feed(TARGET[:, place : place + 1])
    assert calls == [1]


def test_a_session_projects_keys_and_values_of_the_source_once():
    model, calls = transformer(), []
    model.model.decoder.layers[1].encoder_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    session = model.session(SOURCE)
    session.feed(TARGET[:, :3])
    session.feed(TARGET[:, 3:])
    assert calls == [1]


def test_a_session_does_not_look_at_its_source_again():
    source = SOURCE.clone()
    session = transformer().session(source)
    source += 1
    close(session.feed(TARGET), transformer()(SOURCE, decoder_input_ids=TARGET))


@pytest.mark.parametrize(("limit", "held"), [(None, 4), (9, 9)])
def test_a_session_holds_the_sources_keys_and_values_and_those_of_the_target_so_far(limit, held):
    session = transformer().session(SOURCE, max_length=limit)
    session.feed(TARGET[:, :4])
    of_source = 2 * 3 * 3 * 6 * 12 * 8  # both, layers of the decoder, batch, tokens, size, float64
    of_target = 2 * 3 * 3 * held * 12 * 8
    assert session.state_bytes() == of_source + of_target + 3 * 4  # and which tokens are real


def test_a_session_computes_no_gradients():
    session = transformer().session(SOURCE)
    assert not session.feed(TARGET).requires_grad


# --- the config


def test_defaults_are_those_of_hugging_face():
    assert TransformerConfig.from_dict({}) == TransformerConfig(
        model_type="marian",
        vocab_size=58101,
        decoder_vocab_size=None,
        d_model=1024,
        encoder_layers=12,
        decoder_layers=12,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
        encoder_ffn_dim=4096,
        decoder_ffn_dim=4096,
        activation_function="gelu",
        scale_embedding=False,
        share_encoder_decoder_embeddings=True,
        tie_word_embeddings=True,
    )


def test_the_config_of_the_hub_is_read():
    """The keys of opus-mt's, as transformers 4 wrote them."""
    config = {
        "_num_labels": 3, "activation_dropout": 0.0, "activation_function": "swish", "add_bias_logits": False,
        "add_final_layer_norm": False, "architectures": ["MarianMTModel"], "attention_dropout": 0.0,
        "bad_words_ids": [[58100]], "bos_token_id": 0, "classif_dropout": 0.0, "classifier_dropout": 0.0,
        "d_model": 512, "decoder_attention_heads": 8, "decoder_ffn_dim": 2048, "decoder_layerdrop": 0.0,
        "decoder_layers": 6, "decoder_start_token_id": 58100, "decoder_vocab_size": 58101, "dropout": 0.1,
        "encoder_attention_heads": 8, "encoder_ffn_dim": 2048, "encoder_layerdrop": 0.0, "encoder_layers": 6,
        "eos_token_id": 0, "extra_pos_embeddings": 58101, "forced_eos_token_id": 0, "gradient_checkpointing": False,
        "id2label": {"0": "LABEL_0"},
        "init_std": 0.02, "is_encoder_decoder": True, "label2id": {"LABEL_0": 0}, "max_length": 512,
        "max_position_embeddings": 512, "model_type": "marian", "normalize_before": False, "normalize_embedding": False,
        "num_beams": 4, "num_hidden_layers": 6, "pad_token_id": 58100, "scale_embedding": True,
        "share_encoder_decoder_embeddings": True, "static_position_embeddings": True, "transformers_version": "4.22",
        "use_cache": True, "vocab_size": 58101,
    }  # fmt: skip
    assert TransformerConfig.from_dict(config) == TransformerConfig(
        d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8, decoder_attention_heads=8,
        encoder_ffn_dim=2048, decoder_ffn_dim=2048, activation_function="swish", scale_embedding=True,
        decoder_vocab_size=58101,
    )  # fmt: skip


def test_a_config_is_written_as_it_is_read():
    assert CONFIG.to_dict() == {
        "architectures": ["MarianMTModel"],
        "is_encoder_decoder": True,
        "model_type": "transformer",
        "vocab_size": 17,
        "decoder_vocab_size": None,
        "d_model": 12,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 7,
        "decoder_ffn_dim": 5,
        "activation_function": "relu",
        "scale_embedding": True,
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
    }


def test_a_target_without_a_vocabulary_of_its_own_has_the_sources():
    assert TransformerConfig(vocab_size=17).target_vocab_size == 17
    assert TransformerConfig(vocab_size=17, decoder_vocab_size=11, **UNSHARED).target_vocab_size == 11


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4, "d_kv": 3}, r"unknown keys \['d_kv', 'num_heads'\]"),
        ({"model_type": "bart"}, r"model_type='bart' must be one of \['marian', 'transformer'\]"),
        ({"d_model": 50}, "d_model=50 must be divisible by encoder_attention_heads=16; give a divisor of it"),
        ({"decoder_attention_heads": 3}, "d_model=1024 must be divisible by decoder_attention_heads=3"),
        (
            {"decoder_vocab_size": 9},
            "decoder_vocab_size=9 must be vocab_size=58101 where share_encoder_decoder_embeddings is true",
        ),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=false needs share_encoder_decoder_embeddings=false"),
        ({"normalize_before": True}, "normalize_before=True is not implemented: norms stand after each residual"),
        ({"normalize_embedding": True}, "normalize_embedding=True is not implemented"),
        ({"add_final_layer_norm": True}, "add_final_layer_norm=True is not implemented"),
        ({"encoder_layers": 0}, "encoder_layers=0 must be greater than 0"),
        ({"decoder_ffn_dim": 4.5}, r"decoder_ffn_dim=4\.5 must be of type int"),
        ({"vocab_size": "9"}, "vocab_size='9' must be of type int"),
        ({"scale_embedding": 1}, "scale_embedding=1 must be of type bool"),
        ({"activation_function": "quick_gelu"}, "'quick_gelu' is not implemented"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value),
)
def test_a_config_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict(changes)


def test_epsilon_is_that_of_torch():
    assert torch.nn.LayerNorm(1).eps == module.EPSILON
