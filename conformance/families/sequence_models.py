"""What RNNsearch and GNMT share: claims, tensors of recurrent layers and of additive attention, probes of single steps.

Neither was ever in a library: the keys of config.json are this suite's own, the weights of recurrent layers have the
names and layouts of torch.nn.GRU and torch.nn.LSTM.
"""

from collections.abc import Callable
from dataclasses import replace

from conformance.families import Config, Recipe
from conformance.families.decoders import Claims, without
from conformance.families.encoder_decoders import MODEST
from conformance.probes import PROBED_STEPS

# What a case claims that stores the loss, and no gradients.
WITH_LOSS: Claims = MODEST | {"golden.loss": ("float64",)}
# What one sentence alone can claim: nothing is padded.
ALONE: Claims = without(MODEST, "golden.left_padding", "golden.right_padding", "cache.ragged")

# States of recurrent layers lie between -1 and 1: with weights as drawn the energies would be so small that attention
# is almost uniform and the tanh inside it almost linear, and mistakes there would drown in bfloat16's rounding.
SHARPER = {"attention.query_weight": 4.0, "attention.memory_weight": 4.0, "attention.score_vector": 2.0}

Shapes = dict[str, tuple[int, ...]]
Add = Callable[..., None]


def sharper(*recipes: Recipe) -> tuple[Recipe, ...]:
    """The recipes with attention weights that make attention choose."""
    return tuple(replace(recipe, scaled=SHARPER) for recipe in recipes)


def mistakes(config: Config, labels: tuple[str, ...]) -> dict[str, Config]:
    """Counterfactuals: what the configuration gives with one equation changed, by label.

    The labels are those of `conformance.oracles.sequence_mistakes`, which say what is changed.
    """
    return {label: config | {"mistake": label} for label in labels}


def decoder_vocabulary(config: Config) -> int:
    """Number of target ids; as many as source ids where the file says nothing."""
    return int(config.get("decoder_vocab_size") or config["vocab_size"])


def layer_shapes(name: str, gates: int, inputs: int, hidden: int, *, both_ways: bool = False) -> Shapes:
    """torch.nn's names and shapes of one recurrent layer."""
    rows = gates * hidden
    kinds = {"weight_ih": (rows, inputs), "weight_hh": (rows, hidden), "bias_ih": (rows,), "bias_hh": (rows,)}
    suffixes = ("", "_reverse") if both_ways else ("",)
    return {f"{name}.{kind}_l0{suffix}": shape for suffix in suffixes for kind, shape in kinds.items()}


def attention_shapes(config: Config, annotation: int) -> Shapes:
    """W_a, U_a, b_a and v_a of vᵀ tanh(W_a s + U_a h + b_a)."""
    hidden, inner = config["hidden_size"], config["attention_size"]
    return {
        "decoder.attention.query_weight": (inner, hidden),
        "decoder.attention.memory_weight": (inner, annotation),
        "decoder.attention.bias": (inner,),
        "decoder.attention.score_vector": (inner,),
    }


def add_steps(add: Add, annotation: tuple[str, ...], memory: str, before: tuple[str, ...]) -> list[str]:
    """The probes of the first steps, in which the search comes before the step.

    annotation: axes of a context beside "batch"; memory: probe of the annotations; before: probes of the state that the
    first step begins with (none where it is zero).
    Returns: what comes of them, states and contexts.
    """
    found: list[str] = []
    for i in range(PROBED_STEPS):
        a, state = f"decoder.steps.{i}.cross_attention.", f"decoder.steps.{i}.state"
        add(a + "scores", ("batch", "source"), memory, *before)
        add(a + "weights", ("batch", "source"), a + "scores")
        add(a + "context", ("batch", *annotation), a + "weights", memory)
        add(state, ("batch", "hidden"), a + "context", "decoder.embedding", *before)
        found += [a + "context", state]
        before = (state,)
    return found


def step_places(state: str) -> dict[str, tuple[str, str]]:
    """Where the reference shows them; `state` is the path of the module that the new state passes through."""
    places = {}
    for i in range(PROBED_STEPS):
        for part in ("scores", "weights", "context"):
            places[f"decoder.steps.{i}.cross_attention.{part}"] = (f"decoder.attention.{part}[{i}]", "output")
        places[f"decoder.steps.{i}.state"] = (f"{state}[{i}]", "output")
    return places
