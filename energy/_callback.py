"""Meters inside a Lightning ``fit``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from locallearn.energy._meter import Reading
from locallearn.energy._window import EnergyMonitor, Window


@dataclass(frozen=True)
class _Totals:
    """What a fit has cost so far."""

    seconds: float = 0.0
    validation_seconds: float = 0.0
    co2_g: float | None = None
    readings: list[Reading] = field(default_factory=list)


class EnergyCallback(Callback):
    """Measures training, and training alone, in one window from ``on_train_start`` to ``on_train_end`` or an exception.

    The window is paused from the start of a validation, and from the end of an epoch, to the next training batch or
    epoch: so checkpoints written after either, and the sanity check, are not in it. Nor is a checkpoint that is written
    between two training steps: from there to the next batch the window rests, and :meth:`paused` leaves out anything
    else. The figures go into checkpoints, and a resumed fit reports the sum of its parts. The meters
    are told the device of the fit, so that no board is billed to a run that does not compute on it.

    Args:
        monitor: the meters. On a CUDA device it is given ``torch.cuda.synchronize``, unless it has something already.
    """

    def __init__(self, monitor: EnergyMonitor) -> None:
        self._monitor = monitor
        self._window: Window | None = None
        self._earlier: _Totals | None = None
        self._validation_seconds = 0.0
        self._validation_began_s: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training, the parts before a resume included."""
        return self._totals().seconds

    @property
    def validation_seconds(self) -> float:
        """Seconds of validation, the parts before a resume included."""
        return self._totals().validation_seconds

    @property
    def readings(self) -> list[Reading]:
        """Joules of training, one entry per source, the parts before a resume included."""
        return self._totals().readings

    @property
    def co2_g(self) -> float | None:
        """Grams of CO2-equivalent of training; ``None`` where no meter knows them for every part."""
        return self._totals().co2_g

    def running_seconds(self) -> float:
        """Seconds of training so far, without a look at the meters: for the time to a target accuracy."""
        earlier = 0.0 if self._earlier is None else self._earlier.seconds
        return earlier + (0.0 if self._window is None else self._window.seconds)

    def running_joules(self) -> dict[str, float | None]:
        """Joules of training so far by source; ``None`` where a source is unreadable."""
        return {reading.source: reading.joules for reading in self.readings}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens in the ``with`` statement; without effect outside of training."""
        if self._window is None or not self._window.is_open:
            yield
            return
        with self._window.paused():
            yield

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new fit counts from zero; a checkpoint's state comes after this."""
        if stage == "fit":
            self._window, self._earlier, self._validation_seconds = None, None, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        self._monitor.use(str(device))
        if device.type == "cuda" and self._monitor.synchronise is None:
            self._monitor.synchronise = partial(torch.cuda.synchronize, device)
        self._window = self._monitor.window("train")
        self._window.open()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open_window().resume()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # After a validation inside an epoch: the checkpoint callback has then done its work.
        self._open_window().resume()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning's own checkpoint callbacks come after all others; the next batch goes on counting.
        every = [getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks]
        if any(steps > 0 and trainer.global_step % steps == 0 for steps in every):
            self._open_window().pause()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open_window().pause()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._window is not None and self._window.is_open:
            self._window.pause()
            self._validation_began_s = self._monitor.now()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validation_began_s is not None:
            self._validation_seconds += max(0.0, self._monitor.now() - self._validation_began_s)
            self._validation_began_s = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Whoever saves, and when: from here to the next batch or epoch.
        if self._window is not None and self._window.is_open:
            self._window.pause()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Later callbacks have not ended yet: the device is as it was, but idle.
        self._close(idle=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._window is not None and self._window.is_open:
            try:
                self._window.pause()
            except RuntimeError:
                # A device that has failed cannot be waited for; its error, not this one, is what the user must see.
                self._monitor.synchronise = None
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The tuner leaves a fit by neither of the two ways above.
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """The figures so far, as plain numbers, strings, lists and dicts."""
        totals = self._totals()
        return {
            "seconds": totals.seconds,
            "validation_seconds": totals.validation_seconds,
            "co2_g": totals.co2_g,
            "readings": [reading.to_dict() for reading in totals.readings],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the figures of the part before a resume."""
        readings = [Reading.from_dict(values) for values in state_dict["readings"]]
        self._earlier = _Totals(**{**state_dict, "readings": readings})

    def _open_window(self) -> Window:
        if self._window is None:
            raise RuntimeError("EnergyCallback saw a training hook before on_train_start")
        return self._window

    def _close(self, idle: bool = False) -> None:
        self._validation_began_s = None
        if self._window is not None:
            self._window.close(idle)

    def _totals(self) -> _Totals:
        if self._window is None:
            return self._earlier or _Totals()
        window = self._window
        now = _Totals(window.seconds, self._validation_seconds, window.co2_g, window.readings)
        return now if self._earlier is None else _add(self._earlier, now)


_DOUBTS = ("sampling_error_j", "net_error_j", "samples")
"""Of the details of a reading, those that add up as its joules do."""


def _add(earlier: _Totals, now: _Totals) -> _Totals:
    before = {reading.source: reading for reading in earlier.readings}
    after = {reading.source: reading for reading in now.readings}
    return _Totals(
        earlier.seconds + now.seconds,
        earlier.validation_seconds + now.validation_seconds,
        _sum(earlier.co2_g, now.co2_g),
        [_add_readings(before.get(source), after.get(source)) for source in before | after],
    )


def _add_readings(before: Reading | None, after: Reading | None) -> Reading:
    known = after or before
    if known is None:
        raise ValueError("two readings were to be added, and neither is there: give at least one")
    if before is None or after is None:
        part = "before" if before is None else "after"
        return replace(known, joules=None, net_joules=None, reason=f"not metered in the part {part} the resume")
    joules = _sum(before.joules, after.joules)
    doubts = {
        key: before.detail[key] + after.detail[key]  # type: ignore[operator]  # numbers, both
        for key in _DOUBTS
        if before.detail.get(key) is not None and after.detail.get(key) is not None
    }
    return replace(
        after,
        detail={**after.detail, **doubts},
        joules=joules,
        net_joules=_sum(before.net_joules, after.net_joules),
        reason=None if joules is not None else after.reason or f"before the resume: {before.reason}",
        flags=tuple(dict.fromkeys(before.flags + after.flags)),
    )


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second
