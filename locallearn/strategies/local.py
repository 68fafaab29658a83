"""The Lightning strategy that runs an algorithm inside ``Trainer`` on one device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from locallearn.algorithms.base import Algorithm, TaskInfo, let_go
from locallearn.batch import Batch
from locallearn.cost import to_device
from locallearn.local import Local
from locallearn.nets.blocks import Blocks
from locallearn.nets.execution import Execution
from locallearn.strategies.making import (
    AFTER_VALIDATION,
    Closure,
    OptimizerFactory,
    SchedulerFactory,
    check_length,
    make_optimizers,
    make_schedulers,
)

__all__ = [
    "PRECISIONS",
    "Closure",
    "Diverged",
    "LocalStrategy",
    "LocalTask",
    "OptimizerFactory",
    "SchedulerFactory",
    "make_optimizers",
]

# fp16 needs one scaler for all units (one update per batch, not per block) and would scale hand-written gradients.
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")
"""Precisions of ``Trainer`` in which units can be stepped one by one."""


# Callbacks of Lightning that reach into what a rule and its units hold, and why they cannot.
_ONE_OPTIMIZER = "works on the one optimizer of a module, and LocalStrategy has one per unit, made before: leave it out"
_REFUSED: dict[type[pl.Callback], str] = {
    LearningRateFinder: _ONE_OPTIMIZER,
    StochasticWeightAveraging: _ONE_OPTIMIZER,
    BaseFinetuning: "adds the weights that it thaws to the optimizers of all units: set requires_grad of them in a callback of "
    "your own, each unit's optimizer has its weights already",
    ModelPruning: "puts other parameters in the place of those that the rule was attached to: prune after training",
    BatchSizeFinder: "trains steps on the way, which the rule and the schedule would count: set the batch size yourself",
}


# What Lightning calls around a unit's step; where nobody has written any of it, the calls are left out.
_MODULE_HOOKS = (
    "on_before_backward",
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "clip_gradients",
)
_CALLBACK_HOOKS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step")
_STRATEGY_HOOKS = ("pre_backward", "post_backward")


class Diverged(RuntimeError):
    """A unit's loss is not finite any more."""


class _Unscaled(MixedPrecision):
    """bfloat16 has no gradient scaler, so gradients of fused optimizers, which would unscale them, can be clipped."""

    @override
    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        Precision.clip_gradients(self, *args, **kwargs)


class LocalTask(Protocol):
    """What the strategy asks of a LightningModule; ``locallearn.tasks`` has the ones that come along.

    Attributes:
        net: the network.
        algorithm: ``None`` until one is attached; validation and test predict with it.
        metric: what quality is measured by, logged as ``validation/<metric>``.
        maximise: whether more of it is better.
    """

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


# Attributes and methods of LocalTask beside `net`, which is asked for in words of its own.
_OF_A_TASK = ("algorithm", "metric", "maximise", "info", "to_batch", "use")


