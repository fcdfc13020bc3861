"""Partition over processes: pipelines have the bits of one process, tensor parallel its values within the bounds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import partition_mistakes
from conformance import check
from conformance.cases import Case
from conformance.implementation import Checkpoint
from partitioned import PartitionedReference, over, pipeline, tensor_parallel
from reference_impl.checkpoint import load_model

DEEPEST = ("gpt/deep", "gpt2/deep", "gpt3/deep", "llama/mha", "mistral/window", "mixtral/distinct", "phi/distinct")


def checkpoint(name: str, dtype: torch.dtype = torch.float32) -> tuple[Case, Checkpoint]:
    case = Case(name)
    case.read()
    return case, Checkpoint(case.config, case.weights, dtype, torch.device("cpu"))


def passes(implementation: object, case: str, name: str, dtype: str) -> None:
    result = check(implementation, case, name, dtype)
    assert result.outcome == "pass", (result.message, result.details)


# --- pipeline


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", DEEPEST)
def test_two_and_three_stages_have_the_bits_of_one_process(case: str, dtype: str) -> None:
    """One call, padding, a session in pieces; 5 blocks over 2 and 3, 3 over 2 and 3, 2 over 2."""
    passes(PartitionedReference(), case, "partition.bit_equal", dtype)


@torch.no_grad()
@pytest.mark.parametrize("split", [[1, 10], [10, 1], [1, 9, 1], [9, 1, 1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_may_be_shared_out_unevenly(split: list[int], dtype: torch.dtype) -> None:
    case, stored = checkpoint("gpt3/deep", dtype)
    model = over(len(split), partition_mistakes.load_split, splits=[split] * len(split)).load(stored)
    assert torch.equal(model(case.ids), load_model(stored.path, dtype=dtype)(case.ids))


@torch.no_grad()
def test_each_stage_caches_its_own_blocks() -> None:
    case, stored = checkpoint("llama/mha")
    one, several = load_model(stored.path, dtype=torch.float32).session(), pipeline(2).load(stored).session()
    for piece in case.ids.split([3, 1, 7], dim=1):
        assert torch.equal(several.feed(piece), one.feed(piece))
    real = case.ids.numel()  # each stage has its own note of which tokens are real: a byte each
    assert several.state_bytes() == one.state_bytes() + real


@pytest.mark.parametrize("case", ["gpt2/distinct", "mistral/distinct"])
def test_gradients_flow_back_through_the_stages(case: str) -> None:
    """gpt2/distinct: the table is tied, the first and the last stage have a part of its gradient each."""
    passes(pipeline(2), case, "golden.gradients", "float64")


def test_gradients_have_the_bits_of_one_process() -> None:
    """In float32: under the float64 mode a gradient that is sent in a coarser dtype would not be coarser."""
    case, stored = checkpoint("llama/mha")
    one, several = load_model(stored.path, dtype=torch.float32), pipeline(2).load(stored)
    for parameter in several.parameters.values():
        parameter.requires_grad_()
    for model in (one, several):
        logits = model(case.ids)
        (logits["logits"] if isinstance(logits, dict) else logits).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in several.parameters.items()}
    assert gradients
    for name, parameter in one.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


# --- tensor parallel

CUTS = [  # ranks, case
    (3, "gpt/distinct"),
    (2, "gpt2/deep"),
    (3, "gpt2/plain"),  # one head a rank, fused qkv
    (2, "gpt3/plain"),
    (2, "llama/field-attention_bias"),
    (3, "llama/field-mlp_bias"),
    (2, "llama/field-tie_word_embeddings"),
    (3, "llama/mqa"),  # one key/value head, three ranks
    (3, "mistral/window"),  # two key/value heads, three ranks
    (3, "mixtral/distinct"),
    (2, "phi/field-qk_layernorm"),
    (3, "phi/distinct"),  # biases, two key/value heads, three ranks
]


@pytest.mark.parametrize(("ranks", "case"), CUTS)
def test_tensor_parallel_is_within_the_bounds(ranks: int, case: str) -> None:
    for dtype in ("float64", "float32"):
        passes(tensor_parallel(ranks), case, "golden.logits", dtype)
    passes(tensor_parallel(ranks), case, "cache.chunks", "float64")


@pytest.mark.parametrize("case", ["phi/distinct", "llama/distinct", "gpt2/plain", "mistral/window"])
def test_tensor_parallel_in_bfloat16(case: str) -> None:
    passes(tensor_parallel(3), case, "golden.logits", "bfloat16")


@pytest.mark.parametrize(
    ("ranks", "case"),
    [(3, "phi/distinct"), (3, "llama/distinct"), (3, "gpt/distinct"), (3, "mixtral/distinct")],
)
def test_gradients_of_cut_parameters_are_whole(ranks: int, case: str) -> None:
    passes(tensor_parallel(ranks), case, "golden.gradients", "float64")


@pytest.mark.parametrize(("ranks", "case"), CUTS)
def test_token_ids_fall_into_every_shard_of_the_vocabulary(ranks: int, case: str) -> None:
    found = Case(case)
    found.read()
    shards: tuple[Tensor, ...] = torch.arange(found.config["vocab_size"]).chunk(ranks)
    assert len(shards) == ranks
    assert all(torch.isin(found.ids, shard).any() for shard in shards)


# --- the command


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               "-m", "reference_impl.partition", *arguments]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("options", [["--split", "1,2"], ["--by", "columns"]], ids=" ".join)
def test_the_command_continues_a_prompt_as_one_process_does(options: list[str], tmp_path: Path) -> None:
    Case("mistral/window").export(tmp_path / "case")
    model = load_model(tmp_path / "case", dtype=torch.float32)
    session, ids, wanted = model.session(), torch.tensor([[1, 15, 4]]), []  # type: ignore[operator]
    for _ in range(4):
        ids = session.feed(ids)[:, -1].argmax(dim=-1, keepdim=True)
        wanted.append(int(ids))
    done = torchrun(2, "--checkpoint", str(tmp_path / "case"), "--ids", "1,15,4", "--new-tokens", "4", *options)
    assert done.returncode == 0, done.stderr
    assert [int(line.split("\t")[0]) for line in done.stdout.splitlines()] == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ids", "1", "--split", "2,2"], "split=[2, 2] must give every stage a block and add up to 3 blocks"),
        (["--ids", "1", "--by", "columns", "--split", "1,2"], "--split shares out blocks"),
        (["--ids", "1", "--backend", "foo"], "--backend foo is not in this build of torch"),
        (["--ids", "10000"], "prompt 0 holds 10000; token ids are 0 … "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_done_is_one_line_of_each_process(options: list[str], message: str, tmp_path: Path) -> None:
    """torchrun's own report goes on below it; it may end a process before that has said anything."""
    Case("mistral/window").export(tmp_path / "case")
    done = torchrun(2, "--checkpoint", str(tmp_path / "case"), *options)
    assert done.returncode != 0
    assert re.search(f"error: rank [01]: {re.escape(message)}", done.stderr)
    assert "reference_impl/partition/pipeline.py" not in done.stderr  # no traceback of ours
    assert done.stdout == ""
