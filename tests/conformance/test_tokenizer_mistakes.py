"""Tokenizers: known mistakes fail the checks that are there for them, tokenizers written by hand pass every claim.

The ids are those of the catalogue of mistakes, where it has one.
"""

import re
import unicodedata
from typing import Any

import pytest

from judged import check, not_passed
from tokenizers_by_hand import (
    ByteLevelByHand,
    ByteLevelDecoderByHand,
    DecoderByHand,
    Ids,
    Load,
    SentencePieceByHand,
    wrong,
)


def by_hand(checkpoint: Any) -> SentencePieceByHand:
    return SentencePieceByHand(checkpoint)


def byte_level_by_hand(checkpoint: Any) -> ByteLevelByHand:
    return ByteLevelByHand(checkpoint)


def sentencepiece(**methods: Any) -> Load:
    base = wrong(SentencePieceByHand, **methods)
    return lambda checkpoint: base(checkpoint)


def byte_level(**methods: Any) -> Load:
    base = wrong(ByteLevelByHand, **methods)
    return lambda checkpoint: base(checkpoint)


def decoding(base: Any = SentencePieceByHand, decoder: Any = DecoderByHand, **methods: Any) -> Load:
    made = type("WrongDecoder", (decoder,), methods)
    of = wrong(base, decoder=lambda self: made(self))
    return lambda checkpoint: of(checkpoint)


right = SentencePieceByHand


def test_tokenizers_by_hand_pass_every_claim() -> None:
    assert not_passed(by_hand, "sentencepiece_bpe") == {}
    assert not_passed(byte_level_by_hand, "byte_level_bpe") == {}


# --- mistakes of SentencePiece's BPE


def prefix_twice(self: Any, text: str, first: bool) -> str:
    return 2 * right.prefix(self, text, first)


def prefix_on_the_empty_text(self: Any, text: str, **options: bool) -> Ids:
    return right.encode(self, text, **options) or self.looked_up(["▁"])


def prefix_not_before_a_space(self: Any, text: str, first: bool) -> str:
    return "" if text.startswith((" ", "▁")) else right.prefix(self, text, first)


def special_always_parsed(self: Any, text: str, parse_special: bool = False) -> Ids:
    return right.encode(self, text, parse_special=True)


def byte_literal_is_a_byte(self: Any, text: str) -> list[str]:
    return re.findall("<0x[0-9A-F]{2}>|.", text, re.DOTALL)


def longest_first(self: Any, pair: tuple[str, str]) -> Any:
    return None if right.rank(self, pair) is None else (-len("".join(pair)), right.rank(self, pair))


def by_id(self: Any, pair: tuple[str, str]) -> Any:
    return None if right.rank(self, pair) is None else self.ids["".join(pair)]


def greedy(self: Any, symbols: list[str]) -> list[str]:
    """The longest piece that fits, from the left."""
    text, found = "".join(symbols), []
    while text:
        size = next((n for n in range(min(len(text), 24), 0, -1) if text[:n] in self.ids), 1)
        found.append(text[:size])
        text = text[size:]
    return found


def first_possible(self: Any, symbols: list[str]) -> list[str]:
    """Whatever can be merged, from the left."""
    at = 0
    while at + 1 < len(symbols):
        if (symbols[at], symbols[at + 1]) in self.ranks:
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            at = max(at - 1, 0)
        else:
            at += 1
    return symbols


def from_the_right(self: Any, symbols: list[str], best: tuple[str, str]) -> list[str]:
    flipped = right.joined(self, [s[::-1] for s in reversed(symbols)], (best[1][::-1], best[0][::-1]))
    return [symbol[::-1] for symbol in reversed(flipped)]


def word_by_word(self: Any, symbols: list[str]) -> list[str]:
    words = re.findall("▁?[^▁]*", "".join(symbols))
    return [symbol for word in words if word for symbol in right.merged(self, list(word))]


def spaces_collapsed(self: Any, text: str, first: bool) -> str:
    return right.marked(self, re.sub(" +", " ", text.strip(" ")), first)


def nfkc(self: Any, text: str, first: bool) -> str:
    return right.marked(self, unicodedata.normalize("NFKC", text), first)


def no_fallback(self: Any, symbol: str) -> Ids:
    return [self.ids["<unk>"]]


def dropped(self: Any, symbol: str) -> Ids:
    return []


def code_points(self: Any, symbol: str) -> Ids:
    return [self.ids[f"<0x{ord(symbol) & 0xFF:02X}>"]]


