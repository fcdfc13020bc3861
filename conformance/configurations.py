"""Hypothesis strategies for valid configurations of a family: what `conformance fuzz` draws.

Public: `configurations(family)` gives a strategy whose examples are contents of config.json, small enough for a forward
in milliseconds.  Each begins with the family's `plain` case; sizes are drawn, and every field that changes the maths is
either at its default or moved.  Examples shrink towards the smallest sizes and the defaults.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from conformance.families import Config, get
from conformance.families.decoders import rope_keys

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

# The longest sequence that is fed to a drawn configuration: sizes of context must hold it.
LONGEST = 16

ACTIVATIONS = st.sampled_from(["silu", "gelu", "gelu_new", "relu"])
EPSILONS = st.sampled_from([1e-5, 1e-6, 1e-3, 0.05])
THETAS = st.sampled_from([10000.0, 1e6, 500.0, 3.0])
FLAG = st.booleans()


def configurations(family: str) -> "SearchStrategy[Config]":
    """Valid configurations of a model's family.

    Raises: ValueError if none are known of it.
    """
    if family not in DRAWN:
        raise ValueError(f"no configurations are drawn for family {family!r}; there is {', '.join(DRAWN)}")
    return st.composite(DRAWN[family])()


def plain(family: str) -> Config:
    """The configuration of the family's plain case."""
    config: Config = next(r.config for r in get(family).recipes if r.name == f"{family}/plain")
    return dict(config)


def between(least: int, most: int) -> "SearchStrategy[int]":
    """A size.  Hypothesis' own integers are at the least and the most half of the time, where few bugs show."""
    return st.sampled_from(range(least, most + 1))


def lengths() -> "SearchStrategy[int]":
    """Tokens of a sequence, from 1 to LONGEST, half of them among the longest: windows and scalings show there."""
    return st.one_of(between(1, LONGEST), between(LONGEST - 3, LONGEST))


# --- pieces ---------------------------------------------------------------------------------------------------------


def rope(draw: "DrawFn", **more: Any) -> Config:
    """Rotary parameters in both spellings: a base, and perhaps a scaling."""
    parameters = {"rope_type": "default", "rope_theta": draw(THETAS), **more}
    factor = draw(st.sampled_from([2.0, 4.0, 1.5]))
    kind = draw(st.sampled_from(["default", "linear", "llama3"]))
    if kind == "linear":
        parameters |= {"rope_type": "linear", "factor": factor}
    if kind == "llama3":
        low = draw(st.sampled_from([1.0, 1.25, 2.0]))
        parameters |= {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low,
            "high_freq_factor": low + draw(st.sampled_from([1.0, 2.5])),
            "original_max_position_embeddings": draw(st.sampled_from([8, 24, 64])),
        }  # fmt: skip
    return rope_keys(parameters)


def heads_that_share(draw: "DrawFn") -> tuple[int, int]:
    """Query heads, and key-value heads that they can share evenly."""
    shared, groups = draw(between(1, 4)), draw(between(1, 3))
    return shared * groups, shared


def vocabulary(draw: "DrawFn") -> int:
    return draw(between(12, 40))


