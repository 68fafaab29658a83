"""Meters that replay a recorded trace: for tests, and for rehearsing a run where no counter can be read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

from locallearn.energy._meter import Counter, CounterMeter, Quality, Reading, UnreadableError
from locallearn.energy._power import POLL_S, PowerCounter


class ReplayMeter(CounterMeter):
    """Cumulative joules over seconds since ``open``, linearly interpolated between the points of a trace.

    Args:
        trace: ``(seconds, joules)`` points; the first at second 0, seconds rising, joules never falling. After the
            last point there is no figure, since nothing is known.
        source: name in the reading.
        quality: what the trace claims to be.
        clock: seconds; replaced in tests.

    Raises:
        ValueError: the trace is too short, unordered, or not finite.
    """

    def __init__(
        self,
        trace: Sequence[tuple[float, float]],
        source: str = "replay",
        quality: Quality = "measured",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(quality, tick_s=0.0)
        _check(trace)
        self._trace = list(trace)
        self._source = source
        self._clock = clock
        self._opened_at_s = 0.0

    def _connect(self) -> tuple[list[Counter], list[Reading]]:
        self._opened_at_s = self._clock()
        return [Counter(self._source, self._read)], []

    def _disconnect(self) -> None:
        """Nothing is held."""

    def _read(self) -> float:
        now_s = self._clock() - self._opened_at_s
        for (t0, j0), (t1, j1) in pairwise(self._trace):
            if t0 <= now_s <= t1:
                return j0 + (j1 - j0) * (now_s - t0) / (t1 - t0)
        if now_s < 0:
            raise UnreadableError(f"the clock of the replayed trace went back, to second {now_s:g}")
        raise UnreadableError(f"the replayed trace ends after {self._trace[-1][0]:g} s, the window at {now_s:g} s")


class PowerReplayMeter(CounterMeter):
    """A recorded power, sampled and integrated by a process of its own: the way of boards that count no energy.

    Args:
        trace: ``(seconds, watts)`` points; the first at second 0, seconds rising. After the last point there is no figure.
        source: name in the reading.
        quality: what the trace claims to be.
        every_s: seconds between two samples.
        lag_s: seconds by which the sensor was late.

    Raises:
        ValueError: the trace is too short, unordered, negative, or not finite.
    """

    def __init__(
        self,
        trace: Sequence[tuple[float, float]],
        source: str = "replay",
        quality: Quality = "measured",
        every_s: float = POLL_S,
        lag_s: float = 0.0,
    ) -> None:
        super().__init__(quality, tick_s=every_s)
        for _, power_w in trace:
            if not 0 <= power_w < math.inf:
                raise ValueError(f"the trace holds {power_w} W: wanted are watts, 0 or more")
        _check([(seconds, 0.0) for seconds, _ in trace])
        if not 0 < every_s < math.inf or not 0 <= lag_s < math.inf:
            raise ValueError(f"every_s={every_s}, lag_s={lag_s} were given; wanted are seconds, above 0 and from 0")
        self._settings = {"kind": "replay", "trace": [list(point) for point in trace]}
        self._source, self._every_s, self._lag_s = source, every_s, lag_s

    def _connect(self) -> tuple[list[Counter], list[Reading]]:
        try:
            return [PowerCounter.of(self._source, self._settings, every_s=self._every_s, lag_s=self._lag_s)], []
        except UnreadableError as error:
            return [], [Reading(self._source, self.quality, None, str(error))]

    def _disconnect(self) -> None:
        """Nothing is held but the process, which is the counter's."""


def _check(trace: Sequence[tuple[float, float]]) -> None:
    if len(trace) < 2 or trace[0][0] != 0:
        raise ValueError(
            f"a trace of {len(trace)} points was given; wanted are at least two (seconds, joules) points, "
            "the first at second 0"
        )
    for before, after in pairwise(trace):
        if not (math.isfinite(after[0]) and before[0] < after[0] and 0 <= after[1] - before[1] < math.inf):
            raise ValueError(f"the trace goes from {before} to {after}: seconds must rise and joules never fall")
