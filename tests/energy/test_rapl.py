import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from locallearn.energy import EnergyMonitor, RaplMeter, Reading
from locallearn.energy import _rapl as rapl


def _domain(
    root: Path, folder: str, name: str, microjoules: int, wraps_at: int = 1_000_000_000, **files: object
) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    for file, content in files.items():
        (path / file).write_text(f"{content}\n")
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path / "energy_uj"


def _joules(readings: list[Reading]) -> dict[str, float | None]:
    return {reading.source: reading.joules for reading in readings}


def test_packages_and_memory_are_separate_sources(tmp_path: Path) -> None:
    package = _domain(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    core = _domain(tmp_path, "intel-rapl:0:0", "core", 0)
    dram = _domain(tmp_path, "intel-rapl:0:1", "dram", 1_000_000)
    _domain(tmp_path, "intel-rapl:1", "psys", 0)
    # The same package by another road must not be counted twice.
    _domain(tmp_path, "intel-rapl-mmio:0", "package-mmio", 0)
    with EnergyMonitor([RaplMeter(tmp_path)]).window("w") as window:
        package.write_text("12500000")
        core.write_text("7000000")
        dram.write_text("1250000")
    assert _joules(window.readings) == {"rapl:package-0": 7.5, "rapl:dram": 0.25}
    assert {reading.quality for reading in window.readings} == {"measured"}
    assert "shorter than 100 ticks" in window.readings[0].flags[0]


def test_the_memory_of_two_sockets_is_told_apart(tmp_path: Path) -> None:
    for socket in (0, 1):
        _domain(tmp_path, f"intel-rapl:{socket}", f"package-{socket}", 0)
        _domain(tmp_path, f"intel-rapl:{socket}:0", "dram", 0)
    with EnergyMonitor([RaplMeter(tmp_path)]).window("w") as window:
        pass
    assert set(_joules(window.readings)) == {"rapl:package-0", "rapl:dram-0", "rapl:package-1", "rapl:dram-1"}


def test_wraps_and_pauses(tmp_path: Path, stopped: Any) -> None:
    counter = _domain(tmp_path, "intel-rapl:0", "package-0", 990_000_000)
    with EnergyMonitor([RaplMeter(tmp_path)]).window("w") as window:
        counter.write_text("20000000")
        window.pause()
        counter.write_text("500000000")
        window.resume()
        counter.write_text("501000000")
    assert window.readings[0].joules == pytest.approx(30.0 + 1.0)


def test_a_long_window_is_polled_so_that_two_wraps_are_seen(tmp_path: Path, stopped: Any) -> None:
    """Two full turns of a 1 kJ counter between open and close: only polling can see 2 kJ."""
    values = [0, 600, 200, 800, 400, 1000, 0]
    counter = _domain(tmp_path, "intel-rapl:0", "package-0", 0, constraint_0_max_power_uw=30_000_000)
    meter = RaplMeter(tmp_path)
    with EnergyMonitor([meter]).window("w") as window:
        ticker = meter._ticker
        assert ticker is not None
        assert ticker._period_s == 10.0
        for value in values[1:]:
            stopped.pass_by(10)
            counter.write_text(str(value * 1_000_000))
            ticker._action()
    assert window.readings[0].joules == pytest.approx(600 + 600 + 600 + 600 + 600)


def test_the_poll_thread_reads_and_ends_with_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = _domain(tmp_path, "intel-rapl:0", "package-0", 0)
    monkeypatch.setattr(rapl, "_POLL_S", 0.01)
    before = set(threading.enumerate())
    meter = RaplMeter(tmp_path)
    with EnergyMonitor([meter]).window("w"):
        (thread,) = set(threading.enumerate()) - before
        counter.with_suffix(".new").write_text("7000000")
        counter.with_suffix(".new").rename(counter)
        deadline = time.monotonic() + 30
        while meter._counters[0]._joules != 7.0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert meter._counters[0]._joules == 7.0
    thread.join(timeout=30)
    assert not thread.is_alive()


RANGE_J = 262_144


def _window_of(tmp_path: Path, clock: Any, before_j: float, seconds: float, after_j: float, **files: int) -> Reading:
    """What a window says in which nobody reads a counter of 262 kJ between its two ends."""
    counter = _domain(tmp_path, "intel-rapl:0", "package-0", int(before_j * 1e6), RANGE_J * 1_000_000, **files)
    with EnergyMonitor([RaplMeter(tmp_path)]).window("w") as window:
        clock.pass_by(seconds)
        counter.write_text(str(int(after_j * 1e6)))
    (reading,) = window.readings
    return reading


LIMITS = {"constraint_0_power_limit_uw": 150_000_000, "constraint_1_power_limit_uw": 200_000_000}


@pytest.mark.parametrize(
    "files", [{}, LIMITS, {"constraint_0_max_power_uw": 0}, {"constraint_0_max_power_uw": 4_095_000_000}]
)
def test_a_reset_is_no_wrap(tmp_path: Path, stopped: Any, files: dict[str, int]) -> None:
    """The driver starts again from zero after 40 kJ: as a wrap that would be 222 kJ in ten seconds."""
    reading = _window_of(tmp_path, stopped, 40_000, 10, 0, **files)
    assert reading.joules is None
    assert "gained 222144 J in 10.0 s" in str(reading.reason)
    assert "it was reset, or misread" in str(reading.reason)


@pytest.mark.parametrize(("watts", "right"), [(399, True), (441, False)])
def test_a_gain_is_bounded_by_twice_the_highest_power_limit(
    tmp_path: Path, stopped: Any, watts: float, right: bool
) -> None:
    """200 W is the highest limit, so 400 W the bound; a second more is granted, for counters that come late."""
    files = {**LIMITS, "constraint_2_max_power_uw": 100_000_000, "constraint_1_time_window_us": 10**12}
    reading = _window_of(tmp_path, stopped, 0, 10, 10 * watts, **files)
    assert reading.joules == (10 * watts if right else None)


@pytest.mark.parametrize(("seconds", "right"), [(655, True), (656, False), (5000, False)])
def test_a_time_in_which_it_may_have_wrapped_twice_leaves_no_figure(
    tmp_path: Path, stopped: Any, seconds: float, right: bool
) -> None:
    """At 400 W a counter of 262 kJ wraps every 655.36 s."""
    reading = _window_of(tmp_path, stopped, 0, seconds, 1000, **LIMITS)
    assert reading.joules == (1000 if right else None)
    if not right:
        assert f"not read for {seconds} s, in which it may have wrapped more than once" in str(reading.reason)
        assert "(every 655 s at 400 W)" in str(reading.reason)


def test_a_negative_counter_leaves_no_figure(tmp_path: Path, stopped: Any) -> None:
    assert _window_of(tmp_path, stopped, 5, 1, -5).reason == "the counter showed -5.0"


def test_without_domains_the_reason_is_given(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        with EnergyMonitor([RaplMeter(root)]).window("w") as window:
            pass
        (reading,) = window.readings
        assert (reading.source, reading.joules) == ("rapl", None)
        assert "no RAPL domains under" in str(reading.reason)


def test_a_counter_for_root_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _domain(tmp_path, "intel-rapl:0", "package-0", 0)
    dram = _domain(tmp_path, "intel-rapl:0:0", "dram", 0)
    readable = Path.read_text

    def read_text(path: Path, encoding: str | None = None, errors: str | None = None) -> str:
        if path == dram:
            raise PermissionError(13, "Permission denied")
        return readable(path, encoding, errors)

    monkeypatch.setattr(Path, "read_text", read_text)
    with EnergyMonitor([RaplMeter(tmp_path)]).window("w") as window:
        pass
    assert _joules(window.readings) == {"rapl:package-0": 0.0, "rapl:dram": None}
    assert "not readable: needs root" in str(window.readings[1].reason)


def test_a_counter_that_vanishes_leaves_no_figure(tmp_path: Path) -> None:
    counter = _domain(tmp_path, "intel-rapl:0", "package-0", 0)
    with EnergyMonitor([RaplMeter(tmp_path)]).window("w") as window:
        counter.write_text("5000000")
        window.pause()
        window.resume()
        counter.unlink()
        window.pause()
        counter.write_text("9000000")
    (reading,) = window.readings
    assert reading.joules is None
    assert "cannot be read" in str(reading.reason)


def test_a_counter_of_garbage(tmp_path: Path) -> None:
    _domain(tmp_path, "intel-rapl:0", "package-0", 0).write_text("much")
    with EnergyMonitor([RaplMeter(tmp_path)]).window("w") as window:
        pass
    assert "'much' instead of microjoules" in str(window.readings[0].reason)


@pytest.mark.parametrize(("others_s", "flagged"), [(0, False), (30, True)])
def test_processor_time_of_other_processes_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others_s: int, flagged: bool
) -> None:
    """The run computes for 60 s; the machine for as long, or half as long again."""
    tick = os.sysconf("SC_CLK_TCK")
    stat = tmp_path / "stat"
    times = [0.0, 0.0]
    monkeypatch.setattr(os, "times", lambda: os.times_result([*times, 0.0, 0.0, 0.0]))
    stat.write_text(f"cpu {100 * tick} 0 {50 * tick} {10**9} {10**6} 0 0 0 0 0\ncpu0 1 2 3\n")
    _domain(tmp_path, "intel-rapl:0", "package-0", 0)
    monitor = EnergyMonitor([RaplMeter(tmp_path, stat)], idle_s=30)

    def idle(seconds: float) -> None:
        """Others compute while the run waits: that is in the idle power, not in the window."""
        with stat.open("w") as file:
            file.write(f"cpu {(100 + 500) * tick} 0 {50 * tick} {10**9} {10**6} 0 0 0 0 0\n")

    monitor.wait = idle
    with monitor.window("w") as window:
        times[:] = [50.0, 10.0]
        monitor.wait = lambda seconds: None
        stat.write_text(f"cpu {(650 + others_s) * tick} 0 {60 * tick} {2 * 10**9} {10**7} 0 0 0 0 0\n")
    (reading,) = window.readings
    assert reading.detail["cpu_s_of_run"] == pytest.approx(60)
    assert reading.detail["cpu_s_of_machine"] == pytest.approx(60 + others_s)
    told = "other processes took 33% of the processors' time: what these drew for them is in the figure"
    assert (told in reading.flags) == flagged


@pytest.mark.parametrize("text", [None, "", "cpu many"])
def test_without_the_system_s_count_nothing_is_said_of_others(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "stat").write_text(text)
    _domain(tmp_path, "intel-rapl:0", "package-0", 0)
    with EnergyMonitor([RaplMeter(tmp_path, tmp_path / "stat")]).window("w") as window:
        pass
    assert window.readings[0].joules == 0.0
    assert window.readings[0].detail.keys() == {"domain"}
