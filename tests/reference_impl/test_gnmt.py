import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from reference_impl.checkpoint import load_model, save_model
from reference_impl.models.gnmt import GNMT, GNMTConfig

CONFIG = GNMTConfig(
    vocab_size=17, decoder_vocab_size=13, embedding_size=5, hidden_size=4, attention_size=7, encoder_layers=5,
    decoder_layers=4,
)  # fmt: skip
SOURCE = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8], [0, 5, 7, 7, 2, 1, 5, 6]])
TARGET = torch.tensor([[1, 4, 1, 5, 9], [1, 8, 2, 8, 1], [1, 7, 7, 2, 0]])


def gnmt(config=CONFIG, dtype=torch.float64):
    """A model of which no weight or bias can be left out unnoticed."""
    model, generator = GNMT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.7)
    return model.to(dtype)


def token_by_token(model):
    session = model.session(SOURCE)
    return torch.cat([session.feed(TARGET[:, place : place + 1]) for place in range(TARGET.shape[1])], dim=1)


def equations(model, source, target):
    """Logits of one row, number by number; layers are numbered from 1, as in section 3.1."""
    w = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    H = model.config.hidden_size
    rank = range(H)

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    def sigma(x):
        return 1 / (1 + math.exp(-x))

    def lstm(name, x, state, suffix=""):
        m, c = state
        W, U = w[f"{name}.weight_ih_l0{suffix}"], w[f"{name}.weight_hh_l0{suffix}"]
        b, d = w[f"{name}.bias_ih_l0{suffix}"], w[f"{name}.bias_hh_l0{suffix}"]
        z = [dot(W[k], x) + b[k] + dot(U[k], m) + d[k] for k in range(4 * H)]
        i, f, g, o = z[:H], z[H : 2 * H], z[2 * H : 3 * H], z[3 * H :]
        c = [sigma(f[k]) * c[k] + sigma(i[k]) * math.tanh(g[k]) for k in rank]
        return [sigma(o[k]) * math.tanh(c[k]) for k in rank], c

    zero = ([0.0] * H, [0.0] * H)
    x = [w["encoder.embedding.weight"][i] for i in source]
    forward, backward, state = [], [], zero
    for x_t in x:
        state = lstm("encoder.layers.0", x_t, state)
        forward.append(state[0])
    state = zero
    for x_t in reversed(x):
        state = lstm("encoder.layers.0", x_t, state, "_reverse")
        backward.insert(0, state[0])
    x = [a + b for a, b in zip(forward, backward, strict=True)]
    for number in range(2, model.config.encoder_layers + 1):
        state, above = zero, []
        for x_t in x:
            state = lstm(f"encoder.layers.{number - 1}", x_t, state)
            above.append([m + below for m, below in zip(state[0], x_t, strict=True)] if number >= 3 else state[0])
        x = above

    states = [zero] * model.config.decoder_layers
    logits = []
    for token in target:
        y = states[0][0]
        scores = []
        for x_t in x:
            rows = zip(
                w["decoder.attention.query_weight"], w["decoder.attention.memory_weight"],
                w["decoder.attention.bias"], w["decoder.attention.score_vector"], strict=True,
            )  # fmt: skip
            scores.append(sum(v * math.tanh(dot(q, y) + dot(u, x_t) + b) for q, u, b, v in rows))
        total = sum(map(math.exp, scores))
        a = [sum(math.exp(s) / total * x_t[k] for s, x_t in zip(scores, x, strict=True)) for k in range(len(x[0]))]
        states[0] = lstm("decoder.layers.0", w["decoder.embedding.weight"][token] + a, states[0])
        out = states[0][0]
        for number in range(2, model.config.decoder_layers + 1):
            states[number - 1] = lstm(f"decoder.layers.{number - 1}", out + a, states[number - 1])
            m = states[number - 1][0]
            out = [p + q for p, q in zip(m, out, strict=True)] if number >= 3 else m
        rows = zip(w["decoder.output.weight"], w["decoder.output.bias"], strict=True)
        logits.append([dot(row, out) + b for row, b in rows])
    return torch.tensor(logits, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- the model


@pytest.mark.parametrize(("encoder_layers", "decoder_layers"), [(5, 4), (2, 3), (3, 2), (1, 1)])
def test_logits_follow_the_equations(encoder_layers, decoder_layers):
    model = gnmt(replace(CONFIG, encoder_layers=encoder_layers, decoder_layers=decoder_layers))
    rows = zip(SOURCE.tolist(), TARGET.tolist(), strict=True)
    close(model(SOURCE, decoder_input_ids=TARGET), torch.stack([equations(model, *row) for row in rows]))


def test_torchs_own_lstms_load_the_weights_and_read_the_source():
    model = gnmt(replace(CONFIG, encoder_layers=3))
    bottom = nn.LSTM(5, 4, bidirectional=True, batch_first=True).double()
    second, third = nn.LSTM(8, 4, batch_first=True).double(), nn.LSTM(4, 4, batch_first=True).double()
    for library, ours in zip((bottom, second, third), model.encoder.layers, strict=True):
        library.load_state_dict(ours.state_dict())
    x = second(bottom(model.encoder.embedding(SOURCE))[0])[0]
    close(model.encoder(SOURCE, torch.ones_like(SOURCE).bool()), third(x)[0] + x)


def test_parameters_have_these_names_and_shapes():
    model = GNMT(replace(CONFIG, encoder_layers=3, decoder_layers=2))

    def lstm(name, rows, below, suffix=""):
        kinds = {"weight_ih": (rows, below), "weight_hh": (rows, rows // 4), "bias_ih": (rows,), "bias_hh": (rows,)}
        return {f"{name}.{kind}_l0{suffix}": shape for kind, shape in kinds.items()}

    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "encoder.embedding.weight": (17, 5),
        **lstm("encoder.layers.0", 16, 5),
        **lstm("encoder.layers.0", 16, 5, "_reverse"),
        **lstm("encoder.layers.1", 16, 8),
        **lstm("encoder.layers.2", 16, 4),
        "decoder.embedding.weight": (13, 5),
        "decoder.attention.query_weight": (7, 4),
        "decoder.attention.memory_weight": (7, 4),
        "decoder.attention.bias": (7,),
        "decoder.attention.score_vector": (7,),
        **lstm("decoder.layers.0", 16, 9),
        **lstm("decoder.layers.1", 16, 8),
        "decoder.output.weight": (13, 4),
        "decoder.output.bias": (13,),
    }


# --- padding


def test_a_source_of_padding_alone_is_refused_by_its_row():
    with pytest.raises(ValueError, match="row 1 of the source is all padding"):
        gnmt()(SOURCE, torch.tensor([[1], [0], [1]]).expand(3, 8), TARGET)


def test_missing_decoder_ids_are_refused():
    with pytest.raises(ValueError, match="decoder_input_ids are missing"):
        gnmt()(SOURCE)


# --- sessions


def test_pieces_in_bfloat16_are_as_the_whole():
    """The states are kept in float32 between calls, so that nothing is rounded that the whole does not round."""
    model = gnmt(dtype=torch.bfloat16)
    assert torch.equal(token_by_token(model), model(SOURCE, decoder_input_ids=TARGET))


def test_a_session_reads_the_source_once():
    model, calls = gnmt(), []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    token_by_token(model)
    assert len(calls) == 1


def test_a_session_holds_the_source_and_two_states_a_layer_however_much_is_fed():
    session = gnmt().session(SOURCE)
    source = 3 * 8 * (4 + 7) * 8 + 3 * 8  # batch, source, annotation and key, float64; which tokens are real
    for _ in range(3):
        session.feed(TARGET)
        assert session.state_bytes() == source + 4 * 2 * 3 * 4 * 8  # layers, h and c, batch, hidden, float64


# --- the config


def test_defaults_are_those_of_the_paper():
    assert GNMTConfig.from_dict({}) == GNMTConfig(
        vocab_size=32000, decoder_vocab_size=32000, embedding_size=1024, hidden_size=1024, attention_size=1024,
        encoder_layers=8, decoder_layers=8,
    )  # fmt: skip


def test_a_checkpoint_is_written_as_it_is_read(tmp_path):
    model = gnmt()
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(SOURCE, decoder_input_ids=TARGET), model(SOURCE, decoder_input_ids=TARGET))


def test_keys_that_only_training_or_decoding_reads_are_accepted():
    config = {"model_type": "gnmt", "dropout": 0.2, "decoder_start_token_id": 1, "is_encoder_decoder": True}
    assert GNMTConfig.from_dict(config) == GNMTConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2}, r"unknown keys \['num_layers'\]"),
        ({"model_type": "rnn_search"}, "model_type='rnn_search' is not 'gnmt'"),
        ({"decoder_layers": 0}, "decoder_layers=0 must be greater than 0"),
        ({"hidden_size": 2.0}, r"hidden_size=2\.0 must be of type int"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value),
)
def test_a_config_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GNMTConfig.from_dict(changes)
