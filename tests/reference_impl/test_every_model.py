"""What holds for every model: padding, sessions, dtypes, gradients.  Equations, names and configs have modules of their
own.

A model is covered by being in `MODELS` of the suite, with the sizes and weights of its case `distinct`, or of `plain`
where the other cannot be fed in pieces.  What a model does not declare (padding, positions, fixed memory) is not asked
of it.
"""

import copy
import functools
import inspect
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.families import MODELS, get
from conformance.golden.model import draw_weights
from reference_impl.checkpoint import FAMILIES
from reference_impl.nn.kv_cache import KVCache

SEQ = 13
IDS = torch.tensor([
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9],
    [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9],
    [0, 5, 7, 7, 2, 1, 5, 6, 6, 4, 9, 0, 1],
])  # fmt: skip
JUNK = 16
# Rows of 9 tokens, of all and of a single one.
LEFT = (torch.arange(SEQ) >= torch.tensor([[4], [0], [12]])).long()
RIGHT = LEFT.flip(1)
SOURCE = torch.tensor([[7, 3, 10, 4, 4, 1, 8], [6, 2, 9, 11, 0, 5, 3], [12, 1, 1, 9, 7, 2, 6]])
SOURCE_LEFT = (torch.arange(7) >= torch.tensor([[0], [6], [3]])).long()
# At once, one by one, growing, shrinking, with an empty piece.  Windows have 5 or 6 keys; pieces are shorter, longer
# and as long.
PLANS = [(13,), (1,) * 13, (4, 1, 7, 1), (1, 2, 10), (12, 1), (5, 5, 3), (2, 9, 2), (4, 0, 9)]


def source_mask(mask: Tensor | None) -> Tensor:
    """The source's, which is padded on the right if the target is."""
    return SOURCE_LEFT.flip(1) if mask is RIGHT else SOURCE_LEFT


@dataclass(frozen=True)
class Subject:
    """A model with a case's sizes; the ids and masks of its calls are those that its logits belong to."""

    family: str

    @property
    def recipe(self) -> Any:
        cases = {recipe.name.split("/")[1]: recipe for recipe in get(self.family).recipes}
        return next(cases[name] for name in ("distinct", "plain") if "cache.chunks" in cases[name].claims)

    @property
    def classes(self) -> tuple[Any, Any]:
        module, config_class, model_class = FAMILIES[self.recipe.config["model_type"]]
        return getattr(import_module(module), config_class), getattr(import_module(module), model_class)

    @functools.cached_property
    def config(self) -> Any:
        return self.classes[0].from_dict(self.recipe.config)

    @property
    def declared(self) -> set[str]:
        _, model_class = self.classes
        return set(inspect.signature(model_class.forward).parameters)

    @property
    def decodes(self) -> bool:
        return "decoder_input_ids" in self.declared

    @property
    def padded(self) -> bool:
        return "attention_mask" in self.declared

    @property
    def limited(self) -> bool:
        """Whether a session's memory can be fixed."""
        return "max_length" in inspect.signature(self.classes[1].session).parameters

    def model(self, attention: str = "eager", dtype: torch.dtype = torch.float64) -> nn.Module:
        return loaded(self.family, attention, dtype)

    def logits(self, model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Of all rows; sources are padded on the side that targets are."""
        if not self.decodes:
            return model(ids) if mask is None else model(ids, mask)
        given = {} if mask is None else {"decoder_attention_mask": mask}
        return model(SOURCE, source_mask(mask), decoder_input_ids=ids, **given)

    def alone(self, model: nn.Module, row: int, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of one row's ids and its source without padding."""
        if not self.decodes:
            return model(ids[None])[0]
        source = SOURCE[row, source_mask(mask)[row].bool()]
        return model(source[None], decoder_input_ids=ids[None])[0]

    def session(self, model: nn.Module, *limit: int, mask: Tensor | None = None) -> Any:
        source = (SOURCE, source_mask(mask)) if self.decodes else ()
        return model.session(*source, *limit)

    def in_pieces(self, model: nn.Module, plan: tuple[int, ...], mask: Tensor | None = None, *limit: int) -> Tensor:
        session, outputs, start = self.session(model, *limit, mask=mask), [], 0
        for size in plan:
            piece = slice(start, start + size)
            outputs.append(session.feed(IDS[:, piece], *(() if mask is None else (mask[:, piece],))))
            start += size
        return torch.cat(outputs, dim=1)


@functools.cache
def loaded(family: str, attention: str, dtype: torch.dtype) -> nn.Module:
    """With weights of which none has its initial value, so that none can be left out unnoticed."""
    subject = Subject(family)
    model: nn.Module = subject.classes[1](subject.config, attention)
    weights = draw_weights(get(family), subject.recipe)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    stored = {name for name, _ in model.named_parameters()} - weights.keys()
    assert not unexpected
    assert set(missing) <= tied | stored
    assert not stored or any(name in weights for name in tied)
    return model.to(dtype).eval()


SUBJECTS = [Subject(family) for family in MODELS]


def subjects(*wanted: str, chosen: Any = None) -> pytest.MarkDecorator:
    """The models that declare all of `wanted`, of which `chosen` holds."""
    found = [s for s in SUBJECTS if all(getattr(s, what) for what in wanted) and (chosen is None or chosen(s))]
    return pytest.mark.parametrize("subject", found, ids=lambda subject: subject.family)


both_kernels = pytest.mark.parametrize("attention", ["eager", "sdpa"])
either_side = pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def equal(subject: Subject, actual: Tensor, expected: Tensor) -> None:
    """Bit by bit, unless the model has experts, which compute other tokens beside these."""
    experts = any("expert" in field.name for field in fields(subject.config))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 if experts else 0)


