"""The residual stream: where norms stand, what is added to what, which blocks there are."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.groups import DECODERS, LLAMAS, TURNING
from conformance.mistakes.making import each, on_model

# Pre-norm blocks, which add two halves one after the other.
PRE = (
    "reference_impl.models.gpt2:GPT2Block.forward",
    "reference_impl.models.gpt3:GPT3Block.forward",
    "reference_impl.models.llama:LlamaDecoderLayer.forward",
    "reference_impl.models.mistral:MistralDecoderLayer.forward",
    "reference_impl.models.mixtral:MixtralDecoderLayer.forward",
)
POST = "reference_impl.models.gpt:GPTBlock.forward"
PARALLEL = "reference_impl.models.phi:PhiDecoderLayer.forward"
ENCODER = "reference_impl.models.transformer:EncoderLayer.forward"
PRE_FAMILIES = ("gpt2", "gpt3", *LLAMAS)

L = "layers.N."
STREAM = (L + "attention.residual", L + "output")
NORMED = (L + "attention.norm", L + "feed_forward.norm", L + "attention.output_norm", L + "norm")
INNER = (
    L + "attention.query", L + "attention.key", L + "attention.value", L + "feed_forward.up", L + "feed_forward.gate",
    L + "feed_forward.router_logits",
)  # fmt: skip

Part = Callable[[Tensor], Tensor]
# (x, attention, its norm, feed-forward layer, its norm) -> the block's output
Rule = Callable[[Tensor, Part, Part, Part, Part], Tensor]


def rewired(rule: Rule) -> Callable[..., Any]:
    """A block whose parts are put together by another rule."""

    def forward(self: Any, x: Tensor, *rest: Any) -> Tensor:
        if hasattr(self, "ln_1"):
            attention, one, feed, two = self.attn, self.ln_1, self.mlp, self.ln_2
        else:
            attention, one, two = self.self_attn, self.input_layernorm, getattr(self, "post_attention_layernorm", None)
            feed = self.block_sparse_moe if hasattr(self, "block_sparse_moe") else self.mlp
        return rule(x, lambda n: attention(n, *rest), one, feed, two)

    return lambda original: forward


def post_norm(x: Tensor, attention: Part, one: Part, feed: Part, two: Part) -> Tensor:
    n = one(x + attention(x))
    return two(n + feed(n))


def pre_norm(x: Tensor, attention: Part, one: Part, feed: Part, two: Part) -> Tensor:
    h = x + attention(one(x))
    return h + feed(two(h))


def from_normed(x: Tensor, attention: Part, one: Part, feed: Part, two: Part) -> Tensor:
    n = one(x)
    h = n + attention(n)
    m = two(h)
    return m + feed(m)


def without_first_skip(x: Tensor, attention: Part, one: Part, feed: Part, two: Part) -> Tensor:
    h = attention(one(x))
    return h + feed(two(h))


def without_second_skip(x: Tensor, attention: Part, one: Part, feed: Part, two: Part) -> Tensor:
    return feed(two(x + attention(one(x))))


def skip_from_the_start(x: Tensor, attention: Part, one: Part, feed: Part, two: Part) -> Tensor:
    h = x + attention(one(x))
    return x + feed(two(h))


def in_parallel(x: Tensor, attention: Part, one: Part, feed: Part, two: Part) -> Tensor:
    return x + attention(one(x)) + feed(two(x))


def feed_forward_first(x: Tensor, attention: Part, one: Part, feed: Part, two: Part) -> Tensor:
    h = x + feed(two(x))
    return h + attention(one(h))


def not_normed_feed(x: Tensor, attention: Part, one: Part, feed: Part, two: Part) -> Tensor:
    h = x + attention(one(x))
    return h + feed(h)


def halved(x: Tensor, attention: Part, one: Part, feed: Part, two: Part) -> Tensor:
    half = math.sqrt(0.5)
    h = (x + attention(one(x))) * half
    return (h + feed(two(h))) * half


def sandwiched(x: Tensor, attention: Part, one: Part, feed: Part, two: Part) -> Tensor:
    h = x + one(attention(x))
    return h + two(feed(h))


def serial(x: Tensor, attention: Part, one: Part, feed: Part, two: Part) -> Tensor:
    h = x + attention(one(x))
    return h + feed(one(h))


def fed_by_attention(x: Tensor, attention: Part, one: Part, feed: Part, two: Part) -> Tensor:
    attended = attention(one(x))
    return x + attended + feed(attended)


def skip_twice(x: Tensor, attention: Part, one: Part, feed: Part, two: Part) -> Tensor:
    n = one(x)
    return (x + attention(n)) + (x + feed(n))


def plainly_normed(x: Tensor, attention: Part, one: Any, feed: Part, two: Part) -> Tensor:
    plain = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=one.eps)
    return x + attention(one(x)) + feed(plain)


def skip_from_norm(x: Tensor, attention: Part, one: Part, feed: Part, two: Part) -> Tensor:
    n = one(x)
    return n + attention(n) + feed(n)


def encoder_pre_norm(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, mask: Tensor) -> Tensor:
        n = self.self_attn_layer_norm(x)
        h = x + self.self_attn(n, *self.self_attn.keys_values(n), mask)
        return h + self.fc2(self.activation_fn(self.fc1(self.final_layer_norm(h))))  # type: ignore[no-any-return]

    return forward


# --- stacks -----------------------------------------------------------------------------------------------------------

STACKS = ("h", "layers")
FINAL_NORMS = ("ln_f", "norm", "final_layernorm")


def inner(model: Any) -> Any:
    """The module that holds the blocks."""
    return model.transformer if hasattr(model, "transformer") else model.model


def blocks_changed(change: Callable[[list[nn.Module]], list[nn.Module]]) -> Callable[[Any], None]:
    def changed(model: Any) -> None:
        for name in STACKS:
            if hasattr(inner(model), name):
                setattr(inner(model), name, nn.ModuleList(change(list(getattr(inner(model), name)))))

    return changed


def by_string(blocks: list[nn.Module]) -> list[nn.Module]:
    return [blocks[int(number)] for number in sorted(map(str, range(len(blocks))))]


def final_norm_dropped(model: Any) -> None:
    for name in FINAL_NORMS:
        if hasattr(inner(model), name):
            setattr(inner(model), name, nn.Identity())


class Normed(nn.Module):
    """A block with a plain norm behind it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return torch.nn.functional.layer_norm(self.block(x, *rest), x.shape[-1:])


