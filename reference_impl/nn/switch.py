"""The Switch layer: a router sends each token to one feed-forward expert, and experts have room for so many tokens.

Shapes: B batch, T seq, E experts, C expert_capacity.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference_impl.nn.feed_forward import DenseFeedForward
from reference_impl.nn.moe import Router


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
    chosen: Int[Tensor, "batch seq"],
    num_experts: int,
    expert_capacity: int,
    counted: Bool[Tensor, "batch seq"] | None = None,
) -> Int[Tensor, "batch seq experts"]:
    """1 where a token is sent: to the expert it chose, if fewer than C tokens before it in its row chose the same.

    Fedus et al. 2021, section 2.2 and figure 3; rows do not share room. With C = 2, a row that chooses experts

        0 0 1 0   is sent to   0 0 1 –

    Args:
        counted: which tokens are sent and take room; None: all, padding too.
    """
    wanted = F.one_hot(chosen, num_experts)  # (B, T, E)
    if counted is not None:
        wanted = wanted * counted[..., None]
    place = wanted.cumsum(dim=1)  # (B, T, E): the how-manieth token of this expert, from 1
    return wanted * (place <= expert_capacity)


def run_experts(
    x: Float[Tensor, "batch seq hidden"],
    sent: Int[Tensor, "batch seq experts"],
    experts: Sequence[Callable[[Tensor], Tensor]],
) -> Float[Tensor, "batch seq hidden"]:
    """What each token's expert makes of it; 0 for a token that is sent to none. An expert is called once."""
    outputs = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        token = sent[..., number].nonzero(as_tuple=True)
        outputs = outputs.index_put(token, expert(x[token]))
    return outputs


def weighted(
    outputs: Float[Tensor, "batch seq hidden"], weights: Float[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq hidden"]:
    """p_i(x) · E_i(x), in the dtype of `weights`, then rounded."""
    return (weights[..., None] * outputs).to(outputs.dtype)


def switch_ffn(
    x: Float[Tensor, "batch seq hidden"],
    router_weight: Float[Tensor, "experts hidden"],
    wi_weight: Float[Tensor, "experts ffn hidden"],
    wo_weight: Float[Tensor, "experts hidden ffn"],
    expert_capacity: int,
) -> dict[str, Tensor]:
    """`SwitchFeedForward` with ReLU and without a bias, as a function of its weights.

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
    outputs = run_experts(x, sent, [partial(_expert, *weights) for weights in zip(wi_weight, wo_weight, strict=True)])
    y = weighted(outputs, probabilities.amax(dim=-1))
    return {"y": y, "router_logits": router_logits, "probabilities": probabilities, "dispatched": probabilities * sent}


def _expert(wi: Float[Tensor, "ffn hidden"], wo: Float[Tensor, "hidden ffn"], x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, wi)), wo)


class SwitchRouter(nn.Module):
    """A router under the names of the hub: h(x) = W_r x, with W_r → `classifier.weight`, in float32 or better."""

    def __init__(self, *, hidden_size: int, num_experts: int, bias: bool) -> None:
        super().__init__()
        self.classifier = Router(hidden_size=hidden_size, num_local_experts=num_experts, bias=bias)

    def forward(self, x: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq experts"]:
        router_logits: Tensor = self.classifier(x)
        return router_logits


class SwitchFeedForward(nn.Module):
    """A feed-forward layer of E experts, of which each token uses one, or, where that one is full, none.

        y = p_i(x) · E_i(x),   i = argmax p(x),   E_i(x) = wo_i act(wi_i x)

    Fedus et al. 2021 (arXiv:2101.03961), equations 1 and 2 with k = 1: p → `route_to_one`. `expert_capacity` is the
    result of equation 3, in tokens a row: who finds room, says `within_capacity`. A token without room gets 0: the
    residual connection around the layer carries it on. The weight p_i is not divided by anything, also for k = 1.

    The router, and with it the choice, is in float32, or float64 for float64 input ("selective precision", section
    2.4); experts are in the dtype of `x`. Input jitter (appendix C), for training, is not implemented.

    Children without weights show to forward hooks what no module returns: `routing_weights` (B, T), p_i also where
    there is no room, and `expert_outputs` (B, T, hidden), not yet weighted, 0 where there is no room.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        num_experts: int,
        expert_capacity: int,
        router_bias: bool,
    ) -> None:
        super().__init__()
        self.expert_capacity = expert_capacity
        self.router = SwitchRouter(hidden_size=hidden_size, num_experts=num_experts, bias=router_bias)
        self.experts = nn.ModuleDict(
            {
                f"expert_{number}": DenseFeedForward(
                    hidden_size=hidden_size, intermediate_size=intermediate_size, hidden_act=hidden_act
                )
                for number in range(num_experts)
            }
        )
        self.routing_weights = nn.Identity()
        self.expert_outputs = nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch seq hidden"], counted: Bool[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq hidden"]:
        """`counted`: as in `within_capacity`."""
        probabilities, chosen = route_to_one(self.router(x))
        weights = probabilities.gather(-1, chosen[..., None]).squeeze(-1)  # (B, T)
        sent = within_capacity(chosen, len(self.experts), self.expert_capacity, counted)
        outputs = run_experts(x, sent, list(self.experts.values()))
        return weighted(self.expert_outputs(outputs), self.routing_weights(weights))
