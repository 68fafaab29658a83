"""Which figures are shown, under what heading, in what unit and with how many digits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from locallearn.records import Quality
from locallearn.statistics import Figure, Row

UNKNOWN = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
LEGEND = (
    f"Mean ± standard deviation over seeds; {TIMES} is the ratio to {{baseline}}, paired by seed; {UNKNOWN} is unknown."
)

_SECONDS = ((1.0, "s"), (3600.0, "h"))
_BYTES = ((1.0, "B"), (2.0**10, "KiB"), (2.0**20, "MiB"), (2.0**30, "GiB"))
_PREFIXES = ((1e-3, "m"), (1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"), (1e15, "P"))
_COUNTS = ((1.0, ""), (1e3, "thousand"), (1e6, "million"), (1e9, "billion"))
_PERCENTAGES = ("accuracy", "auc")
_ABBREVIATIONS = {"auc": "AUC", "mse": "MSE"}


def _si(unit: str) -> tuple[tuple[float, str], ...]:
    return tuple((size, prefix + unit) for size, prefix in _PREFIXES)


# Heading and units of the figures with fixed names, in the order of the headline table.
_COSTS: dict[str, tuple[str, tuple[tuple[float, str], ...]]] = {
    "train_s": ("Training time", _SECONDS),
    "energy": ("Energy", _si("J")),
    "train_flops": ("Training FLOPs", _si("FLOP")[1:]),
    "update_flops": ("Update FLOPs", _si("FLOP")[1:]),
    "once_flops": ("FLOPs done once", _si("FLOP")[1:]),
    "inference_flops": ("Inference FLOPs", _si("FLOP")[1:]),
    "activation_peak_bytes": ("Peak activations", _BYTES),
    "allocated_peak_bytes": ("Peak allocated", _BYTES),
    "state_bytes": ("Weights and buffers", _BYTES),
    "gradient_bytes": ("Peak gradients", _BYTES),
    "optimizer_bytes": ("Optimizer state", _BYTES),
    "cache_bytes": ("Caches", _BYTES),
    "params": ("Parameters", _COUNTS),
    "extra_params": ("Added parameters", _COUNTS),
    "samples": ("Samples per unit", _COUNTS),
    "validation_s": ("Validation time", _SECONDS),
    "co2_g": ("CO₂, modelled", _si("g")),
}
_TARGETS: dict[str, tuple[str, tuple[tuple[float, str], ...]]] = {
    "target/seconds": ("Time to target", _SECONDS),
    "target/joules": ("Energy to target", _si("J")),
    "target/samples": ("Samples to target", _COUNTS),
}


@dataclass(frozen=True)
class Column:
    """One figure as it is shown.

    Attributes:
        key: the figure's name in :attr:`Row.figures`.
        title: heading, plain text.
        unit: unit of the shown numbers, empty for none.
        scale: shown number = value / scale.
        digits: decimals shown.
        lower: whether this is a metric of which less is better.
    """

    key: str
    title: str
    unit: str
    scale: float
    digits: int
    lower: bool = False

    @property
    def qualifier(self) -> str:
        """Unit and direction; empty for neither."""
        return ", ".join(filter(None, (self.unit, "lower is better" if self.lower else "")))

    @property
    def heading(self) -> str:
        """Title and qualifier in one line."""
        return f"{self.title} ({self.qualifier})" if self.qualifier else self.title

    def number(self, value: float | None) -> str:
        """``value`` in this column's unit; a dash for unknown."""
        return UNKNOWN if value is None else f"{value / self.scale:,.{self.digits}f}"

    def summary(self, figure: Figure) -> str:
        """Mean, with the standard deviation where there is one and it is not 0."""
        mean, std = figure.summary.mean, figure.summary.std
        return f"{self.number(mean)} ± {self.number(std)}" if std else self.number(mean)

    def ratio(self, ratio: float | None) -> str:
        """A ratio to the baseline; qualities differ by little, so they get a digit more than costs."""
        return ratio_text(ratio, 4 if self.key.startswith(("test/", "validation/")) else 3)

    def interval(self, figure: Figure) -> str:
        """The 95 % interval of the mean, or that there is only one value."""
        if figure.interval is None:
            return "n = 1"
        return f"[{self.number(figure.interval[0])}, {self.number(figure.interval[1])}]"


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns for which at least one row has a figure, in reading order."""
    keys = {key for row in rows for key in row.figures}
    judges = {row.metric.name for row in rows}
    metrics = [metric_column(key, rows) for part in ("test/", "validation/") for key in _ordered(keys, part, judges)]
    costs: list[Column] = []
    for name, (title, units) in _COSTS.items():
        if name == "energy":
            costs += [_energy(key, title, units, rows) for key in _ordered(keys, "energy_j/", set())]
            costs += [_energy(key, "Energy net of idle", units, rows) for key in _ordered(keys, "energy_net_j/", set())]
        elif name in keys:
            incomplete = name.endswith("_flops") and uncounted(rows)
            costs.append(_column(name, f"{title}, incomplete" if incomplete else title, units, rows))
    targets = [metric_column(key, rows) for name in sorted(judges) if (key := f"target/{name}") in keys]
    if targets:
        keys.add("target/seconds")  # even if nobody reached the target, which is then seen
    targets += [_column(key, title, units, rows) for key, (title, units) in _TARGETS.items() if key in keys]
    losses = [column for column in metrics if column.key.endswith("/loss") and "loss" not in judges]
    return [column for column in metrics if column not in losses] + costs + targets + losses


def uncounted(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Operators of whose work nothing is known, by the label of a row in which they ran: its FLOPs are too few."""
    found: dict[str, list[str]] = {}
    for row in rows:
        lists = [record.part("cost").get("uncounted") for record in row.records]
        names = {name for some in lists if isinstance(some, list) for name in some if isinstance(name, str)}
        if names:
            found[row.label] = sorted(names)
    return found


