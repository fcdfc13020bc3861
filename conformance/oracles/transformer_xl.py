"""The oracle of Transformer-XL: `TransfoXLLMHeadModel` of Hugging Face transformers, which had it up to 4.37.2.

Later releases do not run it (4.38 to 4.57) or do not have it (5.x). It is older than the library's attention interface
and computes time-major, (seq, batch, …); here everything is (batch, seq, …) as elsewhere.

Left to itself the library gives a first segment a memory of mem_len zero vectors, and attends to them, as the authors'
TensorFlow code does (huggingface/transformers#200). The paper's first segment has nothing before it, and the authors'
PyTorch code begins with an empty memory: that is what it is given here.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from conformance.oracles.hugging_face import HuggingFace
from conformance.probes import at_module_boundaries, canonical

# What only the counterfactuals of cases ask for, and no config.json says: key -> value.
# A first segment that attends to mem_len zero vectors, as the library's does that is called without `mems`.
ZERO_MEMORY = {"first_memory": "zeros"}
# The head's clusters counted from its end, as in the authors' PyTorch code.
REVERSED_CLUSTERS = {"cluster_order": "reversed"}
CLUSTER_PARAMETERS = ("crit.cluster_weight", "crit.cluster_bias")

Memory = list[Tensor]


class TransformerXL(HuggingFace):
    """The library's Transformer-XL with a case's weights; logits are log-probabilities."""

    def checkpoint(
        self, config: dict[str, Any], weights: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if config.get("cluster_order"):
            weights = weights | {name: weights[name].flip(0) for name in CLUSTER_PARAMETERS}
        own = ZERO_MEMORY.keys() | REVERSED_CLUSTERS.keys()
        return {key: value for key, value in config.items() if key not in own}, weights

    def _load(self, directory: str, attention: str) -> Any:
        import warnings

        import transformers

        transformers.utils.logging.set_verbosity_error()  # what it would warn of is raised below
        architecture = self.architecture()
        with self._mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecation
            model, info = architecture.from_pretrained(directory, torch_dtype=self.dtype, output_loading_info=True)
        info["missing_keys"] = [name for name in info["missing_keys"] if not self._stands_elsewhere(name)]
        if faults := {what: sorted(found) for what, found in info.items() if found}:
            raise ValueError(f"{architecture.__name__} does not want exactly these weights: {faults}")
        # It makes projections and biases with torch.FloatTensor, which no dtype that is asked for reaches.
        with self._mode():
            return model.to(self.dtype).eval()

    def _stands_elsewhere(self, name: str) -> bool:
        """Whether a tensor follows from config.json, or is another name of the biases that all layers share."""
        shared = not self.config.get("untie_r", True) and ".dec_attn.r_" in name
        return shared or name.endswith(".inv_freq")

    def _call(self, input_ids: Tensor, *_: Any, memory: Memory | None = None, **more: Any) -> Any:
        """One segment.  memory: of those before it; None: there are none."""
        if memory is None:
            length = self.model.config.mem_len if self.config.get("first_memory") else 0
            empty = torch.zeros(length, len(input_ids), self.model.config.d_model, dtype=self.dtype)
            memory = [empty] * self.model.config.n_layer
        return self.model(input_ids, mems=memory, **more)

    def segments(self, input_ids: Tensor, lengths: list[int]) -> Tensor:
        """Log-probabilities of all segments, fed one after the other."""
        memory, pieces = None, []
        with torch.no_grad(), self._mode():
            for segment in input_ids.split(lengths, dim=1):
                output = self._call(segment, memory=memory)
                memory = output.mems
                pieces.append(output.logits)
            return torch.cat(pieces, dim=1)

    def last_loss_and_gradients(self, input_ids: Tensor, lengths: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """The library's own next-token loss of the last segment, the ones before it being memory, and its gradients.

        All segments are run with gradients.
        """
        self.model.zero_grad()
        *earlier, last = input_ids.split(lengths, dim=1)
        memory = None
        with self._mode():
            for segment in earlier:
                memory = self._call(segment, memory=memory).mems
            loss = self._call(last, memory=memory, labels=last).loss
            loss.backward()
        return loss.detach(), self.gradients()

    def gradients(self) -> dict[str, Tensor]:
        """What the last backward left.  The library's loss leaves out clusters that no label is in: they get zero."""
        named = self.model.named_parameters()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in named}

    def probes(self, input_ids: Tensor, **_: Tensor) -> dict[str, Tensor]:
        """Every probe of the family, in canonical axes and computational order."""
        where = {
            probe: place for probe, place in self.module_probes().items() if probe not in ("logits", "head_scores")
        }
        attentions = [layer.dec_attn for layer in self.model.transformer.layers]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._mode())
            collected = stack.enter_context(at_module_boundaries(self.model, where))
            head_scores = stack.enter_context(_returns_of(self.model.crit, "_compute_logit"))
            shifted = [stack.enter_context(_returns_of(attention, "_rel_shift")) for attention in attentions]
            calls = stack.enter_context(_Calls())
            logits = self._call(input_ids).logits
        found = {probe: value.transpose(0, 1) for probe, value in collected.items()}
        found |= {"logits": logits, "head_scores": head_scores[0]}
        found["distances"] = found["distances"][0].flip(0)  # the library's fall to distance 0
        for layer, values in enumerate(calls.by_layer(len(attentions))):
            prefix, scale = f"layers.{layer}.attention.", attentions[layer].scale
            found[f"{prefix}distance_key"] = found[f"{prefix}distance_key"][0].flip(0)
            found |= {f"{prefix}{name}": value for name, value in values.items()}
            found[f"{prefix}content_scores"] *= scale
            # What lies after the query is no score.
            found[f"{prefix}position_scores"] = shifted[layer][0].permute(2, 3, 0, 1).tril() * scale
        return canonical(self.family, self.config, found, {"input_ids": input_ids})


