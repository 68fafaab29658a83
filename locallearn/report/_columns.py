"""Which figures are shown, under what heading, in what unit and with how many digits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_UP, Context
from statistics import median
from typing import Any

from locallearn.records import COST_COLUMNS, SHARES, Quality
from locallearn.statistics import Figure, Row

UNKNOWN = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
AT_LEAST = "\N{GREATER-THAN OR EQUAL TO}"
LEGEND = (
    f"Mean ± standard deviation over the seeds that finished; {TIMES} is the geometric mean of the ratios to {{baseline}}, "
    f"paired by seed; {UNKNOWN} is unknown."
)

PER_SAMPLE = "sample_energy_j/"
"""Beginning of the names of joules per sample, by source."""

_SECONDS = ((1.0, "s"), (3600.0, "h"))
_BYTES = ((1.0, "B"), (2.0**10, "KiB"), (2.0**20, "MiB"), (2.0**30, "GiB"))
_PREFIXES = ((1e-6, "µ"), (1e-3, "m"), (1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"), (1e15, "P"))
_COUNTS = ((1.0, ""), (1e3, "thousand"), (1e6, "million"), (1e9, "billion"))
_UP = Context(prec=2, rounding=ROUND_UP)
_LONG = 1e15  # numbers with more digits are shown with an exponent
_ABBREVIATIONS = {"auc": "AUC", "mse": "MSE"}


def _si(unit: str) -> tuple[tuple[float, str], ...]:
    return tuple((size, prefix + unit) for size, prefix in _PREFIXES)


_FLOPS = _si("FLOP")[2:]

# Units of a figure without a heading of its own, by the end of its name.
_ENDS = {"_s": _SECONDS, "_j": _si("J"), "_g": _si("g"), "_flops": _FLOPS, "_bytes": _BYTES, "": _COUNTS}

# Heading and units of the figures with fixed names, in the order of the headline table.
_COSTS: dict[str, tuple[str, tuple[tuple[float, str], ...]]] = {
    "train_s": ("Training time", _SECONDS),
    "energy": ("Energy", _si("J")),
    "train_flops": ("Training FLOPs", _FLOPS),
    "update_flops": ("Update FLOPs", _FLOPS),
    "activation_peak_bytes": ("Peak activations", _BYTES),
    "allocated_peak_bytes": ("Peak allocated", _BYTES),
    "once_flops": ("FLOPs done once", _FLOPS),
    "inference_flops": ("Inference FLOPs", _FLOPS),
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
        if value is None:
            return UNKNOWN
        shown = value / self.scale
        return f"{shown:.4g}" if abs(shown) >= _LONG else _rounded(shown, self.digits, ",")

    def summary(self, figure: Figure, row: Row | None = None) -> str:
        """Mean, with the standard deviation where there is one and it is not 0; one that is too small is a least value."""
        mean, std = figure.summary.mean, figure.summary.std
        told = f"{self.least(figure, row)}{self.number(mean)}"
        return f"{told} ± {self.number(std)}" if std and not figure.censored else told

    def least(self, figure: Figure, row: Row | None = None) -> str:
        """The sign of a mean that is too small: a restricted one, or of FLOPs of which ``row`` lacks some."""
        lacking = row is not None and "flops" in self.key and any(record.uncounted for record in row.records)
        return f"{AT_LEAST} " if figure.censored or lacking else ""

    def difference(self, value: float) -> str:
        """A difference with its sign."""
        return _rounded(value / self.scale, self.digits, "+")

    def ratio(self, ratio: float | None) -> str:
        """A ratio to the baseline; qualities differ by little, so they get a digit more than costs."""
        return ratio_text(ratio, 4 if self.key.startswith(("test/", "validation/")) else 3)

    def interval(self, figure: Figure) -> str:
        """The 95 % interval around :attr:`Figure.centre`, or why there is none."""
        if figure.interval is None:
            few = figure.summary.n < 3 and not figure.censored  # a reason may be that of no comparison
            return f"none, n = {figure.summary.n}" if few or not figure.reason else figure.reason
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
            costs += [_energy(key, "Energy per sample", units, rows) for key in _ordered(keys, PER_SAMPLE, set())]
        elif name in keys:
            costs.append(_column(name, title, units, rows))
    for name in COST_COLUMNS:
        if name in keys and name not in _COSTS:
            end = next(end for end in _ENDS if name.endswith(end))
            costs.append(_column(name, metric_title(name.removesuffix(end)).capitalize(), _ENDS[end], rows))
    targets = [metric_column(key, rows) for name in sorted(judges) if (key := f"target/{name}") in keys]
    if targets:
        keys.add("target/seconds")  # even if nobody reached the target, which is then seen
    targets += [_column(key, title, units, rows) for key, (title, units) in _TARGETS.items() if key in keys]
    targets += [_energy(key, "Energy to target", _si("J"), rows) for key in _ordered(keys, "target/joules", set())]
    losses = [column for column in metrics if column.key.endswith("/loss") and "loss" not in judges]
    return [column for column in metrics if column not in losses] + costs + targets + losses


def shared_notes(rows: Sequence[Row]) -> list[str]:
    """What rows must not be read without, each sentence once, behind the rules that it is about."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            labels = found.setdefault(note, [])
            if row.label not in labels:
                labels.append(row.label)
    return [
        f"{'all rules' if len(labels) == len(rows) > 3 else ', '.join(labels)}: {note}"
        for note, labels in found.items()
    ]


