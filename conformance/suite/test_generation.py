"""Generation checks: what a candidate's own loop of decoding gives follows from its logits, and stops where it must."""

from typing import TYPE_CHECKING

from conformance.bounds import SEMANTIC
from conformance.implementation import Misbehaviour
from conformance.strategies import ragged_prompts
from conformance.suite import drawn

if TYPE_CHECKING:
    import torch

    from conformance.judge import Judge
    from conformance.search import Example

# Tokens that are generated.
NEW = 5


def test_greedy(judge: "Judge") -> None:
    """Every token that `greedy` gives is the likeliest after its row: prompts of different lengths in one batch.

    Rows are padded with junk on the left.  Each is then read alone, with what was generated for it, in one forward:
    where its logits are largest, and by how much, is known without any cache.  Tokens that are equally likely may both
    be given.
    """

    def holds(example: "Example") -> None:
        batch = drawn.ragged(judge, example["ids"], example["lengths"], example["extra"], "left")
        found = _generate(judge, batch, None)
        for row, (length, new) in enumerate(zip(example["lengths"], found, strict=True)):
            _require_likeliest(judge, batch.whole.ids[row, :length], row, new)

    first = [{"ids": 0, "lengths": [3, 1, 5], "extra": 1}]
    judge.search(ragged_prompts(drawn.usual(judge), NEW), holds, first)


def test_stop_token(judge: "Judge") -> None:
    """A row ends with the first stop token that is generated; the rows beside it go on as they would without one."""

    def holds(example: "Example") -> None:
        batch = drawn.ragged(judge, example["ids"], example["lengths"], example["extra"], "left")
        free = _generate(judge, batch, None)
        stop = free[0][1]  # amid the first row; perhaps in others too, perhaps elsewhere
        wanted = [new[: new.index(stop) + 1] if stop in new else new for new in free]
        for row, (new, right) in enumerate(zip(_generate(judge, batch, stop), wanted, strict=True)):
            if new != right:
                raise Misbehaviour("stop", f"row {row} is {new} with stop_token={stop}, wanted {right}")

    first = [{"ids": 0, "lengths": [3, 1, 5], "extra": 1}]
    judge.search(ragged_prompts(drawn.usual(judge), NEW), holds, first)


def _generate(judge: "Judge", batch: drawn.Ragged, stop_token: int | None) -> list[list[int]]:
    """The new tokens of each row: as many as were asked for, where nothing stops it."""
    with judge.precision():
        found: list[list[int]] = judge.candidate.greedy(batch.padded.ids, batch.mask, NEW, stop_token)
    for row, new in enumerate(found):
        if stop_token is None and len(new) != NEW:
            raise Misbehaviour("length", f"row {row} has {len(new)} new tokens, wanted max_new_tokens={NEW}")
    return found


def _require_likeliest(judge: "Judge", prompt: "torch.Tensor", row: int, new: list[int]) -> None:
    import torch

    text = torch.cat([prompt, torch.tensor(new[:-1], dtype=prompt.dtype)])[None]
    logits = drawn.logits(judge, drawn.Text(text, None))[0, len(prompt) - 1 :].detach().to("cpu", torch.float64)
    for place, (token, of) in enumerate(zip(new, logits, strict=True)):
        largest = of.max()
        # either run may be off by the bound
        if of[token] < largest - 2 * SEMANTIC * of.abs().max():
            raise Misbehaviour(
                "not the likeliest", f"new token {place} of row {row} is {token}, whose logit in one forward is "
                f"{of[token]:.6g}; that of {int(of.argmax())} is {largest:.6g}"
            )  # fmt: skip
