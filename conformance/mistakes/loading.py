"""Reading config.json and files of weights; losses and gradients."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.groups import DECODERS, GPTS, LLAMAS, MODELS, OTHERS
from conformance.mistakes.making import each, instead, on_load, on_model
from conformance.mistakes.norms import READ
from conformance.mistakes.rotary import TURNED

# config class -> its families
CONFIGS = {
    "gpt": "reference_impl.models.gpt:GPTConfig",
    "gpt2": "reference_impl.models.gpt2:GPT2Config",
    "gpt3": "reference_impl.models.gpt3:GPT3Config",
    "llama": "reference_impl.models.llama:LlamaConfig",
    "mistral": "reference_impl.models.mistral:MistralConfig",
    "mixtral": "reference_impl.models.mixtral:MixtralConfig",
    "phi": "reference_impl.models.phi:PhiConfig",
    "transformer": "reference_impl.models.transformer:TransformerConfig",
}
LOGITS = ("golden.logits",)
EVERY_MODEL = (*MODELS, *OTHERS, "rnn_search", "gnmt")
L, A, F_ = "layers.N.", "layers.N.attention.", "layers.N.feed_forward."
# What a projection returns, and what the reference shows of it first.
PROJECTED = (
    A + "query", A + "key", A + "value", A + "query_normed", A + "key_normed", *TURNED, A + "scores", A + "context",
    A + "output", F_ + "gate", F_ + "up", F_ + "expert_outputs", F_ + "output",
)  # fmt: skip
# What can be wrong first in a block whose weights are another's.
IN_A_BLOCK = (*READ, *PROJECTED, L + "output", F_ + "router_logits")


def fields_at(value: Callable[[Any], dict[str, Any]], *families: str) -> tuple[Swap, ...]:
    """Configs in which some fields are what value(config) says, whatever the file says."""

    def from_dict(original: Callable[..., Any]) -> Callable[..., Any]:
        def read(cls: type, config: Any) -> Any:
            found = original(cls, config)
            return replace(found, **value(found))

        return read

    return each(tuple(f"{CONFIGS[family]}.from_dict" for family in families), from_dict)


def entry(identifier: str, families: tuple[str, ...], swaps: tuple[Swap, ...], **text: Any) -> Mistake:
    more = {"seen": "common knowledge", "killed_by": LOGITS, "touches": PROJECTED} | text
    return Mistake(id=identifier, families=families, swaps=swaps, **more)


# --- config.json ------------------------------------------------------------------------------------------------------


def head_width_derived() -> tuple[Swap, ...]:
    """In its silent form: heads are cut right, but the scale and the frequencies are those of d / H."""
    known: dict[str, int] = {}

    def attention_scores(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def scored(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
            return original(query, key, known["derived"] ** -0.5)

        return scored

    def tables(original: Callable[..., Any]) -> Callable[..., Any]:
        def spaced(position_ids: Tensor, head_dim: int, theta: float, scaling: Any = None, *, dtype: Any) -> Any:
            # θ^(−2j/Dh) with another Dh is another θ
            return original(position_ids, head_dim, theta ** (head_dim / known["derived"]), scaling, dtype=dtype)

        return spaced

    def forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            known["derived"] = max(self.config.hidden_size // self.config.num_attention_heads, 1)
            return original(self, *args, **kwargs)

        return noted

    return (
        Swap("reference_impl.nn.attention:attention_scores", attention_scores),
        Swap("reference_impl.nn.rotary:tables", tables),
        *each(
            ("reference_impl.models.llama:LlamaModel.forward", "reference_impl.models.mistral:MistralModel.forward",
             "reference_impl.models.mixtral:MixtralModel.forward"),
            forward,
        ),
    )  # fmt: skip


_CONFIG = (
    entry(
        "head-dim-derived", LLAMAS, head_width_derived(),
        what="head_dim is taken for hidden_size / num_attention_heads, though the config gives it: in the scale and in "
        "the rotary frequencies, where no shape objects.",
        why="Mistral-Nemo's, Mixtral's and many others' is another.",
        shows="Exactly nothing whenever head_dim = d / H.", fix="Read head_dim; test with one that is not d / H.",
        seen="InternLM/lmdeploy#2761, huggingface/candle#2358, vllm#2622",
        touches=(*TURNED, A + "scores", A + "weights"),
    ),
    entry(
        "field-epsilon-default", (*GPTS, *LLAMAS, "phi"),
        (*fields_at(lambda c: {"layer_norm_epsilon": type(c).layer_norm_epsilon}, *GPTS),
         *fields_at(lambda c: {"rms_norm_eps": type(c).rms_norm_eps}, *LLAMAS),
         *fields_at(lambda c: {"layer_norm_eps": type(c).layer_norm_eps}, "phi")),
        what="The norms' ε is the default of the config class, whatever the file says.",
        why="Llama 1 has 1e-6, Llama 2 1e-5.",
        shows="Nothing at variance 1; percents where the variance is near ε.", fix="Read the field.",
        seen="llama.cpp#2374, llama.cpp#2384, meta-llama#771", touches=READ,
    ),
    entry(
        "field-activation-default", ("gpt", "gpt2", "gpt3", "llama", "mistral", "mixtral", "phi", "transformer"),
        (*fields_at(lambda c: {"activation_function": type(c).activation_function}, "gpt2", "gpt3", "transformer"),
         *fields_at(lambda c: {"afn": type(c).afn}, "gpt"),
         *fields_at(lambda c: {"hidden_act": type(c).hidden_act}, *LLAMAS, "phi")),
        what="The activation is the family's usual one, whatever the file says.",
        why="Configs differ: hidden_act, activation_function, afn.",
        shows="Only in models with another activation.", fix="Read the field; refuse names that are not implemented.",
        seen="OpenNMT-py#1971", touches=(F_ + "activation", F_ + "product", F_ + "expert_outputs", F_ + "output"),
    ),
    entry(
        "field-sliding-window-default", ("mistral",), fields_at(lambda c: {"sliding_window": 4096}, "mistral"),
        what="The window is 4,096, whatever the file says.",
        why="The config says how many keys.",
        shows="Only where T exceeds the window.", fix="Read sliding_window.",
        seen="unsloth#8253, transformers#28133", touches=(A + "weights",),
    ),
    entry(
        "field-sliding-window-ignored", ("mixtral",), fields_at(lambda c: {"sliding_window": None}, "mixtral"),
        what="The config's sliding_window is ignored, since released Mixtrals have none.",
        why="A file that has one was trained with it.",
        shows="Only where T exceeds the window.", fix="Read sliding_window.",
        seen="unsloth#8253", touches=(A + "weights",),
    ),
    entry(
        "field-attention-pattern-default", ("gpt3",),
        fields_at(lambda c: {"attention_pattern": ("dense",)}, "gpt3"),
        what="All blocks are dense, whatever attention_pattern says: GPT-2.",
        why="Every other block is banded.",
        shows="Only where T exceeds the band.", fix="Read attention_pattern.",
        seen="transformers#10848, transformers#11320", touches=(A + "weights",),
    ),
    entry(
        "field-position-layout", ("transformer",),
        (Swap("reference_impl.models.transformer:POSITION_LAYOUTS",
              lambda original: dict.fromkeys(original, "concatenated")),),
        what="Marian's order of sines and cosines, whatever the model.",
        why="The paper's alternate.",
        shows="Everywhere in models of the paper's kind.", fix="Follow the model.",
        seen="tensorflow/tensor2tensor#1423", touches=("embedding",),
    ),
    entry(
        "field-scale-embedding-ignored", ("transformer",),
        fields_at(lambda c: {"scale_embedding": False}, "transformer"),
        what="scale_embedding is ignored: embeddings are not multiplied by √d_model.",
        why="The paper's are, and so are most of Marian's.",
        shows="Everywhere in models that scale.", fix="Read scale_embedding.",
        seen="harvardnlp/annotated-transformer#60, pytorch/tutorials#2849", touches=("embedding",),
    ),
    entry(
        "field-decoder-heads-from-encoder", ("transformer",),
        fields_at(lambda c: {"decoder_attention_heads": c.encoder_attention_heads}, "transformer"),
        what="The decoder has as many heads as the encoder.",
        why="decoder_attention_heads is a field of its own.",
        shows="Only where the two differ; shapes agree whatever the number.", fix="Read it.",
    ),
    entry(
        "field-heads-swapped", ("transformer",),
        fields_at(lambda c: {"decoder_attention_heads": c.encoder_attention_heads,
                             "encoder_attention_heads": c.decoder_attention_heads}, "transformer"),
        what="Encoder and decoder have each other's number of heads.",
        why="They are fields of their own.",
        shows="Only where the two differ.", fix="Read each.",
    ),
)  # fmt: skip


# --- weights ----------------------------------------------------------------------------------------------------------


def square_transposed(suffixes: tuple[str, ...]) -> Callable[..., Tensor | None]:
    """Transposed wherever no shape objects."""

    def change(name: str, tensor: Tensor, config: Any) -> Tensor | None:
        if tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1] or not name.endswith(suffixes):
            return None
        return tensor.T

    return change


PROJECTIONS = ("proj.weight", ".c_attn.weight", ".c_fc.weight", ".dense.weight", ".fc1.weight", ".fc2.weight",
               ".w1.weight", ".w2.weight", ".w3.weight")  # fmt: skip


def at_birth(*endings: str) -> Swap:
    """Tensors that no name of the file fits keep what the constructor gave them."""

    def change(name: str, tensor: Tensor, config: Any) -> Tensor | None:
        if not name.endswith(endings):
            return None
        return torch.ones_like(tensor) if tensor.ndim == 1 else torch.zeros_like(tensor)

    return on_load(change)


def last_layer_of(model: Any) -> Any:
    inner = model.transformer if hasattr(model, "transformer") else model.model
    return (inner.h if hasattr(inner, "h") else inner.layers)[-1]


def last_is_first(model: Any) -> None:
    inner = model.transformer if hasattr(model, "transformer") else model.model
    blocks = inner.h if hasattr(inner, "h") else inner.layers
    tensors = dict(blocks[0].named_parameters())
    for name, parameter in blocks[-1].named_parameters():
        parameter.data = tensors[name].detach().clone()


def halves_joined_crosswise(name: str, tensor: Tensor, config: Any) -> Tensor | None:
    """Two shards of a matrix whose columns were split, concatenated along rows."""
    if not name.endswith((".o_proj.weight", ".down_proj.weight", ".w2.weight")) or tensor.shape[1] % 2:
        return None
    left, right = tensor.chunk(2, dim=1)
    return torch.cat((left, right), dim=0).reshape(tensor.shape)


def first_shard_twice(name: str, tensor: Tensor, config: Any) -> Tensor | None:
    if not name.endswith((".q_proj.weight", ".gate_proj.weight", ".w1.weight", ".up_proj.weight")) or len(tensor) % 2:
        return None
    return torch.cat((tensor[: len(tensor) // 2],) * 2)


def biases_of_two(first: str, second: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, first) and hasattr(module, second):
                one, other = getattr(module, first), getattr(module, second)
                if getattr(one, "bias", None) is not None and one.bias.shape == other.bias.shape:
                    one.bias.data, other.bias.data = other.bias.data, one.bias.data

    return change


def shifted_exponent(name: str, tensor: Tensor, config: Any) -> Tensor | None:
    """Powers of two lost: raw bfloat16 bits taken for float16 keep the sign and shift the exponent."""
    return tensor * 0.5 if tensor.ndim == 2 and name.endswith(PROJECTIONS) else None


def rounded_to_int8(name: str, tensor: Tensor, config: Any) -> Tensor | None:
    if tensor.ndim != 2 or not name.endswith(PROJECTIONS):
        return None
    scale = tensor.abs().amax() / 127
    return (tensor / scale).round() * scale


_WEIGHTS = (
    entry(
        "conv1d-transposed", GPTS, (on_load(square_transposed((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))),),
        what="GPT-2's projections are stored (in, out), and are loaded as if they were nn.Linear's.",
        why="The square one, attn.c_proj, loads either way.",
        shows="A shape error, or silence for square matrices.", fix="Transpose all four.",
        seen="nntile#370, nntile#402, AutoGPTQ#139, mlxcel#926", touches=PROJECTED,
    ),
    entry(
        "transpose-guessed-by-shape", MODELS, (on_load(square_transposed(PROJECTIONS)),),
        what="A loader transposes where shapes differ, or turns what is square in any case.",
        why="A square matrix does not say which way it lies.",
        shows="Finite garbage, exactly where two widths are equal.",
        fix="Decide by name and format; test with a model of equal widths.",
        seen="transformers#47031", touches=PROJECTED,
    ),
    entry(
        "weights-missing-silent", DECODERS,
        (at_birth("final_layernorm.weight", "ln_f.weight", ".norm.weight", "ln_2.weight"),),
        what="strict=False: a tensor whose name does not match is skipped, and keeps its initial value.",
        why="It is part of the model.",
        shows="Small if it is one norm; nothing while trained and initial value agree.",
        fix="The set of names in the file equals the set of names used.",
        seen="mosaicml/composer#2216, pytorch#141256, pytorch/torchtitan#2498", touches=READ,
    ),
    entry(
        "weights-wrong-shard", DECODERS, (on_model(last_is_first),),
        what="The last block's weights are the first's: an index maps names to the wrong file, or a name is cut short.",
        why="Every block has its own.",
        shows="Shapes agree; wrong from the last block on.",
        fix="Read what the index says, and check that it is there.",
        seen="okuvshynov/slowllama#16", touches=IN_A_BLOCK,
    ),
    entry(
        "shard-merge-axis", LLAMAS, (on_load(halves_joined_crosswise),),
        what="Meta's consolidated files are concatenated on the wrong axis: wo and w2 are split by columns.",
        why="Row-parallel matrices are split along their inputs.",
        shows="A shape error, or silence once it is reshaped.", fix="dim=1 for wo, w2 and tok_embeddings.",
        seen="okuvshynov/slowllama#16", touches=(A + "output", F_ + "output", F_ + "expert_outputs", L + "output"),
    ),
    entry(
        "shard-first-twice", LLAMAS, (on_load(first_shard_twice),),
        what="Of two shards the first is read twice.",
        why="The second half of the rows is missing.",
        shows="Half of the heads or units are right.", fix="Read every shard.",
        seen="okuvshynov/slowllama#16",
    ),
    entry(
        "biases-q-k-crossed", ("llama", "phi", "transformer"), (on_model(biases_of_two("q_proj", "k_proj")),),
        what="The biases of the query and key projections change places.",
        why="Each belongs to its projection.",
        shows="Nothing while biases are 0, or where there are fewer key heads (a shape error).",
        fix="Follow the names.", touches=(A + "query", A + "key", A + "query_normed", A + "key_normed", *TURNED),
    ),
    entry(
        "dtype-on-load", MODELS, (on_load(shifted_exponent),),
        what="Raw bits of one 16-bit format are taken for the other's: numbers are off by powers of two.",
        why="bfloat16 has 8 bits of exponent, float16 has 5.",
        shows="Everywhere; the right signs and digits.", fix="Read the dtype of the file's header.",
        seen="okoge-kaz/llm-recipes#6", touches=PROJECTED,
    ),
    entry(
        "weights-quantised", MODELS, (on_load(rounded_to_int8),),
        what="Weights go through 8 bits with one scale a matrix, though nobody asked for it.",
        why="That is another model.",
        shows="About 1 %.", fix="Say so, or do not.", touches=PROJECTED,
    ),
)  # fmt: skip


# --- losses and gradients ---------------------------------------------------------------------------------------------

NEXT = "reference_impl.nn.loss:next_token_loss"


def loss(rule: Callable[[Tensor, Tensor], Tensor]) -> tuple[Swap, ...]:
    return (Swap(NEXT, lambda original: rule),)


def unshifted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def shifted_twice(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-2].flatten(0, 1), labels[:, 2:].flatten())


def shifted_back(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten())


def mean_with_last(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over T − 1 tokens is divided by T."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) * (1 - 1 / labels.shape[1])


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of the rows' means."""
    rows = [F.cross_entropy(row[:-1], ids[1:]) for row, ids in zip(logits, labels, strict=True)]
    return torch.stack(rows).mean()


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)


