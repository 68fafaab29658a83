"""A meter that replays a recorded trace: for tests, and for rehearsing a run where no counter can be read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

from locallearn.energy._meter import Counter, CounterMeter, Quality, Reading, UnreadableError


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


def _check(trace: Sequence[tuple[float, float]]) -> None:
    if len(trace) < 2 or trace[0][0] != 0:
        raise ValueError(
            f"a trace of {len(trace)} points was given; wanted are at least two (seconds, joules) points, "
            "the first at second 0"
        )
    for before, after in pairwise(trace):
        if not (math.isfinite(after[0]) and before[0] < after[0] and 0 <= after[1] - before[1] < math.inf):
            raise ValueError(f"the trace goes from {before} to {after}: seconds must rise and joules never fall")
