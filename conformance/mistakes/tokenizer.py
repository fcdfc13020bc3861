"""Tokenizers: merges, spaces, bytes, special tokens."""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.making import instead

TEXT = "reference_impl.tokenizer.text:"
PIECES = "reference_impl.tokenizer.sentencepiece_bpe:SentencePieceBPE."
BYTES = "reference_impl.tokenizer.byte_level_bpe:"
MERGE = "reference_impl.tokenizer.bpe:merge"
ENCODES = (PIECES + "encode", BYTES + "ByteLevelBPE.encode")
SENTENCES, LEVEL = ("sentencepiece_bpe",), ("byte_level_bpe",)
BOTH = (*SENTENCES, *LEVEL)
ENCODE = ("tokenizer.encode", "tokenizer.spaces", "tokenizer.runs", "tokenizer.special_tokens",
          "tokenizer.byte_fallback",
          "tokenizer.begin_and_end", "tokenizer.vocabulary")  # fmt: skip
DECODE = ("tokenizer.decode", "tokenizer.round_trip", "tokenizer.incremental", "tokenizer.streaming",
          "tokenizer.invalid_bytes")  # fmt: skip


def entry(identifier: str, families: tuple[str, ...], *swaps: Swap, **text: Any) -> Mistake:
    more = {"seen": "common knowledge", "killed_by": (*ENCODE, *DECODE)} | text
    return Mistake(id=identifier, families=families, swaps=swaps, **more)


# --- merging ----------------------------------------------------------------------------------------------------------


def merging(choose: Callable[[list[float | None]], int]) -> Callable[..., Any]:
    """Byte-pair encoding that merges the pair choose(ranks of all pairs) next."""

    def merge(word: str, rank: Any) -> list[str]:
        symbols = list(word)
        while True:
            ranks = [rank(a, b) for a, b in pairwise(symbols)]
            if all(found is None for found in ranks):
                return symbols
            at = choose(ranks)
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]

    return instead(merge)


def first_possible(ranks: list[float | None]) -> int:
    return next(at for at, found in enumerate(ranks) if found is not None)


def best_rightmost(ranks: list[float | None]) -> int:
    best = min(found for found in ranks if found is not None)
    return max(at for at, found in enumerate(ranks) if found == best)


def worst(ranks: list[float | None]) -> int:
    top = max(found for found in ranks if found is not None)
    return next(at for at, found in enumerate(ranks) if found == top)


