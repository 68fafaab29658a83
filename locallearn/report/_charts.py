"""The charts: plain Plotly figures with the table of the same numbers beside each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from locallearn.report._columns import (
    UNKNOWN,
    Column,
    best_energy,
    headline_metric,
    metric_column,
    ratio_text,
    significant,
)
from locallearn.statistics import Row

# Okabe and Ito's palette, which colour-blind people can tell apart; the baseline is grey, and every rule has its own
# marker too, so that colour is never the only sign.
_BASELINE = ("#808080", "square")
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SYMBOLS = ("circle", "diamond", "triangle-up", "star", "hexagon", "cross", "triangle-down", "x", "pentagon")
_RAMP = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7")

Figure = dict[str, Any]
Curves = Mapping[str, Mapping[int, Sequence[float]]]


@dataclass(frozen=True)
class Chart:
    """A chart and its numbers.

    Attributes:
        title: heading above the chart, plain text.
        note: a sentence under the heading, may be empty.
        figure: ``data`` and ``layout`` for Plotly; every name in it is escaped.
        header: heading of the table under the chart.
        table: its lines.
        height: pixels.
    """

    title: str
    note: str
    figure: Figure
    header: tuple[str, ...]
    table: Sequence[tuple[str, ...]]
    height: int


def styles(rows: Sequence[Row], baseline: str) -> dict[str, tuple[str, str]]:
    """Colour and marker for every label on the page, the same in every chart."""
    plain = sorted({row.label for row in rows if row.algorithm == baseline})[:1]  # of several the first
    chosen = dict.fromkeys(plain, _BASELINE)
    for i, label in enumerate(sorted({row.label for row in rows} - chosen.keys())):
        chosen[label] = (_COLOURS[i % len(_COLOURS)], _SYMBOLS[i % len(_SYMBOLS)])
    return chosen


# ------------------------------------------------------------------------------------------- quality against cost


def cost_charts(rows: Sequence[Row], shown: Sequence[Column], style: Mapping[str, tuple[str, str]]) -> list[Chart]:
    """The headline metric against energy and against time, with the Pareto front."""
    metric = headline_metric(shown, rows[0].metric)
    time = next((column for column in shown if column.key == "train_s"), None)
    if metric is None:
        return []
    return [_cost_chart(rows, cost, metric, style) for cost in (best_energy(shown, rows), time) if cost is not None]


def _cost_chart(rows: Sequence[Row], cost: Column, metric: Column, style: Mapping[str, tuple[str, str]]) -> Chart:
    known = [row for row in rows if cost.key in row.figures and metric.key in row.figures]
    data: list[Figure] = [_front(known, cost, metric)]
    table = []
    for row in known:
        colour, symbol = style[row.label]
        x, y = row.figures[cost.key], row.figures[metric.key]
        seeds = [seed for seed in x.by_seed if seed in y.by_seed]
        common = {"type": "scatter", "mode": "markers", "legendgroup": escape(row.label), "name": escape(row.label)}
        if len(seeds) > 1:
            data.append(
                {
                    **common,
                    "x": [x.by_seed[seed] / cost.scale for seed in seeds],
                    "y": [y.by_seed[seed] / metric.scale for seed in seeds],
                    "marker": {"color": colour, "size": 5, "opacity": 0.35},
                    "showlegend": False,
                    "hoverinfo": "skip",
                }
            )
        data.append(
            {
                **common,
                "x": [_scaled(x.summary.mean, cost)],
                "y": [_scaled(y.summary.mean, metric)],
                "error_x": _error_bar(x.summary.mean, x.interval, cost.scale, colour),
                "error_y": _error_bar(y.summary.mean, y.interval, metric.scale, colour),
                "marker": {"color": colour, "symbol": symbol, "size": 12, "line": {"width": 1, "color": "#fff"}},
                "text": [
                    f"<b>{escape(row.label)}</b><br>{escape(metric.title)} {metric.summary(y)} {metric.unit}"
                    f"<br>{escape(cost.title)} {cost.summary(x)} {cost.unit}<br>n = {y.summary.n}"
                ],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
        table.append(
            (row.label, str(y.summary.n), metric.summary(y), metric.interval(y), cost.summary(x), cost.interval(x))
        )
    xs = [row.figures[cost.key].summary.mean or 0.0 for row in known]
    wide = bool(xs) and min(xs) > 0 and max(xs) / min(xs) > 20
    layout = {
        "xaxis": {"title": {"text": escape(cost.heading)}, "type": "log" if wide else "linear"},
        "yaxis": {"title": {"text": escape(metric.heading)}},
    }
    header = ("Rule", "Seeds", metric.heading, "95 % interval", cost.heading, "95 % interval")
    missing = [row.label for row in rows if row not in known]
    note = f"Not shown, for lack of a figure: {', '.join(missing)}." if missing else ""
    return Chart(
        f"{metric.title} against {_lower(cost.title)}", note, _figure(data, layout), header, table, 380 + 7 * len(known)
    )


def _front(rows: Sequence[Row], cost: Column, metric: Column) -> Figure:
    """The means that no other rule beats in both cost and quality."""
    sign = 1 if metric.lower else -1
    points = sorted(
        (x, sign * y)
        for row in rows
        if (x := _scaled(row.figures[cost.key].summary.mean, cost)) is not None
        and (y := _scaled(row.figures[metric.key].summary.mean, metric)) is not None
    )
    front: list[tuple[float, float]] = []
    for x, badness in points:
        if not front or badness < front[-1][1]:
            front.append((x, badness))
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [x for x, _ in front],
        "y": [sign * badness for _, badness in front],
        "line": {"color": "#808080", "width": 1.5, "dash": "dot", "shape": "hv"},
        "hoverinfo": "skip",
    }


# ------------------------------------------------------------------------------------------- paired with the baseline


def paired_charts(
    rows: Sequence[Row], shown: Sequence[Column], style: Mapping[str, tuple[str, str]], baseline: str
) -> list[Chart]:
    """The difference in the headline metric and the ratios in cost, paired by seed, with their intervals."""
    metric, energy = headline_metric(shown, rows[0].metric), best_energy(shown, rows)
    costs = ("train_s", energy.key if energy else "", "train_flops", "update_flops", "activation_peak_bytes")
    charts = [_difference_chart(rows, metric, style, baseline)] if metric else []
    by_key = {column.key: column for column in shown}
    charts += [_ratio_chart(rows, by_key[key], style, baseline) for key in costs if key in by_key]
    return [chart for chart in charts if chart.table]


def _difference_chart(
    rows: Sequence[Row], metric: Column, style: Mapping[str, tuple[str, str]], baseline: str
) -> Chart:
    unit = "percentage points" if metric.unit == "%" else metric.unit
    points = []
    for row in rows:
        figure = row.figures.get(metric.key)
        if figure and figure.paired and figure.paired.mean is not None:
            pair = figure.paired
            interval = None if pair.lo is None or pair.hi is None else (pair.lo / metric.scale, pair.hi / metric.scale)
            points.append((row.label, pair.n, figure.paired.mean / metric.scale, interval))
    axis = f"difference to {baseline}" + (f" ({unit})" if unit else "")
    chart = _interval_chart(
        f"{metric.title}: {axis}", axis, points, style, 0.0, lambda value: f"{value:+.{metric.digits}f}"
    )
    return replace(chart, note=f"Lower is better: left of the line a rule beats {baseline}.") if metric.lower else chart


def _ratio_chart(rows: Sequence[Row], cost: Column, style: Mapping[str, tuple[str, str]], baseline: str) -> Chart:
    points = []
    for row in rows:
        figure = row.figures.get(cost.key)
        if figure and figure.paired and figure.paired.ratio is not None:
            pair = figure.paired
            interval = None if pair.ratio_lo is None or pair.ratio_hi is None else (pair.ratio_lo, pair.ratio_hi)
            points.append((row.label, pair.n, figure.paired.ratio, interval))
    axis = f"ratio to {baseline}"
    return _interval_chart(f"{cost.title}: {axis}", axis, points, style, 1.0, ratio_text)


def _interval_chart(
    title: str,
    axis: str,
    points: Sequence[tuple[str, int, float, tuple[float, float] | None]],
    style: Mapping[str, tuple[str, str]],
    reference: float,
    write: Callable[[float], str],
) -> Chart:
    """Dots with intervals, one line per rule, and a line where there is no difference."""
    data, table = [], []
    for label, n, mean, interval in points:
        colour, symbol = style[label]
        span = f"[{write(interval[0])}, {write(interval[1])}]" if interval else "none, n = 1"
        table.append((label, str(n), write(mean), span))
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [mean],
                "y": [escape(label)],
                "error_x": _error_bar(mean, interval, 1.0, colour),
                "marker": {"color": colour, "symbol": symbol + ("" if interval else "-open"), "size": 11},
                "text": [f"<b>{escape(label)}</b><br>{write(mean)}<br>95 % interval {span}<br>n = {n}"],
                "hovertemplate": "%{text}<extra></extra>",
                "showlegend": False,
            }
        )
    line = {"type": "line", "x0": reference, "x1": reference, "yref": "paper", "y0": 0, "y1": 1}
    layout = {
        "xaxis": {"title": {"text": escape(axis)}},
        "yaxis": {"type": "category", "range": [len(points) - 0.5, -0.5]},
        "shapes": [{**line, "line": {"color": "#808080", "width": 1.5, "dash": "dot"}}],
    }
    header = ("Rule", "Pairs", axis[:1].upper() + axis[1:], "95 % interval")
    return Chart(title, "", _figure(data, layout), header, table, 130 + 36 * len(points))


# ------------------------------------------------------------------------------------------- memory


def memory_charts(rows: Sequence[Row], shown: Sequence[Column], style: Mapping[str, tuple[str, str]]) -> list[Chart]:
    """Bars of the peak bytes, from zero."""
    wanted = ("activation_peak_bytes", "allocated_peak_bytes")
    return [_bar_chart(rows, column, style) for column in shown if column.key in wanted]


def _bar_chart(rows: Sequence[Row], column: Column, style: Mapping[str, tuple[str, str]]) -> Chart:
    known = [row for row in rows if column.key in row.figures]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "x": [_scaled(row.figures[column.key].summary.mean, column)],
            "y": [escape(row.label)],
            "marker": {"color": style[row.label][0]},
            "text": [column.number(row.figures[column.key].summary.mean)],
            "textposition": "auto",
            "hovertemplate": "%{y}<br>%{x}<extra></extra>",
            "showlegend": False,
        }
        for row in known
    ]
    layout = {
        "xaxis": {"title": {"text": escape(column.heading)}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "type": "category"},
        "bargap": 0.35,
    }
    table = [(row.label, str((f := row.figures[column.key]).summary.n), column.summary(f)) for row in known]
    header = ("Rule", "Seeds", column.heading)
    return Chart(column.title, "", _figure(data, layout), header, table, 120 + 36 * len(known))


# ------------------------------------------------------------------------------------------- curves over epochs


def metric_chart(
    rows: Sequence[Row], curves: Sequence[Curves], style: Mapping[str, tuple[str, str]], points: int
) -> Chart | None:
    """The validation metric over epochs: the mean over seeds, and the range of the seeds behind it."""
    name = f"validation/{rows[0].metric.name}"
    metric = metric_column(name, rows)
    data: list[Figure] = []
    series: dict[str, Mapping[int, Sequence[float]]] = {}
    for row, known in zip(rows, curves, strict=True):
        if name not in known:
            continue
        series[row.label] = known[name]
        data += _band(row.label, known[name], metric, style[row.label][0], points)
    if not series:
        return None
    layout = {"xaxis": _epoch_axis(series), "yaxis": {"title": {"text": escape(_lower(metric.heading))}}}
    header, table = _curve_table(
        series,
        points,
        lambda values: f"{100 * _mean(values):.2f}" if metric.unit == "%" else significant(_mean(values)),
    )
    note = "Mean over the seeds that reached the epoch; the band spans them."
    return Chart(f"{metric.title} over epochs", note, _figure(data, layout), header, table, 360 + 7 * len(series))


def _band(label: str, values: Mapping[int, Sequence[float]], metric: Column, colour: str, points: int) -> list[Figure]:
    epochs = thin(sorted(values), points)
    factor = 1 / metric.scale
    line = {"type": "scatter", "mode": "lines", "x": epochs, "legendgroup": escape(label)}
    edge = {**line, "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    band = [
        {**edge, "y": [_round(factor * max(values[epoch])) for epoch in epochs]},
        {
            **edge,
            "y": [_round(factor * min(values[epoch])) for epoch in epochs],
            "fill": "tonexty",
            "fillcolor": f"{colour}2e",
        },
    ]
    mean = {
        **line,
        "name": escape(label),
        "y": [_round(factor * _mean(values[epoch])) for epoch in epochs],
        "line": {"color": colour, "width": 2},
        "hovertemplate": "%{fullData.name}<br>epoch %{x}: "
        + ("%{y:.2f} %" if metric.unit == "%" else "%{y:.4g}")
        + "<extra></extra>",
    }
    spread = any(len(values[epoch]) > 1 for epoch in epochs)
    return [*(band if spread else []), _dotted_when_single(mean, epochs)]


def block_charts(row: Row, curves: Curves, points: int) -> list[Chart]:
    """Loss and probe accuracy of every block over epochs, mean over seeds."""
    charts = []
    for suffix, title, axis, factor in (
        ("loss", "local loss per block", "loss", 1.0),
        ("probe_accuracy", "probe accuracy per block", "probe accuracy (%)", 100.0),
    ):
        series = {
            block: curves[name] for block in _block_names(row, curves) if (name := f"block/{block}/{suffix}") in curves
        }
        if series:
            charts.append(_block_chart(f"{row.label}: {title}", axis, series, factor, points))
    return charts


def layer_charts(row: Row, curves: Curves, points: int) -> list[Chart]:
    """The rule's own figures of every layer over epochs, mean over seeds: one chart per figure, latest values below."""
    figures: dict[str, dict[str, Mapping[int, Sequence[float]]]] = {}
    for name, values in curves.items():
        layer, _, figure = name.removeprefix("layer/").rpartition("/")
        if name.startswith("layer/") and layer:
            figures.setdefault(figure, {})[layer] = values
    charts = []
    for figure, series in figures.items():
        words = figure.replace("_", " ")
        axis = f"{words} (degrees)" if words.endswith("angle") else words
        chart = _block_chart(f"{row.label}: {words} per layer", axis, series, 1.0, points, "layer")
        latest = [
            (layer, str(max(values)), significant(_mean(values[max(values)]))) for layer, values in series.items()
        ]
        charts.append(replace(chart, header=("Layer", "Epoch", axis[:1].upper() + axis[1:]), table=latest))
    return charts


