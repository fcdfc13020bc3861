"""The checks of memory, packing and generation can fail, and do so for the right reason."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conformance.implementations.reference import Reference
from judged import check
from reference_impl.nn import segment_memory
from reference_impl.nn.kv_cache import KVCache, Session

WINDOWED = "mistral/window"


class Changed:
    """The reference whose model has been tampered with."""

    def __init__(self, change: Any):
        self.change = change

    def load(self, checkpoint: Any) -> Any:
        model = Reference("eager").load(checkpoint)
        self.change(model)
        return model


# --- memory


def keeps_everything(model: Any) -> None:
    model.session = lambda: Session(model.model, KVCache(num_hidden_layers=3))


def says(size: Any) -> Any:
    def change(model: Any) -> None:
        session = model.session
        model.session = lambda: SimpleNamespace(feed=session().feed, state_bytes=lambda: size)

    return change


def says_nothing(model: Any) -> None:
    session = model.session
    model.session = lambda: SimpleNamespace(feed=session().feed)


def constant_state(change: Any) -> Any:
    return check(Changed(change), WINDOWED, "cache.constant_state", "float32")


def test_a_cache_that_keeps_everything_fails() -> None:
    result = constant_state(keeps_everything)
    assert (result.outcome, result.kind) == ("fail", "state grows")
    assert "after 10 tokens" in result.message
    assert "sliding_window=5" in result.message


def test_a_rolling_cache_passes() -> None:
    assert constant_state(lambda model: None).outcome == "pass"


def test_a_session_that_does_not_say_is_unsupported() -> None:
    result = constant_state(says_nothing)
    assert (result.outcome, result.message) == ("unsupported", "the session has no state_bytes()")


@pytest.mark.parametrize("size", [None, 1.5, -1, True, "much"], ids=str)
def test_what_is_no_number_of_bytes_fails(size: Any) -> None:
    result = constant_state(says(size))
    assert (result.outcome, result.kind) == ("fail", "type")


def test_the_smallest_growth_fails() -> None:
    fed = []

    def change(model: Any) -> None:
        session = model.session()
        feed = lambda input_ids: (fed.append(1), session.feed(input_ids))[1]  # noqa: E731
        model.session = lambda: SimpleNamespace(feed=feed, state_bytes=lambda: 1000 + (len(fed) == 17))

    result = constant_state(change)
    assert (result.outcome, result.kind) == ("fail", "state grows")
    assert "1,000 bytes after 10 tokens and 1,001 after 17" in result.message


def test_a_memory_of_segments_that_keeps_everything_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = "transformer_xl/field-mem_len", "cache.constant_state", "float32"
    assert check("reference", *claim).outcome == "pass"
    monkeypatch.setattr(
        segment_memory, "remember", lambda old, new, _: new if old is None else torch.cat((old, new), 1)
    )
    result = check("reference", *claim)
    assert (result.outcome, result.kind) == ("fail", "state grows")
    assert "with mem_len=5 no key older than that is seen again" in result.message


# --- packing


def packed(check_name: str, change: Any, case: str = "llama/distinct", dtype: str = "float64") -> Any:
    return check(Changed(change), case, check_name, dtype)


def packed_by(function: Any) -> Any:
    """A model whose `packed` is function(model of the reference, ids, lengths)."""

    def change(model: Any) -> None:
        model.packed = lambda input_ids, lengths: function(model.model, input_ids, lengths.tolist())

    return change


def one_text(model: Any, ids: Any, lengths: Any) -> Any:
    """No blocks: the row is one text."""
    return model(ids)


def positions_restart_only(model: Any, ids: Any, lengths: Any) -> Any:
    """Positions start again, but every text sees those before it."""
    return model(ids, position_ids=torch.cat([torch.arange(n) for n in lengths])[None])


def positions_run_on(model: Any, ids: Any, lengths: Any) -> Any:
    """Blocks, but positions count on through the row."""
    return model(ids, position_ids=torch.arange(sum(lengths))[None], lengths=lengths)


def single_tokens_missed(model: Any, ids: Any, lengths: Any) -> Any:
    """A text of one token is taken for the end of the text before it."""
    joined: list[int] = []
    for length in lengths:
        if joined and length == 1:
            joined[-1] += 1
        else:
            joined.append(length)
    return model(ids, lengths=joined)


def last_sees_first(model: Any, ids: Any, lengths: Any) -> Any:
    """Only the last text is not kept apart: it is read behind the first."""
    logits = model(ids, lengths=lengths).clone()
    end, start = lengths[0], sum(lengths[:-1])
    logits[:, start:] = model(torch.cat((ids[:, :end], ids[:, start:]), dim=1))[:, end:]
    return logits


@pytest.mark.parametrize("mistake", [one_text, positions_restart_only, single_tokens_missed, last_sees_first])
@pytest.mark.parametrize("check_name", ["packed.logits", "packed.isolation"])
def test_texts_that_see_each_other_fail(check_name: str, mistake: Any) -> None:
    result = packed(check_name, packed_by(mistake))
    assert (result.outcome, result.kind) == ("fail", "value")


def test_the_message_names_the_text_that_moved_others() -> None:
    assert "when text 0 changes" in packed("packed.isolation", packed_by(last_sees_first)).message


def test_positions_that_run_on_fail_where_they_are_absolute() -> None:
    """Rotary positions are relative: running on changes nothing there, and is no mistake."""
    run_on = packed_by(positions_run_on)
    assert packed("packed.logits", run_on, "gpt2/distinct").outcome == "fail"
    assert packed("packed.isolation", run_on, "gpt2/distinct").outcome == "pass"
    assert packed("packed.logits", run_on, "llama/distinct").outcome == "pass"


def test_a_window_that_is_ignored_when_packing_fails() -> None:
    def without_window(model: Any, ids: Any, lengths: Any) -> Any:
        import dataclasses

        kept = model.model.config
        model.model.config = dataclasses.replace(kept, sliding_window=None)
        try:
            return model(ids, lengths=lengths)
        finally:
            model.model.config = kept

    assert packed("packed.logits", packed_by(without_window), "mistral/window").outcome == "fail"


@pytest.mark.parametrize("case", ["gpt/distinct", "gpt2/distinct", "gpt3/distinct", "mixtral/distinct", "phi/distinct"])
@pytest.mark.parametrize("check_name", ["packed.logits", "packed.isolation"])
def test_the_reference_packs_rightly(check_name: str, case: str) -> None:
    assert packed(check_name, lambda model: None, case).outcome == "pass"


def test_a_model_that_cannot_pack_is_unsupported() -> None:
    class Plain:
        def load(self, checkpoint: Any) -> Any:
            model = Reference("eager").load(checkpoint)
            return lambda input_ids: model(input_ids)

    result = check(Plain(), "llama/distinct", "packed.logits")
    assert (result.outcome, result.message) == ("unsupported", "the model has no packed()")


def test_logits_of_another_shape_fail() -> None:
    result = packed("packed.logits", packed_by(lambda model, ids, lengths: model(ids, lengths=lengths)[0]))
    assert (result.outcome, result.kind) == ("fail", "shape")


# --- generation


def greedy(answer: Any) -> Any:
    def change(model: Any) -> None:
        model.greedy = answer

    return check(Changed(change), "llama/plain", "generation.greedy")


def test_a_model_that_does_not_generate_is_unsupported() -> None:
    class Plain:
        def load(self, checkpoint: Any) -> Any:
            model = Reference("eager").load(checkpoint)
            return lambda input_ids: model(input_ids)

    for name in ("generation.greedy", "generation.stop_token"):
        result = check(Plain(), "llama/plain", name)
        assert (result.outcome, result.message) == ("unsupported", "the model has no greedy()")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda ids, mask, new, stop: [[1] * new], "shape"),
        (lambda ids, mask, new, stop: [[-1] * new for _ in ids], "type"),
        (lambda ids, mask, new, stop: [[10**6] * new for _ in ids], "type"),
        (lambda ids, mask, new, stop: [[1] * (new - 1) for _ in ids], "length"),
        (lambda ids, mask, new, stop: torch.ones(len(ids), new, dtype=torch.long), "not the likeliest"),
    ],
    ids=["rows", "negative", "too-large", "too-few", "always-one"],
)
def test_what_is_not_the_likeliest_continuation_fails(answer: Any, kind: str) -> None:
    result = greedy(answer)
    assert (result.outcome, result.kind) == ("fail", kind), result


def test_a_text_that_ends_for_no_reason_fails_the_stop_token_too() -> None:
    def change(model: Any) -> None:
        model.greedy = lambda ids, mask, new, stop: [[] for _ in ids]

    result = check(Changed(change), "llama/plain", "generation.stop_token")
    assert (result.outcome, result.kind) == ("fail", "length"), result


@pytest.mark.parametrize("answer", [lambda ids, mask, new, stop: None, lambda ids, mask, new, stop: [[0.5] * new]])
def test_what_is_no_list_of_ids_is_an_error(answer: Any) -> None:
    assert greedy(answer).outcome == "error"


def test_the_message_names_row_token_and_both_logits() -> None:
    message = greedy(lambda ids, mask, new, stop: [[1] * new for _ in ids]).message
    assert "new token 0 of row 0 is 1, whose logit in one forward is" in message
