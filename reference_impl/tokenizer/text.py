"""What both kinds of tokenizer share: special tokens in text, and text out of bytes as they come."""

import codecs
import re
from collections.abc import Callable, Iterator, Mapping

# Of all that decoding with the error handler "surrogateescape" can give, only broken bytes give these.
_BROKEN = re.compile("[\udc80-\udcff]")
_BROKEN_BYTES = "surrogateescape"
# The reading of U+FFFD for each longest piece of a broken character (Unicode, section 3.9, "maximal subparts").
MAXIMAL_SUBPARTS = "replace"
# id of a token, whether it is the first one with a text -> its bytes; None: it has none, and no character goes on
# behind it.
Surface = Callable[[int, bool], bytes | None]


class SpecialTokens:
    """Tokens that stand in a text as they are: cut out before anything is encoded, the longest first.

    Args:
        ids: the token's text → its id.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = dict(ids)
        longest_first = sorted(filter(None, ids), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def split(self, text: str) -> Iterator[tuple[int, str, int | None]]:
        """Where each part starts, its text, and its id if it is a special token; empty parts are left out."""
        end = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if match.start() > end:
                yield end, text[end : match.start()], None
            yield match.start(), match[0], self.ids[match[0]]
            end = match.end()
        if end < len(text):
            yield end, text[end:], None


class IncrementalDecoder:
    """Decodes token by token: gives text out as soon as its last byte has come, and never a part of a character.

    The bytes E4 BD A0 of "你" as three tokens give "", "" and "你".

    Args:
        surface: the bytes of a token.
        errors: what bytes that are no UTF-8 become: one U+FFFD for each byte (None), or for each maximal subpart
            (`MAXIMAL_SUBPARTS`).
    """

    def __init__(self, surface: Surface, errors: str | None = None) -> None:
        self._surface = surface
        self._per_byte = errors is None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors or _BROKEN_BYTES)
        self._first = True

    def feed(self, token_id: int) -> str:
        """The text that this token completes."""
        data = self._surface(token_id, self._first)
        if data is None:
            return self.finish()
        self._first = False
        return self._marked(self._decoder.decode(data))

    def finish(self) -> str:
        """U+FFFD for what was begun and never completed."""
        return self._marked(self._decoder.decode(b"", final=True))

    def _marked(self, text: str) -> str:
        return _BROKEN.sub("\ufffd", text) if self._per_byte else text


def require_text(text: str) -> None:
    """Raises ValueError if `text` has no UTF-8: a lone surrogate, half of a UTF-16 pair, is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where, what = error.start, ord(text[error.start])
        raise ValueError(f"the text holds U+{what:04X} at {where}, half of a surrogate pair: decode it first") from None