def once(original: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Symbols that were made by a merge are not merged again."""

    def merge(word: str, rank: Any) -> list[str]:
        return original(word, lambda left, right: rank(left, right) if len(left) == len(right) == 1 else None)

    return merge


def longest_match(original: Callable[..., Any]) -> Callable[..., Any]:
    """The longest piece from the left, as WordPiece does."""

    def encode_word(self: Any, word: str) -> tuple[int, ...]:
        ids, at = [], 0
        while at < len(word):
            stop = next((end for end in range(len(word), at, -1) if word[at:end] in self._ids), at + 1)
            ids += self._ids_of(word[at:stop])
            at = stop
        return tuple(ids)

    return encode_word


_MERGING = (
    entry(
        "tok-merge-left-to-right", BOTH, Swap(MERGE, merging(first_possible)),
        what="Merges the first pair that can be merged, not the best.",
        why="Rank decides, position only between equals.",
        shows="Half of ordinary words are cut differently; decoding is still right.", fix="The best rank first.",
        seen="ztxz16/fastllm#715",
    ),
    entry(
        "tok-merge-tie", BOTH, Swap(MERGE, merging(best_rightmost)),
        what="Of equal pairs the rightmost is merged first.", why="The leftmost.", shows="Only in runs: aaaa, spaces.",
        fix="The leftmost.", seen="ohdearquant/lattice#330",
    ),
    entry(
        "tok-merge-worst-first", BOTH, Swap(MERGE, merging(worst)),
        what="The worst rank is merged first (scores for ranks, or a sign).", why="The best.",
        shows="Nearly everywhere.",
        fix="Higher scores, smaller ranks first.",
    ),
    entry(
        "tok-merge-once", BOTH, Swap(MERGE, once),
        what="What a merge made is not merged again.", why="Until nothing can be merged.",
        shows="Words of three letters and more.",
        fix="Repeat.",
    ),
    entry(
        "tok-longest-match", SENTENCES, Swap(PIECES + "_encode_word", longest_match),
        what="The longest piece from the left, as WordPiece.", why="Byte-pair encoding merges by score.",
        shows="Some words are cut differently; decoding is still right.", fix="Merge.", seen="ztxz16/fastllm#715",
    ),
)  # fmt: skip


# --- spaces and the dummy prefix --------------------------------------------------------------------------------------


def text_before(change: Callable[[str], str]) -> Callable[..., Any]:
    """The text that is encoded, changed."""

    def make(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
        return lambda self, text, **options: original(self, change(text), **options)

    return make


def prefix(rule: Callable[[str, bool], bool]) -> Callable[..., Any]:
    """The dummy prefix where rule(part, at the start of the text)."""

    def make(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
        def encode(self: Any, text: str, at_start: bool) -> list[int]:
            kept = self.vocabulary
            self.vocabulary = replace(
                kept, prefix="always" if rule(text, at_start) else "never", prefix_before_space=True
            )
            try:
                return original(self, text, at_start)
            finally:
                self.vocabulary = kept

        return encode

    return make


def prefix_kept(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, token, first: original(self, token, False)


def every_prefix_stripped(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, token, first: original(self, token, True)


_SPACES = (
    entry(
        "tok-dummy-prefix", SENTENCES, Swap(PIECES + "_encode", prefix(lambda part, start: False)),
        what='No "▁" is put in front of the text.', why="The model was trained with it.", shows="The first token.",
        fix="Add it, once, unless the file says otherwise.", seen="google/sentencepiece#282, #877, llama.cpp#1315",
    ),
    entry(
        "tok-prefix-always", SENTENCES, Swap(PIECES + "_encode", prefix(lambda part, start: True)),
        what='"▁" is put in front of every part, also where the file says that it is not.',
        why="add_dummy_prefix, legacy.",
        shows="Only with the option, or behind special tokens.", fix="Read the file.",
        seen="transformers#28010, llama.cpp#3664, transformers#30964",
    ),
    entry(
        "tok-prefix-after-special", SENTENCES, Swap(PIECES + "_encode", prefix(lambda part, start: start)),
        what='"▁" is put in front of the text only, not behind special tokens.',
        why="With legacy it stands behind them too.",
        shows="Only texts with special tokens.", fix="Read legacy.", seen="transformers#28010, llama.cpp#3664",
    ),
    entry(
        "tok-decode-leading-space", SENTENCES, Swap(PIECES + "_surface", prefix_kept),
        what="The dummy prefix stays when decoding.", why="It is no part of the text.", shows="A space in front.",
        fix="Take one space off the first piece.", seen="karpathy/llama2.c#89, transformers#29453", killed_by=DECODE,
    ),
    entry(
        "tok-decode-strips-all", SENTENCES, Swap(PIECES + "_surface", every_prefix_stripped),
        what="A space is taken off every piece.", why="Off the first.", shows="Words run together.",
        fix="Only the first.",
        seen="transformers#29453", killed_by=DECODE,
    ),
    entry(
        "tok-normaliser", SENTENCES, Swap(PIECES + "encode", text_before(lambda text: re.sub(" +", " ", text))),
        what="Runs of spaces are collapsed.", why="Llama's model has the identity normaliser.", shows="Double spaces.",
        fix="Leave the text as it is.", seen="google/sentencepiece#650, #766, zml#47",
    ),
    entry(
        "tok-normaliser-nfkc", BOTH,
        *(Swap(target, text_before(lambda text: unicodedata.normalize("NFKC", text))) for target in ENCODES),
        what="NFKC is applied.", why="These models have the identity normaliser.",
        shows="“…”, full-width letters, ligatures.",
        fix="Leave the text as it is.", seen="google/sentencepiece#650, #329",
    ),
    entry(
        "tok-text-stripped", BOTH, Swap(PIECES + "encode", text_before(str.strip)),
        Swap(BYTES + "ByteLevelBPE.encode", text_before(str.strip)),
        what="White space around a text is stripped.", why="It is text.", shows="Texts that begin or end with it.",
        fix="Leave it.",
    ),
    entry(
        "tok-lower-case", BOTH, Swap(PIECES + "encode", text_before(str.lower)),
        Swap(BYTES + "ByteLevelBPE.encode", text_before(str.lower)),
        what="Texts are lower-cased, as for GPT-1.", why="These vocabularies have both cases.", shows="Capitals.",
        fix="Leave it.", seen="huggingface/tokenizers#239",
    ),
)  # fmt: skip


# --- bytes ------------------------------------------------------------------------------------------------------------


def unknown_for_bytes(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    def ids_of(self: Any, symbol: str) -> list[int]:
        if symbol in self._ids:
            return [self._ids[symbol]]
        return [self._unknown if self._unknown is not None else 0]

    return ids_of


def code_points(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    """The code point's low byte stands for the character."""

    def ids_of(self: Any, symbol: str) -> list[int]:
        if symbol in self._ids or len(self._id_of_byte) != 256:
            return original(self, symbol)
        return [self._id_of_byte[ord(character) & 0xFF] for character in symbol]

    return ids_of


def vanishing(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    return lambda self, symbol: [self._ids[symbol]] if symbol in self._ids else []


def shown_literally(original: Callable[..., Any]) -> Callable[..., Any]:
    def surface(self: Any, token: int, first: bool) -> Any:
        found = original(self, token, first)
        return self.vocabulary.pieces[token].encode() if token in self._byte_of else found

    return surface


def per_token(original: Callable[..., str]) -> Callable[..., str]:
    """Every token is decoded by itself."""

    def feed(self: Any, token: int) -> str:
        fed: str = original(self, token)
        return fed + str(self.finish())

    return feed


def read_as_bytes(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    """ "<0x0A>" in a text is read as the piece."""

    def encode(self: Any, text: str, at_start: bool) -> list[int]:
        parts = re.split(r"(<0x[0-9A-F]{2}>)", text)
        if len(parts) == 1 or len(self._id_of_byte) != 256:
            return original(self, text, at_start)
        ids: list[int] = []
        for number, part in enumerate(parts):
            ids += (
                [self._id_of_byte[int(part[3:5], 16)]] if number % 2 else original(self, part, at_start) if part else []
            )
        return ids

    return encode


def numbered_backwards(original: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """The bytes that are written as U+0100 and what follows, the last of them first."""

    def byte_characters() -> list[str]:
        found = original()
        others = iter([character for character in found if ord(character) >= 256][::-1])
        return [next(others) if ord(character) >= 256 else character for character in found]

    return byte_characters


_BYTES = (
    entry(
        "tok-byte-fallback-missing", SENTENCES, Swap(PIECES + "_ids_of", unknown_for_bytes),
        what="Characters that are no piece become <unk>.", why="They become the pieces of their UTF-8 bytes.",
        shows="Emoji, rare scripts, line breaks.", fix="<0xNN> for every byte.",
        seen="zml#37, ariannamethod/notorch#41",
    ),
    entry(
        "tok-byte-fallback-code-points", SENTENCES, Swap(PIECES + "_ids_of", code_points),
        what="The code point is taken for the byte.", why="UTF-8 has several bytes a character.",
        shows="Characters beyond U+007F that are no piece.", fix="text.encode().", seen="zml#37",
    ),
    entry(
        "tok-unknown-vanishes", SENTENCES, Swap(PIECES + "_ids_of", vanishing),
        what="Characters that are no piece are left out.", why="Nothing may get lost.", shows="Emoji, rare scripts.",
        fix="Bytes, or <unk>.", seen="zml#37",
    ),
    entry(
        "tok-byte-shown-literally", SENTENCES, Swap(PIECES + "_surface", shown_literally),
        what="Byte pieces are decoded as their names: <0xE4>.", why="They are bytes.",
        shows="Characters that are no piece.",
        fix="bytes([0xE4]).", seen="swift-models#571, cactus#684", killed_by=DECODE,
    ),
    entry(
        "tok-byte-decode-per-token", BOTH, Swap(TEXT + "IncrementalDecoder.feed", per_token),
        what="Every token is decoded by itself: half a character becomes U+FFFD.", why="Characters cross tokens.",
        shows="Characters of several bytes.", fix="Keep bytes until the character is complete.",
        seen="antonellof/ferrox#124, cactus#684", killed_by=DECODE,
    ),
    entry(
        "tok-byte-literal-confusion", SENTENCES, Swap(PIECES + "_encode", read_as_bytes),
        what='"<0x0A>" in a text is read as byte 10.', why="It is six characters.", shows="Only such texts.",
        fix="Byte pieces are never matched in text.", seen="zml#37",
    ),
    entry(
        "tok-byte-alphabet", LEVEL, Swap(BYTES + "byte_characters", numbered_backwards),
        what="The 68 bytes that are not printable are numbered in another order.",
        why="Space is U+0120, the 33rd of them, in the order of bytes.", shows="Spaces, line breaks, half of UTF-8.",
        fix="GPT-2's table.",
    ),
)  # fmt: skip


# --- words and special tokens -----------------------------------------------------------------------------------------


def pattern(change: Callable[[str], str]) -> Swap:
    def make(original: Callable[[], re.Pattern[str]]) -> Callable[[], re.Pattern[str]]:
        return lambda: re.compile(change(original().pattern))

    return Swap(BYTES + "word_pattern", make)


def without_lookahead(text: str) -> str:
    return re.sub(r"\|\[[^\]]*\]\+\(\?!\[\^[^\]]*\]\)", "", text)


def specials_always(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    return lambda self, text, *, add_special_tokens=False, parse_special=False: original(
        self, text, add_special_tokens=add_special_tokens, parse_special=True
    )


def specials_never(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    return lambda self, text, *, add_special_tokens=False, parse_special=False: original(
        self, text, add_special_tokens=add_special_tokens, parse_special=False
    )


def ends(always: bool) -> Callable[..., Any]:
    def make(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
        return lambda self, text, *, add_special_tokens=False, parse_special=False: original(
            self, text, add_special_tokens=always, parse_special=parse_special
        )

    return make


def shortest_first(original: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Of several special tokens at one place the shortest is taken."""

    def split(self: Any, text: str) -> Iterator[Any]:
        ordered = sorted(filter(None, self.ids), key=len)
        kept = self._pattern
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        try:
            yield from list(original(self, text))
        finally:
            self._pattern = kept

    return split


def controls_shown(original: Callable[..., Any]) -> Callable[..., Any]:
    def surface(self: Any, token: int, first: bool) -> Any:
        found = original(self, token, first)
        return self.vocabulary.pieces[token].encode() if found is None else found

    return surface


_WORDS = (
    entry(
        "tok-pretokeniser", LEVEL, pattern(without_lookahead),
        what="The pattern lacks \\s+(?!\\S): a run of spaces keeps its last one.",
        why="That one belongs to the word behind it.",
        shows="Runs of spaces before a word.", fix="GPT-2's pattern.",
        seen="lattice#519, latitudegames/GPT-3-Encoder#5, huggingface/tokenizers#905",
    ),
    entry(
        "tok-pretokeniser-contractions", LEVEL, pattern(lambda text: text.replace("'s|'t|'re|'ve|'m|'ll|'d|", "")),
        what="Contractions are not cut off.", why="'s, 't, 're … are words of their own.", shows="Apostrophes.",
        fix="GPT-2's pattern.", seen="latitudegames/GPT-3-Encoder#5",
    ),
    entry(
        "tok-pretokeniser-case", LEVEL, pattern(lambda text: "(?i:'s|'t|'re|'ve|'m|'ll|'d)" + text.removeprefix(
            "'s|'t|'re|'ve|'m|'ll|'d")),
        what="Contractions are cut off in capitals too (GPT-4's pattern).", why="GPT-2's knows small letters only.",
        shows="WE'LL, IT'S.", fix="GPT-2's pattern.", seen="huggingface/tokenizers#905",
    ),
    entry(
        "tok-pretokeniser-ascii", LEVEL, Swap(BYTES + "word_pattern", instead(lambda: re.compile(
            r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"))),
        what="Letters and numbers are ASCII's.", why="They are Unicode's categories L and N.",
        shows="Other scripts, accents.",
        fix="\\p{L}, \\p{N}.", seen="lattice#519",
    ),
    entry(
        "tok-pretokeniser-digits", LEVEL, pattern(lambda text: text.replace("]+| ?[^", "]{1,3}| ?[^")),
        what="Numbers are cut into groups of three (GPT-4's pattern).", why="GPT-2's keeps them whole.",
        shows="Numbers of four "
        "digits and more.", fix="GPT-2's pattern.", seen="huggingface/tokenizers#905 (patterns mixed up)",
    ),
    entry(
        "tok-special-in-text", BOTH, *(Swap(target, specials_always) for target in ENCODES),
        what="A literal <s> in a user's text becomes the control token.", why="What a user types is text.",
        shows="Only such texts.", fix="Read special tokens only when asked to.",
        seen="transformers#31336, ferrox#198, cpp-tiktoken#5",
    ),
    entry(
        "tok-special-split", BOTH, *(Swap(target, specials_never) for target in ENCODES),
        what="Special tokens are encoded as text even where they are to be read.", why="A template is made of them.",
        shows="Only where special tokens are asked for.", fix="Cut them out first.",
        seen="fastertransformer_backend#45",
    ),
    entry(
        "tok-begin-always", SENTENCES, *(Swap(target, ends(True)) for target in ENCODES),
        what="Begin and end tokens are added, asked or not.", why="Only with add_special_tokens.", shows="Everywhere.",
        fix="Read the argument.",
    ),
    entry(
        "tok-begin-never", SENTENCES, *(Swap(target, ends(False)) for target in ENCODES),
        what="Begin and end tokens are never added.", why="With add_special_tokens they are.",
        shows="Where they are asked for.",
        fix="Read add_bos_token and add_eos_token.",
    ),
    entry(
        "tok-special-shortest", BOTH, Swap(TEXT + "SpecialTokens.split", shortest_first),
        what="Of special tokens that begin alike the shortest is found.", why="The longest.",
        shows="Only where one begins "
        "another.", fix="Longest first.",
    ),
    entry(
        "tok-control-shown", SENTENCES, Swap(PIECES + "_surface", controls_shown),
        what="Control pieces are decoded as their names: <s>.", why="They have no text.", shows="Wherever one stands.",
        fix="Drop them.", seen="ferrox#198", killed_by=DECODE,
    ),
)  # fmt: skip

MISTAKES = (*_MERGING, *_SPACES, *_BYTES, *_WORDS)
