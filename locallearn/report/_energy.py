"""Joules: by source, measured and modelled told apart, per run and per sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from locallearn.report._charts import Chart, categories, cost_axis, figure_of, plain_text, rows_height, scaled
from locallearn.report._columns import PER_SAMPLE, UNKNOWN, Column, quality
from locallearn.statistics import Figure, Row, own_figure


def per_sample(row: Row) -> Row:
    """The row with joules per sample that a unit learned from, seed by seed, for every source."""
    samples = row.figures.get("samples")
    if samples is None:
        return row
    found: dict[str, Figure] = {}
    for name, figure in row.figures.items():
        if name.startswith("energy_j/"):
            ratios = {
                seed: ratio
                for seed, joules in figure.by_seed.items()
                if samples.by_seed.get(seed, 0) > 0 and math.isfinite(ratio := joules / samples.by_seed[seed])
            }
            if ratios:
                title = PER_SAMPLE + name.partition("/")[2]
                found[title] = own_figure(title, ratios)
    return replace(row, figures={**row.figures, **found})


def energy_charts(rows: Sequence[Row], shown: Sequence[Column]) -> list[Chart]:
    """Bars of the joules of every source: measured ones filled, modelled ones hatched; per run and per sample below."""
    columns = [column for column in shown if column.key.startswith("energy_j/")]
    if not columns:
        return []
    by_key = {column.key: column for column in shown}
    # One unit for all, so that bars of sources can be held against each other.
    unit = max(columns, key=lambda column: column.scale)
    data: list[dict[str, Any]] = []
    table = []
    names = categories(row.label for row in rows)
    for number, column in enumerate(columns):
        source = column.key.partition("/")[2]
        word = quality(source, rows)
        measured = word == "measured"
        known = [row for row in rows if column.key in row.figures]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": plain_text(f"{source}, {word}"),
                "x": [scaled(row.figures[column.key].summary.mean, unit) for row in known],
                "y": [names[row.label] for row in known],
                "marker": {
                    "color": _SHADES[number % len(_SHADES)],
                    "pattern": {
                        "shape": "" if measured else "/",
                        "fillmode": "overlay",
                        "fgcolor": "#fff",
                        "size": 6,
                        "solidity": 0.25,
                    },
                },
                "hovertemplate": "%{y}<br>%{fullData.name}<br>%{x:.4g} " + unit.unit + "<extra></extra>",
            }
        )
        each, net = by_key.get(PER_SAMPLE + source), by_key.get(f"energy_net_j/{source}")
        for row in known:
            said = [
                f"{one.summary(row.figures[one.key])} {one.unit}" if one and one.key in row.figures else UNKNOWN
                for one in (column, net, each)
            ]
            table.append((row.label, source, word, str(row.figures[column.key].summary.n), *said))
    layout = {
        "xaxis": cost_axis(f"joules per run ({unit.unit})", [x for trace in data for x in trace["x"] if x], 50),
        "yaxis": {"autorange": "reversed", "type": "category"},
        "barmode": "group",
        "bargap": 0.3,
    }
    kinds = {quality(column.key.partition("/")[2], rows).partition(" ")[0] for column in columns}
    note = "Filled bars are measured, hatched ones modelled; sources overlap in part and are never added up."
    if kinds == {"modelled"}:
        note += " Nothing here was measured: these joules follow from time and an assumed power."
    header = ("Rule", "Source", "Quality", "Runs", "Joules per run", "Net of idle", "Joules per sample")
    height = 100 + rows_height(names.values(), 14 * len(columns) + 14)
    return [Chart("Energy by source", note, figure_of(data, layout), header, table, height)]


_SHADES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
