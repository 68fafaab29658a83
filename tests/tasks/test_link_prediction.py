"""Link prediction: the published split of the edges, the pairs that are judged, and the area under the curve."""

from __future__ import annotations

import random
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import Backprop
from locallearn.batch import Batch
from locallearn.nets import Blocks, gnn
from locallearn.strategies import LocalStrategy
from locallearn.tasks.graphs import GeneratedGraph, GraphData
from locallearn.tasks.link_prediction import LinkPrediction, _split
from tests.tasks.conftest import quiet_trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of third parties, on import
    from torch_geometric import seed_everything
    from torch_geometric.data import Data
    from torch_geometric.nn import GCNConv
    from torch_geometric.transforms import RandomLinkSplit

PARTS = ("train", "validation", "test")
_adam = partial(torch.optim.Adam, lr=1e-2)


class _Convolution(nn.Module):
    def __init__(self, before: int, after: int, last: bool = False) -> None:
        super().__init__()
        self.convolution = GCNConv(before, after)
        self.last = last

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        out: Tensor = self.convolution(x, edges)
        return out if self.last else out.relu()


def _net() -> Blocks:
    torch.manual_seed(0)
    return Blocks({"a": _Convolution(8, 16)}, _Convolution(16, 12, last=True))


@pytest.fixture(scope="module")
def data() -> GraphData:
    return GraphData(graph=GeneratedGraph(200, 8.0, features=8, classes=4, noise=1.0, seed=1), normalize="none")


def _task(data: GraphData, **settings: Any) -> LinkPrediction:
    return LinkPrediction(_net(), data.example(), outputs=12, **settings)


