"""NVML: the energy counter of NVIDIA boards (Volta and later), else an integral of their power.

Calls and units: https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from locallearn.energy._meter import Counter, CounterMeter, Detail, Reading, UnreadableError
from locallearn.energy._power import POLL_S, PowerCounter

_TICK_S = 0.1
# An average may stand above the enforced limit for a while, hence twice that; where NVML tells none, more than any
# board draws.
_ABOVE_LIMIT = 2.0
_MAX_W = 4000.0
# A counter that has not moved after so long is believed not to count: the slowest seen moves every 0.1 s.
_STILL_S = 1.0
_LOOK_S = 0.005
# NVML's power is a mean over the second before on Ampere and later, so it is late by half of that.
_POWER_LAG_S = 0.5
# NVML's "not available" is -1 in an unsigned number of 64 bits.
_NOT_AVAILABLE_MJ = 2**63


class NvmlMeter(CounterMeter):
    """Joules of whole NVIDIA boards, whoever uses them, from ``nvmlDeviceGetTotalEnergyConsumption``.

    Once it has been told what a run computes on (:meth:`use`), it measures that board alone, found by the UUID that
    CUDA gives it, else by its PCI address; a run on another kind of device has no joules here. Without that it
    measures the boards that ``CUDA_VISIBLE_DEVICES`` lets through, by index and by UUID. Indices there are taken in PCI
    order, which is CUDA's own order on boards of one model; on mixed boards set ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.

    A gain that is more than twice the board's power limit could give in the time leaves no figure. Of a board that has
    no counter, or one that stands still, the power is integrated by a process of its own; the reading then says so, and
    how wrong it may be. Other processes on the board are noted: what they draw is in the figure.

    Args:
        devices: boards as torch numbers them (``cuda:0`` is 0) or by their UUID (``GPU-…``, or its beginning),
            whatever a run computes on; ``None``: the run's own, or every visible one.
        poll_s: seconds between two samples of a power.

    Raises:
        ValueError: ``devices`` is empty, or holds a negative number, something twice, or text that is no UUID;
            ``poll_s`` is not positive.
    """

    def __init__(self, devices: Sequence[int | str] | None = None, poll_s: float = POLL_S) -> None:
        super().__init__("measured", tick_s=_TICK_S)
        if devices is not None:
            wanted = [_bare(device) if isinstance(device, str) else device for device in devices]
            bad = [device for device in wanted if device == "" or (isinstance(device, int) and device < 0)]
            if not wanted or bad or len(set(wanted)) < len(wanted):
                raise ValueError(
                    f"devices={list(devices)} was given; wanted are distinct numbers from 0 or UUIDs (GPU-...), or None for all"
                )
        if not 0 < poll_s < float("inf"):
            raise ValueError(f"poll_s={poll_s} was given; wanted are seconds above 0")
        self._devices = None if devices is None else list(devices)
        self._poll = poll_s
        self._device: str | None = None
        self._nvml: Any = None

    def use(self, device: str) -> None:
        """See :meth:`Meter.use`."""
        self._device = str(device)

    def _connect(self) -> tuple[list[Counter], list[Reading]]:
        if self._devices is None and self._device is not None and not self._device.startswith("cuda"):
            return [], [Reading("nvml", "measured", None, _not_used(self._device))]
        try:
            pynvml = _started()
        except UnreadableError as error:
            return [], [Reading("nvml", "measured", None, str(error))]
        self._nvml = pynvml
        boards = _Boards(pynvml, self._poll, self._device)
        if self._devices is None and self._device is not None:
            return boards.watched([(str(cuda_number(self._device)), partial(board_of, pynvml, self._device))])
        try:
            visible = visible_boards(pynvml)
        except Exception as error:
            return [], [Reading("nvml", "measured", None, f"NVML did not list the boards: {_said(error)}")]
        if self._devices is None and not visible:
            hidden = "" if os.environ.get("CUDA_VISIBLE_DEVICES") is None else " that CUDA_VISIBLE_DEVICES lets through"
            return [], [Reading("nvml", "measured", None, f"no NVIDIA GPU{hidden}")]
        named = range(len(visible)) if self._devices is None else self._devices
        return boards.watched(
            [
                (f"GPU-{_bare(name)[:8]}", partial(_named_board, pynvml, name))
                if isinstance(name, str)
                else (str(name), partial(_visible_board, name, visible))
                for name in named
            ]
        )

    def _disconnect(self) -> None:
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            # The counters have been read by now: what goes wrong here takes nothing from them.
            with suppress(Exception):
                nvml.nvmlShutdown()


def _started() -> Any:
    """NVML's binding, started.

    Raises:
        UnreadableError: there is none, or no driver that answers it.
    """
    try:
        import pynvml
    except ImportError:
        raise UnreadableError("the package nvidia-ml-py is not installed: pip install nvidia-ml-py") from None
    try:
        pynvml.nvmlInit()
    except Exception as error:
        raise UnreadableError(f"NVML did not start: {_said(error)} (is there an NVIDIA driver?)") from None
    return pynvml


def board_of(nvml: Any, device: str) -> int:
    """NVML's index of the board that torch calls ``device`` (``cuda:1``); NVML must have been started.

    Raises:
        UnreadableError: it is a slice of a board, or no board of NVML's is known to be this one.
    """
    import torch

    try:
        known = torch.cuda.get_device_properties(torch.device(device))
    except Exception as error:
        raise UnreadableError(f"CUDA does not tell which board {device} is: {error}") from None
    # A board that does not answer costs its own figures only: it is not the run's, or it will be missed below.
    found = [(i, _try(nvml, "nvmlDeviceGetHandleByIndex", i)) for i in range(nvml.nvmlDeviceGetCount())]
    handles = [(index, handle) for index, handle in found if handle is not None]
    uuid = _bare(getattr(known, "uuid", None))
    if uuid:
        for index, handle in handles:
            if _bare(_try(nvml, "nvmlDeviceGetUUID", handle)) == uuid:
                return index
        for _, handle in handles:
            if uuid in map(_bare, _slices(nvml, handle)):
                raise UnreadableError(_MIG)
    address = tuple(getattr(known, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    if None not in address:
        for index, handle in handles:
            pci = _try(nvml, "nvmlDeviceGetPciInfo", handle)
            if pci is not None and (pci.domain, pci.bus, pci.device) == address:
                return index
    if not uuid and None in address:  # an old torch: the order of CUDA_VISIBLE_DEVICES is all there is
        return _visible_board(cuda_number(device), visible_boards(nvml))
    if len(found) == len(handles) == 1:
        ((index, handle),) = handles
        if all(_try(nvml, ask, handle) is None for ask in ("nvmlDeviceGetUUID", "nvmlDeviceGetPciInfo")):
            return index  # in some virtual machines a board tells neither; where there is one, it is the one
    raise UnreadableError(f"none of NVML's {len(found)} boards has the UUID or the PCI address of {device}")


def cuda_number(device: str) -> int:
    """The number in ``cuda:1``; of ``cuda``, the current device's."""
    _, colon, number = device.partition(":")
    if colon:
        return int(number)
    import torch

    return torch.cuda.current_device()


