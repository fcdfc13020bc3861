"""Seeded draws that are the same bytes on every machine: weights, token ids, lengths.

Every value is an integer times a power of two, so it is exact in float32, bfloat16 and float16 and needs no
random generator of any library.  The stream for a tensor is SHAKE-256 of a label and the tensor's name, read
as 16-bit little-endian words; word w gives the integer (w · n) >> 16 in [0, n).  Any language can repeat it.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Largest integer magnitude: bfloat16 keeps 8 significant bits, so 255 would do; 127 leaves sums well inside float16.
LARGEST = 127
# A matrix has standard deviation GAIN / √fan_in: attention is then far from uniform and activations far from linear,
# so that a mistake shows (at the usual 0.02 most of them hide; a gain of 1 would damp them layer by layer).
GAIN = 1.5


def integers(label: str, count: int, low: int, high: int) -> "Tensor":
    """`count` integers in [low, high], int64, a function of the label alone."""
    import torch

    words = torch.frombuffer(bytearray(hashlib.shake_256(label.encode()).digest(2 * count)), dtype=torch.uint8)
    words = words.to(torch.int64).view(count, 2)
    return ((words[:, 0] + 256 * words[:, 1]) * (high - low + 1) >> 16) + low


def few_integers(label: str, count: int, low: int, high: int) -> list[int]:
    """The same as a list, without torch."""
    stream = hashlib.shake_256(label.encode()).digest(2 * count)
    words = (stream[at] + 256 * stream[at + 1] for at in range(0, 2 * count, 2))
    return [(word * (high - low + 1) >> 16) + low for word in words]


def uniform(label: str, shape: Sequence[int], deviation: float, mean: float = 0.0) -> "Tensor":
    """A float32 tensor, uniform around `mean` with about the given standard deviation.

    The half-width √3·deviation is written m · 2^-s with 64 <= m <= LARGEST; the draw is k · 2^-s, |k| <= m.
    `mean` must be 0 or 1 (norm weights): 1 ± values up to 1 stay exact as long as s <= 7, so s is at most 7 there
    (and m may be smaller).
    """
    import torch

    half_width = math.sqrt(3.0) * deviation
    shift = math.floor(math.log2(LARGEST / half_width))
    if mean:
        shift = min(shift, 7)
    limit = round(half_width * 2.0**shift)
    draws = integers(label, math.prod(shape), -limit, limit)
    return (mean + draws.to(torch.float32) * 2.0**-shift).view(*shape)


# kind of weight -> standard deviation; the matrices' is GAIN / √fan_in
KINDS = {"bias": 0.3, "norm": 0.4, "embedding": 0.5, "linear": None, "conv1d": None}


def kind_of(name: str, module_kinds: Mapping[str, str]) -> str:
    """What kind of weight `name` is: by its module, where `module_kinds` lists it, else by the words in its name."""
    if name.endswith("bias"):
        return "bias"
    module = name.split(".")[-2:][0]
    if module in module_kinds:
        return module_kinds[module]
    return "norm" if "norm" in name else "embedding" if "embed" in name else "linear"


def tensor(label: str, name: str, shape: Sequence[int], module_kinds: Mapping[str, str] | None = None) -> "Tensor":
    """The stress weight called `name`: nothing keeps its initial value, and no two tensors are alike.

    Standard deviations: norm weights 0.4 around 1, biases 0.3, embeddings 0.5 (small, so that a norm's ε matters),
    every other matrix GAIN/√fan_in, fan_in being the last dimension (torch.nn.Linear's layout) or, of the kind
    "conv1d", the first.
    """
    stream = f"{label}/{name}/{'x'.join(map(str, shape))}"
    kind = kind_of(name, module_kinds or {})
    deviation = KINDS[kind] or GAIN / math.sqrt(shape[0] if kind == "conv1d" else shape[-1])
    return uniform(stream, shape, deviation, mean=1.0 if kind == "norm" else 0.0)
