"""What Hugging Face's Transformer-XL does, measured, and what the oracle makes of it.

Needs a release of transformers that still has the model: `tox -e transformer-xl`.
"""

import dataclasses
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import Config, get
from conformance.golden import GoldenError
from conformance.golden.model import derive, draw_inputs, draw_weights
from conformance.oracles import oracle_missing
from conformance.oracles.true_double import TrueDouble
from conformance.sizes import PUBLISHED

REASON = oracle_missing("transformer_xl")
# The library, older than torch, warns of what it will do one day.
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.filterwarnings("ignore")]

FAMILY = get("transformer_xl")
RECIPES = {recipe.name.split("/")[1]: recipe for recipe in FAMILY.recipes}
PLAIN, DISTINCT, MEM_LEN = RECIPES["plain"], RECIPES["distinct"], RECIPES["field-mem_len"]
AGREEMENT = 1e-12


def oracle(recipe: Any = PLAIN, weights: dict[str, Tensor] | None = None, **changes: Any) -> Any:
    from conformance.oracles.transformer_xl import TransformerXL

    config = recipe.config | changes
    return TransformerXL(FAMILY, config, draw_weights(FAMILY, recipe) if weights is None else weights)


def ids_of(recipe: Any = PLAIN) -> Tensor:
    return draw_inputs(recipe)["input_ids"]


def error(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth.double()).abs().max() / truth.double().abs().max()).item()


def library(model: Any, ids: Tensor, **arguments: Any) -> Any:
    """The library's own answer to arguments of ours."""
    with TrueDouble(), torch.no_grad():
        return model.model(ids, **arguments)


def memories(model: Any, length: int, batch: int = 3) -> list[Tensor]:
    return [torch.zeros(length, batch, model.model.config.d_model, dtype=torch.float64)] * model.model.config.n_layer


# --- what the library does ------------------------------------------------------------------------------------------


def test_library_without_mems_attends_to_mem_len_zero_vectors() -> None:
    model = oracle(MEM_LEN)
    without, with_zeros = (
        library(model, ids_of(MEM_LEN), **mems).logits for mems in ({}, {"mems": memories(model, 5)})
    )
    assert without.equal(with_zeros)
    assert error(without, model.logits(ids_of(MEM_LEN))) > 0.1


def visible(model: Any, memory: int, queries: int) -> list[list[int]]:
    """Which keys the first layer gives a weight to: memory first; one row of a batch, one head."""
    mems = [torch.randn(memory, 1, model.model.config.d_model, dtype=torch.float64)] * model.model.config.n_layer
    attentions = library(model, ids_of()[:1, :queries], mems=mems, output_attentions=True).attentions
    return attentions[0][0, 0].gt(0).long().tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("memory", [0, 1, 2, 3])
@pytest.mark.parametrize("queries", [1, 2, 4, 5])
def test_same_length_is_a_window_of_mem_len_keys_however_the_text_is_cut(memory: int, queries: int) -> None:
    """The query's own key included, whether memory is empty, partly filled or full."""
    keys = memory + queries
    wanted = [[int(0 <= memory + i - j < 3) for j in range(keys)] for i in range(queries)]
    assert visible(oracle(same_length=True, mem_len=3), memory, queries) == wanted


@pytest.mark.parametrize("memory", [0, 2, 3])
def test_without_same_length_memory_and_all_before_the_query_are_visible(memory: int) -> None:
    wanted = [[int(j <= memory + i) for j in range(memory + 4)] for i in range(4)]
    assert visible(oracle(same_length=False, mem_len=3), memory, 4) == wanted


@pytest.mark.parametrize("lengths", [[4, 4, 3], [1, 1, 9], [6, 2, 3]])
def test_memory_is_the_last_mem_len_inputs_of_each_layer(lengths: list[int]) -> None:
    """The embedding's memory is looked up again; kimiyoung/transformer-xl#59's exchange of lengths changes nothing."""
    model, mems, fed = oracle(MEM_LEN), None, 0
    embedding = model.probes(ids_of(MEM_LEN))["embedding"]
    for length in lengths:
        mems = library(model, ids_of(MEM_LEN)[:, fed : fed + length],
                       mems=memories(model, 0) if mems is None else mems).mems  # fmt: skip
        fed += length
        assert error(mems[0].transpose(0, 1), embedding[:, max(0, fed - 5) : fed]) < AGREEMENT
        assert not any(memory.requires_grad for memory in mems)


