"""The Switch layer: a router sends each token to one feed-forward expert, and experts have room for so many tokens.

Shapes: B batch, T seq, E experts, C expert_capacity.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def route_to_one(
    router_logits: Float[Tensor, "batch seq experts"],
) -> tuple[Float[Tensor, "batch seq experts"], Int[Tensor, "batch seq"]]:
    """Probability of every expert, and the number of the likeliest.

        p_i(x) = exp(h(x)_i) / Σ_j exp(h(x)_j)

    Fedus et al. 2021 (arXiv:2101.03961), equation 1: h(x) → `router_logits`. Which of two equal ones is taken is not
    defined.
    """
    probabilities = torch.softmax(router_logits, dim=-1)
    return probabilities, probabilities.argmax(dim=-1)


def within_capacity(
    chosen: Int[Tensor, "batch seq"], num_experts: int, expert_capacity: int
) -> Int[Tensor, "batch seq experts"]:
    """1 where a token is sent: to the expert it chose, if fewer than C tokens before it in its row chose the same.

    Fedus et al. 2021, section 2.1 and figure 3; rows do not share room. With C = 2, a row that chooses experts

        0 0 1 0   is sent to   0 0 1 –
    """
    wanted = F.one_hot(chosen, num_experts)  # (B, T, E)
    place = wanted.cumsum(dim=1)  # (B, T, E): the how-manieth token of this expert, from 1
    return wanted * (place <= expert_capacity)


def switch_ffn(
    x: Float[Tensor, "batch seq hidden"],
    router_weight: Float[Tensor, "experts hidden"],
    wi_weight: Float[Tensor, "experts ffn hidden"],
    wo_weight: Float[Tensor, "experts hidden ffn"],
    expert_capacity: int,
) -> dict[str, Tensor]:
    """A feed-forward layer of E experts, of which each token uses one, or, where that one is full, none.

        y = p_i(x) · E_i(x),   i = argmax p(x),   E_i(x) = wo_i max(0, wi_i x)

    Fedus et al. 2021 (arXiv:2101.03961), equations 1 and 2 with k = 1: W_r → `router_weight`; `expert_capacity` is the
    result of equation 3, in tokens a row. A token for which there is no room gets 0: the residual connection around the
    layer carries it on. There is no jitter and no bias.

    The router, and with it the choice, is in float32, or float64 for float64 input; experts are in the dtype of `x`.

    Returns: `y`, and on the way `router_logits`, `probabilities` and `dispatched` (p_i where a token is sent, else 0),
        all (B, T, E).

    Raises:
        ValueError: there is no room at all.
    """
    if expert_capacity < 1:
        raise ValueError(f"expert_capacity={expert_capacity} must be 1 token or more")
    working = torch.promote_types(x.dtype, torch.float32)
    router_logits = F.linear(x.to(working), router_weight.to(working))  # (B, T, E)
    probabilities, chosen = route_to_one(router_logits)
    sent = within_capacity(chosen, len(router_weight), expert_capacity)  # (B, T, E)
    dispatched = probabilities * sent
    y = torch.zeros_like(x)
    for expert, (wi, wo) in enumerate(zip(wi_weight, wo_weight, strict=True)):
        row, place = sent[..., expert].nonzero(as_tuple=True)
        output = F.linear(F.relu(F.linear(x[row, place], wi)), wo)
        y = y.index_put((row, place), (dispatched[row, place, expert, None] * output).to(x.dtype))
    return {"y": y, "router_logits": router_logits, "probabilities": probabilities, "dispatched": dispatched}
