"""Switch Transformer: T5's blocks and position bias, and the Switch layer in a model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.making import instead, on_load, on_model

BIAS = "reference_impl.nn.relative_bias:"
T5 = "reference_impl.nn.t5:"
MODEL = "reference_impl.models.switch_transformer:"
SWITCH = "reference_impl.nn.switch:"
A, L, F_ = "layers.N.attention.", "layers.N.", "layers.N.feed_forward."
SCORES = (A + "scores", A + "weights")
STREAM = (A + "residual", L + "output", F_ + "norm", A + "norm", F_ + "residual")
ROUTED = (F_ + "router_logits", F_ + "routing_weights", F_ + "expert_outputs", F_ + "output")


def entry(identifier: str, *swaps: Swap, **text: Any) -> Mistake:
    more = {"seen": "common knowledge", "killed_by": ("golden.logits",), "touches": SCORES} | text
    return Mistake(id=identifier, families=("switch_transformer",), swaps=swaps, **more)


# --- position bias ----------------------------------------------------------------------------------------------------


def positions(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Swap:
    """The bias of other positions: change(queries', keys')."""

    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def relative_position_bias(
            table: Tensor, query: Tensor, key: Tensor, max_distance: int, bidirectional: bool
        ) -> Tensor:
            return original(table, *change(query, key), max_distance, bidirectional)

        return relative_position_bias

    return Swap(BIAS + "relative_position_bias", make)


def both_ways(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda relative, num_buckets, max_distance, bidirectional: original(
        relative, num_buckets, max_distance, True
    )


def one_way(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda relative, num_buckets, max_distance, bidirectional: original(
        relative, num_buckets, max_distance, False
    )


def all_linear(num_buckets: int, max_distance: int) -> list[int]:
    return list(range(num_buckets))


def every_distance(value: int) -> Callable[..., Any]:
    return lambda original: lambda num_buckets, max_distance: original(num_buckets, value)


def zero_bias(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, **more: torch.zeros_like(original(*arguments, **more))


def first_block_alone(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Blocks without a table get no bias."""

    def forward(self: Any, x: Tensor, mask: Tensor, bias: Any = None, memory: Any = None, cache: Any = None) -> Tensor:
        own = bias if hasattr(self, "relative_attention_bias") or bias is None else torch.zeros_like(bias)
        return original(self, x, mask, own, memory, cache)

    return forward


def scaled(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, *arguments: Any) -> Tensor:
        kept, self.scale = self.scale, self.head_dim**-0.5
        try:
            return original(self, *arguments)
        finally:
            self.scale = kept

    return forward


