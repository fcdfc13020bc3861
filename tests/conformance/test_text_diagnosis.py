"""Mistakes written into tokenizers that share no code with the reference are named; what is in no entry is not."""

import re
from typing import Any

import pytest
from test_tokenizer_mistakes import (
    BYTE_LEVEL,
    SENTENCEPIECE,
    by_hand,
    byte_level,
    byte_level_by_hand,
    code_points,
    first_possible,
    nfkc,
    prefix_twice,
    sentencepiece,
    special_always_parsed,
    until_nul,
)

from conformance.cases import Case, Claim
from conformance.diagnosis import both, hypotheses, of_mistake
from conformance.implementation import adopt
from conformance.judge import Answers, Judge, Result, judge
from conformance.mistakes import get as get_mistake
from conformance.mutation import mutant
from conformance.suite import checks
from conformance.text_diagnosis import Search, Simulator, Tokenizers
from tokenizers_by_hand import ByteLevelByHand, SentencePieceByHand

PLAIN = "sentencepiece_bpe/plain"
CASES: dict[str, Case] = {}

# Mistake of the tables -> the catalogue's entry.  What is not here is in no entry.
ENTRIES = {
    "sentencepiece_bpe": {
        "tok-dummy-prefix": "tok-dummy-prefix",
        "tok-dummy-prefix, twice": "tok-prefix-twice",
        "tok-dummy-prefix, on the empty text": "tok-prefix-on-nothing",
        "no prefix before a space": "tok-prefix-not-before-space",
        "tok-prefix-after-special, missing": "tok-prefix-after-special",
        "tok-special-in-text": "tok-special-in-text",
        "shortest special token first": "tok-special-shortest",
        "tok-byte-literal-confusion": "tok-byte-literal-confusion",
        "longest merge first": "tok-merge-longest-first",
        "rank by id": "tok-merge-rank-by-id",
        "longest piece from the left": "tok-longest-match-any",
        "tok-merge-left-to-right": "tok-merge-left-to-right",
        "tok-merge-tie": "tok-merge-tie",
        "words apart": "tok-merge-within-words",
        "tok-normaliser, NFKC": "tok-normaliser-nfkc",
        "tok-byte-fallback-missing": "tok-byte-fallback-missing-apart",
        "tok-byte-fallback-missing, dropped": "tok-unknown-vanishes",
        "tok-byte-fallback-missing, code points": "tok-byte-fallback-code-points",
        "byte pieces taken to begin at 3": "tok-byte-offset-assumed",
        "text ends at NUL": "tok-text-ends-at-nul",
        "every unknown character alone": "tok-unknown-not-joined",
        "begin token by default": "tok-begin-always",
        "tok-decode-leading-space, kept": "tok-decode-leading-space",
        "tok-decode-leading-space, of every piece": "tok-decode-strips-all",
        "tok-decode-leading-space, all of them": "tok-decode-left-stripped",
        "▁ left in the middle": "tok-decode-mark-left",
        "tok-byte-decode-per-token, shown": "tok-byte-shown-literally",
        "tok-byte-decode-per-token": "tok-byte-decode-per-token",
        "invalid bytes left out": "tok-invalid-bytes-dropped",
        "all text at the end": "tok-decode-all-at-the-end",
        "the end left out": "tok-special-inside-character and tok-decode-end-lost",  # it keeps what it does not give
        "user-defined pieces split": "tok-user-defined-split",
    },
    "byte_level_bpe": {
        "tok-pretokeniser, spaces": "tok-pretokeniser",
        "tok-pretokeniser, contractions": "tok-pretokeniser-case",
        "tok-pretokeniser, no contractions": "tok-pretokeniser-contractions",
        "tok-pretokeniser, digits one by one": "tok-pretokeniser-digits-single",
        "tok-pretokeniser, ASCII": "tok-pretokeniser-ascii",
        "tok-pretokeniser, white space as `str.isspace`": "tok-pretokeniser-white-space",
        "tok-pretokeniser, none": "tok-pretokeniser-none",
        "tok-merges-parse": "tok-merges-parse",
        "tok-merge-left-to-right": "tok-merge-left-to-right",
        "tok-merge-tie": "tok-merge-tie",
        "code points for bytes": "tok-code-points-for-bytes",
        "a space before every text": "tok-prefix-space-assumed",
        "tok-special-in-text": "tok-special-in-text",
        "tok-byte-decode-per-token": "tok-byte-decode-per-token",
        "a special token ends a character": "tok-special-ends-character",
        "one U+FFFD for each byte": "tok-invalid-bytes-apart",
        "all text at the end": "tok-decode-all-at-the-end",
    },
}
TABLES = {"sentencepiece_bpe": SENTENCEPIECE, "byte_level_bpe": BYTE_LEVEL}


def case(name: str) -> Case:
    if name not in CASES:
        CASES[name] = Case(name)
        CASES[name].read()
    return CASES[name]


