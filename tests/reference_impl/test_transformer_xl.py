import math
from dataclasses import replace

import pytest
import torch

from reference_impl.checkpoint import load_model, save_model
from reference_impl.models.transformer_xl import TransformerXL, TransformerXLConfig

CONFIG = TransformerXLConfig(
    vocab_size=17, cutoffs=(5, 11), d_model=6, d_embed=8, div_val=2, n_layer=2, n_head=2, d_head=4, d_inner=7,
    mem_len=3, clamp_len=4, same_length=False, layer_norm_epsilon=0.01,
)  # fmt: skip
IDS = torch.tensor([[3, 11, 4, 1, 16, 9, 2, 6, 5], [12, 7, 1, 8, 2, 15, 1, 8, 0], [0, 5, 10, 7, 2, 13, 14, 6, 6]])
# Segments of 9 tokens: at once, one by one, shorter and longer than the memory of 3.
PLANS = [(9,), (1,) * 9, (2, 2, 2, 3), (4, 1, 4), (1, 5, 3)]
CHANGES = [
    {}, {"pre_lnorm": True}, {"same_length": True}, {"untie_r": False}, {"clamp_len": -1}, {"div_val": 1},
    {"div_val": 1, "d_embed": 6}, {"cutoffs": (), "tie_projs": None}, {"tie_word_embeddings": False},
    {"tie_projs": (True, False, True)}, {"tie_projs": (True, False, True), "div_val": 1}, {"mem_len": 0},
    {"mem_len": 20, "same_length": True},
]  # fmt: skip


def transformer_xl(config=CONFIG, attention="eager", dtype=torch.float64, **changes):
    """A model whose norms and biases are random too, so that none can be left out unnoticed."""
    if "cutoffs" in changes:
        changes["tie_projs"] = None
    model = TransformerXL(replace(config, **changes), attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.6)
    return model.to(dtype)


def in_segments(model, plan, ids=IDS):
    session = model.session()
    return torch.cat([session.feed(segment) for segment in ids.split(list(plan), dim=1)], dim=1)


