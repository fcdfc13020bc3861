"""The contract with an implementation: how it is named, loaded and called, and what it may return.

An implementation is any object with `name`, `families` and `load(checkpoint)`; a function `load` alone is enough.
`load` returns a model: a callable `model(input_ids, attention_mask=None, position_ids=None, …)` that returns logits
(batch, seq, vocab), or a dict with "logits" and optionally those of `LOSSES`.  Only arguments that it declares are
passed.  An encoder–decoder model takes `decoder_input_ids`, and perhaps `decoder_attention_mask`, too: its logits
belong to these.
Optional attributes, each declared by its presence: `session(**source)`, `packed(input_ids, lengths)`, `parameters`,
`partitioned(stages)`, `greedy(input_ids, attention_mask, max_new_tokens, stop_token)`.
"""

import copy
import importlib
import importlib.util
import inspect
import operator
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from conformance.cases import Case

_PARTITION = "conformance.implementations.partition"
BUILT_IN = {
    "reference": ("conformance.implementations.reference", "this project's own from-scratch PyTorch models"),
    "reference-sdpa": ("conformance.implementations.reference", "the same through PyTorch's fused attention"),
    "reference-pipeline-2": (_PARTITION, "the same, its blocks shared out to 2 processes"),
    "reference-pipeline-3": (_PARTITION, "the same, its blocks shared out to 3 processes"),
    "reference-tensor-parallel-2": (_PARTITION, "the same, each of its projections cut over 2 processes"),
    "reference-tensor-parallel-3": (_PARTITION, "the same, each of its projections cut over 3 processes"),
    "hf": ("conformance.implementations.hf", "the installed Hugging Face transformers, eager attention"),
    "hf-sdpa": ("conformance.implementations.hf", "the installed Hugging Face transformers, SDPA attention"),
}
# What a model may return beside its logits: the whole loss, and what a router adds to it (before its coefficient).
LOSSES = ("loss", "aux_loss", "z_loss")
DTYPES = ("float64", "float32", "bfloat16", "float16")
# The dtype of a claim about ids and text.
EXACT = "exact"


class Unsupported(Exception):
    """Raised by an implementation to declare that it does not do something, with the reason."""


class CannotResolve(ValueError):
    """The implementation named on the command line cannot be imported or is not one."""


class Misbehaviour(Exception):
    """A candidate's answer that is wrong in kind, not in value: shape, dtype, type, NaN.

    kind: "shape", "dtype", "type", "not finite", "signature", "input changed", "state grows", "length", …
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class CandidateRaised(Exception):
    """The candidate's own code raised; `__cause__` is what it raised, `where` what it was asked to do."""

    def __init__(self, where: str):
        super().__init__(where)
        self.where = where


@dataclass(frozen=True)
class Implementation:
    """A resolved implementation.

    families: what it declares, or None when it is a bare function that declares nothing.
    bare: it is a function and nothing more: a `load`, or for a component the component itself.
    dtypes: what it declares to run in (all four when it says nothing).
    """

    spec: str
    name: str
    families: frozenset[str] | None
    dtypes: frozenset[str]
    load: Callable[..., Any]
    bare: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "spec": self.spec,
            "name": self.name,
            "families": None if self.families is None else sorted(self.families),
            "dtypes": [d for d in DTYPES if d in self.dtypes],
        }


