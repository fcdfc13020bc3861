"""Generating text: one token after another, greedily or by drawing, for a batch of prompts of any lengths.

    for step in stream(model, [[1, 15, 4], [1, 9]], max_new_tokens=20, stop_tokens={2}):
        print(step.tokens, step.active)

Prompts are padded on the left, so that the last column holds every row's last token; the model counts positions from
each row's first real token, and no token looks at padding. Each row is what it would be alone.

Shapes: B batch, T tokens of the longest prompt, V vocabulary.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the model's distribution: `temperature`, then `top_k`, then `top_p`.

    Raises ValueError where a value is out of range.
    """

    # The logits are divided by it: below 1 likely tokens become likelier.
    temperature: float = 1.0
    # Only the k most likely tokens can be drawn; None: all.
    top_k: int | None = None
    # Only the fewest most likely tokens that have at least this probability together can be drawn; None: all.
    top_p: float | None = None
    # Neither of the two leaves fewer tokens than this.
    min_tokens_to_keep: int = 1

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be greater than 0; leave sampling out to be greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None to keep all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be greater than 0 and at most 1, or None to keep all")
        if self.min_tokens_to_keep < 1:
            raise ValueError(f"min_tokens_to_keep={self.min_tokens_to_keep} must be at least 1")

    def process(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        """The logits of what is drawn from: divided, and −∞ for tokens that cannot be drawn."""
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, max(self.top_k, self.min_tokens_to_keep))
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p, min_tokens_to_keep=self.min_tokens_to_keep)
        return logits


def keep_top_k(logits: Float[Tensor, "batch vocab"], top_k: int) -> Float[Tensor, "batch vocab"]:
    """−∞ for all but the k largest of each row; what equals the k-th largest stays, so that ties can leave more.

    Fan et al. 2018 (arXiv:1805.04833), section 5.4: k → `top_k`.
    """
    smallest_kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(
    logits: Float[Tensor, "batch vocab"], top_p: float, *, min_tokens_to_keep: int = 1
) -> Float[Tensor, "batch vocab"]:
    """−∞ for all but the nucleus of each row: the fewest most likely tokens whose probabilities sum to at least p.

    Holtzman et al. 2020 (arXiv:1904.09751), equation 2: p → `top_p`. Told from the other end, as Hugging Face does: a
    token goes if it and all less likely ones have at most 1 − p together. Of equally likely tokens the first go first.
    With probabilities 0.5 0.25 0.15 0.1 and p = 0.7 the least likely have 0.1, 0.25, 0.5, 1 together: the first two of
    these go, as 0.25 ≤ 0.3 < 0.5.
    """
    ascending, order = logits.sort(dim=-1, stable=True)
    goes = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    goes[:, max(0, logits.shape[-1] - min_tokens_to_keep) :] = False
    return logits.masked_fill(torch.zeros_like(goes).scatter(-1, order, goes), -torch.inf)


@dataclass(frozen=True)
class Step:
    """What one pass through the model adds.

    tokens: one a row; of a row that has stopped, a 0 that means nothing.
    log_probs: ln of the model's probability of each token, before any `Sampling`.
    active: rows that the token belongs to; a row's stop token is its last.
    """

    tokens: Int[Tensor, " batch"]
    log_probs: Float[Tensor, " batch"]
    active: Bool[Tensor, " batch"]


def stream(
    model: nn.Module,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[Step]:
    """Generates step by step, until every row has stopped or has `max_new_tokens` new tokens.

    Args:
        model: one with `session(max_length)`, in evaluation mode; `reference_impl.checkpoint.load_model` gives one.
        stop_tokens: a row ends with the first of these that is generated, which is still part of it.
        sampling: how tokens are drawn; None: the most likely one is taken, of equally likely ones the first.
        generator: where chance comes from, on the model's device; None: torch's own. The same seed, prompts and
            settings give the same tokens; a row's tokens depend on which rows are beside it.
        prefill_chunk: the most tokens of the prompts that are fed at once; None: all. Bounds memory, changes nothing.

    Raises:
        ValueError: at once if a prompt is empty or holds what is not a token id, or a number is out of range; while
            generating if a text outgrows the model's table of positions.
    """
    if max_new_tokens < 0 or (prefill_chunk is not None and prefill_chunk < 1):
        wanted = "max_new_tokens must be at least 0 and prefill_chunk at least 1"
        raise ValueError(f"max_new_tokens={max_new_tokens}, prefill_chunk={prefill_chunk}: {wanted}")
    config: Any = model.config
    ids, mask = left_padded(prompts, vocab_size=config.vocab_size)
    device = next(model.parameters()).device
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.long, device=device)
    return _steps(model, ids.to(device), mask.to(device), max_new_tokens, stops, sampling, generator, prefill_chunk)


