"""One run: train one algorithm on one data set with one seed, measure it, and leave a record."""

from __future__ import annotations

import gc
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from locallearn.algorithms.base import Algorithm
from locallearn.energy import EnergyCallback, EnergyMonitor
from locallearn.precision import multiplying
from locallearn.records import SHARES, Record, RunFolder, hardware, load_record, source, versions
from locallearn.strategies.local import LocalStrategy, LocalTask
from locallearn.strategies.making import make_optimizers, make_schedulers
from locallearn.study._beginning import Beginning, begin_with, weights_behind
from locallearn.study._callbacks import _Keeper, _Probes, _Recorder
from locallearn.study._costs import _Costs
from locallearn.study._rehearsal import make_trainer, precision_of, quiet, rehearse
from locallearn.study._signals import stoppable, terminations
from locallearn.study._tensors import read_tensors
from locallearn.study._trajectory import trajectory_of
from locallearn.study.plan import CHECKPOINT, MODEL, SAMPLES, Interrupted, Plan
from locallearn.tasks._checks import check_batch_sizes
from locallearn.tasks._task import Task

__all__ = [
    "CHECKPOINT",
    "MODEL",
    "SAMPLES",
    "Interrupted",
    "Plan",
    "attached_task",
    "check",
    "quiet",
    "read_tensors",
    "run",
    "weights_behind",
]

_QUICK = 100_000
"""Most rows of an example (of a graph: all its nodes) whose first batch is tried before everything else."""


def run(plan: Plan) -> Path:
    """Train, measure and record one run.

    Returns:
        The run's folder. Its record says ``done``.

    Raises:
        Interrupted: Ctrl-C or a termination signal; the record says ``interrupted`` and holds a checkpoint. One that came
            when there was no batch left to train, as in the last look at the idle machine, costs the run nothing: its record
            says ``done``, and the error that it has ``ended``.
        Exception: whatever stopped the run; the record says ``failed`` and why. The raised error has the folder as its
            ``run_folder``; it is still the part folder where not even the record could be written.
    """
    gc.collect()  # Lightning's objects hold each other: what an earlier run left would stand in this one's peak of memory
    with multiplying(plan.matmul_precision), terminations():
        return _run(plan)


def _run(plan: Plan) -> Path:
    earlier = None if plan.resume is None else _Earlier.read(plan.resume)
    monitor = EnergyMonitor(plan.meters, idle_s=plan.idle_s, cooldown_s=plan.cooldown_s)
    energy = EnergyCallback(monitor)
    probes = _Probes(plan)
    costs = _Costs(plan)
    recorder = _Recorder(plan, energy, probes, costs)
    kept = trajectory_of(plan, recorder)
    keeper = _Keeper(plan, recorder)
    monitor.wait = keeper.wait
    task, trainer, begun = _prepared(plan, [costs, probes, energy, *kept, recorder, plan.schedule, keeper])
    if earlier is not None:
        earlier.check(task)
        begun = Beginning.from_dict(earlier.record.data.get("beginning"))
    decided = [] if begun is None or begun.told is None else [begun.told]
    plan.data.prepare_data()
    plan.data.setup("fit")  # missing data is told before a folder is made
    rehearse(plan, task)
    folder = recorder.folder = RunFolder.create(
        plan.runs_dir,
        {
            **_start(plan, cast(LocalTask, task), trainer, earlier),
            "beginning": None if begun is None else begun.to_dict(),
            "notes": decided,
        },
    )
    try:
        if earlier is not None:
            folder.update({"parts": earlier.hand_over(folder)})
        recorder.copies.begin(folder, trainer)
        figures = _train(plan, task, trainer, recorder, earlier)
        figures["notes"] = [*decided, *figures.get("notes", [])]
        recorder.copies.end(max(0, trainer.current_epoch - 1), trainer.global_step, figures)
        folder.update(figures)
        if plan.keep_model:
            with plan.schedule.as_far_as_trained(plan.algorithm):
                folder.write_with(MODEL, partial(_save_model, task))
        recorder.copies.close("success")
        if recorder.copies.notes:
            folder.update({"notes": [*figures["notes"], *recorder.copies.notes]})
    except (Interrupted, KeyboardInterrupt) as error:
        recorder.copies.close("aborted")
        _end(folder, "interrupted", str(error) or "stopped by the user or the system", error)
        raise
    except BaseException as error:
        recorder.copies.close("failed")
        _end(folder, "failed", _sentence(error), error)
        raise
    try:
        ended = folder.finish("done")
    except BaseException as error:
        # What is in the record already must not be overwritten with another ending.
        error.run_folder = folder.abandon()  # type: ignore[attr-defined]
        raise
    if keeper.asked:
        stopped = Interrupted()
        stopped.run_folder = stopped.ended = ended
        raise stopped
    return ended


