"""Golden cases on disk: reading, verifying, materialising; and the manifest that says how many claims there are.

A case is a directory `fixtures/<family>/<case>/`:

    config.json            the configuration, in Hugging Face's own keys (both spellings of the rotary parameters)
    model.safetensors      weights under hub names, float32, exact in bfloat16; tensors that an earlier case of the
                           family stores already are left out and listed in provenance.json under "shared";
                           of a tokenizer, its files by name, each as a tensor of bytes
    inputs.safetensors     token ids, lengths, positions; of a tokenizer, texts in UTF-8, each ended by the byte 0xFF
    expected.safetensors   float64 truth: logits, block outputs, and where the family stores them probes and gradients;
                           of a tokenizer, rows of ids, each ended by -1
    provenance.json        recipe, versions, the oracle's own error per dtype, what the golden was checked against

`fixtures/MANIFEST.json` holds the SHA-256 and size of every file and the claims of every case.  A fixture that is
damaged, missing, superfluous or swapped is refused by name before anything is judged.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
FILES = ("config.json", "model.safetensors", "inputs.safetensors", "expected.safetensors", "provenance.json")


class FixtureError(ValueError):
    """A golden case cannot be trusted: names the file and what is wrong with it."""


@dataclass(frozen=True, order=True)
class Claim:
    """The unit that is counted: one check of one case in one dtype."""

    case: str
    check: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.case} · {self.check} · {self.dtype}"

    @property
    def family(self) -> str:
        return self.case.split("/")[0]


def fixtures_directory() -> Path:
    """Where the goldens are: `$CONFORMANCE_FIXTURES`, else inside the installed package, else the checkout's own."""
    if chosen := os.environ.get("CONFORMANCE_FIXTURES"):
        return Path(chosen)
    packaged = Path(__file__).parent / "_fixtures"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "fixtures"


class Manifest:
    """`MANIFEST.json`: which cases there are, their files' hashes, and their claims."""

    def __init__(self, directory: Path | None = None):
        self.directory = directory or fixtures_directory()
        path = self.directory / "MANIFEST.json"
        try:
            text = path.read_bytes()
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise FixtureError(f"{path}: format {content['format']}, this version reads format {FORMAT}")
            self.cases: dict[str, dict[str, Any]] = content["cases"]
            stated = content["claims"]
            counted = sum(1 for _ in self.claims())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, FixtureError):
                raise
            raise FixtureError(f"{path}: cannot be read as a manifest ({type(error).__name__}: {error})") from error
        for case, entry in self.cases.items():
            if not isinstance(entry.get("files"), dict) or set(entry["files"]) != set(FILES):
                raise FixtureError(f"{path}: {case} must list the files {', '.join(FILES)}")
        if stated != counted:
            raise FixtureError(f"{path}: states {stated} claims but lists {counted}")
        self.sha256 = hashlib.sha256(text).hexdigest()

    def adopt(self, directory: Path) -> str:
        """Take a self-contained case into this manifest, for as long as it lives; returns the case's name.

        directory: as `Case.export` writes it; its provenance.json says name and claims.
        Raises: FixtureError if it is no such case.
        """
        provenance = Case(directory).provenance
        name, claims = provenance.get("recipe"), provenance.get("claims")
        if not isinstance(name, str) or name.count("/") != 1 or not isinstance(claims, dict):
            raise FixtureError(
                f"{directory / 'provenance.json'}: says neither recipe nor claims; `conformance export` writes both"
            )
        self.cases[name] = {"claims": claims, "directory": directory}
        return name

    def claims(self) -> Iterator[Claim]:
        """Every claim, in the manifest's order."""
        for case, entry in self.cases.items():
            for check, dtypes in entry["claims"].items():
                yield from (Claim(case, check, dtype) for dtype in dtypes)

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(name.split("/")[0] for name in self.cases))

    def select(
        self,
        *,
        families: Iterable[str] = (),
        cases: Iterable[str] = (),
        checks: Iterable[str] = (),
        dtypes: Iterable[str] = (),
    ) -> list[Claim]:
        """Claims that match every given filter; an empty filter matches all.

        A check may be given as its module alone: `golden` selects `golden.logits`, `golden.loss`, …
        Raises: ValueError naming a value that matches nothing in the manifest, with the values there are.
        """
        claims = list(self.claims())
        known = {
            "family": self.families,
            "case": list(self.cases),
            "check": sorted({c.check for c in claims} | {c.check.split(".")[0] for c in claims}),
            "dtype": sorted({c.dtype for c in claims}),
        }
        wanted = {"family": set(families), "case": set(cases), "check": set(checks), "dtype": set(dtypes)}
        for what, values in wanted.items():
            if unknown := values - set(known[what]):
                raise ValueError(f"unknown {what} {', '.join(sorted(unknown))}; there is {', '.join(known[what])}")
        return [
            c
            for c in claims
            if (not wanted["family"] or c.family in wanted["family"])
            and (not wanted["case"] or c.case in wanted["case"])
            and (not wanted["check"] or {c.check, c.check.split(".")[0]} & wanted["check"])
            and (not wanted["dtype"] or c.dtype in wanted["dtype"])
        ]


