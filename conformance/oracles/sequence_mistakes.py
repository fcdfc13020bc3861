"""What RNNsearch and GNMT give when one of their equations is another: counterfactuals of their cases, by label.

Each completes "equals the oracle with …".
"""

from typing import Any

import torch
from torch import Tensor

from conformance.oracles.equations.gnmt import GNMT, State
from conformance.oracles.equations.gnmt import Weights as GNMTWeights
from conformance.oracles.equations.rnn_search import RNNSearch, Weights

# --- RNNsearch ------------------------------------------------------------------------------------------------------


class ReadsNewState(RNNSearch):
    """t̃_i = U_o s_i + …, as equation 4 may be read."""

    def read(self, before: Tensor, after: Tensor) -> Tensor:
        return after


class SearchesAfterStep(RNNSearch):
    """The unit steps with c_{i-1}, c_0 = 0, and s_i does the search, as in Luong et al. 2015."""

    def step(
        self, word: Tensor, s: Tensor, h: list[Tensor], previous: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        s = self.gated("decoder.rnn", "", self.unit_input(word, previous), s)
        c, found = self.search(s, h)
        return s, c, {**found, "state": s}


class UpdatesByThePaper(RNNSearch):
    """The file's z taken for the paper's: a gate near one takes the candidate."""

    def update_gate(self, a: Tensor) -> Tensor:
        return torch.sigmoid(a)


class GatesWithoutContext(RNNSearch):
    """C_z = C_r = 0."""

    def __init__(self, config: dict[str, Any], weights: Weights):
        weight = weights["decoder.rnn.weight_ih_l0"].clone()
        weight[: 2 * len(weight) // 3, config["embedding_size"] :] = 0
        super().__init__(config, weights | {"decoder.rnn.weight_ih_l0": weight})


class SwappedAnnotation(RNNSearch):
    def annotation(self, forward: Tensor, backward: Tensor) -> Tensor:
        return torch.cat([backward, forward])


class UnturnedBackward(RNNSearch):
    """Listed as they were computed, the last word's state first; s_0 is made from the right one all the same."""

    def backward_states(self, words: list[Tensor]) -> list[Tensor]:
        return super().backward_states(words)[::-1]

    def initial(self, forward: list[Tensor], backward: list[Tensor]) -> Tensor:
        return super().initial(forward, backward[::-1])


class StartsAtLastWord(RNNSearch):
    """s_0 from ←h_S, which has seen one word."""

    def initial(self, forward: list[Tensor], backward: list[Tensor]) -> Tensor:
        return super().initial(forward, backward[::-1])


class StartsFromForward(RNNSearch):
    """s_0 from →h_S."""

    def initial(self, forward: list[Tensor], backward: list[Tensor]) -> Tensor:
        return super().initial(backward, forward[::-1])


class StartsAtZero(RNNSearch):
    def initial(self, forward: list[Tensor], backward: list[Tensor]) -> Tensor:
        return torch.zeros_like(backward[0])


class MaxoutOfHalves(RNNSearch):
    """max(t̃_j, t̃_{l+j})."""

    def maxout(self, pieces: Tensor) -> Tensor:
        return torch.maximum(*pieces.chunk(2))


RNN_SEARCH = {
    "s_i in the deep output, where the appendix has s_{i-1}": ReadsNewState,
    "the search after the step, with s_i": SearchesAfterStep,
    "the update gates the other way round, as the paper writes them": UpdatesByThePaper,
    "the context in the candidate state only, not in the gates": GatesWithoutContext,
    "the directions swapped in the annotations": SwappedAnnotation,
    "the backward states not turned back into reading order": UnturnedBackward,
    "s_0 from the backward state of the last word": StartsAtLastWord,
    "s_0 from the forward state": StartsFromForward,
    "s_0 at zero": StartsAtZero,
    "maxout over the halves, not over neighbours": MaxoutOfHalves,
}

# --- GNMT -----------------------------------------------------------------------------------------------------------


class SearchesWithNewOutput(GNMT):
    """The bottom layer steps with a_{i-1}, a_0 = 0; its new output searches, and the layers above read a_i."""

    def step(
        self, token: Tensor, states: list[State], x: list[Tensor], previous: Tensor
    ) -> tuple[list[State], Tensor, dict[str, Tensor], dict[str, Tensor]]:
        bottom = self.lstm("decoder.layers.0", "", self.layer_input(1, token, previous), states[0])
        a, found = self.search(bottom[1], x)
        new, stack = self.upper(bottom, states, a)
        return new, a, {**found, "state": bottom[1]}, stack


class ContextAtBottomOnly(GNMT):
    def layer_input(self, layer: int, below: Tensor, a: Tensor) -> Tensor:
        return super().layer_input(layer, below, a if layer == 1 else torch.zeros_like(a))


class ContextAboveBottomOnly(GNMT):
    def layer_input(self, layer: int, below: Tensor, a: Tensor) -> Tensor:
        return super().layer_input(layer, below, a if layer > 1 else torch.zeros_like(a))


class NothingFoundAtFirst(GNMT):
    """a_1 = 0: nothing searches before there is an output."""

    def search(self, y: Tensor, x: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        a, found = super().search(y, x)
        return (a if y.any() else torch.zeros_like(a)), found


class ResidualFromSecondDecoderLayer(GNMT):
    def handed_on(self, stack: str, layer: int, below: Tensor, m: Tensor) -> Tensor:
        return m + below if stack == "decoder" and layer == 2 else super().handed_on(stack, layer, below, m)


class ResidualFromFourthLayer(GNMT):
    def handed_on(self, stack: str, layer: int, below: Tensor, m: Tensor) -> Tensor:
        return m if layer == 3 else super().handed_on(stack, layer, below, m)


class NoResidual(GNMT):
    def handed_on(self, stack: str, layer: int, below: Tensor, m: Tensor) -> Tensor:
        return m


class NoEncoderResidual(GNMT):
    def handed_on(self, stack: str, layer: int, below: Tensor, m: Tensor) -> Tensor:
        return m if stack == "encoder" else super().handed_on(stack, layer, below, m)


class SwappedDirections(GNMT):
    def joined(self, forward: Tensor, backward: Tensor) -> Tensor:
        return torch.cat([backward, forward])


class UnturnedDirection(GNMT):
    def backward(self, x: list[Tensor]) -> list[Tensor]:
        return super().backward(x)[::-1]


class ForgetBiasAdded(GNMT):
    """f = σ(… + 1), which TensorFlow's cells add at run time."""

    def __init__(self, config: dict[str, Any], weights: GNMTWeights):
        changed = {}
        for name, bias in weights.items():
            if ".bias_ih_" in name:
                forget = slice(len(bias) // 4, len(bias) // 2)
                changed[name] = bias.index_add(0, torch.arange(len(bias))[forget], torch.ones_like(bias[forget]))
        super().__init__(config, weights | changed)


GNMT_MISTAKES = {
    "the search with the bottom layer's new output": SearchesWithNewOutput,
    "the context in the bottom decoder layer only": ContextAtBottomOnly,
    "the context above the bottom decoder layer only": ContextAboveBottomOnly,
    "no context in the first step": NothingFoundAtFirst,
    "residual connections from the second decoder layer on": ResidualFromSecondDecoderLayer,
    "residual connections from the fourth layer on": ResidualFromFourthLayer,
    "no residual connections": NoResidual,
    "no residual connections in the encoder": NoEncoderResidual,
    "the directions of the bottom encoder layer swapped": SwappedDirections,
    "the backward outputs not turned back into reading order": UnturnedDirection,
    "1 added to the forget gates": ForgetBiasAdded,
}
