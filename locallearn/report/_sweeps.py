"""Charts of a figure against a setting: of every rule that a section has with three values of it or more."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from locallearn.report._charts import (
    Chart,
    Figure,
    clipped,
    cost_axis,
    error_bar,
    figure_of,
    lower,
    plain_text,
    ramp,
    scaled,
    wrapped,
)
from locallearn.report._columns import UNKNOWN, Column, headline_metric, judge_of, significant
from locallearn.report._styles import Styles
from locallearn.statistics import Row, _identity

_LEAST = 3  # values of a setting that make a curve
_MOST = 8  # charts of a section
_LINES, _AXES = 300, 8  # of parallel coordinates
_DASHES = ("solid", "dash", "dot", "dashdot")


def sweep_charts(rows: Sequence[Row], shown: Sequence[Column], style: Styles) -> list[Chart]:
    """The headline metric against a setting of which a rule has three values or more, all others being equal.

    Accuracy against a device's noise or drift, say.
    """
    metric = headline_metric(shown, rows[0].metric)
    if metric is None:
        return []
    lines: dict[str, list[tuple[str, list[tuple[float, Row]]]]] = {}
    for algorithm in dict.fromkeys(row.algorithm for row in rows):
        members = [row for row in rows if row.algorithm == algorithm and metric.key in row.figures]
        for key, name, points in _curves(algorithm, list(zip(members, _settings(members), strict=True))):
            lines.setdefault(key, []).append((name, points))
    charts = [_chart(key, named, metric, style) for key, named in list(lines.items())[:_MOST]]
    if further := list(lines)[_MOST:]:
        charts[-1] = replace(charts[-1], note=f"{charts[-1].note} There is no room for charts of {', '.join(further)}.")
    # It shows which settings are good, and those are chosen by validation.
    judge = judge_of([row for row in rows if metric.key in row.figures], shown, metric)
    for algorithm in dict.fromkeys(row.algorithm for row in rows):
        members = [row for row in rows if row.algorithm == algorithm and judge.key in row.figures]
        together = [
            (row.label, values, value)
            for row, values in zip(members, _settings(members), strict=True)
            if (value := scaled(row.figures[judge.key].centre, judge)) is not None
        ]
        chart = parallel_chart(f"{algorithm}: settings together", together, judge.heading, judge.lower)
        charts += [chart] if chart is not None else []
    return charts


def parallel_chart(
    title: str, points: Sequence[tuple[str, Mapping[str, Any], float]], metric: str, lower_is_better: bool
) -> Chart | None:
    """Parallel coordinates: a line per experiment through its settings and its figure, warm for good ones.

    Drawn from four experiments on in which two settings or more differ; lines and points alone, so that it can be written as
    a vector picture.

    Args:
        title: of the chart.
        points: name, settings and figure of every experiment.
        metric: heading of the figure.
        lower_is_better: whether less of it is better.
    """
    known = [point for point in points if math.isfinite(point[2])]
    best = sorted(range(len(known)), key=lambda i: known[i][2], reverse=not lower_is_better)[:_LINES]
    points = [known[i] for i in sorted(best)]
    keys = list(dict.fromkeys(key for _, settings, _ in points for key in settings))
    unlike = [
        key
        for key in keys
        if len({_told(settings.get(key)) for _, settings, _ in points}) > 1 and "seed" not in key.rpartition(".")[2]
    ]
    differ = unlike[:_AXES]
    if len(points) < 4 or len(differ) < 2:
        return None
    places, marks = [], []
    for number, key in enumerate(differ):
        place, ends = _axis([settings.get(key) for _, settings, _ in points])
        places.append(place)
        marks += [(number, at, text) for at, text in ends]
    values = [value for *_, value in points]
    low, high = min(values), max(values)
    marks += [(len(differ), 0.0, significant(low)), (len(differ), 1.0, significant(high))]
    # The best ones are drawn last, above the others.
    order = sorted(range(len(points)), key=lambda i: values[i], reverse=lower_is_better)
    data: list[Figure] = []
    for rank, i in enumerate(order):
        share = (values[i] - low) / (high - low) if high > low else 0.5
        good = 1 - share if lower_is_better else share
        told = "<br>".join(plain_text(f"{key} = {_told(points[i][1].get(key))}") for key in differ)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": plain_text(points[i][0]),
                "meta": plain_text(points[i][0]),
                "x": list(range(len(differ) + 1)),
                "y": [*(place[i] for place in places), share],
                "line": {"color": ramp(round(99 * good), 100), "width": 2.5 if rank >= len(order) - 3 else 1.2},
                "opacity": 1.0 if rank >= len(order) - 3 else 0.55,
                "text": [f"<b>{plain_text(points[i][0])}</b><br>{told}<br>{significant(values[i])}"]
                * (len(differ) + 1),
                "hovertemplate": "%{text}<extra></extra>",
                "showlegend": False,
            }
        )
    names = [*(key.rpartition(".")[2] if _once(key, differ) else key for key in differ), metric]
    layout = {
        "xaxis": {
            "tickvals": list(range(len(names))),
            "ticktext": [wrapped(name, 14) for name in names],
            "range": [-0.25, len(names) - 0.5],
        },
        "yaxis": {"visible": False, "range": [-0.08, 1.08]},
        "annotations": [
            {
                **{"x": x, "y": y, "text": plain_text(clipped(text, 14)), "showarrow": False, "font": {"size": 11}},
                **{"xanchor": "left", "xshift": 4, "yshift": 7 if y > 0.5 else -7},
            }
            for x, y, text in marks
        ],
    }
    table = [
        (name, *(_told(settings.get(key)) for key in differ), significant(value)) for name, settings, value in points
    ]
    note = "A line per experiment; warm colours are better, and the three best lines are drawn thick."
    if len(known) > _LINES:
        note += f" Of {len(known)} experiments the {_LINES} best are here."
    if further := unlike[_AXES:]:
        note += f" There is no room for {', '.join(further)}."
    return Chart(title, note, figure_of(data, layout), ("Experiment", *names), table, 380)


def _axis(values: Sequence[Any]) -> tuple[list[float | None], list[tuple[float, str]]]:
    """Places between 0 and 1 for values of a setting, and what to write where: numbers on a scale, words in order."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    if len(numbers) == len([v for v in values if v is not None]) and len(set(numbers)) > 1:
        low, high = min(numbers), max(numbers)
        wide = low > 0 and high / low > 20
        scale = math.log if wide else float
        span = scale(high) - scale(low)
        if math.isfinite(span) and span > 0:
            found = [None if v is None else (scale(float(v)) - scale(low)) / span for v in values]
            return found, [(0.0, f"{low:g}"), (1.0, f"{high:g}")]
    words = list(dict.fromkeys(_told(v) for v in values))
    step = 1 / max(1, len(words) - 1)
    told = [(i * step, word) for i, word in enumerate(words)] if len(words) <= 8 else []
    return [words.index(_told(v)) * step for v in values], told


