"""Windows: the stretch of time that a set of meters is read over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType

from locallearn.energy._guard import GuardedMeter
from locallearn.energy._meter import Detail, Meter, Reading, monotonic_s

_TICKS = 100
# Idle power that changes by more than this share of itself is told.
_DRIFT = 0.05
# A look at the idle machine that lasted less than this share of what was asked for was cut short.
_WHOLE = 0.99


class EnergyMonitor:
    """A set of meters and how to read them together.

    Args:
        meters: read over every window.
        synchronise: called before every read of a clock or counter, to wait for a device's queue, e.g.
            ``torch.cuda.synchronize``.
        idle_s: before and after each window, watch the idle machine for this many seconds, so that readings also get a
            net figure; 0 does without.
        clock: monotonic seconds; replaced in tests.
        cooldown_s: before each window, and before its idle power is watched, let everything rest for this many seconds,
            so that windows one after another begin equally warm.

    Attributes:
        wait: lets seconds pass; whoever wants to cut that short puts another one here.

    Raises:
        ValueError: ``idle_s`` or ``cooldown_s`` is negative or not finite, or one meter is given twice.
    """

    def __init__(
        self,
        meters: Sequence[Meter],
        synchronise: Callable[[], None] | None = None,
        idle_s: float = 0.0,
        clock: Callable[[], float] = monotonic_s,
        cooldown_s: float = 0.0,
    ) -> None:
        for name, seconds in (("idle_s", idle_s), ("cooldown_s", cooldown_s)):
            if not 0 <= seconds < float("inf"):
                raise ValueError(f"{name}={seconds} was given; wanted are seconds, 0 or more")
        if len({id(meter) for meter in meters}) < len(meters):
            raise ValueError("one meter was given twice: give each meter once")
        self.meters = tuple(meters)
        self.synchronise = synchronise
        self.idle_s = idle_s
        self.cooldown_s = cooldown_s
        self.clock = clock
        self.device: str | None = None
        self.wait: Callable[[float], object] = lambda seconds: time.sleep(seconds)

    def use(self, device: str) -> None:
        """Measure what belongs to ``device``, as torch names it (``cpu``, ``cuda:0``), in the windows opened from now on."""
        self.device = device

    def now(self) -> float:
        """Seconds on the clock, after waiting for the device."""
        if self.synchronise is not None:
            self.synchronise()
        return self.clock()

    def window(self, name: str) -> Window:
        """A window over the meters: use it in a ``with`` statement, or ``open`` and ``close`` it."""
        return Window(name, self)


class Window:
    """Seconds, joules and CO2 of what happens between ``open`` and ``close``, pauses left out.

    Made by :meth:`EnergyMonitor.window`. The figures may be read at any time after ``open``; after ``close`` they stay.

    Example:
        >>> from locallearn.energy import EnergyMonitor, ReplayMeter
        >>> monitor = EnergyMonitor([ReplayMeter([(0, 0), (60, 600)])])
        >>> with monitor.window("train") as window:
        ...     pass
        >>> [reading.source for reading in window.readings]
        ['replay']
    """

    def __init__(self, name: str, monitor: EnergyMonitor) -> None:
        self.name = name
        self._monitor = monitor
        self._meters = [GuardedMeter(meter) for meter in monitor.meters]
        # Coarse meters take longest to switch: they stand outside, so that the fine ones and the clock miss it.
        self._outside_in = sorted(self._meters, key=lambda meter: -meter.tick_s)
        self._before: list[list[Reading]] = []
        self._before_co2_g: list[float | None] = []
        self._idle_w: list[dict[str, float]] = [{}, {}]  # before and after, by source
        self._idle_seconds = [0.0, 0.0]
        self._cut_short = False
        self._seconds = 0.0
        self._clock_went_back = False
        self._resumed_at_s: float | None = None
        self._opened = False
        self._final: list[Reading] | None = None
        self._final_co2_g: float | None = None

    def __enter__(self) -> Window:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(idle=kind is None)

    def open(self) -> None:
        """Open the meters, let everything rest and watch the idle machine if that is wanted, and start to count.

        A meter that fails, here or later, has no figures and a reason; the others go on.

        Raises:
            ValueError: the window was opened before, a meter is in another open window, or two meters report the
                same source.
        """
        if self._opened or self._final is not None:
            raise ValueError(f"window {self.name!r} was opened before: make a new one with monitor.window()")
        if any(meter.in_use for meter in self._monitor.meters):
            raise ValueError(f"window {self.name!r} wants meters that another open window holds: close that one first")
        self._opened = True
        for meter in self._monitor.meters:
            meter.in_use = True
        try:
            for guarded in self._meters:
                guarded.open(self._monitor.device)
            self._refuse_same_sources()
            if self._monitor.cooldown_s > 0 and self._meters:
                self._monitor.wait(self._monitor.cooldown_s)
            self._watch_idle(0)
            for guarded in self._meters:
                guarded.begin()
            self._before = [meter.readings() for meter in self._meters]
            self._before_co2_g = [meter.co2_g for meter in self._meters]
            self.resume()
        except BaseException:
            self._release()
            raise

    def close(self, idle: bool = True) -> None:
        """Stop counting, watch the idle machine again, and let the meters go. Closing again does nothing.

        Args:
            idle: ``False`` does without the second look at the idle machine, where something has gone wrong.
        """
        if not self._opened:
            return
        try:
            self.pause()
            ended, co2_g = [meter.readings() for meter in self._meters], self.co2_g
            try:
                if idle:
                    self._watch_idle(1)
            finally:  # whoever does not wait for it has the figures all the same
                self._opened = False
                by_meter = self._by_meter(ended)
                self._final, self._final_co2_g = [reading for readings in by_meter for reading in readings], co2_g
        finally:
            self._release()
        # Letting go may have gone wrong, too.
        pairs = zip(self._meters, by_meter, strict=True)
        self._final = [reading for meter, readings in pairs for reading in meter.failed(readings)]
        lost = any(b is not None and m.co2_g is None for m, b in zip(self._meters, self._before_co2_g, strict=True))
        self._final_co2_g = None if lost else co2_g

    def resume(self) -> None:
        """Count again; without effect while counting.

        Raises:
            ValueError: the window is not open.
        """
        self._require_open()
        if self._resumed_at_s is None:
            self._switch_on()
            self._resumed_at_s = self._monitor.clock()

    def pause(self) -> None:
        """Count no longer; without effect while paused.

        Raises:
            ValueError: the window is not open.
        """
        self._require_open()
        if self._resumed_at_s is not None:
            self._seconds += self._since(self._resumed_at_s)
            self._resumed_at_s = None
            self._switch_off()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens in the ``with`` statement."""
        was_counting = self._resumed_at_s is not None
        self.pause()
        try:
            yield
        finally:
            if was_counting:
                self.resume()

    @property
    def is_open(self) -> bool:
        """Whether the window holds its meters, counting or paused."""
        return self._opened

    @property
    def seconds(self) -> float:
        """Seconds counted so far, on a monotonic clock."""
        if self._resumed_at_s is None:
            return self._seconds
        return self._seconds + self._since(self._resumed_at_s)

    @property
    def readings(self) -> list[Reading]:
        """Joules counted so far, one entry per source."""
        if self._final is not None:
            return self._final
        return [reading for readings in self._by_meter() for reading in readings]

    @property
    def co2_g(self) -> float | None:
        """Grams of CO2-equivalent counted so far; ``None`` where no meter knows, or one that did has failed."""
        if not self._opened:
            return self._final_co2_g
        total_g: float | None = None
        for meter, before_g in zip(self._meters, self._before_co2_g, strict=False):
            now_g = meter.co2_g
            if now_g is None and before_g is None:
                continue  # it never knew any
            if now_g is None or now_g < (before_g or 0.0):
                return None
            total_g = (total_g or 0.0) + now_g - (before_g or 0.0)
        return total_g

    def _require_open(self) -> None:
        if not self._opened:
            raise ValueError(f"window {self.name!r} is not open: use it in a with statement")

    def _release(self) -> None:
        self._opened = False
        self._resumed_at_s = None
        try:
            for guarded in self._meters:
                guarded.close()
        finally:
            for meter in self._monitor.meters:
                meter.in_use = False

    def _since(self, earlier_s: float) -> float:
        """Seconds on the clock since then; none if somebody's clock has gone back, which the readings then tell."""
        passed_s = self._monitor.now() - earlier_s
        self._clock_went_back |= passed_s < 0
        return max(0.0, passed_s)

    def _by_meter(self, ended: list[list[Reading]] | None = None) -> list[list[Reading]]:
        """Readings of every meter, less what was counted before the window; ``ended``: what it showed at its end."""
        seconds = self.seconds
        now = ended or [meter.readings() for meter in self._meters]
        return [
            [
                self._finish(meter, reading, seconds, before)
                for reading, before in zip(readings, self._before_of(number, readings), strict=True)
            ]
            for number, (meter, readings) in enumerate(zip(self._meters, now, strict=True))
        ]

    def _before_of(self, number: int, readings: list[Reading]) -> list[Reading]:
        """What a meter showed when counting began; of a window that never did, what it shows."""
        return self._before[number] if self._before else readings

    def _refuse_same_sources(self) -> None:
        sources = [reading.source for meter in self._meters if meter.works for reading in meter.readings()]
        for source in sources:
            if sources.count(source) > 1:
                raise ValueError(f"two meters both report {source!r}: keep one, or give each a source of its own")

    def _watch_idle(self, when: int) -> None:
        """Before (0) or after (1) the window."""
        if self._monitor.idle_s <= 0 or not self._meters:
            return
        first = [meter.readings() for meter in self._meters]
        self._switch_on()
        began_s = self._monitor.clock()
        self._monitor.wait(self._monitor.idle_s)
        seconds = self._since(began_s)
        self._switch_off()
        if seconds < _WHOLE * self._monitor.idle_s:  # somebody asked to stop; a moment tells no power
            self._cut_short = True
            return
        self._idle_seconds[when] = seconds
        for meter, earlier in zip(self._meters, first, strict=True):
            for then, now in zip(earlier, meter.readings(), strict=True):
                if then.joules is not None and now.joules is not None and now.joules >= then.joules:
                    self._idle_w[when][now.source] = (now.joules - then.joules) / seconds

    def _switch_on(self) -> None:
        if self._monitor.synchronise is not None:
            self._monitor.synchronise()
        for meter in self._outside_in:
            meter.resume()

    def _switch_off(self) -> None:
        for meter in reversed(self._outside_in):
            meter.pause()

    def _finish(self, meter: GuardedMeter, reading: Reading, seconds: float, before: Reading) -> Reading:
        """The reading less what was counted before the window, with its net figure and its flags."""
        if reading.joules is None:
            return reading
        if before.joules is None or reading.joules < before.joules:
            showed = "nothing" if before.joules is None else f"{before.joules:g} J"
            return reading.without_figure(f"the meter showed {showed} when counting began and {reading.joules:g} J now")
        joules = reading.joules - before.joules
        flags = list(self._time_flags(meter.tick_s, seconds))
        if joules == 0 and seconds > 0:
            flags.append("the counter did not move during the window")
        idle_w, detail, remark = self._idle_of(reading.source, seconds)
        return replace(
            reading,
            joules=joules,
            net_joules=None if idle_w is None or self._clock_went_back else joules - idle_w * seconds,
            detail={**reading.detail, **detail},
            flags=(*flags, *remark, *reading.flags),
        )

    def _idle_of(self, source: str, seconds: float) -> tuple[float | None, Detail, tuple[str, ...]]:
        """Idle watts of a source, what the record says of them, and a flag where they are in doubt."""
        before_w, after_w = (watts.get(source) for watts in self._idle_w)
        known = [watts for watts in (before_w, after_w) if watts is not None]
        if not known:
            return None, {}, ()
        idle_w = sum(known) / len(known)
        detail: Detail = {"idle_w": idle_w, "idle_before_w": before_w, "idle_after_w": after_w}
        if before_w is None or after_w is None:
            when = "before" if after_w is None else "after"
            # While a window is open it cannot be otherwise.
            why = ", the other look was cut short" if self._cut_short else ""
            return idle_w, detail, () if self._opened else (f"idle power was watched {when} the window only{why}",)
        doubt_j = abs(after_w - before_w) / 2 * seconds
        detail |= {"idle_drift_w": after_w - before_w, "net_error_j": doubt_j}
        if abs(after_w - before_w) <= _DRIFT * idle_w:
            return idle_w, detail, ()
        return (
            idle_w,
            detail,
            (
                f"idle power went from {before_w:.3g} W before to {after_w:.3g} W after: the net figure is sure to "
                f"{doubt_j:.3g} J only",
            ),
        )

    def _time_flags(self, tick_s: float, seconds: float) -> Iterator[str]:
        if self._clock_went_back:
            yield "the clock went back during the window: the seconds are too few"
        if seconds < _TICKS * tick_s:
            yield f"the window of {seconds:.1f} s is shorter than {_TICKS} ticks of {tick_s:g} s: rough"
        watched_s = min((seconds for seconds in self._idle_seconds if seconds > 0), default=0.0)
        if watched_s and watched_s < _TICKS * tick_s:
            yield f"idle power was watched for {watched_s:.1f} s only: the net figure is rough"