def visible_boards(nvml: Any) -> list[int | None]:
    """NVML's index of each device that CUDA shows, in CUDA's order; ``None`` for a MIG slice.

    Like CUDA, stop at the first entry of ``CUDA_VISIBLE_DEVICES`` that names no board.
    """
    count = nvml.nvmlDeviceGetCount()
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return list(range(count))
    uuids = [_uuid(nvml, index) for index in range(count)]
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


def _uuid(nvml: Any, index: int) -> str:
    handle = _try(nvml, "nvmlDeviceGetHandleByIndex", index)
    return "" if handle is None else _try(nvml, "nvmlDeviceGetUUID", handle) or ""


def used_indices(device: str | None) -> list[int] | None:
    """NVML's indices of the boards that are measured for ``device``; ``None`` where there is no NVML, nor a device known.

    For a CUDA device its own, where it is a whole board; for another one none; for ``None`` all whole boards that CUDA shows.

    Raises:
        UnreadableError: which boards these are cannot be known; then none may be measured, since others' would be, too.
    """
    if device is not None and not device.startswith("cuda"):
        return []
    try:
        pynvml = _started()
    except UnreadableError as error:
        if device is None:
            return None
        raise UnreadableError(f"which board {device} is is not known: {error}") from None
    try:
        if device is not None:
            return [board_of(pynvml, device)]
        return [index for index in visible_boards(pynvml) if index is not None]
    except UnreadableError:
        raise
    except Exception as error:
        which = "which boards CUDA shows" if device is None else f"which board {device} is"
        raise UnreadableError(f"NVML failed after it had started, so {which} is not known: {_said(error)}") from None
    finally:
        with suppress(Exception):
            pynvml.nvmlShutdown()


_MIG = "a MIG slice has no energy counter of its own"


def _not_used(device: str) -> str:
    return f"the run computes on {device}: what the NVIDIA boards draw meanwhile is not its own"


def _bare(uuid: Any) -> str:
    """A UUID without the word before it, for comparing CUDA's with NVML's."""
    text = uuid.decode() if isinstance(uuid, bytes) else str(uuid or "")
    return text.lower().removeprefix("gpu-").removeprefix("mig-")


