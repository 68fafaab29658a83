"""Link prediction: which pairs of nodes are joined, area under the ROC curve."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from locallearn.algorithms.base import TaskInfo, selected
from locallearn.batch import Batch
from locallearn.nets.blocks import Blocks
from locallearn.nets.graph import check_edge_features
from locallearn.tasks._checks import check_inputs
from locallearn.tasks._graph_files import quiet_geometric
from locallearn.tasks._task import Task

Part = Literal["train", "validation", "test"]


class LinkPrediction(Task):
    """Tell the edges of an undirected graph from pairs that are not joined: cross entropy and area under the ROC curve.

    The edges are split into 64 % for training, 16 % for validation and 20 % for the test, each part with as many pairs
    that are not joined, drawn once: ``RandomLinkSplit`` of torch_geometric after all generators were seeded with
    ``101 * split``, ForwardGNN's recipe (Park et al., ICLR 2024, arXiv 2403.11004). Messages pass along the training edges;
    in the test, as that transform has it, along those for validation too. An edge that comes several times is split as one,
    and a loop is no edge to predict: messages pass along it in every part. Directed graphs are refused.

    Batches from the data module are whole graphs, of which only the features are used. A training batch is
    ``Batch(x, labels, (edges,), rows)`` with ``rows`` the pairs ``(2, M)`` and ``labels`` ``(M,)``, 1 for an edge and 0 for
    none; weights or features of the edges stand behind them in the context, ``(edges, weights)``. Pairs are scored by
    ``algorithm.score_pairs(x, edges, pairs, *weights)``, logits ``(M,)``, where the algorithm has it, else by the dot product
    of its outputs for both nodes.

    Args:
        net: the network; its output is an embedding of every node, ``(N, outputs)``.
        example: the whole graph, with all its edges as context.
        outputs: width of the embedding.
        split: which split of the edges, at least 0; published are 0 to 4.
        optimizer: makes the optimizer of the backpropagation baseline from parameters; unused under ``LocalStrategy``,
            which brings its own.
        scheduler: makes its learning rate scheduler, advanced every epoch.

    Raises:
        ValueError: the example is no graph, its edges are too few or not undirected, or a number is out of range; later,
            a batch that is not the whole graph.
    """

    metric = "auc"
    maximise = True

    def __init__(
        self,
        net: Blocks,
        example: Batch,
        outputs: int = 128,
        split: int = 0,
        optimizer: Callable[[Any], Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__(net, optimizer, scheduler)
        if outputs < 1 or split < 0:
            raise ValueError(f"outputs is {outputs} and split is {split}, expected at least 1 and 0")
        if not isinstance(example, Batch) or len(example.context) not in (1, 2):
            raise ValueError(
                "link prediction needs a graph, whose edges are the batch's context: use a dataset of graphs"
            )
        check_edge_features(net, example.context)
        edges, *carried = example.context
        self._inputs = example.inputs
        self._outputs = outputs
        # Buffers, so that they follow the module to its device; not in checkpoints, because the split makes them again.
        for part, (messages, pairs, labels) in _split(edges, len(example.inputs), split).items():
            if part != "validation":  # there messages pass along the training edges
                self.register_buffer(f"{part}_edges", messages, persistent=False)
                weights = _carried(messages, edges, carried[0], len(example.inputs)) if carried else None
                self.register_buffer(f"{part}_weights", weights, persistent=False)
            self.register_buffer(f"{part}_pairs", pairs, persistent=False)
            self.register_buffer(f"{part}_labels", labels, persistent=False)

    @override
    def info(self) -> TaskInfo:
        """Shapes and loss, for an algorithm; the example is the training batch."""
        example = self._batch("train", self._inputs)
        return TaskInfo(example, self._outputs, F.binary_cross_entropy_with_logits, classes=False)

    @override
    def to_batch(self, raw: Any) -> Batch:
        """The training batch of the graph that the data module gives; always the same tensors.

        Raises:
            ValueError: it is not the whole graph.
        """
        return self._batch("train", _graph_of(raw).inputs)

    @override
    def forward(self, inputs: Tensor, edges: Tensor, pairs: Tensor, *weights: Tensor) -> Tensor:
        """Logits ``(M,)`` that pairs are joined: the algorithm's own inference, or dot products of the network's output."""
        score: Callable[..., Tensor] | None = getattr(self.algorithm, "score_pairs", None)
        if score is not None:
            return score(inputs, edges, pairs, *weights)
        outputs = self.infer(inputs, edges, *weights)
        return selected(Batch(inputs, pairs, (edges,), rows=pairs), outputs)[0]

    @override
    def validation_step(self, raw: Any, batch_idx: int) -> None:
        self._add(self.judge(self._batch("validation", _graph_of(raw).inputs)))

    @override
    def test_step(self, raw: Any, batch_idx: int) -> None:
        self._add(self.judge(self._batch("test", _graph_of(raw).inputs)))

    def _batch(self, part: Part, inputs: Tensor) -> Batch:
        if inputs.shape != self._inputs.shape:
            raise ValueError(
                f"link prediction got features of shape {tuple(inputs.shape)} of a graph of {tuple(self._inputs.shape)}: it"
                " trains on the whole graph, so leave dataset.batch_size and dataset.fanouts out"
            )
        pairs, labels = self.get_buffer(f"{part}_pairs"), self.get_buffer(f"{part}_labels")
        # In validation the very tensor of training: what a rule keeps for a graph is looked up by it.
        passed = "test" if part == "test" else "train"
        weights = getattr(self, f"{passed}_weights")
        edges = self.get_buffer(f"{passed}_edges")
        return Batch(inputs, labels, (edges,) if weights is None else (edges, weights), rows=pairs)

    @override
    def judge(self, batch: Batch) -> Tensor:
        """One, the area under the ROC curve, and the cross entropy: a graph comes in one batch."""
        # Imported here: scikit-learn takes a second to load.
        from sklearn.metrics import roc_auc_score

        edges, *weights = batch.context
        scores, labels = self(batch.inputs, edges, batch.rows, *weights).float(), batch.targets.float()
        known = bool(scores.isfinite().all())
        auc = roc_auc_score(labels.cpu().numpy(), scores.cpu().numpy()) if known else float("nan")
        loss = F.binary_cross_entropy_with_logits(scores, labels)
        return torch.stack((loss.new_ones(()), loss.new_tensor(float(auc)), loss))

    @override
    def figures(self, sums: list[float]) -> dict[str, float]:
        """Area under the ROC curve, and cross entropy."""
        passes, auc, loss = sums
        return {"auc": auc / passes, "loss": loss / passes}


def _graph_of(raw: Any) -> Batch:
    if not isinstance(raw, Batch):
        raise ValueError(
            f"the batch is a {type(raw).__name__}, expected a graph, Batch(x, y, (edge_index,)): use a dataset of graphs"
        )
    check_inputs(raw.inputs)
    return raw


def _split(edges: Tensor, nodes: int, split: int) -> dict[Part, tuple[Tensor, Tensor, Tensor]]:
    """Edges that messages pass along ``(2, E)``, pairs ``(2, M)`` and labels ``(M,)`` of every part.

    The split is that of the simple graph: what comes several times counts once, where it comes first, and loops are no
    edges to predict. Messages pass along them in every part, once each.
    """
    simple = edges.cpu()[:, _firsts(edges.cpu(), nodes)[0]]
    loops = simple[:, simple[0] == simple[1]]
    simple = simple[:, simple[0] != simple[1]]
    with quiet_geometric() as geometric, _seeded(101 * split):
        graph = geometric.data.Data(edge_index=simple, num_nodes=nodes)
        if simple.shape[1] == 0 or graph.is_directed():
            raise ValueError(
                f"link prediction needs an undirected graph, and this one's {simple.shape[1]} edges do not all come in both"
                " directions (loops do not count): make them so with torch_geometric.utils.to_undirected"
            )
        transform = geometric.transforms.RandomLinkSplit(
            num_val=0.16, num_test=0.2, is_undirected=True, neg_sampling_ratio=1.0
        )
        parts = transform(graph)
    found: dict[Part, tuple[Tensor, Tensor, Tensor]] = {}
    names: tuple[Part, ...] = ("train", "validation", "test")
    for name, part in zip(names, parts, strict=True):
        if len(part.edge_label.unique()) < 2:
            raise ValueError(
                f"link prediction got {simple.shape[1] // 2} edges between {nodes} nodes, which leave its {name} part without"
                " edges or without pairs that are not joined: use a larger graph"
            )
        found[name] = (torch.cat((part.edge_index, loops), 1), part.edge_label_index, part.edge_label)
    return found


def _firsts(edges: Tensor, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of edges of which some may come several times, each direction by itself.

    Returns:
        Places where each one comes first, in rising order; the sorted keys ``source * nodes + target`` of all that there
        are; and the place where each of these comes first.
    """
    keys, inverse = torch.unique(edges[0] * nodes + edges[1], return_inverse=True)
    places = torch.arange(edges.shape[1], device=edges.device)
    first = torch.full_like(keys, edges.shape[1]).scatter_reduce_(0, inverse, places, "amin")
    return first.sort().values, keys, first


def _carried(messages: Tensor, edges: Tensor, carried: Tensor, nodes: int) -> Tensor:
    """Weights or features of the edges that messages pass along, from those of the graph's own edges.

    Raises:
        ValueError: an edge comes several times and carries different ones.
    """
    _, keys, first = _firsts(edges, nodes)
    of_first = carried[first[torch.searchsorted(keys, edges[0] * nodes + edges[1])]]
    if not torch.equal(of_first, carried):
        raise ValueError(
            "link prediction takes every edge once, and this graph has edges that come several times with different weights or "
            "features: merge them with torch_geometric.utils.coalesce, or set dataset.edge_features=false"
        )
    return carried[first[torch.searchsorted(keys, messages[0] * nodes + messages[1])]]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators that torch_geometric draws from, and put them back afterwards."""
    state, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)
