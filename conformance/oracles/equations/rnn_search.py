"""RNNsearch, word by word: Bahdanau, Cho and Bengio 2015 (arXiv:1409.0473), section 3 and appendix A.

One pair of sentences at a time; vectors are columns, matrices multiply them from the left.  The paper leaves the biases
out "to increase readability": they are added here.  A file's GRU rows lie in torch.nn's order r, z, n, and its z is
one minus the paper's.
"""

from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


class RNNSearch:
    """The equations, a method each; a subclass that overrides one of them makes one mistake.

    weights: by the names of the case's file, float64 (or any dtype, in which everything is then computed).
    """

    def __init__(self, config: dict[str, Any], weights: Weights):
        self.w = weights
        self.reset_after = bool(config.get("reset_after", False))

    def row(self, source: list[int], target: list[int]) -> dict[str, Tensor]:
        """Every probe of one pair, without a batch axis; "logits" (target, vocab) among them."""
        words = [self.w["encoder.embedding.weight"][x] for x in source]
        forward, backward = self.forward_states(words), self.backward_states(words)
        h = [self.annotation(f, b) for f, b in zip(forward, backward, strict=True)]
        s = self.initial(forward, backward)
        found = {
            "encoder.embedding": torch.stack(words),
            "encoder.layers.0.forward": torch.stack(forward),
            "encoder.layers.0.backward": torch.stack(backward),
            "encoder.layers.0.output": torch.stack(h),
            "decoder.initial_state": s,
        }
        previous = [self.w["decoder.embedding.weight"][y] for y in target]
        found["decoder.embedding"] = torch.stack(previous)
        c = torch.zeros_like(h[0])
        pieces = []
        for i, word in enumerate(previous):
            before = s
            s, c, step = self.step(word, s, h, c)
            found |= {f"decoder.steps.{i}.{name}": value for name, value in step.items()}
            pieces.append(self.pieces(self.read(before, s), word, c))
        units = [self.maxout(piece) for piece in pieces]
        found |= {"decoder.pieces": torch.stack(pieces), "decoder.maxout": torch.stack(units)}
        return found | {"logits": torch.stack([self._affine("decoder.output", t) for t in units])}

    # --- A.1.1 and A.2.1

    def forward_states(self, words: list[Tensor]) -> list[Tensor]:
        """→h_1 … →h_S from →h_0 = 0."""
        return self._states(words, "")

    def backward_states(self, words: list[Tensor]) -> list[Tensor]:
        """←h_1 … ←h_S: computed from the last word to the first one, listed from the first to the last."""
        return self._states(words[::-1], "_reverse")[::-1]

    def _states(self, words: list[Tensor], suffix: str) -> list[Tensor]:
        h = torch.zeros_like(self.w[f"encoder.rnn.weight_hh_l0{suffix}"][0])
        states = []
        for word in words:
            h = self.gated("encoder.rnn", suffix, word, h)
            states.append(h)
        return states

    def gated(self, name: str, suffix: str, x: Tensor, h: Tensor) -> Tensor:
        """h_i = (1 - z_i) ∘ h_{i-1} + z_i ∘ h̲_i, h̲_i = tanh(W x_i + U [r_i ∘ h_{i-1}]), r and z = σ(W x_i + U h_{i-1}).

        With `reset_after` the candidate is tanh(W x_i + b + r_i ∘ (U h_{i-1} + b')) in its stead.
        """
        n = len(h)
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        W, U, b, d = (self.w[f"{name}.{kind}_l0{suffix}"] for kind in kinds)
        R, Z, C = slice(0, n), slice(n, 2 * n), slice(2 * n, 3 * n)
        r = torch.sigmoid(W[R] @ x + b[R] + U[R] @ h + d[R])
        z = self.update_gate(W[Z] @ x + b[Z] + U[Z] @ h + d[Z])
        if self.reset_after:
            candidate = torch.tanh(W[C] @ x + b[C] + r * (U[C] @ h + d[C]))
        else:
            candidate = torch.tanh(W[C] @ x + b[C] + U[C] @ (r * h) + d[C])
        return (1 - z) * h + z * candidate

    def update_gate(self, a: Tensor) -> Tensor:
        """The paper's z: one minus σ of what the file's rows give."""
        return 1 - torch.sigmoid(a)

    def annotation(self, forward: Tensor, backward: Tensor) -> Tensor:
        """h_j = [→h_j; ←h_j], equation 7."""
        return torch.cat([forward, backward])

    # --- A.1.2 and A.2.2

    def initial(self, forward: list[Tensor], backward: list[Tensor]) -> Tensor:
        """s_0 = tanh(W_s ←h_1)."""
        return torch.tanh(self._affine("decoder.initial", backward[0]))

    def step(
        self, word: Tensor, s: Tensor, h: list[Tensor], previous: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """s_i and c_i from E y_{i-1} and s_{i-1}: first the search, then the gated unit, which reads what was found.

        previous: c_{i-1}, which the paper's decoder does not look at.
        """
        c, found = self.search(s, h)
        s = self.gated("decoder.rnn", "", self.unit_input(word, c), s)
        return s, c, {**found, "state": s}

    def search(self, s: Tensor, h: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """e_j = v_aᵀ tanh(W_a s_{i-1} + U_a h_j), α = softmax(e), c_i = Σ_j α_j h_j: equations 5 and 6."""
        W_a, U_a = self.w["decoder.attention.query_weight"], self.w["decoder.attention.memory_weight"]
        v_a, b_a = self.w["decoder.attention.score_vector"], self.w["decoder.attention.bias"]
        e = [v_a @ torch.tanh(W_a @ s + U_a @ h_j + b_a) for h_j in h]
        powers = [e_j.exp() for e_j in e]
        total = torch.stack(powers).sum()
        alpha = [power / total for power in powers]
        c = torch.zeros_like(h[0])
        for alpha_j, h_j in zip(alpha, h, strict=True):
            c = c + alpha_j * h_j
        found = {"scores": torch.stack(e), "weights": torch.stack(alpha), "context": c}
        return c, {f"cross_attention.{name}": value for name, value in found.items()}

    def unit_input(self, word: Tensor, c: Tensor) -> Tensor:
        """W E y + C c is one matrix [W C] times [E y; c], and so in both gates."""
        return torch.cat([word, c])

    def read(self, before: Tensor, after: Tensor) -> Tensor:
        """The state that the deep output reads: s_{i-1} in the appendix, while equation 4 has s_i."""
        return before

    def pieces(self, s: Tensor, word: Tensor, c: Tensor) -> Tensor:
        """t̃_i = U_o s_{i-1} + V_o E y_{i-1} + C_o c_i."""
        U_o, V_o, C_o = (self.w[f"decoder.readout.{part}_weight"] for part in ("state", "word", "context"))
        return U_o @ s + V_o @ word + C_o @ c + self.w["decoder.readout.bias"]

    def maxout(self, pieces: Tensor) -> Tensor:
        """t_i = [max(t̃_i,2j-1, t̃_i,2j)], j = 1 … l."""
        pairs = range(len(pieces) // 2)
        return torch.stack([torch.maximum(pieces[2 * j], pieces[2 * j + 1]) for j in pairs])

    def _affine(self, name: str, x: Tensor) -> Tensor:
        return self.w[f"{name}.weight"] @ x + self.w[f"{name}.bias"]
