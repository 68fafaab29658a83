"""A run's figures, copied to a Lightning logger: the same names in every one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

from locallearn.records import Record, RunFolder
from locallearn.study.plan import Plan

_COSTS = ("validation_s", "co2_g", "update_flops", "train_flops", "activation_peak_bytes", "allocated_peak_bytes")

_OURS = ("save", "finalize")


def logged_name(name: str) -> str:
    """What loggers call a figure: TensorBoard takes letters, digits, ``_ - . /`` alone, and others then shall not differ."""
    return re.sub(r"[^-\w./]", "_", name, flags=re.ASCII)


class Copies:
    """Hands figures to the plan's logger. Whatever that raises costs the rest of the copies, never the run.

    Args:
        plan: its logger, or what makes one for a run's folder.

    Attributes:
        notes: for the record: what went wrong.
    """

    def __init__(self, plan: Plan) -> None:
        self.notes: list[str] = []
        self._plan = plan
        self._logger: Logger | None = None

    def begin(self, folder: RunFolder, trainer: pl.Trainer) -> None:
        """Make the logger, give it to the Trainer, and hand it the settings and what an earlier part has logged."""
        made = self._plan.logger
        self._logger = made if made is None or isinstance(made, Logger) else made(folder.path)
        if self._logger is None:
            return
        trainer.loggers = [self._logger]
        # Lightning saves and ends a logger with each of fit, validate and test, and logs some of the figures once more.
        for name in _OURS:
            setattr(self._logger, name, lambda *_, **__: None)
        trainer._logger_connector.log_metrics = lambda *_, **__: None  # type: ignore[method-assign]
        with self._guarded("take the settings"):
            if self._plan.config:
                self._logger.log_hyperparams(dict(self._plan.config))
        earlier = Record(folder.path, {}).metrics() if folder.rows else []
        for (epoch, step), rows in groupby(earlier, key=lambda row: (row.epoch, row.step)):
            self.write(epoch, step, {row.name: row.value for row in rows})

    def write(self, epoch: int, step: int, figures: Mapping[str, float | None]) -> None:
        """One row; unknown figures are left out."""
        if self._logger is None:
            return
        known = {logged_name(name): float(value) for name, value in figures.items() if value is not None}
        with self._guarded("take a row"):
            self._logger.log_metrics({"epoch": epoch, **known}, step)
            type(self._logger).save(self._logger)

    def end(self, epoch: int, step: int, figures: Mapping[str, Any]) -> None:
        """What a finished run has cost, and the test set's figures, in a last row."""
        cost = figures["cost"]
        joules = {f"cost/energy_j/{source}": value for source, value in cost["energy_j"].items()}
        totals = {f"cost/{name}": cost.get(name) for name in ("train_s", *_COSTS)}
        test = {f"test/{name}": value for name, value in figures.get("test", {}).items()}
        self.write(epoch, step, {**test, **totals, **joules})

    def close(self, status: str) -> None:
        """Let the logger finish its files, while the run's folder still has the name that it knows.

        Args:
            status: ``"success"``, ``"failed"`` or ``"aborted"``, as Lightning's loggers know them.
        """
        logger = self._logger
        if logger is None:
            return
        for name in _OURS:
            delattr(logger, name)
        with self._guarded("finish"):
            # Weights & Biases would go on with it in the next run of this process; asked later, Aim would open a new one.
            finish = getattr(getattr(logger, "experiment", None), "finish", None)
            logger.finalize(status)
            if callable(finish):
                finish()
        self._logger = None

    @contextmanager
    def _guarded(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            name = type(self._logger).__name__
            said = " ".join(str(error).split())
            self.notes.append(f"{name} could not {doing}, and got nothing more: {type(error).__name__}: {said}")
            self._logger = None
