"""RAPL: the energy counters of Intel and AMD processors, through Linux powercap files.

Files and units: https://docs.kernel.org/power/powercap/powercap.html
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path

from locallearn.energy._meter import Counter, CounterMeter, Detail, Reading, UnreadableError

_TICK_S = 0.1
# The smallest range seen is 65 kJ, a minute at the power that is thought possible below.
_POLL_S = 10.0
# A running average may stand above the limit that firmware states for a while, hence twice that. Where it states none,
# or one so high that it means none, more than any processor draws.
_ABOVE_LIMIT = 2.0
_MAX_W = 1000.0
# Others' part of the processors' time that is flagged.
_OTHERS = 0.1
_OTHERS_S = 1.0


class RaplMeter(CounterMeter):
    """Joules of every processor package and, where there is one, of the memory (DRAM) beside it.

    A package includes its cores, so those sub-domains are not reported; DRAM is not part of the package and is a
    source of its own. The counters are the machine's: every process is in them. They are read every ten seconds in a
    daemon thread, so that a long window sees every wrap-around. A gain that is more than twice the domain's highest
    power limit (1000 W where none is stated) could give in the time, and a time in which the counter may have wrapped
    more than once, leave no figure.

    How much of the processors' time went to other processes is noted: what they draw is in the figure.

    Args:
        root: the powercap folder.
        stat: where the system counts the processors' time.
    """

    def __init__(self, root: Path = Path("/sys/class/powercap"), stat: Path = Path("/proc/stat")) -> None:
        super().__init__("measured", tick_s=_TICK_S, poll_s=_POLL_S)
        self._root = root
        self._stat = stat

    def _connect(self) -> tuple[list[Counter], list[Reading]]:
        counters: list[Counter] = []
        unreadable: list[Reading] = []
        try:
            domains = _domains(self._root)
        except UnreadableError as error:
            return [], [Reading("rapl", "measured", None, str(error))]
        others = _Others(self._stat)
        for source, folder in domains.items():
            try:
                _microjoules(folder / "energy_uj")
                wraps_at_j = _microjoules(folder / "max_energy_range_uj") / 1e6
            except UnreadableError as error:
                unreadable.append(Reading(source, "measured", None, str(error)))
                continue
            counters.append(
                Counter(
                    source,
                    partial(_joules, folder),
                    wraps_at_j or None,
                    {"domain": folder.name},
                    others.look,
                    max_w=_max_w(folder),
                    remarks=others.remarks,
                    forget=others.forget,
                )
            )
        return counters, unreadable

    def _disconnect(self) -> None:
        """Nothing is held."""


class _Others:
    """How the processors' time was shared, from the making of this on, or since it was told to forget.

    Of this process's children those count as its own that have ended and were waited for.
    """

    def __init__(self, stat: Path) -> None:
        self._stat = stat
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._began = self._times_s()
        self._machine_s = self._own_s = 0.0

    def look(self) -> Detail:
        """What to note."""
        now = self._times_s()
        if now is None or self._began is None:
            return {}
        self._machine_s, self._own_s = (later - earlier for later, earlier in zip(now, self._began, strict=True))
        return {"cpu_s_of_machine": self._machine_s, "cpu_s_of_run": self._own_s}

    def remarks(self) -> tuple[str, ...]:
        """A flag where others took much of it."""
        others_s = self._machine_s - self._own_s
        if others_s < _OTHERS_S or others_s < _OTHERS * self._machine_s:
            return ()
        share = others_s / self._machine_s
        return (f"other processes took {share:.0%} of the processors' time: what these drew for them is in the figure",)

    def _times_s(self) -> tuple[float, float] | None:
        """Seconds that all processors were busy, and that this process was computing."""
        try:
            ticks = [int(text) for text in _text(self._stat).splitlines()[0].split()[1:9]]
        except (UnreadableError, ValueError, IndexError):
            return None
        own = os.times()
        busy = sum(ticks) - sum(ticks[3:5])  # idle, and waiting for a disk
        return busy / os.sysconf("SC_CLK_TCK"), own.user + own.system + own.children_user + own.children_system


def _joules(folder: Path) -> float:
    return _microjoules(folder / "energy_uj") / 1e6


def _max_w(folder: Path) -> float:
    """Watts that a domain cannot draw: from its long-term, short-term and peak limits."""
    limits_w = [0.0]
    for path in sorted(folder.glob("constraint_*_*_uw")):
        if path.name.endswith(("_max_power_uw", "_power_limit_uw")):
            # Some constraints have files that answer with an error, or with 0 for "none".
            with suppress(UnreadableError):
                limits_w.append(_microjoules(path) / 1e6)
    return min(_ABOVE_LIMIT * max(limits_w), _MAX_W) or _MAX_W


def _domains(root: Path) -> dict[str, Path]:
    """Folders of the package and DRAM domains by source name."""
    names: dict[Path, str] = {}
    for folder in sorted(root.glob("intel-rapl:*")):
        name = _text(folder / "name")
        if name.startswith("package") or name == "dram":
            names[folder] = name
    if not names:
        raise UnreadableError(f"no RAPL domains under {root} (virtual machines and many containers have none)")
    several = list(names.values()).count("dram") > 1
    sources = {}
    for folder, name in names.items():
        # Every socket calls its memory "dram": the number of the package before it tells them apart.
        package = folder.name.split(":")[1]
        sources[f"rapl:{name}-{package}" if name == "dram" and several else f"rapl:{name}"] = folder
    return sources


def _microjoules(path: Path) -> int:
    text = _text(path)
    try:
        return int(text)
    except ValueError:
        raise UnreadableError(f"{path} holds {text!r} instead of microjoules") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except PermissionError:
        raise UnreadableError(f"{path} is not readable: needs root") from None
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}") from None
