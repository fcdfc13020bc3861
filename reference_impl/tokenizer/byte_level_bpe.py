"""GPT-2's byte-level byte-pair encoding (Radford et al. 2019, section 2.2).

    1. the text is cut into words by a pattern; merges never cross their borders
    2. the UTF-8 bytes of a word, each written as one printable character, are merged: the pair of the best rank first,
       of equal ones the leftmost

" café" → "Ġ", "c", "a", "f", "Ã", "©" → merges.

Conventions. A printable Latin-1 byte is written as itself, the other 68 as U+0100 and what follows, in order: space is
"Ġ" (U+0120). Letters and numbers are the Unicode categories L and N of the running Python's `unicodedata`; what later
versions of Unicode have assigned is neither. Bytes that belong to no UTF-8 character become U+FFFD, one for each
maximal subpart. No special token is put around a text unless the file says so.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby

from reference_impl.tokenizer.bpe import Rank, merge
from reference_impl.tokenizer.text import MAXIMAL_SUBPARTS, IncrementalDecoder, SpecialTokens, require_text

# White_Space of the Unicode standard. `\s` of `re` would count U+001C to U+001F in.
WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# How many words' ids are kept.
KEPT_WORDS = 1 << 16


def byte_characters() -> list[str]:
    """The character that stands for each byte: byte 32 → "Ġ"."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@cache
def word_pattern() -> re.Pattern[str]:
    """GPT-2's pattern: contractions, a word, number or other run with at most one space in front, white space.

    `\\s+(?!\\S)` leaves the last space of a run to the word after it: "a   b" → "a", "  ", " b".
    """
    letter, number = _category("L"), _category("N")
    return re.compile(
        f"'s|'t|'re|'ve|'m|'ll|'d| ?[{letter}]+| ?[{number}]+| ?[^{WHITE_SPACE}{letter}{number}]+"
        f"|[{WHITE_SPACE}]+(?![^{WHITE_SPACE}])|[{WHITE_SPACE}]+"
    )


def _category(major: str) -> str:
    """A character class of all code points whose Unicode category begins with `major`."""
    ranges = []
    for inside, run in groupby(range(0x110000), lambda code: unicodedata.category(chr(code))[0] == major):
        if inside:
            codes = list(run)
            ranges.append(f"\\U{codes[0]:08x}-\\U{codes[-1]:08x}")
    return "".join(ranges)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens, in the characters that stand for bytes, and their order of merging.

    tokens: token → id.
    merges: pairs of tokens, the first merge first.
    specials: text → id of tokens that only `parse_special` finds in a text; they have no text when decoded.
    added: text → id of tokens that are always found in a text, such as Phi's runs of spaces.
    begin, end: ids that `add_special_tokens` puts around a text.
    add_prefix_space: put a space before a text that begins with none.
    """

    tokens: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    specials: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    add_prefix_space: bool = False


class ByteLevelBPE:
    """Text to ids and back.

    Raises:
        ValueError: a byte or the result of a merge is no token, or two tokens have one id.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._characters = byte_characters()
        missing = [f"<0x{byte:02X}>" for byte, c in enumerate(self._characters) if c not in vocabulary.tokens]
        if missing:
            raise ValueError(f"the vocabulary lacks the bytes {', '.join(missing[:5])}{' …' * (len(missing) > 5)}")
        for number, (left, right) in enumerate(vocabulary.merges, start=1):
            if not {left, right, left + right} <= vocabulary.tokens.keys():
                raise ValueError(f"merge {number}, {left!r} with {right!r}: all of it and both parts must be tokens")
        ranks = {pair: order for order, pair in enumerate(vocabulary.merges)}
        self._rank: Rank = lambda left, right: ranks.get((left, right))
        self.special_tokens = SpecialTokens({**vocabulary.specials, **vocabulary.added})
        self._added = SpecialTokens(vocabulary.added)
        self._surfaces = self._bytes_by_id()
        self._kept: dict[str, tuple[int, ...]] = {}

    @property
    def vocab_size(self) -> int:
        return max(self._surfaces) + 1

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        """The ids of a text; arguments and Raises as for `SentencePieceBPE.encode`."""
        require_text(text)
        ids: list[int] = []
        for _, part, token in (self.special_tokens if parse_special else self._added).split(text):
            ids += self._encode(part) if token is None else [token]
        return [*self.vocabulary.begin, *ids, *self.vocabulary.end] if add_special_tokens else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids.  Raises: ValueError for an id that the vocabulary does not have."""
        decoder = self.decoder()
        return "".join([*map(decoder.feed, ids), decoder.finish()])

    def decoder(self) -> IncrementalDecoder:
        """Decodes token by token: `feed(id)` and, after the last one, `finish()` return the text that is complete."""
        return IncrementalDecoder(self._surface, MAXIMAL_SUBPARTS)

    def _surface(self, token_id: int, first: bool) -> bytes:
        if token_id not in self._surfaces:
            raise ValueError(f"id {token_id} is not in the vocabulary of {self.vocab_size} tokens")
        return self._surfaces[token_id]

    def _encode(self, text: str) -> list[int]:
        """The ids of a text without special or added tokens."""
        if self.vocabulary.add_prefix_space and not text.startswith(" "):
            text = " " + text
        return [i for word in word_pattern().findall(text) for i in self._encode_word(word)]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word not in self._kept:
            if len(self._kept) == KEPT_WORDS:
                self._kept.clear()
            spelt = "".join(self._characters[byte] for byte in word.encode())
            self._kept[word] = tuple(self.vocabulary.tokens[symbol] for symbol in merge(spelt, self._rank))
        return self._kept[word]

    def _bytes_by_id(self) -> dict[int, bytes]:
        """The bytes of every id: of special tokens none, of added tokens their own, of the rest what they spell."""
        vocabulary, byte_of = self.vocabulary, {c: byte for byte, c in enumerate(self._characters)}
        found = {i: text.encode() for text, i in vocabulary.added.items()}
        found |= dict.fromkeys(vocabulary.specials.values(), b"")
        for token, i in vocabulary.tokens.items():
            if token in vocabulary.specials or token in vocabulary.added:
                continue
            if i in found:
                raise ValueError(f"{token!r} and another token have the id {i}")
            unknown = sorted(set(token) - byte_of.keys())
            if unknown:
                raise ValueError(f"{token!r} holds {unknown[0]!r}, which stands for no byte")
            found[i] = bytes(map(byte_of.__getitem__, token))
        return found
