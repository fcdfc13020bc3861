"""Mixtral's and Switch's experts: known mistakes fail, an independent right function passes every claim.

The ids are those of the catalogue of mistakes. What the cases must contain for them to show is stated at the end.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.cases import Case
from judged import Function, not_passed, outputs

# --- sparse_moe: a router gives every expert a weight, most of them 0; a mistake is another router or expert


def router(logits: Tensor, k: int) -> Tensor:
    """Softmax over the k largest."""
    highest = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, highest.indices, highest.values.softmax(-1))


def renormalised(logits: Tensor, k: int) -> Tensor:
    """The same numbers in another order: softmax over all, the k largest, divided by their sum."""
    share = logits.softmax(-1)
    share = share * (share >= share.topk(k, dim=-1).values[..., -1:])
    return share / share.sum(-1, keepdim=True)


def expert(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    return (F.silu(x @ w1.mT) * (x @ w3.mT)) @ w2.mT


def mixture(route: Callable[[Tensor, int], Tensor] = router, run: Callable[..., Tensor] = expert) -> Function:
    """All experts compute all tokens."""

    def sparse_moe(
        x: Tensor, gate_weight: Tensor, w1_weight: Tensor, w2_weight: Tensor, w3_weight: Tensor,
        num_experts_per_tok: int,
    ) -> dict[str, Tensor]:  # fmt: skip
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = x.to(wide) @ gate_weight.to(wide).mT
        weights = route(logits, num_experts_per_tok)
        every = torch.stack(
            [run(x, *w) for w in zip(w1_weight, w2_weight, w3_weight, strict=True)], -1
        )  # (batch, seq, hidden, experts)
        return {"y": (every * weights[..., None, :]).sum(-1).to(x.dtype), "router_logits": logits,
                "routing_weights": weights}  # fmt: skip

    return sparse_moe


def not_renormalised(logits: Tensor, k: int) -> Tensor:
    return logits.softmax(-1) * (router(logits, k) > 0)


def raw_logits(logits: Tensor, k: int) -> Tensor:
    return logits * (router(logits, k) > 0)


def all_alike(logits: Tensor, k: int) -> Tensor:
    return (router(logits, k) > 0).to(logits.dtype) / k


def misaligned(logits: Tensor, k: int) -> Tensor:
    """The weights, heaviest first, meet the chosen experts in the order of their numbers."""
    highest = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, highest.indices.sort(-1).values, highest.values.softmax(-1))


def in_order_of_names(**given: Any) -> Any:
    """Experts sorted as strings: 0 1 10 2 … ."""
    order = sorted(range(len(given["w1_weight"])), key=str)
    return mixture()(**given | {f"w{i}_weight": given[f"w{i}_weight"][order] for i in (1, 2, 3)})


MIXTRAL: dict[str, tuple[Function, str]] = {
    "route-no-renorm": (mixture(not_renormalised), "plain"),
    "route-raw-logits": (mixture(raw_logits), "plain"),
    "route-weights-unused": (mixture(all_alike), "plain"),
    "route-weights-misaligned": (mixture(misaligned), "plain"),
    "number of experts ignored": (mixture(lambda logits, k: router(logits, 2)), "field-num_experts_per_tok"),
    "all experts used": (mixture(lambda logits, k: logits.softmax(-1)), "plain"),
    "swiglu-swap": (mixture(run=lambda x, w1, w2, w3: expert(x, w3, w2, w1)), "plain"),
    "expert-role-map": (mixture(run=lambda x, w1, w2, w3: expert(x, w1, w3, w2)), "square"),
    "transpose-guessed-by-shape": (mixture(run=lambda x, w1, w2, w3: expert(x, w1, w2.mT, w3)), "square"),
    "expert-order": (in_order_of_names, "distinct"),
}


@pytest.mark.parametrize("route", [router, renormalised])
def test_right_mixture_passes_every_claim(route: Callable[[Tensor, int], Tensor]) -> None:
    assert not_passed(mixture(route), "sparse_moe") == {}


@pytest.mark.parametrize("mistake", MIXTRAL)
def test_mixture_mistake_fails(mistake: str) -> None:
    function, case = MIXTRAL[mistake]
    assert outputs(function, f"sparse_moe/{case}").outcome == "fail"


def test_ignored_number_of_experts_is_named() -> None:
    function, case = MIXTRAL["number of experts ignored"]
    assert outputs(function, f"sparse_moe/{case}").equals == "num_experts_per_tok ignored"


def test_string_sorted_experts_are_right_with_fewer_than_eleven() -> None:
    assert outputs(in_order_of_names, "sparse_moe/plain").outcome == "pass"


# --- switch_ffn: which of the tokens that chose an expert it takes is what mistakes are about


def first_come(wanted: Tensor, _probability: Tensor, capacity: int) -> Tensor:
    """wanted: (batch, seq, experts), where each token wants to go -> where it is sent."""
    before = wanted.cumsum(1) - wanted
    return wanted * (before < capacity)


def switch(
    admit: Callable[[Tensor, Tensor, int], Tensor] = first_come,
    weigh: Callable[[Tensor], Tensor] = lambda probability: probability,
    dropped: Callable[[Tensor, Tensor], Tensor] = lambda x, probability: torch.zeros_like(x),
) -> Function:
    """weigh: what the output of the chosen expert is multiplied with.  dropped: what a token gets that is not sent."""

    def switch_ffn(
        x: Tensor, router_weight: Tensor, wi_weight: Tensor, wo_weight: Tensor, expert_capacity: int
    ) -> Tensor:
        probabilities = (x @ router_weight.mT).softmax(-1)
        probability, chosen = probabilities.max(-1, keepdim=True)
        wanted = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)
        sent = admit(wanted, probability[..., 0], expert_capacity)
        every = torch.einsum("btef,ehf->bteh", torch.einsum("bth,efh->btef", x, wi_weight).relu(), wo_weight)
        y = (sent[..., None] * every).sum(2) * weigh(probability)
        return torch.where(sent.sum(-1, keepdim=True) > 0, y, dropped(x, probability))

    return switch_ffn


def over_the_batch(wanted: Tensor, probability: Tensor, capacity: int) -> Tensor:
    return first_come(wanted.flatten(0, 1)[None], probability, capacity).view_as(wanted)


def along_the_rows(wanted: Tensor, probability: Tensor, capacity: int) -> Tensor:
    """The queue is counted over the batch, token by token."""
    return wanted * (wanted.cumsum(0) - wanted < capacity)


def last_come(wanted: Tensor, probability: Tensor, capacity: int) -> Tensor:
    return first_come(wanted.flip(1), probability, capacity).flip(1)


def likeliest_first(wanted: Tensor, probability: Tensor, capacity: int) -> Tensor:
    order = probability.argsort(1, descending=True)[..., None].expand_as(wanted)
    return torch.zeros_like(wanted).scatter(1, order, first_come(wanted.gather(1, order), probability, capacity))


SWITCH: dict[str, tuple[Function, str]] = {
    "switch-dropped-as-identity": (switch(dropped=lambda x, p: x * p), "field-expert_capacity"),
    "dropped tokens passed on": (switch(dropped=lambda x, p: x), "field-expert_capacity"),
    "switch-cumsum-axis, nothing dropped": (switch(lambda wanted, p, c: wanted), "field-expert_capacity"),
    "switch-cumsum-axis, batch": (switch(along_the_rows), "field-expert_capacity"),
    "switch-capacity-scope": (switch(over_the_batch), "field-expert_capacity"),
    "switch-capacity-value, one more": (switch(lambda w, p, c: first_come(w, p, c + 1)), "field-expert_capacity"),
    "switch-capacity-value, one fewer": (switch(lambda w, p, c: first_come(w, p, c - 1)), "field-expert_capacity"),
    "switch-priority, last": (switch(last_come), "field-expert_capacity"),
    "switch-priority, likeliest": (switch(likeliest_first), "field-expert_capacity"),
    "route-renorm-where-forbidden": (switch(weigh=torch.ones_like), "plain"),
}


def test_right_switch_passes_every_claim() -> None:
    assert not_passed(switch(), "switch_ffn") == {}


@pytest.mark.parametrize("mistake", SWITCH)
def test_switch_mistake_fails(mistake: str) -> None:
    function, case = SWITCH[mistake]
    assert outputs(function, f"switch_ffn/{case}").outcome == "fail"


@pytest.mark.parametrize(
    ("mistake", "label"),
    [
        ("switch-cumsum-axis, nothing dropped", "expert_capacity ignored"),
        ("switch-capacity-value, one more", "expert_capacity one too high"),
        ("switch-capacity-value, one fewer", "expert_capacity one too low"),
    ],
)
def test_wrong_capacity_is_named(mistake: str, label: str) -> None:
    function, case = SWITCH[mistake]
    assert outputs(function, f"switch_ffn/{case}").equals == label


# --- what the cases contain


@pytest.mark.parametrize("case", ["plain", "field-num_experts_per_tok", "square", "distinct"])
def test_no_choice_of_mixtral_is_near_a_tie(case: str) -> None:
    """The last chosen expert leads by 0.07 or more; bfloat16 rounds logits of up to 6 by less than 0.016."""
    golden = Case(f"sparse_moe/{case}")
    logits, k = golden.expected["router_logits"], golden.config["num_experts_per_tok"]
    ordered = logits.sort(-1, descending=True).values
    assert (ordered[..., k - 1] - ordered[..., k]).min() > 0.07
    assert logits.abs().max() < 6


def test_some_experts_of_mixtral_are_unused_and_one_is_busy() -> None:
    used = (Case("sparse_moe/distinct").expected["routing_weights"] > 0).flatten(0, 1).sum(0)
    assert used.tolist() == [0, 3, 1, 0, 1, 3, 4, 3, 1, 0, 4]


def test_experts_of_switch_are_asked_for_less_as_much_and_more_than_they_hold() -> None:
    """With room for 2: fewer in a row, exactly as many, and more, the last in every row."""
    chosen = Case("switch_ffn/field-expert_capacity").expected["probabilities"].argmax(-1)
    assert [row.bincount(minlength=4).tolist() for row in chosen] == [[3, 2, 1, 2], [0, 2, 4, 2], [2, 0, 3, 3]]


def test_no_choice_of_switch_is_near_a_tie() -> None:
    ordered = Case("switch_ffn/plain").expected["router_logits"].sort(-1, descending=True).values
    assert (ordered[..., 0] - ordered[..., 1]).min() > 0.15
