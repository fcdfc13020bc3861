"""Reads and writes Hugging Face checkpoint directories: config.json and safetensors files, one or several.

Loading is strict: the files hold every parameter of the model, with its shape, and nothing else; faults are reported
together. The model is built on the meta device, without memory, and its parameters are filled one by one from
memory-mapped files, so that the peak is the size of the weights, plus mapped pages that the system may drop.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# model_type in config.json → module, config class and model class of the family.
FAMILIES = {
    "gnmt": ("reference_impl.models.gnmt", "GNMTConfig", "GNMT"),
    "gpt2": ("reference_impl.models.gpt2", "GPT2Config", "GPT2"),
    "gpt3": ("reference_impl.models.gpt3", "GPT3Config", "GPT3"),
    "llama": ("reference_impl.models.llama", "LlamaConfig", "Llama"),
    "mistral": ("reference_impl.models.mistral", "MistralConfig", "Mistral"),
    "mixtral": ("reference_impl.models.mixtral", "MixtralConfig", "Mixtral"),
    "openai-gpt": ("reference_impl.models.gpt", "GPTConfig", "GPT"),
    "marian": ("reference_impl.models.transformer", "TransformerConfig", "Transformer"),
    "phi": ("reference_impl.models.phi", "PhiConfig", "Phi"),
    "rnn_search": ("reference_impl.models.rnn_search", "RNNSearchConfig", "RNNSearch"),
    "transformer": ("reference_impl.models.transformer", "TransformerConfig", "Transformer"),
}

# Tensors that old files hold although they follow from config.json: rotary frequencies, GPT's and GPT-2's causal masks.
DERIVED_TENSORS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")

READABLE_DTYPES = ("F64", "F32", "F16", "BF16")
CONFIG_FILE, SINGLE_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"

# The names that one parameter has in its model.
Names = tuple[str, ...]


class CheckpointError(ValueError):
    """A checkpoint directory cannot be read or written; the message lists every fault, with names, shapes and files."""

    def __init__(self, path: Path, faults: list[str]) -> None:
        super().__init__("\n  ".join([f"{path}: {len(faults)} fault(s)", *faults]))
        self.faults = faults


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, under which name, and what the header of its file says about it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def load_config(path: str | Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint directory."""
    return _read_json(Path(path) / CONFIG_FILE)


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str = "eager",
) -> nn.Module:
    """Builds the family that config.json names, with the weights of the directory, ready for evaluation.

    Args:
        dtype: of the parameters; None: as they are stored.
        attention: "eager" (written out) or "sdpa" (torch's fused kernel).

    Raises:
        CheckpointError: the directory cannot be read, or its family is not implemented.
        ValueError: config.json is not valid for its family.
    """
    config = load_config(path)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise CheckpointError(Path(path), [f"model_type={model_type!r} must be one of {sorted(FAMILIES)}"])
    module_name, config_class, model_class = FAMILIES[model_type]
    family = import_module(module_name)
    with torch.device("meta"):
        model: nn.Module = getattr(family, model_class)(getattr(family, config_class).from_dict(config), attention)
    load_weights(model, path, dtype=dtype, device=device)
    return model.eval()


