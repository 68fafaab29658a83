"""The charts: plain Plotly figures with the table of the same numbers beside each."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from locallearn.report._columns import (
    UNKNOWN,
    Column,
    best_energy,
    headline_metric,
    lacking,
    p_text,
    ratio_text,
)
from locallearn.report._styles import Styles
from locallearn.statistics import Figure as Numbers
from locallearn.statistics import PairedDifference, Row, elsewhere, is_cost, machine_bound

_NAMED = 6  # rows that a caption names
_LONG = 90  # signs of a row's name on an axis and in a sentence
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


# ------------------------------------------------------------------------------------------- quality against cost


def cost_charts(rows: Sequence[Row], shown: Sequence[Column], style: Styles) -> list[Chart]:
    """The headline metric against energy, time and bytes, each with its Pareto front."""
    metric = headline_metric(shown, rows[0].metric)
    # One point is no comparison; its numbers stand in the table.
    if metric is None or sum(metric.key in row.figures for row in rows) < 2:
        return []
    by_key = {column.key: column for column in shown}
    # What the device's allocator really held, where no row is lost by it; else what the graphs keep alive.
    found = [by_key[key] for key in ("allocated_peak_bytes", "activation_peak_bytes") if key in by_key]
    memory = max(found, key=lambda column: sum(column.key in row.figures for row in rows), default=None)
    costs = (best_energy(shown, rows), by_key.get("train_s"), memory)
    return [_cost_chart(rows, cost, metric, style) for cost in costs if cost is not None]


def _cost_chart(rows: Sequence[Row], cost: Column, metric: Column, style: Styles) -> Chart:
    known = [row for row in rows if cost.key in row.figures and metric.key in row.figures]
    away = elsewhere(rows) if machine_bound(cost.key) else frozenset()
    out = {row.label: why for row in known if (why := _left_out(row, cost, away))}
    front, verdicts = _pareto(known, out, cost, metric)
    data: list[Figure] = [_front_line(front)]
    table = []
    for row, verdict in zip(known, verdicts, strict=True):
        colour, symbol, _ = style[row.label]
        x, y = row.figures[cost.key], row.figures[metric.key]
        seeds = [seed for seed in x.by_seed if seed in y.by_seed]
        told, firm = f"{row.seeds} seeds, {verdict}", x.interval and y.interval and row.label not in out
        common = {
            "type": "scatter",
            "mode": "markers",
            "name": plain_text(row.label),
            "meta": plain_text(row.label),
        }
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
                "x": [scaled(x.centre, cost)],
                "y": [scaled(y.centre, metric)],
                "error_x": error_bar(x, cost.scale, colour),
                "error_y": error_bar(y, metric.scale, colour),
                "marker": {
                    "color": colour,
                    "symbol": symbol if firm else f"{symbol}-open",
                    "size": 12,
                    "line": {"width": 1, "color": "#fff"} if firm else {"width": 2},
                },
                "text": [
                    f"<b>{plain_text(row.label)}</b><br>{plain_text(metric.title)} {metric.summary(y)} {metric.unit}"
                    f"<br>{plain_text(cost.title)} {cost.number(x.centre)} {cost.unit}<br>{plain_text(told)}"
                ],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
        table.append(
            (
                *(row.label, row.seeds, metric.number(y.centre), metric.interval(y)),
                *(cost.number(x.centre), cost.interval(x), verdict),
            )
        )
    layout = {
        "xaxis": cost_axis(cost.heading, [scaled(row.figures[cost.key].centre, cost) for row in known], 20),
        "yaxis": {"title": {"text": plain_text(metric.heading)}},
    }
    header = ("Rule", "Seeds", metric.heading, "95 % interval", cost.heading, "95 % interval", "Pareto front")
    missing = [row.label for row in rows if row not in known]
    note = (
        "Means (of costs geometric ones) with 95 % t-intervals; an open marker has none, or is left out of the front."
    )
    if out:
        named = [f"{label} ({why})" for label, why in out.items()]
        note += f" The front leaves out {len(out)} of {len(known)} rows: "
        note += f"{', '.join(named[:_NAMED])}{', …' if len(named) > _NAMED else ''}."
    if metric.key.startswith("test/") and len({row.algorithm for row in known}) < len(known):
        note += (
            " Some rules have several rows: the best test figures of many are flattered by luck, and so is the front."
        )
    note += f" Not shown, for lack of a figure: {', '.join(missing)}." if missing else ""
    return Chart(
        f"{metric.title} against {lower(cost.title)}",
        note,
        figure_of(data, layout, "point"),
        header,
        table,
        400,
    )


def _left_out(row: Row, cost: Column, away: frozenset[str]) -> str:
    """Why a row has no place among the others: its means are those of survivors, or of another machine. Empty: it has."""
    why = ["not every seed finished"] if row.missing else []
    if row.arrivals is not None and row.arrivals.reached < len(row.records):
        why.append("not every run reached the target")
    why += lacking(row)
    if row.label in away:
        why.append(f"its {lower(cost.title).partition(',')[0]} is not of the same machine")
    return "; ".join(why)


def _pareto(
    rows: Sequence[Row], out: Mapping[str, str], cost: Column, metric: Column
) -> tuple[list[tuple[float, float]], list[str]]:
    """The front of the means, and what can be said of every row.

    A row is beaten only by another that is better in cost and quality beyond the intervals of both (a figure that does not
    vary has an interval without width).

    Args:
        rows: that have both figures.
        out: labels of those that are not placed, and why.
        cost: across.
        metric: upwards.

    Returns:
        The front's corners in the units of the columns, from cheap to dear; a verdict for every row.
    """
    sign = 1 if metric.lower else -1
    placed = {i: row for i, row in enumerate(rows) if row.label not in out}
    points = sorted(
        (x, sign * y)
        for row in placed.values()
        if (x := scaled(row.figures[cost.key].centre, cost)) is not None
        and (y := scaled(row.figures[metric.key].centre, metric)) is not None
    )
    front: list[tuple[float, float]] = []
    for x, badness in points:
        if not front or badness < front[-1][1]:
            front.append((x, badness))
    boxes = {i: _box(row, cost, metric, sign) for i, row in placed.items()}
    verdicts = []
    for i, row in enumerate(rows):
        box = boxes.get(i)
        if i not in placed:
            verdicts.append(f"not placed: {out[row.label]}")
        elif box is None:
            verdicts.append("cannot be told: no interval")
        elif any(_beats(other, box) for other in boxes.values() if other is not None):
            verdicts.append("beaten beyond the intervals")
        else:
            at = (
                scaled(row.figures[cost.key].centre, cost),
                sign * (scaled(row.figures[metric.key].centre, metric) or 0.0),
            )
            verdicts.append("on it" if at in front else "not beaten beyond the intervals")
    return [(x, sign * badness) for x, badness in front], verdicts


# Least and largest cost, least and largest badness.
_Box = tuple[float, float, float, float]


def _box(row: Row, cost: Column, metric: Column, sign: int) -> _Box | None:
    x, y = row.figures[cost.key].interval, row.figures[metric.key].interval
    if x is None or y is None:
        return None
    return (*x, *sorted((sign * y[0], sign * y[1])))  # type: ignore[return-value]  # two of two


def _beats(one: _Box, other: _Box) -> bool:
    """Whether ``one`` is better on one axis beyond both intervals, and on the other axis too or exactly equal."""
    return one[1] <= other[0] and one[3] <= other[2] and (one[1] < other[0] or one[3] < other[2])


def _front_line(front: Sequence[tuple[float, float]]) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [x for x, _ in front],
        "y": [y for _, y in front],
        "line": {"color": "#808080", "width": 1.5, "dash": "dot", "shape": "hv"},
        "hoverinfo": "skip",
    }


# ------------------------------------------------------------------------------------------- paired with the baseline


def paired_charts(rows: Sequence[Row], shown: Sequence[Column], style: Styles, baseline: str) -> list[Chart]:
    """The difference in the headline metric and the ratios in cost, paired by seed, with their intervals and tests."""
    metric, energy = headline_metric(shown, rows[0].metric), best_energy(shown, rows)
    by_key = {column.key: column for column in shown}
    costs = ("train_s", energy.key if energy else "", "train_flops", "update_flops", "activation_peak_bytes")
    targets = [key for key in by_key if key.startswith("target/") and is_cost(key)]
    charts = [_difference_chart(rows, metric, style, baseline)] if metric else []
    charts += [_ratio_chart(rows, by_key[key], style, baseline) for key in (*targets, *costs) if key in by_key]
    return [chart for chart in charts if chart.table]


@dataclass(frozen=True)
class _Point:
    """A rule against the baseline, in the unit of its chart."""

    label: str
    pair: PairedDifference
    middle: float
    interval: tuple[float, float] | None


def _difference_chart(rows: Sequence[Row], metric: Column, style: Styles, baseline: str) -> Chart:
    unit = "percentage points" if metric.unit == "%" else metric.unit
    points = []
    for row in rows:
        pair = _pair(row, metric)
        if pair and pair.mean is not None:
            ends = None if pair.lo is None or pair.hi is None else (pair.lo / metric.scale, pair.hi / metric.scale)
            points.append(_Point(row.label, pair, pair.mean / metric.scale, ends))
    axis = f"difference to {baseline}" + (f" ({unit})" if unit else "")
    chart = _interval_chart(
        f"{metric.title}: {axis}", axis, points, style, 0.0, lambda value: metric.difference(value * metric.scale)
    )
    return replace(chart, note=f"Lower is better: left of the line a rule beats {baseline}.") if metric.lower else chart


def _ratio_chart(rows: Sequence[Row], cost: Column, style: Styles, baseline: str) -> Chart:
    points = []
    for row in rows:
        pair = _pair(row, cost)
        if pair and pair.ratio is not None:
            ends = None if pair.ratio_lo is None or pair.ratio_hi is None else (pair.ratio_lo, pair.ratio_hi)
            points.append(_Point(row.label, pair, pair.ratio, ends))
    axis = f"ratio to {baseline}"
    return _interval_chart(f"{cost.title}: {axis}", axis, points, style, 1.0, ratio_text)


def _pair(row: Row, column: Column) -> PairedDifference | None:
    figure = row.figures.get(column.key)
    return figure.paired if figure else None


def _interval_chart(
    title: str,
    axis: str,
    points: Sequence[_Point],
    style: Styles,
    reference: float,
    write: Callable[[float], str],
) -> Chart:
    """Dots with intervals, one line per rule, and a line where there is no difference."""
    data, table = [], []
    names = categories(point.label for point in points)
    for point in points:
        colour, symbol, _ = style[point.label]
        ends, pair = point.interval, point.pair
        span = f"[{write(ends[0])}, {write(ends[1])}]" if ends else f"none, n = {pair.n}"
        # What is the same for every seed (a count, say) is no sample of anything.
        tested = pair.p is not None and not (ends and ends[0] == ends[1])
        ps = [_p(p) if tested else UNKNOWN for p in (pair.p, pair.p_least, pair.p_holm)]
        table.append((point.label, str(pair.n), write(point.middle), span, *ps))
        said = f"<br>sign-flip p {ps[0]} (at least {ps[1]}), Holm {ps[2]}" if tested else ""
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [point.middle],
                "y": [names[point.label]],
                "error_x": _bar(point.middle, ends, 1.0, colour),
                "marker": {"color": colour, "symbol": symbol + ("" if ends else "-open"), "size": 11},
                "text": [
                    f"<b>{plain_text(point.label)}</b><br>{write(point.middle)}<br>95 % interval {span}{said}<br>n = {pair.n}"
                ],
                "hovertemplate": "%{text}<extra></extra>",
                "meta": plain_text(point.label),
                "showlegend": False,
            }
        )
    line = {"type": "line", "x0": reference, "x1": reference, "yref": "paper", "y0": 0, "y1": 1}
    layout = {
        "xaxis": {"title": {"text": plain_text(axis)}},
        "yaxis": {"type": "category", "range": [len(points) - 0.5, -0.5]},
        "shapes": [{**line, "line": {"color": "#808080", "width": 1.5, "dash": "dot"}}],
    }
    heading = axis[:1].upper() + axis[1:]
    header = ("Rule", "Pairs", heading, "95 % interval", "Sign-flip p", "Smallest possible p", "p after Holm")
    return Chart(title, "", figure_of(data, layout), header, table, 100 + rows_height(names.values()))


def _p(p: float | None) -> str:
    return UNKNOWN if p is None else p_text(p)


# ------------------------------------------------------------------------------------------- memory


def memory_charts(rows: Sequence[Row], shown: Sequence[Column], style: Styles) -> list[Chart]:
    """Bars of the peak bytes, from zero."""
    wanted = ("activation_peak_bytes", "allocated_peak_bytes")
    found = [column for column in shown if column.key in wanted]
    return [_bar_chart(rows, c, style) for c in found if sum(c.key in row.figures for row in rows) > 1]


def _bar_chart(rows: Sequence[Row], column: Column, style: Styles) -> Chart:
    known = [row for row in rows if column.key in row.figures]
    names = categories(row.label for row in known)
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "x": [scaled(row.figures[column.key].summary.mean, column)],
            "y": [names[row.label]],
            "meta": plain_text(row.label),
            "marker": {"color": style[row.label][0]},
            "text": [column.number(row.figures[column.key].summary.mean)],
            "textposition": "auto",
            "textangle": 0,
            "hovertemplate": "%{y}<br>%{x}<extra></extra>",
            "showlegend": False,
        }
        for row in known
    ]
    layout = {
        "xaxis": {"title": {"text": plain_text(column.heading)}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "type": "category"},
        "bargap": 0.35,
    }
    table = [(row.label, str((f := row.figures[column.key]).summary.n), column.summary(f)) for row in known]
    header = ("Rule", "Seeds", column.heading)
    return Chart(column.title, "", figure_of(data, layout), header, table, 90 + rows_height(names.values()))


# ------------------------------------------------------------------------------------------- small parts


def figure_of(data: Sequence[Figure], layout: Figure, labels: str = "") -> Figure:
    """A figure for Plotly.

    Args:
        data: its traces; ``meta`` of a trace is the label of the row that it is about, by which the page filters.
        layout: what is not as in every chart.
        labels: where the page writes the traces' names: ``end`` (of their lines), ``point`` (beside their last points), or
            nowhere but in the legend.
    """
    return {"data": list(data), "layout": layout, **({"labels": labels} if labels else {})}


def error_bar(figure: Numbers, scale: float, colour: str) -> Figure:
    return _bar(figure.centre, figure.interval, scale, colour)


def _bar(middle: float | None, interval: tuple[float, float] | None, scale: float, colour: str) -> Figure:
    if middle is None or interval is None:
        return {"visible": False}
    up, down = [(interval[1] - middle) / scale], [(middle - interval[0]) / scale]
    shape = {"type": "data", "symmetric": False, "thickness": 1.5, "width": 5, "color": colour}
    return {**shape, "array": up, "arrayminus": down}


def plain_text(text: str) -> str:
    """Text for Plotly, which reads some markup in labels; one line of it."""
    return escape(" ".join(text.split()))


def clipped(text: str, most: int) -> str:
    """The beginning of a long text, with a sign that there is more."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def wrapped(text: str, width: int = 24) -> str:
    """Text for a category of an axis, in lines of about ``width`` signs: a long name must leave room for the chart."""
    return "<br>".join(escape(line) for line in textwrap.wrap(" ".join(text.split()), width)) or plain_text(text)