def offset_forgotten(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """While decoding, the queries stand at the beginning."""

    def position_bias(self: Any, real: Tensor, num_queries: int) -> Tensor:
        whole = original(self, real, real.shape[1])
        return whole[:, :, :num_queries]

    return position_bias


_BIAS = (
    entry(
        "t5-scores-scaled", Swap(T5 + "T5Attention.forward", scaled),
        what="Scores are divided by √Dh.", why="T5 folds that into the initialisation of q.", shows="Everywhere.",
        fix="No scale.",
    ),
    entry(
        "t5-bias-missing", Swap(BIAS + "relative_position_bias", zero_bias),
        what="No position bias is added.", why="T5 has no other positions.", shows="Everywhere.",
        fix="Add it to the scores.",
    ),
    entry(
        "t5-bias-first-block-only", Swap(T5 + "T5Attention.forward", first_block_alone),
        what="Only the block that holds the table adds a bias.", why="The first block's bias serves all blocks.",
        shows="From the second block on.", fix="Hand it on.",
    ),
    entry(
        "t5-bias-sign", positions(lambda query, key: (-query, -key)),
        what="Query minus key, for key minus query.", why="Buckets of the past and of the future change places.",
        shows="Everywhere but on the diagonal.", fix="key − query.",
    ),
    entry(
        "t5-buckets-both-ways", Swap(BIAS + "buckets", both_ways),
        what="The decoder halves the buckets, as the encoder does.", why="It looks back only: all are for the past.",
        shows="At distances where the halves differ.", fix="bidirectional=False in the decoder.",
    ),
    entry(
        "t5-buckets-one-way", Swap(BIAS + "buckets", one_way),
        what="The encoder uses all buckets for the past, and bucket 0 for the future.", why="It halves them.",
        shows="In the encoder.", fix="bidirectional=True in the encoder.",
    ),
    entry(
        "t5-buckets-linear", Swap(BIAS + "bucket_starts", instead(all_linear)),
        what="Every distance has a bucket of its own, up to the last.", why="From the middle on their ranges grow.",
        shows="Only at distances beyond half the buckets.", fix="Logarithmic buckets.",
    ),
    entry(
        "t5-max-distance-default", Swap(BIAS + "bucket_starts", every_distance(128)),
        what="The largest distance is 128, whatever the config says.",
        why="relative_attention_max_distance is a field.",
        shows="Only where it is another, at far distances.", fix="Read it.",
    ),
    entry(
        "t5-bias-cache-offset", Swap(T5 + "Stack.position_bias", offset_forgotten),
        what="While decoding, the bias is that of the first rows.", why="The query stands behind the cached keys.",
        shows="Only from the second call on.", fix="The last T rows.", seen="ml-explore/mlx-lm#93 (learned positions)",
        killed_by=("cache.prefill_decode", "cache.one_by_one", "cache.chunks"),
    ),
)  # fmt: skip


# --- blocks and head --------------------------------------------------------------------------------------------------


def post_norm(self: Any, x: Tensor, *more: Any) -> Tensor:
    return self.layer_norm(x + self.get_submodule(self._name)(x, *more))  # type: ignore[no-any-return]


def skip_from_normed(self: Any, x: Tensor, *more: Any) -> Tensor:
    n = self.layer_norm(x)
    return n + self.get_submodule(self._name)(n, *more)  # type: ignore[no-any-return]


def without_skip(self: Any, x: Tensor, *more: Any) -> Tensor:
    return self.get_submodule(self._name)(self.layer_norm(x), *more)  # type: ignore[no-any-return]


def head_not_scaled(model: Any) -> None:
    if model.config.tie_word_embeddings:
        model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * args[0].shape[-1] ** 0.5,))


def final_norms_dropped(model: Any) -> None:
    model.encoder.final_layer_norm, model.decoder.final_layer_norm = nn.Identity(), nn.Identity()


def final_norms_crossed(model: Any) -> None:
    one, other = model.encoder.final_layer_norm, model.decoder.final_layer_norm
    one.weight.data, other.weight.data = other.weight.data, one.weight.data


def embeddings_scaled(model: Any) -> None:
    model.shared.register_forward_hook(lambda module, args, out: out * out.shape[-1] ** 0.5)


def causal_encoder(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, input_ids: Tensor, real: Tensor, *more: Any) -> Tensor:
        kept, self.is_decoder = self.is_decoder, True
        try:
            return original(self, input_ids, real, *more)
        finally:
            self.is_decoder = kept

    return forward


