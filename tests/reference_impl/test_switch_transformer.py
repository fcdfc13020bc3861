import math
from dataclasses import replace

import pytest
import torch

from reference_impl.checkpoint import load_model, save_model
from reference_impl.models.switch_transformer import SwitchTransformer, SwitchTransformerConfig, is_sparse
from reference_impl.nn.moe import recorded_router_logits

CONFIG = SwitchTransformerConfig(
    vocab_size=17,
    d_model=10,
    d_kv=3,
    d_ff=7,
    num_heads=4,
    num_layers=3,
    num_decoder_layers=4,
    encoder_sparse_step=2,
    decoder_sparse_step=3,
    num_experts=5,
    expert_capacity=20,
    router_bias=True,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=6,
    layer_norm_epsilon=0.01,
)
SOURCE = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2], [0, 5, 7, 7, 2, 1, 5, 6, 6]])
TARGET = torch.tensor([[0, 3, 1, 4, 1, 5, 9], [0, 2, 7, 1, 8, 2, 8], [0, 5, 7, 7, 2, 1, 5]])
SOURCE_LENGTHS, TARGET_LENGTHS = [5, 9, 1], [7, 1, 4]
# Pieces of 7 tokens: at once, one by one, and others.
PLANS = [(7,), (1,) * 7, (3, 1, 2, 1), (1, 6), (2, 5)]


def switch(config=CONFIG, attention="eager", dtype=torch.float64):
    """A model whose norms and biases are random too, so that none can be left out unnoticed."""
    model = SwitchTransformer(config, attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.7)
    return model.to(dtype)


def mask_of(lengths, width, side):
    place = torch.arange(width)
    rows = [place < n if side == "right" else place >= width - n for n in lengths]
    return torch.stack(rows).long()


def equations(model, source, target):
    """Logits of one row, from the equations of the papers, number by number."""
    config, weights = model.config, {name: tensor.tolist() for name, tensor in model.state_dict().items()}

    def project(name, x):
        return [sum(map(float.__mul__, row, x)) for row in weights[f"{name}.weight"]]

    def norm(name, x):
        root = math.sqrt(sum(v * v for v in x) / len(x) + config.layer_norm_epsilon)
        return [v / root * g for v, g in zip(x, weights[f"{name}.weight"], strict=True)]

    def head(x, index):
        return x[index * config.d_kv : (index + 1) * config.d_kv]

    def bucket(offset, bidirectional):
        count = config.relative_attention_num_buckets // (2 if bidirectional else 1)
        distance = abs(offset) if bidirectional else max(-offset, 0)
        exact = count // 2
        if distance >= exact:
            share = math.log(distance / exact) / math.log(config.relative_attention_max_distance / exact)
            distance = min(count - 1, exact + math.floor(share * (count - exact) + 1e-9))
        return distance + (count if bidirectional and offset > 0 else 0)

    def attend(name, queries, keys, table, causal):
        """`table`: the stack's biases; None: none are added."""
        projected_keys, values = ([project(f"{name}.{p}", x) for x in keys] for p in "kv")
        outputs = []
        for t, x in enumerate(queries):
            query, context = project(f"{name}.q", x), []
            visible = range(t + 1 if causal else len(keys))
            for h in range(config.num_heads):
                powers = []
                for s in visible:
                    score = sum(map(float.__mul__, head(query, h), head(projected_keys[s], h)))
                    powers.append(math.exp(score + (table[bucket(s - t, not causal)][h] if table else 0)))
                context += [
                    sum(p * head(values[s], h)[d] for p, s in zip(powers, visible, strict=True)) / sum(powers)
                    for d in range(config.d_kv)
                ]
            outputs.append(project(f"{name}.o", context))
        return outputs

    def dense(name, x):
        return project(f"{name}.wo", [max(v, 0.0) for v in project(f"{name}.wi", x)])

    def sparse(name, xs):
        held, outputs = [0] * config.num_experts, []
        for x in xs:
            logits = project(f"{name}.router.classifier", x)
            if config.router_bias:
                logits = list(map(float.__add__, logits, weights[f"{name}.router.classifier.bias"]))
            best = max(range(config.num_experts), key=lambda e: logits[e])
            share = math.exp(logits[best]) / sum(map(math.exp, logits))
            held[best] += 1
            if held[best] > config.expert_capacity:
                outputs.append([0.0] * config.d_model)
            else:
                outputs.append([share * v for v in dense(f"{name}.experts.expert_{best}", x)])
        return outputs

    def add(xs, ys):
        return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(xs, ys, strict=True)]

    def stack(name, ids, memory=None):
        blocks = config.num_layers if memory is None else config.num_decoder_layers
        step = config.encoder_sparse_step if memory is None else config.decoder_sparse_step
        table = weights[f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        x = [weights["shared.weight"][i] for i in ids]
        for n in range(blocks):
            layer = f"{name}.block.{n}.layer"
            normed = [norm(f"{layer}.0.layer_norm", v) for v in x]
            x = add(x, attend(f"{layer}.0.SelfAttention", normed, normed, table, causal=memory is not None))
            if memory is not None:
                normed = [norm(f"{layer}.1.layer_norm", v) for v in x]
                x = add(x, attend(f"{layer}.1.EncDecAttention", normed, memory, None, causal=False))
            last = f"{layer}.{1 if memory is None else 2}"
            normed = [norm(f"{last}.layer_norm", v) for v in x]
            with_experts = n in range(1, blocks, step) if step > 1 else step == 1
            x = add(x, sparse(f"{last}.mlp", normed) if with_experts else [dense(f"{last}.mlp", v) for v in normed])
        return [norm(f"{name}.final_layer_norm", v) for v in x]

    states = stack("decoder", target, stack("encoder", source))
    scale = config.d_model**-0.5 if config.tie_word_embeddings else 1.0
    return torch.tensor([project("lm_head", [scale * v for v in x]) for x in states], dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- the model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"expert_capacity": 2},
        {"encoder_sparse_step": 1, "decoder_sparse_step": 2, "expert_capacity": 1},
        {"encoder_sparse_step": 0, "decoder_sparse_step": 0},
        {"tie_word_embeddings": False, "router_bias": False},
        {"num_layers": 1, "num_decoder_layers": 2},
    ],
    ids=["room-for-all", "room-for-2", "all-sparse", "dense", "untied", "short"],
)
def test_logits_follow_the_equations(changes, attention):
    model = switch(replace(CONFIG, **changes), attention)
    expected = torch.stack([equations(model, s, t) for s, t in zip(SOURCE.tolist(), TARGET.tolist(), strict=True)])
    close(model(SOURCE, decoder_input_ids=TARGET), expected)


