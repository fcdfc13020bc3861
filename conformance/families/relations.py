"""Properties of components: pairs of calls whose returns must agree, by what the maths says.

Each is a `Relation`, which a component's file lists under the check that puts it to a candidate.  `call` holds tensors
and settings by name, floats drawn anew; `example` what was drawn beside.
"""

from typing import TYPE_CHECKING, Any

from conformance.families.properties import Relation

if TYPE_CHECKING:
    from conformance.families import ComponentRecipe

Call = dict[str, Any]
Made = tuple[Call, Call]


def _unmasked(recipe: "ComponentRecipe") -> bool:
    return not {"attention_mask", "source_mask", "lengths"} & recipe.inputs.keys()


# --- batching --------------------------------------------------------------------------------------------------------


def rows(*batched: str, states: tuple[str, ...] = (), returned_states: tuple[str, ...] = ()) -> Relation:
    """A row alone gets what it gets in the batch.

    batched: arguments whose first axis is the batch; states: those whose second is; likewise the returns.
    """

    def make(call: Call, example: Call) -> Made:
        row = example["row"] % len(call[batched[0]])
        cut = {name: call[name][row : row + 1] for name in batched if name in call}
        return {}, cut | {name: call[name][:, row : row + 1] for name in states if name in call}

    def expected(returns: Call, example: Call) -> Call:
        found = {}
        for name, value in returns.items():
            row = example["row"] % value.shape[name in returned_states]
            found[name] = value[:, row : row + 1] if name in returned_states else value[row : row + 1]
        return found

    return Relation(
        everywhere=True, applies=lambda recipe: not recipe.compared, make=make, expected=expected,
        sizes=lambda example: {"batch": 1}, draws={"row": (0, 5)},
    )  # fmt: skip


# --- norms -----------------------------------------------------------------------------------------------------------


def scale(*inputs: str) -> Relation:
    """A norm does not see the scale of its input: n times the input with n² times ε gives the same."""

    def make(call: Call, example: Call) -> Made:
        times = example["times"]
        return {}, {name: call[name] * times for name in inputs} | {"eps": call["eps"] * times**2}

    return Relation(everywhere=True, make=make, draws={"times": (2, 9)})


def offset(*inputs: str) -> Relation:
    """LayerNorm takes the mean away: the same number added to all elements changes nothing."""

    def make(call: Call, example: Call) -> Made:
        return {}, {inputs[0]: call[inputs[0]] + example["added"]}

    return Relation(everywhere=True, make=make, draws={"added": (1, 9)})


# --- attention -------------------------------------------------------------------------------------------------------


def rotated_distance() -> Relation:
    """Products of rotated vectors depend on the distance of their positions alone."""

    def products(returns: Call, example: Call) -> Call:
        y = returns["y"]
        return {"the products of rotated vectors": y @ y.transpose(-1, -2)}

    return Relation(
        make=lambda call, example: ({}, {"position_ids": call["position_ids"] + example["shift"]}),
        expected=products, compared=products, draws={"shift": (1, 500)},
    )  # fmt: skip


def _sums(returns: Call, *names: str) -> Call:
    """Sums over the keys, of the optional returns that there are."""
    return {f"the sum of {name}": returns[name].sum(-1) for name in names if name in returns}


def _ones(sums: Call) -> Call:
    return {name: value * 0 + 1 for name, value in sums.items()}


def mixes_values(*, query: str = "query", key: str = "key", value: str = "value", axis: int = 1) -> Relation:
    """Attention weights add up to 1: where all values are alike the queries and keys do not matter."""

    def make(call: Call, example: Call) -> Made:
        alike = {value: call[value].narrow(axis, 0, 1).expand_as(call[value]).clone()}
        return alike, alike | {query: call[query].flip(-1) * 2, key: call[key].roll(1, dims=-1)}

    def expected(returns: Call, example: Call) -> Call:
        sums = _ones(_sums(returns, "weights"))
        return {name: returns[name] for name in ("y", "context") if name in returns} | sums

    return Relation(
        applies=_unmasked, make=make, expected=expected,
        compared=lambda returns, example: returns | _sums(returns, "weights"),
    )  # fmt: skip


def mixes_memory(result: str) -> Relation:
    """Attention weights add up to 1: a source of equal positions is a source of one position."""

    def make(call: Call, example: Call) -> Made:
        memory = call["memory"]
        mask = {"source_mask": call["source_mask"][:, :1] | True} if "source_mask" in call else {}
        return {"memory": memory[:, :1].expand_as(memory).clone()}, {"memory": memory[:, :1], **mask}

    return Relation(
        make=make, sizes=lambda example: {"source": 1},
        expected=lambda returns, example: {result: returns[result]} | _ones(_sums(returns, "attention_weights")),
        compared=lambda returns, example: returns | _sums(returns, "attention_weights"),
    )  # fmt: skip


