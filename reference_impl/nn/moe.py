"""Sparse mixture of experts: a router sends each token to k of E feed-forward blocks (Mixtral).

Shapes: E experts, k chosen experts a token; "*batch" stands for the axes of the tokens, usually batch and seq.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference_impl.nn.feed_forward import activation, gate


def route(
    router_logits: Float[Tensor, "*batch experts"], num_experts_per_tok: int
) -> tuple[Float[Tensor, "*batch chosen"], Int[Tensor, "*batch chosen"]]:
    """Weights and numbers of the experts that each token is sent to, the heaviest first.

        G(x) = Softmax(TopK(x · W_g))

    Jiang et al. 2024, Mixtral of Experts (arXiv:2401.04088), section 2.1: x · W_g → `router_logits`, K →
    `num_experts_per_tok`. Computed as softmax over all experts, top k of it, and division by the sum of those: the same
    numbers, since softmax's denominator cancels. A token's weights sum to 1.

    Which of two equal logits is taken is not defined. Arithmetic is in the dtype of `router_logits`.
    """
    probabilities = torch.softmax(router_logits, dim=-1)  # (*, E)
    weights, chosen = probabilities.topk(num_experts_per_tok, dim=-1)  # (*, k)
    return weights / weights.sum(dim=-1, keepdim=True), chosen


def combine(
    expert_outputs: Float[Tensor, "*batch chosen hidden"], weights: Float[Tensor, "*batch chosen"]
) -> Float[Tensor, "*batch hidden"]:
    """Σ_i G(x)_i · E_i(x): the weighted sum over a token's experts, in the dtype of `weights`, then rounded."""
    return (weights[..., None] * expert_outputs).sum(dim=-2).to(expert_outputs.dtype)


def load_balancing_loss(
    router_logits: Sequence[Float[Tensor, "batch seq experts"]],
    num_experts_per_tok: int,
    real: Bool[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, ""]:
    """The auxiliary loss that is least when all experts are used alike.

        L = E · Σ_i f_i · P_i

    Fedus et al. 2021, Switch Transformer (arXiv:2101.03961), equations 4 to 6, without the factor α
    (`router_aux_loss_coef`): N → E, f_i → how often expert i is chosen by a token, P_i → its mean probability. Two
    conventions are Hugging Face's and not the paper's: the tokens of all layers are averaged together, and f sums to k,
    not to 1, so that even use of all experts gives k.

    Args:
        router_logits: those of each layer.
        real: which tokens count; None: all.
    """
    logits = torch.stack(list(router_logits))  # (layers, B, T, E)
    if real is not None:
        logits = logits[:, real]  # (layers, real tokens, E)
    logits = logits.flatten(end_dim=-2)  # (N, E)
    num_experts = logits.shape[-1]
    _, chosen = route(logits, num_experts_per_tok)
    chosen_by = F.one_hot(chosen, num_experts).sum(dim=-2).to(logits.dtype).mean(dim=0)  # (E,): f
    probability = torch.softmax(logits, dim=-1).mean(dim=0)  # (E,): P
    return num_experts * (chosen_by * probability).sum()


def router_z_loss(router_logits: Float[Tensor, "*batch experts"]) -> Float[Tensor, ""]:
    """The loss that keeps a router's logits small.

        L_z = 1/B · Σ_i (log Σ_j exp x_ij)²

    Zoph et al. 2022, ST-MoE (arXiv:2202.08906), equation 5, without the factor c_z (`router_z_loss_coef`): x →
    `router_logits`, B → how many tokens there are, in all rows. A token's own logits are all that its term depends on.
    """
    return router_logits.logsumexp(dim=-1).square().mean()


@contextmanager
def recorded_router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """The logits of every router of `model`, in the order in which they are computed while the context is open."""
    recorded: list[Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    handles = [
        router.register_forward_hook(lambda _router, _args, logits: recorded.append(logits)) for router in routers
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


class Router(nn.Module):
    """Scores every expert for a token: x · W_g + b, with W_g → `weight` transposed and b → `bias`, if there is one.

    Arithmetic, and with it the choice of experts, is in float32, or float64 for float64 input: logits rounded to
    bfloat16 tie and flip.
    """

    def __init__(self, *, hidden_size: int, num_local_experts: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_local_experts, hidden_size))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as nn.Linear
        self.bias = nn.Parameter(torch.zeros(num_local_experts)) if bias else None

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch experts"]:
        working = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(working)
        return F.linear(x.to(working), self.weight.to(working), bias)


class Expert(nn.Module):
    """One gated feed-forward block: w2(act(w1 x) ⊗ w3 x).

    The names are those of the original checkpoint: w1 is the gate, w3 goes up, w2 goes down. Shazeer 2020
    (arXiv:2002.05202), equation 6: W → w1, V → w3, W₂ → w2.
    """

    def __init__(self, *, hidden_size: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.act_fn = activation(hidden_act)

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        output: Tensor = self.w2(gate(self.w1(x), self.w3(x), self.act_fn))
        return output


class MixtureOfExperts(nn.Module):
    """A feed-forward layer of E experts, of which each token uses k.

        y = Σ_i G(x)_i · E_i(x)

    Jiang et al. 2024 (arXiv:2401.04088), section 2.1: G → `route`, W_g → `gate`, E_i → `experts`. An expert computes
    the tokens that chose it and no others; there is no capacity limit, no token is dropped.

    Children without weights show to forward hooks what no module returns: `weights` (*, k), the heaviest expert of a
    token first, and `expert_outputs` (*, k, hidden), in the same order and not yet weighted. Router jitter is not
    implemented.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        num_local_experts: int,
        num_experts_per_tok: int,
    ) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.gate = Router(hidden_size=hidden_size, num_local_experts=num_local_experts)
        self.experts = nn.ModuleList(
            Expert(hidden_size=hidden_size, intermediate_size=intermediate_size, hidden_act=hidden_act)
            for _ in range(num_local_experts)
        )
        self.weights = nn.Identity()
        self.expert_outputs = nn.Identity()

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        weights, chosen = route(self.gate(x), self.num_experts_per_tok)  # (*, k)
        return combine(self.expert_outputs(self.run_experts(x, chosen)), self.weights(weights))

    def run_experts(
        self, x: Float[Tensor, "*batch hidden"], chosen: Int[Tensor, "*batch chosen"]
    ) -> Float[Tensor, "*batch chosen hidden"]:
        """What each token's experts make of it. An expert is called once, with all tokens that chose it.

        Three tokens with `chosen` [[4, 0], [0, 2], [2, 4]]: expert 0 gets tokens 0 and 1 and fills [0, 1] and [1, 0].
        """
        outputs = x.new_empty(*chosen.shape, x.shape[-1])  # (*, k, hidden)
        for number, expert in enumerate(self.experts):
            *token, choice = (chosen == number).nonzero(as_tuple=True)
            outputs[(*token, choice)] = expert(x[tuple(token)])
        return outputs
