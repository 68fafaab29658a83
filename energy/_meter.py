"""What a meter is, what it reports, and the frame shared by all meters that read a cumulative counter."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Quality: TypeAlias = Literal["measured", "modelled"]
"""``measured``: a hardware counter was read. ``modelled``: an estimate from load, model tables and constants."""

Detail: TypeAlias = dict[str, str | int | float | bool | None]
"""Facts beside a figure, ready for JSON."""


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
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reading:
        """The reading that :meth:`to_dict` wrote."""
        return cls(**{**values, "flags": tuple(values["flags"]), "detail": dict(values["detail"])})


class Meter(ABC):
    """One device or one model that accounts for energy; it may report several sources.

    A window calls ``open``, then ``resume`` and ``pause`` in turn, then ``close``. Joules are those of the resumed
    stretches since ``open``. Every method may be called again without effect, and ``resume`` and ``pause`` are cheap.

    Attributes:
        tick_s: seconds between two updates of what is read; 0 where that is of no account.
        co2_g: grams of CO2-equivalent over the resumed stretches, for the meters that know it, else ``None``.
        in_use: set by the window that holds the meter.
    """

    tick_s: float
    co2_g: float | None = None
    in_use: bool = False

    @abstractmethod
    def open(self) -> None:
        """Take hold of the hardware and count from zero. Missing hardware raises nothing: the readings say why."""

    @abstractmethod
    def resume(self) -> None:
        """Count from now on."""

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

    Attributes:
        source: name in the reading.
        read: joules since some fixed moment; raises :class:`UnreadableError`.
        wraps_at_j: joules at which the counter starts again from zero; ``None`` if it never does.
        detail: facts beside the figure.
        observe: facts that change with time, read together with the figure.
    """

    source: str
    read: Callable[[], float]
    wraps_at_j: float | None = None
    detail: Detail = field(default_factory=dict)
    observe: Callable[[], Detail] = dict
    _joules: float = 0.0
    _last_j: float | None = None
    _reason: str | None = None

    def start(self) -> None:
        """Remember where the counter stands."""
        if self._reason is None:
            self._last_j = self._read()

    def advance(self) -> None:
        """Add what the counter gained since ``start`` or the last ``advance``."""
        if self._reason is not None or self._last_j is None:
            return
        now_j = self._read()
        if now_j is None:
            return
        gained_j = now_j - self._last_j
        if gained_j < 0 and self.wraps_at_j is not None:
            gained_j += self.wraps_at_j
        if gained_j < 0:
            self._reason = "the counter went backwards during the window"
            return
        self._joules += gained_j
        self._last_j = now_j

    def reading(self, quality: Quality) -> Reading:
        """What was counted; once a read has failed there is no figure, since a part of the window is missing."""
        joules = self._joules if self._reason is None else None
        return Reading(self.source, quality, joules, self._reason, dict(self.detail))

    def _read(self) -> float | None:
        try:
            return self.read()
        except UnreadableError as error:
            self._reason = str(error)
            return None


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
        self._quality = quality
        self._poll_s = poll_s
        self._lock = threading.Lock()
        self._counters: list[Counter] = []
        self._unreadable: list[Reading] = []
        self._ticker: Ticker | None = None
        self._opened = False
        self._counting = False

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
        self._counters, self._unreadable = self._connect()
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
        self._disconnect()

    def readings(self) -> list[Reading]:
        """See :meth:`Meter.readings`."""
        self._advance()
        if self._opened:
            self._observe()
        return [counter.reading(self._quality) for counter in self._counters] + self._unreadable

    def _advance(self) -> None:
        with self._lock:
            self._gain()

    def _gain(self) -> None:
        if self._counting:
            for counter in self._counters:
                counter.advance()

    def _observe(self) -> None:
        for counter in self._counters:
            counter.detail.update(counter.observe())
