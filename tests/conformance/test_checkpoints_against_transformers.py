"""What the reference saves, transformers loads, and the other way round: every decoder family, sharded and not."""

import json

import pytest
import torch
from safetensors import safe_open

from conformance.cases import Case
from conformance.families import get
from conformance.oracles import oracle_class
from conformance.oracles.true_double import TrueDouble
from reference_impl.checkpoint import load_model, save_model

transformers = pytest.importorskip("transformers")

FAMILIES = ["gpt", "gpt2", "llama", "mistral", "mixtral", "phi"]
CASES = [f"{family}/{case}" for family in FAMILIES for case in ("plain", "distinct", "field-absent")] + [
    "gpt2/square", "llama/field-tie_word_embeddings", "mistral/field-tie_word_embeddings", "mistral/window-null",
    "mixtral/eleven-experts",
]  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Directory of a case, as a checkpoint."""

    def export(name):
        directory = tmp_path_factory.getbasetemp() / name.replace("/", "-")
        if not directory.exists():
            Case(name).export(directory)
        return directory

    return export


def library_model(case, directory):
    """The library's own model of a directory at true double, which must want exactly these tensors."""
    family = get(case.family)
    oracle = oracle_class(family)
    settings = {**family.oracle_settings, **family.double_settings}
    architecture = oracle(family, case.config, case.weights).architecture()
    with TrueDouble():
        model, info = architecture.from_pretrained(directory, dtype=torch.float64, output_loading_info=True, **settings)
    assert not {what: found for what, found in info.items() if found}
    return model.eval()


def logits(model, case):
    with TrueDouble(), torch.no_grad():
        returned = model(case.inputs["input_ids"])
    return getattr(returned, "logits", returned)


@pytest.mark.parametrize("max_shard_bytes", [None, 20_000], ids=["one-file", "sharded"])
@pytest.mark.parametrize("name", CASES)
def test_the_library_loads_what_we_saved(exported, tmp_path, name, max_shard_bytes):
    case = Case(name)
    save_model(load_model(exported(name)), tmp_path, max_shard_bytes=max_shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or max_shard_bytes is None
    torch.testing.assert_close(
        logits(library_model(case, tmp_path), case), case.expected["logits"], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", CASES)
def test_no_key_of_config_json_is_lost(exported, tmp_path, name):
    """Nor changed, but for a null that was worked out and the two spellings of rotary settings."""
    save_model(load_model(exported(name)), tmp_path)
    before, after = (json.loads((d / "config.json").read_text()) for d in (exported(name), tmp_path))
    worked_out = {"head_dim", "num_key_value_heads", "n_inner", "rope_scaling", "rope_parameters"}
    assert {key for key, value in before.items() if key not in after or after[key] != value} <= worked_out
    assert before.keys() <= after.keys()


@pytest.mark.parametrize("name", [f"{family}/distinct" for family in FAMILIES])
def test_we_load_what_the_library_saved(exported, tmp_path, name):
    """Sharded by the library, with its own config.json; Mixtral in both layouts."""
    case = Case(name)
    library = library_model(case, exported(name)).float()
    layouts = [{}, {"save_original_format": False}] if case.family == "mixtral" else [{}]
    for number, layout in enumerate(layouts):
        library.save_pretrained(tmp_path / str(number), max_shard_size="40KB", **layout)
        assert len(list((tmp_path / str(number)).glob("*.safetensors"))) > 1
        ours = load_model(tmp_path / str(number), dtype=torch.float64)
        torch.testing.assert_close(logits(ours, case), case.expected["logits"], rtol=1e-11, atol=1e-11)


def test_the_two_layouts_of_mixtral_are_different_files(exported, tmp_path):
    """So that the test above reads two layouts, and not one twice."""
    case = Case("mixtral/distinct")
    library = library_model(case, exported(case.name)).float()
    library.save_pretrained(tmp_path / "hub")
    library.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in names_in(tmp_path / "hub")
    assert "model.layers.0.mlp.experts.gate_up_proj" in names_in(tmp_path / "fused")


def names_in(directory):
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return list(file.keys())


def test_the_library_generates_to_the_stop_token_of_the_file_that_was_loaded(exported, tmp_path):
    """eos_token_id is nothing that we compute by, and would be lost if only what we compute by were saved."""
    directory = exported("llama/plain")
    config = json.loads((directory / "config.json").read_text())
    assert config["eos_token_id"] is not None
    save_model(load_model(directory), tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).eos_token_id == config["eos_token_id"]
