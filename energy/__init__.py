"""Measure energy: meters, windows over them, and a Lightning callback. Knows nothing of networks.

Example:
    >>> from locallearn.energy import EnergyMonitor, NvmlMeter, RaplMeter
    >>> with EnergyMonitor([NvmlMeter(), RaplMeter()]).window("work") as window:
    ...     total = sum(range(1000))
    >>> all((reading.joules is None) == (reading.reason is not None) for reading in window.readings)
    True
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from locallearn.energy._codecarbon import CodeCarbonMeter
from locallearn.energy._meter import Meter, Quality, Reading
from locallearn.energy._nvml import NvmlMeter
from locallearn.energy._rapl import RaplMeter
from locallearn.energy._replay import PowerReplayMeter, ReplayMeter
from locallearn.energy._survey import Survey, survey
from locallearn.energy._window import EnergyMonitor, Window
from locallearn.energy._zeus import ZeusMeter

if TYPE_CHECKING:
    from locallearn.energy._callback import EnergyCallback

__all__ = [
    "CodeCarbonMeter",
    "EnergyCallback",
    "EnergyMonitor",
    "Meter",
    "NvmlMeter",
    "PowerReplayMeter",
    "Quality",
    "RaplMeter",
    "Reading",
    "ReplayMeter",
    "Survey",
    "Window",
    "ZeusMeter",
    "survey",
]


def __getattr__(name: str) -> Any:
    """Import the callback when it is asked for: it alone needs Lightning."""
    if name == "EnergyCallback":
        from locallearn.energy._callback import EnergyCallback

        return EnergyCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