def resolve(spec: str) -> Implementation:
    """Find the implementation that a command line names.

    spec: a built-in name (`reference`, `hf`, …), `package.module:Object` or `path/to/file.py:Object`.
    Raises: CannotResolve saying what was looked for and what to write instead.
    """
    if spec in BUILT_IN:
        if spec.startswith("hf") and importlib.util.find_spec("transformers") is None:
            raise CannotResolve(
                f"{spec} needs Hugging Face transformers, which is not installed: pip install transformers"
            )
        return adopt(spec, importlib.import_module(BUILT_IN[spec][0]).IMPLEMENTATIONS[spec])
    module_name, _, attribute = spec.rpartition(":")
    if not module_name or not attribute:
        raise CannotResolve(
            f"{spec!r} is neither a built-in implementation ({', '.join(BUILT_IN)}) nor of the form "
            "package.module:Object or path/to/file.py:Object"
        )
    found: Any = _import(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
            raise CannotResolve(f"{module_name} has no attribute {attribute!r}; it has {', '.join(names) or 'none'}")
        found = getattr(found, part)
    return adopt(spec, found)


def _import(name: str) -> Any:
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(error.name + ".")):
                raise CannotResolve(
                    f"no module named {error.name!r} on the import path; run from the directory that holds it, "
                    "install it, or give the file: path/to/file.py:Object"
                ) from error
            raise
    path = Path(name)
    if not path.is_file():
        raise CannotResolve(f"no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    return module


def adopt(spec: str, found: Any) -> Implementation:
    """Make an Implementation of whatever the contract allows: class, object, or a bare load function.

    Raises: CannotResolve if it is none of these, or declares something impossible.
    """
    if inspect.isclass(found):
        found = found()
    load = getattr(found, "load", found)
    if not callable(load):
        raise CannotResolve(f"{spec}: a {type(found).__name__} has no load(checkpoint) and cannot be called itself")
    families = getattr(found, "families", None)
    for what, declared in (("families", families), ("dtypes", getattr(found, "dtypes", None))):
        if isinstance(declared, str):
            raise CannotResolve(f"{spec}: {what} is the string {declared!r}; wanted a set: {{{declared!r}}}")
    dtypes = frozenset(str(dtype).removeprefix("torch.") for dtype in getattr(found, "dtypes", DTYPES))
    if unknown := dtypes - set(DTYPES):
        raise CannotResolve(f"{spec}: declares dtypes {', '.join(sorted(unknown))}; there is {', '.join(DTYPES)}")
    return Implementation(
        spec=spec,
        name=str(getattr(found, "name", getattr(found, "__name__", spec))),
        families=None if families is None else frozenset(families),
        dtypes=dtypes,
        load=load,
        bare=not hasattr(found, "load"),
    )


class Checkpoint:
    """What an implementation is given to load.

    path: a directory in Hugging Face's layout (config.json, model.safetensors); it lives as long as the model.
    config: the content of config.json.
    dtype, device: what the model must run in and on.
    tensors(): hub name -> weight in that dtype on that device, fresh copies.

    A tokenizer's directory holds its files (`files`, by name) instead of weights.
    """

    def __init__(
        self,
        config: dict[str, Any],
        weights: "dict[str, Tensor]",
        dtype: "torch.dtype",
        device: "torch.device",
        files: Mapping[str, bytes] | None = None,
    ):
        self.config, self.dtype, self.device = copy.deepcopy(config), dtype, device
        from safetensors.torch import save_file

        from conformance.cases import write_json

        self._weights = weights
        # Written at once: when `load` asks for the path, float32 already means float64.
        # In a worker below the parent's directory, which outlives a crash.
        self.path = Path(tempfile.mkdtemp(prefix="conformance-checkpoint-", dir=os.environ.get("CONFORMANCE_SCRATCH")))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        write_json(self.path / "config.json", self.config)
        if files is None:
            save_file(weights, self.path / "model.safetensors", metadata={"format": "pt"})
        for name, content in (files or {}).items():
            (self.path / name).write_bytes(content)

    def tensors(self) -> "dict[str, Tensor]":
        return {
            name: tensor.to(device=self.device, dtype=self.dtype, copy=True) for name, tensor in self._weights.items()
        }

    def __repr__(self) -> str:
        return f"Checkpoint({self.config.get('model_type')}, {self.dtype}, {self.device})"


@dataclass(frozen=True)
class Output:
    """What one call returned, normalised: logits always, losses by name where the candidate returns any."""

    logits: "Tensor"
    losses: "dict[str, Tensor]"


class Candidate:
    """A loaded model behind the contract: passes only declared arguments, checks the kind of what comes back.

    dtype: the dtype under judgement.  vocab: expected width of the logits.
    calls: how many times the model has been called (a session's feed counts as one).
    given: the tensors that the last call was given, by argument.
    """

    def __init__(self, model: Any, dtype: "torch.dtype", device: "torch.device", vocab: int):
        if not callable(model):
            raise Misbehaviour("type", f"load returned a {type(model).__name__}, wanted a callable model")
        self.model, self.dtype, self.device, self.vocab = model, dtype, device, vocab
        self.declared = _declared_arguments(model)
        self.calls = 0
        self.given: dict[str, Tensor] = {}

    def accepts(self, argument: str) -> bool:
        return self.declared is None or argument in self.declared

    def need(self, argument: str) -> None:
        """Raises: Unsupported if the model does not declare the argument."""
        if not self.accepts(argument):
            raise Unsupported(f"the model takes no {argument}")

    def __call__(self, input_ids: "Tensor", **optional: "Tensor") -> Output:
        """Call the model once; arguments that it does not declare are left out.

        Raises: Misbehaviour if it is to decode and declares no `decoder_input_ids`.
        """
        self.calls += 1
        decoded = optional.get("decoder_input_ids")
        if decoded is not None and not self.accepts("decoder_input_ids"):
            raise Misbehaviour("signature", "the model takes no decoder_input_ids, which its decoder is to read")
        passed = {k: v.clone().to(self.device) for k, v in optional.items() if self.accepts(k)}
        self.given = {"input_ids": input_ids.clone().to(self.device), **passed}
        with running("model(…)"):
            returned = self.model(self.given["input_ids"], **passed)
        return self._normalise(returned, tuple((input_ids if decoded is None else decoded).shape))

    def parameters(self, names: list[str]) -> "dict[str, Tensor] | None":
        """The named parameters, which receive gradients: from a mapping `parameters`, or a module that has the names.

        None if the model declares neither, or not all of the names.
        """
        import torch

        declared = getattr(self.model, "parameters", None)
        if not isinstance(declared, Mapping):
            declared = dict(self.model.named_parameters()) if isinstance(self.model, torch.nn.Module) else {}
        return {name: declared[name] for name in names} if set(names) <= set(declared) else None

    def session(self, **source: "Tensor") -> "Session":
        """A new session, of an encoder–decoder model over a source: `input_ids` and perhaps `attention_mask`.

        Raises: Unsupported if the model has no `session`, or it takes no mask and is given one.
        """
        if not hasattr(self.model, "session"):
            raise Unsupported("the model has no session()")
        declared = _declared_arguments(self.model.session)
        if declared is not None and "attention_mask" in source and "attention_mask" not in declared:
            raise Unsupported("session() takes no attention_mask")
        with running("model.session()"):
            return Session(self, self.model.session(**{k: v.clone().to(self.device) for k, v in source.items()}))

    def packed(self, input_ids: "Tensor", lengths: "Tensor") -> "Tensor":
        """Logits (1, tokens, vocab) of texts of these lengths, one behind the other in the one row of `input_ids`.

        Raises: Unsupported if the model has no `packed`.
        """
        if not hasattr(self.model, "packed"):
            raise Unsupported("the model has no packed()")
        self.calls += 1
        with running("model.packed(…)"):
            returned = self.model.packed(input_ids.clone().to(self.device), lengths.clone().to(self.device))
        return self._normalise(returned, tuple(input_ids.shape)).logits

    def greedy(
        self, input_ids: "Tensor", attention_mask: "Tensor", max_new_tokens: int, stop_token: int | None
    ) -> list[list[int]]:
        """The new token ids of each row, greedily.

        Raises: Unsupported if the model has no `greedy`; Misbehaviour if it returns something else than a list of ids
            for each row.
        """
        if not hasattr(self.model, "greedy"):
            raise Unsupported("the model has no greedy()")
        self.calls += 1
        with running("model.greedy(…)"):
            returned = self.model.greedy(
                input_ids.clone().to(self.device), attention_mask.clone().to(self.device), max_new_tokens, stop_token
            )
            rows = [[operator.index(token) for token in row] for row in returned]
        if len(rows) != len(input_ids):
            raise Misbehaviour("shape", f"greedy returned {len(rows)} rows for {len(input_ids)} prompts")
        wrong = [token for row in rows for token in row if not 0 <= token < self.vocab]
        if wrong:
            raise Misbehaviour("type", f"greedy returned {wrong[0]}; token ids are 0 … {self.vocab - 1}")
        return rows

    def partitioned(self, stages: int) -> "Candidate":
        """The same model, its blocks shared out to so many processes.

        Raises: Unsupported if the model has no `partitioned`.
        """
        if not hasattr(self.model, "partitioned"):
            raise Unsupported("the model has no partitioned()")
        with running("model.partitioned(…)"):
            model = self.model.partitioned(stages)
        return Candidate(model, self.dtype, self.device, self.vocab)

    def _normalise(self, returned: Any, shape: tuple[int, ...]) -> Output:
        import torch

        with torch._C.DisableTorchFunction():  # TrueDouble would promote a low-precision answer on sight
            return self._output(returned, (*shape, self.vocab))

    def _output(self, returned: Any, wanted: tuple[int, ...]) -> Output:
        losses = {}
        if isinstance(returned, Mapping):
            if "logits" not in returned:
                raise Misbehaviour(
                    "type", f'a dict with keys {sorted(map(str, returned))} was returned; it needs "logits"'
                )
            returned, losses = returned["logits"], {name: returned.get(name) for name in LOSSES}
        elif hasattr(returned, "logits"):
            returned, losses = returned.logits, {name: getattr(returned, name, None) for name in LOSSES}
        elif isinstance(returned, tuple | list):
            fitting = [x for x in returned if tuple(getattr(x, "shape", ())) == wanted]
            if len(fitting) != 1:
                shapes = [tuple(getattr(x, "shape", ())) or type(x).__name__ for x in returned]
                raise Misbehaviour(
                    "type", f"a {type(returned).__name__} of {shapes} was returned; exactly one must be {wanted}"
                )
            returned = fitting[0]
        # Copies: an engine may return the same buffer again and again
        losses = {name: as_tensor(loss, name).clone() for name, loss in losses.items() if loss is not None}
        for name, loss in losses.items():
            if loss.numel() != 1:
                raise Misbehaviour("shape", f"a {name} of shape {tuple(loss.shape)}, wanted a single number")
        return Output(self._logits(returned, wanted).clone(), {name: loss.reshape(()) for name, loss in losses.items()})

    def _logits(self, returned: Any, wanted: tuple[int, ...]) -> "Tensor":
        import torch

        logits = as_tensor(returned, "logits")
        if logits.is_meta or logits.layout is not torch.strided:
            kind = "on the meta device" if logits.is_meta else f"in the layout {_name(logits.layout)}"
            raise Misbehaviour("type", f"logits {kind}, wanted a dense tensor with values")
        if tuple(logits.shape) != wanted:
            raise Misbehaviour("shape", f"logits of shape {tuple(logits.shape)}, wanted {wanted} (batch, seq, vocab)")
        if not logits.is_floating_point() or torch.finfo(logits.dtype).eps > torch.finfo(self.dtype).eps:
            raise Misbehaviour(
                "dtype", f"logits in {_name(logits.dtype)}, wanted {_name(self.dtype)} or finer"
                f"{'; an engine without float64 declares its dtypes' if self.dtype == torch.float64 else ''}"
            )  # fmt: skip
        return logits


class Session:
    """A candidate's decoding session: feeds ids, gets the logits of exactly those ids."""

    def __init__(self, candidate: Candidate, session: Any):
        self.candidate, self.session = candidate, session
        self.declared = _declared_arguments(session.feed)

    def feed(self, input_ids: "Tensor", attention_mask: "Tensor | None" = None) -> "Tensor":
        """Raises: Unsupported if a mask is given and `feed` takes none."""
        self.candidate.calls += 1
        passed = {}
        if attention_mask is not None:
            if self.declared is not None and "attention_mask" not in self.declared:
                raise Unsupported("session.feed takes no attention_mask")
            passed["attention_mask"] = attention_mask.clone().to(self.candidate.device)
        with running("session.feed(…)"):
            returned = self.session.feed(input_ids.clone().to(self.candidate.device), **passed)
        return self.candidate._normalise(returned, tuple(input_ids.shape)).logits

    def state_bytes(self) -> int:
        """Memory that the session says it holds, in bytes.

        Raises: Unsupported if it has no `state_bytes`.
        """
        if not hasattr(self.session, "state_bytes"):
            raise Unsupported("the session has no state_bytes()")
        with running("session.state_bytes()"):
            size = self.session.state_bytes()
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise Misbehaviour("type", f"state_bytes() returned {size!r}, wanted a number of bytes")
        return size


def load(implementation: Implementation, case: "Case", dtype: str, device: str) -> Candidate:
    """Load a case into an implementation."""
    return load_checkpoint(implementation, case.config, case.weights, dtype, device)


def load_checkpoint(
    implementation: Implementation, config: dict[str, Any], weights: "dict[str, Tensor]", dtype: str, device: str
) -> Candidate:
    """Load any checkpoint into an implementation.

    Raises: Unsupported if the implementation declares that it does not run in the dtype, or raises it itself.
    """
    import torch

    if dtype not in implementation.dtypes:
        declared = ", ".join(d for d in DTYPES if d in implementation.dtypes)
        raise Unsupported(f"declares to run in {declared} only")
    torch_dtype: torch.dtype = getattr(torch, dtype)
    checkpoint = Checkpoint(config, weights, torch_dtype, torch.device(device))
    with precision(dtype), running("load(checkpoint)"):
        model = implementation.load(checkpoint)
    candidate = Candidate(model, torch_dtype, checkpoint.device, vocabulary(config))
    candidate.checkpoint = checkpoint  # type: ignore[attr-defined]  # keeps the directory while the model lives
    return candidate


def vocabulary(config: dict[str, Any]) -> int:
    """How many logits a model has: the tokens of its vocabulary, of the decoder's where it has its own."""
    return int(config.get("decoder_vocab_size") or config["vocab_size"])


@contextmanager
def precision(dtype: str, gradients: bool = False) -> Iterator[None]:
    """Where a candidate's code runs: under TrueDouble for float64, without gradients unless asked for."""
    import torch

    from conformance.oracles.true_double import TrueDouble

    mode: Any = TrueDouble() if dtype == "float64" else nullcontext()
    with mode, torch.set_grad_enabled(gradients):
        yield


@contextmanager
def running(where: str) -> Iterator[None]:
    """The candidate's own code runs inside; what it raises becomes CandidateRaised (Unsupported passes through)."""
    try:
        yield
    except Unsupported:
        raise
    except Exception as error:
        raise CandidateRaised(where) from error


def _declared_arguments(function: Any) -> frozenset[str] | None:
    """Argument names that a callable declares; None when it takes **kwargs or hides its signature."""
    target = function.forward if hasattr(function, "forward") else function
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)


def as_tensor(value: Any, what: str) -> "Tensor":
    import numpy
    import torch

    if isinstance(value, torch.Tensor):
        return value
    if value is None:
        raise Misbehaviour("type", f"the {what} are None, wanted a tensor")
    try:
        # A copy of an array: other libraries' may be read-only, of which torch warns
        return torch.as_tensor(numpy.array(value) if hasattr(value, "__array__") else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Misbehaviour("type", f"the {what} are a {type(value).__name__}, wanted a tensor or array") from error


def _name(of_torch: "torch.dtype | torch.layout") -> str:
    return str(of_torch).removeprefix("torch.")
