import math

import torch

from reference_impl.nn.loss import next_token_loss


def test_equals_the_mean_of_negative_log_probabilities_in_plain_python() -> None:
    logits = [[[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]], [[-2.0, 0.0, 1.0], [0.0, 3.0, -1.0]]]
    labels = [[2, 1], [0, 2]]
    losses = [
        math.log(sum(map(math.exp, row[0]))) - row[0][label[1]] for row, label in zip(logits, labels, strict=True)
    ]
    got = next_token_loss(torch.tensor(logits, dtype=torch.float64), torch.tensor(labels))
    assert abs(got.item() - sum(losses) / 2) < 1e-15


def test_first_label_and_last_logits_are_not_used() -> None:
    logits, labels = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)), torch.arange(10).view(2, 5) % 7
    before = next_token_loss(logits, labels)
    logits[:, -1] += 3 * logits[:, 0]
    labels[:, 0] = 6
    assert torch.equal(next_token_loss(logits, labels), before)
