import json
import math
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reference_impl import checkpoint, stored_tensors
from reference_impl.checkpoint import CheckpointError, load_config, load_model, load_weights, save_model
from reference_impl.models.gpt2 import GPT2, GPT2Config
from reference_impl.models.llama import Llama, LlamaConfig
from reference_impl.models.mixtral import Mixtral, MixtralConfig
from reference_impl.stored_tensors import read_header

CONFIG = LlamaConfig(
    vocab_size=17,
    hidden_size=10,
    intermediate_size=7,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=4,
    attention_bias=True,
    rope_theta=50.0,
)
TIED = replace(CONFIG, tie_word_embeddings=True)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def llama(config=CONFIG):
    model = Llama(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


@pytest.fixture
def saved(tmp_path):
    """A checkpoint in one file."""
    save_model(llama(), tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint in several files."""
    save_model(llama(), tmp_path / "sharded", max_shard_bytes=2500)
    return tmp_path / "sharded"


def edit(file, **changes):
    """Replaces or adds tensors of a file; None removes one."""
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(name, None) if tensor is None else tensors.update({name: tensor})
    save_file(tensors, file)


def faults_of(path, model=None):
    with pytest.raises(CheckpointError) as caught:
        load_weights(llama() if model is None else model, path)
    return caught.value.faults


def assert_same_parameters(model, expected):
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


# --- round trips


def test_one_file_round_trip(saved):
    assert_same_parameters(load_model(saved), llama())


def test_several_files_round_trip(sharded):
    assert_same_parameters(load_model(sharded), llama())


def test_a_loaded_model_gives_the_logits_of_the_saved_one(saved):
    with torch.no_grad():
        assert torch.equal(load_model(saved)(IDS), llama()(IDS))


def test_the_config_round_trip(saved):
    assert LlamaConfig.from_dict(load_config(saved)) == CONFIG


def test_files_hold_hub_names_and_say_that_torch_wrote_them(saved):
    with safe_open(saved / SINGLE, framework="pt") as file:
        assert set(file.keys()) == llama().state_dict().keys()
        assert file.metadata() == {"format": "pt"}


def test_every_shard_is_within_the_limit_or_holds_one_tensor(sharded):
    for file in sharded.glob("*.safetensors"):
        sizes = [tensor.numel() * 4 for tensor in load_file(file).values()]
        assert sum(sizes) <= 2500 or len(sizes) == 1


def test_the_index_maps_every_tensor_to_its_file(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    assert weight_map == {name: file.name for file in sharded.glob("*.safetensors") for name in load_file(file)}


def test_names_are_split_in_order():
    sizes = {"a": 3, "b": 4, "c": 9, "d": 1}
    assert checkpoint.shard(sizes, 8) == [["a", "b"], ["c"], ["d"]]


def test_without_a_limit_there_is_one_file():
    assert checkpoint.shard({"a": 3, "b": 4}, None) == [["a", "b"]]


def test_saving_over_weights_is_refused(saved):
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors already; choose another directory"):
        save_model(llama(), saved)


# --- loading


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_converted_to_the_dtype(saved, dtype):
    assert_same_parameters(load_model(saved, dtype=dtype), llama().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_keep_their_stored_dtype(tmp_path, dtype):
    save_model(llama().to(dtype), tmp_path)
    assert_same_parameters(load_model(tmp_path), llama().to(dtype))


def test_a_loaded_model_does_not_depend_on_its_files(saved):
    model = load_model(saved)
    (saved / SINGLE).write_bytes(b"\0" * (saved / SINGLE).stat().st_size)
    assert_same_parameters(model, llama())


def test_the_backend_is_passed_on(saved):
    assert load_model(saved, attention="sdpa").model.layers[0].self_attn.attention == "sdpa"


def test_nothing_stays_on_the_meta_device(saved):
    model = load_model(saved)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}


def test_a_tied_head_is_not_stored(tmp_path):
    save_model(llama(TIED), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / SINGLE)


def test_a_tied_head_is_still_tied_when_loaded(tmp_path):
    save_model(llama(TIED), tmp_path)
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_may_be_stored_if_it_is_equal(tmp_path):
    save_model(llama(TIED), tmp_path)
    edit(tmp_path / SINGLE, **{"lm_head.weight": llama(TIED).lm_head.weight.detach().clone()})
    assert_same_parameters(load_model(tmp_path), llama(TIED))


def test_a_tied_head_that_differs_is_refused(tmp_path):
    save_model(llama(TIED), tmp_path)
    edit(tmp_path / SINGLE, **{"lm_head.weight": torch.ones(17, 10)})
    (fault,) = faults_of(tmp_path, llama(TIED))
    assert fault == "model.embed_tokens.weight and lm_head.weight are one parameter, but differ in the files"


def test_stored_rotary_frequencies_are_ignored(saved):
    edit(saved / SINGLE, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert_same_parameters(load_model(saved), llama())


# --- files written without the head, as OpenAI's GPT-2 is on the hub


def gpt2_without_head(path):
    """A small GPT-2 in the hub's layout; returns the model that was stored."""
    model = GPT2(GPT2Config(vocab_size=13, n_positions=7, n_embd=6, n_layer=2, n_head=3))
    save_model(model, path)
    stored = load_file(path / SINGLE)
    stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 7, 7, dtype=torch.uint8).tril() for layer in (0, 1)}
    save_file(stored | masks, path / SINGLE)
    return model


