"""Which tokens are real, which position each has, and which keys a query may see.

Masks are boolean with one polarity everywhere: True means *real*, or *may be seen*.

Shapes: B batch, T tokens of this call (queries), S tokens so far (keys: cached and new, S ≥ T).
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Tokens:
    """What a call knows of its keys: those that a cache holds, in whatever order, then the T of the call itself.

    real: which are real tokens; padding is not, nor an empty slot of a cache.
    place: how many real tokens of its text stand before each; of padding, the place of the real token before it, or −1
        if there is none.
    lengths: where the one row of the batch is several texts, one behind the other, how many tokens each has; None:
        every row is one text.
    """

    real: Bool[Tensor, "batch keys"]
    place: Int[Tensor, "batch keys"]
    lengths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class BlockDiagonal:
    """What the texts of one row may see: each itself alone, by a mask of its own.

    Blocks of 2 and 1 tokens stand for the first of these; outside them nothing is stored, and nothing computed.

        1 0 0        1 0
        1 1 0   →    1 1
        0 0 1             1
    """

    blocks: tuple[Bool[Tensor, "1 1 n n"], ...]

    @property
    def lengths(self) -> list[int]:
        """How many tokens each text has."""
        return [block.shape[-1] for block in self.blocks]


# What queries may see: one mask for the whole batch, or one for each of the texts in its row.
Mask = Bool[Tensor, "#batch 1 queries keys"] | BlockDiagonal


def in_order(real: Bool[Tensor, "batch keys"]) -> Tokens:
    """The tokens of rows of one text each, stored as they stand in it.

    real       0 0 1 1 1        1 1 1 0 0
    place     −1−1 0 1 2        0 1 2 2 2
    """
    return Tokens(real, real.cumsum(dim=-1) - 1)


def end_to_end(input_ids: Int[Tensor, "batch seq"], lengths: Sequence[int]) -> Tokens:
    """The tokens of one row that holds texts of these lengths, one behind the other, without padding.

        lengths 2 1 3  →  place  0 1 0 0 1 2

    Raises:
        ValueError: there is not one row, a text is empty, or the texts together are not as long as the row.
    """
    if len(input_ids) != 1 or sum(lengths) != input_ids.shape[1] or min(lengths, default=1) < 1:
        raise ValueError(
            f"texts of lengths {list(lengths)} have {sum(lengths)} tokens, input_ids has shape "
            f"{tuple(input_ids.shape)}: give one row (1, {sum(lengths)}), and lengths of at least 1"
        )
    places = [torch.arange(length, device=input_ids.device) for length in lengths]
    place = torch.cat([input_ids.new_empty(0), *places])[None]
    return Tokens(torch.ones_like(place, dtype=torch.bool), place, tuple(lengths))


def visible(tokens: Tokens, *, num_queries: int, sliding_window: int | None = None) -> Mask:
    """Which keys each of the last `num_queries` tokens may see: real ones of its text, not later and not too far back.

    Order is told by places alone, so that keys may be stored in any order. With a `sliding_window` of W a query sees W
    keys, itself among them. A padding query that has only padding before it sees nothing: its row is all False.

    Jiang et al. 2023, Mistral 7B (arXiv:2310.06825), section 2: W → `sliding_window`. The paper speaks of "tokens
    between i − W and i", which could be W + 1 keys; here and in Hugging Face they are i − W + 1 … i, W keys, as many as
    the paper's rolling buffer holds. Layers stack: after L of them a token has been reached by L · (W − 1) before it.
    """
    if tokens.lengths is None:
        return visible_in_rows(tokens, num_queries=num_queries, sliding_window=sliding_window)
    parts = zip(tokens.real.split(tokens.lengths, dim=1), tokens.place.split(tokens.lengths, dim=1), strict=True)
    return BlockDiagonal(
        tuple(
            visible_in_rows(Tokens(real, place), num_queries=real.shape[1], sliding_window=sliding_window)
            for real, place in parts
        )
    )


def visible_in_rows(
    tokens: Tokens, *, num_queries: int, sliding_window: int | None = None
) -> Bool[Tensor, "batch 1 queries keys"]:
    """`visible` for rows of one text each."""
    query = tokens.place[:, tokens.place.shape[1] - num_queries :, None]  # (B, T, 1)
    key = tokens.place[:, None, :]  # (B, 1, S)
    may_see = (key <= query) & tokens.real[:, None, :]  # (B, T, S)
    if sliding_window is not None:
        may_see = may_see & (key > query - sliding_window)
    return may_see[:, None]  # (B, 1, T, S): the same for every head


def positions(real: Bool[Tensor, "batch keys"], *, num_queries: int) -> Int[Tensor, "batch queries"]:
    """Positions of the last `num_queries` tokens: how many real tokens stand before each in its row.

    Padding gets the position of the real token before it, or 0 if there is none; no real token depends on it.

        real       0 0 1 1 1        1 1 1 0 0
        position   0 0 0 1 2        0 1 2 2 2
    """
    return default_positions(in_order(real), num_queries=num_queries)


def default_positions(tokens: Tokens, *, num_queries: int) -> Int[Tensor, "batch queries"]:
    """The places of the last `num_queries` tokens; 0 where there is none."""
    return tokens.place[:, tokens.place.shape[1] - num_queries :].clamp(min=0)  # (B, T)


def resolve_positions(
    position_ids: Int[Tensor, "#batch #seq"] | None,
    input_ids: Int[Tensor, "batch seq"],
    tokens: Tokens,
) -> Int[Tensor, "#batch seq"]:
    """The given positions of `input_ids`, which are the last of `tokens`; by default their places in their text.

    Raises:
        ValueError: the given positions have neither the shape of `input_ids` nor that of one row for all.
    """
    seq = input_ids.shape[1]
    if position_ids is None:
        return default_positions(tokens, num_queries=seq)
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


def visible_keys(
    real: Bool[Tensor, "batch keys"], *, num_queries: int, sliding_window: int | None = None
) -> Bool[Tensor, "batch 1 queries keys"]:
    """`visible` for rows of one text each, stored as they stand in it.

    Only real tokens are counted, so that padding inside a row takes no place in the window. With W = 3, for the last
    two of five tokens, all real, and with the third one padding:

        1 1 1 1 1  →  0 1 1 1 0        1 1 0 1 1  →  1 1 0 1 0
                      0 0 1 1 1                      0 1 0 1 1
    """
    return visible_in_rows(in_order(real), num_queries=num_queries, sliding_window=sliding_window)
