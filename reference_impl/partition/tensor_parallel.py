"""Tensor parallel: each of N processes ("ranks") holds a part of every projection, and its own attention heads.

    q, k, v, gate, up     cut by output features ("columns" of x W): each rank has whole heads, or some hidden units
    o, down               cut by input features ("rows"): each rank has a summand of the output; one all-reduce
    embedding table       cut by token ids: a rank looks up its own ids, the others give zeros; one all-reduce
    output projection     cut by token ids: each rank has some logits; one all-gather
    norms, routers        whole on every rank

Shoeybi et al. 2019, Megatron-LM (arXiv:1909.08053), section 3. All of it is a plan for
torch.distributed.tensor.parallel, whose DTensors know how a tensor is cut and do the sums, biases (added once, not once
a rank) and gradients among them. Two things no plan says, and the weights are laid out for them when they are loaded:

- A rank needs whole key/value heads. With N ranks that do not divide KV heads, each is repeated, so that there are
  lcm(KV, N): with H = 6, KV = 2, N = 3 the heads 0 1 become 0 0 0 1 1 1, two a rank, one for each of its query heads.
- GPT's `c_attn` has queries, keys and values side by side, [Q | K | V]. Cut as it is, rank 0 of 3 would hold all
  queries. It is laid out as [Q₀ K₀ V₀ | Q₁ K₁ V₁ | …], part r being that of rank r's heads.

Sums run in another order than in one process: results agree within rounding, not bit for bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import lcm
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from reference_impl.checkpoint import build, load_config, load_weights
from reference_impl.nn.conv1d import Conv1D
from reference_impl.partition.pipeline import anatomy


class Conv1DParallel(ParallelStyle):
    """ColwiseParallel ("columns") or RowwiseParallel ("rows") for the projection whose weight is stored (in, out)."""

    def __init__(self, cut: str, *, use_local_output: bool = True) -> None:
        self.weight, self.bias, self.input, self.output = {
            "columns": (Shard(1), Shard(0), Replicate(), Shard(-1)),
            "rows": (Shard(0), Replicate(), Shard(-1), Replicate()),
        }[cut]
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._partition, self._input, self._output)  # type: ignore[arg-type]

    def _partition(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        assert isinstance(module, Conv1D)
        for parameter, placement in (("weight", self.weight), ("bias", self.bias)):
            cut = distribute_tensor(getattr(module, parameter), mesh, [placement])
            module.register_parameter(parameter, nn.Parameter(cut))

    def _input(self, module: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> Tensor:
        (x,) = inputs
        return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [self.input], run_check=False)

    def _output(self, module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
        output = output.redistribute(placements=[self.output])
        return output.to_local() if self.use_local_output else output


def columns() -> ParallelStyle:
    """The output stays a DTensor, which knows its cut: ranks may have parts of unequal size."""
    return ColwiseParallel(use_local_output=False)


def rows() -> ParallelStyle:
    return RowwiseParallel()


def heads() -> ParallelStyle:
    """Columns of whole heads: the output is a plain tensor, since what follows counts a rank's own heads."""
    return ColwiseParallel()


Style = Callable[[], ParallelStyle]

# Module of a block → its style.
_ATTENTION: dict[str, Style] = {f"self_attn.{name}_proj": heads for name in "qkv"}
_LLAMA_ATTENTION: dict[str, Style] = {**_ATTENTION, "self_attn.o_proj": rows}
_EXPERT = "block_sparse_moe.experts.*"
_BLOCKS: Mapping[str, Mapping[str, Style]] = {
    "llama": _LLAMA_ATTENTION | {"mlp.gate_proj": columns, "mlp.up_proj": columns, "mlp.down_proj": rows},
    "mixtral": _LLAMA_ATTENTION | {f"{_EXPERT}.w1": columns, f"{_EXPERT}.w3": columns, f"{_EXPERT}.w2": rows},
    "phi": {**_ATTENTION, "self_attn.dense": rows, "mlp.fc1": columns, "mlp.fc2": rows},
    "gpt2": {
        "attn.c_attn": partial(Conv1DParallel, "columns"),
        "attn.c_proj": partial(Conv1DParallel, "rows"),
        "mlp.c_fc": partial(Conv1DParallel, "columns", use_local_output=False),
        "mlp.c_proj": partial(Conv1DParallel, "rows"),
    },
}
_SAME_BLOCKS = {"gpt3": "gpt2", "mistral": "llama", "openai-gpt": "gpt2"}


def plan(config: Mapping[str, Any]) -> dict[str, ParallelStyle]:
    """Path of a module → how it is cut, for `parallelize_module`.

    Raises:
        ValueError: the family is not one that can be partitioned.
    """
    parts = anatomy(config)
    model_type = config["model_type"]
    styles = dict(_BLOCKS[_SAME_BLOCKS.get(model_type, model_type)])
    if config.get("qk_layernorm"):
        # Norms of single heads: heads are cut (axis 1), weights are not; SequenceParallel sums their gradients.
        style = partial(SequenceParallel, sequence_dim=1, use_local_output=True)
        styles |= {"self_attn.q_layernorm": style, "self_attn.k_layernorm": style}
    return {
        parts.embeddings[0]: RowwiseParallel(input_layouts=Replicate()),
        "lm_head": columns(),
        **{f"{parts.blocks}.*.{module}": style() for module, style in styles.items()},
    }


