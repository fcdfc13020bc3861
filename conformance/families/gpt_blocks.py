"""What GPT, GPT-2 and GPT-3 share: the tensors of a block, and the probes inside its attention and feed-forward."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from conformance.families import Config
from conformance.probes import ProbeSpec

if TYPE_CHECKING:
    from torch import Tensor

# Their modules' names do not say what kind of weight they hold.
MODULE_KINDS = {
    "wte": "embedding", "wpe": "embedding", "tokens_embed": "embedding", "positions_embed": "embedding",
    "ln_1": "norm", "ln_2": "norm", "ln_f": "norm",
    "c_attn": "conv1d", "c_proj": "conv1d", "c_fc": "conv1d",
}  # fmt: skip


def inner(config: Config) -> int:
    """Width inside the feed-forward block."""
    return int(config.get("n_inner") or 4 * config["n_embd"])


def block_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Hub name -> shape of every block's tensors; projections are stored (in, out)."""
    hidden, ffn = config["n_embd"], inner(config)
    projections = {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, ffn),
        "mlp.c_proj": (ffn, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config["n_layer"]):
        prefix = f"transformer.h.{layer}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{prefix}{norm}.weight": (hidden,), f"{prefix}{norm}.bias": (hidden,)}
        for name, shape in projections.items():
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[1:]}
    return shapes


def one_block(
    config: Config,
    weights: "dict[str, Tensor]",
    block_input: "Tensor",
    layer: int,
    *,
    table: str,
    positions: str,
    kept: tuple[str, ...] = (),
) -> "tuple[Config, dict[str, Tensor]]":
    """A one-layer checkpoint that feeds `block_input` (batch, seq, hidden) to block `layer` alone.

    Its embedding table (`table`) is the block's input, one row a token of the batch, so that arange(batch · seq) as ids
    looks it up; its position table (`positions`) is zero.  Block `layer` becomes layer 0; the tensors named in `kept`
    stay.  A tied head stays tied, to the new table; a head of its own gets as many rows as there are ids: the first
    ones, or all of them over and over.
    """
    import torch

    rows = block_input.flatten(0, 1)
    one = {
        name.replace(f"h.{layer}.", "h.0."): tensor
        for name, tensor in weights.items()
        if f".h.{layer}." in name or name in kept
    }
    one |= {table: rows.contiguous(), positions: torch.zeros_like(weights[positions])}
    if "lm_head.weight" in weights:
        one["lm_head.weight"] = weights["lm_head.weight"][torch.arange(len(rows)) % config["vocab_size"]]
    return config | {"n_layer": 1, "vocab_size": len(rows)}, one


STREAM = ("batch", "seq", "hidden")
Add = Callable[..., None]


def collector(specs: list[ProbeSpec]) -> Add:
    """A function add(name, axes, *parents) that appends to `specs`."""

    def add(name: str, axes: tuple[str, ...], *parents: str) -> None:
        specs.append(ProbeSpec(name=name, axes=axes, parents=parents))

    return add


def add_attention(add: Add, layer: int, source: str) -> str:
    """The probes of multi-head attention, from its input `source` to its output, whose name is returned."""
    a = f"layers.{layer}.attention."
    heads, scores = ("batch", "head", "seq", "head_dim"), ("batch", "head", "seq", "key")
    for part in ("query", "key", "value"):
        add(a + part, heads, source)
    add(a + "scores", scores, a + "query", a + "key")
    add(a + "weights", scores, a + "scores")
    add(a + "context", ("batch", "seq", "head", "head_dim"), a + "weights", a + "value")
    add(a + "output", STREAM, a + "context")
    return a + "output"


def add_feed_forward(add: Add, layer: int, source: str) -> str:
    """The probes of the feed-forward block, from its input `source` to its output, whose name is returned."""
    f = f"layers.{layer}.feed_forward."
    add(f + "up", ("batch", "seq", "intermediate"), source)
    add(f + "activation", ("batch", "seq", "intermediate"), f + "up")
    add(f + "output", STREAM, f + "activation")
    return f + "output"


# probe -> (module path inside a block, side), for both
INSIDE = {
    "attention.context": ("attn.c_proj", "input"),
    "attention.output": ("attn.c_proj", "output"),
    "feed_forward.up": ("mlp.c_fc", "output"),
    "feed_forward.activation": ("mlp.c_proj", "input"),
    "feed_forward.output": ("mlp.c_proj", "output"),
    "output": ("", "output"),
}


def inside_blocks(config: Config, inside: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Probe -> (module path, side) of every block, from those inside one block."""
    return {
        f"layers.{layer}.{probe}": (f"transformer.h.{layer}.{module}".rstrip("."), side)
        for layer in range(config["n_layer"])
        for probe, (module, side) in inside.items()
    }


def kernel_probes(config: Config) -> dict[str, tuple[str, str]]:
    """Probe -> (the nn.Identity that shows it in the reference, what the attention kernel calls the value)."""
    return {
        f"layers.{layer}.attention.{part}": (f"transformer.h.{layer}.attn.{part}", part)
        for layer in range(config["n_layer"])
        for part in ("query", "key", "value", "scores", "weights")
    }


def probe_sizes(config: Config, batch: int, seq: int) -> dict[str, int]:
    """Axis name -> size, for the axes that the probes use."""
    return {
        "batch": batch, "seq": seq, "key": seq, "hidden": config["n_embd"], "vocab": config["vocab_size"],
        "intermediate": inner(config), "head": config["n_head"], "head_dim": config["n_embd"] // config["n_head"],
    }  # fmt: skip
