"""Memory of Transformer-XL: what entered each layer for the last tokens, kept from segment to segment.

Unlike a key/value cache it holds hidden states: keys and values are projected from them anew for each segment. It is
bounded, it carries values but no gradients, and it begins empty.

Shapes: B batch, T tokens of this segment, M tokens remembered, d hidden.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference_impl.nn import masks

Hidden = Float[Tensor, "batch seq hidden"]


def remember(old: Hidden | None, new: Hidden, mem_len: int) -> Hidden:
    """The last `mem_len` of the tokens remembered so far and those of the segment, without their history of gradients.

        m' = SG([m ∘ h]) cut to its last mem_len tokens

    Dai et al. 2019 (arXiv:1901.02860), section 3.2: h^(n−1)_τ → `new`, SG is stop-gradient, M → `mem_len`. The memory
    may span several segments: with mem_len = 6 and segments of 4 it holds, after each segment, tokens

        0 1 2 3        2 … 7        6 … 11

    The authors' PyTorch code exchanges two arguments here (kimiyoung/transformer-xl#59, #118), the length of the
    segment and that of the memory. Only their sum is used as long as its `ext_len` is 0, which keeps back the last
    tokens of a segment and is not in the paper: the exchange changes nothing.
    """
    if old is None:
        old = new[:, :0]
    kept_of_new = min(mem_len, new.shape[1])
    kept_of_old = min(mem_len - kept_of_new, old.shape[1])
    # A copy, so that no larger tensor is held.
    return torch.cat((old[:, old.shape[1] - kept_of_old :], new[:, new.shape[1] - kept_of_new :]), dim=1).detach()


def visible_keys(
    queries: int, keys: int, same_length: int | None, device: torch.device | None = None
) -> Bool[Tensor, "1 1 queries keys"]:
    """What the queries, the last of the keys, may see: themselves and what is before them, `same_length` keys at most.

    The paper does not define this window, which its authors' option `same_length` opens as wide as the memory is long;
    their two codes differ by one key. The PyTorch code, and Hugging Face's like it, shows mem_len keys, the query's own
    among them, so that the first query does not see the first token of a full memory (kimiyoung/transformer-xl#86 and
    huggingface/transformers#14832 take it for a mistake). The TensorFlow code shows mem_len + 1, and in a segment
    without memory nothing but the query itself. The first is taken here: the published weights were evaluated with it,
    it means the same however a text is cut into segments, and the memory always holds what a query may see. With a
    memory of 2, for a segment of 3 after it:

        0 1 1 0 0
        0 0 1 1 0
        0 0 0 1 1
    """
    real = torch.ones(1, keys, dtype=torch.bool, device=device)
    return masks.visible_keys(real, num_queries=queries, sliding_window=same_length)


class SegmentMemory:
    """The memories of all layers. A call that fails half way leaves them as they were: they move at the `commit`."""

    def __init__(self, *, num_layers: int, mem_len: int) -> None:
        """`mem_len`: tokens that each layer remembers."""
        self.mem_len = mem_len
        self.layers: list[Hidden | None] = [None] * num_layers

    @property
    def length(self) -> int:
        """Tokens remembered."""
        first = self.layers[0]
        return 0 if first is None else first.shape[1]

    def of_batch(self, batch: int) -> list[Hidden | None]:
        """The memory of each layer.  Raises ValueError unless the batch is that of the earlier segments."""
        first = self.layers[0]
        if first is not None and first.shape[0] != batch:
            raise ValueError(f"the memory is of a batch of {first.shape[0]}, got {batch}; start a new session")
        return self.layers

    def commit(self, entered: list[Hidden]) -> None:
        """Ends a segment: `entered` is what entered each layer."""
        pairs = zip(self.layers, entered, strict=True)
        self.layers = [remember(old, new, self.mem_len) for old, new in pairs]

    def state_bytes(self) -> int:
        """Memory held, in bytes; it does not grow any more once `mem_len` tokens have been fed."""
        return sum(layer.numel() * layer.element_size() for layer in self.layers if layer is not None)


class SegmentSession:
    """Feeds a model one batch of texts, segment after segment."""

    def __init__(self, model: nn.Module, memory: SegmentMemory) -> None:
        """`model` takes (input_ids, memory=…); `memory` is empty and fits it."""
        self._model = model
        self._memory = memory

    def feed(self, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        """Log-probabilities of the tokens after these, given the memory of what was fed before.

        Gradients reach the parameters through this segment alone; under torch.no_grad() none are recorded.
        """
        logits: Tensor = self._model(input_ids, memory=self._memory)
        return logits

    def state_bytes(self) -> int:
        """Memory that the session holds, in bytes."""
        return self._memory.state_bytes()
