"""A tokenizer as a candidate: what it is told, may return, and what is said of a wrong answer; what cases hold."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conformance import Case, Unsupported, check
from conformance.cases import Manifest, fixtures_directory
from conformance.catalogue import explain
from conformance.families import TOKENIZERS, Tokenizer, TokenizerRecipe, get
from conformance.golden.tokenizer import derive
from conformance.judge import Result
from conformance.report.model import run_document, schema
from conformance.suite.test_tokenizer import drawn_texts
from conformance.tokenizer import pack_rows, pack_texts, unpack_rows, unpack_texts
from tokenizers_by_hand import SentencePieceByHand

PLAIN = "sentencepiece_bpe/plain"
RECIPES = {recipe.name: recipe for name in TOKENIZERS for recipe in get(name).recipes}
every_tokenizer = pytest.mark.parametrize("family", [get(name) for name in TOKENIZERS], ids=TOKENIZERS)
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def judged(load: Callable[[Any], Any], group: str = "encode", case: str = PLAIN) -> Result:
    return check(load, case, f"tokenizer.{group}", "exact")


def around(encode: Callable[..., Any] | None = None, decode: Callable[..., Any] | None = None, **more: Any) -> Any:
    """`load` of the right tokenizer with its `encode` or `decode` in other hands, which get it first."""

    def load(checkpoint: Any) -> Any:
        right = SentencePieceByHand(checkpoint)
        found = SimpleNamespace(encode=right.encode, decode=right.decode, **more)
        if encode:
            found.encode = lambda text: encode(right, text)
        if decode:
            found.decode = lambda ids: decode(right, ids)
        return found

    return load


# --- what it is told


def test_load_is_given_the_files_and_the_config(tmp_path: Path) -> None:
    def load(checkpoint: Any) -> Any:
        assert checkpoint.config["tokenizer"] == "sentencepiece_bpe"
        assert json.loads((checkpoint.path / "config.json").read_text()) == checkpoint.config
        assert {path.name for path in checkpoint.path.iterdir()} == {
            "config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
        }  # fmt: skip
        return SentencePieceByHand(checkpoint)

    assert judged(load).outcome == "pass"


def test_an_object_with_load_is_a_tokenizer_too() -> None:
    class Mine:
        name, families = "mine", frozenset({"sentencepiece_bpe"})

        def load(self, checkpoint: Any) -> Any:
            return SentencePieceByHand(checkpoint)

    assert check(Mine(), PLAIN, "tokenizer.encode", "exact").outcome == "pass"


def test_options_are_told_where_they_are_named() -> None:
    """A tokenizer whose own defaults are others is asked for what the contract means."""

    def load(checkpoint: Any) -> Any:
        right = SentencePieceByHand(checkpoint)

        def encode(text: str, add_special_tokens: bool = True, parse_special: bool = True) -> Any:
            return right.encode(text, add_special_tokens, parse_special)

        def decode(ids: Any, skip_special_tokens: bool = False) -> str:
            assert skip_special_tokens
            return right.decode(ids)

        return SimpleNamespace(encode=encode, decode=decode)

    for group in ("encode", "special_tokens", "begin_and_end", "decode"):
        assert judged(load, group).outcome == "pass"


@pytest.mark.parametrize(("group", "words"), [
    ("special_tokens", "encode takes no parse_special"), ("begin_and_end", "encode takes no add_special_tokens"),
    ("incremental", "the tokenizer has no decoder()"), ("streaming", "the tokenizer has no decoder()"),
])  # fmt: skip
def test_what_is_not_declared_is_unsupported(group: str, words: str) -> None:
    result = judged(around(encode=lambda right, text: right.encode(text)), group)
    assert (result.outcome, result.message) == ("unsupported", words)


def test_unsupported_may_be_raised() -> None:
    def load(checkpoint: Any) -> Any:
        raise Unsupported("reads tekken.json only")

    assert judged(load).outcome == "unsupported"


# --- what it may return


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor, lambda ids: [*np.array(ids)]])
def test_ids_may_come_in_other_containers(kind: Callable[[Any], Any]) -> None:
    nonempty = around(encode=lambda right, text: kind(right.encode(text)) if text else [])
    assert judged(nonempty).outcome == "pass"


@pytest.mark.parametrize("wrong", [None, "text", [1.0], [True], ["▁the"], [[1]], {"input_ids": [1]}])
def test_what_is_no_list_of_integers_is_named(wrong: Any) -> None:
    result = judged(around(encode=lambda right, text: wrong))
    assert (result.outcome, result.kind) == ("fail", "type")
    assert "wanted a list of integers" in result.message


@pytest.mark.parametrize("wrong", [None, b"bytes", ["a"]])
def test_what_is_no_text_is_named(wrong: Any) -> None:
    result = judged(around(decode=lambda right, ids: wrong), "decode")
    assert (result.outcome, result.kind) == ("fail", "type")
    assert "wanted a str" in result.message


def test_an_object_without_decode_is_named() -> None:
    result = judged(lambda checkpoint: SimpleNamespace(encode=list))
    assert (result.outcome, result.kind) == ("fail", "type")
    assert "without decode(…)" in result.message


def test_an_exception_is_an_error_with_the_text_that_it_was_raised_for() -> None:
    result = judged(around(encode=lambda right, text: right.encode(text) if text.isascii() else 1 / 0))
    assert (result.outcome, result.kind) == ("error", "ZeroDivisionError")
    assert "encode('" in result.message


# --- what is said of a wrong answer


def test_the_shortest_wrong_texts_are_shown_with_both_answers() -> None:
    result = judged(around(encode=lambda right, text: [i + (text == "x") for i in right.encode(text)]))
    assert (result.outcome, result.kind, result.judgement) == ("fail", "value", None)
    total = len(unpack_texts(Case(PLAIN).inputs["encode.texts"]))
    assert result.message == f"{total - 1} of {total} texts have the oracle's ids"
    shown, gives, wanted = result.details
    assert shown == "'x'"
    assert gives.split()[0] == "gives"
    assert int(gives.split("[")[1][:-1].split(",")[0]) == int(wanted.split("[")[1][:-1].split(",")[0]) + 1


def test_of_a_long_answer_the_place_of_the_first_difference_is_shown() -> None:
    def encode(right: Any, text: str) -> Any:
        ids = right.encode(text)
        return [*ids[:20], 0, *ids[21:]] if len(text) > 1000 else ids

    _, gives, wanted = judged(around(encode=encode), "runs").details
    assert "… [" in gives
    assert "0" in gives
    assert "… [" in wanted


def test_a_failure_of_another_check_points_to_encode() -> None:
    from conformance.cases import Claim
    from conformance.implementation import adopt
    from conformance.judge import Judge, judge
    from conformance.suite import checks

    session = Judge(adopt("", around(encode=lambda right, text: [])), Case(PLAIN), "exact", "cpu")
    results = [
        judge(checks()[name], Claim(PLAIN, name, "exact"), lambda: session)
        for name in ("tokenizer.encode", "tokenizer.spaces")
    ]
    assert results[1].notes == ["tokenizer.encode fails as well; see there first"]


def test_a_run_of_exact_claims_is_as_the_schema_says() -> None:
    import jsonschema

    result = judged(around(encode=lambda right, text: [])).to_json()
    described = {"implementation": {"spec": "", "name": "", "families": None, "dtypes": []}, "environment": {}}
    selection: dict[str, list[str]] = {"family": [], "case": [], "check": [], "dtype": []}
    document = run_document(described, [result], 1, selection, "cpu", None)
    jsonschema.validate(document, schema())
    document["claims"][0]["dtype"] = "approximate"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema())


# --- cases


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=5))
def test_texts_are_packed_and_unpacked(texts: list[str]) -> None:
    assert unpack_texts(pack_texts(texts)) == texts


@given(st.lists(st.lists(st.integers(0, 32767), max_size=4), max_size=5))
def test_rows_are_packed_and_unpacked(rows: list[list[int]]) -> None:
    assert unpack_rows(pack_rows(rows)) == rows


@every_recipe
def test_claims_are_exact_and_each_has_what_it_needs(recipe: TokenizerRecipe) -> None:
    case = Case(recipe.name)
    for name, dtypes in recipe.claims.items():
        group = name.removeprefix("tokenizer.")
        assert dtypes == ("exact",)
        needed = {"round_trip": None, "incremental": "decode.ids", "streaming": "decode.ids", "decode": "decode.ids",
                  "invalid_bytes": "invalid_bytes.ids"}.get(group, f"{group}.texts")  # fmt: skip
        assert needed is None or case.inputs[needed].numel()


@every_recipe
def test_everything_that_a_case_holds_is_claimed(recipe: TokenizerRecipe) -> None:
    groups = {name.split(".")[0] for name in Case(recipe.name).inputs}
    assert groups <= {name.removeprefix("tokenizer.") for name in recipe.claims}


@every_tokenizer
def test_the_first_case_is_plain_and_has_every_check_that_any_has(family: Tokenizer) -> None:
    assert family.recipes[0].name == f"{family.name}/plain"
    assert all(recipe.claims.keys() <= family.recipes[0].claims.keys() for recipe in family.recipes)


@every_tokenizer
def test_fixtures_of_a_tokenizer_stay_small(family: Tokenizer) -> None:
    files = [path for path in Path(fixtures_directory(), family.name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 230_000


@every_tokenizer
def test_every_tokenizer_has_claims(family: Tokenizer) -> None:
    assert family.name in {claim.family for claim in Manifest().claims()}


def test_files_are_shared_between_cases_and_come_back_as_they_are(tmp_path: Path) -> None:
    plain, other = Case(PLAIN), Case("sentencepiece_bpe/field-add_eos_token")
    assert other.shared["tokenizer.model"] == PLAIN
    other.export(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == plain.files["tokenizer.model"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_eos_token"] is True


def test_only_a_tokenizer_has_files() -> None:
    assert Case("rms_norm/plain").files == {}


def test_drawn_texts_are_the_same_for_everyone() -> None:
    texts = drawn_texts("sentencepiece_bpe", 500)
    assert texts == drawn_texts("sentencepiece_bpe", 500) != drawn_texts("byte_level_bpe", 500)
    everything = "".join(texts)
    assert {"\x00", " ", "a", "\u0301"} <= {*everything}
    assert max(map(ord, everything)) > 0xF0000
    assert not any(0xD800 <= ord(c) < 0xE000 for c in everything)
    assert sum(text.startswith(" ") for text in texts) > 20


def test_characters_of_cases_are_older_than_what_versions_of_unicode_dispute() -> None:
    """All were assigned in Unicode 3.2 already or are private or pictures; the classes of letters are then the same."""
    from unicodedata import category, ucd_3_2_0

    held = {c for recipe in get("byte_level_bpe").recipes for texts in recipe.texts.values() for c in "".join(texts)}
    new = {c for c in held if ucd_3_2_0.category(c) == "Cn" and category(c)[0] in "LN"}
    assert new <= {"ẞ"}  # of Unicode 5.1


@every_tokenizer
def test_explain_prints_the_contract(family: Tokenizer) -> None:
    text = explain(family.name)
    for words in ("tokenizer.encode(text) -> ids", "parse_special", "d.finish()", family.recipes[-1].summary):
        assert words in text
    assert f"Cases that move it: {family.recipes[-1].name}" in explain(f"{family.name}.{family.fields[-1].name}")


# --- what deserves to be a golden


def test_a_case_in_which_a_package_differs_is_refused_unless_disputed(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from conformance.golden import GoldenError

    disputed = RECIPES["sentencepiece_bpe/user-defined"]
    with pytest.raises(
        GoldenError, match=r"oracle and second oracle differ on . of 7 in encode: '\[DOC_1\]' gives \[3\]"
    ):
        derive(dataclasses.replace(disputed, disputed=frozenset()))


def test_what_is_called_disputed_must_be() -> None:
    import dataclasses

    from conformance.golden import GoldenError

    agreed = dataclasses.replace(RECIPES["sentencepiece_bpe/field-add_bos_token"], disputed=frozenset({"encode"}))
    with pytest.raises(GoldenError, match="encode is called disputed, but the second oracle agrees"):
        derive(agreed)


def test_a_field_that_changes_nothing_is_refused() -> None:
    import dataclasses

    from conformance.golden import GoldenError

    recipe = RECIPES["sentencepiece_bpe/field-legacy"]
    recipe = dataclasses.replace(
        recipe, texts={"encode": ("a",)}, claims={"tokenizer.encode": ("exact",)}, disputed=frozenset()
    )
    with pytest.raises(GoldenError, match="legacy ignored changes nothing"):
        derive(recipe)


def test_a_reference_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from conformance.golden import GoldenError
    from conformance.implementations import reference

    monkeypatch.setattr(reference, "tokenizer", lambda config, files: SimpleNamespace(encode=lambda text: [0]))
    with pytest.raises(GoldenError, match="oracle and reference differ"):
        derive(RECIPES["byte_level_bpe/field-add_prefix_space"])


def test_the_reference_declares_what_it_cannot_do_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from conformance.implementations import reference

    monkeypatch.setattr(reference, "find_spec", lambda name: None)
    result = check(reference.IMPLEMENTATIONS["reference"], PLAIN, "tokenizer.encode", "exact")
    assert (result.outcome, "`tokenizer` extra" in result.message) == ("unsupported", True)
    assert (
        check(reference.IMPLEMENTATIONS["reference"], "byte_level_bpe/plain", "tokenizer.encode", "exact").outcome
        == "pass"
    )
