"""A deliberate mistake, to see what the suite says: the reference with its rotary pairs interleaved."""

import torch

from conformance.implementations.reference import Reference
from reference_impl.nn import rotary


def rotate_interleaved(x, cos, sin):
    """Turns the pairs (0, 1), (2, 3), …; Hugging Face checkpoints store the pairs (0, Dh/2), (1, Dh/2 + 1), …"""
    cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, Dh/2)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class BrokenLlama(Reference):
    def __init__(self):
        super().__init__("eager")
        self.name = "broken llama"

    def load(self, checkpoint):
        rotary.rotate = rotate_interleaved
        return super().load(checkpoint)
