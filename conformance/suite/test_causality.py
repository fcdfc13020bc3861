"""Causality: a token's logits depend on no later token."""

from typing import TYPE_CHECKING

from conformance import bounds, draws
from conformance.implementation import Misbehaviour, Unsupported, running
from conformance.strategies import SEEDS, changed_texts, different_ids, permuted_texts
from conformance.suite import drawn
from conformance.suite.related import calls_agree

# A token counts as without effect if none of so many others in its place has one: two may have almost one embedding.
ALTERNATIVES = 5

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.judge import Judge
    from conformance.search import Example


def test_prefix(judge: "Judge") -> None:
    """When one token of a text is changed, the logits before it stay as they were, and those at it move.

    Of a component: the first tokens of a segment get alone what they get with others behind them.
    """
    import torch

    if judge.is_component:
        calls_agree(judge, "causality.prefix")
        return

    def holds(example: "Example") -> None:
        text, at = drawn.text(judge, example["ids"], 1, example["length"]), example["at"]
        rows = text.ids.repeat(1 + ALTERNATIVES, 1)
        others = [drawn.changed(judge, text.ids[0, at], example["other"] + by) for by in range(ALTERNATIVES)]
        rows[1:, at] = torch.stack(others)
        before, *after = drawn.logits(judge, text.with_ids(rows))
        if at:
            earlier = torch.stack(after)[:, :at]
            judge.same(earlier, before[:at].expand_as(earlier), f"logits before token {at} moved when it was changed")
        if not any(judge.moved(other[at], before[at]) for other in after):
            raise Misbehaviour("no effect", f"the logits at token {at} do not move when it is changed")

    judge.search(changed_texts(drawn.usual(judge)), holds, [{"ids": 0, "length": 2, "at": 1, "other": 0}])


def test_source(judge: "Judge") -> None:
    """An encoder is not causal: every token of the source moves the logits of the first token that is decoded."""
    import torch
    from hypothesis import strategies as st

    def holds(example: "Example") -> None:
        text, at = drawn.text(judge, example["ids"], 1, 1), example["at"]
        assert text.source is not None
        others = text.source.repeat(1 + ALTERNATIVES, 1)
        others[1:, at] = torch.stack([drawn.changed(judge, text.source[0, at], by) for by in range(ALTERNATIVES)])
        logits = drawn.logits(judge, drawn.Text(text.ids.expand(len(others), -1), others))
        if not any(judge.moved(other, logits[0]) for other in logits[1:]):
            raise Misbehaviour("no effect", f"token {at} of the source does not move the first logits")

    first = [{"ids": 0, "at": at} for at in range(drawn.SOURCE_TOKENS)]
    judge.search(st.fixed_dictionaries({"ids": SEEDS, "at": st.integers(0, drawn.SOURCE_TOKENS - 1)}), holds, first)


def test_encoder(judge: "Judge") -> None:
    """An encoder looks ahead: where positions do not count, the order of the source moves nothing.

    In a checkpoint without positions a source is a bag of tokens.  In a causal encoder the last one would see more than
    the others.
    """
    make = drawn.properties(judge).positionless
    if make is None:
        raise Unsupported(f"the positions of {judge.case.family} cannot be taken away")
    other = judge.load_other(*make(judge.case.config, judge.case.weights))

    def holds(example: "Example") -> None:
        text = drawn.text(judge, example["ids"], 1, example["length"])
        assert text.source is not None
        order = example["order"] + list(range(len(example["order"]), drawn.SOURCE_TOKENS))
        turned = drawn.Text(text.ids, text.source[:, order])
        got, wanted = drawn.logits_of(judge, other, turned), drawn.logits_of(judge, other, text)
        judge.same(got, wanted, "without positions, the order of the source moves the logits")

    first = [{"ids": 0, "length": 2, "order": [2, 0, 1]}]
    judge.search(permuted_texts(3), holds, first)


def test_gradient(judge: "Judge") -> None:
    """The gradient of a token's logits is 0 for every later token's embedding, and not for its own.

    What rounding leaves counts as 0: a softmax that subtracts the largest of all scores, hidden ones too, has a
    gradient at the token of that score, which cancels.  It may be n · 2^-53 of the largest, with n the elements of the
    text's embeddings.

    The embedding table is found among the parameters by its hub name; the ids are all different, so that a row of its
    gradient belongs to one token.  Only logits of ids that the text does not hold are summed: where the head is the
    table, it adds nothing to the rows that are looked at.
    """
    table = drawn.table(judge)
    found = judge.candidate.parameters([table])
    if found is None:
        raise Unsupported("the model has no parameters by hub name")

    def holds(example: "Example") -> None:
        at = example["at"]
        gradient = _gradient(judge, found[table], example)
        rounding = bounds.rounding(gradient.numel()) * gradient.abs().max()
        if leaks := [t for t, row in enumerate(gradient) if t > at and not row.abs().max() <= rounding]:
            raise Misbehaviour(
                "leak", f"the logits at token {at} have a gradient at later tokens: {', '.join(map(str, leaks))}"
            )
        if not gradient[at].any():
            raise Misbehaviour("no effect", f"the logits at token {at} have no gradient at their own token")

    # Ids that the text does not hold are needed too
    most = min(drawn.usual(judge), drawn.usable(judge) // 2)
    judge.search(changed_texts(most), holds, [{"ids": 0, "length": most, "at": most // 2, "other": 0}])


def _gradient(judge: "Judge", table: "Tensor", example: "Example") -> "Tensor":
    """(length, hidden): gradient of a mixture of the logits at token `at` for each token's embedding."""
    import torch

    vocab, real = judge.candidate.vocab, drawn.usable(judge)
    text = drawn.around(judge, different_ids(example["ids"], example["length"], real), example["ids"])
    ids = text.ids[0]
    if text.source is not None:  # one table may serve both
        free = torch.tensor([id_ for id_ in range(real) if id_ not in ids])
        text = drawn.Text(text.ids, free[text.source % len(free)])
    mixture = draws.integers(f"property/mixture/{example['other']}", vocab, 1, draws.LARGEST).double()
    mixture[ids] = 0
    table.requires_grad_(True)
    table.grad = None
    with judge.precision(gradients=True):
        logits = judge.candidate(**text.arguments()).logits
        with running("logits.backward()"):
            (logits[0, example["at"]] * mixture.to(logits.device)).sum().backward()
    gradient, table.grad = table.grad, None
    if gradient is None:
        raise Misbehaviour("no effect", "the logits have no gradient at the embedding table")
    return gradient[ids.to(gradient.device)].detach().cpu()