def headline_metric(shown: Sequence[Column], quality: Quality) -> Column | None:
    """The figure that the charts show: test before validation, the one that runs are judged by before anything else."""
    for part in ("test/", "validation/"):
        found = [column for column in shown if column.key.startswith(part)]
        if found:
            return min(found, key=lambda column: column.key != f"{part}{quality.name}")
    return None


def judge_of(rows: Sequence[Row], shown: Sequence[Column], metric: Column) -> Column:
    """What rows and settings are chosen by: the validation's figure, where every row has one.

    Args:
        rows: that have ``metric``.
        shown: columns of their section.
        metric: the headline metric.
    """
    key = f"validation/{metric.key.partition('/')[2]}"
    judge = next((column for column in shown if column.key == key), None)
    known = judge is not None and all(
        (figure := row.figures.get(key)) is not None and figure.centre is not None and math.isfinite(figure.centre)
        for row in rows
    )
    return judge if judge is not None and known else metric


def metric_title(name: str) -> str:
    """A metric's name as people write it."""
    return _ABBREVIATIONS.get(name, name.replace("_", " ").lower())


def metric_column(key: str, rows: Sequence[Row]) -> Column:
    """A figure such as ``test/mse``: shares of one in percent, anything else with four significant digits."""
    part, _, name = key.partition("/")
    title = f"{part.capitalize()} {metric_title(name)}"
    lower = Quality(name, maximise=False) in [row.metric for row in rows]
    if name in SHARES:
        return Column(key, title, "%", 0.01, 2, lower)
    return Column(key, title, "", 1.0, _digits(_means(key, rows), 4, 9), lower)


def best_energy(shown: Sequence[Column], rows: Sequence[Row], of: str = "energy_j/") -> Column | None:
    """The source of joules that the charts show: measured before modelled, then the one that most rows know."""
    found = [column for column in shown if column.key.startswith(of)]

    def rank(column: Column) -> tuple[bool, int, str]:
        known = sum(column.key in row.figures for row in rows)
        return quality(column.key.removeprefix(of), rows) != "measured", -known, column.key

    return min(found, key=rank, default=None)


def quality(source: str, rows: Sequence[Row]) -> str:
    """What the records call the joules of ``source``: ``measured``, ``modelled`` and by what, or that they disagree."""
    found = {
        (str(window.get("quality") or "unlabelled"), str(window.get("by") or ""))
        for row in rows
        for record in row.records
        for window in record.energy()
        if window["source"] == source
    }
    words, ways = {word for word, _ in found}, {by for word, by in found if word != "measured"} - {""}
    if len(words) != 1:
        return "measured and modelled mixed" if words else "unlabelled"
    return words.pop() + (f" ({'; '.join(sorted(ways))})" if ways else "")


