"""The Switch layer, one token at a time, in float64."""

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
