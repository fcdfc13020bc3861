"""The loss of a language model."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def next_token_loss(logits: Float[Tensor, "batch seq vocab"], labels: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of each row's next token given the ones before it.

        L = -1/(B · (T - 1)) · Σ log softmax(logits_t)[labels_(t+1)]

    Bengio et al. 2003, section 2. The logits at t score the token at t + 1, so the last logits and the first label of a
    row are not used. The mean is over all tokens of the batch, not over the means of rows.
    """
    return token_loss(logits[:, :-1], labels[:, 1:])


def token_loss(logits: Float[Tensor, "batch seq vocab"], labels: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of the tokens that a decoder is to predict, each in the place of its logits.

        L = -1/(B · T) · Σ log softmax(logits_t)[labels_t]

    Sutskever et al. 2014 (arXiv:1409.3215), section 3.2. The mean is over all tokens of the batch.
    """
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
