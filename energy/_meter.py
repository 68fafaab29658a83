"""What a meter is, what it reports, and the frame shared by all meters that read a cumulative counter."""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

Quality: TypeAlias = Literal["measured", "modelled"]
"""``measured``: a hardware counter was read. ``modelled``: an estimate from load, model tables and constants."""

Detail: TypeAlias = dict[str, str | int | float | bool | None]
"""Facts beside a figure, ready for JSON."""

# A counter may come late by some of its ticks: what it gains between two reads may belong to this much more time.
_LATE_S = 1.0


def monotonic_s() -> float:
    """Seconds on a clock that nobody can set."""
    return time.monotonic()


@dataclass(frozen=True)
class Reading:
    """The joules of one source over one window.

    Attributes:
        source: what was read, e.g. ``"nvml:0 NVIDIA H200"``, ``"rapl:package-0"``, ``"codecarbon:cpu"``.
        quality: ``"measured"`` or ``"modelled"``.
        joules: gross energy in joules; ``None`` exactly when ``reason`` is set.
        reason: why there is no figure.
        detail: facts beside the figure (driver, temperature, power model …).
        flags: plain sentences that a reader of the figure must know.
        net_joules: ``joules`` less a measured idle power times the seconds of the window; ``None`` where no idle
            power was measured.
        by: what the figure was made by, e.g. ``"constant power × time"``; empty where the source's name says it.

    Raises:
        ValueError: both or neither of ``joules`` and ``reason`` are given.
    """

    source: str
    quality: Quality
    joules: float | None
    reason: str | None = None
    detail: Detail = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    net_joules: float | None = None
    by: str = ""

    def __post_init__(self) -> None:
        if (self.joules is None) != (self.reason is not None):
            raise ValueError(
                f"reading {self.source!r} has joules={self.joules} and reason={self.reason!r}: give exactly one of them"
            )

    def to_dict(self) -> dict[str, Any]:
        """The reading as plain Python values, ready for JSON."""
        return {
            "source": self.source,
            "quality": self.quality,
            "joules": self.joules,
            "net_joules": self.net_joules,
            "reason": self.reason,
            "flags": list(self.flags),
            "detail": dict(self.detail),
            "by": self.by,
        }

    def without_figure(self, reason: str) -> Reading:
        """The same source with no joules."""
        return replace(self, joules=None, net_joules=None, reason=reason)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reading:
        """The reading that :meth:`to_dict` wrote."""
        return cls(**{**values, "flags": tuple(values["flags"]), "detail": dict(values["detail"])})


class Meter(ABC):
    """One device or one model that accounts for energy; it may report several sources.

    A window calls ``open``, then ``resume`` and ``pause`` in turn, then ``close``. Joules are those of the resumed
    stretches since ``open``. Every method may be called again without effect, and ``resume`` and ``pause`` are cheap.
    Whatever a method raises costs this meter its figures and nothing else: the window goes on without it.

    Attributes:
        tick_s: seconds between two updates of what is read; 0 where that is of no account.
        quality: what the readings are.
        co2_g: grams of CO2-equivalent over the resumed stretches, for the meters that know it, else ``None``.
        in_use: set by the window that holds the meter.
    """

    tick_s: float = 0.0
    quality: Quality = "modelled"
    co2_g: float | None = None
    in_use: bool = False

    def use(self, device: str) -> None:  # noqa: B027  # most meters measure the same whatever computes
        """Measure what belongs to ``device`` (as torch names it: ``cpu``, ``cuda:0``) from the next ``open`` on.

        A meter of something that this device does not use reports no joules, and says so.
        """

    @abstractmethod
    def open(self) -> None:
        """Take hold of the hardware and count from zero. Missing hardware raises nothing: the readings say why."""

    @abstractmethod
    def resume(self) -> None:
        """Count from now on."""

    def begin(self) -> None:  # noqa: B027  # most meters say nothing of the way to their figure
        """What is counted from now on is the window: facts beside the figure shall not be of what came before it.

        Called while the meter does not count. Joules go on from where they are; the window takes off the earlier ones.
        """

    @abstractmethod
    def pause(self) -> None:
        """Count no longer."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the hardware and stop every thread. The readings stay."""

    @abstractmethod
    def readings(self) -> list[Reading]:
        """Joules so far, one entry per source. May be called at any time after ``open``."""


class UnreadableError(Exception):
    """A counter could not be read; the message is the reason that a reading shows."""


