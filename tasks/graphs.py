"""Graphs whose nodes are classified or whose edges are predicted: kept in memory and handed out as ``Batch``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from locallearn.batch import Batch
from locallearn.tasks._batches import batch_sizes
from locallearn.tasks._data import MemoryData
from locallearn.tasks._graph_files import GRAPHS, GraphFacts, graph_facts, graph_status, load_graph, quiet_geometric
from locallearn.tasks._image_files import DataMissing
from locallearn.tasks._own_graph import (
    Graph,
    check_parts,
    check_written_now,
    checked,
    load_file,
    masked_parts,
    tell_unused,
)
from locallearn.tasks._sampling import NeighbourLoader, NeighbourSampler, WholeGraph

__all__ = [
    "GRAPHS",
    "DataMissing",
    "GeneratedGraph",
    "GraphData",
    "GraphFacts",
    "NeighbourLoader",
    "NeighbourSampler",
    "WholeGraph",
    "graph_status",
    "load_graph",
    "published_split",
]

Known = Literal["train", "train+validation"]
Normalize = Literal["sum", "l2", "none"]


def published_split(nodes: int, split: int) -> dict[str, Tensor]:
    """One of the five node splits of ForwardGNN (Park et al., ICLR 2024, arXiv 2403.11004): 64, 16 and 20 % of the nodes.

    All nodes are shuffled with seed 101 and cut into five folds, the first ``nodes % 5`` of them one node larger; fold
    ``split`` is the test part. Of the others a fifth, rounded up and drawn with seed ``127 * split``, is for validation.
    For Cora_ML, CiteSeer, PubMed, Photo and GitHub these are the published splits, node for node.

    Args:
        nodes: number of nodes, at least 5.
        split: 0 to 4.

    Returns:
        Node ids of ``train``, ``validation`` and ``test``, int64, each in rising order.

    Raises:
        ValueError: fewer than 5 nodes, or there is no such split.
    """
    if nodes < 5 or not 0 <= split <= 4:
        raise ValueError(f"There is no split {split} of {nodes} nodes; the splits are 0 to 4, of at least 5 nodes.")
    order = np.arange(nodes)
    np.random.RandomState(101).shuffle(order)
    test = np.sort(np.array_split(order, 5)[split])
    rest = np.setdiff1d(np.arange(nodes), test)
    drawn = np.random.RandomState(127 * split).permutation(len(rest))
    count = -(-len(rest) // 5)
    validation, train = np.sort(rest[drawn[:count]]), np.sort(rest[drawn[count:]])
    return {
        "train": torch.from_numpy(train),
        "validation": torch.from_numpy(validation),
        "test": torch.from_numpy(test),
    }


@dataclass(frozen=True)
class GeneratedGraph:
    """A random graph of any size, to measure memory and speed on: a stochastic block model with noisy features.

    Node ``i`` has class ``i % classes``. Pairs of nodes are drawn and joined in both directions; the second end is
    of the first one's class with probability ``homophily``, else any node. Self-loops and repeated pairs are left out.
    A node's features are its class's centre, drawn from N(0, 1), plus ``noise`` times N(0, 1), over sqrt(1 + noise²).

    Args:
        nodes: number of nodes, at least one per class.
        degree: mean number of neighbours, but for the few pairs that are left out.
        features: entries of a feature vector.
        classes: number of classes.
        homophily: see above.
        noise: see above.
        seed: of all draws; the same on every machine.

    Raises:
        ValueError: for numbers that make no graph.
    """

    nodes: int = 1_000_000
    degree: float = 10.0
    features: int = 128
    classes: int = 10
    homophily: float = 0.8
    noise: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (2 <= self.classes <= self.nodes and self.features >= 1):
            raise ValueError(
                f"GeneratedGraph got nodes={self.nodes}, classes={self.classes}, features={self.features}; give at least 2"
                " classes, a node for each, and 1 feature."
            )
        if not (self.degree > 0 and 0 <= self.homophily <= 1 and self.noise >= 0):
            raise ValueError(
                f"GeneratedGraph got degree={self.degree}, homophily={self.homophily}, noise={self.noise}; give a degree"
                " above 0, a homophily from 0 to 1 and a noise of at least 0."
            )

    def data(self) -> Any:
        """Make the graph, a ``torch_geometric.data.Data`` with ``x``, ``y`` and ``edge_index``."""
        draw = torch.Generator().manual_seed(self.seed)
        labels = torch.arange(self.nodes) % self.classes
        pairs = round(self.nodes * self.degree / 2)
        one = torch.randint(self.nodes, (pairs,), generator=draw)
        other = torch.randint(self.nodes, (pairs,), generator=draw)
        alike = torch.rand(pairs, generator=draw) < self.homophily
        # The nearest node of the wanted class, from above where there is none below.
        same = other - (other - one) % self.classes
        same = torch.where(same < 0, same + self.classes, same)
        other = torch.where(alike, same, other)
        keys = torch.minimum(one, other) * self.nodes + torch.maximum(one, other)
        keys = torch.unique(keys[one != other])
        low, high = keys // self.nodes, keys % self.nodes
        edges = torch.stack((torch.cat((low, high)), torch.cat((high, low))))
        centres = torch.randn(self.classes, self.features, generator=draw)
        x = torch.randn(self.nodes, self.features, generator=draw).mul_(self.noise)
        x.add_(centres[labels]).div_((1 + self.noise**2) ** 0.5)
        with quiet_geometric() as geometric:
            return geometric.data.Data(x=x, y=labels, edge_index=edges)


class GraphData(MemoryData):
    """One graph with training, validation and test nodes, for a Lightning ``Trainer`` or a plain loop.

    A batch is the whole graph, ``Batch(x, y, (edge_index,), rows)``, once per epoch and always of the same tensors, which
    lie on the Trainer's device. ``rows`` are the ids of the nodes whose labels the part may see; all other labels in it
    are -1, so that no rule can learn from what it is judged by.

    With ``batch_size`` and ``fanouts`` training batches are sampled neighbourhoods instead
    (:class:`~locallearn.tasks.graphs.NeighbourLoader`); validation and test still see the whole graph.

    Parts: of ``planetoid_*`` the public masks; of ``karate_club`` its four training nodes, the others in turn for
    validation and test; of graphs of one's own the masks ``train_mask``, ``val_mask`` and ``test_mask``, of which a
    matrix ``(N, splits)`` holds one split per column; of everything else :func:`published_split`.

    Where the edges of a graph of one's own carry weights or features, these come after the edge index,
    ``Batch(x, y, (edge_index, carried), rows)``: ``edge_weight`` as ``(E,)``, ``edge_attr`` as ``(E, D)``.

    Args:
        name: one of ``GRAPHS``; or else give ``graph`` or ``path``.
        data_dir: folder that holds ``graphs/``; ``None`` means ``default_data_dir()``.
        graph: a graph of one's own: ``torch_geometric.data.Data``, a dataset of torch_geometric that holds one, or a
            :class:`GeneratedGraph`.
        path: a file that ``torch.save`` made of a ``Data``.
        split: which split.
        normalize: of every node's features: ``sum`` scales them to sum 1, after the smallest of all is taken off if it
            is negative, ``l2`` to length 1, ``none`` leaves them; rows of zeros stay.
        batch_size: training nodes in a sampled batch; ``None`` trains on the whole graph.
        fanouts: neighbours that every node of a sampled batch draws, hop after hop, one hop per layer; -1 takes all.
        drop_last: leave out an epoch's last sampled batch if it is smaller.
        edge_features: hand out ``edge_weight`` or ``edge_attr`` where the graph has one; ``False`` leaves them aside.
        seed: of the order of sampled batches and their draws.

    Attributes:
        name: as given; of a graph of one's own ``path``'s stem, or ``graph``.
        shape: of one node's features, ``(F,)``; known before ``setup`` for ``GRAPHS`` and generated graphs, else read.
        classes: number of classes, likewise.

    Raises:
        ValueError: for an unknown name, a number that is out of range, or settings that do not go together.
    """

    def __init__(
        self,
        name: str | None = None,
        data_dir: Path | str | None = None,
        *,
        graph: Any = None,
        path: Path | str | None = None,
        split: int = 0,
        normalize: Normalize = "sum",
        batch_size: int | None = None,
        fanouts: Sequence[int] | None = None,
        drop_last: bool = False,
        edge_features: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if sum(given is not None for given in (name, graph, path)) != 1:
            raise ValueError(
                f"GraphData got name={name!r}, {'a' if graph is not None else 'no'} graph and path={path!r}: give one of"
                " the three."
            )
        self._facts = None if name is None else graph_facts(name)
        splits = 1 if name is not None and (name == "karate_club" or name.startswith("planetoid")) else 5
        if split < 0 or (name is not None and split >= splits):
            choice = f"0 to {splits - 1}" if splits > 1 else "0, the only one there is"
            raise ValueError(f"split={split} is out of range; give {choice}.")
        if normalize not in get_args(Normalize):
            raise ValueError(f"normalize={normalize!r} is unknown; choose {', '.join(get_args(Normalize))}.")
        if (batch_size is None) != (fanouts is None):
            raise ValueError(
                f"batch_size={batch_size} and fanouts={fanouts} go together: give both to train on sampled neighbourhoods,"
                " or neither to train on the whole graph."
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is out of range; give at least 1.")
        if drop_last and batch_size is None:
            raise ValueError(
                "drop_last=true leaves out a last batch that is smaller, but the whole graph is one batch: give batch_size and"
                " fanouts, or leave drop_last out."
            )
        if fanouts is not None and (not fanouts or any(fanout < 1 and fanout != -1 for fanout in fanouts)):
            raise ValueError(
                f"fanouts={list(fanouts)} is out of range; give a number of neighbours for every layer, of at least 1, or -1"
                " for all."
            )
        if seed < 0:
            raise ValueError(f"seed={seed} is out of range; give at least 0.")
        self.name: str = name or (Path(path).stem if path is not None else "graph")
        self._given: Any = graph
        self._data_dir, self._path = data_dir, path
        self._split, self._normalize = split, normalize
        self._batch_size, self._fanouts, self._seed = batch_size, fanouts, seed
        self._drop_last, self._edge_features = drop_last, edge_features
        self._graph: Graph | None = None
        self._tensors: dict[torch.device, tuple[Tensor, ...]] = {}
        self._batches: dict[tuple[str, torch.device], Batch] = {}
        self._sampler: NeighbourSampler | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one node's features, ``(F,)``."""
        known = self._known_before_reading()
        return (self._whole().x.shape[1] if known is None else known.features,)

    @property
    def classes(self) -> int:
        """Number of classes."""
        known = self._known_before_reading()
        return int(self._whole().y.max()) + 1 if known is None else known.classes

    @property
    def edge_dim(self) -> int | None:
        """Features of an edge; ``None``: edges carry none, or weights."""
        if self._known_before_reading() is not None:
            return None
        carried = self._whole().carried
        return carried.shape[1] if carried is not None and carried.dim() == 2 else None

    def setup(self, stage: str | None = None) -> None:
        """Read and check the graph once, for all stages.

        Raises:
            DataMissing: when files are missing and cannot be downloaded.
            ValueError: when files are damaged, or the graph cannot be learned from; the sentence says why.
        """
        if stage == "fit":
            self._train_loader = None
        self._whole()

    def train_dataloader(self) -> WholeGraph | NeighbourLoader:
        """The graph with the labels of its training nodes, or sampled neighbourhoods of them."""
        if self._batch_size is None or self._fanouts is None:
            return WholeGraph(self._batch("train"))
        batch = self._batch("train")
        assert batch.rows is not None
        if self._sampler is None:
            self._sampler = NeighbourSampler(self._whole().edges, len(batch.inputs), self._fanouts)
        loader = NeighbourLoader(
            batch.inputs,
            batch.targets,
            batch.rows,
            self._sampler,
            self._batch_size,
            self._seed,
            self._epoch_batches(len(batch.rows), self._batch_size, self._drop_last),
            drop_last=self._drop_last,
            carried=batch.context[1] if len(batch.context) > 1 else None,
        )
        return self._placed(loader)

    def batch_sizes(self) -> set[int]:
        """How many training nodes there are in an epoch's sampled batches, or the nodes of the whole graph; reads the data.

        Raises:
            ValueError: there is no batch.
        """
        nodes = len(self._whole().parts["train"])
        if self._batch_size is None:
            return {len(self._whole().x)}
        sizes = batch_sizes(nodes, self._batch_size, self._drop_last)
        if not sizes:
            raise ValueError(
                f"drop_last=true leaves nothing of {nodes} training nodes in batches of {self._batch_size}; give a smaller"
                " batch_size, or drop_last=false."
            )
        return sizes

    def val_dataloader(self) -> WholeGraph:
        """The graph with the labels of its validation nodes."""
        return WholeGraph(self._batch("validation"))

    def test_dataloader(self) -> WholeGraph:
        """The graph with the labels of its test nodes."""
        return WholeGraph(self._batch("test"))

    def example(self) -> Batch:
        """The whole graph with the labels of its training nodes, on the CPU; reads the data."""
        return self._batch("train", torch.device("cpu"))

    def known(self, part: Known) -> tuple[Tensor, Tensor]:
        """Labels that inference may use, for :meth:`locallearn.algorithms.ForwardGNN.reveal`.

        Args:
            part: ``train``: those of the training nodes; ``train+validation``: those of the validation nodes, too.

        Returns:
            Class ids ``(N,)``, -1 where they are not to be known, and the ids of the nodes whose labels are; always the
            same tensors, on the Trainer's device.

        Raises:
            ValueError: for another part.
        """
        if part not in get_args(Known):
            raise ValueError(f"part={part!r} is unknown; choose {' or '.join(get_args(Known))}.")
        batch = self._batch(part)
        assert batch.rows is not None
        return batch.targets, batch.rows

    def _known_before_reading(self) -> GraphFacts | GeneratedGraph | None:
        return self._given if isinstance(self._given, GeneratedGraph) else self._facts

    def _whole(self) -> Graph:
        if self._graph is None:
            with quiet_geometric():
                data = self._read()
            check_written_now(data, self.name)
            x, y, edges, carried = checked(data, self.name, self._edge_features)
            parts = self._parts(data, len(x))
            check_parts(parts, y, self.name)
            if self._known_before_reading() is None:
                tell_unused(data, self.name)
            self._graph = Graph(_normalised(x, self._normalize), y, edges, carried, parts)
        return self._graph

    def _read(self) -> Any:
        if self._facts is not None:
            return load_graph(self.name, self._data_dir)
        if self._path is not None:
            return load_file(Path(self._path).expanduser())
        if isinstance(self._given, GeneratedGraph):
            return self._given.data()
        from torch_geometric.data import Data, Dataset

        if isinstance(self._given, Data):
            return self._given
        # A dataset of one graph passes for that graph, but not in everything.
        if hasattr(self._given, "edge_index") and not isinstance(self._given, Dataset):
            return self._given
        if not hasattr(self._given, "num_node_features") or len(self._given) != 1:
            raise ValueError(
                f"graph is {type(self._given).__name__}, expected a torch_geometric Data, a dataset that holds exactly one,"
                " or a GeneratedGraph."
            )
        return self._given[0]

    def _parts(self, data: Any, nodes: int) -> dict[str, Tensor]:
        if self.name == "karate_club" and self._facts is not None:
            rest = (~data.train_mask).nonzero().squeeze(1)
            return {"train": data.train_mask.nonzero().squeeze(1), "validation": rest[::2], "test": rest[1::2]}
        parts = masked_parts(data, nodes, self._split, self.name)
        return published_split(nodes, self._split) if parts is None else parts

    def _labels(self, part: str) -> Tensor:
        """Class ids of a part (or parts, joined by a plus), -1 elsewhere."""
        graph, rows = self._whole(), self._rows(part)
        return torch.full_like(graph.y, -1).index_copy_(0, rows, graph.y[rows])

    def _rows(self, part: str) -> Tensor:
        return torch.cat([self._whole().parts[name] for name in part.split("+")]).sort().values

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Features, edges, and what they carry, once per device."""
        if device not in self._tensors:
            graph = self._whole()
            kept = (graph.x, graph.edges) if graph.carried is None else (graph.x, graph.edges, graph.carried)
            self._tensors[device] = tuple(tensor.to(device) for tensor in kept)
        return self._tensors[device]

    def _batch(self, part: str, device: torch.device | None = None) -> Batch:
        device = self._device() if device is None else device
        if (part, device) not in self._batches:
            x, *context = self._on(device)
            self._batches[part, device] = Batch(
                x, self._labels(part).to(device), tuple(context), rows=self._rows(part).to(device)
            )
        return self._batches[part, device]


def _normalised(x: Tensor, how: Normalize) -> Tensor:
    if how == "none":
        return x
    if how == "sum":
        x = x - x.min().clamp(max=0)
    size = x.sum(1, keepdim=True) if how == "sum" else torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(size > 0, size, 1.0)