_BLOCKS = (
    entry(
        "t5-post-norm", Swap(T5 + "Sublayer.forward", instead(post_norm)),
        what="LN(x + f(x)), the order of 2017.", why="T5 is pre-norm.", shows="Everywhere.", fix="x + f(LN(x)).",
        seen="karpathy/minGPT#52 (in GPT)", touches=(*STREAM, A + "query", A + "key", A + "value"),
    ),
    entry(
        "t5-skip-from-normed", Swap(T5 + "Sublayer.forward", instead(skip_from_normed)),
        what="The skip path carries the normalised value.", why="It carries the stream.", shows="Everywhere.",
        fix="x + f(LN(x)).", seen="pytorch#61165", touches=STREAM,
    ),
    entry(
        "t5-skip-missing", Swap(T5 + "Sublayer.forward", instead(without_skip)),
        what="No residual connection.", why="Each layer adds to the stream.", shows="Everywhere.", fix="Add x.",
        touches=STREAM,
    ),
    entry(
        "t5-head-not-scaled", on_model(head_not_scaled),
        what="A tied head's input is not multiplied by d_model^(−1/2).",
        why="T5's code does it, where the head is tied.",
        shows="A constant ratio √d of all logits; no greedy token shows it.", fix="hidden · d_model^(−1/2) if tied.",
        touches=("logits", "final_norm"),
    ),
    entry(
        "t5-embeddings-scaled", on_model(embeddings_scaled),
        what="Embeddings are multiplied by √d_model.", why="The Transformer of 2017 does, T5 does not.",
        shows="Everywhere.", fix="No factor.", touches=("embedding", *STREAM),
    ),
    entry(
        "t5-final-norm-missing", on_model(final_norms_dropped),
        what="The norms at the end of encoder and decoder are missing.", why="A pre-norm stream needs them.",
        shows="Everywhere.", fix="final_layer_norm.", seen="pytorch#55270",
        touches=("final_norm", "logits", A + "key", A + "value", *SCORES),
    ),
    entry(
        "t5-final-norms-crossed", on_model(final_norms_crossed),
        what="Encoder and decoder have each other's final norm.", why="Each has its own.",
        shows="Nothing while norm weights are 1.", fix="Follow the names.", touches=("final_norm", "logits"),
    ),
    entry(
        "t5-encoder-causal", Swap(T5 + "Stack.forward", causal_encoder),
        what="The encoder is causal.", why="It sees the whole source.", shows="All source rows but the last.",
        fix="Only padding is hidden.",
    ),
)  # fmt: skip


# --- the Switch layer in the model ------------------------------------------------------------------------------------


