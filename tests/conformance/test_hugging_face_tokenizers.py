"""The installed library's tokenizers, judged as any other: what they fail is known, and each cause is shown by hand."""

from pathlib import Path
from typing import Any

import pytest

from conformance import Case, check
from conformance.cases import Manifest
from conformance.implementations.hf import IMPLEMENTATIONS

HF = IMPLEMENTATIONS["hf"]
# transformers 5.23.0: LlamaTokenizer builds a pipeline of its own and leaves tokenizer.json's normalizer aside.
SPACE_LOST = {"spaces", "special_tokens", "runs", "round_trip"}
KNOWN = {
    *((case, check) for case in ("plain", "distinct") for check in (*SPACE_LOST, "invalid_bytes")),
    ("user-defined", "encode"),
    ("field-byte_fallback", "encode"),
    ("field-legacy", "spaces"),
}


def failing(family: str) -> set[tuple[str, str]]:
    claims = [claim for claim in Manifest().claims() if claim.family == family]
    results = [check(HF, claim.case, claim.check, claim.dtype) for claim in claims]
    assert {result.outcome for result in results} <= {"pass", "fail"}
    return {(r.claim.case.split("/")[1], r.claim.check.split(".")[1]) for r in results if r.outcome == "fail"}


def test_gpt2s_tokenizer_passes_every_claim() -> None:
    assert failing("byte_level_bpe") == set()


def test_llamas_tokenizer_fails_what_is_known() -> None:
    assert failing("sentencepiece_bpe") == KNOWN


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer") / "plain"
    Case("sentencepiece_bpe/plain").export(directory)
    return directory


def test_llamas_tokenizer_loses_a_space_that_tokenizer_json_keeps(plain: Path) -> None:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(plain)
    assert theirs.encode(" the", add_special_tokens=False) == theirs.encode("the", add_special_tokens=False)
    assert theirs.decode(theirs.encode(" the", add_special_tokens=False)) == "the"
    from_json = Tokenizer.from_file(str(plain / "tokenizer.json")).encode(" the", add_special_tokens=False).ids
    assert from_json == SentencePieceProcessor(model_file=str(plain / "tokenizer.model")).encode(" the")
    assert from_json != theirs.encode(" the", add_special_tokens=False)


def test_a_wrong_byte_takes_a_valid_character_with_it(plain: Path) -> None:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    ids = [3 + byte for byte in (0xE4, 0xBD, 0xA0, 0xFF)]
    assert SentencePieceProcessor(model_file=str(plain / "tokenizer.model")).decode(ids) == "你\ufffd"
    assert Tokenizer.from_file(str(plain / "tokenizer.json")).decode(ids) == "\ufffd" * 4


def test_without_byte_pieces_an_unknown_character_vanishes(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    Case("sentencepiece_bpe/field-byte_fallback").export(tmp_path / "case")
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "case")
    assert theirs.encode("a🙂b", add_special_tokens=False) == theirs.encode("ab", add_special_tokens=False)
