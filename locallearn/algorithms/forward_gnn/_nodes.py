"""Kinds that classify nodes: by agreement with virtual nodes, or by loudness on graphs with right and wrong labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.algorithms.base import TaskInfo
from locallearn.algorithms.forward_gnn._checks import has_pairs
from locallearn.algorithms.forward_gnn._frame import ForwardGNN
from locallearn.algorithms.forward_gnn._views import View, joined
from locallearn.batch import Batch
from locallearn.functional import forward_gnn as fg
from locallearn.nets.graph import kept, sum_of


class Nodes(ForwardGNN):
    """Labels of nodes are shown by edges to one virtual node per class."""

    virtual: Tensor
    train_labels: Tensor

    def _note(self, task: TaskInfo) -> None:
        super()._note(task)
        if not task.classes or has_pairs(task.example):
            raise ValueError(
                f"ForwardGNN's {self.variant} classifies nodes, and this task has no classes: choose ce or ff, or a task with "
                "classes"
            )
        rows, labels = _labelled(task.example)
        if not len(rows):
            raise ValueError("no node of this graph has a training label: check the training mask")
        if int(labels.min()) < 0 or int(labels.max()) >= self.outputs:
            raise ValueError(
                f"labels of training nodes go from {int(labels.min())} to {int(labels.max())}, expected 0 to "
                f"{self.outputs - 1}: check the number of classes"
            )
        self.register_buffer("train_labels", torch.full((self._nodes,), -1).index_copy_(0, rows, labels))
        self._draw(labels, task.example.inputs.shape[1])

    def _draw(self, labels: Tensor, features: int) -> None:
        """Draw what shows labels, once."""
        self.register_buffer("virtual", torch.randn(self.outputs, features))

    @property
    def _drawn(self) -> tuple[Tensor, ...]:
        """What a view is made of beside graph and labels."""
        return (self.virtual,)

    def _training_view(self, batch: Batch) -> tuple[View, Tensor]:
        tensors = (batch.inputs, batch.targets, *batch.context, *(() if batch.rows is None else (batch.rows,)))
        rows, labels = self._kept.get("labelled", tensors, lambda: _labelled(batch))
        whole = self._kept.get("whole", tensors, lambda: self._is_whole(len(batch.inputs), rows, labels))
        return self._shown(batch, rows, labels, whole), rows

    def _is_whole(self, nodes: int, rows: Tensor, labels: Tensor) -> bool:
        """Whether a batch is the graph that the rule was attached to, with its training labels."""
        known = torch.full_like(self.train_labels, -1)
        return nodes == self._nodes and torch.equal(known.index_copy_(0, rows, labels), self.train_labels)

    def _shown(self, batch: Batch, rows: Tensor, labels: Tensor, whole: bool) -> View:
        """The right labels, and maybe wrong ones; of the whole graph kept."""
        if whole:
            return self._right_view(batch.inputs, *batch.context)
        return self._view(batch.inputs, batch.context, rows, labels[None])

    def _right_view(self, inputs: Tensor, *edges: Tensor) -> View:
        self._check_nodes(inputs)

        def make() -> View:
            rows = (self.train_labels >= 0).nonzero().flatten()
            return self._view(inputs, edges, rows, self.train_labels[rows][None])

        return self._kept.get("right", (inputs, *edges, *self._drawn), make)

    def _view(self, inputs: Tensor, edges: tuple[Tensor, ...], rows: Tensor, labels: Tensor) -> View:
        """The graph with these nodes' labels shown, one view for each row of ``labels``, ``(G, M)``."""
        index, *weights = edges
        # An edge to a virtual node weighs 1, as an edge without a weight does.
        weights = [torch.cat((w, w.new_ones(2 * len(rows)))) for w in weights]
        graphs = tuple(joined(fg.join_virtual_nodes(index, rows, shown, len(inputs)), *weights) for shown in labels)
        return View(fg.normalise(self._with_virtual(inputs)), graphs)

    def _with_virtual(self, inputs: Tensor) -> Tensor:
        return torch.cat((inputs, self.virtual.to(inputs.dtype)))

    def _check_nodes(self, inputs: Tensor) -> None:
        if len(inputs) != self._nodes:
            raise ValueError(
                f"ForwardGNN knows the labels of the {self._nodes} nodes of the graph it was attached to, and this graph has "
                f"{len(inputs)}: predict on that graph"
            )