def test_the_librarys_shift_is_a_gather_by_distance() -> None:
    attention = oracle().model.transformer.layers[0].dec_attn
    queries, keys = 3, 5
    by_distance = torch.randn(queries, keys, 1, 1)  # column c: distance keys − 1 − c
    shifted = attention._rel_shift(by_distance)
    for i in range(queries):
        for j in range(keys - queries + i + 1):
            distance = keys - queries + i - j
            assert shifted[i, j].equal(by_distance[i, keys - 1 - distance])


def test_the_librarys_own_dtype_reaches_not_all_of_its_parameters(tmp_path: Any) -> None:
    import transformers

    oracle().model.to(torch.float32).save_pretrained(tmp_path)
    model = transformers.TransfoXLLMHeadModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16, torch.float32}


# --- the oracle -----------------------------------------------------------------------------------------------------


def test_logits_are_log_probabilities() -> None:
    total = oracle().logits(ids_of()).exp().sum(-1)
    assert (total - 1).abs().max() < AGREEMENT


def test_probes_come_in_the_familys_order_and_shape() -> None:
    probes = oracle(DISTINCT).probes(ids_of(DISTINCT))
    sizes = FAMILY.probe_sizes(DISTINCT.config, DISTINCT.batch, DISTINCT.seq)
    wanted = {spec.name: tuple(sizes[axis] for axis in spec.axes) for spec in FAMILY.probes(DISTINCT.config)}
    assert {name: tuple(probe.shape) for name, probe in probes.items()} == wanted


def test_attention_probes_follow_from_each_other() -> None:
    probes, weights = oracle(DISTINCT).probes(ids_of(DISTINCT)), draw_weights(FAMILY, DISTINCT)
    u, v = (weights[f"transformer.{name}"].double()[:, None] for name in ("r_w_bias", "r_r_bias"))
    scale, places = DISTINCT.config["d_head"] ** 0.5, torch.arange(DISTINCT.seq)
    distance = (places[:, None] - places).clamp(min=0)
    causal = places[:, None] >= places
    for layer in range(DISTINCT.config["n_layer"]):
        p = {name.rsplit(".", 1)[1]: x for name, x in probes.items() if name.startswith(f"layers.{layer}.attention.")}
        content = (p["query"] + u) @ p["key"].transpose(-1, -2) / scale
        by_distance = torch.einsum("bhqd,khd->bhqk", p["query"] + v, p["distance_key"]) / scale
        position = by_distance.gather(-1, distance.expand_as(by_distance)) * causal
        assert error(p["content_scores"], content) < AGREEMENT
        assert error(p["position_scores"], position) < AGREEMENT
        weighted = (content + position).masked_fill(~causal, -torch.inf).softmax(-1)
        assert error(p["weights"], weighted) < AGREEMENT
        assert error(p["context"], (weighted @ p["value"]).transpose(1, 2)) < AGREEMENT


def test_model_is_as_before_after_its_probes_were_taken() -> None:
    model = oracle()
    before = model.logits(ids_of())
    model.probes(ids_of())
    assert model.logits(ids_of()).equal(before)
    assert "_rel_shift" not in vars(model.model.transformer.layers[0].dec_attn)


def test_segments_of_one_piece_are_the_logits() -> None:
    model = oracle(MEM_LEN)
    assert model.segments(ids_of(MEM_LEN), [11]).equal(model.logits(ids_of(MEM_LEN)))


def test_gradients_of_one_segment_are_those_of_the_loss() -> None:
    model, ids = oracle(MEM_LEN), ids_of(MEM_LEN)
    loss, gradients = model.loss_and_gradients(ids, ids)
    chosen = model.logits(ids)[:, :-1].gather(-1, ids[:, 1:, None])
    assert loss.item() == pytest.approx(-chosen.mean().item(), rel=1e-12)
    assert gradients.keys() == FAMILY.tensor_shapes(MEM_LEN.config).keys()


def test_no_gradient_reaches_the_memory() -> None:
    """Tokens of the first segment alone: their embeddings, untied, get none."""
    model, ids = oracle(DISTINCT), ids_of(DISTINCT)
    ids[:, :4], ids[:, 4:] = 3, ids[:, 4:].clamp(min=4)
    _, gradients = model.last_loss_and_gradients(ids, [4, 7])
    table = gradients["transformer.word_emb.emb_layers.0.weight"]
    assert table[3].eq(0).all()
    assert not table.eq(0).all()


