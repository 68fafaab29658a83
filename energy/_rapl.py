"""RAPL: the energy counters of Intel and AMD processors, through Linux powercap files.

Files and units: https://docs.kernel.org/power/powercap/powercap.html
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

from locallearn.energy._meter import Counter, CounterMeter, Reading, UnreadableError

_TICK_S = 0.1
# The smallest range seen is 65 kJ, a minute at the power that is thought possible below.
_POLL_S = 10.0
# A running average may stand above the limit that firmware states for a while, hence twice that. Where it states none,
# or one so high that it means none, more than any processor draws.
_ABOVE_LIMIT = 2.0
_MAX_W = 1000.0


class RaplMeter(CounterMeter):
    """Joules of every processor package and, where there is one, of the memory (DRAM) beside it.

    A package includes its cores, so those sub-domains are not reported; DRAM is not part of the package and is a
    source of its own. The counters are the machine's: every process is in them. They are read every ten seconds in a
    daemon thread, so that a long window sees every wrap-around. A gain that is more than twice the domain's highest
    power limit (1000 W where none is stated) could give in the time, and a time in which the counter may have wrapped
    more than once, leave no figure.

    Args:
        root: the powercap folder.
    """

    def __init__(self, root: Path = Path("/sys/class/powercap")) -> None:
        super().__init__("measured", tick_s=_TICK_S, poll_s=_POLL_S)
        self._root = root

    def _connect(self) -> tuple[list[Counter], list[Reading]]:
        counters: list[Counter] = []
        unreadable: list[Reading] = []
        try:
            domains = _domains(self._root)
        except UnreadableError as error:
            return [], [Reading("rapl", "measured", None, str(error))]
        for source, folder in domains.items():
            try:
                _microjoules(folder / "energy_uj")
                wraps_at_j = _microjoules(folder / "max_energy_range_uj") / 1e6
            except UnreadableError as error:
                unreadable.append(Reading(source, "measured", None, str(error)))
                continue
            counters.append(
                Counter(
                    source, partial(_joules, folder), wraps_at_j or None, {"domain": folder.name}, max_w=_max_w(folder)
                )
            )
        return counters, unreadable

    def _disconnect(self) -> None:
        """Nothing is held."""


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
