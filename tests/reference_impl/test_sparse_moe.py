import torch

from reference_impl.nn.feed_forward import swiglu
from reference_impl.nn.moe import MixtureOfExperts
from reference_impl.nn.sparse_moe import sparse_moe


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(experts, ffn, hidden):
    return {
        "gate_weight": drawn(experts, hidden),
        "w1_weight": drawn(experts, ffn, hidden, seed=1),
        "w2_weight": drawn(experts, hidden, ffn, seed=2),
        "w3_weight": drawn(experts, ffn, hidden, seed=3),
    }


def test_is_the_module_as_a_function_of_its_weights():
    module = MixtureOfExperts(
        hidden_size=5, intermediate_size=4, hidden_act="silu", num_local_experts=7, num_experts_per_tok=3
    ).double()
    ours = weights(7, 4, 5)
    state = {f"experts.{e}.w{i}.weight": ours[f"w{i}_weight"][e] for e in range(7) for i in (1, 2, 3)}
    module.load_state_dict(state | {"gate.weight": ours["gate_weight"]})
    x = drawn(2, 6, 5, seed=4)
    torch.testing.assert_close(sparse_moe(x, **ours, num_experts_per_tok=3)["y"], module(x), rtol=1e-13, atol=1e-13)


def test_an_only_expert_is_a_swiglu_block():
    x, only = drawn(2, 3, 5, seed=4), weights(1, 4, 5)
    expected = swiglu(x, only["w1_weight"][0], only["w3_weight"][0], only["w2_weight"][0])["y"]
    torch.testing.assert_close(sparse_moe(x, **only, num_experts_per_tok=1)["y"], expected, rtol=1e-13, atol=1e-13)


def test_weights_of_a_token_sum_to_1_over_k_experts():
    found = sparse_moe(drawn(2, 6, 5, seed=4), **weights(7, 4, 5), num_experts_per_tok=3)["routing_weights"]
    assert (found > 0).sum(-1).unique().tolist() == [3]
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 6).double(), rtol=1e-14, atol=0)


def test_router_is_in_float32_for_bfloat16():
    low = {name: tensor.bfloat16() for name, tensor in weights(7, 4, 5).items()}
    found = sparse_moe(drawn(1, 2, 5).bfloat16(), **low, num_experts_per_tok=2)
    assert (found["router_logits"].dtype, found["y"].dtype) == (torch.float32, torch.bfloat16)
