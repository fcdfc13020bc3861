"""Directories with tokenizer files for tests: the cases', real vocabularies, and small ones made on the spot."""

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from conformance import Case


def of_case(case: str, directory: Path, *files: str) -> Path:
    """The tokenizer files of a case, all or those named."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in Case(case).files.items():
        if not files or name in files:
            (directory / name).write_bytes(content)
    return directory


def mistral(directory: Path, name: str) -> Path:
    """A real vocabulary of Mistral's, from mistral-common's files; the package need not be imported."""
    spec = find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("mistral-common is not installed, so that no real vocabulary is at hand")
    content = Path(spec.origin).with_name("data").joinpath(name).read_bytes()
    (directory / "tokenizer.model").write_bytes(content)
    return directory


def sentencepiece_model(directory: Path, pieces: Iterable[tuple[str, float, str]], **settings: Any) -> Path:
    """tokenizer.model of (piece, score, kind); settings of the normalizer and trainer by name."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=ModelProto.SentencePiece.Type.Value(kind))
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.normalizer_spec.remove_extra_whitespaces = False
    for name, value in settings.items():
        spec = model.trainer_spec if hasattr(model.trainer_spec, name) else model.normalizer_spec
        setattr(spec, name, value)
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())
    return directory


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
