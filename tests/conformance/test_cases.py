"""A fixture that is damaged in any way is refused by name; an intact one is read, materialised and exported whole.

The tests make a small set of fixtures of their own, with a manifest written here, and damage it.
"""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conformance.cases import Case, Claim, FixtureError, Manifest, file_entries, fixtures_directory, write_manifest

FILES = ("config.json", "model.safetensors", "inputs.safetensors", "expected.safetensors", "provenance.json")
CLAIMS = {
    "llama/first": {"golden.logits": ["float64", "float32"], "golden.loss": ["float64"], "cache.chunks": ["float64"]},
    "llama/second": {"golden.logits": ["float64", "bfloat16"]},
    "mistral/third": {"golden.logits": ["float64"], "cache.chunks": ["float64", "float32"]},
}
BASE = {"embed": torch.arange(15.0).view(5, 3), "head": torch.arange(15.0, 30.0).view(5, 3)}


def write_case(directory: Path, number: int, weights: dict[str, torch.Tensor], shared: dict[str, str]) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"vocab_size": 5, "hidden_size": 3, "note": f"ε {number}"}))
    save_file(weights, directory / "model.safetensors")
    save_file({"input_ids": torch.full((2, 7), number)}, directory / "inputs.safetensors")
    logits = torch.arange(70.0, dtype=torch.float64).view(2, 7, 5) + number
    save_file({"logits": logits, "loss": torch.tensor(1.5, dtype=torch.float64)}, directory / "expected.safetensors")
    noise = {"logits": {"float32": {"max": 1e-6, "rms": 2e-7 * number}}}
    (directory / "provenance.json").write_text(json.dumps({"shared": shared, "oracle_error": noise, "last_rows": None}))