def short(labels: Iterable[str]) -> dict[str, str]:
    """Long names cut in the middle, for rows mostly differ at their ends; as far as no two of them become one."""
    found: dict[str, str] = {}
    every = left = list(dict.fromkeys(labels))
    most = _LONG
    while left:
        names = [_cut(label, most) for label in left]
        often = Counter([*found.values(), *names])
        found |= {label: name for label, name in zip(left, names, strict=True) if often[name] == 1}
        left, most = [label for label in left if label not in found], most + 4
    return {label: found[label] for label in every}


def _cut(label: str, most: int) -> str:
    """A name without settings from its middle, or without signs where a single one is too long."""
    if len(label) <= most:
        return label
    first, last = label[: most // 2], label[-(most // 2) :]
    head, tail = first.rpartition(", ")[0], last.partition(", ")[2]
    return f"{f'{head}, ' if head else first}…{f', {tail}' if tail else last}"


def categories(labels: Iterable[str]) -> dict[str, str]:
    """What an axis has for each of these labels: no two the same."""
    return {label: wrapped(name) for label, name in short(labels).items()}


def rows_height(names: Iterable[str], least: int = 36) -> int:
    """Pixels for an axis of these categories, some of which take several lines."""
    return sum(max(least, 17 * (name.count("<br>") + 1) + 8) for name in names)


def cost_axis(title: str, values: Sequence[float | None], times: float) -> Figure:
    """An axis of costs: logarithmic where they are all above 0 and the largest is more than ``times`` the least.

    Its marks are at 1, 2 and 5 or, over many decades, at powers of ten: left alone, Plotly writes digits between them.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    axis: Figure = {"title": {"text": plain_text(title)}}
    if not known or min(known) <= 0 or max(known) / min(known) <= times:
        return axis
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    every = max(1, (high - low) // 8)
    marks = [step * 10.0**power for power in range(low - 1, high + 2, every) for step in steps]
    return axis | {"type": "log", "tickvals": marks, "ticktext": [_mark(mark) for mark in marks]}


def _mark(value: float) -> str:
    return f"{value:,.0f}" if 1 <= value < 1e6 else f"{value:g}"


def scaled(value: float | None, column: Column) -> float | None:
    return None if value is None else value / column.scale


def mean_of(values: Sequence[float]) -> float:
    return math.fsum(value / len(values) for value in values)  # a sum of large ones would overflow


def rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def lower(title: str) -> str:
    return title[:1].lower() + title[1:]


def ramp(i: int, n: int) -> str:
    """A colour for block ``i`` of ``n``, cool for early and warm for late blocks."""
    place = (len(_RAMP) - 1) * (i / (n - 1) if n > 1 else 0.0)
    low = min(int(place), len(_RAMP) - 2)
    a, b = (tuple(int(_RAMP[j][k : k + 2], 16) for k in (1, 3, 5)) for j in (low, low + 1))
    return "#" + "".join(f"{round(x + (y - x) * (place - low)):02x}" for x, y in zip(a, b, strict=True))
