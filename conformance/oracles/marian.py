"""The oracles of the Transformer: `MarianMTModel` of Hugging Face, and `torch.nn.Transformer`, which must agree.

Marian's positions count pads, and it takes none of ours: its position tables are made to look up those of real tokens.
For the paper's order of sines and cosines the columns of these tables are put into that order.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from conformance.golden.common import AGREEMENT
from conformance.oracles import torch_transformer
from conformance.oracles.hugging_face import HuggingFace, real_positions, tapped_attention


class Marian(HuggingFace):
    """The library's Marian; its logits of ids without padding are those of `torch.nn.Transformer` too."""

    def checkpoint(
        self, config: dict[str, Any], weights: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        self.weights = weights
        return config | {"model_type": "marian"}, weights

    def _load(self, directory: str, attention: str) -> Any:
        model = super()._load(directory, attention)
        for side in ("encoder", "decoder"):
            self._mend_positions(side, getattr(model.model, side).embed_positions)
        return model

    def _mend_positions(self, side: str, table: Any) -> None:
        if self.config["model_type"] == "transformer":
            sines, cosines = table.weight.data.chunk(2, dim=-1)
            table.weight.data = torch.stack((sines, cosines), dim=-1).flatten(start_dim=-2)
        table.forward = lambda *_, **__: table.weight.detach()[self._positions[side]]

    def logits(self, input_ids: Tensor, **optional: Tensor) -> Tensor:
        """Raises: AssertionError if the two oracles differ."""
        theirs = super().logits(input_ids, **optional)
        if self.truth and optional.keys() == {"decoder_input_ids"}:
            with self._mode():
                other = torch_transformer.logits(self.config, self.weights, input_ids, **optional)
            error = ((other - theirs).abs().max() / theirs.abs().max()).item()
            if not error <= AGREEMENT:
                raise AssertionError(f"MarianMTModel and torch.nn.Transformer differ by {error:.1e}")
        return theirs

    def _call(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Any:
        assert position_ids is None
        assert decoder_input_ids is not None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        its_mask = torch.ones_like(decoder_input_ids) if decoder_attention_mask is None else decoder_attention_mask
        self._positions = {"encoder": real_positions(mask), "decoder": real_positions(its_mask)}
        return self.model(
            input_ids, attention_mask=mask, decoder_input_ids=decoder_input_ids, decoder_attention_mask=its_mask,
            use_cache=False, **more,
        )  # fmt: skip

    def tapped(self) -> contextlib.AbstractContextManager[dict[Any, dict[str, Tensor]]]:
        names = {}
        for side in ("encoder", "decoder"):
            for number, layer in enumerate(getattr(self.model.model, side).layers):
                names[id(layer.self_attn)] = f"{side}.layers.{number}.attention"
                if side == "decoder":
                    names[id(layer.encoder_attn)] = f"{side}.layers.{number}.cross_attention"
        return tapped_attention(self.model, lambda module: names[id(module)])

    def tapped_at(self, probe: str, tapped: dict[Any, dict[str, Tensor]]) -> dict[str, Tensor]:
        return tapped[probe.rpartition(".")[0]]
