"""RMSNorm (Zhang and Sennrich 2019), as Llama and Mistral use it.

Oracle: `torch.nn.functional.rms_norm`.
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, ConfigField, Value, relations
from conformance.families.components import ALL, FLOAT16, Claims

if TYPE_CHECKING:
    from torch import Tensor

_SHAPE = {"x": (3, 7, 10)}
_WEIGHT = {"weight": (10,)}


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    import torch.nn.functional as F

    return {"y": F.rms_norm(tensors["x"], tensors["weight"].shape, tensors["weight"], settings["eps"])}


def _recipe(name: str, summary: str, eps: float, claims: Claims = ALL, **more: Any) -> ComponentRecipe:
    return ComponentRecipe(
        name=f"rms_norm/{name}",
        summary=summary,
        settings={"eps": eps},
        inputs=_SHAPE,
        weights=_WEIGHT,
        claims=claims,
        **more,
    )  # fmt: skip


FAMILY = Component(
    name="rms_norm",
    title="RMSNorm",
    paper="Zhang and Sennrich 2019, arXiv:1910.07467",
    equations="""
    y = x / sqrt(mean(x²) + eps) · weight          the mean is over the last dimension; x is not centred
""",
    oracle="torch.nn.functional.rms_norm",
    arguments=(
        Value(name="x", axes="batch seq hidden", meaning="input"),
        Value(name="weight", axes="hidden", meaning="gain"),
        Value(name="eps", axes=None, meaning="ε, inside the root"),
    ),
    returns=(Value(name="y", axes="batch seq hidden", meaning="normalised input"),),
    recipes=(
        _recipe("plain", "ordinary input, eps 1e-6", 1e-6),
        _recipe(
            "small", "inputs as small as the root of eps, so that its place and value show", 1e-3,
            deviation={"x": 0.03},
            field="eps", counterfactuals={"eps ignored": {"eps": 1e-6}, "eps at 1e-5": {"eps": 1e-5}},
        ),
        _recipe("large", "inputs whose squares overflow float16", 1e-6, claims=FLOAT16,
                deviation={"x": 256.0}),
    ),
    truth=truth,
    reference="reference_impl.nn.norm:rms_norm",
    relations={
        "batching.alone": relations.rows("x"),
        "invariance.scale": relations.scale("x"),
    },
    fields=(ConfigField(name="eps", default="1e-6", meaning="ε, inside the root"),),
)  # fmt: skip
