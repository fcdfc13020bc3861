"""SentencePiece's byte-pair encoding with byte fallback (Kudo and Richardson 2018), as Llama and Mistral use it.

Oracle: the `sentencepiece` package on tokenizer.model, whose format it is.  The `tokenizers` package on tokenizer.json
must agree, and does, but for what follows; there `sentencepiece` is right, since it loses no text and the other does:

- Bytes that are no UTF-8.  <0xE4> <0xBD> <0xA0> <0xFF>: `sentencepiece` decodes "你\\ufffd", `tokenizers` four times
  "\\ufffd", because its step ByteFallback gives up a whole run of bytes for one that is wrong.
- A special token inside a character.  <0xE4> <0xBD> <s> <0xA0>: `sentencepiece` decodes three times "\ufffd",
  `tokenizers`, which drops special tokens before it decodes, "你".
- `legacy: false` writes the dummy prefix as a Metaspace step, which puts none before a space.  " the": `sentencepiece`
  gives ▁ ▁the, `tokenizers` ▁the, the ids of "the": the space is lost.
- User-defined pieces.  "[DOC_1]x": `sentencepiece` gives ▁ [DOC_1] x; `tokenizers` cuts the text at such a piece before
  anything else, so that no prefix comes before it, and (`legacy: true`) one comes after it: [DOC_1] ▁x.
- A space as a byte.  <0x20> ▁the: `sentencepiece` decodes "  the", since only a piece's own prefix is taken off;
  `tokenizers` takes one space off the decoded text.  No encoder makes this, and no case holds it.

Which of several equal merges comes first can differ in principle, scores against a list of pairs; 300,000 drawn
vocabularies and all runs of Mistral's showed no difference as long as of one piece's pairs the longest left part comes
first.
"""

from typing import Any

from conformance.families import Config, ConfigField, Tokenizer, TokenizerRecipe
from conformance.families.texts import CONTROLS, LOOKALIKES, RUNS, SCRIPTS, SPACES, WORDS, drawn
from conformance.implementation import EXACT

_PLAIN: Config = {
    "model_type": "llama",
    "add_dummy_prefix": True,
    "byte_fallback": True,
    "legacy": True,
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
}
_ALPHABET = (
    " ", "  ", "a", "b", "aa", "the", "re", "ing", "on", "an", "na", "é", "e\u0301", "你", "吗", "🙂", "0", "10", "==",
    "\n", "\t", "▁", "<s>", "<0x0A>", "[INST]", ".", "'s", "\x00", "Ж", "other",
)  # fmt: skip
_SPECIAL = (
    "<s>", "</s>", "<s>the", "<s> the", "the<s>", "the</s>the", "the </s> the", "<s><s>", "<s></s>the", "<s",
    "the <s> the", "<s>the quick</s><s>brown", "\n<s>\n", "<0x0A><s><0x0A>", "<s>a</s> b </s>c",
)  # fmt: skip
_INSTRUCTIONS = (
    "[INST] the [/INST] quick", "<s>[INST]the[/INST]quick</s>", "[INST]]the", "[[INST]", "[INST",
    "[INST]x[INST]]x", " [INST] ",
)  # fmt: skip
_DECODED = (
    ("<s>", "▁the", "</s>"), ("▁the", "<s>", "▁the"), ("▁the", "</s>", "<s>", "▁the", "▁"), ("<s>", "<s>", "▁", "▁"),
    ("▁", "▁the"), ("a", "▁the"), ("<0xE4>", "<0xBD>", "<0xA0>"), ("▁", "<0xE4>", "<0xBD>", "<0xA0>", "a"),
    ("▁the", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "▁the"), ("<0x41>", "▁the"), ("<0x00>", "▁", "<0x0A>"), ("<s>",),
)  # fmt: skip
_INVALID = (
    ("<0xFF>",), ("▁the", "<0xFF>", "▁the"), ("<0xE4>", "<0xBD>"), ("<0xE4>", "<0xBD>", "a"), ("<0xBD>", "<0xA0>", "a"),
    ("<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>"), ("<0xFF>", "<0xE4>", "<0xBD>", "<0xA0>"), ("<0xC0>", "<0x80>"),
    ("<0xED>", "<0xA0>", "<0x80>"), ("<0xF4>", "<0x90>", "<0x80>", "<0x80>"), ("<0xF0>", "<0x9F>", "<0x99>", "a"),
    ("<0xE4>", "<0xE4>", "<0xBD>", "<0xA0>"), ("<0xE4>", "<0xBD>", "<s>", "<0xA0>"),
)  # fmt: skip
_AROUND = ("", "the", "<s>", "你好吗")
# A recipe that claims little is encoded with these.
_FEW = ("the quick", "a", "", "你好吗 the", "the  the", "the <s> the")


