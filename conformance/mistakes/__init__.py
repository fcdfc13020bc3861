"""The catalogue of mistakes: what people get wrong, each as a small patch of `reference_impl`.

An entry is documentation (`conformance explain rope-layout`), a mutant that the suite must kill (`conformance mutate`),
and a hypothesis about a candidate that fails.  One topic a file; a topic is a tuple called MISTAKES.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

TOPICS = (
    "rotary",
    "attention",
    "masks",
    "norms",
    "feed_forward",
    "blocks",
    "embeddings",
    "experts",
    "cache",
    "packing",
    "generation",
    "loading",
    "recurrent",
    "sequence_attention",
    "encoder_decoder",
    "transformer_xl",
    "switch_transformer",
    "translation",
    "tokenizer",
    "detokenizer",
    "partition",
)  # fmt: skip

Replace = Callable[[Any], Any]


@dataclass(frozen=True)
class Swap:
    """One replacement in `reference_impl`.

    target: "module:name" or "module:Class.name" of a function, method, property or constant.
    make: the original -> what takes its place.
    """

    target: str
    make: Replace


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One mistake.

    id: names the fault.
    families: the models and components in which it can be made.
    what, why, shows, fix: what it does, why that is wrong, how it shows (where, when, how large), the way out.
    seen: threads and files that show the mistake or the trap behind it, or "common knowledge".
    swaps: the mistake as a patch of `reference_impl`.
    killed_by: the checks that must fail it, at least one of them in every family.
    touches: words of the probe vocabulary, without `encoder.` or `decoder.`, that it can make wrong first.
    equivalent: family -> why no output can show it there.
    precision: why it shows in working dtypes only; empty for a mistake of the maths.
    partition: "pipeline" or "tensor parallel" for a mistake of a model over several processes; empty for others.
    """

    id: str
    families: tuple[str, ...]
    what: str
    why: str
    shows: str
    fix: str
    seen: str
    swaps: tuple[Swap, ...]
    killed_by: tuple[str, ...]
    touches: tuple[str, ...] = ()
    equivalent: Mapping[str, str] = field(default_factory=dict)
    precision: str = ""
    partition: str = ""

    def to_text(self) -> str:
        """The entry for a terminal."""
        parts = {
            "What it does": self.what, "Why it is wrong": self.why, "How it shows": self.shows, "Fix": self.fix,
            "Seen in": self.seen, "Families": ", ".join(self.families), "Killed by": ", ".join(self.killed_by),
            "First wrong": ", ".join(self.touches), "Working dtypes only": self.precision,
            "Only over several processes": self.partition,
            **{f"No output shows it in {family}": reason for family, reason in self.equivalent.items()},
        }  # fmt: skip
        return "\n\n".join([self.id, *(f"{title}: {text}" for title, text in parts.items() if text)])


@cache
def catalogue() -> dict[str, Mistake]:
    """Every mistake by id, topic by topic."""
    return {mistake.id: mistake for topic in TOPICS for mistake in topic_mistakes(topic)}


def topic_mistakes(topic: str) -> tuple[Mistake, ...]:
    found: tuple[Mistake, ...] = import_module(f"conformance.mistakes.{topic}").MISTAKES
    return found


def get(identifier: str) -> Mistake:
    """The mistake of that id.  Raises: ValueError naming the nearest."""
    from difflib import get_close_matches

    if identifier not in catalogue():
        near = get_close_matches(identifier, catalogue(), n=3)
        raise ValueError(f"no mistake {identifier!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return catalogue()[identifier]