def test_names_without_their_first_part_are_read_and_stored_masks_ignored(tmp_path):
    model = gpt2_without_head(tmp_path)
    assert_same_parameters(load_model(tmp_path), model)


def test_a_tensor_under_both_names_is_a_fault(tmp_path):
    gpt2_without_head(tmp_path)
    edit(tmp_path / SINGLE, **{"transformer.ln_f.bias": torch.ones(6)})
    assert faults_of(tmp_path, GPT2(GPT2Config(vocab_size=13, n_positions=7, n_embd=6, n_layer=2, n_head=3))) == [
        "ln_f.bias is unexpected: shape (6,), in model.safetensors"
    ]


# --- faults


def test_all_tensor_faults_are_listed_with_shapes_and_files(saved):
    edit(
        saved / SINGLE,
        **{
            "model.norm.weight": None,
            "model.layers.1.mlp.up_proj.weight": torch.ones(10, 7),
            "model.layers.2.mlp.up_proj.weight": torch.ones(7, 10),
        },
    )
    assert faults_of(saved) == [
        "model.layers.1.mlp.up_proj.weight has shape (10, 7): wanted (7, 10), in model.safetensors",
        "model.norm.weight is missing: wanted (10,)",
        "model.layers.2.mlp.up_proj.weight is unexpected: shape (7, 10), in model.safetensors",
    ]


def test_a_head_that_is_missing_and_not_tied_is_a_fault(saved):
    edit(saved / SINGLE, **{"lm_head.weight": None})
    assert faults_of(saved) == ["lm_head.weight is missing: wanted (17, 10)"]


def test_integers_are_not_read_as_weights(saved):
    edit(saved / SINGLE, **{"model.norm.weight": torch.ones(10, dtype=torch.int8)})
    (fault,) = faults_of(saved)
    assert fault == "model.norm.weight is stored as I8: wanted one of F64, F32, F16, BF16, in model.safetensors"


def test_a_missing_shard_is_named_with_its_tensors(tmp_path):
    save_model(llama(), tmp_path, max_shard_bytes=2500)
    lost = sorted(tmp_path.glob("*.safetensors"))[-1]
    names = ", ".join(sorted(load_file(lost)))
    lost.unlink()
    assert faults_of(tmp_path) == [f"{INDEX} names {lost.name}, which is missing, for {names}"]


def test_an_index_that_names_the_wrong_file_is_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())
    right = index["weight_map"]["model.norm.weight"]
    wrong = index["weight_map"]["model.embed_tokens.weight"]
    assert right != wrong
    index["weight_map"]["model.norm.weight"] = wrong
    (sharded / INDEX).write_text(json.dumps(index))
    assert faults_of(sharded) == [
        f"model.norm.weight is not in {wrong}, where {INDEX} says it is",
        f"model.norm.weight is in {right}, but {INDEX} says {wrong}",
    ]