def files(vocabulary: str, settings: Config) -> dict[str, bytes]:
    """plain: as trained.  shuffled: the same with ids in no order and instruction tokens.  documents: plain with
    user-defined pieces.  no_bytes: trained without byte pieces."""
    from conformance.draws import few_integers
    from conformance.oracles.tokenizer_training import Piece, sentencepiece_files, trained_pieces

    pieces = trained_pieces(480 if settings["byte_fallback"] else 224, byte_fallback=settings["byte_fallback"])
    if vocabulary == "shuffled":
        pieces += [Piece(text, 0.0, "CONTROL") for text in ("[INST]", "[/INST]", "[INST]]")]
        keys = few_integers("sentencepiece_bpe/shuffled", len(pieces), 0, 0xFFFF)
        pieces = [piece for _, _, piece in sorted(zip(keys, range(len(pieces)), pieces, strict=True))]
    if vocabulary == "documents":
        pieces[3:3] = [Piece(text, 0.0, "USER_DEFINED") for text in ("[DOC_1]", "[DOC_12]")]
    return sentencepiece_files(pieces, settings)


def truth(files: dict[str, bytes]) -> Any:
    from conformance.oracles.tokenizers import SentencePiece

    return SentencePiece(files)


def second(files: dict[str, bytes]) -> Any:
    from conformance.oracles.tokenizers import Library

    return Library(files)


def _claims(*checks: str) -> dict[str, tuple[str, ...]]:
    return {f"tokenizer.{check}": (EXACT,) for check in checks}


def _texts(label: str, count: int) -> dict[str, tuple[str, ...]]:
    """All texts and some drawn ones; those that begin with a space, where the dummy prefix is lost, by themselves."""
    everything = (*WORDS, *SPACES, *LOOKALIKES, *drawn(label, _ALPHABET, count))
    spaced = tuple(text for text in everything if text.startswith((" ", "▁")))
    return {"encode": tuple(text for text in everything if text not in spaced), "spaces": spaced}


def _field(name: str, summary: str, value: Any, checks: tuple[str, ...], vocabulary: str = "plain", **more: Any) -> Any:
    settings = _PLAIN | {name: value}
    return TokenizerRecipe(
        name=f"sentencepiece_bpe/field-{name}", summary=summary, settings=settings, vocabulary=vocabulary,
        claims=_claims(*checks), field=name, counterfactuals={f"{name} ignored": _PLAIN}, **more,
    )  # fmt: skip


_EVERYTHING = _claims("encode", "vocabulary", "spaces", "special_tokens", "begin_and_end", "byte_fallback", "runs",
                      "decode", "invalid_bytes", "round_trip", "incremental", "streaming")  # fmt: skip

