"""What the component families share: claims."""

Claims = dict[str, tuple[str, ...]]

# A component whose oracle runs in every dtype.
ALL: Claims = {
    "component.outputs": ("float64", "float32", "bfloat16"),
    "component.gradients": ("float64",),
}
# One whose oracle is plain float64 loops.
EXACT: Claims = {"component.outputs": ("float64",)}
# The same, when the loops have gradients.
EXACT_GRADIENTS: Claims = {**EXACT, "component.gradients": ("float64",)}
# For inputs that stress the range of float16.
FLOAT16: Claims = {"component.outputs": ("float64", "float16")}
