"""Switch Transformers of Hugging Face as oracle.

Where the library differs from the paper or from its own documentation, these decide:

- `router_ignore_padding_tokens` is stored and never read.  Where it is set, a padded row's truth is that of the row
  alone, without padding.
- The losses of the routers are averaged over the layers of encoder and decoder, the balancing loss over the rows too,
  and both are 0 where every layer is sparse.  The paper sums over the layers and averages over the tokens of a batch;
  its equations are applied to the library's router logits (`conformance.oracles.equations.switch`).
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from conformance.oracles.equations.switch import balancing_loss, z_loss
from conformance.oracles.hugging_face import HuggingFace, tapped_attention


class SwitchTransformers(HuggingFace):
    """The library's model with its language modelling head; what is tapped is kept by the path of its module."""

    def logits(self, input_ids: Tensor, **optional: Tensor) -> Tensor:
        if self.config.get("router_ignore_padding_tokens") and "attention_mask" in optional:
            return self._rows_alone(input_ids, **optional)
        return super().logits(input_ids, **optional)

    def _rows_alone(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Tensor
    ) -> Tensor:
        """Logits of each row's real tokens, from a call without padding; 0 at pads."""
        rows = []
        for row, (source, target) in enumerate(zip(attention_mask.bool(), decoder_attention_mask.bool(), strict=True)):
            ids, decoded = input_ids[row, source][None], decoder_input_ids[row, target][None]
            alone = super().logits(ids, decoder_input_ids=decoded)[0]
            rows.append(alone.new_zeros(len(target), alone.shape[-1]).masked_scatter(target[:, None], alone))
        return torch.stack(rows)

    def gradients(self) -> dict[str, Tensor]:
        """Experts that no token was sent to have a gradient of 0; the library leaves them none."""
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            for name, p in self.model.named_parameters()
        }

    def auxiliary_losses(self, input_ids: Tensor, labels: Tensor, **optional: Tensor) -> dict[str, Tensor]:
        """Summed over all sparse layers, as in the paper."""
        routers = [name for name in self.module_probes() if name.endswith("router_logits")]
        logits = self.at_boundaries(routers, input_ids=input_ids, **optional)
        layers = [layer.flatten(0, 1).tolist() for layer in logits.values()]
        return {
            name: torch.tensor(sum(map(loss, layers)), dtype=torch.float64)
            for name, loss in {"aux_loss": balancing_loss, "z_loss": z_loss}.items()
        }

    def tapped_at(self, probe: str, tapped: dict[Any, dict[str, Tensor]]) -> dict[str, Tensor]:
        path, _, _ = self.family.kernel_probes(self.config)[probe][0].rpartition(".")
        return tapped[path]

    @contextlib.contextmanager
    def tapped(self) -> Iterator[dict[Any, dict[str, Tensor]]]:
        paths = {module: name for name, module in self.model.named_modules()}
        configs = [self.model.encoder.config, self.model.decoder.config]
        with tapped_attention(self.model, paths.__getitem__, configs) as tapped, _tapped_experts(self.model, tapped):
            yield tapped

    def _call(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **more: Any,
    ) -> Any:
        assert position_ids is None  # the library takes none: distances are all that its position bias knows
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False, **more)


@contextlib.contextmanager
def _tapped_experts(model: torch.nn.Module, tapped: dict[Any, dict[str, Tensor]]) -> Iterator[None]:
    """Add to `tapped` the routing weights that every experts module received, and what the chosen experts return.

    The library returns them weighted.  Its own experts are called once more with a weight of 1; these, weighted, must
    be what it returned.
    """

    def tap(path: str, experts: Any, args: tuple[Tensor, Tensor, Tensor], returned: Tensor) -> None:
        x, sent, weights = args  # (tokens, hidden), (tokens, 1, experts), (tokens, 1)
        outputs = experts.forward(x, sent, torch.ones_like(weights))
        if not torch.allclose(weights * outputs, returned, rtol=1e-13, atol=1e-13):
            raise AssertionError("the experts' outputs, weighted, do not give what the module returned")
        tapped[path] = {"routing_weights": weights.detach().clone(), "expert_outputs": outputs.detach()}

    handles = [
        module.register_forward_hook(functools.partial(tap, name.removesuffix(".experts")))
        for name, module in model.named_modules()
        if name.endswith(".mlp.experts")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
