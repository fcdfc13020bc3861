"""Reads tokenizers from checkpoint directories: tokenizer.model, tokenizer.json, or vocab.json with merges.txt.

tokenizer_config.json, where there is one, says which tokens go around a text (`add_bos_token`, `add_eos_token`; of
tokenizer.json its post-processor does) and, for tokenizer.model, whether parts of a text behind a special token get the dummy prefix too (`legacy`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reference_impl.tokenizer import byte_level_bpe, sentencepiece_bpe
from reference_impl.tokenizer.byte_level_bpe import ByteLevelBPE
from reference_impl.tokenizer.sentencepiece_bpe import SentencePieceBPE

MODEL, JSON, VOCAB, MERGES, CONFIG = (
    "tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"
)  # fmt: skip


class TokenizerError(ValueError):
    """A tokenizer cannot be read: names the file and what is wrong with it."""

    def __init__(self, file: Path, fault: str) -> None:
        super().__init__(f"{file}: {fault}")


def load_tokenizer(path: str | Path, file: str | None = None) -> SentencePieceBPE | ByteLevelBPE:
    """The tokenizer of a checkpoint directory.

    Args:
        file: which file to read; None: the first there is of tokenizer.model, tokenizer.json, vocab.json.

    Raises:
        TokenizerError: no such file, or it cannot be read, or asks for something that is not implemented.
    """
    directory = Path(path)
    present = [name for name in (MODEL, JSON, VOCAB) if (directory / name).is_file()]
    chosen = file or next(iter(present), None)
    if chosen is None:
        raise TokenizerError(directory, f"no tokenizer here: wanted {MODEL}, {JSON}, or {VOCAB} with {MERGES}")
    readers = {MODEL: _from_model, JSON: _from_json, VOCAB: _from_vocab}
    if chosen not in readers:
        raise TokenizerError(directory / chosen, f"not a tokenizer's file: wanted one of {', '.join(readers)}")
    try:
        return readers[chosen](directory)
    except TokenizerError:
        raise
    except ValueError as error:
        raise TokenizerError(directory / chosen, str(error)) from error


def _config(directory: Path) -> dict[str, Any]:
    return _read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}


def _around(config: Mapping[str, Any], ids: Mapping[str, int], **default: bool) -> dict[str, tuple[int, ...]]:
    """The ids before and after a text, as tokenizer_config.json says.  Raises: ValueError for an unknown token."""
    found = {}
    for where, key in (("begin", "bos"), ("end", "eos")):
        token = config.get(f"{key}_token")
        text = token["content"] if isinstance(token, Mapping) else token
        wanted = config.get(f"add_{key}_token", default[key])
        if wanted and text not in ids:
            raise ValueError(f"add_{key}_token wants {key}_token={text!r}, which is not in the vocabulary")
        found[where] = (ids[text],) if wanted else ()
    return found


# --- tokenizer.model


def _from_model(directory: Path) -> SentencePieceBPE:
    """SentencePiece's own file, a protocol buffer (sentencepiece_model.proto)."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except ImportError as error:
        raise TokenizerError(
            directory / MODEL, f"needs sentencepiece and protobuf ({error.name} is missing): pip install sentencepiece "
            f"protobuf, or read another file: load_tokenizer(path, {JSON!r})"
        ) from error  # fmt: skip
    model = ModelProto()
    try:
        model.ParseFromString(_read(directory / MODEL))
    except DecodeError as error:
        raise TokenizerError(directory / MODEL, f"corrupt or cut short, or no SentencePiece model: {error}") from error
    _require_supported(model)
    pieces = [piece.piece for piece in model.pieces]
    ids = {piece: i for i, piece in enumerate(pieces)}
    if len(ids) < len(pieces):
        raise ValueError(f"{len(pieces) - len(ids)} pieces occur twice")
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type in (1, 4)}
    named = {"bos_token": model.trainer_spec.bos_piece, "eos_token": model.trainer_spec.eos_piece}
    config = named | {key: value for key, value in _config(directory).items() if value is not None}
    prefix: sentencepiece_bpe.Prefix = "always" if config.get("legacy", True) else "first"
    return SentencePieceBPE(
        sentencepiece_bpe.Vocabulary(
            pieces=pieces,
            kinds=[sentencepiece_bpe.Kind(piece.type) for piece in model.pieces],
            rank=sentencepiece_bpe.by_score(scores),
            specials=_added(config, ids),
            prefix=prefix if model.normalizer_spec.add_dummy_prefix else "never",
            unknown_surface=model.trainer_spec.unk_surface,
            **_around(config, ids, bos=True, eos=False),
        )
    )