def test_an_index_may_not_name_files_elsewhere(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = f"../sharded/{index['weight_map']['model.norm.weight']}"
    (sharded / INDEX).write_text(json.dumps(index))
    assert "which is missing, for model.norm.weight" in faults_of(sharded)[0]


@pytest.mark.parametrize("length", [0, 7, 100, -1], ids=["empty", "no-header", "half-a-header", "one-byte-short"])
def test_a_file_that_was_cut_short_is_refused(saved, length):
    content = (saved / SINGLE).read_bytes()
    (saved / SINGLE).write_bytes(content[:length])
    (fault,) = faults_of(saved)
    assert fault.startswith("model.safetensors is corrupt or cut short: ")


def test_one_corrupt_shard_is_one_fault(sharded):
    first = sorted(sharded.glob("*.safetensors"))[0]
    names = ", ".join(sorted(load_file(first)))
    first.write_bytes(first.read_bytes()[:-1])
    (fault,) = faults_of(sharded)
    assert fault.startswith(f"{first.name} is corrupt or cut short: ")
    assert fault.endswith(f"{INDEX} says that it holds {names}")


@pytest.mark.parametrize("left", [0.3, 0.9])
def test_the_tensors_that_a_cut_takes_away_are_named(saved, left):
    """Those that begin before the cut and end behind it, and all behind it; no other."""
    content = (saved / SINGLE).read_bytes()
    entries = read_header(saved / SINGLE)
    end = int(left * len(content))
    (saved / SINGLE).write_bytes(content[:end])
    (fault,) = faults_of(saved)
    lost = {name for name, entry in entries.items() if entry.start + 4 * math.prod(entry.shape) > end}
    assert 0 < len(lost) < len(entries)
    assert {part.split(" ")[0] for part in fault.split("; ")[1:]} == lost


def test_a_header_that_names_a_tensor_twice_is_refused(saved):
    """The format forbids it; of two entries one would be lost without a word."""
    content = (saved / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    again = json.dumps(json.loads(header)["model.norm.weight"]).encode()
    header = header[:-1] + b',"model.norm.weight":' + again + b"}"
    (saved / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    (fault,) = faults_of(saved)
    assert fault == "model.safetensors is corrupt or cut short: its header names model.norm.weight twice"


def test_a_directory_without_weights_is_refused(tmp_path):
    nothing = f"holds neither {SINGLE} nor {INDEX}; nothing else is read"
    assert faults_of(tmp_path) == [nothing]
    for name in ("pytorch_model.bin", "consolidated.safetensors", "README.md"):
        (tmp_path / name).touch()
    way_out = "load it elsewhere, and save it as safetensors"
    assert faults_of(tmp_path) == [f"{nothing}, not consolidated.safetensors, pytorch_model.bin: {way_out}"]


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"model.norm.weight": 1}}'])
def test_an_index_without_a_map_is_refused(tmp_path, index):
    (tmp_path / INDEX).write_text(index)
    assert faults_of(tmp_path) == [f"{INDEX} has no weight_map from names to files"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [(None, "config.json is missing"), ("{", "config.json is not JSON"), ("[]", "config.json holds a list")],
)
def test_a_config_that_cannot_be_read_is_refused(tmp_path, content, fault):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=fault):
        load_config(tmp_path)


def test_an_unknown_family_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match=r"model_type='bert' must be one of \[.*'gpt2', 'gpt3', 'llama'"):
        load_model(tmp_path)


def test_a_checkpoint_error_is_a_value_error_that_names_the_directory(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_config(tmp_path)


def test_every_loading_fault_of_a_config_names_the_file(saved):
    for content, fault in {
        '{"model_type": ["llama"]}': r"model_type=\['llama'\] must be one of",
        '{"model_type": "llama", "hidden_size": "wide"}': "config.json: hidden_size='wide' must be of type int",
        '{"model_type": "llama", "qk_norm": true}': r"config.json: unknown keys \['qk_norm'\]",
        "[" * 100_000: "config.json is not JSON",
        "\x00": "config.json is not JSON",
    }.items():
        (saved / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=fault):
            load_model(saved)


def test_bytes_that_are_no_text_are_no_config(saved):
    (saved / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        load_model(saved)


def test_a_directory_in_the_place_of_a_file_is_refused(saved):
    (saved / SINGLE).unlink()
    (saved / SINGLE).mkdir()
    (fault,) = faults_of(saved)
    assert fault.startswith("model.safetensors is corrupt or cut short: ")


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_more_blocks_than_tensors_are_refused_before_they_are_built(saved):
    change_config(saved, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match=r"says num_hidden_layers=1000000000, the files hold \d+ at most"):
        load_model(saved)


def test_sizes_beyond_64_bits_are_refused(saved):
    change_config(saved, vocab_size=10**30)
    with pytest.raises(CheckpointError, match=r"config\.json describes a model that cannot be built") as raised:
        load_model(saved)
    assert len(str(raised.value).splitlines()) == 2  # and not a line for each C++ function


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9000000000]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [9223372036854775807, 9223372036854775807], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"\xff": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b"[" * 10_000,
    ],
    ids=range(13),
)
def test_an_absurd_header_is_refused(saved, header):
    (saved / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    (fault,) = faults_of(saved)
    assert fault.startswith("model.safetensors is corrupt or cut short: ")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12], ids=str)
