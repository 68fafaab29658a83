import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import locallearn.energy
from locallearn.energy import CodeCarbonMeter, EnergyMonitor, Reading, ReplayMeter
from tests.energy.conftest import FakeClock


def test_importing_the_package_brings_in_no_heavy_software() -> None:
    folder = Path(locallearn.energy.__file__).parents[1]
    # An empty parent stands in for locallearn itself, which imports torch.
    code = f"""
import sys, types
parent = types.ModuleType("locallearn")
parent.__path__ = [{str(folder)!r}]
sys.modules["locallearn"] = parent
import locallearn.energy
print(locallearn.energy.__file__)
print([name for name in ("codecarbon", "lightning", "pynvml", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(locallearn.energy.__file__), "[]"]


def test_the_real_clock_and_a_constant_power_give_power_times_time(constant: Any) -> None:
    monitor = EnergyMonitor([ReplayMeter(constant(50.0))])
    began = time.monotonic()
    with monitor.window("w") as window:
        time.sleep(0.05)
    seconds = time.monotonic() - began
    assert 0.05 <= window.seconds <= seconds
    assert window.readings[0].joules is not None
    assert 50.0 * window.seconds <= window.readings[0].joules <= 50.0 * seconds


def test_a_bent_trace_is_interpolated(clock: Any) -> None:
    # 10 W for 4 s, then 100 W: from second 3 to second 6 that is 10 + 200 J.
    meter = ReplayMeter([(0, 0), (4, 40), (10, 640)], clock=clock)
    with EnergyMonitor([meter], clock=clock).window("w") as window:
        window.pause()
        clock.pass_by(3)
        window.resume()
        clock.pass_by(3)
    assert window.readings == [Reading("replay", "measured", 210.0)]
    assert window.seconds == 3.0


def test_pauses_are_left_out(clock: Any, constant: Any) -> None:
    monitor = EnergyMonitor([ReplayMeter(constant(7.0), clock=clock)], clock=clock)
    with monitor.window("w") as window:
        clock.pass_by(2)
        with window.paused():
            clock.pass_by(50)
            assert window.seconds == 2.0
            with window.paused():
                clock.pass_by(1)
            clock.pass_by(1)
        window.resume()
        clock.pass_by(3)
        assert window.seconds == 5.0
        assert window.readings[0].joules == pytest.approx(35.0)
        window.pause()
        window.pause()
        clock.pass_by(100)
    clock.pass_by(100)
    window.close()
    assert window.seconds == 5.0
    assert window.readings[0].joules == pytest.approx(35.0)


def test_an_exception_closes_the_window_and_frees_the_meters(clock: Any, constant: Any) -> None:
    monitor = EnergyMonitor([ReplayMeter(constant(1.0), clock=clock)], clock=clock)
    window = monitor.window("w")

    def fail() -> None:
        with window:
            clock.pass_by(4)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert window.readings[0].joules == pytest.approx(4.0)
    with monitor.window("next") as following:
        clock.pass_by(1)
    assert following.readings[0].joules == pytest.approx(1.0)


def test_windows_do_not_nest_on_one_meter(clock: Any, constant: Any) -> None:
    shared = ReplayMeter(constant(1.0), clock=clock)
    with EnergyMonitor([shared], clock=clock).window("outer") as outer:
        clock.pass_by(1)
        inner = EnergyMonitor([shared], clock=clock).window("inner")
        with pytest.raises(ValueError, match="'inner' wants meters that another open window holds"):
            inner.open()
        clock.pass_by(1)
    assert outer.readings[0].joules == pytest.approx(2.0)


def test_the_device_is_waited_for_before_every_reading(clock: Any) -> None:
    """Work still queued belongs to the stretch that queued it: 3 s come due in each wait."""
    waits = []

    def synchronise() -> None:
        waits.append(clock.now_s)
        clock.pass_by(3)

    meter = ReplayMeter([(0, 0), (1e3, 1e3)], clock=clock)
    with EnergyMonitor([meter], synchronise, clock=clock).window("w") as window:
        clock.pass_by(10)
    assert window.seconds == 13.0
    assert window.readings[0].joules == pytest.approx(13.0)
    assert len(waits) >= 2


def _idle(clock: Any, monkeypatch: pytest.MonkeyPatch, watts: tuple[float, float, float], **options: Any) -> Any:
    """A window of 5 s, whose source draws the first watts for 30 s before, the second in it, the third after."""
    monkeypatch.setattr("locallearn.energy._window.time.sleep", clock.pass_by)
    before_w, in_it_w, after_w = watts
    points = [(0.0, 0.0), (30.0, 30 * before_w), (35.0, 30 * before_w + 5 * in_it_w)]
    points.append((1e4, points[-1][1] + (1e4 - 35) * after_w))
    return EnergyMonitor([ReplayMeter(points, clock=clock)], idle_s=30, clock=clock, **options).window("w")


def test_idle_power_is_taken_off(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with _idle(clock, monkeypatch, (2, 12, 2)) as window:
        clock.pass_by(5)
        assert window.readings[0].net_joules == pytest.approx(50.0)  # already, by what was seen before
        assert window.readings[0].flags == ()
    (reading,) = window.readings
    assert window.seconds == 5.0
    assert reading.joules == pytest.approx(60.0)
    assert reading.net_joules == pytest.approx(50.0)
    assert reading.flags == ()
    assert {key: value for key, value in reading.detail.items() if value is not None} == pytest.approx(
        {"idle_w": 2.0, "idle_before_w": 2.0, "idle_after_w": 2.0, "idle_drift_w": 0.0, "net_error_j": 0.0}, abs=1e-9
    )


def test_idle_power_that_drifts_is_told(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm board: 2 W before, 4 W after; 3 W in the mean, of which each might be the right one."""
    with _idle(clock, monkeypatch, (2, 12, 4)) as window:
        clock.pass_by(5)
    (reading,) = window.readings
    assert reading.joules == pytest.approx(60.0)
    assert reading.net_joules == pytest.approx(60 - 5 * 3)
    assert reading.detail["idle_drift_w"] == pytest.approx(2.0)
    assert reading.detail["net_error_j"] == pytest.approx(5.0)
    assert reading.flags == ("idle power went from 2 W before to 4 W after: the net figure is sure to 5 J only",)


