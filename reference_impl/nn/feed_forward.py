"""The feed-forward block, gated (SwiGLU and its relatives) or plain, and the activations that config.json can name."""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reference_impl.nn.conv1d import Conv1D
from reference_impl.nn.norm import LayerNorm

# hidden_act → its module. Φ is the normal distribution function.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,  # x · σ(x)
    "swish": nn.SiLU,  # the same function, by its first name
    "gelu": nn.GELU,  # x · Φ(x), exact
    "gelu_new": lambda: nn.GELU(approximate="tanh"),  # x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),  # the same function, by its later name
    "relu": nn.ReLU,  # max(0, x)
}


def activation(hidden_act: str) -> nn.Module:
    """The activation that config.json calls `hidden_act`.

    Swish₁ (SiLU): Ramachandran et al. 2017 (arXiv:1710.05941). GELU: Hendrycks & Gimpel 2016 (arXiv:1606.08415),
    section 2; its tanh form is off by up to 4.7e-4, so that the two are not interchangeable.

    Raises:
        ValueError: the name is not implemented.
    """
    if hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act={hidden_act!r} is not implemented; use one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[hidden_act]()


def gate(
    gate_projection: Float[Tensor, "*batch ffn"], up_projection: Float[Tensor, "*batch ffn"], act_fn: nn.Module
) -> Float[Tensor, "*batch ffn"]:
    """act(gate) ⊗ up: the activation goes on the gate."""
    activated: Tensor = act_fn(gate_projection)
    return activated * up_projection


def feed_forward(
    x: Float[Tensor, "*batch hidden"],
    linear1_weight: Float[Tensor, "ffn hidden"],
    linear1_bias: Float[Tensor, "ffn"],
    linear2_weight: Float[Tensor, "hidden ffn"],
    linear2_bias: Float[Tensor, "hidden"],
    hidden_act: str,
) -> dict[str, Tensor]:
    """One projection up, an activation, one projection down.

        y = act(x W₁ + b₁) W₂ + b₂

    Vaswani et al. 2017 (arXiv:1706.03762), equation 2, where act is ReLU: W₁, b₁ → linear1, W₂, b₂ → linear2, both
    stored transposed, (out, in). Projections are in the dtype of `x`.

    Returns: `y`, and on the way `projected` (x W₁ + b₁) and `activated`, both (*, ffn).
    """
    projected = F.linear(x, linear1_weight, linear1_bias)
    activated: Tensor = activation(hidden_act)(projected)
    return {"y": F.linear(activated, linear2_weight, linear2_bias), "projected": projected, "activated": activated}


def swiglu(
    x: Float[Tensor, "*batch hidden"],
    gate_proj_weight: Float[Tensor, "ffn hidden"],
    up_proj_weight: Float[Tensor, "ffn hidden"],
    down_proj_weight: Float[Tensor, "hidden ffn"],
    gate_proj_bias: Float[Tensor, "ffn"] | None = None,
    up_proj_bias: Float[Tensor, "ffn"] | None = None,
    down_proj_bias: Float[Tensor, "hidden"] | None = None,
) -> dict[str, Tensor]:
    """`GatedFeedForward` with SiLU, as a function of its weights.

    Returns: `y`, and on the way `gate` (before the activation), `up` and `product`, all (*, ffn).
    """
    gate_projection, up = F.linear(x, gate_proj_weight, gate_proj_bias), F.linear(x, up_proj_weight, up_proj_bias)
    product = gate(gate_projection, up, activation("silu"))
    y = F.linear(product, down_proj_weight, down_proj_bias)
    return {"y": y, "gate": gate_projection, "up": up, "product": product}


class GatedFeedForward(nn.Module):
    """Two projections up, one gating the other, and one down.

        y = (act(x W) ⊗ x V) W₂

    Shazeer 2020 (arXiv:2002.05202), equation 6, SwiGLU with `hidden_act` "silu": W → gate_proj, V → up_proj,
    W₂ → down_proj. Arithmetic is in the dtype of `x`.
    """

    def __init__(self, *, hidden_size: int, intermediate_size: int, hidden_act: str, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act_fn = activation(hidden_act)

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        output: Tensor = self.down_proj(gate(self.gate_proj(x), self.up_proj(x), self.act_fn))
        return output


class BiasedFeedForward(nn.Module):
    """One projection up, an activation, and one projection down, both with a bias (Phi).

        y = act(x W₁ + b₁) W₂ + b₂

    Vaswani et al. 2017 (arXiv:1706.03762), equation 2, where act is ReLU: W₁, b₁ → fc1, W₂, b₂ → fc2. Arithmetic is in
    the dtype of `x`.
    """

    def __init__(self, *, hidden_size: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation_fn = activation(hidden_act)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        output: Tensor = self.fc2(self.activation_fn(self.fc1(x)))
        return output


class DenseFeedForward(nn.Module):
    """One projection up, an activation, and one projection down, without biases (T5, and one expert of Switch).

        y = W_o act(W_i x)

    Raffel et al. 2020 (arXiv:1910.10683), section 2.1, where act is ReLU; the names are those of its code. Arithmetic
    is in the dtype of `x`.
    """

    def __init__(self, *, hidden_size: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.wi = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.act = activation(hidden_act)
        self.wo = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        output: Tensor = self.wo(self.act(self.wi(x)))
        return output


class Conv1DFeedForward(nn.Module):
    """One projection up, an activation, and one projection down, stored (in, out) as in GPT, GPT-2 and GPT-3.

        y = act(x W₁ + b₁) W₂ + b₂

    Vaswani et al. 2017 (arXiv:1706.03762), equation 2, there with max(0, ·): W₁, b₁ → c_fc, W₂, b₂ → c_proj.
    Arithmetic is in the dtype of `x`.
    """

    def __init__(self, *, hidden_size: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.c_fc = Conv1D(in_features=hidden_size, out_features=intermediate_size)
        self.c_proj = Conv1D(in_features=intermediate_size, out_features=hidden_size)
        self.act = activation(hidden_act)

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        output: Tensor = self.c_proj(self.act(self.c_fc(x)))
        return output


class NormedFeedForward(nn.Module):
    """Two layers with ReLU between them, residual connection and norm included, as in Transformer-XL.

        y = LayerNorm(x + FF(x))      with `pre_norm`      y = x + FF(LayerNorm(x))

    Vaswani et al. 2017 (arXiv:1706.03762), equation 2 and section 3.1: W₁, b₁ → `CoreNet.0`, W₂, b₂ → `CoreNet.3`; 2
    and 4 are dropout, which is not implemented. Arithmetic is in the dtype of `x`, the norm's as in `LayerNorm`.
    """

    def __init__(self, *, hidden_size: int, intermediate_size: int, eps: float, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.CoreNet = nn.Sequential()
        self.CoreNet.add_module("0", nn.Linear(hidden_size, intermediate_size))
        self.CoreNet.add_module("1", nn.ReLU())
        self.CoreNet.add_module("3", nn.Linear(intermediate_size, hidden_size))
        self.layer_norm = LayerNorm(hidden_size=hidden_size, eps=eps)

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        y: Tensor = x + self.CoreNet(self.layer_norm(x)) if self.pre_norm else self.layer_norm(x + self.CoreNet(x))
        return y