def even(draw: "DrawFn", most: int) -> int:
    return 2 * draw(between(1, most // 2))


# --- families -------------------------------------------------------------------------------------------------------


def llama_sizes(draw: "DrawFn") -> Config:
    """What Llama, Mistral and Mixtral have in common."""
    heads, shared = heads_that_share(draw)
    width = even(draw, 10)
    hidden = heads * draw(between(2, 8)) if draw(FLAG) else heads * width
    sizes = {
        "vocab_size": vocabulary(draw), "hidden_size": hidden, "intermediate_size": draw(between(1, 30)),
        "num_hidden_layers": draw(between(1, 3)), "num_attention_heads": heads, "num_key_value_heads": shared,
        "hidden_act": draw(ACTIVATIONS), "rms_norm_eps": draw(EPSILONS), "tie_word_embeddings": draw(FLAG),
    }  # fmt: skip
    if hidden != heads * width:
        sizes["head_dim"] = width
    return sizes | rope(draw)


def llama(draw: "DrawFn") -> Config:
    return plain("llama") | llama_sizes(draw) | {"attention_bias": draw(FLAG), "mlp_bias": draw(FLAG)}


def window(draw: "DrawFn") -> Config:
    return {"sliding_window": draw(st.one_of(st.none(), between(1, LONGEST), between(1, LONGEST)))}


def mistral(draw: "DrawFn") -> Config:
    return plain("mistral") | llama_sizes(draw) | window(draw)


def mixtral(draw: "DrawFn") -> Config:
    experts = draw(between(1, 6))
    routing = {"num_local_experts": experts, "num_experts_per_tok": draw(between(1, experts))}
    return plain("mixtral") | llama_sizes(draw) | window(draw) | routing


def phi(draw: "DrawFn") -> Config:
    heads, shared = heads_that_share(draw)
    head_dim = even(draw, 12)
    turned = 2 * draw(between(1, head_dim // 2))
    return plain("phi") | {
        "vocab_size": vocabulary(draw), "hidden_size": heads * head_dim, "intermediate_size": draw(between(1, 30)),
        "num_hidden_layers": draw(between(1, 3)), "num_attention_heads": heads, "num_key_value_heads": shared,
        "hidden_act": draw(ACTIVATIONS), "layer_norm_eps": draw(EPSILONS), "qk_layernorm": draw(FLAG),
        "tie_word_embeddings": draw(FLAG), **rope(draw, partial_rotary_factor=turned / head_dim),
    }  # fmt: skip


def gpt_sizes(draw: "DrawFn") -> Config:
    """What GPT, GPT-2 and GPT-3 have in common."""
    heads = draw(between(1, 4))
    return {
        "vocab_size": vocabulary(draw), "n_positions": draw(between(LONGEST, LONGEST + 9)),
        "n_embd": heads * draw(between(1, 8)), "n_layer": draw(between(1, 3)), "n_head": heads,
        "layer_norm_epsilon": draw(EPSILONS), "tie_word_embeddings": draw(st.just(True) | FLAG),
    }  # fmt: skip


def gpt(draw: "DrawFn") -> Config:
    return plain("gpt") | gpt_sizes(draw) | {"afn": draw(st.sampled_from(["gelu", "relu", "silu", "swish"]))}


def transformer_xl(draw: "DrawFn") -> Config:
    """The memory is as long as what a query may see: in pieces of any size a text is then as it is in one."""
    vocab, div_val, same_length = vocabulary(draw), draw(between(1, 4)), draw(FLAG)
    cutoffs = sorted(draw(st.sets(between(1, vocab - 1), max_size=3)))
    tied = draw(st.none() | st.lists(FLAG, min_size=len(cutoffs) + 1, max_size=len(cutoffs) + 1))
    return plain("transformer_xl") | {
        "vocab_size": vocab, "cutoffs": cutoffs, "div_val": div_val, "d_model": even(draw, 16),
        "d_embed": div_val ** len(cutoffs) * draw(between(1, 3)), "n_layer": draw(between(1, 3)),
        "n_head": draw(between(1, 4)), "d_head": draw(between(1, 8)), "d_inner": draw(between(1, 24)),
        "same_length": same_length, "mem_len": draw(between(1, LONGEST) if same_length else between(LONGEST, 20)),
        "clamp_len": draw(st.sampled_from([1000, -1, 0]) | between(1, LONGEST)), "pre_lnorm": draw(FLAG),
        "untie_r": draw(FLAG), "layer_norm_epsilon": draw(EPSILONS), "tie_word_embeddings": draw(FLAG),
        "proj_share_all_but_first": draw(FLAG), **({} if tied is None else {"tie_projs": tied}),
    }  # fmt: skip


def gpt2_options(draw: "DrawFn") -> Config:
    return {
        "n_inner": draw(st.none() | between(1, 30)),
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "relu", "silu"])),
    }


def gpt2(draw: "DrawFn") -> Config:
    options = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
    scaled = {"scale_attn_weights": not draw(FLAG)}
    return plain("gpt2") | gpt_sizes(draw) | gpt2_options(draw) | scaled | {name: draw(FLAG) for name in options}


def gpt3(draw: "DrawFn") -> Config:
    pattern = draw(st.lists(st.sampled_from(["dense", "banded"]), min_size=1, max_size=3))
    band = {"attention_pattern": pattern, "window_size": draw(between(1, LONGEST))}
    return plain("gpt3") | gpt_sizes(draw) | gpt2_options(draw) | band


def transformer(draw: "DrawFn") -> Config:
    heads, others = draw(between(1, 4)), draw(between(1, 3))
    vocab = vocabulary(draw)
    shared = draw(FLAG)
    target = vocab if shared else vocabulary(draw)
    return plain("transformer") | {
        "model_type": draw(st.sampled_from(["marian", "transformer"])),
        "vocab_size": vocab, "decoder_vocab_size": target, "d_model": 2 * heads * others * draw(between(1, 2)),
        "encoder_layers": draw(between(1, 3)), "decoder_layers": draw(between(1, 3)),
        "encoder_attention_heads": heads, "decoder_attention_heads": others,
        "encoder_ffn_dim": draw(between(1, 24)), "decoder_ffn_dim": draw(between(1, 24)),
        "activation_function": draw(st.sampled_from(["relu", "gelu", "swish"])),
        "scale_embedding": draw(FLAG), "share_encoder_decoder_embeddings": shared,
        "tie_word_embeddings": shared or draw(FLAG), "pad_token_id": min(vocab, target) - 1,
    }  # fmt: skip


# Buckets and the distance that they end at. Where a bucket begins at an exact power, a rounded logarithm may put it one
# too low, in the library as well; these have no such place below LONGEST.
BUCKETS = st.sampled_from([(32, 128), (8, 20), (10, 7), (12, 11), (32, 20), (4, 9)])


def switch_transformer(draw: "DrawFn") -> Config:
    """Half of the drawn experts have room for all; the others are compared in full forwards only."""
    layers, deep = draw(between(1, 3)), draw(st.none() | between(1, 3))
    buckets, distance = draw(BUCKETS)
    config = plain("switch_transformer") | {
        "vocab_size": vocabulary(draw), "d_model": draw(between(2, 20)), "d_kv": draw(between(1, 8)),
        "d_ff": draw(between(1, 24)), "num_heads": draw(between(1, 4)), "num_layers": layers,
        "num_decoder_layers": deep, "num_sparse_encoder_layers": draw(between(1, layers)),
        "num_sparse_decoder_layers": draw(between(1, deep or layers)), "num_experts": draw(between(1, 5)),
        "expert_capacity": draw(st.just(64) | between(1, LONGEST)), "router_bias": draw(FLAG),
        "router_ignore_padding_tokens": draw(FLAG), "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": distance, "layer_norm_epsilon": draw(EPSILONS),
        "dense_act_fn": draw(ACTIVATIONS), "tie_word_embeddings": draw(st.just(True) | FLAG),
    }  # fmt: skip
    for step in ("encoder_sparse_step", "decoder_sparse_step"):
        config.pop(step)
        if (value := draw(st.none() | between(0, 3))) is not None:
            config[step] = value
    return config


def recurrent_sizes(draw: "DrawFn") -> Config:
    """What RNNsearch and GNMT have in common."""
    return {
        "vocab_size": vocabulary(draw), "decoder_vocab_size": vocabulary(draw),
        "hidden_size": draw(between(1, 8)), "attention_size": draw(between(1, 8)),
    }  # fmt: skip


def rnn_search(draw: "DrawFn") -> Config:
    sizes = {"embedding_size": draw(between(1, 8)), "maxout_size": draw(between(1, 6))}
    return plain("rnn_search") | recurrent_sizes(draw) | sizes | {"reset_after": draw(FLAG)}


def gnmt(draw: "DrawFn") -> Config:
    layers = {"encoder_layers": draw(between(2, 5)), "decoder_layers": draw(between(2, 5))}
    return plain("gnmt") | recurrent_sizes(draw) | layers | {"embedding_size": draw(between(1, 8))}


DRAWN: dict[str, Callable[["DrawFn"], Config]] = {
    "rnn_search": rnn_search, "gnmt": gnmt, "transformer": transformer, "gpt": gpt,
    "transformer_xl": transformer_xl, "gpt2": gpt2, "gpt3": gpt3, "switch_transformer": switch_transformer,
    "llama": llama, "mistral": mistral, "mixtral": mixtral, "phi": phi,
}  # fmt: skip
