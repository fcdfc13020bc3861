"""Models over several processes: pipelines, tensor parallel.

Each is made in a partition of `reference_impl` whose ranks are threads (`implementations.partition.simulated`).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from conformance.mistakes import Mistake, Replace, Swap
from conformance.mistakes.groups import GPTS
from conformance.mistakes.making import after, instead
from reference_impl.nn.conv1d import Conv1D
from reference_impl.partition import pipeline, stand_ins
from reference_impl.partition.tensor_parallel import Layout

COLUMNS = "reference_impl.partition.tensor_parallel:"
STAGES = "reference_impl.partition.pipeline:"
FORWARD = ("golden.logits", "golden.gradients", "golden.loss", "cache.chunks")
GRADIENTS = ("golden.gradients",)
BITS = ("partition.bit_equal",)
ALL = ("llama", "gpt", "gpt2", "gpt3", "mistral", "mixtral", "phi")
BIASED = ("phi", "gpt", "gpt2", "gpt3", "llama")
# With a case whose gradients are known and whose heads three ranks can share.
TRAINED = ("phi", "gpt", "llama")
DEEP = ("llama", "gpt", "gpt2", "gpt3")
NORMED = ("llama", "gpt2", "gpt3", "mistral", "mixtral", "phi")


def columns(identifier: str, families: tuple[str, ...], *swaps: Swap, **text: Any) -> Mistake:
    more = {"seen": "common knowledge", "killed_by": FORWARD} | text
    return Mistake(id=identifier, families=families, swaps=swaps, partition="tensor parallel", **more)


def stages(identifier: str, families: tuple[str, ...], *swaps: Swap, **text: Any) -> Mistake:
    more = {"seen": "common knowledge", "killed_by": BITS} | text
    return Mistake(id=identifier, families=families, swaps=swaps, partition="pipeline", **more)


# --- tensor parallel: sums --------------------------------------------------------------------------------------------


def on_ranks(change: Callable[[nn.Module], None]) -> Swap:
    """`change` works on every rank's part of the model."""

    def changed(model: nn.Module) -> nn.Module:
        change(model)
        return model

    return Swap(COLUMNS + "load_tensor_parallel", after(changed))


