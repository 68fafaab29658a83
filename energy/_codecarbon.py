"""CodeCarbon, offline: modelled joules of processor, GPU and memory, and the CO2 of the grid.

Software: https://github.com/mlco2/codecarbon. Where no counter can be read, its processor figure is a load times a
table's power and its memory figure a constant by size, up to 40 % off a wall meter (arXiv 2509.22092).
"""

from __future__ import annotations

import io
import logging
import math
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args

from locallearn.energy._meter import Detail, Meter, Reading, Ticker, UnreadableError, monotonic_s
from locallearn.energy._nvml import used_indices

TrackingMode = Literal["machine", "process"]

_JOULES_PER_KWH = 3.6e6
# CodeCarbon samples the load once a second, whatever it is told.
_TICK_S = 1.0
# A task's mean power above this is a counter that was reset, or a clock that was set, not a machine.
_MAX_W = 4000.0
# Two clocks that nobody touches agree to microseconds over a task.
_CLOCKS_APART_S = 0.1
_TIMES = "\N{MULTIPLICATION SIGN}"
_CONSTANT = f"constant power {_TIMES} time"
_LOAD = "cpu_load"
# Every setting that could change a figure or reach a file or the network is given, so that no configuration file or
# environment variable of the user's sets it. An empty token stands for "none" without a look into the configuration.
_FIXED_SETTINGS: dict[str, Any] = {
    "allow_multiple_runs": True,
    "api_call_interval": -1,
    "cloud_provider": None,
    "cloud_region": None,
    "country_2letter_iso_code": None,
    "electricitymaps_api_token": "",
    "emissions_endpoint": None,
    "force_carbon_intensity_g_co2e_kwh": None,
    "force_cpu_power": None,
    "force_mode_cpu_load": False,
    "force_ram_power": None,
    "log_level": "critical",
    "logger_preamble": "",
    "metadata": None,
    "output_handlers": [],
    "output_methods": [],
    "pue": 1.0,
    "rapl_include_dram": False,
    "rapl_prefer_psys": False,
    "region": None,
    "wue": 0.0,
}


