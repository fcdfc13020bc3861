"""Step-wise decoding with a recurrent decoder: the source is read once, and the state is carried from call to call.

A decoder takes (ids, real, source, state) and returns (logits, state): ids (B, T), `real` true where an id is no
padding (B, T), None where all are, the state a tuple of tensors whose sizes do not depend on T.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reference_impl.nn import masks
from reference_impl.nn.recurrent_cells import State
from reference_impl.nn.sequence_attention import Source


class Session:
    """One batch of sources, to be translated in pieces of any size. For inference only."""

    def __init__(self, decoder: nn.Module, source: Source, state: State) -> None:
        self._decoder, self._source, self._state = decoder, source, state

    @torch.no_grad()
    def feed(
        self, decoder_input_ids: Int[Tensor, "batch target"], attention_mask: masks.PaddingMask | None = None
    ) -> Float[Tensor, "batch target vocab"]:
        """Logits of these ids, given the source and all that was fed before; the mask speaks of these ids only.

        Raises:
            ValueError: the mask does not fit the ids, or there are not as many rows as the source has.
        """
        logits, self._state = decode(self._decoder, decoder_input_ids, attention_mask, self._source, self._state)
        return logits

    def state_bytes(self) -> int:
        """Memory held, in bytes: the source as it was read, and the state. The same after any number of calls."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self._source, *self._state))


def decode(
    decoder: nn.Module,
    ids: Int[Tensor, "batch target"] | None,
    attention_mask: masks.PaddingMask | None,
    source: Source,
    state: State,
) -> tuple[Tensor, State]:
    """Logits (B, T, vocab) of `ids`, and the state after them.

    Raises:
        ValueError: there are no ids, they are not as many rows as the source, or the mask does not fit them.
    """
    if ids is None:
        raise ValueError("decoder_input_ids are missing: give what the decoder reads, its start token first")
    if len(ids) != len(source.memory):
        raise ValueError(f"decoder_input_ids have {len(ids)} rows and the source {len(source.memory)}: give as many")
    real = None if attention_mask is None else masks.real_tokens(ids, attention_mask)
    logits, state = decoder(ids, real, source, state)
    return logits, state
