"""Sinusoidal positions (Vaswani et al. 2017), interleaved as in the paper, or concatenated as Marian has them.

Oracle: the paper's equations, number by number (`conformance.oracles.equations.sinusoid`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, ConfigField, Value, relations
from conformance.families.components import EXACT

if TYPE_CHECKING:
    from torch import Tensor


# Mistake -> what the exponent has over d, by column, where 2i belongs: 0 0 2 2 4 4 …
_NUMERATORS: dict[str, Callable[[int], int]] = {
    "exponent 2·column/d, not 2i/d: doubled, and a cosine at another frequency than its sine": lambda column: (
        2 * column
    ),
    "exponent column/d, not 2i/d: a cosine at another frequency than its sine": lambda column: column,
    "exponent 4i/d, not 2i/d: doubled": lambda column: 4 * (column // 2),
}


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    import torch

    from conformance.oracles.equations.sinusoid import position_encoding, two_i

    numerator = _NUMERATORS.get(settings.get("mistake", ""), two_i)
    rows = [
        [position_encoding(position, settings["hidden_size"], settings["layout"], numerator) for position in row]
        for row in tensors["position_ids"].tolist()
    ]
    return {"y": torch.tensor(rows, dtype=torch.float64)}


def _recipe(name: str, summary: str, hidden_size: int, layout: str, **more: Any) -> ComponentRecipe:
    settings = {"hidden_size": hidden_size, "layout": layout}
    known = {} if layout == "interleaved" else {"layout ignored": settings | {"layout": "interleaved"}}
    return ComponentRecipe(
        name=f"sinusoidal_positions/{name}",
        summary=summary,
        settings=settings,
        inputs={"position_ids": [[0, 1, 2, 3, 40], [7, 1, 300, 12, 2049], [5, 2500, 6, 99, 0]]},
        claims=EXACT,
        counterfactuals=known | {mistake: settings | {"mistake": mistake} for mistake in _NUMERATORS},
        **more,
    )


FAMILY = Component(
    name="sinusoidal_positions",
    title="Sinusoidal positions",
    paper="Vaswani et al. 2017, arXiv:1706.03762, section 3.5; Junczys-Dowmunt et al. 2018, arXiv:1804.00344",
    equations="""
    s_i = sin(position / 10000^(2i/d)),   c_i = cos(position / 10000^(2i/d)),   d = hidden_size

    layout "interleaved": s_0 c_0 s_1 c_1 …;   "concatenated": s_0 s_1 … c_0 c_1 …;   an odd d has one s more
""",
    oracle="the paper's equations in float64",
    arguments=(
        Value(name="position_ids", axes="batch seq", meaning="the position of each token, from 0"),
        Value(name="hidden_size", axes=None, meaning="d, the width of the table"),
        Value(name="layout", axes=None, meaning='"interleaved" (the paper) or "concatenated" (Marian)'),
    ),
    returns=(Value(name="y", axes="batch seq hidden", meaning="the encoding of each position"),),
    recipes=(
        _recipe("plain", "interleaved, even width", 10, "interleaved"),
        _recipe("field-layout", "sines first, then cosines", 10, "concatenated", field="layout"),
        _recipe("odd", "interleaved, odd width", 7, "interleaved"),
        _recipe("distinct", "concatenated, odd width", 7, "concatenated"),
    ),
    truth=truth,
    exact=True,
    reference="reference_impl.nn.absolute_positions:sinusoidal_positions",
    relations={
        "batching.alone": relations.rows("position_ids"),
    },
    fields=(ConfigField(name="layout", default="none", meaning="where sines and cosines stand"),),
)  # fmt: skip
