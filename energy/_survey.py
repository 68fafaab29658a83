"""What a machine can measure, and how well: every counter watched for some seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from locallearn.energy._guard import GuardedMeter
from locallearn.energy._meter import CounterMeter, Meter, Quality, monotonic_s
from locallearn.energy._power import PowerCounter

# Reading a counter costs a tenth of a millisecond to a few; the fastest seen are renewed every millisecond.
_LOOK_S = 0.001


@dataclass(frozen=True)
class Survey:
    """What was found of one source.

    Attributes:
        source: its name in readings.
        quality: of its figures.
        by: what they are made by: ``"energy counter"``, or as in a reading.
        update_s: seconds between two changes of what is read, in the mean over the time it was watched; ``None`` where
            it changed less than twice, or what is read is no counter.
        step_j: smallest change of a counter in joules; ``None`` as before, and for a power.
        power_w: what the source drew meanwhile; ``None`` where there is no figure.
        window_s: shortest window that is not flagged as rough.
        reason: why there is no figure.
        flags: what a reader of its figures must know.
    """

    source: str
    quality: Quality
    by: str
    update_s: float | None
    step_j: float | None
    power_w: float | None
    window_s: float
    reason: str | None
    flags: tuple[str, ...]


def survey(meters: Sequence[Meter], seconds: float, ticks: int = 100) -> list[Survey]:
    """Open every meter, watch its counters, and say what it can do.

    Args:
        meters: they are opened and closed again; one that fails has a reason.
        seconds: to watch all of them.
        ticks: updates of a counter that a window must hold at least.

    Raises:
        ValueError: ``seconds`` is not positive.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds={seconds} was given; wanted are seconds above 0")
    guarded = [(meter, GuardedMeter(meter)) for meter in meters]
    try:
        for _, guard in guarded:
            guard.open(None)
            guard.resume()
        watched = [
            _Watched(counter.source, _gauge(counter), isinstance(counter, PowerCounter))
            for meter, guard in guarded
            if isinstance(meter, CounterMeter) and guard.works
            for counter in meter.counters
        ]
        began_s = monotonic_s()
        while monotonic_s() < began_s + seconds:
            for each in watched:
                each.look()
            time.sleep(_LOOK_S)
        for _, guard in guarded:
            guard.pause()
        passed_s = monotonic_s() - began_s
        found = {each.source: each for each in watched}
        rows: list[Survey] = []
        for meter, guard in guarded:
            for reading in guard.readings():
                seen = found.get(reading.source)
                update_s = None if seen is None else seen.update_s
                rows.append(
                    Survey(
                        reading.source,
                        reading.quality,
                        reading.by or ("energy counter" if reading.joules is not None else ""),
                        update_s,
                        None if seen is None else seen.step_j,
                        None if reading.joules is None else reading.joules / passed_s,
                        ticks * max(meter.tick_s, update_s or 0.0),
                        reading.reason,
                        reading.flags,
                    )
                )
        return rows
    finally:
        for _, guard in guarded:
            guard.close()


def _gauge(counter: object) -> Callable[[], float]:
    """What is read of a counter, or the power that one is made of."""
    if isinstance(counter, PowerCounter):
        return lambda: float(counter.poller.state()["power_w"])
    return counter.read  # type: ignore[attr-defined, no-any-return]  # a Counter


class _Watched:
    """How often, and by how much, a gauge changes."""

    def __init__(self, source: str, read: Callable[[], float], power: bool) -> None:
        self.source = source
        self._read = read
        self._power = power
        self._last: float | None = None
        self._changed_s: list[float] = []
        self._steps: list[float] = []

    def look(self) -> None:
        try:
            now = self._read()
        except Exception:  # the reading says why
            return
        if self._last is not None and now != self._last:
            self._changed_s.append(monotonic_s())
            self._steps.append(abs(now - self._last))
        self._last = now

    @property
    def update_s(self) -> float | None:
        """Mean seconds between two changes."""
        if len(self._changed_s) < 2:
            return None
        return (self._changed_s[-1] - self._changed_s[0]) / (len(self._changed_s) - 1)

    @property
    def step_j(self) -> float | None:
        """The smallest change."""
        return None if self._power or not self._steps else min(self._steps)
