"""Classification: one label per sample (or per selected row), cross entropy, accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from locallearn.algorithms.base import Algorithm, TaskInfo, selected
from locallearn.batch import Batch
from locallearn.nets.blocks import Blocks


class Classification(pl.LightningModule):
    """Assign one of ``classes`` labels. ``training_step`` is plain backpropagation.

    Under ``Trainer(strategy="auto")`` this module is the backpropagation baseline; under a
    :class:`~locallearn.strategies.LocalStrategy` the algorithm trains the same blocks and predicts in its own way.

    Args:
        net: the network; its output is ``(N, classes)``.
        example: two inputs with the shape and dtype of the real ones, ``(2, ...)``.
        classes: number of labels.
        optimizer: makes the optimizer of the backpropagation baseline from parameters; unused under ``LocalStrategy``,
            which brings its own.
        scheduler: makes its learning rate scheduler, advanced every epoch.
        context: what every block gets after its input (see :class:`~locallearn.batch.Batch`).
    """

    def __init__(
        self,
        net: Blocks,
        example: Tensor,
        classes: int,
        optimizer: Callable[[Any], Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        context: tuple[Any, ...] = (),
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes is {classes}, expected at least 2")
        self.net = net
        self.algorithm: Algorithm | None = None
        self._example = example
        self._classes = classes
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._context = context
        self._counts: Tensor | None = None

    def info(self) -> TaskInfo:
        """Shapes and loss, for an algorithm."""
        labels = torch.arange(len(self._example)) % self._classes
        return TaskInfo(Batch(self._example, labels, self._context), self._classes, F.cross_entropy)

    def to_batch(self, raw: Any) -> Batch:
        """A :class:`Batch` as it is; ``(inputs, labels)`` of an ordinary data loader is wrapped."""
        if isinstance(raw, Batch):
            return raw
        inputs, labels = raw
        return Batch(inputs, labels, self._context)

    def use(self, algorithm: Algorithm) -> None:
        """Attach the algorithm to the network and predict with it from now on."""
        algorithm.attach(self.net, self.info())
        self.algorithm = algorithm

    @override
    def forward(self, inputs: Tensor, *context: Any) -> Tensor:
        """Class scores ``(N, classes)``: the algorithm's own inference, or the network's forward pass."""
        scores: Tensor = (self.net if self.algorithm is None else self.algorithm.predict)(inputs, *context)
        return scores

    @override
    def training_step(self, raw: Any, batch_idx: int) -> Tensor:
        batch = self.to_batch(raw)
        return F.cross_entropy(*selected(batch, self.net(batch.inputs, *batch.context)))

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.net.parameters())
        return optimizer if self._scheduler is None else ([optimizer], [self._scheduler(optimizer)])

    @override
    def on_validation_epoch_start(self) -> None:
        self._counts = None

    @override
    def validation_step(self, raw: Any, batch_idx: int) -> None:
        self._count(self.to_batch(raw))

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_counts("validation")

    @override
    def on_test_epoch_start(self) -> None:
        self._counts = None

    @override
    def test_step(self, raw: Any, batch_idx: int) -> None:
        self._count(self.to_batch(raw))

    @override
    def on_test_epoch_end(self) -> None:
        self._log_counts("test")

    def _count(self, batch: Batch) -> None:
        """Add one batch to (samples, hits, summed loss), kept on the device: one read per epoch, not per batch."""
        scores, labels = selected(batch, self(batch.inputs, *batch.context))
        scores = scores.float()
        counts = torch.stack(
            (
                scores.new_tensor(float(len(labels))),
                (scores.argmax(1) == labels).sum(dtype=torch.float32),
                F.cross_entropy(scores, labels, reduction="sum"),
            )
        )
        self._counts = counts if self._counts is None else self._counts + counts

    def _log_counts(self, name: str) -> None:
        if self._counts is None:
            return
        samples, hits, loss = self._counts.tolist()
        self.log_dict({f"{name}/accuracy": hits / samples, f"{name}/loss": loss / samples})
