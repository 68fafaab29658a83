import contextlib
import json
import logging
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from locallearn.energy import CodeCarbonMeter, EnergyMonitor, Reading

TEMPORARY = "locallearn.energy._codecarbon.tempfile.gettempdir"


def _busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _joules(readings: list[Reading]) -> dict[str, float]:
    return {reading.source: reading.joules for reading in readings if reading.joules is not None}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of the network; every call fails, and CodeCarbon would swallow that."""
    asked: list[Any] = []

    def refuse(*args: Any, **options: Any) -> None:
        asked.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


def test_one_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], calls: list[Any]
) -> None:
    """Constant RAM power makes joules proportional to seconds; nothing is written, sent, logged or left running."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TEMPORARY, lambda: str(tmp_path))
    threads = threading.active_count()
    meter = CodeCarbonMeter("FRA", "process", measure_power_secs=0.1)
    with EnergyMonitor([meter]).window("w") as window:
        _busy(0.5)
    by_source = {reading.source: reading for reading in window.readings}
    assert {"codecarbon:cpu", "codecarbon:ram"} <= set(by_source)
    assert {reading.quality for reading in window.readings} == {"modelled"}
    assert all(reading.joules is not None and reading.joules > 0 for reading in window.readings)
    assert all("shorter than 100 ticks of 1 s" in reading.flags[0] for reading in window.readings)
    cpu = by_source["codecarbon:cpu"].detail
    assert (cpu["country"], cpu["tracking_mode"], cpu["ignored_settings"]) == ("FRA", "process", None)
    assert cpu["power_model"]
    json.dumps([reading.to_dict() for reading in window.readings])
    assert list(tmp_path.iterdir()) == []
    assert calls == []
    assert capfd.readouterr() == ("", "")
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads


def test_co2_follows_the_grid() -> None:
    """Grams per kilowatt-hour of the published mixes: Poland's coal against Sweden's water."""
    grams = {}
    for country in ("POL", "SWE"):
        with EnergyMonitor([CodeCarbonMeter(country)]).window("w") as window:
            time.sleep(0.2)
        assert window.co2_g is not None
        grams[country] = window.co2_g / (sum(_joules(window.readings).values()) / 3.6e6)
    assert 500 < grams["POL"] < 1000
    assert 5 < grams["SWE"] < 100


def test_pauses_are_not_billed() -> None:
    """RAM is a constant power: its joules are those of the counted seconds, though the pause is the longest part."""
    meter = CodeCarbonMeter(tracking_mode="process")
    with EnergyMonitor([meter]).window("w") as window:
        time.sleep(0.3)
        before = _joules(window.readings)
        with window.paused():
            _busy(1.5)
        paused = _joules(window.readings)
        time.sleep(0.3)
        # The tracker stops long after the last counted stretch: its own total would bill this too.
        window.pause()
        time.sleep(0.6)
    after = _joules(window.readings)
    power_w = before["codecarbon:ram"] / 0.3
    assert paused["codecarbon:ram"] == pytest.approx(before["codecarbon:ram"], rel=0.1)
    assert after["codecarbon:ram"] == pytest.approx(power_w * window.seconds, rel=0.1)
    # The busy 1.5 s took place in the pause; what was counted slept.
    busy = CodeCarbonMeter(tracking_mode="process")
    with EnergyMonitor([busy]).window("busy") as worked:
        _busy(0.6)
    assert _joules(worked.readings)["codecarbon:cpu"] > 4 * after["codecarbon:cpu"]


def test_two_trackers_at_once() -> None:
    """No lock stands between them, and each counts its own stretch."""
    first, second = CodeCarbonMeter(), CodeCarbonMeter()
    with EnergyMonitor([first]).window("long") as long:
        time.sleep(0.2)
        with EnergyMonitor([second]).window("short") as short:
            time.sleep(0.4)
        time.sleep(0.2)
    ratio = _joules(short.readings)["codecarbon:ram"] / _joules(long.readings)["codecarbon:ram"]
    assert ratio == pytest.approx(short.seconds / long.seconds, rel=0.1)


def test_the_users_configuration_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    """A file and a variable that multiply the figures by thousands, and send them away, are passed over and named."""
    (tmp_path / ".codecarbon.config").write_text(
        "[codecarbon]\npue = 1000\nforce_ram_power = 5000\nsave_to_file = true\nemissions_endpoint = http://localhost:9\n"
        "co2_signal_api_token = secret\nallow_multiple_runs = false\n"
    )
    meter = CodeCarbonMeter()
    with EnergyMonitor([meter]).window("w") as plain:
        time.sleep(0.2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TEMPORARY, lambda: str(tmp_path))
    monkeypatch.setenv("CODECARBON_FORCE_CPU_POWER", "9000")
    with EnergyMonitor([meter]).window("w") as configured:
        time.sleep(0.2)
    ram_w = [_joules(window.readings)["codecarbon:ram"] / window.seconds for window in (plain, configured)]
    assert ram_w[1] == pytest.approx(ram_w[0], rel=0.1)
    assert _joules(configured.readings)["codecarbon:cpu"] < 500
    assert configured.readings[0].detail["ignored_settings"] == "./.codecarbon.config, CODECARBON_FORCE_CPU_POWER"
    assert [path.name for path in tmp_path.iterdir()] == [".codecarbon.config"]
    assert calls == []


def test_a_tracker_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CodeCarbon swallows the errors of its constructor; the reading must show them."""
    monkeypatch.setattr(TEMPORARY, lambda: str(tmp_path / "missing"))
    with EnergyMonitor([CodeCarbonMeter()]).window("w") as window:
        pass
    (reading,) = window.readings
    assert (reading.source, reading.joules, window.co2_g) == ("codecarbon", None, None)
    assert "CodeCarbon did not start: OSError" in str(reading.reason)
    assert "missing" in str(reading.reason)


def test_a_tracker_that_fails_midway_leaves_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    from codecarbon import OfflineEmissionsTracker

    meter = CodeCarbonMeter()
    with contextlib.ExitStack() as stack:
        window = stack.enter_context(EnergyMonitor([meter]).window("w"))
        monkeypatch.setattr(OfflineEmissionsTracker, "stop_task", lambda tracker: None)
    assert {reading.joules for reading in window.readings} == {None}
    assert "CodeCarbon failed during the window" in str(window.readings[0].reason)
    assert window.co2_g is None


def test_the_logger_is_left_as_it_was() -> None:
    logger = logging.getLogger("codecarbon")
    handlers = list(logger.handlers)
    with EnergyMonitor([CodeCarbonMeter()]).window("w"):
        assert logger.level == logging.CRITICAL
    assert logger.handlers == handlers


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="country_iso_code='US' is not among"):
        CodeCarbonMeter("US")
    with pytest.raises(ValueError, match="tracking_mode='all'"):
        CodeCarbonMeter(tracking_mode="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="measure_power_secs=0"):
        CodeCarbonMeter(measure_power_secs=0)