def _order(length: int, example: Call) -> list[int]:
    """A permutation without a fixed point where there are two tokens or more."""
    by = 1 + example["turn"] % max(1, length - 1)
    return [(place + by) % length for place in range(length)]


def blind_to_order() -> Relation:
    """Without positions and a causal mask, keys may change places with their values, and queries with their results."""

    def make(call: Call, example: Call) -> Made:
        keys, queries = _order(call["key"].shape[1], example), _order(call["query"].shape[1], example)
        mask = {"attention_mask": call["attention_mask"][:, keys]} if "attention_mask" in call else {}
        return {}, {
            "query": call["query"][:, queries], "key": call["key"][:, keys], "value": call["value"][:, keys], **mask,
        }  # fmt: skip

    return Relation(
        applies=lambda recipe: recipe.settings["causal"] is False and not recipe.compared, make=make,
        expected=lambda returns, example: {"y": returns["y"][:, _order(returns["y"].shape[1], example)]},
        draws={"turn": (0, 9)},
    )  # fmt: skip


def source_order(result: str) -> Relation:
    """The positions of a source may change places, with their marks in the mask."""

    def make(call: Call, example: Call) -> Made:
        order = _order(call["memory"].shape[1], example)
        return {}, {name: call[name][:, order] for name in ("memory", "source_mask") if name in call}

    return Relation(
        everywhere=True, make=make, expected=lambda returns, example: {result: returns[result]}, draws={"turn": (0, 9)}
    )


def padding(mask: str, *covered: str) -> Relation:
    """What stands in masked places has no effect: other junk there gives the same."""

    def make(call: Call, example: Call) -> Made:
        hidden = call[mask] == 0
        return {}, {name: call[name].masked_fill(hidden[..., None], example["junk"]) for name in covered}

    return Relation(
        applies=lambda recipe: mask in recipe.inputs and not recipe.compared, make=make,
        expected=lambda returns, example: {n: v for n, v in returns.items() if n not in ("scores", "energies")},
        draws={"junk": (2, 9)},
    )  # fmt: skip