def judged(load: Any, name: str, check: str, found: Any = None) -> Result:
    implementation = found or adopt("", load)
    claim = Claim(name, f"tokenizer.{check}", "exact")
    return judge(checks()[claim.check], claim, lambda: Judge(implementation, case(name), "exact", "cpu"))


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str], Result]:
    runs = [(family, name, *of) for family, table in TABLES.items() for name, of in table.items()]
    runs.sort(key=lambda run: run[3:])  # what is simulated for one serves the next
    return {(family, name): judged(load, where, check) for family, name, load, where, check in runs}


def said(result: Result) -> str | None:
    return result.diagnosis["id"] if result.diagnosis else None


def test_known_mistakes_are_named(results: dict[tuple[str, str], Result]) -> None:
    """At least 95 % of them rightly; at most 1 % wrongly.  What cannot be told apart is named together."""
    entries = {(family, name): entry for family, table in ENTRIES.items() for name, entry in table.items()}
    assert len(entries) >= 45
    named = {run: (said(results[run]) or "").split(" or ") for run in entries}
    missed = {run: found for run, found in named.items() if entries[run] not in found}
    wrong = {run: found for run, found in missed.items() if found != [""]}
    assert len(wrong) <= 0.01 * len(entries), wrong
    assert len(missed) <= 0.05 * len(entries), missed
    assert sum(len(found) > 1 for found in named.values()) <= 2, named


def test_a_named_mistake_is_reproduced_exactly(results: dict[tuple[str, str], Result]) -> None:
    named = [result.diagnosis for result in results.values() if result.diagnosis and result.diagnosis["id"]]
    assert all(diagnosis["reproduced_to"] == 0 and diagnosis["fix"] for diagnosis in named)


def test_a_mistake_of_no_entry_is_unknown(results: dict[tuple[str, str], Result]) -> None:
    foreign = {run: r.diagnosis for run, r in results.items() if run[1] not in ENTRIES[run[0]] and r.equals is None}
    assert len(foreign) >= 4
    assert {diagnosis and diagnosis["kind"] for diagnosis in foreign.values()} == {"unknown"}
    spaces = foreign["sentencepiece_bpe", "tok-normaliser, spaces"]
    assert spaces is not None
    assert spaces["text"].startswith("only texts with white space are wrong, and all of them; near, and not the same: "
                                     "tok-extra-spaces-removed (19 of 22 wrong answers)")  # fmt: skip
    added = foreign["byte_level_bpe", "added tokens ignored"]
    assert added is not None
    assert "tok-added-tokens-ignored (7 of 7 wrong answers, 1 others wrong)" in added["text"]


def test_what_a_counterfactual_names_is_not_searched_for(results: dict[tuple[str, str], Result]) -> None:
    equal = [result for result in results.values() if result.equals]
    assert len(equal) >= 4
    assert all(result.diagnosis is None for result in equal)


def test_a_right_tokenizer_has_no_diagnosis() -> None:
    assert judged(by_hand, PLAIN, "decode").diagnosis is None
    assert judged(byte_level_by_hand, "byte_level_bpe/plain", "encode").diagnosis is None


# --- two at once, other checks, other answers -------------------------------------------------------------------------


def test_two_mistakes_at_once_are_both_named() -> None:
    result = judged(sentencepiece(marked=nfkc, merged=first_possible), PLAIN, "encode")
    assert {"tok-merge-left-to-right and tok-normaliser-nfkc"} <= set((said(result) or "").split(" or "))
    nul = judged(sentencepiece(encode=until_nul, fallback=code_points), PLAIN, "byte_fallback")
    assert nul.diagnosis is not None
    assert nul.diagnosis["kind"] == "two at once"
    assert said(nul) == "tok-byte-fallback-code-points and tok-text-ends-at-nul"


def test_what_was_found_is_tried_first_in_other_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    load = sentencepiece(prefix=prefix_twice)
    found = adopt("", load)
    assert said(judged(load, PLAIN, "encode", found)) == "tok-prefix-twice"
    monkeypatch.setattr(Search, "_try", lambda *_: pytest.fail("searched again"))
    assert said(judged(load, PLAIN, "spaces", found)) == "tok-prefix-twice"
    assert said(judged(load, "sentencepiece_bpe/distinct", "encode", found)) == "tok-prefix-twice"


def test_decoding_is_diagnosed_though_encoding_is_wrong_too() -> None:
    """One does not follow from the other."""

    class Twice(SentencePieceByHand):
        def prefix(self, text: str, first: bool) -> str:
            return prefix_twice(self, text, first)

        def characters(self, data: bytes) -> str:
            return data.decode(errors="ignore")

    found = adopt("", lambda checkpoint: Twice(checkpoint))
    prepared = Judge(found, case(PLAIN), "exact", "cpu")
    ids = [
        said(judge(checks()[name], Claim(PLAIN, name, "exact"), lambda: prepared))
        for name in ("tokenizer.encode", "tokenizer.invalid_bytes")
    ]
    assert ids == ["tok-prefix-twice", "tok-invalid-bytes-dropped"]


