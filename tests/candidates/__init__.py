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

# Mistakes of one layout only: layout -> mistake -> its first wrong probe, and the check that fails where it is not
# golden.logits (the probes of a session are those of its second feed).
_SCORES = "layers.0.attention.scores"
_CONTEXT = "layers.0.attention.context"
_TURNED = "layers.0.attention.query_rotated"
MORE: dict[str, dict[str, str]] = {
    "batch_first": {
        "rotary_sign": _TURNED,
        "keys_not_rotated": "layers.0.attention.key_rotated",
        "rotated_twice": _TURNED,
        "values_rotated": "layers.0.attention.context",
        "eps_outside_root": "layers.0.attention.norm",
        "mean_subtracted": "layers.0.attention.norm",
        "gain_plus_one": "layers.0.attention.norm",
        "final_norm_missing": "final_norm",
        "both_activated": "layers.0.feed_forward.product",
        "relu_for_silu": "layers.0.feed_forward.activation",
        "keys_values_swapped": "layers.0.attention.key_rotated",
        "query_bias_dropped": "layers.0.attention.query",
        "residual_from_block_input": "layers.0.output",
        "blocks_reversed": "layers.0.attention.norm",
        "embedding_scaled": "layers.0.attention.norm",  # after the rows were looked up
        "softmax_over_queries": "layers.0.attention.weights",
        "memory_values_forgotten": _CONTEXT,
        "memory_never_written": _SCORES,
    },
    "heads_first": {
        "exponent_halved": _TURNED,
        "half_without_minus": _TURNED,
        "scaling_ignored": _TURNED,
        "theta_default": _TURNED,
        "frequencies_reversed": _TURNED,
        "scale_twice": "layers.0.attention.weights",  # the scores were right once
        "scale_by_heads": _SCORES,
        "heads_split_by_view": _TURNED,
        "mask_after_softmax": "layers.0.attention.weights",
        "up_bias_dropped": "layers.0.feed_forward.gate",
        "output_bias_dropped": "layers.0.attention.output",
        "first_kv_head_for_all": _SCORES,
        "silu_is_sigmoid": "layers.0.feed_forward.activation",
        "residual_from_normed": "layers.0.attention.residual",
        "last_layer_missing": "layers.1.attention.norm",
        "tied_anyway": "logits",
        "logits_capped": "logits",
        "padding_seen": "",
        "cache_new_first": _SCORES,
        "square_weight_transposed": "layers.0.attention.query",
    },
    "fused_sdpa": {
        "llama3_blend_flipped": _TURNED,
        "llama3_without_2pi": _TURNED,
        "gqa_kv_index": _CONTEXT,
        "scale_by_hidden": _CONTEXT,
        "scale_by_width": _CONTEXT,
        "key_bias_dropped": "layers.0.attention.key",
        "value_bias_dropped": "layers.0.attention.value",
        "parallel_block": "layers.0.feed_forward.norm",
        "halves_swapped": "layers.0.attention.norm",
        "feed_forward_not_normed": "layers.0.feed_forward.norm",
        "qkv_read_as_qvk": "layers.0.attention.key_rotated",
        "log_softmax_returned": "logits",
        "no_causality": _CONTEXT,
        "rms_over_tokens": "layers.0.attention.norm",
        "down_bias_dropped": "layers.0.feed_forward.output",
        "attention_skip_missing": "layers.0.feed_forward.norm",  # taken off again
        "gate_plus_up": "layers.0.feed_forward.product",
        "positions_late": _TURNED,
        "store_of_first_row": _CONTEXT,
        "store_of_one_layer": _CONTEXT,
    },
}
# Mistakes that llama/distinct with golden.logits does not show: the claim that does.
SHOWN_BY = {
    "decode_position_restart": ("llama/distinct", "cache.prefill_decode"),
    "memory_values_forgotten": ("llama/distinct", "cache.prefill_decode"),
    "memory_never_written": ("llama/distinct", "cache.prefill_decode"),
    "padding_seen": ("llama/distinct", "golden.left_padding"),
    "cache_new_first": ("llama/distinct", "cache.chunks"),
    "square_weight_transposed": ("llama/square", "golden.logits"),
    "positions_late": ("llama/distinct", "cache.prefill_decode"),
    "store_of_first_row": ("llama/distinct", "cache.prefill_decode"),
    "store_of_one_layer": ("llama/distinct", "cache.prefill_decode"),
}
# Mistake -> the catalogue's entry.  What is not here is in no entry.
ENTRIES = {
    "interleaved_rotary": "rope-layout",
    "gqa_tile": "gqa-tile",
    "scale_missing": "attn-scale-missing",
    "gate_up_swapped": "swiglu-swap",
    "gelu_for_silu": "act-gelu-for-silu",
    "eps_1e6": "field-epsilon-default",
    "causal_off_by_one": "causal-mask-next-visible",
    "norms_crossed": "norm-weights-crossed",
    "decode_position_restart": "decode-position-restart",
    "head_dim_derived": "head-dim-derived",
    "heads_merged_without_transpose": "heads-merged-without-transpose",
    "rotary_sign": "rope-sign",
    "keys_not_rotated": "rope-keys-not-rotated",
    "rotated_twice": "rope-applied-twice",
    "values_rotated": "rope-on-values",
    "eps_outside_root": "rms-eps-outside",
    "mean_subtracted": "layernorm-for-rms",
    "gain_plus_one": "norm-weight-plus-one",
    "final_norm_missing": "final-norm-missing",
    "both_activated": "swiglu-both-activated",
    "relu_for_silu": "act-relu-for-silu",
    "keys_values_swapped": "qkv-k-v-swapped",
    "query_bias_dropped": "attn-query-bias-dropped",
    "residual_from_block_input": "residual-from-block-input",
    "blocks_reversed": "layer-order-reversed",
    "embedding_scaled": "emb-scale-extra",
    "softmax_over_queries": "attn-softmax-over-queries",
    "memory_never_written": "cache-written-as-zeros",
    "exponent_halved": "rope-exponent-halved",
    "half_without_minus": "rope-rotate-half-without-minus",
    "scaling_ignored": "rope-scaling-ignored",
    "theta_default": "rope-theta-default",
    "frequencies_reversed": "rope-frequencies-reversed",
    "scale_twice": "attn-scale-twice",
    "scale_by_heads": "attn-scale-nheads",
    "heads_split_by_view": "heads-split-by-view",
    "mask_after_softmax": "attn-mask-after-softmax",
    "up_bias_dropped": "ffn-up-bias-dropped",
    "output_bias_dropped": "attn-output-bias-dropped",
    "first_kv_head_for_all": "gqa-first-head-for-all",
    "silu_is_sigmoid": "act-silu-is-sigmoid",
    "residual_from_normed": "prenorm-residual-from-normed",
    "last_layer_missing": "layer-last-missing",
    "tied_anyway": "tie-word-embeddings-assumed",
    "logits_capped": "logits-soft-capped",
    "padding_seen": "mask-padding-ignored",
    "square_weight_transposed": "transpose-guessed-by-shape",
    "llama3_blend_flipped": "rope-llama3-blend-flipped",
    "llama3_without_2pi": "rope-llama3-without-2pi",
    "gqa_kv_index": "gqa-kv-index",
    "scale_by_width": "attn-scale-hidden",
    "key_bias_dropped": "attn-key-bias-dropped",
    "value_bias_dropped": "attn-value-bias-dropped",
    "parallel_block": "serial-block-parallel",
    "halves_swapped": "block-halves-swapped",
    "feed_forward_not_normed": "feed-forward-not-normed",
    "qkv_read_as_qvk": "qkv-k-v-swapped",
    "log_softmax_returned": "logits-are-log-probabilities",
    "no_causality": "causal-mask-dropped",
    "rms_over_tokens": "rms-over-tokens",
    "down_bias_dropped": "ffn-down-bias-dropped",
    "attention_skip_missing": "residual-attention-missing",
    "gate_plus_up": "swiglu-sum",
    "positions_late": "decode-position-late",
    "store_of_first_row": "cache-rows-mixed",
    "store_of_one_layer": "cache-shared-by-layers",
}
# Different in code, and right.
HARMLESS = {"batch_first": ("position_zero_is_one",)}

__all__ = [
    "ENTRIES",
    "FIRST_DIVERGENCE",
    "HARMLESS",
    "LAYOUTS",
    "MISTAKES",
    "MORE",
    "SESSION_ONLY",
    "SHOWN_BY",
    "UNOBSERVABLE",
    "BatchFirst",
    "FusedSDPA",
    "HeadsFirst",
]
