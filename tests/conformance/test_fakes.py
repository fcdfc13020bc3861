"""What each deliberate fake of tests/fakes.py comes to, judged in a real worker process."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from conformance import Case
from conformance.cases import Claim
from conformance.report.model import died
from conformance.worker import Died, Worker

FAKES = Path(__file__).parents[1] / "fakes.py"
TIMEOUT = 20.0
Judged = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judged]:
    """Judge one claim of llama/plain with a fake, in a child of its own: (fake, check, dtype) -> result."""
    chosen = tmp_path_factory.mktemp("fake") / "name"
    with pytest.MonkeyPatch.context() as patch, closing(Worker(f"{FAKES}:Chosen")) as worker:
        patch.setenv("FAKE", str(chosen))

        def judged(
            fake: str, check: str = "golden.right_padding", dtype: str = "float64", timeout: float = TIMEOUT
        ) -> dict[str, Any]:
            chosen.write_text(fake)
            if worker._child is not None:  # the child of the fake before
                worker._kill_child(worker._connection)
            answer = worker.request(timeout, op="judge", case="llama/plain", check=check, dtype=dtype)
            return died(Claim("llama/plain", check, dtype), answer, timeout) if isinstance(answer, Died) else answer

        yield judged


@pytest.fixture(scope="module")
def shape() -> tuple[int, ...]:
    """(batch, seq, vocab) of llama/plain."""
    case = Case("llama/plain")
    return (*case.inputs["input_ids"].shape, case.config["vocab_size"])


# --- right, in an unusual way: accepted ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fake",
    [
        "ReturnsTuple",
        "ReturnsObject",
        "ReturnsDict",
        "ReturnsNumpy",
        "NotContiguous",
        "Talks",
        "StartsThread",
        "MutatesInputs",
        "fused",
    ],
)
def test_right_answer_passes_in_whatever_form(judged: Judged, fake: str) -> None:
    assert judged(fake, "golden.right_padding")["outcome"] == "pass"


def test_right_answer_passes_in_a_working_dtype(judged: Judged) -> None:
    assert judged("fused", "golden.logits", "float32")["outcome"] == "pass"


def test_session_may_return_one_buffer_again_and_again(judged: Judged) -> None:
    assert judged("OneBuffer", "cache.one_by_one")["outcome"] == "pass"


def test_session_with_in_place_adds_and_preallocated_cache_passes(judged: Judged) -> None:
    assert judged("fused", "cache.ragged")["outcome"] == "pass"


# --- wrong values ----------------------------------------------------------------------------------------------------


def test_zeros_fail_with_error_one(judged: Judged) -> None:
    result = judged("Zeros")
    assert (result["outcome"], result["kind"]) == ("fail", "value")
    assert result["error"]["rms"] == pytest.approx(1.0)


def test_zeros_are_wrong_everywhere(judged: Judged) -> None:
    assert judged("Zeros")["details"] == ["wrong in every row and position"]


def test_zeros_fail_in_a_working_dtype(judged: Judged) -> None:
    assert judged("Zeros", dtype="float32")["outcome"] == "fail"


def test_swapped_rows_are_said_to_be_wrong_and_the_others_right(judged: Judged, shape: tuple[int, ...]) -> None:
    result = judged("SwapsRows", "golden.logits")
    batch, seq, _ = shape
    assert result["details"] == [
        f"wrong in batch rows 0, 1, first at position 0; {2 * seq} of {batch * seq} rows",
    ]


def test_one_wrong_logit_is_found_in_its_place(judged: Judged, shape: tuple[int, ...]) -> None:
    result = judged("WrongLastLogit", "golden.logits")
    batch, seq, _ = shape
    assert result["details"] == [
        f"wrong in batch rows {batch - 1}, first at position {seq - 1}; 1 of {batch * seq} rows",
    ]


def test_rounding_to_float32_on_the_way_fails_in_float64(judged: Judged) -> None:
    result = judged("ThroughFloat32")
    assert (result["outcome"], result["kind"]) == ("fail", "value")
    assert 1e-9 < result["error"]["max"] < 1e-6


# --- wrong in kind ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fake", "kind", "message"),
    [
        ("NaN", "not finite", "1 of {size} logits are NaN or infinite, the first at (1, 3, 5)"),
        ("Inf", "not finite", "{size} of {size} logits are NaN or infinite, the first at (0, 0, 0)"),
        ("LastTokenOnly", "shape", "logits of shape ({batch}, {vocab}), wanted {shape} (batch, seq, vocab)"),
        (
            "Float32",
            "dtype",
            "logits in float32, wanted float64 or finer; an engine without float64 declares its dtypes",
        ),
        (
            "Integers",
            "dtype",
            "logits in int64, wanted float64 or finer; an engine without float64 declares its dtypes",
        ),
        ("ReturnsNone", "type", "the logits are None, wanted a tensor"),
        ("ReturnsString", "type", "the logits are a str, wanted a tensor or array"),
        ("ReturnsTwo", "type", "a tuple of [{shape}, {shape}] was returned; exactly one must be {shape}"),
        ("DictWithoutLogits", "type", "a dict with keys ['scores'] was returned; it needs \"logits\""),
        ("OnMeta", "type", "logits on the meta device, wanted a dense tensor with values"),
        ("LossPerToken", "shape", "a loss of shape ({batch}, {seq}), wanted a single number"),
        ("LoadsNone", "type", "load returned a NoneType, wanted a callable model"),
    ],
)
def test_wrong_in_kind_fails_and_says_what_was_wanted(
    judged: Judged, shape: tuple[int, ...], fake: str, kind: str, message: str
) -> None:
    batch, seq, vocab = shape
    wanted = message.format(shape=shape, batch=batch, seq=seq, vocab=vocab, size=batch * seq * vocab)
    result = judged(fake, "golden.logits")
    assert (result["outcome"], result["kind"], result["message"]) == ("fail", kind, wanted)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fake", "kind", "message"),
    [
        ("RaisesInLoad", "KeyError", "load(checkpoint) raised KeyError: 'model.layers.0.mlp.weight'"),
        ("RaisesInCall", "IndexError", "model(…) raised IndexError: no such head"),
        ("PythonOutOfMemory", "out of memory", "model(…) ran out of memory (MemoryError)"),
        ("CannotLoadLlama", "NotImplementedError", "load(checkpoint) raised NotImplementedError: model_type 'llama'"),
    ],
)
def test_exception_is_an_error_with_its_own_message(judged: Judged, fake: str, kind: str, message: str) -> None:
    result = judged(fake)
    assert (result["outcome"], result["kind"], result["message"]) == ("error", kind, message)


def test_failed_allocation_is_out_of_memory(judged: Judged) -> None:
    result = judged("OutOfMemory")
    assert (result["outcome"], result["kind"]) == ("error", "out of memory")
    assert re.fullmatch(r"model\(…\) ran out of memory \(RuntimeError: .*8000000000000000 bytes.*\)", result["message"])


def test_error_points_into_the_candidate(judged: Judged) -> None:
    line = judged("RaisesInCall")["details"][-1]
    assert re.fullmatch(rf"{re.escape(str(FAKES))}:\d+ in answer: raise IndexError\(.*", line)


def test_error_leaves_out_frames_of_the_suite_and_of_torch(judged: Judged) -> None:
    files = {line.split(":")[0] for line in judged("RaisesInCall")["details"]}
    assert files == {str(FAKES)}


# --- crashes and timeouts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fake", "how"),
    [
        ("ExitsWell", "exit status 0"),
        ("Exits3", "exit status 3"),
        ("SysExit", "exit status 1"),
        ("Segfaults", "killed by SIGSEGV"),
        ("KillsItself", "killed by SIGKILL, perhaps out of memory"),
    ],
)
def test_death_of_the_process_is_a_crash(judged: Judged, fake: str, how: str) -> None:
    result = judged(fake)
    assert (result["outcome"], result["kind"]) == ("crash", how)
    assert result["message"] == f"the candidate's process died: {how}"


@pytest.mark.parametrize(("fake", "words"), [("ExitsWell", "good bye"), ("SysExit", "licence expired")])
def test_last_words_of_a_crash_are_kept(judged: Judged, fake: str, words: str) -> None:
    assert judged(fake)["details"] == [words]


def test_segfault_says_where_in_the_candidate(judged: Judged) -> None:
    assert f'File "{FAKES}", line ' in "\n".join(judged("Segfaults")["details"])


def test_hang_is_a_timeout(judged: Judged) -> None:
    result = judged("Sleeps", timeout=3)
    assert (result["outcome"], result["message"]) == ("timeout", "no answer after 3 s")


def test_last_words_of_a_hang_are_kept(judged: Judged) -> None:
    assert judged("Sleeps", timeout=3)["details"] == ["going to sleep"]


@pytest.mark.parametrize(("fake", "timeout"), [("SleepsWithChild", 3), ("DiesLeavingChild", TIMEOUT)])
def test_processes_that_a_dead_candidate_started_are_ended(judged: Judged, fake: str, timeout: float) -> None:
    said = judged(fake, timeout=timeout)["details"][-1]
    assert re.fullmatch(r"child \d+", said)
    assert _ended(int(said.split()[1]))


def _ended(pid: int) -> bool:
    """Whether a process is gone within some seconds (or waits, dead, for init to take notice)."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


