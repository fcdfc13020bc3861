"""Tokenizer files: each kind is read, and what is absent, broken or not implemented is named, with its file."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from reference_impl.tokenizer import ByteLevelBPE, SentencePieceBPE, TokenizerError, load_tokenizer
from tokenizer_directories import of_case, sentencepiece_model, write_json

PIECES = [("<unk>", 0.0, "UNKNOWN"), ("<s>", 0.0, "CONTROL"), ("</s>", 0.0, "CONTROL"), ("▁", -2.0, "NORMAL"),
          ("a", -1.0, "NORMAL")]  # fmt: skip
SENTENCEPIECE, BYTE_LEVEL = "sentencepiece_bpe/plain", "byte_level_bpe/plain"


def changed(directory: Path, file: str, change: Any) -> Path:
    """The directory with one of its JSON files changed."""
    content = json.loads((directory / file).read_text("utf-8"))
    change(content)
    write_json(directory / file, content)
    return directory


# --- what is read


def test_the_first_of_three_files_is_read(tmp_path: Path) -> None:
    assert isinstance(load_tokenizer(of_case(SENTENCEPIECE, tmp_path / "a")), SentencePieceBPE)
    both = of_case(BYTE_LEVEL, tmp_path / "b")
    (both / "vocab.json").write_text("broken")
    assert isinstance(load_tokenizer(both), ByteLevelBPE)
    only = load_tokenizer(of_case(BYTE_LEVEL, tmp_path / "c", "vocab.json", "merges.txt"))
    assert only.encode("<|endoftext|>", parse_special=True) == [only.vocab_size - 1]


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_begin_and_end_tokens_are_those_of_the_files(file: str, tmp_path: Path) -> None:
    for field, around in (("add_bos_token", ([], [])), ("add_eos_token", ([1], [2]))):
        tokenizer = load_tokenizer(of_case(f"sentencepiece_bpe/field-{field}", tmp_path / field), file)
        ids = tokenizer.encode("a")
        assert tokenizer.encode("a", add_special_tokens=True) == [*around[0], *ids, *around[1]]


def test_without_tokenizer_config_a_begin_token_goes_before_as_llama_has_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(of_case(SENTENCEPIECE, tmp_path, "tokenizer.model"))
    assert tokenizer.encode("", add_special_tokens=True) == [1]


def test_tokens_may_be_given_with_their_properties(tmp_path: Path) -> None:
    """Older configs write {"content": "<s>", "lstrip": false, …}."""
    directory = of_case(SENTENCEPIECE, tmp_path)
    changed(directory, "tokenizer_config.json", lambda c: c.update(bos_token={"content": "</s>", "lstrip": False}))
    assert load_tokenizer(directory).encode("", add_special_tokens=True) == [2]


def test_merges_are_read_with_and_without_header_and_last_line_end(tmp_path: Path) -> None:
    directory = of_case(BYTE_LEVEL, tmp_path)
    text = (directory / "merges.txt").read_text("utf-8")
    wanted = load_tokenizer(directory, "vocab.json")
    assert isinstance(wanted, ByteLevelBPE)
    for variant in (text.split("\n", 1)[1], text.removesuffix("\n"), text.replace("\n", "\r\n")):
        (directory / "merges.txt").write_text(variant, encoding="utf-8", newline="")
        found = load_tokenizer(directory, "vocab.json")
        assert isinstance(found, ByteLevelBPE)
        assert found.vocabulary.merges == wanted.vocabulary.merges


def test_merges_as_strings_are_those_as_pairs(tmp_path: Path) -> None:
    """Versions of the library before 0.20 wrote "a b" for ["a", "b"]."""
    for case in (SENTENCEPIECE, BYTE_LEVEL):
        directory = of_case(case, tmp_path / case)
        wanted = load_tokenizer(directory, "tokenizer.json").encode("the others were banana")
        changed(directory, "tokenizer.json",
                lambda c: c["model"].update(merges=[" ".join(pair) for pair in c["model"]["merges"]]))  # fmt: skip
        assert load_tokenizer(directory, "tokenizer.json").encode("the others were banana") == wanted


# --- what cannot be


def refused(directory: Path, file: str | None = None) -> str:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(directory, file)
    message = str(caught.value)
    assert message.startswith(str(directory))
    return message


def test_nothing_there(tmp_path: Path) -> None:
    assert "no tokenizer here: wanted tokenizer.model, tokenizer.json, or vocab.json with merges.txt" in refused(
        tmp_path
    )


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json", "vocab.json"])
def test_the_named_file_is_absent(file: str, tmp_path: Path) -> None:
    assert f"{file}: cannot be read: No such file" in refused(tmp_path, file)


def test_another_file_is_named(tmp_path: Path) -> None:
    assert "tekken.json: not a tokenizer's file" in refused(tmp_path, "tekken.json")


def test_merges_are_absent(tmp_path: Path) -> None:
    assert "merges.txt: cannot be read" in refused(of_case(BYTE_LEVEL, tmp_path, "vocab.json"))


@pytest.mark.parametrize("content", [b"no protocol buffer", b"\x0a\xff\xff\xff\xff\x0f", b"{}", b"\x00" * 64])
def test_tokenizer_model_is_broken(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert "tokenizer.model: " in refused(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_tokenizer_model_is_cut_short(share: float, tmp_path: Path) -> None:
    directory = of_case(SENTENCEPIECE, tmp_path)
    content = (directory / "tokenizer.model").read_bytes()
    (directory / "tokenizer.model").write_bytes(content[: int(share * len(content))])
    refused(directory)


@pytest.mark.parametrize(("settings", "words"), [
    ({"model_type": 1}, "of type unigram: only bpe is implemented"),
    ({"precompiled_charsmap": b"x", "name": "nmt_nfkc"}, "normalises text by 'nmt_nfkc'"),
    ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces must be false"),
    ({"escape_whitespaces": False}, "escape_whitespaces true"),
    ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix must be false"),
])  # fmt: skip
def test_a_model_that_is_not_as_llamas(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in refused(sentencepiece_model(tmp_path, PIECES, **settings))


@pytest.mark.parametrize(("pieces", "words"), [
    ([], "no pieces"),
    ([*PIECES, ("a", -3.0, "NORMAL")], "1 pieces occur twice"),
    ([*PIECES, ("b", -3.0, "UNUSED")], "unused pieces are not implemented"),
    ([("▁", 0.0, "NORMAL"), ("<s>", 0.0, "CONTROL"), ("<0x00>", 0.0, "BYTE")], "1 of 256 byte pieces and no unknown"),
    ([*PIECES, ("<0xZZ>", 0.0, "BYTE")], "the byte piece '<0xZZ>' must be one of <0x00> … <0xFF>"),
    ([("<unk>", 0.0, "UNKNOWN"), ("a", 0.0, "NORMAL")], "bos_token='<s>', which is not in the vocabulary"),
])  # fmt: skip
def test_pieces_that_cannot_be_used(pieces: Any, words: str, tmp_path: Path) -> None:
    assert words in refused(sentencepiece_model(tmp_path, pieces))


def test_sentencepiece_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    message = refused(sentencepiece_model_without_import(tmp_path))
    assert "needs sentencepiece and protobuf" in message
    assert "load_tokenizer(path, 'tokenizer.json')" in message


def sentencepiece_model_without_import(directory: Path) -> Path:
    (directory / "tokenizer.model").write_bytes(b"")
    return directory


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\ufeff{}", "null", "[" * 100_000], ids=repr)
def test_tokenizer_json_is_broken(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    assert "tokenizer.json: " in refused(tmp_path)


def test_tokenizer_json_is_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    assert "not UTF-8" in refused(tmp_path)


@pytest.mark.parametrize("content", [{}, {"model": None}, {"model": {"type": "BPE"}},
                                     {"model": {"vocab": [], "merges": []}},
                                     {"model": {"vocab": {}, "merges": []}},
                                     {"model": {"vocab": {"a": 0}, "merges": [1]}, "added_tokens": 3}])  # fmt: skip
def test_tokenizer_json_is_of_another_shape(content: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", content)
    assert "tokenizer.json: " in refused(tmp_path)


NOT_IMPLEMENTED: dict[str, tuple[str, Any]] = {
    "model of type Unigram": (SENTENCEPIECE, lambda c: c["model"].update(type="Unigram")),
    "dropout=0.1": (SENTENCEPIECE, lambda c: c["model"].update(dropout=0.1)),
    "end_of_word_suffix='</w>'": (BYTE_LEVEL, lambda c: c["model"].update(end_of_word_suffix="</w>")),
    "ignore_merges=True": (SENTENCEPIECE, lambda c: c["model"].update(ignore_merges=True)),
    "must be an id": (SENTENCEPIECE, lambda c: c["model"]["vocab"].update(the=-1)),
    "merge 1 is": (SENTENCEPIECE, lambda c: c["model"]["merges"].insert(0, ["a"])),
    "a post-processor BertProcessing": (SENTENCEPIECE, lambda c: c.update(post_processor={"type": "BertProcessing"})),
    "lstrip=true": (SENTENCEPIECE, lambda c: c["added_tokens"][0].update(lstrip=True)),
    "after normalization": (SENTENCEPIECE, lambda c: c["added_tokens"][0].update(normalized=True)),
    "neither SentencePiece's way": (SENTENCEPIECE, lambda c: c.update(normalizer={"type": "NFC"})),
    "fuse_unk must be true": ("sentencepiece_bpe/field-byte_fallback", lambda c: c["model"].update(fuse_unk=False)),
    "wanted split=false": ("sentencepiece_bpe/field-legacy", lambda c: c["pre_tokenizer"].update(split=True)),
    "a normalizer NFC": (BYTE_LEVEL, lambda c: c.update(normalizer={"type": "NFC"})),
    "use_regex must be true": (BYTE_LEVEL, lambda c: c["pre_tokenizer"].update(use_regex=False)),
    "every value of model.vocab": (SENTENCEPIECE, lambda c: c["model"]["vocab"].update(a_hole_of=10**12)),
    "merge 1, 'q' with 'zz'": (SENTENCEPIECE, lambda c: c["model"]["merges"].insert(0, ["q", "zz"])),
    "has id 1000000000000": (SENTENCEPIECE, lambda c: c["added_tokens"][0].update(id=10**12)),
    "has id -1": (BYTE_LEVEL, lambda c: c["added_tokens"][0].update(id=-1)),
    "has id '7'": (BYTE_LEVEL, lambda c: c["added_tokens"][0].update(id="7")),
    "the added token 5 has id": (BYTE_LEVEL, lambda c: c["added_tokens"][0].update(content=5)),
    "lacks the bytes": (BYTE_LEVEL, lambda c: c["model"]["vocab"].pop("Ġ")),
}  # fmt: skip


@pytest.mark.parametrize("words", NOT_IMPLEMENTED)
def test_tokenizer_json_asks_for_what_is_not_implemented(words: str, tmp_path: Path) -> None:
    case, change = NOT_IMPLEMENTED[words]
    assert words in refused(changed(of_case(case, tmp_path, "tokenizer.json"), "tokenizer.json", change))


@pytest.mark.parametrize(("text", "words"), [("a", "line 1 is 'a'"), ("#version: 0.2\na b c", "line 2 is 'a b c'"),
                                             ("a  b", "line 1"), ("a\tb", "line 1")])  # fmt: skip
def test_merges_are_broken(text: str, words: str, tmp_path: Path) -> None:
    directory = of_case(BYTE_LEVEL, tmp_path, "vocab.json")
    (directory / "merges.txt").write_text(text)
    message = refused(directory)
    assert "merges.txt: " in message
    assert words in message


@pytest.mark.parametrize("content", [{"a": "0"}, {"a": True}, {"a": -1}])
def test_vocab_is_broken(content: Any, tmp_path: Path) -> None:
    directory = of_case(BYTE_LEVEL, tmp_path, "merges.txt")
    write_json(directory / "vocab.json", content)
    assert "every value must be an id" in refused(directory)


def test_tokenizer_config_is_of_another_shape(tmp_path: Path) -> None:
    directory = of_case(SENTENCEPIECE, tmp_path)
    write_json(directory / "tokenizer_config.json", {"added_tokens_decoder": ["<s>"]})
    assert "tokenizer_config.json is not in the known format" in refused(directory)
