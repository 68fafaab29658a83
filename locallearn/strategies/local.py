"""The Lightning strategy that runs an algorithm inside ``Trainer`` on one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from locallearn.algorithms.base import Algorithm, ParamGroup, TaskInfo
from locallearn.batch import Batch
from locallearn.nets.blocks import Blocks

OptimizerFactory = Callable[[list[ParamGroup]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

# fp16 needs one scaler for all units (one update per batch, not per block) and would scale hand-written gradients.
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")
"""Precisions of ``Trainer`` in which units can be stepped one by one."""


class Diverged(RuntimeError):
    """A unit's loss is not finite any more."""


def make_optimizers(algorithm: Algorithm, make: OptimizerFactory) -> dict[str, Optimizer]:
    """One optimizer per unit.

    Raises:
        ValueError: the rule needs an optimizer that is linear in its gradients, and this one is not.
    """
    optimizers = {unit: make(groups) for unit, groups in algorithm.units().items()}
    reason = algorithm.linear_optimizer
    for optimizer in optimizers.values():
        if reason is not None and not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(
                f"the optimizer is {type(optimizer).__name__}, but {type(algorithm).__name__} needs SGD, with or without "
                f"momentum (optimizer=sgd): {reason}"
            )
    return optimizers


class LocalTask(Protocol):
    """What the strategy asks of a LightningModule; ``locallearn.tasks`` has the ones that come along."""

    net: Blocks
    algorithm: Algorithm | None
    metric: str
    maximise: bool

    def info(self) -> TaskInfo:
        """Shapes and loss of the task."""

    def to_batch(self, raw: Any) -> Batch:
        """What the data loader gives, as a :class:`Batch`."""

    def use(self, algorithm: Algorithm) -> None:
        """Attach the algorithm and predict with it from now on."""