def _block_chart(
    title: str,
    axis: str,
    series: Mapping[str, Mapping[int, Sequence[float]]],
    factor: float,
    points: int,
    what: str = "block",
) -> Chart:
    data = []
    for i, (block, values) in enumerate(series.items()):
        epochs = thin(sorted(values), points)
        trace = {
            "type": "scatter",
            "mode": "lines",
            "name": escape(block),
            "x": epochs,
            "y": [_round(factor * _mean(values[epoch])) for epoch in epochs],
            "line": {"color": _ramp(i, len(series)), "width": 2, "dash": ("solid", "dash", "dot", "dashdot")[i % 4]},
            "hovertemplate": what + " %{fullData.name}<br>epoch %{x}: %{y:.4g}<extra></extra>",
        }
        data.append(_dotted_when_single(trace, epochs))
    layout = {"xaxis": _epoch_axis(series), "yaxis": {"title": {"text": escape(axis)}}}
    header, table = _curve_table(series, points, lambda values: significant(factor * _mean(values)))
    return Chart(title, "", _figure(data, layout), header, table, 330 + 5 * len(series))


def _block_names(row: Row, curves: Curves) -> list[str]:
    """Blocks in the network's order, then those that only the metrics know."""
    logged = [name.split("/", 1)[1].rpartition("/")[0] for name in curves if name.startswith("block/")]
    listed = row.records[-1].data.get("blocks")
    first = [str(name) for name in listed] if isinstance(listed, list) else []
    return list(dict.fromkeys([name for name in first if name in logged] + logged))


