"""The sparse mixture of experts of Mixtral as a function of its weights; `moe` has it as modules.

Shapes: E experts, k chosen experts a token; "*batch" stands for the axes of the tokens, usually batch and seq.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reference_impl.nn import moe
from reference_impl.nn.feed_forward import activation, gate


def sparse_moe(
    x: Float[Tensor, "*batch hidden"],
    gate_weight: Float[Tensor, "experts hidden"],
    w1_weight: Float[Tensor, "experts ffn hidden"],
    w2_weight: Float[Tensor, "experts hidden ffn"],
    w3_weight: Float[Tensor, "experts ffn hidden"],
    num_experts_per_tok: int,
) -> dict[str, Tensor]:
    """A feed-forward layer of E experts, of which each token uses k.

        y = Σ_i G(x)_i · E_i(x),   E_i(x) = w2_i (SiLU(w1_i x) ⊗ w3_i x)

    Jiang et al. 2024, Mixtral of Experts (arXiv:2401.04088), section 2.1: G → `moe.route`, W_g → `gate_weight`. There
    is no capacity limit, no token is dropped. The router is in float32, or float64 for float64 input; experts are in
    the dtype of `x`.

    Returns: `y`, and on the way `router_logits` and `routing_weights` (0 for experts not chosen), both (*, E).
    """
    working = torch.promote_types(x.dtype, torch.float32)
    router_logits = F.linear(x.to(working), gate_weight.to(working))  # (*, E)
    weights, chosen = moe.route(router_logits, num_experts_per_tok)  # (*, k)
    outputs = x.new_empty(*chosen.shape, x.shape[-1])  # (*, k, hidden)
    silu = activation("silu")
    for expert, (w1, w2, w3) in enumerate(zip(w1_weight, w2_weight, w3_weight, strict=True)):
        *token, choice = (chosen == expert).nonzero(as_tuple=True)
        own = x[tuple(token)]  # (tokens of this expert, hidden)
        outputs[(*token, choice)] = F.linear(gate(F.linear(own, w1), F.linear(own, w3), silu), w2)
    routing_weights = torch.zeros_like(router_logits).scatter(-1, chosen, weights)
    return {
        "y": moe.combine(outputs, weights),
        "router_logits": router_logits,
        "routing_weights": routing_weights,
    }
