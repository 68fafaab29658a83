"""Cost to a target, run by run: who arrived when, and who had spent how much without arriving."""

from __future__ import annotations

from collections.abc import Sequence

from locallearn.report._charts import Chart, categories, cost_axis, figure_of, plain_text, rows_height
from locallearn.report._columns import AT_LEAST, Column
from locallearn.report._styles import Styles
from locallearn.statistics import Row

_COSTS = ("target/seconds", "target/joules", "target/samples")


def target_charts(rows: Sequence[Row], shown: Sequence[Column], style: Styles) -> list[Chart]:
    """A dot per seed where it reached the target; an open arrow at what it had spent where it did not (censored)."""
    columns = [column for column in shown if column.key.startswith(_COSTS)]
    charts = [_chart(rows, column, style) for column in columns]
    return [chart for chart in charts if chart.table]


def _chart(rows: Sequence[Row], column: Column, style: Styles) -> Chart:
    data, table, values = [], [], []
    names = categories(row.label for row in rows if column.key in row.figures)
    for row in rows:
        figure = row.figures.get(column.key)
        if figure is None:
            continue
        arrived = {record.seed for record in row.records if record.arrived}
        colour, symbol, _ = style[row.label]
        for reached in (True, False):
            seeds = [seed for seed in figure.by_seed if (seed in arrived) == reached]
            if not seeds:
                continue
            xs = [figure.by_seed[seed] / column.scale for seed in seeds]
            values += xs
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": plain_text(row.label if reached else f"{row.label}, not reached"),
                    "meta": plain_text(row.label),
                    "x": xs,
                    "y": [names[row.label]] * len(xs),
                    "marker": {
                        "color": colour,
                        "symbol": symbol if reached else "triangle-right-open",
                        "size": 10,
                        "opacity": 0.8,
                        "line": {"width": 1 if reached else 2},
                    },
                    "text": [f"seed {seed}{'' if reached else ': not reached by then'}" for seed in seeds],
                    "hovertemplate": "%{y}<br>%{text}<br>%{x:.4g} " + column.unit + "<extra></extra>",
                    "showlegend": False,
                }
            )
        each = ", ".join(
            f"{'' if seed in arrived else AT_LEAST + ' '}{column.number(value)} (seed {seed})"
            for seed, value in figure.by_seed.items()
        )
        table.append((row.label, str(figure.arrivals or ""), column.summary(figure), each))
    axis = cost_axis(column.heading, values, 30)
    layout = {
        "xaxis": axis if "type" in axis else axis | {"rangemode": "tozero"},
        "yaxis": {"type": "category", "autorange": "reversed"},
    }
    note = (
        "A mark per seed: where it reached the target, or, as an open arrow, all that it had spent without reaching it. Such a "
        "run's cost is larger by an unknown amount, and a mean that counts it is a least value."
    )
    header = ("Rule", "Reached", f"Mean, {column.qualifier or 'samples'}", "Every seed")
    height = 100 + rows_height(names.values(), 38)
    return Chart(f"{column.title}, seed by seed", note, figure_of(data, layout), header, table, height)
