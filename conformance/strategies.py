"""Hypothesis strategies for inputs of a loaded checkpoint, and what their examples mean.

Public: anybody who writes property tests for a sequence model can draw from here.

    from conformance.strategies import plans, texts, token_ids

Every strategy draws *examples*: dicts of numbers and lists that JSON can hold and a person can read.  Tensors are not
drawn but made from an example: `token_ids(example, vocab)` turns the seed under "ids" into token ids, the same on every
machine.  So an example is short, can be repeated from a command line, and shrinks fast.

    key        meaning
    ids        seed of the token ids                    batch      rows
    length     tokens a row                             lengths    tokens of each row, padded to one width
    row        a row of the batch                       order      an order of the rows (or of tokens)
    at         index of a token                         plan       sizes of the calls that feed a session
    side       where the padding is                     extra      columns of padding more than are needed
    other      seed of what is put in place             …          each check says what else it draws
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from conformance import draws

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy
    from torch import Tensor

    from conformance.search import Example

# Seeds are small numbers: they are for people to read and to type.
SEEDS = st.integers(0, 9999)
SIDES = st.sampled_from(("left", "right"))
MOST_ROWS = 4


def seeds() -> "SearchStrategy[int]":
    """Seeds of drawn tensors."""
    return SEEDS


def texts(longest: int, *, shortest: int = 1, rows: int = MOST_ROWS) -> "SearchStrategy[Example]":
    """Batches without padding: {"ids", "batch", "length"}, 1 … `rows` rows of `shortest` … `longest` tokens."""
    return st.fixed_dictionaries(
        {"ids": SEEDS, "batch": st.integers(1, rows), "length": st.integers(shortest, longest)}
    )


@st.composite
def changed_texts(draw: "DrawFn", longest: int) -> "Example":
    """One row and a token of it that is changed: {"ids", "length", "at", "other"}, with at < length."""
    length = draw(st.integers(1, longest))
    return {"ids": draw(SEEDS), "length": length, "at": draw(st.integers(0, length - 1)), "other": draw(SEEDS)}


@st.composite
def rows_of_texts(draw: "DrawFn", longest: int) -> "Example":
    """A batch of at least two rows and one of them: {"ids", "batch", "length", "row"}."""
    batch = draw(st.integers(2, MOST_ROWS))
    return {
        "ids": draw(SEEDS), "batch": batch, "length": draw(st.integers(1, longest)),
        "row": draw(st.integers(0, batch - 1)),
    }  # fmt: skip


@st.composite
def permuted_texts(draw: "DrawFn", longest: int) -> "Example":
    """A batch and another order of its rows: {"ids", "length", "order"}; as many rows as the order has."""
    order = draw(st.permutations(range(draw(st.integers(2, MOST_ROWS)))))
    return {"ids": draw(SEEDS), "length": draw(st.integers(1, longest)), "order": list(order)}


@st.composite
def ragged_texts(draw: "DrawFn", longest: int) -> "Example":
    """Rows of different lengths, padded with junk: {"ids", "lengths", "side", "extra"}.

    The batch is as wide as its longest row and `extra` columns more; `longest` counts both.
    """
    lengths = draw(st.lists(st.integers(1, longest), min_size=2, max_size=MOST_ROWS))
    extra = draw(st.integers(0, min(2, longest - max(lengths))))
    return {"ids": draw(SEEDS), "lengths": lengths, "side": draw(SIDES), "extra": extra}


def packed_texts(longest: int) -> "SearchStrategy[Example]":
    """Texts of different lengths, one behind the other: {"ids", "lengths"}; together as many tokens as `longest`."""
    return st.fixed_dictionaries({"ids": SEEDS, "lengths": plan_of(longest)})


@st.composite
def plans(draw: "DrawFn", longest: int, *, rows: int = 2) -> "Example":
    """A text and how it is cut into calls: {"ids", "batch", "plan"}; the plan's sizes add up to at most `longest`."""
    return {"ids": draw(SEEDS), "batch": draw(st.integers(1, rows)), "plan": draw(_plan(longest))}


@st.composite
def plan_of(draw: "DrawFn", total: int) -> list[int]:
    """Sizes of calls that add up to `total`."""
    plan: list[int] = []
    while left := total - sum(plan):
        plan.append(draw(st.integers(1, left)))
    return plan