class CodeCarbonMeter(Meter):
    """CodeCarbon's estimate, one source each for processor, memory and, where one is tracked, GPU.

    One tracker lives from ``open`` to ``close``. Each resumed stretch is a *task* of it, and only the tasks' figures
    are added up: the tracker's own total also bills the pause before it stops. Nothing is written or sent.

    Args:
        country_iso_code: three capital letters; its electricity mix gives the CO2.
        tracking_mode: ``"machine"`` counts every process, ``"process"`` this one and its children; a GPU is always
            counted whole.
        measure_power_secs: a running stretch is read out this often, so that the processor's counters, where
            CodeCarbon can read them, do not wrap twice unseen.

    Raises:
        ValueError: a country that CodeCarbon does not know, another mode, or an interval that is not positive.
    """

    tick_s = _TICK_S

    def __init__(
        self,
        country_iso_code: str = "USA",
        tracking_mode: TrackingMode = "machine",
        measure_power_secs: float = 15.0,
    ) -> None:
        if tracking_mode not in get_args(TrackingMode):
            raise ValueError(f"tracking_mode={tracking_mode!r} was given; wanted is 'machine' or 'process'")
        if not 0 < measure_power_secs < float("inf"):
            raise ValueError(f"measure_power_secs={measure_power_secs} was given; wanted are seconds above 0")
        _check_country(country_iso_code)
        self._country = country_iso_code
        self._mode = tracking_mode
        self._period_s = measure_power_secs
        self._lock = threading.Lock()
        self._tracker: Any = None
        self._ticker: Ticker | None = None
        self._counting = False
        self._reason: str | None = "CodeCarbon was not started"
        self._co2_g: float | None = None
        self._joules: dict[str, float] = {}
        self._details: dict[str, Detail] = {}
        self._doubts: dict[str, str] = {}
        self._device: str | None = None
        self._began_s = (0.0, 0.0)

    @property
    def co2_g(self) -> float | None:  # type: ignore[override]  # up to date, as the joules are
        """See :attr:`Meter.co2_g`."""
        self._split()
        return self._co2_g

    def use(self, device: str) -> None:
        """See :meth:`Meter.use`."""
        self._device = str(device)

    def open(self) -> None:
        """Start the tracker; the first in a process takes some seconds to look at the hardware."""
        if self._tracker is not None:
            return
        self._joules, self._details, self._doubts, self._co2_g, self._reason = {}, {}, {}, None, None
        gpus: list[int] | None = []  # none rather than all: others' boards are not the run's
        unknown = ""
        try:
            gpus = used_indices(self._device)
        except UnreadableError as error:
            unknown = str(error)
        with _quiet() as errors:
            try:
                self._tracker = _new_tracker(self._country, self._mode, self._period_s, gpus)
                # A first task of no length shows whether the tracker works, and leaves its slow start behind.
                self._tracker.start_task()
                data = self._tracker.stop_task()
            except Exception as error:
                self._reason = f"CodeCarbon did not start: {errors[-1] if errors else _named(error)}"
                return
        if data is None:
            self._reason = f"CodeCarbon did not start: {errors[-1] if errors else 'it gives no data'}"
            return
        self._co2_g = 0.0
        self._details = _details(self._tracker, data, gpus)
        if gpus == [] and data.gpu_count and (unknown or self._device is not None):
            self._details["gpu"] = dict(self._details["ram"])
            self._doubts["gpu"] = unknown or f"the run computes on {self._device}: no whole board is its own"
        self._joules = {part: 0.0 for part in self._details if part not in self._doubts}
        self._ticker = Ticker(self._period_s, self._split)

    def resume(self) -> None:
        """See :meth:`Meter.resume`."""
        with self._lock:
            if self._counting or self._reason is not None or self._tracker is None:
                return
            self._start()

    def pause(self) -> None:
        """See :meth:`Meter.pause`."""
        with self._lock:
            if self._counting:
                self._stop()

    def close(self) -> None:
        """See :meth:`Meter.close`."""
        if self._tracker is None:
            return
        self.pause()
        if self._ticker is not None:
            self._ticker.stop()
            self._ticker = None
        with _quiet():
            # A tracker that never came up raises here; why is already in the readings.
            try:
                self._tracker.stop()
            except Exception as error:
                self._reason = self._reason or f"CodeCarbon did not stop: {_named(error)}"
        self._tracker = None

    def readings(self) -> list[Reading]:
        """See :meth:`Meter.readings`."""
        self._split()
        if not self._details:
            return [Reading("codecarbon", "modelled", None, self._reason)]
        return [
            Reading(
                f"codecarbon:{part}",
                "modelled",
                None if (reason := self._reason or self._doubts.get(part)) else self._joules[part],
                reason,
                dict(detail),
                flags=(_CONSTANT_FLAG,) if _by(part, detail).startswith(_CONSTANT) else (),
                by=_by(part, detail),
            )
            for part, detail in self._details.items()
        ]

    def _split(self) -> None:
        """End the running task and begin the next one, so that the sums are up to date."""
        with self._lock:
            if self._counting:
                self._stop()
                self._start()

    def _start(self) -> None:
        if self._reason is not None:
            return
        try:
            self._tracker.start_task()
            self._began_s = monotonic_s(), time.time()
            self._counting = True
        except Exception as error:
            self._fail(error)

    def _stop(self) -> None:
        self._counting = False
        try:
            data = self._tracker.stop_task()
            seconds, wall_s = (
                now - began for now, began in zip((monotonic_s(), time.time()), self._began_s, strict=True)
            )
            for part in self._joules:
                self._add(part, getattr(data, f"{part}_energy") * _JOULES_PER_KWH, seconds, wall_s)
            grams = data.emissions * 1e3
            lost = not self._joules.keys().isdisjoint(self._doubts) or not 0 <= grams < math.inf
            self._co2_g = None if lost or self._co2_g is None else self._co2_g + grams
        except Exception as error:
            self._fail(error)

    def _add(self, part: str, joules: float, seconds: float, wall_s: float) -> None:
        """Count the joules of a task, or note why they are none."""
        if part in self._doubts:
            return
        if not 0 <= joules <= (seconds + 1) * _MAX_W:
            self._doubts[part] = f"CodeCarbon answered {joules:g} J for {seconds:.1f} s"
        elif part == "cpu" and self._loads_by_wall_clock() and abs(wall_s - seconds) > _CLOCKS_APART_S:
            self._doubts[part] = (
                f"the system's clock was set by {wall_s - seconds:+.1f} s during the window (or the machine slept), and "
                "CodeCarbon takes a process's load by that clock"
            )
        else:
            self._joules[part] += joules

    def _loads_by_wall_clock(self) -> bool:
        return self._mode == "process" and self._details["cpu"]["power_model"] == _LOAD

    def _fail(self, error: Exception) -> None:
        self._reason = f"CodeCarbon failed during the window: {_named(error)}"
        self._co2_g = None