def _end(folder: RunFolder, status: str, reason: str, error: BaseException) -> None:
    """Finishes a run that did not end well; if that fails, too, ``error`` stays what the user must see."""
    try:
        ended = folder.finish(status, reason)
    except Exception as failure:
        ended = folder.abandon()
        error.add_note(f"The record in {ended} could not be completed: {failure}")
    error.run_folder = ended  # type: ignore[attr-defined]


def _save_model(task: pl.LightningModule, place: Path) -> None:
    """What was trained, readable without running anybody's code; the record beside it says what to build around it."""
    state = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in task.state_dict().items()}
    active = cast(
        Algorithm, cast(LocalTask, task).algorithm
    ).active  # units that answer where a sequential training was stopped
    content = io.BytesIO()  # PyTorch's own words for a full disk do not say that it is full
    torch.save({"format": 1, "state_dict": state, "active": None if active is None else sorted(active)}, content)
    place.write_bytes(content.getbuffer())


def check(plan: Plan) -> None:
    """Raise what :func:`run` would say of the plan's settings, without training or leaving a record.

    The plan is used up: its algorithm is attached to a network afterwards.
    """
    task, *_ = _prepared(plan, [])
    if len(cast(LocalTask, task).info().example.inputs) <= _QUICK:
        plan.data.prepare_data()
        plan.data.setup("fit")
        rehearse(plan, task)


def attached_task(plan: Plan) -> Any:
    """The plan's task with its network and the algorithm attached, the network's weights drawn from the plan's seed.

    Raises:
        ValueError: the run that the weights are to come from has none that fit.
    """
    return _attached(plan)[0]


def _attached(plan: Plan) -> tuple[Any, Beginning | None]:
    """The task, and what its network's weights were begun with where that are those of another run."""
    torch.manual_seed(plan.seed)
    net = plan.make_net()
    begun = None
    if plan.init_from is not None and plan.resume is None:  # a checkpoint has later weights
        begun = begin_with(net, plan.init_from)
        if begun.told is not None and plan.say is not None:
            plan.say(begun.told)
    task = plan.make_task(net)
    cast(LocalTask, task).use(plan.algorithm)
    return task, begun


def check_last_batch(plan: Plan, task: Any) -> None:
    """Refuse a last batch of one sample, if the network cannot be trained on it, before data are read.

    Raises:
        ValueError: says which batch size.
    """
    if isinstance(task, Task) and hasattr(plan.data, "batch_sizes"):  # other data are asked when they are there
        check_batch_sizes(plan.data.batch_sizes(), task.net, plan.algorithm, task.info())


def _prepared(plan: Plan, callbacks: list[pl.Callback]) -> tuple[pl.LightningModule, pl.Trainer, Beginning | None]:
    """Everything that can refuse the settings, built; optimizers too, which the strategy makes anew."""
    task, begun = _attached(plan)
    if (
        not {"limit_train_batches", "max_steps"} & plan.trainer.keys()
    ):  # else it may never come, which the rehearsal knows
        check_last_batch(plan, task)
    plan.schedule.check(plan.algorithm, scheduled=plan.scheduler is not None)
    metric = cast(LocalTask, task).metric
    if plan.target is not None and metric in SHARES and plan.target > 1:
        raise ValueError(f"the target is {plan.target}, but {metric} is a number up to 1: write 0.97 for 97 %")
    optimizers = make_optimizers(plan.algorithm, plan.optimizer)
    if plan.scheduler is not None:
        make_schedulers(optimizers, plan.scheduler, plan.scheduler_interval, metric, cast(LocalTask, task).maximise)
    trainer = make_trainer(plan, plan.algorithm, callbacks, max_epochs=plan.max_epochs, logger=False)
    strategy = cast(LocalStrategy, trainer.strategy)
    strategy.check(trainer)
    strategy.execution.check(cast(LocalTask, task).net, cast(LocalTask, task).info().example.inputs)
    return task, trainer, begun


