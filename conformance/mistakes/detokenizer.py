"""Tokenizers: from ids back to text, whole and piece by piece."""

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

from conformance.mistakes import Swap
from conformance.mistakes.tokenizer import BOTH, BYTES, DECODE, LEVEL, PIECES, SENTENCES, TEXT, entry

DECODER = TEXT + "IncrementalDecoder."
# The readings of bytes that are no UTF-8 (`IncrementalDecoder`'s errors): one U+FFFD for each byte, or for each part
# of a character.
EACH, PARTS = None, "replace"


def reading(errors: str | None) -> Swap:
    def make(original: Callable[..., None]) -> Callable[..., None]:
        return lambda self, surface, *_: original(self, surface, errors)

    return Swap(DECODER + "__init__", make)


def run_given_up(original: Callable[..., str]) -> Callable[..., str]:
    """Byte pieces that follow each other are one run: text if all of it is UTF-8, and else U+FFFD for each byte."""

    def decode(self: Any, ids: Iterable[int]) -> str:
        surfaces = [(i in self._byte_of, self._surface(i, n == 0)) for n, i in enumerate(without_control(self, ids))]
        return "".join(run_text(is_bytes, [data for _, data in run]) for is_bytes, run in groupby(surfaces, is_byte))

    return decode


def is_byte(surface: tuple[bool, bytes]) -> bool:
    return surface[0]


def run_text(is_bytes: bool, data: list[bytes]) -> str:
    try:
        return b"".join(data).decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(data) if is_bytes else b"".join(data).decode(errors="replace")


def without_control(tokenizer: Any, ids: Iterable[int]) -> list[int]:
    return [i for i in ids if tokenizer._surface(i, False) is not None]


def control_dropped_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """Special tokens have an empty text, and characters go on behind it."""

    def surface(self: Any, token: int, first: bool) -> Any:
        found = original(self, token, first)
        return b"" if found is None else found

    return surface


def special_ends_character(original: Callable[..., Any]) -> Callable[..., Any]:
    def surface(self: Any, token: int, first: bool) -> Any:
        found = original(self, token, first)
        return None if token in self.vocabulary.specials.values() else found

    return surface


def one_mark_only(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of several "▁" in a piece the first becomes a space, or nothing."""

    def surface(self: Any, token: int, first: bool) -> Any:
        if token in self._byte_of or original(self, token, first) is None or token == self._unknown:
            return original(self, token, first)
        return self.vocabulary.pieces[token].replace("▁", " ", 1).encode()

    return surface


def stripped(original: Callable[..., str]) -> Callable[..., str]:
    return lambda self, ids: original(self, ids).lstrip(" ")


def kept_to_the_end() -> tuple[Swap, ...]:
    """Text comes at a special token that ends it, and at the end; `feed` and `finish` share what is held."""

    def feed(original: Callable[..., str]) -> Callable[..., str]:
        def fed(self: Any, token: int) -> str:
            ends = self._surface(token, self._first) is None
            text = original(self, token)
            if ends:
                return text
            self.held = getattr(self, "held", "") + text
            return ""

        return fed

    def finish(original: Callable[..., str]) -> Callable[..., str]:
        def finished(self: Any) -> str:
            held, self.held = getattr(self, "held", ""), ""
            return held + original(self)

        return finished

    return Swap(DECODER + "feed", feed), Swap(DECODER + "finish", finish)


def no_end(original: Callable[..., str]) -> Callable[..., str]:
    def finish(self: Any) -> str:
        original(self)
        return ""

    return finish


MISTAKES = (
    entry(
        "tok-decode-left-stripped", SENTENCES, Swap(PIECES + "decode", stripped),
        what="All spaces at the start of the decoded text are taken off.", why="One of them is the dummy prefix.",
        shows="Texts that begin with spaces.", fix="Take one space off the first piece.",
        seen="transformers#29453", killed_by=DECODE,
    ),
    entry(
        "tok-decode-mark-left", SENTENCES, Swap(PIECES + "_surface", one_mark_only),
        what='Of several "▁" in a piece the first alone becomes a space, at the start of a text too.',
        why="All of them stand for spaces.", shows="Pieces of several spaces, such as indentation.",
        fix="Replace all of them.", killed_by=DECODE,
    ),
    entry(
        "tok-invalid-bytes-spoil-run", SENTENCES, Swap(PIECES + "decode", run_given_up),
        what="One byte that is no UTF-8 makes the whole run of byte pieces that it stands in U+FFFD.",
        why="The characters beside it are whole.", shows="Only byte pieces that are no UTF-8, as in a text cut short.",
        fix="Mark the bytes that belong to no character.",
        seen="huggingface/tokenizers (the decoder step ByteFallback)", killed_by=DECODE,
    ),
    entry(
        "tok-invalid-bytes-dropped", BOTH, reading("ignore"),
        what='Bytes that are no UTF-8 are left out: errors="ignore".', why="They become U+FFFD: nothing may get lost.",
        shows="Only such bytes.", fix="U+FFFD.", killed_by=DECODE,
    ),
    entry(
        "tok-invalid-bytes-joined", SENTENCES, reading(PARTS),
        what='Bytes that are no UTF-8 become one U+FFFD for each part of a character: errors="replace".',
        why="SentencePiece gives one for each byte.", shows="Only characters that are cut short.",
        fix="Count bytes.", killed_by=DECODE,
    ),
    entry(
        "tok-invalid-bytes-apart", LEVEL, reading(EACH),
        what="Bytes that are no UTF-8 become one U+FFFD for each byte.",
        why="One for each maximal subpart of a character (Unicode, section 3.9).",
        shows="Only characters that are cut short.", fix='errors="replace".', killed_by=DECODE,
    ),
    entry(
        "tok-special-inside-character", SENTENCES, Swap(PIECES + "_surface", control_dropped_first),
        what="Special tokens are dropped before anything is decoded, so that the bytes around one become a character.",
        why="It ends what was begun.", shows="Only a special token between the bytes of one character.",
        fix="Decode piece by piece.", seen="huggingface/tokenizers (skip_special_tokens)", killed_by=DECODE,
    ),
    entry(
        "tok-special-ends-character", LEVEL, Swap(BYTES + "ByteLevelBPE._surface", special_ends_character),
        what="A special token ends the character that was begun before it.",
        why="Special tokens are dropped first; the bytes around one become a character.",
        shows="Only a special token between the bytes of one character.", fix="Drop them first.", killed_by=DECODE,
    ),
    entry(
        "tok-decode-all-at-the-end", BOTH, *kept_to_the_end(),
        what="An incremental decoder gives nothing out before the end.", why="A character is due when it is complete.",
        shows="Only while streaming.", fix="Hold back what may still become another character, and nothing else.",
        killed_by=DECODE,
    ),
    entry(
        "tok-decode-end-lost", BOTH, Swap(DECODER + "finish", no_end),
        what="What was begun and never completed is left out.", why="It becomes U+FFFD.",
        shows="Only texts that end inside a character.", fix="Flush.", killed_by=DECODE,
    ),
)  # fmt: skip
