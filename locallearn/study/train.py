"""One run: train one algorithm on one data set with one seed, measure it, and leave a record."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch

from locallearn.cost import measure_update, to_device
from locallearn.energy import EnergyCallback, EnergyMonitor
from locallearn.precision import multiplying
from locallearn.records import RunFolder, hardware, versions
from locallearn.strategies.local import LocalStrategy, LocalTask, make_optimizers
from locallearn.study._callbacks import _Keeper, _Probes, _Recorder
from locallearn.study.plan import CHECKPOINT, SAMPLES, Interrupted, Plan
from locallearn.tasks._checks import check_batch_sizes
from locallearn.tasks._task import Task

__all__ = ["CHECKPOINT", "SAMPLES", "Interrupted", "Plan", "attached_task", "check", "quiet", "run"]


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
    if isinstance(task, Task) and hasattr(plan.data, "batch_sizes"):  # foreign loaders are asked when training starts
        check_batch_sizes(plan.data.batch_sizes(), task.net, plan.algorithm, task.info())
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