def in_bits(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) / torch.tensor(2.0).log()


def zero_left_out(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0)


def detached(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda scores, mask: original(scores, mask).detach()


def loss_entry(identifier: str, rule: Callable[[Tensor, Tensor], Tensor], **text: Any) -> Mistake:
    return entry(identifier, DECODERS, loss(rule), killed_by=("golden.loss",), touches=(), **text)


def last_token_ignored(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=logits.shape[-1] - 1)


def head_stopped(model: Any) -> None:
    if model.config.tie_word_embeddings:
        weight, bias = model.lm_head.weight, model.lm_head.bias
        model.lm_head.forward = lambda x: F.linear(x, weight.detach(), bias)


_LOSSES = (
    loss_entry(
        "loss-not-shifted", unshifted,
        what="Logits at t are scored against the token at t.", why="They predict the token at t + 1.",
        shows="The loss only; training learns to copy.", fix="logits[:, :−1], labels[:, 1:].",
        seen="transformers#34191 (family)",
    ),
    loss_entry(
        "loss-shifted-twice", shifted_twice,
        what="The data loader shifts labels, and the model shifts them again.", why="Once.",
        shows="The loss only; training learns to predict the token after the next.", fix="One place that shifts.",
    ),
    loss_entry(
        "loss-shifted-backwards", shifted_back,
        what="Logits at t are scored against the token at t − 1.", why="t + 1.",
        shows="The loss only.", fix="logits[:, :−1], labels[:, 1:].",
    ),
    loss_entry(
        "loss-mean-over-all", mean_with_last,
        what="The sum over T − 1 tokens is divided by T.", why="T − 1 tokens are scored.",
        shows="A constant ratio (T − 1) / T.", fix="Divide by the number of scored tokens.",
        seen="OpenNMT-py#2209 (other denominators)",
    ),
    loss_entry(
        "loss-summed", summed,
        what="The sum over tokens, not their mean.", why="The mean is meant.", shows="A constant factor.",
        fix='reduction="mean".',
    ),
    loss_entry(
        "loss-label-smoothing", smoothed,
        what="Label smoothing of training stays on.", why="The reported loss is the plain one.",
        shows="A few percent.", fix="Smooth in training only, and report both.", seen="OpenNMT-py#2209",
    ),
    loss_entry(
        "loss-in-bits", in_bits,
        what="Bits for nats.", why="Natural logarithms.", shows="A constant ratio ln 2.", fix="Natural logarithms.",
    ),
    loss_entry(
        "loss-token-zero-ignored", zero_left_out,
        what="Token 0 is taken for padding and left out (ignore_index=0).", why="Token 0 is a token like any other.",
        shows="Only where token 0 is a label.", fix="ignore_index=−100.",
    ),
    loss_entry(
        "loss-mean-of-means", of_rows,
        what="The mean of the rows' means instead of the mean over tokens.",
        why="Short rows weigh too much.",
        shows="Only where rows have different numbers of scored tokens.", fix="Sum over all tokens, divide once.",
        seen="transformers#34191, transformers#24725, torchtune#1875",
        equivalent=dict.fromkeys(DECODERS, "the loss is claimed of rows of equal length only, whose mean of means is "
                                 "the mean; the contract has no way to leave tokens out"),
    ),
    entry(
        "gradient-attention-stopped", DECODERS, (Swap("reference_impl.nn.attention:attention_weights", detached),),
        what="No gradient flows through the attention weights (a kernel without a backward pass, a no_grad too many).",
        why="Queries and keys learn by them alone.",
        shows="The forward pass is right; gradients of q_proj and k_proj are 0.", fix="Leave them in the graph.",
        killed_by=("golden.gradients",), touches=(),
    ),
    Mistake(
        id="weights-half-misread",
        families=EVERY_MODEL,
        what="Bytes that the file calls F16 are read as bfloat16.",
        why="Both have two bytes, and other numbers.",
        shows="Only with checkpoints stored in float16.",
        fix="Read by the dtype that the header gives.",
        seen="common knowledge",
        swaps=(
            Swap(
                "reference_impl.stored_tensors:READABLE_DTYPES",
                lambda dtypes: {**dtypes, "F16": torch.bfloat16},
            ),
        ),
        killed_by=("round_trip.storage",),
    ),
    Mistake(
        id="loss-last-token-ignored",
        families=EVERY_MODEL,
        what="Labels that are the last id of the vocabulary do not count: it is taken for padding.",
        why="It is a token like any other.",
        shows="Only in the loss of texts that hold that id.",
        fix="Leave out what a mask, or −100, marks; never an id.",
        seen="common knowledge",
        swaps=(Swap("reference_impl.nn.loss:token_loss", instead(last_token_ignored)),),
        killed_by=("invariance.loss",),
    ),
    Mistake(
        id="gradient-tied-head-stopped",
        families=("llama", "mistral", "mixtral", "phi", "gpt", "gpt2", "gpt3"),
        what="The head uses a detached copy of the table: training moves the embedding by half of its gradient.",
        why="A tied table is used twice, and its gradient is the sum of both.",
        shows="Only in gradients, and only where head and embedding are tied.",
        fix="Use the parameter itself in both places.",
        seen="common knowledge",
        swaps=(on_model(head_stopped),),
        killed_by=("gradients.tied",),
    ),
)  # fmt: skip

MISTAKES = (*_CONFIG, *_WEIGHTS, *_LOSSES)
