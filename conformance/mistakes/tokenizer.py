"""Tokenizers: merges, spaces, bytes, special tokens."""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.making import after, instead

TEXT = "reference_impl.tokenizer.text:"
PIECES = "reference_impl.tokenizer.sentencepiece_bpe:SentencePieceBPE."
BYTES = "reference_impl.tokenizer.byte_level_bpe:"
MERGE = "reference_impl.tokenizer.bpe:merge"
FILES = "reference_impl.tokenizer."
# As `reference_impl.tokenizer.byte_level_bpe` writes it in its pattern.
WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
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


def longest_match(among: Callable[[Any], Any]) -> Callable[..., Any]:
    """The longest piece from the left, as WordPiece does; among(tokenizer): the pieces that count, by text."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def encode_word(self: Any, word: str) -> tuple[int, ...]:
            known, at = among(self), 0
            ids: list[int] = []
            while at < len(word):
                stop = next((end for end in range(len(word), at, -1) if word[at:end] in known), at + 1)
                ids += [known[word[at:stop]]] if word[at:stop] in known else self._ids_of(word[at:stop])
                at = stop
            return tuple(ids)

        return encode_word

    return make


def ranked(order: Callable[[Any, float, str, str], Any]) -> Callable[..., Any]:
    """Pieces whose merges go by order(tokenizer, their rank, left, right)."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def encode_word(self: Any, word: str) -> Any:
            kept = self.vocabulary

            def rank(left: str, right: str) -> Any:
                found = kept.rank(left, right)
                return None if found is None else order(self, found, left, right)

            self.vocabulary = replace(kept, rank=rank)
            try:
                return original(self, word)
            finally:
                self.vocabulary = kept

        return encode_word

    return make


def word_by_word(original: Callable[..., Any]) -> Callable[..., Any]:
    """Pieces are cut before every "▁"."""
    return lambda self: re.compile("▁[^▁]*|[^▁]+").findall


def whole_words_first(original: Callable[..., tuple[int, ...]]) -> Callable[..., tuple[int, ...]]:
    def encode_word(self: Any, word: str) -> tuple[int, ...]:
        spelt = "".join(self._characters[byte] for byte in word.encode())
        tokens = self.vocabulary.tokens
        return (tokens[spelt],) if spelt in tokens else original(self, word)

    return encode_word


def merges_cut(part: slice) -> tuple[Swap, ...]:
    """Only a part of the merges is read, whichever file they stand in."""
    make = after(lambda merges: merges[part])
    return Swap(FILES + "files:read_merges", make), Swap(FILES + "tokenizer_json:_merges", make)


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
        "tok-longest-match", SENTENCES, Swap(PIECES + "_encode_word", longest_match(lambda self: self._ids)),
        what="The longest piece from the left, as WordPiece.", why="Byte-pair encoding merges by score.",
        shows="Some words are cut differently; decoding is still right.", fix="Merge.", seen="ztxz16/fastllm#715",
    ),
    entry(
        "tok-longest-match-any", SENTENCES, Swap(PIECES + "_encode_word", longest_match(
            lambda self: {piece: i for i, piece in enumerate(self.vocabulary.pieces)})),
        what="The longest piece from the left, special and byte pieces too.",
        why="Byte-pair encoding merges by score, and what a user types is text.",
        shows="Some words are cut differently, and <s> in a text becomes the special token.", fix="Merge.",
        seen="ztxz16/fastllm#715",
    ),
    entry(
        "tok-merge-longest-first", SENTENCES,
        Swap(PIECES + "_encode_word", ranked(lambda self, rank, left, right: (-len(left + right), rank))),
        what="The pair that makes the longest piece is merged first.", why="The pair of the best score.",
        shows="Some words are cut differently; decoding is still right.", fix="Compare scores.",
        seen="ztxz16/fastllm#715",
    ),
    entry(
        "tok-merge-rank-by-id", SENTENCES,
        Swap(PIECES + "_encode_word", ranked(lambda self, rank, left, right: self._ids[left + right])),
        what="The pair that makes the piece with the smallest id is merged first.",
        why="Scores say the order; a trained vocabulary happens to be sorted by them, one that was added to is not.",
        shows="Only where ids are not in the order of scores.", fix="Read the scores.",
    ),
    entry(
        "tok-merge-within-words", SENTENCES, Swap(PIECES + "_cutter", word_by_word),
        what='Text is cut before every "▁", and merged word by word.',
        why="SentencePiece merges the whole text; runs of spaces are pieces too.", shows="Runs of spaces.",
        fix="Cut nowhere, or where no piece crosses.",
    ),
    entry(
        "tok-vocab-first", LEVEL, Swap(BYTES + "ByteLevelBPE._encode_word", whole_words_first),
        what="A word that is a token as it stands is taken without merging.",
        why="GPT-2's merges decide; only tiktoken and files with ignore_merges look whole words up first.",
        shows="Only words that are tokens, and that no merges lead to.",
        fix="Merge; look whole words up only with ignore_merges.", seen="llama.cpp#7193",
    ),
    entry(
        "tok-merges-parse", LEVEL, *merges_cut(slice(None, -1)),
        what="The last merge is not read: lines[1:-1] of a list that has lost its empty last line already.",
        why="All of them count.", shows="Only words in which the last merge stands.",
        fix="Leave out empty lines, and no others.",
        seen="huggingface/transformers.js#199 (merges.txt read too simply)",
    ),
    entry(
        "tok-merges-first-lost", LEVEL, *merges_cut(slice(1, None)),
        what="The first merge is not read: it is taken for the header line.",
        why="Some files have a line that begins with #version, others begin with a merge.",
        shows="Wherever the most frequent pair stands.", fix="Leave out a line that begins with #version.",
        seen="huggingface/transformers.js#199 (merges.txt read too simply)",
    ),
)  # fmt: skip


