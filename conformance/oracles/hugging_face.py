"""Hugging Face transformers as oracle: its unmodified models, at true double precision or in a working dtype.

The library itself loads the model from a checkpoint directory, under `TrueDouble` for the truth (its `.double()` keeps
float32 casts inside).  Probes come from forward hooks at module boundaries and from a tap on the attention kernel; none
of them is computed by this project, except `scores`, which the kernel does not return: they are recomputed from
the kernel's own query and key and must reproduce the kernel's own weights.
"""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
        self.truth, self.dtype = dtype is None, dtype or torch.float64
        config, weights = self.checkpoint(config, weights)
        with tempfile.TemporaryDirectory() as directory:
            write_json(Path(directory, "config.json"), config)
            save_file(weights, Path(directory, "model.safetensors"), metadata={"format": "pt"})
            self.model = self._load(directory, attention)

    def _load(self, directory: str, attention: str) -> Any:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()  # what it would warn of is raised below
        architecture = self.architecture()
        settings = {**self.family.oracle_settings, **(self.family.double_settings if self.truth else {})}
        with self._mode():
            model, info = architecture.from_pretrained(
                directory, dtype=self.dtype, attn_implementation=attention, output_loading_info=True, **settings
            )
        if faults := {what: sorted(found) for what, found in info.items() if found}:
            raise ValueError(f"{architecture.__name__} does not want exactly these weights: {faults}")
        return model.eval()

    def checkpoint(self, config: "Config", weights: dict[str, Tensor]) -> "tuple[Config, dict[str, Tensor]]":
        """What the library loads: config.json and weights, here those of the case."""
        return config, weights

    def architecture(self) -> Any:
        """The library's class."""
        import transformers

        return getattr(transformers, self.family.oracle)

    def logits(self, input_ids: Tensor, **optional: Tensor) -> Tensor:
        """Logits (batch, seq, vocab) of a call with the contract's arguments."""
        with torch.no_grad(), self._mode():
            return self._call(input_ids, **optional).logits  # type: ignore[no-any-return]

    def loss_and_gradients(
        self, input_ids: Tensor, labels: Tensor | None = None, **optional: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The library's own loss over all rows, and its gradient for every parameter by hub name.

        labels: what is to be predicted; None for the ids themselves.
        """
        self.model.zero_grad()
        with self._mode():
            loss = self._call(input_ids, labels=input_ids if labels is None else labels, **optional).loss
            loss.backward()
        return loss.detach(), self.gradients()

    def auxiliary_losses(self, input_ids: Tensor, labels: Tensor, **optional: Tensor) -> dict[str, Tensor]:
        """What routers add to the library's loss, before their coefficients, by the contract's names."""
        with torch.no_grad(), self._mode():
            return {"aux_loss": self._call(input_ids, labels=labels, **optional).aux_loss}

    def gradients(self) -> dict[str, Tensor]:
        """What the last backward left, by the names of the case."""
        return {name: p.grad.detach().clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def probes(self, input_ids: Tensor, **optional: Tensor) -> dict[str, Tensor]:
        """Every probe of the family, in canonical axes and computational order (eager attention only)."""
        boundaries = at_module_boundaries(self.model, self.module_probes())
        with torch.no_grad(), self._mode(), self.tapped() as tapped, boundaries as found:
            self._call(input_ids, **optional)
        for probe, (_, quantity) in self.family.kernel_probes(self.config).items():
            found[probe] = self.tapped_at(probe, tapped)[quantity]
        return canonical(self.family, self.config, found, {"input_ids": input_ids, **optional})

    def tapped_at(self, probe: str, tapped: dict[Any, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The values that were tapped where the probe is: of its layer."""
        return tapped[int(probe.split(".")[1])]

    def at_boundaries(self, probes: list[str], **arguments: Tensor) -> dict[str, Tensor]:
        """Some probes that module boundaries show, in canonical axes; in any dtype and with any kernel."""
        places = {probe: place for probe, place in self.module_probes().items() if probe in probes}
        with torch.no_grad(), self._mode(), at_module_boundaries(self.model, places) as found:
            self._call(**arguments)
        return canonical(self.family, self.config, found, arguments)

    def module_probes(self) -> dict[str, tuple[str, str]]:
        """Probe -> (path of the library's module, "input" or "output")."""
        return self.family.module_probes(self.config)

    def tapped(self) -> contextlib.AbstractContextManager[dict[Any, dict[str, Tensor]]]:
        """While open, the attention kernels tell what they receive and return: layer -> quantity -> value."""
        return tapped_attention(self.model)

    def _call(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **more: Any,
    ) -> Any:
        # Positions are always given to the library, never left for it to derive. With jumping positions and no mask it
        # takes a row for packed documents; a mask of ones says no.
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = real_positions(attention_mask)
        return self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **more)


def real_positions(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only: cumsum(attention_mask) - 1, pads at 0."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def by_layer(module: Any) -> Any:
    """How a decoder-only model's attention is known: by the number of its layer."""
    return module.layer_idx


@contextlib.contextmanager
def tapped_attention(
    model: torch.nn.Module, key_of: Callable[[Any], Any] = by_layer, configs: Sequence[Any] = ()
) -> Iterator[dict[Any, dict[str, Tensor]]]:
    """Switch the model to an attention kernel that also tells what it received and returned, layer by layer.

    Works for models on the library's attention interface.
    key_of: the attention module -> what its values are known by.
    configs: those of parts of the model that have copies of their own (encoder, decoder).
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tapped: dict[Any, dict[str, Tensor]] = {}

    def tap(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kw: Any
    ) -> Any:
        home = sys.modules[type(module).__module__]
        context, weights = home.eager_attention_forward(module, query, key, value, attention_mask, scaling, **kw)
        groups = query.shape[1] // key.shape[1]
        keys = home.repeat_kv(key, groups) if groups > 1 else key
        scores = query @ keys.transpose(2, 3) * scaling
        if kw.get("position_bias") is not None:
            scores = scores + kw["position_bias"]
        masked = scores if attention_mask is None else scores + attention_mask
        if not torch.allclose(masked.softmax(-1), weights, rtol=0, atol=1e-14):
            raise AssertionError("the recomputed scores do not give the kernel's own weights")
        values = {"query": query, "key": key, "value": value, "scores": scores,
                  "weights": weights, "context": context}  # fmt: skip
        tapped[key_of(module)] = {quantity: tensor.detach().clone() for quantity, tensor in values.items()}
        return context, weights

    ALL_ATTENTION_FUNCTIONS.register("conformance_tap", tap)
    ALL_MASK_ATTENTION_FUNCTIONS.register("conformance_tap", eager_mask)
    settings: list[Any] = [model.config, *configs]
    before = [config._attn_implementation for config in settings]
    for config in settings:
        config._attn_implementation = "conformance_tap"
    try:
        yield tapped
    finally:
        for config, kernel in zip(settings, before, strict=True):
            config._attn_implementation = kernel
