"""Measure the error ratio of correct implementations, and from it the two constants of the working tier.

    PYTHONPATH=tests python benchmarks/calibrate_bounds.py --seeds 2000 --jobs 2

For every seed, fresh weights and ids for one of the Llama recipes; the oracle's truth and its own error per dtype as
`golden make` measures it; then the error ratio, by RMS and by maximum, of implementations that share no code with the
oracle: reference_impl (written out and SDPA) and the three candidates of the tests (einsum over batch-first heads,
functional heads-first, fused projections with SDPA and complex rotary).  All are correct, so every ratio beyond a
limit is a false alarm.  By the rule of three, n samples without one bound the rate by 3/n at 95 % confidence.
"""

import dataclasses
import statistics
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import click
import torch

from candidates import LAYOUTS
from conformance import bounds
from conformance.families import get
from conformance.golden import model
from conformance.implementation import adopt, load_checkpoint
from conformance.implementations.reference import Reference
from conformance.oracles.hugging_face import HuggingFace

Samples = dict[tuple[str, str], list[tuple[float, float]]]


def sample(seed: int) -> Samples:
    """Ratios (RMS, maximum) by (dtype, implementation) for one seed."""
    torch.set_num_threads(1)
    family = get("llama")
    recipes = [r for r in family.recipes if r.last_rows is None]
    recipe = recipes[seed % len(recipes)]
    recipe = dataclasses.replace(recipe, name=f"{recipe.name}-{seed}", weights=f"calibrate/{seed}", store=frozenset())
    weights, ids = model.draw_weights(family, recipe), model.draw_inputs(recipe)["input_ids"]
    truth = HuggingFace(family, recipe.config, weights).logits(ids)
    noise = decoder.measure_noise(family, recipe.config, weights, ids, truth)
    implementations = {"reference": Reference("eager"), "reference-sdpa": Reference("sdpa")}
    implementations |= {name: make() for name, make in LAYOUTS.items()}
    found: Samples = defaultdict(list)
    for dtype in bounds.UNIT_ROUNDOFF:
        for name, implementation in implementations.items():
            candidate = load_checkpoint(adopt(name, implementation), recipe.config, weights, dtype, "cpu")
            with torch.no_grad():
                logits = candidate(ids).logits
            judgement = bounds.within(bounds.measure(logits, truth), dtype, bounds.Error(**noise[dtype]))
            found[dtype, name].append((judgement.ratio.rms, judgement.ratio.max))
    return dict(found)


@click.command()
@click.option("--seeds", default=2000, show_default=True)
@click.option("--jobs", default=2, show_default=True)
def main(seeds: int, jobs: int) -> None:
    """Print, by dtype and implementation: median, 99 % and largest ratio; then what the constants must exceed."""
    samples: Samples = defaultdict(list)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for found in pool.map(sample, range(seeds), chunksize=8):
            for key, ratios in found.items():
                samples[key] += ratios
    print(f"{'dtype':<10} {'implementation':<15} {'by RMS: median   99 %    max':<31} by maximum: median   99 %    max")
    for (dtype, name), ratios in sorted(samples.items()):
        print(f"{dtype:<10} {name:<15} " + "   ".join(_row([r[i] for r in ratios]) for i in (0, 1)))
    everything = [ratio for ratios in samples.values() for ratio in ratios]
    for index, (what, limit) in enumerate((("RMS", bounds.RMS_RATIO), ("maximum", bounds.MAX_RATIO))):
        values = [ratio[index] for ratio in everything]
        logs = [torch.tensor(v).log().item() for v in values]
        normal = statistics.NormalDist(statistics.mean(logs), statistics.stdev(logs))
        fitted = torch.tensor(normal.inv_cdf(1 - 1e-4)).exp().item()
        alarms = sum(v > limit for v in values)
        print(
            f"by {what}: n = {len(values)}, largest {max(values):.2f}, log-normal 1 - 1e-4 quantile {fitted:.2f}, "
            f"limit {limit:g}: {alarms} false alarms, rate < {(3 + alarms * 3) / len(values):.1e} (95 %)"
        )


def _row(values: list[float]) -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered):14.2f} {ordered[int(0.99 * len(ordered))]:6.2f} {ordered[-1]:6.2f}"


if __name__ == "__main__":
    main()
