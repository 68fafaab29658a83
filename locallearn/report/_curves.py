"""Charts of what was learned when: over epochs, over seconds, over forward passes, block by block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from locallearn.records import Record
from locallearn.report._charts import (
    Chart,
    Curves,
    Figure,
    cost_axis,
    figure_of,
    lower,
    mean_of,
    plain_text,
    ramp,
    rounded,
)
from locallearn.report._columns import UNKNOWN, Column, metric_column, significant
from locallearn.report._styles import Style, Styles
from locallearn.statistics import Row

LOSS, SECONDS, PASSES = "validation/loss", "cost/train_s", "cost/forward_passes"
"""Curves of a run: two that it logged, and one that is worked out from its record (:func:`passes_by`)."""
JOULES = "cost/energy_j/"
"""Beginning of the names of further ones: joules by source."""


def metric_chart(rows: Sequence[Row], curves: Sequence[Curves], style: Styles, points: int) -> Chart | None:
    """The validation metric over epochs: the mean over seeds, and the range of the seeds behind it."""
    name = f"validation/{rows[0].metric.name}"
    metric = metric_column(name, rows)
    data: list[Figure] = []
    series: dict[str, Mapping[int, Sequence[float]]] = {}
    for row, known in zip(rows, curves, strict=True):
        if name not in known:
            continue
        series[row.label] = known[name]
        data += _band(row.label, known[name], metric, style[row.label], points)
    if not series:
        return None
    layout = {"xaxis": _epoch_axis(series), "yaxis": {"title": {"text": plain_text(lower(metric.heading))}}}
    header, table = _curve_table(
        series,
        points,
        lambda values: _value(metric, values),
    )
    note = f"Mean over the seeds that reached the epoch; the band spans them.{_thinned(series.values(), points)}"
    return Chart(
        f"{metric.title} over epochs", note, figure_of(data, layout, "end"), header, table, _height(len(series))
    )


def _height(lines: int) -> int:
    """Room for the names of so many lines beside their ends, up to where only the legend can name them."""
    return max(360, min(620, 120 + 16 * lines))


def _band(label: str, values: Mapping[int, Sequence[float]], metric: Column, look: Style, points: int) -> list[Figure]:
    epochs = thin(sorted(values), points)
    factor = 1 / metric.scale
    line = {"type": "scatter", "mode": "lines", "x": epochs, "meta": plain_text(label)}
    edge = {**line, "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    band = [
        {**edge, "y": [rounded(factor * max(values[epoch])) for epoch in epochs]},
        {
            **edge,
            "y": [rounded(factor * min(values[epoch])) for epoch in epochs],
            "fill": "tonexty",
            "fillcolor": f"{look.colour}2e",
        },
    ]
    mean = {
        **line,
        "name": plain_text(label),
        "y": [rounded(factor * mean_of(values[epoch])) for epoch in epochs],
        "line": {"color": look.colour, "width": 2, "dash": look.dash},
        "hovertemplate": "%{fullData.name}<br>epoch %{x}: "
        + ("%{y:.2f} %" if metric.unit == "%" else "%{y:.4g}")
        + "<extra></extra>",
    }
    spread = any(len(values[epoch]) > 1 for epoch in epochs)
    return [*(band if spread else []), _dotted_when_single(mean, epochs)]


_WIDE = 8  # curves whose numbers stand side by side

# What a training has cost by an epoch: the curve's name, and how the axis is headed.
_SPENT = {
    SECONDS: "training time (s)",
    PASSES: "forward passes of the training set",
}


def loss_charts(rows: Sequence[Row], curves: Sequence[Curves], style: Styles, points: int) -> list[Chart]:
    """The validation loss against what the training had cost by then.

    Drawn where a rule without a backward pass is among the rows.
    """
    if all(row.newest.text("locality") != "forward-only" for row in rows):
        return []
    loss = Column(LOSS, "Validation loss", "", 1.0, 4, lower=True)
    found = (_spent_chart(rows, curves, style, points, loss, spent, axis) for spent, axis in _SPENT.items())
    return [chart for chart in found if chart is not None]


def spent_charts(
    rows: Sequence[Row], curves: Sequence[Curves], style: Styles, points: int, energy: Column | None
) -> list[Chart]:
    """The validation metric against seconds, and against the joules of the source that the charts show.

    Args:
        rows: of a section.
        curves: of every row.
        style: of every label.
        points: most points of a line.
        energy: the source's column, ``None`` for none.
    """
    metric = metric_column(f"validation/{rows[0].metric.name}", rows)
    spent = {SECONDS: "training time (s)"}
    if energy is not None:
        source = energy.key.partition("/")[2]
        spent[f"{JOULES}{source}"] = f"joules ({energy.title.partition(', ')[2]})"
    found = (_spent_chart(rows, curves, style, points, metric, name, axis) for name, axis in spent.items())
    return [chart for chart in found if chart is not None]


def _spent_chart(
    rows: Sequence[Row],
    curves: Sequence[Curves],
    style: Styles,
    points: int,
    metric: Column,
    spent: str,
    axis: str,
) -> Chart | None:
    """A figure of the validation part against what a training had cost by then, both as means over seeds."""
    data: list[Figure] = []
    table = []
    every: list[list[int]] = []
    pick = min if metric.lower else max
    for row, known in zip(rows, curves, strict=True):
        values, costs = known.get(metric.key, {}), known.get(spent, {})
        # Where some seeds have ended already, both means would be of others than before.
        both = [epoch for epoch in _reached_by_all(values) if len(values[epoch]) == len(costs.get(epoch, ()))]
        epochs = thin(both, points)
        if not epochs:
            continue
        every.append(both)
        colour, symbol, dash = style[row.label]
        trace = {
            "type": "scatter",
            "mode": "lines+markers",
            "name": plain_text(row.label),
            "meta": plain_text(row.label),
            "x": [rounded(mean_of(costs[epoch])) for epoch in epochs],
            "y": [rounded(mean_of(values[epoch]) / metric.scale) for epoch in epochs],
            "line": {"color": colour, "width": 2, "dash": dash},
            "marker": {"color": colour, "symbol": symbol, "size": 6},
            "hovertemplate": "%{fullData.name}<br>%{x:.4g}: %{y:.4g}<extra></extra>",
        }
        data.append(trace)
        last, best = both[-1], pick(both, key=lambda epoch: mean_of(values[epoch]))
        told = [text for at in (best, last) for text in (_value(metric, values[at]), significant(mean_of(costs[at])))]
        table.append((row.label, str(len(values[last])), *told))
    if not data:
        return None
    name = lower(metric.title)
    layout = {
        "xaxis": cost_axis(axis, [value for trace in data for value in trace["x"] if value], 30),
        "yaxis": {"title": {"text": plain_text(name if metric.key == LOSS else lower(metric.heading))}},
    }
    note = f"Mean over the seeds, as far as all of them came, a marker for every validation.{_thinned(every, points)}"
    if spent == PASSES:
        note += (
            " A forward pass is the operations (FLOPs) of inference on every training sample once, as far as counted."
        )
    best_of = "Lowest loss" if metric.key == LOSS else f"{'Lowest' if metric.lower else 'Highest'} {name}"
    last_of = "Last loss" if metric.key == LOSS else f"Last {name}"
    header = ("Rule", "Seeds", best_of, f"At {axis}", last_of, f"At {axis}")
    figure = figure_of(data, layout, "end")
    return Chart(f"{metric.title} against {axis}", note, figure, header, table, _height(len(data)))


def _reached_by_all(values: Mapping[int, Sequence[float]]) -> list[int]:
    """Epochs with a value of every seed."""
    seeds = max((len(of) for of in values.values()), default=0)
    return [epoch for epoch, of in sorted(values.items()) if len(of) == seeds]


def _of_all_seeds(curves: Curves) -> Curves:
    """The curves without the epochs that only some seeds reached: a mean there is one of others than before."""
    return {name: {epoch: values[epoch] for epoch in _reached_by_all(values)} for name, values in curves.items()}


def _value(metric: Column, values: Sequence[float]) -> str:
    return f"{100 * mean_of(values):.2f}" if metric.unit == "%" else significant(mean_of(values))


def passes_by(record: Record, step: int) -> float | None:
    """Operations spent on training up to a step, in forward passes over the training set.

    Returns:
        So many times the operations of inference on what is learned from in an epoch; ``None`` where the record does not say.
    """
    cost = record.part("cost")
    stages, forward = cost.get("stages"), cost.get("inference_flops")
    epochs = record.data.get("epochs")
    if not isinstance(stages, list) or not isinstance(epochs, list):
        return None
    spent, before, samples = 0.0, 0.0, 0.0
    try:
        for stage in stages:
            steps = float(stage["steps"])
            share = min(1.0, max(0.0, (step - before) / steps)) if steps > 0 else 1.0
            spent += share * float(stage["train_flops"])
            before += steps
            # Those that came by in all its epochs; cost.samples is a mean over stages, of what a rule passes on.
            samples += float(stage["samples"])
        passes = spent / (float(str(forward)) * samples / sum(map(float, epochs)))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return passes if 0 <= passes < float("inf") else None


def block_charts(row: Row, curves: Curves, points: int, whose: str = "") -> list[Chart]:
    """Loss of every block and further unit and probe accuracy of every block over epochs, mean over seeds.

    ``whose`` stands in the titles instead of the row's label.
    """
    charts = []
    curves = _of_all_seeds(curves)
    units = {
        name.removeprefix("unit/").removesuffix("/loss"): of for name, of in curves.items() if name.startswith("unit/")
    }
    for suffix, title, axis, factor in (
        ("loss", "local loss per block", "loss", 1.0),
        ("probe_accuracy", "probe accuracy per block", "probe accuracy (%)", 100.0),
    ):
        series = {
            block: curves[name] for block in _block_names(row, curves) if (name := f"block/{block}/{suffix}") in curves
        }
        if suffix == "loss" and units:
            title = "local loss per block and unit" if series else "loss per unit"
            series |= units
        if series:
            charts.append(_block_chart(f"{whose or row.label}: {title}", axis, series, factor, points))
    return charts


def layer_charts(row: Row, curves: Curves, points: int, whose: str = "") -> list[Chart]:
    """The rule's own figures of every layer over epochs, mean over seeds: one chart per figure, latest values below."""
    figures: dict[str, dict[str, Mapping[int, Sequence[float]]]] = {}
    for name, values in _of_all_seeds(curves).items():
        layer, _, figure = name.removeprefix("layer/").rpartition("/")
        if name.startswith("layer/") and layer:
            figures.setdefault(figure, {})[layer] = values
    charts = []
    for figure, series in figures.items():
        words = figure.replace("_", " ")
        axis = f"{words} (degrees)" if words.endswith("angle") else words
        chart = _block_chart(f"{whose or row.label}: {words} per layer", axis, series, 1.0, points, "layer")
        latest = [
            (layer, str(max(values)), significant(mean_of(values[max(values)]))) for layer, values in series.items()
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
            "name": plain_text(block),
            "x": epochs,
            "y": [rounded(factor * mean_of(values[epoch])) for epoch in epochs],
            "line": {"color": ramp(i, len(series)), "width": 2, "dash": ("solid", "dash", "dot", "dashdot")[i % 4]},
            "hovertemplate": what + " %{fullData.name}<br>epoch %{x}: %{y:.4g}<extra></extra>",
        }
        data.append(_dotted_when_single(trace, epochs))
    layout = {"xaxis": _epoch_axis(series), "yaxis": {"title": {"text": plain_text(axis)}}}
    header, table = _curve_table(series, points, lambda values: significant(factor * mean_of(values)))
    note = _thinned(series.values(), points).strip()
    return Chart(title, note, figure_of(data, layout, "end"), header, table, _height(len(series)))


