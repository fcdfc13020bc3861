"""Hugging Face transformers as oracle: its unmodified models, at true double precision or in a working dtype.

The library itself loads the model from a checkpoint directory, under `TrueDouble` for the truth (its `.double()` keeps
float32 casts inside).  Probes come from forward hooks at module boundaries and from taps on the kernels of
attention and experts; none of them is computed by this project, except `scores`, which the kernel does not return: they
are recomputed from the kernel's own query and key and must reproduce the kernel's own weights.
"""

import contextlib
import functools
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from conformance.cases import write_json
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
        self.family, self.config = family, config
        self._mode: Any = TrueDouble if dtype is None else contextlib.nullcontext
        self.dtype = dtype or torch.float64
        with tempfile.TemporaryDirectory() as directory:
            write_json(Path(directory, "config.json"), config)
            save_file(weights, Path(directory, "model.safetensors"), metadata={"format": "pt"})
            self.model = self._load(directory, attention)

    def _load(self, directory: str, attention: str) -> Any:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        architecture = getattr(transformers, self.family.oracle)
        with self._mode():
            model, info = architecture.from_pretrained(
                directory, dtype=self.dtype, attn_implementation=attention, output_loading_info=True,
                **self.family.oracle_settings,
            )  # fmt: skip
        if faults := {what: sorted(found) for what, found in info.items() if found}:
            raise ValueError(f"{self.family.oracle} does not want exactly these weights: {faults}")
        return model.eval()

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
        return loss.detach(), self._by_hub_name(gradients)

    def _by_hub_name(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by parameter, as the library itself would save them: what it fuses in memory is cut up again."""
        from transformers.core_model_loading import revert_weight_conversion

        return {n: t.contiguous() for n, t in revert_weight_conversion(self.model, tensors).items()}

    def probes(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Every probe of the family, in canonical axes and computational order (eager attention only)."""
        boundaries = at_module_boundaries(self.model, self._places())
        taps = _tapped_attention(self.model), _tapped_experts(self.model)
        with torch.no_grad(), self._mode(), boundaries as found, taps[0] as attention, taps[1] as experts:
            self._call(input_ids, None, None)
        for probe, (_, quantity) in self.family.kernel_probes(self.config).items():
            layer = int(probe.split(".")[1])
            found[probe] = (attention[layer] | experts.get(layer, {}))[quantity]
        return canonical(self.family, self.config, found, *input_ids.shape)

    def at_boundaries(self, input_ids: Tensor, probes: list[str]) -> dict[str, Tensor]:
        """Some probes that module boundaries show, in canonical axes; in any dtype and with any kernel."""
        places = {probe: place for probe, place in self._places().items() if probe in probes}
        with torch.no_grad(), self._mode(), at_module_boundaries(self.model, places) as found:
            self._call(input_ids, None, None)
        return canonical(self.family, self.config, found, *input_ids.shape)

    def _places(self) -> dict[str, tuple[str, str]]:
        """The family's `module_probes`, with module paths as the library has them in memory."""
        places = self.family.module_probes(self.config)
        for part, renamed in self.family.library_paths.items():
            places = {probe: (path.replace(part, renamed), side) for probe, (path, side) in places.items()}
        return places

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
def _tapped_experts(model: torch.nn.Module) -> Iterator[dict[int, dict[str, Tensor]]]:
    """Have every fused experts module tell, layer by layer, the weights it received and what the chosen experts return.

    The library returns the weighted sum only. Its own experts are called once for each place in a token's choice, with
    a weight of 1; the weighted sum of these must be what it returned.
    """
    tapped: dict[int, dict[str, Tensor]] = {}

    def tap(layer: int, experts: Any, args: tuple[Tensor, Tensor, Tensor], returned: Tensor) -> None:
        x, chosen, weights = args
        alone = [experts.forward(x, one, torch.ones_like(one, dtype=x.dtype)) for one in chosen.split(1, dim=-1)]
        outputs = torch.stack(alone, dim=1)  # (tokens, k, hidden)
        if not torch.allclose((weights[..., None] * outputs).sum(1), returned, rtol=1e-13, atol=1e-13):
            raise AssertionError("the experts' outputs, weighted, do not give what the module returned")
        tapped[layer] = {"routing_weights": weights.detach().clone(), "expert_outputs": outputs.detach()}

    handles = [
        module.register_forward_hook(functools.partial(tap, int(found[1])))
        for name, module in model.named_modules()
        if (found := re.search(r"layers\.(\d+)\.mlp\.experts$", name))
    ]
    try:
        yield tapped
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _tapped_attention(model: torch.nn.Module) -> Iterator[dict[int, dict[str, Tensor]]]:
    """Switch the model to an attention kernel that also tells what it received and returned, layer by layer.

    Works for models on the library's attention interface.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tapped: dict[int, dict[str, Tensor]] = {}

    def tap(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kw: Any
    ) -> Any:
        home = sys.modules[type(module).__module__]
        context, weights = home.eager_attention_forward(module, query, key, value, attention_mask, scaling, **kw)
        groups = query.shape[1] // key.shape[1]
        keys = home.repeat_kv(key, groups) if groups > 1 else key
        scores = query @ keys.transpose(2, 3) * scaling
        masked = scores if attention_mask is None else scores + attention_mask
        if not torch.allclose(masked.softmax(-1), weights, rtol=0, atol=1e-14):
            raise AssertionError("the recomputed scores do not give the kernel's own weights")
        values = {"query": query, "key": key, "scores": scores, "weights": weights, "context": context}
        tapped[module.layer_idx] = {quantity: tensor.detach().clone() for quantity, tensor in values.items()}
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
