"""Small vocabularies, trained by the packages themselves on a small text, and the files they are written to.

The text is fixed, the trainers count and draw nothing, so that a vocabulary follows from this file and the package's
version alone.  Files are written anew from pieces, scores and merges, so that no byte depends on the trainer.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conformance.families import Config

SPACE = "▁"
# Sentences and how often each occurs; the counts decide what is merged, and that pairs compete.
CORPUS = (
    ("the quick brown fox jumps over the lazy dog, and the dog does not mind at all.", 9),
    ("there were three others there; the others thought that this was the third of them.", 7),
    ("in the beginning nothing was written, in the end everything had been rewritten.", 6),
    ("it's what they'll say: we're here, I'm sure you've seen it, he'd know.", 5),
    ("reading and writing, reading and rewriting, reordering and ordering the orders.", 5),
    ("internationalisation is an international nation's national notion.", 4),
    ("banana bandana ananas cabana, abab ababa bababa aab abb aabb abba.", 4),
    ("The Start. The Story. The Demand. Some Stars. The Three Stands.", 4),
    ("aa aaa aaaa aaaaa aaaaaa aaaaaaaa aaaaaaaaaaaaaaaa", 3),
    ("Die Straße führt über die Brücke; naïve café, déjà vu, e\u0301te\u0301.", 3),
    ("    for i in range(10):\n        total += values[i] ** 2  # 100 200 2024\n", 6),
    ("if a == b:  return a --- b   ...   x != y        <s> <0x", 4),
    ("你好，世界。 你好 世界 Привет, мир", 2),
)  # fmt: skip
CONTROL = ("<s>", "</s>")


@dataclass(frozen=True)
class Piece:
    """A piece of a SentencePiece model; kind as in the file format: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE."""

    text: str
    score: float
    kind: str


def lines() -> list[str]:
    return [sentence for sentence, count in CORPUS for _ in range(count)]


def trained_pieces(vocab_size: int, *, byte_fallback: bool = True) -> list[Piece]:
    """What SentencePiece's BPE trainer makes of the text: <unk>, <s>, </s>, 256 bytes, merges, characters."""
    from sentencepiece import SentencePieceTrainer
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines()), model_writer=written, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=byte_fallback, character_coverage=1.0, normalization_rule_name="identity", num_threads=1,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True, minloglevel=2,
    )  # fmt: skip
    model = ModelProto.FromString(written.getvalue())
    return [Piece(p.piece, p.score, p.Type.Name(p.type)) for p in model.pieces]


