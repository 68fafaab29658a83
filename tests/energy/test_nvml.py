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

UUIDS = ("GPU-aaa1", "GPU-aab2", "GPU-ccc3")


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
        self.slices: dict[int, list[str]] = {}
        self.unsupported: set[str] = set()
        self.no_driver = False
        self.processes = [os.getpid(), 1]

    def _need(self, call: str) -> None:
        if not self.started:
            raise self.NVMLError("Uninitialized")
        if call in self.unsupported:
            raise self.NVMLError("Not Supported")

    def _slice(self, handle: int, number: int) -> str:
        if number >= len(self.slices[handle]):
            raise self.NVMLError("Not Found")
        return self.slices[handle][number]

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
            "nvmlDeviceGetUUID": lambda handle: handle if isinstance(handle, str) else UUIDS[handle],
            "nvmlDeviceGetPciInfo": lambda handle: SimpleNamespace(domain=0, bus=16 + handle, device=0),
            "nvmlDeviceGetMaxMigDeviceCount": lambda handle: 7 if handle in self.slices else 0,
            "nvmlDeviceGetMigDeviceHandleByIndex": self._slice,
            "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: self.millijoules[handle],
            "nvmlDeviceGetMigMode": lambda handle: [int(handle in self.mig), 0],
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
            "nvmlSystemGetDriverVersion": lambda: "570.1",
            "nvmlDeviceGetTemperature": lambda handle, sensor: 41,
            "nvmlDeviceGetClockInfo": lambda handle, clock: 1980,
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: [
                SimpleNamespace(pid=pid, usedGpuMemory=2**29) for pid in self.processes
            ],
            "nvmlSystemGetProcessName": lambda pid: "/usr/bin/python3",
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

    used = set(re.findall(r"\b(?:nvml[A-Z]|NVML_[A-Z])\w+\b(?!\{)", inspect.getsource(_nvml))) - {"NVML_ERROR_"}
    assert len(used) > 10
    assert [name for name in sorted(used) if not hasattr(pynvml, name)] == []


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
        "compute_processes_seen": "python3 (1, 512 MiB)",
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
    first, second, third = _read(NvmlMeter([1, 5, 2]))
    assert first.detail["nvml_index"] == 1
    assert [second.source, third.source] == ["nvml:5", "nvml:2"]
    for reading in (second, third):
        assert "only 2 NVIDIA GPU(s) are visible" in str(reading.reason)


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
        nvml.millijoules[0] = 5
    assert window.readings[0].reason == "the counter went backwards during the window"


# -- the board of the run ---------------------------------------------------------------------------------------------


def _cuda(monkeypatch: pytest.MonkeyPatch, **properties: Any) -> None:
    """What torch tells of every CUDA device."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))


def _read_for(device: str, meter: NvmlMeter) -> list[Reading]:
    monitor = EnergyMonitor([meter])
    monitor.use(device)
    with monitor.window("w") as window:
        pass
    return window.readings


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_run_on_another_device_is_not_billed_for_the_boards(nvml: FakeNvml, device: str) -> None:
    (reading,) = _read_for(device, NvmlMeter())
    assert (reading.source, reading.joules) == ("nvml", None)
    assert f"the run computes on {device}" in str(reading.reason)
    assert nvml.started == 0


@pytest.mark.parametrize("uuid", ["aab2", "GPU-aab2", b"AAB2"])
@pytest.mark.parametrize("visible", [None, "1", "GPU-aab2", "MIG-whatever"])
def test_the_board_of_the_run_is_found_by_its_uuid(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, uuid: Any, visible: str | None
) -> None:
    """Whatever CUDA_VISIBLE_DEVICES says: here torch's first device is the second board."""
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    _cuda(monkeypatch, uuid=uuid, pci_domain_id=0, pci_bus_id=99, pci_device_id=0)
    monitor = EnergyMonitor([NvmlMeter()])
    monitor.use("cuda:0")
    with monitor.window("w") as window:
        for board, millijoules in enumerate((1000, 20_000, 300_000)):
            nvml.millijoules[board] += millijoules
    (reading,) = window.readings
    assert (reading.source, reading.joules) == ("nvml:0 NVIDIA H200", 20.0)
    assert reading.detail["nvml_index"] == 1
    assert nvml.started == 0


