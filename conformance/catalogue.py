"""What there is, and what each thing means: the text behind `conformance list` and `conformance explain`."""

import contextlib
import inspect
import re

from conformance.cases import Manifest
from conformance.families import FAMILIES, MODELS, Component, Family, Recipe, Tokenizer, Value, get
from conformance.probes import VOCABULARY, any_layer, word

Rows = list[tuple[str, str]]


def families() -> Rows:
    manifest = Manifest()
    rows = []
    for name in FAMILIES:
        claims = [claim for claim in manifest.claims() if claim.family == name]
        cases = {claim.case for claim in claims}
        rows.append((name, f"{get(name).title}: {len(cases)} cases, {len(claims)} claims ({get(name).paper})"))
    return rows


def cases() -> Rows:
    manifest = Manifest()
    summaries = {recipe.name: recipe.summary for name in FAMILIES for recipe in get(name).recipes}
    return [
        (case, f"{sum(map(len, entry['claims'].values())):>3} claims  {summaries.get(case, '')}")
        for case, entry in manifest.cases.items()
    ]


def checks() -> Rows:
    from conformance.suite import checks

    return [(name, _first_sentence(inspect.getdoc(function) or "")) for name, function in checks().items()]


def implementations() -> Rows:
    from conformance.implementation import BUILT_IN

    return [(name, text) for name, (_, text) in BUILT_IN.items()]


def mistakes() -> Rows:
    from conformance.mistakes import catalogue

    return [(mistake.id, mistake.what) for mistake in catalogue().values()]


def explain(identifier: str) -> str:
    """The explanation of a family, case, check, probe, config field or mistake.

    A probe may be given with its layer (`layers.1.attention.key`); a field as `rope_theta` or `llama.rope_theta`.
    Raises: KeyError with a message that names the nearest identifiers.
    """
    from conformance.suite import checks

    functions = checks()
    if identifier in FAMILIES:
        return _family(identifier)
    if identifier in Manifest().cases:
        return _case(identifier)
    if identifier in functions:
        return _check(identifier, inspect.getdoc(functions[identifier]) or "")
    with contextlib.suppress(KeyError):
        probe = word(identifier)
        return f"{probe}: {VOCABULARY[probe]}.\n\n" + "\n".join(_probe_shapes(probe))
    if found := _fields(identifier):
        return found
    from conformance.mistakes import catalogue  # imports torch

    if identifier in catalogue():
        return catalogue()[identifier].to_text()
    raise KeyError(_unknown(identifier, [*FAMILIES, *Manifest().cases, *functions, *VOCABULARY, *catalogue()]))


def _family(name: str) -> str:
    family = get(name)
    if isinstance(family, Component):
        return _component(family)
    if isinstance(family, Tokenizer):
        return _tokenizer(family)
    lines = [
        f"{name}: {family.title}",
        f"Source: {family.paper}",
        f"Oracle: {family.oracle} at true double precision",
        "",
    ]
    lines += ["Config fields that change the maths, each with a field case:"]
    lines += [f"  {f.name:<22} default {f.default:<22} {f.meaning}" for f in family.fields]
    lines += ["", "Cases:"] + [f"  {r.name:<34} {r.summary}" for r in family.recipes]
    lines += ["", "Probes, in computational order (axes):"]
    config = family.recipes[0].config
    seen = dict.fromkeys((any_layer(s.name), s.axes) for s in family.probes(config))
    lines += [f"  {probe:<42} ({', '.join(axes)})" for probe, axes in seen]
    return "\n".join([*lines, *_properties(family)])


def _properties(family: Family) -> list[str]:
    """What is searched for an input that breaks it, and what is not, with the reason."""
    found = family.properties
    if found is None:
        return []
    searched = dict.fromkeys(check for recipe in family.recipes for check in found.of(recipe.name, recipe.config))
    where = ", ".join([*found.cases, *found.also])
    lines = ["", f"Properties, searched in the cases {where}:", *(f"  {check}" for check in searched)]
    lines += [f"  not {check}: {reason}" for check, reason in found.exceptions.items()]
    return lines + [f"  not sensitivity.weights of {name}: {reason}" for name, reason in found.unmoved.items()]