def _parts(task: LinkPrediction) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Edges, pairs and labels as the task keeps them."""
    edges = {"train": "train_edges", "validation": "train_edges", "test": "test_edges"}
    names = {part: (edges[part], f"{part}_pairs", f"{part}_labels") for part in PARTS}
    return {part: tuple(task.get_buffer(name) for name in names[part]) for part in PARTS}  # type: ignore[misc]


def _set(edges: Tensor) -> set[tuple[int, int]]:
    return {(min(pair), max(pair)) for pair in edges.T.tolist()}


def test_edges_are_split_into_published_shares_with_as_many_pairs_that_are_none(data: GraphData) -> None:
    edges = data.example().context[0]
    parts = _parts(_task(data))
    count = edges.shape[1] // 2
    sizes = {"validation": int(0.16 * count), "test": int(0.2 * count)}
    sizes["train"] = count - sum(sizes.values())
    judged: list[set[tuple[int, int]]] = []
    for part, (passing, pairs, labels) in parts.items():
        assert pairs.shape == (2, len(labels))
        assert int(labels.sum()) == int((1 - labels).sum()) == sizes[part]
        assert _set(pairs[:, labels == 1]) <= _set(edges)
        assert not _set(pairs[:, labels == 0]) & _set(edges)
        judged.append(_set(pairs[:, labels == 1]))
        directed = {tuple(pair) for pair in passing.T.tolist()}
        assert len(directed) == passing.shape[1] == 2 * len(_set(passing))
    assert sum(len(pairs) for pairs in judged) == len(set.union(*judged)) == count
    train, validation, _ = judged
    assert _set(parts["train"][0]) == _set(parts["validation"][0]) == train
    assert _set(parts["test"][0]) == train | validation


@pytest.mark.parametrize("split", [0, 3])
def test_split_is_that_of_torch_geometric_with_the_published_seed(data: GraphData, split: int) -> None:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_everything(101 * split)
    transform = RandomLinkSplit(is_undirected=True, num_val=0.16, num_test=0.2, neg_sampling_ratio=1.0)
    expected = transform(Data(edge_index=data.example().context[0], num_nodes=200))
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    for (passing, pairs, labels), part in zip(_parts(_task(data, split=split)).values(), expected, strict=True):
        assert torch.equal(passing, part.edge_index)
        assert torch.equal(pairs, part.edge_label_index)
        assert torch.equal(labels, part.edge_label)


def _undirected(draw: torch.Generator, nodes: int, edges: int) -> Tensor:
    """A random multigraph in both directions: loops, and edges that come any number of times, in any order."""
    ends = torch.randint(nodes, (2, edges), generator=draw)
    ends = torch.cat((ends, ends.flip(0), ends[:, : edges // 3]), 1)
    return ends[:, torch.randperm(ends.shape[1], generator=draw)]


@pytest.mark.parametrize("seed", range(6))
def test_edges_that_come_several_times_and_loops_are_in_one_part_or_none(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    nodes = int(torch.randint(20, 80, (), generator=draw))
    edges = _undirected(draw, nodes, 3 * nodes)
    parts = _split(edges, nodes, seed)
    positive = {part: [_pair(p) for p in pairs[:, labels == 1].T] for part, (_, pairs, labels) in parts.items()}
    negative = {
        part: [tuple(p.tolist()) for p in pairs[:, labels == 0].T] for part, (_, pairs, labels) in parts.items()
    }
    joined = {pair for pair in _set(edges) if pair[0] != pair[1]}
    loops = {pair for pair in _set(edges) if pair[0] == pair[1]}
    every = [pair for part in PARTS for pair in positive[part]]
    assert len(every) == len(set(every))
    assert set(every) == joined
    wrong = [pair for part in PARTS for pair in negative[part]]
    assert len(wrong) == len(set(wrong))
    assert not {_pair(torch.tensor(pair)) for pair in wrong} & (joined | {(i, i) for i in range(nodes)})
    seen = set(positive["train"])
    for part in PARTS:
        messages = parts[part][0]
        directed = [tuple(pair) for pair in messages.T.tolist()]
        assert len(directed) == len(set(directed))
        seen |= set(positive["validation"]) if part == "test" else set()
        assert _set(messages) == seen | loops
        assert not _set(messages) & set(positive["test"])


def _pair(ends: Tensor) -> tuple[int, int]:
    return int(ends.min()), int(ends.max())


def test_a_multigraph_is_split_as_its_simple_graph(data: GraphData) -> None:
    edges = data.example().context[0]
    loops = torch.arange(200).repeat(2, 1)
    wanted, found = _split(edges, 200, 2), _split(torch.cat((edges, loops, edges, edges, loops), 1), 200, 2)
    for part in PARTS:
        assert torch.equal(found[part][0], torch.cat((wanted[part][0], loops), 1))  # type: ignore[index]
        assert torch.equal(found[part][1], wanted[part][1])  # type: ignore[index]
        assert torch.equal(found[part][2], wanted[part][2])  # type: ignore[index]


def _weighted(repeats: int = 1, odd: float = 0.0) -> Batch:
    draw = torch.Generator().manual_seed(3)
    edges = _undirected(draw, 40, 120)
    keys = edges.min(0).values * 40 + edges.max(0).values
    weights = 0.1 + keys / 1600
    edges, weights = edges.repeat(1, repeats), weights.repeat(repeats)
    weights[0] += odd
    return Batch(torch.rand(40, 8, generator=draw), torch.zeros(40).long(), (edges, weights))


def test_weights_go_with_their_edges() -> None:
    torch.manual_seed(0)
    task = LinkPrediction(gnn((8,), 12, hidden=(16,)), _weighted(3), outputs=12)
    for part in ("train", "test"):
        edges, weights = task.get_buffer(f"{part}_edges"), task.get_buffer(f"{part}_weights")
        expected = 0.1 + (edges.min(0).values * 40 + edges.max(0).values) / 1600
        assert torch.equal(weights, expected)
    batch = task.info().example
    assert len(batch.context) == 2
    scores = task(batch.inputs, batch.context[0], batch.rows, batch.context[1])
    z = task.net(batch.inputs, *batch.context)
    assert batch.rows is not None
    torch.testing.assert_close(scores, (z[batch.rows[0]] * z[batch.rows[1]]).sum(1))
    assert not torch.allclose(task.net(batch.inputs, batch.context[0]), z)
    with pytest.raises(ValueError, match="come several times with different weights"):
        LinkPrediction(gnn((8,), 12, hidden=(16,)), _weighted(2, odd=0.5), outputs=12)


def test_splitting_leaves_the_global_generators_alone(data: GraphData) -> None:
    net, example = _net(), data.example()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    LinkPrediction(net, example)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_training_batches_are_pairs_of_the_training_edges_and_always_the_same(data: GraphData) -> None:
    task = _task(data)
    [raw] = data.train_dataloader()
    first, second = task.to_batch(raw), task.to_batch(raw)
    edges, pairs, labels = _parts(task)["train"]
    assert first.inputs is second.inputs is raw.inputs
    assert first.context[0] is second.context[0] is edges
    assert first.rows is second.rows is pairs
    assert first.targets is second.targets is labels
    info = task.info()
    assert (info.outputs, info.classes) == (12, False)
    assert all(torch.equal(one, other) for one, other in zip(_tensors(info.example), _tensors(first), strict=True))
    assert labels.dtype == torch.float32
    assert not [name for name in task.state_dict() if "edges" in name or "pairs" in name]


def _tensors(batch: Batch) -> list[Tensor]:
    assert batch.rows is not None
    return [batch.inputs, batch.targets, *batch.context, batch.rows]


def test_training_step_is_backpropagation_through_dot_products(data: GraphData) -> None:
    task, net = _task(data), _net()
    [raw] = data.train_dataloader()
    task.training_step(raw, 0).backward()  # type: ignore[no-untyped-call]
    edges, pairs, labels = _parts(task)["train"]
    z = net(raw.inputs, edges)
    likely = torch.sigmoid(torch.stack([z[i] @ z[j] for i, j in pairs.T.tolist()]))
    loss = -(labels * likely.log() + (1 - labels) * (1 - likely).log()).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    for ours, theirs in zip(task.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def _auc(scores: Tensor, labels: Tensor) -> float:
    """Share of pairs of an edge and a non-edge in which the edge has the higher score; ties count half."""
    difference = scores[labels == 1][:, None] - scores[labels == 0][None]
    return float(((difference > 0).double() + 0.5 * (difference == 0)).mean())


def test_figures_are_those_of_all_comparisons(data: GraphData, tmp_path: Path) -> None:
    task = _task(data)
    trainer = quiet_trainer(tmp_path, strategy=LocalStrategy(Backprop(), _adam), max_epochs=30)
    trainer.fit(task, datamodule=data)
    [validation] = trainer.validate(task, datamodule=data, verbose=False)
    [test] = trainer.test(task, datamodule=data, verbose=False)
    figures = {**validation, **test}
    for part in ("validation", "test"):
        edges, pairs, labels = _parts(task)[part]
        with torch.no_grad():
            z = task.net(data.example().inputs, edges)
        scores = (z[pairs[0]] * z[pairs[1]]).sum(1)
        assert figures[f"{part}/auc"] == pytest.approx(_auc(scores, labels), abs=1e-6)
        loss = F.binary_cross_entropy_with_logits(scores, labels)
        assert figures[f"{part}/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert figures["test/auc"] > 0.6
    assert (task.metric, task.maximise) == ("auc", True)


def test_backpropagation_under_the_strategy_is_that_of_a_plainquiet_trainer(data: GraphData, tmp_path: Path) -> None:
    weights = []
    for strategy in ("auto", LocalStrategy(Backprop(), _adam)):
        task = _task(data, optimizer=_adam)
        quiet_trainer(tmp_path, strategy=strategy, max_epochs=3).fit(task, datamodule=data)
        weights.append([p.detach().clone() for p in task.net.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


class _Scores(Backprop):
    """Scores pairs in its own way: by the distance of their numbers."""

    def score_pairs(self, inputs: Tensor, edges: Tensor, pairs: Tensor) -> Tensor:
        return -(pairs[0] - pairs[1]).abs().float()


def test_an_algorithm_may_score_pairs_itself(data: GraphData, tmp_path: Path) -> None:
    task, algorithm = _task(data), _Scores()
    trainer = quiet_trainer(tmp_path, strategy=LocalStrategy(algorithm, _adam))
    [figures] = trainer.test(task, datamodule=data, verbose=False)
    _, pairs, labels = _parts(task)["test"]
    assert figures["test/auc"] == pytest.approx(_auc(-(pairs[0] - pairs[1]).abs().float(), labels), abs=1e-6)


def test_scores_that_are_no_numbers_give_no_figure(data: GraphData) -> None:
    task = _task(data)
    with torch.no_grad():
        next(iter(task.net.parameters())).fill_(float("nan"))
    logged: dict[str, Any] = {}
    task.log_dict = lambda figures, **_: logged.update(figures)  # type: ignore[method-assign]
    task.validation_step(data.example(), 0)
    task.on_validation_epoch_end()
    assert np.isnan(logged["validation/auc"])


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([[0, 1, 2], [1, 2, 3]], "do not all come in both directions"),
        ([[], []], "0 edges"),
        ([[0, 1], [1, 0]], "without edges"),
        (
            [[i for i in range(6) for j in range(6) if i != j], [j for i in range(6) for j in range(6) if i != j]],
            "pairs",
        ),
    ],
    ids=["directed", "none", "one", "all"],
)
def test_a_graph_that_cannot_be_split_is_told_in_one_sentence(edges: list[list[int]], message: str) -> None:
    example = Batch(torch.rand(6, 8), torch.zeros(6).long(), (torch.tensor(edges, dtype=torch.int64),))
    with pytest.raises(ValueError, match=message) as caught:
        LinkPrediction(_net(), example)
    assert "\n" not in str(caught.value)


def test_wrong_arguments_get_one_sentence(data: GraphData) -> None:
    with pytest.raises(ValueError, match="use a dataset of graphs"):
        LinkPrediction(_net(), torch.zeros(2, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split is -1"):
        _task(data, split=-1)
    with pytest.raises(ValueError, match="outputs is 0"):
        LinkPrediction(_net(), data.example(), outputs=0)
    sampled = GraphData(graph=GeneratedGraph(200, 8.0, features=8, classes=4), batch_size=10, fanouts=[2])
    with pytest.raises(ValueError, match=r"leave dataset.batch_size"):
        _task(data).to_batch(next(iter(sampled.train_dataloader())))