class Equations:
    """The papers' equations for one row of a batch, number by number, with a memory of lists."""

    def __init__(self, model):
        self.config = model.config
        self.weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
        ends = [*self.config.cutoffs, self.config.vocab_size]
        self.clusters = list(zip([0, *self.config.cutoffs], ends, strict=True))
        self.memory = [[] for _ in range(self.config.n_layer)]

    def feed(self, ids):
        config = self.config
        stream = [self.embed(token) for token in ids]
        for layer in range(config.n_layer):
            known = self.memory[layer] + stream
            self.memory[layer] = known[max(0, len(known) - config.mem_len) :]
            name = f"transformer.layers.{layer}"
            stream = self.half(f"{name}.dec_attn", stream, known, self.attend)
            stream = self.half(f"{name}.pos_ff", stream, stream, self.feed_forward)
        return [self.log_probabilities(x) for x in stream]

    def embed(self, token):
        one_table = self.config.div_val == 1
        cluster = 0 if one_table else next(n for n, (low, high) in enumerate(self.clusters) if low <= token < high)
        row = self.weights[f"transformer.word_emb.emb_layers.{cluster}.weight"]
        row = row[token if one_table else token - self.clusters[cluster][0]]
        projection = self.weights.get(f"transformer.word_emb.emb_projs.{cluster}")
        vector = row if projection is None else times(projection, row)
        return [math.sqrt(self.config.d_model) * value for value in vector]

    def half(self, name, stream, known, function):
        if self.config.pre_lnorm:
            return add(stream, function(name, [self.norm(name, x) for x in known])[-len(stream) :])
        return [self.norm(name, x) for x in add(stream, function(name, known)[-len(stream) :])]

    def norm(self, name, x):
        mean = sum(x) / len(x)
        root = math.sqrt(sum((value - mean) ** 2 for value in x) / len(x) + self.config.layer_norm_epsilon)
        affine = zip(x, self.weights[f"{name}.layer_norm.weight"], self.weights[f"{name}.layer_norm.bias"], strict=True)
        return [(value - mean) / root * g + b for value, g, b in affine]

    def encoding(self, distance):
        d, clamp = self.config.d_model, self.config.clamp_len
        place = min(distance, clamp) if clamp > 0 else distance
        angles = [place / 10000 ** (i / d) for i in range(0, d, 2)]
        return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]

    def attend(self, name, known):
        """A_ij = (q_i + u) · k_j + (q_i + v) · W_r R_(i−j), over √d_head; every query, also those of the memory."""
        config, width = self.config, self.config.d_head
        joint, features = [times(self.weights[f"{name}.qkv_net.weight"], x) for x in known], config.n_head * width
        outputs = []
        for i in range(len(known)):
            context = []
            for head in range(config.n_head):
                part = {what: slice(n * features + head * width, n * features + (head + 1) * width)
                        for n, what in enumerate("qkv")}  # fmt: skip
                first = max(0, i - config.mem_len + 1) if config.same_length else 0
                powers = []
                for j in range(first, i + 1):
                    rows = self.weights[f"{name}.r_net.weight"][head * width : (head + 1) * width]
                    content = dot(
                        plus(joint[i][part["q"]], self.weights[f"{name}.r_w_bias"][head]), joint[j][part["k"]]
                    )
                    position = dot(plus(joint[i][part["q"]], self.weights[f"{name}.r_r_bias"][head]),
                                   times(rows, self.encoding(i - j)))  # fmt: skip
                    powers.append(math.exp((content + position) / math.sqrt(width)))
                values = [joint[j][part["v"]] for j in range(first, i + 1)]
                context += [dot(powers, column) / sum(powers) for column in zip(*values, strict=True)]
            outputs.append(times(self.weights[f"{name}.o_net.weight"], context))
        return outputs

    def feed_forward(self, name, stream):
        w, outputs = {n: self.weights[f"{name}.CoreNet.{n}"] for n in ("0.weight", "0.bias", "3.weight", "3.bias")}, []
        for x in stream:
            inner = [max(0.0, value) for value in plus(times(w["0.weight"], x), w["0.bias"])]
            outputs.append(plus(times(w["3.weight"], inner), w["3.bias"]))
        return outputs

    def log_probabilities(self, x):
        def scores(cluster):
            low, high = self.clusters[cluster]
            layer, rows = (0, slice(low, high)) if self.config.div_val == 1 else (cluster, slice(None))
            weight, bias = (self.weights[f"crit.out_layers.{layer}.{kind}"][rows] for kind in ("weight", "bias"))
            projected = self.projected(x, cluster)
            return plus(times(weight, projected), bias)

        head = scores(0)
        if len(self.clusters) > 1:
            head += plus(times(self.weights["crit.cluster_weight"], self.projected(x, 0)),
                         self.weights["crit.cluster_bias"])  # fmt: skip
        head = log_softmax(head)
        shortlist = self.clusters[0][1]
        result = head[:shortlist]
        for cluster in range(1, len(self.clusters)):
            result += [head[shortlist + cluster - 1] + value for value in log_softmax(scores(cluster))]
        return result

    def projected(self, x, cluster):
        projection = self.weights.get(f"crit.out_projs.{cluster}")
        return x if projection is None else [dot(x, column) for column in zip(*projection, strict=True)]


def dot(xs, ys):
    return sum(x * y for x, y in zip(xs, ys, strict=True))


def times(rows, x):
    return [dot(row, x) for row in rows]


def plus(xs, ys):
    return [x + y for x, y in zip(xs, ys, strict=True)]


def add(rows, others):
    return [plus(x, y) for x, y in zip(rows, others, strict=True)]


def log_softmax(scores):
    total = math.log(sum(math.exp(score) for score in scores))
    return [score - total for score in scores]


