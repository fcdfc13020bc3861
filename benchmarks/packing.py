"""What packing saves: time of a batch of prompts of different lengths, padded to a rectangle and packed into one row.

    python benchmarks/packing.py --runs 15

A Mistral of 8 layers, 512 wide, 8 heads over 2, window 128, random weights, float32, one thread. Padded and packed
forwards alternate, so that both see the same noise; the ratio is taken run by run, and its median printed. Before
anything is timed, packed logits are compared with padded ones.
"""

import statistics
import time

import click
import torch

from reference_impl.generation import left_padded
from reference_impl.models.mistral import Mistral, MistralConfig
from reference_impl.packing import pack, packed

CONFIG = MistralConfig(
    vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, sliding_window=128,
)  # fmt: skip
BATCHES = {
    "equal: 8 of 128": [128] * 8,
    "spread: 16 … 256 by 16": list(range(16, 257, 16)),
    "skewed: one of 512, 15 of 32": [512] + [32] * 15,
    "short: 64 of 1 … 32": [1 + n % 32 for n in range(64)],
}


def seconds(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


@torch.no_grad()
def compare(model: Mistral, lengths: list[int], runs: int) -> tuple[float, float, float]:
    """Padding in the rectangle, median seconds packed, median of padded ÷ packed."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(CONFIG.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    ids, mask = left_padded(prompts, vocab_size=CONFIG.vocab_size)
    row, _ = pack(prompts)
    torch.testing.assert_close(packed(model, row, lengths)[0], model(ids, mask)[mask], rtol=1e-3, atol=1e-3)
    times = [(seconds(model, ids, mask), seconds(packed, model, row, lengths)) for _ in range(runs)]
    ratio = statistics.median(padded / together for padded, together in times)
    return 1 - sum(lengths) / ids.numel(), statistics.median(together for _, together in times), ratio


@click.command()
@click.option("--runs", default=15, show_default=True)
def main(runs: int) -> None:
    torch.set_num_threads(1)
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = Mistral(CONFIG, attention).eval()
        print(f"{attention:30} padding   packed   padded ÷ packed")
        for name, lengths in BATCHES.items():
            padding, together, ratio = compare(model, lengths, runs)
            print(f"  {name:28} {padding:7.0%} {together:7.2f} s {ratio:17.2f}")


if __name__ == "__main__":
    main()
