from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass
class FakeClock:
    """Seconds that pass only when a test says so."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def pass_by(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def constant() -> Callable[[float], list[tuple[float, float]]]:
    """The trace of a constant power in watts, a million seconds long."""
    return lambda power_w: [(0.0, 0.0), (1e6, 1e6 * power_w)]
