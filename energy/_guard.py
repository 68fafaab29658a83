"""A meter behind a guard: whatever it does wrong costs its own figures, never the training that it stands beside."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from locallearn.energy._meter import Meter, Reading


def _is_plain(value: object) -> bool:
    return value is None or type(value) in (str, int, float, bool)


class GuardedMeter:
    """Calls a meter's methods; after the first error none of its sources has a figure, and the readings say why.

    Args:
        meter: somebody's.
    """

    def __init__(self, meter: Meter) -> None:
        self.tick_s = meter.tick_s
        self._meter = meter
        self._failure: str | None = None
        self._sources: dict[str, Reading] = {}

    def open(self, device: str | None) -> None:
        """Tell the meter the device, open it, and take down its sources: for those it answers until it is closed."""
        if device is not None:
            self._call("use", partial(self._meter.use, device))
        self._call("open", self._meter.open)
        self._sources = self._read()

    def resume(self) -> None:
        """See :meth:`Meter.resume`."""
        self._call("resume", self._meter.resume)

    def begin(self) -> None:
        """See :meth:`Meter.begin`."""
        self._call("begin", self._meter.begin)

    def pause(self) -> None:
        """See :meth:`Meter.pause`."""
        self._call("pause", self._meter.pause)

    def close(self) -> None:
        """See :meth:`Meter.close`."""
        self._call("close", self._meter.close)

    def readings(self) -> list[Reading]:
        """One reading for each source that there was at ``open``."""
        found = self._read()
        return [
            self._checked(
                found.get(source) or known.without_figure("the meter gives no reading of this source any more")
            )
            for source, known in self._sources.items()
        ]

    def failed(self, readings: list[Reading]) -> list[Reading]:
        """These readings of the meter's, with no figures if it has failed since."""
        return [
            reading if self._failure is None or reading.joules is None else reading.without_figure(self._failure)
            for reading in readings
        ]

    @property
    def works(self) -> bool:
        """Whether the meter has done nothing wrong so far."""
        return self._failure is None

    @property
    def co2_g(self) -> float | None:
        """Grams of CO2-equivalent so far; ``None`` where they are not known, or not known any more."""
        if self._failure is not None:
            return None
        try:
            grams = None if self._meter.co2_g is None else float(self._meter.co2_g)
            return grams if grams is not None and math.isfinite(grams) and grams >= 0 else None
        except Exception:  # its joules may well be right
            return None

    def _call(self, name: str, method: Callable[[], None]) -> None:
        try:
            method()
        except Exception as error:
            self._fail(name, error)

    def _read(self) -> dict[str, Reading]:
        try:
            readings = self._meter.readings()
            found = {reading.source: reading for reading in readings}
            if len(found) < len(readings):
                raise ValueError(f"one source twice among {', '.join(reading.source for reading in readings)}")
            if found or self._failure is None:
                return found
        except Exception as error:
            self._fail("readings", error)
        name = type(self._meter).__name__
        return self._sources or {name: Reading(name, self._meter.quality, None, self._failure)}

    def _checked(self, reading: Reading) -> Reading:
        if self._failure is not None:
            return reading.without_figure(self._failure)
        # What somebody's meter answers goes into a record, which holds plain numbers and text alone.
        detail = {str(key): value if _is_plain(value) else str(value) for key, value in reading.detail.items()}
        reading = replace(reading, detail=detail, flags=tuple(map(str, reading.flags)))
        if reading.joules is None:
            return reading
        try:
            joules = float(reading.joules)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            joules = math.nan
        if not (math.isfinite(joules) and joules >= 0):
            return reading.without_figure(f"the meter answered {reading.joules} joules")
        return replace(reading, joules=joules)

    def _fail(self, name: str, error: Exception) -> None:
        if self._failure is None:
            self._failure = f"the meter failed in {name}(): {type(error).__name__}: {error}"
