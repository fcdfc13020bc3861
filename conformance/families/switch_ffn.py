"""The Switch layer (Fedus et al. 2021): one expert a token, with room for so many tokens a sequence.

Oracle: the paper's equations, one token at a time (`conformance.oracles.equations.switch`).
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, ConfigField, Value, relations
from conformance.families.components import EXACT, Claims

if TYPE_CHECKING:
    from torch import Tensor

# The loops are over torch vectors, so that the oracle has gradients.
_CLAIMS: Claims = {**EXACT, "component.gradients": ("float64",)}


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    import torch

    from conformance.oracles.equations.switch import one_row

    W_r, wi, wo = (tensors[name] for name in ("router_weight", "wi_weight", "wo_weight"))
    rows = [one_row(x, W_r, wi, wo, settings["expert_capacity"]) for x in tensors["x"]]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _recipe(name: str, summary: str, capacity: int, *, ffn: int = 5, **more: Any) -> ComponentRecipe:
    return ComponentRecipe(
        name=f"switch_ffn/{name}",
        summary=summary,
        settings={"expert_capacity": capacity},
        inputs={"x": (3, 8, 7)},
        weights={"router_weight": (4, 7), "wi_weight": (4, ffn, 7), "wo_weight": (4, 7, ffn)},
        claims=_CLAIMS,
        **more,
    )


FAMILY = Component(
    name="switch_ffn",
    title="Switch layer",
    paper="Fedus, Zoph and Shazeer 2021, arXiv:2101.03961, section 2.1",
    equations="""
    p = softmax(W_r x)    i = argmax p    y = p_i · wo_i max(0, wi_i x)

    An expert takes the first expert_capacity tokens of each sequence that choose it, in their order; for a later one
    y = 0 (the residual connection around the layer carries it).
""",
    oracle="the paper's equations in float64",
    arguments=(
        Value(name="x", axes="batch seq hidden", meaning="input; a row is a sequence"),
        Value(name="router_weight", axes="experts hidden", meaning="W_r, (out, in)"),
        Value(name="wi_weight", axes="experts ffn hidden", meaning="each expert's way up, (out, in)"),
        Value(name="wo_weight", axes="experts hidden ffn", meaning="each expert's way down, (out, in)"),
        Value(name="expert_capacity", axes=None, meaning="tokens of a sequence that an expert takes"),
    ),
    returns=(
        Value(name="y", axes="batch seq hidden", meaning="output"),
        Value(name="router_logits", axes="batch seq experts", meaning="W_r x", optional=True),
        Value(name="probabilities", axes="batch seq experts", meaning="softmax of them", optional=True),
        Value(
            name="dispatched", axes="batch seq experts", optional=True,
            meaning="p_i at the expert that takes the token, 0 elsewhere",
        ),
    ),
    recipes=(
        _recipe("plain", "room for all", 8),
        _recipe(
            "field-expert_capacity", "room for 2 tokens of 8", 2,
            field="expert_capacity",
            counterfactuals={
                "expert_capacity ignored": {"expert_capacity": 8},
                "expert_capacity one too high": {"expert_capacity": 3},
                "expert_capacity one too low": {"expert_capacity": 1},
            },
        ),
        _recipe("square", "room for 2, ffn as wide as hidden: transposed experts fit", 2, ffn=7),
    ),
    truth=truth,
    exact=True,
    reference="reference_impl.nn.switch:switch_ffn",
    relations={
        "batching.alone": relations.rows("x"),
    },
    fields=(ConfigField(name="expert_capacity", default="none", meaning="tokens that an expert takes"),),
)  # fmt: skip