def _curve_table(
    series: Mapping[str, Mapping[int, Sequence[float]]], points: int, write: Callable[[Sequence[float]], str]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    epochs = thin(sorted({epoch for values in series.values() for epoch in values}), points)
    table = [(str(epoch), *(write(v[epoch]) if epoch in v else UNKNOWN for v in series.values())) for epoch in epochs]
    return ("Epoch", *series), table


def _epoch_axis(series: Mapping[str, Mapping[int, Sequence[float]]]) -> Figure:
    """An axis of whole epochs: left alone, Plotly halves them when there are few."""
    few = max((epoch for values in series.values() for epoch in values), default=0) <= 10
    return {"title": {"text": "epoch"}, **({"dtick": 1} if few else {})}


def thin(epochs: Sequence[int], points: int) -> list[int]:
    """At most ``points`` of ``epochs``, evenly spread, the first and the last among them."""
    if len(epochs) <= points:
        return list(epochs)
    step = (len(epochs) - 1) / (points - 1)
    return [epochs[round(i * step)] for i in range(points)]


# ------------------------------------------------------------------------------------------- small parts


def _figure(data: Sequence[Figure], layout: Figure) -> Figure:
    return {"data": list(data), "layout": layout}


def _error_bar(mean: float | None, interval: tuple[float, float] | None, scale: float, colour: str) -> Figure:
    if mean is None or interval is None:
        return {"visible": False}
    up, down = [(interval[1] - mean) / scale], [(mean - interval[0]) / scale]
    shape = {"type": "data", "symmetric": False, "thickness": 1.5, "width": 5, "color": colour}
    return {**shape, "array": up, "arrayminus": down}


def _dotted_when_single(trace: Figure, epochs: Sequence[int]) -> Figure:
    return {**trace, "mode": "lines+markers"} if len(epochs) == 1 else trace


def _scaled(value: float | None, column: Column) -> float | None:
    return None if value is None else value / column.scale


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _lower(title: str) -> str:
    return title[:1].lower() + title[1:]


def _ramp(i: int, n: int) -> str:
    """A colour for block ``i`` of ``n``, cool for early and warm for late blocks."""
    place = (len(_RAMP) - 1) * (i / (n - 1) if n > 1 else 0.0)
    low = min(int(place), len(_RAMP) - 2)
    a, b = (tuple(int(_RAMP[j][k : k + 2], 16) for k in (1, 3, 5)) for j in (low, low + 1))
    return "#" + "".join(f"{round(x + (y - x) * (place - low)):02x}" for x, y in zip(a, b, strict=True))
