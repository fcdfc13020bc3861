"""Mixtral of Hugging Face as oracle: the experts that the library fuses in memory, seen as the checkpoint has them."""

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from conformance.oracles.hugging_face import HuggingFace, tapped_attention


class Mixtral(HuggingFace):
    """The library's Mixtral, under the names of the hub."""

    def module_probes(self) -> dict[str, tuple[str, str]]:
        return {
            probe: (path.replace(".block_sparse_moe", ".mlp"), side)
            for probe, (path, side) in super().module_probes().items()
        }

    def auxiliary_losses(self, input_ids: Tensor, labels: Tensor, **optional: Tensor) -> dict[str, Tensor]:
        """Mixtral's paper states none: that of the library, over the tokens of all layers together."""
        with torch.no_grad(), self._mode():
            return {"aux_loss": self._call(input_ids, output_router_logits=True, **optional).aux_loss}

    def gradients(self) -> dict[str, Tensor]:
        """Cut up as the library itself would cut the parameters up to save them."""
        from transformers.core_model_loading import revert_weight_conversion

        return {n: t.contiguous() for n, t in revert_weight_conversion(self.model, super().gradients()).items()}

    @contextlib.contextmanager
    def tapped(self) -> Iterator[dict[Any, dict[str, Tensor]]]:
        """While open, attention and experts tell what they receive and return: layer -> quantity -> value."""
        with tapped_attention(self.model) as tapped, _tapped_experts(self.model, tapped):
            yield tapped


@contextlib.contextmanager
def _tapped_experts(model: torch.nn.Module, tapped: dict[Any, dict[str, Tensor]]) -> Iterator[None]:
    """Add to `tapped` the routing weights that every fused experts module received, and what the chosen experts return.

    The library returns the weighted sum only. Its own experts are called once for each place in a token's choice, with
    a weight of 1; the weighted sum of these must be what it returned.
    """

    def tap(layer: int, experts: Any, args: tuple[Tensor, Tensor, Tensor], returned: Tensor) -> None:
        x, chosen, weights = args
        alone = [experts.forward(x, one, torch.ones_like(one, dtype=x.dtype)) for one in chosen.split(1, dim=-1)]
        outputs = torch.stack(alone, dim=1)  # (tokens, k, hidden)
        if not torch.allclose((weights[..., None] * outputs).sum(1), returned, rtol=1e-13, atol=1e-13):
            raise AssertionError("the experts' outputs, weighted, do not give what the module returned")
        tapped[layer] |= {"routing_weights": weights.detach().clone(), "expert_outputs": outputs.detach()}

    handles = [
        module.register_forward_hook(functools.partial(tap, int(found[1])))
        for name, module in model.named_modules()
        if (found := re.search(r"layers\.(\d+)\.mlp\.experts$", name))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
