"""When each unit trains, when it stops, and which of its weights are kept: one callback for all schedules."""

from __future__ import annotations

from typing import Any, Literal, cast

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from locallearn.algorithms.base import Algorithm
from locallearn.algorithms.layer_local import LayerLocal
from locallearn.strategies.local import LocalTask


class Schedule(pl.Callback):
    """Train all units together, or one after another, each to the same stopping rule.

    A stage is the set of units that train together: one stage with all of them (joint), or one stage per unit
    (sequential). Every stage ends after ``max_epochs`` of the Trainer, or when the monitored metric has not improved for
    ``patience`` epochs, and gets the weights of its best epoch back. The same rule therefore serves backpropagation and
    every local rule, which is what makes their costs comparable (docs/studies.md, mode ``own``). The validation metric of
    a sequential stage is that of the network trained so far.

    Args:
        sequential: one stage per unit instead of one stage.
        patience: validations without improvement before the stage ends (one after every epoch, unless the Trainer's
            ``check_val_every_n_epoch`` says otherwise); ``None``: run all epochs.
        monitor: ``"validation/loss"`` (smaller is better), or ``None``: the task's own metric, e.g. accuracy.
        min_delta: what counts as an improvement.
        restore_best: give every stage the weights of its best epoch back; else it keeps the last ones.
        cache: keep the outputs of frozen blocks for the whole training set (sequential only). The weights are the same,
            for N x width numbers of memory.

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
        if min_delta < 0:
            raise ValueError(f"schedule.min_delta is {min_delta}, expected zero or more")
        if cache and not sequential:
            raise ValueError("schedule.cache keeps frozen activations, and a joint schedule freezes none: drop it")
        self.sequential = sequential
        self.patience = patience
        self.monitor = monitor
        self.min_delta = min_delta
        self.restore_best = restore_best
        self.cache = cache
        self.stage = 0
        self.epochs = 0
        self.bad_epochs = 0
        self.best: float | None = None
        self.epochs_by_stage: list[int] = []
        self._best_weights: dict[str, Tensor] = {}
        self._cap: int | None = None

    def stages(self, algorithm: Algorithm) -> list[list[str]]:
        """Units of every stage.

        Raises:
            ValueError: the algorithm cannot be trained one unit after another.
        """
        return algorithm.stages if self.sequential else [list(algorithm.units())]

    def check(self, algorithm: Algorithm | None, scheduled: bool) -> None:
        """Refuse an algorithm that cannot be trained so; one that can begins to keep frozen activations, if it is to.

        Args:
            algorithm: the rule, attached; ``None`` under ``strategy="auto"``.
            scheduled: whether learning rates follow a scheduler.

        Raises:
            ValueError: no stages, no frozen activations to cache, or a scheduler over stages.
        """
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

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (self.sequential or self.patience is not None) and not trainer.enable_validation:
            raise ValueError("the schedule ends its stages by what validation says, and there is no validation data")
        algorithm = cast(LocalTask, pl_module).algorithm
        # Under strategy="auto" there is no algorithm: plain backpropagation, one stage.
        self.check(algorithm, scheduled=bool(trainer.lr_scheduler_configs))
        stages = 1 if algorithm is None else len(self.stages(algorithm))
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and self._cap is None:
            self._cap = trainer.max_epochs
            trainer.fit_loop.max_epochs = self._cap * stages

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not where a stage ends: there validation is about to put every module back into the mode it found it in.
        algorithm = cast(LocalTask, pl_module).algorithm
        if algorithm is None or not self.sequential or self.stage >= len(self.stages(algorithm)):
            return
        units = frozenset(self.stages(algorithm)[self.stage])
        if algorithm.active != units:
            algorithm.train_only(units)

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
        value = float(trainer.callback_metrics[monitor])
        algorithm = task.algorithm
        stages = [["network"]] if algorithm is None else self.stages(algorithm)
        # Not a count of validations: Lightning skips one when it resumes from the last step of an epoch.
        self.epochs = trainer.current_epoch + 1 - sum(self.epochs_by_stage)
        if self._improves(value, maximise=self.monitor is None and task.maximise):
            self.best, self.bad_epochs = value, 0
            if self.restore_best:
                self._best_weights = self._weights(pl_module, algorithm, stages)
        else:
            self.bad_epochs += 1
        spent = self._cap is not None and self.epochs >= self._cap
        if spent or (self.patience is not None and self.bad_epochs >= self.patience):
            self._end_stage(trainer, pl_module, algorithm, stages)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        algorithm = cast(LocalTask, pl_module).algorithm
        if algorithm is not None and self.stage == len(self.stages(algorithm)):
            algorithm.train_only(None)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "epochs": self.epochs,
            "bad_epochs": self.bad_epochs,
            "best": self.best,
            "best_weights": self._best_weights,
            "epochs_by_stage": self.epochs_by_stage,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stage = state_dict["stage"]
        self.epochs = state_dict["epochs"]
        self.bad_epochs = state_dict["bad_epochs"]
        self.best = state_dict["best"]
        self._best_weights = state_dict["best_weights"]
        self.epochs_by_stage = list(state_dict["epochs_by_stage"])

    def _improves(self, value: float, maximise: bool) -> bool:
        if self.best is None:
            return True
        if maximise:
            return value > self.best + self.min_delta
        return value < self.best - self.min_delta

    def _weights(
        self, module: pl.LightningModule, algorithm: Algorithm | None, stages: list[list[str]]
    ) -> dict[str, Tensor]:
        """A copy of what this stage trains, normalisation statistics included."""
        state = (module if algorithm is None else algorithm).state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if algorithm is not None and len(stages) > 1:
            mine = {id(p) for unit in stages[self.stage] for group in algorithm.units()[unit] for p in group["params"]}
            parameters = dict(algorithm.named_parameters(remove_duplicate=False))
            tensors = {n: v for n, v in tensors.items() if n not in parameters or id(parameters[n]) in mine}
        return {name: value.detach().clone() for name, value in tensors.items()}

    def _end_stage(
        self, trainer: pl.Trainer, module: pl.LightningModule, algorithm: Algorithm | None, stages: list[list[str]]
    ) -> None:
        if self._best_weights:
            (module if algorithm is None else algorithm).load_state_dict(self._best_weights, strict=False)
        self.epochs_by_stage.append(self.epochs)
        self.stage += 1
        self.epochs, self.bad_epochs, self.best, self._best_weights = 0, 0, None, {}
        if self.stage == len(stages):
            trainer.should_stop = True
            if algorithm is not None and self.cache and isinstance(algorithm, LayerLocal):
                algorithm.cache_frozen(False)
