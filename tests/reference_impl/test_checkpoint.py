import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reference_impl import checkpoint
from reference_impl.checkpoint import CheckpointError, load_config, load_model, load_weights, save_model
from reference_impl.models.gpt2 import GPT2, GPT2Config
from reference_impl.models.llama import Llama, LlamaConfig

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
    assert fault.startswith("model.norm.weight is stored as I8: wanted one of")


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
    first.write_bytes(first.read_bytes()[:-1])
    (fault,) = faults_of(sharded)
    assert fault.startswith(f"{first.name} is corrupt or cut short: ")


def test_a_directory_without_weights_is_refused(tmp_path):
    assert faults_of(tmp_path) == [f"holds neither {SINGLE} nor {INDEX}; other formats are not read"]


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
