"""python -m reference_impl generate --checkpoint DIR --prompt "…": text from a checkpoint, as it is generated.

Text (or ids) goes to standard output, what is said about it to standard error. `--help` says the rest.
"""

import argparse
import inspect
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from reference_impl.checkpoint import load_config, load_model
from reference_impl.generation import Sampling, Step, stream
from reference_impl.stored_tensors import read_json
from reference_impl.tokenizer import ByteLevelBPE, SentencePieceBPE, load_tokenizer

DTYPES = ("float64", "float32", "bfloat16", "float16")
EXIT_STATUS = """\
exit status: 0, text was generated; 1, standard output was closed before the end; 2, it could not be generated, standard
error says why; 130, interrupted."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m reference_impl", description="The reference models, at work.")
    commands = top.add_subparsers(dest="command", required=True)
    generate = commands.add_parser(
        "generate", epilog=EXIT_STATUS, formatter_class=argparse.RawDescriptionHelpFormatter,
        help="continue a prompt, token by token", description="Continues a prompt; greedily, unless told to draw.",
    )  # fmt: skip
    add = generate.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="config.json, safetensors files, tokenizer")
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--ids", metavar='"1 2 3"', help="the same as token ids; ids are printed; needs no tokenizer")
    add(
        "--tokenizer", metavar="FILE", help="tokenizer.model, tokenizer.json or vocab.json; otherwise the first of them"
    )
    add("--max-new-tokens", type=int, default=100, metavar="N", help="the most tokens to generate (%(default)s)")
    add("--temperature", type=float, metavar="T", help="draw, from logits divided by T")
    add("--top-k", type=int, metavar="K", help="draw, from the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="draw, from the fewest tokens with a probability of P together")
    add("--seed", type=int, metavar="S", help="the same seed draws the same tokens")
    add("--ignore-eos", action="store_true", help="go on after a token that ends a text (eos_token_id)")
    add("--dtype", choices=DTYPES, help="of the computation; otherwise the one that config.json names, or float32")
    add("--device", default="cpu", help="where torch computes (%(default)s)")
    add("--attention", choices=("sdpa", "eager"), default="sdpa", help="kernel (%(default)s)")
    add("--prefill-chunk", type=int, metavar="N", help="the most tokens of the prompt to feed at once")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal can show every character
    try:
        generate(options)
    except (ValueError, RuntimeError) as error:  # RuntimeError: torch's, of a device or of memory
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        # what Python would still write at its end has nowhere to go either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 1
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def generate(options: argparse.Namespace) -> None:
    """Writes the continuation to standard output, and how long it took to standard error."""
    require_device(options.device)
    config = load_config(options.checkpoint)
    sampling, generator = sampling_of(options), generator_of(options)
    stop_tokens: set[int] = set() if options.ignore_eos else end_tokens(options.checkpoint, config)
    ids, decode = prompt_of(options)
    started = time.perf_counter()
    model = load_decoder(options, config)
    loaded = time.perf_counter()
    print(f"{type(model).__name__} loaded in {loaded - started:.1f} s", file=sys.stderr)
    steps = stream(
        model, [ids], max_new_tokens=options.max_new_tokens, stop_tokens=stop_tokens, sampling=sampling,
        generator=generator, prefill_chunk=options.prefill_chunk,
    )  # fmt: skip
    times = [time.perf_counter()]
    try:
        for text in decode(timed(steps, times)):
            print(text, end="", flush=True)
    finally:
        print(flush=True)  # what is said next, of an error too, begins a line
    print(speed(len(ids), times), file=sys.stderr)


def timed(steps: Iterable[Step], times: list[float]) -> Iterator[int]:
    """The token of each step, and in `times` when it came."""
    for step in steps:
        times.append(time.perf_counter())
        yield int(step.tokens[0])


def speed(prompt: int, times: list[float]) -> str:
    """When the first token came, and how many followed in a second."""
    start, *tokens = times
    if not tokens:
        return f"{prompt} tokens of prompt, nothing generated"
    first = f"{prompt} tokens of prompt and the first new one in {tokens[0] - start:.2f} s"
    if len(tokens) == 1:
        return first
    seconds = tokens[-1] - tokens[0]
    return f"{first}, {len(tokens) - 1} more in {seconds:.2f} s: {(len(tokens) - 1) / seconds:.1f} tokens per second"


Decode = Callable[[Iterable[int]], Iterator[str]]


def prompt_of(options: argparse.Namespace) -> tuple[list[int], Decode]:
    """The ids of the prompt, and what makes text of the ids that follow them.

    Raises:
        ValueError: there is no tokenizer, the ids are no numbers, or the prompt is empty.
    """
    if options.ids is not None:
        try:
            ids = [int(word) for word in options.ids.replace(",", " ").split()]
        except ValueError:
            raise ValueError(f"--ids {options.ids!r} must be numbers, as in --ids '1 15 4'") from None
        return ids, lambda tokens: (f"{token} " for token in tokens)
    try:
        tokenizer = load_tokenizer(options.checkpoint, options.tokenizer)
    except ValueError as error:
        raise ValueError(f"{error}; give --tokenizer to read another file, or --ids instead of --prompt") from error
    ids = tokenizer.encode(options.prompt, add_special_tokens=True)
    return ids, lambda tokens: continuation(tokenizer, ids, tokens)


def continuation(
    tokenizer: SentencePieceBPE | ByteLevelBPE, prompt: Sequence[int], tokens: Iterable[int]
) -> Iterator[str]:
    """The text of tokens that follow a prompt, piece by piece; a piece never ends inside a character.

    The decoder is given the prompt first: what stands at the beginning of a text has another spelling.
    """
    decoder = tokenizer.decoder()
    for token in prompt:
        decoder.feed(token)
    for token in tokens:
        yield decoder.feed(token)
    yield decoder.finish()


def load_decoder(options: argparse.Namespace, config: Mapping[str, object]) -> nn.Module:
    """The model, in the dtype that was asked for.

    Raises:
        ValueError: it cannot be loaded, or is one that generates from a source.
    """
    named = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    name = options.dtype or (named if named in DTYPES else "float32")
    dtype: torch.dtype = getattr(torch, name)
    model = load_model(options.checkpoint, dtype=dtype, device=options.device, attention=options.attention)
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} has an encoder: it translates a source, and continues no prompt")
    return model


def end_tokens(checkpoint: Path, config: Mapping[str, object]) -> set[int]:
    """The ids that end a text: eos_token_id, a number or several, of generation_config.json or else of config.json."""
    file = checkpoint / "generation_config.json"
    content = {**config, **read_json(file)} if file.is_file() else config
    found = content.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int for token in ids):
        raise ValueError(f"eos_token_id={found!r} must be a number or a list of numbers")
    return set(ids)


def sampling_of(options: argparse.Namespace) -> Sampling | None:
    """None, to be greedy, unless one of the options of drawing is given."""
    given = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    given = {name: value for name, value in given.items() if value is not None}
    if not given and options.seed is not None:
        raise ValueError("--seed is for drawing: give --temperature, --top-k or --top-p with it")
    return Sampling(**given) if given else None


def generator_of(options: argparse.Namespace) -> torch.Generator | None:
    """Where chance comes from.  Raises: ValueError if torch does not take the seed."""
    if options.seed is None:
        return None
    if not -(2**63) <= options.seed < 2**64:
        raise ValueError(f"--seed {options.seed} must be one of −2⁶³ … 2⁶⁴ − 1")
    return torch.Generator(options.device).manual_seed(options.seed)


def require_device(device: str) -> None:
    """Raises ValueError if torch does not know the device, or has none of its kind."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
