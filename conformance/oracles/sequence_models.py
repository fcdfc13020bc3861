"""RNNsearch and GNMT, which no library has: the truth is their papers' equations, number by number in float64.

In a working dtype those loops would be a strange program: nobody multiplies one column at a time.  The oracle's own
error is measured with what one would write instead, batches through torch.nn's recurrent layers and torch's operations,
run in that dtype (`torch_sequence_models`).  Tests prove that both agree in float64 to 1e-12.

A configuration with the key `MISTAKE` is what a candidate effectively runs that makes it: one equation is another.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.oracles import torch_sequence_models as working
from conformance.oracles.equations import gnmt, rnn_search
from conformance.oracles.sequence_mistakes import GNMT_MISTAKES, RNN_SEARCH
from conformance.oracles.torch_recurrent import without_onednn
from conformance.probes import canonical

if TYPE_CHECKING:
    from conformance.families import Config, Family

# Not a key of any config.json: only counterfactuals of cases use it.
MISTAKE = "mistake"


class EquationModel:
    """An encoder–decoder model by its equations, with a case's weights; an oracle like `HuggingFace`.

    dtype: None for the equations in float64, else the working dtype that the composition runs in.
    Raises: ValueError if the weights are not exactly the tensors that the family wants.
    """

    equations: Any
    mistakes: Mapping[str, Any]
    composed: Any

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
        self.truth, self.dtype = dtype is None, dtype or torch.float64
        if (wanted := family.tensor_shapes(config)) != (given := {n: tuple(w.shape) for n, w in weights.items()}):
            differ = sorted({name for name, _ in wanted.items() ^ given.items()})
            raise ValueError(f"{family.name} does not want exactly these weights: {', '.join(differ)} differ")
        self.weights = {name: weight.to(self.dtype, copy=True) for name, weight in weights.items()}

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (batch, target, vocab) of `decoder_input_ids`; zero at its pads.  A padded row is run by itself."""
        assert decoder_input_ids is not None
        with torch.no_grad():
            if attention_mask is None and decoder_attention_mask is None:
                return self._run(input_ids, decoder_input_ids)["logits"]
            sources, targets = _real(input_ids, attention_mask), _real(decoder_input_ids, decoder_attention_mask)
            rows = []
            for b, (source, target) in enumerate(zip(sources, targets, strict=True)):
                found = self._run(input_ids[b, source][None], decoder_input_ids[b, target][None])["logits"][0]
                rows.append(found.new_zeros(decoder_input_ids.shape[1], found.shape[1]))
                rows[-1][target] = found
            return torch.stack(rows)

    def probes(self, input_ids: Tensor, decoder_input_ids: Tensor) -> dict[str, Tensor]:
        """Every probe of the family, in canonical axes and computational order; by the equations alone."""
        with torch.no_grad():
            found = self._run(input_ids, decoder_input_ids)
        arguments = {"input_ids": input_ids, "decoder_input_ids": decoder_input_ids}
        return canonical(self.family, self.config, found, arguments)

    def loss_and_gradients(
        self, input_ids: Tensor, labels: Tensor, decoder_input_ids: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of the labels, each in the place of its logits, and its gradient for every weight."""
        self.weights = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
        loss = F.cross_entropy(self._run(input_ids, decoder_input_ids)["logits"].flatten(0, 1), labels.flatten())
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        return loss.detach(), dict(zip(self.weights, gradients, strict=True))

    def _run(self, input_ids: Tensor, decoder_input_ids: Tensor) -> dict[str, Tensor]:
        if not self.truth:
            with without_onednn():
                return {"logits": self.composed(self.config, self.weights, input_ids, decoder_input_ids)}
        mistake = self.config.get(MISTAKE)
        model = (self.equations if mistake is None else self.mistakes[mistake])(self.config, self.weights)
        rows = [model.row(*ids) for ids in zip(input_ids.tolist(), decoder_input_ids.tolist(), strict=True)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _real(ids: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(ids).bool() if mask is None else mask.bool()


class RNNSearch(EquationModel):
    """The paper's equations, `equations.rnn_search`."""

    equations, mistakes, composed = rnn_search.RNNSearch, RNN_SEARCH, staticmethod(working.rnn_search)


class GNMT(EquationModel):
    """The paper's equations, `equations.gnmt`."""

    equations, mistakes, composed = gnmt.GNMT, GNMT_MISTAKES, staticmethod(working.gnmt)
