import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

# Starts NVML and sets up its logger when it is imported: before any test puts a fake in NVML's place or looks at loggers.
import codecarbon.core.gpu  # noqa: F401
import pytest

from locallearn.energy import _codecarbon, _nvml


@dataclass
class FakeClock:
    """Seconds that pass only when a test says so."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def pass_by(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture(autouse=True)
def counters_that_stand_still_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML's fake counters move when a test says so."""
    monkeypatch.setattr(_nvml, "_STILL_S", 0.0)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def constant() -> Callable[[float], list[tuple[float, float]]]:
    """The trace of a constant power in watts, a million seconds long."""
    return lambda power_w: [(0.0, 0.0), (1e6, 1e6 * power_w)]


@pytest.fixture
def stopped(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The monotonic clock of everything, standing still until a test says otherwise."""
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@dataclass
class FakeTracker:
    """CodeCarbon's tracker with constant powers on a fake clock; ``answers`` replaces what the next tasks say."""

    clock: FakeClock
    watts: dict[str, float] = field(default_factory=lambda: {"cpu": 30.0, "gpu": 0.0, "ram": 20.0})
    gpu_count: int = 0
    answers: dict[str, Any] = field(default_factory=dict)
    began_s: float = 0.0
    _hardware: tuple[Any, ...] = ()

    def start_task(self) -> None:
        self.began_s = self.clock()

    def stop_task(self) -> SimpleNamespace:
        seconds = self.clock() - self.began_s
        kwh = {f"{part}_energy": watts * seconds / 3.6e6 for part, watts in self.watts.items()}
        data = {
            **kwh,
            "emissions": sum(kwh.values()) * 0.4,
            "codecarbon_version": "3",
            "country_iso_code": "USA",
            "tracking_mode": "process",
            "cpu_model": "a processor",
            "gpu_model": "a board",
            "gpu_count": self.gpu_count,
            "ram_total_size": 64.0,
        }
        return SimpleNamespace(**{**data, **self.answers})

    def stop(self) -> None:
        """Nothing runs."""


@pytest.fixture
def tracker(stopped: FakeClock, monkeypatch: pytest.MonkeyPatch) -> FakeTracker:
    """What every ``CodeCarbonMeter`` opens; both the monotonic clock and the system's are the fake one."""
    CPU = type("CPU", (), {"_mode": "cpu_load", "_tdp": 85, "_is_generic_tdp": True})
    fake = FakeTracker(stopped, _hardware=(CPU(),))
    monkeypatch.setattr(_codecarbon, "_new_tracker", lambda country, mode, period_s, gpus: fake)
    monkeypatch.setattr(time, "time", stopped)
    return fake
