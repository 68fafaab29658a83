"""What one run needs: its plan, and how it may be stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

from locallearn.algorithms.base import Algorithm
from locallearn.energy import Meter
from locallearn.nets.blocks import Blocks
from locallearn.records import CHECKPOINT
from locallearn.strategies.local import OptimizerFactory, SchedulerFactory
from locallearn.strategies.schedule import Schedule

MODEL = "model.pt"
"""Where a finished run keeps what it trained; ``locallearn.load(FOLDER)`` reads it."""
TRAJECTORY = "trajectory.bin"
"""Where a zeroth-order run keeps the numbers of its steps, if it is to; ``locallearn replay FOLDER`` reads it."""
SAMPLES = "reconstructions.png"
"""Where a run keeps what its task made of some test samples."""


__all__ = ["CHECKPOINT", "MODEL", "SAMPLES", "TRAJECTORY", "Interrupted", "Plan"]


class Interrupted(Exception):
    """The user or the system asked the run to stop; it did so between two batches.

    Attributes:
        run_folder: of the run, once it has one.
        ended: the same where training was over by then: the run is ``done``, and its caller does not begin with another.
    """

    run_folder: Path | None = None
    ended: Path | None = None


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
        scheduler_interval: ``epoch`` or ``step``: when it advances.
        schedule: stages and stopping rule.
        meters: sources of joules, new ones for every run.
        idle_s: seconds to watch the idle machine before training and after it, for net joules; 0 leaves net empty.
        cooldown_s: seconds in which everything rests before the meters start, so that runs one after another begin equally
            warm.
        warmup_steps: steps of every stage on a copy before the meters start, so that what only a first step costs is not
            measured; weights, order of data and draws are the same with and without.
        runs_dir: where the record goes.
        max_epochs: cap of every stage.
        trainer: further arguments of ``lightning.pytorch.Trainer``.
        matmul_precision: inside products of float32 matrices: ``highest`` (float32), ``high`` (TF32 where the device has
            it) or ``medium`` (bfloat16 where it has it); sums and everything else stay in float32.
        channels_last: see :class:`~locallearn.nets.execution.Execution`.
        compile: the same.
        compile_backend: the same.
        logger: a Lightning logger to copy the metrics to, or what makes one when the run's folder is there, and is handed
            that. The folder is renamed when the run ends, after the logger has finished.
        variant: what sets this run apart from others of the same algorithm, for the record.
        config: the resolved configuration, for the record.
        command: what was typed, for the record.
        mode: ``own``, ``matched`` or ``target`` (docs/studies.md).
        target: in mode ``target``: stop when the task's validation metric reaches it, and report what it cost.
        probe_samples: training samples that linear probes are fitted on after every epoch; 0 for no probes.
        checkpoint_s: seconds between two checkpoints to resume from.
        evaluate_test: read the test set at the end; a tuning trial must not.
        keep_model: keep what was trained in ``model.pt``.
        resume: folder of an interrupted run to go on from.
        init_from: folder of a finished run, or its ``model.pt``, whose network's weights this one begins with; a readout of
            other shape stays as it is drawn.
        progress: told ``(epoch, epochs, metrics)`` after every epoch.
        say: told in a sentence what was decided for the run that its settings do not say.
        workers: processes that train at once on this machine, of which this is one; for the record.
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
    scheduler_interval: str = "epoch"
    trainer: dict[str, Any] = field(default_factory=dict)
    matmul_precision: str = "highest"
    channels_last: bool = False
    compile: str | None = None
    compile_backend: str = "inductor"
    logger: Logger | Callable[[Path], Logger] | None = None
    variant: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    mode: str = "own"
    target: float | None = None
    probe_samples: int = 1000
    checkpoint_s: float = 300.0
    warmup_steps: int = 0
    cooldown_s: float = 0.0
    evaluate_test: bool = True
    keep_model: bool = True
    resume: Path | None = None
    init_from: Path | None = None
    progress: Callable[[int, int, dict[str, float]], None] | None = None
    say: Callable[[str], None] | None = None
    workers: int = 1
