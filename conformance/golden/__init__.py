"""Making and verifying goldens: recipe + oracle -> case.

`make` writes a case only if it deserves to be one (see `model.derive`).  `verify` rebuilds every case and compares:
recipe, configuration, weights and inputs byte for byte, expected values to 1e-13, the oracle's own error to a factor
of 2.  Both need transformers, of a release that has the family's model, and reference_impl.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from conformance import bounds
from conformance.cases import Case, Manifest, file_entries, verify_files, write_json, write_manifest
from conformance.families import FAMILIES, ComponentRecipe, Recipe, TokenizerRecipe, claims, get
from conformance.golden import component, model, tokenizer
from conformance.golden.common import AGREEMENT, MOVEMENT, REBUILT, REBUILT_NOISE, Derived, GoldenError

__all__ = [
    "AGREEMENT",
    "MOVEMENT",
    "REBUILT",
    "REBUILT_NOISE",
    "GoldenError",
    "make",
    "verify",
    "write",
    "write_claims",
]

# Whose versions a tokenizer's golden states as well.
TOKENIZER_PACKAGES = ("sentencepiece", "tokenizers")
Progress = Callable[[str], None]
AnyRecipe = Recipe | ComponentRecipe | TokenizerRecipe
# weight draws' label and tensor name -> the case that stores it, and the tensor
Stored = dict[str, tuple[str, Tensor]]


def write(recipe: AnyRecipe, directory: Path, stored: Stored) -> None:
    """Derive a case and write it.  A weight that a case in `stored` holds already is referred to, not repeated.

    Raises: GoldenError, and nothing is written, if the case does not deserve to be a golden.
    """
    derived = derive(recipe)
    label = _weights_label(recipe)
    own, shared = {}, {}
    for name, tensor in derived.weights.items():
        home, same = stored.get(f"{label}/{name}", (recipe.name, None))
        if same is not None and same.equal(tensor):
            shared[name] = home
        else:
            own[name] = tensor
            stored.setdefault(f"{label}/{name}", (recipe.name, tensor))
    target = directory / recipe.name
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "config.json", _config(recipe))
    save_file(own, target / "model.safetensors", metadata={"format": "pt"})
    save_file(derived.inputs, target / "inputs.safetensors")
    save_file({n: t.contiguous() for n, t in derived.expected.items()}, target / "expected.safetensors")
    write_json(target / "provenance.json", {**_stated(recipe), **derived.provenance, "shared": shared})


def derive(recipe: AnyRecipe) -> Derived:
    """Everything that a case holds.  Raises: GoldenError if it does not deserve to be a golden."""
    if isinstance(recipe, ComponentRecipe):
        return component.derive(recipe)
    return tokenizer.derive(recipe) if isinstance(recipe, TokenizerRecipe) else model.derive(recipe)


def _config(recipe: AnyRecipe) -> dict[str, Any]:
    """config.json; a component's or tokenizer's says which one it is."""
    if isinstance(recipe, Recipe):
        return recipe.config
    kind = "component" if isinstance(recipe, ComponentRecipe) else "tokenizer"
    return {kind: recipe.name.split("/")[0], **recipe.settings}


def _weights_label(recipe: AnyRecipe) -> str:
    """Recipes with one label share every weight of equal name and shape; a component or tokenizer has one label."""
    return recipe.weights if isinstance(recipe, Recipe) else recipe.name.split("/")[0]


def _stated(recipe: AnyRecipe) -> dict[str, Any]:
    """What provenance.json says of the recipe and of the versions it was made with."""
    import transformers

    more = TOKENIZER_PACKAGES if isinstance(recipe, TokenizerRecipe) else ()
    return {
        "recipe": recipe.name,
        "summary": recipe.summary,
        "field": recipe.field,
        "last_rows": recipe.last_rows,
        "weights": _weights_label(recipe),
        "oracle": {
            "name": get(recipe.name.split("/")[0]).oracle,
            "transformers": transformers.__version__,
            "torch": torch.__version__.split("+")[0],
            **{package: version(package) for package in more},
        },
    }


def make(families: Iterable[str], directory: Path, progress: Progress = lambda _: None) -> None:
    """Write all cases of the families and the manifest.

    Other families' entries are kept; cases of these families that have no recipe any more are removed.
    """
    cases = Manifest(directory).cases if (directory / "MANIFEST.json").exists() else {}
    for family in families:
        stored: Stored = {}
        recipes = {recipe.name: recipe for recipe in get(family).recipes}
        for recipe in recipes.values():
            progress(recipe.name)
            write(recipe, directory, stored)
        for name in [name for name in cases if name.split("/")[0] == family]:
            del cases[name]
            if name not in recipes:
                shutil.rmtree(directory / name, ignore_errors=True)
        cases |= {name: _manifest_entry(recipe, directory) for name, recipe in recipes.items()}
        write_manifest(directory, dict(sorted(cases.items(), key=_order)))


def _order(entry: tuple[str, Any]) -> tuple[int, int]:
    """Families and cases in the order in which they are declared; what is not declared any more comes last."""
    family, name = entry[0].split("/")[0], entry[0]
    if family not in FAMILIES:
        return len(FAMILIES), 0
    names = [recipe.name for recipe in get(family).recipes]
    return FAMILIES.index(family), names.index(name) if name in names else len(names)


def _manifest_entry(recipe: AnyRecipe, directory: Path) -> dict[str, Any]:
    return {"claims": _claims(recipe), "files": file_entries(directory / recipe.name)}


def _claims(recipe: AnyRecipe) -> dict[str, list[str]]:
    return {check: list(dtypes) for check, dtypes in claims(recipe).items()}


def write_claims(directory: Path) -> int:
    """Write the claims of all recipes into the manifest of goldens that stay as they are; returns how many there are.

    Raises: FixtureError if a stored file is not the manifest's, GoldenError if a case was never made.
    """
    cases = Manifest(directory).cases
    recipes = [recipe for family in FAMILIES for recipe in get(family).recipes]
    if missing := [recipe.name for recipe in recipes if recipe.name not in cases]:
        raise GoldenError(f"not made yet: {', '.join(missing)}; conformance golden make writes them")
    for recipe in recipes:
        verify_files(directory / recipe.name, cases[recipe.name]["files"])
        cases[recipe.name]["claims"] = _claims(recipe)
    write_manifest(directory, cases)
    return sum(1 for _ in Manifest(directory).claims())


def verify(families: Iterable[str], directory: Path, progress: Progress = lambda _: None) -> list[str]:
    """Rebuild every case of the families and compare; returns what differs, a line each (none: all is well).

    Raises: FixtureError if a stored file is not the manifest's.
    """
    manifest, families = Manifest(directory), list(families)
    recipes = [recipe for family in families for recipe in get(family).recipes]
    known = {recipe.name for recipe in recipes}
    problems = [
        f"{path}: not in the manifest"
        for path in sorted(directory.glob("*/*/"))
        if "/".join(path.parts[-2:]) not in manifest.cases
    ]
    problems += [
        f"{name}: in the manifest, but no recipe makes it"
        for name in manifest.cases
        if name.split("/")[0] in families and name not in known
    ]
    with tempfile.TemporaryDirectory() as scratch:
        stored: Stored = {}
        for recipe in recipes:
            progress(recipe.name)
            if recipe.name not in manifest.cases:
                problems.append(f"{recipe.name}: not in the manifest")
                continue
            verify_files(directory / recipe.name, manifest.cases[recipe.name]["files"])
            write(recipe, Path(scratch), stored)
            if manifest.cases[recipe.name]["claims"] != _manifest_entry(recipe, Path(scratch))["claims"]:
                problems.append(f"{recipe.name}: the manifest's claims are not the recipe's")
            problems += _differences(Case(recipe.name, manifest), Case(Path(scratch) / recipe.name))
    return problems


def _differences(case: Case, again: Case) -> list[str]:
    """What differs between a golden and its rebuilt twin."""
    found = [
        f"{case.name}/{file}: not the same bytes when rebuilt"
        for file in ("config.json", "model.safetensors", "inputs.safetensors")
        if (case.directory / file).read_bytes() != (again.directory / file).read_bytes()
    ]
    for key in ("recipe", "summary", "field", "last_rows", "weights", "shared"):
        if case.provenance.get(key) != again.provenance[key]:
            found.append(
                f"{case.name}: provenance says {key} {case.provenance.get(key)!r}, not {again.provenance[key]!r}"
            )
    if list(case.provenance.get("movement", {})) != list(again.provenance["movement"]):
        found.append(f"{case.name}: provenance names other counterfactuals")
    return found + _different_values(case, again) + _different_noise(case, again)


def _different_values(case: Case, again: Case) -> list[str]:
    if set(case.expected) != set(again.expected):
        only = sorted(set(case.expected) ^ set(again.expected))
        return [f"{case.name}: expected values {only} on one side only"]
    found = []
    gradients = [t.flatten() for n, t in case.expected.items() if n.startswith("gradient.")]
    scale = bounds.magnitude(torch.cat(gradients)) if gradients else None
    for name, truth in case.expected.items():
        rebuilt = again.expected[name]
        if rebuilt.shape != truth.shape:
            found.append(f"{case.name}: {name} has shape {tuple(truth.shape)}, rebuilt {tuple(rebuilt.shape)}")
            continue
        error = bounds.measure(rebuilt, truth, scale if name.startswith("gradient.") else None).max
        if not error <= REBUILT:
            found.append(f"{case.name}: {name} rebuilt differs by {error:.1e}, wanted {REBUILT:g}")
    return found


def _different_noise(case: Case, again: Case) -> list[str]:
    """Oracle errors that are on one side only, or differ by more than the factor."""
    before, after = (
        {
            f"{what} in {dtype} by {kind}": value
            for what, by_dtype in side.provenance.get("oracle_error", {}).items()
            for dtype, pair in by_dtype.items()
            for kind, value in pair.items()
        }
        for side in (case, again)
    )
    found = [f"{case.name}: oracle error of {what} on one side only" for what in sorted(before.keys() ^ after.keys())]
    for what in before.keys() & after.keys():
        if not before[what] / REBUILT_NOISE <= after[what] <= before[what] * REBUILT_NOISE:
            found.append(f"{case.name}: oracle error of {what} is {after[what]:.1e}, was {before[what]:.1e}")
    return found