def last_normed(blocks: list[nn.Module]) -> list[nn.Module]:
    return [*blocks[:-1], Normed(blocks[-1])]


def entry(
    identifier: str, families: tuple[str, ...], swaps: tuple[Swap, ...], touches: tuple[str, ...], **text: str
) -> Mistake:
    """These mistakes are all seen by a plain forward pass."""
    seen = text.pop("seen", "common knowledge")
    return Mistake(
        id=identifier, families=families, swaps=swaps, touches=touches, killed_by=("golden.logits",), seen=seen,
        what=text["what"], why=text["why"], shows=text["shows"], fix=text["fix"],
    )  # fmt: skip


MISTAKES = (
    entry(
        "norm-order-post-for-pre", PRE_FAMILIES, each(PRE, rewired(post_norm)), (*STREAM, *NORMED, *INNER),
        what="LN(x + f(x)), the order of 2017 and GPT, in a model that has x + f(LN(x)).",
        why="GPT-2 and all later decoders normalise the input of each half.",
        shows="Everywhere.", fix="x + f(LN(x)).",
        seen="karpathy/minGPT#52, NVIDIA-NeMo/Speech#4350",
    ),
    entry(
        "norm-order-pre-for-post", ("gpt", "transformer"),
        (Swap(POST, rewired(pre_norm)), Swap(ENCODER, encoder_pre_norm)), (*STREAM, *NORMED, *INNER),
        what="x + f(LN(x)) in a model that has LN(x + f(x)).",
        why="The Transformer of 2017 and GPT normalise the sum.",
        shows="Everywhere.", fix="LN(x + f(x)).",
        seen="harvardnlp/harvardnlp.github.io#6, karpathy/minGPT#52",
    ),
    entry(
        "norm-on-sublayer-output", PRE_FAMILIES, each(PRE, rewired(sandwiched)), (*STREAM, *NORMED, *INNER),
        what="x + LN(f(x)): the norm is on the output of each half.",
        why="It belongs on its input.",
        shows="Everywhere.", fix="x + f(LN(x)).",
    ),
    entry(
        "prenorm-residual-from-normed", PRE_FAMILIES, each(PRE, rewired(from_normed)), STREAM,
        what="x ← LN(x), then x + f(x): the skip path carries the normalised value.",
        why="The residual stream is added to, and otherwise left alone.",
        shows="Everywhere.", fix="Keep x; give LN(x) to the sublayer only.",
        seen="pytorch#61165, tracel-ai/burn#1056, SHI-Labs/Compact-Transformers#25",
    ),
    entry(
        "residual-attention-missing", PRE_FAMILIES, each(PRE, rewired(without_first_skip)), (*STREAM, *NORMED),
        what="The skip connection around attention is missing.",
        why="h = x + Attention(…).", shows="Everywhere.", fix="Add x.",
    ),
    entry(
        "residual-feed-forward-missing", PRE_FAMILIES, each(PRE, rewired(without_second_skip)), STREAM,
        what="The skip connection around the feed-forward layer is missing.",
        why="y = h + FeedForward(…).", shows="Everywhere.", fix="Add h.",
    ),
    entry(
        "residual-from-block-input", PRE_FAMILIES, each(PRE, rewired(skip_from_the_start)), STREAM,
        what="The feed-forward layer's output is added to the block's input, and attention's share is lost.",
        why="It is added to what attention left.",
        shows="Everywhere.", fix="y = h + FeedForward(…), h and not x.",
    ),
    entry(
        "serial-block-parallel", PRE_FAMILIES, each(PRE, rewired(in_parallel)), (*STREAM, *NORMED),
        what="The feed-forward layer reads the block's input instead of what attention left (a parallel block).",
        why="GPT-J and Phi are parallel; GPT-2 and Llama are not.",
        shows="Everywhere.", fix="h first, then FeedForward(LN(h)).",
    ),
    entry(
        "block-halves-swapped", PRE_FAMILIES, each(PRE, rewired(feed_forward_first)), (*STREAM, *NORMED, *INNER),
        what="The feed-forward layer comes before attention.",
        why="Attention comes first.", shows="Everywhere.", fix="Attention, then feed-forward.",
    ),
    entry(
        "feed-forward-not-normed", PRE_FAMILIES, each(PRE, rewired(not_normed_feed)), (*STREAM, *NORMED, *INNER),
        what="The feed-forward layer reads the residual stream without its norm.",
        why="Each half has a norm.", shows="Everywhere.", fix="FeedForward(LN(h)).",
    ),
    entry(
        "residual-halved", PRE_FAMILIES, each(PRE, rewired(halved)), (*STREAM, *NORMED),
        what="Sums are multiplied by √½, as ConvS2S does, or by 1/√(2 · layers), which GPT-2 applies to initial "
        "weights.",
        why="GPT-2's factor is for initialisation; a checkpoint has it inside.",
        shows="Everywhere.", fix="x + f(LN(x)).",
    ),
    entry(
        "parallel-block-serial", ("phi",), (Swap(PARALLEL, rewired(serial)),), (*STREAM, *NORMED, *INNER),
        what="The feed-forward layer reads what attention left, as in Llama.",
        why="Phi's halves read the same normalised input.",
        shows="Everywhere.", fix="x + Attention(n) + FeedForward(n), n = LN(x).",
        seen="zeux/calm#1, transformers#29745",
    ),
    entry(
        "parallel-fed-by-attention", ("phi",), (Swap(PARALLEL, rewired(fed_by_attention)),), (*STREAM, *INNER),
        what="The feed-forward layer reads attention's output.",
        why="It reads the normalised input of the block.",
        shows="Everywhere.", fix="FeedForward(n).", seen="zeux/calm#1",
    ),
    entry(
        "parallel-skip-twice", ("phi",), (Swap(PARALLEL, rewired(skip_twice)),), STREAM,
        what="Each half adds the residual stream, which then counts twice.",
        why="It is added once.", shows="Everywhere.", fix="x + Attention(n) + FeedForward(n).",
    ),
    entry(
        "parallel-skip-from-normed", ("phi",), (Swap(PARALLEL, rewired(skip_from_norm)),), STREAM,
        what="The skip path carries the normalised input.",
        why="It carries the residual stream.", shows="Everywhere.", fix="x + Attention(n) + FeedForward(n).",
        seen="pytorch#61165 (in serial blocks)",
    ),
    entry(
        "parallel-two-norms", ("phi",), (Swap(PARALLEL, rewired(plainly_normed)),), (*STREAM, *INNER),
        what="The feed-forward layer has a norm of its own, which no file fills: weight 1, bias 0.",
        why="Phi's block has one norm for both halves.",
        shows="Exactly nothing while the norm's weight is 1 and its bias 0.",
        fix="One norm; no parameter may be left at its initial value after loading.",
        seen="lucidrains/PaLM-pytorch#7, allenai/OLMo#222",
    ),
    entry(
        "final-norm-missing", ("gpt2", "gpt3", *TURNING), (on_model(final_norm_dropped),), ("final_norm", "logits"),
        what="The norm after the last block is missing.",
        why="A pre-norm stream has not been normalised since its last sum.",
        shows="Everywhere; greedy tokens often stay right.", fix="ln_f, model.norm, final_layernorm before the head.",
        seen="pytorch#55270, OpenNMT-py#1971",
    ),
    entry(
        "final-norm-extra", ("gpt",), (on_model(blocks_changed(last_normed)),), ("logits", *STREAM),
        what="A norm after the last block of a post-norm stack.",
        why="That block ends with a norm already.",
        shows="1.6e-8 while weights are 1 and biases 0 (a norm of a norm is itself); large with trained weights.",
        fix="No final norm in GPT and the Transformer of 2017.",
        seen="harvardnlp/harvardnlp.github.io#6",
    ),
    entry(
        "layers-string-sorted", ("gpt", "gpt2", "gpt3"), (on_model(blocks_changed(by_string)),),
        (*STREAM, *NORMED, *INNER),
        what="Blocks are ordered by their names as strings: 0, 1, 10, 11, 2, ….",
        why="They are numbered.", shows="Only in models with more than 10 blocks.", fix="Sort by int(name).",
    ),
    entry(
        "layers-one-object", DECODERS, (on_model(blocks_changed(lambda blocks: [blocks[-1]] * len(blocks))),),
        (*STREAM, *NORMED, *INNER, L + "attention.query_rotated"),
        what="[Block()] * n makes n references to one block: all layers have the weights that were loaded last.",
        why="Every layer has its own.",
        shows="Everywhere; nothing with one layer.", fix="[Block() for _ in range(n)].",
    ),
    entry(
        "layer-last-missing", DECODERS, (on_model(blocks_changed(lambda blocks: blocks[:-1])),),
        ("logits", "final_norm", *STREAM, *NORMED, *INNER),
        what="The last block is not run: range(n_layers − 1).",
        why="There are n.", shows="Everywhere; a session may complain first.", fix="All blocks.",
    ),
    entry(
        "layer-order-reversed", DECODERS, (on_model(blocks_changed(lambda blocks: blocks[::-1])),),
        (*STREAM, *NORMED, *INNER),
        what="Blocks are run in reverse.",
        why="0 first.", shows="Everywhere; nothing with one layer.", fix="Run them in order.",
    ),
)  # fmt: skip
