"""The packages that decide about tokenizers, behind one interface: `encode`, `decode`, `id_of`, `text_of`, `size`."""

import json
from typing import Any


class SentencePiece:
    """The `sentencepiece` package on tokenizer.model.

    It knows no special tokens in text; a text is cut at them here, and each part encoded by the package, with the dummy
    prefix or (`legacy` false, not at the start) by the same model with `add_dummy_prefix` off.
    """

    def __init__(self, files: dict[str, bytes]):
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        model = ModelProto.FromString(files["tokenizer.model"])
        self.config = json.loads(files["tokenizer_config.json"])
        self.size = len(model.pieces)
        self.ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
        self.specials = [p.piece for p in model.pieces if p.type in (p.UNKNOWN, p.CONTROL)]
        self.processor = SentencePieceProcessor(model_proto=files["tokenizer.model"])
        model.normalizer_spec.add_dummy_prefix = False
        self.without_prefix = SentencePieceProcessor(model_proto=model.SerializeToString())

    def encode(self, text: str, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        ids: list[int] = []
        for start, part, special in parts(text, self.specials if parse_special else []):
            prefixed = start == 0 or self.config["legacy"]
            processor = self.processor if prefixed else self.without_prefix
            ids += [self.ids[part]] if special else processor.encode(part)
        around = [[self.ids[self.config[f"{key}_token"]]] * self.config[f"add_{key}_token"] for key in ("bos", "eos")]
        return [*around[0], *ids, *around[1]] if add_special_tokens else ids

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)  # type: ignore[no-any-return]

    def id_of(self, token: str) -> int:
        return self.ids[token]

    def text_of(self, i: int) -> str:
        """A token's text without spaces in front, which a dummy prefix may swallow."""
        return self.decode([i]).lstrip(" ")


class Library:
    """The `tokenizers` package on tokenizer.json."""

    def __init__(self, files: dict[str, bytes]):
        from tokenizers import Tokenizer

        self.tokenizer: Any = Tokenizer.from_str(files["tokenizer.json"].decode())
        self.size: int = self.tokenizer.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        self.tokenizer.encode_special_tokens = not parse_special
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids  # type: ignore[no-any-return]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[no-any-return]

    def id_of(self, token: str) -> int:
        return self.tokenizer.token_to_id(token)  # type: ignore[no-any-return]

    def text_of(self, i: int) -> str:
        return self.decode([i])


def parts(text: str, specials: list[str]) -> list[tuple[int, str, bool]]:
    """A text cut at special tokens, the longest that fits first: where each part starts, the part, whether special."""
    found: list[tuple[int, str, bool]] = []
    start = position = 0
    while position < len(text):
        fitting = [special for special in specials if text.startswith(special, position)]
        if not fitting:
            position += 1
            continue
        longest = max(fitting, key=len)
        found += [(start, text[start:position], False)] * (position > start) + [(position, longest, True)]
        start = position = position + len(longest)
    return found + [(start, text[start:], False)] * (start < len(text))