def repeated_key_values() -> Relation:
    """Grouped-query attention is multi-head attention whose key and value heads are repeated."""

    def make(call: Call, example: Call) -> Made:
        heads, shared = call["num_attention_heads"], call["num_key_value_heads"]
        repeated = {
            name: call[name].unflatten(0, (shared, -1)).repeat_interleave(heads // shared, dim=0).flatten(0, 1)
            for name in ("k_proj_weight", "k_proj_bias", "v_proj_weight", "v_proj_bias")
        }
        return {}, repeated | {"num_key_value_heads": heads}

    return Relation(
        applies=lambda recipe: recipe.settings["num_key_value_heads"] < recipe.settings["num_attention_heads"],
        make=make,
    )


def wide_window() -> Relation:
    """A window as long as the text is no window: a longer one gives the same."""
    return Relation(
        everywhere=True,
        make=lambda call, example: (
            {"sliding_window": call["key"].shape[2]}, {"sliding_window": call["key"].shape[2] + example["longer"]},
        ),
        draws={"longer": (1, 99)},
    )  # fmt: skip


def last_query(*results: str, axis: int = 1, size: str = "queries") -> Relation:
    """Queries do not see each other: the last one alone gets what it gets among all.

    axis: of the queries.  size: the name of that axis.
    """

    def last(value: Any) -> Any:
        return value.narrow(axis, value.shape[axis] - 1, 1)

    return Relation(
        everywhere=True, applies=lambda recipe: not recipe.compared,
        make=lambda call, example: ({}, {"query": last(call["query"])}), sizes=lambda example: {size: 1},
        expected=lambda returns, example: {name: last(returns[name]) for name in results if name in returns},
    )  # fmt: skip


def first_tokens() -> Relation:
    """Causality: the first tokens of a segment, alone with the memory, get what they get with others behind them.

    There are then more distances than keys.
    """
    return Relation(
        everywhere=True, draws={"tokens": (1, 3)},
        make=lambda call, example: ({}, {"x": call["x"][:, : 1 + example["tokens"]]}),
        sizes=lambda example: {"seq": 1 + example["tokens"], "keys": -1},
        expected=lambda returns, example: {"y": returns["y"][:, : 1 + example["tokens"]]},
        compared=lambda returns, example: {"y": returns["y"]},
    )  # fmt: skip


def places_with_tokens() -> Relation:
    """A token is turned by its own position: tokens may change places with their positions."""

    def make(call: Call, example: Call) -> Made:
        order = _order(call["x"].shape[2], example)
        return {}, {"x": call["x"][:, :, order], "position_ids": call["position_ids"][:, order]}

    def expected(returns: Call, example: Call) -> Call:
        return {name: value[:, :, _order(value.shape[2], example)] for name, value in returns.items()}

    return Relation(everywhere=True, make=make, expected=expected, draws={"turn": (0, 9)})


def exact_table() -> Relation:
    """Rows of a table beyond the last position do not matter, and the last row that there is does not either."""

    def make(call: Call, example: Call) -> Made:
        mask = call.get("attention_mask")
        tokens = call["x"].shape[1] if mask is None else int((mask != 0).sum(1).max())
        return {}, {"weight": call["weight"][:tokens]}

    return Relation(everywhere=True, make=make)


def kept_state(state: str, keep: tuple[float, ...]) -> Relation:
    """A state whose gates say keep is kept, however large it is: n times the initial state gives n times the final one.

    state: "c" or "h".  keep: for each block of rows the number that its biases have; weights are zero.
    Hochreiter & Schmidhuber 1997, "constant error carousel".
    """

    def make(call: Call, example: Call) -> Made:
        import torch

        zero = {name: value * 0 for name, value in call.items() if name.startswith(("weight_", "bias_"))}
        for name in zero:
            if name.startswith("bias_ih"):
                blocks = [block + number for block, number in zip(zero[name].chunk(len(keep)), keep, strict=True)]
                zero[name] = torch.cat(blocks)
        return zero, zero | {f"{state}0": call[f"{state}0"] * example["times"]}

    return Relation(
        everywhere=True, make=make, draws={"times": (100, 999)},
        expected=lambda returns, example: {f"{state}_n": returns[f"{state}_n"] * example["times"]},
        compared=lambda returns, example: {f"{state}_n": returns[f"{state}_n"]},
    )  # fmt: skip


def narrow_window() -> Relation:
    """Keys before the window might as well not be there: the last query, alone with its window and the key before it,
    gets what it gets among all."""

    def make(call: Call, example: Call) -> Made:
        kept = {name: call[name][:, :, -example["window"] - 1 :] for name in ("key", "value")}
        window = {"sliding_window": example["window"]}
        return window, window | kept | {"query": call["query"][:, :, -1:]}

    return Relation(
        everywhere=True, make=make, draws={"window": (1, 5)},
        sizes=lambda example: {"queries": 1, "keys": example["window"] + 1},
        expected=lambda returns, example: {"y": returns["y"][:, :, -1:]},
    )  # fmt: skip


# --- experts ---------------------------------------------------------------------------------------------------------


def _alike(call: Call) -> Call:
    """Expert 0 in the place of all."""
    names = ("w1_weight", "w2_weight", "w3_weight")
    return {name: call[name][:1].expand_as(call[name]).clone() for name in names}


def one_expert() -> Relation:
    """Experts that are all alike are one expert, alone and without a choice: the router's weights add up to 1."""

    def make(call: Call, example: Call) -> Made:
        names = ("gate_weight", "w1_weight", "w2_weight", "w3_weight")
        return _alike(call), {name: call[name][:1] for name in names} | {"num_experts_per_tok": 1}

    return Relation(
        everywhere=True, make=make, sizes=lambda example: {"experts": 1},
        expected=lambda returns, example: {"y": returns["y"]} | _ones(_sums(returns, "routing_weights")),
        compared=lambda returns, example: returns | _sums(returns, "routing_weights"),
    )  # fmt: skip


# --- recurrence ------------------------------------------------------------------------------------------------------


def reversal() -> Relation:
    """Read backwards, with the directions' weights and states exchanged, a text gives the same outputs backwards."""

    def make(call: Call, example: Call) -> Made:
        other = {"x": call["x"].flip(1)}
        for name in call:
            if name.startswith(("weight_", "bias_")):
                twin = name.removesuffix("_reverse") if name.endswith("_reverse") else f"{name}_reverse"
                other[name] = call[twin]
            elif name in ("h0", "c0"):
                other[name] = call[name].flip(0)
        return {}, other

    def expected(returns: Call, example: Call) -> Call:
        forward, reverse = returns["output"].flip(1).chunk(2, dim=-1)
        states: Call = {name: returns[name].flip(0) for name in ("h_n", "c_n") if name in returns}
        return {"output": _beside(reverse, forward), **states}

    return Relation(
        applies=lambda recipe: (
            bool(recipe.settings["bidirectional"]) and recipe.settings["num_layers"] == 1 and _unmasked(recipe)
        ),
        make=make, expected=expected,
    )  # fmt: skip


def _beside(left: Any, right: Any) -> Any:
    import torch

    return torch.cat([left, right], dim=-1)


def junk_after_lengths() -> Relation:
    """What stands behind a row's length has no effect."""

    def make(call: Call, example: Call) -> Made:
        import torch

        hidden = torch.arange(call["x"].shape[1]) >= call["lengths"].cpu()[:, None]
        return {}, {"x": call["x"].masked_fill(hidden[..., None].to(call["x"].device), example["junk"])}

    return Relation(applies=lambda recipe: "lengths" in recipe.inputs, make=make, draws={"junk": (2, 9)})
