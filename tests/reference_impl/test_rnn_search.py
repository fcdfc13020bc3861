import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from reference_impl.checkpoint import load_model, save_model
from reference_impl.models.rnn_search import MaxoutReadout, RNNSearch, RNNSearchConfig, maxout

CONFIG = RNNSearchConfig(
    vocab_size=17, decoder_vocab_size=13, embedding_size=5, hidden_size=6, attention_size=7, maxout_size=4
)
SOURCE = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8], [0, 5, 7, 7, 2, 1, 5, 6]])
TARGET = torch.tensor([[1, 4, 1, 5, 9], [1, 8, 2, 8, 1], [1, 7, 7, 2, 0]])


def rnn_search(config=CONFIG):
    """A model of which no weight or bias can be left out unnoticed."""
    model, generator = RNNSearch(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.7)
    return model.double()


def token_by_token(model):
    session = model.session(SOURCE)
    return torch.cat([session.feed(TARGET[:, place : place + 1]) for place in range(TARGET.shape[1])], dim=1)


def equations(model, source, target):
    """Logits of one row, number by number, with the letters of appendix A."""
    w = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    n, m = model.config.hidden_size, model.config.embedding_size

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    def sigma(x):
        return 1 / (1 + math.exp(-x))

    def gated(name, x, s, suffix=""):
        """One step; the update gate of the paper is one minus that of the rows in the file."""
        W, U = w[f"{name}.weight_ih_l0{suffix}"], w[f"{name}.weight_hh_l0{suffix}"]
        b, d = w[f"{name}.bias_ih_l0{suffix}"], w[f"{name}.bias_hh_l0{suffix}"]
        r = [sigma(dot(W[k], x) + b[k] + dot(U[k], s) + d[k]) for k in range(n)]
        z = [1 - sigma(dot(W[k], x) + b[k] + dot(U[k], s) + d[k]) for k in range(n, 2 * n)]
        candidate = []
        for k in range(2 * n, 3 * n):
            if model.config.reset_after:
                candidate.append(math.tanh(dot(W[k], x) + b[k] + r[k - 2 * n] * (dot(U[k], s) + d[k])))
            else:
                inside = [a * c for a, c in zip(r, s, strict=True)]
                candidate.append(math.tanh(dot(W[k], x) + b[k] + dot(U[k], inside) + d[k]))
        return [(1 - z[k]) * s[k] + z[k] * candidate[k] for k in range(n)]

    x = [w["encoder.embedding.weight"][i] for i in source]
    forward, backward = [], []
    state = [0.0] * n
    for word in x:
        state = gated("encoder.rnn", word, state)
        forward.append(state)
    state = [0.0] * n
    for word in reversed(x):
        state = gated("encoder.rnn", word, state, "_reverse")
        backward.insert(0, state)
    h = [a + b for a, b in zip(forward, backward, strict=True)]

    W_s, b_s = w["decoder.initial.weight"], w["decoder.initial.bias"]
    s = [math.tanh(dot(row, backward[0]) + b) for row, b in zip(W_s, b_s, strict=True)]
    logits = []
    for y in target:
        word = w["decoder.embedding.weight"][y]
        energies = []
        for h_j in h:
            inner = [
                math.tanh(dot(row, s) + dot(other, h_j) + b)
                for row, other, b in zip(
                    w["decoder.attention.query_weight"], w["decoder.attention.memory_weight"],
                    w["decoder.attention.bias"], strict=True,
                )
            ]  # fmt: skip
            energies.append(dot(w["decoder.attention.score_vector"], inner))
        total = sum(map(math.exp, energies))
        c = [sum(math.exp(e) / total * h_j[k] for e, h_j in zip(energies, h, strict=True)) for k in range(2 * n)]
        U_o, V_o, C_o = (w[f"decoder.readout.{part}_weight"] for part in ("state", "word", "context"))
        pieces = [
            dot(U_o[k], s) + dot(V_o[k], word) + dot(C_o[k], c) + b for k, b in enumerate(w["decoder.readout.bias"])
        ]
        t = [max(pieces[2 * j], pieces[2 * j + 1]) for j in range(len(pieces) // 2)]
        rows = zip(w["decoder.output.weight"], w["decoder.output.bias"], strict=True)
        logits.append([dot(row, t) + b for row, b in rows])
        assert len(word) == m
        s = gated("decoder.rnn", word + c, s)
    return torch.tensor(logits, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- the model


@pytest.mark.parametrize("reset_after", [False, True])
def test_logits_follow_the_equations(reset_after):
    model = rnn_search(replace(CONFIG, reset_after=reset_after))
    rows = zip(SOURCE.tolist(), TARGET.tolist(), strict=True)
    close(model(SOURCE, decoder_input_ids=TARGET), torch.stack([equations(model, *row) for row in rows]))


def test_torchs_own_gru_loads_the_weights_and_reads_the_source():
    model = rnn_search(replace(CONFIG, reset_after=True))
    library = nn.GRU(5, 6, bidirectional=True, batch_first=True).double()
    library.load_state_dict(model.encoder.rnn.state_dict())
    annotations, final = library(model.encoder.embedding(SOURCE))
    ours, backward = model.encoder(SOURCE, torch.ones_like(SOURCE).bool())
    close(ours, annotations)
    close(backward, final[1])


def test_parameters_have_these_names_and_shapes():
    assert {name: tuple(tensor.shape) for name, tensor in RNNSearch(CONFIG).state_dict().items()} == {
        "encoder.embedding.weight": (17, 5),
        "encoder.rnn.weight_ih_l0": (18, 5),
        "encoder.rnn.weight_hh_l0": (18, 6),
        "encoder.rnn.bias_ih_l0": (18,),
        "encoder.rnn.bias_hh_l0": (18,),
        "encoder.rnn.weight_ih_l0_reverse": (18, 5),
        "encoder.rnn.weight_hh_l0_reverse": (18, 6),
        "encoder.rnn.bias_ih_l0_reverse": (18,),
        "encoder.rnn.bias_hh_l0_reverse": (18,),
        "decoder.embedding.weight": (13, 5),
        "decoder.initial.weight": (6, 6),
        "decoder.initial.bias": (6,),
        "decoder.attention.query_weight": (7, 6),
        "decoder.attention.memory_weight": (7, 12),
        "decoder.attention.bias": (7,),
        "decoder.attention.score_vector": (7,),
        "decoder.rnn.weight_ih_l0": (18, 17),
        "decoder.rnn.weight_hh_l0": (18, 6),
        "decoder.rnn.bias_ih_l0": (18,),
        "decoder.rnn.bias_hh_l0": (18,),
        "decoder.readout.state_weight": (8, 6),
        "decoder.readout.word_weight": (8, 5),
        "decoder.readout.context_weight": (8, 12),
        "decoder.readout.bias": (8,),
        "decoder.output.weight": (13, 4),
        "decoder.output.bias": (13,),
    }


def test_maxout_takes_the_larger_of_neighbours():
    assert maxout(torch.tensor([[1.0, 3.0, 5.0, 2.0], [-4.0, -6.0, 0.0, 7.0]])).tolist() == [[3.0, 5.0], [-4.0, 7.0]]


def test_a_new_readout_has_no_bias_and_bounded_weights():
    readout = MaxoutReadout(CONFIG)
    assert not readout.bias.any()
    assert readout.context_weight.abs().max() <= 1 / math.sqrt(12)


# --- padding


def test_a_source_of_padding_alone_is_refused_by_its_row():
    with pytest.raises(ValueError, match="row 1 of the source is all padding"):
        rnn_search()(SOURCE, torch.tensor([[1], [0], [1]]).expand(3, 8), TARGET)


def test_missing_decoder_ids_are_refused():
    with pytest.raises(ValueError, match="decoder_input_ids are missing"):
        rnn_search()(SOURCE)


def test_another_batch_of_decoder_ids_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="decoder_input_ids have 2 rows and the source 3"):
        rnn_search()(SOURCE, decoder_input_ids=TARGET[:2])


# --- sessions


def test_a_session_reads_the_source_once():
    model, calls = rnn_search(), []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    token_by_token(model)
    assert len(calls) == 1


def test_a_session_holds_the_source_and_one_state_however_much_is_fed():
    session = rnn_search().session(SOURCE)
    source = 3 * 8 * (12 + 7) * 8 + 3 * 8  # batch, source, annotation and key, float64; which tokens are real
    for _ in range(3):
        session.feed(TARGET)
        assert session.state_bytes() == source + 3 * 6 * 8


# --- the config


def test_defaults_are_those_of_the_paper():
    assert RNNSearchConfig.from_dict({}) == RNNSearchConfig(
        vocab_size=30000, decoder_vocab_size=30000, embedding_size=620, hidden_size=1000, attention_size=1000,
        maxout_size=500, reset_after=False,
    )  # fmt: skip


def test_a_checkpoint_is_written_as_it_is_read(tmp_path):
    model = rnn_search(replace(CONFIG, reset_after=True))
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(SOURCE, decoder_input_ids=TARGET), model(SOURCE, decoder_input_ids=TARGET))


def test_keys_that_only_training_or_decoding_reads_are_accepted():
    config = {"model_type": "rnn_search", "dropout": 0.1, "decoder_start_token_id": 1, "is_encoder_decoder": True}
    assert RNNSearchConfig.from_dict(config) == RNNSearchConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2}, r"unknown keys \['num_layers'\]"),
        ({"model_type": "gnmt"}, "model_type='gnmt' is not 'rnn_search'"),
        ({"hidden_size": 0}, "hidden_size=0 must be greater than 0"),
        ({"maxout_size": 2.0}, r"maxout_size=2\.0 must be of type int"),
        ({"reset_after": 1}, "reset_after=1 must be of type bool"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value),
)
def test_a_config_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RNNSearchConfig.from_dict(changes)