def found_how(key: str, rows: Sequence[Row]) -> str:
    """Whether the joules of a figure were measured, without by what they were modelled."""
    return quality(source_of(key), rows).partition(" (")[0]


def source_of(key: str) -> str:
    """The source of joules in the name of a figure."""
    return key.removeprefix("target/").partition("/")[2]


def lacking(row: Row) -> list[str]:
    """Which of its finished runs lack the metric, and where: ``1 finished run has no validation accuracy``."""
    return [
        f"{n} {'finished run has' if n == 1 else 'finished runs have'} no "
        f"{f'{parts[0]} ' if len(parts) == 1 else ''}{metric_title(row.metric.name)}"
        for parts, n in row.unjudged.items()
    ]


def ratio_text(ratio: float | None, digits: int = 3) -> str:
    """A ratio with ``digits`` significant digits and a multiplication sign; empty for unknown."""
    if ratio is None:
        return ""
    if not 1e-6 < abs(ratio) < _LONG:
        return f"{ratio:.{digits}g}{TIMES}"
    return f"{ratio:.{min(6, max(0, digits - 1 - _magnitude(ratio)))}f}{TIMES}"


def p_text(p: float) -> str:
    """A p-value to its second digit, rounded up: the smallest possible one, 2/2ⁿ, must not be printed as less than it is."""
    return f"{float(_UP.create_decimal(f'{p:.12g}')):.2g}"  # twelve digits: a sum of shares is no more exact


def known_number(value: Any) -> float | None:
    """A finite number out of a file; ``None`` for anything else that may stand there."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None


def significant(value: float | None, digits: int = 4) -> str:
    """``value`` with ``digits`` significant digits; a dash for unknown."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def _ordered(keys: set[str], prefix: str, first: set[str]) -> list[str]:
    found = [key for key in keys if key.startswith(prefix)]
    return sorted(found, key=lambda key: (key.removeprefix(prefix) not in first, key))


def _energy(key: str, title: str, units: Sequence[tuple[float, str]], rows: Sequence[Row]) -> Column:
    source = source_of(key)
    return _column(key, f"{title}, {source}, {quality(source, rows)}", units, rows)


def _column(key: str, title: str, units: Sequence[tuple[float, str]], rows: Sequence[Row]) -> Column:
    means = _means(key, rows)
    middle = _middle(means)
    scale, unit = max((pair for pair in units if pair[0] <= middle), default=units[0])
    if middle == 0:
        scale, unit = next((pair for pair in units if pair[0] == 1.0), units[0])
    whole = all(mean == int(mean) for mean in means) and scale == 1.0
    return Column(key, title, unit, scale, 0 if whole else _digits([mean / scale for mean in means], 3))


def _means(key: str, rows: Sequence[Row]) -> list[float]:
    means = [abs(row.figures[key].summary.mean or 0.0) for row in rows if key in row.figures]
    return [mean for mean in means if 0 < mean < math.inf]


def _rounded(value: float, digits: int, sign: str) -> str:
    """With so many digits behind the point; what would read as nothing has one of its own instead."""
    small = value != 0 and round(value, digits) == 0
    return f"{value:{sign}.1g}" if small else f"{value:{sign}.{digits}f}"


def _digits(means: Sequence[float], wanted: int, most: int = 6) -> int:
    """Decimals that give the middle value ``wanted`` significant digits."""
    return max(0, min(most, wanted - 1 - _magnitude(_middle(means)))) if means else 0


def _middle(values: Sequence[float]) -> float:
    """The median; of two that are too large to be added the larger one."""
    if not values:
        return 0.0
    middle = median(values)
    return middle if math.isfinite(middle) else max(value for value in values if math.isfinite(value))


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value)))
