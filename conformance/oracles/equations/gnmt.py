"""GNMT, token by token: Wu et al. 2016 (arXiv:1609.08144), section 3.

One pair of sentences at a time; vectors are columns, matrices multiply them from the left.  Layers are numbered from 1
here, from 0 in the names of weights and probes.  What the paper leaves open: all states begin at zero, y_0 among them.
"""

from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
# c_t and m_t of one layer
State = tuple[Tensor, Tensor]


class GNMT:
    """The equations, a method each; a subclass that overrides one of them makes one mistake.

    weights: by the names of the case's file, float64 (or any dtype, in which everything is then computed).
    """

    def __init__(self, config: dict[str, Any], weights: Weights):
        self.w = weights
        self.encoder_layers, self.decoder_layers = config["encoder_layers"], config["decoder_layers"]

    def row(self, source: list[int], target: list[int]) -> dict[str, Tensor]:
        """Every probe of one pair, without a batch axis; "logits" (target, vocab) among them."""
        found, x = self.encode([self.w["encoder.embedding.weight"][token] for token in source])
        tokens = [self.w["decoder.embedding.weight"][token] for token in target]
        found["decoder.embedding"] = torch.stack(tokens)
        states = [self.zero("decoder", layer) for layer in range(1, self.decoder_layers + 1)]
        a = torch.zeros_like(x[0])
        columns: dict[str, list[Tensor]] = {}
        for i, token in enumerate(tokens):
            states, a, step, stack = self.step(token, states, x, a)
            found |= {f"decoder.steps.{i}.{name}": value for name, value in step.items()}
            for name, value in stack.items():
                columns.setdefault(name, []).append(value)
        return found | {name: torch.stack(values) for name, values in columns.items()}

    # --- 3.1 and 3.2

    def encode(self, x: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """x_1 … x_M of the top layer, and the probes on the way."""
        found = {"encoder.embedding": torch.stack(x)}
        forward, backward = self.forward(x), self.backward(x)
        found |= {"encoder.layers.0.forward": torch.stack(forward), "encoder.layers.0.backward": torch.stack(backward)}
        x = [self.joined(f, b) for f, b in zip(forward, backward, strict=True)]
        found["encoder.layers.0.output"] = torch.stack(x)
        for layer in range(2, self.encoder_layers + 1):
            m = self.run(layer, "", x)
            x = [self.handed_on("encoder", layer, below, m_t) for below, m_t in zip(x, m, strict=True)]
            found[f"encoder.layers.{layer - 1}.hidden"] = torch.stack(m)
            found[f"encoder.layers.{layer - 1}.output"] = torch.stack(x)
        return found, x

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """LSTM_f, from left to right."""
        return self.run(1, "", x)

    def backward(self, x: list[Tensor]) -> list[Tensor]:
        """LSTM_b, from right to left; listed from the first token to the last."""
        return self.run(1, "_reverse", x[::-1])[::-1]

    def joined(self, forward: Tensor, backward: Tensor) -> Tensor:
        """The outputs of LSTM_f and LSTM_b "are first concatenated and then fed to the next layer"."""
        return torch.cat([forward, backward])

    def run(self, layer: int, suffix: str, x: list[Tensor]) -> list[Tensor]:
        """m_1 … m_M of one encoder layer in one direction."""
        state, outputs = self.zero("encoder", layer), []
        for x_t in x:
            state = self.lstm(f"encoder.layers.{layer - 1}", suffix, x_t, state)
            outputs.append(state[1])
        return outputs

    def zero(self, stack: str, layer: int) -> State:
        m = torch.zeros_like(self.w[f"{stack}.layers.{layer - 1}.weight_hh_l0"][0])
        return m, m

    def lstm(self, name: str, suffix: str, x: Tensor, state: State) -> State:
        """c_t, m_t = LSTM(c_{t-1}, m_{t-1}, x_t; W): i, f, o = σ(…), g = tanh(…), c = f ∘ c + i ∘ g, m = o ∘ tanh(c).

        Each … is W x + b + U m + b' with its own rows, in the order i, f, g, o.
        """
        c, m = state
        n = len(m)
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        W, U, b, d = (self.w[f"{name}.{kind}_l0{suffix}"] for kind in kinds)
        rows = [slice(k * n, (k + 1) * n) for k in range(4)]
        i, f, g, o = (W[r] @ x + b[r] + U[r] @ m + d[r] for r in rows)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return c, torch.sigmoid(o) * torch.tanh(c)

    def handed_on(self, stack: str, layer: int, below: Tensor, m: Tensor) -> Tensor:
        """x^i = m^i + x^{i-1} (equation 6) from the layer "third from the bottom in the encoder and decoder" on, and
        x^i = m^i (equation 5) under it.
        """
        return m + below if layer >= 3 else m

    # --- the decoder: section 3, figure 1

    def step(
        self, token: Tensor, states: list[State], x: list[Tensor], previous: Tensor
    ) -> tuple[list[State], Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """States and a_i after one more token; what happens at the bottom, and what the whole stack hands on.

        previous: a_{i-1}, which the paper's decoder does not look at.
        """
        a, found = self.search(states[0][1], x)
        bottom = self.lstm("decoder.layers.0", "", self.layer_input(1, token, a), states[0])
        found["state"] = bottom[1]
        new, stack = self.upper(bottom, states, a)
        return new, a, found, stack

    def upper(self, bottom: State, states: list[State], a: Tensor) -> tuple[list[State], dict[str, Tensor]]:
        """The layers above the bottom one, and the softmax layer's logits."""
        new, out, stack = [bottom], bottom[1], {}
        for layer in range(2, self.decoder_layers + 1):
            state = self.lstm(f"decoder.layers.{layer - 1}", "", self.layer_input(layer, out, a), states[layer - 1])
            out = self.handed_on("decoder", layer, out, state[1])
            new.append(state)
            stack[f"decoder.layers.{layer - 1}.hidden"] = state[1]
            stack[f"decoder.layers.{layer - 1}.output"] = out
        stack["logits"] = self.w["decoder.output.weight"] @ out + self.w["decoder.output.bias"]
        return new, stack

    def search(self, y: Tensor, x: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """s_t = AttentionFunction(y_{i-1}, x_t), p = softmax(s), a_i = Σ_t p_t · x_t: equation 4.

        The function "is a feed forward network with one hidden layer": vᵀ tanh(W y + U x_t + b).
        """
        W, U = self.w["decoder.attention.query_weight"], self.w["decoder.attention.memory_weight"]
        v, b = self.w["decoder.attention.score_vector"], self.w["decoder.attention.bias"]
        s = [v @ torch.tanh(W @ y + U @ x_t + b) for x_t in x]
        powers = [s_t.exp() for s_t in s]
        total = torch.stack(powers).sum()
        p = [power / total for power in powers]
        a = torch.zeros_like(x[0])
        for p_t, x_t in zip(p, x, strict=True):
            a = a + p_t * x_t
        found = {"scores": torch.stack(s), "weights": torch.stack(p), "context": a}
        return a, {f"cross_attention.{name}": value for name, value in found.items()}

    def layer_input(self, layer: int, below: Tensor, a: Tensor) -> Tensor:
        """The context "is sent directly to all the remaining decoder layers"; every layer reads [x; a]."""
        return torch.cat([below, a])
