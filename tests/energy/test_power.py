import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import locallearn.energy
from locallearn.energy import EnergyMonitor, NvmlMeter, PowerReplayMeter, Reading, _nvml, _power
from locallearn.energy._meter import UnreadableError
from locallearn.energy._poll import Integral
from locallearn.energy._power import Poller, PowerCounter
from tests.energy.test_nvml import FakeNvml


def _integral(points: list[tuple[float, float]]) -> Integral:
    integral = Integral()
    for at_s, power_w in points:
        integral.add(at_s, power_w)
    return integral


def _error_j(integral: Integral) -> float:
    return max(abs(integral.signed_j) / 3, math.sqrt(integral.squared_j2))


# -- the rule and its error -------------------------------------------------------------------------------------------


def test_straight_lines_are_integrated_exactly_at_any_distances() -> None:
    times = [0.0, 0.1, 0.35, 0.4, 1.0, 1.01, 3.0]
    integral = _integral([(t, 10 + 5 * t) for t in times])
    assert integral.joules == pytest.approx(10 * 3 + 5 * 9 / 2)
    assert integral.seconds == pytest.approx(3.0)
    assert integral.longest_s == pytest.approx(1.99)
    assert _error_j(integral) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("curve", ["parabola", "exponential"])
def test_the_signed_estimate_is_the_error_of_a_smooth_power(curve: str) -> None:
    """Richardson: a third of the difference to twice the interval, up to terms of higher order."""
    power, exact = {
        "parabola": (lambda t: 100 + 30 * t * t, 100 * 4 + 10 * 64),
        "exponential": (lambda t: 50 * math.exp(-t), 50 * (1 - math.exp(-4))),
    }[curve]
    integral = _integral([(i / 25, power(i / 25)) for i in range(101)])
    error_j = integral.joules - exact
    assert -integral.signed_j / 3 == pytest.approx(error_j, rel=0.01)
    assert abs(error_j) <= 1.01 * _error_j(integral)


def test_the_estimate_covers_the_error_of_noise() -> None:
    """Against the known mean of the noise: two estimates' width must hold about as often as two standard deviations do."""
    draws = random.Random(0)
    held = 0
    for _ in range(200):
        points = [(i * 0.05, draws.gauss(300, 60)) for i in range(201)]
        integral = _integral(points)
        held += abs(integral.joules - 300 * 10) <= 2 * _error_j(integral)
    assert 170 <= held <= 200


def test_a_sample_that_is_not_later_is_left_out() -> None:
    assert _integral([(1.0, 5.0), (1.0, 500.0), (0.5, 500.0), (2.0, 5.0)]).joules == 5.0


# -- the process ------------------------------------------------------------------------------------------------------


def _window(meter: PowerReplayMeter, seconds: float, rest_s: float = 0.0) -> tuple[float, Reading]:
    with EnergyMonitor([meter]).window("w") as window:
        time.sleep(seconds / 2)
        if rest_s:
            with window.paused():
                time.sleep(rest_s)
        time.sleep(seconds / 2)
    return window.seconds, window.readings[0]


def _sampled_s(reading: Reading) -> float:
    """Seconds that were integrated."""
    samples, apart_s = reading.detail["samples"], reading.detail["sampling_s"]
    assert isinstance(samples, int)
    assert isinstance(apart_s, float)
    return samples * apart_s


def test_a_constant_power_gives_power_times_time_without_its_pauses() -> None:
    seconds, reading = _window(PowerReplayMeter([(0, 40), (1e6, 40)], every_s=0.01), 0.2, rest_s=0.5)
    assert reading.quality == "measured"
    assert reading.by == "power integrated over samples 0.01 s apart"
    assert reading.joules == pytest.approx(40 * _sampled_s(reading))
    # Clock and power are asked one after the other, which takes a while on a busy machine.
    assert 0.15 < _sampled_s(reading) < seconds + 0.45
    assert reading.detail["sampling_error_j"] == pytest.approx(0.0, abs=1e-6)


