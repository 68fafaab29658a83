"""zeus's part is played by a small package of the same names, here and in the processes that sample."""

import importlib
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from locallearn.energy import EnergyMonitor, Reading, ZeusMeter
from tests.energy.test_power import _sampled_s

_AMD = """
class AMDGPUs:
    energy_mj = {0: 1000, 1: 2000}
    counted = (0,)
    started = True
    def __len__(self): return 2
    def get_name(self, number): return "AMD Instinct MI300X"
    def get_power_management_limit(self, number): return 750_000
    def get_gpu_temperature(self, number): return 44
    def supports_get_total_energy_consumption(self, number): return number in self.counted
    def get_total_energy_consumption(self, number): return self.energy_mj[number]
    def get_average_power_usage(self, number): raise RuntimeError("not supported")
    def get_instant_power_usage(self, number): return 300_000
def amdsmi_is_available(): return AMDGPUs.started
"""
_JETSON = """
import os
class Sensor:
    def __init__(self, mw): self.mw = mw
    def measure_power(self):
        if f"{self.mw:.0f}" == os.environ.get("BROKEN_MW"): raise OSError("in1_input: Input/output error")
        return self.mw
class Jetson:
    there = False
    def __init__(self): raise RuntimeError("would start a process")
    def _discover_available_metrics(self): return {"gpu_power_mw": Sensor(4000.0), "total_power_mw": Sensor(9000.0)}
def jetson_is_available(): return Jetson.there
"""
_APPLE = """
from types import SimpleNamespace
class AppleSilicon:
    mj = {"cpu_total_mj": 1000, "gpu_mj": 5000, "gpu_sram_mj": None, "dram_mj": 300, "ane_mj": 0}
    def get_available_metrics(self): return {key for key, value in self.mj.items() if value is not None}
    def get_total_energy_consumption(self): return SimpleNamespace(**self.mj)
def apple_silicon_is_available(): return True
"""


@pytest.fixture
def zeus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules by their last names."""
    for folder in ("zeus", "zeus/device", "zeus/device/gpu", "zeus/device/soc"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    for name, text in (("gpu/amd", _AMD), ("soc/jetson", _JETSON), ("soc/apple", _APPLE)):
        (tmp_path / f"zeus/device/{name}.py").write_text(text)
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "zeus"}
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ("gpu.amd", "soc.jetson", "soc.apple")
    yield SimpleNamespace(**{name[4:]: importlib.import_module(f"zeus.device.{name}") for name in names})
    for name in list(sys.modules):
        if name.split(".")[0] == "zeus":
            del sys.modules[name]
    sys.modules.update(kept)


def _read(
    meter: ZeusMeter, device: str | None = None, seconds: float = 0.0, during: Any = lambda: None
) -> list[Reading]:
    monitor = EnergyMonitor([meter])
    if device is not None:
        monitor.use(device)
    with monitor.window("w") as window:
        during()
        time.sleep(seconds)
    return window.readings


def test_without_the_package_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeus", None)
    monkeypatch.setitem(sys.modules, "zeus.device", None)
    (reading,) = _read(ZeusMeter())
    assert (reading.source, reading.joules) == ("zeus", None)
    assert reading.reason == "the package zeus is not installed: pip install 'locallearn[zeus]'"


def test_a_machine_with_none_of_them_says_so(zeus: Any) -> None:
    zeus.amd.AMDGPUs.started = False
    (reading,) = _read(ZeusMeter())
    assert "no AMD board, no chip of Apple's and no Jetson board" in str(reading.reason)


def test_the_run_s_amd_board_is_read_by_its_counter(zeus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.3")
    boards = zeus.amd.AMDGPUs
    (reading,) = _read(ZeusMeter(), "cuda:0", during=lambda: boards.energy_mj.update({0: 1000 + 7500, 1: 10**6}))
    assert (reading.source, reading.quality, reading.joules) == ("amd:0 AMD Instinct MI300X", "measured", 7.5)
    assert reading.detail == {"name": "AMD Instinct MI300X", "power_limit_w": 750.0, "temperature_c": 44}
    assert not any("not the device of the run" in flag for flag in reading.flags)


@pytest.mark.parametrize(("device", "hip"), [("cpu", "6.3"), ("cuda:0", None)])
def test_a_run_on_something_else_is_not_billed_for_amd_boards(
    zeus: Any, monkeypatch: pytest.MonkeyPatch, device: str, hip: str | None
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    (reading,) = _read(ZeusMeter(), device)
    assert f"the run computes on {device}" in str(reading.reason)
    named = _read(ZeusMeter([0]), device)
    assert named[0].joules == 0.0
    assert "not the device of the run" in str(named[0].flags)


def test_an_amd_board_without_a_counter_has_its_power_integrated(zeus: Any) -> None:
    """300 W, of which only the second way to ask knows."""
    monitor = EnergyMonitor([ZeusMeter([1, 5], poll_s=0.01)])
    with monitor.window("w") as window:
        time.sleep(0.1)
    second, missing = window.readings
    assert second.source == "amd:1 AMD Instinct MI300X"
    assert second.joules == pytest.approx(300 * _sampled_s(second))
    assert second.by.startswith("power integrated")
    assert "only 2 AMD board(s) are visible" in str(missing.reason)


def test_rails_of_a_jetson_are_sampled_by_processes_of_our_own(zeus: Any) -> None:
    zeus.amd.AMDGPUs.started = False
    zeus.jetson.Jetson.there = True
    monitor = EnergyMonitor([ZeusMeter(poll_s=0.01)])
    with monitor.window("w") as window:
        time.sleep(0.1)
    gpu, total = window.readings
    assert [gpu.source, total.source] == ["jetson:gpu", "jetson:total"]
    assert gpu.joules == pytest.approx(4 * _sampled_s(gpu))
    assert total.joules == pytest.approx(9 * _sampled_s(total))
    assert any("the whole board" in flag for flag in total.flags)
    on_cpu = _read(ZeusMeter(poll_s=0.01), "cpu")
    assert [reading.joules is None for reading in on_cpu if reading.source == "jetson:gpu"] == [True]


def test_a_rail_that_cannot_be_read_costs_the_others_nothing(zeus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it leave their processes behind."""
    zeus.amd.AMDGPUs.started = False
    zeus.jetson.Jetson.there = True
    monkeypatch.setenv("BROKEN_MW", "9000")
    gpu, total = _read(ZeusMeter(poll_s=0.01), seconds=0.05)
    assert gpu.joules == pytest.approx(4 * _sampled_s(gpu))
    assert (total.source, total.joules) == ("jetson:total", None)
    assert "in1_input: Input/output error" in str(total.reason)