class SingleForward(Nodes):
    """``sf``: a node's row agrees most with that of its class's virtual node."""

    variant = "sf"
    _shows = "labels in the edges to virtual nodes and in the loss"

    def _judged(self, rows: Tensor | None, nodes: int) -> Tensor | None:
        assert rows is not None
        return torch.cat((rows, torch.arange(-self.outputs, 0, device=rows.device) + nodes))

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of the agreement, from the output of all nodes, or of the loss's and the virtual ones alone."""
        assert batch.rows is not None
        return F.cross_entropy(self._class_logits(output[0], batch.rows), batch.targets[batch.rows])

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Logarithm of the mean over layers of their class probabilities, ``(N, K)``.

        Raises:
            ValueError: the graph has another number of nodes than the one attached to.
        """
        rows = torch.arange(len(inputs), device=inputs.device)
        said = self._said(self._right_view(inputs, *context), self.depth)
        return fg.mean_log_softmax(torch.stack([self._class_logits(h, rows) for h in said]))

    def _class_logits(self, h: Tensor, rows: Tensor) -> Tensor:
        # Not two slices, whose backward passes fill a tensor of zeros each.
        nodes, virtual = torch.split(h, [len(h) - self.outputs, self.outputs])
        if len(nodes) != len(rows):
            # Not nodes[rows], whose backward pass sorts the rows for the case that one comes twice.
            nodes = nodes.index_select(0, rows)
        return fg.virtual_logits(nodes, virtual, self.temperature)


class ForwardForward(Nodes):
    """``ff_vn``: loud where the edges lead to the right virtual nodes, quiet where they lead to wrong ones."""

    variant = "ff_vn"
    _shows = "labels in the edges to virtual nodes"
    known_labels: Tensor
    asked: Tensor
    negatives: Tensor

    def _draw(self, labels: Tensor, features: int) -> None:
        self._draw_wrong(labels)
        super()._draw(labels, features)

    def _draw_wrong(self, labels: Tensor) -> None:
        self.register_buffer("known_labels", self.train_labels.clone())
        self.register_buffer("asked", torch.ones(self._nodes, dtype=torch.bool))
        self.register_buffer("negatives", fg.wrong_labels(labels, self.outputs, torch.default_generator))

    def reveal(self, targets: Tensor, rows: Tensor, asked: Tensor | None = None) -> None:
        """Take these labels as known at inference.

        The nodes that are asked for show one class after the other; what is neither known nor asked for shows none.

        Raises:
            ValueError: not one target for every node of the graph.
        """
        if targets.shape != self.known_labels.shape:
            raise ValueError(
                f"labels of shape {tuple(targets.shape)} were revealed on a graph of {self._nodes} nodes: give one per node"
            )
        known = torch.full_like(self.known_labels, -1)
        known[rows] = targets[rows]
        shown = torch.full_like(self.asked, asked is None)
        if asked is not None:
            shown[asked] = True
        for mine, new in ((self.known_labels, known), (self.asked, shown)):
            if not torch.equal(mine, new):  # what was made of the old ones is kept until they change
                mine.copy_(new)

    def _shown(self, batch: Batch, rows: Tensor, labels: Tensor, whole: bool) -> View:
        def make(wrong: Tensor) -> View:
            return self._view(batch.inputs, batch.context, rows, torch.cat((labels[None], wrong)))

        if not whole:
            return make(fg.wrong_labels(labels, self.outputs, self.rng(labels.device)))
        drawn = (rows, labels, self.negatives, *self._drawn)
        return self._kept.get("training", (batch.inputs, *batch.context, *drawn), lambda: make(self.negatives))

    def _judged(self, rows: Tensor | None, nodes: int) -> Tensor | None:
        return rows

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """The Forward-Forward loss of the goodness on every view, of all nodes, or of the loss's alone."""
        assert batch.rows is not None
        rows = batch.rows
        loud = fg.goodness(output if output.shape[1] == len(rows) else output.index_select(1, rows))
        return fg.forward_forward_loss(loud[0], loud[1:], self.threshold)

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Sum over layers of the goodness when all nodes that are asked for are said to be of one class, ``(N, K)``.

        Asked for (:meth:`reveal`) are at first all whose label is not known. The scores of the others tell nothing: known
        labels stay, and where neither holds, none is shown.

        Raises:
            ValueError: the graph has another number of nodes than the one attached to.
        """
        self._check_nodes(inputs)
        known, asked = self.known_labels, self.asked

        def make() -> View:
            rows = ((known >= 0) | asked).nonzero().flatten()
            classes = torch.arange(self.outputs, device=known.device)[:, None]
            return self._view(inputs, context, rows, torch.where(known[rows] >= 0, known[rows], classes))

        view = self._kept.get("inference", (inputs, *context, known, asked, *self._drawn), make)
        return sum_of(fg.goodness(output)[:, : len(inputs)] for output in self._said_upwards(view, self.depth)).T


class LabelColumns(ForwardForward):
    """``ff_la``: the same with columns beside the features in place of virtual nodes; all views are handed on."""

    variant = "ff_la"
    _shows = "labels in the input"

    @property
    def net_settings(self) -> dict[str, Any]:
        """Room for the labels in the first block's input."""
        return {"label_inputs": True}

    def _beside(self) -> list[int]:
        return [self.outputs, *[0] * (len(self.blocks) - 1)]

    def _draw(self, labels: Tensor, features: int) -> None:
        self._draw_wrong(labels)

    @property
    def _drawn(self) -> tuple[Tensor, ...]:
        return ()

    def emit(self, index: int, output: Tensor) -> Tensor:
        """The output of every view with rows of length 1."""
        return fg.normalise(output.detach())

    def _open_view(self, inputs: Tensor, *edges: Tensor) -> View:
        nobody = torch.zeros(0, dtype=torch.int64, device=inputs.device)
        return self._view(inputs, edges, nobody, nobody[None])

    def _view(self, inputs: Tensor, edges: tuple[Tensor, ...], rows: Tensor, labels: Tensor) -> View:
        features = inputs.shape[1]
        columns = fg.label_columns(rows, labels, len(inputs), self.outputs, inputs.dtype)
        # A row is as long whichever label it shows, so that all views share the features. Columns of a row sum to 1.
        joint = fg.normalise(torch.cat((inputs, columns[0]), 1))
        scale = joint[:, features:].sum(1, keepdim=True)
        return View(joint[:, :features].contiguous(), (joined(*edges),), columns * scale)

    def _joined(self, index: int, view: int, parts: list[Tensor]) -> Tensor:
        """Of a whole graph, columns joined once are kept, and with them their sparse form."""
        join = super()._joined
        if len(parts) == 1 or not self._kept.holds(parts[0]):
            return join(index, view, parts)
        return kept(parts[1], ("joined", index, view), lambda: join(index, view, parts))


def _labelled(batch: Batch) -> tuple[Tensor, Tensor]:
    """Nodes whose labels train, in rising order, and those labels."""
    rows = batch.rows
    if rows is None:
        rows = torch.arange(len(batch.inputs), device=batch.inputs.device)
    rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows.sort().values
    return rows, batch.targets[rows]
