"""Which tokens are real, which position each has, and which keys a query may see.

Masks are boolean with one polarity everywhere: True means *real*, or *may be seen*.

Shapes: B batch, T tokens of this call (queries), S tokens so far (keys: cached and new, S ≥ T).
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

# 1 or True: real; 0 or False: padding. `real_tokens` checks the shape, so that its message can say what to do.
PaddingMask = Int[Tensor, "..."] | Bool[Tensor, "..."]


def real_tokens(input_ids: Int[Tensor, "batch seq"], attention_mask: PaddingMask | None) -> Bool[Tensor, "batch seq"]:
    """True where `attention_mask` is not 0; without a mask every token is real.

    Raises:
        ValueError: the mask does not have the shape of `input_ids`.
    """
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)}: give one "
            "number a token of this call (1 real, 0 padding); a cache remembers those of earlier calls"
        )
    return attention_mask != 0


def positions(real: Bool[Tensor, "batch keys"], *, num_queries: int) -> Int[Tensor, "batch queries"]:
    """Positions of the last `num_queries` tokens: how many real tokens stand before each in its row.

    Padding gets the position of the real token before it, or 0 if there is none; no real token depends on it.

        real       0 0 1 1 1        1 1 1 0 0
        position   0 0 0 1 2        0 1 2 2 2
    """
    all_positions = (real.cumsum(dim=-1) - 1).clamp(min=0)  # (B, S)
    return all_positions[:, real.shape[1] - num_queries :]  # (B, T)


def resolve_positions(
    position_ids: Int[Tensor, "#batch #seq"] | None,
    input_ids: Int[Tensor, "batch seq"],
    real: Bool[Tensor, "batch keys"],
) -> Int[Tensor, "#batch seq"]:
    """The given positions of `input_ids`, which are the last tokens of `real`; by default those of `positions`.

    Raises:
        ValueError: the given positions have neither the shape of `input_ids` nor that of one row for all.
    """
    seq = input_ids.shape[1]
    if position_ids is None:
        return positions(real, num_queries=seq)
    if position_ids.shape not in (input_ids.shape, (1, seq)):
        shapes = f"{tuple(position_ids.shape)} and input_ids {tuple(input_ids.shape)}"
        raise ValueError(f"position_ids has shape {shapes}: give one position a token, or one row for all")
    return position_ids


def causal(num_queries: int, num_keys: int, device: torch.device | None = None) -> Bool[Tensor, "queries keys"]:
    """The queries are the last tokens of the sequence; each sees itself and all before it.

    Query t stands at index t + (num_keys − num_queries). With 3 cached and 2 new tokens, `causal(2, 5)` is

        1 1 1 1 0
        1 1 1 1 1
    """
    query_index = torch.arange(num_queries, device=device) + (num_keys - num_queries)
    key_index = torch.arange(num_keys, device=device)
    return key_index[None, :] <= query_index[:, None]


def within_window(
    real: Bool[Tensor, "batch keys"], *, num_queries: int, sliding_window: int
) -> Bool[Tensor, "batch queries keys"]:
    """Keys that are fewer than `sliding_window` tokens back: a query sees that many keys, itself among them.

    Jiang et al. 2023, Mistral 7B (arXiv:2310.06825), section 2: W → `sliding_window`. The paper speaks of "tokens
    between i − W and i", which could be W + 1 keys; here and in Hugging Face they are i − W + 1 … i, W keys, as many as
    the paper's rolling buffer holds. Layers stack: after L of them a token has been reached by L · (W − 1) before it.

    Only real tokens are counted, so that padding inside a row takes no place in the window. Keys after the query are
    not hidden here. With W = 3, for the last two of five tokens, all real, and with the third one padding:

        1 1 1 1 1  →  0 1 1 1 1        1 1 0 1 1  →  1 1 1 1 1
                      0 0 1 1 1                      0 1 1 1 1
    """
    place = real.cumsum(dim=-1)  # (B, S): how many real tokens there are up to and including this one
    queries = place[:, real.shape[1] - num_queries :]  # (B, T)
    return queries[:, :, None] - place[:, None, :] < sliding_window  # (B, T, S)


def visible_keys(
    real: Bool[Tensor, "batch keys"], *, num_queries: int, sliding_window: int | None = None
) -> Bool[Tensor, "batch 1 queries keys"]:
    """Keys that are not in the future, not padding, and not beyond the window, for the last `num_queries` of `real`.

    Without a `sliding_window` a query may look back to the beginning. A padding query that has only padding before it
    sees nothing: its row is all False.
    """
    may_see = causal(num_queries, real.shape[1], real.device) & real[:, None, :]  # (B, T, S)
    if sliding_window is not None:
        may_see = may_see & within_window(real, num_queries=num_queries, sliding_window=sliding_window)
    return may_see[:, None]  # (B, 1, T, S): the same for every head
