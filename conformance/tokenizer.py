"""A candidate for a tokenizer: what `load(checkpoint)` returns has `encode` and `decode`.

The contract in full is `conformance.families.texts.CONTRACT`, which `conformance explain sentencepiece_bpe` prints.
"""

import inspect
from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any

from conformance.implementation import Checkpoint, Implementation, Misbehaviour, Unsupported, running

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.cases import Case

# What ends a text and a row of ids in a tensor: neither UTF-8 nor a vocabulary has it.
END_OF_TEXT, END_OF_ROW = 0xFF, -1
# Told to `encode` explicitly where it names them.
ENCODE_OPTIONS = ("add_special_tokens", "parse_special")


def pack_texts(texts: Iterable[str]) -> "Tensor":
    """Texts as one tensor of bytes."""
    import torch

    data = b"".join(text.encode() + bytes([END_OF_TEXT]) for text in texts)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def unpack_texts(packed: "Tensor") -> list[str]:
    return [text.decode() for text in packed.numpy().tobytes().split(bytes([END_OF_TEXT]))[:-1]]


def pack_rows(rows: Iterable[list[int]]) -> "Tensor":
    """Rows of ids below 32,768 as one tensor."""
    import torch

    return torch.tensor([i for row in rows for i in (*row, END_OF_ROW)], dtype=torch.int16)


def unpack_rows(packed: "Tensor") -> list[list[int]]:
    rows: list[list[int]] = [[]]
    for i in packed.tolist():
        if i == END_OF_ROW:
            rows.append([])
        else:
            rows[-1].append(i)
    return rows[:-1]


class TokenizerCandidate:
    """A tokenizer behind the contract: passes what is declared, checks the kind of what comes back.

    calls: how often it has been asked for something.
    """

    def __init__(self, implementation: Implementation, case: "Case"):
        import torch

        self.calls = 0
        self.checkpoint = Checkpoint(case.config, {}, torch.float32, torch.device("cpu"), case.files)
        with running("load(checkpoint)"):
            self.tokenizer = implementation.load(self.checkpoint)
        for method in ("encode", "decode"):
            if not callable(getattr(self.tokenizer, method, None)):
                raise Misbehaviour("type", f"load returned a {type(self.tokenizer).__name__} without {method}(…)")
        self.declared = {method: _named(getattr(self.tokenizer, method)) for method in ("encode", "decode")}

    def encode(self, text: str, **wanted: bool) -> list[int]:
        """The ids of a text.  Raises: Unsupported if `encode` does not name an option that is wanted."""
        self.calls += 1
        declared = self.declared["encode"]
        if missing := [option for option in wanted if option not in declared]:
            raise Unsupported(f"encode takes no {missing[0]}")
        options = {option: wanted.get(option, False) for option in ENCODE_OPTIONS if option in declared}
        with running(f"encode({_shown(text)})"):
            returned = self.tokenizer.encode(text, **options)
        return _ids(returned)

    def decode(self, ids: list[int]) -> str:
        self.calls += 1
        options = {"skip_special_tokens": True} if "skip_special_tokens" in self.declared["decode"] else {}
        with running(f"decode({_shown(ids)})"):
            returned = self.tokenizer.decode(list(ids), **options)
        return _text(returned, "decode")

    def stream(self, ids: list[int]) -> list[str]:
        """What an incremental decoder gives after each id, and at the end.  Raises: Unsupported if there is none."""
        self.calls += 1
        if not hasattr(self.tokenizer, "decoder"):
            raise Unsupported("the tokenizer has no decoder()")
        with running(f"decoder(), fed {_shown(ids)}"):
            decoder = self.tokenizer.decoder()
            *fed, rest = [*map(decoder.feed, ids), decoder.finish()]
        return [*(_text(text, "feed") for text in fed), _text(rest, "finish")]


def _named(method: Any) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(method).parameters)
    except (TypeError, ValueError):
        return frozenset()


def _ids(returned: Any) -> list[int]:
    ids = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(ids, list | tuple) or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids):
        raise Misbehaviour("type", f"encode returned {_shown(returned)}, wanted a list of integers")
    return [int(i) for i in ids]


def _text(returned: Any, method: str) -> str:
    if not isinstance(returned, str):
        raise Misbehaviour("type", f"{method} returned {_shown(returned)}, wanted a str")
    return returned


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