@dataclass
class Counter:
    """A cumulative counter and the joules it gained while it was watched.

    A difference of two readings counts only where the source could have drawn it in the time between them: a counter that
    was reset looks like one that wrapped, and one that wrapped twice like one that wrapped once.

    Attributes:
        source: name in the reading.
        read: joules since some fixed moment; raises :class:`UnreadableError`.
        wraps_at_j: joules at which the counter starts again from zero; ``None`` if it never does.
        detail: facts beside the figure.
        observe: facts that change with time, read together with the figure.
        max_w: watts that the source cannot draw on average; ``None`` where nothing bounds it.
        clock: monotonic seconds.
        flags: of every reading.
        by: what the figure is made by, where that is not the source's own counter.
        remarks: flags that come up while it is watched.
        forget: makes ``observe`` and ``remarks`` begin anew.
        quality: of its readings, where that is another one than its meter's.
    """

    source: str
    read: Callable[[], float]
    wraps_at_j: float | None = None
    detail: Detail = field(default_factory=dict)
    observe: Callable[[], Detail] = dict
    max_w: float | None = None
    clock: Callable[[], float] = monotonic_s
    flags: tuple[str, ...] = ()
    by: str = ""
    remarks: Callable[[], tuple[str, ...]] = tuple
    forget: Callable[[], object] = tuple
    quality: Quality | None = None
    _joules: float = 0.0
    _last_j: float | None = None
    _last_s: float = 0.0
    _reason: str | None = None

    def start(self) -> None:
        """Remember where the counter stands."""
        if self._reason is None:
            self._last_s, self._last_j = self.clock(), self._read()

    def advance(self) -> None:
        """Add what the counter gained since ``start`` or the last ``advance``."""
        if self._reason is not None or self._last_j is None:
            return
        now_s, now_j = self.clock(), self._read()
        if now_j is None:
            return
        gained_j = now_j - self._last_j
        if gained_j < 0 and self.wraps_at_j is not None:
            gained_j += self.wraps_at_j
        self._reason = self._doubt(gained_j, now_s - self._last_s)
        if self._reason is None:
            self._joules += gained_j
            self._last_s, self._last_j = now_s, now_j

    def begin(self) -> None:
        """See :meth:`Meter.begin`."""
        self.forget()

    def close(self) -> None:
        """Let go of what the counter alone holds; it is not read again."""

    def reading(self, quality: Quality) -> Reading:
        """What was counted; once a read has failed there is no figure, since a part of the window is missing."""
        joules = self._joules if self._reason is None else None
        flags = (*self.flags, *self.remarks())
        quality = self.quality or quality
        return Reading(self.source, quality, joules, self._reason, dict(self.detail), flags, by=self.by)

    def _doubt(self, gained_j: float, seconds: float) -> str | None:
        """Why a gain cannot be what the source drew in these seconds; ``None`` if it can."""
        if gained_j < 0:
            return "the counter went backwards during the window"
        if self.max_w is None:
            return None
        if self.wraps_at_j is not None and seconds * self.max_w >= self.wraps_at_j:
            return (
                f"the counter was not read for {seconds:.0f} s, in which it may have wrapped more than once "
                f"(every {self.wraps_at_j / self.max_w:.0f} s at {self.max_w:g} W)"
            )
        if gained_j > (seconds + _LATE_S) * self.max_w:
            return (
                f"the counter gained {gained_j:.0f} J in {seconds:.1f} s, more than {self.max_w:g} W can: "
                "it was reset, or misread"
            )
        return None

    def _read(self) -> float | None:
        try:
            value = self.read()
            if not (math.isfinite(value) and value >= 0):
                raise UnreadableError(f"the counter showed {value}")
        except UnreadableError as error:
            self._reason = str(error)
        except Exception as error:  # whatever a driver's binding raises
            self._reason = f"the counter could not be read: {type(error).__name__}: {error}"
        return None if self._reason is not None else value


class Ticker:
    """Calls ``action`` every ``period_s`` seconds in a daemon thread until ``stop``."""

    def __init__(self, period_s: float, action: Callable[[], None]) -> None:
        self._stop = threading.Event()
        self._period_s = period_s
        self._action = action
        threading.Thread(target=self._run, name="locallearn-energy", daemon=True).start()

    def stop(self) -> None:
        """Ask the thread to end; it does so at once unless ``action`` is running."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self._action()


class CounterMeter(Meter):
    """Frame of the meters that read cumulative counters.

    Args:
        quality: of every reading.
        tick_s: seconds between two updates of the counters.
        poll_s: read the counters at least this often while counting, so that none wraps twice between two reads;
            ``None`` where they cannot wrap.
    """

    def __init__(self, quality: Quality, tick_s: float, poll_s: float | None = None) -> None:
        self.tick_s = tick_s
        self.quality = quality
        self._poll_s = poll_s
        self._lock = threading.Lock()
        self._counters: list[Counter] = []
        self._unreadable: list[Reading] = []
        self._ticker: Ticker | None = None
        self._opened = False
        self._counting = False

    @property
    def counters(self) -> tuple[Counter, ...]:
        """The counters that can be read, from ``open`` on."""
        return tuple(self._counters)

    @abstractmethod
    def _connect(self) -> tuple[list[Counter], list[Reading]]:
        """The counters that can be read, and a reading with its reason for each that cannot."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Let go of what ``_connect`` took."""

    def open(self) -> None:
        """See :meth:`Meter.open`."""
        if self._opened:
            return
        self._counters, self._unreadable, self._counting = [], [], False
        try:
            self._counters, self._unreadable = self._connect()
        except BaseException:
            self._disconnect()
            raise
        self._opened = True
        if self._poll_s is not None and self._counters:
            self._ticker = Ticker(self._poll_s, self._advance)

    def resume(self) -> None:
        """See :meth:`Meter.resume`."""
        with self._lock:
            if self._opened and not self._counting:
                for counter in self._counters:
                    counter.start()
                self._counting = True

    def begin(self) -> None:
        """See :meth:`Meter.begin`."""
        with self._lock:
            for counter in self._counters:
                counter.begin()

    def pause(self) -> None:
        """See :meth:`Meter.pause`."""
        with self._lock:
            self._gain()
            self._counting = False

    def close(self) -> None:
        """See :meth:`Meter.close`."""
        if not self._opened:
            return
        self.pause()
        self._observe()
        if self._ticker is not None:
            self._ticker.stop()
            self._ticker = None
        self._opened = False
        try:
            for counter in self._counters:
                counter.close()
        finally:
            self._disconnect()

    def readings(self) -> list[Reading]:
        """See :meth:`Meter.readings`."""
        self._advance()
        if self._opened:
            self._observe()
        return [counter.reading(self.quality) for counter in self._counters] + self._unreadable

    def _advance(self) -> None:
        with self._lock:
            self._gain()

    def _gain(self) -> None:
        if self._counting:
            for counter in self._counters:
                counter.advance()

    def _observe(self) -> None:
        for counter in self._counters:
            # Facts beside a figure; without them it stands as well.
            with suppress(Exception):
                counter.detail.update(counter.observe())