class LocalStrategy(SingleDeviceStrategy):
    """Run an algorithm inside ``Trainer``: one optimizer per unit, each block's graph freed before the next one runs.

    The strategy stays in Lightning's automatic loop, so ``global_step`` counts batches, every optimizer and scheduler is
    saved and resumed, gradients are clipped per unit, and callbacks work. The same LightningModule under
    ``strategy="auto"`` is the backpropagation baseline. Weights are bit-equal to the four-line loop in
    :class:`~locallearn.algorithms.base.Algorithm`.

    Args:
        algorithm: the rule. It is attached to the module's network when the Trainer connects, unless it is already.
        optimizer: makes one optimizer from a unit's parameter groups, e.g. ``functools.partial(torch.optim.Adam, lr=1e-3)``.
        scheduler: makes a learning rate scheduler from an optimizer; one per unit.
        scheduler_interval: ``"epoch"`` or ``"step"``: when schedulers advance.

    Raises:
        ValueError: on connection, where the module has no blocks, the algorithm cannot train them, the precision is
            fp16, gradients are to be accumulated, several devices are asked for, or the rule needs a linear optimizer
            and got another one, or gradients clipped by value.
        Diverged: a unit's loss is not finite; names the unit and the step.
    """

    strategy_name = "local"

    def __init__(
        self,
        algorithm: Algorithm,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        scheduler_interval: str = "epoch",
    ) -> None:
        super().__init__()
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval is {scheduler_interval!r}, expected 'epoch' or 'step'")
        self.algorithm = algorithm
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self._scheduler_interval = scheduler_interval
        self._devices: list[torch.device] = []
        self._unit_optimizers: dict[str, Optimizer] = {}
        self._loss_sums: dict[str, Tensor] = {}
        self._loss_counts: dict[str, int] = {}

    # The connector fills this in once it knows the accelerator; without it the root device would stay the CPU.
    @property
    def parallel_devices(self) -> list[torch.device]:
        """The one device, once the Trainer has chosen it."""
        return self._devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) != 1:
            raise ValueError(
                f"LocalStrategy runs on one device, the Trainer chose {len(devices)}: set trainer.devices=1"
            )
        self._devices = list(devices)
        self._root_device = devices[0]

    @property
    def task(self) -> LocalTask:
        """The connected module."""
        return cast(LocalTask, self.lightning_module)

    @override
    def connect(self, model: pl.LightningModule) -> None:
        # Before devices, dtypes and checkpoints are dealt with: what the rule adds must be there by then.
        task = cast(LocalTask, model)
        if not isinstance(getattr(model, "net", None), Blocks):
            raise ValueError(
                f"{type(model).__name__} has no blocks to train: give it a `net` made by locallearn.Blocks, as the tasks in "
                "locallearn.tasks have"
            )
        if task.algorithm is None:
            task.use(self.algorithm)
        elif task.algorithm is not self.algorithm:
            raise ValueError(
                f"{type(model).__name__} is trained by {type(task.algorithm).__name__} already: make a new module for "
                f"{type(self.algorithm).__name__}"
            )
        super().connect(model)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        precision = self.precision_plugin.precision
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision is {precision!r}; units are stepped one by one, which a gradient scaler cannot follow: use "
                f"one of {', '.join(PRECISIONS)}"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"accumulate_grad_batches is {trainer.accumulate_grad_batches}, but every unit steps with every batch: "
                "use a larger batch instead"
            )
        reason = self.algorithm.linear_optimizer
        if reason is not None and trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
            raise ValueError(
                f"gradients are clipped entry by entry, but {type(self.algorithm).__name__} can be clipped by norm only "
                f"(gradient_clip_algorithm='norm'): {reason}"
            )
        super().setup(trainer)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        self._unit_optimizers = make_optimizers(self.algorithm, self._make_optimizer)
        # Lightning's loop wants one optimizer; a rule that solves in closed form has no unit to step.
        nothing = torch.optim.SGD([torch.zeros(0, requires_grad=True)], lr=0.0)
        self.optimizers = list(self._unit_optimizers.values()) or [nothing]
        self.lr_scheduler_configs = []
        if self._make_scheduler is not None:
            self.lr_scheduler_configs = [
                LRSchedulerConfig(self._make_scheduler(optimizer), interval=self._scheduler_interval, name=f"lr-{unit}")
                for unit, optimizer in self._unit_optimizers.items()
            ]

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Drive the algorithm's generator through one batch."""
        module = self.lightning_module
        assert module is not None
        batch = self.task.to_batch(args[0])
        updates = self.algorithm.updates(batch)
        total: Tensor | None = None
        while True:
            with self.precision_plugin.train_step_context():
                update = next(updates, None)
            if update is None:
                break
            optimizer = self._unit_optimizers[update.unit]

            def closure(update: Any = update, optimizer: Optimizer = optimizer) -> Tensor | None:
                update.backward(lambda loss: Strategy.backward(self, loss, optimizer))
                return cast("Tensor | None", update.loss)

            self.precision_plugin.optimizer_step(optimizer, model=module, closure=closure)
            optimizer.zero_grad()  # a unit's gradients are let go before the next unit's exist
            if update.loss is not None:
                self._note(update.unit, update.loss)
                total = update.loss if total is None else total + update.loss
            del closure, update
        self._check_finite()
        # Lightning wants a loss; a rule without one (closed form, zeroth order) reports zero.
        return torch.zeros((), device=self.root_device) if total is None else total

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Nothing left to do: every unit was differentiated in :meth:`training_step`."""
        return closure_loss

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the closure; every unit was stepped in :meth:`training_step`."""
        return closure()

    @property
    def losses(self) -> dict[str, tuple[float, int]]:
        """Sum of every unit's losses since :meth:`mean_losses` was called last, and their number: for a checkpoint."""
        return {unit: (float(total), self._loss_counts[unit]) for unit, total in self._loss_sums.items()}

    @losses.setter
    def losses(self, losses: Mapping[str, tuple[float, int]]) -> None:
        device = self.root_device
        self._loss_sums = {unit: torch.tensor(total, device=device) for unit, (total, _) in losses.items()}
        self._loss_counts = {unit: count for unit, (_, count) in losses.items()}

    def mean_losses(self) -> Mapping[str, float]:
        """Mean loss of every unit since the last call; units that reported none are left out."""
        means = {unit: float(total) / self._loss_counts[unit] for unit, total in self._loss_sums.items()}
        self._loss_sums, self._loss_counts = {}, {}
        return means

    def _note(self, unit: str, loss: Tensor) -> None:
        loss = loss.float()
        self._loss_sums[unit] = self._loss_sums[unit] + loss if unit in self._loss_sums else loss
        self._loss_counts[unit] = self._loss_counts.get(unit, 0) + 1

    def _check_finite(self) -> None:
        # Reading a loss waits for the device: often on a CPU, where that costs nothing, seldom elsewhere.
        step = self.lightning_module.trainer.global_step if self.lightning_module is not None else 0
        if self.root_device.type != "cpu" and step % 50:
            return
        for unit, total in self._loss_sums.items():
            if not torch.isfinite(total):
                raise Diverged(
                    f"unit {unit!r} diverged: its loss is {float(total)} at step {step}; a smaller learning rate or "
                    "gradient clipping (trainer.gradient_clip_val) may help"
                )
