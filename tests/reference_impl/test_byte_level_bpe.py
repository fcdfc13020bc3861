"""GPT-2's BPE: ids and text equal the `tokenizers` package's, over all of Unicode."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from reference_impl.tokenizer import ByteLevelBPE, byte_level_bpe, load_tokenizer
from reference_impl.tokenizer.byte_level_bpe import Vocabulary, byte_characters, word_pattern
from tokenizer_directories import of_case

CASES = ["byte_level_bpe/plain", "byte_level_bpe/added-tokens", "byte_level_bpe/field-add_prefix_space"]
FILES = ["tokenizer.json", "vocab.json"]

fragments = st.sampled_from([
    " ", "  ", "    ", "a", "aa", "the", "re", "'s", "'ll", "'LL", "'", "é", "e\u0301", "\u0301", "你", "🙂",
    "\u200d", "\x00", "\n", "\r\n", "\t", "\t\t", "\x0b", "\x1c", "\u0085", "\u00a0", "\u3000", "\u200b",
    "²", "Ⅷ", "١", "10", "==", "_", "Ġ", "<|endoftext|>", "<|endof",
])  # fmt: skip
texts = st.lists(st.one_of(fragments, st.text(st.characters(exclude_categories=["Cs"]), max_size=3)), max_size=20).map(
    "".join
)
words = pre_tokenizers.ByteLevel(add_prefix_space=False)


class Both:
    """The reference, from either kind of file, and the package on tokenizer.json."""

    def __init__(self, directory: Path, file: str):
        self.ours = load_tokenizer(directory, file)
        assert isinstance(self.ours, ByteLevelBPE)
        self.theirs: Any = Tokenizer.from_file(str(directory / "tokenizer.json"))

    def encode(self, text: str, parse_special: bool) -> list[int]:
        self.theirs.encode_special_tokens = not parse_special
        return self.theirs.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=[(case, file) for case in CASES for file in FILES], ids=" ".join)
def both(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Both:
    case, file = request.param
    return Both(of_case(case, tmp_path_factory.mktemp("tokenizer")), file)


def same_to_both(text: str) -> bool:
    """Whether the package's Unicode and Python's put each character into the same class."""
    return all(unicodedata.category(c) != "Cn" for c in text)


@given(text=texts, parse_special=st.booleans())
@example(text="", parse_special=False)
def test_ids_equal_the_packages(both: Both, text: str, parse_special: bool) -> None:
    assume(same_to_both(text))
    assert both.ours.encode(text, parse_special=parse_special) == both.encode(text, parse_special)


@given(text=texts)
def test_texts_come_back(both: Both, text: str) -> None:
    came_back = both.ours.decode(both.ours.encode(text))
    assert came_back == text or (
        both.ours.vocabulary.add_prefix_space and came_back.replace(" ", "") == text.replace(" ", "")
    )


@given(data=st.data())
def test_text_of_any_ids_equals_the_packages(both: Both, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.one_of(st.integers(0, both.ours.vocab_size - 1), st.integers(0, 255)), max_size=10))
    assert both.ours.decode(ids) == both.theirs.decode(ids, skip_special_tokens=True)


@given(text=texts)
def test_what_is_decoded_id_by_id_adds_up_and_is_whole(both: Both, text: str) -> None:
    ids = both.ours.encode(text)
    decoder = both.ours.decoder()
    pieces = [decoder.feed(i) for i in ids]
    assert decoder.finish() == ""
    assert "".join(pieces) == both.ours.decode(ids)


def test_a_character_comes_with_its_last_byte(both: Both) -> None:
    ids = {c: i for c, i in both.ours.vocabulary.tokens.items() if len(c) == 1}
    decoder = both.ours.decoder()
    assert [decoder.feed(ids[c]) for c in "aä½łb"] == ["a", "", "", "你", "b"]
    assert [decoder.feed(ids[c]) for c in "ä½a"] == ["", "", "\ufffda"]
    assert (decoder.feed(ids["ä"]), decoder.finish()) == ("", "\ufffd")


@pytest.mark.parametrize(("text", "cut"), [
    ("a   b", ["a", "  ", " b"]), ("a  ", ["a", "  "]), ("  \n a", ["  \n", " a"]),
    ("we'll 'LL", ["we", "'ll", " '", "LL"]),
    ("a1²b", ["a", "1²", "b"]), ("!? ...x", ["!?", " ...", "x"]),
    ("a\u00a0b", ["a", "\u00a0", "b"]), ("x\x1cy", ["x", "\x1c", "y"]),
    ("e\u0301a", ["e", "\u0301", "a"]), ("a_b", ["a", "_", "b"]),
])  # fmt: skip
def test_words(text: str, cut: list[str]) -> None:
    assert word_pattern().findall(text) == cut


@settings(max_examples=1000)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=12))
def test_words_equal_the_packages(text: str) -> None:
    spans = [span for _, span in words.pre_tokenize_str(text)]
    assert word_pattern().findall(text) == [text[start:end] for start, end in spans]


def test_every_assigned_character_is_in_the_packages_class() -> None:
    """Beside a letter, a digit, a mark: it joins exactly what it is."""
    for code in range(0, 0x110000, 7):
        character = chr(code)
        if unicodedata.category(character) in ("Cn", "Cs"):
            continue
        for neighbour in "a1!":
            joined = len(word_pattern().findall(neighbour + character)) == 1
            assert joined == (len(words.pre_tokenize_str(neighbour + character)) == 1), (
                f"U+{code:04X} after {neighbour}"
            )


def test_characters_for_bytes() -> None:
    characters = byte_characters()
    assert len(set(characters)) == 256
    assert {byte: characters[byte] for byte in (0, 10, 32, 33, 126, 127, 160, 173, 174, 255)} == {
        0: "Ā", 10: "Ċ", 32: "Ġ", 33: "!", 126: "~", 127: "ġ", 160: "ł", 173: "Ń", 174: "®", 255: "ÿ",
    }  # fmt: skip


def small(**changes: Any) -> Vocabulary:
    tokens = {c: i for i, c in enumerate(byte_characters())}
    return Vocabulary(**{"tokens": tokens | {"ab": 256}, "merges": [("a", "b")], **changes})


def test_a_missing_byte_is_refused() -> None:
    tokens = dict(small().tokens)
    del tokens["Ā"]
    with pytest.raises(ValueError, match="lacks the bytes <0x00>"):
        ByteLevelBPE(small(tokens=tokens))


@pytest.mark.parametrize("pair", [("b", "a"), ("ab", "c"), ("x", "abc")])
def test_a_merge_without_a_token_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"merge 2, .*must be tokens"):
        ByteLevelBPE(small(merges=[("a", "b"), pair]))


def test_a_token_that_spells_no_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="holds '你', which stands for no byte"):
        ByteLevelBPE(small(tokens={**small().tokens, "你": 257}))


def test_two_tokens_with_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match="another token have the id 256"):
        ByteLevelBPE(small(tokens={**small().tokens, "ba": 256}))


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="id 257 is not in the vocabulary of 257 tokens"):
        ByteLevelBPE(small()).decode([257])


def test_half_of_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"U\+DC00 at 0"):
        ByteLevelBPE(small()).encode("\udc00")


def test_a_long_word_in_seconds() -> None:
    assert ByteLevelBPE(small()).encode("ab" * 100_000) == [256] * 100_000


def test_kept_words_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is forgotten is found again."""
    monkeypatch.setattr(byte_level_bpe, "KEPT_WORDS", 3)
    tokenizer = ByteLevelBPE(small())
    words = [f" {letter}" for letter in "abcdefgh"]
    alone = [tokenizer.encode(word) for word in words]
    for word, ids in zip(words, alone, strict=True):
        assert tokenizer.encode(word) == ids
        assert len(tokenizer._kept) <= 3
