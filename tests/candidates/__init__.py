"""Llama three times over, by hands that never met: the negative controls of the suite and their correct twins.

    batch_first   (B, T, H, Dh) throughout, einsum with grouped heads, nn.Modules with names of their own
    heads_first   (B, H, T, Dh), plain functions over the hub's tensors, float32 casts hard-coded
    fused_sdpa    fused QKV and gate-up, scaled_dot_product_attention, preallocated cache, complex rotary

The files share no code with each other or with `reference_impl`, so that agreement means something.  Each adapter takes
one mistake by name, or None for the correct model; the mistake is a visible branch at the one place where it lives.

Mistakes are what people really write, in their *silent* form, and some need a case that can show them:

    gqa_tile                        1 < num_key_value_heads < num_attention_heads, and their ratio > 1
    gelu_for_silu                   hidden_act silu (other activations are left alone)
    eps_1e6                         rms_norm_eps other than 1e-6
    norms_crossed                   norm weights that differ between the two norms of a block (all at 1 hides it)
    head_dim_derived                head_dim other than hidden_size // num_attention_heads.  Heads are still cut by the
                                    right head_dim; the scale and the spacing of the rotary frequencies are wrong
    decode_position_restart         a session of two feeds or more; the plain call is right
    heads_merged_without_transpose  two tokens and two heads or more
    batch_rows_swapped              two rows or more; ids change places, masks and positions do not
    causal_off_by_one               two tokens or more in the call or in one feed
"""

from .batch_first import BatchFirst
from .fused_sdpa import FusedSDPA
from .heads_first import HeadsFirst

LAYOUTS = {"batch_first": BatchFirst, "heads_first": HeadsFirst, "fused_sdpa": FusedSDPA}

# Mistake -> the first probe that it makes wrong, where every probe can be observed.
MISTAKES = {
    "interleaved_rotary": "layers.0.attention.query_rotated",
    "gqa_tile": "layers.0.attention.scores",
    "scale_missing": "layers.0.attention.scores",
    "gate_up_swapped": "layers.0.feed_forward.activation",
    "gelu_for_silu": "layers.0.feed_forward.activation",
    "eps_1e6": "layers.0.attention.norm",
    "causal_off_by_one": "layers.0.attention.weights",
    "norms_crossed": "layers.0.attention.norm",
    "decode_position_restart": "layers.0.attention.query_rotated",
    "head_dim_derived": "layers.0.attention.query_rotated",
    "heads_merged_without_transpose": "layers.0.attention.output",
    "batch_rows_swapped": "embedding",
}

# Probes of every layer that a layout never materialises.
UNOBSERVABLE: dict[str, frozenset[str]] = {
    "batch_first": frozenset(),
    "heads_first": frozenset(),
    "fused_sdpa": frozenset({"attention.scores", "attention.weights"}),
}

# Mistakes that only a session shows; the probes are those of its second feed.
SESSION_ONLY = frozenset({"decode_position_restart"})


def _expected(layout: str, mistake: str) -> str:
    probe = MISTAKES[mistake]
    hidden = any(probe.endswith(name) for name in UNOBSERVABLE[layout])
    return "layers.0.attention.context" if hidden else probe


# layout -> mistake -> the first wrong probe that can be observed there
FIRST_DIVERGENCE = {layout: {mistake: _expected(layout, mistake) for mistake in MISTAKES} for layout in LAYOUTS}

__all__ = [
    "FIRST_DIVERGENCE",
    "LAYOUTS",
    "MISTAKES",
    "SESSION_ONLY",
    "UNOBSERVABLE",
    "BatchFirst",
    "FusedSDPA",
    "HeadsFirst",
]
