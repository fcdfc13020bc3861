"""The activations of feed-forward blocks: ReLU, GELU exact, GELU by tanh, SiLU.

Oracle: `torch.nn.functional`.
"""

from typing import TYPE_CHECKING

from conformance.families import Component, ComponentRecipe, Config, ConfigField, Value
from conformance.families.components import ALL

if TYPE_CHECKING:
    from torch import Tensor

# −4 … 4 in steps of 1/16: the two forms of GELU differ by 4.7e-4 at |x| = 2.7, and hardly elsewhere.  0 is left out,
# since ReLU's derivative there is a matter of taste.
_GRID = [(k + 0.5) / 16 for k in range(-64, 64)]
# Where e^x, x³ in float16, or a quotient of two infinities would break; the results lie within −1e-7 … 0 and near x.
_LARGE = [-30720.0, -1000.0, -120.0, -89.0, -40.0, -12.0, -6.0, 6.0, 12.0, 40.0, 89.0, 120.0, 1000.0, 30720.0]
_LABELS = {
    "relu": ("ReLU", {}),
    "gelu": ("GELU, exact", {"the tanh form instead of the exact one": "gelu_new"}),
    "gelu_new": ("GELU by tanh", {"the exact form instead of tanh": "gelu"}),
    "silu": ("SiLU", {}),
}


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    import torch.nn.functional as F

    x = tensors["x"]
    match settings["name"]:
        case "relu":
            return {"y": F.relu(x)}
        case "gelu":
            return {"y": F.gelu(x)}
        case "gelu_new":
            return {"y": F.gelu(x, approximate="tanh")}
        case "silu":
            return {"y": F.silu(x)}
    raise ValueError(f"unknown activation {settings['name']!r}")


def _recipe(case: str, summary: str, name: str, x: list[float], wrong: dict[str, str]) -> ComponentRecipe:
    """wrong: label -> the activation that it stands for."""
    return ComponentRecipe(
        name=f"activations/{case}",
        summary=summary,
        settings={"name": name},
        inputs={"x": x},
        claims=ALL,
        field="name" if wrong else None,
        counterfactuals={label: {"name": other} for label, other in wrong.items()},
    )


def _grid(name: str) -> ComponentRecipe:
    title, wrong = _LABELS[name]
    others = {f"{_LABELS[other][0]} instead": other for other in _LABELS if other not in {name, *wrong.values()}}
    return _recipe("plain" if name == "relu" else name, f"{title} on a grid from −4 to 4", name, _GRID, wrong | others)


FAMILY = Component(
    name="activations",
    title="Activations",
    paper="Hendrycks and Gimpel 2016, arXiv:1606.08415; Ramachandran et al. 2017, arXiv:1710.05941",
    equations="""
    relu       max(0, x)
    gelu       x · Φ(x),   Φ(x) = (1 + erf(x / √2)) / 2
    gelu_new   x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))
    silu       x / (1 + e^−x)
""",
    oracle="torch.nn.functional",
    arguments=(
        Value(name="x", axes="points", meaning="input"),
        Value(name="name", axes=None, meaning="which: relu, gelu (exact), gelu_new (by tanh), silu"),
    ),
    returns=(Value(name="y", axes="points", meaning="activated input"),),
    recipes=(
        *map(_grid, _LABELS),
        *(
            _recipe(f"{name}-large", f"{title} far from 0, up to ±30720", name, _LARGE, {})
            for name, (title, _) in _LABELS.items()
        ),
    ),
    truth=truth,
    reference="reference_impl.nn.activations:activate",
    fields=(ConfigField(name="name", default="none", meaning="the activation, by the hub's name"),),
)
