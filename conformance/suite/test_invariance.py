"""Invariances of the maths: what may change in a checkpoint or in its input without any effect."""

import functools
import json
from typing import TYPE_CHECKING, Any

from conformance.implementation import Unsupported
from conformance.strategies import permuted_texts, texts
from conformance.suite import drawn
from conformance.suite.related import calls_agree

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.families import Config, Family
    from conformance.implementation import Candidate
    from conformance.judge import Judge
    from conformance.search import Example

# Positions are shifted by at most so much: beyond what models are trained for, and float64 still knows the angles.
FARTHEST = 20_000


def test_shift(judge: "Judge") -> None:
    """With rotary positions only distances count: all positions moved by the same number give the same logits.

    Of the component alone, the products of rotated vectors are compared.  A mask of ones goes along where the model
    takes one, so that the positions are not read as those of packed texts.
    """
    import torch
    from hypothesis import strategies as st

    if judge.is_component:
        calls_agree(judge, "invariance.shift")
        return
    judge.candidate.need("position_ids")

    def holds(example: "Example") -> None:
        text = drawn.text(judge, example["ids"], example["batch"], example["length"])
        positions = torch.arange(example["length"]).expand(text.ids.shape) + example["shift"]
        moved = judge.logits(**text.arguments(torch.ones_like(text.ids)), position_ids=positions)
        judge.same(
            moved, drawn.logits(judge, text), f"logits move when all positions are {example['shift']} further on"
        )

    drawn_ = st.builds(
        lambda text, shift: {**text, "shift": shift}, texts(drawn.usual(judge)), st.integers(1, FARTHEST)
    )
    judge.search(drawn_, holds, [{"ids": 0, "batch": 1, "length": drawn.USUAL_TOKENS, "shift": FARTHEST}])


def test_repeated_key_values(judge: "Judge") -> None:
    """Grouped-query attention is multi-head attention whose key and value heads are repeated.

    A checkpoint that repeats them, and says that it has as many as query heads, gives the same logits.
    """
    if judge.is_component:
        calls_agree(judge, "invariance.repeated_key_values")
        return
    _twins(judge, "repeated_key_values", "logits differ when every query head has a copy of its key and value head")


def test_wide_window(judge: "Judge") -> None:
    """A window that no text outgrows is no window: the checkpoint without one gives the same logits."""
    if judge.is_component:
        calls_agree(judge, "invariance.wide_window")
        return
    _twins(judge, "wide_window", "logits with a window as long as the text differ from those without a window")


def test_one_query(judge: "Judge") -> None:
    """Queries do not see each other: the last one alone gets what it gets among all."""
    calls_agree(judge, "invariance.one_query")


def test_exact_table(judge: "Judge") -> None:
    """A table of positions may end with the last position that is looked up."""
    calls_agree(judge, "invariance.exact_table")


def test_kept_state(judge: "Judge") -> None:
    """A state that the gates keep is kept however large it is: nothing is clipped, and no gate is moved."""
    calls_agree(judge, "invariance.kept_state")


def test_loss(judge: "Judge") -> None:
    """The loss of a call is the mean cross-entropy of that call's logits, whatever the labels: no id is left out.

    Labels are the ids themselves, the last id of the vocabulary among them, each scored by the logits before it; of an
    encoder-decoder model each by the logits in its place.
    """
    import torch

    last, encoder_decoder = judge.candidate.vocab - 1, drawn.family(judge).encoder_decoder

    def holds(example: "Example") -> None:
        text = drawn.text(judge, example["ids"], example["batch"], example["length"])
        text = text.with_ids(last - text.ids)  # those that are not drawn, the last ones, in the place of the first
        text.ids[:, -1] = last
        with judge.precision():
            output = judge.candidate(**text.arguments(), labels=text.ids)
        if "loss" not in output.losses:
            raise Unsupported('the model returns no "loss"')
        logits, labels = output.logits.detach(), text.ids.to(output.logits.device)
        if not encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        judge.same(output.losses["loss"], entropy, "the loss differs from the cross-entropy of the same call's logits")

    most = drawn.usual(judge)
    judge.search(texts(most, shortest=2), holds, [{"ids": 0, "batch": 2, "length": most}])


def test_absent(judge: "Judge") -> None:
    """A key of config.json whose value is the default may be left out, whatever the other keys say.

    Each key whose default does not ask for tensors of other shapes than the checkpoint has, one by one, but for numbers
    of heads: their defaults need not divide the checkpoint's width.  The profile `quick` tries in a family's second
    case those that the first one lacks, 6 at least.
    """
    family, config = drawn.family(judge), judge.case.config
    defaults = _defaults(family, config)
    names = drawn.tried(judge, list(defaults), lambda other: _defaults(family, other))
    text = drawn.text(judge, 0, 2, drawn.usual(judge))

    @functools.cache
    def logits(said: str) -> "Tensor":
        if said == json.dumps(config):
            return drawn.logits(judge, text)
        return drawn.logits_of(judge, judge.load_other(json.loads(said), judge.case.weights), text)

    def holds(example: "Example") -> None:
        name = example["field"]
        without = {key: value for key, value in config.items() if key != name}
        stated, absent = (logits(json.dumps(said)) for said in (config | {name: defaults[name]}, without))
        judge.same(absent, stated, f"logits without {name} differ from those with {name} at {defaults[name]!r}")

    judge.each([{"field": name} for name in names], holds)


