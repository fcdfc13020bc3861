"""Normalisation: RMSNorm and LayerNorm, and which of them goes where."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.groups import GPTS, LLAMAS
from conformance.mistakes.making import instead, on_model
from reference_impl.nn import norm

RMS = "reference_impl.nn.norm:rms_norm"
LAYER = "reference_impl.nn.norm:layer_norm"
RMS_FAMILIES = ("rms_norm", *LLAMAS, "switch_transformer")
LAYER_FAMILIES = ("layer_norm", "add_and_norm", "transformer", *GPTS, "phi", "transformer_xl")
FORWARD = ("component.outputs", "golden.logits")
NORMS = (
    "layers.N.norm", "layers.N.attention.norm", "layers.N.feed_forward.norm", "layers.N.attention.output_norm",
    "layers.N.output", "final_norm", "layers.N.attention.query_normed", "layers.N.attention.key_normed",
)  # fmt: skip
# Where norms are not probed of their own, what reads them is the first to be wrong.
READ = (
    *NORMS, "layers.N.attention.query", "layers.N.attention.key", "layers.N.attention.value",
    "layers.N.feed_forward.up", "logits",
)  # fmt: skip


def rms(mean_square: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """RMSNorm with another denominator: √(mean_square(x) + eps)."""

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        working = x.to(torch.promote_types(x.dtype, torch.float32))
        return weight * (working * torch.rsqrt(mean_square(working) + eps)).to(x.dtype)

    return instead(rms_norm)


def layer(normalise: Callable[[Tensor, float], Tensor]) -> Callable[..., Any]:
    """LayerNorm with another normalisation, before scale and shift."""

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        working = x.to(torch.promote_types(x.dtype, torch.float32))
        return (normalise(working, eps) * weight + bias).to(x.dtype)

    return instead(layer_norm)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=-1, keepdim=True)


def mean_square(x: Tensor, dim: Any = -1) -> Tensor:
    return x.square().mean(dim=dim, keepdim=True)


def unbiased(x: Tensor, eps: float) -> Tensor:
    return centred(x) / (x.var(dim=-1, keepdim=True, correction=1) + eps).sqrt()


def outside(x: Tensor, eps: float) -> Tensor:
    return centred(x) / (mean_square(centred(x)).sqrt() + eps)


def over_tokens(x: Tensor) -> tuple[int, ...]:
    """The axes of tokens and features, or of features alone where there is one vector."""
    return (-2, -1) if x.ndim > 1 else (-1,)


def whole(x: Tensor, eps: float) -> Tensor:
    middle = x - x.mean(dim=over_tokens(x), keepdim=True)
    return middle * torch.rsqrt(mean_square(middle, over_tokens(x)) + eps)


def rms_eps_outside(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    working = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (working / (mean_square(working).sqrt() + eps)).to(x.dtype)


def own_eps(value: float) -> Callable[..., Any]:
    """Another ε than the one that is given."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if original.__name__ == "rms_norm":
            return lambda x, weight, eps: original(x, weight, value)
        return lambda x, weight, bias, eps: original(x, weight, bias, value)

    return make


