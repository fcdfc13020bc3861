"""Sparse mixture of experts (Mixtral): the k likeliest of E experts, their weights renormalised.

Oracle: transformers' `MixtralSparseMoeBlock`.
"""

from typing import TYPE_CHECKING, Any

from conformance.families import Component, ComponentRecipe, Config, ConfigField, Value, relations
from conformance.families.components import ALL

if TYPE_CHECKING:
    from torch import Tensor


def truth(tensors: "dict[str, Tensor]", settings: Config) -> "dict[str, Tensor]":
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    x = tensors["x"]
    experts, ffn, hidden = tensors["w1_weight"].shape
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=ffn, num_local_experts=experts, hidden_act="silu",
        num_experts_per_tok=settings["num_experts_per_tok"],
        experts_implementation="eager",  # the fused kernel has no float64
    )  # fmt: skip
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config).eval()
    parameters = {
        "gate.weight": tensors["gate_weight"],
        "experts.gate_up_proj": torch.cat((tensors["w1_weight"], tensors["w3_weight"]), dim=1),
        "experts.down_proj": tensors["w2_weight"],
    }
    routed: list[tuple[Tensor, ...]] = []
    block.gate.register_forward_hook(lambda _module, _inputs, output: routed.append(output))
    y = torch.func.functional_call(block, parameters, (x,))
    logits, weights, chosen = routed[0]
    dense = torch.zeros_like(logits, dtype=weights.dtype).scatter(-1, chosen, weights)
    return {"y": y, "router_logits": logits.view(*x.shape[:2], -1), "routing_weights": dense.view(*x.shape[:2], -1)}


def _recipe(
    name: str, summary: str, chosen: int, *, shape: tuple[int, int, int], experts: int, ffn: int, **more: Any
) -> ComponentRecipe:
    """Shapes are chosen such that no token's k-th and (k+1)-th expert are near a tie (a test states the margin)."""
    hidden = shape[-1]
    return ComponentRecipe(
        name=f"sparse_moe/{name}",
        summary=summary,
        settings={"num_experts_per_tok": chosen},
        inputs={"x": shape},
        weights={
            "gate_weight": (experts, hidden), "w1_weight": (experts, ffn, hidden),
            "w2_weight": (experts, hidden, ffn), "w3_weight": (experts, ffn, hidden),
        },
        claims=ALL,
        **more,
    )  # fmt: skip


FAMILY = Component(
    name="sparse_moe",
    title="Sparse mixture of experts",
    paper="Jiang et al. 2024, arXiv:2401.04088, section 2.1",
    equations="""
    g = softmax over the num_experts_per_tok largest of W_g x        (equally: softmax over all, the largest, divided by
    y = Σ_i g_i · w2_i (SiLU(w1_i x) ⊗ w3_i x)                        their sum)

    i runs over the chosen experts; every token is computed, there is no capacity.
""",
    oracle="transformers MixtralSparseMoeBlock",
    arguments=(
        Value(name="x", axes="batch seq hidden", meaning="input"),
        Value(name="gate_weight", axes="experts hidden", meaning="W_g, the router, (out, in)"),
        Value(name="w1_weight", axes="experts ffn hidden", meaning="each expert's gate, (out, in): the activated half"),
        Value(name="w2_weight", axes="experts hidden ffn", meaning="each expert's way down, (out, in)"),
        Value(name="w3_weight", axes="experts ffn hidden", meaning="each expert's way up, (out, in)"),
        Value(name="num_experts_per_tok", axes=None, meaning="k, how many experts a token uses"),
    ),
    returns=(
        Value(name="y", axes="batch seq hidden", meaning="output"),
        Value(name="router_logits", axes="batch seq experts", meaning="W_g x", optional=True),
        Value(name="routing_weights", axes="batch seq experts", meaning="g, 0 where not chosen", optional=True),
    ),
    recipes=(
        _recipe("plain", "2 of 5 experts", 2, shape=(2, 4, 6), experts=5, ffn=7),
        _recipe(
            "field-num_experts_per_tok", "3 of 5 experts", 3, shape=(2, 4, 6), experts=5, ffn=7,
            field="num_experts_per_tok",
            counterfactuals={
                "num_experts_per_tok ignored": {"num_experts_per_tok": 2},
                "num_experts_per_tok at 1": {"num_experts_per_tok": 1},
                "all experts used": {"num_experts_per_tok": 5},
            },
        ),
        _recipe("square", "2 of 5 experts, ffn as wide as hidden: any matrix fits any place", 2,
                shape=(2, 4, 6), experts=5, ffn=6),
        _recipe("distinct", "2 of 11 experts, some unused and some busy", 2, shape=(2, 5, 7), experts=11, ffn=4),
    ),
    truth=truth,
    reference="reference_impl.nn.sparse_moe:sparse_moe",
    relations={
        "batching.alone": relations.rows("x"),
        "invariance.one_expert": relations.one_expert(),
    },
    fields=(ConfigField(name="num_experts_per_tok", default="none", meaning="k, how many experts a token uses"),),
)  # fmt: skip
