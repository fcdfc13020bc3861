"""`python -m reference_impl generate`: what it writes where, and how it ends."""

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from reference_impl import __main__ as command
from reference_impl.checkpoint import load_model, save_model
from reference_impl.generation import Sampling, generate
from reference_impl.models.gpt2 import GPT2, GPT2Config
from reference_impl.models.mistral import Mistral, MistralConfig
from reference_impl.models.transformer import Transformer, TransformerConfig
from reference_impl.tokenizer import load_tokenizer
from tokenizer_directories import of_case

PROMPT = [3, 1, 4, 1, 5]


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).mul_(0.7)
    return model


@pytest.fixture
def checkpoint(tmp_path):
    config = MistralConfig(
        vocab_size=23, hidden_size=10, intermediate_size=7, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=4, sliding_window=3,
    )  # fmt: skip
    save_model(randomised(Mistral(config)), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def run(checkpoint, *arguments):
    return command.main(["generate", "--checkpoint", str(checkpoint), *arguments])


def ids_of(text):
    return [int(word) for word in text.split()]


def expected(checkpoint, **options):
    return generate(load_model(checkpoint), [PROMPT], max_new_tokens=12, **options)[0].ids


def change(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


# --- ids


def test_ids_are_continued_greedily(checkpoint, capsys):
    assert run(checkpoint, "--ids", "3 1 4,1, 5", "--max-new-tokens", "12") == 0
    written = capsys.readouterr()
    assert ids_of(written.out) == expected(checkpoint)
    assert "5 tokens of prompt and the first new one in" in written.err
    assert "11 more in" in written.err
    assert written.err.rstrip().endswith("tokens per second")


def test_any_decoder_family_is(tmp_path, capsys):
    save_model(randomised(GPT2(GPT2Config(vocab_size=23, n_embd=12, n_head=3, n_layer=2, n_positions=20))), tmp_path)
    assert run(tmp_path, "--ids", "3 1 4 1 5", "--max-new-tokens", "12") == 0
    assert ids_of(capsys.readouterr().out) == expected(tmp_path)


def test_the_same_seed_draws_the_same_tokens(checkpoint, capsys):
    outputs = []
    for seed in ("7", "7", "8"):
        assert run(checkpoint, "--ids", "3 1", "--temperature", "1.5", "--top-k", "20", "--seed", seed) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_token_that_ends_a_text_ends_generation(checkpoint, capsys, file, several):
    free = expected(checkpoint)
    end = free[4]
    change(checkpoint / "config.json", eos_token_id=None)
    change(checkpoint / file, eos_token_id=[end, 22] if several else end)
    assert run(checkpoint, "--ids", "3 1 4 1 5", "--max-new-tokens", "12") == 0
    assert ids_of(capsys.readouterr().out) == free[: free.index(end) + 1]
    assert run(checkpoint, "--ids", "3 1 4 1 5", "--max-new-tokens", "12", "--ignore-eos") == 0
    assert ids_of(capsys.readouterr().out) == free


@pytest.mark.parametrize(("given", "dtype"), [((), "bfloat16"), (("--dtype", "float64"), "float64")], ids=str)
def test_the_dtype_is_the_one_asked_for_or_that_of_the_file(checkpoint, monkeypatch, given, dtype):
    loaded = []
    monkeypatch.setattr(command, "load_model", lambda *a, **k: loaded.append(load_model(*a, **k)) or loaded[-1])
    change(checkpoint / "config.json", torch_dtype="bfloat16")
    assert run(checkpoint, "--ids", "1", *given) == 0
    assert loaded[0].lm_head.weight.dtype == getattr(torch, dtype)


def test_one_token_and_none_are_no_division_by_zero(checkpoint, capsys):
    for number, said in (("1", "and the first new one in"), ("0", "nothing generated")):
        assert run(checkpoint, "--ids", "1", "--max-new-tokens", number) == 0
        assert said in capsys.readouterr().err


# --- text


class Letters:
    """A tokenizer of 26 letters that writes a space before each but the first of a text; "e" needs two tokens."""

    def encode(self, text, *, add_special_tokens):
        assert add_special_tokens
        return [0] + [ord(letter) - 96 for letter in text]

    def decoder(self):
        seen = []

        def feed(token):
            seen.append(token)
            letter = chr(96 + token) if token else ""
            return f" {letter}" if len(seen) > 1 else letter

        return SimpleNamespace(feed=feed, finish=lambda: "!")


@pytest.fixture
def letters(monkeypatch):
    monkeypatch.setattr(command, "load_tokenizer", lambda directory, file: Letters())


@pytest.mark.usefixtures("letters")
def test_text_is_continued_as_the_middle_of_a_text(checkpoint, capsys):
    assert run(checkpoint, "--prompt", "abc", "--max-new-tokens", "6") == 0
    ids = generate(load_model(checkpoint), [[0, 1, 2, 3]], max_new_tokens=6)[0].ids
    assert capsys.readouterr().out == "".join(f" {chr(96 + token)}" if token else " " for token in ids) + "!\n"


@pytest.mark.usefixtures("letters")
def test_text_is_written_as_soon_as_it_is_there(checkpoint, monkeypatch):
    """Before the second token is computed, the first has been flushed."""
    events = []
    monkeypatch.setattr(command, "print", lambda *text, **options: events.append((text, options)), raising=False)
    real = command.stream

    def stream(*arguments, **options):
        for step in real(*arguments, **options):
            events.append("step")
            yield step

    monkeypatch.setattr(command, "stream", stream)
    assert run(checkpoint, "--prompt", "abc", "--max-new-tokens", "3") == 0
    kinds = [event if event == "step" else "text" for event in events if event == "step" or event[1].get("flush")]
    assert kinds == ["step", "text"] * 3 + ["text"] * 2


@pytest.mark.parametrize("case", ["sentencepiece_bpe/plain", "byte_level_bpe/plain"])
def test_text_is_the_tokenizer_s(checkpoint, capsys, case):
    """What is written is what decoding the whole text adds to the prompt."""
    tokenizer = load_tokenizer(of_case(case, checkpoint.parent / "tokenizer"))
    config = MistralConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=10, intermediate_size=7, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=4, sliding_window=3,
    )  # fmt: skip
    save_model(randomised(Mistral(config)), checkpoint.parent / "tokenizer")
    ids = tokenizer.encode("a cat", add_special_tokens=True)
    for seed in range(3):
        drawn = {"sampling": Sampling(temperature=3.0), "generator": torch.Generator().manual_seed(seed)}
        new = generate(load_model(checkpoint.parent / "tokenizer"), [ids], max_new_tokens=40, **drawn)[0].ids
        arguments = ["--prompt", "a cat", "--temperature", "3", "--seed", str(seed), "--max-new-tokens", "40"]
        assert run(checkpoint.parent / "tokenizer", *arguments) == 0
        text = capsys.readouterr().out.removesuffix("\n")
        assert tokenizer.decode(ids) + text == tokenizer.decode(ids + new)
        assert text


def test_without_a_tokenizer_ids_are_asked_for(checkpoint, capsys):
    assert run(checkpoint, "--prompt", "abc") == 2
    assert "no tokenizer here" in (said := capsys.readouterr().err)
    assert "--ids instead of --prompt" in said


def test_the_file_of_the_tokenizer_may_be_named(checkpoint, capsys):
    of_case("byte_level_bpe/plain", checkpoint)
    assert run(checkpoint, "--prompt", "abc", "--tokenizer", "tokenizer.model") == 2
    assert "tokenizer.model" in capsys.readouterr().err


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ids", "one"], "--ids 'one' must be numbers"),
        (["--ids", ""], "prompt 0 is empty"),
        (["--ids", "23"], r"prompt 0 holds 23; token ids are 0 … 22 (vocab_size=23)"),
        (["--ids", "1", "--top-p", "2"], "top_p=2.0 must be greater than 0 and at most 1"),
        (["--ids", "1", "--temperature", "0"], "temperature=0.0 must be greater than 0"),
        (["--ids", "1", "--seed", "1"], "--seed is for drawing"),
        (["--ids", "1", "--max-new-tokens", "-1"], "max_new_tokens must be at least 0"),
        (["--ids", "1", "--top-k", "2", "--seed", str(2**64)], "must be one of −2⁶³ … 2⁶⁴ − 1"),
        (["--ids", "1", "--device", "nonsense"], "--device nonsense: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_done_is_status_2_and_one_error(checkpoint, capsys, arguments, message):
    assert run(checkpoint, *arguments) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert message in written.err
    assert "error: " in written.err


def test_a_checkpoint_that_is_none_is_named(tmp_path, capsys):
    assert run(tmp_path / "nowhere", "--ids", "1") == 2
    assert "config.json is missing" in capsys.readouterr().err


def test_a_damaged_checkpoint_names_file_and_fault(checkpoint, capsys):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert run(checkpoint, "--ids", "1") == 2
    assert "model.safetensors is corrupt or cut short" in capsys.readouterr().err


@pytest.mark.parametrize("eos", ["</s>", True, [1, 2.0]], ids=repr)
def test_an_eos_that_is_no_number_is_refused(checkpoint, capsys, eos):
    change(checkpoint / "generation_config.json", eos_token_id=eos)
    assert run(checkpoint, "--ids", "1") == 2
    assert f"eos_token_id={eos!r} must be a number or a list of numbers" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_an_error(checkpoint, capsys):
    assert run(checkpoint, "--ids", "1", "--device", "cuda") == 2
    assert capsys.readouterr().err.startswith("error: --device cuda: ")


def test_an_error_amid_the_text_begins_a_line(tmp_path, capsys):
    save_model(randomised(GPT2(GPT2Config(vocab_size=23, n_embd=12, n_head=3, n_layer=2, n_positions=8))), tmp_path)
    assert run(tmp_path, "--ids", "3 1 4 1 5", "--max-new-tokens", "12") == 2
    written = capsys.readouterr()
    assert len(ids_of(written.out)) == 4
    assert written.out.endswith("\n")
    assert written.err.splitlines()[-1].startswith("error: position 8 needs a table of 9 positions, n_positions=8")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_an_error_and_no_traceback(checkpoint):
    started = [sys.executable, "-m", "reference_impl", "generate", "--checkpoint", str(checkpoint), "--ids", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(started, stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ, check=False)
    assert done.returncode == 2
    assert "error: [Errno 28]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_character_that_the_terminal_cannot_show_is_escaped(monkeypatch, checkpoint):
    letters = SimpleNamespace(
        encode=lambda text, add_special_tokens: [1],
        decoder=lambda: SimpleNamespace(feed=lambda token: "é", finish=lambda: "你"),
    )
    monkeypatch.setattr(command, "load_tokenizer", lambda directory, file: letters)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run(checkpoint, "--prompt", "a", "--max-new-tokens", "2") == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == b"\xe9\xe9\\u4f60\n"


def test_a_model_with_an_encoder_is_refused(tmp_path, capsys):
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_layers": 1, "decoder_layers": 1}
    config = TransformerConfig(vocab_size=23, d_model=12, encoder_ffn_dim=8, decoder_ffn_dim=8, **heads)
    save_model(Transformer(config), tmp_path)
    assert run(tmp_path, "--ids", "1") == 2
    assert "has an encoder: it translates a source, and continues no prompt" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["generate"], ["generate", "--checkpoint", "x"], ["nonsense"]], ids=str)
def test_arguments_that_make_no_sense_are_status_2(arguments):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2


def test_an_interrupt_is_status_130(checkpoint, monkeypatch):
    def stream(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "stream", stream)
    assert run(checkpoint, "--ids", "1") == 130


def test_as_a_process_whose_reader_goes_away(checkpoint):
    """Two tokens are read, then the pipe is closed: no traceback, and a status of 1."""
    started = [sys.executable, "-m", "reference_impl", "generate", "--checkpoint", str(checkpoint), "--ids", "1",
               "--max-new-tokens", "20000"]  # fmt: skip
    with subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout.read(4)
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait() == 1
    assert "Traceback" not in said
    assert "Error" not in said
