"""Goldens are made only of cases that deserve it, and verification names whatever was tampered with.

Everything runs on a family of two tiny recipes in a directory of its own; `small` is the case, `bias` a field case that
shares its weights.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from conformance import draws, families, golden
from conformance.cases import Case, FixtureError, Manifest, file_entries, write_manifest
from conformance.families import FAMILIES, Recipe, claims, get, llama
from conformance.oracles.hugging_face import HuggingFace

CONFIG = {
    "model_type": "llama", "vocab_size": 29, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2,
    "num_attention_heads": 3, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "attention_bias": False,
    "mlp_bias": False, "tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 100.0,
    "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}  # fmt: skip
SMALL = Recipe(
    name="llama/small",
    summary="a tiny Llama",
    config=CONFIG,
    weights="llama/small",
    batch=3,
    seq=7,
    claims={
        "golden.logits": ("float64", "float32"),
        "golden.left_padding": ("float64",),
        "golden.loss": ("float64",),
    },
    store=frozenset({"probes", "loss", "gradients", "blocks"}),
)
BIAS = Recipe(
    name="llama/field-mlp_bias",
    summary="small with mlp_bias moved",
    config=CONFIG | {"mlp_bias": True},
    weights="llama/small",
    batch=3,
    seq=7,
    claims={"golden.logits": ("float64",)},
    field="mlp_bias",
    counterfactuals={"mlp_bias ignored": CONFIG},
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only lose time to threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def use(monkeypatch: pytest.MonkeyPatch, *recipes: Recipe) -> None:
    """Let these be the family's recipes."""
    monkeypatch.setattr(llama, "FAMILY", dataclasses.replace(llama.FAMILY, recipes=recipes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both cases, made once; tests work on copies."""
    directory = tmp_path_factory.mktemp("goldens")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(monkeypatch, SMALL, BIAS)
        golden.make(["llama"], directory)
    return directory


@pytest.fixture
def goldens(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use(monkeypatch, SMALL, BIAS)
    return Path(shutil.copytree(made, tmp_path / "goldens"))


# --- what is made ---------------------------------------------------------------------------------------------------


def test_manifest_lists_the_cases_in_the_recipes_order_with_their_claims(goldens: Path) -> None:
    content = json.loads((goldens / "MANIFEST.json").read_text())
    assert {name: entry["claims"] for name, entry in content["cases"].items()} == {
        "llama/small": {check: list(dtypes) for check, dtypes in SMALL.claims.items()},
        "llama/field-mlp_bias": {"golden.logits": ["float64"]},
    }
    assert list(content["cases"]) == ["llama/small", "llama/field-mlp_bias"]
    assert content["claims"] == 5


def test_weights_are_the_draws_of_the_recipes_label(goldens: Path) -> None:
    weights = Case("llama/small", Manifest(goldens)).weights
    assert weights.keys() == llama.tensor_shapes(CONFIG).keys()
    assert [n for n, t in weights.items() if not t.equal(draws.tensor("llama/small", n, t.shape))] == []


def test_weights_of_an_earlier_case_are_stored_once(goldens: Path) -> None:
    stored = load_file(goldens / "llama/field-mlp_bias/model.safetensors")
    assert stored.keys() == {
        f"model.layers.{layer}.mlp.{part}_proj.bias" for layer in (0, 1) for part in ("gate", "up", "down")
    }
    case = Case("llama/field-mlp_bias", Manifest(goldens))
    assert set(case.shared.values()) == {"llama/small"}
    assert case.weights.keys() == llama.tensor_shapes(BIAS.config).keys()


def test_expected_values_are_those_that_the_recipe_stores(goldens: Path) -> None:
    kinds = {name.split(".")[0] for name in Case("llama/small", Manifest(goldens)).expected}
    assert kinds == {"logits", "loss", "probe", "gradient", "blocks"}
    bias = Case("llama/field-mlp_bias", Manifest(goldens)).expected
    assert {name for name in bias if not name.startswith("counterfactual.")} == {"logits"}


def test_stored_truth_is_float64(goldens: Path) -> None:
    expected = Case("llama/small", Manifest(goldens)).expected
    inputs = {"blocks.0.input", "blocks.1.input"}  # weights of one-layer checkpoints: exact in bfloat16
    assert {name for name, tensor in expected.items() if tensor.dtype != torch.float64} == inputs


def test_block_inputs_are_exact_in_bfloat16(goldens: Path) -> None:
    expected = Case("llama/small", Manifest(goldens)).expected
    for layer in (0, 1):
        stored = expected[f"blocks.{layer}.input"]
        assert (stored.dtype, stored.shape) == (torch.float32, (3, 7, 12))
        assert stored.to(torch.bfloat16).to(torch.float32).equal(stored)


def test_provenance_says_how_far_ignoring_the_field_moves_the_logits(goldens: Path) -> None:
    case = Case("llama/field-mlp_bias", Manifest(goldens))
    wrong, right = case.expected["counterfactual.mlp_bias ignored.logits"], case.expected["logits"]
    moved = ((wrong - right).abs().max() / right.abs().max()).item()
    assert case.provenance["movement"] == {"mlp_bias ignored": pytest.approx(moved, rel=1e-12)}
    assert moved > 1e-3


def test_oracle_error_is_known_in_every_working_dtype(goldens: Path) -> None:
    noise = Case("llama/small", Manifest(goldens)).provenance["oracle_error"]
    assert noise.keys() == {"logits", "blocks.0", "blocks.1"}
    for of_tensor in noise.values():
        assert of_tensor.keys() == {"float32", "bfloat16", "float16"}
        assert all(pair.keys() == {"max", "rms"} for pair in of_tensor.values())


def test_oracle_error_lies_near_the_roundoff_of_its_dtype(goldens: Path) -> None:
    noise = Case("llama/small", Manifest(goldens)).provenance["oracle_error"]["logits"]
    for dtype, roundoff in {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}.items():
        assert 0.1 * roundoff < noise[dtype]["rms"] < 50 * roundoff


def test_making_again_writes_the_same_weights_inputs_and_configs(goldens: Path, made: Path) -> None:
    golden.make(["llama"], goldens)
    for case in ("llama/small", "llama/field-mlp_bias"):
        for file in ("config.json", "model.safetensors", "inputs.safetensors"):
            assert (goldens / case / file).read_bytes() == (made / case / file).read_bytes()


def test_other_families_entries_are_kept(goldens: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The other family is a second name for the same one."""
    other = dataclasses.replace(SMALL, name="gpt2/small")
    module = ModuleType("conformance.families.gpt2")
    module.FAMILY = dataclasses.replace(llama.FAMILY, name="gpt2", recipes=(other,))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "conformance.families.gpt2", module)
    for place in (families, golden):
        monkeypatch.setattr(place, "FAMILIES", ("llama", "gpt2"))
    golden.make(["gpt2"], goldens)
    assert list(Manifest(goldens).cases) == ["llama/small", "llama/field-mlp_bias", "gpt2/small"]
    golden.make(["llama"], goldens)
    assert list(Manifest(goldens).cases) == ["llama/small", "llama/field-mlp_bias", "gpt2/small"]


# --- what is refused ------------------------------------------------------------------------------------------------


def refusal(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, directory: Path) -> str:
    use(monkeypatch, recipe)
    with pytest.raises(golden.GoldenError) as caught:
        golden.make(["llama"], directory)
    return str(caught.value)


def test_field_that_hardly_moves_the_logits_is_refused_with_the_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    idle = dataclasses.replace(
        BIAS,
        name="llama/field-rms_norm_eps",
        config=CONFIG | {"rms_norm_eps": 1.1e-6},
        field="rms_norm_eps",
        counterfactuals={"rms_norm_eps ignored": CONFIG},
    )
    message = refusal(idle, monkeypatch, tmp_path)
    assert message.startswith("llama/field-rms_norm_eps: ignoring rms_norm_eps moves the logits by ")
    assert "a field case needs 0.001" in message
    assert not (tmp_path / "llama/field-rms_norm_eps").exists()


@pytest.mark.parametrize(("moved", "accepted"), [(1.01e-3, True), (0.99e-3, False)])
def test_movement_is_held_against_one_thousandth(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moved: float, accepted: bool
) -> None:
    """The counterfactual's logits are set to the truth times 1 + moved, so that they move by exactly that."""
    real = HuggingFace.logits

    def logits(self: HuggingFace, input_ids: Tensor, **optional: Tensor) -> Tensor:
        ignored = self.config == CONFIG and self.dtype == torch.float64
        return truth * (1 + moved) if ignored else real(self, input_ids, **optional)

    truth = HuggingFace(llama.FAMILY, BIAS.config, golden.model.draw_weights(llama.FAMILY, BIAS)).logits(
        golden.model.draw_inputs(BIAS)["input_ids"]
    )
    monkeypatch.setattr(HuggingFace, "logits", logits)
    if accepted:
        use(monkeypatch, BIAS)
        golden.make(["llama"], tmp_path)
        assert Manifest(tmp_path).cases.keys() == {"llama/field-mlp_bias"}
    else:
        assert "moves the logits by 9.9e-04 only" in refusal(BIAS, monkeypatch, tmp_path)


def test_counterfactual_beside_the_ignored_field_may_move_little(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    near = dataclasses.replace(
        BIAS, counterfactuals=dict(BIAS.counterfactuals) | {"ε at 1.1e-6": BIAS.config | {"rms_norm_eps": 1.1e-6}}
    )
    use(monkeypatch, near)
    golden.make(["llama"], tmp_path)
    assert Case("llama/field-mlp_bias", Manifest(tmp_path)).provenance["movement"]["ε at 1.1e-6"] < 1e-3


def change_epsilon(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    from reference_impl.nn import norm

    right = norm.rms_norm
    monkeypatch.setattr(norm, "rms_norm", lambda x, weight, eps: right(x, weight, eps * factor))


def test_disagreement_of_oracle_and_reference_is_refused_with_the_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ε is 1e-6 beside a mean square of 1/4: a tenth more of it moves the logits by about 2e-7."""
    change_epsilon(monkeypatch, 1.1)
    message = refusal(SMALL, monkeypatch, tmp_path)
    assert message.startswith("llama/small: oracle and reference differ by ")
    assert message.endswith("e-07 at logits, wanted 1e-12")
    assert not (tmp_path / "llama/small").exists()


def test_disagreement_far_below_float32s_rounding_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    change_epsilon(monkeypatch, 1 + 2e-6)
    assert "e-12 at logits, wanted 1e-12" in refusal(SMALL, monkeypatch, tmp_path)


def test_disagreement_of_rounding_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    change_epsilon(monkeypatch, 1 + 1e-9)
    use(monkeypatch, SMALL)
    golden.make(["llama"], tmp_path)
    assert Case("llama/small", Manifest(tmp_path)).provenance["agreement_with_reference"]["logits"] < 1e-12


@pytest.mark.parametrize(
    ("name", "where"),
    [("layers.1.attention.value", "at layers.1.attention.value"), ("final_norm", "at final_norm")],
)
def test_disagreement_at_one_probe_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, where: str
) -> None:
    right = golden.model.reference.probes

    def probes(*args: Any, **arguments: Tensor) -> dict[str, Tensor]:
        found = right(*args, **arguments)
        found[name].view(-1)[-1] += 1e-9
        return found

    monkeypatch.setattr(golden.model.reference, "probes", probes)
    assert where in refusal(SMALL, monkeypatch, tmp_path)


def test_disagreement_at_one_gradient_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = golden.model.reference.loss_and_gradients

    def loss_and_gradients(*args: Any, **arguments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, gradients = right(*args, **arguments)
        gradients["model.norm.weight"][5] += 1e-9
        return loss, gradients

    monkeypatch.setattr(golden.model.reference, "loss_and_gradients", loss_and_gradients)
    assert "at the gradient of model.norm.weight, wanted 1e-12" in refusal(SMALL, monkeypatch, tmp_path)


def test_gradient_on_one_side_only_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = golden.model.reference.loss_and_gradients

    def loss_and_gradients(*args: Any, **arguments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, gradients = right(*args, **arguments)
        return loss, {name: g for name, g in gradients.items() if name != "lm_head.weight"}

    monkeypatch.setattr(golden.model.reference, "loss_and_gradients", loss_and_gradients)
    assert "gradients for ['lm_head.weight'] on one side only" in refusal(SMALL, monkeypatch, tmp_path)


def test_oracle_that_ignores_the_padding_mask_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pads on the right are harmless to a causal model; on the left real tokens then attend to them."""
    right = HuggingFace._call

    def call(self: HuggingFace, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Any:
        return right(self, input_ids, None, **more)

    monkeypatch.setattr(HuggingFace, "_call", call)
    assert "llama/small: the oracle padded on the left differs from its rows by" in refusal(
        SMALL, monkeypatch, tmp_path
    )


# --- verification ---------------------------------------------------------------------------------------------------


def reseal(root: Path) -> None:
    """Write the manifest anew for the files as they are, as somebody who tampers would."""
    cases = Manifest(root).cases
    write_manifest(root, {n: {"claims": e["claims"], "files": file_entries(root / n)} for n, e in cases.items()})


def verified(root: Path) -> list[str]:
    reseal(root)
    return golden.verify(["llama"], root)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"} if path.name == "model.safetensors" else None)


def shift(name: str, by: float) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[0] += by * tensors[name].abs().max().item()

    return edit


def test_untouched_goldens_verify(goldens: Path) -> None:
    assert golden.verify(["llama"], goldens) == []


def test_resealing_what_is_untouched_changes_nothing(goldens: Path) -> None:
    assert verified(goldens) == []


@pytest.mark.parametrize("name", ["logits", "loss", "probe.layers.1.attention.weights", "blocks.1.logits"])
def test_moved_expected_value_is_named_with_the_figure(goldens: Path, name: str) -> None:
    edit_tensors(goldens / "llama/small/expected.safetensors", shift(name, 1e-12))
    assert verified(goldens) == [f"llama/small: {name} rebuilt differs by 1.0e-12, wanted 1e-13"]


def test_moved_gradient_is_named_and_measured_by_the_largest_gradient(goldens: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        largest = max(t.abs().max().item() for name, t in tensors.items() if name.startswith("gradient."))
        tensors["gradient.model.layers.0.mlp.up_proj.weight"][3, 5] += 1e-12 * largest

    edit_tensors(goldens / "llama/small/expected.safetensors", edit)
    assert verified(goldens) == [
        "llama/small: gradient.model.layers.0.mlp.up_proj.weight rebuilt differs by 1.0e-12, wanted 1e-13"
    ]


def test_expected_value_that_moved_by_rounding_only_verifies(goldens: Path) -> None:
    edit_tensors(goldens / "llama/small/expected.safetensors", shift("logits", 2e-14))
    assert verified(goldens) == []


def test_expected_value_that_is_not_a_number_is_named(goldens: Path) -> None:
    edit_tensors(goldens / "llama/small/expected.safetensors", lambda tensors: tensors["loss"].fill_(torch.nan))
    assert verified(goldens) == ["llama/small: loss rebuilt differs by nan, wanted 1e-13"]


def test_expected_value_left_out_is_named(goldens: Path) -> None:
    edit_tensors(goldens / "llama/small/expected.safetensors", lambda tensors: tensors.pop("loss"))
    assert verified(goldens) == ["llama/small: expected values ['loss'] on one side only"]


def test_expected_value_too_many_is_named(goldens: Path) -> None:
    path = goldens / "llama/field-mlp_bias/expected.safetensors"
    edit_tensors(path, lambda tensors: tensors.update(loss=torch.ones(())))
    assert verified(goldens) == ["llama/field-mlp_bias: expected values ['loss'] on one side only"]


def test_counterfactual_is_verified_too(goldens: Path) -> None:
    path = goldens / "llama/field-mlp_bias/expected.safetensors"
    edit_tensors(path, shift("counterfactual.mlp_bias ignored.logits", 1e-12))
    assert verified(goldens) == [
        "llama/field-mlp_bias: counterfactual.mlp_bias ignored.logits rebuilt differs by 1.0e-12, wanted 1e-13"
    ]


@pytest.mark.parametrize("factor", [2.2, 0.45])
def test_oracle_error_off_by_more_than_a_factor_of_2_is_named(goldens: Path, factor: float) -> None:
    def edit(provenance: dict[str, Any]) -> None:
        provenance["oracle_error"]["blocks.1"]["bfloat16"]["rms"] *= factor

    edit_json(goldens / "llama/small/provenance.json", edit)
    problems = verified(goldens)
    assert len(problems) == 1
    assert problems[0].startswith("llama/small: oracle error of blocks.1 in bfloat16 by rms is ")


@pytest.mark.parametrize("factor", [1.8, 0.55])
def test_oracle_error_off_by_less_than_a_factor_of_2_verifies(goldens: Path, factor: float) -> None:
    def edit(provenance: dict[str, Any]) -> None:
        provenance["oracle_error"]["logits"]["float32"]["max"] *= factor

    edit_json(goldens / "llama/small/provenance.json", edit)
    assert verified(goldens) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_oracle_error_that_is_no_error_is_named(goldens: Path, value: float) -> None:
    def edit(provenance: dict[str, Any]) -> None:
        provenance["oracle_error"]["logits"]["float16"]["max"] = value

    edit_json(goldens / "llama/small/provenance.json", edit)
    problems = verified(goldens)
    assert len(problems) == 1
    assert problems[0].startswith("llama/small: oracle error of logits in float16 by max is ")


def test_moved_weight_is_named_by_its_file(goldens: Path) -> None:
    edit_tensors(goldens / "llama/small/model.safetensors", shift("lm_head.weight", 0.5))
    assert verified(goldens) == ["llama/small/model.safetensors: not the same bytes when rebuilt"]


def test_moved_input_is_named_by_its_file(goldens: Path) -> None:
    edit_tensors(goldens / "llama/small/inputs.safetensors", lambda tensors: tensors["lengths"].sub_(1))
    assert verified(goldens) == ["llama/small/inputs.safetensors: not the same bytes when rebuilt"]


def test_changed_config_is_named_by_its_file(goldens: Path) -> None:
    edit_json(goldens / "llama/small/config.json", lambda config: config.update(rms_norm_eps=1e-5))
    assert verified(goldens) == ["llama/small/config.json: not the same bytes when rebuilt"]


def test_claim_left_out_of_the_manifest_is_named(goldens: Path) -> None:
    cases = Manifest(goldens).cases
    cases["llama/small"]["claims"].pop("golden.loss")
    write_manifest(goldens, cases)
    assert golden.verify(["llama"], goldens) == ["llama/small: the manifest's claims are not the recipe's"]


def test_claim_in_a_dtype_too_few_is_named(goldens: Path) -> None:
    cases = Manifest(goldens).cases
    cases["llama/small"]["claims"]["golden.logits"] = ["float64"]
    write_manifest(goldens, cases)
    assert golden.verify(["llama"], goldens) == ["llama/small: the manifest's claims are not the recipe's"]


def test_recipe_without_golden_is_named(goldens: Path) -> None:
    cases = Manifest(goldens).cases
    del cases["llama/field-mlp_bias"]
    write_manifest(goldens, cases)
    shutil.rmtree(goldens / "llama/field-mlp_bias")
    assert golden.verify(["llama"], goldens) == ["llama/field-mlp_bias: not in the manifest"]


def test_directory_that_is_no_case_is_named(goldens: Path) -> None:
    (goldens / "llama/forgotten").mkdir()
    assert golden.verify(["llama"], goldens) == [f"{goldens}/llama/forgotten: not in the manifest"]


def test_damaged_file_is_refused_by_name(goldens: Path) -> None:
    with (goldens / "llama/small/config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(FixtureError, match=r"llama/small/config\.json: .* bytes, the manifest says"):
        golden.verify(["llama"], goldens)


def test_tampering_in_several_places_is_named_in_all_of_them(goldens: Path) -> None:
    edit_tensors(goldens / "llama/small/expected.safetensors", shift("logits", 1e-9))
    edit_json(goldens / "llama/field-mlp_bias/config.json", lambda config: config.update(hidden_act="gelu"))
    assert verified(goldens) == [
        "llama/small: logits rebuilt differs by 1.0e-09, wanted 1e-13",
        "llama/field-mlp_bias/config.json: not the same bytes when rebuilt",
    ]


# --- what is shipped ------------------------------------------------------------------------------------------------


def test_shipped_case_verifies_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One small case here; `conformance golden verify` does all."""
    name = "llama/square"
    recipe = next(r for r in llama.FAMILY.recipes if r.name == name)
    shipped = Manifest()
    shutil.copytree(shipped.directory / name, tmp_path / name)
    write_manifest(tmp_path, {name: shipped.cases[name]})
    use(monkeypatch, recipe)
    assert golden.verify(["llama"], tmp_path) == []


def test_shipped_manifest_has_the_recipes_cases_and_claims() -> None:
    stated = {name: entry["claims"] for name, entry in Manifest().cases.items()}
    assert stated == {
        r.name: {check: list(dtypes) for check, dtypes in claims(r).items()} for f in FAMILIES for r in get(f).recipes
    }


def test_disagreement_at_explicit_positions_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An oracle that is fooled by positions that jump is not believed."""
    real = HuggingFace.logits

    def logits(self: HuggingFace, input_ids: Tensor, position_ids: Tensor | None = None, **optional: Tensor) -> Tensor:
        return real(
            self, input_ids, position_ids=None if position_ids is None else position_ids.clamp(max=3), **optional
        )

    monkeypatch.setattr(HuggingFace, "logits", logits)
    positions = dataclasses.replace(SMALL, store=SMALL.store | {"positions"})
    assert "at positions.logits, wanted 1e-12" in refusal(positions, monkeypatch, tmp_path)


def test_disagreement_of_a_block_alone_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = HuggingFace.logits

    def logits(self: HuggingFace, input_ids: Tensor, **optional: Tensor) -> Tensor:
        return real(self, input_ids, **optional) * (1 + 1e-9 * (self.config["num_hidden_layers"] == 1))

    monkeypatch.setattr(HuggingFace, "logits", logits)
    assert "at block 0 alone, wanted 1e-12" in refusal(SMALL, monkeypatch, tmp_path)


def test_provenance_that_says_something_else_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, SMALL)
    golden.make(["llama"], tmp_path)
    path = tmp_path / "llama/small/provenance.json"
    path.write_text(path.read_text().replace("a tiny Llama", "a large Llama"))
    cases = Manifest(tmp_path).cases
    cases["llama/small"]["files"] = file_entries(path.parent)
    write_manifest(tmp_path, cases)
    assert golden.verify(["llama"], tmp_path) == [
        "llama/small: provenance says summary 'a large Llama', not 'a tiny Llama'"
    ]


def test_a_case_without_a_recipe_is_named_and_then_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, SMALL, BIAS)
    golden.make(["llama"], tmp_path)
    use(monkeypatch, SMALL)
    assert golden.verify(["llama"], tmp_path) == ["llama/field-mlp_bias: in the manifest, but no recipe makes it"]
    golden.make(["llama"], tmp_path)
    assert not (tmp_path / "llama/field-mlp_bias").exists()
    assert golden.verify(["llama"], tmp_path) == []


def test_probe_that_the_oracle_does_not_show_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = HuggingFace.probes

    def probes(self: HuggingFace, input_ids: Tensor) -> dict[str, Tensor]:
        return {name: probe for name, probe in real(self, input_ids).items() if name != "layers.1.attention.value"}

    monkeypatch.setattr(HuggingFace, "probes", probes)
    assert refusal(SMALL, monkeypatch, tmp_path) == "llama/small: the oracle shows no layers.1.attention.value"
