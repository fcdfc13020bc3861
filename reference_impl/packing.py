"""Query batching: prompts of different lengths in one row, so that nothing is computed on padding.

    packed:  7 8 9 | 5 | 3 1        padded:  7 8 9
    lengths: 3, 1, 2                         5 · ·
                                             3 1 ·

Mistral's implementation batches prompts so ("efficient query batching"), with a block-diagonal causal mask: a text sees
itself alone, positions start again with each, and every layer but attention takes the row as it is. Attention runs text
by text, so that no score between two texts is computed either: Σ n² of them, where one mask for the row would need
(Σ n)², and padding (number of texts) · (longest n)².

Shapes: N tokens of all texts together, n of one of them, V vocabulary.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def pack(prompts: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "1 tokens"], list[int]]:
    """One row of all prompts, one behind the other, and their lengths.

    Raises:
        ValueError: a prompt is empty; it would have no logits.
    """
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise ValueError(f"prompt {lengths.index(0)} is empty; leave it out or begin it with one token at least")
    return torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.long)[None], lengths


def packed(
    model: nn.Module, input_ids: Int[Tensor, "1 tokens"], lengths: Sequence[int] | Int[Tensor, " texts"]
) -> Float[Tensor, "1 tokens vocab"]:
    """Logits of every token given its own text, which is what the texts would give alone.

    Raises:
        ValueError: `input_ids` is not one row, `lengths` do not sum to its length, or one is less than 1.
    """
    lengths = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    logits: Tensor = model(input_ids, lengths=lengths)
    return logits


def unpack(logits: Float[Tensor, "1 tokens vocab"], lengths: Sequence[int]) -> list[Float[Tensor, "n vocab"]]:
    """The logits of each text; `logits[-1]` of one are those of its next token."""
    return list(logits[0].split(list(lengths)))
