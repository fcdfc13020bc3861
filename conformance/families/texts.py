"""What the tokenizer families share: the contract in words, and texts that tokenizers go wrong on.

Texts are written as escapes where a reader could not see what is there.
"""

from collections.abc import Sequence

from conformance.draws import few_integers

CONTRACT = """
    def load(checkpoint):                 # .path: a directory with the tokenizer's files; .config: its config.json
        return tokenizer

    tokenizer.encode(text) -> ids         the text alone: nothing around it, and what looks like a special token is text
    tokenizer.decode(ids) -> text         special tokens have no text

    Optional, each declared by its presence:
    encode(…, add_special_tokens=False)   True: with the begin and end tokens that the files ask for
    encode(…, parse_special=False)        True: special tokens are found in the text, as in a prompt put together
    tokenizer.decoder() -> d              d.feed(id) -> the text that is complete now; d.finish() -> the rest
    decode(…, skip_special_tokens)        is passed True, if `decode` names it

    An implementation of models as well sees by checkpoint.config["tokenizer"] that a tokenizer is wanted, and which.
"""

Texts = tuple[str, ...]

# In the words of the training text, and out of them.
WORDS: Texts = (
    "", "the", "The", "the quick brown fox", "there were three others", "reordering the orders", "rewritten",
    "internationalisation", "nationality", "banana bandana", "ababab", "abba aabb", "quixotic zephyr", "WRITING",
    "thethethe", "otherthere", "in the end, the beginning.", "hello world", "x", "zzz", "it's what they'll say",
    "I'm sure we're here and he'd know you've", "IT'S WE'LL", "it 's they 'll", "don't 'tis ''s '", "a'b'c",
    "'The 'Start 'Demand", "'the 'start 'demand",
    "a == b", "x!=y", "...", "---", "--- --", "a.b.c", "(10)", "100", "2024 100 3.14 1,000", "10 20 30", "a1b2c3",
    "total += values[i] ** 2", "    for i in range(10):\n        total\n", "https://example.org/a?b=c&d=%20",
    "<s", "_a_b_",
)  # fmt: skip
SPACES: Texts = (
    " ", "  ", "   ", " a", "  a", "   a", "a ", "a  ", "a  b", "a   b    c", " the  the ", "the\tthe", "\tthe", "\n",
    "\n\n", "the\nthe", "the \n the", "a\r\nb", "\u00a0", "a\u00a0b", "\u00a0\u00a0a", "\u3000", "a\u3000b", "\u2003a",
    "a\u0085b", "a\u2028b", "a\x0bb\x0cc", "a\u200bb", "\ufeffa", "a \t \n b",
)  # fmt: skip
SCRIPTS: Texts = (
    "Straße", "naïve café", "déjà vu", "e\u0301te\u0301", "été", "\u0301", "a\u0301\u0323b", "n\u0303", "ẞ ß ſ",
    "Привет, мир", "Здравствуйте", "你好，世界。", "你好吗", "日本語のテキスト", "한국어", "שלום עולם",
    "مرحبا ١٢٣", "हिन्दी १२३", "ไทย",
    "²³ ½ Ⅷ ①", "🙂", "a🙂b", "👩\u200d👩\u200d👧", "🇩🇪", "👍🏽", "ﬁ ﬀ", "Ａ１", "…—–", "€ £ ¥", "\U0001d400",
    "\U00020000", "\U0010ffff", "\ufffd", "\ue000", "a\U000e0041b",
)  # fmt: skip
CONTROLS: Texts = ("\x00", "a\x00b", "\x00\x00", "\x01\x1f", "a\x1cb", "\x7f", "\x80", "\x9f", "\u200e\u200f")
# Text that looks like a token of either kind of tokenizer, and is none.
LOOKALIKES: Texts = (
    "<s>", "</s>", "<unk>", "a<s>b", "<s> the </s>", "<0x0A>", "<0x41>", "a<0x41>", "<0xE4><0xBD><0xA0>", "<0x",
    "0x0A>", "▁", "▁the", "the▁the", "▁▁", " ▁ ", "Ġ", "Ġthe", "the Ġ", "Ċ", "<|endoftext|>", "a<|endoftext|>b",
    "[INST]", "[INST] the [/INST]", "##the", "the</w>",
)  # fmt: skip
RUNS: Texts = (
    *("a" * n for n in (*range(2, 20), 31, 64, 100)), *(" " * n for n in (*range(4, 20), 31, 100)),
    *("ab" * n for n in (2, 3, 5, 8)), *("aab" * n for n in (2, 3, 5)), *("ba" * n for n in (2, 3, 5)), "aba" * 4,
    "bab" * 4, "abbaabba", "=" * 7, "-" * 12, "." * 9, "1" * 12, "the" * 6, "na" * 9, "你" * 5, "\n" * 6, "z" * 9,
    "a" * 7 + " " * 7 + "a" * 7, "   a    a     a", "a" * 10_000,
)  # fmt: skip


def drawn(label: str, alphabet: Sequence[str], count: int) -> Texts:
    """Texts of up to 16 entries of an alphabet, a function of the label alone."""
    sizes = few_integers(f"{label}/sizes", count, 1, 16)
    return tuple(
        "".join(alphabet[i] for i in few_integers(f"{label}/{index}", size, 0, len(alphabet) - 1))
        for index, size in enumerate(sizes)
    )