class Case:
    """One golden case, by name (`llama/plain`) or from a self-contained directory.

    A named case is verified against the manifest when it is opened.

    Raises: FixtureError if any file is damaged, missing, superfluous or not the one the manifest names.
    """

    def __init__(self, name: str | Path, manifest: Manifest | None = None):
        if isinstance(name, Path) or (name.startswith((".", "/")) and Path(name).is_dir()):
            self.directory, self.manifest = Path(name), None
            self.name = "/".join(self.directory.resolve().parts[-2:])
        else:
            self.manifest = manifest or Manifest()
            if name not in self.manifest.cases:
                where = self.manifest.directory
                raise FixtureError(f"no case {name!r} in {where}; `conformance list cases` shows them")
            entry = self.manifest.cases[name]
            self.name, self.directory = name, entry.get("directory", self.manifest.directory / name)
            if "directory" not in entry:
                verify_files(self.directory, entry["files"])

    def __repr__(self) -> str:
        return f"Case({self.name!r})"

    @property
    def family(self) -> str:
        return self.name.split("/")[0]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration as config.json has it."""
        return self._json("config.json")

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return self._json("provenance.json")

    @cached_property
    def inputs(self) -> dict[str, "Tensor"]:
        return self._tensors("inputs.safetensors")

    @property
    def arguments(self) -> "dict[str, Tensor]":
        """What the full forward of a model is called with."""
        return forward_arguments(self.inputs)

    @property
    def ids(self) -> "Tensor":
        """The token ids that the logits belong to: of an encoder–decoder model, those that its decoder reads."""
        return self.inputs.get("decoder_input_ids", self.inputs["input_ids"])

    @property
    def source(self) -> "dict[str, Tensor]":
        """What a session is opened with: of an encoder–decoder model, the ids that its encoder reads."""
        return {"input_ids": self.inputs["input_ids"]} if "decoder_input_ids" in self.inputs else {}

    @cached_property
    def expected(self) -> dict[str, "Tensor"]:
        """The float64 truth by name: `logits`, `loss`, `probe.<probe>`, `gradient.<parameter>`, …"""
        return self._tensors("expected.safetensors")

    @cached_property
    def weights(self) -> dict[str, "Tensor"]:
        """All weights under hub names, float32; shared ones are read from the case that stores them."""
        weights = self._tensors("model.safetensors")
        for source in dict.fromkeys(self.shared.values()):
            stored = Case(source, self.manifest).weights
            weights |= {name: stored[name] for name, home in self.shared.items() if home == source}
        return dict(sorted(weights.items()))

    @cached_property
    def files(self) -> dict[str, bytes]:
        """A tokenizer's files by name; each is stored among the weights, as a tensor of bytes."""
        return {name: tensor.numpy().tobytes() for name, tensor in self.weights.items() if "tokenizer" in self.config}

    @property
    def shared(self) -> dict[str, str]:
        """Tensors that another case stores: hub name -> that case."""
        return self.provenance["shared"]  # type: ignore[no-any-return]

    def counterfactuals(self, what: str = "logits") -> "dict[str, Tensor]":
        """A value as the mistakes that the case knows give it, the plainest mistake first: label -> value."""
        keys = {label: f"counterfactual.{label}.{what}" for label in self.provenance["movement"]}
        return {label: self.expected[key] for label, key in keys.items() if key in self.expected}

    @property
    def rows(self) -> slice:
        """The rows of the sequence that are compared: all, or in a `long` case the last few."""
        last = self.provenance.get("last_rows")
        return slice(None) if last is None else slice(-last, None)

    def oracle_error(self, what: str, dtype: str) -> dict[str, float] | None:
        """The oracle's own error in `dtype` for an expected tensor: {"max": …, "rms": …}; None for float64."""
        if dtype == "float64":
            return None
        return self.provenance["oracle_error"][what][dtype]  # type: ignore[no-any-return]

    def read(self) -> None:
        """Read everything now, as it is stored: under TrueDouble, which a check may be in, float32 means float64."""
        _ = self.config, self.provenance, self.weights, self.inputs, self.expected

    def export(self, directory: Path) -> None:
        """Write the case as a complete Hugging Face checkpoint, with inputs and expected values beside it."""
        claims = self.manifest.cases[self.name]["claims"] if self.manifest else self.provenance.get("claims", {})
        provenance = {**self.provenance, "claims": claims}
        self.write(directory, self.config, self.weights, self.inputs, self.expected, provenance)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)

    @staticmethod
    def write(
        directory: Path,
        config: dict[str, Any],
        weights: "dict[str, Tensor]",
        inputs: "dict[str, Tensor]",
        expected: "dict[str, Tensor]",
        provenance: dict[str, Any],
    ) -> None:
        """Write a self-contained case, which `Manifest.adopt` takes.

        provenance: says at least "recipe" (its name), "claims" (check -> dtypes), "oracle_error" and "movement".
        """
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "config.json", config)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        save_file(inputs, directory / "inputs.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in expected.items()}, directory / "expected.safetensors")
        write_json(directory / "provenance.json", {**provenance, "shared": {}})

    def _json(self, file: str) -> dict[str, Any]:
        try:
            content = json.loads((self.directory / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FixtureError(f"{self.directory / file}: cannot be read as JSON ({error})") from error
        if not isinstance(content, dict):
            raise FixtureError(f"{self.directory / file}: holds a {type(content).__name__}, wanted an object")
        return content

    def _tensors(self, file: str) -> dict[str, "Tensor"]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.directory / file)
        except (OSError, SafetensorError) as error:
            raise FixtureError(f"{self.directory / file}: cannot be read as safetensors ({error})") from error


def forward_arguments(inputs: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Of a case's inputs, what a full forward is called with: the ids, and those of a decoder where there is one."""
    return {name: inputs[name] for name in ("input_ids", "decoder_input_ids") if name in inputs}


def file_entries(directory: Path) -> dict[str, dict[str, Any]]:
    """Hash and size of the files of a case, as the manifest records them."""
    return {name: {"sha256": _sha256(directory / name), "bytes": (directory / name).stat().st_size} for name in FILES}


def verify_files(directory: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Compare a case's directory with its manifest entries.

    Raises: FixtureError naming the first file that is missing, superfluous, of another size or of another content.
    """
    present = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    for name, entry in entries.items():
        path = directory / name
        if name not in present:
            raise FixtureError(f"{path}: missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise FixtureError(f"{path}: {size} bytes, the manifest says {entry['bytes']}")
        if (digest := _sha256(path)) != entry["sha256"]:
            known = next((other for other, e in entries.items() if e["sha256"] == digest), None)
            detail = f"it is the content of {known}" if known else f"SHA-256 {digest[:12]}…"
            raise FixtureError(f"{path}: not the file of the manifest ({detail}, wanted {entry['sha256'][:12]}…)")
    if superfluous := sorted(present - set(entries)):
        raise FixtureError(f"{directory / superfluous[0]}: not in the manifest")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def write_manifest(directory: Path, cases: dict[str, dict[str, Any]]) -> None:
    """Write MANIFEST.json for `cases`: name -> {"claims": {check: [dtype, …]}, "files": {…}}."""
    total = sum(len(dtypes) for entry in cases.values() for dtypes in entry["claims"].values())
    write_json(directory / "MANIFEST.json", {"format": FORMAT, "claims": total, "cases": cases})


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
