"""Writes the trajectory of a zeroth-order run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from locallearn.algorithms.zeroth_order import ZerothOrder
from locallearn.algorithms.zeroth_order.trajectory import Writer
from locallearn.study._callbacks import _Recorder
from locallearn.study.plan import TRAJECTORY, Plan


def trajectory_of(plan: Plan, recorder: _Recorder) -> list[pl.Callback]:
    """What writes the trajectory that was asked for; nothing where none was.

    Raises:
        ValueError: the file is there already, its folder is not, or gradients are clipped.
    """
    rule = plan.algorithm
    if not isinstance(rule, ZerothOrder) or rule.trajectory is None:
        return []
    if plan.trainer.get("gradient_clip_val"):
        raise ValueError(
            f"algorithm.trajectory keeps the numbers that steps are made of, and trainer.gradient_clip_val="
            f"{plan.trainer['gradient_clip_val']} changes the steps behind them, so they could not be replayed: leave one of "
            "the two out"
        )
    path = None if rule.trajectory == "run" else Path(rule.trajectory).expanduser()
    if path is not None and plan.resume is None and path.exists():
        raise ValueError(
            f"algorithm.trajectory is {path}, which is there already, and a trajectory is never overwritten: name another "
            "file, or run for the run's folder"
        )
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(
            f"algorithm.trajectory is {path}, and there is no folder {path.absolute().parent}: make it first"
        )
    return [_Trajectory(plan, rule, recorder, path)]


class _Trajectory(pl.Callback):
    """Comes before the keeper of checkpoints, so that a checkpoint has no step that the file has not."""

    def __init__(self, plan: Plan, rule: ZerothOrder, recorder: _Recorder, path: Path | None) -> None:
        self._plan, self._rule, self._recorder, self._path = plan, rule, recorder, path
        self._writer: Writer | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = self._path or self._recorder.folder.path / TRAJECTORY
        steps = None
        if self._plan.resume is not None:
            steps = self._rule.batches_seen
            if self._path is None:
                earlier = self._plan.resume / TRAJECTORY
                if not earlier.is_file():
                    raise ValueError(f"{earlier} is missing, and the trajectory of a run cannot begin in its middle")
                shutil.copyfile(earlier, path)
        self._writer = Writer(path, self._rule, trainer.optimizers, steps)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._writer is not None:
            self._writer.before()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._writer is not None:
            self._writer.step()
            if trainer.is_last_batch:
                self._writer.epoch()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._writer is not None:
            self._writer.flush()
        return {}

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