@st.composite
def _plan(draw: "DrawFn", longest: int) -> list[int]:
    """Sizes of calls that add up to `longest` at most."""
    return draw(plan_of(draw(st.integers(1, longest))))


@st.composite
def ragged_plans(draw: "DrawFn", longest: int, decoded: int) -> "Example":
    """Prompts of different lengths, padded on the left and fed in calls of any size, then `decoded` single tokens.

    {"ids", "lengths", "extra", "plan"}: the plan cuts the padded prompts; their width is what its sizes add up to.
    """
    example = draw(ragged_texts(longest - decoded))
    plan = draw(plan_of(max(example["lengths"]) + example["extra"]))
    return {"ids": example["ids"], "lengths": example["lengths"], "extra": example["extra"], "plan": plan}


@st.composite
def ragged_prompts(draw: "DrawFn", longest: int, new: int) -> "Example":
    """Prompts of different lengths, padded on the left, with room for `new` tokens: {"ids", "lengths", "extra"}."""
    example = draw(ragged_texts(longest - new))
    return {"ids": example["ids"], "lengths": example["lengths"], "extra": example["extra"]}


@st.composite
def interleaved(draw: "DrawFn", longest: int) -> "Example":
    """Two texts fed to two sessions in turns: {"ids", "other", "plan"}; the sessions take turns call by call."""
    ids, other = draw(SEEDS), draw(SEEDS)
    return {"ids": ids, "other": other + 10_000, "plan": draw(_plan(longest))}


# --- what is made of an example --------------------------------------------------------------------------------------


def junk(vocab: int) -> int:
    """How many of the last ids stand for junk in padding, and are drawn for nothing else."""
    return max(2, vocab // 10)


def token_ids(seed: int, batch: int, length: int, vocab: int) -> "Tensor":
    """(batch, length) token ids; none is among the last `junk(vocab)`."""
    drawn = draws.integers(f"property/ids/{seed}", batch * length, 0, vocab - junk(vocab) - 1)
    return drawn.view(batch, length)


def different_ids(seed: int, length: int, vocab: int) -> "Tensor":
    """(1, length) token ids, no two alike.  Raises: ValueError if there are not so many."""
    if length > vocab:
        raise ValueError(f"{length} different ids were asked for, the vocabulary has {vocab}")
    return draws.integers(f"property/different/{seed}", vocab, 0, 2**16 - 1).argsort(stable=True)[None, :length]


def padding_ids(seed: int, batch: int, length: int, vocab: int) -> "Tensor":
    """(batch, length) junk for padding: ids that `token_ids` never gives."""
    return draws.integers(f"property/padding/{seed}", batch * length, vocab - junk(vocab), vocab - 1).view(
        batch, length
    )


def floats(seed: int, name: str, shape: Sequence[int], deviation: float = 1.0) -> "Tensor":
    """A float32 tensor, exact in bfloat16, with about the given standard deviation."""
    return draws.uniform(f"property/{name}/{seed}/{'x'.join(map(str, shape))}", shape, deviation)


# --- for people ------------------------------------------------------------------------------------------------------

# key -> how a person says it; {} is the value.  What is not here is said as `key value`.
WORDS = {
    "tensor": "{}",
    "field": "{}",
    "stored": "stored in {}",
    "layer": "layer {}",
    "batch": "rows: {}",
    "length": "tokens a row: {}",
    "lengths": "tokens of each row: {}",
    "side": "padded on the {}",
    "extra": "columns of padding beyond the longest row: {}",
    "plan": "calls of {} tokens",
    "at": "token {} changed",
    "row": "row {}",
    "order": "order {}",
    "shift": "positions {} further on",
    "times": "{} times as large",
    "added": "{} added",
    "longer": "{} keys more",
    "window": "a window of {}",
    "tokens": "{} more than one token",
    "turn": "turned by {}",
    "ids": "ids from seed {}",
    "inputs": "inputs from seed {}",
    "other": "the others from seed {}",
}


def in_order(example: "Example") -> "Example":
    """The example with its keys in the order in which a person would say them."""
    order = {key: place for place, key in enumerate(WORDS)}
    return dict(sorted(example.items(), key=lambda item: order.get(item[0], len(order))))


def describe(example: "Example") -> str:
    """An example in words, for a failure's message."""
    return ", ".join(WORDS.get(key, key + " {}").format(_said(value)) for key, value in example.items())


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
