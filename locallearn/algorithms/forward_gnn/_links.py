"""Kinds that predict edges: from products of the two ends' rows, without labels in the graph."""

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


class Links(ForwardGNN):
    """``ce``: cross entropy of Σ h_i h_j."""

    variant = "ce"
    _shows = "edge labels in the loss"

    def _note(self, task: TaskInfo) -> None:
        super()._note(task)
        if task.classes or not has_pairs(task.example):
            raise ValueError(
                f"ForwardGNN's {self.variant} predicts edges, and this task has classes: choose sf, ff_la or ff_vn, or links"
            )

    def _training_view(self, batch: Batch) -> tuple[View, Tensor | None]:
        whole = len(batch.inputs) == self._nodes
        return (self._right_view if whole else _plain_view)(batch.inputs, *batch.context), batch.rows

    def _right_view(self, inputs: Tensor, *edges: Tensor) -> View:
        return self._kept.get("right", (inputs, *edges), lambda: _plain_view(inputs, *edges))

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """Of the edges and the pairs that are none."""
        assert batch.rows is not None
        return self._pair_loss(self._logits(fg.edge_products(output[0], batch.rows)), batch.targets)

    def _logits(self, products: Tensor) -> Tensor:
        return products.sum(1)

    def _pair_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """The outputs of all layers side by side, ``(N, Σ d)``."""
        return torch.cat(self._said(self._right_view(inputs, *context), self.depth)[-self.depth :], 1)

    def score_pairs(self, inputs: Tensor, edges: Tensor, pairs: Tensor, *weights: Tensor) -> Tensor:
        """See :meth:`ForwardGNN.score_pairs`."""
        said = self._said(self._right_view(inputs, edges, *weights), self.depth)
        return fg.mean_probability_logit(torch.stack([self._logits(fg.edge_products(h, pairs)) for h in said]))


class LoudLinks(Links):
    """``ff``: the Forward-Forward loss of Σ (h_i h_j)²."""

    variant = "ff"

    def _logits(self, products: Tensor) -> Tensor:
        return products.square().sum(1) - self.threshold

    def _pair_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        true = targets > 0.5
        return fg.forward_forward_loss(logits[true], logits[~true], threshold=0.0)  # θ is in the logits


def _plain_view(inputs: Tensor, *edges: Tensor) -> View:
    return View(fg.normalise(inputs), (joined(*edges),))
