import contextlib
import json
import logging
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from locallearn.energy import CodeCarbonMeter, EnergyMonitor, Reading, _codecarbon
from tests.energy.conftest import FakeClock
from tests.energy.test_nvml import FakeNvml

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
    deadline = time.monotonic() + 60
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
    """Not by the real tracker: its figures stand still between ``pause`` and ``resume``, however busy the pause."""
    with EnergyMonitor([CodeCarbonMeter(tracking_mode="process")]).window("w") as window:
        time.sleep(0.1)
        window.pause()
        before, co2_g = _joules(window.readings), window.co2_g
        _busy(0.3)
        assert _joules(window.readings) == before
        assert window.co2_g == co2_g
        # The tracker stops long after the last counted stretch: its own total would bill this too.
    assert _joules(window.readings) == before
    assert all(joules > 0 for source, joules in before.items() if source == "codecarbon:ram")


def test_two_trackers_at_once() -> None:
    """No lock stands between them, and each counts its own stretch."""
    first, second = CodeCarbonMeter(), CodeCarbonMeter()
    with EnergyMonitor([first]).window("long") as long, EnergyMonitor([second]).window("short") as short:
        time.sleep(0.1)
        short.pause()
        time.sleep(0.1)
    assert 0 < _joules(short.readings)["codecarbon:ram"] < _joules(long.readings)["codecarbon:ram"]


# -- with a tracker whose answers are known ---------------------------------------------------------------------------


def test_only_resumed_stretches_are_counted(stopped: Any, tracker: Any) -> None:
    with EnergyMonitor([CodeCarbonMeter()]).window("w") as window:
        stopped.pass_by(10)
        with window.paused():
            stopped.pass_by(1000)
        stopped.pass_by(20)
    assert _joules(window.readings) == pytest.approx({"codecarbon:cpu": 30 * 30, "codecarbon:ram": 20 * 30})
    assert window.co2_g == pytest.approx(50 * 30 / 3.6e6 * 400)


def test_closing_counts_what_is_running_and_keeps_the_first_reason(
    stopped: Any, tracker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError("boom")

    monkeypatch.setattr(tracker, "stop", fail)
    for wrong, said in (
        (False, "CodeCarbon did not stop: OSError: boom"),
        (True, "CodeCarbon failed during the window"),
    ):
        meter = CodeCarbonMeter()
        meter.open()
        ticker = meter._ticker
        assert ticker is not None
        meter.resume()
        stopped.pass_by(10)
        tracker.answers = {"emissions": None} if wrong else {}
        meter.close()
        assert ticker._stop.is_set()
        assert meter._joules == pytest.approx({"cpu": 300.0, "ram": 200.0})
        assert str(meter.readings()[0].reason).startswith(said)


def test_every_figure_says_by_what_it_is_modelled(stopped: Any, tracker: Any) -> None:
    """Memory is a constant times seconds; so is a processor that CodeCarbon knows no load of."""
    tracker.watts["gpu"], tracker.gpu_count = 5.0, 1
    constant = "a constant power times the seconds: it says nothing of what ran"
    for mode, said in (
        ("cpu_load", "load \N{MULTIPLICATION SIGN} 85 W"),
        ("constant", "constant power \N{MULTIPLICATION SIGN} time (half of 85 W)"),
    ):
        type(tracker._hardware[0])._mode = mode
        with EnergyMonitor([CodeCarbonMeter()]).window("w") as window:
            stopped.pass_by(200)
        by_source = {reading.source.partition(":")[2]: reading for reading in window.readings}
        assert {part: reading.by for part, reading in by_source.items()} == {
            "cpu": said,
            "gpu": "the boards' counter or power",
            "ram": "constant power \N{MULTIPLICATION SIGN} time (by size)",
        }
        assert {reading.quality for reading in by_source.values()} == {"modelled"}
        assert by_source["ram"].flags == (constant,)
        assert by_source["cpu"].flags == ((constant,) if mode == "constant" else ())
        assert by_source["gpu"].flags == ()


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), -1e-9, 4000 * 11.5 / 3.6e6])
@pytest.mark.parametrize("part", ["cpu", "ram"])
def test_an_answer_that_cannot_be_right_costs_its_source_and_the_co2(
    stopped: Any, tracker: Any, part: str, answer: float
) -> None:
    """4 kW is the most, with a second granted: ten seconds may have 44 kJ, and not 46."""
    with EnergyMonitor([CodeCarbonMeter()]).window("w") as window:
        stopped.pass_by(10)
        tracker.answers[f"{part}_energy"] = answer
        assert window.co2_g is None
        tracker.answers.clear()
        stopped.pass_by(10)
    readings = {reading.source.partition(":")[2]: reading for reading in window.readings}
    wrong, other = readings.pop(part), next(iter(readings.values()))
    assert wrong.joules is None
    assert "CodeCarbon answered" in str(wrong.reason)
    assert "for 10.0 s" in str(wrong.reason)
    assert other.joules == pytest.approx({"cpu": 30, "ram": 20}[other.source.partition(":")[2]] * 20)
    assert window.co2_g is None


def test_the_most_that_is_believed(stopped: Any, tracker: Any) -> None:
    with EnergyMonitor([CodeCarbonMeter()]).window("w") as window:
        stopped.pass_by(10)
        tracker.answers["cpu_energy"] = 4000 * 10.9 / 3.6e6
    assert _joules(window.readings)["codecarbon:cpu"] == pytest.approx(43_600)