def _component(component: Component) -> str:
    """The contract of a component: what a function may declare, and what it returns."""
    names = ", ".join(value.name for value in component.arguments)
    lines = [f"{component.name}: {component.title}", f"Source: {component.paper}", f"Oracle: {component.oracle}"]
    lines += [component.equations.rstrip(), "", f"    def {component.name}({names}): ..."]
    lines += ["", "Called by keyword, with those of these arguments that it declares:"]
    lines += [f"  {v.name:<22} {_shape(v):<34} {v.meaning}" for v in component.arguments]
    lines += ["", "Returns, alone, as a tuple in this order, or as a dict by name:"]
    lines += [
        f"  {v.name:<22} {_shape(v):<34} {v.meaning}{' (optional, in a dict)' if v.optional else ''}"
        for v in component.returns
    ]
    lines += ["", "Cases:"] + [f"  {r.name:<34} {r.summary}" for r in component.recipes]
    searched = dict.fromkeys(check for recipe in component.recipes for check in component.relations_of(recipe))
    lines += ["", "Properties, searched:", *(f"  {check}" for check in searched)] if searched else []
    return "\n".join([*lines, "", f"    conformance run my_file.py:{component.name} --family {component.name}"])


def _tokenizer(tokenizer: Tokenizer) -> str:
    """The contract of a tokenizer: what an implementation is given, and what it must answer."""
    from conformance.families.texts import CONTRACT

    lines = [f"{tokenizer.name}: {tokenizer.title}", f"Source: {tokenizer.paper}", f"Oracle: {tokenizer.oracle}"]
    lines += [tokenizer.rules.rstrip(), "", CONTRACT.strip("\n"), "", "Fields:"]
    lines += [f"  {f.name:<22} default {f.default:<10} {f.meaning}" for f in tokenizer.fields]
    lines += ["", "Cases:"] + [f"  {r.name:<42} {r.summary}" for r in tokenizer.recipes]
    return "\n".join([*lines, "", f"    conformance run my_tokenizer.py:load --family {tokenizer.name}"])


def _shape(value: Value) -> str:
    return "setting" if value.axes is None else f"({', '.join(value.axes.split())})"


def _case(name: str) -> str:
    recipe = next(r for r in get(name.split("/")[0]).recipes if r.name == name)
    size = [_size(recipe)] if isinstance(recipe, Recipe) else []
    lines = [f"{name}: {recipe.summary}", *size, "", "Claims:"]
    lines += [f"  {check:<24} {', '.join(dtypes)}" for check, dtypes in Manifest().cases[name]["claims"].items()]
    if recipe.counterfactuals:
        lines += ["", "A wrong answer is recognised if it equals the oracle with:"]
        lines += [f"  {label}" for label in recipe.counterfactuals]
    shown = {key: value for key, value in recipe.config.items() if value is not None}
    return "\n".join([*lines, "", "Configuration:", *(f"  {key}: {value}" for key, value in shown.items())])


def _size(recipe: Recipe) -> str:
    decoded = "" if recipe.target is None else f", {recipe.target} decoded"
    pieces = f", fed in segments of {', '.join(map(str, recipe.segments))}" if recipe.segments else ""
    return f"Batch {recipe.batch}, sequence {recipe.seq}{decoded}{pieces}."


def _check(name: str, documentation: str) -> str:
    claims = [claim for claim in Manifest().claims() if claim.check == name]
    return f"{name}\n\n{documentation}\n\n{len(claims)} claims in {len({c.case for c in claims})} cases."


def _probe_shapes(probe: str) -> list[str]:
    lines: dict[str, str] = {}
    for name in MODELS:
        for spec in get(name).probes(get(name).recipes[0].config):
            if word(spec.name) == probe:
                origin = ", ".join(spec.parents) or "the ids"
                shown = f"{name}, {any_layer(spec.name)}" if spec.name.startswith(("encoder.", "decoder.")) else name
                lines.setdefault(shown, f"{shown}: ({', '.join(spec.axes)}), computed from {origin}")
    return list(lines.values())


def _fields(identifier: str) -> str | None:
    family_name, _, field = identifier.rpartition(".")
    lines = []
    for name in FAMILIES:
        for entry in get(name).fields:
            if entry.name == field and family_name in ("", name):
                moved = ", ".join(field_cases(get(name), field))
                lines.append(f"{name}.{field} (default {entry.default}): {entry.meaning}.\nCases that move it: {moved}")
    return "\n\n".join(lines) or None


def field_cases(family: Family | Component | Tokenizer, field: str) -> list[str]:
    """The field cases that move a config field."""
    return [r.name for r in family.recipes if r.field and field in re.split(r"\W+", r.field)]


def _unknown(identifier: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(identifier, known, n=3)
    return f"nothing is called {identifier!r}" + (
        f"; did you mean {' or '.join(near)}?"
        if near
        else "; `conformance list families|cases|checks` shows what there is"
    )


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())
