"""What ``locallearn distill`` left beside runs: every student of every depth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from locallearn.records import SHARES, Record, plain_file
from locallearn.report._charts import Chart, figure_of, plain_text, ramp
from locallearn.report._columns import TIMES, UNKNOWN, known_number, metric_title, significant
from locallearn.statistics import Row

_FOLDER = "distilled"
_STUDENTS = 500


def read_distilled(rows: Sequence[Row]) -> tuple[list[Chart], list[str]]:
    """A chart with its table for every run of the page that was distilled; a sentence for each file that cannot be used."""
    charts: list[Chart] = []
    problems: list[str] = []
    for row in rows:
        for record in row.records:
            path = record.path.parent / _FOLDER / record.path.name / "table.json"
            try:
                data = json.loads(plain_file(path).decode("utf-8"))
                if not isinstance(data, dict) or data.get("format") != 1 or data.get("run") != record.id:
                    raise ValueError("it is no table of this run that this version of locallearn has written")
                charts.append(_chart(row, record, data))
            except FileNotFoundError:
                continue
            except (ValueError, RecursionError, OverflowError) as error:
                problems.append(f"{path} is left out ({str(error)[:200]}); locallearn distill writes it anew.")
    return charts, problems


def _chart(row: Row, record: Record, data: Mapping[str, Any]) -> Chart:
    metric = str(data.get("metric"))[:80]
    share = metric in SHARES
    students = data.get("students")
    if not isinstance(students, list) or not students or not all(isinstance(one, Mapping) for one in students):
        raise ValueError("it has no students")
    teacher = students[0]
    table: list[tuple[str, ...]] = []
    lines: dict[str, list[tuple[float, float, int]]] = {}
    for one in students[:_STUDENTS]:
        recipe = one.get("recipe")
        recipe = recipe if isinstance(recipe, Mapping) else None
        size = None if recipe is None else known_number(recipe.get("share"))
        name = "teacher" if recipe is None else f"{str(recipe.get('method'))[:40]}, {significant(size)} of the size"
        test = known_number(_part(one, "test").get(metric))
        params, depth = known_number(one.get("params")), known_number(one.get("depth"))
        if test is not None and params is not None:
            lines.setdefault(name, []).append((params, test * (100 if share else 1), int(depth or 0)))
        figures = [
            f"{100 * value:.2f}" if share and value is not None else significant(value)
            for value in (known_number(_part(one, part).get(metric)) for part in ("validation", "test"))
        ]
        lost = known_number(one.get("lost"))
        ratios = [_ratio(known_number(one.get(key)), known_number(teacher.get(key))) for key in ("bytes", "flops")]
        table.append(
            (
                *(name, str(int(depth or 0)), *figures),
                f"{100 * lost:.2f}" if share and lost is not None else significant(lost),
                *(
                    UNKNOWN if params is None else f"{params:,.0f}",
                    *ratios,
                    _ratio(known_number(one.get("latency_ratio")), 1.0),
                ),
            )
        )
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": plain_text(name),
            "x": [params for params, _, _ in points],
            "y": [test for _, test, _ in points],
            "text": [f"{depth} layers replaced" for _, _, depth in points],
            "line": {"color": ramp(i, len(lines)), "width": 2, "dash": ("solid", "dash", "dot", "dashdot")[i % 4]},
            "marker": {"size": 8, "color": ramp(i, len(lines))},
            "hovertemplate": "%{fullData.name}<br>%{text}<br>%{x:,} numbers: %{y:.4g}<extra></extra>",
        }
        for i, (name, points) in enumerate(lines.items())
    ]
    unit = " (%)" if share else ""
    layout = {
        "xaxis": {"title": {"text": "numbers that inference uses"}},
        "yaxis": {"title": {"text": f"test {plain_text(metric_title(metric))}{unit}"}},
    }
    header = (
        *(
            "Student",
            "Layers replaced",
            f"Validation {metric_title(metric)}{unit}",
            f"Test {metric_title(metric)}{unit}",
        ),
        *("Lost", "Numbers", "Bytes", "FLOPs", "Time"),
    )
    note = f"Layers replaced in closed form, to every depth; bytes, FLOPs and time are ratios to the teacher ({TIMES})."
    return Chart(
        f"Students of {row.label} on {row.place}, seed {record.seed}",
        note,
        figure_of(traces, layout, "end"),
        header,
        table,
        380,
    )


def _part(one: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = one.get(key)
    return found if isinstance(found, Mapping) else {}


def _ratio(value: float | None, by: float | None) -> str:
    return UNKNOWN if value is None or not by else f"{value / by:.3g}{TIMES}"
