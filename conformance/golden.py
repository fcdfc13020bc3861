"""Making and verifying goldens: recipe + oracle -> case.

`make` writes a case only if it deserves to be one: the reference agrees with the oracle on every probe and gradient to
1e-12, the oracle agrees with itself on padded batches, and a field case's logits move when its field is ignored.
`verify` rebuilds every case and compares: recipes, weights and inputs byte for byte, expected values to 1e-13, the
oracle's own error to a factor of 2.  Both need transformers and reference_impl.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from conformance import bounds, draws
from conformance.cases import Case, Manifest, file_entries, verify_files, write_json, write_manifest
from conformance.families import FAMILIES, Config, Family, Recipe, get
from conformance.implementations import reference
from conformance.oracles.hugging_face import KERNELS, HuggingFace
from conformance.suite.padding import padded

# Oracle and reference are independent derivations in float64; they agree to about 1e-14.
AGREEMENT = 1e-12
# Expected values rebuilt on another machine may differ by the rounding of another summation order.
REBUILT = 1e-13
REBUILT_NOISE = 2.0
# A field case whose logits move by less than this when the field is ignored proves nothing in a working dtype.
MOVEMENT = 1e-3


class GoldenError(ValueError):
    """A case does not deserve to be a golden, or a golden does not verify: names the case and the figure."""


def draw_weights(family: Family, recipe: Recipe) -> dict[str, Tensor]:
    """The case's weights under hub names, float32."""
    shapes = family.tensor_shapes(recipe.config)
    return {name: draws.tensor(recipe.weights, name, shapes[name]) for name in sorted(shapes)}


