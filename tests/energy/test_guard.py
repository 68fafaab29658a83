"""A meter may only ever cost its own figure."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from locallearn.energy import (
    CodeCarbonMeter,
    EnergyMonitor,
    Meter,
    NvmlMeter,
    RaplMeter,
    Reading,
    ReplayMeter,
)
from locallearn.energy._window import Window
from tests.energy.conftest import FakeClock, FakeTracker
from tests.energy.test_nvml import FakeNvml

HOOKS = ("use", "open", "resume", "pause", "readings", "close")


class Plain(Meter):
    """Ten joules a second and a gram of CO2 every ten."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.began_s = 0.0

    def open(self) -> None:
        self.began_s = self.clock()

    def resume(self) -> None:
        """Pauses are counted, too."""

    def pause(self) -> None:
        """As above."""

    def close(self) -> None:
        """Nothing is held."""

    def readings(self) -> list[Reading]:
        return [Reading("plain", "modelled", 10 * (self.clock() - self.began_s))]

    @property
    def co2_g(self) -> float | None:  # type: ignore[override]
        return (self.clock() - self.began_s) / 10


Make = Callable[[str], Meter]


@pytest.fixture
def make(tmp_path: Path, stopped: FakeClock, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes each kind of meter on fake hardware that draws nothing."""
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    folder = tmp_path / "intel-rapl:0"
    folder.mkdir()
    for name, content in (("name", "package-0"), ("max_energy_range_uj", "262144000000"), ("energy_uj", "5")):
        (folder / name).write_text(content)
    made: dict[str, Callable[[], Meter]] = {
        "nvml": lambda: NvmlMeter([0]),
        "rapl": lambda: RaplMeter(tmp_path),
        "codecarbon": CodeCarbonMeter,
        "replay": lambda: ReplayMeter([(0, 0), (1e6, 0)], source="failing", clock=stopped),
        "plain": lambda: Plain(stopped),
    }
    return lambda name: made[name]()


def _raise(*args: Any) -> Any:
    raise OSError("boom")


def _measure(meters: list[Meter], clock: FakeClock) -> Window:
    """Ten seconds with a pause of a hundred, and a look at the figures in between."""
    monitor = EnergyMonitor(meters, clock=clock)
    monitor.use("cpu")
    with monitor.window("w") as window:
        clock.pass_by(4)
        assert len(window.readings) >= len(meters)
        window.pause()
        clock.pass_by(100)
        window.resume()
        clock.pass_by(6)
    assert not any(meter.in_use for meter in meters)
    return window


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("kind", ["nvml", "rapl", "codecarbon", "replay", "plain"])
@pytest.mark.parametrize("first", [True, False])
def test_an_error_in_any_method_costs_that_meter_its_figures(
    make: Make, stopped: FakeClock, constant: Any, kind: str, hook: str, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ReplayMeter(constant(5.0), clock=stopped)
    failing = make(kind)
    monkeypatch.setattr(failing, hook, _raise)
    window = _measure([failing, other] if first else [other, failing], stopped)
    assert window.seconds == 10.0
    readings = {reading.source: reading for reading in window.readings}
    assert readings.pop("replay").joules == pytest.approx(50.0)
    assert readings
    for reading in readings.values():
        assert reading.joules is None
        assert reading.reason == f"the meter failed in {hook}(): OSError: boom"
    assert window.co2_g is None


@pytest.mark.parametrize("hook", HOOKS)
def test_two_failing_meters_of_one_kind(stopped: FakeClock, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go by the name of their class, which is no reason to stop anything."""
    monkeypatch.setattr(Plain, hook, _raise, raising=False)
    window = _measure([Plain(stopped), Plain(stopped)], stopped) if hook in ("use", "open", "readings") else None
    assert window is None or [reading.joules for reading in window.readings] == [None, None]


@pytest.mark.parametrize("grams", [_raise, lambda meter: float("nan"), lambda meter: -1.0, lambda meter: float("inf")])
def test_an_error_in_co2_costs_the_co2_only(
    stopped: FakeClock, grams: Callable[[Any], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = _measure([Plain(stopped)], stopped)
    assert healthy.co2_g == pytest.approx(11.0)
    meter = Plain(stopped)
    with EnergyMonitor([meter], clock=stopped).window("w") as window:
        stopped.pass_by(2)
        monkeypatch.setattr(Plain, "co2_g", property(grams))
    assert window.co2_g is None
    assert window.readings[0].joules == pytest.approx(20.0)


def test_one_meters_co2_is_no_total_when_anothers_is_lost(stopped: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Second(Plain):
        def readings(self) -> list[Reading]:
            return [Reading("second", "modelled", 0.0)]

    first, second = Plain(stopped), Second(stopped)
    with EnergyMonitor([first, second], clock=stopped).window("w") as window:
        stopped.pass_by(10)
        assert window.co2_g == pytest.approx(2.0)
        monkeypatch.setattr(second, "pause", _raise)
    assert window.co2_g is None
    assert [reading.joules for reading in window.readings] == [100.0, None]


@pytest.mark.parametrize("hook", ["open", "resume", "pause", "readings", "close"])
def test_ctrl_c_goes_through_and_frees_the_meters(
    stopped: FakeClock, hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    meter = Plain(stopped)
    monkeypatch.setattr(meter, hook, stop)
    with pytest.raises(KeyboardInterrupt), EnergyMonitor([meter], clock=stopped).window("w"):
        pass
    assert not meter.in_use


@pytest.mark.parametrize(
    ("readings", "said"),
    [
        ([], "gives no reading of this source any more"),
        ([Reading("plain", "modelled", float("nan"))], "the meter answered nan joules"),
        ([Reading("plain", "modelled", float("inf"))], "the meter answered inf joules"),
        ([Reading("plain", "modelled", -1.0)], "the meter answered -1.0 joules"),
        ([Reading("plain", "modelled", 3.0)], "the meter showed 5 J when counting began and 3 J now"),
        ([Reading("plain", "modelled", 9.0)] * 2, "one source twice among plain, plain"),
        ([None], "AttributeError"),
        (None, "TypeError"),
    ],
)
def test_what_is_no_gain_leaves_no_figure(stopped: FakeClock, readings: Any, said: str) -> None:
    meter = Plain(stopped)
    answers: list[Any] = [[Reading("plain", "modelled", 5.0)]]
    meter.readings = lambda: answers[-1]  # type: ignore[method-assign]
    with EnergyMonitor([meter], clock=stopped).window("w") as window:
        answers.append(readings)
    (reading,) = window.readings
    assert (reading.source, reading.joules) == ("plain", None)
    assert said in str(reading.reason)


def test_a_source_that_comes_later_is_not_counted(stopped: FakeClock) -> None:
    """Nobody knows where it stood when the window was opened."""
    meter = Plain(stopped)
    answers: list[Any] = [[Reading("plain", "modelled", 0.0)]]
    meter.readings = lambda: answers[-1]  # type: ignore[method-assign]
    with EnergyMonitor([meter], clock=stopped).window("w") as window:
        answers.append([Reading("plain", "modelled", 1.0), Reading("late", "modelled", 7.0)])
    assert [(reading.source, reading.joules) for reading in window.readings] == [("plain", 1.0)]


def test_a_meter_without_a_figure_at_the_start_has_none_at_the_end(stopped: FakeClock) -> None:
    """What it counted while the machine was idle would be in it."""
    meter = Plain(stopped)
    answers: list[Any] = [[Reading("plain", "modelled", None, "not yet")]]
    meter.readings = lambda: answers[-1]  # type: ignore[method-assign]
    with EnergyMonitor([meter], clock=stopped).window("w") as window:
        answers.append([Reading("plain", "modelled", 7.0)])
    assert window.readings[0].reason == "the meter showed nothing when counting began and 7 J now"


def test_a_thread_that_polls_outlives_no_error(make: Make, stopped: FakeClock) -> None:
    """What raises in the background is a reason, not a traceback on the terminal."""
    meter = make("rapl")
    assert isinstance(meter, RaplMeter)
    with EnergyMonitor([meter]).window("w") as window:
        meter._counters[0].read = _raise
        assert meter._ticker is not None
        meter._ticker._action()
    assert window.readings[0].reason == "the counter could not be read: OSError: boom"


class Odd(Plain):
    """Answers with what no record can hold."""

    def readings(self) -> list[Reading]:
        numbers = {"odd": np.float32(3.0), "odd:text": "seven"}
        detail: Any = {"name": b"board", "at": Path("x"), "ok": 1.5}
        return [Reading(source, "measured", cast(Any, value), detail=detail) for source, value in numbers.items()]


def test_what_a_meter_answers_can_be_written_down(stopped: FakeClock) -> None:
    """Else a training that has ended well could not be recorded."""
    monitor = EnergyMonitor([Odd(stopped)], clock=stopped)
    window = monitor.window("w")
    window.open()
    first, second = window.readings
    window.close()
    assert type(first.joules) is float
    assert {key: value for key, value in first.detail.items() if key != "idle_w"} == {
        "name": "b'board'",
        "at": "x",
        "ok": 1.5,
    }
    assert second.joules is None
    assert second.reason is not None
    json.dumps([reading.to_dict() for reading in window.readings])
