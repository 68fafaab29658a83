"""Data that cannot be learned from: one sentence in front of the first step, with and without LocalStrategy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from locallearn.algorithms import Backprop, ForwardForward, MonoForward
from locallearn.algorithms.base import Algorithm
from locallearn.batch import Batch
from locallearn.nets import Blocks, autoencoder
from locallearn.strategies import LocalStrategy
from locallearn.tasks.classification import Classification, NodeClassification
from locallearn.tasks.graphs import GeneratedGraph, GraphData
from locallearn.tasks.images import BatchLoader, ImageData
from locallearn.tasks.link_prediction import LinkPrediction
from locallearn.tasks.reconstruction import Reconstruction
from tests.tasks.conftest import quiet_trainer

# Lightning 2.6.6 asks torch 2.15 for it in its own loops.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You called `self.log"),
]

_adam = partial(torch.optim.Adam, lr=1e-2)
X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


def _net(norm: bool = False) -> Blocks:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), *([nn.BatchNorm1d(5)] if norm else []), nn.ReLU()]
    return Blocks({"a": nn.Sequential(*layers)}, nn.Linear(5, 3))


class _Rows(Dataset[Any]):
    """Not a TensorDataset: what is in it shows batch by batch."""

    def __init__(self, *columns: Any) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        return tuple(column[i] for column in self.columns)


class _Batches:
    """Hands these batches out."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def _later(tensor: Tensor, value: Any) -> Tensor:
    """With something wrong in the last sample only."""
    changed = tensor.clone()
    changed[-1] = value
    return changed


def _as_dict(rows: Any) -> dict[str, Tensor]:
    return {"input_ids": torch.stack([x for x, _ in rows]), "labels": torch.stack([y for _, y in rows])}


def _loader(*columns: Any, **settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*columns), 4, **settings)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "labels from 1": (lambda: _loader(X, Y + 1), "labels go from 1 to 3, expected class ids from 0 to 2 .* labels - 1"),
    "labels below 0": (lambda: _loader(X, Y - 1), "labels go from -1 to 1"),
    "a late label": (lambda: _loader(X, _later(Y, 3)), "labels go from 0 to 3"),
    "(N, 1)": (lambda: _loader(X, Y[:, None]), r"shape \(4, 1\) for 4 samples.*squeeze"),
    "one-hot": (lambda: _loader(X, nn.functional.one_hot(Y)), r"shape \(4, 3\).*argmax"),
    "float labels": (lambda: _loader(X, Y.float()), r"torch.float32 of shape \(4,\).*labels.long"),
    "a list of texts": (lambda: DataLoader(_Rows(X, ["a", "b", "c"] * 4), 4), "labels of the batch are a (tuple|list)"),
    "NaN": (lambda: _loader(_later(X, torch.nan), Y), "1 of 12 samples are not finite"),
    "infinity": (lambda: _loader(_later(X, -torch.inf), Y), "not finite"),
    "token ids": (lambda: _loader(torch.randint(9, (12, 6)), Y), "torch.int64 .* which the network does not take"),
    "float64": (lambda: _loader(X.double(), Y), "torch.float64 .* torch.float32"),
    "another width": (lambda: _loader(X[:, :4], Y), r"shape \(4,\) per sample.*shape \(6,\) by its example"),
    "complex": (lambda: _loader(X.to(torch.complex64), Y), "complex64"),
    "a dict": (lambda: _loader(X, Y, collate_fn=_as_dict), "a dict with the keys input_ids, labels"),
    "three things": (lambda: _loader(X, Y, Y), "(tuple|list) of 3 things"),
    "inputs alone": (lambda: _loader(X), "(tuple|list) of 1 things"),
    "an empty batch": (lambda: _Batches((X[:0], Y[:0])), "the batch is empty"),
    "in our own loader": (lambda: BatchLoader(X, _later(Y, 7), 4, shuffle=False), "labels go from 0 to 7"),
    "NaN in our own loader": (lambda: BatchLoader(_later(X, torch.nan), Y, 4, shuffle=True), "not finite"),
}


