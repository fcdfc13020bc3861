"""What Llama, Mistral and Mixtral share: names and shapes of tensors, names of modules, probes.

They differ in the feed-forward layer, which each family gives as a table.
"""

from collections.abc import Mapping

from conformance.families import Config
from conformance.families.decoders import kv_heads
from conformance.probes import ProbeSpec

# Name of a matrix inside a layer -> rows, columns, whether it has a bias.
Projections = dict[str, tuple[int, int, bool]]
# Probes of a feed-forward layer in computational order, the last one "output": name -> axes, parents ("norm" is given).
FeedForward = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]


def head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


# --- checkpoint -----------------------------------------------------------------------------------------------------


def attention_projections(config: Config, *, bias: bool = False) -> Projections:
    hidden = config["hidden_size"]
    queries, keys = config["num_attention_heads"] * head_dim(config), kv_heads(config) * head_dim(config)
    return {
        "self_attn.q_proj": (queries, hidden, bias),
        "self_attn.k_proj": (keys, hidden, bias),
        "self_attn.v_proj": (keys, hidden, bias),
        "self_attn.o_proj": (hidden, queries, bias),
    }


def gated_projections(config: Config, *, bias: bool = False) -> Projections:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    return {
        "mlp.gate_proj": (ffn, hidden, bias),
        "mlp.up_proj": (ffn, hidden, bias),
        "mlp.down_proj": (hidden, ffn, bias),
    }


def tensor_shapes(config: Config, projections: Projections) -> dict[str, tuple[int, ...]]:
    """Hub name -> shape of everything a checkpoint holds (no lm_head when it is tied)."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for name, (rows, columns, bias) in projections.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
    return shapes


# --- probes ---------------------------------------------------------------------------------------------------------

STREAM = ("batch", "seq", "hidden")
_INNER = ("batch", "seq", "intermediate")

GATED: FeedForward = {
    "gate": (_INNER, ("norm",)),
    "up": (_INNER, ("norm",)),
    "activation": (_INNER, ("gate",)),
    "product": (_INNER, ("activation", "up")),
    "output": (STREAM, ("product",)),
}
GATED_MODULES = {
    "gate": ("mlp.gate_proj", "output"),
    "up": ("mlp.up_proj", "output"),
    "activation": ("mlp.act_fn", "output"),
    "product": ("mlp.down_proj", "input"),
    "output": ("mlp.down_proj", "output"),
}


def probes(config: Config, feed_forward: FeedForward) -> list[ProbeSpec]:
    """The probes in computational order; heads are split into (kv_head, group) where a layout may split them."""
    specs = [ProbeSpec(name="embedding", axes=STREAM, parents=())]

    def add(name: str, axes: tuple[str, ...], *parents: str) -> None:
        specs.append(ProbeSpec(name=name, axes=axes, parents=parents))

    block_input = "embedding"
    for layer in range(config["num_hidden_layers"]):
        a, f = f"layers.{layer}.attention.", f"layers.{layer}.feed_forward."
        add(a + "norm", STREAM, block_input)
        add(a + "query", ("batch", "seq", "kv_head", "group", "head_dim"), a + "norm")
        add(a + "key", ("batch", "seq", "kv_head", "head_dim"), a + "norm")
        add(a + "value", ("batch", "seq", "kv_head", "head_dim"), a + "norm")
        add(a + "query_rotated", ("batch", "kv_head", "group", "seq", "head_dim"), a + "query")
        add(a + "key_rotated", ("batch", "kv_head", "seq", "head_dim"), a + "key")
        add(a + "scores", ("batch", "kv_head", "group", "seq", "key"), a + "query_rotated", a + "key_rotated")
        add(a + "weights", ("batch", "kv_head", "group", "seq", "key"), a + "scores")
        add(a + "context", ("batch", "seq", "kv_head", "group", "head_dim"), a + "weights", a + "value")
        add(a + "output", STREAM, a + "context")
        add(a + "residual", STREAM, a + "output", block_input)
        add(f + "norm", STREAM, a + "residual")
        for name, (axes, parents) in feed_forward.items():
            add(f + name, axes, *(f + parent for parent in parents))
        block_input = f"layers.{layer}.output"
        add(block_input, STREAM, f + "output", a + "residual")
    add("final_norm", STREAM, block_input)
    add("logits", ("batch", "seq", "vocab"), "final_norm")
    return specs


def probe_sizes(config: Config, batch: int, seq: int) -> dict[str, int]:
    """Axis name -> size, for the axes that `probes` uses."""
    heads, kv = config["num_attention_heads"], kv_heads(config)
    return {
        "batch": batch, "seq": seq, "key": seq, "hidden": config["hidden_size"], "vocab": config["vocab_size"],
        "intermediate": config["intermediate_size"], "kv_head": kv, "group": heads // kv, "head_dim": head_dim(config),
    }  # fmt: skip


def module_probes(config: Config, feed_forward: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Probe -> (module path as the hub names it, "input" or "output").

    feed_forward: the same for the feed-forward layer's own probes, names and paths inside the layer.
    What no module boundary shows is in `kernel_probes`.
    """
    found = {
        "embedding": ("model.embed_tokens", "output"),
        "final_norm": ("model.norm", "output"),
        "logits": ("lm_head", "output"),
    }
    inside = {
        "attention.norm": ("input_layernorm", "output"),
        "attention.query": ("self_attn.q_proj", "output"),
        "attention.key": ("self_attn.k_proj", "output"),
        "attention.value": ("self_attn.v_proj", "output"),
        "attention.context": ("self_attn.o_proj", "input"),
        "attention.output": ("self_attn.o_proj", "output"),
        "attention.residual": ("post_attention_layernorm", "input"),
        "feed_forward.norm": ("post_attention_layernorm", "output"),
        **{f"feed_forward.{name}": place for name, place in feed_forward.items()},
        "output": ("", "output"),
    }
    for layer in range(config["num_hidden_layers"]):
        for probe, (module, side) in inside.items():
            path = f"model.layers.{layer}.{module}".rstrip(".")
            found[f"layers.{layer}.{probe}"] = (path, side)
    return found