# --- spaces and the dummy prefix --------------------------------------------------------------------------------------


def text_before(change: Callable[[str], str]) -> Callable[..., Any]:
    """The text that is encoded, changed."""

    def make(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
        return lambda self, text, **options: original(self, change(text), **options)

    return make


def encoded_with(changes: Callable[[str, bool], dict[str, Any]]) -> Callable[..., Any]:
    """A part of a text is encoded with another vocabulary: changes(part, whether it is at the start of the text)."""

    def make(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
        def encode(self: Any, text: str, at_start: bool) -> list[int]:
            kept = self.vocabulary
            self.vocabulary = replace(kept, **changes(text, at_start))
            try:
                return original(self, text, at_start)
            finally:
                self.vocabulary = kept

        return encode

    return make


def prefix(rule: Callable[[str, bool], bool]) -> Callable[..., Any]:
    """The dummy prefix where rule(part, at the start of the text)."""
    return encoded_with(
        lambda text, start: {"prefix": "always" if rule(text, start) else "never", "prefix_before_space": True}
    )


def has_prefix(tokenizer: Any, at_start: bool) -> bool:
    where: str = tokenizer.vocabulary.prefix
    return where == "always" or (where == "first" and at_start)


def prefix_twice(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    return lambda self, text, at_start: original(self, "▁" * has_prefix(self, at_start) + text, at_start)


def prefix_on_nothing(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    """The empty text is a part like any other."""

    def encode(self: Any, text: str, **options: bool) -> list[int]:
        found = original(self, text, **options)
        begin = len(self.vocabulary.begin) if options.get("add_special_tokens") else 0
        return found if text else [*found[:begin], *self._encode("", True), *found[begin:]]

    return encode


def user_defined_first(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    """User-defined pieces are cut out before a prefix is thought of, and what is between them gets its own."""

    def encode(self: Any, text: str, at_start: bool) -> list[int]:
        parts = list(self._user_defined.split(text))
        return [i for start, part, whole in parts
                for i in ([whole] if whole is not None else original(self, part, at_start and start == 0))]  # fmt: skip

    return encode


def user_defined_never(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    def encode(self: Any, text: str, at_start: bool) -> list[int]:
        kept = self._user_defined
        self._user_defined = type(kept)({})
        try:
            return original(self, text, at_start)
        finally:
            self._user_defined = kept

    return encode


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
        "tok-prefix-not-before-space", SENTENCES,
        Swap(PIECES + "_encode", encoded_with(lambda part, start: {"prefix_before_space": False})),
        what='No "▁" is put in front of a text that begins with a space.',
        why='SentencePiece puts one there all the same: " the" is ▁ ▁the, and not the ids of "the".',
        shows="Texts that begin with a space; the space is lost on the way back.",
        fix="Prepend without looking (a normalizer Prepend, not a pre-tokenizer Metaspace).",
        seen="transformers#47700, transformers#47862",
    ),
    entry(
        "tok-prefix-twice", SENTENCES, Swap(PIECES + "_encode", prefix_twice),
        what='"▁" is put in front twice, by the normalizer and by hand.', why="Once.", shows="The first token.",
        fix="Leave it to one of them.", seen="google/sentencepiece#282, llama.cpp#1315",
    ),
    entry(
        "tok-prefix-on-nothing", SENTENCES, Swap(PIECES + "encode", prefix_on_nothing),
        what='The empty text becomes "▁".', why="It has no tokens.", shows="Only the empty text.",
        fix="Put the prefix in front of something only.", seen="google/sentencepiece#877",
    ),
    entry(
        "tok-user-defined-cut-first", SENTENCES, Swap(PIECES + "_encode", user_defined_first),
        what="User-defined pieces are cut out of the text before the prefix is put in front.",
        why="The prefix belongs to the whole text: [DOC]x is ▁ [DOC] x, not [DOC] ▁x.",
        shows="Texts with user-defined pieces.", fix="First the prefix, then the cuts.",
        seen="huggingface/tokenizers (added tokens with normalized=false)",
    ),
    entry(
        "tok-user-defined-split", SENTENCES, Swap(PIECES + "_encode", user_defined_never),
        what="User-defined pieces are merged like any text.", why="They stay whole.",
        shows="Texts with user-defined pieces.", fix="Cut them out before merging.",
    ),
    entry(
        "tok-prefix-space-assumed", LEVEL, Swap(BYTES + "ByteLevelBPE._encode", text_before(
            lambda text: text if text.startswith(" ") else " " + text)),
        what="A space is put before a text that begins with none.", why="Only with add_prefix_space.",
        shows="The first token.", fix="Read add_prefix_space; GPT-2's is false.",
    ),
    entry(
        "tok-text-ends-at-nul", BOTH,
        *(Swap(target, text_before(lambda text: text.split("\0")[0])) for target in ENCODES),
        what="A text ends at its first U+0000.", why="That is a character; C's strings end there, Unicode's do not.",
        shows="Only such texts.", fix="Pass lengths.",
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
        "tok-extra-spaces-removed", SENTENCES,
        Swap(PIECES + "encode", text_before(lambda text: re.sub(" +", " ", text.strip(" ")))),
        what="Spaces around a text are removed and runs of them collapsed: remove_extra_whitespaces.",
        why="Llama's model says false; SentencePiece's default is true.", shows="Texts with spaces around or in runs.",
        fix="Read normalizer_spec.", seen="google/sentencepiece#650, #766, zml#47",
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


def bytes_from_three(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    def ids_of(self: Any, symbol: str) -> list[int]:
        if symbol in self._ids or len(self._id_of_byte) != 256:
            return original(self, symbol)
        return [byte + 3 for byte in symbol.encode()]

    return ids_of


class Lonely(int):
    """An id that differs from every other, when it is asked whether it differs."""

    __hash__ = int.__hash__

    def __ne__(self, other: object) -> bool:
        return True


def unknown_apart(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    """Each unknown character becomes a piece of its own."""

    def ids_of(self: Any, symbol: str) -> list[int]:
        return [Lonely(i) if i == self._unknown else i for i in original(self, symbol)]

    return ids_of


def unknown_for_each(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    return unknown_apart(unknown_for_bytes(original))


def low_bytes(original: Callable[..., tuple[int, ...]]) -> Callable[..., tuple[int, ...]]:
    """Characters are taken for bytes: U+4F60 for 60."""
    return lambda self, word: original(self, _Spelt(word))


class _Spelt(str):
    """A word whose UTF-8 is said to be the low bytes of its code points."""

    def encode(self, *_: Any) -> bytes:
        return bytes(ord(character) & 0xFF for character in self)


def vanishing(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    return lambda self, symbol: [self._ids[symbol]] if symbol in self._ids else []


def vanishing_early(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    return lambda self, text, at_start: original(self, "".join(c for c in text if c == " " or c in self._ids), at_start)


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


def read_as_bytes(original: Callable[..., tuple[int, ...]]) -> Callable[..., tuple[int, ...]]:
    """ "<0x0A>" in a text is read as the piece."""

    def encode_word(self: Any, word: str) -> tuple[int, ...]:
        parts = re.split(r"(<0x[0-9A-F]{2}>)", word)
        if len(parts) == 1 or len(self._id_of_byte) != 256:
            return original(self, word)
        found = [(self._id_of_byte[int(part[3:5], 16)],) if number % 2 else original(self, part)
                 for number, part in enumerate(parts) if part]  # fmt: skip
        return tuple(i for ids in found for i in ids)

    return encode_word


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
        "tok-byte-fallback-missing-apart", SENTENCES, Swap(PIECES + "_ids_of", unknown_for_each),
        what="Every character that is no piece becomes an <unk> of its own.",
        why="They become the pieces of their UTF-8 bytes.", shows="Emoji, rare scripts, line breaks.",
        fix="<0xNN> for every byte.", seen="zml#37, ariannamethod/notorch#41",
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
        "tok-unknown-vanishes-early", SENTENCES, Swap(PIECES + "_encode", vanishing_early),
        what="Characters that are no piece are left out before merging, and what they parted is merged.",
        why="Nothing may get lost.", shows="Emoji, rare scripts; with byte pieces or without.", fix="Bytes, or <unk>.",
        seen="transformers (byte_fallback of LlamaTokenizer, always on)",
    ),
    entry(
        "tok-byte-offset-assumed", SENTENCES, Swap(PIECES + "_ids_of", bytes_from_three),
        what="The piece of byte b is taken to have the id b + 3.", why="The vocabulary says where it is.",
        shows="Only vocabularies in another order than Llama's, where a character is no piece.",
        fix="Look <0xNN> up.", seen="llama.cpp's and llama2.c's first tokenizers (byte + 3)",
    ),
    entry(
        "tok-unknown-not-joined", SENTENCES, Swap(PIECES + "_ids_of", unknown_apart),
        what="Every unknown character becomes an <unk> of its own.", why="A run of them becomes one.",
        shows="Only without byte pieces, where several unknown characters stand together.", fix="Join them (fuse_unk).",
        seen="huggingface/tokenizers (fuse_unk)",
    ),
    entry(
        "tok-code-points-for-bytes", LEVEL, Swap(BYTES + "ByteLevelBPE._encode_word", low_bytes),
        what="Code points are taken for bytes.", why="The bytes are those of UTF-8.", shows="All but ASCII.",
        fix="text.encode().", seen="zml#37",
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
        "tok-byte-literal-confusion", SENTENCES, Swap(PIECES + "_encode_word", read_as_bytes),
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
        return cache(lambda: re.compile(change(original().pattern)))

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


def added_ignored(original: Callable[..., list[int]]) -> Callable[..., list[int]]:
    """Added tokens that are no special ones are text."""

    def encode(self: Any, text: str, **options: bool) -> list[int]:
        kept = self._added, self.special_tokens
        self._added, self.special_tokens = type(kept[0])({}), type(kept[1])(self.vocabulary.specials)
        try:
            return original(self, text, **options)
        finally:
            self._added, self.special_tokens = kept

    return encode


_WORDS = (
    entry(
        "tok-pretokeniser-none", LEVEL, pattern(lambda text: "(?s:.+)"),
        what="The text is not cut into words.", why="Merges do not cross the borders of words.",
        shows="Wherever a space stands inside.", fix="GPT-2's pattern.",
    ),
    entry(
        "tok-pretokeniser-digits-single", LEVEL, pattern(lambda text: text.replace("]+| ?[^", "]| ?[^")),
        what="Digits are cut off one by one (Llama's rule).", why="GPT-2's pattern keeps a number whole.",
        shows="Numbers.", fix="GPT-2's pattern.", seen="huggingface/tokenizers#905 (patterns mixed up)",
    ),
    entry(
        "tok-pretokeniser-white-space", LEVEL, pattern(lambda text: text.replace(
            WHITE_SPACE, WHITE_SPACE + r"\x1c-\x1f")),
        what="U+001C to U+001F count as white space, as in Python's re and str.isspace.",
        why="Unicode's White_Space, the \\s of other engines, does not have them.", shows="Only such texts.",
        fix="White_Space of Unicode.", seen="common knowledge",
    ),
    entry(
        "tok-added-tokens-ignored", LEVEL, Swap(BYTES + "ByteLevelBPE.encode", added_ignored),
        what="Added tokens that are no special ones (Phi's runs of spaces) are not looked for.",
        why="They are cut out of every text.", shows="Texts that hold one.", fix="Read added_tokens.",
    ),
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
