"""Reads and writes Hugging Face checkpoint directories: config.json and safetensors files, one or several.

Loading is strict: the files hold every parameter of the model, with its shape, and nothing else; faults are reported
together. The model is built on the meta device, without memory, and its parameters are filled one by one, so that the
peak is hardly more than the size of the weights.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reference_impl.checkpoint_layouts import with_model_names
from reference_impl.stored_tensors import (
    INDEX_FILE,
    READABLE_DTYPES,
    SINGLE_FILE,
    CheckpointError,
    Stored,
    find_tensors,
    read_json,
    write_json,
)

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
    "switch_transformers": ("reference_impl.models.switch_transformer", "SwitchTransformerConfig", "SwitchTransformer"),
    "transfo-xl": ("reference_impl.models.transformer_xl", "TransformerXLConfig", "TransformerXL"),
    "transformer": ("reference_impl.models.transformer", "TransformerConfig", "Transformer"),
}

# Tensors that files hold although they follow from config.json: frequencies of rotary and of Transformer-XL's
# positions, GPT's and GPT-2's causal masks.
DERIVED_TENSORS = (".rotary_emb.inv_freq", ".pos_emb.inv_freq", ".attn.bias", ".attn.masked_bias")

CONFIG_FILE = "config.json"
# Attribute of a loaded model: its config.json.
STORED_CONFIG = "stored_config"
# Keys of config.json that count blocks, of which each has tensors of its own.
BLOCKS = ("decoder_layers", "encoder_layers", "n_layer", "num_decoder_layers", "num_hidden_layers", "num_layers")

# The names that one parameter has in its model.
Names = tuple[str, ...]


def load_config(path: str | Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint directory."""
    return read_json(Path(path) / CONFIG_FILE)


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str = "eager",
) -> nn.Module:
    """Builds the family that config.json names, with the weights of the directory, ready for evaluation.

    The model remembers config.json as `stored_config`, so that `save_model` can write what no computation needs.

    Args:
        dtype: of the parameters; None: as they are stored.
        attention: "eager" (written out) or "sdpa" (torch's fused kernel).

    Raises:
        CheckpointError: the directory cannot be read, its family is not implemented, or config.json does not fit it.
        ValueError: `attention` is unknown.
    """
    path = Path(path)
    config = load_config(path)
    model = build(path, config, attention)
    load_weights(model, path, dtype=dtype, device=device)
    setattr(model, STORED_CONFIG, config)
    return model.eval()


def build(path: Path, config: Mapping[str, Any], attention: str) -> nn.Module:
    """The model that config.json describes, on the meta device: shapes without memory."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(path, [f"model_type={model_type!r} must be one of {sorted(FAMILIES)}"])
    module_name, config_class, model_class = FAMILIES[model_type]
    family = import_module(module_name)
    try:
        parsed = getattr(family, config_class).from_dict(config)
    except ValueError as error:
        raise CheckpointError(path, [f"{CONFIG_FILE}: {error}"]) from error
    _require_as_many_tensors(path, config)
    try:
        with torch.device("meta"), _WithoutDraws():
            model: nn.Module = getattr(family, model_class)(parsed, attention)
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond 64 bits
        reason = str(error).partition("\n")[0]
        raise CheckpointError(path, [f"{CONFIG_FILE} describes a model that cannot be built: {reason}"]) from error
    return model


class _WithoutDraws(TorchFunctionMode):
    """No parameter is drawn: on the meta device there is nothing to fill, and torch spends most of `build` on it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _require_as_many_tensors(path: Path, config: Mapping[str, Any]) -> None:
    """Before they are built: 10⁹ blocks would take for ever, and the files cannot hold them."""
    stored = find_tensors(path)
    rows = sum(entry.shape[0] if entry.shape else 1 for entry in stored.values())  # experts may be rows of one tensor
    for key, limit in {**dict.fromkeys(BLOCKS, len(stored)), "num_local_experts": rows, "num_experts": rows}.items():
        if isinstance(config.get(key), int) and config[key] > limit:
            raise CheckpointError(path, [f"{CONFIG_FILE} says {key}={config[key]}, the files hold {limit} at most"])


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    wanted: Callable[[str], bool] = lambda name: True,
    place: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> None:
    """Fills every parameter of `model` from the files of a checkpoint directory; `dtype` None: as stored.

    A parameter with several names (a tied output projection) may be stored under one of them, or equal under several.

    Args:
        wanted: whether a parameter of this name is to be filled; the files must hold the others, which are not read.
        place: name and value of a parameter → what the model gets of it (its part of a tensor-parallel model).

    Raises:
        CheckpointError: a file or tensor is missing, unreadable, unexpected, misshapen, or not where the index says.
    """
    path = Path(path)
    parameters = _parameters_by_names(model)
    stored = with_model_names(find_tensors(path), {name for names in parameters for name in names})
    _require_match(path, parameters, stored)
    for names, parameter in parameters.items():
        if not any(wanted(name) for name in names):
            continue
        tensor, *others = (stored[name].read(dtype=dtype, device=device) for name in names if name in stored)
        if not all(torch.equal(tensor, other) for other in others):
            raise CheckpointError(path, [f"{' and '.join(names)} are one parameter, but differ in the files"])
        tensor = place(names[0], tensor)
        if isinstance(parameter, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        _set_tensor(model, names, tensor)


def save_model(model: nn.Module, path: str | Path, *, max_shard_bytes: int | None = None) -> None:
    """Writes config.json and the weights, in files of at most `max_shard_bytes` (or one tensor) if it is given.

    `model.config.to_dict()` gives config.json, and for a model that was loaded the keys of its own config.json that no
    computation needs (ids of special tokens, …). A tied parameter is written once, by its first name. Creates `path`.
    Tokenizer files and generation_config.json are not the model's: copy them.

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
        write_json(path / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})
    write_json(path / CONFIG_FILE, config_to_save(model))


def config_to_save(model: nn.Module) -> dict[str, Any]:
    """The model's config.json: what it was loaded with, then what it computes by, in the dtype that it has now."""
    config: Any = model.config
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    before = getattr(model, STORED_CONFIG, {})
    spellings = {"dtype", "torch_dtype"} & before.keys() or {"torch_dtype"}
    return {**before, **config.to_dict(), **dict.fromkeys(spellings, dtype)}


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
            wanted_one = ", ".join(READABLE_DTYPES)
            faults.append(f"{name} is stored as {entry.dtype}: wanted one of {wanted_one}, in {entry.file.name}")
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
