"""Feed-forward layers: activations, gates, biases."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.attention import bias_dropped
from conformance.mistakes.groups import GPTS, LLAMAS
from conformance.mistakes.making import instead, on_load

TABLE = "reference_impl.nn.feed_forward:activation"
GATE = "reference_impl.nn.feed_forward:gate"
FUNCTIONS = "reference_impl.nn.activations:"
FORWARD = ("component.outputs", "golden.logits")
ACTIVATED = ("layers.N.feed_forward.activation",)
UP = ("layers.N.feed_forward.up", "layers.N.feed_forward.gate")
PRODUCT = (*ACTIVATED, "layers.N.feed_forward.product", "layers.N.feed_forward.expert_outputs")
OUTPUT = ("layers.N.feed_forward.output",)
GATED = ("swiglu", "sparse_moe", *LLAMAS)
# What has cases with GELU's tanh form, and with GELU itself.
TANH = ("activations", "feed_forward", *GPTS, "llama", "phi")
EXACT = ("activations", "feed_forward", "transformer", "gpt2", "llama", "mistral", "mixtral", "phi")


class Function(nn.Module):
    """A function as the module that an activation is."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def named(names: tuple[str, ...], function: Callable[[Tensor], Tensor]) -> tuple[Swap, ...]:
    """Some activations, by their names in config.json, become another function: as modules and as functions."""

    def activation(original: Callable[[str], nn.Module]) -> Callable[[str], nn.Module]:
        def chosen(hidden_act: str) -> nn.Module:
            found = original(hidden_act)
            return Function(function) if hidden_act in names else found

        return chosen

    written_out = tuple(Swap(FUNCTIONS + name, instead(function)) for name in names if name in WRITTEN_OUT)
    return Swap(TABLE, activation), *written_out


WRITTEN_OUT = ("relu", "gelu", "gelu_new", "silu")
TANH_NAMES, SILU_NAMES = ("gelu_new", "gelu_pytorch_tanh"), ("silu", "swish")
ROOT = math.sqrt(2 / math.pi)


