"""Tokenizers written by hand from the contract, in the slow way of the papers: each merge looks at all pairs first.

They read tokenizer.json with no library's help, and know nothing of reference_impl.  Methods are small, so that a
mistake is a method replaced.
"""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

Ids = list[int]


class SentencePieceByHand:
    """SentencePiece's BPE with byte fallback."""

    def __init__(self, checkpoint: Any):
        content = json.loads((checkpoint.path / "tokenizer.json").read_text("utf-8"))
        self.settings = checkpoint.config
        self.ids: dict[str, int] = content["model"]["vocab"]
        self.pieces = {i: piece for piece, i in self.ids.items()}
        self.ranks = {tuple(pair): order for order, pair in enumerate(content["model"]["merges"])}
        self.control = [t["content"] for t in content["added_tokens"] if t["special"]]
        self.whole = [t["content"] for t in content["added_tokens"] if not t["special"]]

    # --- encoding

    def encode(self, text: str, add_special_tokens: bool = False, parse_special: bool = False) -> Ids:
        ids: Ids = []
        for part in self.cut(text, self.control if parse_special else []):
            if parse_special and part in self.control:
                ids.append(self.ids[part])
            else:
                ids += self.encode_part(part, first=not ids)
        return self.begin() + ids + self.end() if add_special_tokens else ids

    def begin(self) -> Ids:
        return [self.ids[self.settings["bos_token"]]] * self.settings["add_bos_token"]

    def end(self) -> Ids:
        return [self.ids[self.settings["eos_token"]]] * self.settings["add_eos_token"]

    def cut(self, text: str, tokens: list[str]) -> list[str]:
        if not tokens:
            return [text] if text else []
        longest_first = sorted(tokens, key=len, reverse=True)
        return [part for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if part]

    def encode_part(self, text: str, first: bool) -> Ids:
        marked = self.marked(text, first)
        symbols: list[str] = []
        for part in self.cut(marked, self.whole):
            symbols += [part] if part in self.whole else self.merged(self.split(part))
        return self.looked_up(symbols)

    def marked(self, text: str, first: bool) -> str:
        return self.prefix(text, first) + text.replace(" ", "▁")

    def prefix(self, text: str, first: bool) -> str:
        return "▁" if self.settings["add_dummy_prefix"] and (first or self.settings["legacy"]) else ""

    def split(self, text: str) -> list[str]:
        return list(text)

    def merged(self, symbols: list[str]) -> list[str]:
        while True:
            pairs = [pair for pair in pairwise(symbols) if self.rank(pair) is not None]
            if not pairs:
                return symbols
            symbols = self.joined(symbols, min(pairs, key=self.rank))

    def rank(self, pair: tuple[str, str]) -> Any:
        return self.ranks.get(pair)

    def joined(self, symbols: list[str], best: tuple[str, str]) -> list[str]:
        """Every `best` pair merged, from the left."""
        done: list[str] = []
        for symbol in symbols:
            if done and (done[-1], symbol) == best:
                done[-1] += symbol + "\0"  # so that it does not merge again in this pass
            else:
                done.append(symbol)
        return [symbol.removesuffix("\0") if len(symbol) > 1 else symbol for symbol in done]

    def looked_up(self, symbols: list[str]) -> Ids:
        ids: Ids = []
        for symbol in symbols:
            if symbol in self.ids:
                ids.append(self.ids[symbol])
            elif self.settings["byte_fallback"]:
                ids += self.fallback(symbol)
            elif ids[-1:] != [self.ids["<unk>"]]:
                ids.append(self.ids["<unk>"])
        return ids

    def fallback(self, symbol: str) -> Ids:
        return [self.ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]

    # --- decoding

    def decode(self, ids: Ids) -> str:
        decoder = self.decoder()
        return "".join(decoder.feed(i) for i in ids) + decoder.finish()

    def decoder(self) -> Any:
        return DecoderByHand(self)

    def text_of(self, piece: str, first: bool) -> bytes:
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        if first and self.settings["add_dummy_prefix"]:
            piece = piece.removeprefix("▁")
        return piece.replace("▁", " ").encode()

    def characters(self, data: bytes) -> str:
        """Text of bytes that are complete: U+FFFD for every byte that belongs to no character."""
        return re.sub("[\udc80-\udcff]", "\ufffd", data.decode(errors="surrogateescape"))


class DecoderByHand:
    """Holds bytes back while they may become a character."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.held, self.first = tokenizer, b"", True

    def feed(self, i: int) -> str:
        piece = self.tokenizer.pieces[i]
        if piece in self.tokenizer.control:
            return self.control()
        self.held += self.tokenizer.text_of(piece, self.first)
        self.first = False
        return self.give(len(self.held) - self.unfinished())

    def control(self) -> str:
        return self.finish()

    def finish(self) -> str:
        return self.give(len(self.held))

    def give(self, count: int) -> str:
        data, self.held = self.held[:count], self.held[count:]
        return self.tokenizer.characters(data)

    def unfinished(self) -> int:
        """How many bytes at the end may be the first of a character (the second byte of some is restricted)."""
        for back in (1, 2, 3):
            rest = self.held[-back:]
            if len(rest) == back and any(completes(rest + more) for more in TAILS):
                return back
        return 0


def completes(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


# What can complete a character: one to three bytes, the first of them at either end of its range.
TAILS = [bytes([first, *[0x80] * n]) for first in (0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF) for n in range(3)]


class ByteLevelByHand(SentencePieceByHand):
    """GPT-2's byte-level BPE: the merging is the same, on the characters that stand for bytes."""

    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # Radford et al.'s code

    def __init__(self, checkpoint: Any):
        super().__init__(checkpoint)
        content = json.loads((checkpoint.path / "tokenizer.json").read_text("utf-8"))
        self.added = {t["content"]: t["id"] for t in content["added_tokens"]}
        self.pieces |= {i: text for text, i in self.added.items()}
        own = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
        others = [b for b in range(256) if b not in own]
        self.letters = {b: chr(b) for b in own} | {b: chr(256 + n) for n, b in enumerate(others)}
        self.bytes_of = {letter: b for b, letter in self.letters.items()}

    def encode(self, text: str, parse_special: bool = False) -> Ids:  # type: ignore[override]
        tokens = [*self.whole, *(self.control if parse_special else [])]
        ids: Ids = []
        for part in self.cut(text, tokens):
            ids += [self.added[part]] if part in tokens else self.encode_part(part, first=not ids)
        return ids

    def encode_part(self, text: str, first: bool) -> Ids:
        if self.settings["add_prefix_space"] and not text.startswith(" "):
            text = " " + text
        return [self.ids[s] for word in self.words(text) for s in self.merged([self.letters[b] for b in word.encode()])]

    def words(self, text: str) -> list[str]:
        import regex

        return regex.findall(self.pattern, text)

    def text_of(self, piece: str, first: bool) -> bytes:
        return piece.encode() if piece in self.whole else bytes(self.bytes_of[letter] for letter in piece)

    def decoder(self) -> Any:
        return ByteLevelDecoderByHand(self)

    def characters(self, data: bytes) -> str:
        return data.decode(errors="replace")


class ByteLevelDecoderByHand(DecoderByHand):
    def control(self) -> str:
        return ""


Load = Callable[[Any], Any]


def wrong(base: type, **methods: Callable[..., Any]) -> Load:
    """`load` of a tokenizer in which these methods are others."""
    return type("Wrong", (base,), methods)
