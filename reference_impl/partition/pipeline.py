"""Pipeline: stage s of S holds a run of blocks, the first one the embeddings too, the last one the output projection.

    stage 0                       stage 1                         stage 2
    embeddings, blocks 0 1   →    blocks 2 3                 →    block 4, final norm, output projection

A stage is the family's own model in which the modules of other stages are replaced: what comes before its blocks by
one module that receives, what comes after them by one that sends. Masks and positions follow from the token ids, which
every process has; a session's cache holds the keys and values of the stage's own blocks. So the arithmetic is that of
one process, operation for operation, and the logits are equal bit for bit (on one kind of machine, with one number of
threads).

torch.distributed.pipelining splits batches into micro-batches for training; its stages receive into buffers of the
first call's shape, and decoding one token after a prompt has another. Hence plain `send` and `recv`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from reference_impl.checkpoint import build, load_config, load_weights
from reference_impl.partition.stand_ins import Elsewhere, EmbeddingElsewhere, NoLogits, Receive, Send


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a family's model are: paths of the embeddings, the list of blocks, what follows them."""

    embeddings: tuple[str, ...]
    blocks: str
    head: tuple[str, ...]


_LLAMA_LIKE = Anatomy(("model.embed_tokens",), "model.layers", ("model.norm", "lm_head"))
_GPT_2 = Anatomy(("transformer.wte", "transformer.wpe"), "transformer.h", ("transformer.ln_f", "lm_head"))

# model_type in config.json → parts.
ANATOMY = {
    "gpt2": _GPT_2,
    "gpt3": _GPT_2,
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "mixtral": _LLAMA_LIKE,
    "openai-gpt": Anatomy(("transformer.tokens_embed", "transformer.positions_embed"), "transformer.h", ("lm_head",)),
    "phi": Anatomy(("model.embed_tokens",), "model.layers", ("model.final_layernorm", "lm_head")),
}


@dataclass(frozen=True)
class Stage:
    """One stage's place: its number, how many there are, and its blocks, `first` … `end` − 1.

    tied: name of the embedding table where it is the output projection too, and another stage has it as well.
    """

    number: int
    count: int
    first: int
    end: int
    tied: str | None = None

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1


