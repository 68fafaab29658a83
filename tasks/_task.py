"""What all problems share: a network, the algorithm that trains it, and plain backpropagation as the baseline."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

from locallearn.algorithms.base import Algorithm, TaskInfo, selected
from locallearn.batch import Batch
from locallearn.cost import to_device
from locallearn.nets.blocks import Blocks, evaluating, rest
from locallearn.tasks._checks import check_batch_sizes, check_finite, everything, sizes_of


class Task(pl.LightningModule, ABC):
    """A problem. ``training_step`` is plain backpropagation of the task's loss.

    Data are looked at before a weight is moved by them: those in memory all at once, in front of the first batch, those of
    other loaders batch by batch where training is on the CPU, else the first batch. What cannot be learned from is refused
    in one sentence, and so are batches of one sample where the network cannot be trained on them.

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
        views: inferences that one prediction is the mean of.
    """

    metric: str
    maximise: bool
    views: int = 1

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
        self._resting: frozenset[str] = frozenset()
        self._sound: dict[Any, bool] = {}

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":  # Lightning sets it twice around every hook; modules look for parameters first
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @abstractmethod
    def info(self) -> TaskInfo:
        """Shapes and loss, for an algorithm."""

    @abstractmethod
    def to_batch(self, raw: Any) -> Batch:
        """What the data loader gives, as a :class:`~locallearn.batch.Batch`.

        Raises:
            ValueError: it cannot be made one; looks at no value, so that no device is waited for.
        """

    @abstractmethod
    def judge(self, batch: Batch) -> Tensor:
        """Sums over one batch that :meth:`figures` is made of, ``(n,)``, kept on the device."""

    @abstractmethod
    def figures(self, sums: list[float]) -> dict[str, float]:
        """The metric and the loss from the sums over a whole pass."""

    def check(self, batch: Batch) -> None:
        """Look at the values of a batch.

        Raises:
            ValueError: inputs that are not finite, or targets that are none; says what to do.
        """
        check_finite(batch.inputs)

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
        # By a more general name, too: rules that are told apart by a variant were one class once.
        mine = [None] if self.algorithm is None else [kind.__name__ for kind in type(self.algorithm).__mro__]
        if wanted not in mine:
            raise ValueError(
                f"this checkpoint was trained by {wanted or 'backpropagation without a rule'}, and the task predicts with "
                f"{mine[0] or 'the network alone'}: give load_from_checkpoint(..., algorithm=...) the rule that trained it, "
                "made with the same settings"
            )

    def infer(self, inputs: Tensor, *context: Any) -> Tensor:
        """One prediction per row: the algorithm's own inference, or the network's forward pass."""
        outputs: Tensor = (self.net if self.algorithm is None else self.algorithm.predict)(inputs, *context)
        return outputs

    @override
    def forward(self, inputs: Tensor, *context: Any) -> Tensor:
        """What validation and test judge: :meth:`infer`."""
        return self.infer(inputs, *context)

    @override
    def train(self, mode: bool = True) -> Self:
        """Set the mode of everything that learns; frozen parts stay in eval mode, as under an algorithm."""
        super().train(mode)
        self._resting = frozenset()
        self._rest()
        return self

    def _rest(self) -> None:
        if self.training and self.algorithm is None:
            self._resting = rest(self.net, self._resting, (), ())

    @override
    def training_step(self, raw: Any, batch_idx: int) -> Tensor:
        self._rest()
        batch = self.to_batch(raw)
        return self.info().loss(*selected(batch, self.net(batch.inputs, *batch.context)))

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.net.parameters())
        if self._scheduler is None:
            return optimizer
        scheduler = self._scheduler(optimizer)
        if not isinstance(scheduler, ReduceLROnPlateau):
            return [optimizer], [scheduler]
        monitor = "validation/loss" if scheduler.mode == "min" else f"validation/{self.metric}"
        return [optimizer], [{"scheduler": scheduler, "monitor": monitor}]

    # -- what comes from the loaders is looked at before it is used ------------------------------------------------------
    @override
    def setup(self, stage: str) -> None:
        self._sound = {}

    @override
    def on_train_start(self) -> None:
        steps, batches = self.trainer.max_steps, self.trainer.num_training_batches  # of the second, streams have inf
        trained = min(batches, float("inf") if steps == -1 else steps)
        limit = sys.maxsize if trained == float("inf") else int(trained)
        check_batch_sizes(sizes_of(self.trainer.train_dataloader, limit), self.net, self.algorithm, self.info())

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._look(batch, self.trainer.train_dataloader)

    @override
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._look(batch, self.trainer.val_dataloaders)

    @override
    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._look(batch, self.trainer.test_dataloaders)

    def _look(self, raw: Any, loaders: Any) -> None:
        """Look at the first batch of a stage and at all data that lie in memory; where others come, at every batch."""
        stage = self.trainer.state.stage
        if stage not in self._sound:
            first = self.to_batch(raw)
            self.check(first)
            self._check_fit(first)
            found = [everything(loader) for loader in (loaders if isinstance(loaders, list | tuple) else [loaders])]
            for whole in found:
                if whole is not None:
                    self.check(self.to_batch(whole))
            self._sound[stage] = all(whole is not None for whole in found)
        elif not self._sound[stage]:
            given = self.to_batch(raw)
            if given.inputs.device.type == "cpu":  # elsewhere a look would have to wait
                self.check(given)

    def _check_fit(self, batch: Batch) -> None:
        """Try inputs out that are not of the example's shape and dtype, on the network in eval mode."""
        example = self.info().example.inputs
        same = batch.inputs.shape[1:] == example.shape[1:] and batch.inputs.dtype == example.dtype
        if same and batch.inputs.is_floating_point():
            return
        tried = batch.inputs if batch.context else batch.inputs[:2]
        context = to_device(batch, self.device).context
        try:
            with evaluating(self.net), torch.no_grad(), self.trainer.precision_plugin.forward_context():
                self.net(tried.to(self.device), *context)
        except Exception as error:
            raise ValueError(
                f"the inputs of the batch are {batch.inputs.dtype} of shape {tuple(batch.inputs.shape[1:])} per sample, which "
                f"the network does not take ({type(error).__name__}: {' '.join(str(error).split())}): give what it was made "
                f"for, {next(self.net.parameters()).dtype} as a rule, and {example.dtype} of shape "
                f"{tuple(example.shape[1:])} by its example"
            ) from error

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