@contextlib.contextmanager
def _returns_of(owner: Any, method: str) -> Iterator[list[Tensor]]:
    """While open, what the method of this very object returns is kept, call by call."""
    original, returned = getattr(owner, method), []

    def tap(*args: Any, **kwargs: Any) -> Tensor:
        value: Tensor = original(*args, **kwargs)
        returned.append(value.clone())
        return value

    setattr(owner, method, tap)
    try:
        yield returned
    finally:
        delattr(owner, method)


class _Calls(TorchFunctionMode):
    """Keeps what the library's attention computes between its modules: a chunk and three einsums in each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.chunks: list[tuple[Tensor, ...]] = []
        self.einsums: list[tuple[tuple[Tensor, ...], Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.chunk:
            self.chunks.append(tuple(part.clone() for part in result))
        elif func is torch.einsum:
            self.einsums.append((tuple(operand.clone() for operand in args[1]), result.clone()))
        return result

    def by_layer(self, layers: int) -> list[dict[str, Tensor]]:
        """Of each layer: query, key and value (batch, head, seq, head_dim); content scores, not scaled, and weights
        (batch, head, query, key).
        """
        if (len(self.chunks), len(self.einsums)) != (layers, 3 * layers):
            raise AssertionError("the library's attention is not a chunk and three einsums in each layer any more")
        found = []
        for layer, (joint_query, _, _) in enumerate(self.chunks):
            (_, key), content = self.einsums[3 * layer]  # ibnd,jbnd->ijbn
            (weights, value), _ = self.einsums[3 * layer + 2]  # ijbn,jbnd->ibnd
            vectors = {"query": joint_query.view(value.shape), "key": key, "value": value}
            matrices = {"content_scores": content, "weights": weights}
            found.append(
                {name: tensor.permute(1, 2, 0, 3) for name, tensor in vectors.items()}
                | {name: tensor.permute(2, 3, 0, 1) for name, tensor in matrices.items()}
            )
        return found