def equations(model, plan, ids=IDS):
    rows = []
    for row in ids.tolist():
        text, start, fed = Equations(model), 0, []
        for size in plan:
            fed += text.feed(row[start : start + size])
            start += size
        rows.append(fed)
    return torch.tensor(rows, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


# --- the model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_log_probabilities_follow_the_equations(changes, attention):
    model = transformer_xl(attention=attention, **changes)
    close(model(IDS), equations(model, (9,)))


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("changes", CHANGES[:4], ids=str)
def test_segments_follow_the_equations(changes, plan):
    model = transformer_xl(**changes)
    close(in_segments(model, plan), equations(model, plan))


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_probabilities_of_all_tokens_add_up_to_1(changes):
    close(transformer_xl(**changes)(IDS).exp().sum(dim=-1), torch.ones(3, 9, dtype=torch.float64))


def test_parameters_have_the_names_and_shapes_of_a_hugging_face_checkpoint():
    model = TransformerXL(replace(CONFIG, n_layer=1, tie_projs=(True, False, True)))
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == {
        "transformer.word_emb.emb_layers.0.weight": (5, 8),
        "transformer.word_emb.emb_layers.1.weight": (6, 4),
        "transformer.word_emb.emb_layers.2.weight": (6, 2),
        "transformer.word_emb.emb_projs.0": (6, 8),
        "transformer.word_emb.emb_projs.1": (6, 4),
        "transformer.word_emb.emb_projs.2": (6, 2),
        "transformer.layers.0.dec_attn.r_w_bias": (2, 4),
        "transformer.layers.0.dec_attn.r_r_bias": (2, 4),
        "transformer.layers.0.dec_attn.qkv_net.weight": (24, 6),
        "transformer.layers.0.dec_attn.r_net.weight": (8, 6),
        "transformer.layers.0.dec_attn.o_net.weight": (6, 8),
        "transformer.layers.0.dec_attn.layer_norm.weight": (6,),
        "transformer.layers.0.dec_attn.layer_norm.bias": (6,),
        "transformer.layers.0.pos_ff.CoreNet.0.weight": (7, 6),
        "transformer.layers.0.pos_ff.CoreNet.0.bias": (7,),
        "transformer.layers.0.pos_ff.CoreNet.3.weight": (6, 7),
        "transformer.layers.0.pos_ff.CoreNet.3.bias": (6,),
        "transformer.layers.0.pos_ff.layer_norm.weight": (6,),
        "transformer.layers.0.pos_ff.layer_norm.bias": (6,),
        "crit.cluster_weight": (2, 8),
        "crit.cluster_bias": (2,),
        "crit.out_layers.0.bias": (5,),
        "crit.out_layers.1.bias": (6,),
        "crit.out_layers.2.bias": (6,),
        "crit.out_projs.1": (6, 4),
    }


def test_shared_biases_stand_once_beside_the_layers():
    names = dict(transformer_xl(untie_r=False).named_parameters())
    assert [name for name in names if "r_w_bias" in name or "r_r_bias" in name] == [
        "transformer.r_w_bias",
        "transformer.r_r_bias",
    ]


def test_softmax_is_tied_to_the_tables_and_projections_of_the_embedding():
    model = transformer_xl()
    embedding = model.transformer.word_emb
    for n in range(3):
        assert model.crit.out_layers[n].weight is embedding.emb_layers[n].weight
        assert (model.crit.out_projs[n] is embedding.emb_projs[n]) == (n > 0)


def test_with_one_table_all_tied_clusters_use_its_projection():
    model = transformer_xl(div_val=1)
    projections = [model.crit.out_projs[n] is model.transformer.word_emb.emb_projs[0] for n in range(3)]
    assert projections == [False, True, True]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_runs_in_working_precision(dtype, attention):
    logits = in_segments(transformer_xl(attention=attention, dtype=dtype), (4, 4, 1))
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_attention_that_is_neither_is_refused():
    with pytest.raises(ValueError, match=r"attention='flash' must be 'eager' \(written out\) or 'sdpa' \(fused\)"):
        transformer_xl(attention="flash")


@pytest.mark.parametrize("token", [-1, 17])
def test_an_id_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match=r"ids must be 0 … 16, got"):
        transformer_xl()(torch.tensor([[3, token]]))


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_checkpoint_is_read_as_it_was_written(changes, tmp_path):
    model = transformer_xl(**changes)
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(IDS), model(IDS))