def write_claims(root: Path, cases: dict[str, Any], **changes: Any) -> None:
    """MANIFEST.json for the files as they are now, then changed."""
    entries = {}
    for name, claims in cases.items():
        contents = {file: (root / name / file).read_bytes() for file in FILES}
        files = {f: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for f, c in contents.items()}
        entries[name] = {"claims": claims, "files": files}
    total = sum(len(dtypes) for claims in cases.values() for dtypes in claims.values())
    (root / "MANIFEST.json").write_text(json.dumps({"format": 1, "claims": total, "cases": entries} | changes))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three cases; `second` takes its embedding from `first`, the others store all of their weights."""
    write_case(tmp_path / "llama/first", 1, BASE, {})
    write_case(tmp_path / "llama/second", 2, {"head": BASE["head"] + 100}, {"embed": "llama/first"})
    write_case(tmp_path / "mistral/third", 3, {name: tensor + 200 for name, tensor in BASE.items()}, {})
    write_claims(tmp_path, CLAIMS)
    return tmp_path


def opened(root: Path, name: str = "llama/first") -> Case:
    return Case(name, Manifest(root))


def refusal(root: Path, name: str = "llama/first") -> str:
    with pytest.raises(FixtureError) as caught:
        opened(root, name)
    return str(caught.value)


# --- damage to a case's files ---------------------------------------------------------------------------------------


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("byte", [0, 33, -1])
@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit_is_refused(root: Path, file: str, byte: int) -> None:
    flip(root / "llama/first" / file, byte)
    assert refusal(root).startswith(f"{root}/llama/first/{file}: not the file of the manifest")


@pytest.mark.parametrize("file", FILES)
def test_flipped_bit_of_another_case_does_not_matter(root: Path, file: str) -> None:
    flip(root / "mistral/third" / file, 33)
    assert opened(root).name == "llama/first"


@pytest.mark.parametrize("file", FILES)
def test_truncated_file_is_refused_with_both_sizes(root: Path, file: str) -> None:
    path = root / "llama/first" / file
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert refusal(root) == f"{path}: {len(whole) - 1} bytes, the manifest says {len(whole)}"


@pytest.mark.parametrize("file", FILES)
def test_file_with_a_byte_too_many_is_refused(root: Path, file: str) -> None:
    path = root / "llama/first" / file
    whole = path.read_bytes()
    path.write_bytes(whole + b"\n")
    assert refusal(root) == f"{path}: {len(whole) + 1} bytes, the manifest says {len(whole)}"


@pytest.mark.parametrize("file", FILES)
def test_empty_file_is_refused(root: Path, file: str) -> None:
    (root / "llama/first" / file).write_bytes(b"")
    assert refusal(root).startswith(f"{root}/llama/first/{file}: 0 bytes")


@pytest.mark.parametrize("file", FILES)
def test_missing_file_is_refused(root: Path, file: str) -> None:
    (root / "llama/first" / file).unlink()
    assert refusal(root) == f"{root}/llama/first/{file}: missing"


def test_missing_directory_is_refused_by_its_first_file(root: Path) -> None:
    shutil.rmtree(root / "llama/first")
    assert refusal(root) == f"{root}/llama/first/config.json: missing"


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", ".hidden", "config.json.orig"])
def test_superfluous_file_is_refused(root: Path, name: str) -> None:
    (root / "llama/first" / name).write_text("more")
    assert refusal(root) == f"{root}/llama/first/{name}: not in the manifest"


def test_superfluous_directory_is_refused(root: Path) -> None:
    (root / "llama/first/original").mkdir()
    assert refusal(root) == f"{root}/llama/first/original: not in the manifest"


def swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


@pytest.mark.parametrize(("first", "second"), list(combinations(FILES, 2)))
def test_files_swapped_within_a_case_are_refused(root: Path, first: str, second: str) -> None:
    swap(root / "llama/first" / first, root / "llama/first" / second)
    assert refusal(root).startswith(f"{root}/llama/first/{first}: ")


def test_files_of_one_size_swapped_within_a_case_are_refused_saying_whose_content_it_is(root: Path) -> None:
    case = root / "llama/first"
    (case / "provenance.json").write_bytes((case / "config.json").read_bytes().replace(b"1", b"7"))
    write_claims(root, CLAIMS)
    swap(case / "config.json", case / "provenance.json")
    assert "(it is the content of provenance.json, wanted" in refusal(root)


@pytest.mark.parametrize("file", ["config.json", "inputs.safetensors", "expected.safetensors"])
def test_files_of_one_size_swapped_between_two_cases_are_refused_in_both(root: Path, file: str) -> None:
    first, third = root / "llama/first" / file, root / "mistral/third" / file
    assert first.stat().st_size == third.stat().st_size
    swap(first, third)
    assert refusal(root).startswith(f"{first}: not the file of the manifest")
    assert refusal(root, "mistral/third").startswith(f"{third}: not the file of the manifest")


def test_whole_cases_that_changed_places_are_refused(root: Path) -> None:
    (root / "llama/first").rename(root / "spare")
    (root / "mistral/third").rename(root / "llama/first")
    (root / "spare").rename(root / "mistral/third")
    assert refusal(root).startswith(f"{root}/llama/first/config.json: not the file of the manifest")


def test_case_whose_shared_weights_lie_in_a_damaged_case_is_refused_by_that_case(root: Path) -> None:
    flip(root / "llama/first/model.safetensors", -1)
    with pytest.raises(FixtureError, match=r"llama/first/model\.safetensors: not the file"):
        _ = opened(root, "llama/second").weights


def test_unknown_case_is_refused_with_the_directory_and_the_way_out(root: Path) -> None:
    assert refusal(root, "llama/fist") == f"no case 'llama/fist' in {root}; `conformance list cases` shows them"


# --- damage to the manifest -----------------------------------------------------------------------------------------


def manifest_refusal(root: Path) -> str:
    with pytest.raises(FixtureError) as caught:
        Manifest(root)
    message = str(caught.value)
    assert message.startswith(f"{root}/MANIFEST.json: ")
    return message.removeprefix(f"{root}/MANIFEST.json: ")


def test_missing_manifest_is_refused(tmp_path: Path) -> None:
    assert manifest_refusal(tmp_path).startswith("cannot be read as a manifest (FileNotFoundError")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"null", b"[]", b"3", b"{}", b'{"format": 1}', b'{"format": 1, "cases": []}']
)
def test_manifest_that_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "MANIFEST.json").write_bytes(content)
    assert manifest_refusal(tmp_path).startswith("cannot be read as a manifest (")


def test_truncated_manifest_is_refused(root: Path) -> None:
    path = root / "MANIFEST.json"
    path.write_bytes(path.read_bytes()[:-9])
    assert manifest_refusal(root).startswith("cannot be read as a manifest (JSONDecodeError")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_manifest_of_another_format_is_refused_with_both_numbers(root: Path, version: object) -> None:
    write_claims(root, CLAIMS, format=version)
    assert manifest_refusal(root) == f"format {version}, this version reads format 1"


@pytest.mark.parametrize("stated", [0, 8, 10])
def test_manifest_with_a_wrong_total_is_refused_with_both_numbers(root: Path, stated: int) -> None:
    write_claims(root, CLAIMS, claims=stated)
    assert manifest_refusal(root) == f"states {stated} claims but lists 9"


def edited(root: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((root / "MANIFEST.json").read_text())
    edit(content["cases"])
    (root / "MANIFEST.json").write_text(json.dumps(content))


def test_manifest_without_a_claim_is_refused(root: Path) -> None:
    edited(root, lambda cases: cases["llama/first"]["claims"].pop("golden.loss"))
    assert manifest_refusal(root) == "states 9 claims but lists 8"


def test_manifest_without_a_case_is_refused(root: Path) -> None:
    edited(root, lambda cases: cases.pop("mistral/third"))
    assert manifest_refusal(root) == "states 9 claims but lists 6"


@pytest.mark.parametrize("file", FILES)
def test_manifest_that_leaves_out_a_file_of_a_case_is_refused(root: Path, file: str) -> None:
    edited(root, lambda cases: cases["llama/second"]["files"].pop(file))
    assert manifest_refusal(root).startswith("llama/second must list the files config.json, ")


def test_manifest_without_files_is_refused(root: Path) -> None:
    edited(root, lambda cases: cases["llama/second"].pop("files"))
    assert manifest_refusal(root).startswith("llama/second must list the files config.json, ")


def test_manifest_digest_is_that_of_its_bytes(root: Path) -> None:
    assert Manifest(root).sha256 == hashlib.sha256((root / "MANIFEST.json").read_bytes()).hexdigest()


def test_manifest_written_by_write_manifest_is_read_back(root: Path) -> None:
    before = json.loads((root / "MANIFEST.json").read_text())
    entries = {name: {"claims": claims, "files": file_entries(root / name)} for name, claims in CLAIMS.items()}
    write_manifest(root, entries)
    assert json.loads((root / "MANIFEST.json").read_text()) == before


# --- damage that no manifest vouches for: self-contained directories ------------------------------------------------


def container(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: little-endian header length, JSON header, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor_header(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"logits": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


ABSURD = {
    "nothing": b"",
    "cut within the length": b"\x08\0\0",
    "length of 2^63 bytes": container(b"{}", length=2**63),
    "length of 2^64 - 1 bytes": container(b"{}", length=2**64 - 1),
    "length beyond the file": container(b"{}", length=50_000_000),
    "no JSON": container(b"\xff\xfe{}"),
    "not an object": container([1, 2]),
    "nested 5,000 deep": container(b'{"a":' * 5000),
    "fewer bytes than it says": container(tensor_header([3], 0, 12), bytes(8)),
    "more bytes than it says": container(tensor_header([3], 0, 12), bytes(16)),
    "end before beginning": container(tensor_header([3], 12, 0), bytes(12)),
    "a terabyte of shape": container(tensor_header([2**38], 0, 12), bytes(12)),
    "shape that overflows": container(tensor_header([2**40, 2**40], 0, 12), bytes(12)),
    "negative shape": container(tensor_header([-3], 0, 12), bytes(12)),
    "unknown dtype": container(tensor_header([3], 0, 12, "F99"), bytes(12)),
    "dtype that torch lacks": container(tensor_header([16], 0, 12, "F6_E2M3"), bytes(12)),
}


@pytest.mark.parametrize("content", ABSURD.values(), ids=ABSURD)
@pytest.mark.parametrize(
    ("file", "attribute"),
    [("model.safetensors", "weights"), ("inputs.safetensors", "inputs"), ("expected.safetensors", "expected")],
)
def test_absurd_safetensors_are_refused_by_name(root: Path, content: bytes, file: str, attribute: str) -> None:
    (root / "llama/first" / file).write_bytes(content)
    with pytest.raises(FixtureError, match=rf"llama/first/{file}: cannot be read as safetensors"):
        getattr(Case(root / "llama/first"), attribute)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1} {}'])
@pytest.mark.parametrize(("file", "attribute"), [("config.json", "config"), ("provenance.json", "provenance")])
def test_file_that_is_no_json_is_refused_by_name(root: Path, content: bytes, file: str, attribute: str) -> None:
    (root / "llama/first" / file).write_bytes(content)
    with pytest.raises(FixtureError, match=f"llama/first/{file}: cannot be read as JSON"):
        getattr(Case(root / "llama/first"), attribute)


def test_json_that_is_no_object_is_refused_by_name(root: Path) -> None:
    (root / "llama/first/config.json").write_text("[3]")
    with pytest.raises(FixtureError, match=r"llama/first/config\.json: holds a list, wanted an object"):
        _ = Case(root / "llama/first").config


# --- reading --------------------------------------------------------------------------------------------------------


def test_case_is_read_as_it_was_written(root: Path) -> None:
    case = opened(root, "mistral/third")
    assert (case.name, case.family) == ("mistral/third", "mistral")
    assert case.config == {"vocab_size": 5, "hidden_size": 3, "note": "ε 3"}
    assert case.inputs["input_ids"].equal(torch.full((2, 7), 3))
    assert case.expected["logits"].equal(torch.arange(3.0, 73.0, dtype=torch.float64).view(2, 7, 5))


def test_weights_come_back_in_the_order_of_their_names(root: Path) -> None:
    assert list(opened(root, "llama/second").weights) == ["embed", "head"]


def test_shared_weight_is_read_from_the_case_that_stores_it(root: Path) -> None:
    weights = opened(root, "llama/second").weights
    assert weights["embed"].equal(torch.arange(15.0).view(5, 3))
    assert weights["head"].equal(torch.arange(115.0, 130.0).view(5, 3))


def test_shared_weights_may_come_from_several_cases(root: Path) -> None:
    write_case(root / "llama/fourth", 4, {}, {"embed": "mistral/third", "head": "llama/first"})
    write_claims(root, CLAIMS | {"llama/fourth": {"golden.logits": ["float64"]}})
    weights = opened(root, "llama/fourth").weights
    assert weights["embed"].equal(torch.arange(200.0, 215.0).view(5, 3))
    assert weights["head"].equal(torch.arange(15.0, 30.0).view(5, 3))


def test_case_is_found_by_name_in_the_fixtures_of_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFORMANCE_FIXTURES", str(root))
    assert fixtures_directory() == root
    assert Case("llama/second").directory == root / "llama/second"


def test_directory_is_a_case_of_its_own_without_manifest(root: Path) -> None:
    (root / "MANIFEST.json").unlink()
    case = Case(root / "llama/first")
    assert (case.name, case.manifest) == ("llama/first", None)
    assert case.weights["head"].equal(torch.arange(15.0, 30.0).view(5, 3))


def test_directory_may_be_given_as_a_string(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root / "llama")
    assert Case("./first").name == Case(str(root / "llama/first")).name == "llama/first"


def test_last_rows_select_the_end_of_the_sequence(root: Path) -> None:
    case = opened(root)
    assert list(range(7))[case.rows] == list(range(7))
    case.provenance["last_rows"] = 3
    assert list(range(7))[case.rows] == [4, 5, 6]


def test_oracle_error_is_known_for_working_dtypes_and_none_for_float64(root: Path) -> None:
    assert opened(root, "mistral/third").oracle_error("logits", "float32") == {"max": 1e-6, "rms": 6e-7}
    assert opened(root, "mistral/third").oracle_error("logits", "float64") is None


# --- exporting ------------------------------------------------------------------------------------------------------


def test_exported_case_equals_the_case_and_stands_alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    case = opened(root, "llama/second")
    target = tmp_path_factory.mktemp("export") / "llama" / "second"
    case.export(target)
    shutil.rmtree(root)
    again = Case(target)
    assert sorted(os.listdir(target)) == sorted(FILES)
    assert (again.name, again.config, again.shared) == ("llama/second", case.config, {})
    for kind in ("weights", "inputs", "expected"):
        stored, copied = getattr(case, kind), getattr(again, kind)
        assert stored.keys() == copied.keys()
        assert [n for n in stored if stored[n].dtype != copied[n].dtype or not stored[n].equal(copied[n])] == []


def test_exported_checkpoint_holds_the_shared_weights_itself(root: Path, tmp_path: Path) -> None:
    opened(root, "llama/second").export(tmp_path / "copy")
    weights = load_file(tmp_path / "copy/model.safetensors")
    assert weights["embed"].equal(torch.arange(15.0).view(5, 3))
    assert weights["head"].equal(torch.arange(115.0, 130.0).view(5, 3))


def test_json_is_utf_8_whatever_the_locale(root: Path) -> None:
    code = f"""
