"""What property checks share: drawn texts, how long they are, and a candidate run on them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from conformance import draws, strategies
from conformance.implementation import Unsupported
from conformance.suite.feeding import feed

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.families import Config, Family
    from conformance.families.properties import Properties
    from conformance.implementation import Candidate, Session
    from conformance.judge import Judge

# No text is longer; and what the longest text is of a model that knows no end.
MOST_TOKENS, WITHOUT_AN_END = 128, 64
# Texts are this long at most, unless a window asks for more, so that an example is run in a few milliseconds.
USUAL_TOKENS = 12
# Windows that texts can outgrow.
WIDEST_WINDOW = 24
# Of what an earlier case of the family has been asked, the profile `quick` asks so much again.
AGAIN = 6
# Tokens of the source that an encoder reads.
SOURCE_TOKENS = 5


def family(judge: "Judge") -> "Family":
    from conformance.families import get

    return get(judge.case.family)  # type: ignore[no-any-return]


def properties(judge: "Judge") -> "Properties":
    """The capability table of the case's family.  Raises: Unsupported if it has none."""
    found = family(judge).properties
    if found is None:
        raise Unsupported(f"the family {judge.case.family} states no properties")
    return found


def table(judge: "Judge") -> str:
    """Hub name of the table of token embeddings."""
    return properties(judge).table(judge.case.config)


def one_layer(judge: "Judge", embeddings: "Tensor", layer: int) -> "Candidate":
    """A model of one layer of the case's, whose embedding table is `embeddings` (tokens, hidden).

    Positions do not count where they are looked up in a table.
    """
    make = family(judge).block_checkpoint
    if make is None:
        raise Unsupported(f"one layer of {judge.case.family} cannot be had alone")
    return judge.load_other(*make(judge.case.config, judge.case.weights, embeddings[None], layer))


def longest(judge: "Judge") -> int:
    """The most tokens that a text may have: the rows of the position table, if it is not larger than `MOST_TOKENS`."""
    rows: int = judge.case.config.get(family(judge).positions_key, WITHOUT_AN_END)
    return min(rows, MOST_TOKENS)


def windows(judge: "Judge") -> tuple[int | None, ...]:
    """For each layer the keys that a query sees, None where it sees all of any text that is drawn."""
    found = properties(judge).windows(judge.case.config)
    return tuple(None if window is None or window > WIDEST_WINDOW else window for window in found)


def usual(judge: "Judge") -> int:
    """The most tokens that ordinary examples have: more than three windows, where there is one."""
    widest = max((window for window in windows(judge) if window is not None), default=0)
    return min(longest(judge), max(USUAL_TOKENS, 3 * widest + 2))


def tried(
    judge: "Judge", names: Sequence[str], known: "Callable[[Config], Collection[str]]", most: int | None = None
) -> list[str]:
    """What a check tries of things that the cases of a family have in common, such as tensors: all of it.

    In the profile `quick` what no earlier case of the family has, `most` at most; filled up to `AGAIN` with the rest.
    Which ones they are follows from the seed.  known: what another case has, of its config.
    """
    if judge.settings.profile != "quick" or not names:
        return list(names)
    own, cases = judge.case.name.split("/")[1], properties(judge).cases
    earlier = [recipe for recipe in family(judge).recipes if recipe.name.split("/")[1] in takewhile(own.__ne__, cases)]
    before = {name for recipe in earlier for name in known(recipe.config)}
    order = draws.integers(f"property/tried/{judge.settings.seed}", len(names), 0, 2**16 - 1).argsort(stable=True)
    shuffled = sorted((names[place] for place in order.tolist()), key=before.__contains__)
    new = len(set(names) - before)
    chosen = set(shuffled[: min(max(new, AGAIN), most or len(names))])
    return [name for name in names if name in chosen]


