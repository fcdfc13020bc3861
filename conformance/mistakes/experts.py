"""Mixtures of experts: routing, weights, capacity, which expert is which."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.making import after, instead, on_load, on_model
from reference_impl.nn import moe

ROUTE = "reference_impl.nn.moe:route"
COMBINE = "reference_impl.nn.moe:combine"
ROUTER = "reference_impl.nn.moe:Router.forward"
RUN = "reference_impl.nn.moe:MixtureOfExperts.run_experts"
FUNCTION = "reference_impl.nn.sparse_moe:sparse_moe"
SWITCH = "reference_impl.nn.switch:switch_ffn"
TO_ONE = "reference_impl.nn.switch:route_to_one"
CAPACITY = "reference_impl.nn.switch:within_capacity"
FORWARD = ("component.outputs", "golden.logits")
BOTH = ("sparse_moe", "mixtral")
SWITCHES = ("switch_ffn", "switch_transformer")

FF = "layers.N.feed_forward."
LOGITS, WEIGHTS = (FF + "router_logits",), (FF + "routing_weights",)
OUTPUTS, OUTPUT = (FF + "expert_outputs",), (FF + "output",)
ROUTED = (*WEIGHTS, *OUTPUTS, *OUTPUT)


# --- top-k routing ----------------------------------------------------------------------------------------------------


def routed(weigh: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """The right experts with weights weigh(logits, probabilities of the chosen, numbers of the chosen)."""

    def route(router_logits: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
        probabilities = torch.softmax(router_logits, dim=-1)
        weights, chosen = probabilities.topk(num_experts_per_tok, dim=-1)
        return weigh(router_logits, weights, chosen), chosen

    return instead(route)


def of(count: Callable[[int], int]) -> Callable[..., Any]:
    """Another number of experts a token, the missing ones with weight 0."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def route(router_logits: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
            wanted = min(count(num_experts_per_tok), router_logits.shape[-1])
            weights, chosen = original(router_logits, wanted)
            missing = num_experts_per_tok - wanted
            if missing <= 0:
                return weights, chosen
            return F.pad(weights, (0, missing)), torch.cat(
                (chosen, chosen[..., :1].expand(*chosen.shape[:-1], missing)), -1
            )

        return route

    return make