def even_split(num_layers: int, stages: int) -> tuple[int, ...]:
    """Blocks of each stage, as even as can be, the longer ones first: 5 over 3 stages are 2 2 1.

    Raises:
        ValueError: there are more stages than blocks.
    """
    if not 1 <= stages <= num_layers:
        raise ValueError(f"{stages} stages cannot share {num_layers} blocks: each needs one at least")
    return tuple(num_layers // stages + (stage < num_layers % stages) for stage in range(stages))


def stage_of(split: Sequence[int], number: int, num_layers: int) -> Stage:
    """The place of stage `number` where stage s has `split[s]` blocks.

    Raises:
        ValueError: the numbers do not add up to `num_layers`, a stage has no block, or there is no such stage.
    """
    if sum(split) != num_layers or min(split, default=0) < 1:
        raise ValueError(f"split={list(split)} must give every stage a block and add up to {num_layers} blocks")
    if not 0 <= number < len(split):
        raise ValueError(f"stage={number} must be one of 0 … {len(split) - 1}, the stages of split={list(split)}")
    first = sum(split[:number])
    return Stage(number, len(split), first, first + split[number])


def load_stage(
    path: str | Path,
    *,
    split: Sequence[int],
    stage: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    attention: str = "eager",
    group: dist.ProcessGroup | None = None,
) -> nn.Module:
    """One stage of the model in a checkpoint directory; it reads its own tensors and no others.

    It is called like the whole model, `session` included, in every process of the group alike. The last stage returns
    the logits, the others "logits" of an empty vocabulary, (B, T, 0). For gradients every process calls `backward` on
    what it got, and then `sum_tied_gradients`.

    Args:
        split: how many blocks each stage has (`even_split`).
        stage: the number of this one; process s of `group` is stage s.
        dtype: of parameters and hidden states, the same in all stages.
        attention: "eager" (written out) or "sdpa" (torch's fused kernel).
        group: None: the default group.

    Raises:
        CheckpointError: the directory cannot be read.
        ValueError: config.json is not valid, its family is no decoder, or `split` does not fit it.
    """
    config = load_config(path)
    parts = anatomy(config)
    model = build(Path(path), config, attention)
    place = stage_of(split, stage, len(_blocks(model, parts)))
    elsewhere = tuple(f"{name}." for name in _elsewhere(parts, place, len(_blocks(model, parts))))
    load_weights(model, path, dtype=dtype, device=device, wanted=lambda name: not name.startswith(elsewhere))
    _replace(model, parts, place, dtype, group)
    setattr(model, "stage", replace(place, tied=_tied(model, parts, place)))  # noqa: B010  # no tensor, no module
    return model.eval()


def number_of_blocks(path: str | Path) -> int:
    """What a checkpoint's config.json says."""
    config = load_config(path)
    return len(_blocks(build(Path(path), config, "eager"), anatomy(config)))


def anatomy(config: Mapping[str, Any]) -> Anatomy:
    """Raises ValueError if the family is not one that can be partitioned."""
    if (model_type := config.get("model_type")) not in ANATOMY:
        raise ValueError(f"model_type={model_type!r} cannot be partitioned; {sorted(ANATOMY)} can")
    return ANATOMY[model_type]


def _blocks(model: nn.Module, parts: Anatomy) -> nn.ModuleList:
    blocks = model.get_submodule(parts.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _tied(model: nn.Module, parts: Anatomy, place: Stage) -> str | None:
    config: Any = model.config
    if place.count == 1 or not config.tie_word_embeddings:
        return None
    return f"{parts.embeddings[0]}.weight" if place.is_first else "lm_head.weight" if place.is_last else None


def _elsewhere(parts: Anatomy, place: Stage, num_layers: int) -> list[str]:
    """Paths of the modules that are on other stages."""
    blocks = [f"{parts.blocks}.{n}" for n in range(num_layers) if not place.first <= n < place.end]
    return [
        *([] if place.is_first else parts.embeddings),
        *blocks,
        *([] if place.is_last else parts.head),
    ]


def _replace(
    model: nn.Module, parts: Anatomy, place: Stage, dtype: torch.dtype, group: dist.ProcessGroup | None
) -> None:
    """Puts stand-ins in the place of what is on other stages. With blocks 2 3 of 0 … 4:

    0 Elsewhere   1 Receive   2 own   3 own   4 Send
    """
    blocks = _blocks(model, parts)
    for number in range(len(blocks)):
        if not place.first <= number < place.end:
            blocks[number] = Elsewhere()
    if not place.is_first:
        for path in parts.embeddings:
            table = model.get_submodule(path)
            assert isinstance(table, nn.Embedding)
            model.set_submodule(path, EmbeddingElsewhere(table.num_embeddings, table.embedding_dim, dtype))
        blocks[place.first - 1] = Receive(place.number - 1, group)
    if not place.is_last:
        blocks[place.end] = Send(place.number + 1, group)
        for path in parts.head:
            model.set_submodule(path, NoLogits() if path == "lm_head" else Elsewhere())


def sum_tied_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """After `backward`: first and last stage each hold the tied table and a part of its gradient; both get the sum.

    Without it the two copies drift apart as soon as they are trained. Every stage may call it; where nothing is tied it
    does nothing. The sum is made once, so that both copies get the same bits.
    """
    place: Any = model.stage
    if place.tied is None:
        return
    gradient = model.get_parameter(place.tied).grad
    assert gradient is not None
    if place.is_last:
        dist.send(gradient, group=group, group_dst=0)
        dist.recv(gradient, group=group, group_src=0)
    else:
        other = torch.empty_like(gradient)
        dist.recv(other, group=group, group_src=place.count - 1)
        gradient += other
        dist.send(gradient, group=group, group_dst=place.count - 1)