def test_every_model_that_checkpoints_name_is_a_family_of_the_suite() -> None:
    types = {recipe.config["model_type"] for family in MODELS for recipe in get(family).recipes}
    assert types == FAMILIES.keys()


def test_most_models_are_asked_everything() -> None:
    """A name that is mistyped in a signature would leave a model out."""
    for what in ("padded", "limited"):
        asked = {subject.family for subject in SUBJECTS if getattr(subject, what)}
        assert asked >= {"transformer", "gpt", "gpt2", "gpt3", "llama", "mistral", "mixtral", "phi"}


# --- a call ---------------------------------------------------------------------------------------------------------


@subjects()
def test_a_token_changes_no_earlier_logits(subject: Subject) -> None:
    model, changed = subject.model(), IDS.clone()
    changed[:, 5] += 1
    equal(subject, subject.logits(model, changed)[:, :5], subject.logits(model, IDS)[:, :5])


@subjects(chosen=lambda s: not any(getattr(s.config, key, None) for key in ("sliding_window", "window_size")))
def test_a_token_changes_all_later_logits(subject: Subject) -> None:
    model, changed = subject.model(), IDS.clone()
    changed[:, 5] += 1
    moved = (subject.logits(model, changed) - subject.logits(model, IDS)).abs().amax(dim=-1)
    assert moved[:, 5:].gt(1e-6).all()


@subjects("decodes")
def test_a_real_token_of_the_source_changes_all_logits_and_padding_none(subject: Subject) -> None:
    model = subject.model()
    for place in range(SOURCE.shape[1]):
        changed = SOURCE.clone()
        changed[:, place] += 1
        moved = (
            model(changed, SOURCE_LEFT, decoder_input_ids=IDS) - model(SOURCE, SOURCE_LEFT, decoder_input_ids=IDS)
        ).abs().amax(dim=-1)  # fmt: skip
        real = SOURCE_LEFT[:, place].bool()
        assert moved[real].gt(1e-7).all()
        assert moved[~real].lt(1e-12).all()


