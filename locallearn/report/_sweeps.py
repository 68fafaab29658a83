"""Charts of a figure against a setting: of every rule that a section has with three values of it or more."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from locallearn.report._charts import Chart, Figure, error_bar, figure_of, lower, plain_text, ramp, scaled
from locallearn.report._columns import UNKNOWN, Column, headline_metric, significant
from locallearn.statistics import Row

_PARTS = ("algorithm", "net", "optimizer", "dataset", "trainer", "schedule", "task")
_LEAST = 3  # values of a setting that make a curve
_MOST = 8  # charts of a section
_DASHES = ("solid", "dash", "dot", "dashdot")


def sweep_charts(rows: Sequence[Row], shown: Sequence[Column], style: Mapping[str, tuple[str, str]]) -> list[Chart]:
    """The headline metric against a setting of which a rule has three values or more, all others being equal.

    Accuracy against a device's noise or drift, say.
    """
    metric = headline_metric(shown, rows[0].metric)
    if metric is None:
        return []
    lines: dict[str, list[tuple[str, list[tuple[float, Row]]]]] = {}
    for algorithm in dict.fromkeys(row.algorithm for row in rows):
        members = [
            (row, dict(_settings(row))) for row in rows if row.algorithm == algorithm and metric.key in row.figures
        ]
        for key, name, points in _curves(algorithm, members):
            lines.setdefault(key, []).append((name, points))
    return [_chart(key, named, metric, style) for key, named in list(lines.items())[:_MOST]]


def _settings(row: Row) -> Iterator[tuple[str, Any]]:
    """All settings of a row's runs that say how they trained, by their path on the command line."""

    def walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if path or key != "seed":
                    yield from walk(f"{path}.{key}", inner)
        elif not path.endswith(".seed"):
            yield path, value

    config = row.newest.part("config")
    for part in _PARTS:
        yield from walk(part, config.get(part))


def _curves(
    algorithm: str, members: Sequence[tuple[Row, Mapping[str, Any]]]
) -> Iterator[tuple[str, str, list[tuple[float, Row]]]]:
    """Setting, name of the line and its points, where rows that are alike otherwise have several values."""
    keys = dict.fromkeys(key for _, settings in members for key in settings)
    differ = [key for key in keys if len({_told(settings.get(key)) for _, settings in members}) > 1]
    for key in differ:
        if "seed" in key.rpartition(".")[2]:
            continue
        alike: dict[tuple[str, ...], list[tuple[float, Row]]] = {}
        for row, settings in members:
            value = settings.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                others = tuple(
                    f"{other.rpartition('.')[2]}={_told(settings.get(other))}" for other in differ if other != key
                )
                alike.setdefault(others, []).append((float(value), row))
        for others, points in alike.items():
            if len({value for value, _ in points}) >= _LEAST:
                yield key, " · ".join([algorithm, *others]), sorted(points, key=lambda point: point[0])


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _chart(
    key: str,
    lines: Sequence[tuple[str, list[tuple[float, Row]]]],
    metric: Column,
    style: Mapping[str, tuple[str, str]],
) -> Chart:
    data: list[Figure] = []
    table = []
    for number, (name, points) in enumerate(lines):
        colour, symbol = style[points[0][1].label]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain_text(name),
                "x": [value for value, _ in points],
                "y": [scaled(row.figures[metric.key].centre, metric) for _, row in points],
                "error_y": _bars(points, metric, colour),
                "line": {"color": colour, "width": 2, "dash": _DASHES[number % len(_DASHES)]},
                "marker": {"color": colour, "symbol": symbol, "size": 9},
                "hovertemplate": "%{fullData.name}<br>%{x}: %{y:.4g}<extra></extra>",
            }
        )
        for value, row in points:
            figure = row.figures[metric.key]
            table.append((name, f"{value:g}", str(row.seeds), metric.number(figure.centre), metric.interval(figure)))
    setting = key.partition(".")[2] if key.startswith("algorithm.") else key
    values = [value for _, points in lines for value, _ in points]
    wide = min(values) > 0 and max(values) / min(values) > 20
    layout = {
        "xaxis": {"title": {"text": plain_text(setting)}, "type": "log" if wide else "linear"},
        "yaxis": {"title": {"text": plain_text(lower(metric.heading))}},
    }
    note = f"Means with 95 % t-intervals over the seeds; all settings but {key} are equal along a line."
    header = ("Rule", setting, "Seeds", metric.heading, "95 % interval")
    return Chart(
        f"{metric.title} against {setting}", note, figure_of(data, layout), header, table, 360 + 7 * len(lines)
    )


def _bars(points: Sequence[tuple[float, Row]], metric: Column, colour: str) -> Figure:
    bars = [error_bar(row.figures[metric.key], metric.scale, colour) for _, row in points]
    if any("array" not in bar for bar in bars):
        return {"visible": False}
    return {**bars[0], "array": [bar["array"][0] for bar in bars], "arrayminus": [bar["arrayminus"][0] for bar in bars]}


def estimate_charts(bench: Mapping[str, Any]) -> list[Chart]:
    """The error of estimated gradients against the number of directions, with theory as a dotted line through the points."""
    found = bench.get("estimates")
    lines: dict[str, list[tuple[float, float, float | None, float | None]]] = {}
    for one in found if isinstance(found, list) else []:
        if not isinstance(one, Mapping):
            continue
        count, error, spread, theory = (_known(one.get(key)) for key in ("count", "error", "standard_error", "theory"))
        if count and error is not None:
            lines.setdefault(str(one.get("name")), []).append((count, error, spread, theory))
    if not lines:
        return []
    data: list[Figure] = []
    table = []
    for number, (name, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point[0])
        colour, shared = ramp(number, len(lines)), {"type": "scatter", "legendgroup": plain_text(name)}
        data.append(
            {
                **shared,
                "mode": "markers",
                "name": plain_text(name),
                "x": [count for count, *_ in points],
                "y": [error for _, error, *_ in points],
                "error_y": {"type": "data", "array": [spread or 0.0 for _, _, spread, _ in points], "color": colour},
                "marker": {"color": colour, "size": 8},
                "hovertemplate": "%{fullData.name}<br>%{x} directions: %{y:.4g}<extra></extra>",
            }
        )
        known = [(count, theory) for count, _, _, theory in points if theory is not None]
        if known:
            data.append(
                {
                    **shared,
                    "mode": "lines",
                    "name": plain_text(f"{name}, theory"),
                    "x": [count for count, _ in known],
                    "y": [theory for _, theory in known],
                    "line": {"color": colour, "width": 1.5, "dash": "dot"},
                    "showlegend": False,
                    "hoverinfo": "skip",
                }
            )
        for count, error, spread, theory in points:
            said = [UNKNOWN if value is None else significant(value) for value in (spread, theory)]
            table.append((name, f"{count:g}", significant(error), *said))
    layout = {
        "xaxis": {"title": {"text": "directions"}, "type": "log"},
        "yaxis": {"title": {"text": "relative squared error"}, "type": "log"},
    }
    header = ("Rule", "Directions", "Relative squared error", "Standard error", "Theory")
    note = "Means with standard errors; dotted lines are theory."
    title = "Error of the estimated gradient against the number of directions"
    return [Chart(title, note, figure_of(data, layout), header, table, 380 + 14 * len(lines))]


def _known(value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    return None
