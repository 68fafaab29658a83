"""What watches a run: probes, the recorder of its figures, and the keeper of its checkpoint."""

from __future__ import annotations

import math
import signal
import threading
import time
from types import FrameType
from typing import Any, cast

import lightning.pytorch as pl
import torch
from typing_extensions import override

from locallearn.batch import Batch
from locallearn.energy import EnergyCallback
from locallearn.nets.blocks import evaluating
from locallearn.probe import probe_blocks
from locallearn.records import RunFolder
from locallearn.strategies.local import LocalStrategy, LocalTask
from locallearn.study._copies import Copies
from locallearn.study._costs import _Costs
from locallearn.study.plan import CHECKPOINT, Interrupted, Plan


class _Probes(pl.Callback):
    """Linear probes on every block. Comes before the meters, which must not see the samples being fetched."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._batches: tuple[Batch, Batch] | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # From loaders of their own, and after Lightning has got its own: a checkpoint's place in the data is for that.
        samples, strategy = self.plan.probe_samples, cast(LocalStrategy, trainer.strategy)
        info = cast(LocalTask, pl_module).info()
        if samples and info.classes:  # probes tell classes apart
            judged = strategy.feed(_first(self.plan.data.val_dataloader(), samples))
            if info.example.context:  # a graph: its batches may be parts of it, on which not every rule can infer
                self._batches = strategy.feed(info.example), judged
            else:
                self._batches = strategy.feed(_first(self.plan.data.train_dataloader(), samples)), judged

    def accuracies(self, trainer: pl.Trainer) -> dict[str, float]:
        """Accuracy of every block's probe, by the name of the metric; empty without probes."""
        if self._batches is None:
            return {}
        with trainer.precision_plugin.val_step_context():
            found = probe_blocks(self.plan.algorithm, *self._batches, self.plan.algorithm.outputs)
        return {f"block/{name}/probe_accuracy": value for name, value in found.items() if math.isfinite(value)}

    def examined(self, trainer: pl.Trainer) -> dict[str, float]:
        """The rule's own figures on the samples that probes are judged on, by the name of the metric."""
        if self._batches is None:
            return {}
        algorithm = self.plan.algorithm
        with trainer.precision_plugin.val_step_context(), torch.no_grad(), evaluating(algorithm):
            found = algorithm.examine(self._batches[1])
        return {f"layer/{layer}/{name}": value for layer, figures in found.items() for name, value in figures.items()}


class _Recorder(pl.Callback):
    """Writes metrics after every epoch, and ends a run that has reached its target.

    Comes before the schedule, so that all figures of an epoch are those of its own weights, not of restored ones.
    """

    folder: RunFolder  # made once the settings have been found good

    def __init__(self, plan: Plan, energy: EnergyCallback, probes: _Probes, costs: _Costs) -> None:
        self.plan = plan
        self.energy = energy
        self.probes = probes
        self.costs = costs
        self.copies = Copies(plan)
        self.target: dict[str, Any] | None = None
        self.started = False
        self._strategy: LocalStrategy | None = None
        self._losses: dict[str, tuple[float, int]] = {}  # of the epoch in which a checkpoint was made

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = True
        self._strategy = cast(LocalStrategy, trainer.strategy)
        self._strategy.losses = self._losses

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        blocks = self.plan.algorithm.blocks.names
        strategy = trainer.strategy
        assert isinstance(strategy, LocalStrategy)
        for unit, loss in strategy.mean_losses().items():
            metrics[f"block/{unit}/loss" if unit in blocks else f"unit/{unit}/loss"] = loss
        metrics |= self.probes.accuracies(trainer) | self.probes.examined(trainer)
        for layer, figures in self.plan.algorithm.diagnostics().items():
            metrics |= {f"layer/{layer}/{name}": value for name, value in figures.items()}
        timed = self.plan.algorithm.untimed is None
        if timed:
            metrics["cost/train_s"] = self.energy.running_seconds()
        metrics["cost/samples"] = self.costs.samples
        joules = self.energy.running_joules() if timed else {}
        metrics |= {f"cost/energy_j/{source}": value for source, value in joules.items() if value is not None}
        self.folder.log(trainer.current_epoch, trainer.global_step, metrics)
        self.copies.write(trainer.current_epoch, trainer.global_step, metrics)
        self._check_target(trainer, cast(LocalTask, pl_module), metrics, joules)
        if self.plan.progress is not None:
            self.plan.progress(trainer.current_epoch + 1, trainer.max_epochs or 0, metrics)

    @override
    def state_dict(self) -> dict[str, Any]:
        losses = {} if self._strategy is None else self._strategy.losses
        return {"target": self.target, "rows": self.folder.rows, "losses": losses}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.target = state_dict["target"]
        self._losses = state_dict["losses"]

    def _check_target(
        self, trainer: pl.Trainer, task: LocalTask, metrics: dict[str, float], joules: dict[str, float | None]
    ) -> None:
        wanted, value = self.plan.target, metrics[f"validation/{task.metric}"]
        if wanted is None or self.target is not None or (value < wanted if task.maximise else value > wanted):
            return
        self.target = {
            task.metric: wanted,
            "seconds": metrics.get("cost/train_s"),
            "samples": self.costs.samples_per_unit,
            "joules": joules,
        }
        trainer.should_stop = True


class _Keeper(pl.Callback):
    """Keeps a checkpoint to resume from, and stops when it is told to. Comes last: what it saves must be complete."""

    def __init__(self, plan: Plan, recorder: _Recorder) -> None:
        self.plan = plan
        self.recorder = recorder
        self._stop = threading.Event()
        self._saved_s = time.monotonic()
        self._handlers: dict[int, Any] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Here, because Lightning installs its own handlers just before.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)

    @property
    def asked(self) -> bool:
        """Whether somebody has asked to stop."""
        return self._stop.is_set()

    def wait(self, seconds: float) -> None:
        """Let seconds pass, until somebody asks to stop."""
        self._stop.wait(seconds)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_last_batch:  # else a resumed run would leave out the validation that is due now
            self._save_or_stop(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and trainer.is_last_batch and not trainer.should_stop:
            self._save_or_stop(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handlers()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Stop after this batch, so that the checkpoint is exact; a second signal stops at once."""
        if self._stop.is_set():
            raise KeyboardInterrupt
        self._stop.set()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _save_or_stop(self, trainer: pl.Trainer) -> None:
        now = time.monotonic()
        if not self._stop.is_set() and now - self._saved_s <= self.plan.checkpoint_s:
            return
        self._saved_s = now
        with self.recorder.energy.paused():  # not training; nor is it where a run that is to stop ends
            self.recorder.folder.write_with(CHECKPOINT, trainer.save_checkpoint)
        if self._stop.is_set():
            raise Interrupted


def _first(loader: Any, samples: int) -> Batch:
    """The first ``samples`` samples of a loader as one batch; a graph's single batch as it is."""
    batches: list[Batch] = []
    for batch in loader:
        batches.append(batch if isinstance(batch, Batch) else Batch(*batch))
        if batches[-1].context or sum(len(b.inputs) for b in batches) >= samples:
            break
    if len(batches) == 1:
        return batches[0]
    inputs = torch.cat([b.inputs for b in batches])[:samples]
    targets = torch.cat([b.targets for b in batches])[:samples]
    return Batch(inputs, targets)