def test_an_absurd_length_of_the_header_is_refused(saved, length):
    content = (saved / SINGLE).read_bytes()
    (saved / SINGLE).write_bytes(length.to_bytes(8, "little") + content[8:])
    (fault,) = faults_of(saved)
    assert fault.startswith("model.safetensors is corrupt or cut short: ")


def test_a_file_that_shrinks_while_it_is_read_is_an_error_that_names_the_tensor(saved):
    entry = read_header(saved / SINGLE)["model.norm.weight"]
    content = (saved / SINGLE).read_bytes()
    (saved / SINGLE).write_bytes(content[: entry.start + 4])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read at model\.norm\.weight: it ends 36"):
        entry.read()
    (saved / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read at model\.norm\.weight"):
        entry.read()


@pytest.mark.parametrize("file", ["\0", "x" * 5000, "", "."], ids=["nul", "long", "empty", "dot"])
def test_what_is_no_name_of_a_file_is_a_missing_file(sharded, file):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (sharded / INDEX).write_text(json.dumps(index))
    assert any("which is missing, for model.norm.weight" in fault for fault in faults_of(sharded))


@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX, "model-00001-of-00002.safetensors"])
def test_random_damage_is_an_error_or_harmless(tmp_path, saved, sharded, name):
    """100 times a few bytes of a file are overwritten, or its end is cut off; in a third, near its beginning."""
    path = saved if name in (SINGLE, "config.json") else sharded
    file = path / name if (path / name).exists() else sorted(path.glob("*.safetensors"))[0]
    content, chance = file.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 1, 2, 8])):
            end = len(damaged) if chance.random() < 2 / 3 else min(40, len(damaged))
            damaged[chance.randrange(end)] = chance.choice([0, 0xFF, *b'0123456789"{[,-', chance.randrange(256)])
        if chance.random() < 0.1:
            del damaged[chance.randrange(len(damaged)) :]
        file.write_bytes(damaged)
        try:
            load_model(path)
        except CheckpointError:
            refused += 1
    assert 0 < refused < 100


# --- other layouts


def mixtral():
    config = MixtralConfig(
        vocab_size=17, hidden_size=10, intermediate_size=7, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=4, num_local_experts=5, num_experts_per_tok=2,
    )  # fmt: skip
    return Mixtral(config)