def test_what_a_late_sensor_moves_across_the_ends_is_in_the_error() -> None:
    """From 0 W, 100 W more every second: half a second late, it misses half of what it rises by."""
    _, reading = _window(PowerReplayMeter([(0, 0), (1e3, 1e5)], every_s=0.01, lag_s=0.5), 0.2)
    assert reading.detail["sampling_error_j"] == pytest.approx(0.5 * 100 * _sampled_s(reading), rel=0.3)


def test_the_process_ends_with_the_window() -> None:
    meter = PowerReplayMeter([(0, 1), (1e6, 1)])
    with EnergyMonitor([meter]).window("w"):
        (counter,) = meter._counters
        assert isinstance(counter, PowerCounter)
        process = counter.poller._process
        assert process.poll() is None
    assert process.poll() is not None


def test_what_is_told_of_the_samples_is_the_windows_not_the_idle_looks() -> None:
    """While the machine is watched idle the power is noise, which would be in the error; then it is constant."""
    noise = [(i / 100, 10.0 * (i % 2)) for i in range(1, 40)]
    meter = PowerReplayMeter([(0, 0), *noise, (0.4, 5), (1e6, 5)], every_s=0.01)
    with EnergyMonitor([meter], idle_s=0.5).window("w") as window:
        time.sleep(0.05)
    (reading,) = window.readings
    assert reading.joules == pytest.approx(5 * _sampled_s(reading))
    assert reading.detail["sampling_error_j"] == pytest.approx(0.0, abs=1e-6)


def test_a_process_of_ours_that_holds_the_pipe_does_not_hold_up_the_end() -> None:
    """As a forked worker of a data loader does: the end of the pipe does not come, and once it had to be killed."""
    poller = Poller({"kind": "replay", "trace": [[0, 1], [1e6, 1]]}, every_s=0.01)
    assert poller._process.stdin is not None
    held = os.dup(poller._process.stdin.fileno())
    try:
        poller.close()
    finally:
        os.close(held)
    assert poller._process.returncode == 0


def _package_without_torch() -> str:
    folder = str(Path(locallearn.energy.__file__).parents[1])
    return f"""
import sys, types, time
parent = types.ModuleType("locallearn")
parent.__path__ = [{folder!r}]
sys.modules["locallearn"] = parent
from locallearn.energy._power import Poller
poller = Poller({{"kind": "replay", "trace": [[0, 1], [1e6, 1]]}})
print(poller.pid, flush=True)
"""