@subjects()
def test_training_mode_changes_nothing(subject: Subject) -> None:
    model = copy.deepcopy(subject.model())
    assert torch.equal(subject.logits(model.train(), IDS), subject.logits(model.eval(), IDS))


@subjects()
def test_inputs_are_left_unchanged(subject: Subject) -> None:
    given = [tensor.clone() for tensor in (IDS, LEFT, SOURCE, SOURCE_LEFT)]
    subject.logits(subject.model(), IDS, LEFT if subject.padded else None)
    subject.in_pieces(subject.model(), (4, 9), LEFT if subject.padded else None)
    assert all(torch.equal(a, b) for a, b in zip(given, (IDS, LEFT, SOURCE, SOURCE_LEFT), strict=True))


@both_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@subjects()
def test_runs_in_working_precision(subject: Subject, dtype: torch.dtype, attention: str) -> None:
    logits = subject.logits(subject.model(attention, dtype), IDS, LEFT if subject.padded else None)
    assert logits.dtype == dtype
    assert logits.isfinite().all()


@subjects()
def test_an_empty_piece_has_no_logits(subject: Subject) -> None:
    logits = subject.logits(subject.model(), IDS)
    assert subject.logits(subject.model(), IDS[:, :0]).shape == (3, 0, logits.shape[-1])


@subjects()
def test_both_kernels_give_the_same_logits(subject: Subject) -> None:
    mask = LEFT if subject.padded else None
    real = torch.ones_like(IDS).bool() if mask is None else mask.bool()
    eager, sdpa = (subject.logits(subject.model(attention), IDS, mask) for attention in ("eager", "sdpa"))
    close(sdpa[real], eager[real])


# --- padding and positions ------------------------------------------------------------------------------------------


@both_kernels
@either_side
@subjects("padded")
def test_a_padded_row_is_as_if_it_stood_alone(subject: Subject, mask: Tensor, attention: str) -> None:
    model = subject.model(attention)
    logits = subject.logits(model, IDS, mask)
    for row in range(3):
        real = mask[row].bool()
        close(logits[row, real], subject.alone(model, row, IDS[row, real], mask))


@subjects("padded", "decodes")
@pytest.mark.parametrize("mask", [SOURCE_LEFT, SOURCE_LEFT.flip(1)], ids=["left", "right"])
def test_a_padded_source_is_as_if_it_stood_alone(subject: Subject, mask: Tensor) -> None:
    model = subject.model()
    logits = model(SOURCE, mask, decoder_input_ids=IDS)
    for row in range(3):
        alone = SOURCE[row : row + 1, mask[row].bool()]
        close(logits[row], model(alone, decoder_input_ids=IDS[row : row + 1])[0])


@either_side
@subjects("padded")
def test_ids_at_padding_do_not_matter(subject: Subject, mask: Tensor) -> None:
    model, real = subject.model(), mask.bool()
    junk = torch.where(real, IDS, JUNK)
    equal(subject, subject.logits(model, junk, mask)[real], subject.logits(model, IDS, mask)[real])


@both_kernels
@either_side
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@subjects("padded")
def test_padding_makes_no_gradient_nan(subject: Subject, dtype: torch.dtype, mask: Tensor, attention: str) -> None:
    model = copy.deepcopy(subject.model(attention, dtype))
    subject.logits(model, IDS, mask)[mask.bool()].sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    unused = {name for name, gradient in gradients.items() if gradient is None}
    assert all("expert" in name for name in unused)
    assert all(gradients[name].isfinite().all() for name in gradients.keys() - unused)


takes_positions = subjects(chosen=lambda subject: "position_ids" in subject.declared)


@takes_positions
def test_default_positions_count_real_tokens(subject: Subject) -> None:
    model, positions = subject.model(), (LEFT.cumsum(-1) - 1).clamp(min=0)
    assert positions[0].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert torch.equal(model(IDS, LEFT), model(IDS, LEFT, position_ids=positions))


