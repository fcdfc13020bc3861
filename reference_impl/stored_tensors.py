"""What the files of a checkpoint directory hold, and their bytes: safetensors files, one or several, and their index.

A file begins with the length of a header and the header, JSON that gives dtype, shape and place of every tensor; the
bytes of the tensors follow, row by row. The safetensors library checks the header; the bytes are read here, a few at a
time and not through a memory map, so that no page of a file counts as memory of the process, and a file that is cut
short meanwhile is an error and no crash. Every fault is reported, with the names of file and tensor.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

READABLE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Elements that are read at once: what loading needs beside the weights.
RUN = 2**20
# What else may be beside a config.json; Mistral's own releases have consolidated.safetensors.
OTHER_FORMATS = {".bin", ".gguf", ".h5", ".msgpack", ".pt", ".pth", ".safetensors"}
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint directory cannot be read or written; the message lists every fault, with names, shapes and files."""

    def __init__(self, path: Path, faults: list[str]) -> None:
        super().__init__("\n  ".join([f"{path}: {len(faults)} fault(s)", *faults]))
        self.faults = faults


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what the header of its file says about it.

    name: in the file; several that are stored as one tensor share it.
    start: of its bytes, counted from the beginning of the file.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int

    def part(self, number: int, shape: tuple[int, ...]) -> "Stored":
        """A part of this tensor: the bytes are cut into runs of `shape`, and this is run `number`."""
        # a dtype that is not read is reported, never sliced
        width = READABLE_DTYPES[self.dtype].itemsize if self.dtype in READABLE_DTYPES else 0
        return Stored(self.file, self.name, shape, self.dtype, self.start + number * math.prod(shape) * width)

    def read(self, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Tensor:
        """The tensor, in memory of its own; `dtype` None: as it is stored. Converted and moved run by run.

        Raises:
            CheckpointError: the file is gone or shorter than its header says.
        """
        stored = READABLE_DTYPES[self.dtype]
        tensor = torch.empty(self.shape, dtype=dtype or stored, device=device)
        elements, size = tensor.view(-1), math.prod(self.shape)
        try:
            with self.file.open("rb") as file:
                file.seek(self.start)
                for start in range(0, size, RUN):
                    stop = min(start + RUN, size)
                    content = bytearray((stop - start) * stored.itemsize)
                    if (read := file.readinto(content)) < len(content):
                        raise OSError(f"it ends {len(content) - read} bytes too early")
                    # as bytes first, then as what they mean: no dtype of values is named until the values are there
                    elements[start:stop] = torch.frombuffer(content, dtype=torch.uint8).view(stored)
        except OSError as error:
            fault = f"{self.file.name} cannot be read at {self.name}: {error}"
            raise CheckpointError(self.file.parent, [fault]) from error
        return tensor


def find_tensors(path: Path) -> dict[str, Stored]:
    """Every stored tensor by name, from the headers of the files and, if there are several, their index.

    Raises:
        CheckpointError: a file is missing or damaged, or index and files disagree.
    """
    if (path / SINGLE_FILE).exists():
        return read_header(path / SINGLE_FILE)
    if not (path / INDEX_FILE).exists():
        others = sorted(file.name for file in path.glob("*") if file.suffix in OTHER_FORMATS)
        hint = f", not {', '.join(others)}: load it elsewhere, and save it as safetensors" if others else ""
        raise CheckpointError(path, [f"holds neither {SINGLE_FILE} nor {INDEX_FILE}; nothing else is read{hint}"])
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(path, [f"{INDEX_FILE} has no weight_map from names to files"])
    faults: list[str] = []
    found: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        listed = {name for name, its_file in weight_map.items() if its_file == file}
        if not _is_file_of(path, file):
            faults.append(f"{INDEX_FILE} names {file}, which is missing, for {', '.join(sorted(listed))}")
            continue
        try:
            contents = read_header(path / file)
        except CheckpointError as error:
            faults += [
                f"{fault}; {INDEX_FILE} says that it holds {', '.join(sorted(listed))}" for fault in error.faults
            ]
            continue
        faults += [f"{name} is not in {file}, where {INDEX_FILE} says it is" for name in sorted(listed - set(contents))]
        for name in sorted(set(contents) - listed):
            faults.append(f"{name} is in {file}, but {INDEX_FILE} says {weight_map.get(name, 'nothing about it')}")
        found |= contents
    if faults:
        raise CheckpointError(path, faults)
    return found


def _is_file_of(path: Path, name: str) -> bool:
    """Whether `name` is a file in the directory itself; what is no name of a file at all is not."""
    try:
        return Path(name).name == name and (path / name).is_file()
    except (OSError, ValueError):
        return False


def read_header(file: Path) -> dict[str, Stored]:
    """What one file holds.

    Raises:
        CheckpointError: it is not a safetensors file, or not all of one.
    """
    try:
        with safe_open(file, framework="pt"):  # checks that names, shapes and places fit together and fill the file
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length), object_pairs_hook=_each_once)
    except (SafetensorError, OSError, ValueError) as error:
        cut = "".join(f"; {name} goes on beyond its end" for name in _cut_short(file))
        raise CheckpointError(file.parent, [f"{file.name} is corrupt or cut short: {error}{cut}"]) from error
    return {
        name: Stored(file, name, tuple(about["shape"]), about["dtype"], 8 + length + about["data_offsets"][0])
        for name, about in header.items()
        if name != "__metadata__"
    }


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of which no name is silently lost.  Raises: ValueError for one that occurs twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"its header names {next(name for name in names if names.count(name) > 1)} twice")
    return content


def _cut_short(file: Path) -> list[str]:
    """Of a file that is refused: the tensors whose bytes it does not have all of, if its header still says so."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            start = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(start - 8, size)))
        return [name for name, about in header.items() if "shape" in about and start + about["data_offsets"][1] > size]
    except (OSError, ValueError, RecursionError, AttributeError, LookupError, TypeError):
        return []  # nothing in it can be relied on


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise CheckpointError(file.parent, [f"{file.name} is missing"])
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(file.parent, [f"{file.name} is not JSON: {error}"]) from error
    if not isinstance(content, dict):
        raise CheckpointError(file.parent, [f"{file.name} holds a {type(content).__name__}: wanted an object"])
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes the file anew, keys in order."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