def load_weights(
    model: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> None:
    """Fills every parameter of `model` from the files of a checkpoint directory; `dtype` None: as stored.

    A parameter with several names (a tied output projection) may be stored under one of them, or equal under several.

    Raises:
        CheckpointError: a file or tensor is missing, unreadable, unexpected, misshapen, or not where the index says.
    """
    path = Path(path)
    parameters = _parameters_by_names(model)
    stored = _with_full_names(_find_tensors(path), {name for names in parameters for name in names})
    _require_match(path, parameters, stored)
    with ExitStack() as stack:
        files = {entry.file for entry in stored.values()}
        readers = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
        for names, parameter in parameters.items():
            tensor, *others = (
                readers[stored[name].file].get_tensor(stored[name].name) for name in names if name in stored
            )
            if not all(torch.equal(tensor, other) for other in others):
                raise CheckpointError(path, [f"{' and '.join(names)} are one parameter, but differ in the files"])
            # A copy: the mapped file may be replaced or deleted while the model lives.
            tensor = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
            if isinstance(parameter, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            _set_tensor(model, names, tensor)


def save_model(model: nn.Module, path: str | Path, *, max_shard_bytes: int | None = None) -> None:
    """Writes config.json and the weights, in files of at most `max_shard_bytes` (or one tensor) if it is given.

    `model.config.to_dict()` gives config.json; a tied parameter is written once, under its first name. Creates `path`.

    Raises:
        CheckpointError: the directory holds weights already; old and new files must not be mixed.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    present = sorted(file.name for file in path.glob("model*.safetensors*"))
    if present:
        raise CheckpointError(path, [f"holds {name} already; choose another directory" for name in present])
    tensors = {names[0]: parameter for names, parameter in _parameters_by_names(model).items()}
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    shards = shard(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        contents = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(contents, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        metadata = {"total_size": sum(sizes.values())}
        _write_json(path / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})
    config: Any = model.config
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    _write_json(path / CONFIG_FILE, {**config.to_dict(), "torch_dtype": dtype})


def shard(sizes: Mapping[str, int], max_bytes: int | None) -> list[list[str]]:
    """Splits names, in their order, into runs of at most `max_bytes`; a larger tensor has a run of its own.

    Sizes a: 3, b: 4, c: 9, d: 1 with max_bytes 8 give [a b] [c] [d].
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if max_bytes is not None and shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _find_tensors(path: Path) -> dict[str, Stored]:
    """Every stored tensor by name, from the headers of the files and, if there are several, their index."""
    if (path / SINGLE_FILE).exists():
        return _read_header(path / SINGLE_FILE)
    if not (path / INDEX_FILE).exists():
        raise CheckpointError(path, [f"holds neither {SINGLE_FILE} nor {INDEX_FILE}; other formats are not read"])
    weight_map = _read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(path, [f"{INDEX_FILE} has no weight_map from names to files"])
    faults: list[str] = []
    found: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        listed = {name for name, its_file in weight_map.items() if its_file == file}
        if Path(file).name != file or not (path / file).is_file():
            faults.append(f"{INDEX_FILE} names {file}, which is missing, for {', '.join(sorted(listed))}")
            continue
        try:
            contents = _read_header(path / file)
        except CheckpointError as error:
            faults += error.faults
            continue
        faults += [f"{name} is not in {file}, where {INDEX_FILE} says it is" for name in sorted(listed - set(contents))]
        for name in sorted(set(contents) - listed):
            faults.append(f"{name} is in {file}, but {INDEX_FILE} says {weight_map.get(name, 'nothing about it')}")
        found |= contents
    if faults:
        raise CheckpointError(path, faults)
    return found


def _with_full_names(stored: Mapping[str, Stored], wanted: set[str]) -> dict[str, Stored]:
    """The stored tensors under their names in the model.

    Files written from a model without its head, such as OpenAI's GPT-2 on the hub, leave the first part of the names
    out: "h.0.ln_1.weight" for "transformer.h.0.ln_1.weight". A tensor whose full name is stored too keeps its own.
    """
    full = {name.partition(".")[2]: name for name in wanted - stored.keys()}
    return {name if name in wanted else full.get(name, name): entry for name, entry in stored.items()}


def _read_header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt") as reader:
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
            return {name: Stored(file, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(file.parent, [f"{file.name} is corrupt or cut short: {error}"]) from error


def _require_match(path: Path, parameters: Mapping[Names, Tensor], stored: Mapping[str, Stored]) -> None:
    """Raises CheckpointError unless the stored tensors are the parameters: all, only, and with their shapes."""
    faults = []
    for names, parameter in parameters.items():
        wanted = tuple(parameter.shape)
        if not any(name in stored for name in names):
            faults.append(f"{' or '.join(names)} is missing: wanted {wanted}")
        faults += [
            f"{name} has shape {stored[name].shape}: wanted {wanted}, in {stored[name].file.name}"
            for name in names
            if name in stored and stored[name].shape != wanted
        ]
    known = {name for names in parameters for name in names}
    for name, entry in sorted(stored.items()):
        if name not in known and name.endswith(DERIVED_TENSORS):
            continue
        if entry.dtype not in READABLE_DTYPES:
            faults.append(f"{name} is stored as {entry.dtype}: wanted one of {READABLE_DTYPES}, in {entry.file.name}")
        if name not in known:
            faults.append(f"{name} is unexpected: shape {entry.shape}, in {entry.file.name}")
    if faults:
        raise CheckpointError(path, faults)


def _parameters_by_names(model: nn.Module) -> dict[Names, Tensor]:
    """Each parameter and buffer once, under all its names in the model: more than one if it is tied."""
    names: dict[Tensor, Names] = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        names[parameter] = (*names.get(parameter, ()), name)
    return {its_names: parameter for parameter, its_names in names.items()}


def _set_tensor(model: nn.Module, names: Names, tensor: Tensor) -> None:
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, tensor)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(file.parent, [f"{file.name} is missing"])
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(file.parent, [f"{file.name} is not JSON: {error}"]) from error
    if not isinstance(content, dict):
        raise CheckpointError(file.parent, [f"{file.name} holds a {type(content).__name__}: wanted an object"])
    return content


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