def row_parallel(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The projections of which every rank has a summand, by path."""
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        inputs = 1 if isinstance(module, nn.Linear) else 0
        cut = weight.placements if isinstance(weight, DTensor) else ()
        if isinstance(module, nn.Linear | Conv1D) and Shard(inputs) in cut:
            yield path, module


def sums(change: Callable[[Tensor, Any], Tensor]) -> Swap:
    """change(output, bias or 0) of every row-parallel projection."""

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        bias = module.bias
        return change(output, 0 if bias is None else bias.to_local() if isinstance(bias, DTensor) else bias)

    def hooked(model: nn.Module) -> None:
        for _, module in row_parallel(model):
            module.register_forward_hook(hook)

    return on_ranks(hooked)


class OwnSummand(nn.Module):
    """A row-parallel projection that keeps what the rank itself has computed."""

    def __init__(self, of: Any):
        super().__init__()
        self.weight, self.bias, self.turned = of.weight, of.bias, isinstance(of, Conv1D)

    def forward(self, x: Any) -> Tensor:
        weight, bias = (p.to_local() if isinstance(p, DTensor) else p for p in (self.weight, self.bias))
        x = x.to_local() if isinstance(x, DTensor) else x
        return F.linear(x, weight.T if self.turned else weight, bias)


def not_summed(model: nn.Module) -> None:
    for path, module in list(row_parallel(model)):
        model.set_submodule(path, OwnSummand(module))


def shared_out_bias(original: Callable[[nn.Module], dict[str, Tensor]]) -> Callable[[nn.Module], dict[str, Tensor]]:
    """Gradients of biases of which every rank adds its share."""

    def full_gradients(model: nn.Module) -> dict[str, Tensor]:
        found, biases = original(model), {f"{path}.bias" for path, _ in row_parallel(model)}
        return {name: g / dist.get_world_size() if name in biases else g for name, g in found.items()}

    return full_gradients


class Total(torch.autograd.Function):
    """All-reduce; every rank's gradient is the whole one already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class WrongTable(nn.Module):
    """An embedding table cut by token ids, looked up by hand.

    masked: ids of other ranks give zeros.  late: by how much the first id of a rank is off.
    """

    def __init__(self, of: nn.Embedding, masked: bool, late: int):
        super().__init__()
        self.weight, self.masked, self.late = of.weight, masked, late

    def forward(self, ids: Tensor) -> Tensor:
        own: Tensor = self.weight.to_local()  # type: ignore[attr-defined]
        rows = -(-self.weight.shape[0] // dist.get_world_size())  # DTensor's cut: all but the last are of this size
        place = ids - rows * dist.get_rank() - self.late
        elsewhere = (place < 0) | (place >= len(own))
        found = F.embedding(place.clamp(0, len(own) - 1), own)
        return Total.apply(found.masked_fill(elsewhere[..., None], 0.0) if self.masked else found)  # type: ignore[no-any-return, no-untyped-call]


def table(masked: bool, late: int) -> Swap:
    def replaced(model: nn.Module) -> None:
        path, found = next((p, m) for p, m in model.named_modules() if isinstance(m, nn.Embedding))
        model.set_submodule(path, WrongTable(found, masked, late))

    return on_ranks(replaced)


_SUMS = (
    columns(
        "tp-row-bias-per-rank", BIASED,
        sums(lambda output, bias: output + (dist.get_world_size() - 1) * bias),
        what="Every rank adds the whole bias to its summand.", why="The sum over N ranks then holds N biases.",
        shows="Nothing at one rank, or with biases of zero; (N − 1) · b else.",
        fix="Add it once, after the all-reduce.",
        seen="MinivLLM#80, text-generation-inference#1036, PaddlePaddle#35186",
    ),
    columns(
        "tp-row-bias-gradient", TRAINED, Swap(COLUMNS + "full_gradients", shared_out_bias),
        what="Every rank adds b / N: the sum is right, the gradient of b is divided by N too.",
        why="The bias of each rank gets the gradient of its share.", shows="Only in training.",
        fix="Add it once, after the all-reduce.", seen="torchtitan#4332", killed_by=GRADIENTS,
    ),
    columns(
        "tp-double-all-reduce", ALL,
        sums(lambda output, bias: (output - bias) * dist.get_world_size() + bias),
        what="Partial sums are added up twice, inside the layer and outside.", why="What comes is N times the sum.",
        shows="Nothing at one rank; a ratio of N else.", fix="One all-reduce a projection.",
        seen="vllm#49366, vllm#49122, tpu-inference#3537, #3151",
    ),
    columns(
        "tp-missing-all-reduce", ALL, on_ranks(not_summed),
        what="Partial sums are used as they are.", why="Each rank has one summand.", shows="Nothing at one rank.",
        fix="An all-reduce behind every row-parallel projection.", seen="tpu-inference#3435, sglang#32963",
    ),
    columns(
        "tp-vocab-embedding", ALL, table(masked=False, late=0),
        what="Ids of other ranks are looked up at the border of the own table instead of giving zeros.",
        why="The sum over the ranks is to hold one row.", shows="Everywhere; nothing at one rank.",
        fix="Mask them to zero before the sum.", seen="Megatron-LM#926, ColossalAI#242",
    ),
    columns(
        "tp-vocab-embedding-offset", ALL, table(masked=True, late=1),
        what="The first id of every rank's table is off by one.", why="Rank r has the ids from r · ⌈V / N⌉ on.",
        shows="Every token has its neighbour's embedding, the first of a rank's none.", fix="r · ⌈V / N⌉.",
        seen="Megatron-LM#926",
    ),
)  # fmt: skip


# --- tensor parallel: layouts, norms ----------------------------------------------------------------------------------


def laid_out(change: Callable[[str, Layout, int], Layout | None]) -> Swap:
    """change(name of a parameter, its layout, number of ranks); None: it gets none."""

    def make(original: Callable[..., dict[str, Layout]]) -> Callable[..., dict[str, Layout]]:
        def layouts(model: nn.Module, ranks: int) -> dict[str, Layout]:
            found = {name: change(name, layout, ranks) for name, layout in original(model, ranks).items()}
            return {name: layout for name, layout in found.items() if layout is not None}

        return layouts

    return Swap(COLUMNS + "layouts", make)


def tiled(copies: int) -> Layout:
    """Heads 0 1 0 1 0 1 for 0 0 0 1 1 1."""

    def there(x: Tensor) -> Tensor:
        return x.repeat(copies, *[1] * (x.ndim - 1))

    def back(x: Tensor) -> Tensor:
        each: Tensor = x.unflatten(0, (copies, -1))
        return each.sum(dim=0)

    return Layout(there, back)


def of_slices(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A norm of every rank's slice by its own statistics, the slices side by side."""

    def norm(x: Tensor, *parameters: Any) -> Tensor:
        *weights, eps = parameters
        if not dist.is_initialized():
            return original(x, *parameters)
        slices = [tensor.chunk(dist.get_world_size(), dim=-1) for tensor in (x, *weights)]
        return torch.cat([original(*own, eps) for own in zip(*slices, strict=True)], dim=-1)

    return norm


_LAYOUTS = (
    columns(
        "tp-fused-shard-layout", GPTS,
        laid_out(lambda name, layout, ranks: None if "c_attn" in name else layout),
        what="[Q | K | V] is cut as it is: the first rank gets queries and nothing else.",
        why="Every rank needs the queries, keys and values of its heads.",
        shows="Nothing at one rank; what is read and written alike looks right.", fix="[Q₀ K₀ V₀ | Q₁ K₁ V₁ | …].",
        seen="nnsight#719, Automodel#1053, tt-metal#52818, pytorch#149701",
        touches=("layers.N.attention.query", "layers.N.attention.key", "layers.N.attention.value"),
    ),
    columns(
        "tp-fused-gathered-by-rank", ("gpt",),
        laid_out(lambda name, layout, ranks: Layout(layout.there, lambda x: x) if "c_attn" in name else layout),
        what="What is gathered of [Q | K | V] stays in the order of ranks.", why="The checkpoint has [Q | K | V].",
        shows="Only in gradients and in what is saved.", fix="Undo the layout after gathering.", seen="nnsight#719",
        killed_by=GRADIENTS,
    ),
    columns(
        "tp-kv-heads-tiled", ("mistral", "mixtral", "phi"),
        laid_out(lambda name, layout, ranks: tiled(ranks)),
        what="With fewer key-value heads than ranks they are given out in turn: 0 1 0 1 0 1.",
        why="Rank r needs those of its own query heads: 0 0 0 1 1 1.", shows="Only with more ranks than KV heads.",
        fix="Repeat every head, not all of them.", seen="transformers#48307, sglang#19086, TensorRT-LLM#4308, #6447",
        touches=("layers.N.attention.scores",),
    ),
    columns(
        "tp-norm-on-shard", ALL,
        *(Swap(f"reference_impl.nn.norm:{name}", of_slices) for name in ("rms_norm", "layer_norm")),
        what="A norm takes its statistics over the rank's slice of the hidden states.", why="Over all of them.",
        shows="Nothing at one rank.", fix="Norms of whole rows, or an all-reduce of their statistics.",
    ),
)  # fmt: skip


# --- pipelines --------------------------------------------------------------------------------------------------------


def sent(change: Callable[[Tensor], Tensor]) -> Swap:
    """What goes to the next stage, changed."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda self, x, *unused: original(self, change(x), *unused)

    return Swap("reference_impl.partition.stand_ins:Send.forward", make)


def norm_before_sending(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Every stage has the final norm, and ends with it."""

    def load_stage(path: Any, **arguments: Any) -> nn.Module:
        from reference_impl.checkpoint import load_config, load_model

        model = original(path, **arguments)
        whole = load_model(path, dtype=arguments["dtype"])
        norm = whole.get_submodule(pipeline.anatomy(load_config(path)).head[0])
        for module in model.modules():
            if isinstance(module, stand_ins.Send):
                module.register_forward_pre_hook(lambda module, inputs: (norm(inputs[0]), *inputs[1:]))
        return model

    return load_stage


def borders(first: Callable[[int, int, int], int], end: Callable[[int, int, int], int]) -> Replace:
    """first, end: (number of the stage, blocks, stages) -> its blocks are first … end − 1."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def stage_of(split: Any, number: int, num_layers: int) -> Any:
            count = len(split)
            own = first(number, num_layers, count), end(number, num_layers, count)
            return replace(original(split, number, num_layers), first=own[0], end=own[1])

        return stage_of

    return make


def summed_twice(original: Callable[..., None]) -> Callable[..., None]:
    def sum_tied_gradients(*arguments: Any) -> None:
        original(*arguments)
        original(*arguments)

    return sum_tied_gradients


_STAGES = (
    stages(
        "pp-boundary-norm", NORMED, Swap(STAGES + "load_stage", norm_before_sending),
        what="Every stage applies the final norm to what it sends.", why="It belongs to the last block.",
        shows="Only with two stages and more.", fix="On the last stage alone.",
    ),
    stages(
        "pp-boundary-dtype", ALL, sent(lambda x: x.to(torch.bfloat16).to(x.dtype)),
        what="Hidden states are sent in bfloat16.",
        why="Stages compute in the model's dtype, and so must what is sent.",
        shows="Only with two stages and more; as large as bfloat16's rounding.", fix="Send what was computed.",
    ),
    stages(
        "pp-block-lost", DEEP,
        Swap(STAGES + "stage_of", borders(lambda n, blocks, count: n * (blocks // count),
                                          lambda n, blocks, count: (n + 1) * (blocks // count))),
        what="Every stage gets ⌊L / S⌋ blocks, and what remains is lost.", why="All blocks run.",
        shows="Only where S does not divide L.", fix="Give the first stages one more.",
    ),
    stages(
        "pp-block-doubled", DEEP,
        Swap(STAGES + "stage_of", borders(lambda n, blocks, count: blocks * n // count,
                                          lambda n, blocks, count: -(-blocks * (n + 1) // count))),
        what="Stages begin at ⌊n · L / S⌋ and end at ⌈(n + 1) · L / S⌉: a block where two meet runs twice.",
        why="Every block runs once.", shows="Only where S does not divide L.", fix="Round both borders alike.",
    ),
    stages(
        "pp-tied-embedding", GPTS, Swap(STAGES + "sum_tied_gradients", instead(lambda *_: None)),
        what="The gradients of the two copies of a tied table are not added up.",
        why="The copies drift apart with the first step.", shows="The forward is right; training is not.",
        fix="Add them up, between the first stage and the last.", seen="Megatron-LM#844, #1012, #656",
        killed_by=GRADIENTS,
    ),
    stages(
        "pp-tied-embedding-twice", GPTS, Swap(STAGES + "sum_tied_gradients", summed_twice),
        what="The gradients of the two copies of a tied table are added up twice, by the pipeline and by hand.",
        why="Once.", shows="The forward is right; training is not.", fix="Leave it to one of them.",
        seen="Megatron-LM#656", killed_by=GRADIENTS,
    ),
)  # fmt: skip

MISTAKES = (*_SUMS, *_LAYOUTS, *_STAGES)
