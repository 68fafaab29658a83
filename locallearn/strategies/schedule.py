"""When each unit trains, when it stops, and which of its weights are kept: one callback for all schedules."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from typing_extensions import override

from locallearn.algorithms.base import Algorithm
from locallearn.algorithms.layer_local import LayerLocal
from locallearn.strategies.local import LocalStrategy, LocalTask

_log = logging.getLogger(__name__)

_WHEN = ("check_val_every_n_epoch", "val_check_batch", "_val_check_time_interval")
"""What the Trainer's loop decides by whether a validation is due."""


class Schedule(pl.Callback):
    """Train all units together, or one after another, each to the same stopping rule.

    A stage is the set of units that train together: one stage with all of them (joint), or one stage per unit
    (sequential). Every stage ends with the epoch in which it has had ``max_epochs`` of the Trainer, or in which the
    monitored metric has not improved for ``patience`` validations, or after which another would change nothing
    (``Algorithm.finished``: a closed form), and gets the weights of its best validation back. The
    same rule therefore serves backpropagation and every local rule, which is what makes their costs comparable
    (docs/studies.md, mode ``own``). The validation metric of a sequential stage is that of the network trained so far.

    The Trainer's ``max_epochs`` and ``min_epochs`` are of every stage; ``max_steps``, ``min_steps``, ``max_time`` and a
    callback that stops the training (``EarlyStopping``, say) are of all stages together: where they end it, the stage that
    trains gets its best weights back, and later stages are left as they are (:meth:`untrained`). An epoch that is broken
    off counts as one. Where a stage ends, its last weights are validated even if no validation is due, so that the best
    are chosen among all; a validation that gives no number (NaN) is never the best.

    Args:
        sequential: one stage per unit instead of one stage; a rule whose stages have to follow one another
            (``Algorithm.consecutive``) always has it so.
        patience: validations without improvement before the stage ends (one after every epoch, unless the Trainer's
            ``check_val_every_n_epoch`` or ``val_check_interval`` say otherwise); ``None``: run all epochs.
        monitor: ``"validation/loss"`` (smaller is better), or ``None``: the task's own metric, e.g. accuracy.
        min_delta: what counts as an improvement.
        restore_best: give every stage the weights of its best validation back; else it keeps the last ones. Without
            validation data a joint schedule keeps the last ones.
        cache: keep the outputs of frozen blocks for the whole training set (sequential only). The weights are the same,
            for N x width numbers of memory.

    Attributes:
        stage: number of stages that have ended.
        epochs_by_stage: epochs of every stage that has ended.
        epochs: epochs of the stage that trains.

    Raises:
        ValueError: on construction or at the start of training, for a combination that cannot work.
    """

    def __init__(
        self,
        sequential: bool = False,
        patience: int | None = None,
        monitor: Literal["validation/loss"] | None = None,
        min_delta: float = 0.0,
        restore_best: bool = True,
        cache: bool = False,
    ) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"schedule.patience is {patience}, expected a positive number of epochs or null")
        if monitor not in (None, "validation/loss"):
            raise ValueError(
                f"schedule.monitor is {monitor!r}, expected validation/loss, or null for the task's metric"
            )
        if not min_delta >= 0:
            raise ValueError(f"schedule.min_delta is {min_delta}, expected zero or more")
        if cache and not sequential:
            raise ValueError("schedule.cache keeps frozen activations, and a joint schedule freezes none: drop it")
        self.sequential = sequential
        self.patience = patience
        self.monitor = monitor
        self.min_delta = min_delta
        self.restore_best = restore_best
        self.cache = cache
        self._begin()

    def _begin(self) -> None:
        self.stage = 0
        self.epochs = 0
        self.bad_epochs = 0
        self.best: float | None = None
        self.epochs_by_stage: list[int] = []
        self._best_weights: dict[str, Tensor] = {}
        self._judged_step: int | None = None  # what the last validation has seen
        self._cap: int | None = None
        self._usual: dict[str, Any] | None = None  # when validations come, while one is called out of turn

    def stages(self, algorithm: Algorithm) -> list[list[str]]:
        """Units of every stage.

        Raises:
            ValueError: the algorithm cannot be trained one unit after another.
        """
        return algorithm.stages if self.sequential else [list(algorithm.units())]

    def untrained(self, algorithm: Algorithm) -> list[str]:
        """Units whose stage never began, because the training was stopped before."""
        return [unit for stage in self.stages(algorithm)[self.stage :] for unit in stage]

    @contextmanager
    def as_far_as_trained(self, algorithm: Algorithm) -> Iterator[None]:
        """Predict with what a sequential training that was stopped has trained, as its validations did."""
        if self.sequential and self.stage and self.untrained(algorithm):
            algorithm.train_only(frozenset(self.stages(algorithm)[self.stage - 1]))
        try:
            yield
        finally:
            algorithm.train_only(None)

    def check(self, algorithm: Algorithm | None, scheduled: bool) -> None:
        """Refuse an algorithm that cannot be trained so; one that can begins to keep frozen activations, if it is to.

        Args:
            algorithm: the rule, attached; ``None`` under ``strategy="auto"``.
            scheduled: whether learning rates follow a scheduler.

        Raises:
            ValueError: no stages, no frozen activations to cache, or a scheduler over stages.
        """
        if algorithm is not None and algorithm.consecutive:
            if scheduled:
                raise ValueError(
                    f"{type(algorithm).__name__} solves for its weights and has no learning rate to schedule: drop scheduler"
                )
            self.sequential = True
        if algorithm is not None:
            self.stages(algorithm)
        if self.sequential and scheduled:
            raise ValueError(
                "a learning rate scheduler runs over the whole training, but a sequential schedule starts its units one "
                "after another: drop scheduler or use schedule=joint"
            )
        if self.cache:
            if not isinstance(algorithm, LayerLocal):
                raise ValueError(
                    f"{type(algorithm).__name__} has no frozen activations to cache: set schedule.cache=false"
                )
            algorithm.cache_frozen(True)
        if self.sequential and algorithm is None:
            raise ValueError(
                "a sequential schedule trains the units of an algorithm one after another, and there is none under this "
                "strategy: use LocalStrategy, or a joint schedule"
            )

    # -- hooks -----------------------------------------------------------------------------------------------------------
    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Before a checkpoint's state comes; a Trainer that has trained goes on where it stopped.
        if stage == "fit" and trainer.global_step == 0:
            self._begin()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        algorithm = cast(LocalTask, pl_module).algorithm
        # Under strategy="auto" there is no algorithm: plain backpropagation, one stage.
        self.check(algorithm, scheduled=bool(trainer.lr_scheduler_configs))
        self._check_trainer(trainer)
        self._cap = None if trainer.max_epochs in (None, -1) else trainer.max_epochs
        if self.stage and not self.sequential and self._cap is not None and self._cap > self.epochs_by_stage[0]:
            # A finished joint training that is given more epochs: the weights that it ended with are the best so far.
            self.stage, self.epochs, self.epochs_by_stage = 0, self.epochs_by_stage[0], []
            self._best_weights = self._weights(pl_module) if self.restore_best and self.best is not None else {}
        self._limit_epochs(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._activate(pl_module)
        done = trainer.current_epoch - sum(self.epochs_by_stage)
        if done > self.epochs:  # Lightning leaves out the end of an epoch whose last batch left the checkpoint
            self.epochs = done
            if self._validates(trainer) and (self._ends(trainer, pl_module) or _is_due(trainer)):
                self._validate(trainer)
        progress: Any = trainer.fit_loop.epoch_progress.current
        between = progress.ready == progress.processed  # else the end of the epoch that was begun will come
        if between and self.epochs and self._ends(trainer, pl_module):
            self._end_stage(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stops = _stops(trainer)
        if not (stops or trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches):
            return
        self.epochs = trainer.current_epoch + 1 - sum(self.epochs_by_stage)
        if self._validates(trainer) and (stops or self._ends(trainer, pl_module)):
            # The best weights are chosen among all validations, so the last weights need one.
            self._usual = {name: getattr(trainer, name) for name in _WHEN}
            _set(trainer, dict(zip(_WHEN, (1, batch_idx + 1, None), strict=True)))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validate_as_usual(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        task = cast(LocalTask, pl_module)
        monitor = self.monitor or f"validation/{task.metric}"
        if monitor not in trainer.callback_metrics:
            raise ValueError(
                f"the task logs no {monitor!r}, which the schedule watches; it logs {sorted(trainer.callback_metrics)}"
            )
        self._judged_step = trainer.global_step
        if task.algorithm is not None and not task.algorithm.judges:
            pass  # what the metric says is not about this stage: it has all its epochs, and keeps its last weights
        elif self._improves(float(trainer.callback_metrics[monitor]), self.monitor is None and task.maximise):
            self.best, self.bad_epochs = float(trainer.callback_metrics[monitor]), 0
            if self.restore_best:
                self._best_weights = self._weights(pl_module)
        else:
            self.bad_epochs += 1
        if isinstance(trainer.strategy, LocalStrategy):
            trainer.strategy.step_plateaus()  # now, so that checkpoints made by callbacks after this one know of it

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validate_as_usual(trainer)
        self.epochs = trainer.current_epoch + 1 - sum(self.epochs_by_stage)
        if self.stage == self._stages(pl_module):
            return
        if _stops(trainer) and self._validates(trainer):  # a callback after this one stopped it
            self._validate(trainer)
        if self._ends(trainer, pl_module):
            self._end_stage(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.epochs and self.stage < self._stages(pl_module):
            if self._validates(trainer):
                self._validate(trainer)
            self._end_stage(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.epochs and self.stage < self._stages(pl_module):  # resumed where nothing was left to do
            self._end_stage(trainer, pl_module)
        self._let_go(pl_module)
        if self._cap is not None:
            trainer.fit_loop.max_epochs = self._cap
        algorithm = cast(LocalTask, pl_module).algorithm
        if algorithm is not None and self.sequential and (left := self.untrained(algorithm)):
            _log.warning("the training was stopped before its last stage: %s never trained", ", ".join(left))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._validate_as_usual(trainer)
        self._let_go(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "epochs": self.epochs,
            "bad_epochs": self.bad_epochs,
            "best": self.best,
            "best_weights": self._best_weights,
            "epochs_by_stage": self.epochs_by_stage,
            "judged_step": self._judged_step,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stage = state_dict["stage"]
        self.epochs = state_dict["epochs"]
        self.bad_epochs = state_dict["bad_epochs"]
        self.best = state_dict["best"]
        self._best_weights = state_dict["best_weights"]
        self.epochs_by_stage = list(state_dict["epochs_by_stage"])
        self._judged_step = state_dict.get("judged_step")

    # -- what the hooks are made of --------------------------------------------------------------------------------------
    def _check_trainer(self, trainer: pl.Trainer) -> None:
        chooses = self.patience is not None or (self.restore_best and self.sequential)
        if chooses and not trainer.enable_validation:
            raise ValueError("the schedule ends its stages by what validation says, and there is no validation data")
        if trainer.barebones and trainer.enable_validation and (chooses or self.restore_best):
            raise ValueError(
                "a Trainer with barebones=True logs no metrics, and the schedule chooses weights by them: leave barebones out"
            )
        if self.sequential and self.patience is None and trainer.max_epochs in (None, -1):
            raise ValueError(
                "nothing ends the first stage of this sequential schedule: set max_epochs of the Trainer (epochs of every "
                "unit), or patience"
            )
        callbacks: list[pl.Callback] = vars(trainer)[
            "callbacks"
        ]  # set from outside the class, where mypy does not see it
        for callback in callbacks:
            if self.restore_best and isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise ValueError(
                    f"{type(callback).__name__} validates averaged weights and ends with them, but the schedule gives back "
                    "the best ones that were trained: drop one of the two, or set restore_best=False"
                )

    def _stages(self, module: pl.LightningModule) -> int:
        algorithm = cast(LocalTask, module).algorithm
        return 1 if algorithm is None else len(self.stages(algorithm))

    def _limit_epochs(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Tell the Trainer how many epochs all stages may have together."""
        left = self._stages(module) - self.stage
        if self._cap is not None:
            ahead = max(self._cap, self.epochs) + self._cap * (left - 1) if left else 0
            trainer.fit_loop.max_epochs = sum(self.epochs_by_stage) + ahead

    def _activate(self, module: pl.LightningModule) -> None:
        """Freeze what does not train in this stage."""
        algorithm = cast(LocalTask, module).algorithm
        if algorithm is None or not self.sequential or self.stage >= self._stages(module):
            return
        units = frozenset(self.stages(algorithm)[self.stage])
        if algorithm.active != units:
            algorithm.train_only(units)

    def _ends(self, trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        """Whether the stage ends with the epoch that has just been counted."""
        if self._cap is not None and self.epochs >= self._cap:
            return True
        algorithm = cast(LocalTask, module).algorithm
        stalled = self.patience is not None and self.bad_epochs >= self.patience
        if not stalled and not (algorithm is not None and self.epochs and algorithm.finished):
            return False
        if self.epochs < (trainer.min_epochs or 0):
            return False
        return self.stage + 1 < self._stages(module) or trainer.global_step >= (trainer.min_steps or 0)

    def _improves(self, value: float, maximise: bool) -> bool:
        if math.isnan(value) or self.best is None:
            return not math.isnan(value)
        if maximise:
            return value > self.best + self.min_delta
        return value < self.best - self.min_delta

    def _validates(self, trainer: pl.Trainer) -> bool:
        """Whether weights are chosen by validations, and the present ones have had none."""
        chooses = self.restore_best or self.patience is not None
        return chooses and trainer.enable_validation and self._judged_step != trainer.global_step

    def _validate(self, trainer: pl.Trainer) -> None:
        """Validate now: as the training loop does between two batches."""
        connector = trainer._logger_connector
        first = connector._first_loop_iter
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False  # a checkpoint's place in an earlier validation is not to be gone on from
        trainer.validating = True
        loop.run()
        trainer.training = True
        connector._first_loop_iter = first

    def _validate_as_usual(self, trainer: pl.Trainer) -> None:
        if self._usual is not None:
            _set(trainer, self._usual)
            self._usual = None

    def _weights(self, module: pl.LightningModule) -> dict[str, Tensor]:
        """A copy of what this stage trains, normalisation statistics included."""
        algorithm = cast(LocalTask, module).algorithm
        state = (module if algorithm is None else algorithm).state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if algorithm is not None and self.sequential:
            units = self.stages(algorithm)[self.stage]
            mine = {id(p) for unit in units for group in algorithm.units()[unit] for p in group["params"]}
            parameters = dict(algorithm.named_parameters(remove_duplicate=False))
            tensors = {n: v for n, v in tensors.items() if n not in parameters or id(parameters[n]) in mine}
        return {name: value.detach().clone() for name, value in tensors.items()}

    def _end_stage(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        algorithm = cast(LocalTask, module).algorithm
        if self._best_weights:
            (module if algorithm is None else algorithm).load_state_dict(self._best_weights, strict=False)
        self.epochs_by_stage.append(self.epochs)
        self.stage += 1
        self.epochs, self.bad_epochs, self._best_weights, self._judged_step = 0, 0, {}, None
        self._limit_epochs(trainer, module)
        if self.stage == self._stages(module):
            trainer.should_stop = True
        else:
            self.best = None
            self._activate(module)

    def _let_go(self, module: pl.LightningModule) -> None:
        algorithm = cast(LocalTask, module).algorithm
        if algorithm is not None and self.sequential:
            algorithm.train_only(None)
            if self.cache and isinstance(algorithm, LayerLocal):
                algorithm.cache_frozen(False)


def _set(trainer: pl.Trainer, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(trainer, name, value)


def _stops(trainer: pl.Trainer) -> bool:
    """Whether the Trainer ends the whole training with the batch that has just been trained."""
    spent = 0 <= trainer.max_steps <= trainer.global_step
    return spent or (trainer.should_stop and trainer.fit_loop._can_stop_early)


def _is_due(trainer: pl.Trainer) -> bool:
    """Whether the Trainer validates at the end of the epoch that has ended."""
    every, batches = trainer.check_val_every_n_epoch, cast(float, trainer.val_check_batch)
    if every is None:
        return trainer.global_step % batches == 0
    return trainer.current_epoch % every == 0 and trainer.num_training_batches % batches == 0