# --- declarations ----------------------------------------------------------------------------------------------------


def test_unsupported_raised_in_load_is_unsupported_with_its_reason(judged: Judged) -> None:
    result = judged("NothingSupported")
    assert (result["outcome"], result["message"]) == ("unsupported", "no licence for weights")


def test_undeclared_dtype_is_unsupported(judged: Judged) -> None:
    result = judged("OnlyFloat16")
    assert (result["outcome"], result["message"]) == ("unsupported", "declares to run in float16 only")


def test_declared_dtype_is_judged(judged: Judged) -> None:
    assert judged("OnlyFloat16", "golden.logits", "float16")["outcome"] == "pass"


def test_missing_argument_is_unsupported(judged: Judged) -> None:
    result = judged("OneBuffer", "golden.right_padding")
    assert (result["outcome"], result["message"]) == ("unsupported", "the model takes no attention_mask")


def test_missing_session_is_unsupported(judged: Judged) -> None:
    result = judged("Zeros", "cache.chunks")
    assert (result["outcome"], result["message"]) == ("unsupported", "the model has no session()")


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        ("FamiliesAsString", "families is the string 'llama'; wanted a set: {'llama'}"),
        ("DtypesAsString", "dtypes is the string 'float32'; wanted a set: {'float32'}"),
        ("UnknownDtype", "declares dtypes int4; there is float64, float32, bfloat16, float16"),
        ("NOT_AN_IMPLEMENTATION", "a int has no load(checkpoint) and cannot be called itself"),
    ],
)
def test_impossible_declaration_cannot_be_resolved(fake: str, message: str) -> None:
    from conformance.implementation import CannotResolve, resolve

    with pytest.raises(CannotResolve, match=re.escape(message)):
        resolve(f"{FAKES}:{fake}")
