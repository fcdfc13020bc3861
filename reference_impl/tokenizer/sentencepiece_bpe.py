"""SentencePiece's byte-pair encoding with byte fallback, as Llama and Mistral use it (Kudo and Richardson 2018;
Touvron et al. 2023, section 2.1; Jiang et al. 2023).

    1. a space becomes "▁" (U+2581), and one more "▁" goes in front: the dummy prefix
    2. the whole text, not word by word, is merged: of all neighbours whose union is a piece, the union with the highest
       score first, of equal ones the leftmost
    3. a character that is no piece becomes the pieces <0xNN> of its UTF-8 bytes

"Hi 你" → "▁Hi▁你" → ▁Hi, ▁, <0xE4>, <0xBD>, <0xA0>.

Conventions. Text that looks like a piece is text: "<0x0A>" is six characters, "<s>" three. A "▁" in the text is a space
from then on. Decoding drops control pieces and takes one space off the first piece, whatever that is; each byte that
belongs to no UTF-8 character becomes U+FFFD. User-defined pieces are found first and stay whole.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from reference_impl.tokenizer.bpe import Rank, merge
from reference_impl.tokenizer.text import IncrementalDecoder, SpecialTokens, require_text

SPACE = "▁"
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
# What an unknown piece is decoded as, unless the file says otherwise.
UNKNOWN_SURFACE = " ⁇ "
# How many words' ids are kept.
KEPT_WORDS = 1 << 16

Prefix = Literal["always", "first", "never"]


class Kind(Enum):
    """What a piece is; the values are those of the file format."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Pieces and their order of merging.

    pieces, kinds: by id.
    rank: left and right symbol → order of their merge, or None.
    specials: text → id of what only `parse_special` finds in a text, beside the control pieces.
    added: text → id of what is always found in a text, before anything else is done with it.
    begin, end: ids that `add_special_tokens` puts around a text.
    prefix: before which parts of a text, cut at special and added tokens, the dummy prefix goes: "always"; "first",
        only before a part at the very start; "never".
    prefix_before_space: whether it goes before a part that begins with a space, too.
    """

    pieces: Sequence[str]
    kinds: Sequence[Kind]
    rank: Rank
    specials: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    prefix: Prefix = "always"
    prefix_before_space: bool = True
    unknown_surface: str = UNKNOWN_SURFACE


def by_score(scores: Mapping[str, float]) -> Rank:
    """The order of merging that the scores of the pieces give: higher is earlier."""
    return lambda left, right: -scores[left + right] if left + right in scores else None


def by_merges(merges: Iterable[tuple[str, str]]) -> Rank:
    """The order of merging that a list of pairs gives."""
    ranks = {pair: order for order, pair in enumerate(merges)}
    return lambda left, right: ranks.get((left, right))


def byte_of(piece: str) -> int:
    """ "<0x0A>" → 10.  Raises: ValueError for another spelling."""
    if not BYTE_PIECE.fullmatch(piece):
        raise ValueError(f"the byte piece {piece!r} must be one of <0x00> … <0xFF>")
    return int(piece[3:5], 16)


class SentencePieceBPE:
    """Text to ids and back.

    Raises:
        ValueError: the vocabulary has neither all 256 byte pieces nor an unknown piece, or a byte piece names no byte.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        named = list(zip(vocabulary.pieces, vocabulary.kinds, range(len(vocabulary.pieces)), strict=True))
        self._ids = {piece: i for piece, kind, i in named if kind in (Kind.NORMAL, Kind.USER_DEFINED)}
        self._byte_of = {i: byte_of(piece) for piece, kind, i in named if kind is Kind.BYTE}
        self._id_of_byte = {byte: i for i, byte in self._byte_of.items()}
        self._unknown = next((i for _, kind, i in named if kind is Kind.UNKNOWN), None)
        if len(self._id_of_byte) != 256 and self._unknown is None:
            raise ValueError(f"{len(self._id_of_byte)} of 256 byte pieces and no unknown piece: wanted either")
        self._user_defined = SpecialTokens({piece: i for piece, kind, i in named if kind is Kind.USER_DEFINED})
        control = {piece: i for piece, kind, i in named if kind in (Kind.CONTROL, Kind.UNKNOWN)}
        self.special_tokens = SpecialTokens({**control, **vocabulary.specials, **vocabulary.added})
        self._added = SpecialTokens(vocabulary.added)
        self._cut = self._cutter()
        self._kept: dict[str, tuple[int, ...]] = {}

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary.pieces)

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        """The ids of a text.

        Args:
            add_special_tokens: put begin and end tokens around it.
            parse_special: read special tokens where they stand in the text. For prompts that a program has put
                together, never for what a user typed.

        Raises:
            ValueError: the text holds half of a surrogate pair.
        """
        require_text(text)
        ids: list[int] = []
        for start, part, token in (self.special_tokens if parse_special else self._added).split(text):
            ids += self._encode(part, start == 0) if token is None else [token]
        return [*self.vocabulary.begin, *ids, *self.vocabulary.end] if add_special_tokens else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids.  Raises: ValueError for an id that the vocabulary does not have."""
        decoder = self.decoder()
        return "".join([*map(decoder.feed, ids), decoder.finish()])

    def decoder(self) -> IncrementalDecoder:
        """Decodes token by token: `feed(id)` and, after the last one, `finish()` return the text that is complete."""
        return IncrementalDecoder(self._surface)

    def _surface(self, token_id: int, first: bool) -> bytes | None:
        """The bytes of a piece; `first`: it is the first one that has any."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"id {token_id} is not in the vocabulary of {self.vocab_size} pieces")
        if self.vocabulary.kinds[token_id] is Kind.CONTROL:
            return None
        piece = self.vocabulary.pieces[token_id]
        if token_id in self._byte_of:
            return bytes([self._byte_of[token_id]])
        if token_id == self._unknown:
            return self.vocabulary.unknown_surface.encode()
        if first and self.vocabulary.prefix != "never":
            piece = piece.removeprefix(SPACE)
        return piece.replace(SPACE, " ").encode()

    def _encode(self, text: str, at_start: bool) -> list[int]:
        """The ids of a text without special tokens."""
        vocabulary = self.vocabulary
        prefixed = vocabulary.prefix == "always" or (vocabulary.prefix == "first" and at_start)
        if not vocabulary.prefix_before_space and text.startswith((" ", SPACE)):
            prefixed = False
        text = SPACE * prefixed + text.replace(" ", SPACE)
        ids: list[int] = []
        for _, part, whole in self._user_defined.split(text):
            for word in () if whole is not None else self._cut(part):
                ids += self._encode_word(word)
            ids += [] if whole is None else [whole]
        unknown = self._unknown
        # A run of unknown characters is one unknown piece
        return [i for i, before in zip(ids, [None, *ids], strict=False) if i != unknown or before != unknown]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word not in self._kept:
            if len(self._kept) == KEPT_WORDS:
                self._kept.clear()
            self._kept[word] = tuple(i for symbol in merge(word, self.vocabulary.rank) for i in self._ids_of(symbol))
        return self._kept[word]

    def _ids_of(self, symbol: str) -> list[int]:
        if symbol in self._ids:
            return [self._ids[symbol]]
        if len(self._id_of_byte) == 256:
            return [self._id_of_byte[byte] for byte in symbol.encode()]
        assert self._unknown is not None
        return [self._unknown]

    def _cutter(self) -> Callable[[str], list[str]]:
        """Cuts a text where no merge can cross: before a "▁" after something else, if no piece has that inside."""
        if any(SPACE in piece.lstrip(SPACE) for piece in self._ids):
            return lambda text: [text]
        return re.compile(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+").findall
