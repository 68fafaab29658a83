"""One run: train one algorithm on one data set with one seed, measure it, and leave a record."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from typing_extensions import override

from locallearn.algorithms.base import Algorithm
from locallearn.batch import Batch
from locallearn.cost import measure_update, to_device
from locallearn.energy import EnergyCallback, EnergyMonitor, Meter
from locallearn.nets.blocks import Blocks
from locallearn.precision import multiplying
from locallearn.probe import probe_blocks
from locallearn.records import RunFolder, hardware, versions
from locallearn.strategies.local import LocalStrategy, LocalTask, OptimizerFactory, SchedulerFactory, make_optimizers
from locallearn.strategies.schedule import Schedule

CHECKPOINT = "resume.ckpt"
"""Where an interrupted run keeps what ``train resume=FOLDER`` goes on from."""
SAMPLES = "reconstructions.png"
"""Where a run keeps what its task made of some test samples."""


class Interrupted(Exception):
    """The user or the system asked the run to stop; it did so between two batches."""


@dataclass
class Plan:
    """Everything one run needs, as typed objects; nothing here knows of Hydra.

    Attributes:
        names: ``algorithm``, ``dataset``, ``net`` and ``task`` as they go into the record.
        seed: of the network's weights; order of data and the rule's own draws are seeded where those were made.
        data: the data module.
        make_net: makes the network, after PyTorch's generator has been seeded.
        make_task: makes the LightningModule from the network.
        algorithm: the rule, not yet attached.
        optimizer: makes a unit's optimizer.
        scheduler: makes a unit's learning rate scheduler.
        schedule: stages and stopping rule.
        meters: sources of joules, new ones for every run.
        idle_s: seconds to watch the idle machine before training, for net joules; 0 leaves net empty.
        runs_dir: where the record goes.
        max_epochs: cap of every stage.
        trainer: further arguments of ``lightning.pytorch.Trainer``.
        matmul_precision: inside products of float32 matrices: ``highest`` (float32), ``high`` (TF32 where the device has
            it) or ``medium`` (bfloat16 where it has it); sums and everything else stay in float32.
        logger: a Lightning logger to copy the metrics to.
        variant: what sets this run apart from others of the same algorithm, for the record.
        config: the resolved configuration, for the record.
        command: what was typed, for the record.
        mode: ``own``, ``matched`` or ``target`` (docs/studies.md).
        target: in mode ``target``: stop when the task's validation metric reaches it, and report what it cost.
        probe_samples: training samples that linear probes are fitted on after every epoch; 0 for no probes.
        checkpoint_s: seconds between two checkpoints to resume from.
        evaluate_test: read the test set at the end; a tuning trial must not.
        resume: folder of an interrupted run to go on from.
        progress: told ``(epoch, epochs, metrics)`` after every epoch.
    """

    names: dict[str, str]
    seed: int
    data: pl.LightningDataModule
    make_net: Callable[[], Blocks]
    make_task: Callable[[Blocks], pl.LightningModule]
    algorithm: Algorithm
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None
    schedule: Schedule
    meters: Sequence[Meter]
    idle_s: float
    runs_dir: Path
    max_epochs: int
    trainer: dict[str, Any] = field(default_factory=dict)
    matmul_precision: str = "highest"
    logger: Logger | None = None
    variant: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    mode: str = "own"
    target: float | None = None
    probe_samples: int = 1000
    checkpoint_s: float = 300.0
    evaluate_test: bool = True
    resume: Path | None = None
    progress: Callable[[int, int, dict[str, float]], None] | None = None


def run(plan: Plan) -> Path:
    """Train, measure and record one run.

    Returns:
        The run's folder. Its record says ``done``.

    Raises:
        Interrupted: Ctrl-C or a termination signal; the record says ``interrupted`` and holds a checkpoint.
        Exception: whatever stopped the run; the record says ``failed`` and why. The raised error has the folder as its
            ``run_folder``.
    """
    with multiplying(plan.matmul_precision):
        return _run(plan)


def _run(plan: Plan) -> Path:
    resume = None if plan.resume is None else _checkpoint_of(plan.resume)
    energy = EnergyCallback(EnergyMonitor(plan.meters, idle_s=plan.idle_s))
    probes = _Probes(plan)
    recorder = _Recorder(plan, energy, probes)
    task, trainer = _prepared(plan, [probes, energy, recorder, plan.schedule, _Keeper(plan, recorder)])
    plan.data.prepare_data()
    plan.data.setup("fit")  # missing data is told before a folder is made
    folder = recorder.folder = RunFolder.create(plan.runs_dir, _start(plan, cast(LocalTask, task)))
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        folder.update(_train(plan, task, trainer, recorder, resume))
    except (Interrupted, KeyboardInterrupt) as error:
        error.run_folder = folder.finish("interrupted", "stopped by the user or the system")  # type: ignore[union-attr]
        raise
    except BaseException as error:
        error.run_folder = folder.finish("failed", _sentence(error))  # type: ignore[attr-defined]
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # Lightning leaves Ctrl-C switched off after one
    (folder.path / CHECKPOINT).unlink(missing_ok=True)
    return folder.finish("done")


def check(plan: Plan) -> None:
    """Raise what :func:`run` would say of the plan's settings, without training or leaving a record.

    The plan is used up: its algorithm is attached to a network afterwards.
    """
    _prepared(plan, [])


def attached_task(plan: Plan) -> Any:
    """The plan's task with its network and the algorithm attached, the network's weights drawn from the plan's seed."""
    torch.manual_seed(plan.seed)
    task = plan.make_task(plan.make_net())
    cast(LocalTask, task).use(plan.algorithm)
    return task


