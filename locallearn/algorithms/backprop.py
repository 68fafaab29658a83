"""The control: backpropagation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.algorithms._segments import Checkpoint, Segments, segments
from locallearn.algorithms._selection import By, LastLosses, Selection, rows_of, sample_losses
from locallearn.algorithms.base import Algorithm, Locality, ParamGroup, TaskInfo, Update, output_layer, selected
from locallearn.algorithms.dry_run import dry_run
from locallearn.batch import Batch
from locallearn.losses._of_torch import divisor
from locallearn.nets.blocks import width_of


class Backprop(Algorithm):
    """Plain backpropagation of the task's loss through the whole network: the baseline of every comparison.

    Its weights are bit-equal to those of the same LightningModule under ``Trainer(strategy="auto")``; running it as an
    algorithm gives it the same instruments as the others.

    The two ways to pay for its memory with work or with smaller batches are controls of every claim about memory:

    * activation checkpointing (Chen et al. 2016, arXiv 1604.06174): the network is cut into segments of blocks, and what is
      inside of all but the last one is computed again for the backward pass. Nothing else changes: weights, statistics of
      normalisation and draws are bit-equal.
    * gradient accumulation: the batch passes in equal parts, one after another. The gradient is that of the whole batch
      up to rounding, however the parts come out; but a layer that looks across the batch (BatchNorm) sees each part by
      itself, moves its statistics with each, and makes another function of the network, and dropout draws otherwise.

    Learning from a part of every batch is the control of local rules that pass on a part (``keep`` of
    :class:`~locallearn.algorithms.LocalHeads`). Which samples are hard is not known before the network has run, so they are
    ranked by the loss that each had when it was last learned from; those that never were come first.

    Args:
        seed: of a random choice; nothing else is drawn.
        checkpoint: ``None``: keep everything; ``"auto"``: the segments with the fewest peak bytes; a number: so many segments,
            the best of their kind; or the names of the blocks after which a segment ends.
        accumulate: parts of a batch, at least 1; a batch with fewer samples passes one by one.
        keep: share of every batch that is learned from; 1: all of it.
        keep_by: ``loss``: the samples whose last loss was largest, for which batches must say which samples they hold
            (:attr:`Batch.places <locallearn.batch.Batch.places>`); ``random``: any.

    Raises:
        ValueError: when attached, where there is no such block, or where a batch cannot be split (a graph).
    """

    def __init__(
        self,
        seed: int = 0,
        checkpoint: Checkpoint | None = None,
        accumulate: int = 1,
        keep: float = 1.0,
        keep_by: By = "loss",
    ) -> None:
        super().__init__(seed)
        self.selection = Selection(keep, keep_by)
        if type(accumulate) is not int or accumulate < 1:
            raise ValueError(f"accumulate is {accumulate}, expected a whole number of parts of at least 1")
        self._checkpoint, self._parts = checkpoint, accumulate

    @property
    def locality(self) -> Locality:
        """Global."""
        return Locality.GLOBAL

    @property
    def carries(self) -> bool:
        """Whatever crosses the borders."""
        return True

    @property
    def broadcast(self) -> str:
        """The error goes backward through every layer."""
        return "the error, through every transposed weight"

    @property
    def variant(self) -> str | None:
        """How memory is saved, and what is learned from, where it is not all."""
        told = [] if self._checkpoint is None else [f"checkpoint={_written(self._checkpoint)}"]
        told += [f"accumulate={self._parts}"] if self._parts > 1 else []
        told += [f"keep={self.selection.keep:g}", f"keep_by={self.selection.by}"] if self.selection else []
        return ", ".join(told) or None

    @property
    def checkpoints(self) -> list[str]:
        """Names of the blocks after which a segment ends, as they were asked for or chosen."""
        return [] if self._segments is None else [self.blocks.names[cut] for cut in self._segments.cuts]

    def build(self, task: TaskInfo) -> None:
        """Add nothing."""
        *_, given = dry_run(self.blocks, task.example, task)  # refuses a network that cannot take the data
        # Where no layer could be kept apart, the blocks may give the outputs themselves.
        if self.blocks.readout is None and width_of(given) != task.outputs:
            output_layer(self.blocks, "backpropagation")
        if self._parts > 1 and (task.example.context or task.example.rows is not None):
            raise ValueError(
                f"accumulate is {self._parts}, but a graph is one batch whose nodes see one another: it cannot pass in parts"
            )
        self.selection.check(task)
        self.last_losses = LastLosses() if self.selection.ranks else None
        self._loss = task.loss
        self._segments: Segments | None = None
        if self._checkpoint is not None:
            self._segments = segments(self.blocks, self._checkpoint, task.example)

    def units(self) -> dict[str, list[ParamGroup]]:
        """One unit: the network."""
        return {"network": [{"params": list(self.blocks.parameters())}]}

    def _forward(self, inputs: Tensor, *context: Any) -> Tensor:
        output: Tensor = (self._segments or self.blocks)(inputs, *context)
        return output

    def learned_from(self, unit: str, samples: int) -> int:
        """The part that is chosen."""
        return self.selection.count(samples)

    def updates(self, batch: Batch) -> Iterator[Update]:
        """The task's loss on the network's output; of a batch in parts its gradients, which are summed here."""
        batch = self._chosen(batch)

        def loss() -> Tensor:
            return self._lost(batch)

        if self._parts == 1:
            yield Update("network", loss(), again=loss)
        else:
            yield Update("network", *self._accumulated(batch))

    def _chosen(self, batch: Batch) -> Batch:
        """What of a batch is learned from."""
        if not self.selection:
            return batch
        losses = None if self.last_losses is None else self.last_losses.of(batch)
        return rows_of(batch, self.selection.choose(len(batch.inputs), losses, self.rng(batch.inputs.device)))

    def _lost(self, batch: Batch) -> Tensor:
        """The task's loss; what every sample costs is kept where samples are ranked by it."""
        scores, targets = selected(batch, self._forward(batch.inputs, *batch.context))
        if self.last_losses is not None:
            self.last_losses.note(batch, sample_losses(self._loss, scores, targets))
        return self._loss(scores, targets)

    def _accumulated(self, batch: Batch) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """Loss and gradients of the whole batch, of which one part after another is run and differentiated."""
        rows = len(batch.inputs)
        aside = {p: p.grad for p in self.blocks.parameters() if p.requires_grad}
        for p in aside:
            p.grad = None
        losses, whole = [], divisor(self._loss, batch.targets)
        for places in torch.arange(rows).tensor_split(min(self._parts, rows)):
            part = rows_of(batch, slice(int(places[0]), int(places[-1]) + 1))
            loss, counts = self._lost(part), divisor(self._loss, part.targets)
            if whole is None or counts is None:
                loss = loss * (len(places) / rows)
            else:  # of a part without labels the mean is not a number; nothing flows back from it
                loss = torch.where(counts > 0, loss * counts / whole, 0.0)
            if loss.requires_grad:
                torch.autograd.backward(loss)
            losses.append(loss.detach())
            torch.clear_autocast_cache()  # else the next part would use casts whose graph has been freed
        gradients = {p: p.grad for p in aside if p.grad is not None}
        for p, before in aside.items():
            p.grad = before
        return torch.stack(losses).sum(), gradients


def _written(checkpoint: Checkpoint) -> str:
    return str(checkpoint) if isinstance(checkpoint, str | int) else f"[{','.join(checkpoint)}]"