@takes_positions
def test_positions_are_used_as_given(subject: Subject) -> None:
    """Distances that change change all logits but the first, which sees itself alone, in every model."""
    model, positions = subject.model(), torch.tensor([[0, 2, 3, 5, 8, 13, 21, 22, 23, 34, 36, 55, 57]])
    assert (model(IDS, position_ids=positions) - model(IDS))[:, 1:].abs().amax(dim=-1).gt(1e-6).all()


@takes_positions
def test_positions_of_another_shape_are_refused_with_both_shapes(subject: Subject) -> None:
    with pytest.raises(ValueError, match=r"position_ids has shape \(3, 1\) and input_ids \(3, 13\)"):
        subject.model()(IDS, position_ids=torch.zeros(3, 1, dtype=torch.long))


# --- sessions -------------------------------------------------------------------------------------------------------


@both_kernels
@pytest.mark.parametrize("plan", PLANS, ids=str)
@subjects()
def test_pieces_give_the_logits_of_the_whole(subject: Subject, plan: tuple[int, ...], attention: str) -> None:
    model = subject.model(attention)
    close(subject.in_pieces(model, plan), subject.logits(model, IDS))


@both_kernels
@either_side
@pytest.mark.parametrize("plan", PLANS, ids=str)
@subjects("padded")
def test_padded_pieces_give_the_logits_of_the_whole(
    subject: Subject, plan: tuple[int, ...], mask: Tensor, attention: str
) -> None:
    model, real = subject.model(attention), mask.bool()
    close(subject.in_pieces(model, plan, mask)[real], subject.logits(model, IDS, mask)[real])


@subjects("padded")
def test_rows_of_unequal_length_go_on_from_their_own_last_token(subject: Subject) -> None:
    model = subject.model()
    session = subject.session(model)
    session.feed(IDS[:, :4], torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]]))
    continued = session.feed(IDS[:, 4:])
    for row, real in enumerate(([0, 1], [0, 1, 2, 3], [1, 2])):
        alone = subject.alone(model, row, IDS[row, [*real, *range(4, SEQ)]])
        close(continued[row], alone[len(real) :])


@subjects("limited")
def test_a_fixed_length_gives_the_same_logits(subject: Subject) -> None:
    model = subject.model()
    close(subject.in_pieces(model, (4, 9), None, SEQ), subject.logits(model, IDS))


@subjects("limited")
def test_a_piece_that_does_not_fit_is_refused_and_changes_nothing(subject: Subject) -> None:
    model = subject.model()
    session = subject.session(model, SEQ)
    first = session.feed(IDS[:, :5])
    with pytest.raises(ValueError, match="5 cached and 9 new tokens need max_length=14, got max_length=13"):
        session.feed(IDS[:, :9])
    close(torch.cat((first, session.feed(IDS[:, 5:])), dim=1), subject.logits(model, IDS))


@subjects()
def test_sessions_of_one_model_are_independent(subject: Subject) -> None:
    model = subject.model()
    other = subject.session(model)
    other.feed(IDS[:, :3])
    close(subject.in_pieces(model, (4, 9)), subject.logits(model, IDS))
    close(other.feed(IDS[:, 3:]), subject.logits(model, IDS)[:, 3:])


@subjects()
def test_a_session_says_how_much_it_holds_in_whole_bytes(subject: Subject) -> None:
    sessions = [subject.session(subject.model(dtype=dtype)) for dtype in (torch.float64, torch.float32)]
    for session in sessions:
        session.feed(IDS)
    double, single = (session.state_bytes() for session in sessions)
    assert isinstance(double, int)
    assert 0 < single < double <= 2 * single


@subjects(chosen=lambda subject: "cache" in subject.declared)
def test_a_cache_needs_no_grad(subject: Subject) -> None:
    layers = subject.recipe.config[get(subject.family).layers_key]
    with pytest.raises(ValueError, match=r"call the model under torch\.no_grad\(\), or without a cache"):
        copy.deepcopy(subject.model()).requires_grad_()(IDS, cache=KVCache(num_hidden_layers=layers))