def draw_inputs(recipe: Recipe) -> dict[str, Tensor]:
    """Token ids (batch, seq), row lengths, junk ids for pads that no real token has, and positions that jump."""
    vocab, batch, seq = recipe.config["vocab_size"], recipe.batch, recipe.seq
    junk = max(2, vocab // 10)
    shape = (batch, seq)

    def draw(what: str, low: int, high: int) -> Tensor:
        return draws.integers(f"{recipe.name}/{what}", batch * seq, low, high).view(shape)

    inputs = {"input_ids": draw("input_ids", 0, vocab - junk - 1)}
    if batch > 1:
        # all different, unsorted, the whole sequence and a single token among them
        lengths = [2 * seq // 3, seq, 1, seq // 3 + 1][:batch]
        inputs |= {"lengths": torch.tensor(lengths), "padding_ids": draw("padding_ids", vocab - junk, vocab - 1)}
    if "positions" in recipe.store:
        longest = recipe.config["max_position_embeddings"] // seq
        steps = draw("positions", 1, longest - 1)
        steps[0, :2] = torch.tensor([0, 1])
        inputs["position_ids"] = steps.cumsum(-1)
    return inputs


def build(recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Everything that a case holds: (weights, inputs, expected, provenance without "shared").

    Raises: GoldenError if the case does not deserve to be a golden.
    """
    family = get(recipe.name.split("/")[0])
    weights, inputs = draw_weights(family, recipe), draw_inputs(recipe)
    ids = inputs["input_ids"]
    oracle = HuggingFace(family, recipe.config, weights)
    logits = oracle.logits(ids)
    rows = slice(None) if recipe.last_rows is None else slice(-recipe.last_rows, None)
    expected = {"logits": logits[:, rows]}
    agreement = {"logits": _agree(recipe, "logits", reference.logits(recipe.config, weights, ids), logits)}
    noise = {"logits": measure_noise(family, recipe.config, weights, ids, logits, rows)}

    if recipe.last_rows is None:
        expected |= _probes(family, recipe, weights, ids, oracle, agreement)
    if "positions" in recipe.store:
        expected["positions.logits"] = oracle.logits(ids, position_ids=inputs["position_ids"])
    if "loss" in recipe.store:
        _losses(recipe, weights, ids, oracle, expected, agreement)
    if "blocks" in recipe.store:
        for layer, (config, block_weights, block_ids, block_input) in enumerate(
            _blocks(family, recipe.config, weights, oracle.probes(ids))
        ):
            truth = HuggingFace(family, config, block_weights).logits(block_ids)
            expected |= {f"blocks.{layer}.input": block_input, f"blocks.{layer}.logits": truth}
            noise[f"blocks.{layer}"] = measure_noise(family, config, block_weights, block_ids, truth)
    movement = _counterfactuals(family, recipe, weights, ids, logits, expected)
    provenance = {
        "recipe": recipe.name,
        "summary": recipe.summary,
        "field": recipe.field,
        "last_rows": recipe.last_rows,
        "weights": recipe.weights,
        "oracle": {"model": family.oracle, **_versions()},
        "oracle_error": noise,
        "agreement_with_reference": agreement,
        "movement": movement,
    }
    return weights, inputs, {name: tensor.contiguous() for name, tensor in expected.items()}, provenance


def _probes(
    family: Family, recipe: Recipe, weights: dict[str, Tensor], ids: Tensor, oracle: HuggingFace,
    agreement: dict[str, float],
) -> dict[str, Tensor]:  # fmt: skip
    """Compare every probe with the reference; return those that this golden stores."""
    theirs, ours = oracle.probes(ids), reference.probes(family, recipe.config, weights, ids)
    for name, probe in theirs.items():
        agreement["probes"] = max(agreement.get("probes", 0.0), _agree(recipe, name, ours[name], probe))
    keep = theirs if "probes" in recipe.store else {}
    return {f"probe.{name}": probe for name, probe in keep.items() if name != "logits"}


def _losses(
    recipe: Recipe, weights: dict[str, Tensor], ids: Tensor, oracle: HuggingFace,
    expected: dict[str, Tensor], agreement: dict[str, float],
) -> None:  # fmt: skip
    """Loss and gradients, compared with the reference's; gradients share one scale over all parameters."""
    loss, gradients = oracle.loss_and_gradients(ids)
    our_loss, ours = reference.loss_and_gradients(recipe.config, weights, ids)
    agreement["loss"] = _agree(recipe, "loss", our_loss, loss)
    if set(ours) != set(gradients):
        raise GoldenError(f"{recipe.name}: gradients for {sorted(set(ours) ^ set(gradients))} on one side only")
    scale = bounds.magnitude(torch.cat([g.flatten() for g in gradients.values()]))
    agreement["gradients"] = max(_agree(recipe, n, ours[n], g, scale) for n, g in gradients.items())
    expected["loss"] = loss
    if "gradients" in recipe.store:
        expected |= {f"gradient.{name}": gradient for name, gradient in gradients.items()}


def _blocks(
    family: Family, config: Config, weights: dict[str, Tensor], probes: dict[str, Tensor]
) -> Iterator[tuple[Config, dict[str, Tensor], Tensor, Tensor]]:
    """One-layer checkpoints: (config, weights, ids, the block's input rounded to bfloat16 and stored as float32)."""
    for layer in range(config["num_hidden_layers"]):
        source = probes["embedding" if layer == 0 else f"layers.{layer - 1}.output"]
        block_input = source.to(torch.bfloat16).to(torch.float32)
        one, block_weights = family.block_checkpoint(config, weights, block_input, layer)
        ids = torch.arange(block_input.shape[0] * block_input.shape[1]).view(block_input.shape[:2])
        yield one, block_weights, ids, block_input


def _counterfactuals(
    family: Family, recipe: Recipe, weights: dict[str, Tensor], ids: Tensor, logits: Tensor, expected: dict[str, Tensor]
) -> dict[str, float]:
    """Logits of each configuration that a mistaken candidate effectively runs; returns how far they are from the truth.

    Tensors that the counterfactual configuration does not know (an ignored bias) are left out of its checkpoint.
    """
    movement = {}
    for label, config in recipe.counterfactuals.items():
        known = family.tensor_shapes(config)
        wrong = HuggingFace(family, config, {n: w for n, w in weights.items() if n in known}).logits(ids)
        movement[label] = bounds.measure(wrong, logits).max
        if label == f"{recipe.field} ignored" and movement[label] < MOVEMENT:
            raise GoldenError(
                f"{recipe.name}: ignoring {recipe.field} moves the logits by {movement[label]:.1e} only; a field case "
                f"needs {MOVEMENT:g}; choose a value further from the default"
            )
        expected[f"counterfactual.{label}"] = wrong
    return movement


def measure_noise(
    family: Family, config: Config, weights: dict[str, Tensor], ids: Tensor, truth: Tensor, rows: slice = slice(None)
) -> dict[str, dict[str, float]]:
    """The oracle's own error in each working dtype: the largest over its kernels and over row by row."""
    noise = {}
    for name in bounds.UNIT_ROUNDOFF:
        dtype = getattr(torch, name)
        errors = []
        for kernel in KERNELS:
            model = HuggingFace(family, config, weights, dtype=dtype, attention=kernel)
            errors.append(bounds.measure(model.logits(ids)[:, rows], truth[:, rows]))
            if kernel == "eager" and len(ids) > 1:
                alone = torch.cat([model.logits(row[None]) for row in ids])
                errors.append(bounds.measure(alone[:, rows], truth[:, rows]))
        noise[name] = {"max": max(e.max for e in errors), "rms": max(e.rms for e in errors)}
    return noise


def _agree(recipe: Recipe, what: str, got: Tensor, truth: Tensor, scale: bounds.Error | None = None) -> float:
    error = bounds.measure(got, truth, scale).max
    if not error <= AGREEMENT:
        raise GoldenError(f"{recipe.name}: oracle and reference differ by {error:.1e} at {what}, wanted {AGREEMENT:g}")
    return error


def _check_padding(case: Case) -> None:
    """The oracle's padded forwards must give the truth that the padding checks derive from the full forward."""
    oracle = HuggingFace(get(case.family), case.config, case.weights)
    for side in ("left", "right"):
        ids, mask, truth = padded(case, side)
        error = bounds.measure(oracle.logits(ids, mask)[mask.bool()], truth[mask.bool()]).max
        if not error <= AGREEMENT:
            raise GoldenError(f"{case.name}: the oracle padded on the {side} differs from its rows by {error:.1e}")


def write(recipe: Recipe, directory: Path, stored: dict[str, tuple[str, Tensor]]) -> None:
    """Build a case and write it; weights in `stored` (by content, see `weight_key`) are referred to, not repeated."""
    weights, inputs, expected, provenance = build(recipe)
    own, shared = {}, {}
    for name, tensor in weights.items():
        home = stored.get(f"{recipe.weights}/{name}")
        if home is not None and home[1].equal(tensor):
            shared[name] = home[0]
        else:
            own[name] = tensor
            stored.setdefault(f"{recipe.weights}/{name}", (recipe.name, tensor))
    target = directory / recipe.name
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "config.json", recipe.config)
    save_file(own, target / "model.safetensors", metadata={"format": "pt"})
    save_file(inputs, target / "inputs.safetensors")
    save_file(expected, target / "expected.safetensors")
    write_json(target / "provenance.json", {**provenance, "shared": shared})


def make(families: Iterable[str], directory: Path, progress: Callable[[str], None] = lambda _: None) -> None:
    """Write all cases of the families and the manifest; other families' entries are kept."""
    manifest_path = directory / "MANIFEST.json"
    cases = Manifest(directory).cases if manifest_path.exists() else {}
    for family in families:
        stored: dict[str, tuple[str, Tensor]] = {}
        for recipe in get(family).recipes:
            progress(recipe.name)
            write(recipe, directory, stored)
        fresh = {recipe.name: _manifest_entry(recipe, directory) for recipe in get(family).recipes}
        cases = {name: entry for name, entry in cases.items() if name.split("/")[0] != family} | fresh
        write_manifest(directory, dict(sorted(cases.items(), key=lambda item: _order(item[0]))))
        for name in fresh:
            case = Case(name, Manifest(directory))
            if "lengths" in case.inputs:
                _check_padding(case)


def _order(name: str) -> tuple[int, int]:
    family = name.split("/")[0]
    return FAMILIES.index(family), [r.name for r in get(family).recipes].index(name)


def _manifest_entry(recipe: Recipe, directory: Path) -> dict[str, Any]:
    claims = {check: list(dtypes) for check, dtypes in recipe.claims.items()}
    return {"claims": claims, "files": file_entries(directory / recipe.name)}


def verify(families: Iterable[str], directory: Path, progress: Callable[[str], None] = lambda _: None) -> list[str]:
    """Rebuild every case of the families and compare; returns what differs, a line each (none: all is well)."""
    manifest, problems = Manifest(directory), []
    known = set(manifest.cases)
    for path in sorted(directory.glob("*/*/")):
        if "/".join(path.parts[-2:]) not in known:
            problems.append(f"{path}: not in the manifest")
    with tempfile.TemporaryDirectory() as scratch:
        for family in families:
            stored: dict[str, tuple[str, Tensor]] = {}
            for recipe in get(family).recipes:
                progress(recipe.name)
                if recipe.name not in known:
                    problems.append(f"{recipe.name}: not in the manifest")
                    continue
                verify_files(directory / recipe.name, manifest.cases[recipe.name]["files"])
                write(recipe, Path(scratch), stored)
                if manifest.cases[recipe.name]["claims"] != _manifest_entry(recipe, Path(scratch))["claims"]:
                    problems.append(f"{recipe.name}: the manifest's claims are not the recipe's")
                problems += _differences(Case(recipe.name, manifest), Path(scratch) / recipe.name)
    return problems


def _differences(case: Case, rebuilt: Path) -> list[str]:
    """What differs between a golden and its rebuilt twin."""
    again = Case(rebuilt)
    found = [
        f"{case.name}/{file}: not the same bytes when rebuilt"
        for file in ("config.json", "model.safetensors", "inputs.safetensors")
        if (case.directory / file).read_bytes() != (rebuilt / file).read_bytes()
    ]
    if set(case.expected) != set(again.expected):
        found.append(
            f"{case.name}: expected values {sorted(set(case.expected) ^ set(again.expected))} on one side only"
        )
        return found
    gradients = [t.flatten() for n, t in case.expected.items() if n.startswith("gradient.")]
    scale = bounds.magnitude(torch.cat(gradients)) if gradients else None
    for name, truth in case.expected.items():
        error = bounds.measure(again.expected[name], truth, scale if name.startswith("gradient.") else None).max
        if not error <= REBUILT:
            found.append(f"{case.name}: {name} rebuilt differs by {error:.1e}, wanted {REBUILT:g}")
    for what, by_dtype in case.provenance["oracle_error"].items():
        for dtype, pair in by_dtype.items():
            for kind, value in pair.items():
                now = again.provenance["oracle_error"][what][dtype][kind]
                if not value / REBUILT_NOISE <= now <= value * REBUILT_NOISE:
                    found.append(
                        f"{case.name}: oracle error of {what} in {dtype} by {kind} is {now:.1e}, was {value:.1e}"
                    )
    return found


def _versions() -> dict[str, str]:
    import transformers

    return {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