# --- segments


@pytest.mark.parametrize("changes", [{"mem_len": 8}, {"mem_len": 3, "same_length": True}], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_any_plan_gives_the_whole_if_the_memory_holds_what_a_query_may_see(plan, changes):
    model = transformer_xl(**changes)
    close(in_segments(model, plan), model(IDS))


def test_a_memory_that_forgets_does_not_give_the_whole():
    model = transformer_xl()
    assert (in_segments(model, (3, 3, 3)) - model(IDS))[:, 6:].abs().amax(dim=-1).gt(1e-3).all()


def test_without_memory_a_segment_is_as_if_it_stood_alone():
    model = transformer_xl(mem_len=0)
    close(in_segments(model, (4, 5)), torch.cat([model(IDS[:, :4]), model(IDS[:, 4:])], dim=1))


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_no_gradient_flows_into_the_memory():
    """As if the memory were a number: that of a copy of the model, which shares no parameter."""
    model = transformer_xl()
    session = model.session()
    session.feed(IDS[:, :4])
    session.feed(IDS[:, 4:]).square().sum().backward()
    of_model = gradients(model)
    with torch.no_grad():
        session = model.session()
        session.feed(IDS[:, :4])
    session.feed(IDS[:, 4:]).square().sum().backward()
    apart = gradients(model)
    assert of_model.keys() == apart.keys() == dict(model.named_parameters()).keys()
    for name, gradient in apart.items():
        close(of_model[name], gradient)


def test_the_memory_itself_reaches_later_segments():
    model, changed = transformer_xl(), IDS.clone()
    changed[:, 3] += 1
    assert (in_segments(model, (4, 5), changed) - in_segments(model, (4, 5)))[:, 4:].abs().amax(dim=-1).gt(1e-6).all()


def test_state_does_not_grow_once_the_memory_is_full():
    session = transformer_xl().session()
    assert session.state_bytes() == 0
    sizes = []
    for segment in IDS.split([2, 2, 4, 1], dim=1):
        session.feed(segment)
        sizes.append(session.state_bytes())
    full = 2 * 3 * 3 * 6 * 8  # layers, batch, tokens, width, float64
    assert sizes == [full * 2 // 3, full, full, full]


def test_sessions_share_nothing():
    model = transformer_xl()
    first, second = model.session(), model.session()
    first.feed(IDS[:, :4])
    close(second.feed(IDS[:, :4]), model(IDS[:, :4]))
    close(first.feed(IDS[:, 4:]), in_segments(model, (4, 5))[:, 4:])


def test_another_batch_is_refused_and_changes_nothing():
    model = transformer_xl()
    session = model.session()
    session.feed(IDS[:, :4])
    with pytest.raises(ValueError, match="the memory is of a batch of 3, got 2; start a new session"):
        session.feed(IDS[:2, 4:])
    close(session.feed(IDS[:, 4:]), in_segments(model, (4, 5))[:, 4:])


def test_an_empty_segment_has_no_logits_and_changes_nothing():
    model = transformer_xl()
    session = model.session()
    session.feed(IDS[:, :4])
    assert session.feed(IDS[:, :0]).shape == (3, 0, 17)
    close(session.feed(IDS[:, 4:]), in_segments(model, (4, 5))[:, 4:])


# --- the config


def test_defaults_are_those_of_hugging_face():
    assert TransformerXLConfig.from_dict({}) == TransformerXLConfig(
        vocab_size=267735, cutoffs=(20000, 40000, 200000), d_model=1024, d_embed=1024, div_val=4, n_layer=18, n_head=16,
        d_head=64, d_inner=4096, mem_len=1600, clamp_len=1000, same_length=True, pre_lnorm=False, untie_r=True,
        layer_norm_epsilon=1e-5, tie_word_embeddings=True, proj_share_all_but_first=True,
        tie_projs=(False, True, True, True),
    )  # fmt: skip


def test_the_config_of_the_hub_is_read():
    config = {
        "adaptive": True, "architectures": ["TransfoXLLMHeadModel"], "attn_type": 0, "clamp_len": 1000,
        "cutoffs": [20000, 40000, 200000], "d_embed": 1024, "d_head": 64, "d_inner": 4096, "d_model": 1024,
        "div_val": 4, "dropatt": 0.0, "dropout": 0.1, "eos_token_id": 0, "ext_len": 0, "init": "normal",
        "init_range": 0.01, "init_std": 0.02, "layer_norm_epsilon": 1e-05, "mem_len": 1600, "n_head": 16,
        "model_type": "transfo-xl", "n_layer": 18, "pre_lnorm": False, "proj_init_std": 0.01, "same_length": True,
        "sample_softmax": -1, "task_specific_params": {"text-generation": {"do_sample": True}}, "tgt_len": 128,
        "tie_projs": [False, True, True, True], "tie_weight": True, "untie_r": True, "vocab_size": 267735,
    }  # fmt: skip
    assert TransformerXLConfig.from_dict(config) == TransformerXLConfig()


def test_tie_projs_says_more_than_proj_share_all_but_first():
    config = {"tie_projs": [True, False, False, True], "proj_share_all_but_first": True}
    assert TransformerXLConfig.from_dict(config).tie_projs == (True, False, False, True)
    assert TransformerXLConfig.from_dict({"proj_share_all_but_first": False}).tie_projs == (False,) * 4


def test_a_config_is_written_as_it_is_read():
    assert TransformerXLConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert CONFIG.to_dict()["architectures"] == ["TransfoXLLMHeadModel"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 4}, r"unknown keys \['max_length'\]"),
        ({"model_type": "gpt2"}, "model_type='gpt2' is not 'transfo-xl'"),
        ({"attn_type": 2}, "attn_type=2 is not implemented; only 0 is"),
        ({"sample_softmax": 5}, "sample_softmax=5 is not implemented; only -1 is"),
        ({"ext_len": 1}, "ext_len=1 is not implemented; only 0 is"),
        ({"adaptive": False}, "adaptive=False is not implemented; only True is"),
        ({"tie_weight": False}, "tie_weight=False, an old name, contradicts tie_word_embeddings=True"),
        ({"cutoffs": [20000, 300000]}, r"cutoffs=\[20000, 300000\] must rise, .* less than vocab_size=267735"),
        ({"cutoffs": [4.0]}, r"cutoffs=\[4\.0\] must be a list of int"),
        ({"cutoffs": 7}, "cutoffs=7 must be a list of int"),
        ({"tie_projs": [True]}, r"tie_projs=\[True\] must say something for each of 4 clusters"),
        ({"tie_projs": [1, 0, 0, 0]}, r"tie_projs=\[1, 0, 0, 0\] must be a list of bool"),
        ({"d_model": 7}, "d_model=7 must be even: half of a position's encoding are sines"),
        ({"d_embed": 60}, "d_embed=60 divided by div_val=4 to the power 3 is less than 1"),
        ({"mem_len": -1}, "mem_len=-1 must be 0 or more"),
        ({"mem_len": 0}, "mem_len=0 must be 0 or more, with same_length, which shows so many keys, 1"),
        ({"n_layer": 0}, "n_layer=0 must be greater than 0"),
        ({"n_head": 2.0}, r"n_head=2\.0 must be of type int"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()),
)
def test_a_config_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerXLConfig.from_dict(changes)
