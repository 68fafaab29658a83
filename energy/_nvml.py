"""NVML: the energy counter of NVIDIA boards (Volta and later).

Calls and units: https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from locallearn.energy._meter import Counter, CounterMeter, Detail, Reading, UnreadableError

_TICK_S = 0.1


class NvmlMeter(CounterMeter):
    """Joules of whole NVIDIA boards, whoever uses them, from ``nvmlDeviceGetTotalEnergyConsumption``.

    NVML knows nothing of ``CUDA_VISIBLE_DEVICES``; this meter does, by index and by UUID. Indices there are taken in
    PCI order, which is CUDA's own order on boards of one model; on mixed boards set ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.

    Args:
        devices: boards as torch numbers them (``cuda:0`` is 0); ``None`` means every visible one.

    Raises:
        ValueError: ``devices`` is empty, or holds a negative or repeated number.
    """

    def __init__(self, devices: Sequence[int] | None = None) -> None:
        super().__init__("measured", tick_s=_TICK_S)
        if devices is not None and (not devices or min(devices) < 0 or len(set(devices)) < len(devices)):
            raise ValueError(f"devices={list(devices)} was given; wanted are distinct numbers from 0, or None for all")
        self._devices = None if devices is None else list(devices)
        self._nvml: Any = None

    def _connect(self) -> tuple[list[Counter], list[Reading]]:
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            return [], [Reading("nvml", "measured", None, f"NVML did not start: {error} (is there an NVIDIA driver?)")]
        self._nvml = pynvml
        try:
            visible = visible_boards(pynvml)
        except pynvml.NVMLError as error:
            return [], [Reading("nvml", "measured", None, f"NVML did not list the boards: {error}")]
        if not visible:
            hidden = "" if os.environ.get("CUDA_VISIBLE_DEVICES") is None else " that CUDA_VISIBLE_DEVICES lets through"
            return [], [Reading("nvml", "measured", None, f"no NVIDIA GPU{hidden}")]
        counters: list[Counter] = []
        unreadable: list[Reading] = []
        for number in range(len(visible)) if self._devices is None else self._devices:
            try:
                counters.append(_counter(pynvml, number, visible))
            except UnreadableError as error:
                unreadable.append(Reading(f"nvml:{number}", "measured", None, str(error)))
        return counters, unreadable

    def _disconnect(self) -> None:
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml = None


def visible_boards(nvml: Any) -> list[int | None]:
    """NVML's index of each device that CUDA shows, in CUDA's order; ``None`` for a MIG slice.

    Like CUDA, stop at the first entry of ``CUDA_VISIBLE_DEVICES`` that names no board.
    """
    count = nvml.nvmlDeviceGetCount()
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return list(range(count))
    uuids = [nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
    boards: list[int | None] = []
    for entry in wanted.split(","):
        name = entry.strip()
        if name.startswith("MIG-"):
            boards.append(None)
            continue
        if name.startswith("GPU-"):
            matches = [index for index, uuid in enumerate(uuids) if uuid.startswith(name)]
        else:
            matches = [int(name)] if name.isdecimal() and int(name) < count else []
        if len(matches) != 1 or matches[0] in boards:
            break
        boards.append(matches[0])
    return boards


def visible_indices() -> list[int] | None:
    """NVML's indices of the whole boards that CUDA shows; ``None`` where NVML does not work."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return [index for index in visible_boards(pynvml) if index is not None]
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _counter(nvml: Any, number: int, visible: list[int | None]) -> Counter:
    if number >= len(visible):
        raise UnreadableError(f"device {number} was asked for, but only {len(visible)} NVIDIA GPU(s) are visible")
    index = visible[number]
    if index is None:
        raise UnreadableError("a MIG slice has no energy counter of its own")
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name = nvml.nvmlDeviceGetName(handle)
    except nvml.NVMLError as error:
        raise UnreadableError(f"NVML does not open board {index}: {error}") from None
    mig = _try(nvml, nvml.nvmlDeviceGetMigMode, handle)
    if mig is not None and mig[0] == nvml.NVML_DEVICE_MIG_ENABLE:
        raise UnreadableError(f"MIG is on: the counter of the {name} covers all its slices")
    read = partial(_joules, nvml, handle)
    read()
    power_limit_mw = _try(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    detail: Detail = {
        "name": name,
        "uuid": _try(nvml, nvml.nvmlDeviceGetUUID, handle),
        "nvml_index": index,
        "driver": _try(nvml, nvml.nvmlSystemGetDriverVersion),
        "power_limit_w": None if power_limit_mw is None else power_limit_mw / 1e3,
    }
    return Counter(f"nvml:{number} {name}", read, detail=detail, observe=partial(_observe, nvml, handle))


def _joules(nvml: Any, handle: Any) -> float:
    try:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except nvml.NVMLError as error:
        raise UnreadableError(f"NVML gives no energy counter: {error}") from None


def _observe(nvml: Any, handle: Any) -> Detail:
    """Temperature, clock, and how many other compute processes NVML lists (a container may not know itself)."""
    processes = _try(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle)
    others = None if processes is None else sum(process.pid != os.getpid() for process in processes)
    return {
        "temperature_c": _try(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        "sm_clock_mhz": _try(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        "other_compute_processes": others,
    }


def _try(nvml: Any, query: Callable[..., Any], *args: Any) -> Any:
    """What NVML answers, or ``None`` where it does not."""
    try:
        return query(*args)
    except nvml.NVMLError:
        return None
