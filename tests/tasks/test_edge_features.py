"""Weights and features of edges: used where a convolution takes them, refused where it does not, never dropped in silence."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import ForwardGNN, MonoForward, TaskInfo
from locallearn.batch import Batch
from locallearn.functional.forward_gnn import join_virtual_nodes
from locallearn.nets import Blocks, gnn
from locallearn.strategies import LocalStrategy
from locallearn.tasks.classification import NodeClassification
from locallearn.tasks.graphs import GraphData
from locallearn.tasks.link_prediction import LinkPrediction
from locallearn.testing.loop import plain_loop
from tests.tasks.conftest import quiet_trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of third parties, on import
    from torch_geometric.data import Data
    from torch_geometric.utils import to_undirected

_adam = partial(torch.optim.Adam, lr=1e-2)
N, CLASSES = 40, 3
EDGES = to_undirected(torch.randint(N, (2, 90), generator=torch.Generator().manual_seed(0)))
WEIGHTS = torch.rand(EDGES.shape[1], generator=torch.Generator().manual_seed(1)) + 0.1


def _graph(**more: Any) -> GraphData:
    x = torch.rand(N, 8, generator=torch.Generator().manual_seed(2))
    settings = {key: more.pop(key) for key in ("edge_features", "batch_size", "fanouts") if key in more}
    return GraphData(graph=Data(x=x, y=torch.arange(N) % CLASSES, edge_index=EDGES, **more), **settings)


def _net(conv: str = "GCNConv", **more: Any) -> Blocks:
    torch.manual_seed(0)
    return gnn((8,), CLASSES, conv, (6,), **more)


@pytest.mark.parametrize("conv", ["GCNConv", "GraphConv", "TAGConv"])
def test_weights_reach_every_convolution_that_takes_them(conv: str) -> None:
    batch = _graph(edge_weight=WEIGHTS[:, None]).example()
    assert torch.equal(batch.context[1], WEIGHTS)
    net = _net(conv)
    NodeClassification(net, batch, CLASSES)
    readout: Any = net.readout
    hidden = net[0].conv(batch.inputs, EDGES, WEIGHTS).relu()  # type: ignore[operator,union-attr]
    torch.testing.assert_close(net(batch.inputs, *batch.context), readout.conv(hidden, EDGES, WEIGHTS))


def test_sorted_weights_follow_the_tensor_and_what_is_written_into_it() -> None:
    block = _net()[0]
    x, weights = torch.rand(N, 8), WEIGHTS.clone()
    for change in (1.0, 3.0):
        weights[:20] *= change
        torch.testing.assert_close(block(x, EDGES, weights), block.conv(x, EDGES, weights).relu())  # type: ignore[operator]
    other = WEIGHTS.flip(0)
    torch.testing.assert_close(block(x, EDGES, other), block.conv(x, EDGES, other).relu())  # type: ignore[operator]
    torch.testing.assert_close(block(x, EDGES), block.conv(x, EDGES).relu())  # type: ignore[operator]
    learned = WEIGHTS.clone().requires_grad_()
    block(x, EDGES, learned).sum().backward()
    assert learned.grad is not None
    with pytest.raises(ValueError, match="negative sum of weights"):
        block(x, EDGES, -WEIGHTS)


def test_features_reach_attention() -> None:
    features = torch.rand(EDGES.shape[1], 4)
    data = _graph(edge_attr=features)
    assert data.edge_dim == 4
    net, batch = _net("GATConv", edge_dim=data.edge_dim), data.example()
    NodeClassification(net, batch, CLASSES)
    hidden = net[0].conv(batch.inputs, EDGES, edge_attr=features).relu()  # type: ignore[operator,union-attr]
    torch.testing.assert_close(net[0](batch.inputs, *batch.context), hidden)
    assert not torch.allclose(net[0](batch.inputs, EDGES, 2 * features), hidden)


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize(
    ("more", "make_net", "message"),
    [
        ({"edge_weight": WEIGHTS}, lambda: _net("SAGEConv"), "SAGEConv takes no edge_weight"),
        ({"edge_weight": WEIGHTS}, lambda: _net("GINConv"), "GINConv takes no edge_weight"),
        ({"edge_weight": WEIGHTS}, lambda: _net("GATConv"), "it takes edge_attr"),
        ({"edge_attr": WEIGHTS}, lambda: _net("GCNConv"), "it takes edge_weight"),
        ({"edge_attr": WEIGHTS}, lambda: _net("GATConv"), "made for edges without features"),
        ({"edge_attr": WEIGHTS}, lambda: _net("GCNConv", edge_dim=1), "it takes edge_weight"),
        ({"edge_weight": WEIGHTS}, lambda: Blocks({"mine": _Plain()}), "block 'mine' takes .*one more argument"),
        ({"edge_weight": WEIGHTS, "edge_attr": WEIGHTS}, _net, "edge_weight, edge_attr, and a network reads"),
        ({"edge_type": torch.zeros(EDGES.shape[1]).long()}, _net, "edge_type"),
        ({"edge_weight": WEIGHTS[1:]}, _net, "one row for each of its"),
        ({"edge_weight": WEIGHTS / 0}, _net, "not finite"),
        ({"edge_weight": torch.rand(EDGES.shape[1], 3)}, _net, "a weight is one number"),
    ],
)
def test_nothing_is_dropped_in_silence(more: dict[str, Any], make_net: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        NodeClassification(make_net(), _graph(**more).example(), CLASSES)
    assert "\n" not in str(caught.value)
    assert "dataset.edge_features=false" in str(caught.value)
    batch = _graph(**more, edge_features=False).example()
    assert len(batch.context) == 1


def test_other_tensors_of_a_graph_are_named() -> None:
    with pytest.warns(UserWarning, match="the graph 'graph' has pos, which nothing here reads"):
        _graph(pos=torch.rand(N, 2)).setup()


def test_sampled_edges_bring_their_weights() -> None:
    keys = EDGES[0] * N + EDGES[1]
    data = _graph(edge_weight=keys.float() + 1, batch_size=6, fanouts=[2, 2])
    x = data.example().inputs
    for batch in data.train_dataloader():
        edges, weights = batch.context
        nodes = torch.cdist(batch.inputs, x).argmin(1)
        assert torch.equal(weights, (nodes[edges[0]] * N + nodes[edges[1]]).float() + 1)


def test_weighted_graphs_are_trained_on_from_end_to_end(tmp_path: Path) -> None:
    for settings in ({}, {"batch_size": 10, "fanouts": [3, 3]}):
        data = _graph(edge_weight=WEIGHTS, **settings)
        task = NodeClassification(_net(), data.example(), CLASSES)
        trainer = quiet_trainer(tmp_path, strategy=LocalStrategy(MonoForward(seed=0), _adam), max_epochs=2)
        trainer.fit(task, datamodule=data)
        assert trainer.test(task, datamodule=data, verbose=False)
    data = _graph(edge_weight=WEIGHTS)
    links = LinkPrediction(_net(readout=None), data.example(), outputs=6)
    trainer = quiet_trainer(tmp_path, strategy=LocalStrategy(ForwardGNN("ce", seed=0), _adam), max_epochs=2)
    trainer.fit(links, datamodule=data)
    assert trainer.test(links, datamodule=data, verbose=False)


# ForwardGNN's virtual nodes


def _trained(variant: Any, context: tuple[Tensor, ...], **settings: Any) -> tuple[ForwardGNN, list[float], Batch]:
    graph = _graph().example()
    batch = graph._replace(context=context)
    algorithm = ForwardGNN(variant, seed=0, **settings)
    net = _net(readout=None, **algorithm.net_settings)
    algorithm.attach(net, TaskInfo(batch, CLASSES, F.cross_entropy))
    losses = []
    for update in algorithm.updates(batch):
        assert update.loss is not None
        losses.append(float(update.loss.detach()))
        update.backward()
    algorithm.zero_grad()
    plain_loop(algorithm, [batch] * 3, partial(torch.optim.SGD, lr=0.1))
    return algorithm, losses, batch


@pytest.mark.parametrize("variant", ["sf", "ff_la", "ff_vn", "sf_top_to_loss"])
def test_virtual_nodes_are_joined_by_edges_of_weight_one(variant: str) -> None:
    ones = torch.ones(EDGES.shape[1])
    plain, losses, batch = _trained(variant, (EDGES,))
    weighed, same, whole = _trained(variant, (EDGES, ones))
    assert losses == pytest.approx(same, abs=1e-6)
    torch.testing.assert_close(
        plain.predict(batch.inputs, *batch.context), weighed.predict(whole.inputs, *whole.context), atol=1e-5, rtol=1e-4
    )
    for settings in ({}, {"aggregate_once": False}):
        _, other, _ = _trained(variant, (EDGES, WEIGHTS), **settings)
        assert other != pytest.approx(losses, abs=1e-6)
    assert other == pytest.approx(_trained(variant, (EDGES, WEIGHTS))[1], abs=1e-6)


def test_the_first_layer_of_a_weighted_graph_is_the_convolution_on_the_joined_graph() -> None:
    algorithm, _, batch = _trained("sf", (EDGES, WEIGHTS))
    rows = batch.rows
    assert rows is not None
    joined = join_virtual_nodes(EDGES, rows, batch.targets[rows], N)
    weights = torch.cat((WEIGHTS, torch.ones(2 * len(rows))))
    x = torch.cat((batch.inputs, algorithm.virtual))
    x = x / (x.norm(dim=1, keepdim=True) + 1e-8)
    with torch.no_grad():
        expected = algorithm.blocks[0].conv(x, joined, weights).relu()  # type: ignore[operator,union-attr]
        found = next(iter(algorithm.activations(batch.inputs, *batch.context)))
    torch.testing.assert_close(found, expected[:N], atol=1e-5, rtol=1e-4)


def test_features_of_edges_are_refused_by_a_rule_with_virtual_nodes() -> None:
    with pytest.raises(ValueError, match="joins nodes to virtual ones"):
        _trained("sf", (EDGES, torch.rand(EDGES.shape[1], 2)))
