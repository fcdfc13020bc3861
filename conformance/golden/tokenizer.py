"""What a golden case of a tokenizer holds, derived from its recipe and the oracle."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from conformance.families import Tokenizer, TokenizerRecipe, get
from conformance.golden.common import Derived, GoldenError
from conformance.implementations import reference
from conformance.tokenizer import pack_rows, pack_texts, unpack_rows

# group -> what `encode` is told
OPTIONS = {"special_tokens": {"parse_special": True}, "begin_and_end": {"add_special_tokens": True}}
REPLACEMENT = "\ufffd"


def derive(recipe: TokenizerRecipe) -> Derived:
    """Everything that the case holds.  Raises: GoldenError if it does not deserve to be a golden."""
    family: Tokenizer = get(recipe.name.split("/")[0])
    files = family.files(recipe.vocabulary, recipe.settings)
    truth = family.truth(files)
    others = {"reference": reference.tokenizer(recipe.settings, files)}
    if family.second is not None:
        others["second oracle"] = family.second(files)
    inputs: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    agreement: dict[str, dict[str, str]] = {}
    for group, texts in _texts(recipe, truth).items():
        ids = [_encoded(truth, group, text) for text in texts]
        for name, other in others.items():
            theirs = [_encoded(other, group, text) for text in texts]
            agreement.setdefault(group, {})[name] = _agree(recipe, group, name, texts, theirs, ids)
        inputs[f"{group}.texts"], expected[f"{group}.ids"] = pack_texts(texts), pack_rows(ids)
    for group, tokens in recipe.tokens.items():
        rows = _rows(recipe, truth, tokens, with_texts=group == "decode")
        decoded = [truth.decode(row) for row in rows]
        for name, other in others.items():
            theirs_decoded = [other.decode(row) for row in rows]
            agreement.setdefault(group, {})[name] = _agree(recipe, group, name, rows, theirs_decoded, decoded)
        inputs[f"{group}.ids"], expected[f"{group}.texts"] = pack_rows(rows), pack_texts(decoded)
        if group == "decode":
            expected["decode.characters"] = pack_rows([_out_after_each(truth, row) for row in rows])
    wrong, movement = _counterfactuals(recipe, family, expected)
    weights = {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in files.items()}
    provenance = {"oracle_error": {}, "agreement_with_reference": agreement, "movement": movement}
    return Derived(weights, inputs, expected | wrong, provenance)


def _texts(recipe: TokenizerRecipe, truth: Any) -> dict[str, tuple[str, ...]]:
    """The recipe's texts; and, where it is claimed, those of all tokens, of which no text is a part of a character."""
    if "tokenizer.vocabulary" not in recipe.claims:
        return dict(recipe.texts)
    of_tokens = dict.fromkeys(map(truth.text_of, range(truth.size)))
    return {**recipe.texts, "vocabulary": tuple(text for text in of_tokens if text and REPLACEMENT not in text)}


def _encoded(tokenizer: Any, group: str, text: str) -> list[int]:
    return list(tokenizer.encode(text, **OPTIONS.get(group, {})))


def _rows(recipe: TokenizerRecipe, truth: Any, tokens: Iterable[tuple[str, ...]], with_texts: bool) -> list[list[int]]:
    """The rows of ids to decode: as named; and of the encoded texts, in turn whole and without the first id."""
    rows = [[truth.id_of(token) for token in row] for row in tokens]
    texts = [text for group in ("encode", "spaces", "byte_fallback") for text in recipe.texts.get(group, ())]
    for index, text in enumerate(texts if with_texts else ()):
        row = truth.encode(text)[index % 2 :]
        if row not in rows and REPLACEMENT not in truth.decode(row):
            rows.append(row)
    return rows


def _out_after_each(truth: Any, row: list[int]) -> list[int]:
    """How many characters are certain after each id, and at the end."""
    whole = truth.decode(row)
    return [_in_common(whole, truth.decode(row[: n + 1])) for n in range(len(row))] + [len(whole)]


def _in_common(whole: str, text: str) -> int:
    """How many first characters of two texts are equal."""
    return next((i for i, (a, b) in enumerate(zip(whole, text, strict=False)) if a != b), min(len(whole), len(text)))


def _agree(recipe: TokenizerRecipe, group: str, name: str, given: Any, theirs: list[Any], wanted: list[Any]) -> str:
    """How many agree, in words.  Raises: GoldenError where all must and one does not, or all do where some must not."""
    wrong = [entry for entry in zip(given, theirs, wanted, strict=True) if entry[1] != entry[2]]
    disputed = group in recipe.disputed and name != "reference"
    if wrong and not disputed:
        what, got, right = min(wrong, key=lambda entry: len(entry[0]))
        raise GoldenError(
            f"{recipe.name}: oracle and {name} differ on {len(wrong)} of {len(wanted)} in {group}: "
            f"{what!r} gives {got!r}, wanted {right!r}"
        )
    if disputed and not wrong:
        raise GoldenError(f"{recipe.name}: {group} is called disputed, but the {name} agrees")
    return f"{len(wanted) - len(wrong)} of {len(wanted)}"


def _counterfactuals(
    recipe: TokenizerRecipe, family: Tokenizer, expected: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The ids that each known mistake gives, and the largest share of a group's texts that it changes."""
    wrong: dict[str, Tensor] = {}
    movement: dict[str, float] = {}
    for label, settings in recipe.counterfactuals.items():
        other = family.truth(family.files(recipe.vocabulary, settings))
        movement[label] = 0.0
        for group, texts in recipe.texts.items():
            ids = [_encoded(other, group, text) for text in texts]
            packed = pack_rows(ids)
            if packed.equal(expected[f"{group}.ids"]):
                continue
            wrong[f"counterfactual.{label}.{group}.ids"] = packed
            right = unpack_rows(expected[f"{group}.ids"])
            movement[label] = max(movement[label], sum(a != b for a, b in zip(ids, right, strict=True)) / len(ids))
        if not movement[label]:
            raise GoldenError(f"{recipe.name}: {label} changes nothing")
    return wrong, movement