def _steps(
    model: nn.Module,
    ids: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    max_new_tokens: int,
    stops: Int[Tensor, " stops"],
    sampling: Sampling | None,
    generator: torch.Generator | None,
    prefill_chunk: int | None,
) -> Iterator[Step]:
    feed = open_session(model, max_length=ids.shape[1] + max_new_tokens, padded=not bool(mask.all()))
    active = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        for piece, real in zip(*(t.split(prefill_chunk or t.shape[1], dim=1) for t in (ids, mask)), strict=True):
            with torch.no_grad():
                logits = feed(piece, real)
        tokens, log_probs = choose(of_next(logits, real), sampling, generator)  # (B,)
        yield Step(tokens.masked_fill(~active, 0), log_probs.masked_fill(~active, 0), active)
        active = active & ~torch.isin(tokens, stops)
        if not active.any():
            return
        # a row that has stopped is fed padding, which takes part in nothing
        ids, mask = tokens.masked_fill(~active, 0)[:, None], active[:, None]


def of_next(logits: Float[Tensor, "batch seq vocab"], real: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch vocab"]:
    """The logits of the next token: of the last column, which is real in every row, since padding is on the left."""
    return logits[:, -1]


def open_session(model: nn.Module, *, max_length: int, padded: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """What feeds a new session of the model: takes ids and which of them are real, returns logits.

    Not every family has a memory whose size can be fixed, or knows padding (Transformer-XL has neither). A row that has
    stopped is of no importance to the others, so that its padding need not be known.

    Raises:
        ValueError: there is padding, and the model does not know it.
    """
    open_: Any = model.session
    session = open_(max_length=max_length) if "max_length" in inspect.signature(open_).parameters else open_()
    if "attention_mask" in inspect.signature(session.feed).parameters:
        return session.feed  # type: ignore[no-any-return]
    if padded:
        raise ValueError(f"{type(model).__name__} knows no padding: give one prompt, or prompts of the same length")
    return lambda ids, real: session.feed(ids)


def choose(
    logits: Float[Tensor, "batch vocab"], sampling: Sampling | None, generator: torch.Generator | None = None
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """A next token for each row, and ln of its probability by the model. In float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling is None:
        tokens = logits.argmax(dim=-1)
    else:
        tokens = torch.multinomial(sampling.process(logits).softmax(dim=-1), 1, generator=generator)[:, 0]
    log_probs = logits.log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]
    return tokens, log_probs


def left_padded(prompts: Prompts, *, vocab_size: int) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """The prompts as rows of one width, and which places hold real tokens.

        [[7, 8, 9], [5]]    →    7 8 9    1 1 1
                                 0 0 5    0 0 1

    Raises:
        ValueError: there is no prompt, one is empty, or holds a number that is not in the vocabulary.
    """
    if not prompts:
        raise ValueError("there is no prompt; give a list of lists of token ids")
    width = max(len(prompt) for prompt in prompts)
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty; begin it with one token at least, such as the model's BOS")
        if not all(0 <= token < vocab_size for token in prompt):
            wrong = next(token for token in prompt if not 0 <= token < vocab_size)
            raise ValueError(
                f"prompt {row} holds {wrong}; token ids are 0 … {vocab_size - 1} (vocab_size={vocab_size})"
            )
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = True
    return ids, mask


@dataclass
class Generated:
    """What was generated for one prompt: new token ids, ln of the model's probability of each, whether it stopped."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    stopped: bool = False


def generate(model: nn.Module, prompts: Prompts, **options: Any) -> list[Generated]:
    """All of `stream`, row by row; takes its options and raises what it raises."""
    rows = [Generated() for _ in prompts]
    stop_tokens = set(options.get("stop_tokens", ()))
    for step in stream(model, prompts, **options):
        added = zip(rows, step.tokens.tolist(), step.log_probs.tolist(), step.active.tolist(), strict=True)
        for row, token, log_prob, active in added:
            if active:
                row.ids.append(token)
                row.log_probs.append(log_prob)
                row.stopped = token in stop_tokens
    return rows