def everyone_full(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A token without room gets p · x."""

    def forward(self: Any, x: Tensor, counted: Any = None) -> Tensor:
        y = original(self, x, counted)
        from reference_impl.nn import switch

        probabilities, chosen = switch.route_to_one(self.router(x))
        sent = switch.within_capacity(chosen, len(self.experts), self.expert_capacity, counted)
        dropped = sent.sum(dim=-1, keepdim=True) == 0
        return torch.where(dropped, (probabilities.amax(-1, keepdim=True) * x).to(x.dtype), y)

    return forward


def certain(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda outputs, weights: original(outputs, torch.ones_like(weights))


def all_count(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda chosen, experts, capacity, counted=None: original(chosen, experts, capacity, None)


def one_place_fewer(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda chosen, experts, capacity, counted=None: original(chosen, experts, max(capacity - 1, 1), counted)


def experts_by_string(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "experts") and isinstance(module.experts, nn.ModuleDict):
            names = sorted(module.experts)
            module.experts = nn.ModuleDict({f"x{n}": module.experts[name] for n, name in enumerate(names)})


def router_bias_dropped(name: str, tensor: Tensor, config: Any) -> Tensor | None:
    return torch.zeros_like(tensor) if name.endswith("classifier.bias") else None


def losses(change: Callable[[list[Tensor]], dict[str, Tensor]]) -> Swap:
    return Swap(
        MODEL + "SwitchTransformer.router_losses",
        lambda original: lambda self, logits: {**original(self, logits), **change(list(logits))},
    )


def z_of(logits: Tensor) -> Tensor:
    return logits.logsumexp(dim=-1).square().mean()


_EXPERTS = (
    entry(
        "switch-dropped-as-identity-in-model", Swap(SWITCH + "SwitchFeedForward.forward", everyone_full),
        what="A token for which there is no room gets p · x from the layer.",
        why="It gets 0; the residual connection carries it.",
        shows="Only where capacity is exceeded.", fix="Start from zeros.",
        seen="transformers#37017, transformers#37123",
        touches=(*ROUTED, *STREAM),
    ),
    entry(
        "switch-weight-missing", Swap(SWITCH + "weighted", certain),
        what="The expert's output is not multiplied by its probability.", why="p · E(x): with k = 1 as well.",
        shows="Everywhere.", fix="Multiply.", seen="mlxcel#391, Fast-LLM#83", touches=ROUTED,
    ),
    entry(
        "switch-pad-consumes-capacity", Swap(SWITCH + "within_capacity", all_count),
        what="Padding takes places although router_ignore_padding_tokens is set.", why="It must not push tokens out.",
        shows="Only in padded batches, where capacity is exceeded.", fix="Leave padding out of the count.",
        seen="Megatron-LM#5542, marin#8953, transformers#28505",
        killed_by=("golden.left_padding", "golden.right_padding"),
    ),
    entry(
        "switch-capacity-reduced", Swap(SWITCH + "within_capacity", one_place_fewer),
        what="Experts take one token fewer than expert_capacity.", why="The config says how many.",
        shows="Only at the boundary.", fix="place ≤ capacity.", seen="DeepSeek-V2#48 (the formula)",
        touches=(*ROUTED, *STREAM),
    ),
    entry(
        "switch-expert-order", on_model(experts_by_string),
        what="Experts are stacked by their names as strings: 0, 1, 10, 2, ….",
        why="Expert i belongs to row i of the router.",
        shows="Only with more than 10 experts.", fix="Sort by int.", touches=ROUTED,
    ),
    entry(
        "switch-router-bias-dropped", on_load(router_bias_dropped),
        what="The router's bias is in the file and is not added.", why="router_bias says that there is one.",
        shows="Nothing while it is 0.", fix="Read router_bias.", touches=ROUTED,
    ),
    entry(
        "switch-router-rows-reversed", Swap(SWITCH + "route_to_one", lambda original: lambda logits: original(
            logits.flip(-1))),
        what="The router's rows are read in reverse: expert E − 1 − i for expert i.", why="Row i belongs to expert i.",
        shows="Everywhere.", fix="One order for both.", touches=ROUTED,
    ),
    entry(
        "aux-loss-formula", losses(lambda logits: {"aux_loss": torch.stack(
            [layer.softmax(-1).mean(dim=(0, 1)).square().sum() * layer.shape[-1] for layer in logits]).sum()}),
        what="The balancing loss is E · Σ P², without the fractions f.", why="E · Σ f · P.",
        shows="In the loss only.", fix="f is how often an expert is chosen.",
        seen="transformers#28255, transformers#31464, Megatron-LM#1617", killed_by=("golden.auxiliary_losses",),
        touches=(),
    ),
    entry(
        "aux-loss-averaged", losses(lambda logits: {"z_loss": torch.stack([z_of(layer) for layer in logits]).mean()}),
        what="Routers' losses are averaged over the layers.", why="Each layer's is added to the total loss.",
        shows="A constant ratio, the number of sparse layers.", fix="Sum.", seen="transformers#31464",
        killed_by=("golden.auxiliary_losses",), touches=(),
    ),
    entry(
        "z-loss-not-squared", losses(lambda logits: {"z_loss": torch.stack(
            [layer.logsumexp(dim=-1).mean() for layer in logits]).sum()}),
        what="The z-loss is the mean of logsumexp, not of its square.", why="Squared.", shows="In the loss only.",
        fix="logsumexp².", killed_by=("golden.auxiliary_losses",), touches=(),
    ),
    entry(
        "router-logits-are-probs-in-loss", losses(lambda logits: {"z_loss": torch.stack(
            [z_of(layer.softmax(-1)) for layer in logits]).sum()}),
        what="The z-loss is computed from probabilities.", why="From logits.",
        shows="In the loss only: nearly constant.",
        fix="Router logits.", seen="transformers#48421, transformers#48293", killed_by=("golden.auxiliary_losses",),
        touches=(),
    ),
)  # fmt: skip

MISTAKES = (*_BIAS, *_BLOCKS, *_EXPERTS)
