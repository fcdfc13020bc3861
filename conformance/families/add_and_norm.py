"""Add & Norm (Vaswani et al. 2017): the residual connection and the LayerNorm after it, "post-norm".

Oracle: `torch.nn.functional.layer_norm` of the sum.
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, ConfigField, Value, relations
from conformance.families.components import ALL, FLOAT16, Claims

if TYPE_CHECKING:
    from torch import Tensor

_HIDDEN = 10
_MISTAKES = ("residual ignored", "sub-layer ignored", "norm before the sum")


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    import torch.nn.functional as F

    x, sublayer, weight, bias = (tensors[name] for name in ("x", "sublayer_output", "weight", "bias"))
    added, residual = x + sublayer, 0 * x
    match settings.get("mistake"):
        case "residual ignored":
            added = sublayer
        case "sub-layer ignored":
            added = x
        case "norm before the sum":
            added, residual = sublayer, x
    return {"y": residual + F.layer_norm(added, weight.shape, weight, bias, settings["eps"])}


def _recipe(
    name: str, summary: str, eps: float, other_eps: dict[str, float] | None = None, claims: Claims = ALL, **more: Any
) -> ComponentRecipe:
    known: dict[str, Config] = {label: {"eps": wrong} for label, wrong in (other_eps or {}).items()}
    return ComponentRecipe(
        name=f"add_and_norm/{name}",
        summary=summary,
        settings={"eps": eps},
        inputs={"x": (3, 7, _HIDDEN), "sublayer_output": (3, 7, _HIDDEN)},
        weights={"weight": (_HIDDEN,), "bias": (_HIDDEN,)},
        claims=claims,
        counterfactuals=known | {mistake: {"eps": eps, "mistake": mistake} for mistake in _MISTAKES},
        **more,
    )


FAMILY = Component(
    name="add_and_norm",
    title="Add & Norm",
    paper="Vaswani et al. 2017, arXiv:1706.03762, section 3.1",
    equations="""
    y = LayerNorm(x + Sublayer(x))        Sublayer(x) → sublayer_output

    LayerNorm as in `layer_norm`.
""",
    oracle="torch.nn.functional.layer_norm of the sum",
    arguments=(
        Value(name="x", axes="batch seq hidden", meaning="the sub-layer's input, which the residual connection adds"),
        Value(name="sublayer_output", axes="batch seq hidden", meaning="what attention or feed-forward made of x"),
        Value(name="weight", axes="hidden", meaning="gain"),
        Value(name="bias", axes="hidden", meaning="shift"),
        Value(name="eps", axes=None, meaning="ε, inside the root"),
    ),
    returns=(Value(name="y", axes="batch seq hidden", meaning="the normalised sum"),),
    recipes=(
        _recipe("plain", "ordinary inputs, eps 1e-5", 1e-5),
        _recipe("small", "inputs as small as the root of eps", 1e-3, {"eps ignored": 1e-5},
                deviation={"x": 0.03, "sublayer_output": 0.02}, field="eps"),
        _recipe("large", "inputs whose squares overflow float16", 1e-5, claims=FLOAT16,
                deviation={"x": 256.0, "sublayer_output": 128.0}),
    ),
    truth=truth,
    reference="reference_impl.nn.norm:add_and_norm",
    relations={
        "batching.alone": relations.rows("x", "sublayer_output"),
        "invariance.scale": relations.scale("x", "sublayer_output"),
        "invariance.offset": relations.offset("x"),
    },
    fields=(ConfigField(name="eps", default="1e-5", meaning="ε, inside the root"),),
)  # fmt: skip