def fused(tensors):
    """The tensors of a Mixtral as transformers 5 can write them: the experts of a layer together."""
    together = {name: tensor for name, tensor in tensors.items() if ".block_sparse_moe." not in name}
    for layer in (0, 1):
        moe, mlp = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        w1, w2, w3 = ([tensors[f"{moe}.experts.{e}.w{n}.weight"] for e in range(5)] for n in (1, 2, 3))
        together[f"{mlp}.gate.weight"] = tensors[f"{moe}.gate.weight"]
        together[f"{mlp}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(w1, w3, strict=True)])
        together[f"{mlp}.experts.down_proj"] = torch.stack(w2)
    return together


def test_experts_stored_together_are_read(tmp_path):
    model = mixtral()
    save_model(model, tmp_path)
    save_file(fused(load_file(tmp_path / SINGLE)), tmp_path / SINGLE)
    assert_same_parameters(load_model(tmp_path), model)
    assert_same_parameters(load_model(tmp_path, dtype=torch.float64), model.double())


def test_experts_stored_together_with_another_shape_are_faults(tmp_path):
    save_model(mixtral(), tmp_path)
    together = fused(load_file(tmp_path / SINGLE))
    together["model.layers.0.mlp.experts.gate_up_proj"] = torch.ones(5, 13, 10)
    together["model.layers.1.mlp.experts.down_proj"] = torch.ones(4, 10, 7)
    save_file(together, tmp_path / SINGLE)
    faults = faults_of(tmp_path, mixtral())
    assert "model.layers.0.mlp.experts.gate_up_proj is unexpected: shape (5, 13, 10), in model.safetensors" in faults
    assert "model.layers.0.block_sparse_moe.experts.4.w1.weight is missing: wanted (7, 10)" in faults
    assert "model.layers.1.block_sparse_moe.experts.4.w2.weight is missing: wanted (10, 7)" in faults
    assert len(faults) == 12


def test_experts_of_a_dtype_that_is_not_read_are_faults(tmp_path):
    save_model(mixtral(), tmp_path)
    together = fused(load_file(tmp_path / SINGLE))
    together["model.layers.0.mlp.experts.down_proj"] = torch.ones(5, 10, 7, dtype=torch.int8)
    save_file(together, tmp_path / SINGLE)
    assert len(faults_of(tmp_path, mixtral())) == 5


def test_each_tensor_keeps_its_own_dtype(saved):
    """Norms in float32, matrices in bfloat16 or float16, as some checkpoints are."""
    mixed = {"model.norm.weight": torch.float64, "lm_head.weight": torch.bfloat16}
    edit(saved / SINGLE, **{name: load_file(saved / SINGLE)[name].to(dtype) for name, dtype in mixed.items()})
    loaded = load_model(saved).state_dict()
    assert {name: loaded[name].dtype for name in mixed} == mixed
    assert loaded["model.embed_tokens.weight"].dtype == torch.float32
    as_one = load_model(saved, dtype=torch.float32).state_dict()
    assert {tensor.dtype for tensor in as_one.values()} == {torch.float32}
    assert torch.equal(as_one["lm_head.weight"], llama().lm_head.weight.bfloat16().float())


def test_a_tensor_larger_than_a_run_is_read_whole(saved, monkeypatch):
    """In runs of 7 of its 170 elements; the last one is shorter."""
    monkeypatch.setattr(stored_tensors, "RUN", 7)
    assert_same_parameters(load_model(saved), llama())
    assert_same_parameters(load_model(saved, dtype=torch.bfloat16), llama().bfloat16())


# --- what no computation needs


def test_keys_that_change_nothing_survive_a_round_trip(saved, tmp_path):
    kept = {"eos_token_id": [2, 7], "bos_token_id": 1, "max_position_embeddings": 99, "_name_or_path": "me/mine"}
    change_config(saved, **kept)
    save_model(load_model(saved), tmp_path / "again")
    assert load_config(tmp_path / "again") == load_config(saved)
    assert load_config(saved).items() >= kept.items()


def test_what_is_computed_by_is_written_as_it_is_now(saved, tmp_path):
    """A null that was derived is written out; the dtype is that of the model, in the spelling of the file."""
    change_config(saved, num_key_value_heads=3, head_dim=4, dtype="float32")
    config = load_config(saved)
    del config["torch_dtype"]
    (saved / "config.json").write_text(json.dumps(config))
    save_model(load_model(saved, dtype=torch.bfloat16), tmp_path / "again")
    assert load_config(tmp_path / "again") == config | {"dtype": "bfloat16"}


# --- memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("stored", "loaded"), [("float32", "None"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_loading_takes_no_more_memory_than_the_weights_and_a_tenth(saved, tmp_path, stored, loaded):
    """In a process of its own: by how much its largest memory grows, over the weights as they are then."""
    config = LlamaConfig(
        vocab_size=4000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=16
    )
    model = Llama(config).to(getattr(torch, stored))
    save_model(model, tmp_path / "large")
    program = f"""
import pathlib, torch
from reference_impl.checkpoint import load_model
largest = lambda: int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
load = lambda path: load_model(path, dtype={"None" if loaded == "None" else f"torch.{loaded}"})
load({str(saved)!r})  # what the libraries need once for all
before = largest()
model = load({str(tmp_path / "large")!r})
print((largest() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) <= 1.1