@dataclass(frozen=True)
class Layout:
    """How a parameter is laid out before it is cut, and how its gradient is put back."""

    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


def repeated_heads(num_heads: int, copies: int) -> Layout:
    """Each of `num_heads` key or value heads, rows of the weight, `copies` times; gradients of copies are added."""

    def there(x: Tensor) -> Tensor:  # (KV · Dh, …) → (KV · copies · Dh, …)
        each: Tensor = x.unflatten(0, (num_heads, -1))
        return each.repeat_interleave(copies, dim=0).flatten(0, 1)

    def back(x: Tensor) -> Tensor:
        each: Tensor = x.unflatten(0, (num_heads, copies, -1))
        return each.sum(dim=1).flatten(0, 1)

    return Layout(there, back)


def fused_by_rank(ranks: int) -> Layout:
    """[Q | K | V], the columns of the weight, as [Q₀ K₀ V₀ | Q₁ K₁ V₁ | …]."""

    def there(x: Tensor) -> Tensor:
        parts: Tensor = x.unflatten(-1, (3, ranks, -1))
        return parts.transpose(-3, -2).flatten(-3)

    def back(x: Tensor) -> Tensor:
        parts: Tensor = x.unflatten(-1, (ranks, 3, -1))
        return parts.transpose(-3, -2).flatten(-3)

    return Layout(there, back)


def layouts(model: nn.Module, ranks: int) -> dict[str, Layout]:
    """Name of a parameter → its layout, of those that have one.

    Raises:
        ValueError: query heads cannot be shared out evenly.
    """
    config: Any = model.config
    num_heads = config.n_head if hasattr(config, "n_head") else config.num_attention_heads
    if num_heads % ranks:
        raise ValueError(f"{num_heads} attention heads must be divisible by ranks={ranks}; give a divisor of it")
    kv_heads = getattr(config, "num_key_value_heads", num_heads)
    copies = lcm(kv_heads, ranks) // kv_heads
    endings = {".attn.c_attn": fused_by_rank(ranks)}
    if copies > 1:
        endings |= dict.fromkeys((".self_attn.k_proj", ".self_attn.v_proj"), repeated_heads(kv_heads, copies))
    names = [name for name, _ in model.named_parameters()]
    return {name: layout for name in names for end, layout in endings.items() if name.rpartition(".")[0].endswith(end)}


def load_tensor_parallel(
    path: str | Path,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    attention: str = "eager",
) -> nn.Module:
    """The calling rank's part of the model in a checkpoint directory.

    It is called like the whole model, `session` included, in every process of the mesh alike, and returns the logits in
    each; a session's cache holds the rank's own heads. Gradients are right after `backward` in every process
    (`full_gradients`). One tensor at a time is read whole.

    Args:
        mesh: of one axis, the ranks.
        dtype: of the parameters; None: as they are stored.
        attention: "eager" (written out) or "sdpa" (torch's fused kernel).

    Raises:
        CheckpointError: the directory cannot be read.
        ValueError: config.json is not valid, its family is no decoder, or its heads cannot be shared out.
    """
    config = load_config(path)
    model = build(Path(path), config, attention)
    laid_out = layouts(model, mesh.size())
    parallelize_module(model, mesh, plan(config))
    # Not the style's own Replicate(): that gather is waited for when its result is used, and a rank that never looks at
    # its logits would leave the group with a collective under way.
    model.get_submodule("lm_head").register_forward_hook(lambda module, inputs, logits: logits.full_tensor())
    if model.config.tie_word_embeddings:  # type: ignore[union-attr]
        # cut alike, by token ids: one parameter again
        table = model.get_parameter(f"{anatomy(config).embeddings[0]}.weight")
        model.get_submodule("lm_head").register_parameter("weight", table)

    def place(name: str, tensor: Tensor) -> Tensor:
        parameter = model.get_parameter(name)
        if name in laid_out:
            tensor = laid_out[name].there(tensor)
        if not isinstance(parameter, DTensor):
            return tensor
        return distribute_tensor(tensor.contiguous(), mesh, parameter.placements)

    load_weights(model, path, dtype=dtype, device=mesh.device_type, place=place)
    setattr(model, "layouts", laid_out)  # noqa: B010  # no tensor, no module
    return model.eval()


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter, whole and laid out as in the checkpoint. Every rank must call it."""
    laid_out: Any = model.layouts
    gradients = {}
    for name, parameter in model.named_parameters():
        if (gradient := parameter.grad) is None:
            continue
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        gradients[name] = laid_out[name].back(whole) if name in laid_out else whole
    return gradients