def _prepared(plan: Plan, callbacks: list[pl.Callback]) -> tuple[pl.LightningModule, pl.Trainer]:
    """Everything that can refuse the settings, built; optimizers too, which the strategy makes anew."""
    task = attached_task(plan)
    plan.schedule.check(plan.algorithm, scheduled=plan.scheduler is not None)
    metric = cast(LocalTask, task).metric
    if plan.target is not None and metric in ("accuracy", "auc") and plan.target > 1:
        raise ValueError(f"the target is {plan.target}, but {metric} is a number up to 1: write 0.97 for 97 %")
    for optimizer in make_optimizers(plan.algorithm, plan.optimizer).values():
        if plan.scheduler is not None:
            plan.scheduler(optimizer)
    with quiet():
        trainer = pl.Trainer(
            strategy=LocalStrategy(plan.algorithm, plan.optimizer, plan.scheduler),
            max_epochs=plan.max_epochs,
            logger=plan.logger or False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1_000_000,  # per-batch logging costs more than a small batch; epochs are logged
            **plan.trainer,
        )
    return task, trainer


def _checkpoint_of(folder: Path) -> Path:
    checkpoint = folder / CHECKPOINT
    if not checkpoint.is_file():
        raise ValueError(
            f"{folder} holds no {CHECKPOINT} to resume from: name the folder of an interrupted run (a finished one has "
            "none)"
        )
    return checkpoint


def _sentence(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__


def _start(plan: Plan, task: LocalTask) -> dict[str, Any]:
    """What is known of a run before it starts."""
    algorithm = plan.algorithm
    params = sum(p.numel() for p in algorithm.blocks.parameters())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **plan.names,
        "seed": plan.seed,
        "variant": plan.variant,
        "metric": {"name": task.metric, "maximise": task.maximise},
        "locality": str(algorithm.locality),
        "mode": plan.mode,
        "blocks": algorithm.blocks.names,
        "config": plan.config,
        "command": plan.command,
        "versions": versions(),
        "hardware": {**hardware(gpus), "threads": torch.get_num_threads()},
        "resumed_from": None if plan.resume is None else plan.resume.name,
        "cost": {"params": params, "extra_params": algorithm.added_parameters},
    }


def _train(
    plan: Plan, task: pl.LightningModule, trainer: pl.Trainer, recorder: _Recorder, resume: Path | None
) -> dict[str, Any]:
    with quiet():
        try:
            trainer.fit(task, datamodule=plan.data, ckpt_path=resume, weights_only=True)
            figures = _figures(plan, cast(LocalTask, task), trainer, recorder)
            validation = trainer.validate(task, datamodule=plan.data, verbose=False)[0]
            test = trainer.test(task, datamodule=plan.data, verbose=False)[0] if plan.evaluate_test else {}
        except SystemExit:  # what Lightning makes of Ctrl-C where there is no batch to finish
            raise Interrupted from None
    write_samples = getattr(task, "write_samples", None)  # pictures, where a task makes them
    if plan.evaluate_test and write_samples is not None:
        write_samples(recorder.folder.path / SAMPLES)
    figures["validation"] = {name.split("/")[1]: value for name, value in validation.items()}
    figures["test"] = {name.split("/")[1]: value for name, value in test.items()}
    return figures


