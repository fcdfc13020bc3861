"""Golden checks: the candidate's values equal the oracle's, element by element."""

from typing import TYPE_CHECKING

from conformance.implementation import Unsupported, load_checkpoint
from conformance.suite.gradients import compare_gradients
from conformance.suite.padding import padded, row_truth

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.judge import Judge


def test_logits(judge: "Judge") -> None:
    """The logits of one full forward over a batch without padding equal the oracle's."""
    logits = judge.logits(**judge.case.arguments)
    judge.compare(
        logits[:, judge.case.rows], judge.case.expected["logits"], known_mistakes=judge.case.counterfactuals()
    )


def test_left_padding(judge: "Judge") -> None:
    """In a batch of rows of different lengths, padded on the left with junk, every real row is right.

    Positions count real tokens: cumsum(attention_mask) - 1.  Of an encoder–decoder model source and target are padded.
    """
    _padded_and_compare(judge, "left")


def test_right_padding(judge: "Judge") -> None:
    """In a batch of rows of different lengths, padded on the right with junk, every real row is right."""
    _padded_and_compare(judge, "right")


def _padded_and_compare(judge: "Judge", side: str) -> None:
    batch = padded(judge.case.inputs, row_truth(judge.case), side)
    for argument in batch.arguments:
        judge.candidate.need(argument)
    judge.compare(judge.logits(**batch.arguments), batch.truth, real=batch.mask.bool())


def test_positions(judge: "Judge") -> None:
    """Explicit position_ids are used as given: they jump, differ from row to row and leave the sequence far behind.

    Where they turn queries and keys they go past 2,000; where they are looked up in a table, towards its end.

    An all-ones attention_mask goes with them where the candidate takes one, so that jumps are not read as the
    beginnings of packed documents.  Then the last row is fed alone, with its positions.
    """
    judge.candidate.need("position_ids")
    ids, positions, expected = judge.case.ids, judge.case.inputs["position_ids"], judge.case.expected
    for rows in (slice(None), slice(-1, None)):
        ones = ids[rows].new_ones(ids[rows].shape)
        logits = judge.logits(input_ids=ids[rows], position_ids=positions[rows], attention_mask=ones)
        ignored = {"position_ids ignored": expected["logits"][rows]}
        judge.compare(logits, expected["positions.logits"][rows], known_mistakes=ignored)


def test_loss(judge: "Judge") -> None:
    """The loss that the candidate returns, if it returns one, is the mean next-token cross-entropy over all rows.

    Labels are the ids themselves, which the candidate shifts; of an encoder–decoder model they are the tokens to be
    predicted, in the place of the logits that predict them.
    """
    with judge.precision():
        labels = judge.case.inputs.get("labels", judge.case.ids)
        loss = judge.candidate(**judge.case.arguments, labels=labels).losses.get("loss")
    if loss is None:
        raise Unsupported('the model returns no "loss"')
    judge.compare(loss, judge.case.expected["loss"], what="loss")


def test_auxiliary_losses(judge: "Judge") -> None:
    """The losses that a router adds, those of them that the candidate returns, before their coefficients.

    `aux_loss` balances the load of the experts, `z_loss` keeps the router's logits small.
    """
    expected = {name: judge.case.expected[name] for name in ("aux_loss", "z_loss") if name in judge.case.expected}
    with judge.precision():
        labels = judge.case.inputs.get("labels", judge.case.ids)
        losses = judge.candidate(**judge.case.arguments, labels=labels).losses
    if not expected.keys() & losses.keys():
        raise Unsupported(f"the model returns no {' and no '.join(expected)}")
    for name in expected.keys() & losses.keys():
        judge.compare(losses[name], expected[name], what=name)


def test_gradients(judge: "Judge") -> None:
    """The gradient of the next-token loss for every parameter equals the oracle's.

    The loss is computed here from the candidate's logits (what a router adds is not in it); the gradient is read from
    its parameters by hub name.
    One scale for all parameters: the largest gradient of the case.
    """
    import torch

    def next_token_loss() -> "Tensor":
        logits, labels = judge.candidate(**judge.case.arguments).logits, judge.case.inputs.get("labels")
        if labels is None:
            logits, labels = logits[:, :-1], judge.case.ids[:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.to(logits.device).flatten())

    compare_gradients(judge, "gradient.", next_token_loss)


def test_blocks(judge: "Judge") -> None:
    """Each block alone, teacher-forced, is right: one bad layer is one finding, not a cascade.

    Block N is judged through a one-layer checkpoint whose embedding table is the oracle's own input to that block
    (rounded to bfloat16, so that it is exact in every dtype), called with arange(batch · seq) as ids.
    """
    from conformance.localise import stored_blocks

    for layer, (config, weights, ids, truth) in enumerate(stored_blocks(judge.case)):
        block = load_checkpoint(judge.implementation, config, weights, judge.dtype, judge.device)
        with judge.precision():
            logits = block(input_ids=ids).logits
        judge.candidate.calls += block.calls
        judge.compare(logits, truth, noise=f"blocks.{layer}", what=f"logits of block {layer} alone")