def headline_metric(shown: Sequence[Column], quality: Quality) -> Column | None:
    """The figure that the charts show: test before validation, the one that runs are judged by before anything else."""
    for part in ("test/", "validation/"):
        found = [column for column in shown if column.key.startswith(part)]
        if found:
            return min(found, key=lambda column: column.key != f"{part}{quality.name}")
    return None


def metric_title(name: str) -> str:
    """A metric's name as people write it."""
    return _ABBREVIATIONS.get(name, name.replace("_", " ").lower())


def metric_column(key: str, rows: Sequence[Row]) -> Column:
    """A figure such as ``test/mse``: shares of one in percent, anything else with four significant digits."""
    part, _, name = key.partition("/")
    title = f"{part.capitalize()} {metric_title(name)}"
    lower = Quality(name, maximise=False) in [row.metric for row in rows]
    if name in _PERCENTAGES:
        return Column(key, title, "%", 0.01, 2, lower)
    return Column(key, title, "", 1.0, _digits(_means(key, rows), 4, 9), lower)


def best_energy(shown: Sequence[Column], rows: Sequence[Row]) -> Column | None:
    """The source of joules that the charts show: measured before modelled, then the one that most rows know."""
    found = [column for column in shown if column.key.startswith("energy_j/")]

    def rank(column: Column) -> tuple[bool, int, str]:
        known = sum(column.key in row.figures for row in rows)
        return quality(column.key.partition("/")[2], rows) != "measured", -known, column.key

    return min(found, key=rank, default=None)


def quality(source: str, rows: Sequence[Row]) -> str:
    """What the records call the joules of ``source``: ``measured``, ``modelled``, or that they disagree or are mute."""
    words = {
        str(window.get("quality") or "unlabelled")
        for row in rows
        for record in row.records
        for window in record.energy()
        if window["source"] == source
    }
    return words.pop() if len(words) == 1 else "measured and modelled mixed" if words else "unlabelled"


def ratio_text(ratio: float | None, digits: int = 3) -> str:
    """A ratio with ``digits`` significant digits and a multiplication sign; empty for unknown."""
    if ratio is None:
        return ""
    if ratio == 0 or not math.isfinite(ratio):
        return f"{ratio:g}{TIMES}"
    return f"{ratio:.{min(6, max(0, digits - 1 - _magnitude(ratio)))}f}{TIMES}"


def significant(value: float | None, digits: int = 4) -> str:
    """``value`` with ``digits`` significant digits; a dash for unknown."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def _ordered(keys: set[str], prefix: str, first: set[str]) -> list[str]:
    found = [key for key in keys if key.startswith(prefix)]
    return sorted(found, key=lambda key: (key.removeprefix(prefix) not in first, key))


def _energy(key: str, title: str, units: Sequence[tuple[float, str]], rows: Sequence[Row]) -> Column:
    source = key.partition("/")[2]
    return _column(key, f"{title}, {source}, {quality(source, rows)}", units, rows)


def _column(key: str, title: str, units: Sequence[tuple[float, str]], rows: Sequence[Row]) -> Column:
    means = _means(key, rows)
    middle = median(means) if means else 0.0
    scale, unit = max((pair for pair in units if pair[0] <= middle), default=units[0])
    if middle == 0:
        scale, unit = next((pair for pair in units if pair[0] == 1.0), units[0])
    whole = all(mean == int(mean) for mean in means) and scale == 1.0
    return Column(key, title, unit, scale, 0 if whole else _digits([mean / scale for mean in means], 3))


def _means(key: str, rows: Sequence[Row]) -> list[float]:
    means = [abs(row.figures[key].summary.mean or 0.0) for row in rows if key in row.figures]
    return [mean for mean in means if mean > 0]


def _digits(means: Sequence[float], wanted: int, most: int = 6) -> int:
    """Decimals that give the middle value ``wanted`` significant digits."""
    return max(0, min(most, wanted - 1 - _magnitude(median(means)))) if means else 0


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value)))