def lowest(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda router_logits, num_experts_per_tok: original(-router_logits, num_experts_per_tok)


def top_then_softmax(router_logits: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    values, chosen = router_logits.topk(num_experts_per_tok, dim=-1)
    return torch.softmax(values, dim=-1), chosen


def last_of_equals(original: Callable[..., Any]) -> Callable[..., Any]:
    def route(router_logits: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
        weights, chosen = original(router_logits.flip(-1), num_experts_per_tok)
        return weights, router_logits.shape[-1] - 1 - chosen

    return route


def lightest_first(original: Callable[..., Any]) -> Callable[..., Any]:
    def route(router_logits: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
        weights, chosen = original(router_logits, num_experts_per_tok)
        return weights.flip(-1), chosen.flip(-1)

    return route


def by_first_token(original: Callable[..., Any]) -> Callable[..., Any]:
    def route(router_logits: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
        first = router_logits[..., :1, :].expand_as(router_logits)
        found: tuple[Tensor, Tensor] = original(first, num_experts_per_tok)
        return found

    return route


def unsorted(original: Callable[..., Any]) -> Callable[..., Any]:
    """Experts are sorted by number, their weights are not."""

    def route(router_logits: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
        weights, chosen = original(router_logits, num_experts_per_tok)
        return weights, chosen.sort(dim=-1).values

    return route


def capped(original: Callable[..., Any]) -> Callable[..., Any]:
    """Each expert takes the first few tokens of the batch that chose it; the others get nothing from it."""

    def route(router_logits: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
        weights, chosen = original(router_logits, num_experts_per_tok)
        experts = router_logits.shape[-1]
        wanted = F.one_hot(chosen.flatten(), experts)
        room = -(-len(wanted) // experts)
        kept = (wanted * (wanted.cumsum(dim=0) <= room)).sum(dim=-1).view_as(chosen)
        return weights * kept, chosen

    return route


def jittered(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return original(self, x * torch.empty_like(x).uniform_(0.9, 1.1))

    return forward


def low_precision_router(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, x: F.linear(x, self.weight)


def unweighted(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda outputs, weights: original(outputs, torch.ones_like(weights))


def averaged(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda outputs, weights: original(outputs, torch.full_like(weights, 1 / weights.shape[-1]))


def last_written(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda outputs, weights: original(outputs[..., -1:, :], weights[..., -1:])


def weighted_inputs(self: Any, x: Tensor) -> Tensor:
    """Inputs are weighted instead of outputs; experts are not linear."""
    weights, chosen = moe.route(self.gate(x), self.num_experts_per_tok)
    total = torch.zeros_like(x)
    for choice in range(self.num_experts_per_tok):
        scaled = x * self.weights(weights)[..., choice : choice + 1].to(x.dtype)
        total = total + self.run_experts(scaled, chosen[..., choice : choice + 1])[..., 0, :]
    return total


def router_detached(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda outputs, weights: original(outputs, weights.detach())


_TOP_K = (
    Mistake(
        id="route-no-renorm",
        families=BOTH,
        what="The top k of the full softmax are not divided by their sum.",
        why="Mixtral's weights of a token sum to 1.",
        shows="1e-16 where every expert is chosen (E = k), large elsewhere; the ratio is the sum of the top k.",
        fix="weights / weights.sum(−1), or softmax over the chosen logits.",
        seen="torchtitan#1448, litgpt#2013, Fast-LLM#190, TensorRT-LLM#2752",
        swaps=(Swap(ROUTE, routed(lambda logits, weights, chosen: weights)),),
        killed_by=FORWARD,
        touches=ROUTED,
    ),
    Mistake(
        id="route-raw-logits",
        families=BOTH,
        what="The chosen logits are the weights.",
        why="Weights are their softmax.",
        shows="Everywhere; weights outside 0 … 1.",
        fix="softmax.",
        seen="sgl-project/sglang#35160",
        swaps=(Swap(ROUTE, routed(lambda logits, weights, chosen: logits.gather(-1, chosen))),),
        killed_by=FORWARD,
        touches=ROUTED,
    ),
    Mistake(
        id="route-sigmoid",
        families=BOTH,
        what="Weights are sigmoids of the chosen logits, divided by their sum, as in DeepSeek-V3.",
        why="Mixtral has softmax.",
        shows="Everywhere, moderately: the heavier expert stays the heavier one.",
        fix="softmax.",
        seen="common knowledge",
        swaps=(
            Swap(
                ROUTE,
                routed(lambda logits, weights, chosen: F.normalize(logits.gather(-1, chosen).sigmoid(), p=1.0, dim=-1)),
            ),
        ),
        killed_by=FORWARD,
        touches=ROUTED,
    ),
    Mistake(
        id="route-softmax-twice",
        families=BOTH,
        what="Softmax over all experts, top k, and softmax over these probabilities.",
        why="One of the two is right, both are not.",
        shows="Weights near 1/k.",
        fix="Softmax, top k, division by the sum; or top k, softmax.",
        seen="Fast-LLM#83 (orders mixed up)",
        swaps=(Swap(ROUTE, routed(lambda logits, weights, chosen: weights.softmax(-1))),),
        killed_by=FORWARD,
        touches=ROUTED,
    ),
    Mistake(
        id="route-top-k-then-softmax",
        families=BOTH,
        what="Softmax over the k chosen logits, instead of softmax over all, top k, division by the sum.",
        why="It is not wrong: softmax's denominator cancels. Reported as a bug time and again.",
        shows="Nowhere (6e-15).",
        fix="None.",
        seen="litgpt#2013, Megatron-LM#955, Fast-LLM#190 (false alarms)",
        swaps=(Swap(ROUTE, instead(top_then_softmax)),),
        killed_by=FORWARD,
        equivalent=dict.fromkeys(BOTH, "exp(l_i)/Σ_all divided by Σ_top exp(l_j)/Σ_all is exp(l_i)/Σ_top"),
    ),
    Mistake(
        id="route-tie-break",
        families=BOTH,
        what="Of equal logits the expert with the higher number is taken.",
        why="Which one is taken is defined nowhere; programs that must agree bit by bit need one rule.",
        shows="Only exact ties (a router of zeros, experts copied from one another).",
        fix="The lower number first, as torch's topk mostly does.",
        seen="tenstorrent/tt-metal#51009, AstrAI#57",
        swaps=(Swap(ROUTE, last_of_equals),),
        killed_by=FORWARD,
        equivalent=dict.fromkeys(
            BOTH,
            "without ties the k largest logits are the same in any order of the experts, and "
            "the suite refuses cases whose routing is nearly tied",
        ),
    ),
    Mistake(
        id="route-lightest-first",
        families=BOTH,
        what="The chosen experts are listed from the lightest to the heaviest.",
        why="It is not wrong: they are summed.",
        shows="Nowhere.",
        fix="None.",
        seen="common knowledge",
        swaps=(Swap(ROUTE, lightest_first),),
        killed_by=FORWARD,
        equivalent=dict.fromkeys(BOTH, "a sum does not depend on the order of its terms"),
    ),
    Mistake(
        id="route-lowest",
        families=BOTH,
        what="The experts with the lowest scores are chosen.",
        why="The highest.",
        shows="Everywhere; nothing where E = k.",
        fix="topk(largest=True).",
        seen="common knowledge",
        swaps=(Swap(ROUTE, lowest),),
        killed_by=FORWARD,
        touches=ROUTED,
    ),
    Mistake(
        id="route-k-ignored",
        families=BOTH,
        what="Two experts a token, whatever num_experts_per_tok says.",
        why="The config says how many.",
        shows="Only where it is not 2.",
        fix="Read num_experts_per_tok.",
        seen="common knowledge",
        swaps=(
            Swap(ROUTE, of(lambda k: 2)),
            Swap(
                "reference_impl.nn.moe:MixtureOfExperts.__init__",
                lambda original: (
                    lambda self, *, num_experts_per_tok, **sizes: original(self, num_experts_per_tok=2, **sizes)
                ),
            ),
        ),
        killed_by=FORWARD,
        touches=ROUTED,
    ),
    Mistake(
        id="route-top-1",
        families=BOTH,
        what="Only the best expert runs.",
        why="k of them do.",
        shows="Everywhere; small where one expert dominates.",
        fix="topk(num_experts_per_tok).",
        seen="common knowledge",
        swaps=(Swap(ROUTE, of(lambda k: 1)),),
        killed_by=FORWARD,
        touches=ROUTED,
    ),
    Mistake(
        id="route-weights-unused",
        families=BOTH,
        what="Experts' outputs are summed without their weights.",
        why="The sum is weighted.",
        shows="2e-3 in a default-initialised tiny model, large at real scale.",
        fix="Σ weight · output.",
        seen="edwardcapriolo/deliverance#87",
        swaps=(Swap(COMBINE, unweighted),),
        killed_by=FORWARD,
        touches=OUTPUT,
    ),
    Mistake(
        id="route-weights-even",
        families=BOTH,
        what="Experts' outputs are averaged.",
        why="The sum is weighted.",
        shows="Nothing while the router is undecided, as at initialisation.",
        fix="Σ weight · output.",
        seen="edwardcapriolo/deliverance#87",
        swaps=(Swap(COMBINE, averaged),),
        killed_by=FORWARD,
        touches=OUTPUT,
    ),
    Mistake(
        id="route-weights-constant",
        families=BOTH,
        what="The router gives each chosen expert the weight 1 / k.",
        why="The weights are its softmax.",
        shows="Nothing while the router is undecided, as at initialisation.",
        fix="Softmax of the chosen logits.",
        seen="edwardcapriolo/deliverance#87",
        swaps=(Swap(ROUTE, routed(lambda logits, weights, chosen: torch.full_like(weights, 1 / weights.shape[-1]))),),
        killed_by=FORWARD,
        touches=ROUTED,
    ),
    Mistake(
        id="route-weights-misaligned",
        families=BOTH,
        what="Weights belong to other experts than those that they are paired with: one list is sorted and the "
        "other is "
        "not.",
        why="Weight j is that of expert j.",
        shows="Nothing where weights are equal.",
        fix="Permute both.",
        seen="torchtitan#1974 (review)",
        swaps=(Swap(ROUTE, unsorted),),
        killed_by=FORWARD,
        touches=ROUTED,
    ),
    Mistake(
        id="route-by-sequence",
        families=BOTH,
        what="The first token's experts serve the whole row.",
        why="Every token is routed by itself.",
        shows="Everywhere but at position 0.",
        fix="Route each token.",
        seen="common knowledge",
        swaps=(Swap(ROUTE, by_first_token),),
        killed_by=FORWARD,
        touches=ROUTED,
    ),
    Mistake(
        id="route-capacity",
        families=BOTH,
        what="Experts have room for an even share of the tokens; others are dropped.",
        why="Mixtral drops no token.",
        shows="Only where the load is uneven; a row depends on its neighbours in the batch.",
        fix="No capacity, or one that is never reached.",
        seen="marin#8953 (scope of a capacity)",
        swaps=(Swap(ROUTE, capped),),
        killed_by=FORWARD,
        touches=ROUTED,
    ),
    Mistake(
        id="route-low-precision",
        families=("mixtral",),
        what="The router computes in bfloat16.",
        why="Logits that nearly tie change places, and a token meets another expert.",
        shows="Only in low precision, one token at a time.",
        fix="Router and softmax in float32.",
        seen="AstrAI#57, vllm#58076, marin#4234, torchtitan#2389",
        swaps=(Swap(ROUTER, low_precision_router),),
        killed_by=("golden.logits",),
        touches=LOGITS,
        precision="in float32 and float64 the router is in the working dtype anyway",
        equivalent={
            "mixtral": "policy: the oracle's own router computes in the model's dtype, so that the budget allows "
            "it; cases in which rounding could send a token elsewhere are refused"
        },
    ),
    Mistake(
        id="moe-jitter-in-eval",
        families=("mixtral",),
        what="The router's input is multiplied by noise at evaluation too.",
        why="router_jitter_noise is for training.",
        shows="Nothing while it is 0; otherwise two calls differ.",
        fix="Only if self.training.",
        seen="ColossalAI#419, vllm#35499, MoCE-IR#19",
        swaps=(Swap(ROUTER, jittered),),
        killed_by=("golden.logits",),
        touches=(*LOGITS, *ROUTED),
    ),
    Mistake(
        id="moe-last-expert-only",
        families=BOTH,
        what="A token's outputs are written, not added, to the result: the last expert's stays.",
        why="They are summed.",
        shows="Everywhere.",
        fix="index_add.",
        seen="common knowledge",
        swaps=(Swap(COMBINE, last_written),),
        killed_by=FORWARD,
        touches=OUTPUT,
    ),
    Mistake(
        id="moe-inputs-weighted",
        families=("mixtral",),
        what="An expert's input is multiplied by the weight, instead of its output (Llama 4 does so).",
        why="An expert is not linear.",
        shows="Everywhere.",
        fix="Weigh outputs.",
        seen="common knowledge",
        swaps=(Swap("reference_impl.nn.moe:MixtureOfExperts.forward", instead(weighted_inputs)),),
        killed_by=("golden.logits",),
        touches=(*OUTPUTS, *OUTPUT),
    ),
    Mistake(
        id="moe-router-gradient-stopped",
        families=BOTH,
        what="No gradient flows through the weights.",
        why="The router learns by them alone.",
        shows="The forward pass is right; the router's gradient is 0.",
        fix="Leave weights in the graph.",
        seen="common knowledge",
        swaps=(Swap(COMBINE, router_detached),),
        killed_by=("component.gradients", "golden.gradients"),
    ),
)


# --- which expert is which --------------------------------------------------------------------------------------------


def experts_by_string(model: Any) -> None:
    for layer in model.model.layers:
        experts = layer.block_sparse_moe.experts
        order = sorted(map(str, range(len(experts))))
        layer.block_sparse_moe.experts = nn.ModuleList(experts[int(number)] for number in order)


def reversed_function(original: Callable[..., Any]) -> Callable[..., Any]:
    def sparse_moe(
        x: Tensor,
        gate_weight: Tensor,
        w1_weight: Tensor,
        w2_weight: Tensor,
        w3_weight: Tensor,
        num_experts_per_tok: int,
    ) -> Any:
        return original(x, gate_weight, w1_weight.flip(0), w2_weight.flip(0), w3_weight.flip(0), num_experts_per_tok)

    return sparse_moe


def experts_reversed(model: Any) -> None:
    for layer in model.model.layers:
        layer.block_sparse_moe.experts = nn.ModuleList(list(layer.block_sparse_moe.experts)[::-1])


def second_for_third(model: Any) -> None:
    """w2 goes up and w3 goes down: they change places, shapes too."""
    for module in model.modules():
        if hasattr(module, "w2"):
            module.w2, module.w3 = module.w3, module.w2
            if module.w2.weight.shape[0] != module.w3.weight.shape[1]:
                module.w2.weight.data, module.w3.weight.data = module.w3.weight.data.T, module.w2.weight.data.T


def down_read_as_is(name: str, tensor: Tensor, config: Any) -> Tensor | None:
    """w2 as it lies when its transpose was stored: the numbers are read in the other order."""
    return tensor.reshape(tensor.shape[::-1]).T if name.endswith(".w2.weight") else None


_WHICH = (
    Mistake(
        id="expert-order",
        families=("mixtral",),
        what="Experts are stacked by their names as strings: 0, 1, 10, 2, ….",
        why="Expert i belongs to row i of the router.",
        shows="Only with more than 10 experts.",
        fix="Sort by int(name).",
        seen="common knowledge",
        swaps=(on_model(experts_by_string),),
        killed_by=("golden.logits",),
        touches=OUTPUTS,
    ),
    Mistake(
        id="expert-order-reversed",
        families=BOTH,
        what="Experts are stacked in another order than the router's rows.",
        why="Expert i belongs to row i of the router.",
        shows="Everywhere; nothing if all experts are alike.",
        fix="One order for both.",
        seen="common knowledge",
        swaps=(on_model(experts_reversed), Swap(FUNCTION, reversed_function)),
        killed_by=FORWARD,
        touches=OUTPUTS,
    ),
    Mistake(
        id="expert-role-map",
        families=("mixtral",),
        what="w1, w2, w3 are taken for gate, up, down; w2 is down and w3 is up.",
        why="Mixtral's names follow Llama's original files.",
        shows="A shape error, or silent where both widths are equal or a loader transposes.",
        fix="w1 gate, w3 up, w2 down.",
        seen="transformers#27942, prime-rl#1812, mistral-inference#139",
        swaps=(on_model(second_for_third),),
        killed_by=("golden.logits",),
        touches=OUTPUTS,
    ),
    Mistake(
        id="expert-down-transposed",
        families=("mixtral",),
        what="w2 is stored transposed in blocks of experts, and is read as it lies.",
        why="The numbers are the transpose's.",
        shows="Shapes agree once it is reshaped.",
        fix="Transpose while converting.",
        seen="transformers#27942 (expert_block.T for w2)",
        swaps=(on_load(down_read_as_is),),
        killed_by=("golden.logits",),
        touches=OUTPUTS,
    ),
)


# --- the Switch layer -------------------------------------------------------------------------------------------------


def switched(change: Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]) -> Callable[..., Any]:
    """What the layer returns, changed: change(returns, arguments)."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def switch_ffn(
            x: Tensor, router_weight: Tensor, wi_weight: Tensor, wo_weight: Tensor, expert_capacity: int
        ) -> Any:
            given = {"x": x, "router_weight": router_weight, "wi_weight": wi_weight, "wo_weight": wo_weight,
                     "expert_capacity": expert_capacity}  # fmt: skip
            return change(original(**given), given)

        return switch_ffn

    return make


def dropped_pass(found: dict[str, Tensor], given: dict[str, Any]) -> dict[str, Tensor]:
    dropped = (found["dispatched"] == 0).all(dim=-1, keepdim=True)
    weight = found["probabilities"].amax(dim=-1, keepdim=True).to(given["x"].dtype)
    return {**found, "y": torch.where(dropped, weight * given["x"], found["y"])}


def certain(found: dict[str, Tensor], given: dict[str, Any]) -> dict[str, Tensor]:
    weight = found["dispatched"].sum(dim=-1, keepdim=True)
    y = found["y"] / torch.where(weight > 0, weight, 1.0).to(found["y"].dtype)
    return {**found, "y": y, "dispatched": (found["dispatched"] > 0).to(found["dispatched"].dtype)}


def sent_if(place: Callable[[Tensor, int], Tensor]) -> Callable[..., Any]:
    """1 where place(one-hot choices (B, T, E), C) lets a token through."""

    def within_capacity(chosen: Tensor, num_experts: int, expert_capacity: int, counted: Any = None) -> Tensor:
        wanted = F.one_hot(chosen, num_experts)
        wanted = wanted if counted is None else wanted * counted[..., None]
        return wanted * place(wanted, expert_capacity)

    return instead(within_capacity)


def over_batch(wanted: Tensor, capacity: int) -> Tensor:
    return wanted.flatten(0, 1).cumsum(dim=0).view_as(wanted) <= capacity * len(wanted)


def as_one_row(wanted: Tensor, capacity: int) -> Tensor:
    return wanted.flatten(0, 1).cumsum(dim=0).view_as(wanted) <= capacity


def last_first(wanted: Tensor, capacity: int) -> Tensor:
    return wanted.flip(1).cumsum(dim=1).flip(1) <= capacity


def by_probability() -> tuple[Swap, ...]:
    known: dict[str, Tensor] = {}

    def route_to_one(original: Callable[..., Any]) -> Callable[..., Any]:
        def noted(router_logits: Tensor) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = original(router_logits)
            known["probabilities"] = found[0]
            return found

        return noted

    def place(wanted: Tensor, capacity: int) -> Tensor:
        score = torch.where(wanted.bool(), known["probabilities"], -1.0)
        return score.argsort(dim=1, descending=True).argsort(dim=1) < capacity

    return Swap(TO_ONE, route_to_one), Swap(CAPACITY, sent_if(place))


def second_best(router_logits: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = torch.softmax(router_logits, dim=-1)
    return probabilities, probabilities.topk(2, dim=-1).indices[..., 1]


def switch(identifier: str, what: str, why: str, shows: str, fix: str, seen: str, *swaps: Swap) -> Mistake:
    return Mistake(
        id=identifier, families=("switch_ffn",) if swaps[0].target == SWITCH else SWITCHES, what=what, why=why,
        shows=shows, fix=fix, seen=seen, swaps=swaps, killed_by=FORWARD, touches=ROUTED,
    )  # fmt: skip


_SWITCH = (
    switch(
        "switch-dropped-as-identity", "A token for which there is no room gets p · x.",
        "It gets 0: the residual connection around the layer carries it.", "Only where capacity is exceeded.",
        "Start from zeros.", "transformers#37017, transformers#37123", Swap(SWITCH, switched(dropped_pass)),
    ),
    switch(
        "switch-cumsum-axis",
        "The place in the queue is counted along the wrong axis, so that nothing is ever dropped.",
        "Tokens queue along the sequence.", "Only where capacity is exceeded.", "cumsum over the tokens of a group.",
        "transformers#48293, transformers#48421",
        Swap(CAPACITY, sent_if(lambda wanted, capacity: wanted.cumsum(dim=-1) <= capacity)),
    ),
    switch(
        "switch-capacity-scope", "Capacity, as much as all rows have, is counted over the batch instead of per row.",
        "A row then depends on its neighbours.", "Only with several rows, where capacity is exceeded.",
        "One queue a row and expert.", "marin#8953", Swap(CAPACITY, sent_if(over_batch)),
    ),
    switch(
        "switch-capacity-shared", "The whole batch shares the capacity of one row.",
        "Every row has it; a row then depends on those before it.",
        "Only with several rows, where the capacity of one is exceeded by all.",
        "One queue a row and expert.", "marin#8953", Swap(CAPACITY, sent_if(as_one_row)),
    ),
    switch(
        "switch-capacity-value", "One token fewer fits: place < capacity, places counted from 1.",
        "capacity tokens fit.", "Only at the boundary.", "place ≤ capacity, from 1.", "DeepSeek-V2#48 (the formula)",
        Swap(CAPACITY, sent_if(lambda wanted, capacity: wanted.cumsum(dim=1) < capacity)),
    ),
    switch(
        "switch-capacity-one-more", "One token more fits: place ≤ capacity, places counted from 0.",
        "capacity tokens fit.", "Only at the boundary.", "place < capacity, from 0.", "DeepSeek-V2#48 (the formula)",
        Swap(CAPACITY, sent_if(lambda wanted, capacity: wanted.cumsum(dim=1) - 1 <= capacity)),
    ),
    switch(
        "switch-priority", "The last tokens are kept.", "First come, first served, in the order of tokens.",
        "Only where capacity is exceeded.", "Count from the beginning of the row.", "common knowledge",
        Swap(CAPACITY, sent_if(last_first)),
    ),
    switch(
        "switch-priority-by-probability", "The most probable tokens are kept (batch-prioritised routing).",
        "First come, first served; a priority by probability lets later tokens push earlier ones out.",
        "Only where capacity is exceeded.", "Count in the order of tokens.", "common knowledge", *by_probability(),
    ),
    switch(
        "route-renorm-where-forbidden", "The weight of the one chosen expert is normalised, to 1.",
        "With k = 1 the probability itself is the weight; normalised it would teach the router nothing.",
        "Everywhere.", "p · E(x).", "mlxcel#391, Fast-LLM#83, Fast-LLM#190", Swap(SWITCH, switched(certain)),
    ),
    switch(
        "switch-jitter-in-eval", "The router's input is multiplied by noise at evaluation too.",
        "router_jitter_noise is for training.", "Two calls differ.", "Only if self.training.",
        "ColossalAI#419, vllm#35499, MoCE-IR#19",
        Swap(TO_ONE, lambda original: lambda logits: original(logits * torch.empty_like(logits).uniform_(0.9, 1.1))),
    ),
    switch(
        "router-logits-are-probs", "Probabilities are returned as router logits.",
        "z-loss and balancing loss are computed from logits.", "Nowhere in the layer's output; losses are wrong.",
        "Return what the router's projection gives.", "transformers#48421, transformers#48293",
        Swap(SWITCH, switched(lambda found, given: {**found, "router_logits": found["probabilities"]})),
    ),
    switch(
        "switch-second-best", "The second most probable expert is taken.", "The most probable one.", "Everywhere.",
        "argmax.", "common knowledge", Swap(TO_ONE, instead(second_best)),
    ),
    switch(
        "switch-activation-missing", "Experts are linear: the ReLU between wi and wo is left out.",
        "E(x) = wo · max(0, wi x).", "Everywhere.", "ReLU.", "common knowledge",
        Swap(SWITCH, switched(lambda found, given: {**found, "y": linear_experts(found, given)})),
    ),
    Mistake(
        id="aux-loss-without-gradient",
        families=("mixtral", "switch_transformer"),
        what="The balance loss is computed from detached router logits: it has its value and no gradient.",
        why="It is there to train the router, through the mean probability of each expert.",
        shows="Not in any value; experts are used ever more unevenly in training.",
        fix="Detach how often experts are chosen at most, never the probabilities.",
        seen="common knowledge",
        swaps=(Swap("reference_impl.nn.moe:load_balancing_loss", after(lambda loss: loss.detach())),),
        killed_by=("gradients.auxiliary",),
    ),
)  # fmt: skip


def linear_experts(found: dict[str, Tensor], given: dict[str, Any]) -> Tensor:
    sent, x = found["dispatched"], given["x"]
    outputs = torch.einsum("bth,efh,eof->bteo", x, given["wi_weight"], given["wo_weight"])
    return (sent[..., None].to(x.dtype) * outputs).sum(dim=-2)


MISTAKES = (*_TOP_K, *_WHICH, *_SWITCH)
