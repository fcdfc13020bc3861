"""How wrong ids and texts are wrong, when no known mistake gives them: what a person looks at first.

A signature is a function of one failed check that says in a few words what holds of everything that is wrong, or None.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

REPLACEMENT = "\ufffd"
# So many ids or characters too much, or too few, are shown.
FEW = 8


@dataclass(frozen=True)
class WrongText:
    """A failed check of a tokenizer.

    given, got, wanted: texts and rows of ids, or the other way round (`Answers`).
    text_of: ids -> text.  specials: texts of special tokens.
    """

    given: Sequence[Any]
    got: Sequence[Any]
    wanted: Sequence[Any]
    text_of: Callable[[list[int]], str]
    specials: frozenset[str] = frozenset()

    @cached_property
    def wrong(self) -> list[tuple[Any, Any]]:
        """What came and what is right, where they differ."""
        return [(got, wanted) for got, wanted in zip(self.got, self.wanted, strict=True) if got != wanted]

    @cached_property
    def texts(self) -> list[tuple[str, bool]]:
        """Every text that was given, or that was to come of ids, and whether it went wrong."""
        if self.given and not isinstance(self.given[0], str):
            source: Sequence[Any] = self.wanted if isinstance(self.wanted[0], str) else []
        else:
            source = self.given
        return [(text, got != wanted) for text, got, wanted in zip(source, self.got, self.wanted, strict=False)]


Sign = Callable[[WrongText], str | None]


def _of_ids(wrong: WrongText) -> bool:
    return bool(wrong.given) and isinstance(wrong.given[0], str) and isinstance(wrong.got[0], list)


def _of_text(wrong: WrongText) -> bool:
    return isinstance(wrong.got[0], str)


# --- how --------------------------------------------------------------------------------------------------------------


def nothing_came(wrong: WrongText) -> str | None:
    return None if any(got for got, _ in wrong.wrong) else "nothing comes back"


def added_or_missing(wrong: WrongText) -> str | None:
    """The same at one end of everything."""
    if not (_of_ids(wrong) or _of_text(wrong)):
        return None
    what = "ids" if _of_ids(wrong) else "text"
    for more, less, said in ((0, 1, "too much"), (1, 0, "missing")):
        longer, shorter = ([pair[n] for pair in wrong.wrong] for n in (more, less))
        pairs = list(zip(longer, shorter, strict=True))
        extra = {len(a) - len(b) for a, b in pairs}
        if len(extra) != 1 or not 0 < (size := extra.pop()) <= FEW:
            continue
        front, back = {str(a[:size]) for a, _ in pairs}, {str(a[len(a) - size :]) for a, _ in pairs}
        if len(front) == 1 and all(a[size:] == b for a, b in pairs):
            return f"the right {what}, with {_quoted(front.pop(), what)} {said} in front"
        if len(back) == 1 and all(a[: len(a) - size] == b for a, b in pairs):
            return f"the right {what}, with {_quoted(back.pop(), what)} {said} at the end"
    return None


def _quoted(shown: str, what: str) -> str:
    return shown if what == "ids" else ascii(shown)


def other_numbers(wrong: WrongText) -> str | None:
    """The right cut: ids are mapped one to one."""
    if not _of_ids(wrong) or any(len(got) != len(wanted) for got, wanted in wrong.wrong):
        return None
    answers = zip(wrong.got, wrong.wanted, strict=True)
    pairs = {pair for got, wanted in answers for pair in zip(wanted, got, strict=True)}
    if max(Counter(a for a, _ in pairs).values()) > 1 or max(Counter(b for _, b in pairs).values()) > 1:
        return None
    moved = [(a, b) for a, b in pairs if a != b]
    offsets = {b - a for a, b in moved}
    if len(offsets) == 1:
        return f"the right tokens, {len(moved)} of their ids off by {offsets.pop():+d}"
    return f"the right tokens under other numbers: {len(moved)} ids stand for others, each always for the same"


def same_text_other_cut(wrong: WrongText) -> str | None:
    if not _of_ids(wrong):
        return None
    try:
        if any(wrong.text_of(got) != wrong.text_of(wanted) for got, wanted in wrong.wrong):
            return None
    except Exception:  # ids that are none
        return None
    more = Counter((len(got) > len(wanted)) - (len(got) < len(wanted)) for got, wanted in wrong.wrong)
    which = "more" if more[1] == len(wrong.wrong) else "fewer" if more[-1] == len(wrong.wrong) else "other"
    return f"the same text in {which} tokens: the order of merges, or where words are cut"


def one_id_for_much(wrong: WrongText) -> str | None:
    """What is wrong has become one token, <unk> as a rule."""
    if not _of_ids(wrong):
        return None
    found = [Counter(got) - Counter(wanted) for got, wanted in wrong.wrong]
    common = set(found[0]).intersection(*found) if found and all(found) else set()
    if len(common) == 1 and all(len(counter) == 1 for counter in found) and len(found) > 1:
        return f"id {common.pop()} stands where others should"
    return None


def replaced(wrong: WrongText) -> str | None:
    counts = [(got.count(REPLACEMENT), wanted.count(REPLACEMENT)) for got, wanted in wrong.wrong if _of_text(wrong)]
    if not counts or not all(got > wanted for got, wanted in counts):
        return None
    return "U+FFFD where characters should be: bytes decoded in the wrong pieces"


def named_bytes(wrong: WrongText) -> str | None:
    if not _of_text(wrong) or not all("<0x" in got and "<0x" not in wanted for got, wanted in wrong.wrong):
        return None
    return "bytes are shown by their names"


def cut_short(wrong: WrongText) -> str | None:
    if not (_of_ids(wrong) or _of_text(wrong)):
        return None
    if not all(len(got) < len(wanted) and got == wanted[: len(got)] for got, wanted in wrong.wrong):
        return None
    return "everything wrong ends too early"


def spaces_alone(wrong: WrongText) -> str | None:
    if not _of_text(wrong) or not all("".join(a.split()) == "".join(b.split()) for a, b in wrong.wrong):
        return None
    return "only white space differs"


def late_or_early(wrong: WrongText) -> str | None:
    """Counted characters, of streams."""
    if _of_ids(wrong) or _of_text(wrong):
        return None
    for said, holds in (("late", lambda a, b: a <= b), ("early", lambda a, b: a >= b)):
        if all(len(got) == len(wanted) and all(map(holds, got, wanted)) for got, wanted in wrong.wrong):
            return f"text comes too {said}"
    return None


def first_place(wrong: WrongText) -> str | None:
    """Where what came and what is right part."""
    places = {next((n for n, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair)))
              for pair in wrong.wrong}  # fmt: skip
    if len(places) != 1 or len(wrong.wrong) < 2:
        return None
    place = places.pop()
    return f"all of it is wrong from {'the start' if place == 0 else f'place {place}, counted from 0,'} on"


HOW: tuple[Sign, ...] = (
    nothing_came, added_or_missing, other_numbers, named_bytes, replaced, spaces_alone, cut_short, one_id_for_much,
    same_text_other_cut, late_or_early, first_place,
)  # fmt: skip


# --- which ------------------------------------------------------------------------------------------------------------

# What may be special about a text.
KINDS: dict[str, Callable[[str], bool]] = {
    "that are empty": lambda text: not text,
    "with U+0000": lambda text: "\0" in text,
    "that begin with a space": lambda text: text.startswith((" ", "▁")),
    "that end with white space": lambda text: text != text.rstrip(),
    "with several spaces in a row": lambda text: "  " in text,
    "with white space": lambda text: any(map(str.isspace, text)),
    'with "▁"': lambda text: "▁" in text,
    "that look like bytes, <0x0A>": lambda text: "<0x" in text,
    "with apostrophes": lambda text: "'" in text,
    "with digits": lambda text: any(map(str.isdigit, text)),
    "with capitals": lambda text: text != text.lower(),
    "that are not in NFC": lambda text: text != unicodedata.normalize("NFC", text),
    "that are not in NFKC": lambda text: text != unicodedata.normalize("NFKC", text),
    "with control characters": lambda text: any(unicodedata.category(character) == "Cc" for character in text),
    "with one character four times in a row": lambda text: any(4 * c in text for c in set(text)),
    "beyond ASCII": lambda text: not text.isascii(),
    "of several words": lambda text: len(text.split()) > 1,
}


def which_texts(wrong: WrongText) -> str | None:
    """The kind that all wrong texts are of, and the fewest right ones, if few enough are."""
    bad, good = ([text for text, is_wrong in wrong.texts if is_wrong is kind] for kind in (True, False))
    if not bad or not good:
        return None
    kinds = {"with special tokens": lambda text: any(token in text for token in wrong.specials), **KINDS}
    counted = [(sum(map(holds, good)), name) for name, holds in kinds.items() if all(map(holds, bad))]
    if not counted:
        return None
    others, name = min(counted, key=lambda entry: entry[0])
    if others > len(good) / 4:
        return None
    return f"only texts {name} are wrong" + (f", {len(bad)} of {len(bad) + others}" if others else ", and all of them")


def text_signature(wrong: WrongText) -> str | None:
    """How, and which: the most telling of each that hold."""
    said = [next((found for sign in HOW if (found := sign(wrong))), None), which_texts(wrong)]
    return "; ".join(filter(None, said)) or None