def _slices(nvml: Any, handle: Any) -> list[str]:
    """UUIDs of a board's MIG slices."""
    found = []
    for number in range(_try(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
        part = _try(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, number)
        uuid = None if part is None else _try(nvml, "nvmlDeviceGetUUID", part)
        found += [] if uuid is None else [uuid]
    return found


def _visible_board(number: int, visible: Sequence[int | None]) -> int:
    if number >= len(visible):
        raise UnreadableError(f"device {number} was asked for, but only {len(visible)} NVIDIA GPU(s) are visible")
    index = visible[number]
    if index is None:
        raise UnreadableError(_MIG)
    return index


def _named_board(nvml: Any, uuid: str) -> int:
    """NVML's index of the board with a UUID, or with one that begins so."""
    known = [_bare(_uuid(nvml, index)) for index in range(nvml.nvmlDeviceGetCount())]
    found = [index for index, name in enumerate(known) if name.startswith(_bare(uuid))]
    if len(found) != 1:
        told = ", ".join(name for name in known if name) or "none tells its UUID"
        raise UnreadableError(f"{len(found)} of NVML's {len(known)} boards have a UUID that begins {uuid}: {told}")
    return found[0]


class _Boards:
    """Makes the counters of boards.

    Args:
        nvml: started.
        poll_s: seconds between two samples of a power.
        device: what the run computes on; ``None`` where there is no run.
    """

    def __init__(self, nvml: Any, poll_s: float, device: str | None) -> None:
        self._nvml = nvml
        self._poll_s = poll_s
        self._device = device

    def watched(self, wanted: Sequence[tuple[str, Callable[[], int]]]) -> tuple[list[Counter], list[Reading]]:
        """Counters of the boards that can be read, and readings with the reason for the others.

        Args:
            wanted: name of each board, and what finds NVML's index of it.
        """
        counters: dict[int, Counter] = {}
        unreadable: list[Reading] = []
        own = self._own() if self._device is not None else None
        for name, find in wanted:
            try:
                index = find()
                if index in counters:
                    raise UnreadableError(f"it is the same board as {counters[index].source}")
                counters[index] = self._counter(name, index, own)
            except Exception as error:  # whatever it is, the other boards are read all the same
                reason = str(error) if isinstance(error, UnreadableError) else f"NVML failed: {_said(error)}"
                unreadable.append(Reading(f"nvml:{name}", "measured", None, reason))
        return list(counters.values()), unreadable

    def _own(self) -> int:
        """NVML's index of the run's own board; -1 where it has none."""
        if self._device is None or not self._device.startswith("cuda"):
            return -1
        try:
            return board_of(self._nvml, self._device)
        except Exception:  # then by the order in which CUDA shows them
            with suppress(Exception):
                return _visible_board(cuda_number(self._device), visible_boards(self._nvml))
            return -1

    def _counter(self, name: str, index: int, own: int | None) -> Counter:
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except Exception as error:
            raise UnreadableError(f"NVML does not open board {index}: {_said(error)}") from None
        model = _try(nvml, "nvmlDeviceGetName", handle) or "board without a name"
        mig = _try(nvml, "nvmlDeviceGetMigMode", handle)
        if mig is not None and mig[0] == nvml.NVML_DEVICE_MIG_ENABLE:
            raise UnreadableError(f"MIG is on: the counter of the {model} covers all its slices")
        power_limit_mw = _try(nvml, "nvmlDeviceGetEnforcedPowerLimit", handle)
        detail: Detail = {
            "name": model,
            "uuid": _try(nvml, "nvmlDeviceGetUUID", handle),
            "nvml_index": index,
            "driver": _try(nvml, "nvmlSystemGetDriverVersion"),
            "power_limit_w": None if power_limit_mw is None else power_limit_mw / 1e3,
        }
        neighbours = _Neighbours(nvml, handle, own == index)
        common: dict[str, Any] = {
            "detail": detail,
            "observe": partial(_observe, nvml, handle, neighbours),
            "remarks": neighbours.remarks,
            "max_w": _ABOVE_LIMIT * power_limit_mw / 1e3 if power_limit_mw else _MAX_W,
            "flags": ()
            if own is None or own == index
            else ("not the device of the run: this board was asked for by its number or UUID",),
        }
        source = f"nvml:{name} {model}"
        read = partial(_joules, nvml, handle)
        try:
            still = _stands_still(read)
            why = f"its energy counter does not move ({_STILL_S:g} s)" if still else ""
        except UnreadableError as error:
            still, why = True, str(error)
        if not still:
            return Counter(source, read, **common)
        try:
            sampled = {"kind": "nvml", "index": index}
            counter = PowerCounter.of(source, sampled, every_s=self._poll_s, lag_s=_POWER_LAG_S, **common)
        except UnreadableError as error:
            raise UnreadableError(f"{why}; nor can its power be integrated: {error}") from None
        detail["instead_of"] = why
        return counter


def _stands_still(read: Callable[[], float]) -> bool:
    """Whether a counter that can be read does not count."""
    first_j = read()
    for _ in range(round(_STILL_S / _LOOK_S)):
        time.sleep(_LOOK_S)
        if read() != first_j:
            return False
    return _STILL_S > 0


def _joules(nvml: Any, handle: Any) -> float:
    try:
        millijoules = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:
        raise UnreadableError(f"NVML gives no energy counter: {_said(error)}{_why(nvml, error)}") from None
    # A board that has drawn nothing since its driver was loaded does not exist: some virtual machines show a 0.
    if not isinstance(millijoules, int | float) or not 0 < millijoules < _NOT_AVAILABLE_MJ:
        raise UnreadableError(f"NVML gives no energy counter: it answers {millijoules!r}")
    return millijoules / 1e3


class _Neighbours:
    """Who else computes on a board, as far as NVML tells: all that were seen while it was watched.

    In a container NVML tells the numbers that processes have outside, if it lists them at all; then this one is not
    found by its own, and one of those listed is taken for it.

    Args:
        nvml: started.
        handle: the board's.
        own: whether this process computes on it.
    """

    def __init__(self, nvml: Any, handle: Any, own: bool) -> None:
        self._nvml = nvml
        self._handle = handle
        self._own = own
        self._seen: dict[int, str] = {}
        self.others: int | None = None

    def look(self) -> Detail:
        """What to note of them."""
        listed = _try(self._nvml, "nvmlDeviceGetComputeRunningProcesses", self._handle)
        if listed is not None:
            pids = {process.pid for process in listed}
            others = {process.pid: self._told(process) for process in listed if process.pid != os.getpid()}
            self._seen |= others
            if self._own and os.getpid() not in pids:
                # Not even this process is listed, or under another number.
                if pids:
                    self.others = max(self.others or 0, len(pids) - 1)
            else:
                self.others = len(self._seen)
        return {
            "other_compute_processes": self.others,
            "compute_processes_seen": "; ".join(self._seen.values()) or None,
        }

    def remarks(self) -> tuple[str, ...]:
        """A flag where there were any."""
        if not self.others:
            return ()
        several = "1 other process" if self.others == 1 else f"{self.others} other processes"
        return (f"{several} computed on this board: what it drew for them is in the figure",)

    def _told(self, process: Any) -> str:
        name = _try(self._nvml, "nvmlSystemGetProcessName", process.pid)
        memory = getattr(process, "usedGpuMemory", None)
        used = f", {memory / 2**20:.0f} MiB" if isinstance(memory, int) else ""
        return f"{os.path.basename(str(name)) if name else 'a process'} ({process.pid}{used})"


def _observe(nvml: Any, handle: Any, neighbours: _Neighbours) -> Detail:
    """Temperature, clock, and other processes."""
    return {
        "temperature_c": _try(nvml, "nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
        "sm_clock_mhz": _try(nvml, "nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
        **neighbours.look(),
    }


def _try(nvml: Any, call: str, *args: Any) -> Any:
    """What NVML answers, or ``None`` where it does not: a driver without the call, a binding that stumbles over its answer."""
    try:
        return getattr(nvml, call)(*args)
    except Exception:
        return None


# What an error of the counter means, by the end of its code's name; a text for the people who must do something.
_CAUSES = {
    "NOT_SUPPORTED": "a board before Volta, or a virtual machine or share of a board that is not shown it",
    "NO_PERMISSION": "this user or container may not read it",
    "FUNCTION_NOT_FOUND": "the driver is older than the call",
    "GPU_IS_LOST": "the board has fallen off the bus: the machine must be started again",
    "RESET_REQUIRED": "the board must be reset",
}


def _why(nvml: Any, error: Exception) -> str:
    """A cause in brackets, where the code of the error tells one."""
    value = getattr(error, "value", None)
    found = [
        text for name, text in _CAUSES.items() if value is not None and value == getattr(nvml, f"NVML_ERROR_{name}", 0)
    ]
    return f" ({found[0]})" if found else ""


def _said(error: Exception) -> str:
    """The error's own words, with its kind where it is none of NVML's."""
    text = " ".join(str(error).split())
    return text if "NVMLError" in type(error).__name__ and text else f"{type(error).__name__}: {text}"