def _once(key: str, keys: Sequence[str]) -> bool:
    return sum(other.rpartition(".")[2] == key.rpartition(".")[2] for other in keys) == 1


def _settings(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of every row the settings in which they are different experiments; usual values, which identity leaves out, too."""
    flats = [_identity.settings(row.newest) for row in rows]
    unlike = set(_identity.differing(flats))
    names = [name for name in dict.fromkeys(name for flat in flats for name in flat) if name in unlike]
    return [
        _identity.in_words(
            row.newest,
            {name: _value(flat[name]) if name in flat else _identity.usual(row.newest, name) for name in names},
        )
        for row, flat in zip(rows, flats, strict=True)
    ]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # a number that is none
        return _identity.spoken(text)


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
    style: Styles,
) -> Chart:
    data: list[Figure] = []
    table = []
    for number, (name, points) in enumerate(lines):
        colour, symbol, _ = style[points[0][1].label]
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
    layout = {
        "xaxis": cost_axis(setting, values, 20),
        "yaxis": {"title": {"text": plain_text(lower(metric.heading))}},
    }
    note = f"Means with 95 % t-intervals over the seeds; all settings but {key} are equal along a line."
    if metric.key.startswith("test/"):
        note += " These are figures of the test set; a setting is to be chosen by validation."
    header = ("Rule", setting, "Seeds", metric.heading, "95 % interval")
    return Chart(f"{metric.title} against {setting}", note, figure_of(data, layout, "end"), header, table, 380)


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
        "xaxis": {"type": "log"} | cost_axis("directions", [x for trace in data for x in trace["x"]], 1),
        "yaxis": {"type": "log"} | cost_axis("relative squared error", [y for trace in data for y in trace["y"]], 1),
    }
    header = ("Rule", "Directions", "Relative squared error", "Standard error", "Theory")
    note = "Means with standard errors; dotted lines are theory."
    title = "Error of the estimated gradient against the number of directions"
    return [Chart(title, note, figure_of(data, layout), header, table, 380 + 14 * len(lines))]


def _known(value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    return None
