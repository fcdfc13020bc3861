"""Partition, as far as one process shows it: who holds and reads what, and how it is laid out."""

from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conformance.cases import Case
from conformance.implementations.partition import FAMILIES
from reference_impl.checkpoint import build, load_config, load_model, load_weights
from reference_impl.nn.conv1d import Conv1D
from reference_impl.partition import pipeline, tensor_parallel
from reference_impl.partition.__main__ import arguments, main
from reference_impl.partition.stand_ins import EmbeddingElsewhere

DEEP = {"gpt": "deep", "gpt2": "deep", "gpt3": "deep", "llama": "mha", "mistral": "window"}


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family = request.param
    Case(f"{family}/{DEEP.get(family, 'distinct')}").export(tmp_path / "case")
    return tmp_path / "case"


def test_blocks_are_shared_out_as_evenly_as_can_be() -> None:
    assert [pipeline.even_split(5, stages) for stages in (1, 2, 3, 4, 5)] == [
        (5,), (3, 2), (2, 2, 1), (2, 1, 1, 1), (1, 1, 1, 1, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("stages", [0, 6])
def test_every_stage_needs_a_block(stages: int) -> None:
    with pytest.raises(ValueError, match=f"{stages} stages cannot share 5 blocks"):
        pipeline.even_split(5, stages)


def test_a_stage_has_the_blocks_behind_those_of_the_stages_before() -> None:
    stages = [pipeline.stage_of((1, 3, 1), number, 5) for number in range(3)]
    assert [(stage.first, stage.end, stage.is_first, stage.is_last) for stage in stages] == [
        (0, 1, True, False), (1, 4, False, False), (4, 5, False, True),
    ]  # fmt: skip


@pytest.mark.parametrize("split", [(2, 2), (3, 3), (5, 0), (6, -1), ()], ids=str)
def test_a_split_must_share_out_all_blocks(split: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="add up to 5 blocks"):
        pipeline.stage_of(split, 0, 5)


@pytest.mark.parametrize("stage", [-1, 2])
def test_a_stage_must_be_one_of_the_split(stage: int) -> None:
    with pytest.raises(ValueError, match=f"stage={stage} must be one of 0 … 1"):
        pipeline.stage_of((3, 2), stage, 5)


def test_each_stage_reads_its_own_tensors_alone(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(checkpoint)
    whole = dict(load_model(checkpoint).named_parameters())
    parts, blocks = pipeline.anatomy(config), pipeline.number_of_blocks(checkpoint)
    read: list[str] = []
    monkeypatch.setattr(
        pipeline, "load_weights", partial(load_weights, place=lambda name, x: (read.append(name), x)[1])
    )
    seen = []
    for split in {pipeline.even_split(blocks, min(3, blocks)), (1, blocks - 1)}:
        for number in range(len(split)):
            read.clear()
            stage = pipeline.load_stage(checkpoint, split=split, stage=number, dtype=torch.float32)
            own = set(range(sum(split[:number]), sum(split[: number + 1])))
            tied = config.get("tie_word_embeddings", False)
            wanted = {
                name for name in whole
                if (name.startswith(f"{parts.blocks}.") and int(name.split(".")[2]) in own)
                or (number == 0 and name.startswith(parts.embeddings))
                or (number == len(split) - 1 and name.startswith(parts.head))
                or (number == len(split) - 1 and tied and name == f"{parts.embeddings[0]}.weight")
            }  # fmt: skip
            assert set(read) == wanted
            held = dict(stage.named_parameters())
            assert not any(parameter.is_meta for parameter in held.values())
            assert sum(p.numel() for p in held.values()) == sum(whole[name].numel() for name in wanted)
            seen.append(wanted)
    assert set().union(*seen) == set(whole)


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type='marian' cannot be partitioned"):
        pipeline.anatomy({"model_type": "marian"})


@pytest.mark.parametrize("ids", [[[0, 7]], [[-1, 3]]], ids=str)
def test_later_stages_refuse_the_ids_that_the_first_refuses(ids: list[list[int]]) -> None:
    elsewhere = EmbeddingElsewhere(7, 4, torch.float32)
    assert elsewhere(torch.tensor([[0, 6]])).shape == (1, 2, 4)
    with pytest.raises(ValueError, match="are not in 0 … 6"):
        elsewhere(torch.tensor(ids))


def test_the_plan_cuts_every_projection_of_a_family(checkpoint: Path) -> None:
    config = load_config(checkpoint)
    model = build(checkpoint, config, "eager")
    paths = tensor_parallel.plan(config)
    left = {
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding) and not any(fnmatch(name, path) for path in paths)
    }  # fmt: skip
    assert left <= {"transformer.wpe", "transformer.positions_embed"}
    for path in paths:
        assert any(fnmatch(name, path) for name, _ in model.named_modules()), path


def test_heads_are_repeated_side_by_side_and_their_gradients_added() -> None:
    layout = tensor_parallel.repeated_heads(2, copies=3)
    heads = torch.tensor([[0.0], [1.0], [10.0], [11.0]])  # two heads of two rows
    there = layout.there(heads)
    assert there[:, 0].tolist() == [0, 1, 0, 1, 0, 1, 10, 11, 10, 11, 10, 11]
    assert torch.equal(layout.back(there), 3 * heads)
    assert layout.there(heads[:, 0]).tolist() == there[:, 0].tolist()


def test_fused_columns_are_laid_out_rank_by_rank() -> None:
    layout = tensor_parallel.fused_by_rank(2)
    fused = torch.tensor([1, 2, 3, 4, 10, 20, 30, 40, 100, 200, 300, 400])  # Q, K, V of two heads of two columns
    there = layout.there(fused)
    assert there.tolist() == [1, 2, 10, 20, 100, 200, 3, 4, 30, 40, 300, 400]
    assert torch.equal(layout.back(there), fused)
    weight = torch.arange(5 * 12).view(5, 12)
    assert torch.equal(layout.back(layout.there(weight)), weight)
    assert not torch.equal(layout.there(weight), weight)


def test_key_value_heads_are_repeated_until_the_ranks_divide_them(tmp_path: Path) -> None:
    Case("mistral/plain").export(tmp_path / "case")  # H = 6, KV = 2
    model = build(tmp_path / "case", load_config(tmp_path / "case"), "eager")
    repeated = {ranks: tensor_parallel.layouts(model, ranks) for ranks in (2, 3, 6)}
    assert not repeated[2]
    for ranks, heads in ((3, 6), (6, 6)):
        assert {name.partition("layers.")[2].partition(".")[2] for name in repeated[ranks]} == {
            "self_attn.k_proj.weight", "self_attn.v_proj.weight",
        }  # fmt: skip
        weight = torch.zeros(2 * 8, 48)
        assert all(layout.there(weight).shape == (heads * 8, 48) for layout in repeated[ranks].values())


def test_heads_must_be_shared_out_evenly(tmp_path: Path) -> None:
    Case("mistral/plain").export(tmp_path / "case")
    model = build(tmp_path / "case", load_config(tmp_path / "case"), "eager")
    with pytest.raises(ValueError, match="6 attention heads must be divisible by ranks=4"):
        tensor_parallel.layouts(model, 4)


@pytest.mark.parametrize("wrong", [["--new-tokens", "0"], ["--timeout", "0"], ["--split", "two"]], ids=" ".join)
def test_arguments_that_make_no_sense_are_status_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments(["--checkpoint", "D", "--ids", "1", *wrong])
    assert ended.value.code == 2
    assert f"{wrong[0]}" in capsys.readouterr().err.splitlines()[-1]


def test_without_torchrun_the_command_says_how_it_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["--checkpoint", "D", "--ids", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: start it with torchrun --nproc-per-node N")


def test_command_line() -> None:
    options: Any = arguments(["--checkpoint", "D", "--ids", "1,15,4", "--split", "3,2"])
    assert (options.ids, options.split, options.by, options.backend) == ([1, 15, 4], [3, 2], "blocks", "gloo")