def _added(config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """Special tokens that only tokenizer_config.json knows to be special."""
    listed = config.get("added_tokens_decoder", {})
    return {entry["content"]: ids[entry["content"]] for entry in listed.values() if entry.get("content") in ids}


def _require_supported(model: Any) -> None:
    """Raises ValueError for what Llama's and Mistral's models do not use."""
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    if not model.pieces:
        raise ValueError("no pieces: this is no SentencePiece model")
    if trainer.model_type != trainer.BPE:
        name = trainer.ModelType.Name(trainer.model_type).lower()
        raise ValueError(f"a SentencePiece model of type {name}: only bpe is implemented")
    if normalizer.precompiled_charsmap:
        raise ValueError(f"normalises text by {normalizer.name!r}: only identity is implemented")
    if normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        raise ValueError("remove_extra_whitespaces must be false and escape_whitespaces true, as Llama has them")
    if trainer.treat_whitespace_as_suffix:
        raise ValueError("treat_whitespace_as_suffix must be false, as Llama has it")
    if any(piece.type == piece.UNUSED for piece in model.pieces):
        raise ValueError("unused pieces are not implemented")


# --- tokenizer.json


def _from_json(directory: Path) -> SentencePieceBPE | ByteLevelBPE:
    """The file of the `tokenizers` library.  Its kind is told by what it does before merging."""
    from reference_impl.tokenizer.tokenizer_json import byte_level, sentencepiece

    content = _read_json(directory / JSON)
    try:
        if (content.get("pre_tokenizer") or {}).get("type") == "ByteLevel":
            return ByteLevelBPE(byte_level(content))
        return SentencePieceBPE(sentencepiece(content))
    except (KeyError, TypeError, AttributeError) as error:
        fault = f"not in the library's format ({type(error).__name__}: {error})"
        raise TokenizerError(directory / JSON, fault) from error


# --- vocab.json and merges.txt


def _from_vocab(directory: Path) -> ByteLevelBPE:
    """GPT-2's two files."""
    tokens = _read_json(directory / VOCAB)
    if not all(type(i) is int and i >= 0 for i in tokens.values()):
        raise TokenizerError(directory / VOCAB, "every value must be an id, an integer from 0")
    config = _config(directory)
    special = config.get("eos_token", "<|endoftext|>")
    special = special["content"] if isinstance(special, Mapping) else special
    return ByteLevelBPE(
        byte_level_bpe.Vocabulary(
            tokens=tokens,
            merges=read_merges(directory / MERGES),
            specials={special: tokens[special]} if special in tokens else {},
            add_prefix_space=config.get("add_prefix_space", False),
            **_around(config, tokens, bos=False, eos=False),
        )
    )


def read_merges(file: Path) -> Sequence[tuple[str, str]]:
    """merges.txt: a header line that begins with "#version", then one pair a line, parted by one space.

    Not by any white space: U+00A0 or U+2028 may be a part of a token.
    """
    lines = _read_text(file).split("\n")
    first = 1 if lines[0].startswith("#version") else 0
    pairs = []
    for number, line in enumerate(lines[first:], start=first + 1):
        pair = line.removesuffix("\r").split(" ")
        if pair == [""]:
            continue
        if len(pair) != 2 or not all(pair):
            raise TokenizerError(file, f"line {number} is {line!r}: wanted two tokens with a space between")
        pairs.append((pair[0], pair[1]))
    return pairs


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TokenizerError(file, f"cannot be read: {error.strerror}") from error


def _read_text(file: Path) -> str:
    try:
        return _read(file).decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(file, f"not UTF-8: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise TokenizerError(file, f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(file, f"holds a {type(content).__name__}: wanted an object")
    return content