def test_one_wrong_answer_more_than_a_mistake_gives_is_not_called_by_its_name() -> None:
    """Nor one fewer: all answers must be the same."""

    def also(self: Any, text: str, **options: Any) -> Any:
        return [0] if text == "the" else special_always_parsed(self, text, **options)

    def but_one(self: Any, text: str, **options: Any) -> Any:
        right = text == "<s>"
        return SentencePieceByHand.encode(self, text) if right else special_always_parsed(self, text, **options)

    for encode in (also, but_one):
        diagnosis = judged(sentencepiece(encode=encode), PLAIN, "encode").diagnosis
        assert diagnosis is not None
        assert diagnosis["id"] is None
        assert "near, and not the same: tok-special-in-text (" in diagnosis["text"]


def test_nothing_is_named_while_the_reference_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced class is not put right; what is simulated with it proves nothing."""
    from reference_impl.tokenizer import sentencepiece_bpe

    class Never(sentencepiece_bpe.SpecialTokens):  # type: ignore[name-defined,misc]
        def split(self, text: str) -> Any:
            return iter([(0, text.upper(), None)])

    monkeypatch.setattr(sentencepiece_bpe, "SpecialTokens", Never)
    monkeypatch.setattr("conformance.text_diagnosis.simulator", Simulator)
    monkeypatch.setattr("conformance.text_diagnosis.tokenizers", Tokenizers)
    result = judged(sentencepiece(prefix=prefix_twice), PLAIN, "encode")
    assert (result.outcome, result.diagnosis) == ("fail", None)
    assert result.notes[-1].startswith("not diagnosed: reference_impl itself does not pass this claim")


def test_long_texts_are_not_simulated() -> None:
    """A tokenizer that is wrong there alone is an unknown mistake, and found to be within a moment."""

    def cut(self: Any, text: str, **options: Any) -> Any:
        return SentencePieceByHand.encode(self, text[:5000])

    diagnosis = judged(sentencepiece(encode=cut), PLAIN, "runs").diagnosis
    assert diagnosis is not None
    assert diagnosis["text"].startswith("everything wrong ends too early; ")
    assert diagnosis["text"].endswith("only texts of more than 256 characters are wrong, which are not simulated")


# --- merges and whole words -------------------------------------------------------------------------------------------


def test_whole_words_are_looked_up_first() -> None:
    """Shown by a vocabulary with words that no merges make, and by no other."""

    class WholeWords(ByteLevelByHand):
        def merged(self, symbols: list[str]) -> list[str]:
            whole = "".join(symbols)
            return [whole] if whole in self.ids else super().merged(symbols)

    assert (
        said(judged(lambda checkpoint: WholeWords(checkpoint), "byte_level_bpe/unmerged", "encode"))
        == "tok-vocab-first"
    )
    assert judged(lambda checkpoint: WholeWords(checkpoint), "byte_level_bpe/plain", "encode").outcome == "pass"


def test_a_lost_first_merge_is_named() -> None:
    def rank(self: Any, pair: tuple[str, str]) -> Any:
        return self.ranks.get(pair) or None

    assert said(judged(byte_level(rank=rank), "byte_level_bpe/plain", "encode")) == "tok-merges-first-lost"


@pytest.mark.parametrize("identifier", ["tok-merges-parse", "tok-merges-first-lost"])
@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json"])
def test_merges_are_lost_whichever_file_is_read(identifier: str, file: str) -> None:
    import torch

    from conformance.implementation import Checkpoint
    from conformance.mistakes.patching import Patch
    from reference_impl.tokenizer import load_tokenizer

    known = case("byte_level_bpe/plain")
    checkpoint = Checkpoint(known.config, {}, torch.float32, torch.device("cpu"), known.files)
    right = load_tokenizer(checkpoint.path, file).vocabulary.merges  # type: ignore[union-attr]
    with Patch(get_mistake(identifier)):
        found = load_tokenizer(checkpoint.path, file).vocabulary.merges  # type: ignore[union-attr]
    assert list(found) == list(right[:-1] if identifier == "tok-merges-parse" else right[1:])


# --- every mistake of the catalogue -----------------------------------------------------------------------------------


def test_answers_say_which_are_wrong() -> None:
    assert Answers(["a", "b", "c"], [[1], [2], []], [[1], [3], []]).wrong() == [1]


def test_both_of_two_are_simulated() -> None:
    one, other = (of_mistake(get_mistake(name)) for name in ("tok-prefix-twice", "tok-lower-case"))
    simulator = Simulator(checks()["tokenizer.encode"], case(PLAIN))
    got = simulator.simulate(both(one, other))
    assert got is not None
    assert simulator.right is not None
    text = got.given.index("The")
    assert got.got[text] == mutant_encodes("▁the")
    assert simulator.right.got[text] != got.got[text]


def mutant_encodes(text: str) -> list[int]:
    from conformance.tokenizer import TokenizerCandidate

    return TokenizerCandidate(mutant(), case(PLAIN)).encode(text)


def test_every_entry_is_a_hypothesis() -> None:
    known = {family: {h.id for h in hypotheses(family)} for family in TABLES}
    for family, table in ENTRIES.items():
        assert {part for entry in table.values() for part in re.split(" and ", entry)} <= known[family]