def _figures(plan: Plan, task: LocalTask, trainer: pl.Trainer, recorder: _Recorder) -> dict[str, Any]:
    """Cost of the training that has just ended; measuring an update happens after it, on a copy."""
    energy = recorder.energy
    device = trainer.strategy.root_device
    allocated = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    batch = to_device(task.to_batch(next(iter(plan.data.train_dataloader()))), device)
    with trainer.precision_plugin.train_step_context():
        update = measure_update(plan.algorithm, batch, plan.schedule.sequential)
    return {
        "cost": {
            "train_s": energy.seconds,
            "validation_s": energy.validation_seconds,
            "co2_g": energy.co2_g,
            "update_flops": update.flops,
            "activation_peak_bytes": update.activation_peak_bytes,
            "allocated_peak_bytes": allocated,
            "samples": recorder.samples / len(plan.schedule.stages(plan.algorithm)),
            "energy_j": {reading.source: reading.joules for reading in energy.readings},
        },
        "energy": [reading.to_dict() for reading in energy.readings],
        "target": recorder.target or (None if plan.target is None else {task.metric: plan.target}),
        # The last entry is that of a stage which a target ended.
        "epochs": [*plan.schedule.epochs_by_stage, *([plan.schedule.epochs] if plan.schedule.epochs else [])],
    }


class _Probes(pl.Callback):
    """Linear probes on every block. Comes before the meters, which must not see the samples being fetched."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._batches: tuple[Batch, Batch] | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # From loaders of their own, and after Lightning has got its own: a checkpoint's place in the data is for that.
        samples, device = self.plan.probe_samples, trainer.strategy.root_device
        info = cast(LocalTask, pl_module).info()
        if samples and info.classes:  # probes tell classes apart
            judged = _first(self.plan.data.val_dataloader(), samples, device)
            if info.example.context:  # a graph: its batches may be parts of it, on which not every rule can infer
                self._batches = to_device(info.example, device), judged
            else:
                self._batches = _first(self.plan.data.train_dataloader(), samples, device), judged

    def accuracies(self, trainer: pl.Trainer) -> dict[str, float]:
        """Accuracy of every block's probe, by the name of the metric; empty without probes."""
        if self._batches is None:
            return {}
        with trainer.precision_plugin.val_step_context():
            found = probe_blocks(self.plan.algorithm, *self._batches, self.plan.algorithm.outputs)
        return {f"block/{name}/probe_accuracy": value for name, value in found.items() if math.isfinite(value)}


class _Recorder(pl.Callback):
    """Writes metrics after every epoch, and ends a run that has reached its target.

    Comes before the schedule, so that all figures of an epoch are those of its own weights, not of restored ones.
    """

    folder: RunFolder  # made once the settings have been found good

    def __init__(self, plan: Plan, energy: EnergyCallback, probes: _Probes) -> None:
        self.plan = plan
        self.energy = energy
        self.samples = 0
        self.probes = probes
        self.target: dict[str, Any] | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += len(batch[0])

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
        metrics |= self.probes.accuracies(trainer)
        for layer, figures in self.plan.algorithm.diagnostics().items():
            metrics |= {f"layer/{layer}/{name}": value for name, value in figures.items()}
        metrics["cost/train_s"] = self.energy.running_seconds()
        metrics["cost/samples"] = self.samples
        joules = self.energy.running_joules()
        metrics |= {f"cost/energy_j/{source}": value for source, value in joules.items() if value is not None}
        self.folder.log(trainer.current_epoch, trainer.global_step, metrics)
        if trainer.logger is not None:
            trainer.logger.log_metrics(metrics, trainer.global_step)
        self._check_target(trainer, cast(LocalTask, pl_module), metrics, joules)
        if self.plan.progress is not None:
            self.plan.progress(trainer.current_epoch + 1, trainer.max_epochs or 0, metrics)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "target": self.target}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples = state_dict["samples"]
        self.target = state_dict["target"]

    def _check_target(
        self, trainer: pl.Trainer, task: LocalTask, metrics: dict[str, float], joules: dict[str, float | None]
    ) -> None:
        wanted, value = self.plan.target, metrics[f"validation/{task.metric}"]
        if wanted is None or self.target is not None or (value < wanted if task.maximise else value > wanted):
            return
        self.target = {
            task.metric: wanted,
            "seconds": metrics["cost/train_s"],
            "samples": self.samples / len(self.plan.schedule.stages(self.plan.algorithm)),
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
        aside = self.recorder.folder.path / f".{CHECKPOINT}"
        trainer.save_checkpoint(aside)
        os.replace(aside, self.recorder.folder.path / CHECKPOINT)
        if self._stop.is_set():
            raise Interrupted


def _first(loader: Any, samples: int, device: torch.device) -> Batch:
    """The first ``samples`` samples of a loader as one batch; a graph's single batch as it is."""
    batches: list[Batch] = []
    for batch in loader:
        batches.append(batch if isinstance(batch, Batch) else Batch(*batch))
        if batches[-1].context or sum(len(b.inputs) for b in batches) >= samples:
            break
    if len(batches) == 1:
        return to_device(batches[0], device)
    inputs = torch.cat([b.inputs for b in batches])[:samples]
    targets = torch.cat([b.targets for b in batches])[:samples]
    return to_device(Batch(inputs, targets), device)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's advice off the terminal: it is about settings that are chosen here on purpose."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", message=r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
