"""What the decoder families share: which claims a case makes, and how a field case is made."""

from collections.abc import Callable, Mapping

from conformance.families import Config, Recipe

Claims = dict[str, tuple[str, ...]]

WORKING = ("float64", "float32", "bfloat16")
# What every case claims: a full forward, padding, decoding.
MODEST: Claims = {
    "golden.logits": WORKING,
    "golden.left_padding": ("float64", "float32"),
    "golden.right_padding": ("float64", "float32"),
    "cache.prefill_decode": ("float64", "float32"),
    "cache.one_by_one": ("float64",),
    "cache.chunks": ("float64", "float32"),
    "cache.ragged": ("float64", "float32"),
}
# What one case of the family claims beside; it must store positions, loss, blocks and gradients.
FULL: Claims = MODEST | {
    "golden.logits": (*WORKING, "float16"),
    "golden.positions": ("float64",),
    "golden.loss": ("float64",),
    "golden.blocks": ("float64", "float32"),
    "golden.gradients": ("float64",),
}


def without(claims: Claims, *checks: str) -> Claims:
    return {check: dtypes for check, dtypes in claims.items() if check not in checks}


def only_in(dtypes: tuple[str, ...], claims: Claims) -> Claims:
    """The claims in these dtypes alone."""
    return {check: tuple(d for d in claimed if d in dtypes) for check, claimed in claims.items()}


def field_case(
    family: str,
    field: str,
    label: str,
    config: Config,
    plain: Config,
    tensor_shapes: Callable[[Config], dict[str, tuple[int, ...]]],
    *,
    also: Mapping[str, Config] | None = None,
) -> Recipe:
    """`plain` with one field moved.  Where a candidate that ignores the field could load the checkpoint, the first
    counterfactual is the field ignored, that is `plain` itself; `also` adds further ones.

    A tensor that is in the file and not read (an ignored bias) does not stop it; one of another shape does.
    """
    shapes, plain_shapes = tensor_shapes(config), tensor_shapes(plain)
    loads = all(shapes.get(name) == shape for name, shape in plain_shapes.items())
    return Recipe(
        name=f"{family}/field-{label}",
        summary=f"plain with {field} moved",
        config=config,
        weights=f"{family}/plain",
        claims=MODEST,
        field=field,
        counterfactuals=({f"{field} ignored": plain} if loads else {}) | dict(also or {}),
    )
