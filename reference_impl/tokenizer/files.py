"""Reads tokenizers from checkpoint directories: tokenizer.model, tokenizer.json, or vocab.json with merges.txt.

Beside tokenizer.model or vocab.json, tokenizer_config.json says which tokens go around a text (`add_bos_token`,
`add_eos_token`), which are special or added (`added_tokens_decoder`), and whether text behind a special token gets the
dummy prefix too (`legacy`). tokenizer.json says everything itself.
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
    except (KeyError, TypeError, AttributeError) as error:  # JSON of another shape
        fault = f"it or {CONFIG} is not in the known format ({type(error).__name__}: {error})"
        raise TokenizerError(directory / chosen, fault) from error


def _config(directory: Path) -> dict[str, Any]:
    return _read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}


def _around(config: Mapping[str, Any], ids: Mapping[str, int], key: str, default: bool) -> tuple[int, ...]:
    """The ids of "bos", before a text, or "eos", after it, if tokenizer_config.json wants them.

    Raises: ValueError for a token that is not in the vocabulary.
    """
    if not config.get(f"add_{key}_token", default):
        return ()
    text = _text_of(config.get(f"{key}_token"))
    if text not in ids:
        raise ValueError(f"add_{key}_token wants {key}_token={text!r}, which is not in the vocabulary")
    return (ids[text],)


def _text_of(token: Any) -> str:
    """The text of a token that tokenizer_config.json gives as such, or with its properties."""
    return str(token["content"] if isinstance(token, Mapping) else token)


def _listed(config: Mapping[str, Any], *, special: bool) -> dict[str, int]:
    """The special, or the other added tokens that tokenizer_config.json lists: text → id."""
    listed = config.get("added_tokens_decoder", {})
    return {entry["content"]: int(i) for i, entry in listed.items() if bool(entry.get("special")) == special}


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
            specials={text: i for text, i in _listed(config, special=True).items() if text in ids},
            prefix=prefix if model.normalizer_spec.add_dummy_prefix else "never",
            unknown_surface=model.trainer_spec.unk_surface,
            begin=_around(config, ids, "bos", default=True),
            end=_around(config, ids, "eos", default=False),
        )
    )


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
    if (content.get("pre_tokenizer") or {}).get("type") == "ByteLevel":
        return ByteLevelBPE(byte_level(content))
    return SentencePieceBPE(sentencepiece(content))


# --- vocab.json and merges.txt


def _from_vocab(directory: Path) -> ByteLevelBPE:
    """GPT-2's two files."""
    tokens = _read_json(directory / VOCAB)
    if not all(type(i) is int and i >= 0 for i in tokens.values()):
        raise TokenizerError(directory / VOCAB, "every value must be an id, an integer from 0")
    config = _config(directory)
    special = _text_of(config.get("eos_token", "<|endoftext|>"))
    return ByteLevelBPE(
        byte_level_bpe.Vocabulary(
            tokens=tokens,
            merges=read_merges(directory / MERGES),
            specials={**_listed(config, special=True), **({special: tokens[special]} if special in tokens else {})},
            added=_listed(config, special=False),
            add_prefix_space=config.get("add_prefix_space", False),
            begin=_around(config, tokens, "bos", default=False),
            end=_around(config, tokens, "eos", default=False),
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
    except (json.JSONDecodeError, RecursionError) as error:
        raise TokenizerError(file, f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(file, f"holds a {type(content).__name__}: wanted an object")
    return content