def _defaults(family: "Family", config: "Config") -> dict[str, Any]:
    """The defaults of the keys that may be left out of a configuration or stated in it: its tensors fit either."""
    shapes = _shapes(family, config)
    elsewhere = {name for value in config.values() if isinstance(value, dict) for name in value}
    found = {}
    for field in family.fields:
        if "heads" in field.name or field.name in elsewhere or isinstance(config.get(field.name), dict):
            continue
        try:
            default = json.loads(field.default)
        except ValueError:  # words: what it is follows from other keys
            continue
        if _shapes(family, config | {field.name: default}) == shapes:
            found[field.name] = default
    return found


def _shapes(family: "Family", config: "Config") -> dict[str, tuple[int, ...]] | None:
    """The shapes of a configuration's tensors; None where there are none such."""
    try:
        return {name: tuple(shape) for name, shape in family.tensor_shapes(config).items()}
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):
        return None


def test_narrow_window(judge: "Judge") -> None:
    """In a window of one key a query sees itself alone: which one it would prefer does not matter.

    Of the component alone: keys before the window of the last query might as well not be there.
    """
    if judge.is_component:
        calls_agree(judge, "invariance.narrow_window")
        return
    _twins(judge, "narrow_window", "logits in a window of one key depend on the queries")


def test_spelling(judge: "Judge") -> None:
    """What config.json says can be said in two ways.

    An activation by either of its names; in older files `type` for the `rope_type` of a scaling (here by a factor of
    2.5); a clamp_len of 0 for one of −1.
    """
    _twins(judge, "spelling", "logits differ when config.json says the same in another way")


def test_layer_scale(judge: "Judge") -> None:
    """Scores divided by the block's number are those of queries that are so much smaller, in each of four blocks."""
    _twins(judge, "layer_scale", "logits of queries that grow with the block, scores divided by its number, differ")


def test_one_expert(judge: "Judge") -> None:
    """Experts that are all alike are one expert, whatever the router says: its weights add up to 1."""
    if judge.is_component:
        calls_agree(judge, "invariance.one_expert")
        return
    _twins(judge, "one_expert", "logits of experts that are all alike differ from those of that expert alone")


def test_order(judge: "Judge") -> None:
    """Without positions attention is blind to order.

    Keys may change places with their values; in a model of one layer whose table of positions is zero the last token's
    logits stay when the tokens before it change places.
    """
    import torch

    if judge.is_component:
        calls_agree(judge, "invariance.order")
        return
    other, tokens = _without_positions(judge)

    def holds(example: "Example") -> None:
        order = example["order"]
        text = drawn.ids(judge, example["ids"], 1, len(order) + 1) % tokens
        changed = torch.cat([text[:, order], text[:, -1:]], dim=1)
        got, wanted = (drawn.logits_of(judge, other, drawn.Text(ids, None))[:, -1:] for ids in (changed, text))
        judge.same(got, wanted, "without positions, the order of earlier tokens moves the last one's logits")

    judge.search(permuted_texts(1), holds, [{"ids": 0, "length": 1, "order": [2, 0, 1]}])


def test_weights_sum_to_one(judge: "Judge") -> None:
    """Attention weights add up to 1: where all values are alike, the result is that value, whatever the scores.

    So of a text that is one token over and over all rows are alike, in a model whose positions only tell distances; of
    a model with a table of positions in one layer of it alone, where the table is zero.
    """
    if judge.is_component:
        calls_agree(judge, "invariance.weights_sum_to_one")
        return
    candidate, tokens = judge.candidate, judge.candidate.vocab
    if drawn.properties(judge).positions is not None:
        candidate, tokens = _without_positions(judge)

    def holds(example: "Example") -> None:
        ids = drawn.ids(judge, example["ids"], example["batch"], 1) % tokens
        got = drawn.logits_of(judge, candidate, drawn.Text(ids.repeat(1, example["length"]), None))
        judge.same(got, got[:, :1].expand_as(got), "one token over and over gets other logits from place to place")

    judge.search(texts(drawn.usual(judge)), holds, [{"ids": 0, "batch": 2, "length": 3}])


def _without_positions(judge: "Judge") -> "tuple[Candidate, int]":
    """One dense layer of the case's alone, where the table of positions is zero, and how many ids the model has."""
    layer = drawn.windows(judge).index(None)
    tokens = min(judge.candidate.vocab, 4 * drawn.USUAL_TOKENS)
    return drawn.one_layer(judge, judge.case.weights[drawn.table(judge)][:tokens], layer), tokens


def test_scale(judge: "Judge") -> None:
    """A norm does not see the scale of its input: n times the input with n² times ε gives the same."""
    calls_agree(judge, "invariance.scale")


def test_offset(judge: "Judge") -> None:
    """LayerNorm takes the mean away: the same number added to all elements changes nothing."""
    calls_agree(judge, "invariance.offset")


def test_reversal(judge: "Judge") -> None:
    """A bidirectional layer reads a sequence backwards as well as forwards, the directions' weights exchanged."""
    calls_agree(judge, "invariance.reversal")


def _twins(judge: "Judge", name: str, what: str) -> None:
    """Compare the two checkpoints that the family makes of the case's."""
    most = drawn.usual(judge)
    pair = drawn.properties(judge).twins[name].make(judge.case.config, judge.case.weights, most)
    first, second = (judge.load_other(config, weights) for config, weights in pair)

    def holds(example: "Example") -> None:
        text = drawn.text(judge, example["ids"], example["batch"], example["length"])
        judge.same(drawn.logits_of(judge, first, text), drawn.logits_of(judge, second, text), what)

    judge.search(texts(most), holds, [{"ids": 0, "batch": 2, "length": most}])