def test_a_little_drift_is_no_flag(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with _idle(clock, monkeypatch, (2, 12, 2.08)) as window:
        clock.pass_by(5)
    assert window.readings[0].flags == ()
    assert window.readings[0].detail["idle_drift_w"] == pytest.approx(0.08)


@pytest.mark.parametrize("how", ["exception", "no wait"])
def test_without_a_second_look_the_first_counts(clock: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    window = _idle(clock, monkeypatch, (2, 12, 100))
    window.open()
    clock.pass_by(5)
    if how == "exception":
        window.__exit__(KeyError, KeyError(), None)
    else:
        window.close(idle=False)
    (reading,) = window.readings
    assert reading.net_joules == pytest.approx(50.0)
    assert reading.flags == ("idle power was watched before the window only",)
    assert clock() == 1035.0


def test_ctrl_c_during_the_second_look_keeps_the_figures(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    window = _idle(clock, monkeypatch, (2, 12, 100))
    window.open()
    clock.pass_by(5)

    def stop(seconds: float) -> None:
        clock.pass_by(seconds / 2)
        raise KeyboardInterrupt

    window._monitor.wait = stop
    with pytest.raises(KeyboardInterrupt):
        window.close()
    (reading,) = window.readings
    assert (reading.joules, reading.net_joules) == (pytest.approx(60.0), pytest.approx(50.0))
    assert not window.is_open
    assert not any(meter.in_use for meter in window._monitor.meters)


def test_everything_rests_before_idle_power_is_watched(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 s of cooling down at 100 W, which nobody is to see."""
    monkeypatch.setattr("locallearn.energy._window.time.sleep", clock.pass_by)
    meter = ReplayMeter([(0, 0), (20, 2000), (50, 2060), (55, 2120), (1e4, 2120 + 2 * (1e4 - 55))], clock=clock)
    with EnergyMonitor([meter], idle_s=30, clock=clock, cooldown_s=20).window("w") as window:
        clock.pass_by(5)
    (reading,) = window.readings
    assert (reading.joules, reading.net_joules) == (pytest.approx(60.0), pytest.approx(50.0))
    assert window.seconds == 5.0


def test_nothing_rests_where_nothing_is_measured(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locallearn.energy._window.time.sleep", clock.pass_by)
    with EnergyMonitor([], idle_s=30, clock=clock, cooldown_s=20).window("w"):
        pass
    assert clock() == 1000.0


def test_idle_co2_is_taken_off(stopped: Any, tracker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 W at 400 g/kWh for 30 idle seconds, then for 60: the window's CO2 is that of the 60."""
    monkeypatch.setattr("locallearn.energy._window.time.sleep", stopped.pass_by)
    with EnergyMonitor([CodeCarbonMeter()], idle_s=30).window("w") as window:
        assert window.co2_g == pytest.approx(0.0)
        stopped.pass_by(60)
        assert window.co2_g == pytest.approx(50 * 60 / 3.6e6 * 400)
    assert window.co2_g == pytest.approx(50 * 60 / 3.6e6 * 400)
    ram = next(reading for reading in window.readings if reading.source == "codecarbon:ram")
    assert ram.joules == pytest.approx(20 * 60)
    assert ram.net_joules == pytest.approx(0.0)
    assert ram.detail["idle_w"] == pytest.approx(20.0)


def test_a_short_idle_watch_is_flagged(clock: Any, constant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locallearn.energy._window.time.sleep", clock.pass_by)
    for idle_s, flagged in ((0.5, True), (9.0, True), (10.0, False)):
        meter = ReplayMeter(constant(1.0), clock=clock)
        meter.tick_s = 0.1
        with EnergyMonitor([meter], idle_s=idle_s, clock=clock).window("w") as window:
            clock.pass_by(10.0)
        wanted = (f"idle power was watched for {idle_s:.1f} s only: the net figure is rough",) if flagged else ()
        assert window.readings[0].flags == wanted


@pytest.mark.parametrize("saw_s", [0.5, 1e-6])
def test_a_second_look_that_was_cut_short_tells_no_power(clock: Any, saw_s: float) -> None:
    """After the window the source draws 500 W for as long as anybody looks: the look before it is what counts."""
    trace = [(0, 0), (30, 30), (40, 130), (40 + saw_s, 130 + 500 * saw_s), (1e6, 1e6)]
    meter = ReplayMeter(trace, clock=clock)
    meter.tick_s = 0.1
    monitor = EnergyMonitor([meter], idle_s=30, clock=clock)
    monitor.wait = clock.pass_by
    with monitor.window("w") as window:
        clock.pass_by(10.0)
        monitor.wait = lambda seconds: clock.pass_by(saw_s)  # somebody asks to stop
    (reading,) = window.readings
    assert reading.flags == ("idle power was watched before the window only, the other look was cut short",)
    assert (reading.joules, reading.net_joules) == (pytest.approx(100.0), pytest.approx(90.0))
    assert (reading.detail["idle_before_w"], reading.detail["idle_after_w"]) == (pytest.approx(1.0), None)


def test_a_clock_that_goes_back_gives_no_negative_seconds(clock: Any) -> None:
    """The window's own clock cannot be set; somebody's own may."""
    meter = ReplayMeter([(0, 0), (1e6, 1e6)], clock=FakeClock())
    with EnergyMonitor([meter], clock=clock).window("w") as window:
        clock.pass_by(5)
        with window.paused():
            pass
        clock.pass_by(-3600)
        assert window.seconds == 5.0
        window.pause()
        window.resume()
        clock.pass_by(2)
    assert window.seconds == 7.0
    (reading,) = window.readings
    assert reading.flags[0] == "the clock went back during the window: the seconds are too few"
    assert reading.net_joules is None


def test_a_replay_clock_that_goes_back_leaves_no_figure(clock: Any, constant: Any) -> None:
    with EnergyMonitor([ReplayMeter(constant(1.0), clock=clock)]).window("w") as window:
        clock.pass_by(-1)
    assert window.readings[0].reason == "the clock of the replayed trace went back, to second -1"


def test_no_idle_no_net_figure(clock: Any, constant: Any) -> None:
    with EnergyMonitor([ReplayMeter(constant(1.0), clock=clock)], clock=clock).window("w") as window:
        clock.pass_by(5)
    assert window.readings[0].net_joules is None
    assert window.co2_g is None


@pytest.mark.parametrize(("seconds", "flagged"), [(9.95, True), (10.05, False)])
def test_windows_below_a_hundred_ticks_are_flagged(clock: Any, constant: Any, seconds: float, flagged: bool) -> None:
    meter = ReplayMeter(constant(1.0), clock=clock)
    meter.tick_s = 0.1
    with EnergyMonitor([meter], clock=clock).window("w") as window:
        clock.pass_by(seconds)
    assert any("shorter than 100 ticks of 0.1 s" in flag for flag in window.readings[0].flags) == flagged


def test_a_counter_that_stands_still_is_flagged(clock: Any) -> None:
    with EnergyMonitor([ReplayMeter([(0, 0), (9, 0)], clock=clock)], clock=clock).window("w") as window:
        clock.pass_by(5)
    assert window.readings[0].joules == 0
    assert window.readings[0].flags == ("the counter did not move during the window",)


def test_after_the_trace_there_is_no_figure(clock: Any) -> None:
    with EnergyMonitor([ReplayMeter([(0, 0), (9, 9)], clock=clock)], clock=clock).window("w") as window:
        clock.pass_by(10)
    assert window.readings[0].joules is None
    assert "ends after 9 s" in str(window.readings[0].reason)


def test_the_last_point_of_a_trace_is_known(clock: Any) -> None:
    with EnergyMonitor([ReplayMeter([(0, 0), (9, 9)], clock=clock)], clock=clock).window("w") as window:
        clock.pass_by(9)
    assert window.readings[0].joules == 9.0


def test_coarse_meters_are_switched_on_first_and_off_last(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longest, and the fine ones and the clock shall miss it."""
    seen: list[str] = []
    meters = [ReplayMeter([(0, 0), (9, 9)], source=name, clock=clock) for name in ("fine", "coarse")]
    for meter, tick_s in zip(meters, (0.1, 1.0), strict=True):
        meter.tick_s = tick_s
        for hook in ("resume", "pause"):
            monkeypatch.setattr(meter, hook, lambda name=f"{hook} {meter._source}": seen.append(name))
    window = EnergyMonitor(meters, clock=clock).window("w")
    window.open()
    window.pause()
    assert seen == ["resume coarse", "resume fine", "pause fine", "pause coarse"]
    window.close()


def test_two_meters_of_one_source_are_refused_and_freed(constant: Any) -> None:
    first, second = ReplayMeter(constant(1.0)), ReplayMeter(constant(2.0))
    with pytest.raises(ValueError, match="both report 'replay'"):
        EnergyMonitor([first, second]).window("w").open()
    with EnergyMonitor([first]).window("w"):
        pass


def test_a_window_serves_once(constant: Any) -> None:
    window = EnergyMonitor([ReplayMeter(constant(1.0))]).window("w")
    with pytest.raises(ValueError, match="not open"):
        window.pause()
    with window:
        pass
    with pytest.raises(ValueError, match="opened before"):
        window.open()
    with pytest.raises(ValueError, match="not open"):
        window.resume()


@pytest.mark.parametrize(
    "trace",
    [
        [],
        [(0, 0)],
        [(1, 0), (2, 1)],
        [(0, 0), (0, 1)],
        [(0, 0), (2, 1), (1, 3)],
        [(0, 5), (1, 4)],
        [(0, 0), (1, float("nan"))],
        [(0, 0), (1, float("inf"))],
        [(0, 0), (float("inf"), 1)],
        [(0, 0), (float("nan"), 1)],
    ],
)
def test_bad_traces_are_refused(trace: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="trace"):
        ReplayMeter(trace)


def test_bad_monitors_are_refused(constant: Any) -> None:
    meter = ReplayMeter(constant(1.0))
    with pytest.raises(ValueError, match="idle_s=-1"):
        EnergyMonitor([meter], idle_s=-1)
    with pytest.raises(ValueError, match="cooldown_s=inf"):
        EnergyMonitor([meter], cooldown_s=float("inf"))
    with pytest.raises(ValueError, match="twice"):
        EnergyMonitor([meter, meter])


def test_readings_need_joules_or_a_reason_and_survive_json() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Reading("x", "measured", None)
    with pytest.raises(ValueError, match="exactly one"):
        Reading("x", "measured", 1.0, reason="why")
    reading = Reading("x", "modelled", 1.5, detail={"idle_w": 2.0}, flags=("rough",), net_joules=0.5, by="a table")
    assert Reading.from_dict(json.loads(json.dumps(reading.to_dict()))) == reading


def test_a_trace_may_stand_still_and_begin_at_any_count(clock: Any) -> None:
    meter = ReplayMeter([(0, 7), (0.5, 7), (10, 7.5)], clock=clock)
    with EnergyMonitor([meter], clock=clock).window("w") as window:
        clock.pass_by(10)
    assert window.readings[0].joules == pytest.approx(0.5)
