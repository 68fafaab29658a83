"""zeus: AMD boards, and the chips of Apple and of NVIDIA's Jetson boards.

Software: https://github.com/ml-energy/zeus. It is an extra, and imported when a meter is opened.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from locallearn.energy._meter import Counter, CounterMeter, Quality, Reading, UnreadableError
from locallearn.energy._nvml import cuda_number
from locallearn.energy._poll import jetson_rails
from locallearn.energy._power import POLL_S, PowerCounter

_TICK_S = 0.1
_MAX_W = 4000.0
_APPLE = {"cpu": "cpu_total_mj", "gpu": "gpu_mj", "gpu_sram": "gpu_sram_mj", "dram": "dram_mj", "ane": "ane_mj"}
_APPLE_BY = "Apple's own energy model, which its makers call an estimate"
_MISSING = "the package zeus is not installed: pip install 'locallearn[zeus]'"


class ZeusMeter(CounterMeter):
    """Joules of AMD boards by their counter (else by integrating their power), and of Apple's and Jetson's chips.

    Boards are taken as torch numbers them (``cuda:0`` is 0, with ROCm, too). Once it has been told what a run computes
    on (:meth:`use`), it measures that board alone. The parts of a chip are the whole machine's; its GPU is left out
    where a run computes on the CPU. Apple's figures are ``modelled``. Jetson's rails are sampled by processes of their
    own; ``total`` holds the others.

    Args:
        devices: numbers of AMD boards, whatever a run computes on; ``None``: the run's own, or every visible one.
        poll_s: seconds between two samples of a power.

    Raises:
        ValueError: ``devices`` is empty, or holds a negative or repeated number; ``poll_s`` is not positive.
    """

    def __init__(self, devices: Sequence[int] | None = None, poll_s: float = POLL_S) -> None:
        super().__init__("measured", tick_s=_TICK_S)
        if devices is not None and (not devices or min(devices) < 0 or len(set(devices)) < len(devices)):
            raise ValueError(f"devices={list(devices)} was given; wanted are distinct numbers from 0, or None for all")
        if not 0 < poll_s < float("inf"):
            raise ValueError(f"poll_s={poll_s} was given; wanted are seconds above 0")
        self._devices = None if devices is None else list(devices)
        self._poll = poll_s
        self._device: str | None = None

    def use(self, device: str) -> None:
        """See :meth:`Meter.use`."""
        self._device = str(device)

    def _connect(self) -> tuple[list[Counter], list[Reading]]:
        try:
            import zeus.device  # noqa: F401
        except ImportError:
            return [], [Reading("zeus", self.quality, None, _MISSING)]
        except Exception as error:  # an installation that does not work
            return [], [Reading("zeus", self.quality, None, f"zeus cannot be imported: {_said(error)}")]
        counters: list[Counter] = []
        unreadable: list[Reading] = []
        for find in (self._amd, self._apple, self._jetson):
            try:
                found, lost = find()
            except Exception as error:
                name = find.__name__.lstrip("_")
                found, lost = [], [Reading(name, self.quality, None, f"zeus gives no figure: {_said(error)}")]
            counters += found
            unreadable += lost
        if not counters and not unreadable:
            reason = "zeus finds no AMD board, no chip of Apple's and no Jetson board here"
            unreadable = [Reading("zeus", self.quality, None, reason)]
        return counters, unreadable

    def _disconnect(self) -> None:
        """Nothing is held: zeus keeps what it has opened until the process ends."""

    def _amd(self) -> tuple[list[Counter], list[Reading]]:
        from zeus.device.gpu.amd import AMDGPUs, amdsmi_is_available

        if not amdsmi_is_available():
            if self._devices is None:
                return [], []
            why = "zeus finds no AMD board: ROCm's amdsmi does not start"
            return [], [Reading(f"amd:{number}", self.quality, None, why) for number in self._devices]
        if self._devices is None and self._device is not None and not _is_amd(self._device):
            why = f"the run computes on {self._device}: what the AMD boards draw meanwhile is not its own"
            return [], [Reading("amd", self.quality, None, why)]
        boards = AMDGPUs()
        own = cuda_number(self._device) if self._device is not None and _is_amd(self._device) else None
        numbers = self._devices or (range(len(boards)) if own is None else [own])
        counters: list[Counter] = []
        unreadable: list[Reading] = []
        for number in numbers:
            try:
                if number >= len(boards):
                    raise UnreadableError(
                        f"board {number} was asked for, but only {len(boards)} AMD board(s) are visible"
                    )
                counters.append(self._amd_counter(boards, number, own))
            except Exception as error:
                reason = str(error) if isinstance(error, UnreadableError) else f"zeus gives no figure: {_said(error)}"
                unreadable.append(Reading(f"amd:{number}", self.quality, None, reason))
        return counters, unreadable

    def _amd_counter(self, boards: Any, number: int, own: int | None) -> Counter:
        name = _try(partial(boards.get_name, number)) or "board without a name"
        limit_mw = _try(partial(boards.get_power_management_limit, number))
        common: dict[str, Any] = {
            "detail": {"name": name, "power_limit_w": limit_mw / 1e3 if limit_mw else None},
            "observe": lambda: {"temperature_c": _try(partial(boards.get_gpu_temperature, number))},
            "max_w": 2 * limit_mw / 1e3 if limit_mw else _MAX_W,
            "flags": ()
            if self._device is None or own == number
            else ("not the device of the run: this board was asked for by its number",),
        }
        source = f"amd:{number} {name}"
        if boards.supports_get_total_energy_consumption(number):
            return Counter(source, lambda: boards.get_total_energy_consumption(number) / 1e3, **common)
        for call in ("get_average_power_usage", "get_instant_power_usage"):
            if _try(partial(getattr(boards, call), number)) is not None:
                sampled = {"kind": "amd", "number": number, "call": call}
                common["detail"]["instead_of"] = "its energy counter does not agree with its power"
                return PowerCounter.of(source, sampled, every_s=self._poll, **common)
        raise UnreadableError("it tells neither its energy nor its power")

    def _apple(self) -> tuple[list[Counter], list[Reading]]:
        if platform.system() != "Darwin":
            return [], []
        from zeus.device.soc.apple import AppleSilicon, apple_silicon_is_available

        if not apple_silicon_is_available():
            why = "zeus cannot read this Mac: pip install 'locallearn[zeus]' on one with a chip of Apple's"
            return [], [Reading("apple", "modelled", None, why)]
        chip = AppleSilicon()
        known = chip.get_available_metrics()

        def read(metric: str) -> float:
            return float(getattr(chip.get_total_energy_consumption(), metric)) / 1e3

        readers = {part: partial(read, metric) for part, metric in _APPLE.items() if metric in known}
        return self._parts("apple", readers, quality="modelled", by=_APPLE_BY, max_w=_MAX_W)

    def _jetson(self) -> tuple[list[Counter], list[Reading]]:
        from zeus.device.soc.jetson import jetson_is_available

        if not jetson_is_available():
            return [], []
        counters: list[Counter] = []
        unreadable: list[Reading] = []
        for rail in jetson_rails():
            part = rail.removesuffix("_power_mw")
            if why := self._not_used(part):
                unreadable.append(Reading(f"jetson:{part}", self.quality, None, why))
                continue
            flags = ("the whole board: what its other sources count is in it",) if part == "total" else ()
            sampled = {"kind": "jetson", "rail": rail}
            try:
                counters.append(
                    PowerCounter.of(f"jetson:{part}", sampled, every_s=self._poll, max_w=_MAX_W, flags=flags)
                )
            except UnreadableError as error:  # the other rails are read all the same
                unreadable.append(Reading(f"jetson:{part}", self.quality, None, str(error)))
        return counters, unreadable

    def _parts(
        self, chip: str, readers: Mapping[str, Callable[[], float]], quality: Quality, **common: Any
    ) -> tuple[list[Counter], list[Reading]]:
        """A counter for each part of a chip that a run may use."""
        counters: list[Counter] = []
        unreadable: list[Reading] = []
        for part, read in readers.items():
            if why := self._not_used(part):
                unreadable.append(Reading(f"{chip}:{part}", quality, None, why))
            else:
                counters.append(Counter(f"{chip}:{part}", read, quality=quality, **common))
        return counters, unreadable

    def _not_used(self, part: str) -> str | None:
        if self._device == "cpu" and part in ("gpu", "gpu_sram", "ane"):
            return "the run computes on cpu: what this part draws meanwhile is not its own"
        return None


def _is_amd(device: str) -> bool:
    """Whether what torch calls ``device`` is a board of AMD's."""
    if not device.startswith("cuda"):
        return False
    import torch

    return torch.version.hip is not None


def _try(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception:
        return None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