FAMILY = Tokenizer(
    name="sentencepiece_bpe",
    title="SentencePiece's BPE with byte fallback",
    paper="Kudo and Richardson 2018, arXiv:1808.06226; Touvron et al. 2023, arXiv:2302.13971, section 2.1",
    rules="""
    encode   every space becomes "▁", and one more "▁", the dummy prefix, goes in front (not of the empty text)
             the whole text is merged: of all neighbours whose union is a piece, the one with the highest score first,
             of equal ones the leftmost
             a character that is no piece becomes the pieces <0xNN> of its UTF-8 bytes; without byte pieces, a run of
             such characters becomes one <unk>
             user-defined pieces are found first and stay whole; control pieces are never found in text ...
    special  ... but with parse_special, where each part in between gets a dummy prefix of its own (legacy: true), or
             only a part at the very start does (legacy: false)
    decode   control pieces have no text; "▁" becomes a space, and the dummy prefix is taken off the first piece;
             bytes become characters, and each that belongs to none U+FFFD
""",
    oracle="the `sentencepiece` package on tokenizer.model",
    recipes=(
        TokenizerRecipe(
            name="sentencepiece_bpe/plain", summary="bytes at ids 3 to 258, then pieces in the order of their scores",
            settings=_PLAIN, vocabulary="plain", claims=_EVERYTHING,
            texts={
                **_texts("sentencepiece_bpe/plain", 100), "special_tokens": _SPECIAL, "begin_and_end": _AROUND,
                "byte_fallback": (*SCRIPTS, *CONTROLS), "runs": RUNS,
            },
            tokens={"decode": _DECODED, "invalid_bytes": _INVALID}, disputed=frozenset({"invalid_bytes"}),
        ),
        TokenizerRecipe(
            name="sentencepiece_bpe/distinct", summary="ids in no order, bytes and special tokens anywhere",
            settings=_PLAIN, vocabulary="shuffled", claims=_EVERYTHING,
            texts={
                **_texts("sentencepiece_bpe/distinct", 60), "special_tokens": (*_SPECIAL, *_INSTRUCTIONS),
                "begin_and_end": _AROUND, "byte_fallback": (*SCRIPTS, *CONTROLS), "runs": RUNS[:-1],
            },
            tokens={"decode": (*_DECODED, ("[INST]", "▁the", "[/INST]")), "invalid_bytes": _INVALID},
            disputed=frozenset({"invalid_bytes"}),
        ),
        TokenizerRecipe(
            name="sentencepiece_bpe/user-defined", summary="pieces that a user has defined, found in any text",
            settings=_PLAIN, vocabulary="documents", claims=_claims("encode"), disputed=frozenset({"encode"}),
            texts={"encode": ("[DOC_1]", "[DOC_1]x", " [DOC_1] x", "the[DOC_12]the", "[DOC_1][DOC_12]", "[DOC_",
                              "the [DOC_1]2")},
        ),
        _field("add_dummy_prefix", "nothing is put in front", False,
               ("encode", "spaces", "special_tokens", "decode", "round_trip", "incremental"),
               texts={**_texts("sentencepiece_bpe/no-prefix", 40), "special_tokens": _SPECIAL},
               tokens={"decode": _DECODED}),
        _field("byte_fallback", "no byte pieces: what is unknown is <unk>, a run of it one", False, ("encode",),
               "no_bytes", texts={"encode": (*_FEW, *SCRIPTS, *CONTROLS)}),
        _field("legacy", "no dummy prefix after a special token", False, ("encode", "spaces", "special_tokens"),
               texts={"encode": _FEW, "spaces": (" the", "  the", " ", "▁the"), "special_tokens": _SPECIAL},
               disputed=frozenset({"spaces"})),
        _field("add_bos_token", "no begin token", False, ("encode", "begin_and_end"),
               texts={"encode": _FEW, "begin_and_end": _AROUND}),
        _field("add_eos_token", "an end token too", True, ("encode", "begin_and_end"),
               texts={"encode": _FEW, "begin_and_end": _AROUND}),
    ),
    files=files,
    truth=truth,
    second=second,
    fields=(
        ConfigField(name="add_dummy_prefix", default="true", meaning="whether a space is put in front of every text"),
        ConfigField(name="byte_fallback", default="true", meaning="whether the vocabulary has pieces of bytes"),
        ConfigField(name="legacy", default="true", meaning="whether text behind a special token gets the prefix too"),
        ConfigField(name="add_bos_token", default="true", meaning="whether bos_token goes before a text"),
        ConfigField(name="add_eos_token", default="false", meaning="whether eos_token goes after a text"),
    ),
    comes_back_as={"▁": " "},
)  # fmt: skip
