"""How long the reference's tokenizers take, beside the packages that decide about them.

    PYTHONPATH=. python benchmarks/tokenizer.py --runs 3

1 MB of prose (words of 3 to 9 letters, 20,000 different ones, the r-th 1/r as frequent as the first), 1 MB of which no
word occurs twice, and single words of 100,000 and 1,000,000 equal letters.  On the trained vocabularies of the cases,
and on Mistral's (32,768 pieces) where mistral-common is installed.  Encoding alone; the shortest of several runs, each
with a tokenizer that has encoded nothing before.
"""

import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import click

from conformance.cases import Case
from reference_impl.tokenizer import load_tokenizer

MEGABYTE = 1_000_000


def prose(different: int, frequencies: bool) -> str:
    """A megabyte of made-up words."""
    draw = Random(different)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgk", k=draw.randint(3, 9))) for _ in range(different)]
    if not frequencies:
        return " ".join(words)[:MEGABYTE]
    weights = list(accumulate(1 / rank for rank in range(1, different + 1)))
    return " ".join(draw.choices(words, cum_weights=weights, k=MEGABYTE // 4))[:MEGABYTE]


def texts() -> dict[str, str]:
    return {
        "1 MB of prose": prose(20_000, True),
        "1 MB, no word twice": prose(160_000, False),
        "a word of 100,000 letters": "a" * 100_000,
        "a word of 1,000,000 letters": "a" * MEGABYTE,
    }


def directories(scratch: Path) -> dict[str, Path]:
    """Name -> directory of tokenizer files."""
    found = {}
    for case in ("sentencepiece_bpe/plain", "byte_level_bpe/plain"):
        found[case] = scratch / case
        Case(case).export(found[case])
    spec = find_spec("mistral_common")
    if spec is not None and spec.origin is not None:
        found["Mistral's"] = scratch / "mistral"
        found["Mistral's"].mkdir()
        file = Path(spec.origin).with_name("data") / "mistral_instruct_tokenizer_240323.model.v3"
        (found["Mistral's"] / "tokenizer.model").write_bytes(file.read_bytes())
    return found


def package(directory: Path) -> Any:
    """The package that decides, as a tokenizer."""
    if (directory / "tokenizer.model").exists():
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def seconds(load: Callable[[Path], Any], directory: Path, text: str, runs: int) -> float:
    found = []
    for _ in range(runs):
        tokenizer = load(directory)
        tokenizer.encode("a b")
        started = time.perf_counter()
        tokenizer.encode(text)
        found.append(time.perf_counter() - started)
    return min(found)


@click.command()
@click.option("--runs", default=3, show_default=True)
def main(runs: int) -> None:
    with TemporaryDirectory() as scratch:
        for name, directory in directories(Path(scratch)).items():
            for what, text in texts().items():
                ours, theirs = (seconds(load, directory, text, runs) for load in (load_tokenizer, package))
                print(f"{name:<24} {what:<28} reference {ours:6.2f} s   package {theirs:6.2f} s", flush=True)


if __name__ == "__main__":
    main()
