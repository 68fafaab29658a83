import threading
import time
from pathlib import Path

import pytest

from locallearn.energy import EnergyMonitor, RaplMeter, Reading
from locallearn.energy import _rapl as rapl


def _domain(root: Path, folder: str, name: str, microjoules: int, wraps_at: int = 1_000_000_000) -> Path:
    path = root / folder
    path.mkdir(parents=True)
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


def test_wraps_and_pauses(tmp_path: Path) -> None:
    counter = _domain(tmp_path, "intel-rapl:0", "package-0", 990_000_000)
    with EnergyMonitor([RaplMeter(tmp_path)]).window("w") as window:
        counter.write_text("20000000")
        window.pause()
        counter.write_text("500000000")
        window.resume()
        counter.write_text("501000000")
    assert window.readings[0].joules == pytest.approx(30.0 + 1.0)


def test_a_long_window_is_polled_so_that_two_wraps_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two full turns of a 100 J counter between open and close: only polling can see 200 J."""
    values = [0, 60, 20, 80, 40, 100, 0]
    counter = _domain(tmp_path, "intel-rapl:0", "package-0", 0, wraps_at=100_000_000)
    monkeypatch.setattr(rapl, "_POLL_S", 3600.0)
    meter = RaplMeter(tmp_path)
    with EnergyMonitor([meter]).window("w") as window:
        ticker = meter._ticker
        assert ticker is not None
        assert ticker._period_s == 3600.0
        for value in values[1:]:
            counter.write_text(str(value * 1_000_000))
            ticker._action()
    assert window.readings[0].joules == pytest.approx(60 + 60 + 60 + 60 + 60)


def test_the_poll_thread_ends_with_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = _domain(tmp_path, "intel-rapl:0", "package-0", 0, wraps_at=100_000_000)
    monkeypatch.setattr(rapl, "_POLL_S", 0.01)
    before = set(threading.enumerate())
    with EnergyMonitor([RaplMeter(tmp_path)]).window("w") as window:
        (thread,) = set(threading.enumerate()) - before
        for value in (70, 40, 10, 80):
            counter.with_suffix(".new").write_text(str(value * 1_000_000))
            counter.with_suffix(".new").rename(counter)
            time.sleep(0.1)
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert window.readings[0].joules == pytest.approx(70 + 70 + 70 + 70)


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
