"""What the encoder–decoder families share: claims."""

from conformance.families.decoders import WORKING, Claims

# What every case claims: a full forward, padding of source and target, decoding.
MODEST: Claims = {
    "golden.logits": WORKING,
    "golden.left_padding": ("float64", "float32"),
    "golden.right_padding": ("float64", "float32"),
    "cache.prefill_decode": ("float64", "float32"),
    "cache.one_by_one": ("float64",),
    "cache.chunks": ("float64", "float32"),
    "cache.ragged": ("float64", "float32"),
}
# What one case of the family claims beside; it must store loss and gradients.
FULL: Claims = MODEST | {
    "golden.logits": (*WORKING, "float16"),
    "golden.loss": ("float64",),
    "golden.gradients": ("float64",),
}
