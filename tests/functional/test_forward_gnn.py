"""Equations of ForwardGNN against closed forms, autograd and graphs built by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from locallearn.functional import forward_gnn as fg

DRAW = torch.Generator().manual_seed(0)


def test_rows_get_length_one_whatever_their_scale_and_zeros_stay() -> None:
    """Property 6."""
    x = torch.randn(5, 7, generator=DRAW)
    x[2] = 0
    given = fg.normalise(x)
    assert torch.allclose(given.norm(dim=1), torch.tensor([1.0, 1, 0, 1, 1]))
    assert torch.allclose(fg.normalise(1000 * x), given, atol=1e-6)
    assert torch.equal(fg.normalise(torch.stack((x, x)))[1], given)
    assert fg.normalise(x.bfloat16()).dtype is torch.bfloat16


def test_virtual_nodes_are_joined_to_the_labelled_nodes_of_their_class() -> None:
    """Property 1."""
    nodes, classes = 9, 3
    half = torch.tensor([[0, 1, 2, 3, 7], [1, 2, 3, 8, 8]])
    edges = torch.cat((half, half.flip(0)), 1)
    rows, labels = torch.tensor([0, 2, 5, 6]), torch.tensor([2, 0, 2, 2])
    joined = fg.join_virtual_nodes(edges, rows, labels, nodes)
    assert joined.shape == (2, edges.shape[1] + 2 * len(rows))
    adjacency = torch.zeros(nodes + classes, nodes + classes).index_put_(
        tuple(joined), torch.ones(joined.shape[1]), accumulate=True
    )
    assert torch.equal(adjacency, adjacency.T)
    assert {*map(tuple, adjacency[:nodes, :nodes].nonzero().tolist())} == {*map(tuple, edges.T.tolist())}
    assert adjacency[nodes:].sum(1).tolist() == [1, 0, 3]
    assert adjacency[nodes:, [1, 3, 4, 7, 8]].sum() == 0
    assert [adjacency[row, nodes + label].item() for row, label in zip(rows, labels, strict=True)] == [1] * 4


def test_label_columns_are_one_hot_where_a_label_is_shown_and_even_elsewhere() -> None:
    columns = fg.label_columns(torch.tensor([1, 3]), torch.tensor([[0, 2], [2, 1]]), 5, 4)
    even = [0.25] * 4
    assert columns[0].tolist() == [even, [1, 0, 0, 0], even, [0, 0, 1, 0], even]
    assert columns[1].tolist() == [even, [0, 0, 1, 0], even, [0, 1, 0, 0], even]


def test_every_node_takes_every_wrong_class_once_in_an_order_of_its_own() -> None:
    """Property 2."""
    labels = torch.arange(300) % 4
    wrong = fg.wrong_labels(labels, 4, torch.Generator().manual_seed(0))
    assert wrong.shape == (3, 300)
    for i, label in enumerate(labels.tolist()):
        assert sorted([label, *wrong[:, i].tolist()]) == [0, 1, 2, 3]
    orders = {tuple(column) for column in wrong[:, labels == 1].T.tolist()}
    assert len(orders) == 6
    assert torch.equal(wrong, fg.wrong_labels(labels, 4, torch.Generator().manual_seed(0)))
    assert not torch.equal(wrong, fg.wrong_labels(labels, 4, torch.Generator().manual_seed(1)))


def test_one_class_has_no_wrong_label() -> None:
    with pytest.raises(ValueError, match="at least 2 classes"):
        fg.wrong_labels(torch.zeros(3, dtype=torch.int64), 1, torch.Generator())


def test_the_gradient_of_single_forward_is_softmax_minus_one_hot() -> None:
    """Property 5, and that it goes through nodes and virtual nodes both."""
    h = torch.rand(6, 5, generator=DRAW, dtype=torch.float64, requires_grad=True)
    virtual = torch.rand(3, 5, generator=DRAW, dtype=torch.float64, requires_grad=True)
    labels, tau = torch.tensor([0, 1, 2, 2, 1, 0]), 0.5
    logits = fg.virtual_logits(h, virtual, tau)
    by_nodes, by_virtual = torch.autograd.grad(F.cross_entropy(logits, labels), (h, virtual))
    scores = torch.stack([torch.stack([(row * c).sum() / tau for c in virtual]) for row in h]).detach()
    residual = (scores.exp() / scores.exp().sum(1, keepdim=True) - torch.eye(3, dtype=torch.float64)[labels]) / (
        6 * tau
    )
    assert torch.allclose(by_nodes, residual @ virtual)
    assert torch.allclose(by_virtual, residual.T @ h)


def test_losses_of_silence() -> None:
    """Property 5, at H = 0."""
    zeros = torch.zeros(4, 3)
    silent = fg.virtual_logits(zeros, zeros[:3])
    assert F.cross_entropy(silent, torch.arange(4) % 3).item() == pytest.approx(math.log(3))
    loss = fg.forward_forward_loss(fg.goodness(zeros), fg.goodness(torch.zeros(2, 4, 3)), 2.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(2)) + math.log1p(math.exp(-2)))
    assert loss.item() == pytest.approx(2.2539, abs=1e-4)


def test_the_forward_forward_loss_is_a_mean_over_nodes_and_a_mean_over_graphs() -> None:
    h = torch.randn(4, 6, 5, generator=DRAW, dtype=torch.float64)
    expected = 0.0
    for node in range(6):
        for graph in range(4):
            g = sum(value**2 for value in h[graph, node].tolist())
            sign, share = (-1, 1.0) if graph == 0 else (1, 1 / 3)
            expected += share / 6 * math.log1p(math.exp(sign * (g - 1.5)))
    loud = fg.goodness(h)
    assert fg.forward_forward_loss(loud[0], loud[1:], 1.5).item() == pytest.approx(expected, rel=1e-12)


def test_edge_vectors_are_products_of_their_ends() -> None:
    h = torch.randn(5, 3, generator=DRAW)
    pairs = torch.tensor([[0, 4, 2], [1, 4, 0]])
    assert torch.equal(fg.edge_products(h, pairs), torch.stack((h[0] * h[1], h[4] * h[4], h[2] * h[0])))


def test_means_of_probabilities_are_taken_in_the_logarithm() -> None:
    edges = torch.tensor([[0.3, -2.0, 40.0], [1.0, 0.5, 45.0]], dtype=torch.float64)
    probability = edges.sigmoid().mean(0)
    assert torch.allclose(fg.mean_probability_logit(edges)[:2], probability.logit()[:2])
    assert torch.isfinite(fg.mean_probability_logit(edges * 20)).all()  # where the probability itself is rounded to 1
    classes = torch.randn(3, 4, 5, generator=DRAW)
    assert torch.allclose(fg.mean_log_softmax(classes), classes.softmax(-1).mean(0).log(), atol=1e-6)
