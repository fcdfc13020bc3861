"""Transformer-XL: memory, distances, and the adaptive softmax."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.making import instead, on_model
from conformance.mistakes.norms import READ

MEMORY = "reference_impl.nn.segment_memory:"
ADAPTIVE = "reference_impl.nn.adaptive:"
MODEL = "reference_impl.models.transformer_xl:"
DISTANCES = "reference_impl.nn.relative_attention:RelativePositions.forward"
ATTEND = "reference_impl.nn.relative_attention:RelativeSelfAttention.attend"
A, L = "layers.N.attention.", "layers.N."
SEGMENTS = ("memory.segments", "cache.chunks", "cache.prefill_decode", "cache.one_by_one")
SCORES = (A + "content_scores", A + "position_scores", A + "distance_key", A + "weights")


def entry(identifier: str, *swaps: Swap, **text: Any) -> Mistake:
    more = {"seen": "common knowledge", "killed_by": ("golden.logits",), "touches": ()} | text
    return Mistake(id=identifier, families=("transformer_xl",), swaps=swaps, **more)


# --- memory -----------------------------------------------------------------------------------------------------------


def oldest(old: Tensor | None, new: Tensor, mem_len: int) -> Tensor:
    """The first tokens that ever were, and none of the later ones."""
    whole = new if old is None else torch.cat((old, new), dim=1)
    return whole[:, :mem_len].detach()


def segment_only(old: Tensor | None, new: Tensor, mem_len: int) -> Tensor:
    return new[:, max(new.shape[1] - mem_len, 0) :].detach()


def one_too_old(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The last token of the segment is left out."""
    return lambda old, new, mem_len: original(old, new[:, : max(new.shape[1] - 1, 0)], mem_len)


def unbounded(old: Tensor | None, new: Tensor, mem_len: int) -> Tensor:
    return (new if old is None else torch.cat((old, new), dim=1)).detach()