def _is_there(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes in /proc")
def test_the_process_ends_when_its_parent_is_killed() -> None:
    code = _package_without_torch() + "time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert _is_there(pid)
        os.kill(pid, signal.SIGINT)  # Ctrl-C and the like are for the training
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
        assert _is_there(pid)
        parent.kill()
    end = time.monotonic() + 60
    while _is_there(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _is_there(pid)


def test_an_interpreter_that_does_not_let_go_holds_up_no_sample() -> None:
    """A thread of this process would not have run once in the meantime."""
    poller = Poller({"kind": "replay", "trace": [[0, 1], [1e6, 1]]}, every_s=0.005)
    before, interval = poller.state()["samples"], sys.getswitchinterval()
    sys.setswitchinterval(60.0)
    try:
        for seconds in (0.3, 3.0, 30.0):  # the other process may have to wait for a core
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                pass
            taken = poller.state()["samples"] - before
            if taken > 5:
                break
    finally:
        sys.setswitchinterval(interval)
    assert taken > 5
    poller.close()


def test_a_process_that_is_gone_leaves_no_figure() -> None:
    meter = PowerReplayMeter([(0, 1), (1e6, 1)])
    with EnergyMonitor([meter]).window("w") as window:
        (counter,) = meter._counters
        assert isinstance(counter, PowerCounter)
        counter.poller._process.kill()
        counter.poller._process.wait()
    assert (window.readings[0].joules, window.readings[0].reason) == (
        None,
        "the process that samples the power has ended",
    )


def test_a_process_that_does_not_answer_is_not_waited_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    poller = Poller({"kind": "replay", "trace": [[0, 1], [1e6, 1]]})
    os.kill(poller.pid, signal.SIGSTOP)
    monkeypatch.setattr(_power, "_ANSWER_S", 0.05)
    monkeypatch.setattr(_power, "_END_S", 0.05)
    for _ in range(2):
        with pytest.raises(UnreadableError, match="did not answer"):
            poller.state()
    poller.close()
    assert poller._process.poll() is not None


def test_the_end_of_a_power_trace_leaves_no_figure() -> None:
    _, reading = _window(PowerReplayMeter([(0, 1), (0.05, 1)], every_s=0.01), 0.2)
    assert "the replayed trace ends after 0.05 s" in str(reading.reason)


def test_long_gaps_between_samples_are_flagged() -> None:
    meter = PowerReplayMeter([(0, 1), (1e6, 1)], every_s=0.002)
    with EnergyMonitor([meter]).window("w") as window:
        (counter,) = meter._counters
        assert isinstance(counter, PowerCounter)
        os.kill(counter.poller.pid, signal.SIGSTOP)
        time.sleep(0.1)
        os.kill(counter.poller.pid, signal.SIGCONT)
    assert any("between two samples of the power" in flag for flag in window.readings[0].flags)


@pytest.mark.parametrize(
    "arguments",
    [{"trace": [(0, 1)]}, {"trace": [(0, 1), (1, -1)]}, {"trace": [(0, 1), (1, float("nan"))]}]
    + [{"trace": [(0, 1), (1, 1)], **more} for more in ({"every_s": 0}, {"lag_s": -1})],
)
def test_bad_power_traces_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"trace|every_s"):
        PowerReplayMeter(**arguments)


# -- NVIDIA boards without a counter ----------------------------------------------------------------------------------

_PYNVML = """
from types import SimpleNamespace
def nvmlInit(): pass
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetPowerUsage(handle):
    if handle == 2:
        raise RuntimeError("Not Supported")
    return 250_000 + handle
"""


@pytest.fixture
def powered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeNvml:
    """NVML's fake here, and one of its power in every process that is started."""
    fake = FakeNvml()
    (tmp_path / "pynvml.py").write_text(_PYNVML)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


@pytest.mark.parametrize("fault", ["no counter", "a counter of 0", "a counter that stands still"])
def test_a_board_without_a_counter_has_its_power_integrated(
    powered: FakeNvml, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "no counter":
        powered.unsupported.add("nvmlDeviceGetTotalEnergyConsumption")
    elif fault == "a counter of 0":
        powered.millijoules[1] = 0
    else:
        monkeypatch.setattr(_nvml, "_STILL_S", 0.02)
    with EnergyMonitor([NvmlMeter([1], poll_s=0.01)]).window("w") as window:
        time.sleep(0.1)
    (reading,) = window.readings
    assert (reading.source, reading.quality) == ("nvml:1 NVIDIA H200", "measured")
    assert reading.joules == pytest.approx(250.001 * _sampled_s(reading))
    assert reading.by.startswith("power integrated")
    assert {"no counter": "Not Supported", "a counter of 0": "it answers 0"}.get(fault, "does not move") in str(
        reading.detail["instead_of"]
    )
    assert reading.detail["driver"] == "570.1"


def test_a_board_that_tells_neither_says_both(powered: FakeNvml) -> None:
    powered.unsupported.add("nvmlDeviceGetTotalEnergyConsumption")
    with EnergyMonitor([NvmlMeter([2])]).window("w") as window:
        pass
    (reading,) = window.readings
    assert reading.joules is None
    assert "no energy counter: Not Supported" in str(reading.reason)
    assert "nor can its power be integrated: RuntimeError: Not Supported" in str(reading.reason)


def test_a_counter_that_moves_is_read(powered: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at until it moves, which here is at the third look."""
    looks = iter(range(10**6))
    monkeypatch.setattr(_nvml, "_STILL_S", 1.0)
    monkeypatch.setattr(
        powered, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: 1000 + next(looks) // 3, raising=False
    )
    with EnergyMonitor([NvmlMeter([0])]).window("w") as window:
        pass
    assert window.readings[0].by == ""
    assert window.readings[0].joules is not None
    assert next(looks) < 20