@pytest.mark.parametrize(
    ("blocks", "step", "sparse"),
    [(6, 2, [1, 3, 5]), (5, 2, [1, 3]), (7, 3, [1, 4]), (12, 4, [1, 5, 9]), (3, 1, [0, 1, 2]), (3, 0, [])],
)
def test_sparse_blocks_stand_a_step_apart_from_the_second_on(blocks, step, sparse):
    assert [block for block in range(blocks) if is_sparse(block, step)] == sparse


def test_tokens_are_dropped_where_experts_are_full():
    """With room for one token an expert, rows of one token alone are right, and longer ones are not."""
    narrow, wide = switch(replace(CONFIG, expert_capacity=1)), switch()
    assert (narrow(SOURCE, decoder_input_ids=TARGET) - wide(SOURCE, decoder_input_ids=TARGET)).abs().max() > 1e-2
    alone = narrow(SOURCE[:, :1], decoder_input_ids=TARGET[:, :1])
    close(alone, wide(SOURCE[:, :1], decoder_input_ids=TARGET[:, :1]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_as_if_alone(side, attention):
    model = switch(attention=attention)
    source_mask, target_mask = mask_of(SOURCE_LENGTHS, 9, side), mask_of(TARGET_LENGTHS, 7, side)
    source, target = torch.full_like(SOURCE, 16), torch.full_like(TARGET, 15)  # junk
    for row, (s, t) in enumerate(zip(SOURCE_LENGTHS, TARGET_LENGTHS, strict=True)):
        source[row, source_mask[row].bool()], target[row, target_mask[row].bool()] = SOURCE[row, :s], TARGET[row, :t]
    logits = model(source, source_mask, decoder_input_ids=target, decoder_attention_mask=target_mask)
    assert logits.isfinite().all()
    for row, (s, t) in enumerate(zip(SOURCE_LENGTHS, TARGET_LENGTHS, strict=True)):
        alone = model(SOURCE[row : row + 1, :s], decoder_input_ids=TARGET[row : row + 1, :t])
        close(logits[row, target_mask[row].bool()], alone[0])


@pytest.mark.parametrize("ignored", [True, False])
def test_padding_takes_room_at_experts_unless_it_is_ignored(ignored):
    model = switch(replace(CONFIG, expert_capacity=1, router_ignore_padding_tokens=ignored))
    mask = mask_of([5, 5, 5], 9, "left")
    source = SOURCE.roll(4, dims=1)
    target_mask = mask_of([4, 4, 4], 7, "left")
    target = TARGET.roll(3, dims=1)
    padded = model(source, mask, decoder_input_ids=target, decoder_attention_mask=target_mask)[:, 3:]
    alone = model(SOURCE[:, :5], decoder_input_ids=TARGET[:, :4])
    assert ((padded - alone).abs().max() < 1e-12) == ignored


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("plan", PLANS)
def test_pieces_give_what_the_whole_gives(plan, attention):
    model = switch(attention=attention)
    mask = mask_of(SOURCE_LENGTHS, 9, "left")
    session, pieces, start = model.session(SOURCE, mask), [], 0
    for size in plan:
        pieces.append(session.feed(TARGET[:, start : start + size]))
        start += size
    close(torch.cat(pieces, dim=1), model(SOURCE, mask, decoder_input_ids=TARGET))


def test_targets_of_different_lengths_are_decoded_together():
    """Prompts padded on the right, then two tokens each: pads between real tokens do not count as positions."""
    model, lengths = switch(), [3, 1, 2]
    session = model.session(SOURCE)
    session.feed(TARGET[:, :3], mask_of(lengths, 3, "right"))
    for step in range(2):
        ids = torch.stack([TARGET[row, n + step] for row, n in enumerate(lengths)])[:, None]
        logits = session.feed(ids)
        for row, n in enumerate(lengths):
            alone = model(SOURCE[row : row + 1], decoder_input_ids=TARGET[row : row + 1, : n + step + 1])
            close(logits[row, 0], alone[0, -1])


def test_source_is_read_once_a_session():
    model = switch()
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    for block in model.decoder.block:
        block.layer[1].EncDecAttention.k.register_forward_hook(lambda *_: calls.append("keys"))
    session = model.session(SOURCE)
    for place in range(3):
        session.feed(TARGET[:, place : place + 1])
    assert calls == ["encoder", "keys", "keys", "keys", "keys"]


def test_state_holds_keys_and_values_of_source_and_target():
    session = switch().session(SOURCE)
    one_token = 2 * 4 * 3 * 8  # keys and values, heads, width, bytes of float64
    source = 4 * 3 * 9 * one_token  # blocks, rows, tokens
    assert session.state_bytes() == source
    session.feed(TARGET[:, :3])
    assert session.state_bytes() == source + 4 * 3 * 3 * one_token + 3 * 3  # and which are real


def test_a_target_token_sees_no_later_one_but_the_whole_source():
    model = switch()
    before = model(SOURCE, decoder_input_ids=TARGET)
    later, last = TARGET.clone(), SOURCE.clone()
    later[:, 4], last[:, -1] = 16, 16
    moved = (model(SOURCE, decoder_input_ids=later) - before).abs().amax(dim=(0, 2))
    assert (moved[:4] < 1e-14).all()
    assert (moved[4:] > 1e-6).all()
    assert ((model(last, decoder_input_ids=TARGET) - before).abs().amax(dim=(0, 2)) > 1e-6).all()


def test_embedding_is_one_parameter_under_four_names():
    model = switch()
    tied = [n for n, p in model.named_parameters(remove_duplicate=False) if p is model.shared.weight]
    assert tied == [
        "shared.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    ]
    untied = switch(replace(CONFIG, tie_word_embeddings=False))
    assert untied.lm_head.weight is not untied.shared.weight


def test_one_table_of_biases_a_stack():
    names = [name for name, _ in switch().named_parameters() if "relative_attention_bias" in name]
    assert names == [
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for stack in ("encoder", "decoder")
    ]


def test_training_mode_changes_nothing():
    model = switch()
    before = model.eval()(SOURCE, decoder_input_ids=TARGET)
    assert torch.equal(model.train()(SOURCE, decoder_input_ids=TARGET), before)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_routes_in_float32(attention):
    model = switch(attention=attention, dtype=torch.bfloat16)
    with recorded_router_logits(model) as logits:
        assert model(SOURCE, decoder_input_ids=TARGET).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in logits} == {torch.float32}


def test_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 9\) and input_ids \(3, 7\)"):
        switch()(SOURCE, decoder_input_ids=TARGET, decoder_attention_mask=torch.ones_like(SOURCE))


# --- losses of the routers


def test_router_losses_are_summed_over_layers():
    """Fedus et al. 2021, equations 4 to 6, and Zoph et al. 2022, equation 5, token by token."""
    model = switch()
    with recorded_router_logits(model) as recorded:
        model(SOURCE, decoder_input_ids=TARGET)
    assert [tuple(logits.shape) for logits in recorded] == [(3, 9, 5), (3, 7, 5)]
    aux_loss = z_loss = 0.0
    for layer in recorded:
        tokens = [token for row in layer.tolist() for token in row]
        chosen, shares = [0] * 5, [0.0] * 5
        for token in tokens:
            chosen[token.index(max(token))] += 1
            total = sum(map(math.exp, token))
            shares = [share + math.exp(v) / total for share, v in zip(shares, token, strict=True)]
            z_loss += math.log(total) ** 2 / len(tokens)
        aux_loss += 5 * sum(c / len(tokens) * s / len(tokens) for c, s in zip(chosen, shares, strict=True))
    losses = model.router_losses(recorded)
    assert losses.keys() == {"aux_loss", "z_loss"}
    assert losses["aux_loss"].item() == pytest.approx(aux_loss, rel=1e-12)
    assert losses["z_loss"].item() == pytest.approx(z_loss, rel=1e-12)


def test_routers_are_recorded_only_inside():
    model = switch()
    with recorded_router_logits(model) as recorded:
        pass
    model(SOURCE, decoder_input_ids=TARGET)
    assert recorded == []


# --- the config

HUB = {
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "model_type": "switch_transformers",
    "vocab_size": 17,
    "d_model": 10,
    "d_kv": 3,
    "d_ff": 7,
    "num_heads": 4,
    "num_layers": 6,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 3,
    "num_sparse_decoder_layers": 1,
    "dropout_rate": 0.1,
    "router_jitter_noise": 0.01,
    "router_dtype": "float32",
    "feed_forward_proj": "relu",
    "is_gated_act": False,
    "decoder_start_token_id": 0,
    "is_encoder_decoder": True,
}


def test_steps_follow_from_the_numbers_of_sparse_blocks():
    config = SwitchTransformerConfig.from_dict(HUB)
    assert (config.encoder_sparse_step, config.decoder_sparse_step) == (2, 4)


def test_a_step_in_the_file_goes_before_the_number_of_sparse_blocks():
    config = SwitchTransformerConfig.from_dict(HUB | {"encoder_sparse_step": 1, "decoder_sparse_step": 0})
    assert (config.encoder_sparse_step, config.decoder_sparse_step) == (1, 0)


def test_decoder_of_null_blocks_is_as_deep_as_the_encoder_and_one_that_is_not_mentioned_has_12():
    config = SwitchTransformerConfig.from_dict({**HUB, "num_decoder_layers": None})
    assert (config.num_decoder_layers, config.decoder_sparse_step) == (6, 6)
    absent = {key: value for key, value in HUB.items() if key != "num_decoder_layers"}
    config = SwitchTransformerConfig.from_dict(absent)
    assert (config.num_decoder_layers, config.decoder_sparse_step) == (12, 12)


def test_defaults_are_those_of_the_library():
    config = SwitchTransformerConfig.from_dict({"model_type": "switch_transformers"})
    assert (config.d_model, config.expert_capacity, config.encoder_sparse_step, config.num_experts) == (768, 64, 4, 8)


def test_config_survives_a_round_trip():
    assert SwitchTransformerConfig.from_dict(CONFIG.to_dict()) == CONFIG


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "model_type='t5' is not 'switch_transformers'"),
        ({"capacity_factor": 1.25}, r"unknown keys \['capacity_factor'\]"),
        ({"num_sparse_encoder_layers": 0}, "num_sparse_encoder_layers=0 must be 1 … 6.*give encoder_sparse_step=0"),
        ({"num_sparse_decoder_layers": 5}, "num_sparse_decoder_layers=5 must be 1 … 4"),
        ({"encoder_sparse_step": -1}, "encoder_sparse_step=-1 must be 0 or more"),
        ({"expert_capacity": 0}, "expert_capacity=0 must be 1 or more"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon=0.0 must be greater than 0"),
        ({"relative_attention_num_buckets": 3}, "1 buckets of one direction and max_distance=128 do not fit"),
        ({"relative_attention_max_distance": 16}, "32 buckets of one direction and max_distance=16 do not fit"),
        ({"dense_act_fn": "gated-gelu", "feed_forward_proj": "gated-gelu"}, "hidden_act='gated-gelu' is not implement"),
        ({"is_gated_act": True}, "is_gated_act=True is not implemented; only False is"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj='gelu' is not implemented; only 'relu' is"),
        ({"router_dtype": "bfloat16"}, "router_dtype='bfloat16' is not implemented; only 'float32' is"),
        ({"d_model": "10"}, "d_model='10' must be of type int"),
    ],
)
def test_faulty_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SwitchTransformerConfig.from_dict(HUB | changes)


# --- checkpoints


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_computes_the_same(tmp_path, tied):
    model = switch(replace(CONFIG, tie_word_embeddings=tied), dtype=torch.float32)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(SOURCE, decoder_input_ids=TARGET), model(SOURCE, decoder_input_ids=TARGET))
