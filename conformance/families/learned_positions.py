"""Learned absolute positions (GPT, GPT-2): a table whose rows are added to the token embeddings.

Oracle: `torch.nn.functional.embedding`, at positions counted token by token.
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, Value, relations
from conformance.families.components import ALL

if TYPE_CHECKING:
    from torch import Tensor


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    import torch
    import torch.nn.functional as F

    x = tensors["x"]
    rows = tensors["attention_mask"].tolist() if "attention_mask" in tensors else [[1] * x.shape[1]] * x.shape[0]
    positions = []
    for row in rows:
        seen, counted = 0, []
        for real in row:
            counted.append(seen)
            seen += real
        positions.append(counted[-x.shape[1] :])
    return {"y": x + F.embedding(torch.tensor(positions), tensors["weight"])}


def _recipe(name: str, summary: str, mask: list[list[int]] | None = None) -> ComponentRecipe:
    """Padding's own sum is not compared: what a position of padding is, no paper says."""
    inputs: dict[str, Any] = {"x": (4, 5, 7)}
    if mask:
        inputs["attention_mask"] = mask
    return ComponentRecipe(
        name=f"learned_positions/{name}",
        summary=summary,
        settings={},
        inputs=inputs,
        weights={"weight": (11, 7)},
        compared={"y": [row[-5:] for row in mask]} if mask else {},
        claims=ALL,
    )


FAMILY = Component(
    name="learned_positions",
    title="Learned positions",
    paper="Gehring et al. 2017, arXiv:1705.03122; Radford et al. 2018 (GPT)",
    equations="""
    y_t = x_t + weight[p_t],   p_t = how many real tokens stand before t in its row, cached ones included
""",
    oracle="torch.nn.functional.embedding",
    arguments=(
        Value(name="x", axes="batch seq hidden", meaning="embeddings of the tokens of this call"),
        Value(
            name="attention_mask", axes="batch keys",
            meaning="1 real, 0 padding, for all tokens so far: the last seq are those of x, those before are cached; "
                    "absent: x is all there is, and real",
        ),
        Value(name="weight", axes="positions hidden", meaning="one row a position, from 0"),
    ),
    returns=(Value(name="y", axes="batch seq hidden", meaning="positions added; padding is not compared"),),
    recipes=(
        _recipe("plain", "no cache, no padding"),
        _recipe("right-padding", "rows of 2, 5, 1 and 4 tokens, padded on the right",
                [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]),
        _recipe("left-padding", "the same lengths, padded on the left",
                [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 1, 1, 1, 1]]),
        _recipe("cached", "three tokens came before", [[1] * 8] * 4),
        _recipe("distinct", "three places before, with padding on both sides and between the calls",
                [[0, 1, 1, 1, 1, 1, 0, 0], [1] * 8, [0, 0, 0, 0, 0, 0, 0, 1], [1, 0, 0, 1, 1, 1, 1, 0]]),
    ),
    truth=truth,
    reference="reference_impl.nn.absolute_positions:learned_positions",
    relations={
        "invariance.exact_table": relations.exact_table(),
    },
)  # fmt: skip