def _check_country(code: str) -> None:
    try:
        with _quiet():
            from codecarbon.input import DataSource

            known = DataSource().get_global_energy_mix_data()
    except Exception:  # an installation that does not work; open() says how
        return
    if code not in known:
        raise ValueError(
            f"country_iso_code={code!r} is not among CodeCarbon's {len(known)} countries; "
            "give three capital letters (ISO 3166), e.g. 'USA' or 'DEU'"
        )


def _new_tracker(country: str, mode: TrackingMode, period_s: float, gpus: list[int] | None) -> Any:
    from codecarbon import OfflineEmissionsTracker

    return OfflineEmissionsTracker(
        country_iso_code=country,
        tracking_mode=mode,
        measure_power_secs=period_s,
        gpu_ids=gpus,
        output_dir=tempfile.gettempdir(),
        **_FIXED_SETTINGS,
    )


_CONSTANT_FLAG = "a constant power times the seconds: it says nothing of what ran"


def _details(tracker: Any, data: Any, gpus: list[int] | None) -> dict[str, Detail]:
    """What is known of each source; the keys are the sources there are."""
    common: Detail = {
        "version": data.codecarbon_version,
        "country": data.country_iso_code,
        "tracking_mode": data.tracking_mode,
        "ignored_settings": _ignored_settings(),
    }
    details: dict[str, Detail] = {"cpu": {**common, "cpu_model": data.cpu_model, **_cpu_model(tracker)}}
    # CodeCarbon counts the boards of the machine even where none is tracked.
    if data.gpu_count and gpus != []:
        details["gpu"] = {**common, "gpu_model": data.gpu_model, "scope": "whole boards"}
    details["ram"] = {**common, "ram_total_gb": data.ram_total_size}
    return details


def _cpu_model(tracker: Any) -> Detail:
    """How CodeCarbon gets at the processor's power, which it tells nowhere in public."""
    for part in tracker._hardware:
        if type(part).__name__ == "CPU":
            return {
                "power_model": getattr(part, "_mode", None),
                "tdp_w": getattr(part, "_tdp", None),
                "tdp_is_generic": getattr(part, "_is_generic_tdp", None),
            }
    return {"power_model": None}


def _by(part: str, detail: Detail) -> str:
    """What the figure of a source is made by."""
    if part == "ram":
        return f"{_CONSTANT} (by size)"
    if part == "gpu":
        return "the boards' counter or power"
    model, watts = detail["power_model"], detail.get("tdp_w")
    words = {
        _LOAD: f"load {_TIMES} {watts} W",
        "constant": f"{_CONSTANT} (half of {watts} W)",
        "intel_rapl": "RAPL counters",
    }
    return words.get(str(model), str(model or "CodeCarbon's own model"))


def _ignored_settings() -> str | None:
    """Where the user has CodeCarbon settings that this meter passes over."""
    found = [
        name for name, folder in (("~", Path.home()), (".", Path.cwd())) if (folder / ".codecarbon.config").exists()
    ]
    names = [f"{name}/.codecarbon.config" for name in found]
    names += sorted(key for key in os.environ if key.lower().startswith("codecarbon_"))
    return ", ".join(names) or None


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


class _ErrorList(logging.Handler):
    """Keeps the exceptions that CodeCarbon logs instead of raising."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.errors.append(_named(record.exc_info[1]))


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep CodeCarbon's log and its dependencies' warnings off the screen; give the exceptions it swallowed."""
    # Importing the package sets up its logger, so that comes first.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Where amdsmi is installed and no driver of AMD's is, both complain as they are imported.
        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with redirect_stdout(io.StringIO()):
                import codecarbon.external.logger
        finally:
            logging.disable(disabled)

        logger = codecarbon.external.logger.logger
        kept = list(logger.handlers)
        errors = _ErrorList()
        logger.handlers = [errors]
        logger.setLevel(logging.WARNING)
        try:
            yield errors.errors
        finally:
            logger.handlers = kept
            logger.setLevel(logging.CRITICAL)