@dataclass(frozen=True)
class _Earlier:
    """The part of a run that a checkpoint goes on from."""

    record: Record
    path: Path
    checkpoint: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> _Earlier:
        """From the folder of an interrupted run.

        Raises:
            ValueError: there is no checkpoint, or nothing can be gone on from it.
        """
        path = folder / CHECKPOINT
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no {CHECKPOINT} to resume from: name the folder of an interrupted run (a finished one has "
                "none)"
            )
        checkpoint = read_tensors(path)
        needed = {"state_dict", "optimizer_states", "loops", "callbacks", "epoch", "global_step"}
        known = isinstance(checkpoint, dict) and needed <= checkpoint.keys()
        if not known or _Recorder.__qualname__ not in checkpoint["callbacks"]:
            raise ValueError(
                f"{path} is no checkpoint of a run of locallearn: it lacks the state of the training, so nothing can be gone "
                "on from it; start the run again"
            )
        return cls(load_record(folder), path, checkpoint)

    def check(self, task: pl.LightningModule) -> None:
        """Refuse a checkpoint of something else, before a folder is made."""
        try:
            task.load_state_dict(self.checkpoint["state_dict"])
        except Exception as error:
            what = " ".join(str(error).split())
            raise ValueError(
                f"{self.path} does not fit what the run's settings build, so nothing can be gone on from it: {what}"
            ) from error

    def hand_over(self, folder: RunFolder) -> list[dict[str, Any]]:
        """Begins ``folder`` with the curves up to the checkpoint; returns what the record says of all parts so far."""
        rows = self.checkpoint["callbacks"][_Recorder.__qualname__].get("rows")
        epochs = folder.take_over(self.record.path, rows, int(self.checkpoint["global_step"]))
        parts = [part for part in _list(self.record.data.get("parts")) if isinstance(part, dict)]
        before = sum(part["epochs"] for part in parts if isinstance(part.get("epochs"), int))
        known = {key: self.record.data.get(key) for key in ("hardware", "versions", "source", "started")}
        return [*parts, {**known, "epochs": len(epochs) - before}]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _sentence(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__


def _start(plan: Plan, task: LocalTask, trainer: pl.Trainer, earlier: _Earlier | None) -> dict[str, Any]:
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
        "precision": precision_of(trainer, plan.matmul_precision),
        "blocks": algorithm.blocks.names,
        "config": plan.config,
        "command": plan.command,
        "versions": versions(),
        "source": source(),
        "hardware": {
            **hardware(gpus),
            "threads": torch.get_num_threads(),
            **({"workers": plan.workers} if plan.workers > 1 else {}),
        },
        "resumed_from": None if earlier is None else earlier.record.id,
        "cost": {"params": params, "extra_params": algorithm.added_parameters},
    }


def _train(
    plan: Plan, task: pl.LightningModule, trainer: pl.Trainer, recorder: _Recorder, earlier: _Earlier | None
) -> dict[str, Any]:
    with quiet(), stoppable():
        _fit(plan, task, trainer, recorder, None if earlier is None else earlier.path)
        figures = _figures(plan, cast(LocalTask, task), trainer, recorder)
        with plan.schedule.as_far_as_trained(plan.algorithm):
            validation = trainer.validate(task, datamodule=plan.data, verbose=False)[0]
            test = trainer.test(task, datamodule=plan.data, verbose=False)[0] if plan.evaluate_test else {}
    write_samples = getattr(task, "write_samples", None)  # pictures, where a task makes them
    if plan.evaluate_test and write_samples is not None:
        write_samples(recorder.folder.path / SAMPLES)
    figures["validation"] = {name.split("/")[1]: value for name, value in validation.items()}
    figures["test"] = {name.split("/")[1]: value for name, value in test.items()}
    return figures


def _fit(
    plan: Plan, task: pl.LightningModule, trainer: pl.Trainer, recorder: _Recorder, checkpoint: Path | None
) -> None:
    try:
        trainer.fit(task, datamodule=plan.data, ckpt_path=checkpoint, weights_only=True)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        if checkpoint is None or recorder.started:
            raise
        raise ValueError(
            f"{checkpoint} is damaged, or was made by other versions of the code: the state of the training in it cannot be "
            f"taken up ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def _figures(plan: Plan, task: LocalTask, trainer: pl.Trainer, recorder: _Recorder) -> dict[str, Any]:
    """Cost of the training that has just ended; measuring an update happens after it, on a copy."""
    energy, stages = recorder.energy, plan.schedule.stages(plan.algorithm)
    untrained = plan.schedule.untrained(plan.algorithm)
    figures = {
        "cost": {
            "train_s": energy.seconds,
            "validation_s": energy.validation_seconds,
            "co2_g": energy.co2_g,
            **recorder.costs.figures(trainer, task),
            "energy_j": {reading.source: reading.joules for reading in energy.readings},
        },
        "energy": [reading.to_dict() for reading in energy.readings],
        "target": recorder.target or (None if plan.target is None else {task.metric: plan.target}),
        # One entry per stage; the last one above 0 may be that of a stage which something else than the schedule ended.
        "epochs": [*plan.schedule.epochs_by_stage, *(0 for _ in stages[plan.schedule.stage :])],
        **({"untrained": untrained} if untrained else {}),
        **({"notes": recorder.costs.notes} if recorder.costs.notes else {}),
    }
    return figures if plan.algorithm.untimed is None else _untimed(figures, plan.algorithm.untimed)


_OF_TRAINING = (
    *("train_s", "co2_g", "update_flops", "once_flops", "train_flops"),
    *("activation_peak_bytes", "allocated_peak_bytes", "gradient_bytes"),
)


def _untimed(figures: dict[str, Any], why: str) -> dict[str, Any]:
    """The same without what training cost, which is somebody else's cost."""
    cost = figures["cost"]
    empty = dict.fromkeys(_OF_TRAINING)
    stages = [{**stage, **{key: None for key in empty if key in stage}} for stage in cost["stages"]]
    return {
        **figures,
        "cost": {**cost, **empty, "energy_j": {}, "stages": stages},
        "energy": [],
        "notes": [*figures.get("notes", []), why],
    }
