"""What all problems share: a network, the algorithm that trains it, and plain backpropagation as the baseline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from locallearn.algorithms.base import Algorithm, TaskInfo, selected
from locallearn.batch import Batch
from locallearn.nets.blocks import Blocks


class Task(pl.LightningModule, ABC):
    """A problem. ``training_step`` is plain backpropagation of the task's loss.

    Under ``Trainer(strategy="auto")`` a task is the backpropagation baseline; under a
    :class:`~locallearn.strategies.LocalStrategy` the algorithm trains the same blocks and predicts in its own way.

    Args:
        net: the network.
        optimizer: makes the optimizer of the backpropagation baseline from parameters; unused under ``LocalStrategy``,
            which brings its own.
        scheduler: makes its learning rate scheduler, advanced every epoch.

    Attributes:
        metric: what quality is measured by, logged as ``validation/<metric>`` and ``test/<metric>``.
        maximise: whether more of it is better.
    """

    metric: str
    maximise: bool

    def __init__(
        self,
        net: Blocks,
        optimizer: Callable[[Any], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None,
    ) -> None:
        super().__init__()
        self.net = net
        self.algorithm: Algorithm | None = None
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._sums: Tensor | None = None

    @abstractmethod
    def info(self) -> TaskInfo:
        """Shapes and loss, for an algorithm."""

    @abstractmethod
    def to_batch(self, raw: Any) -> Batch:
        """What the data loader gives, as a :class:`~locallearn.batch.Batch`."""

    @abstractmethod
    def judge(self, batch: Batch) -> Tensor:
        """Sums over one batch that :meth:`figures` is made of, ``(n,)``, kept on the device."""

    @abstractmethod
    def figures(self, sums: list[float]) -> dict[str, float]:
        """The metric and the loss from the sums over a whole pass."""

    def use(self, algorithm: Algorithm) -> None:
        """Attach the algorithm to the network and predict with it from now on."""
        algorithm.attach(self.net, self.info())
        self.algorithm = algorithm

    # A rule's own inference is part of what was trained: a checkpoint says which rule it needs, and load_from_checkpoint
    # takes one as algorithm=, beside the arguments that make the task.
    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.algorithm is not None:
            checkpoint["algorithm"] = type(self.algorithm).__name__

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        given = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).get("algorithm")
        if self.algorithm is None and isinstance(given, Algorithm):
            self.use(given)
        wanted = checkpoint.get("algorithm")
        if wanted is None and any(name.startswith("algorithm.") for name in checkpoint["state_dict"]):
            wanted = "a learning rule" if self.algorithm is None else type(self.algorithm).__name__
        mine = None if self.algorithm is None else type(self.algorithm).__name__
        if mine != wanted:
            raise ValueError(
                f"this checkpoint was trained by {wanted or 'backpropagation without a rule'}, and the task predicts with "
                f"{mine or 'the network alone'}: give load_from_checkpoint(..., algorithm=...) the rule that trained it, made "
                "with the same settings"
            )

    @override
    def forward(self, inputs: Tensor, *context: Any) -> Tensor:
        """Outputs: the algorithm's own inference, or the network's forward pass."""
        outputs: Tensor = (self.net if self.algorithm is None else self.algorithm.predict)(inputs, *context)
        return outputs

    @override
    def training_step(self, raw: Any, batch_idx: int) -> Tensor:
        batch = self.to_batch(raw)
        return self.info().loss(*selected(batch, self.net(batch.inputs, *batch.context)))

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.net.parameters())
        return optimizer if self._scheduler is None else ([optimizer], [self._scheduler(optimizer)])

    # -- validation and test: sums are read from the device once per pass, not once per batch ----------------------------
    @override
    def on_validation_epoch_start(self) -> None:
        self._sums = None

    @override
    def validation_step(self, raw: Any, batch_idx: int) -> None:
        self._add(self.judge(self.to_batch(raw)))

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_figures("validation")

    @override
    def on_test_epoch_start(self) -> None:
        self._sums = None

    @override
    def test_step(self, raw: Any, batch_idx: int) -> None:
        self._add(self.judge(self.to_batch(raw)))

    @override
    def on_test_epoch_end(self) -> None:
        self._log_figures("test")

    def _add(self, sums: Tensor) -> None:
        self._sums = sums if self._sums is None else self._sums + sums

    def _log_figures(self, part: str) -> None:
        if self._sums is not None:
            self.log_dict({f"{part}/{name}": value for name, value in self.figures(self._sums.tolist()).items()})
