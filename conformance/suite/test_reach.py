"""Reach: which tokens move the logits of the last one: all those that the configuration says, and no other."""

import re
from typing import TYPE_CHECKING

from conformance.families.properties import reach, remembered
from conformance.implementation import Misbehaviour, Unsupported
from conformance.strategies import SEEDS, floats, plans, texts
from conformance.suite import drawn
from conformance.suite.feeding import equal_calls

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from conformance.implementation import Candidate
    from conformance.judge import Judge
    from conformance.search import Example

# A token counts as not reaching the last one if none of so many other tokens in its place moves that one's logits.
ALTERNATIVES = 5
# Tokens beyond the reach that a text has.
BEYOND = 3


def test_last_row(judge: "Judge") -> None:
    """The last row is moved by exactly the tokens that can reach it through the layers.

    Where every layer has a window these are the last 1 + Σ (window − 1), the sum over the layers; else all of them.
    """
    limit = reach(drawn.windows(judge))
    most = drawn.usual(judge) if limit is None else min(limit + BEYOND, drawn.longest(judge))

    def holds(example: "Example") -> None:
        text = drawn.text(judge, example["ids"], 1, example["length"])
        moving = _moving(judge, text, lambda rows: drawn.logits(judge, rows))
        _exactly(moving, 0 if limit is None else max(0, len(moving) - limit))

    judge.search(texts(most, rows=1), holds, [{"ids": 0, "batch": 1, "length": most}])


def test_one_layer(judge: "Judge") -> None:
    """In one layer alone a query sees exactly `window` keys, its own included; without a window, all up to its own.

    Each layer stands in a checkpoint of its own, whose embedding table is drawn.
    """
    tokens = min(judge.candidate.vocab, 4 * drawn.USUAL_TOKENS)
    width = drawn.family(judge).probe_sizes(judge.case.config, 1, 1)["hidden"]

    def load(layer: int) -> "Candidate":
        return drawn.one_layer(judge, floats(0, "table", (tokens, width)), layer)

    _layer_by_layer(judge, load, tokens, "layer {} alone: ")


def test_each_layer(judge: "Judge") -> None:
    """Where windows differ from layer to layer, each layer of the whole model has its own: the pattern is not shifted.

    In the case's checkpoint the output projections of all other layers' attention are zero, so that nothing but this
    layer carries anything from one token to another.
    """
    pattern = drawn.properties(judge).attention_output
    assert pattern is not None

    def load(layer: int) -> "Candidate":
        others = {
            name: tensor * 0
            for name, tensor in judge.case.weights.items()
            if (found := re.search(pattern, name)) and int(found[1]) != layer
        }
        return judge.load_other(judge.case.config, judge.case.weights | others)

    _layer_by_layer(judge, load, drawn.usable(judge), "where layer {} alone attends: ")


def _layer_by_layer(judge: "Judge", load: "Callable[[int], Candidate]", tokens: int, where: str) -> None:
    """For each layer: what moves the last row of the model that is loaded for it is the last `window` of its tokens.

    tokens: how many ids the models have.
    """
    from hypothesis import strategies as st

    windows = drawn.windows(judge)
    loaded: dict[int, Candidate] = {}

    def holds(example: "Example") -> None:
        layer = example["layer"]
        if layer not in loaded:
            loaded[layer] = load(layer)
        window = windows[layer]
        length = drawn.USUAL_TOKENS if window is None else window + BEYOND
        text = drawn.Text(drawn.ids(judge, example["ids"], 1, min(length, drawn.longest(judge))) % tokens, None)
        moving = _moving(judge, text, lambda rows: drawn.logits_of(judge, loaded[layer], rows), tokens)
        _exactly(moving, 0 if window is None else max(0, len(moving) - window), where.format(layer))

    first = [{"layer": layer, "ids": 0} for layer in range(len(windows))]
    drawn_ = st.fixed_dictionaries({"layer": st.integers(0, len(windows) - 1), "ids": SEEDS})
    judge.search(drawn_, holds, first)


def test_memory(judge: "Judge") -> None:
    """Fed in segments, a text moves its last row by exactly what each layer saw or remembered, segment by segment.

    With a memory of M tokens a query sees its segment up to itself and the M tokens before the segment, as they entered
    its layer in the segments of their time.  So n layers reach about n · M tokens back, to the start of the segment in
    which each of them arrives and M further: a memory that is one token shorter or longer, or another layer's, shows.
    """
    memory_of = drawn.properties(judge).memory
    if memory_of is None:
        raise Unsupported(f"the family {judge.case.family} has no memory")
    windows, memory = drawn.windows(judge), memory_of(judge.case.config)

    def holds(example: "Example") -> None:
        plan = example["plan"]
        text = drawn.text(judge, example["ids"], 1, sum(plan))
        moving = _moving(judge, text, lambda rows: drawn.fed(judge, plan, rows))
        _exactly(moving, remembered(windows, memory, plan), f"fed in segments of {plan}, ")

    if memory > drawn.WIDEST_WINDOW:
        judge.search(plans(drawn.usual(judge), rows=1), holds)
        return
    # The longest segments of `first` are of M + 1 tokens; before the last one there is more than the layers can reach
    most = (memory + 1) * (2 * len(windows) + 1) + BEYOND
    first = [
        {"ids": 0, "batch": 1, "plan": equal_calls((2 * size - 1 + memory) * len(windows) + size + BEYOND, size)}
        for size in (1, memory - 1, memory, memory + 1)
    ]
    judge.search(plans(most, rows=1), holds, first)


def _moving(
    judge: "Judge", text: drawn.Text, logits: "Callable[[drawn.Text], Tensor]", tokens: int | None = None
) -> list[bool]:
    """For each token of a text (1, length) whether another one in its place moves the last row.

    tokens: how many ids there are, if not those of the case's vocabulary.
    """
    length = text.ids.shape[1]
    rows = text.ids.repeat(1 + length * ALTERNATIVES, 1)
    for at in range(length):
        for by in range(ALTERNATIVES):
            rows[1 + at * ALTERNATIVES + by, at] = drawn.changed(judge, text.ids[0, at], by, tokens)
    last = logits(text.with_ids(rows))[:, -1]
    return [
        any(judge.moved(last[1 + at * ALTERNATIVES + by], last[0]) for by in range(ALTERNATIVES))
        for at in range(length)
    ]


def _exactly(moving: list[bool], first: int, where: str = "") -> None:
    """Raises: Misbehaviour unless the tokens from `first` on move the last row, and they alone."""
    wanted = [at >= first for at in range(len(moving))]
    if moving == wanted:
        return
    found = ", ".join(str(at) for at, moves in enumerate(moving) if moves) or "none"
    raise Misbehaviour(
        "reach", f"{where}the last of {len(moving)} tokens is moved by tokens {found}; "
        f"it must be moved by {first} to {len(moving) - 1} and no other",
    )  # fmt: skip
