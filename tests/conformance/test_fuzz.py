"""Fuzzing finds bugs that only some configurations show, shrinks them, and keeps what replays them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance.api import run
from conformance.cases import Case
from conformance.cli import main
from conformance.configurations import DRAWN, LONGEST, configurations, plain
from conformance.families import MODELS, get
from conformance.fuzz import Found, Fuzzer, examples, fuzz
from conformance.oracles import oracle_missing
from conformance.worker import Worker
from reference_impl.checkpoint import FAMILIES

TESTS = Path(__file__).parent.parent
# A mistake of `fuzz_bugs` -> a family in which some configurations show it
BUGS = {
    "window_off_by_one": "mistral",
    "long_window_ignored": "mistral",
    "one_expert_fewer": "mixtral",
    "layer_scale_ignored": "gpt2",
    "scale_forgotten_with_layer_scale": "gpt2",
    "small_epsilon_raised": "llama",
    "low_frequencies_at_their_default": "llama",
    "pattern_not_repeated": "gpt3",
    "decoder_heads_of_the_encoder": "transformer",
    "unscaled_when_not_shared": "transformer",
    "swish_taken_for_relu": "gpt",
}


@pytest.fixture(autouse=True)
def fuzz_bugs_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TESTS)


def found(candidate: str, family: str, keep: Path, most: int = 200, seed: int = 0) -> Found:
    """What fuzzing one family comes to; the number of examples is the limit, not the time."""
    return fuzz(f"fuzz_bugs:{candidate}", [family], keep=keep, seconds=600, most=most, seed=seed)[0]


# --- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_that_some_configurations_show_is_found_within_200_examples(
    bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conformance.fuzz.SHRINK_SECONDS", 0)
    monkeypatch.setattr(Fuzzer, "_diagnose", lambda self: None)
    failure = found(bug, BUGS[bug], tmp_path).failure
    assert failure is not None
    assert (failure["outcome"], failure["kind"]) == ("fail", "value")


def test_no_bug_is_no_failure(tmp_path: Path) -> None:
    result = found("nothing", "llama", tmp_path, most=40)
    assert (result.failure, result.examples) == (None, 40)
    assert result.passed > 80
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TESTS)
        yield found("window_off_by_one", "mistral", tmp_path_factory.mktemp("kept"))


def test_a_failure_is_shrunk_to_the_smallest_window_and_text(kept: Found) -> None:
    assert kept.config is not None
    moved = {key: kept.config[key] for key in ("sliding_window", "num_hidden_layers", "num_attention_heads")}
    assert moved == {"sliding_window": 1, "num_hidden_layers": 1, "num_attention_heads": 1}
    assert kept.size == "batch 1, sequence 2"


def test_the_kept_case_replays_the_failure_and_passes_without_the_bug(
    kept: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TESTS)
    outcomes = {
        candidate: {
            (claim["check"], claim["outcome"])
            for claim in run(candidate, cases=[str(kept.directory)], checks=["golden.logits"])["claims"]
        }
        for candidate in ("fuzz_bugs.py:window_off_by_one", "reference")
    }
    assert list(outcomes.values()) == [{("golden.logits", "fail")}, {("golden.logits", "pass")}]


@pytest.mark.parametrize(("seeds", "same"), [((1, 1), True), ((1, 2), False)])
def test_a_seed_says_which_configurations_are_tried(
    seeds: tuple[int, int], same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[dict[str, Any]] = []
    monkeypatch.setattr(Fuzzer, "judge", lambda self, example: tried.append(example))
    for seed in seeds:
        found("nothing", "llama", tmp_path, most=5, seed=seed)
    assert (tried[:5] == tried[5:]) is same


def test_a_candidate_that_dies_is_found_and_what_fails_is_a_crash(tmp_path: Path) -> None:
    result = found("Dies", "llama", tmp_path)
    assert result.failure is not None
    assert (result.failure["outcome"], result.failure["kind"]) == ("crash", "exit status 3")
    assert result.config is not None
    assert result.config["tie_word_embeddings"] is True


def test_what_a_candidate_refuses_is_counted_and_not_a_failure(tmp_path: Path) -> None:
    result = found("Refuses", "llama", tmp_path, most=30)
    assert result.failure is None
    assert result.unsupported.keys() == {"no biases"}


def test_the_time_ends_a_search(tmp_path: Path) -> None:
    result = fuzz("fuzz_bugs:nothing", ["llama"], keep=tmp_path, seconds=1.0)[0]
    assert 0 < result.seconds < 30
    assert 0 < result.examples < 10_000


# --- the reference against the live oracle ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", DRAWN)
def test_the_reference_agrees_with_the_oracle_on_drawn_configurations(family: str, tmp_path: Path) -> None:
    if missing := oracle_missing(family):
        pytest.skip(missing)
    result = fuzz("reference", [family], keep=tmp_path, seconds=600, most=8)[0]
    assert result.failure is None
    assert result.examples == 8


@pytest.mark.parametrize("implementation", ["reference", "reference-sdpa"])
def test_a_family_whose_oracle_another_release_has_is_refused_by_name(
    implementation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conformance.oracles.version", lambda _: "5.23.0")
    with pytest.raises(
        ValueError, match=r"the oracle of transformer_xl needs transformers<=4\.37\.2, this is 5\.23\.0"
    ):
        fuzz(implementation, ["transformer_xl"], keep=tmp_path)


def test_the_reference_is_compared_with_the_oracle_and_not_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conformance.oracles.hugging_face import HuggingFace

    right = HuggingFace.logits
    monkeypatch.setattr(HuggingFace, "logits", lambda self, *ids, **more: right(self, *ids, **more) * (1 + 1e-9))
    assert fuzz("reference", ["llama"], keep=tmp_path, seconds=600, most=3)[0].failure is not None


def test_only_our_own_reference_is_compared_with_the_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an implementation whose file is merely called so."""
    from conformance.oracles.hugging_face import HuggingFace

    (tmp_path / "reference_of_mine.py").write_text("from fuzz_bugs import nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(HuggingFace, "logits", None)
    result = fuzz("reference_of_mine:nothing", ["llama"], keep=tmp_path, seconds=600, most=2)[0]
    assert (result.failure, result.examples) == (None, 2)


# --- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DRAWN)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(data=st.data())
def test_drawn_configurations_are_valid_to_the_reference(family: str, data: st.DataObject) -> None:
    config = data.draw(configurations(family))
    module, config_class, _ = FAMILIES[config["model_type"]]
    getattr(__import__(module, fromlist=[config_class]), config_class).from_dict(config)


@pytest.mark.parametrize("family", DRAWN)
def test_every_field_that_changes_the_maths_is_moved(family: str) -> None:
    drawn: list[dict[str, Any]] = []

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(configurations(family))
    def collect(config: dict[str, Any]) -> None:
        drawn.append(config)

    collect()
    usual = plain(family)
    still = {
        field.name for field in get(family).fields if all(c.get(field.name) == usual.get(field.name) for c in drawn)
    }
    assert still == set()


def test_every_model_is_fuzzed() -> None:
    assert set(DRAWN) == set(MODELS)


# --- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["fuzz", *arguments])


def test_a_failure_exits_1_and_says_how_to_replay_it(tmp_path: Path) -> None:
    done = command("fuzz_bugs:layer_scale_ignored", "--family", "gpt2", "--examples", "200", "--keep", str(tmp_path))
    assert done.exit_code == 1
    assert f"conformance run fuzz_bugs:layer_scale_ignored --case {tmp_path / 'gpt2'}" in done.output
    assert "scale_attn_by_inverse_layer_idx: True" in done.output


def test_no_failure_exits_0(tmp_path: Path) -> None:
    done = command("fuzz_bugs:nothing", "--family", "gpt", "--examples", "3", "--keep", str(tmp_path))
    assert (done.exit_code, done.output.startswith("gpt ")) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fuzz_bugs:nobody"], "no attribute 'nobody'"),
        (["fuzz_bugs:bare"], "declares no family; say which: --family"),
        (
            ["fuzz_bugs:nothing", "--family", "lama"],
            "family lama is not fuzzed; there is rnn_search, gnmt",
        ),
        (["fuzz_bugs:Refuses", "--family", "gpt2"], "does not declare family gpt2; it declares llama"),
    ],
)
def test_what_cannot_be_fuzzed_exits_2_and_says_why(arguments: list[str], said: str) -> None:
    done = command(*arguments)
    assert (done.exit_code, said in done.output) == (2, True)


def test_an_example_that_fails_for_the_suites_own_fault_is_not_called_the_candidates(tmp_path: Path) -> None:
    """A configuration that the reference cannot build is an error of the strategy, and raises."""
    worker = Worker("fuzz_bugs:nothing")
    fuzzer = Fuzzer(worker, "llama", tmp_path, tmp_path)
    try:
        with pytest.raises(ValueError, match="unknown keys"):
            fuzzer.judge({"config": plain("llama") | {"colour": "red"}, "batch": 1, "seq": 2, "seed": 0})
    finally:
        worker.close()


def test_kept_cases_open_as_cases(kept: Found) -> None:
    assert kept.directory is not None
    assert sorted(os.listdir(kept.directory)) == [
        "config.json", "expected.safetensors", "inputs.safetensors", "model.safetensors", "provenance.json",
    ]  # fmt: skip
    assert Case(kept.directory).config == kept.config


@settings(max_examples=20, database=None)
@given(examples("transformer"))
def test_examples_of_an_encoder_decoder_have_a_target(example: dict[str, Any]) -> None:
    assert 1 <= example["target"] <= LONGEST