class LocalStrategy(SingleDeviceStrategy):
    """Run an algorithm inside ``Trainer``: one optimizer per unit, each block's graph freed before the next one runs.

    The strategy stays in Lightning's automatic loop, so ``global_step`` counts batches, every optimizer and scheduler is
    saved and resumed, gradients are clipped per unit, and callbacks work. The same LightningModule under
    ``strategy="auto"`` is the backpropagation baseline. Weights are bit-equal to the four-line loop in
    :class:`~locallearn.algorithms.base.Algorithm`. An optimizer that asks for the loss again within one step (LBFGS, SAM)
    gets it from the rules whose updates can be made anew (``Update.again``); with the others it is refused.

    Of the module's hooks, ``on_before_backward``, ``backward``, ``on_after_backward``, ``on_before_optimizer_step`` and
    ``configure_gradient_clipping`` are called for every unit; ``on_before_zero_grad`` and ``optimizer_zero_grad`` once
    per batch; ``training_step`` and ``configure_optimizers`` never, because the rule and the strategy stand for them.

    Args:
        algorithm: the rule. It is attached to the module's network when the Trainer connects, unless it is already. Or what
            ``localize`` made; then the module's ``net`` is its ``blocks``.
        optimizer: makes one optimizer from a unit's parameter groups, e.g. ``functools.partial(torch.optim.Adam, lr=1e-3)``.
            Default: what a ``Local`` was made with.
        scheduler: makes a learning rate scheduler from an optimizer; one per unit.
        scheduler_interval: ``"epoch"`` or ``"step"``: when schedulers advance. ``ReduceLROnPlateau`` advances after every
            validation: in mode ``min`` by ``validation/loss``, in mode ``max`` by the task's metric.
        channels_last: see :class:`~locallearn.nets.execution.Execution`, which changes no number beyond rounding.
        compile: the same: ``"blocks"``: every block by itself, until the Trainer is done.
        compile_backend: the same.

    Attributes:
        batch: of the last step, for callbacks; who has read it may set it to ``None``.
        execution: how blocks are run.

    Raises:
        ValueError: before training, where the module has no blocks or is no :class:`LocalTask`, the algorithm cannot train
            them, a scheduler cannot be made, several devices or nodes are asked for, or :meth:`check` refuses the Trainer;
            during training, where gradients are to be accumulated after all, or an optimizer asks for what the rule cannot
            give.
        Diverged: a unit's loss is not finite; names the unit and the step.
    """

    strategy_name = "local"

    def __init__(
        self,
        algorithm: Algorithm | Local,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        scheduler_interval: str = "epoch",
        channels_last: bool = False,
        compile: str | None = None,
        compile_backend: str = "inductor",
    ) -> None:
        super().__init__()
        self.execution = Execution(channels_last, compile, compile_backend)
        self._proved = compile is None  # that blocks run compiled
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval is {scheduler_interval!r}, expected 'epoch' or 'step'")
        if isinstance(algorithm, Local):
            optimizer = algorithm.make_optimizer if optimizer is None else optimizer
            algorithm = algorithm.algorithm
        if optimizer is None:
            raise ValueError(
                "give optimizer=, which makes a unit's optimizer, e.g. functools.partial(torch.optim.Adam, lr=1e-3)"
            )
        self.algorithm = algorithm
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self._scheduler_interval = scheduler_interval
        self._devices: list[torch.device] = []
        self._unit_optimizers: dict[str, Optimizer] = {}
        self._loss_sums: dict[str, Tensor] = {}
        self._loss_counts: dict[str, int] = {}
        self._plateaus_wait = False
        self.batch: Batch | None = None

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

    # The connector sets this, if the strategy has it; without it a second node would go unnoticed.
    @property
    def num_nodes(self) -> int:
        """One machine."""
        return 1

    @num_nodes.setter
    def num_nodes(self, number: int) -> None:
        if number != 1:
            raise ValueError(
                f"LocalStrategy runs on one device of one machine, the Trainer got num_nodes={number}: set it to 1"
            )

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
        missing = [name for name in _OF_A_TASK if not hasattr(model, name)]
        if missing:
            raise ValueError(
                f"{type(model).__name__} has no {', '.join(missing)}, which LocalStrategy asks every task for: make it a "
                "subclass of locallearn.tasks.classification.Classification, or of another task there, or write what is "
                "missing (docs/own-network.md, A task of your own)"
            )
        if task.algorithm is None and getattr(self.algorithm, "blocks", None) is task.net:  # by localize
            task.algorithm = self.algorithm
        elif task.algorithm is None:
            task.use(self.algorithm)
        elif task.algorithm is not self.algorithm:
            raise ValueError(
                f"{type(model).__name__} is trained by {type(task.algorithm).__name__} already: make a new module for "
                f"{type(self.algorithm).__name__}"
            )
        if self.execution.channels_last:
            self.execution.check(task.net, task.info().example.inputs)
        super().connect(model)

    def check(self, trainer: pl.Trainer) -> None:
        """Refuse what Lightning would take, but units that are stepped one by one cannot follow.

        Raises:
            ValueError: a precision with a gradient scaler or of somebody else's making, gradients that are accumulated, or
                clipped by value under a rule that needs linear steps, a callback that searches, averages, prunes or
                thaws in its own way, or a module that steps its optimizers itself.
        """
        plugin = self.precision_plugin
        if plugin.precision not in PRECISIONS:
            raise ValueError(
                f"precision is {plugin.precision!r}; units are stepped one by one, which a gradient scaler cannot follow: "
                f"use one of {', '.join(PRECISIONS)}"
            )
        if type(plugin) not in (Precision, DoublePrecision, HalfPrecision, MixedPrecision, _Unscaled):
            raise ValueError(
                f"the precision plugin is a {type(plugin).__name__}, which may do to a unit's step what nobody here knows: "
                f"use precision={plugin.precision!r} without a plugin"
            )
        self._check_accumulation(trainer.accumulate_grad_batches)
        callbacks: list[pl.Callback] = vars(trainer)[
            "callbacks"
        ]  # set from outside the class, where mypy does not see it
        for callback in callbacks:
            if isinstance(callback, GradientAccumulationScheduler):
                self._check_accumulation(max(callback.scheduling.values()))
            for kind, why in _REFUSED.items():
                if isinstance(callback, kind):
                    raise ValueError(f"{type(callback).__name__} {why}")
        self._check_clipping(trainer)
        module = self.lightning_module
        if module is not None and not module.automatic_optimization:
            raise ValueError(
                f"{type(module).__name__} has automatic_optimization=False, but LocalStrategy steps the optimizers: leave it "
                "True"
            )
        if module is not None and is_overridden("optimizer_step", module):
            raise ValueError(
                f"{type(module).__name__} has an optimizer_step of its own, which would be called once for all units: leave "
                "it out, and make an optimizer that does what it does"
            )

    def _check_accumulation(self, batches: int) -> None:
        if batches != 1:
            raise ValueError(
                f"accumulate_grad_batches is {batches}, but every unit steps with every batch: use a larger batch instead"
            )

    def _check_clipping(self, trainer: pl.Trainer) -> None:
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value" and self.algorithm.piecewise:
            raise ValueError(
                f"gradient_clip_val is {trainer.gradient_clip_val}, but {type(self.algorithm).__name__} hands gradients over a "
                "few weights at a time here, and the norm of all is never known: leave it out, clip by value "
                "(gradient_clip_algorithm='value'), or use a variant that hands them over at once"
            )
        if not trainer.gradient_clip_val or trainer.gradient_clip_algorithm != "value":
            return
        reason = self.algorithm.linear_optimizer
        if reason is not None:
            raise ValueError(
                f"gradients are clipped entry by entry, but {type(self.algorithm).__name__} can be clipped by norm only "
                f"(gradient_clip_algorithm='norm'): {reason}"
            )

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self.check(trainer)
        plugin = self.precision_plugin
        if type(plugin) is MixedPrecision:
            self.precision_plugin = _Unscaled("bf16-mixed", plugin.device)
        super().setup(trainer)
        self.execution.prepare(self.algorithm, self.algorithm.blocks)

    @override
    def teardown(self) -> None:
        if hasattr(self.algorithm, "blocks"):
            self.execution.undo(self.algorithm.blocks)
        super().teardown()

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """On the device, images laid out as they are wanted."""
        return self.execution.given(super().batch_to_device(batch, device, dataloader_idx))

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        self._unit_optimizers = make_optimizers(self.algorithm, self._make_optimizer)
        # Lightning's loop wants one optimizer; a rule that solves in closed form has no unit to step.
        nothing = torch.optim.SGD([torch.zeros(0, requires_grad=True)], lr=0.0)
        self.optimizers = list(self._unit_optimizers.values()) or [nothing]
        self.lr_scheduler_configs = []
        if self._make_scheduler is not None:
            self.lr_scheduler_configs = make_schedulers(
                self._unit_optimizers,
                self._make_scheduler,
                self._scheduler_interval,
                self.task.metric,
                self.task.maximise,
            )
        follow = any(config.interval == AFTER_VALIDATION for config in self.lr_scheduler_configs)
        if follow and not trainer.enable_validation:
            raise ValueError(
                "ReduceLROnPlateau follows what validation says, and there is no validation data: give some, or use another "
                "scheduler"
            )

    @override
    def on_train_start(self) -> None:
        trainer = cast(pl.LightningModule, self.lightning_module).trainer
        epochs = float("inf") if trainer.max_epochs in (None, -1) else trainer.max_epochs
        steps = float("inf") if trainer.max_steps == -1 else trainer.max_steps
        if trainer.global_step == 0:
            check_length(self.lr_scheduler_configs, epochs, min(steps, epochs * trainer.num_training_batches))

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Drive the algorithm's generator through one batch."""
        module = self.lightning_module
        assert module is not None
        self._check_accumulation(module.trainer.accumulate_grad_batches)  # callbacks may change it at any time,
        self._check_clipping(module.trainer)  # and this, too
        self.batch = batch = self.execution.given(self.task.to_batch(args[0]))
        try:
            total = self._learn(batch, module)
        except RuntimeError as error:
            self.execution.explain(error)
            raise
        self._check_finite(total)
        if not self._proved:
            self._proved = True
            learns, owner = self.algorithm.trains, type(self.algorithm).__name__
            self.execution.check_ran(self.algorithm.blocks, learns, owner)
        progress: Any = module.trainer.fit_loop.epoch_loop.batch_progress
        if progress.is_last_batch or progress.current.ready >= module.trainer.num_training_batches:
            self.algorithm.end_epoch()
        # Lightning wants a loss; a rule without one (closed form, zeroth order) reports zero.
        return torch.zeros((), device=self.root_device) if total is None else total

    def _learn(self, batch: Batch, module: pl.LightningModule) -> Tensor | None:
        """Step every unit; the sum of their losses."""
        plugin, listened = self.precision_plugin, self._listened_to(module)
        # In plain precision there is nothing to enter.
        context = nullcontext if type(plugin) is Precision else plugin.train_step_context
        for own in self._unit_optimizers.values():  # of somebody's backward pass through the network: a callback's, say
            let_go(own)
        updates = self.algorithm.updates(batch)
        total: Tensor | None = None
        while True:
            with context():
                update = next(updates, None)
            if update is None:
                break
            optimizer = self._unit_optimizers[update.unit]
            if listened:
                closure = Closure(update, optimizer, context, partial(self._differentiate, optimizer))
                plugin.optimizer_step(optimizer, model=module, closure=closure)
            else:
                closure = Closure(update, optimizer, context)
                optimizer.step(closure)  # type: ignore[arg-type]
            if not closure.calls:
                raise ValueError(
                    f"the optimizer {type(optimizer).__name__} has not called its closure, which works out the gradients: unit "
                    f"{update.unit!r} would never learn"
                )
            let_go(optimizer)  # before the next unit's gradients exist
            if update.loss is not None:
                self._note(update.unit, update.loss)
                total = update.loss if total is None else total + update.loss
            del closure, update
        return total

    def _listened_to(self, module: pl.LightningModule) -> bool:
        """Whether anybody has written a hook around backward passes and steps, clips, or takes the time of such hooks."""
        trainer = module.trainer
        set_outside = vars(trainer)  # of the class, where mypy does not see it
        callbacks: list[pl.Callback] = set_outside["callbacks"]
        return (
            trainer.gradient_clip_val is not None
            or type(set_outside["profiler"]) is not PassThroughProfiler
            or _writes(module, pl.LightningModule, _MODULE_HOOKS)
            or _writes(self, Strategy, _STRATEGY_HOOKS)
            or any(_writes(callback, pl.Callback, _CALLBACK_HOOKS) for callback in callbacks)
        )

    def _differentiate(self, optimizer: Optimizer, loss: Tensor) -> None:
        Strategy.backward(self, loss, optimizer)

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

    @override
    def on_validation_start(self) -> None:
        trainer = cast(pl.LightningModule, self.lightning_module).trainer
        self._plateaus_wait = trainer.state.fn == "fit" and not trainer.sanity_checking

    @override
    def on_validation_end(self) -> None:
        self.step_plateaus()

    def step_plateaus(self) -> None:
        """Advance the schedulers that follow a metric, once per validation; called by a callback, else after all of them.

        Raises:
            ValueError: the task does not log the metric.
        """
        if not self._plateaus_wait:
            return
        self._plateaus_wait = False
        metrics = cast(pl.LightningModule, self.lightning_module).trainer.callback_metrics
        for config in self.lr_scheduler_configs:
            if config.interval == AFTER_VALIDATION:
                if config.monitor not in metrics:
                    raise ValueError(
                        f"the task logs no {config.monitor!r}, which ReduceLROnPlateau watches; it logs {sorted(metrics)}"
                    )
                cast(ReduceLROnPlateau, config.scheduler).step(float(metrics[config.monitor]))

    def feed(self, batch: Batch) -> Batch:
        """A batch as the training loop hands it over: in the dtype of the precision, on the device, laid out."""
        return self.execution.given(to_device(self.precision_plugin.convert_input(batch), self.root_device))

    @property
    def losses(self) -> dict[str, tuple[float, int]]:
        """Sum of every unit's losses since :meth:`mean_losses` was called last, and their number: for a checkpoint."""
        return {unit: (float(total), self._loss_counts[unit]) for unit, total in self._loss_sums.items()}

    @losses.setter
    def losses(self, losses: Mapping[str, tuple[float, int]]) -> None:
        device = self.root_device
        self._loss_sums = {
            unit: torch.tensor(total, dtype=torch.float32, device=device) for unit, (total, _) in losses.items()
        }
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

    def _check_finite(self, latest: Tensor | None) -> None:
        # Reading a loss waits for the device: often on a CPU, where that costs nothing, seldom elsewhere.
        step = self.lightning_module.trainer.global_step if self.lightning_module is not None else 0
        if self.root_device.type != "cpu":
            if step % 50:
                return
        elif latest is None or math.isfinite(latest.item()):  # the sum of this batch's losses tells of all of them
            return
        for unit, total in self._loss_sums.items():
            if not torch.isfinite(total):
                raise Diverged(
                    f"unit {unit!r} diverged: its loss is {float(total)} at step {step}; a smaller learning rate or "
                    "gradient clipping (trainer.gradient_clip_val) may help"
                )


def _writes(one: object, base: type, hooks: Sequence[str]) -> bool:
    """Whether an object has a method of its own in place of any of these of ``base``."""
    own, kind = vars(one), type(one)
    return any(hook in own or getattr(kind, hook, None) is not getattr(base, hook) for hook in hooks)
