"""SentencePiece's BPE: ids and text equal the package's, over all of Unicode, on trained and on real vocabularies."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from reference_impl.tokenizer import SentencePieceBPE, load_tokenizer, sentencepiece_bpe
from tokenizer_directories import mistral, of_case, sentencepiece_model

TRAINED = ["sentencepiece_bpe/plain", "sentencepiece_bpe/distinct", "sentencepiece_bpe/user-defined",
           "sentencepiece_bpe/field-add_dummy_prefix", "sentencepiece_bpe/field-byte_fallback"]  # fmt: skip
REAL = ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]

any_character = st.characters(exclude_categories=["Cs"])
fragments = st.sampled_from([
    " ", "  ", "a", "aa", "the", "re", "an", "ing", "é", "e\u0301", "\u0301", "你", "🙂", "\u200d", "\x00",
    "\n", "\t", "▁", "<s>", "</s>", "<unk>", "<0x0A>", "<0xE4>", "[INST]", "[DOC_1]", "[DOC_1",
    "[REFERENCE_DOC_1]", "10", "==",
])  # fmt: skip
texts = st.lists(st.one_of(fragments, st.text(any_character, max_size=3)), max_size=24).map("".join)
runs = st.lists(st.tuples(st.sampled_from("a ▁=1你"), st.integers(1, 40)), max_size=4).map(
    lambda parts: "".join(letter * count for letter, count in parts)
)


class Both:
    """The reference and the package on one tokenizer.model."""

    def __init__(self, directory: Path):
        self.ours = load_tokenizer(directory, "tokenizer.model")
        assert isinstance(self.ours, SentencePieceBPE)
        self.theirs = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


@pytest.fixture(scope="module", params=[*TRAINED, *REAL])
def both(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Both:
    directory = tmp_path_factory.mktemp("tokenizer")
    return Both(mistral(directory, request.param) if request.param in REAL else of_case(request.param, directory))


@given(text=texts)
@example(text="")
@example(text="▁")
@example(text=" <s> [DOC_12]2")
def test_ids_equal_the_packages(both: Both, text: str) -> None:
    assert both.ours.encode(text) == both.theirs.encode(text)


@given(text=runs)
def test_ids_of_runs_equal_the_packages(both: Both, text: str) -> None:
    assert both.ours.encode(text) == both.theirs.encode(text)


@given(data=st.data())
def test_text_of_any_ids_equals_the_packages(both: Both, data: st.DataObject) -> None:
    """Bytes in any order, control and unknown pieces among them."""
    size = both.ours.vocab_size
    of_bytes = [i for i in range(size) if both.theirs.is_byte(i)] or [0]
    ids = data.draw(
        st.lists(st.one_of(st.integers(0, size - 1), st.sampled_from(of_bytes), st.integers(0, 3)), max_size=12)
    )
    assert both.ours.decode(ids) == both.theirs.decode(ids)


@given(data=st.data())
def test_what_is_decoded_id_by_id_adds_up_and_is_whole(both: Both, data: st.DataObject) -> None:
    ids = both.ours.encode(data.draw(texts))
    if 0 in ids:
        return  # an unknown piece's text is not the text
    decoder = both.ours.decoder()
    pieces = [decoder.feed(i) for i in ids]
    assert decoder.finish() == ""
    assert "".join(pieces) == both.ours.decode(ids)


@pytest.mark.parametrize("case", TRAINED[:2] + TRAINED[3:4])
@settings(max_examples=200)
@given(text=texts)
def test_texts_come_back(case: str, text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = cached(case, tmp_path_factory)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


_LOADED: dict[str, Any] = {}


def cached(case: str, factory: pytest.TempPathFactory) -> Any:
    if case not in _LOADED:
        _LOADED[case] = load_tokenizer(of_case(case, factory.mktemp("tokenizer")))
    return _LOADED[case]


@pytest.mark.parametrize("case", TRAINED[:2] + TRAINED[3:])
@settings(max_examples=200)
@given(text=texts)
def test_tokenizer_json_says_what_tokenizer_model_says(
    case: str, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """User-defined pieces aside, which tokenizer.json cannot hold as they are."""
    from_model, key = cached(case, tmp_path_factory), f"{case} as JSON"
    if key not in _LOADED:
        _LOADED[key] = load_tokenizer(of_case(case, tmp_path_factory.mktemp("tokenizer"), "tokenizer.json"))
    for options in ({}, {"parse_special": True}, {"add_special_tokens": True}):
        assert _LOADED[key].encode(text, **options) == from_model.encode(text, **options)


def test_legacy_decides_about_the_prefix_after_a_special_token(tmp_path: Path) -> None:
    always = load_tokenizer(of_case("sentencepiece_bpe/plain", tmp_path / "legacy"))
    first = load_tokenizer(of_case("sentencepiece_bpe/field-legacy", tmp_path / "not"))
    prefixed, bare = always.encode("a"), [i for i in always.encode("ba") if i not in always.encode("b")]
    assert len(bare) == 1
    assert always.encode("a<s>a", parse_special=True) == [*prefixed, 1, *prefixed]
    assert first.encode("a<s>a", parse_special=True) == [*prefixed, 1, *bare]


CHARACTERS = [("<unk>", 0.0, "UNKNOWN"), ("<s>", 0.0, "CONTROL"), ("</s>", 0.0, "CONTROL"), ("▁", -9.0, "NORMAL"),
              *((letter, -9.0, "NORMAL") for letter in "abc")]  # fmt: skip


def pieces_of(directory: Path, *more: tuple[str, float, str]) -> SentencePieceBPE:
    pieces, fallback = [*CHARACTERS, *more], any(kind == "BYTE" for _, _, kind in more)
    tokenizer = load_tokenizer(sentencepiece_model(directory, pieces, add_dummy_prefix=False, byte_fallback=fallback))
    assert isinstance(tokenizer, SentencePieceBPE)
    return tokenizer


def test_the_higher_score_is_merged_first_whatever_its_id_or_length(tmp_path: Path) -> None:
    tokenizer = pieces_of(tmp_path, ("ab", -2.0, "NORMAL"), ("bca", -0.5, "NORMAL"), ("bc", -1.0, "NORMAL"))
    assert [tokenizer.vocabulary.pieces[i] for i in tokenizer.encode("abca")] == ["a", "bca"]


def test_a_merge_may_cross_words_if_a_piece_does(tmp_path: Path) -> None:
    """Words are taken apart only where no piece holds a space inside."""
    tokenizer = pieces_of(tmp_path, ("a▁", -1.0, "NORMAL"), ("a▁b", -2.0, "NORMAL"))
    assert [tokenizer.vocabulary.pieces[i] for i in tokenizer.encode("a b a")] == ["a▁b", "▁", "a"]


def test_a_byte_piece_is_never_made_by_merging(tmp_path: Path) -> None:
    """Even where all but its last merge is a piece."""
    parts = ["<", "0", "x", "4", "1", ">", "<0", "<0x", "<0x4", "<0x41"]
    bytes_and_all = [(f"<0x{byte:02X}>", 0.0, "BYTE") for byte in range(256)]
    tokenizer = pieces_of(tmp_path, *((part, -1.0, "NORMAL") for part in parts), *bytes_and_all)
    ids = tokenizer.encode("<0x41>")
    assert [tokenizer.vocabulary.pieces[i] for i in ids] == ["<0x41", ">"]
    assert ids == SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode("<0x41>")


@given(text=texts)
@example(text=" the")
@example(text="<s> the")
def test_a_prefix_that_tokenizer_json_writes_as_a_step_goes_before_no_space(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """tokenizer.json means what `tokenizers` makes of it, though tokenizer.model beside it means something else."""
    if "metaspace" not in _LOADED:
        directory = of_case("sentencepiece_bpe/field-legacy", tmp_path_factory.mktemp("tokenizer"), "tokenizer.json")
        _LOADED["metaspace"] = load_tokenizer(directory), Tokenizer.from_file(str(directory / "tokenizer.json"))
    ours, theirs = _LOADED["metaspace"]
    for parse_special in (False, True):
        theirs.encode_special_tokens = not parse_special
        assert ours.encode(text, parse_special=parse_special) == theirs.encode(text, add_special_tokens=False).ids


def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"U\+D83D at 1, half of a surrogate pair"):
        pieces_of(tmp_path).encode("a\ud83d")


@pytest.mark.parametrize("i", [-1, 7])
def test_an_id_outside_the_vocabulary_is_refused(i: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"id {i} is not in the vocabulary of 7 pieces"):
        pieces_of(tmp_path).decode([3, i])


def test_a_million_letters_in_seconds(tmp_path: Path) -> None:
    """Nothing is n²; the time is benchmarks/tokenizer.py's business, that it ends is this one's."""
    tokenizer = load_tokenizer(of_case("sentencepiece_bpe/plain", tmp_path))
    theirs = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("a" * 200_000, " " * 200_000, "the others there " * 60_000):
        assert tokenizer.encode(text) == theirs.encode(text)


def test_kept_words_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is forgotten is found again."""
    monkeypatch.setattr(sentencepiece_bpe, "KEPT_WORDS", 3)
    tokenizer = pieces_of(tmp_path)
    words = [f" {letter}" for letter in "abcdefgh"]
    alone = [tokenizer.encode(word) for word in words]
    for word, ids in zip(words, alone, strict=True):
        assert tokenizer.encode(word) == ids
        assert len(tokenizer._kept) <= 3
