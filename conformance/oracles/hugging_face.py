"""Hugging Face transformers as oracle: its unmodified models, at true double precision or in a working dtype.

The model is built from the case's own config and weights, under `TrueDouble` for the truth (its `.double()` keeps
float32 casts inside).  Probes come from forward hooks at module boundaries and from a tap on the attention kernel;
none of them is computed by this project, except `scores`, which the kernel does not return: they are recomputed from
the kernel's own query and key and must reproduce the kernel's own weights.
"""

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conformance.oracles.true_double import TrueDouble
from conformance.probes import at_module_boundaries, canonical

if TYPE_CHECKING:
    from conformance.families import Config, Family

# The kernels whose spread in a working dtype is the oracle's own error.
KERNELS = ("eager", "sdpa")


class HuggingFace:
    """One model of Hugging Face with a case's weights.

    family: names the architecture and the probes; config and weights: as a checkpoint holds them.
    dtype: None for true double precision, else the working dtype that everything runs in.
    attention: "eager" or "sdpa".
    Raises: ValueError if the weights are not exactly the tensors that the architecture wants.
    """

    def __init__(
        self,
        family: "Family",
        config: "Config",
        weights: dict[str, Tensor],
        *,
        dtype: torch.dtype | None = None,
        attention: str = "eager",
    ):
        import transformers

        self.family, self.config = family, config
        self._mode: Any = TrueDouble if dtype is None else contextlib.nullcontext
        self.dtype = dtype or torch.float64
        architecture = getattr(transformers, family.oracle)
        with self._mode():
            settings = architecture.config_class.from_dict(copy.deepcopy(config), attn_implementation=attention)
            self.model = architecture(settings).to(self.dtype).eval()
            missing, unexpected = self.model.load_state_dict(weights, strict=False)
        tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
        if set(missing) - tied or unexpected:
            raise ValueError(f"{family.oracle} misses {sorted(set(missing) - tied)}, does not want {unexpected}")

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits (batch, seq, vocab).  Positions are always given to the library, never left for it to derive."""
        with torch.no_grad(), self._mode():
            return self._call(input_ids, attention_mask, position_ids).logits  # type: ignore[no-any-return]

    def loss_and_gradients(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The library's own next-token loss over all rows, and its gradient for every parameter by hub name."""
        self.model.zero_grad()
        with self._mode():
            loss = self._call(input_ids, None, None, labels=input_ids).loss
            loss.backward()
        gradients = {name: p.grad.detach().clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return loss.detach(), gradients

    def probes(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Every probe of the family, in canonical axes and computational order (eager attention only)."""
        boundaries = at_module_boundaries(self.model, self.family.module_probes(self.config))
        with torch.no_grad(), self._mode(), _tapped(self.model) as tapped, boundaries as found:
            self._call(input_ids, None, None)
        return canonical(self.family, self.config, found | tapped, *input_ids.shape)

    def _call(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, **more: Any) -> Any:
        # With jumping positions and no mask the library takes a row for packed documents; a mask of ones says no.
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = real_positions(attention_mask)
        return self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **more)


def real_positions(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only: cumsum(attention_mask) - 1, pads at 0."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


@contextlib.contextmanager
def _tapped(model: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Switch the model to an attention kernel that also tells what it received and returned."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tapped: dict[str, Tensor] = {}

    def tap(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kw: Any
    ) -> Any:
        home = sys.modules[type(module).__module__]
        context, weights = home.eager_attention_forward(module, query, key, value, attention_mask, scaling, **kw)
        scores = query @ home.repeat_kv(key, query.shape[1] // key.shape[1]).transpose(2, 3) * scaling
        masked = scores if attention_mask is None else scores + attention_mask
        if not torch.allclose(masked.softmax(-1), weights, rtol=0, atol=1e-14):
            raise AssertionError("the recomputed scores do not give the kernel's own weights")
        prefix = f"layers.{module.layer_idx}.attention."
        for name, tensor in {
            "query_rotated": query, "key_rotated": key, "scores": scores, "weights": weights,
        }.items():  # fmt: skip
            tapped[prefix + name] = tensor.detach().clone()
        return context, weights

    ALL_ATTENTION_FUNCTIONS.register("conformance_tap", tap)
    ALL_MASK_ATTENTION_FUNCTIONS.register("conformance_tap", eager_mask)
    settings: Any = model.config
    before = settings._attn_implementation
    settings._attn_implementation = "conformance_tap"
    try:
        yield tapped
    finally:
        settings._attn_implementation = before