def tanh_form(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: x / 2 * (1 + torch.tanh(inner(x)))


def both_activated(gate: Tensor, up: Tensor, act_fn: Callable[[Tensor], Tensor]) -> Tensor:
    return act_fn(gate) * act_fn(up)


def summed(gate: Tensor, up: Tensor, act_fn: Callable[[Tensor], Tensor]) -> Tensor:
    return act_fn(gate) + up


def gelu_entry(
    identifier: str, what: str, why: str, shows: str, inner: Callable[[Tensor], Tensor], seen: str
) -> Mistake:
    return Mistake(
        id=identifier, families=TANH, what=what, why=why, shows=shows,
        fix="x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))).", seen=seen, swaps=named(TANH_NAMES, tanh_form(inner)),
        killed_by=FORWARD, touches=ACTIVATED,
    )  # fmt: skip


_ACTIVATIONS = (
    Mistake(
        id="gelu-exact-for-tanh",
        families=TANH,
        what="The error function's GELU where the model has its tanh form (gelu_new).",
        why="The two differ by up to 4.7e-4, at |x| = 2.7; the model was trained with one of them.",
        shows="1.4e-6 at the logits of a default-initialised tiny model, 1e-3 (Phi) and 1e-4 (GPT-2) at real scale.",
        fix='GELU(approximate="tanh") for gelu_new, gelu_pytorch_tanh, and GPT\'s "gelu".',
        seen="pocket-tts#278, onnxruntime#2270 (review), apache/mxnet#21034",
        swaps=named(TANH_NAMES, F.gelu),
        killed_by=FORWARD,
        touches=ACTIVATED,
    ),
    Mistake(
        id="gelu-tanh-for-exact",
        families=EXACT,
        what="GELU's tanh form where the model has the exact one.",
        why="The two differ by up to 4.7e-4.",
        shows="1e-6 in a default-initialised tiny model, 1e-4 to 1e-3 at real scale.",
        fix='GELU() for "gelu" (but not in GPT, whose "gelu" is the tanh form).',
        seen="onnxruntime#2270 (review)",
        swaps=named(("gelu",), lambda x: F.gelu(x, approximate="tanh")),
        killed_by=FORWARD,
        touches=(*ACTIVATED, *PRODUCT),
    ),
    Mistake(
        id="gelu-sigmoid-form",
        families=TANH,
        what="x · σ(1.702 x), the quick form of CLIP.",
        why="It is a third function, off by up to 0.02.",
        shows="1e-2 at real scale.",
        fix="Read the name of the activation: quick_gelu is another.",
        seen="common knowledge",
        swaps=named(TANH_NAMES, lambda x: x * torch.sigmoid(1.702 * x)),
        killed_by=FORWARD,
        touches=ACTIVATED,
    ),
    gelu_entry(
        "gelu-tanh-cube-missing", "Leaves the cube out: tanh(√(2/π) · x).", "The cubic term makes it fit Φ.",
        "Everywhere, up to 0.03.", lambda x: ROOT * x, "tensorflow/tfjs#8224",
    ),
    gelu_entry(
        "gelu-tanh-factor-x", "Forgets the linear term: tanh(√(2/π) · 0.044715 x³).", "x + 0.044715 x³ is meant.",
        "Everywhere, large.", lambda x: ROOT * 0.044715 * x**3, "tensorflow/tfjs#8224",
    ),
    gelu_entry(
        "gelu-tanh-constant", "0.44715 for 0.044715.", "A digit is lost.", "Large beyond |x| = 1.",
        lambda x: ROOT * (x + 0.44715 * x**3), "tensorflow/tfjs#8224",
    ),
    gelu_entry(
        "gelu-tanh-rounded", "√(2/π) is written as 0.8.", "It is 0.7978845608.", "1e-3.",
        lambda x: 0.8 * (x + 0.044715 * x**3), "common knowledge",
    ),
    gelu_entry(
        "gelu-tanh-root", "√2/π for √(2/π).", "The root covers the quotient.", "Everywhere, large.",
        lambda x: math.sqrt(2) / math.pi * (x + 0.044715 * x**3), "common knowledge",
    ),
    Mistake(
        id="act-relu-for-silu",
        families=("activations", "feed_forward", *GATED, "gpt2"),
        what="ReLU where the config says silu.",
        why="They agree far from 0 only.",
        shows="1e-3 in a default-initialised tiny model, large at real scale.",
        fix="Read hidden_act; refuse a name that is not implemented.",
        seen="OpenNMT-py#1971",
        swaps=named(SILU_NAMES, F.relu),
        killed_by=FORWARD,
        touches=PRODUCT,
    ),
    Mistake(
        id="act-gelu-for-silu",
        families=("activations", "feed_forward", *GATED, "gpt2"),
        what="GELU where the config says silu.",
        why="x · Φ(x) and x · σ(x) look alike and differ by up to 0.2.",
        shows="1e-3 in a default-initialised tiny model, large at real scale.",
        fix="Read hidden_act.",
        seen="transformers tests/causal_lm_tester.py sets gelu for every family",
        swaps=named(SILU_NAMES, F.gelu),
        killed_by=FORWARD,
        touches=PRODUCT,
    ),
    Mistake(
        id="act-silu-is-sigmoid",
        families=("activations", "feed_forward", *GATED, "gpt2"),
        what="σ(x) for x · σ(x).",
        why="That is the sigmoid (GLU), not SiLU (SwiGLU).",
        shows="Everywhere.",
        fix="x · σ(x).",
        seen="common knowledge",
        swaps=named(SILU_NAMES, torch.sigmoid),
        killed_by=FORWARD,
        touches=PRODUCT,
    ),
    Mistake(
        id="act-relu-leaky",
        families=("activations", "feed_forward", "transformer", *GPTS, "llama", "mistral", "phi"),
        what="A leaky ReLU where the config says relu.",
        why="Negative values must become 0.",
        shows="About 1 % of the negative values.",
        fix="max(0, x).",
        seen="OpenNMT-py#1971 (functions mixed up)",
        swaps=named(("relu",), F.leaky_relu),
        killed_by=FORWARD,
        touches=PRODUCT,
    ),
    Mistake(
        id="act-gpt-gelu-exact",
        families=("gpt",),
        what='Takes GPT\'s afn "gelu" for the exact GELU.',
        why="OpenAI's code computes the tanh form under this name.",
        shows="1e-3 at real scale.",
        fix='afn "gelu" is gelu_new.',
        seen="common knowledge",
        swaps=(
            Swap("reference_impl.models.gpt:ACTIVATION_OF", lambda original: original | {"gelu": "gelu"}),
        ),
        killed_by=("golden.logits",),
        touches=ACTIVATED,
    ),
)  # fmt: skip


def component_bias_dropped(*arguments: str) -> tuple[Swap, ...]:
    """feed_forward and swiglu without some biases."""

    def feed_forward(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            x: Tensor, linear1_weight: Tensor, linear1_bias: Tensor, linear2_weight: Tensor, linear2_bias: Tensor,
            hidden_act: str,
        ) -> Any:  # fmt: skip
            one, two = (
                torch.zeros_like(bias) if name in arguments else bias
                for name, bias in (("linear1_bias", linear1_bias), ("linear2_bias", linear2_bias))
            )
            return original(x, linear1_weight, one, linear2_weight, two, hidden_act)

        return call

    def swiglu(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            x: Tensor, gate_proj_weight: Tensor, up_proj_weight: Tensor, down_proj_weight: Tensor,
            gate_proj_bias: Any = None, up_proj_bias: Any = None, down_proj_bias: Any = None,
        ) -> Any:  # fmt: skip
            biases = {"gate_proj_bias": gate_proj_bias, "up_proj_bias": up_proj_bias, "down_proj_bias": down_proj_bias}
            kept = [None if name in arguments else bias for name, bias in biases.items()]
            return original(x, gate_proj_weight, up_proj_weight, down_proj_weight, *kept)

        return call

    return (
        Swap("reference_impl.nn.feed_forward:feed_forward", feed_forward),
        Swap("reference_impl.nn.feed_forward:swiglu", swiglu),
    )


def rounded_down(name: str, tensor: Tensor, config: Any) -> Tensor | None:
    """The last unit of every feed-forward layer is not there: its row of the projections up is 0."""
    if not any(part in name for part in (".up_proj.", ".gate_proj.")):
        return None
    shorter = tensor.clone()
    shorter[-1:] = 0
    return shorter


BIASED = ("feed_forward", "swiglu", "transformer", *GPTS, "llama", "phi")

_LAYERS = (
    Mistake(
        id="swiglu-swap",
        families=GATED,
        what="SiLU(up) ⊙ gate: gate and up change roles (w1 and w3, or the halves of a fused [gate; up]).",
        why="The activation goes on the gate.",
        shows="2e-3 to 5e-3 in a default-initialised tiny model, since both are about half the product there; large "
        "at real scale.",
        fix="SiLU(x W_gate) ⊙ (x W_up).",
        seen="tenstorrent/tt-metal#52818, nnsight#719, prime-rl#1812 (layouts of fused halves)",
        swaps=(Swap(GATE, lambda original: lambda gate, up, act: original(up, gate, act)),),
        killed_by=FORWARD,
        touches=PRODUCT,
    ),
    Mistake(
        id="swiglu-both-activated",
        families=GATED,
        what="The activation goes on gate and up.",
        why="Up stays linear.",
        shows="Everywhere.",
        fix="act(gate) ⊙ up.",
        seen="common knowledge",
        swaps=(Swap(GATE, instead(both_activated)),),
        killed_by=FORWARD,
        touches=PRODUCT,
    ),
    Mistake(
        id="swiglu-sum",
        families=GATED,
        what="act(gate) + up.",
        why="A gate multiplies.",
        shows="Everywhere.",
        fix="act(gate) ⊙ up.",
        seen="common knowledge",
        swaps=(Swap(GATE, instead(summed)),),
        killed_by=FORWARD,
        touches=PRODUCT,
    ),
    Mistake(
        id="swiglu-not-gated",
        families=GATED,
        what="act(up), without the gate: the plain feed-forward block.",
        why="A third of the block's weights are not used.",
        shows="Everywhere.",
        fix="act(gate) ⊙ up; check that every tensor of the file has an effect.",
        seen="common knowledge",
        swaps=(Swap(GATE, instead(lambda gate, up, act: act(up))),),
        killed_by=FORWARD,
        touches=PRODUCT,
    ),
    Mistake(
        id="ffn-up-bias-dropped",
        families=BIASED,
        what="The bias of the projection up (and of the gate) is in the file and is not added.",
        why="It is part of the model.",
        shows="Exactly nothing while biases are 0, as at initialisation.",
        fix="Add it; test with random biases.",
        seen="vllm#46835 (the same pattern in a loader), common knowledge",
        swaps=(
            bias_dropped(".c_fc.bias", ".fc1.bias", ".gate_proj.bias", ".up_proj.bias"),
            *component_bias_dropped("linear1_bias", "gate_proj_bias", "up_proj_bias"),
        ),
        killed_by=FORWARD,
        touches=UP,
    ),
    Mistake(
        id="ffn-down-bias-dropped",
        families=BIASED,
        what="The bias of the projection down is in the file and is not added.",
        why="It is part of the model.",
        shows="Exactly nothing while biases are 0; otherwise one error vector at all positions.",
        fix="Add it; test with random biases.",
        seen="vllm#46835 (the same pattern in a loader), common knowledge",
        swaps=(
            bias_dropped(".mlp.c_proj.bias", ".fc2.bias", ".down_proj.bias"),
            *component_bias_dropped("linear2_bias", "down_proj_bias"),
        ),
        killed_by=FORWARD,
        touches=OUTPUT,
    ),
    Mistake(
        id="ffn-size-rounding",
        families=("llama", "mistral"),
        what="The width of the feed-forward layer is derived (8d/3, a multiple of something) and rounded down: "
        "the last "
        "units of the file are left out.",
        why="The config states intermediate_size; Meta's rule rounds up to multiple_of.",
        shows="A shape error, or a silently smaller model.",
        fix="Use intermediate_size; check that every tensor is used in full.",
        seen="fms-fsdp#52, gpt-neox#1309, llama.cpp#2276, meta-llama#1019",
        swaps=(on_load(rounded_down),),
        killed_by=("golden.logits",),
        touches=UP,
    ),
)

MISTAKES = (*_ACTIVATIONS, *_LAYERS)