def fed_again(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Everything that a session was fed is fed with each call, to a memory that holds it already."""

    def feed(self: Any, input_ids: Tensor) -> Tensor:
        before = getattr(self, "fed", input_ids[:, :0])
        self.fed = torch.cat((before, input_ids), dim=1)
        return original(self, self.fed)[:, before.shape[1] :]

    return feed


def with_history(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def remember(old: Tensor | None, new: Tensor, mem_len: int) -> Tensor:
        whole = new if old is None else torch.cat((old, new), dim=1)
        return whole[:, max(whole.shape[1] - mem_len, 0) :]

    return remember


def outputs_remembered(original: Callable[..., None]) -> Callable[..., None]:
    """Each layer remembers what entered the layer above it; the last one, itself."""
    return lambda self, entered: original(self, [*entered[1:], entered[-1]])


def bottom_remembered(original: Callable[..., None]) -> Callable[..., None]:
    return lambda self, entered: original(self, [entered[0]] * len(entered))


def kept_memory(original: Callable[..., None]) -> Callable[..., None]:
    """The model keeps the memory of its first session, for all."""

    def init(self: Any, model: Any, memory: Any) -> None:
        if not hasattr(model, "kept_memory"):
            object.__setattr__(model, "kept_memory", memory)
        original(self, model, model.kept_memory)

    return init


def window(change: Callable[[int | None], int | None]) -> Swap:
    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda queries, keys, same_length, device=None: original(queries, keys, change(same_length), device)

    return Swap(MODEL + "visible_keys", make)


def first_slot_hidden(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def visible_keys(queries: int, keys: int, same_length: int | None, device: Any = None) -> Tensor:
        mask = original(queries, keys, same_length, device).clone()
        if keys > queries:
            mask[..., 0] = False
        return mask

    return visible_keys


def own_triangle(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The triangle is not shifted by the length of the memory."""

    def visible_keys(queries: int, keys: int, same_length: int | None, device: Any = None) -> Tensor:
        return (torch.arange(keys) <= torch.arange(queries)[:, None])[None, None]

    return visible_keys


def normed_memory(self: Any, x: Tensor, memory: Tensor | None, distances: Tensor, mask: Tensor) -> Tensor:
    """With pre_lnorm the norm is applied to the segment alone."""
    if self.pre_lnorm:
        n = self.layer_norm(x)
        return x + self.attend(n if memory is None else torch.cat((memory, n), dim=1), distances, mask)  # type: ignore[no-any-return]
    known = x if memory is None else torch.cat((memory, x), dim=1)
    return self.layer_norm(x + self.attend(known, distances, mask))  # type: ignore[no-any-return]


_MEMORY = (
    entry(
        "txl-memory-update", Swap(MEMORY + "remember", instead(oldest)),
        what="The memory keeps the oldest tokens.", why="It keeps the last mem_len.",
        shows="Only once more than mem_len tokens were fed.", fix="The last mem_len of memory and segment.",
        seen="dhruvramani/Transformers-RL#7", killed_by=SEGMENTS, touches=SCORES,
    ),
    entry(
        "txl-memory-of-segment-only", Swap(MEMORY + "remember", instead(segment_only)),
        what="The memory is the last segment, even where it is longer than that.", why="It may span several segments.",
        shows="Only where segments are shorter than mem_len, from the third on.",
        fix="cat((memory, segment))[-mem_len:].",
        seen="dhruvramani/Transformers-RL#7", killed_by=SEGMENTS, touches=SCORES,
    ),
    entry(
        "txl-generate-not-truncated", Swap(MEMORY + "SegmentSession.feed", fed_again),
        what="While generating, the whole text is fed again with each call, together with its memory.",
        why="The memory holds what was fed before: tokens would be seen twice, and at wrong distances.",
        shows="Only from the second call on.", fix="With a memory, feed what is new alone.",
        seen="transformers#4826", killed_by=SEGMENTS, touches=(*SCORES, "embedding"),
    ),
    entry(
        "txl-memory-lags", Swap(MEMORY + "remember", one_too_old),
        what="The last token of a segment is not remembered.", why="It stands right before the next one.",
        shows="From the second segment on.", fix="Whole segments.", seen="dhruvramani/Transformers-RL#7",
        killed_by=SEGMENTS, touches=SCORES,
    ),
    entry(
        "txl-memory-unbounded", Swap(MEMORY + "remember", instead(unbounded)),
        what="The memory is never cut.", why="It holds mem_len tokens.",
        shows="Only once more than mem_len tokens were fed; nothing with same_length, which hides the rest.",
        fix="Cut it.", killed_by=SEGMENTS, touches=SCORES,
    ),
    entry(
        "txl-memory-gradient", Swap(MEMORY + "remember", with_history),
        what="Gradients flow into the memory.", why="The paper stops them.",
        shows="The forward pass is right; gradients from the second segment on are not.", fix="detach().",
        killed_by=("memory.gradients",),
    ),
    entry(
        "txl-memory-of-outputs", Swap(MEMORY + "SegmentMemory.commit", outputs_remembered),
        what="A layer remembers its output.", why="It remembers what entered it: keys are projected from that.",
        shows="From the second segment on.",
        fix="h^(n−1).", killed_by=SEGMENTS, touches=(A + "key", A + "value", *SCORES),
    ),
    entry(
        "txl-memory-of-embeddings", Swap(MEMORY + "SegmentMemory.commit", bottom_remembered),
        what="All layers remember the embeddings.", why="Each remembers what entered it.",
        shows="From the second segment on, and the second layer.", fix="One memory a layer.",
        killed_by=SEGMENTS, touches=(A + "key", A + "value", *SCORES),
    ),
    entry(
        "txl-memory-shared", Swap(MEMORY + "SegmentSession.__init__", kept_memory),
        what="Sessions share a memory: a second text remembers the first one.",
        why="Texts have nothing to do with each other.",
        shows="Only from the second session on.", fix="One memory a session.",
        seen="EleutherAI/gpt-neox#532 (in a cache)",
        killed_by=("memory.second_session", *SEGMENTS), touches=SCORES,
    ),
    entry(
        "txl-mask-memory-offset", Swap(MODEL + "visible_keys", own_triangle),
        what="The triangle is not shifted by the length of the memory.", why="Queries are the last T of M + T keys.",
        shows="Only from the second segment on.", fix="key ≤ query + M.",
        seen="transformers#14832, kimiyoung/transformer-xl#86", killed_by=SEGMENTS, touches=(A + "weights",),
    ),
    entry(
        "txl-mask-first-slot", Swap(MODEL + "visible_keys", first_slot_hidden),
        what="The first slot of the memory is always hidden.", why="It is a token like the others.",
        shows="Only from the second segment on.", fix="Hide what same_length says, no more.",
        seen="transformers#14832, kimiyoung/transformer-xl#86", killed_by=SEGMENTS, touches=(A + "weights",),
    ),
    entry(
        "txl-same-length", window(lambda same_length: None),
        what="same_length is ignored: queries see all of memory and segment before them.", why="They see mem_len keys.",
        shows="Only where more than mem_len tokens stand before a query.", fix="Read same_length.",
        seen="kimiyoung/transformer-xl#86, lucidrains/x-transformers#64", killed_by=("golden.logits", *SEGMENTS),
        touches=(A + "weights",),
    ),
    entry(
        "txl-same-length-one-more", window(lambda same_length: None if same_length is None else same_length + 1),
        what="same_length shows mem_len + 1 keys, as the authors' TensorFlow code does.",
        why="Their PyTorch code, with which the published weights were evaluated, shows mem_len.",
        shows="Only where more than mem_len tokens stand before a query.", fix="mem_len, the query's own among them.",
        seen="kimiyoung/transformer-xl#86", killed_by=("golden.logits", *SEGMENTS), touches=(A + "weights",),
    ),
    entry(
        "txl-memory-not-normed", Swap(MODEL + "TransformerXLAttention.forward", instead(normed_memory)),
        what="With pre_lnorm the norm is applied to the segment and not to the memory.", why="Both are normalised.",
        shows="Only with pre_lnorm, from the second segment on.", fix="LayerNorm([m ∘ x]).",
        killed_by=SEGMENTS, touches=(A + "key", A + "value", *SCORES),
    ),
)  # fmt: skip


# --- distances and biases ---------------------------------------------------------------------------------------------


def clamp(change: Callable[[int], int]) -> Swap:
    def make(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(self: Any, like: Tensor, keys: int) -> Tensor:
            kept = self.clamp_len
            self.clamp_len = change(kept)
            try:
                return original(self, like, keys)
            finally:
                self.clamp_len = kept

        return forward

    return Swap(DISTANCES, make)


def exchanged(model: Any) -> None:
    """u and v change places."""
    for holder in (model.transformer, *(layer.dec_attn for layer in model.transformer.layers)):
        if hasattr(holder, "r_w_bias"):
            u, v = holder.r_w_bias.detach().clone(), holder.r_r_bias.detach().clone()
            holder.r_w_bias.data.copy_(v)
            holder.r_r_bias.data.copy_(u)
            if holder is model.transformer:
                return


def first_for_all(model: Any) -> None:
    """All layers use the first one's u and v."""
    first = model.transformer.layers[0].dec_attn
    for layer in model.transformer.layers:
        layer.dec_attn.r_w_bias, layer.dec_attn.r_r_bias = first.r_w_bias, first.r_r_bias


def fields_at(**values: Any) -> Swap:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda cls, config: replace(original(cls, config), **values)

    return Swap(MODEL + "TransformerXLConfig.from_dict", make)


_DISTANCES = (
    entry(
        "txl-clamp-ignored", clamp(lambda clamp_len: 0),
        what="clamp_len is ignored.", why="Distances beyond it are encoded as clamp_len.",
        shows="Only at distances beyond clamp_len.", fix="Read clamp_len.", killed_by=("golden.logits", *SEGMENTS),
        touches=("distances", *SCORES),
    ),
    entry(
        "txl-clamp-one-less", clamp(lambda clamp_len: clamp_len - 1),
        what="Distances are clamped to clamp_len − 1.", why="clamp_len itself is still a distance of its own.",
        shows="Only at distances of clamp_len and more.", fix="min(distance, clamp_len).",
        killed_by=("golden.logits", *SEGMENTS), touches=("distances", *SCORES),
    ),
    entry(
        "txl-biases-exchanged", on_model(exchanged),
        what="u (content) and v (position) change places.", why="r_w_bias is u, r_r_bias is v.",
        shows="Nothing while both are 0; 3e-6 at deviation 0.02.", fix="Follow the meaning, not the letter.",
        touches=SCORES,
    ),
    entry(
        "txl-u-v-sharing", on_model(first_for_all),
        what="One u and one v for all layers, though untie_r says that each has its own.", why="They are in the file.",
        shows="Nothing while they agree.", fix="Read untie_r.", seen="dmlc/gluon-nlp#846", touches=SCORES,
    ),
    entry(
        "txl-pre-norm-ignored", fields_at(pre_lnorm=False),
        what="pre_lnorm is ignored: norms stand after the residual connections.", why="The config says before.",
        shows="Only with pre_lnorm.", fix="Read pre_lnorm.",
        touches=(*READ, A + "residual", L + "feed_forward.residual", *SCORES),
    ),
)  # fmt: skip


# --- the adaptive softmax ---------------------------------------------------------------------------------------------


def clusters_reversed(head: Tensor, tails: list[Tensor]) -> Tensor:
    shortlist = head.shape[-1] - len(tails)
    found = [head[..., -1 - n, None] + tail for n, tail in enumerate(tails)]
    return torch.cat((head[..., :shortlist], *found), dim=-1)


def tails_alone(head: Tensor, tails: list[Tensor]) -> Tensor:
    return torch.cat((head[..., : head.shape[-1] - len(tails)], *tails), dim=-1)


def unscaled(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, ids: original(self, ids) / self.scale


def scaled_by_own_width(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """√d_embed, where d_embed is not d_model."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        scale = float(self.emb_layers[0].weight.shape[1] ** 0.5)
        return original(self, ids) / float(self.scale) * scale

    return forward


def not_shifted(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An id of a later cluster is looked up as it is, modulo the table."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        moved = ids.clone()
        for cluster in self.clusters[1:]:
            inside = (ids >= cluster.start) & (ids < cluster.stop)
            moved[inside] = cluster.start + ids[inside] % len(cluster)
        return original(self, moved)

    return forward


def cluster_bias_dropped(model: Any) -> None:
    if hasattr(model.crit, "cluster_bias"):
        model.crit.cluster_bias.data.zero_()


def out_biases_dropped(model: Any) -> None:
    for layer in model.crit.out_layers:
        layer.bias.data.zero_()


def first_projection_for_all(model: Any) -> None:
    projections = model.crit.out_projs
    for cluster in range(1, len(projections)):
        if projections[cluster].shape == projections[0].shape:
            projections[cluster] = projections[0]


def not_logarithmic(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, ids, memory=None: original(self, ids, memory).exp()


HEAD = ("head_scores", "logits")

_SOFTMAX = (
    entry(
        "txl-adaptive-softmax", Swap(ADAPTIVE + "whole_log_probabilities", instead(clusters_reversed)),
        what="Clusters are counted from the end of the head.", why="Behind the shortlist stands cluster 1 first.",
        shows="Only ids beyond the first cutoff; nothing with one further cluster.", fix="head[shortlist + n].",
        seen="transformers#690, transformers#3286, kimiyoung/transformer-xl#112", touches=("logits",),
    ),
    entry(
        "txl-adaptive-tail-alone", Swap(ADAPTIVE + "whole_log_probabilities", instead(tails_alone)),
        what="Log-probabilities within a cluster are taken for those of its ids.",
        why="The cluster's own has to be added.",
        shows="Only ids beyond the first cutoff; probabilities sum to more than 1.",
        fix="log p(cluster) + log p(id | cluster).",
        seen="transformers#3286", touches=("logits",),
    ),
    entry(
        "txl-embedding-not-scaled", Swap(ADAPTIVE + "AdaptiveEmbedding.forward", unscaled),
        what="Embeddings are not multiplied by √d_model.", why="They are, as in the Transformer of 2017.",
        shows="Everywhere.", fix="· √d_model.", seen="jadore801120/attention-is-all-you-need-pytorch#138",
        touches=("embedding", *READ),
    ),
    entry(
        "txl-embedding-scaled-by-width", Swap(ADAPTIVE + "AdaptiveEmbedding.forward", scaled_by_own_width),
        what="Embeddings are multiplied by √d_embed.", why="By √d_model, behind the projection.",
        shows="Only where the two differ.", fix="· √d_model.", touches=("embedding", *READ),
    ),
    entry(
        "txl-embedding-cutoff", Swap(ADAPTIVE + "AdaptiveEmbedding.forward", not_shifted),
        what="Ids of later clusters are not counted from the cluster's beginning.", why="Each table begins with row 0.",
        shows="Only ids beyond the first cutoff.", fix="id − cutoff.", touches=("embedding",),
    ),
    entry(
        "txl-cluster-bias-dropped", on_model(cluster_bias_dropped),
        what="The biases of the clusters are not added.", why="They are in the file.",
        shows="Nothing while they are 0.",
        fix="cluster_bias.", touches=HEAD,
    ),
    entry(
        "txl-out-bias-dropped", on_model(out_biases_dropped),
        what="The biases of the softmax are not added, since its weights are the embedding's.",
        why="They are in the file.",
        shows="Nothing while they are 0.", fix="out_layers.n.bias.", seen="vllm#46835 (the same seam)", touches=HEAD,
    ),
    entry(
        "txl-projections-shared", on_model(first_projection_for_all),
        what="All clusters use the first one's projection.", why="Each has its own, unless tie_projs says otherwise.",
        shows="Only ids beyond the first cutoff.", fix="Read proj_share_all_but_first and tie_projs.",
        seen="kimiyoung/transformer-xl#112", touches=("logits",),
    ),
    entry(
        "txl-probabilities", Swap(MODEL + "TransformerXL.forward", not_logarithmic),
        what="Probabilities instead of log-probabilities.", why="The contract is their logarithm.", shows="Everywhere.",
        fix="log_softmax.", touches=("logits",),
    ),
)  # fmt: skip

MISTAKES = (*_MEMORY, *_DISTANCES, *_SOFTMAX)
