"""Reads tokenizer.json, the format of the `tokenizers` library; what is not implemented is refused by name."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from reference_impl.tokenizer import byte_level_bpe, sentencepiece_bpe
from reference_impl.tokenizer.sentencepiece_bpe import BYTE_PIECE, SPACE, Kind, Prefix

Json = Mapping[str, Any]
# No vocabulary is larger; an id of 10¹² is damage, and a list of so many pieces would take all memory.
MOST_IDS = 1 << 24


def sentencepiece(content: Json) -> sentencepiece_bpe.Vocabulary:
    """SentencePiece's BPE as the library writes it: pairs instead of scores, the dummy prefix as a normalizer (before
    every part of a text) or as a pre-tokenizer (as `prepend_scheme` says, but never before a space).

    Raises: ValueError for what is not implemented; KeyError, TypeError, AttributeError for another format.
    """
    model = _model(content)
    added = _added_tokens(content)
    size = 1 + max([*model["vocab"].values(), *(token["id"] for token in added.values())], default=-1)
    pieces, kinds = [""] * size, [Kind.CONTROL] * size
    for piece, i in model["vocab"].items():
        is_byte = model.get("byte_fallback") and BYTE_PIECE.fullmatch(piece)
        pieces[i], kinds[i] = piece, Kind.BYTE if is_byte else Kind.NORMAL
    for text, token in added.items():
        pieces[token["id"]], kinds[token["id"]] = text, Kind.CONTROL if token.get("special") else Kind.NORMAL
    if model.get("unk_token") is not None:
        kinds[model["vocab"][model["unk_token"]]] = Kind.UNKNOWN
    if not (model.get("fuse_unk") or model.get("byte_fallback")):
        raise ValueError("fuse_unk must be true where there is no byte_fallback, as SentencePiece has it")
    merges = _merges(model)
    for number, (left, right) in enumerate(merges, start=1):
        if not {left, right, left + right} <= model["vocab"].keys():
            raise ValueError(f"merge {number}, {left!r} with {right!r}: all of it and both parts must be tokens")
    begin, end = _around(content)
    prefix, before_space = _prefix(content)
    return sentencepiece_bpe.Vocabulary(
        pieces=pieces, kinds=kinds, rank=sentencepiece_bpe.by_merges(merges), begin=begin, end=end,
        added={text: token["id"] for text, token in added.items() if not token.get("special")},
        prefix=prefix, prefix_before_space=before_space,
    )  # fmt: skip


def byte_level(content: Json) -> byte_level_bpe.Vocabulary:
    """GPT-2's BPE as the library writes it.  Raises: as `sentencepiece`."""
    model, settings = _model(content), content["pre_tokenizer"]
    if content.get("normalizer"):
        raise ValueError(f"a normalizer {content['normalizer']['type']}: GPT-2 has none, none is implemented")
    if not settings.get("use_regex", True):
        raise ValueError("use_regex must be true: only GPT-2's own pattern is implemented")
    added = _added_tokens(content)
    begin, end = _around(content)
    return byte_level_bpe.Vocabulary(
        tokens=model["vocab"], merges=_merges(model),
        specials={text: token["id"] for text, token in added.items() if token.get("special")},
        added={text: token["id"] for text, token in added.items() if not token.get("special")},
        begin=begin, end=end, add_prefix_space=settings["add_prefix_space"],
    )  # fmt: skip


def _model(content: Json) -> Json:
    model: Json = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"a model of type {model['type']}: only BPE is implemented")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            raise ValueError(f"{key}={model[key]!r} is not implemented")
    if not all(map(_is_id, model["vocab"].values())):
        raise ValueError(f"every value of model.vocab must be an id, an integer of 0 … {MOST_IDS - 1}")
    return model


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST_IDS


def _merges(model: Json) -> list[tuple[str, str]]:
    """The pairs, written as ["a", "b"] or, by older versions, as "a b"."""
    found = []
    for number, entry in enumerate(model["merges"], start=1):
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if len(pair) != 2:
            raise ValueError(f"merge {number} is {entry!r}: wanted two tokens")
        found.append((pair[0], pair[1]))
    return found


def _added_tokens(content: Json) -> dict[str, Json]:
    found = {token["content"]: token for token in content.get("added_tokens") or []}
    for text, token in found.items():
        if not isinstance(text, str) or not _is_id(token["id"]):
            raise ValueError(f"the added token {text!r} has id {token['id']!r}: wanted 0 … {MOST_IDS - 1}, and a text")
        for key in ("lstrip", "rstrip", "single_word"):
            if token.get(key):
                raise ValueError(f"the added token {text!r} has {key}=true, which is not implemented")
        if token.get("normalized") and content.get("normalizer"):
            raise ValueError(f"the added token {text!r} is looked for after normalization, which is not implemented")
    return found


def _prefix(content: Json) -> tuple[Prefix, bool]:
    """Where the dummy prefix goes, and whether before a space too: a normalizer puts it there, a pre-tokenizer not."""
    steps = list(_steps(content.get("normalizer"), "normalizers"))
    before = content.get("pre_tokenizer")
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if before is None and steps in ([prepend, replace], [replace]):
        return "always" if prepend in steps else "never", True
    known = {"type", "replacement", "prepend_scheme", "split"}
    if steps or before is None or before["type"] != "Metaspace" or before["replacement"] != SPACE:
        raise ValueError("neither SentencePiece's way of writing spaces nor GPT-2's: nothing else is implemented")
    scheme = before["prepend_scheme"]
    if before.keys() - known or before["split"] or scheme not in get_args(Prefix):
        raise ValueError(f"a pre-tokenizer {dict(before)}: wanted split=false and one of {get_args(Prefix)}")
    return scheme, False


def _around(content: Json) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts before and after a text."""
    begin: list[int] = []
    end: list[int] = []
    for step in _steps(content.get("post_processor"), "processors"):
        if step["type"] == "ByteLevel":  # trims offsets only
            continue
        if step["type"] != "TemplateProcessing":
            raise ValueError(f"a post-processor {step['type']} is not implemented")
        side = begin
        for item in step["single"]:
            if "Sequence" in item:
                side = end
            else:
                side += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    return tuple(begin), tuple(end)


def _steps(part: Json | None, key: str) -> Iterator[Json]:
    """The steps of a normalizer, post-processor …, one or a sequence."""
    if part is not None and part["type"] == "Sequence":
        for step in part[key]:
            yield from _steps(step, key)
    elif part is not None:
        yield part
