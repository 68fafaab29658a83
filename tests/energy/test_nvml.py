import inspect
import os
import re
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from locallearn.energy import EnergyMonitor, NvmlMeter, Reading, _nvml


class FakeNvml:
    """NVML with three boards; each call checks that NVML is started, as the library does."""

    NVML_DEVICE_MIG_ENABLE = 1
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.started = 0
        self.millijoules = {0: 1_000_000, 1: 2_000_000, 2: 3_000_000}
        self.mig: set[int] = set()
        self.unsupported: set[str] = set()
        self.no_driver = False

    def _need(self, call: str) -> None:
        if not self.started:
            raise self.NVMLError("Uninitialized")
        if call in self.unsupported:
            raise self.NVMLError("Not Supported")

    def nvmlInit(self) -> None:  # noqa: N802
        if self.no_driver:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.started += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._need("shutdown")
        self.started -= 1

    def __getattr__(self, call: str) -> Any:
        answers: dict[str, Any] = {
            "nvmlDeviceGetCount": lambda: len(self.millijoules),
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetUUID": lambda handle: ["GPU-aaa1", "GPU-aab2", "GPU-ccc3"][handle],
            "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: self.millijoules[handle],
            "nvmlDeviceGetMigMode": lambda handle: [int(handle in self.mig), 0],
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
            "nvmlSystemGetDriverVersion": lambda: "570.1",
            "nvmlDeviceGetTemperature": lambda handle, sensor: 41,
            "nvmlDeviceGetClockInfo": lambda handle, clock: 1980,
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: [
                SimpleNamespace(pid=os.getpid()),
                SimpleNamespace(pid=1),
            ],
        }
        if call not in answers:
            raise AttributeError(call)

        def answer(*args: Any) -> Any:
            self._need(call)
            return answers[call](*args)

        return answer


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def _read(meter: NvmlMeter) -> list[Reading]:
    with EnergyMonitor([meter]).window("w") as window:
        pass
    return window.readings


def test_the_fake_answers_only_calls_that_the_real_library_has(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the fake: every name the meter uses must exist in the installed nvidia-ml-py."""
    monkeypatch.delitem(sys.modules, "pynvml")
    import pynvml

    used = set(re.findall(r"nvml\.(\w+)", inspect.getsource(_nvml))) - {"nvml"}
    assert len(used) > 10
    assert [name for name in sorted(used) if name[:4].lower() == "nvml" and not hasattr(pynvml, name)] == []


def test_joules_of_one_board_with_a_pause(nvml: FakeNvml) -> None:
    with EnergyMonitor([NvmlMeter([1])]).window("w") as window:
        nvml.millijoules[1] += 1500
        window.pause()
        nvml.millijoules[1] += 9999
        window.resume()
        nvml.millijoules[1] += 500
    (reading,) = window.readings
    assert (reading.source, reading.quality, reading.joules) == ("nvml:1 NVIDIA H200", "measured", 2.0)
    assert reading.detail == {
        "name": "NVIDIA H200",
        "uuid": "GPU-aab2",
        "nvml_index": 1,
        "driver": "570.1",
        "power_limit_w": 700.0,
        "temperature_c": 41,
        "sm_clock_mhz": 1980,
        "other_compute_processes": 1,
    }
    assert "shorter than 100 ticks of 0.1 s" in reading.flags[0]
    assert nvml.started == 0


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        ("GPU-ccc3,0", [2, 0]),
        ("GPU-aa", []),
        ("1,7,0", [1]),
        ("1,1,2", [1]),
        ("-1", []),
        ("", []),
    ],
)
def test_visible_devices(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, indices: list[int]
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    readings = _read(NvmlMeter())
    if indices:
        assert [reading.detail["nvml_index"] for reading in readings] == indices
        assert [reading.source[:6] for reading in readings] == [f"nvml:{n}" for n in range(len(indices))]
    else:
        (reading,) = readings
        assert (reading.source, reading.joules) == ("nvml", None)
        assert reading.reason == "no NVIDIA GPU that CUDA_VISIBLE_DEVICES lets through"
    assert nvml.started == 0


def test_devices_are_counted_among_the_visible(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    first, second = _read(NvmlMeter([1, 5]))
    assert first.detail["nvml_index"] == 1
    assert second.source == "nvml:5"
    assert "only 2 NVIDIA GPU(s) are visible" in str(second.reason)


def test_no_driver(nvml: FakeNvml) -> None:
    nvml.no_driver = True
    (reading,) = _read(NvmlMeter())
    assert (reading.source, reading.joules) == ("nvml", None)
    assert "Shared Library Not Found" in str(reading.reason)


def test_no_counter(nvml: FakeNvml) -> None:
    nvml.unsupported.add("nvmlDeviceGetTotalEnergyConsumption")
    readings = _read(NvmlMeter([0]))
    assert [(reading.source, reading.joules) for reading in readings] == [("nvml:0", None)]
    assert "Not Supported" in str(readings[0].reason)


def test_what_a_board_does_not_tell_is_none(nvml: FakeNvml) -> None:
    nvml.unsupported |= {"nvmlDeviceGetMigMode", "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetTemperature"}
    (reading,) = _read(NvmlMeter([0]))
    assert reading.joules == 0.0
    assert reading.detail["other_compute_processes"] is None
    assert reading.detail["temperature_c"] is None


def test_mig(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.mig.add(0)
    assert "MIG is on" in str(_read(NvmlMeter([0]))[0].reason)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-aaa1/1/0")
    assert _read(NvmlMeter())[0].reason == "a MIG slice has no energy counter of its own"


def test_a_board_lost_in_the_window_leaves_no_figure(nvml: FakeNvml) -> None:
    with EnergyMonitor([NvmlMeter([0])]).window("w") as window:
        nvml.millijoules[0] += 5000
        nvml.unsupported.add("nvmlDeviceGetTotalEnergyConsumption")
    assert window.readings[0].joules is None


def test_a_counter_that_falls_leaves_no_figure(nvml: FakeNvml) -> None:
    with EnergyMonitor([NvmlMeter([0])]).window("w") as window:
        nvml.millijoules[0] = 0
    assert window.readings[0].reason == "the counter went backwards during the window"


@pytest.mark.parametrize("devices", [[], [-1], [0, 0]])
def test_bad_devices_are_refused(devices: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct numbers"):
        NvmlMeter(devices)


@pytest.mark.gpu
def test_a_real_board_under_load() -> None:
    """Energy of a busy second lies between 1 W and twice the board's power limit."""
    values = torch.randn(4096, 4096, device="cuda")
    with EnergyMonitor([NvmlMeter([0])], torch.cuda.synchronize).window("w") as window:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            values @ values
            torch.cuda.synchronize()
    (reading,) = window.readings
    limit_w = reading.detail["power_limit_w"]
    assert reading.joules is not None, reading.reason
    assert isinstance(limit_w, float)
    assert window.seconds < reading.joules < 2 * limit_w * window.seconds