# --- the end of a table of positions --------------------------------------------------------------------------------

LONG = torch.arange(80)[None] % 7
has_a_table = subjects(chosen=lambda subject: hasattr(subject.config, "n_positions"))


@has_a_table
def test_the_whole_context_may_be_fed(subject: Subject) -> None:
    assert subject.model()(LONG[:, : subject.config.n_positions]).shape[1] == subject.config.n_positions


@has_a_table
def test_a_text_longer_than_the_context_is_refused_with_both_numbers(subject: Subject) -> None:
    n = subject.config.n_positions
    wanted = f"position {n} needs a table of {n + 1} positions, n_positions={n}: feed at most {n}"
    with pytest.raises(ValueError, match=wanted):
        subject.model()(LONG[:, : n + 1])


@has_a_table
def test_padding_does_not_count_against_the_context(subject: Subject) -> None:
    n, model = subject.config.n_positions, subject.model()
    ids, mask = LONG[:, : n + 4], (torch.arange(n + 4) >= 4).long()[None]
    close(model(ids, mask)[:, 4:], model(ids[:, 4:]))


@has_a_table
def test_a_session_that_reaches_the_end_of_the_context_is_refused_and_not_changed(subject: Subject) -> None:
    n, model = subject.config.n_positions, subject.model()
    session = model.session()
    first = session.feed(LONG[:, : n - 2])
    with pytest.raises(ValueError, match=f"position {n} needs a table of {n + 1} positions, n_positions={n}"):
        session.feed(LONG[:, n - 2 : n + 1])
    rest = session.feed(LONG[:, n - 2 : n])
    close(torch.cat((first, rest), dim=1), model(LONG[:, :n]))


# --- configs --------------------------------------------------------------------------------------------------------


@subjects()
def test_a_config_is_read_as_it_was_written(subject: Subject) -> None:
    assert subject.classes[0].from_dict(subject.config.to_dict()) == subject.config
    assert subject.config.to_dict()["architectures"] == subject.recipe.config["architectures"]


@subjects()
def test_a_config_of_another_model_is_refused(subject: Subject) -> None:
    with pytest.raises(ValueError, match=r"model_type='lama' (is not|must be one of)"):
        subject.classes[0].from_dict(subject.recipe.config | {"model_type": "lama"})


@subjects()
def test_an_unknown_key_is_refused_by_name(subject: Subject) -> None:
    with pytest.raises(ValueError, match=r"unknown keys \['qk_norm', 'window'\]"):
        subject.classes[0].from_dict(subject.recipe.config | {"window": 3, "qk_norm": True})


@subjects()
def test_an_int_may_stand_for_a_float(subject: Subject) -> None:
    floats = {field.name for field in fields(subject.config) if field.type in ("float", float)}
    small = floats & {"rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"}
    for name in small:
        given = subject.classes[0].from_dict(subject.recipe.config | {name: 1})
        assert given == replace(subject.config, **{name: 1.0})
        assert isinstance(getattr(given, name), float)


@subjects()
def test_defaults_are_those_of_the_installed_library(subject: Subject) -> None:
    """What its config says of the keys that are read is what they are where it says nothing."""
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, get(subject.family).oracle, None)
    if theirs is None:
        pytest.skip("transformers does not have this model")
    config_class, _ = subject.classes
    read = {field.name for field in fields(config_class)} | {"rope_parameters"}
    library = {key: value for key, value in theirs.config_class().to_dict().items() if key in read}
    assert len(library) > 5
    default = config_class.from_dict({})
    if getattr(default, "decoder_vocab_size", 0) is None:  # as many as of the source; the library says how many
        default = replace(default, decoder_vocab_size=default.vocab_size)
    assert config_class.from_dict(library) == default
