"""T5's relative position bias: a learned number a head, added to a score, that depends on how far the key is.

Distances share numbers ("buckets"): near ones have one each, farther ones one for a range that grows with the distance.

Shapes: B batch, T queries, S keys, H heads.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def bucket_starts(num_buckets: int, max_distance: int) -> list[int]:
    """The least distance of each bucket of one direction.

        bucket(n) = n                                                  n < e
                    min(b − 1, e + ⌊log(n/e) / log(D/e) · (b − e)⌋)    n ≥ e = ⌊b/2⌋

    Raffel et al. 2020 (arXiv:1910.10683), section 2.1 gives the idea, "ranges that increase in size logarithmically up
    to an offset of 128 beyond which we assign all relative positions to the same embedding", their code the formula:
    b → `num_buckets`, D → `max_distance`. Bucket e + j begins at the least n with (n/e)^(b−e) ≥ (D/e)^j: in whole
    numbers, so that no rounded logarithm decides. With b = 8 and D = 20 the buckets begin at

        0 1 2 3 4 6 9 14
    """
    exact = num_buckets // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"{num_buckets} buckets of one direction and max_distance={max_distance} do not fit: there must be 2 "
            f"buckets or more (4 in an encoder, which halves them), and max_distance be greater than {max(exact, 1)}"
        )
    logarithmic = num_buckets - exact
    starts, distance = list(range(exact)), exact
    for j in range(logarithmic):
        while distance**logarithmic * exact**j < max_distance**j * exact**logarithmic:
            distance += 1
        starts.append(distance)
    return starts


def buckets(
    relative_position: Int[Tensor, "*batch queries keys"], num_buckets: int, max_distance: int, bidirectional: bool
) -> Int[Tensor, "*batch queries keys"]:
    """The bucket of each key: 0 … num_buckets − 1.

    Args:
        relative_position: of the key minus that of the query: negative for what came before.
        bidirectional: True (encoder): the lower half of the buckets is for keys at or before the query, the upper half
            for those after it. False (decoder): all are for keys at or before it; keys after it get bucket 0 (a mask
            hides them).

    Raises:
        ValueError: there are too few buckets, or `max_distance` is within those of one distance each.
    """
    one_way = num_buckets // 2 if bidirectional else num_buckets
    distance = relative_position.abs() if bidirectional else (-relative_position).clamp(min=0)
    starts = torch.tensor(bucket_starts(one_way, max_distance), device=relative_position.device)
    bucket = torch.bucketize(distance, starts, right=True) - 1  # the last bucket that begins at or before it
    return bucket + one_way * (relative_position > 0) if bidirectional else bucket


def relative_position_bias(
    table: Float[Tensor, "buckets heads"],
    query_positions: Int[Tensor, "#batch queries"],
    key_positions: Int[Tensor, "#batch keys"],
    max_distance: int,
    bidirectional: bool,
) -> Float[Tensor, "#batch heads queries keys"]:
    """What is added to every score: row `buckets(key position − query position)` of `table`, which has a column a head.

    Raffel et al. 2020 (arXiv:1910.10683), section 2.1. Arithmetic is in the dtype of `table`.
    """
    relative_position = key_positions[:, None, :] - query_positions[:, :, None]  # (B, T, S)
    return table[buckets(relative_position, len(table), max_distance, bidirectional)].permute(0, 3, 1, 2)
