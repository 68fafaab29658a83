"""Nothing in the seam is about images: a graph is one batch, its edges are context, its training nodes are rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import Algorithm, Backprop, DeepSupervision, MonoForward, TaskInfo
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.nets import Blocks
from locallearn.testing import plain_loop

adam = partial(torch.optim.Adam, lr=1e-2)


class _Spread(nn.Module):
    """A x W, and a ReLU unless it is the last."""

    def __init__(self, before: int, after: int, last: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(before, after, bias=False)
        self.last = last

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = adjacency @ self.linear(x)
        return x if self.last else x.relu()


def _circles(nodes: int = 40) -> Batch:
    """Two circles; features are noise, so that only neighbours can tell the class of the many unlabelled nodes."""
    draw = torch.Generator().manual_seed(0)
    half = nodes // 2
    adjacency = torch.eye(nodes)
    for start in (0, half):
        for i in range(half):
            adjacency[start + i, start + (i + 1) % half] = adjacency[start + (i + 1) % half, start + i] = 1
    labels = (torch.arange(nodes) >= half).long()
    features = torch.randn(nodes, 8, generator=draw) + 0.7 * labels[:, None]
    mask = torch.zeros(nodes, dtype=torch.bool)
    mask[::4] = True
    return Batch(features, labels, (adjacency / adjacency.sum(1, keepdim=True),), rows=mask)


def _attached(make: Callable[[], Algorithm], batch: Batch) -> Algorithm:
    torch.manual_seed(0)
    algorithm = make()
    net = Blocks({"a": _Spread(8, 16), "b": _Spread(16, 16)}, _Spread(16, 2, last=True))
    algorithm.attach(net, TaskInfo(batch, 2, F.cross_entropy))
    return algorithm


@pytest.mark.parametrize("make", [Backprop, DeepSupervision, MonoForward])
def test_nodes_are_classified_from_their_neighbours(make: Callable[[], Algorithm]) -> None:
    batch = _circles()
    algorithm = _attached(make, batch)
    assert audit(algorithm, batch).confirmed
    plain_loop(algorithm, [batch] * 40, adam)
    right = algorithm.predict(batch.inputs, *batch.context).argmax(1) == batch.targets
    assert batch.rows is not None
    assert right[~batch.rows].float().mean() > 0.9


@pytest.mark.parametrize("make", [Backprop, DeepSupervision, MonoForward])
@pytest.mark.parametrize("index", [False, True], ids=["mask", "index"])
def test_rows_without_targets_teach_nothing(make: Callable[[], Algorithm], index: bool) -> None:
    batch = _circles()
    assert batch.rows is not None
    lies = batch._replace(targets=torch.where(batch.rows, batch.targets, 1 - batch.targets))
    if index:
        lies = lies._replace(rows=batch.rows.nonzero().flatten())
    one, other = _attached(make, batch), _attached(make, batch)
    plain_loop(one, [batch] * 3, adam)
    plain_loop(other, [lies] * 3, adam)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("make", [Backprop, DeepSupervision, MonoForward])
def test_convolutions_of_torch_geometric_are_blocks(make: Callable[[], Algorithm]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties, on import
        from torch_geometric.datasets import KarateClub
        from torch_geometric.nn import GCNConv

        data: Any = KarateClub()[0]

    class Convolution(nn.Module):
        def __init__(self, before: int, after: int) -> None:
            super().__init__()
            self.convolution = GCNConv(before, after)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            out: Tensor = self.convolution(x, edges).relu()
            return out

    torch.manual_seed(0)
    batch = Batch(data.x, data.y, (data.edge_index,), rows=data.train_mask)
    net = Blocks({"a": Convolution(34, 16), "b": Convolution(16, 16)}, GCNConv(16, 4))
    algorithm = make()
    algorithm.attach(net, TaskInfo(batch, 4, F.cross_entropy))
    plain_loop(algorithm, [batch] * 60, adam)
    right = algorithm.predict(batch.inputs, *batch.context).argmax(1) == batch.targets
    assert int(data.train_mask.sum()) == 4  # one labelled member of every community
    assert right[~data.train_mask].float().mean() > 0.6
