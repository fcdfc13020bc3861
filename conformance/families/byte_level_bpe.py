"""GPT-2's byte-level byte-pair encoding (Radford et al. 2019, section 2.2), which Phi uses too.

Oracle: the `tokenizers` package on tokenizer.json.

What is a letter or a number depends on the version of Unicode: `tokenizers` 0.23.3 has version 16, the `regex` package
of 2026 counts 17,480 characters more, Python 3.11's `unicodedata` 9,392 fewer.  No case holds a character that is newer
than Unicode 12; round trips do, which no class of characters changes.
"""

from typing import Any

from conformance.families import Config, ConfigField, Tokenizer, TokenizerRecipe
from conformance.families.texts import CONTROLS, LOOKALIKES, RUNS, SCRIPTS, SPACES, WORDS, drawn
from conformance.implementation import EXACT

SPECIAL = "<|endoftext|>"
_PLAIN: Config = {"model_type": "gpt2", "add_prefix_space": False, "bos_token": SPECIAL, "eos_token": SPECIAL}
_ALPHABET = (
    " ", "  ", "a", "b", "aa", "the", "re", "ing", "on", "an", "na", "é", "e\u0301", "你", "吗", "🙂", "0", "10", "==",
    "\n", "\t", "'s", "'ll", "'", SPECIAL, ".", "\u00a0", "\x00", "Ж", "other", "²", "\x1c", "\u0085", "\u3000",
    "_", "'S",
)  # fmt: skip
_SPECIAL = (
    SPECIAL, f"{SPECIAL}the", f"the{SPECIAL}", f"the {SPECIAL} the", f"{SPECIAL}{SPECIAL}", f"a{SPECIAL}b{SPECIAL}",
    "<|endoftext|", f" {SPECIAL}\n", f"the  {SPECIAL}  the",
)  # fmt: skip
# Bytes in the characters that stand for them: E4 BD A0 is ä ½ ł, F0 9F 99 82 is ð Ł Ļ Ĥ.
_DECODED = (
    (SPECIAL, "t", SPECIAL), ("ä", "½", "ł"), ("a", "ä", "½", "ł", "b"), ("Ġ", "ð", "Ł", "Ļ", "Ĥ", "a"), ("Ā", "Ċ"),
    (SPECIAL,), ("ä", "½", SPECIAL, "ł"), ("Ġ", "Ġ", "a"),
)  # fmt: skip
_INVALID = (
    ("ÿ",), ("a", "ÿ", "a"), ("ä", "½"), ("ä", "½", "a"), ("½", "ł", "a"), ("ä", "½", "ł", "ÿ"), ("ÿ", "ä", "½", "ł"),
    ("À", "Ģ"), ("í", "ł", "Ģ"), ("ô", "Ĳ", "Ģ", "Ģ"), ("ð", "Ł", "Ļ", "a"), ("ä", "ä", "½", "ł"), ("ð", "Ł", "Ļ"),
)  # fmt: skip
# Phi's tokenizer has runs of spaces and tabs beside its vocabulary.
_ADDED = ("  ", "    ", "\t\t")
# Tokens to which no merges lead, as vocabularies have them that were trained in another way.
_UNMERGED = ("quixotic", "Ġzephyr", "zzz")


def files(vocabulary: str, settings: Config) -> dict[str, bytes]:
    """plain: as trained.  spaces: with runs of spaces as added tokens, which are no special ones.  unmerged: with
    words that are tokens, and that no merges make."""
    from conformance.oracles.tokenizer_training import byte_level_files, trained_merges

    added, unmerged = _ADDED if vocabulary == "spaces" else (), _UNMERGED if vocabulary == "unmerged" else ()
    return byte_level_files(trained_merges(420), SPECIAL, added, settings, unmerged)


def truth(files: dict[str, bytes]) -> Any:
    from conformance.oracles.tokenizers import Library

    return Library(files)


def _claims(*checks: str) -> dict[str, tuple[str, ...]]:
    return {f"tokenizer.{check}": (EXACT,) for check in checks}


FAMILY = Tokenizer(
    name="byte_level_bpe",
    title="GPT-2's byte-level BPE",
    paper="Radford et al. 2019, section 2.2",
    rules="""
    encode   the text is cut into words by the pattern below; merges never cross their borders
             's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+
             the UTF-8 bytes of a word are merged: the pair that is first in the list of merges first, of equal ones the
             leftmost; a word that is a token as it stands is merged like any other
             special tokens are never found in text ...
    special  ... but with parse_special; added tokens that are no special ones always are
    decode   special tokens have no text; bytes become characters, and what belongs to none U+FFFD, one for each maximal
             subpart (Unicode, section 3.9)
    files    a byte is written as one character: a printable one of Latin-1 as itself, the other 68 as U+0100 and after
""",
    oracle="the `tokenizers` package on tokenizer.json",
    recipes=(
        TokenizerRecipe(
            name="byte_level_bpe/plain", summary="GPT-2's layout: bytes, merges, <|endoftext|>", settings=_PLAIN,
            vocabulary="plain",
            texts={"encode": (*WORDS, *SCRIPTS, *CONTROLS, *LOOKALIKES, *drawn("byte_level_bpe/plain", _ALPHABET, 100)),
                   "spaces": SPACES, "special_tokens": _SPECIAL, "runs": RUNS},
            tokens={"decode": _DECODED, "invalid_bytes": _INVALID},
            claims=_claims("encode", "vocabulary", "spaces", "special_tokens", "runs", "decode", "invalid_bytes",
                           "round_trip", "incremental", "streaming"),
        ),
        TokenizerRecipe(
            name="byte_level_bpe/added-tokens", summary="Phi's layout: runs of spaces and tabs as added tokens",
            settings=_PLAIN | {"model_type": "phi"}, vocabulary="spaces",
            texts={"encode": (*RUNS[:-1], *drawn("byte_level_bpe/spaces", _ALPHABET, 60)), "spaces": SPACES,
                   "special_tokens": _SPECIAL},
            tokens={"decode": (*_DECODED, ("a", "    ", "a"), ("  ", "\t\t"))},
            claims=_claims("encode", "spaces", "special_tokens", "decode", "round_trip"),
        ),
        TokenizerRecipe(
            name="byte_level_bpe/unmerged", summary="words that are tokens, and that no merges make: merges decide",
            settings=_PLAIN, vocabulary="unmerged", claims=_claims("encode"),
            texts={"encode": ("quixotic", "zephyr", " zephyr", "quixotic zephyr", "quixotically", "zzz", "zzzz",
                              "the zzz", "the quick", "zephyr's")},
        ),
        TokenizerRecipe(
            name="byte_level_bpe/field-add_prefix_space", summary="a space is put before a text that begins with none",
            settings=_PLAIN | {"add_prefix_space": True}, vocabulary="plain",
            texts={"encode": ("the quick", " the", "  the", "\tthe", "", "a", "'s", "你", "the  the")},
            claims=_claims("encode"), field="add_prefix_space",
            counterfactuals={"add_prefix_space ignored": _PLAIN},
        ),
    ),
    files=files,
    truth=truth,
    fields=(
        ConfigField(name="add_prefix_space", default="false", meaning="whether a space is put before a text without"),
    ),
)  # fmt: skip
