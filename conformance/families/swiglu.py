"""The gated feed-forward block SwiGLU (Shazeer 2020), as Llama, Mistral and Mixtral use it.

Oracle: `torch.nn.functional`.
"""

from typing import TYPE_CHECKING

from conformance.families import Component, ComponentRecipe, Config, Value, relations
from conformance.families.components import ALL

if TYPE_CHECKING:
    from torch import Tensor


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    import torch.nn.functional as F

    gate = F.linear(tensors["x"], tensors["gate_proj_weight"], tensors.get("gate_proj_bias"))
    up = F.linear(tensors["x"], tensors["up_proj_weight"], tensors.get("up_proj_bias"))
    product = F.silu(gate) * up
    y = F.linear(product, tensors["down_proj_weight"], tensors.get("down_proj_bias"))
    return {"y": y, "gate": gate, "up": up, "product": product}


def _recipe(name: str, summary: str, *, hidden: int, ffn: int, bias: bool = False) -> ComponentRecipe:
    weights: dict[str, tuple[int, ...]] = {
        "gate_proj_weight": (ffn, hidden), "up_proj_weight": (ffn, hidden), "down_proj_weight": (hidden, ffn),
    }  # fmt: skip
    if bias:
        weights |= {"gate_proj_bias": (ffn,), "up_proj_bias": (ffn,), "down_proj_bias": (hidden,)}
    return ComponentRecipe(
        name=f"swiglu/{name}",
        summary=summary,
        settings={},
        inputs={"x": (2, 5, hidden)},
        weights=weights,
        claims=ALL,
    )


FAMILY = Component(
    name="swiglu",
    title="SwiGLU",
    paper="Shazeer 2020, arXiv:2002.05202, equation 6",
    equations="""
    y = (SiLU(x Wᵀ) ⊗ x Vᵀ) W₂ᵀ        W → gate_proj_weight, V → up_proj_weight, W₂ → down_proj_weight

    SiLU(z) = z / (1 + e^−z) goes on the gate. Biases, where a case has them, are added to their projections.
""",
    oracle="torch.nn.functional",
    arguments=(
        Value(name="x", axes="batch seq hidden", meaning="input"),
        Value(name="gate_proj_weight", axes="ffn hidden", meaning="W, (out, in): the activated half"),
        Value(name="up_proj_weight", axes="ffn hidden", meaning="V, (out, in)"),
        Value(name="down_proj_weight", axes="hidden ffn", meaning="W₂, (out, in)"),
        Value(name="gate_proj_bias", axes="ffn", meaning="absent unless the case has biases"),
        Value(name="up_proj_bias", axes="ffn", meaning="likewise"),
        Value(name="down_proj_bias", axes="hidden", meaning="likewise"),
    ),
    returns=(
        Value(name="y", axes="batch seq hidden", meaning="output"),
        Value(name="gate", axes="batch seq ffn", meaning="x Wᵀ, before the activation", optional=True),
        Value(name="up", axes="batch seq ffn", meaning="x Vᵀ", optional=True),
        Value(name="product", axes="batch seq ffn", meaning="SiLU(gate) ⊗ up", optional=True),
    ),
    recipes=(
        _recipe("plain", "no biases", hidden=6, ffn=9),
        _recipe("distinct", "all three biases", hidden=6, ffn=9, bias=True),
        _recipe("square", "ffn as wide as hidden: any matrix fits any place, transposed or not", hidden=6, ffn=6),
    ),
    truth=truth,
    reference="reference_impl.nn.feed_forward:swiglu",
    relations={
        "batching.alone": relations.rows("x"),
    },
)