def trained_merges(vocab_size: int) -> list[tuple[str, str]]:
    """What the `tokenizers` package's byte-level BPE trainer makes of the text: pairs, in the characters for bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines(), trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


# --- files of SentencePiece's BPE


def sentencepiece_files(pieces: Sequence[Piece], settings: Config) -> dict[str, bytes]:
    """tokenizer.model, tokenizer.json and tokenizer_config.json, all saying the same."""
    return {
        "tokenizer.model": _model(pieces, settings),
        "tokenizer.json": _json(_sentencepiece_json(pieces, settings)),
        "tokenizer_config.json": _json(_sentencepiece_config(pieces, settings)),
    }


def _model(pieces: Sequence[Piece], settings: Config) -> bytes:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    for piece in pieces:
        kind = ModelProto.SentencePiece.Type.Value(piece.kind)
        model.pieces.add(piece=piece.text, score=piece.score, type=kind)
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = trainer.BPE, len(pieces)
    trainer.byte_fallback = any(piece.kind == "BYTE" for piece in pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = ids["<unk>"], ids["<s>"], ids["</s>"], -1
    normalizer.name, normalizer.precompiled_charsmap = "identity", b""
    normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = settings["add_dummy_prefix"], False
    normalizer.escape_whitespaces = True
    return bytes(model.SerializeToString(deterministic=True))


def _sentencepiece_json(pieces: Sequence[Piece], settings: Config) -> dict[str, Any]:
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    listed = [(p.text, ids[p.text], p.kind != "USER_DEFINED") for p in pieces
              if p.kind in ("UNKNOWN", "CONTROL", "USER_DEFINED")]  # fmt: skip
    normalizer, before = _spaces(settings)
    back: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    back += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if settings["add_dummy_prefix"]:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": any(p.kind == "BYTE" for p in pieces),
        "ignore_merges": False, "vocab": ids, "merges": [list(pair) for pair in _merges(pieces)],
    }  # fmt: skip
    decoder = {"type": "Sequence", "decoders": back}
    return _document(listed, normalizer, before, _template(ids, settings), decoder, model)


def _spaces(settings: Config) -> tuple[Any, Any]:
    """Normalizer and pre-tokenizer: `legacy` puts the prefix before every part of a text, else before the first."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not settings["add_dummy_prefix"]:
        return {"type": "Sequence", "normalizers": [replace]}, None
    if settings["legacy"]:
        return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}, None
    return None, {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """All ways to make a piece out of two, the highest score first; of one piece's, the longest left part first."""
    scores = {p.text: p.score for p in pieces if p.kind == "NORMAL"}
    pairs = [(t[:cut], t[cut:]) for t in scores for cut in range(1, len(t)) if {t[:cut], t[cut:]} <= scores.keys()]
    return sorted(pairs, key=lambda pair: (-scores["".join(pair)], -len(pair[0])))


def _template(ids: dict[str, int], settings: Config) -> Any:
    """The post-processor that puts begin and end tokens around a text."""
    text: list[Any] = [{"Sequence": {"id": "A", "type_id": 0}}]
    second: list[Any] = [{"Sequence": {"id": "B", "type_id": 0}}]
    tokens = {}
    for key in ("bos", "eos"):
        if settings[f"add_{key}_token"]:
            token = settings[f"{key}_token"]
            tokens[token] = {"id": token, "ids": [ids[token]], "tokens": [token]}
            special = [{"SpecialToken": {"id": token, "type_id": 0}}]
            text, second = (special + text, special + second) if key == "bos" else (text + special, second + special)
    if not tokens:
        return None
    return {"type": "TemplateProcessing", "single": text, "pair": text + second, "special_tokens": tokens}


def _sentencepiece_config(pieces: Sequence[Piece], settings: Config) -> dict[str, Any]:
    control = {str(i): _added(p.text, True) for i, p in enumerate(pieces) if p.kind in ("UNKNOWN", "CONTROL")}
    own = {str(i): _added(p.text, False) for i, p in enumerate(pieces) if p.kind == "USER_DEFINED"}
    stated = {key: settings[key] for key in ("legacy", "add_bos_token", "add_eos_token", "bos_token", "eos_token")}
    return {
        "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", **stated,
        "add_prefix_space": settings["add_dummy_prefix"], "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False, "added_tokens_decoder": control | own,
    }  # fmt: skip


# --- files of byte-level BPE


def byte_level_files(
    merges: Sequence[tuple[str, str]],
    special: str,
    added: Sequence[str],
    settings: Config,
    unmerged: Sequence[str] = (),
) -> dict[str, bytes]:
    """vocab.json, merges.txt, tokenizer.json and tokenizer_config.json, all saying the same.

    Ids as GPT-2 has them: 256 bytes, printable ones first, then merges, then the special token, then added ones.
    unmerged: further tokens, to which no merges lead.
    """
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(left + right for left, right in merges)]
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys([*tokens, *unmerged]), special])}
    more = [(text, len(vocabulary) + i, False) for i, text in enumerate(added)]
    prefix = settings["add_prefix_space"]
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocabulary,
        "merges": [list(pair) for pair in merges],
    }  # fmt: skip
    by_bytes = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True}
    listed = [(special, vocabulary[special], True), *more]
    config = {
        "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": prefix, "bos_token": special, "eos_token": special,
        "unk_token": special, "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): _added(text, is_special) for text, i, is_special in listed},
    }  # fmt: skip
    return {
        "vocab.json": _json(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges), ""]).encode(),
        "tokenizer.json": _json(_document(listed, None, by_bytes, by_bytes, by_bytes, model)),
        "tokenizer_config.json": _json(config),
    }


# --- shared


def _document(
    listed: list[tuple[str, int, bool]], normalizer: Any, before: Any, after: Any, back: Any, model: Any
) -> dict[str, Any]:
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, **_added(text, special)} for text, i, special in listed],
        "normalizer": normalizer, "pre_tokenizer": before, "post_processor": after, "decoder": back, "model": model,
    }  # fmt: skip


def _added(text: str, special: bool) -> dict[str, Any]:
    return {
        "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": special,
    }  # fmt: skip


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
