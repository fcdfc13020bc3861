import torch

from reference_impl.nn.conv1d import Conv1D


def test_a_row_of_the_weight_belongs_to_an_input():
    projection = Conv1D(in_features=2, out_features=3)
    with torch.no_grad():
        projection.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]))
        projection.bias.copy_(torch.tensor([0.5, 0.0, -1.0]))
    assert projection(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).tolist() == [[1.5, 2.0, 2.0], [20.5, 40.0, 59.0]]


def test_its_weight_is_the_transpose_of_a_linear_layers():
    projection, linear = Conv1D(in_features=4, out_features=4), torch.nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight.copy_(projection.weight.T)
        linear.bias.copy_(projection.bias)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(projection(x), linear(x))


def test_the_bias_is_added_before_the_sum_is_rounded():
    """bfloat16 keeps 8 bits: 256 + 1 is rounded to 256, and so would be a second 1; 256 + 2 is 258."""
    projection = Conv1D(in_features=2, out_features=1).to(torch.bfloat16)
    with torch.no_grad():
        projection.weight.copy_(torch.tensor([[256.0], [1.0]]))
        projection.bias.fill_(1.0)
    assert projection(torch.ones(1, 2, dtype=torch.bfloat16)).item() == 258.0