def _block_names(row: Row, curves: Curves) -> list[str]:
    """Blocks in the network's order, then those that only the metrics know."""
    logged = [name.split("/", 1)[1].rpartition("/")[0] for name in curves if name.startswith("block/")]
    listed = row.newest.data.get("blocks")
    first = [str(name) for name in listed] if isinstance(listed, list) else []
    return list(dict.fromkeys([name for name in first if name in logged] + logged))


def _curve_table(
    series: Mapping[str, Mapping[int, Sequence[float]]], points: int, write: Callable[[Sequence[float]], str]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The numbers of curves: a line per epoch, or of many curves a line each with some of the epochs."""
    epochs = thin(sorted({epoch for values in series.values() for epoch in values}), points)
    if len(series) > _WIDE and len(epochs) > _WIDE:
        some = thin(epochs, _WIDE)
        turned = [
            (name, *(write(values[epoch]) if epoch in values else UNKNOWN for epoch in some))
            for name, values in series.items()
        ]
        return ("Curve", *(f"Epoch {epoch}" for epoch in some)), turned
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


def _thinned(curves: Iterable[Collection[int]], points: int) -> str:
    """What is to be said where curves have more epochs than are drawn."""
    return f" Of long curves {points} epochs are drawn." if any(len(epochs) > points for epochs in curves) else ""


def _dotted_when_single(trace: Figure, epochs: Sequence[int]) -> Figure:
    return {**trace, "mode": "lines+markers"} if len(epochs) == 1 else trace