def test_apple_s_parts_are_modelled_and_only_those_that_the_run_uses(
    zeus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeus.amd.AMDGPUs.started = False
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    chip = zeus.apple.AppleSilicon

    def work() -> None:
        chip.mj = {**chip.mj, "cpu_total_mj": 4000, "gpu_mj": 25_000}

    by_source = {reading.source: reading for reading in _read(ZeusMeter(), "mps", during=work)}
    assert {source: reading.joules for source, reading in by_source.items()} == {
        "apple:cpu": 3.0,
        "apple:gpu": 20.0,
        "apple:dram": 0.0,
        "apple:ane": 0.0,
    }
    assert {reading.quality for reading in by_source.values()} == {"modelled"}
    on_cpu = {reading.source: reading.joules for reading in _read(ZeusMeter(), "cpu")}
    assert on_cpu == {"apple:cpu": 0.0, "apple:gpu": None, "apple:dram": 0.0, "apple:ane": None}


@pytest.mark.parametrize("part", ["gpu.amd", "soc.jetson"])
def test_whatever_zeus_raises_costs_that_part_alone(zeus: Any, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def fail() -> None:
        raise OSError("libamd_smi.so: cannot open")

    modules = {"gpu.amd": zeus.amd, "soc.jetson": zeus.jetson}
    name = {"gpu.amd": "amdsmi_is_available", "soc.jetson": "jetson_is_available"}[part]
    monkeypatch.setattr(modules[part], name, fail)
    readings = {reading.source: reading for reading in _read(ZeusMeter([0] if part == "soc.jetson" else None))}
    assert "libamd_smi.so: cannot open" in str(readings[part.split(".")[1]].reason)
    if part == "soc.jetson":
        assert readings["amd:0 AMD Instinct MI300X"].joules == 0.0


def test_the_part_is_played_with_zeus_s_own_names() -> None:
    """Guards the package above: every name that the meter uses must exist in zeus itself."""
    pytest.importorskip("zeus.device", reason="zeus is not installed")
    from zeus.device.gpu.amd import AMDGPUs, amdsmi_is_available
    from zeus.device.soc.apple import AppleSilicon, apple_silicon_is_available
    from zeus.device.soc.jetson import Jetson, jetson_is_available

    for name in ("get_name", "get_power_management_limit", "supports_get_total_energy_consumption"):
        assert callable(getattr(AMDGPUs, name))
    for name in ("get_total_energy_consumption", "get_average_power_usage", "get_instant_power_usage"):
        assert callable(getattr(AMDGPUs, name))
    assert callable(AppleSilicon.get_available_metrics)
    assert callable(Jetson._discover_available_metrics)
    assert [amdsmi_is_available(), apple_silicon_is_available(), jetson_is_available()].count(True) <= 1


@pytest.mark.parametrize("arguments", [{"devices": []}, {"devices": [-1]}, {"devices": [0, 0]}, {"poll_s": 0}])
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"devices=|poll_s="):
        ZeusMeter(**arguments)
