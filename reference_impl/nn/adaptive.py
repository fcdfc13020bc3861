"""Adaptive embedding and adaptive softmax: frequent tokens have wide vectors and a softmax of their own.

Ids are sorted by frequency, the most frequent token is 0. `cutoffs` cut the vocabulary into clusters; with
cutoffs = [3, 7] and vocab_size = 12 they hold the ids

    0 1 2 | 3 4 5 6 | 7 8 9 10 11

The first cluster is the shortlist. Without cutoffs it is the whole vocabulary, and everything here is an ordinary
embedding and an ordinary softmax.

Parameters carry the names of Hugging Face's Transformer-XL.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


def cluster_ids(vocab_size: int, cutoffs: Sequence[int]) -> list[range]:
    """The ids of each cluster.

    Raises:
        ValueError: the cutoffs do not rise from 1 to less than `vocab_size`.
    """
    bounds = [0, *cutoffs, vocab_size]
    if any(low >= high for low, high in pairwise(bounds)):
        raise ValueError(f"cutoffs={list(cutoffs)} must rise, from 1 or more to less than vocab_size={vocab_size}")
    return [range(low, high) for low, high in pairwise(bounds)]


def cluster_width(d_embed: int, div_val: int, cluster: int) -> int:
    """The width of the vectors of a cluster, counted from 0: d_embed / div_val^cluster, rounded down.

    Baevski & Auli 2019 (arXiv:1809.10853), section 3: d → `d_embed`, k → `div_val`.

    Raises:
        ValueError: nothing is left of the width.
    """
    width = d_embed // int(div_val**cluster)
    if not width:
        raise ValueError(f"d_embed={d_embed} divided by div_val={div_val} to the power {cluster} is less than 1")
    return width


def whole_log_probabilities(
    head: Float[Tensor, "*batch entries"], tails: Sequence[Float[Tensor, "*batch cluster"]]
) -> Float[Tensor, "*batch vocab"]:
    """Log-probabilities of all ids, from those of the shortlist and the clusters and those within each cluster.

        log p(w) = log p_head(w)                                  for w in the shortlist
        log p(w) = log p_head(cluster n) + log p_n(w)             for w in cluster n = 1, 2, …

    Grave et al. 2017 (arXiv:1609.04309), section 4.3. The head has the shortlist's ids first and behind them the
    clusters, cluster 1 first. The authors' TensorFlow code and Hugging Face read them so; the authors' PyTorch code
    counts them from the end (`head_logprob[:, -i]`), so that its checkpoints hold them the other way round. With one
    cluster, or clusters of equal weights, nothing shows it.
    """
    shortlist = head.shape[-1] - len(tails)
    in_clusters = [head[..., shortlist + n, None] + tail for n, tail in enumerate(tails)]
    return torch.cat((head[..., :shortlist], *in_clusters), dim=-1)


def project(vector: Float[Tensor, "*batch width"], proj: Tensor | None) -> Float[Tensor, "*batch d_model"]:
    """From the width of a cluster to that of the model; `proj` (d_model, width), None for no change."""
    return vector if proj is None else F.linear(vector, proj)


def project_back(hidden: Float[Tensor, "*batch d_model"], proj: Tensor | None) -> Float[Tensor, "*batch width"]:
    """From the width of the model to that of a cluster, by the same matrix, transposed."""
    return hidden if proj is None else hidden @ proj


class Projections(nn.ParameterList):
    """The matrices (d_model, width) between the clusters' widths and the model's; none where all are the model's.

    One for each of `widths`; the widths of clusters that one table holds (`div_val` 1) are equal.
    """

    def __init__(self, d_model: int, widths: Sequence[int], *, div_val: int) -> None:
        needed = div_val != 1 or set(widths) != {d_model}
        super().__init__(nn.Parameter(torch.empty(d_model, width)) for width in widths if needed)
        for matrix in self:
            nn.init.normal_(matrix, std=d_model**-0.5)

    def of(self, cluster: int) -> Tensor | None:
        """The matrix of a cluster."""
        return self[cluster] if len(self) else None


class AdaptiveEmbedding(nn.Module):
    """Looks ids up in the table of their cluster, projects to the width of the model, and scales by √d_model.

        y = √d_model · P_n e_w        w in cluster n

    Baevski & Auli 2019 (arXiv:1809.10853), section 3; the factor: Vaswani et al. 2017 (arXiv:1706.03762), section 3.4.
    e_w → `emb_layers.n`, P_n → `emb_projs.n`. With `div_val` 1 there is one table for all clusters, and no projection
    if d_embed = d_model. Arithmetic is in the dtype of the tables.
    """

    def __init__(self, *, vocab_size: int, d_embed: int, d_model: int, cutoffs: Sequence[int], div_val: int) -> None:
        super().__init__()
        self.clusters = cluster_ids(vocab_size, () if div_val == 1 else cutoffs)
        widths = [cluster_width(d_embed, div_val, n) for n in range(len(self.clusters))]
        self.scale = d_model**0.5
        self.d_model = d_model
        self.emb_layers = nn.ModuleList(
            nn.Embedding(len(ids), width) for ids, width in zip(self.clusters, widths, strict=True)
        )
        self.emb_projs = Projections(d_model, widths, div_val=div_val)

    def forward(self, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_model"]:
        """Raises ValueError if an id is not in the vocabulary: it would belong to no cluster."""
        vocab_size = self.clusters[-1].stop
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab_size:
            raise ValueError(f"ids must be 0 … {vocab_size - 1}, got {int(input_ids.min())} … {int(input_ids.max())}")
        tables: Any = self.emb_layers
        y: Tensor = tables[0].weight.new_zeros(*input_ids.shape, self.d_model)
        for n, ids in enumerate(self.clusters):
            inside = (input_ids >= ids.start) & (input_ids < ids.stop)  # (B, T)
            y[inside] = project(tables[n](input_ids[inside] - ids.start), self.emb_projs.of(n))
        scaled: Tensor = y * self.scale
        return scaled


class AdaptiveLogSoftmax(nn.Module):
    """Log-probabilities of all tokens: a softmax over the shortlist and the clusters, and one within each cluster.

        head scores    W_0 P_0ᵀ h + b_0  and behind them  W_c P_0ᵀ h + b_c
        tail n         W_n P_nᵀ h + b_n

    Grave et al. 2017 (arXiv:1609.04309), section 4.3; how the parts are joined: `whole_log_probabilities`. W_n, b_n →
    `out_layers.n`, P_n → `out_projs.n`, W_c, b_c → `cluster_weight`, `cluster_bias`. With `div_val` 1 there is one
    layer for all clusters, cut at the cutoffs, but still a projection for each cluster.

    `head_scores`, a child without weights, shows to forward hooks what the head's softmax gets. The softmax is in
    float32, or float64 for float64 scores; the result is rounded to the dtype of `hidden`.
    """

    def __init__(self, *, vocab_size: int, d_embed: int, d_model: int, cutoffs: Sequence[int], div_val: int) -> None:
        super().__init__()
        self.clusters = cluster_ids(vocab_size, cutoffs)
        self.one_layer = div_val == 1
        widths = [cluster_width(d_embed, div_val, n) for n in range(len(self.clusters))]
        if cutoffs:
            self.cluster_weight = nn.Parameter(torch.randn(len(cutoffs), d_embed) * d_embed**-0.5)
            self.cluster_bias = nn.Parameter(torch.zeros(len(cutoffs)))
        sizes = [(d_embed, vocab_size)] if self.one_layer else zip(widths, map(len, self.clusters), strict=True)
        self.out_layers = nn.ModuleList(nn.Linear(width, entries) for width, entries in sizes)
        self.out_projs = Projections(d_model, widths, div_val=div_val)
        self.head_scores = nn.Identity()

    def forward(self, hidden: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq vocab"]:
        weight, bias = self.layer(0)
        if len(self.clusters) > 1:
            weight, bias = torch.cat((weight, self.cluster_weight)), torch.cat((bias, self.cluster_bias))
        head = self.head_scores(F.linear(project_back(hidden, self.out_projs.of(0)), weight, bias))
        tails = [
            F.linear(project_back(hidden, self.out_projs.of(n)), *self.layer(n)) for n in range(1, len(self.clusters))
        ]
        working = torch.promote_types(hidden.dtype, torch.float32)
        head, *tails = (F.log_softmax(scores, dim=-1, dtype=working) for scores in (head, *tails))
        return whole_log_probabilities(head, tails).to(hidden.dtype)

    def layer(self, cluster: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the ids of a cluster."""
        layer: Any = self.out_layers[0 if self.one_layer else cluster]
        ids = self.clusters[cluster]
        rows = slice(ids.start, ids.stop) if self.one_layer else slice(None)
        return layer.weight[rows], layer.bias[rows]