def test_shared_biases_stand_once() -> None:
    _, gradients = oracle(DISTINCT).loss_and_gradients(ids_of(DISTINCT), ids_of(DISTINCT))
    assert [name for name in gradients if "r_w_bias" in name] == ["transformer.r_w_bias"]


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (PLAIN, "crit.cluster_bias"),
        (PLAIN, "transformer.layers.1.dec_attn.r_w_bias"),
        (DISTINCT, "transformer.r_w_bias"),
    ],
)
def test_missing_weight_is_refused_by_name(recipe: Any, name: str) -> None:
    weights = draw_weights(FAMILY, recipe)
    del weights[name]
    with pytest.raises(ValueError, match=f"'missing_keys': \\['{name}'\\]"):
        oracle(recipe, weights)


def test_weight_that_the_architecture_does_not_have_is_refused_by_name() -> None:
    weights = draw_weights(FAMILY, PLAIN) | {"crit.out_projs.7": torch.ones(20, 32)}
    with pytest.raises(ValueError, match=r"'unexpected_keys': \['crit.out_projs.7'\]"):
        oracle(weights=weights)


@pytest.mark.parametrize(
    ("dtype", "roundoff"), [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)]
)
def test_working_dtype_is_really_run_in(dtype: torch.dtype, roundoff: float) -> None:
    from conformance.oracles.transformer_xl import TransformerXL

    model = TransformerXL(FAMILY, DISTINCT.config, draw_weights(FAMILY, DISTINCT), dtype=dtype)
    logits, truth = model.logits(ids_of(DISTINCT)), oracle(DISTINCT).logits(ids_of(DISTINCT))
    assert logits.dtype == dtype
    assert 0.1 * roundoff < error(logits, truth) < 50 * roundoff


MISTAKES: dict[str, Callable[[Config], Config]] = {
    "zeros": lambda config: config | {"first_memory": "zeros"},
    "reversed": lambda config: config | {"cluster_order": "reversed"},
}


def test_counterfactuals_of_our_own_reach_no_config_of_the_library() -> None:
    for change in MISTAKES.values():
        model = oracle(**change({}))
        assert not {"first_memory", "cluster_order"} & model.model.config.to_dict().keys()
        assert error(model.logits(ids_of()), oracle().logits(ids_of())) > 1e-2


# --- goldens --------------------------------------------------------------------------------------------------------


def test_segments_that_are_not_the_whole_sequence_are_refused() -> None:
    with pytest.raises(GoldenError, match=r"segments of \(4, 4\) tokens do not make up seq=11"):
        derive(dataclasses.replace(MEM_LEN, segments=(4, 4)))


def test_a_reference_whose_memory_carries_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_gradients(old: Tensor | None, new: Tensor, mem_len: int) -> Tensor:
        known = new if old is None else torch.cat([old, new], dim=1)
        return known[:, max(0, known.shape[1] - mem_len) :]

    monkeypatch.setattr("reference_impl.nn.segment_memory.remember", with_gradients)
    with pytest.raises(GoldenError, match=r"field-mem_len: oracle and reference differ by .* at the gradient of "):
        derive(MEM_LEN)


def test_a_reference_whose_memory_forgets_one_token_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from reference_impl.nn.segment_memory import remember

    monkeypatch.setattr(
        "reference_impl.nn.segment_memory.remember", lambda old, new, mem_len: remember(old, new, mem_len - 1)
    )
    with pytest.raises(GoldenError, match=r"oracle and reference differ by .* at segments\.logits"):
        derive(MEM_LEN)


def test_a_field_that_shows_in_segments_alone_is_worth_a_case() -> None:
    """One forward does not know how long the memory is; what a mistake does not move is not stored."""
    derived = derive(MEM_LEN)
    assert derived.provenance["movement"]["mem_len ignored"] > 0.1
    stored = {name for name in derived.expected if name.startswith("counterfactual.mem_len ignored.")}
    assert stored == {"counterfactual.mem_len ignored.segments.logits"}


def test_reference_agrees_on_drawn_configurations(tmp_path: Any) -> None:
    from conformance.fuzz import fuzz

    result = fuzz("reference", ["transformer_xl"], keep=tmp_path, seconds=600, most=8)[0]
    assert (result.failure, result.examples, result.unsupported) == (None, 8, {})


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("published", [m for m in PUBLISHED if m.family == "transformer_xl"], ids=lambda m: m.name)
def test_library_has_the_parameters_of_the_reference_by_name_and_shape(published: Any) -> None:
    import transformers

    from reference_impl.checkpoint import FAMILIES

    with torch.device("meta"):
        theirs = transformers.TransfoXLLMHeadModel(transformers.TransfoXLConfig.from_dict(published.config))
        theirs.tie_weights()
        module, config, model = FAMILIES["transfo-xl"]
        home = import_module(module)
        ours = getattr(home, model)(getattr(home, config).from_dict(published.config))
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in theirs.parameters()) == published.parameters