@pytest.mark.parametrize("local", [True, False], ids=["local", "auto"])
@pytest.mark.parametrize("wrong", list(WRONG))
def test_wrong_data_get_one_sentence_before_a_weight_moves(wrong: str, local: bool, tmp_path: Path) -> None:
    make, message = WRONG[wrong]
    task = Classification(_net(), X[:2], 3, optimizer=_adam)
    before = copy.deepcopy(task.net.state_dict())
    strategy: Any = LocalStrategy(MonoForward(seed=0), _adam) if local else "auto"
    with pytest.raises(ValueError, match=message) as caught:
        quiet_trainer(tmp_path, strategy=strategy, max_epochs=1).fit(task, make())
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in task.net.state_dict().items())


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int16])
def test_other_whole_numbers_are_labels_too(kind: torch.dtype, tmp_path: Path) -> None:
    weights = []
    for labels in (Y, Y.to(kind)):
        task = Classification(_net(), X[:2], 3)
        quiet_trainer(tmp_path, strategy=LocalStrategy(MonoForward(seed=0), _adam), max_epochs=1).fit(
            task, _loader(X, labels)
        )
        weights.append(list(task.net.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_a_stream_is_looked_at_batch_by_batch(tmp_path: Path) -> None:
    seen: list[int] = []

    class Counting(Classification):
        def training_step(self, raw: Any, batch_idx: int) -> Tensor:
            seen.append(batch_idx)
            return super().training_step(raw, batch_idx)

    task = Counting(_net(), X[:2], 3, optimizer=_adam)
    with pytest.raises(ValueError, match="labels go from 0 to 3"):
        quiet_trainer(tmp_path, max_epochs=1).fit(task, DataLoader(_Rows(X, _later(Y, 3)), 4))
    assert seen == [0, 1]


def test_validation_data_are_looked_at_too(tmp_path: Path) -> None:
    task = Classification(_net(), X[:2], 3, optimizer=_adam)
    with pytest.raises(ValueError, match="labels go from 1 to 3"):
        quiet_trainer(tmp_path, max_epochs=1).fit(task, _loader(X, Y), _loader(X, Y + 1))
    with pytest.raises(ValueError, match="not finite"):
        quiet_trainer(tmp_path).test(task, _loader(_later(X, torch.nan), Y), verbose=False)


def test_reconstruction_and_links_say_what_they_want(tmp_path: Path) -> None:
    images = torch.rand(8, 1, 8, 8)
    task = Reconstruction(autoencoder((1, 8, 8), channels=(4, 8), batch_norm=False), images[:2], optimizer=_adam)
    for loader, message in (
        (_loader(_later(images, torch.nan)), "1 of 8 samples are not finite"),
        (_loader((255 * images).byte()), "torch.uint8"),
        (_Batches({"pixels": images}), "dict with the keys pixels"),
        (_Batches(images[:0]), "the batch is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            quiet_trainer(tmp_path, max_epochs=1).fit(task, loader)
    graph = GraphData(graph=GeneratedGraph(60, 8.0, features=6, classes=3), normalize="none")
    links = LinkPrediction(_graph_net(), graph.example(), outputs=3, optimizer=_adam)
    with pytest.raises(ValueError, match=r"expected a graph, Batch\(x, y, \(edge_index,\)\)"):
        quiet_trainer(tmp_path, max_epochs=1).fit(links, _loader(X, Y))


def _graph_net(norm: bool = False) -> Blocks:
    from locallearn.nets import gnn

    torch.manual_seed(0)
    net = gnn((6,), 3, hidden=(5,))
    if norm:
        net[0].after = nn.Sequential(nn.BatchNorm1d(5), nn.ReLU())
    return net


def test_graphs_whose_labels_the_task_does_not_know_are_refused(tmp_path: Path) -> None:
    graph = GraphData(graph=GeneratedGraph(60, 8.0, features=6, classes=4), normalize="none")
    task = NodeClassification(_graph_net(), graph.example(), 3, optimizer=_adam)
    with pytest.raises(ValueError, match="labels go from 0 to 3, expected class ids from 0 to 2"):
        quiet_trainer(tmp_path, max_epochs=1).fit(task, datamodule=graph)


# Batches of one sample


def _rules() -> Iterator[tuple[Algorithm | None, bool]]:
    yield None, True
    yield Backprop(), True
    yield MonoForward(seed=0), True
    yield ForwardForward(seed=0), False  # shows the network two of everything


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("own", [True, False], ids=["our loader", "torch's"])
def test_a_last_batch_of_one_is_refused_where_the_network_cannot_take_it(case: int, own: bool, tmp_path: Path) -> None:
    algorithm, refused = list(_rules())[case]

    def fit(samples: int, norm: bool, **settings: Any) -> None:
        task = Classification(_net(norm), X[:2], 3, optimizer=_adam)
        strategy: Any = "auto" if algorithm is None else LocalStrategy(list(_rules())[case][0] or Backprop(), _adam)
        x, y = X[:samples], Y[:samples]
        loader: Any = (
            BatchLoader(x, y, 4, shuffle=False, **settings) if own else DataLoader(TensorDataset(x, y), 4, **settings)
        )
        quiet_trainer(tmp_path, strategy=strategy, max_epochs=1).fit(task, loader)

    if refused:
        with pytest.raises(ValueError, match=r"last training batch .* one sample \(batch_size=4\).*drop_last=true"):
            fit(9, norm=True)
    else:
        fit(9, norm=True)
    fit(9, norm=False)
    fit(9, norm=True, drop_last=True)
    fit(10, norm=True)


def test_maps_larger_than_one_pixel_can_be_normalised_alone(tmp_path: Path) -> None:
    net = Blocks({"a": nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten())}, nn.Linear(3 * 4, 3))
    images = torch.rand(5, 1, 4, 4)
    task = Classification(net, images[:2], 3, optimizer=_adam)
    quiet_trainer(tmp_path, max_epochs=1).fit(task, BatchLoader(images, Y[:5], 4, shuffle=False))


@pytest.mark.parametrize("kind", ["our loader", "torch's", "somebody's"])
@pytest.mark.parametrize("arguments", [{"limit_train_batches": 2}, {"limit_train_batches": 0.9}, {"max_steps": 2}])
def test_a_last_batch_of_one_that_training_never_reaches_is_not_refused(
    kind: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    class Somebodys(DataLoader[Any]):
        def batch_sizes(self) -> set[int]:
            return {4, 1}

    made: dict[str, Callable[..., Any]] = {"our loader": partial(BatchLoader, X[:9], Y[:9], 4, shuffle=False)}
    made["torch's"] = partial(DataLoader, TensorDataset(X[:9], Y[:9]), 4)
    made["somebody's"] = partial(Somebodys, TensorDataset(X[:9], Y[:9]), 4)
    for more, refused in ((arguments, False), ({"limit_train_batches": 3, "max_steps": 3}, True)):
        task = Classification(_net(norm=True), X[:2], 3, optimizer=_adam)
        strategy = LocalStrategy(MonoForward(seed=0), _adam)
        trainer = quiet_trainer(tmp_path, strategy=strategy, max_epochs=2, **more)
        with pytest.raises(ValueError, match="last training batch") if refused else nullcontext():
            trainer.fit(task, made[kind]())


def test_a_lonely_node_is_refused_only_where_a_batch_may_hold_nothing_else(tmp_path: Path) -> None:
    from torch_geometric.data import Data

    edges = torch.stack((torch.arange(20), (torch.arange(20) + 1) % 20))
    for lonely in (True, False):
        used = edges[:, edges[1] > 1] if lonely else edges
        data = Data(x=torch.rand(20, 6), y=torch.arange(20) % 3, edge_index=used)
        data.train_mask, data.val_mask, data.test_mask = (torch.arange(20) % 4 == i for i in (1, 2, 3))
        graph = GraphData(graph=data, normalize="none", batch_size=4, fanouts=[2, 2])
        task = NodeClassification(_graph_net(norm=True), graph.example(), 3, optimizer=_adam)
        if lonely:
            with pytest.raises(ValueError, match="one sample"):
                quiet_trainer(tmp_path, max_epochs=1).fit(task, datamodule=graph)
        else:
            quiet_trainer(tmp_path, max_epochs=1).fit(task, datamodule=graph)


def test_sizes_of_batches_are_told_before_there_are_any() -> None:
    assert ImageData("digits", batch_size=68).batch_sizes() == {68, 1}
    assert ImageData("digits", batch_size=68, drop_last=True).batch_sizes() == {68}
    assert BatchLoader(X, Y, 5, shuffle=False).batch_sizes() == {5, 2}
    assert BatchLoader(X, Y, 5, shuffle=False, epoch_batches=2).batch_sizes() == {5}
    assert BatchLoader(X, Y, 20, shuffle=False).batch_sizes() == {12}
    graph = GeneratedGraph(60, 8.0, features=6, classes=3)
    assert GraphData(graph=graph).batch_sizes() == {60}
    assert GraphData(graph=graph, batch_size=10, fanouts=[2]).batch_sizes() == {10, 8}
    sampled = GraphData(graph=graph, batch_size=10, fanouts=[2], drop_last=True)
    assert sampled.batch_sizes() == {10}
    assert [len(batch.rows) for batch in sampled.train_dataloader() if isinstance(batch, Batch)] == [10, 10, 10]


def test_leaving_out_the_last_batch_may_leave_nothing() -> None:
    with pytest.raises(ValueError, match="drop_last=true leaves nothing of 100 training samples in batches of 128"):
        ImageData("digits", batch_size=128, limit_train=100, drop_last=True)
    graph = GeneratedGraph(60, 8.0, features=6, classes=3)
    with pytest.raises(ValueError, match="leaves nothing of 38 training nodes"):
        GraphData(graph=graph, batch_size=50, fanouts=[2], drop_last=True).batch_sizes()
    with pytest.raises(ValueError, match="the whole graph is one batch"):
        GraphData(graph=graph, drop_last=True)


# What loaders hand out


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.linear(x.mul_(2)).relu_()


def test_the_users_own_tensors_stay_as_they_were(tmp_path: Path) -> None:
    from torch_geometric.data import Data

    x, edges = torch.rand(20, 6), torch.stack((torch.arange(20), (torch.arange(20) + 1) % 20))
    kept = x.clone(), edges.clone()
    graph = GraphData(graph=Data(x=x, y=torch.arange(20) % 3, edge_index=edges), normalize="none")
    loader = BatchLoader(x, torch.arange(20) % 3, 4, shuffle=False)
    for local in (True, False):
        for data in ({"datamodule": graph}, {"train_dataloaders": loader, "val_dataloaders": loader}):
            nodes = "datamodule" in data
            net, example = Blocks({"a": _InPlace()}, _Last()), graph.example() if nodes else x[:2]
            task = (NodeClassification if nodes else Classification)(net, example, 3, optimizer=_adam)  # type: ignore[arg-type]
            strategy: Any = LocalStrategy(MonoForward(seed=0), _adam) if local else "auto"
            trainer = quiet_trainer(tmp_path, strategy=strategy, max_epochs=2)
            trainer.fit(task, **data)  # type: ignore[arg-type]
            assert torch.equal(x, kept[0])
            assert torch.equal(edges, kept[1])


class _Last(nn.Linear):
    def __init__(self) -> None:
        super().__init__(5, 3)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return super().forward(x)
