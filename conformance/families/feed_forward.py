"""The plain feed-forward block: up, activation, down.

Oracle: `torch.nn.functional`.
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, ConfigField, Value, relations
from conformance.families.components import ALL

if TYPE_CHECKING:
    from torch import Tensor


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    import torch.nn.functional as F

    projected = F.linear(tensors["x"], tensors["linear1_weight"], tensors["linear1_bias"])
    match settings["hidden_act"]:
        case "relu":
            activated = F.relu(projected)
        case "gelu":
            activated = F.gelu(projected)
        case "gelu_new":
            activated = F.gelu(projected, approximate="tanh")
        case "silu":
            activated = F.silu(projected)
    y = F.linear(activated, tensors["linear2_weight"], tensors["linear2_bias"])
    return {"y": y, "projected": projected, "activated": activated}


def _recipe(
    name: str, summary: str, hidden_act: str, *wrong: str, hidden: int = 6, ffn: int = 9, **more: Any
) -> ComponentRecipe:
    """wrong: activations that a candidate may apply instead, the plainest mistake first."""
    counterfactuals = {("hidden_act ignored" if act == "relu" else f"{act} instead"): act for act in wrong}
    return ComponentRecipe(
        name=f"feed_forward/{name}",
        summary=summary,
        settings={"hidden_act": hidden_act},
        inputs={"x": (2, 5, hidden)},
        weights={"linear1_weight": (ffn, hidden), "linear1_bias": (ffn,),
                 "linear2_weight": (hidden, ffn), "linear2_bias": (hidden,)},
        claims=ALL,
        field="hidden_act" if wrong else None,
        counterfactuals={label: {"hidden_act": act} for label, act in counterfactuals.items()},
        **more,
    )  # fmt: skip


FAMILY = Component(
    name="feed_forward",
    title="Feed-forward block",
    paper="Vaswani et al. 2017, arXiv:1706.03762, equation 2",
    equations="""
    y = act(x W₁ᵀ + b₁) W₂ᵀ + b₂        W₁, b₁ → linear1_weight, linear1_bias;   W₂, b₂ → linear2_weight, linear2_bias

    act by hidden_act: relu, gelu (exact), gelu_new (by tanh), silu
""",
    oracle="torch.nn.functional",
    arguments=(
        Value(name="x", axes="batch seq hidden", meaning="input"),
        Value(name="linear1_weight", axes="ffn hidden", meaning="W₁, (out, in)"),
        Value(name="linear1_bias", axes="ffn", meaning="b₁"),
        Value(name="linear2_weight", axes="hidden ffn", meaning="W₂, (out, in)"),
        Value(name="linear2_bias", axes="hidden", meaning="b₂"),
        Value(name="hidden_act", axes=None, meaning="relu, gelu, gelu_new or silu"),
    ),
    returns=(
        Value(name="y", axes="batch seq hidden", meaning="output"),
        Value(name="projected", axes="batch seq ffn", meaning="x W₁ᵀ + b₁", optional=True),
        Value(name="activated", axes="batch seq ffn", meaning="act of it", optional=True),
    ),
    recipes=(
        _recipe("plain", "ReLU", "relu"),
        _recipe("field-hidden_act-gelu", "GELU, exact", "gelu", "relu", "gelu_new"),
        _recipe("field-hidden_act-gelu_new", "GELU by tanh", "gelu_new", "relu", "gelu"),
        _recipe("field-hidden_act-silu", "SiLU", "silu", "relu", "gelu"),
        _recipe("square", "ffn as wide as hidden: transposed weights fit", "gelu_new", hidden=6, ffn=6),
    ),
    truth=truth,
    reference="reference_impl.nn.feed_forward:feed_forward",
    relations={
        "batching.alone": relations.rows("x"),
    },
    fields=(ConfigField(name="hidden_act", default="relu", meaning="the activation, by the hub's name"),),
)
