import pytest
import torch

from reference_impl.nn.adaptive import (
    AdaptiveEmbedding,
    AdaptiveLogSoftmax,
    cluster_ids,
    cluster_width,
    whole_log_probabilities,
)

SIZES = {"vocab_size": 12, "d_embed": 8, "d_model": 6, "cutoffs": (3, 7), "div_val": 2}


def filled(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module.double()


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_clusters_are_those_of_the_docstring():
    assert cluster_ids(12, (3, 7)) == [range(3), range(3, 7), range(7, 12)]


def test_without_cutoffs_there_is_one_cluster():
    assert cluster_ids(12, ()) == [range(12)]


@pytest.mark.parametrize("cutoffs", [(0, 5), (5, 5), (7, 3), (3, 12), (13,)])
def test_cutoffs_that_leave_a_cluster_empty_are_refused(cutoffs):
    with pytest.raises(ValueError, match=r"must rise, from 1 or more to less than vocab_size=12"):
        cluster_ids(12, cutoffs)


def test_widths_fall_by_div_val_and_are_rounded_down():
    assert [cluster_width(100, 3, cluster) for cluster in range(5)] == [100, 33, 11, 3, 1]


def test_a_width_of_nothing_is_refused():
    with pytest.raises(ValueError, match="d_embed=100 divided by div_val=3 to the power 5 is less than 1"):
        cluster_width(100, 3, 5)


def test_each_id_is_looked_up_in_its_cluster_projected_and_scaled():
    module = filled(AdaptiveEmbedding(**SIZES))
    ids = torch.tensor([[0, 2, 3, 6, 7, 11]])
    places = [(0, 0), (0, 2), (1, 0), (1, 3), (2, 0), (2, 4)]
    expected = [module.emb_projs[n] @ module.emb_layers[n].weight[row] * 6**0.5 for n, row in places]
    torch.testing.assert_close(module(ids)[0], torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_clusters_without_an_id_do_not_matter():
    module = filled(AdaptiveEmbedding(**SIZES))
    alone, beside_others = module(torch.tensor([[1, 1]])), module(torch.tensor([[1, 11]]))
    torch.testing.assert_close(alone[:, 0], beside_others[:, 0], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("d_embed", "projections"), [(8, [(6, 8)]), (6, [])])
def test_one_table_has_one_projection_or_none(d_embed, projections):
    module = AdaptiveEmbedding(**SIZES | {"div_val": 1, "d_embed": d_embed})
    assert [tuple(table.weight.shape) for table in module.emb_layers] == [(12, d_embed)]
    assert [tuple(matrix.shape) for matrix in module.emb_projs] == projections


def test_divided_widths_are_projected_even_where_they_are_the_models():
    module = AdaptiveEmbedding(**SIZES | {"d_embed": 6})
    assert [tuple(matrix.shape) for matrix in module.emb_projs] == [(6, 6), (6, 3), (6, 1)]


def test_clusters_stand_in_their_order_behind_the_shortlist():
    """Two ids, then the clusters; each cluster's share goes to its own ids."""
    head = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    tails = [torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()]
    expected = torch.tensor([0.1, 0.2, 0.15, 0.15, 0.1, 0.3])
    torch.testing.assert_close(whole_log_probabilities(head, tails).exp(), expected)


@pytest.mark.parametrize("changes", [{}, {"div_val": 1}, {"div_val": 1, "d_embed": 6}, {"cutoffs": ()}], ids=str)
def test_an_id_has_its_clusters_share_of_the_head_times_its_own_of_the_cluster(changes):
    sizes = SIZES | changes
    module, hidden = filled(AdaptiveLogSoftmax(**sizes)), drawn(2, 3, 6)
    got = module(hidden).exp()
    clusters = cluster_ids(sizes["vocab_size"], sizes["cutoffs"])

    def scores(ids, cluster):
        one = sizes["div_val"] == 1
        layer = module.out_layers[0 if one else cluster]
        rows = slice(ids.start, ids.stop) if one else slice(None)
        inner = hidden @ module.out_projs[cluster] if len(module.out_projs) else hidden
        return inner @ layer.weight[rows].T + layer.bias[rows], inner

    head, inner = scores(clusters[0], 0)
    if len(clusters) > 1:
        head = torch.cat((head, inner @ module.cluster_weight.T + module.cluster_bias), dim=-1)
    head = head.softmax(dim=-1)
    for cluster, ids in enumerate(clusters):
        expected = head[..., ids.start : ids.stop]
        if cluster:
            expected = head[..., [len(clusters[0]) + cluster - 1]] * scores(ids, cluster)[0].softmax(dim=-1)
        torch.testing.assert_close(got[..., ids.start : ids.stop], expected, rtol=1e-12, atol=1e-15)


def test_head_scores_can_be_hooked():
    module, seen = filled(AdaptiveLogSoftmax(**SIZES)), []
    module.head_scores.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    module(drawn(2, 3, 6))
    assert [tuple(scores.shape) for scores in seen] == [(2, 3, 3 + 2)]


def test_log_probabilities_of_half_precision_are_computed_in_float32():
    module, hidden = filled(AdaptiveLogSoftmax(**SIZES)), drawn(2, 3, 6)
    low = module.to(torch.bfloat16)(hidden.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.double().exp().sum(-1) - 1).abs().max() < 2**-5
