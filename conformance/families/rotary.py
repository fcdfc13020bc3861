"""Rotary positions (Su et al. 2021): both layouts, partial heads, linear and Llama 3.1's scaling.

Oracle: transformers' `LlamaRotaryEmbedding` and `apply_rotary_pos_emb`; it knows the half-split layout alone, so that
interleaved elements are put into its order and back.
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, ConfigField, Value, relations
from conformance.families.components import ALL

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN: Config = {"rope_theta": 10000.0, "rotary_dim": 10, "layout": "halves"}
_LINEAR: Config = {"rope_type": "linear", "factor": 4.0}
# A context of 200 and θ = 10000 give pairs of all three kinds: fast (1), between (2), slow (3, 4, 5).
_LLAMA3: Config = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 8.0,
                   "original_max_position_embeddings": 200}  # fmt: skip


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    x, width = tensors["x"], settings["rotary_dim"]
    scaling = settings.get("rope_scaling") or {"rope_type": "default"}
    config = LlamaConfig(head_dim=width, rope_parameters={"rope_theta": settings["rope_theta"], **scaling})
    cos, sin = LlamaRotaryEmbedding(config)(x, tensors["position_ids"])
    order = torch.arange(width)
    if settings["layout"] == "interleaved":
        order = torch.cat((order[0::2], order[1::2]))
    turned, _ = apply_rotary_pos_emb(x[..., order], x[..., order], cos, sin)
    return {"y": torch.cat((turned[..., order.argsort()], x[..., width:]), dim=-1)}


def _recipe(name: str, summary: str, moved: Config, field: str | None = None, **wrong: Any) -> ComponentRecipe:
    """wrong: counterfactuals, label -> what differs from the case's own settings."""
    settings = _PLAIN | moved
    return ComponentRecipe(
        name=f"rotary/{name}",
        summary=summary,
        settings=settings,
        inputs={"x": (2, 3, 4, 10), "position_ids": [[0, 1, 300, 2049], [2, 7, 31, 2003]]},
        claims=ALL,
        field=field,
        counterfactuals={label: settings | other for label, other in wrong.items()},
    )


FAMILY = Component(
    name="rotary",
    title="Rotary positions",
    paper="Su et al. 2021, arXiv:2104.09864",
    equations="""
    θ_j = rope_theta^(−2j / rotary_dim),   j = 0 … rotary_dim/2 − 1;   φ_j = position · θ_j
    y_a = x_a cos φ_j − x_b sin φ_j
    y_b = x_b cos φ_j + x_a sin φ_j        the elements rotary_dim … head_dim − 1 pass unchanged

    layout "halves": (a, b) = (j, j + rotary_dim/2);   "interleaved": (a, b) = (2j, 2j + 1)
    rope_scaling linear: θ_j / factor;   llama3: θ_j is divided by factor where it is slow, kept where it is fast, and
    interpolated between, by its turns c = original_max_position_embeddings · θ_j / 2π
""",
    oracle="transformers LlamaRotaryEmbedding and apply_rotary_pos_emb",
    arguments=(
        Value(name="x", axes="batch heads seq head_dim", meaning="queries or keys"),
        Value(name="position_ids", axes="batch seq", meaning="the position of each token, from 0"),
        Value(name="rope_theta", axes=None, meaning="base of the frequencies"),
        Value(name="rotary_dim", axes=None, meaning="how many elements of a head turn, the first ones"),
        Value(name="layout", axes=None, meaning='pairs: "halves" or "interleaved"'),
        Value(
            name="rope_scaling", axes=None,
            meaning='absent, or {"rope_type": "linear" or "llama3", "factor": …, …} as in config.json',
        ),
    ),
    returns=(Value(name="y", axes="batch heads seq head_dim", meaning="rotated x"),),
    recipes=(
        _recipe("plain", "half-split, the whole head, θ = 10000", {}),
        _recipe("field-rope_theta", "θ = 500", {"rope_theta": 500.0}, "rope_theta",
                **{"rope_theta ignored": {"rope_theta": 10000.0}, "rope_theta at 1e6": {"rope_theta": 1e6}}),
        _recipe("field-layout", "interleaved pairs", {"layout": "interleaved"}, "layout",
                **{"layout ignored": {"layout": "halves"}}),
        _recipe("field-rotary_dim", "6 of 10 elements turn", {"rotary_dim": 6}, "rotary_dim",
                **{"rotary_dim ignored": {"rotary_dim": 10}}),
        _recipe("field-rope_scaling-linear", "positions divided by 4", {"rope_scaling": _LINEAR}, "rope_scaling",
                **{"rope_scaling ignored": {"rope_scaling": None}}),
        _recipe("field-rope_scaling-llama3", "slow pairs divided by 8, fast kept", {"rope_scaling": _LLAMA3},
                "rope_scaling",
                **{"rope_scaling ignored": {"rope_scaling": None},
                   "rope_scaling taken for linear": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}}),
        _recipe("distinct", "interleaved, partial, θ = 500, llama3: all at once",
                {"rope_theta": 500.0, "rotary_dim": 6, "layout": "interleaved", "rope_scaling": _LLAMA3}),
    ),
    truth=truth,
    reference="reference_impl.nn.rotary_layouts:apply_rotary",
    relations={
        "batching.alone": relations.rows("x", "position_ids"),
        "invariance.shift": relations.rotated_distance(),
        "invariance.order": relations.places_with_tokens(),
    },
    fields=(
        ConfigField(name="rope_theta", default="none", meaning="base of the frequencies"),
        ConfigField(name="rotary_dim", default="none", meaning="how many elements of a head turn"),
        ConfigField(name="layout", default="none", meaning="which elements are pairs"),
        ConfigField(name="rope_scaling", default="absent", meaning="stretched frequencies, linear or llama3"),
    ),
)  # fmt: skip