def test_the_board_of_the_run_is_found_by_its_address(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    _cuda(monkeypatch, pci_domain_id=0, pci_bus_id=18, pci_device_id=0)
    (reading,) = _read_for("cuda:5", NvmlMeter())
    assert reading.source == "nvml:5 NVIDIA H200"
    assert reading.detail["nvml_index"] == 2


@pytest.mark.parametrize("visible", [None, "1"])
def test_a_board_that_does_not_answer_costs_the_others_nothing(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None
) -> None:
    handle = nvml.nvmlDeviceGetHandleByIndex

    def lost(index: int) -> Any:
        if index == 0:
            raise FakeNvml.NVMLError("GPU is lost")
        return handle(index)

    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByIndex", lost)
    if visible is None:
        _cuda(monkeypatch, pci_domain_id=0, pci_bus_id=18, pci_device_id=0)
        (reading,) = _read_for("cuda:0", NvmlMeter())
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with EnergyMonitor([NvmlMeter()]).window("w") as window:
            pass
        (reading,) = window.readings
    assert reading.reason is None


def test_cuda_without_a_number_is_the_current_device(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    _cuda(monkeypatch, uuid="ccc3")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 4)
    assert _read_for("cuda", NvmlMeter())[0].source == "nvml:4 NVIDIA H200"


def test_a_board_that_tells_no_address_is_not_the_one(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.unsupported |= {"nvmlDeviceGetPciInfo", "nvmlDeviceGetMaxMigDeviceCount"}
    _cuda(monkeypatch, uuid="dddd", pci_domain_id=0, pci_bus_id=17, pci_device_id=0)
    assert "none of NVML's 3 boards" in str(_read_for("cuda:0", NvmlMeter())[0].reason)


def test_without_uuid_and_address_the_order_counts(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    _cuda(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    (reading,) = _read_for("cuda:1", NvmlMeter())
    assert reading.detail["nvml_index"] == 0


@pytest.mark.parametrize("address", [{}, {"pci_domain_id": 0, "pci_bus_id": 99, "pci_device_id": 0}])
def test_a_board_that_nvml_does_not_know_is_not_guessed(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, address: dict[str, int]
) -> None:
    _cuda(monkeypatch, uuid="dddd", **address)
    (reading,) = _read_for("cuda:0", NvmlMeter())
    assert (reading.source, reading.joules) == ("nvml:0", None)
    assert "none of NVML's 3 boards" in str(reading.reason)


def test_a_run_on_a_mig_slice(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.slices[2] = ["MIG-ee01", "MIG-ee02"]
    _cuda(monkeypatch, uuid="ee02", pci_domain_id=0, pci_bus_id=18, pci_device_id=0)
    assert _read_for("cuda:0", NvmlMeter())[0].reason == "a MIG slice has no energy counter of its own"
    nvml.mig.add(2)
    _cuda(monkeypatch, uuid="ccc3")
    assert "MIG is on" in str(_read_for("cuda:0", NvmlMeter())[0].reason)


def test_boards_that_are_asked_for_are_measured_and_marked(nvml: FakeNvml) -> None:
    first, second = _read_for("cuda:1", NvmlMeter([0, 1]))
    assert [reading.joules for reading in (first, second)] == [0.0, 0.0]
    assert any("not the device of the run" in flag for flag in first.flags)
    assert not any("not the device of the run" in flag for flag in second.flags)
    assert all("not the device" in str(reading.flags) for reading in _read_for("cpu", NvmlMeter([0, 1])))


@pytest.mark.parametrize("uuid", ["GPU-aab2", "aab", "gpu-AAB2"])
def test_boards_are_named_by_uuid_too(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, uuid: str) -> None:
    """Whatever CUDA shows, and beside the run's own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    _cuda(monkeypatch, uuid="ccc3")
    named, own = _read_for("cuda:0", NvmlMeter([uuid, 0]))
    assert (named.detail["uuid"], own.detail["uuid"]) == ("GPU-aab2", "GPU-ccc3")
    assert named.source == f"nvml:GPU-{uuid.lower().removeprefix('gpu-')} NVIDIA H200"
    assert "not the device of the run" in str(named.flags)
    assert "not the device of the run" not in str(own.flags)


@pytest.mark.parametrize(("uuid", "found"), [("GPU-aa", "2 of"), ("GPU-zz", "0 of")])
def test_a_uuid_must_be_one_boards(nvml: FakeNvml, uuid: str, found: str) -> None:
    (reading,) = _read(NvmlMeter([uuid]))
    assert str(reading.reason).startswith(f"{found} NVML's 3 boards have a UUID that begins {uuid}: aaa1, aab2, ccc3")


def test_one_board_named_twice_is_measured_once(nvml: FakeNvml) -> None:
    first, second = _read(NvmlMeter([1, "GPU-aab2"]))
    assert first.joules == 0.0
    assert "the same board as nvml:1" in str(second.reason)


def test_other_processes_are_noted_though_they_have_ended(nvml: FakeNvml) -> None:
    nvml.processes = [os.getpid()]
    with EnergyMonitor([NvmlMeter([0])]).window("w") as window:
        nvml.processes = [os.getpid(), 7]
        assert window.readings[0].detail["other_compute_processes"] == 1
        nvml.processes = [os.getpid(), 8]
        window.pause()
        assert window.readings[0].detail["other_compute_processes"] == 2
        nvml.processes = [os.getpid()]
    (reading,) = window.readings
    assert reading.detail["compute_processes_seen"] == "python3 (7, 512 MiB); python3 (8, 512 MiB)"
    assert "2 other processes computed on this board: what it drew for them is in the figure" in reading.flags


@pytest.mark.parametrize(("listed", "others"), [([], None), ([31], 0), ([31, 32], 1)])
def test_in_a_container_one_of_the_listed_processes_is_this_one(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, listed: list[int], others: int | None
) -> None:
    """Numbers are those outside."""
    nvml.processes = listed
    _cuda(monkeypatch, uuid="aab2")
    (reading,) = _read_for("cuda:0", NvmlMeter())
    assert reading.detail["other_compute_processes"] == others
    assert any("computed on this board" in flag for flag in reading.flags) == bool(others)


def test_a_device_that_cuda_does_not_know(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: Any) -> None:
        raise RuntimeError("invalid device ordinal")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    assert "invalid device ordinal" in str(_read_for("cuda:9", NvmlMeter())[0].reason)


# -- counters that cannot be believed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("watts", "right"), [(1399, True), (1600, False), (1e9, False)])
def test_a_gain_is_bounded_by_twice_the_power_limit(nvml: FakeNvml, stopped: Any, watts: float, right: bool) -> None:
    """The fake's limit is 700 W; a second more is granted, for counters that come late."""
    with EnergyMonitor([NvmlMeter([0])]).window("w") as window:
        stopped.pass_by(10)
        nvml.millijoules[0] += int(watts * 10 * 1000)
    assert window.readings[0].joules == (watts * 10 if right else None)


def test_without_a_known_limit_no_board_draws_4_kw(nvml: FakeNvml, stopped: Any) -> None:
    nvml.unsupported.add("nvmlDeviceGetEnforcedPowerLimit")
    with EnergyMonitor([NvmlMeter([0])]).window("w") as window:
        nvml.millijoules[0] += 3_999_000
    assert window.readings[0].joules == 3999
    with EnergyMonitor([NvmlMeter([0])]).window("w") as window:
        nvml.millijoules[0] += 4_001_000
    assert "more than 4000 W can" in str(window.readings[0].reason)


@pytest.mark.parametrize("answer", [None, -1, 0, 2**64 - 1, 2**63, float("nan"), "many"])
def test_what_is_no_count_of_millijoules_leaves_no_figure(nvml: FakeNvml, answer: Any) -> None:
    with EnergyMonitor([NvmlMeter([0])]).window("w") as window:
        nvml.millijoules[0] = answer
    assert "NVML gives no energy counter: it answers" in str(window.readings[0].reason)
    assert "NVML gives no energy counter: it answers" in str(_read(NvmlMeter([0]))[0].reason)


_CALLS = (
    *("nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID", "nvmlDeviceGetPciInfo"),
    *("nvmlDeviceGetMaxMigDeviceCount", "nvmlDeviceGetMigMode", "nvmlDeviceGetName", "nvmlDeviceGetEnforcedPowerLimit"),
    *("nvmlDeviceGetTotalEnergyConsumption", "nvmlSystemGetDriverVersion", "nvmlDeviceGetTemperature"),
    *("nvmlDeviceGetClockInfo", "nvmlDeviceGetComputeRunningProcesses", "nvmlShutdown"),
)
_NEEDED = {"nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetTotalEnergyConsumption"}


@pytest.mark.parametrize("call", _CALLS)
@pytest.mark.parametrize("kind", [FakeNvml.NVMLError, AttributeError, OSError, ValueError])
def test_whatever_a_call_raises_the_window_goes_on(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, call: str, kind: type[Exception]
) -> None:
    """Only what the figure is made of costs the figure, and then the words of the error are its reason."""

    def fail(*args: Any) -> None:
        raise kind("the words of the error")

    _cuda(monkeypatch, uuid="aab2", pci_domain_id=0, pci_bus_id=17, pci_device_id=0)
    monkeypatch.setattr(nvml, call, fail, raising=False)
    (reading,) = _read_for("cuda:0", NvmlMeter())
    if call in _NEEDED:
        assert reading.joules is None
        assert "the meter failed" not in str(reading.reason)
        if call != "nvmlDeviceGetHandleByIndex":  # a board that does not answer is none of those that may be the run's
            assert "the words of the error" in str(reading.reason)
    else:
        assert (reading.joules, reading.reason) == (0.0, None)


def test_a_missing_binding_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is not installed" in str(_read(NvmlMeter())[0].reason)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("NOT_SUPPORTED", "before Volta, or a virtual machine"),
        ("NO_PERMISSION", "may not read it"),
        ("FUNCTION_NOT_FOUND", "older than the call"),
        ("GPU_IS_LOST", "fallen off the bus"),
        ("UNKNOWN", ""),
    ],
)
def test_why_there_is_no_counter_is_told_apart(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    """With the library's own error codes and words."""
    with monkeypatch.context() as real:
        real.delitem(sys.modules, "pynvml")
        import pynvml
    number = getattr(pynvml, f"NVML_ERROR_{code}")

    def fail(handle: Any) -> None:
        raise pynvml.NVMLError(number)

    for name in _nvml._CAUSES:
        monkeypatch.setattr(nvml, f"NVML_ERROR_{name}", getattr(pynvml, f"NVML_ERROR_{name}"), raising=False)
    monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", fail, raising=False)
    reason = str(_read(NvmlMeter([0]))[0].reason)
    assert reason.startswith(f"NVML gives no energy counter: {pynvml.NVMLError(number)}")
    assert words in reason
    assert ("(" in reason) == bool(words)


@pytest.mark.parametrize(("boards", "found"), [(1, True), (2, False)])
def test_a_single_board_that_tells_nothing_of_itself_is_the_one(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, boards: int, found: bool
) -> None:
    nvml.unsupported |= {"nvmlDeviceGetPciInfo", "nvmlDeviceGetUUID"}
    nvml.millijoules = dict.fromkeys(range(boards), 1000)
    _cuda(monkeypatch, uuid="dddd", pci_domain_id=0, pci_bus_id=99, pci_device_id=0)
    (reading,) = _read_for("cuda:0", NvmlMeter())
    assert (reading.joules is not None) == found


def test_letting_go_of_nvml_costs_no_figure(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counters are read by then."""

    def fail() -> None:
        raise nvml.NVMLError("Unknown Error")

    monkeypatch.setattr(nvml, "nvmlShutdown", fail)
    assert _read(NvmlMeter([0]))[0].joules == 0.0


@pytest.mark.parametrize("devices", [[], [-1], [0, 0], [""], ["GPU-"], ["GPU-a", "a"]])
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
