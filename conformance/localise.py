"""Where the first wrong tensor is.  Explains a failure; never decides one.

In float64 every operation of the candidate is recorded and aligned with the probes, without hooks (`record`, `align`).
Where nothing can be recorded (an engine that is not torch, a working dtype) each block is judged alone through a
one-layer checkpoint.  Probes come from the golden if it stores them, else from `reference_impl`, which must first
reproduce the golden's logits.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conformance import bounds
from conformance.align import Alignment, Probe, align
from conformance.families import Config, get
from conformance.implementation import load_checkpoint
from conformance.probes import step_of
from conformance.record import Recorder

if TYPE_CHECKING:
    from conformance.cases import Case
    from conformance.judge import Judge

# Recording a sequence of thousands of tokens would keep gigabytes; shorter cases show the same.
MOST_TOKENS = 512

Explanation = tuple[dict[str, Any] | None, list[str]]
Block = tuple[Config, dict[str, Tensor], Tensor, Tensor]


class NoProbes(Exception):
    """No trustworthy probes for the case: says why."""


def localise(judge: "Judge") -> Explanation:
    """The divergence (as the run's schema has it, or None) and notes, for the calls that the failed check made."""
    case = judge.case
    if (tokens := sum(ids.numel() for ids in case.arguments.values())) > MOST_TOKENS:
        return None, [f"not localised: {tokens} tokens; see the shorter cases"]
    if judge.dtype == "float64":
        values, source = known_probes(case)
        alignment = _align_session(judge, values) if judge.plan else _align_forward(judge, values)
        if _shows_its_work(alignment):
            return _describe(alignment, source), list(alignment.notes)
    if judge.plan:
        return None, []
    return _block_by_block(judge)


def known_probes(case: "Case") -> tuple[dict[str, Tensor], str]:
    """Every probe of the case by name, and "golden" or "reference".

    Raises: NoProbes if the golden stores none and the reference does not reproduce its logits.
    """
    stored = {n.removeprefix("probe."): t for n, t in case.expected.items() if n.startswith("probe.")}
    if stored:
        return stored | {"logits": case.expected["logits"]}, "golden"
    from conformance.implementations import reference

    values = reference.probes(get(case.family), case.config, case.weights, **case.arguments)
    error = bounds.measure(values["logits"], case.expected["logits"])
    if not bounds.within(error, "float64").passed:
        raise NoProbes(f"reference_impl differs from the golden's logits by {error.max:.1e}")
    return values, "reference"


def probes_of(case: "Case", values: dict[str, Tensor], rows: slice = slice(None)) -> list[Probe]:
    """The case's probes for some rows of the sequence; keys reach back to the first row, steps are among the rows."""
    cut = {"seq": rows, "key": slice(0, rows.stop)}
    computed = {None, *range(*rows.indices(case.ids.shape[1]))}
    return [
        Probe(spec.name, values[spec.name][tuple(cut.get(axis, slice(None)) for axis in spec.axes)].contiguous(),
              spec.axes, tuple(parent for parent in spec.parents if step_of(parent) in computed))
        for spec in get(case.family).probes(case.config) if step_of(spec.name) in computed
    ]  # fmt: skip


def _align_forward(judge: "Judge", values: dict[str, Tensor]) -> Alignment:
    tensors, logits = record_forward(judge)
    return align(probes_of(judge.case, values), tensors, result=logits)


def record_forward(judge: "Judge") -> tuple[list[Tensor], Tensor]:
    """Everything that the candidate computes in one full forward, and its logits."""
    with torch.no_grad(), Recorder() as recorder:
        logits = judge.candidate(**judge.case.arguments).logits
    return recorder.tensors, logits


def _align_session(judge: "Judge", values: dict[str, Tensor]) -> Alignment:
    """Replay the plan of feeds up to the first one whose logits are wrong, and align that one."""
    ids, start = judge.case.ids, 0
    with judge.precision(), Recorder() as opening:  # an encoder runs here
        session = judge.candidate.session(**judge.case.source)
    for size in judge.plan:
        rows = slice(start, start + size)
        start += size
        with torch.no_grad(), Recorder() as recorder:
            logits = session.feed(ids[:, rows])
        error = bounds.measure(logits.cpu(), values["logits"][:, rows])
        if not bounds.within(error, "float64").passed:
            break
    return align(probes_of(judge.case, values, rows), opening.tensors + recorder.tensors, result=logits)


def _shows_its_work(alignment: Alignment) -> bool:
    """Whether the candidate is torch code that was recorded: a probe was found, or most have rivals of their size.

    Where the very first tensor is wrong, as an embedding of the wrong rows, no probe is found at all.  Where none was
    found before the divergence, though not all of them have rivals, the work is done in other pieces (token by token,
    say), and the rival of the divergence has its size by accident.
    """
    first = alignment.first_divergence
    if first and not alignment.last_good and any(f.status == "unobserved" for f in alignment.between):
        return False
    inside = [finding for name, finding in alignment.findings.items() if name != "logits"]
    rivals = sum(finding.status == "unmatched" for finding in inside)
    return rivals > len(inside) / 2 or any(finding.status in ("matched", "permuted") for finding in inside)


def _describe(alignment: Alignment, source: str) -> dict[str, Any] | None:
    first = alignment.first_divergence
    if first is None:
        return None
    how = []
    if first.status == "permuted":
        how.append(f"the right values, permuted along {', '.join(first.permuted_axes)}")
    if alignment.between:
        how.append("not observed in between: " + ", ".join(f.name for f in alignment.between))
    if alignment.others:
        how.append("also wrong, and not because of it: " + ", ".join(f.name for f in alignment.others))
    return {
        "first_wrong": first.name,
        "last_good": [str(f) for f in alignment.last_good],
        "how": "; ".join(how),
        "probes_from": source,
    }


def _layers(case: "Case") -> int:
    return int(case.config[get(case.family).layers_key])


# --- block by block -------------------------------------------------------------------------------------------------


def stored_blocks(case: "Case") -> Iterator[Block]:
    """The one-layer checkpoints whose truth the golden stores: (config, weights, ids, logits), layer by layer."""
    for layer in range(_layers(case)):
        block_input = case.expected[f"blocks.{layer}.input"]
        yield (*_block(case, block_input, layer), case.expected[f"blocks.{layer}.logits"])


def _all_blocks(case: "Case") -> Iterator[Block]:
    """The same for any case; what the golden does not store comes from the reference."""
    if "blocks.0.input" in case.expected:
        yield from stored_blocks(case)
        return
    from conformance.implementations import reference

    values, _ = known_probes(case)
    for layer in range(_layers(case)):
        source = values["embedding" if layer == 0 else f"layers.{layer - 1}.output"]
        one = _block(case, source.to(torch.bfloat16).to(torch.float32), layer)
        yield (*one, reference.logits(*one))


def _block(case: "Case", block_input: Tensor, layer: int) -> tuple[Config, dict[str, Tensor], Tensor]:
    config, weights = get(case.family).block_checkpoint(case.config, case.weights, block_input, layer)
    return config, weights, torch.arange(block_input[..., 0].numel()).view(block_input.shape[:2])


def _block_by_block(judge: "Judge") -> Explanation:
    """Judge every block alone."""
    if get(judge.case.family).block_checkpoint is None:
        hint = "no probe was recognised" if judge.dtype == "float64" else f"not in {judge.dtype}; run it in float64"
        return None, [f"not localised: {hint}, and one block cannot be judged alone"]
    wrong: list[str] = []
    right: list[str] = []
    oracle = judge.case.oracle_error("logits", judge.dtype)
    for layer, (config, weights, ids, truth) in enumerate(_all_blocks(judge.case)):
        block = load_checkpoint(judge.implementation, config, weights, judge.dtype, judge.device)
        with judge.precision():
            logits = block(input_ids=ids).logits
        error = bounds.measure(logits.cpu(), truth)
        passed = bounds.within(error, judge.dtype, bounds.Error(**oracle) if oracle else None).passed
        (right if passed else wrong).append(f"layers.{layer}")
    if not wrong:
        return None, ["every block alone, teacher-forced, is right: look at what depends on a layer's place, at the "
                      "embedding, the final norm and the head"]  # fmt: skip
    how = f"each block alone, teacher-forced: {', '.join(wrong)} wrong" + (
        f"; {', '.join(right)} right" if right else ""
    )
    good = [f"layers.{int(wrong[0].split('.')[1]) - 1}"] if wrong[0] != "layers.0" else []
    return {"first_wrong": wrong[0], "last_good": good, "how": how, "probes_from": "blocks"}, []