# --- texts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Rows of token ids; of an encoder–decoder model its decoder's, each row with a source of its own.

    ids: (batch, length).  source: (batch, tokens) ids that the encoder reads, None without an encoder.
    """

    ids: "Tensor"
    source: "Tensor | None"

    def __getitem__(self, rows: Any) -> "Text":
        """Some of the rows, perhaps in another order or several times."""
        return Text(self.ids[rows], None if self.source is None else self.source[rows])

    def with_ids(self, ids: "Tensor") -> "Text":
        """Other ids; one source serves all, if there are more rows."""
        source = self.source
        if source is not None and len(source) != len(ids):
            source = source[:1].expand(len(ids), -1)
        return Text(ids, source)

    def arguments(self, mask: "Tensor | None" = None) -> "dict[str, Tensor]":
        """The arguments of one call."""
        if self.source is None:
            return {"input_ids": self.ids} | ({} if mask is None else {"attention_mask": mask})
        named = {"input_ids": self.source, "decoder_input_ids": self.ids}
        return named | ({} if mask is None else {"decoder_attention_mask": mask})


def ids(judge: "Judge", seed: int, batch: int, length: int) -> "Tensor":
    """(batch, length) drawn token ids."""
    return strategies.token_ids(seed, batch, length, judge.candidate.vocab)


def usable(judge: "Judge") -> int:
    """How many ids there are that padding does not take for junk; they come first."""
    vocab: int = judge.candidate.vocab
    return vocab - strategies.junk(vocab)


def text(judge: "Judge", seed: int, batch: int, length: int) -> Text:
    """A drawn text."""
    return around(judge, ids(judge, seed, batch, length), seed)


def around(judge: "Judge", given: "Tensor", seed: int) -> Text:
    """A text of these ids, with a drawn source where the model reads one."""
    if not family(judge).encoder_decoder:
        return Text(given, None)
    source = strategies.token_ids(seed + 1, len(given), SOURCE_TOKENS, judge.case.config["vocab_size"])
    return Text(given, source)


def changed(judge: "Judge", id_: "Tensor", by: int, tokens: int | None = None) -> "Tensor":
    """Other ids than these, none of them junk; `by` says which.  tokens: of so many ids instead."""
    count = tokens or usable(judge)
    return (id_ + 1 + by % (count - 1)) % count


# --- padding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Padded:
    """Ids of rows of different lengths in one padded batch.

    whole: (batch, longest and what comes after) without padding; its first tokens are the row's own.
    padded, mask: (batch, columns) the same rows padded with junk.
    place: for each column the index of its token in the row.
    """

    whole: "Tensor"
    padded: "Tensor"
    mask: "Tensor"
    place: "Tensor"


@dataclass(frozen=True)
class Ragged:
    """The same as texts, of the tokens that the logits belong to."""

    whole: Text
    padded: Text
    mask: "Tensor"
    place: "Tensor"

    def in_place(self, values: "Tensor") -> "Tensor":
        """(batch, columns, …): values of the tokens of `whole`, where padding puts them."""
        import torch

        found: Tensor = values[torch.arange(len(self.place))[:, None], self.place.to(values.device)]
        return found


def ragged(judge: "Judge", seed: int, lengths: Sequence[int], extra: int, side: str, after: int = 0) -> Ragged:
    """Rows of these lengths, padded on one side to the longest and `extra` columns more; then `after` tokens a row."""
    ids = _padded(judge.candidate.vocab, seed, lengths, extra, side, after)
    whole = around(judge, ids.whole, seed)
    return Ragged(whole, whole.with_ids(ids.padded), ids.mask, ids.place)


def ragged_source(judge: "Judge", seed: int, lengths: Sequence[int], extra: int, side: str) -> Padded:
    """Sources of these lengths, padded on one side to the longest and `extra` columns more."""
    return _padded(judge.case.config["vocab_size"], seed + 1, lengths, extra, side, 0)


def _padded(vocab: int, seed: int, lengths: Sequence[int], extra: int, side: str, after: int) -> Padded:
    import torch

    width, batch = max(lengths) + extra, len(lengths)
    whole = strategies.token_ids(seed, batch, max(lengths) + after, vocab)
    padded = strategies.padding_ids(seed, batch, width + after, vocab)
    mask, place = torch.zeros_like(padded), torch.zeros_like(padded)
    for row, length in enumerate(lengths):
        start = width - length if side == "left" else 0
        columns = [*range(start, start + length), *range(width, width + after)]
        place[row, columns] = torch.arange(length + after)
        padded[row, columns], mask[row, columns] = whole[row, : length + after], 1
    return Padded(whole, padded, mask, place)


# --- running ---------------------------------------------------------------------------------------------------------


def logits(judge: "Judge", given: Text, mask: "Tensor | None" = None) -> "Tensor":
    """The candidate's logits of a text in one call."""
    return judge.logits(**given.arguments(mask))


def logits_of(judge: "Judge", candidate: "Candidate", given: Text) -> "Tensor":
    """Logits that another candidate than the judge's own gives."""
    with judge.precision():
        output = candidate(**given.arguments())
    return output.logits


def source_of(given: Text) -> "dict[str, Tensor]":
    """What a session over the text is opened with."""
    return {} if given.source is None else {"input_ids": given.source}


def session(judge: "Judge", given: Text) -> "Session":
    """A new session, over the text's source where there is one."""
    return judge.candidate.session(**source_of(given))  # type: ignore[no-any-return]


def fed(
    judge: "Judge", plan: Sequence[int], given: Text, mask: "Tensor | None" = None, masked: int | None = None
) -> "Tensor":
    """Logits of a text that a session of its own is fed in calls of the planned sizes; masked: see `feed`."""
    return feed(judge, plan, given.ids, mask, source_of(given), masked)
