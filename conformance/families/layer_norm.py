"""LayerNorm (Ba et al. 2016), as the Transformer, GPT and Phi use it.

Oracle: `torch.nn.functional.layer_norm`.
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, ConfigField, Value, relations
from conformance.families.components import ALL

if TYPE_CHECKING:
    from torch import Tensor

_HIDDEN = 10
# A mean of about 192 beside a standard deviation of about 7: E[x²] − E[x]² loses it in float32.  Exact in bfloat16.
_OFFSET = [[[192 + (29 * b + 13 * t * t + 7 * i * (i + t)) % 25 - 12.0 for i in range(_HIDDEN)] for t in range(7)]
           for b in range(3)]  # fmt: skip


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    import torch.nn.functional as F

    weight, bias = tensors["weight"], tensors["bias"]
    return {"y": F.layer_norm(tensors["x"], weight.shape, weight, bias, settings["eps"])}


def _recipe(name: str, summary: str, eps: float, x: Any = (3, 7, _HIDDEN), **more: Any) -> ComponentRecipe:
    return ComponentRecipe(
        name=f"layer_norm/{name}",
        summary=summary,
        settings={"eps": eps},
        inputs={"x": x},
        weights={"weight": (_HIDDEN,), "bias": (_HIDDEN,)},
        claims=ALL,
        **more,
    )


FAMILY = Component(
    name="layer_norm",
    title="LayerNorm",
    paper="Ba, Kiros and Hinton 2016, arXiv:1607.06450",
    equations="""
    μ = mean(x)    σ² = mean((x − μ)²)    y = (x − μ) / sqrt(σ² + eps) · weight + bias

    Means are over the last dimension; the variance divides by n, not by n − 1.
""",
    oracle="torch.nn.functional.layer_norm",
    arguments=(
        Value(name="x", axes="batch seq hidden", meaning="input"),
        Value(name="weight", axes="hidden", meaning="gain"),
        Value(name="bias", axes="hidden", meaning="shift"),
        Value(name="eps", axes=None, meaning="ε, inside the root"),
    ),
    returns=(Value(name="y", axes="batch seq hidden", meaning="normalised input"),),
    recipes=(
        _recipe("plain", "ordinary input, eps 1e-5", 1e-5),
        _recipe(
            "small", "inputs as small as the root of eps, so that its place and value show", 1e-3,
            deviation={"x": 0.03},
            field="eps",
            counterfactuals={"eps ignored": {"eps": 1e-5}, "eps at 1e-6": {"eps": 1e-6}},
        ),
        _recipe("offset", "a mean far above the standard deviation, so that cancellation shows", 1e-5, x=_OFFSET),
    ),
    truth=truth,
    reference="reference_impl.nn.norm:layer_norm",
    relations={
        "batching.alone": relations.rows("x"),
        "invariance.scale": relations.scale("x"),
        "invariance.offset": relations.offset("x"),
    },
    fields=(ConfigField(name="eps", default="1e-5", meaning="ε, inside the root"),),
)  # fmt: skip
