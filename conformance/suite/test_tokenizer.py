"""Tokenizer checks: text to ids and back, exactly."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

from conformance.draws import few_integers
from conformance.tokenizer import unpack_rows, unpack_texts

if TYPE_CHECKING:
    from conformance.judge import Judge

# How many drawn texts go there and back.
ROUND_TRIPS = 500
# How many wrong ones are shown, and of a long one how much.
SHOWN, WIDTH = 3, 72

T = TypeVar("T", str, list[int])


def test_encode(judge: "Judge") -> None:
    """Every text has the oracle's ids: words, numbers, punctuation, scripts, and what looks like a special token or a
    byte, which is text like any other."""
    _encode(judge, "encode")


def test_vocabulary(judge: "Judge") -> None:
    """The text of every token that has one, encoded alone, has the oracle's ids: no merge is lost, the last neither."""
    _encode(judge, "vocabulary")


def test_spaces(judge: "Judge") -> None:
    """White space of every kind, alone, in runs and before a text, has the oracle's ids; none of it is lost."""
    _encode(judge, "spaces")


def test_special_tokens(judge: "Judge") -> None:
    """With `parse_special`, special tokens are found in the text, the longest first, and what is between them is
    encoded as the files say: with or without a prefix of its own."""
    _encode(judge, "special_tokens", parse_special=True)


def test_begin_and_end(judge: "Judge") -> None:
    """With `add_special_tokens`, the begin and end tokens that the files ask for stand around every text, the empty one
    too."""
    _encode(judge, "begin_and_end", add_special_tokens=True)


def test_byte_fallback(judge: "Judge") -> None:
    """A character that is no piece becomes the pieces of its UTF-8 bytes; a known one beside it does not."""
    _encode(judge, "byte_fallback")


def test_runs(judge: "Judge") -> None:
    """Runs of one letter and of spaces, where merges compete: the best rank first, of equal ones the leftmost.  One is
    10,000 letters long: merging must not take n² steps."""
    _encode(judge, "runs")


def test_decode(judge: "Judge") -> None:
    """Ids give the oracle's text: those of texts, with and without their first, and special ones, which have none."""
    _decode(judge, "decode")


def test_invalid_bytes(judge: "Judge") -> None:
    """Bytes that are no UTF-8 become U+FFFD, and cost no valid character beside them."""
    _decode(judge, "invalid_bytes")


def test_round_trip(judge: "Judge") -> None:
    """500 texts drawn over all of Unicode come back as they were; needs no oracle."""
    from conformance.families import get

    changed = str.maketrans(dict(get(judge.case.family).comes_back_as))
    texts = drawn_texts(judge.case.family, ROUND_TRIPS)
    wanted = [text.translate(changed) for text in texts]
    got = [judge.candidate.decode(judge.candidate.encode(text)) for text in texts]
    _compare(judge, texts, got, wanted, "come back as they were")


def test_incremental(judge: "Judge") -> None:
    """What an incremental decoder gives, id after id and at the end, adds up to the text, with no character torn."""
    rows, wanted = _to_decode(judge, "decode")
    _compare(judge, rows, ["".join(judge.candidate.stream(row)) for row in rows], wanted, "add up to the text")


def test_streaming(judge: "Judge") -> None:
    """An incremental decoder holds nothing back but a character that is not complete: counted are the characters that
    are out after each id, and at the end."""
    rows, wanted = unpack_rows(judge.case.inputs["decode.ids"]), unpack_rows(judge.case.expected["decode.characters"])
    got = [list(accumulate(map(len, judge.candidate.stream(row)))) for row in rows]
    _compare(judge, rows, got, wanted, "have their text out in time")


def _encode(judge: "Judge", group: str, **options: bool) -> None:
    texts, wanted = unpack_texts(judge.case.inputs[f"{group}.texts"]), unpack_rows(judge.case.expected[f"{group}.ids"])
    got = [judge.candidate.encode(text, **options) for text in texts]
    known = {label: unpack_rows(rows) for label, rows in judge.case.counterfactuals(f"{group}.ids").items()}
    _compare(judge, texts, got, wanted, "have the oracle's ids", known)


def _to_decode(judge: "Judge", group: str) -> tuple[list[list[int]], list[str]]:
    """The rows of ids of a group, and their texts."""
    return unpack_rows(judge.case.inputs[f"{group}.ids"]), unpack_texts(judge.case.expected[f"{group}.texts"])


def _decode(judge: "Judge", group: str) -> None:
    rows, wanted = _to_decode(judge, group)
    _compare(judge, rows, [judge.candidate.decode(row) for row in rows], wanted, "have the oracle's text")


def _compare(
    judge: "Judge",
    given: Sequence[Any],
    got: Sequence[T],
    wanted: Sequence[T],
    what: str,
    known_mistakes: dict[str, list[T]] | None = None,
) -> None:
    """Raises: Failure naming the shortest of what is wrong, and the known mistake that all of it reproduces."""
    from conformance.judge import Answers, Failure

    judge.answers = Answers(given, got, wanted)
    wrong = [entry for entry in zip(given, got, wanted, strict=True) if entry[1] != entry[2]]
    if not wrong:
        return
    wrong.sort(key=lambda entry: len(entry[0]))
    equals = next((label for label, values in (known_mistakes or {}).items() if values == list(got)), None)
    noun = "texts" if isinstance(given[0], str) else "rows of ids"
    message = f"{len(given) - len(wrong)} of {len(given)} {noun} {what}"
    details = [line for entry in wrong[:SHOWN] for line in _described(*entry)]
    raise Failure(message, None, details, equals)


def _described(given: Any, got: Any, wanted: Any) -> list[str]:
    """Three lines: what was given, what came, what was wanted; long ones from shortly before they differ."""
    first = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    start = max(0, first - 5)
    cut: Callable[[Any], str] = lambda value: ("… " if start else "") + _shown(value[start:])  # noqa: E731
    return [f"{_shown(given)}", f"   gives   {cut(got)}", f"   wanted  {cut(wanted)}"]


def _shown(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def drawn_texts(label: str, count: int) -> list[str]:
    """Texts of up to 12 characters: half from the places where tokenizers go wrong, half from all of Unicode."""
    places = (0x20, 0x7E), (0x20, 0x20), (0x61, 0x62), (0x00, 0x1F), (0x7F, 0x24F), (0x300, 0x36F), (0x2000, 0x2BFF)
    unicode = (0x00, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)
    sizes = few_integers(f"{label}/sizes", count, 1, 12)
    texts = []
    for index, size in enumerate(sizes):
        kinds = few_integers(f"{label}/{index}/kinds", size, 0, 2 * len(places) - 1)
        ranges = [places[kind] if kind < len(places) else unicode[kind % len(unicode)] for kind in kinds]
        spread = few_integers(f"{label}/{index}/high", size, 0, 0x7FFF)
        fine = few_integers(f"{label}/{index}/low", size, 0, 0x3F)
        parts = zip(ranges, spread, fine, strict=True)
        texts.append("".join(chr(low + (64 * s + f) % (high - low + 1)) for (low, high), s, f in parts))
    return texts
