"""Attention: heads, grouped keys and values, the scale, the softmax, joint projections."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.groups import DECODERS, GPTS, MODELS, OTHERS, TURNING
from conformance.mistakes.making import after, each, instead, on_load
from reference_impl.nn import attention as core

SPLIT = "reference_impl.nn.attention:split_heads"
MERGE = "reference_impl.nn.attention:merge_heads"
REPEAT = "reference_impl.nn.attention:repeat_key_value_heads"
SCALE = "reference_impl.nn.attention:score_scale"
SCORES = "reference_impl.nn.attention:attention_scores"
WEIGHTS = "reference_impl.nn.attention:attention_weights"
GROUPED = "reference_impl.nn.attention:GroupedQueryAttention.project"
PHI = "reference_impl.models.phi:PhiAttention.project"
JOINT = "reference_impl.nn.self_attention:SelfAttention.project"
PARTS = "reference_impl.nn.self_attention:split_query_key_value"

# What attends, as models and as components.
ALL = ("multi_head_attention", "sliding_window_attention", *MODELS)
PROJECTING = ("multi_head_attention", *MODELS)
RELATIVE = (*PROJECTING, "relative_attention", *OTHERS)
GROUPS = ("multi_head_attention", "sliding_window_attention", *TURNING)
FORWARD = ("component.outputs", "golden.logits")

A = "layers.N.attention."
PROJECTED = (A + "query", A + "key", A + "value", A + "query_normed", A + "key_normed", A + "distance_key")
SCORED = (A + "scores", A + "content_scores", A + "position_scores")
WEIGHED = (A + "weights",)
MIXED = (A + "context",)


# --- heads ------------------------------------------------------------------------------------------------------------


def viewed(x: Tensor, head_dim: int) -> Tensor:
    batch, seq, features = x.shape
    return x.reshape(batch, features // head_dim, seq, head_dim)


def heads_fastest(x: Tensor, head_dim: int) -> Tensor:
    cut: Tensor = x.unflatten(-1, (head_dim, -1))  # (B, T, Dh, H)
    return cut.permute(0, 3, 1, 2)


def merged_as_they_lie(x: Tensor) -> Tensor:
    batch, heads, seq, head_dim = x.shape
    return x.reshape(batch, seq, heads * head_dim)


def merged_heads_fastest(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(start_dim=2)  # (B, T, Dh · H)


_HEADS = (
    Mistake(
        id="heads-split-by-view",
        families=RELATIVE,
        what="Cuts heads by view(B, H, T, Dh) instead of view(B, T, H, Dh) and a transpose.",
        why="A head then holds features of several tokens.",
        shows="Large everywhere, and tokens see the future; nothing with one head or one token.",
        fix="x.view(B, T, H, Dh).transpose(1, 2).",
        seen="reczoo/FuxiCTR#30, 649453932/Chinese-Text-Classification-Pytorch#10",
        swaps=(Swap(SPLIT, instead(viewed)),),
        killed_by=FORWARD,
        touches=(*PROJECTED, A + "query_rotated", A + "key_rotated", *SCORED),
    ),
    Mistake(
        id="heads-merged-without-transpose",
        families=RELATIVE,
        what="Merges heads by reshaping (B, H, T, Dh) as it lies, without the transpose back.",
        why="The features of a token then come from several tokens.",
        shows="The context holds the right values in other places; large, and leaks the future.",
        fix="x.transpose(1, 2).reshape(B, T, H · Dh).",
        seen="common knowledge",
        swaps=(Swap(MERGE, instead(merged_as_they_lie)),),
        killed_by=FORWARD,
        touches=(*MIXED, A + "output"),
    ),
    Mistake(
        id="heads-fastest",
        families=RELATIVE,
        what="Reads features as (Dh, H), the head's number running fastest, where they are (H, Dh).",
        why="A head is Dh neighbouring features.",
        shows="Every head mixes all heads: scores are wrong everywhere; nothing with one head.",
        fix="features → (H, Dh).",
        seen="common knowledge",
        swaps=(Swap(SPLIT, instead(heads_fastest)),),
        killed_by=FORWARD,
        touches=(*PROJECTED, A + "query_rotated", A + "key_rotated", *SCORED),
    ),
    Mistake(
        id="heads-merged-fastest",
        families=RELATIVE,
        what="Merges heads with the head's number running fastest.",
        why="The rows of the output projection expect heads side by side.",
        shows="The context holds each token's values in another order; the output is wrong everywhere.",
        fix="(H, Dh) → features.",
        seen="common knowledge",
        swaps=(Swap(MERGE, instead(merged_heads_fastest)),),
        killed_by=FORWARD,
        touches=(*MIXED, A + "output"),
    ),
)


# --- grouped keys and values ------------------------------------------------------------------------------------------


def heads_of(index: Callable[[int, int, int], int]) -> Callable[..., Tensor]:
    """Query head h reads key-value head index(h, H, KV)."""

    def repeat_key_value_heads(x: Tensor, num_attention_heads: int) -> Tensor:
        kv = x.shape[1]
        return x[:, [index(head, num_attention_heads, kv) for head in range(num_attention_heads)]]

    return repeat_key_value_heads


def repeated_in_time(x: Tensor, num_attention_heads: int) -> Tensor:
    batch, kv, keys, head_dim = x.shape
    groups = num_attention_heads // kv
    return x.repeat_interleave(groups, dim=2).reshape(batch, num_attention_heads, keys, head_dim)


_GROUPS = (
    Mistake(
        id="gqa-tile",
        families=GROUPS,
        what="Tiles the key-value heads, 0 1 0 1, instead of repeating each, 0 0 1 1.",
        why="Neighbouring query heads share a key-value head.",
        shows="Nothing at KV = 1 and KV = H; otherwise large.",
        fix="repeat_interleave(H / KV, dim=heads), or query head h reads h // (H / KV).",
        seen="onnx/onnx#7274, ekzhang/jax-js#180, apple/axlearn#842, microsoft/onnxscript#2408",
        swaps=(Swap(REPEAT, instead(heads_of(lambda h, heads, kv: h % kv))),),
        killed_by=FORWARD,
        touches=SCORED,
    ),
    Mistake(
        id="gqa-kv-index",
        families=GROUPS,
        what="Query head h reads key-value head h // KV, the last one beyond it, instead of h // (H / KV).",
        why="The quotient must be the size of a group, not the number of groups.",
        shows="Right by luck whenever H / KV = KV (4/2, 9/3, 64/8); out of range in memory, or silent, elsewhere.",
        fix="h // (H / KV); test with H / KV ≠ KV.",
        seen="PSAL-POSTECH/ONNXim#34",
        swaps=(Swap(REPEAT, instead(heads_of(lambda h, heads, kv: min(h // kv, kv - 1)))),),
        killed_by=FORWARD,
        touches=SCORED,
    ),
    Mistake(
        id="gqa-kv-index-wrapped",
        families=tuple(family for family in GROUPS if family != "llama"),  # whose cases have nothing to wrap
        what="Query head h reads key-value head (h // KV) mod KV: the wrong quotient, brought back into range.",
        why="The quotient must be the size of a group, not the number of groups.",
        shows="Right by luck whenever H / KV = KV (4/2, 9/3, 64/8); large elsewhere.",
        fix="h // (H / KV); test with H / KV ≠ KV.",
        seen="PSAL-POSTECH/ONNXim#34",
        swaps=(Swap(REPEAT, instead(heads_of(lambda h, heads, kv: h // kv % kv))),),
        killed_by=FORWARD,
        touches=SCORED,
    ),
    Mistake(
        id="gqa-repeat-wrong-axis",
        families=GROUPS,
        what="Repeats along time instead of along heads, and reshapes.",
        why="Keys of one head end up in several, at other times.",
        shows="Nothing at KV = H; otherwise large, and the future leaks.",
        fix="repeat_interleave on the axis of heads.",
        seen="PrimeIntellect-ai/prime-rl#2681",
        swaps=(Swap(REPEAT, instead(repeated_in_time)),),
        killed_by=FORWARD,
        touches=SCORED,
    ),
    Mistake(
        id="gqa-first-head-for-all",
        families=GROUPS,
        what="All query heads read the first key-value head, as a kernel for multi-query attention does.",
        why="There are several.",
        shows="Nothing at KV = 1; the first group is right.",
        fix="Give each group its own head.",
        seen="common knowledge",
        swaps=(Swap(REPEAT, instead(heads_of(lambda h, heads, kv: 0))),),
        killed_by=FORWARD,
        touches=SCORED,
    ),
)


# --- scale and softmax ------------------------------------------------------------------------------------------------


def rescaled(factor: Callable[[Tensor], float]) -> Callable[..., Any]:
    """A scale that is wrong by a factor, which depends on the query (B, H, T, Dh)."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attention_scores(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
            right = core.score_scale(query.shape[-1]) if scale is None else scale
            return original(query, key, right * factor(query))

        return attention_scores

    return make