@pytest.mark.parametrize("grams", [float("nan"), float("inf"), -1.0, -1e-6])
def test_co2_that_cannot_be_right_costs_the_co2(stopped: Any, tracker: Any, grams: float) -> None:
    with EnergyMonitor([CodeCarbonMeter()]).window("w") as window:
        tracker.answers["emissions"] = grams
        stopped.pass_by(10)
    assert window.co2_g is None
    assert set(_joules(window.readings)) == {"codecarbon:cpu", "codecarbon:ram"}


@pytest.mark.parametrize("answer", [{"cpu_energy": None}, {"emissions": None}, {"ram_energy": "much"}])
def test_an_answer_that_is_no_number_costs_the_meter(stopped: Any, tracker: Any, answer: dict[str, Any]) -> None:
    with EnergyMonitor([CodeCarbonMeter()]).window("w") as window:
        tracker.answers |= answer
    assert {reading.joules for reading in window.readings} == {None}
    assert "CodeCarbon failed during the window: TypeError" in str(window.readings[0].reason)


@pytest.mark.parametrize(("by_s", "right"), [(-3600.0, False), (3.0, False), (-0.2, False), (0.05, True)])
@pytest.mark.parametrize("mode", ["process", "machine"])
def test_a_system_clock_that_is_set_costs_the_load_of_a_process(
    stopped: Any, tracker: Any, monkeypatch: pytest.MonkeyPatch, mode: Any, by_s: float, right: bool
) -> None:
    """CodeCarbon divides a process's seconds of processor by those of the system's clock, and by nothing else."""
    wall = FakeClock(5e8)
    monkeypatch.setattr(time, "time", wall)
    with EnergyMonitor([CodeCarbonMeter(tracking_mode=mode)]).window("w") as window:
        stopped.pass_by(10)
        wall.pass_by(10 + by_s)
    right = right or mode == "machine"
    readings = {reading.source: reading for reading in window.readings}
    assert readings["codecarbon:cpu"].joules == (pytest.approx(300.0) if right else None)
    assert right or f"clock was set by {by_s:+.1f} s" in str(readings["codecarbon:cpu"].reason)
    assert readings["codecarbon:ram"].joules == pytest.approx(200.0)
    assert (window.co2_g is not None) == right


def test_a_system_clock_that_is_set_costs_no_figure_without_a_load(
    stopped: Any, tracker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A constant power does not depend on the processor's seconds, in whatever mode."""
    wall = FakeClock(5e8)
    monkeypatch.setattr(time, "time", wall)
    type(tracker._hardware[0])._mode = "constant"
    with EnergyMonitor([CodeCarbonMeter(tracking_mode="process")]).window("w") as window:
        stopped.pass_by(10)
        wall.pass_by(3610)
    assert _joules(window.readings)["codecarbon:cpu"] == pytest.approx(300.0)


def test_a_run_on_the_processor_is_not_billed_for_the_boards(
    stopped: Any, tracker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    asked: list[Any] = []
    monkeypatch.setattr(_codecarbon, "_new_tracker", lambda *settings: asked.append(settings[-1]) or tracker)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ccc3"))
    tracker.gpu_count = 3
    co2_g = {}
    for device in (None, "cpu", "cuda:0"):
        monitor = EnergyMonitor([CodeCarbonMeter()])
        if device is not None:
            monitor.use(device)
        with monitor.window("w") as window:
            stopped.pass_by(10)
        gpu = {reading.source: reading for reading in window.readings}["codecarbon:gpu"]
        assert (gpu.joules is None) == (device == "cpu")
        co2_g[device] = window.co2_g
        if device == "cpu":
            assert gpu.reason == "the run computes on cpu: no whole board is its own"
    assert asked == [[0, 1, 2], [], [2]]
    assert co2_g["cpu"] == pytest.approx(50 * 10 / 3.6e6 * 400)


@pytest.mark.parametrize("device", [None, "cuda:0"])
@pytest.mark.parametrize("fails", ["nvmlDeviceGetCount", "nvmlInit"])
def test_boards_that_cannot_be_told_apart_are_not_billed(
    fails: str, device: str | None, stopped: Any, tracker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVML may fail at any moment; what all boards of the machine draw is never taken for the run's own."""
    nvml = FakeNvml()
    nvml.unsupported, nvml.no_driver = {fails}, fails == "nvmlInit"
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    asked: list[Any] = []
    monkeypatch.setattr(_codecarbon, "_new_tracker", lambda *settings: asked.append(settings[-1]) or tracker)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ccc3"))
    tracker.gpu_count = 3
    monitor = EnergyMonitor([CodeCarbonMeter()])
    if device is not None:
        monitor.use(device)
    with monitor.window("w") as window:
        stopped.pass_by(10)
    if (device, fails) == (None, "nvmlInit"):
        assert asked == [None]  # no NVML, and nobody said what the run computes on: the tracker finds what it can
        return
    gpu = {reading.source: reading for reading in window.readings}["codecarbon:gpu"]
    assert asked == [[]]
    assert gpu.joules is None
    assert "is not known" in (gpu.reason or "")
    assert nvml.started == 0


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
    assert ram_w[1] < 10 * ram_w[0]
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