def weightless(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if original.__name__ == "rms_norm":
        return lambda x, weight, eps: original(x, torch.ones_like(weight), eps)
    return lambda x, weight, bias, eps: original(x, torch.ones_like(weight), bias, eps)


def one_more(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, weight, eps: original(x, 1 + weight, eps)


def biasless(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, weight, bias, eps: original(x, weight, torch.zeros_like(bias), eps)


def weight_first(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, weight, eps: original(x * weight, torch.ones_like(weight), eps)


def cast_last(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    working = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight * working * torch.rsqrt(mean_square(working) + eps)).to(x.dtype)


def rms_in_own_dtype(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(mean_square(x) + eps))


def layer_in_own_dtype(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return centred(x) * torch.rsqrt(mean_square(centred(x)) + eps) * weight + bias


def in_place(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    working = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.no_grad():
        working.mul_(torch.rsqrt(mean_square(working) + eps))
    return weight * working.to(x.dtype)


def statistics_detached(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return weight * (x * torch.rsqrt(mean_square(x.detach()) + eps))

    return rms_norm


def exchanged(model: Any) -> None:
    """The two norms of every block change places."""
    for module in model.modules():
        for first, second in (("input_layernorm", "post_attention_layernorm"), ("ln_1", "ln_2")):
            if hasattr(module, first) and hasattr(module, second):
                one, other = getattr(module, first), getattr(module, second)
                one.weight.data, other.weight.data = other.weight.data, one.weight.data
                if hasattr(one, "bias"):
                    one.bias.data, other.bias.data = other.bias.data, one.bias.data


def first_used_twice(model: Any) -> None:
    for module in model.modules():
        for first, second in (("input_layernorm", "post_attention_layernorm"), ("ln_1", "ln_2")):
            if hasattr(module, first) and hasattr(module, second):
                setattr(module, second, getattr(module, first))


MISTAKES = (
    Mistake(
        id="ln-bessel",
        families=LAYER_FAMILIES,
        what="Divides by a standard deviation with n − 1 (torch's default for std and var).",
        why="LayerNorm's variance divides by n.",
        shows="A constant ratio √((n−1)/n): 0.8 % at n = 64, 0.01 % at n = 4,096.",
        fix="var(correction=0).",
        seen="harvardnlp/annotated-transformer#119, allenai/allennlp#953, facebookresearch/stopes#25",
        swaps=(Swap(LAYER, layer(unbiased)),),
        killed_by=FORWARD,
        touches=READ,
    ),
    Mistake(
        id="ln-eps-outside",
        families=LAYER_FAMILIES,
        what="Adds ε to the standard deviation: (x − μ) / (σ + ε).",
        why="It belongs inside the root: (x − μ) / √(σ² + ε).",
        shows="About as large as ε, unless the variance is near ε.",
        fix="√(var + eps).",
        seen="hkproj/pytorch-transformer#31, hyunwoongko/transformer#7, codertimo/BERT-pytorch#30",
        swaps=(Swap(LAYER, layer(outside)),),
        killed_by=FORWARD,
        touches=READ,
    ),
    Mistake(
        id="rms-eps-outside",
        families=RMS_FAMILIES,
        what="Adds ε to the root mean square: x / (rms + ε).",
        why="It belongs inside the root.",
        shows="About as large as ε, unless the mean square is near ε.",
        fix="√(mean(x²) + eps).",
        seen="hkproj/pytorch-transformer#31 (in LayerNorm)",
        swaps=(Swap(RMS, instead(rms_eps_outside)),),
        killed_by=FORWARD,
        touches=READ,
    ),
    Mistake(
        id="norm-eps-value",
        families=(*RMS_FAMILIES, *LAYER_FAMILIES),
        what="Another ε than the config's: 1e-12, 1e-6 for 1e-5, the default of the framework.",
        why="Llama 1 has 1e-6 and Llama 2 1e-5, in one format.",
        shows="Relative 4.5e-6 / variance: nothing at variance 1, percents at 1e-4.",
        fix="Read rms_norm_eps, layer_norm_epsilon, layer_norm_eps.",
        seen="llama.cpp#2374, llama.cpp#2384, torchtune#152, lit-llama#339, NVIDIA/cutlass#1112",
        swaps=(Swap(RMS, own_eps(2e-6)), Swap(LAYER, own_eps(1e-12))),
        killed_by=FORWARD,
        touches=READ,
    ),
    Mistake(
        id="norm-weight-ignored",
        families=(*RMS_FAMILIES, *LAYER_FAMILIES),
        what="The norm's weight is not loaded, or not applied.",
        why="It is part of the model.",
        shows="Exactly nothing while it is 1, as at initialisation.",
        fix="Multiply by it; test with random norm weights.",
        seen="PAIR-code/tiny-transformers#50 (ε loaded as a parameter), common knowledge",
        swaps=(Swap(RMS, weightless), Swap(LAYER, weightless)),
        killed_by=FORWARD,
        touches=READ,
    ),
    Mistake(
        id="norm-bias-ignored",
        families=LAYER_FAMILIES,
        what="The bias of a LayerNorm is not loaded, or not added.",
        why="It is part of the model.",
        shows="Exactly nothing while it is 0, as at initialisation.",
        fix="Add it; test with random norm biases.",
        seen="common knowledge",
        swaps=(Swap(LAYER, biasless),),
        killed_by=FORWARD,
        touches=READ,
    ),
    Mistake(
        id="norm-weight-plus-one",
        families=RMS_FAMILIES,
        what="Multiplies by 1 + weight, as Gemma does.",
        why="Llama's weights are stored as they are multiplied.",
        shows="Everywhere: about twice the value.",
        fix="weight, not 1 + weight.",
        seen="common knowledge",
        swaps=(Swap(RMS, one_more),),
        killed_by=FORWARD,
        touches=READ,
    ),
    Mistake(
        id="norm-weight-before",
        families=RMS_FAMILIES,
        what="Multiplies by the weight first and normalises the product.",
        why="The root mean square is that of x.",
        shows="Nothing while all weights are equal.",
        fix="Normalise, then scale.",
        seen="common knowledge",
        swaps=(Swap(RMS, weight_first),),
        killed_by=FORWARD,
        touches=READ,
    ),
    Mistake(
        id="rms-for-layernorm",
        families=LAYER_FAMILIES,
        what="LayerNorm without subtracting the mean.",
        why="That is RMSNorm.",
        shows="Wherever the mean is not 0; small where it happens to be.",
        fix="Subtract the mean before the variance.",
        seen="common knowledge",
        swaps=(Swap(LAYER, layer(lambda x, eps: x * torch.rsqrt(mean_square(x) + eps))),),
        killed_by=FORWARD,
        touches=READ,
    ),
    Mistake(
        id="layernorm-for-rms",
        families=RMS_FAMILIES,
        what="RMSNorm that subtracts the mean.",
        why="RMSNorm does not centre.",
        shows="Wherever the mean is not 0.",
        fix="x / √(mean(x²) + eps).",
        seen="common knowledge",
        swaps=(Swap(RMS, lambda original: lambda x, weight, eps: original(centred(x), weight, eps)),),
        killed_by=FORWARD,
        touches=READ,
    ),
    Mistake(
        id="ln-variance-about-zero",
        families=LAYER_FAMILIES,
        what="Subtracts the mean, and divides by the root of mean(x²), which still has it.",
        why="The variance is about the mean.",
        shows="Wherever the mean is not 0; the output's variance is below 1.",
        fix="mean((x − μ)²), or mean(x²) − μ².",
        seen="common knowledge",
        swaps=(Swap(LAYER, layer(lambda x, eps: centred(x) * torch.rsqrt(mean_square(x) + eps))),),
        killed_by=FORWARD,
        touches=READ,
    ),
    Mistake(
        id="ln-variance-not-rooted",
        families=LAYER_FAMILIES,
        what="Divides by the variance, not by its root.",
        why="The result must have variance 1.",
        shows="Nothing at variance 1.",
        fix="rsqrt.",
        seen="common knowledge",
        swaps=(Swap(LAYER, layer(lambda x, eps: centred(x) / (mean_square(centred(x)) + eps))),),
        killed_by=FORWARD,
        touches=READ,
    ),
    Mistake(
        id="rms-sum-for-mean",
        families=RMS_FAMILIES,
        what="Divides by the Euclidean norm: the sum of squares instead of their mean.",
        why="The result must have mean square 1.",
        shows="A constant ratio √n.",
        fix="mean(x²).",
        seen="common knowledge",
        swaps=(Swap(RMS, rms(lambda x: x.square().sum(dim=-1, keepdim=True))),),
        killed_by=FORWARD,
        touches=READ,
    ),
    Mistake(
        id="rms-over-tokens",
        families=RMS_FAMILIES,
        what="One root mean square for all tokens of a row.",
        why="Every vector is normalised by itself; otherwise a token depends on later ones.",
        shows="Nothing with one token; otherwise everywhere, and the future leaks.",
        fix="mean over the last axis only.",
        seen="common knowledge",
        swaps=(Swap(RMS, rms(lambda x: mean_square(x, over_tokens(x)))),),
        killed_by=FORWARD,
        touches=READ,
    ),
    Mistake(
        id="ln-over-tokens",
        families=LAYER_FAMILIES,
        what="Mean and variance over tokens and features together (normalized_shape of two axes).",
        why="Every vector is normalised by itself; otherwise a token depends on later ones.",
        shows="Nothing with one token; otherwise everywhere, and the future leaks.",
        fix="normalized_shape = hidden_size.",
        seen="common knowledge",
        swaps=(Swap(LAYER, layer(whole)),),
        killed_by=FORWARD,
        touches=READ,
    ),
    Mistake(
        id="norm-inplace",
        families=RMS_FAMILIES,
        what="Normalises in place: in float32 x.float() is x itself, and so is what the residual connection adds.",
        why="The residual stream must stay as it was.",
        shows="In float32 (and float64) only: in bfloat16 the cast makes a copy.",
        fix="Not in place.",
        seen="GeeeekExplorer/nano-vllm#170",
        swaps=(Swap(RMS, instead(in_place)),),
        killed_by=FORWARD,
        touches=(*READ, "embedding", "layers.N.attention.residual"),
    ),
    Mistake(
        id="norm-statistics-detached",
        families=RMS_FAMILIES,
        what="No gradient flows through the root mean square.",
        why="It depends on x.",
        shows="The forward pass is right; gradients are wrong.",
        fix="Leave it in the graph.",
        seen="common knowledge (hand-written backward passes)",
        swaps=(Swap(RMS, statistics_detached),),
        killed_by=("component.gradients", "golden.gradients"),
    ),
    Mistake(
        id="rms-cast-order",
        families=RMS_FAMILIES,
        what="Multiplies by the weight before rounding to the model's dtype: (x̂ · w) in float32.",
        why="Llama rounds x̂ first; the two give other numbers in bfloat16.",
        shows="Only in low precision, less than one unit in the last place of each element.",
        fix="weight * x̂.to(dtype), to agree bit by bit.",
        seen="vllm#42325, vllm#42379, transformers#29402, lmdeploy#2842",
        swaps=(Swap(RMS, instead(cast_last)),),
        killed_by=FORWARD,
        touches=READ,
        precision="policy: it rounds once less than the oracle, and is the better for it; no bound forbids that",
        equivalent=dict.fromkeys(RMS_FAMILIES, "in float64 both orders round nothing; in low precision it is nearer "
                                 "to the truth than the oracle"),
    ),
    Mistake(
        id="norm-not-upcast",
        # Mixtral has no case for it: a stream that stresses float16 leaves its choice of experts to rounding.
        # Nor have Switch Transformer and Transformer-XL one.
        families=("rms_norm", "llama", "mistral", *LAYER_FAMILIES[:-1]),
        what="Squares and their mean are computed in float16 or bfloat16.",
        why="A square overflows float16 beyond 256, and the mean loses digits.",
        shows="Only in low precision.",
        fix="Normalise in float32.",
        seen="common knowledge (mistral's one_file_ref.py normalises x.float())",
        swaps=(Swap(RMS, instead(rms_in_own_dtype)), Swap(LAYER, instead(layer_in_own_dtype))),
        killed_by=FORWARD,
        touches=READ,
        precision="in float32 and float64 there is nothing to upcast",
    ),
    Mistake(
        id="norm-weights-crossed",
        families=("gpt", "gpt2", "gpt3", *LLAMAS),
        what="The two norms of a block change places.",
        why="Each has weights of its own.",
        shows="Exactly nothing while all norm weights are 1.",
        fix="Follow the names; test with norm weights that differ.",
        seen="allenai/OLMo#222",
        swaps=(on_model(exchanged),),
        killed_by=("golden.logits",),
        touches=READ,
    ),
    Mistake(
        id="norm-used-twice",
        families=("gpt", "gpt2", "gpt3", *LLAMAS),
        what="One norm serves both halves of a block.",
        why="Each half has its own.",
        shows="Exactly nothing while all norm weights are 1.",
        fix="Two norms; and check that every tensor of the file is used.",
        seen="allenai/OLMo#222, lucidrains/PaLM-pytorch#7",
        swaps=(on_model(first_used_twice),),
        killed_by=("golden.logits",),
        touches=READ,
    ),
    Mistake(
        id="add-and-norm-residual-missing",
        families=("add_and_norm",),
        what="Normalises the sublayer's output alone.",
        why="Add & Norm is LayerNorm(x + Sublayer(x)).",
        shows="Everywhere.",
        fix="Add, then normalise.",
        seen="common knowledge",
        swaps=(Swap("reference_impl.nn.norm:add_and_norm", instead(
            lambda x, sublayer_output, weight, bias, eps: norm.layer_norm(sublayer_output, weight, bias, eps))),),
        killed_by=("component.outputs",),
    ),
    Mistake(
        id="add-and-norm-norm-then-add",
        families=("add_and_norm",),
        what="x + LayerNorm(Sublayer(x)).",
        why="The sum is normalised, not the summand.",
        shows="Everywhere.",
        fix="LayerNorm(x + Sublayer(x)).",
        seen="harvardnlp/harvardnlp.github.io#6",
        swaps=(Swap("reference_impl.nn.norm:add_and_norm", instead(
            lambda x, sublayer_output, weight, bias, eps: x + norm.layer_norm(sublayer_output, weight, bias, eps))),),
        killed_by=("component.outputs",),
    ),
)  # fmt: skip