from pathlib import Path
from conformance.cases import Case, write_json
case = Case(Path({str(root)!r}) / "llama/first")
assert case.config["note"] == "ε 1", case.config
write_json(Path({str(root)!r}) / "again.json", case.config)
"""
    options = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning"]
    subprocess.run([sys.executable, *options, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert (root / "again.json").read_bytes().count("ε".encode()) == 1


# --- selecting claims -----------------------------------------------------------------------------------------------


def test_claims_stand_in_the_manifests_order(root: Path) -> None:
    claims = list(Manifest(root).claims())
    assert len(claims) == 9
    assert claims[:3] == [
        Claim("llama/first", "golden.logits", "float64"),
        Claim("llama/first", "golden.logits", "float32"),
        Claim("llama/first", "golden.loss", "float64"),
    ]


def test_no_filter_selects_everything(root: Path) -> None:
    manifest = Manifest(root)
    assert manifest.select() == list(manifest.claims())


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"families": ["mistral"]}, ["mistral/third golden.logits float64", "mistral/third cache.chunks float64",
                                     "mistral/third cache.chunks float32"]),
        ({"cases": ["llama/second"]}, ["llama/second golden.logits float64", "llama/second golden.logits bfloat16"]),
        ({"checks": ["golden.loss"]}, ["llama/first golden.loss float64"]),
        ({"checks": ["cache"], "families": ["llama"]}, ["llama/first cache.chunks float64"]),
        ({"checks": ["golden"], "cases": ["llama/first"], "dtypes": ["float64"]},
         ["llama/first golden.logits float64", "llama/first golden.loss float64"]),
        ({"dtypes": ["bfloat16", "float32"]},
         ["llama/first golden.logits float32", "llama/second golden.logits bfloat16",
          "mistral/third cache.chunks float32"]),
        ({"dtypes": ["bfloat16"], "families": ["mistral"]}, []),
    ],
    ids=str,
)  # fmt: skip
def test_claim_is_selected_if_it_matches_every_filter(root: Path, filters: dict[str, Any], expected: list[str]) -> None:
    selected = Manifest(root).select(**filters)
    assert [f"{claim.case} {claim.check} {claim.dtype}" for claim in selected] == expected


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"families": ["lama"]}, "unknown family lama; there is llama, mistral"),
        ({"cases": ["llama/frist"]}, "unknown case llama/frist; there is llama/first, llama/second, mistral/third"),
        ({"checks": ["golden.logit"]},
         "unknown check golden.logit; there is cache, cache.chunks, golden, golden.logits, golden.loss"),
        ({"checks": ["logits"]},
         "unknown check logits; there is cache, cache.chunks, golden, golden.logits, golden.loss"),
        ({"dtypes": ["float16", "int8", "float32"]},
         "unknown dtype float16, int8; there is bfloat16, float32, float64"),
    ],
    ids=str,
)  # fmt: skip
def test_unknown_filter_value_is_refused_with_those_there_are(
    root: Path, filters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="unknown") as caught:
        Manifest(root).select(**filters)
    assert str(caught.value) == message


def test_claim_is_printed_with_its_case_check_and_dtype() -> None:
    claim = Claim("llama/plain", "golden.loss", "float64")
    assert (str(claim), claim.family) == ("llama/plain · golden.loss · float64", "llama")


# --- the fixtures that are shipped ----------------------------------------------------------------------------------


def test_every_shipped_case_is_intact() -> None:
    manifest = Manifest()
    assert [Case(name, manifest).name for name in manifest.cases] == list(manifest.cases)


def test_no_directory_of_the_shipped_fixtures_is_outside_the_manifest() -> None:
    manifest = Manifest()
    found = {"/".join(path.parent.parts[-2:]) for path in manifest.directory.glob("*/*/config.json")}
    assert found == set(manifest.cases)