def three_more(self: Any, symbol: str) -> Ids:
    return [byte + 3 for byte in symbol.encode()]


def until_nul(self: Any, text: str, **options: bool) -> Ids:
    return right.encode(self, text.split("\0")[0], **options)


def unknown_not_joined(self: Any, symbols: list[str]) -> Ids:
    return [i for symbol in symbols for i in right.looked_up(self, [symbol])]


def begins_always(self: Any, text: str, add_special_tokens: bool = False, parse_special: bool = False) -> Ids:
    return right.encode(self, text, True, parse_special)


def space_kept(self: Any, piece: str, first: bool) -> bytes:
    return right.text_of(self, piece, False)


def space_taken_everywhere(self: Any, piece: str, first: bool) -> bytes:
    return right.text_of(self, piece, True)


def every_space_taken(self: Any, ids: Ids) -> str:
    return right.decode(self, ids).lstrip(" ")


def mark_kept_inside(self: Any, piece: str, first: bool) -> bytes:
    return right.text_of(self, piece, first) if "<0x" in piece else piece.replace("▁", " ", 1).encode()


def byte_shown(self: Any, piece: str, first: bool) -> bytes:
    return piece.encode() if piece.startswith("<0x") else right.text_of(self, piece, first)


def nothing_held(self: Any) -> int:
    return 0


def run_given_up(self: Any, data: bytes) -> str:
    text = right.characters(self, data)
    return "\ufffd" * len(data) if "\ufffd" in text else text


def invalid_left_out(self: Any, data: bytes) -> str:
    return data.decode(errors="ignore")


def special_shown(self: Any, i: int) -> str:
    piece = self.tokenizer.pieces[i]
    return piece if piece in self.tokenizer.control else DecoderByHand.feed(self, i)


def all_at_the_end(self: Any) -> int:
    return len(self.held)


def shortest_special_first(self: Any, text: str, tokens: list[str]) -> list[str]:
    return right.cut(self, text, []) if not tokens else [
        part for part in re.split(f"({'|'.join(map(re.escape, sorted(tokens, key=len)))})", text) if part]  # fmt: skip


