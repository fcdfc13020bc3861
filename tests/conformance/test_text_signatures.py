"""Each signature of wrong ids and texts says what holds, and nothing of what does not."""

from typing import Any

import pytest

from conformance.text_signatures import HOW, KINDS, WrongText, text_signature, which_texts


def text_of(ids: list[int]) -> str:
    return "".join("abcdefgh"[i % 8] * (1 + i // 8) for i in ids)


def wrong(given: list[Any], got: list[Any], wanted: list[Any]) -> WrongText:
    return WrongText(given, got, wanted, text_of, frozenset({"<s>"}))


TEXTS = ["ab", "cd", "abc", "", "dd"]
IDS = [[0, 1], [2, 3], [0, 1, 2], [], [3, 3]]
SPACED = [" ab", "c d", "a  b", "", "x"]

# Name -> what was given, what came, what is right, and what is to be said.
SAID = {
    "nothing": (TEXTS, [[]] * 5, IDS, "nothing comes back"),
    "an id in front": (TEXTS, [[7, *ids] for ids in IDS], IDS, "the right ids, with [7] too much in front"),
    "an id missing in front": (
        TEXTS[:3], [[1], [3], [1, 2]], [[5, 1], [5, 3], [5, 1, 2]], "the right ids, with [5] missing in front"),
    "an id at the end": (TEXTS, [[*ids, 6] for ids in IDS], IDS, "the right ids, with [6] too much at the end"),
    "a space in front": ([[1]] * 2, [" a", " b"], ["a", "b"], "the right text, with ' ' too much in front"),
    "ids off by one": (TEXTS, [[i + 1 for i in ids] for ids in IDS], IDS, "the right tokens, 4 of their ids off by +1"),
    "ids exchanged": (TEXTS, [[[3, 1, 2, 0][i] for i in ids] for ids in IDS], IDS,
                      "the right tokens under other numbers: 2 ids stand for others, each always for the same"),
    "other merges": (["aab", "bb"], [[0, 0, 1], [9]], [[8, 1], [9]], "the same text in more tokens: the order"),
    "bytes by name": ([[1]] * 2, ["<0xE4>", "ab"], ["ä", "ab"], "bytes are shown by their names"),
    "half characters": ([[1]] * 2, ["\ufffd\ufffd", "ab"], ["ä", "ab"], "U+FFFD where characters should be"),
    "spaces alone": ([[1]] * 2, ["ab", "c d"], ["a b", "c  d"], "only white space differs"),
    "cut short": (["aa", "bbb"], [[0], [1]], [[0, 4], [1, 5, 6]], "everything wrong ends too early"),
    "one id for others": (["ab", "cd"], [[0, 7], [7, 3, 2]], [[0, 1, 5], [2, 3, 2]], "id 7 stands where others should"),
    "late": ([[1, 2]], [[0, 0, 2]], [[1, 2, 2]], "text comes too late"),
    "early": ([[1, 2]], [[1, 2, 2]], [[0, 1, 2]], "text comes too early"),
    "from the start": (["ab", "cd"], [[9, 3, 4], [9, 4]], [[1, 2], [2, 3]], "all of it is wrong from the start on"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_a_signature_says_how(name: str) -> None:
    given, got, wanted, said = SAID[name]
    found = text_signature(wrong(given, got, wanted))
    assert found is not None
    assert found.startswith(said)


def test_nothing_is_said_of_what_nothing_holds_for() -> None:
    assert text_signature(wrong(["ab", "cd", "ef"], [[0, 2], [2, 3], [9, 5]], [[0, 1], [2, 3], [1, 7]])) is None


@pytest.mark.parametrize("sign", HOW)
def test_every_signature_is_shown_to_hold_and_not_to(sign: Any) -> None:
    found = [sign(wrong(*entry[:3])) for entry in SAID.values()]
    assert any(found)
    assert not all(found)


# --- which texts ------------------------------------------------------------------------------------------------------


def which(texts: list[str], is_wrong: list[bool]) -> str | None:
    return which_texts(wrong(texts, [[7] if bad else [1] for bad in is_wrong], [[1] for _ in texts]))


def test_the_kind_of_the_wrong_texts_is_said() -> None:
    assert which(["a", " b", " c", "d", "e"], [False, True, True, False, False]) == (
        "only texts that begin with a space are wrong, and all of them")  # fmt: skip
    assert which(["<s>", "a", "b", "x<s>", "c"], [True, False, False, True, False]) == (
        "only texts with special tokens are wrong, and all of them")  # fmt: skip


def test_a_kind_that_many_right_texts_are_of_is_not_said() -> None:
    texts, bad = ["é", "ü", "a", "b", "c", "d", "ö", "e", "f"], [True, True, *[False] * 7]
    assert which(texts, bad) == "only texts beyond ASCII are wrong, 2 of 3"
    assert which(["é", "ü", "ä", "ö"], [True, False, False, False]) is None


def test_a_kind_that_a_wrong_text_is_not_of_is_not_said() -> None:
    assert which([" a", "b", "c", "d"], [True, True, False, False]) is None


EXAMPLES = {
    "that are empty": "", "with U+0000": "\0", "that begin with a space": " a", "that end with white space": "a ",
    "with several spaces in a row": "a  b", "with white space": "a b", 'with "▁"': "a▁", "with apostrophes": "it's",
    "that look like bytes, <0x0A>": "<0x0A>", "with digits": "1", "with capitals": "A", "beyond ASCII": "é",
    "that are not in NFC": "e\u0301", "that are not in NFKC": "ﬁ", "with control characters": "\x01",
    "with one character four times in a row": "aaaa", "of several words": "a b",
}  # fmt: skip


def test_every_kind_knows_its_texts() -> None:
    assert EXAMPLES.keys() == KINDS.keys()
    assert all(KINDS[kind](text) for kind, text in EXAMPLES.items())
    assert [kind for kind, holds in KINDS.items() if holds("word")] == []


def test_of_ids_the_text_that_was_to_come_counts() -> None:
    said = which_texts(wrong([[1], [2], [3]], ["?", "b", "c"], ["é", "b", "c"]))
    assert said == "only texts beyond ASCII are wrong, and all of them"
