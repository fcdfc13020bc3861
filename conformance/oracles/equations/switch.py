"""The Switch layer and its losses, one token at a time, in float64."""

import math
from typing import Any

import torch
from torch import Tensor


def one_row(x: Tensor, W_r: Tensor, wi: Tensor, wo: Tensor, capacity: int) -> dict[str, Any]:
    """The tokens of one sequence in their order.  Fedus et al. 2021 (arXiv:2101.03961), section 2.1.

        p_i(x) = exp(h(x)_i) / Σ_j exp(h(x)_j),   h(x) = W_r x        (1)
        y = p_i(x) E_i(x),   i = argmax p                             (2), with k = 1

    An expert that already holds `capacity` tokens of the sequence takes no more (equation 3 and figure 3): the y of
    such a token is 0.  E_i(x) = wo_i · max(0, wi_i x).

    x: (seq, hidden).  W_r: (experts, hidden).  wi: (experts, ffn, hidden).  wo: (experts, hidden, ffn).
    """
    held = [0] * len(W_r)
    outputs, logits, probabilities, dispatched = [], [], [], []
    for token in x:
        h = W_r @ token
        powers = torch.exp(h - float(h.detach().max()))
        p = powers / powers.sum()
        best = int(p.detach().argmax())
        sent = [torch.zeros((), dtype=x.dtype)] * len(held)
        y = torch.zeros_like(token)
        if held[best] < capacity:
            held[best] += 1
            sent[best] = p[best]
            y = p[best] * (wo[best] @ torch.relu(wi[best] @ token))
        outputs.append(y)
        logits.append(h)
        probabilities.append(p)
        dispatched.append(torch.stack(sent))
    return {
        "y": torch.stack(outputs),
        "router_logits": torch.stack(logits),
        "probabilities": torch.stack(probabilities),
        "dispatched": torch.stack(dispatched),
    }


def balancing_loss(router_logits: list[list[float]]) -> float:
    """The auxiliary loss of one layer, without its coefficient.  Fedus et al. 2021, equations 4 to 6.

        loss = N Σ_i f_i P_i,   f_i = 1/T Σ_x 1{argmax p(x) = i},   P_i = 1/T Σ_x p_i(x)

    router_logits: of each of the batch's T tokens, for each of N experts.  Tokens that an expert has no room for count:
    f is about the choice, not about what becomes of it.
    """
    experts = len(router_logits[0])
    chosen, probability = [0] * experts, [0.0] * experts
    for h in router_logits:
        chosen[h.index(max(h))] += 1
        total = math.fsum(map(math.exp, h))
        for i in range(experts):
            probability[i] += math.exp(h[i]) / total
    tokens = len(router_logits)
    return experts * math.fsum(c / tokens * p / tokens for c, p in zip(chosen, probability, strict=True))


def z_loss(router_logits: list[list[float]]) -> float:
    """The z-loss of one layer, without its coefficient.  Zoph et al. 2022 (arXiv:2202.08906), equation 5.

    loss = 1/B Σ_x (log Σ_i exp h_i(x))² over the batch's B tokens.
    """
    return math.fsum(math.log(math.fsum(map(math.exp, h))) ** 2 for h in router_logits) / len(router_logits)