PLAIN, DISTINCT = "sentencepiece_bpe/plain", "sentencepiece_bpe/distinct"
SENTENCEPIECE = {
    "tok-dummy-prefix": (sentencepiece(prefix=lambda self, text, first: ""), PLAIN, "encode"),
    "tok-dummy-prefix, twice": (sentencepiece(prefix=prefix_twice), PLAIN, "encode"),
    "tok-dummy-prefix, on the empty text": (sentencepiece(encode=prefix_on_the_empty_text), PLAIN, "encode"),
    "no prefix before a space": (sentencepiece(prefix=prefix_not_before_a_space), PLAIN, "spaces"),
    "tok-prefix-after-special, missing": (
        sentencepiece(prefix=lambda self, text, first: "▁" * first), PLAIN, "special_tokens"),
    "tok-prefix-after-special": (
        sentencepiece(prefix=lambda self, text, first: "▁"), "sentencepiece_bpe/field-legacy", "special_tokens"),
    "prefix not asked for": (
        sentencepiece(prefix=lambda self, text, first: "▁"), "sentencepiece_bpe/field-add_dummy_prefix", "encode"),
    "tok-special-in-text": (sentencepiece(encode=special_always_parsed), PLAIN, "encode"),
    "shortest special token first": (sentencepiece(cut=shortest_special_first), DISTINCT, "special_tokens"),
    "tok-byte-literal-confusion": (sentencepiece(split=byte_literal_is_a_byte), PLAIN, "encode"),
    "longest merge first": (sentencepiece(rank=longest_first), PLAIN, "encode"),
    "rank by id": (sentencepiece(rank=by_id), DISTINCT, "encode"),
    "longest piece from the left": (sentencepiece(merged=greedy), PLAIN, "encode"),
    "tok-merge-left-to-right": (sentencepiece(merged=first_possible), PLAIN, "encode"),
    "tok-merge-tie": (sentencepiece(joined=from_the_right), PLAIN, "runs"),
    "words apart": (sentencepiece(merged=word_by_word), PLAIN, "spaces"),
    "tok-normaliser, spaces": (sentencepiece(marked=spaces_collapsed), PLAIN, "spaces"),
    "tok-normaliser, NFKC": (sentencepiece(marked=nfkc), PLAIN, "byte_fallback"),
    "tok-byte-fallback-missing": (sentencepiece(fallback=no_fallback), PLAIN, "byte_fallback"),
    "tok-byte-fallback-missing, dropped": (sentencepiece(fallback=dropped), PLAIN, "byte_fallback"),
    "tok-byte-fallback-missing, code points": (sentencepiece(fallback=code_points), PLAIN, "byte_fallback"),
    "byte pieces taken to begin at 3": (sentencepiece(fallback=three_more), DISTINCT, "byte_fallback"),
    "text ends at NUL": (sentencepiece(encode=until_nul), PLAIN, "byte_fallback"),
    "every unknown character alone": (
        sentencepiece(looked_up=unknown_not_joined), "sentencepiece_bpe/field-byte_fallback", "encode"),
    "begin token by default": (sentencepiece(encode=begins_always), PLAIN, "encode"),
    "add_bos_token ignored": (
        sentencepiece(begin=lambda self: [self.ids["<s>"]]), "sentencepiece_bpe/field-add_bos_token", "begin_and_end"),
    "add_eos_token ignored": (
        sentencepiece(end=lambda self: []), "sentencepiece_bpe/field-add_eos_token", "begin_and_end"),
    "tok-decode-leading-space, kept": (sentencepiece(text_of=space_kept), PLAIN, "decode"),
    "tok-decode-leading-space, of every piece": (sentencepiece(text_of=space_taken_everywhere), PLAIN, "decode"),
    "tok-decode-leading-space, all of them": (sentencepiece(decode=every_space_taken), PLAIN, "decode"),
    "▁ left in the middle": (sentencepiece(text_of=mark_kept_inside), PLAIN, "decode"),
    "tok-byte-decode-per-token, shown": (sentencepiece(text_of=byte_shown), PLAIN, "decode"),
    "tok-byte-decode-per-token": (decoding(unfinished=nothing_held), PLAIN, "incremental"),
    "a run of bytes given up": (sentencepiece(characters=run_given_up), PLAIN, "invalid_bytes"),
    "invalid bytes left out": (sentencepiece(characters=invalid_left_out), PLAIN, "invalid_bytes"),
    "special tokens have a text": (decoding(feed=special_shown), PLAIN, "decode"),
    "all text at the end": (decoding(unfinished=all_at_the_end), PLAIN, "streaming"),
    "the end left out": (decoding(finish=lambda self: ""), PLAIN, "invalid_bytes"),
    "user-defined pieces split": (
        sentencepiece(cut=lambda self, text, tokens: [text] * bool(text)), "sentencepiece_bpe/user-defined", "encode"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", SENTENCEPIECE)
def test_mistake_of_sentencepiece_bpe_fails(mistake: str) -> None:
    load, case, group = SENTENCEPIECE[mistake]
    result = check(load, case, f"tokenizer.{group}", "exact")
    assert (result.outcome, result.kind) == ("fail", "value"), result.message


@pytest.mark.parametrize("field", ["add_dummy_prefix", "legacy", "add_bos_token", "add_eos_token"])
def test_an_ignored_field_is_named(field: str) -> None:
    """Judged by the check that the field changes."""

    def load(checkpoint: Any) -> Any:
        checkpoint.config[field] = field != "add_eos_token"  # the default
        return SentencePieceByHand(checkpoint)

    group = {"add_dummy_prefix": "encode", "legacy": "special_tokens"}.get(field, "begin_and_end")
    result = check(load, f"sentencepiece_bpe/field-{field}", f"tokenizer.{group}", "exact")
    assert (result.outcome, result.equals) == ("fail", f"{field} ignored")


# --- mistakes of byte-level BPE


def pattern(text: str) -> Load:
    return byte_level(pattern=text)


GPT2 = ByteLevelByHand.pattern


def ends_left_out(self: Any, text: str) -> list[str]:
    return re.findall(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", text)


def pythons_white_space(self: Any, text: str) -> list[str]:
    import regex

    return regex.findall(GPT2.replace(r"\s", r"\s\x1c-\x1f", 1).replace(r"\s+", r"[\s\x1c-\x1f]+"), text)


def last_merge_lost(self: Any, pair: tuple[str, str]) -> Any:
    rank = right.rank(self, pair)
    return None if rank == len(self.ranks) - 1 else rank


def latin(self: Any, text: str, first: bool) -> Ids:
    return [self.ids[s] for w in self.words(text) for s in self.merged([self.letters[ord(c) & 0xFF] for c in w])]


def always_a_space(self: Any, text: str, first: bool) -> Ids:
    return ByteLevelByHand.encode_part(self, text if text.startswith(" ") else " " + text, first)


def special_parsed(self: Any, text: str, parse_special: bool = False) -> Ids:
    return ByteLevelByHand.encode(self, text, True)


def added_ignored(self: Any, text: str, tokens: list[str]) -> list[str]:
    return right.cut(self, text, [token for token in tokens if token in self.control])


def broken_byte_by_byte(self: Any, data: bytes) -> str:
    return SentencePieceByHand.characters(self, data)


GPT2_PLAIN, ADDED, PREFIX = (f"byte_level_bpe/{name}" for name in ("plain", "added-tokens", "field-add_prefix_space"))
BYTE_LEVEL = {
    "tok-pretokeniser, spaces": (pattern(GPT2.replace(r"|\s+(?!\S)", "")), GPT2_PLAIN, "spaces"),
    "tok-pretokeniser, contractions": (pattern("(?i:'s|'t|'re|'ve|'m|'ll|'d)" + GPT2[len("'s|'t|'re|'ve|'m|'ll|'d"):]),
                                       GPT2_PLAIN, "encode"),
    "tok-pretokeniser, no contractions": (pattern(GPT2[len("'s|'t|'re|'ve|'m|'ll|'d|"):]), GPT2_PLAIN, "encode"),
    "tok-pretokeniser, digits one by one": (pattern(GPT2.replace(r"\p{N}+", r"\p{N}")), GPT2_PLAIN, "encode"),
    "tok-pretokeniser, ASCII": (byte_level(words=ends_left_out), GPT2_PLAIN, "encode"),
    "tok-pretokeniser, white space as `str.isspace`": (byte_level(words=pythons_white_space), GPT2_PLAIN, "encode"),
    "tok-pretokeniser, none": (byte_level(words=lambda self, text: [text]), GPT2_PLAIN, "encode"),
    "tok-merges-parse": (byte_level(rank=last_merge_lost), GPT2_PLAIN, "vocabulary"),
    "tok-merge-left-to-right": (byte_level(merged=first_possible), GPT2_PLAIN, "encode"),
    "tok-merge-tie": (byte_level(joined=from_the_right), GPT2_PLAIN, "runs"),
    "code points for bytes": (byte_level(encode_part=latin), GPT2_PLAIN, "encode"),
    "a space before every text": (byte_level(encode_part=always_a_space), GPT2_PLAIN, "encode"),
    "add_prefix_space ignored": (byte_level(encode_part=lambda self, text, first: [
        self.ids[s] for w in self.words(text) for s in self.merged([self.letters[b] for b in w.encode()])]),
        PREFIX, "encode"),
    "tok-special-in-text": (byte_level(encode=special_parsed), GPT2_PLAIN, "encode"),
    "added tokens ignored": (byte_level(cut=added_ignored), ADDED, "spaces"),
    "tok-byte-decode-per-token": (decoding(ByteLevelByHand, ByteLevelDecoderByHand, unfinished=nothing_held),
                                  GPT2_PLAIN, "incremental"),
    "a special token ends a character": (decoding(ByteLevelByHand, DecoderByHand), GPT2_PLAIN, "decode"),
    "one U+FFFD for each byte": (byte_level(characters=broken_byte_by_byte), GPT2_PLAIN, "invalid_bytes"),
    "all text at the end": (decoding(ByteLevelByHand, ByteLevelDecoderByHand, unfinished=all_at_the_end),
                            GPT2_PLAIN, "streaming"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BYTE_LEVEL)
def test_mistake_of_byte_level_bpe_fails(mistake: str) -> None:
    load, case, group = BYTE_LEVEL[mistake]
    result = check(load, case, f"tokenizer.{group}", "exact")
    assert (result.outcome, result.kind) == ("fail", "value"), result.message


def test_ignored_prefix_space_is_named() -> None:
    load, case, group = BYTE_LEVEL["add_prefix_space ignored"]
    assert check(load, case, f"tokenizer.{group}", "exact").equals == "add_prefix_space ignored"


def test_a_lost_space_does_not_come_back() -> None:
    """The property needs no oracle."""
    load, case, _ = SENTENCEPIECE["no prefix before a space"]
    assert check(load, case, "tokenizer.round_trip", "exact").outcome == "fail"