def softmax(
    prepare: Callable[[Tensor, Tensor], Tensor], dim: int = -1, hide: bool = True
) -> Callable[[Tensor, Tensor], Tensor]:
    """Weights from prepare(scores, mask); `hide`: weights of hidden keys are set to 0 afterwards."""

    def attention_weights(scores: Tensor, mask: Tensor) -> Tensor:
        weights = torch.softmax(prepare(scores.to(torch.promote_types(scores.dtype, torch.float32)), mask), dim=dim)
        return (weights.masked_fill(~mask, 0.0) if hide else weights).to(scores.dtype)

    return attention_weights


def lowest(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


def in_own_dtype(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(lowest(scores, mask), dim=-1).masked_fill(~mask, 0.0)


def without_maximum(scores: Tensor, mask: Tensor) -> Tensor:
    exponentials = scores.exp().masked_fill(~mask, 0.0)
    total = exponentials.sum(dim=-1, keepdim=True)
    return exponentials / total.masked_fill(total == 0, 1.0)


def dropped(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda scores, mask: F.dropout(original(scores, mask), p=0.1, training=True)


def one_by_one_scale(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def attention_scores(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
        return original(query, key, scale if query.shape[-2] > 1 else 1.0)

    return attention_scores


_SOFTMAX = (
    Mistake(
        id="attn-scale-missing",
        families=(*ALL, "relative_attention", "transformer_xl"),
        what="Scores are not divided by √Dh.",
        why="The softmax becomes too sharp.",
        shows="2e-3 in a default-initialised tiny model, where scores are near 0; large at real scale.",
        fix="q · k / √Dh.",
        seen="esceptico/perceiver-io#9, Megatron-LM#848",
        swaps=(Swap(SCALE, instead(lambda head_dim: 1.0)),),
        killed_by=FORWARD,
        touches=SCORED,
    ),
    Mistake(
        id="attn-scale-twice",
        families=(*ALL, "relative_attention", "transformer_xl"),
        what="Scales by 1 / Dh: once on the query and once on the scores, or Dh in place of its root.",
        why="The softmax becomes too flat.",
        shows="2e-3 in a default-initialised tiny model; large at real scale.",
        fix="Scale once, by Dh^(−1/2).",
        seen="Megatron-LM#848, esceptico/perceiver-io#9",
        swaps=(Swap(SCALE, instead(lambda head_dim: 1 / head_dim)),),
        killed_by=FORWARD,
        touches=SCORED,
    ),
    Mistake(
        id="attn-scale-inverted",
        families=(*ALL, "relative_attention", "transformer_xl"),
        what="Multiplies by √Dh: divides by Dh^(−1/2).",
        why="The softmax becomes nearly a maximum.",
        shows="Large at real scale.",
        fix="Multiply by Dh^(−1/2).",
        seen="esceptico/perceiver-io#9",
        swaps=(Swap(SCALE, instead(lambda head_dim: head_dim**0.5)),),
        killed_by=FORWARD,
        touches=SCORED,
    ),
    Mistake(
        id="attn-scale-nheads",
        families=ALL,
        what="Scales by 1 / √n_heads.",
        why="The variance of a score grows with the width of a head.",
        shows="Nothing when n_heads = head_dim; often the greedy token stays right and only its margin is wrong.",
        fix="1 / √head_dim; test with n_heads ≠ head_dim.",
        seen="tenstorrent/tt-metal#56789",
        swaps=(Swap(SCORES, rescaled(lambda query: (query.shape[-1] / query.shape[1]) ** 0.5)),),
        killed_by=FORWARD,
        touches=SCORED,
    ),
    Mistake(
        id="attn-scale-hidden",
        families=ALL,
        what="Scales by 1 / √d_model, the width of all heads together.",
        why="d_k in the paper is the width of one head.",
        shows="Nothing with one head; otherwise the weights are too even.",
        fix="1 / √head_dim.",
        seen="common knowledge",
        swaps=(Swap(SCORES, rescaled(lambda query: query.shape[1] ** -0.5)),),
        killed_by=FORWARD,
        touches=SCORED,
    ),
    Mistake(
        id="attn-scale-missing-at-decode",
        families=MODELS,
        what="The path for a single token (a decoding kernel) leaves the scale out.",
        why="Pre-fill and decoding must compute the same.",
        shows="The full forward is right; every decoded token is wrong.",
        fix="One scale for both paths; compare decoding with the full forward.",
        seen="common knowledge",
        swaps=(Swap(SCORES, one_by_one_scale),),
        killed_by=("cache.prefill_decode", "cache.one_by_one"),
        touches=(*SCORED, *MIXED),  # over a rolling buffer the scores are in the order of slots
    ),
    Mistake(
        id="attn-softmax-over-queries",
        families=(*ALL, "relative_attention", *OTHERS),
        what="Softmax over the queries instead of over the keys.",
        why="A query's weights must sum to 1.",
        shows="Large; sums of weights differ from 1, and depend on later tokens.",
        fix="softmax(dim=-1) of (…, queries, keys).",
        seen="common knowledge",
        swaps=(Swap(WEIGHTS, instead(softmax(lowest, dim=-2))),),
        killed_by=FORWARD,
        touches=WEIGHED,
    ),
    Mistake(
        id="attn-softmax-over-heads",
        families=(*ALL, "relative_attention", *OTHERS),
        what="Softmax over the heads.",
        why="A query's weights must sum to 1 over its keys, in every head.",
        shows="Large; with one head all weights are 1.",
        fix="softmax(dim=-1).",
        seen="common knowledge",
        swaps=(Swap(WEIGHTS, instead(softmax(lowest, dim=1))),),
        killed_by=FORWARD,
        touches=WEIGHED,
    ),
    Mistake(
        id="attn-mask-after-softmax",
        families=(*ALL, "relative_attention", *OTHERS),
        what="Sets weights of hidden keys to 0 after the softmax and does not normalise again.",
        why="What hidden keys took is missing: a query's weights sum to less than 1, and depend on the future.",
        shows="Everywhere but in the last row; sums of weights below 1.",
        fix="Mask the scores, before the softmax.",
        seen="common knowledge",
        swaps=(Swap(WEIGHTS, instead(softmax(lambda scores, mask: scores))),),
        killed_by=FORWARD,
        touches=WEIGHED,
    ),
    Mistake(
        id="attn-softmax-not-upcast",
        families=("multi_head_attention", *MODELS),
        what="Computes the softmax in bfloat16 or float16.",
        why="A sum of many small weights loses digits, unless the kernel accumulates in float32 on its own, as "
        "torch's does.",
        shows="Nothing in float32; through torch's kernels not in low precision either.",
        fix="Softmax in float32.",
        seen="transformers#28163, stanford-crfm/mistral#66, transformers#30199",
        swaps=(Swap(WEIGHTS, instead(in_own_dtype)),),
        killed_by=FORWARD,
        touches=WEIGHED,
        precision="in float32 and float64 there is nothing to upcast",
        equivalent=dict.fromkeys(
            ("multi_head_attention", *MODELS),
            "policy: torch's softmax accumulates in float32 whatever it is given, and rounds its result once, as the "
            "oracle's does",
        ),
    ),
    Mistake(
        id="attn-softmax-without-maximum",
        families=("multi_head_attention", *MODELS),
        what="exp(score) / Σ exp(score), without taking the row's maximum off first.",
        why="exp overflows: beyond 11 in float16, 88 in float32 and bfloat16, 709 in float64.",
        shows="NaN or infinity, only where scores are large (Phi-2's are).",
        fix="Subtract the maximum of the row, or use torch.softmax.",
        seen="mlc-ai/mlc-llm#1870 (overflow with Phi-2), common knowledge",
        swaps=(Swap(WEIGHTS, instead(without_maximum)),),
        killed_by=FORWARD,
        touches=WEIGHED,
        precision="in float64 it overflows beyond scores of 709 only",
    ),
    Mistake(
        id="attn-dropout-in-eval",
        families=(*ALL, *OTHERS),
        what="Drops attention weights at evaluation too: dropout_p is passed to the functional call without asking "
        "whether the model trains.",
        why="Evaluation is deterministic.",
        shows="Nothing at p = 0, the default of most small tests; otherwise two calls differ.",
        fix="dropout_p if self.training else 0.0; test with p > 0 in the config.",
        seen="pytorch#124464, meta-pytorch/torchtune#1803, timm#1978, wenet#2699",
        swaps=(Swap(WEIGHTS, dropped),),
        killed_by=FORWARD,
        touches=(*WEIGHED, *MIXED),
    ),
)


# --- projections ------------------------------------------------------------------------------------------------------


def reordered(*order: int) -> Callable[..., Any]:
    return after(lambda parts: tuple(parts[place] for place in order))


def reread(arrange: Callable[[Tensor, int], Tensor]) -> Swap:
    """Columns of a joint projection as they are when the file's order is taken for arrange(columns, heads)."""

    def change(name: str, tensor: Tensor, config: Any) -> Tensor | None:
        if ".attn.c_attn." not in name:
            return None
        return tensor[..., arrange(torch.arange(tensor.shape[-1]), config.n_head)]

    return on_load(change)


def by_head(columns: Tensor, heads: int) -> Tensor:
    """Columns that lie head by head, q k v of each, gathered into three blocks."""
    return columns.view(heads, 3, -1).transpose(0, 1).flatten()


def innermost(columns: Tensor, heads: int) -> Tensor:
    """Columns that lie q k v of each feature, gathered into three blocks."""
    return columns.view(-1, 3).T.flatten()


def raw_kept(attention: str) -> Callable[..., Any]:
    """The block leaves its input with its attention."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            getattr(self, attention).block_input = x
            return original(self, x, *args, **kwargs)

        return forward

    return make


def query_alone_normed(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inputs = {self.q_proj: x, self.k_proj: self.block_input, self.v_proj: self.block_input}
    query, key, value = (core.split_heads(proj(read), self.head_dim) for proj, read in inputs.items())
    return norm(self, "q_layernorm", query), norm(self, "k_layernorm", key), value


def norm(attention: Any, name: str, heads: Tensor) -> Tensor:
    normed: Tensor = getattr(attention, name)(heads) if hasattr(attention, name) else heads
    return normed


def query_third_alone_normed(original: Callable[..., Any]) -> Callable[..., Any]:
    def project(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, key, value = original(self, self.block_input)
        return original(self, x)[0], key, value

    return project


def bias_dropped(*endings: str) -> Swap:
    """Parameters with these endings are 0, as if they were not added."""
    return on_load(lambda name, tensor, config: torch.zeros_like(tensor) if name.endswith(endings) else None)


def joint_bias_dropped(part: int) -> Swap:
    def change(name: str, tensor: Tensor, config: Any) -> Tensor | None:
        if not name.endswith(".attn.c_attn.bias"):
            return None
        parts = list(tensor.chunk(3))
        parts[part] = torch.zeros_like(parts[part])
        return torch.cat(parts)

    return on_load(change)


def component_without(*arguments: str) -> Swap:
    """multi_head_attention without some biases."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def multi_head_attention(
            query: Any, key: Any, value: Any, q_proj_weight: Any, q_proj_bias: Any, k_proj_weight: Any,
            k_proj_bias: Any, v_proj_weight: Any, v_proj_bias: Any, out_proj_weight: Any, out_proj_bias: Any,
            num_attention_heads: int, causal: bool, attention_mask: Any = None,
        ) -> Any:  # fmt: skip
            biases = {"q_proj_bias": q_proj_bias, "k_proj_bias": k_proj_bias, "v_proj_bias": v_proj_bias,
                      "out_proj_bias": out_proj_bias}  # fmt: skip
            biases = {n: torch.zeros_like(b) if n in arguments else b for n, b in biases.items()}
            return original(
                query=query, key=key, value=value, q_proj_weight=q_proj_weight, k_proj_weight=k_proj_weight,
                v_proj_weight=v_proj_weight, out_proj_weight=out_proj_weight, num_attention_heads=num_attention_heads,
                causal=causal, attention_mask=attention_mask, **biases,
            )  # fmt: skip

        return multi_head_attention

    return Swap("reference_impl.nn.multi_head_attention:multi_head_attention", make)


# Families whose attention has biases in some case.
BIASED = ("multi_head_attention", "transformer", *GPTS, "llama", "phi")
ROW_CONSTANT = (
    "a bias on the key adds q · b to all scores of a query alike, which softmax ignores; only rotary positions, which "
    "turn it, make it visible"
)

_PROJECTIONS = (
    Mistake(
        id="qkv-k-v-swapped",
        families=DECODERS,
        what="Takes the projection of the value for the key's, and the reverse.",
        why="Checkpoints store query, key, value.",
        shows="Large everywhere.",
        fix="Query, key, value.",
        seen="tenstorrent/tt-mlir#8958",
        swaps=(*each((GROUPED, PHI), reordered(0, 2, 1)), Swap(PARTS, reordered(0, 2, 1))),
        killed_by=FORWARD,
        touches=(*PROJECTED, *SCORED, A + "key_rotated"),
    ),
    Mistake(
        id="qkv-q-k-swapped",
        families=GPTS,
        what="Takes the projection of the key for the query's, and the reverse.",
        why="Checkpoints store query, key, value.",
        shows="Scores are transposed: 2e-3 in a default-initialised tiny model, large at real scale.",
        fix="Query, key, value.",
        seen="tenstorrent/tt-mlir#8958",
        swaps=(Swap(PARTS, reordered(1, 0, 2)),),
        killed_by=("golden.logits",),
        touches=(*PROJECTED, *SCORED, *WEIGHED),
    ),
    Mistake(
        id="qkv-fused-per-head",
        families=GPTS,
        what="Reads the joint projection head by head (q k v of head 0, then of head 1), as GPT-NeoX stores it.",
        why="GPT-2's lies in three blocks.",
        shows="Shapes agree and text stays fluent nonsense; nothing with one head.",
        fix="Three blocks; test both layouts against models that have them.",
        seen="lablup/mlxcel#928, NeMo-RL#2802, epfLLM/Megatron-LLM#45, tenstorrent/tt-metal#41731",
        swaps=(reread(by_head),),
        killed_by=("golden.logits",),
        touches=(*PROJECTED, *SCORED),
    ),
    Mistake(
        id="qkv-fused-innermost",
        families=GPTS,
        what="Reads the joint projection as (features, 3): query, key and value of each feature side by side.",
        why="GPT-2's lies in three blocks.",
        shows="Shapes agree; wrong everywhere.",
        fix="chunk(3, dim=-1).",
        seen="common knowledge",
        swaps=(reread(innermost),),
        killed_by=("golden.logits",),
        touches=(*PROJECTED, *SCORED),
    ),
    Mistake(
        id="prenorm-only-query-normed",
        families=("gpt2", "gpt3", *TURNING),
        what="The norm before attention is applied to the query's input; keys and values read the raw stream.",
        why="All three read the normalised input.",
        shows="Wrong everywhere; a wrapper that norms its first argument only does this.",
        fix="q, k, v from one normalised x.",
        seen="facebookresearch/xformers#233",
        swaps=(
            *each((GROUPED, PHI), instead(query_alone_normed)),
            Swap(JOINT, query_third_alone_normed),
            Swap("reference_impl.models.gpt2:GPT2Block.forward", raw_kept("attn")),
            Swap("reference_impl.models.gpt3:GPT3Block.forward", raw_kept("attn")),
            Swap("reference_impl.models.llama:LlamaDecoderLayer.forward", raw_kept("self_attn")),
            Swap("reference_impl.models.mistral:MistralDecoderLayer.forward", raw_kept("self_attn")),
            Swap("reference_impl.models.mixtral:MixtralDecoderLayer.forward", raw_kept("self_attn")),
            Swap("reference_impl.models.phi:PhiDecoderLayer.forward", raw_kept("self_attn")),
        ),
        killed_by=("golden.logits",),
        touches=(*PROJECTED, *SCORED),
    ),
    Mistake(
        id="attn-query-bias-dropped",
        families=BIASED,
        what="The bias of the query projection is in the file and is not added.",
        why="It is part of the model.",
        shows="Exactly nothing while biases are 0, as they are at initialisation.",
        fix="Add it; test with random biases, and that every tensor of a file has an effect.",
        seen="vllm#46835 (the same pattern in a loader), common knowledge",
        swaps=(bias_dropped(".q_proj.bias"), joint_bias_dropped(0), component_without("q_proj_bias")),
        killed_by=FORWARD,
        touches=PROJECTED,
    ),
    Mistake(
        id="attn-key-bias-dropped",
        families=BIASED,
        what="The bias of the key projection is in the file and is not added.",
        why="With rotary positions it is turned, and its share of a score depends on the distance.",
        shows="With rotary positions 0.9 at real scale; without them no output can show it.",
        fix="Add it.",
        seen="vllm#46835 (the same pattern in a loader), common knowledge",
        swaps=(bias_dropped(".k_proj.bias"), joint_bias_dropped(1), component_without("k_proj_bias")),
        killed_by=("component.outputs", "golden.logits", "golden.gradients"),
        touches=PROJECTED,
        equivalent=dict.fromkeys(("transformer", *GPTS), ROW_CONSTANT),
    ),
    Mistake(
        id="attn-value-bias-dropped",
        families=BIASED,
        what="The bias of the value projection is in the file and is not added.",
        why="It is part of the model; after the output projection it is a constant vector at every position.",
        shows="Exactly nothing while biases are 0; otherwise one error vector at all positions.",
        fix="Add it.",
        seen="vllm#46835 (the same pattern in a loader), common knowledge",
        swaps=(bias_dropped(".v_proj.bias"), joint_bias_dropped(2), component_without("v_proj_bias")),
        killed_by=FORWARD,
        touches=(*PROJECTED, *MIXED),
    ),
    Mistake(
        id="attn-output-bias-dropped",
        families=BIASED,
        what="The bias of the output projection is in the file and is not added.",
        why="It is part of the model.",
        shows="Exactly nothing while biases are 0; otherwise one error vector at all positions.",
        fix="Add it.",
        seen="vllm#46835 (the same pattern in a loader), common knowledge",
        swaps=(
            bias_dropped(".o_proj.bias", ".out_proj.bias", ".attn.c_proj.bias", ".dense.bias"),
            component_without("out_proj_bias"),
        ),
        killed_by=FORWARD,
        touches=(A + "output",),
    ),
)


# --- options of GPT-2, norms of Phi -----------------------------------------------------------------------------------


def layer_scale(change: Callable[[Any, int, Callable[..., float]], float]) -> Swap:
    return Swap("reference_impl.models.gpt2:score_scale", lambda original: lambda c, n: change(c, n, original))


def without(field: str, value: Any) -> Callable[..., float]:
    from dataclasses import replace

    return lambda config, layer, original: original(replace(config, **{field: value}), layer)


def normed_after_turning(original: Callable[..., Any]) -> Callable[..., Any]:
    def turn(self: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        query, key = original(self, query, key, cos, sin)
        return self.query_rotated(self.q_layernorm(query)), self.key_rotated(self.k_layernorm(key))

    return turn


def not_normed(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(core.split_heads(proj(x), self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))


def one_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    def project(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, _, value = original(self, x)
        return query, self.q_layernorm(core.split_heads(self.k_proj(x), self.head_dim)), value

    return project


NORMED = (A + "query_normed", A + "key_normed", A + "query_rotated", A + "key_rotated")

_OPTIONS = (
    Mistake(
        id="attn-layer-scale-ignored",
        families=("gpt2",),
        what="Ignores scale_attn_by_inverse_layer_idx: scores of block n are not divided by n + 1.",
        why="Models trained with it (stanford-crfm/mistral) need it.",
        shows="Only with the option; block 0 is right, the error grows with depth.",
        fix="scale / (layer + 1).",
        seen="transformers#13573, mlc-ai/mlc-llm#1389",
        swaps=(layer_scale(without("scale_attn_by_inverse_layer_idx", False)),),
        killed_by=("golden.logits",),
        touches=SCORED,
    ),
    Mistake(
        id="attn-layer-scale-from-zero",
        families=("gpt2",),
        what="Divides the scores of block n by n (at least 1) instead of n + 1.",
        why="The option counts layers from 1.",
        shows="Only with the option; block 0 is right.",
        fix="layer + 1 for layers counted from 0.",
        seen="transformers#13573",
        swaps=(
            layer_scale(
                lambda c, n, original: (
                    original(c, max(n - 1, 0)) if c.scale_attn_by_inverse_layer_idx else original(c, n)
                )
            ),
        ),
        killed_by=("golden.logits",),
        touches=SCORED,
    ),
    Mistake(
        id="attn-scale-switch-ignored",
        families=("gpt2",),
        what="Ignores scale_attn_weights=false and scales by 1/√Dh all the same.",
        why="The config says that scores are used as they are.",
        shows="Only in models with the switch off.",
        fix="Read scale_attn_weights.",
        seen="common knowledge",
        swaps=(layer_scale(without("scale_attn_weights", True)),),
        killed_by=("golden.logits",),
        touches=(*SCORED, *WEIGHED),
    ),
    Mistake(
        id="qk-norm-ignored",
        families=("phi",),
        what="Ignores qk_layernorm: queries and keys are not normalised.",
        why="The norms are in the file, with weights.",
        shows="Only with the option.",
        fix="LayerNorm on every head of q and k, before they are turned.",
        seen="common knowledge",
        swaps=(Swap(PHI, instead(not_normed)),),
        killed_by=("golden.logits",),
        touches=NORMED,
    ),
    Mistake(
        id="qk-norm-after-rotary",
        families=("phi",),
        what="Normalises queries and keys after they were turned.",
        why="Centring and the elementwise weight do not commute with a rotation.",
        shows="Only with the option; position 0 is right.",
        fix="Norm first, then turn.",
        seen="common knowledge",
        swaps=(
            Swap(PHI, instead(not_normed)),
            Swap("reference_impl.models.phi:PhiAttention.turn", normed_after_turning),
        ),
        killed_by=("golden.logits",),
        touches=NORMED,
    ),
    Mistake(
        id="qk-norm-shared",
        families=("phi",),
        what="Uses the query's norm for the keys as well.",
        why="Each has weights of its own.",
        shows="Only with the option, and only once the two norms differ.",
        fix="q_layernorm and k_layernorm.",
        seen="common knowledge",
        swaps=(Swap(PHI, one_norm),),
        killed_by=("golden.logits",),
        touches=NORMED,
    ),
    Mistake(
        id="attn-layer-scale-stops",
        families=("gpt2",),
        what="scale_attn_by_inverse_layer_idx divides by 1 in the first block and by 2 in all others.",
        why="Block n divides by n + 1.",
        shows="Only with that switch, and only from the third block on.",
        fix="Divide by the number of the block, counted from 1.",
        seen="common knowledge",
        swaps=(
            Swap(
                "reference_impl.models.gpt2:score_scale",
                lambda right: lambda config, layer: right(config, min(layer, 1)),
            ),
        ),
        killed_by=("invariance.layer_scale",),
        touches=("layers.N.attention.scores",),
    ),
)

MISTAKES = (*_HEADS, *_GROUPS, *_SOFTMAX, *_PROJECTIONS, *_OPTIONS)
