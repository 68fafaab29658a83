"""Pieces of the page: tables that sort, charts with their legends and numbers, sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from locallearn.report._charts import Chart

_LEGEND = 40  # names under a chart
_ROWS = 25  # of a table before a button shows the others; the style sheet knows it, too


@dataclass
class Book:
    """What the page draws and lists, in order: for the page's script, and for those who want files of it.

    Attributes:
        section: what comes next belongs to it.
        charts: section and chart.
        tables: section, title, heading and lines of the tables that are no chart's.
        files: folder of the figures' files relative to the page, empty where there are none.
    """

    section: str = ""
    charts: list[tuple[str, Chart]] = field(default_factory=list)
    tables: list[tuple[str, str, Sequence[str], list[Sequence[str]]]] = field(default_factory=list)
    files: str = ""

    @property
    def figures(self) -> list[Mapping[str, Any]]:
        """For the page's script."""
        return [chart.figure for _, chart in self.charts]

    def grid(self, charts: Sequence[Chart]) -> str:
        """Charts side by side."""
        return f'<div class="grid">{"".join(map(self._figure, charts))}</div>'

    def table(self, title: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
        """A table of its own, which is written as a file, too."""
        known = list(lines)
        self.tables.append((self.section, title, header, known))
        return plain_table(header, known, title, "cards wide")

    def _figure(self, chart: Chart) -> str:
        number = len(self.charts)
        self.charts.append((self.section, chart))
        note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
        return (
            f'<figure id="c{number}"><h4>{escape(chart.title)}</h4>{note}'
            f'<div class="chart" data-chart="{number}" role="img" aria-label="Chart: {escape(chart.title)}; '
            f'the numbers are in the table below" style="height:{chart.height}px"></div>{_legend(chart)}'
            f"<details><summary>Numbers</summary>{self._links(number)}"
            f"{plain_table(chart.header, chart.table, chart.title)}</details></figure>"
        )

    def _links(self, number: int) -> str:
        if not self.files:
            return ""
        stem = f"{self.files}/{file_name(number, *self.charts[number])}"
        kinds = (("svg", "SVG"), ("pdf", "PDF"), ("csv", "CSV"), ("tex", "LaTeX"))
        links = (f'<a href="{escape(stem)}.{end}">{word}</a>' for end, word in kinds)
        return f'<p class="note">This figure as {" · ".join(links)}</p>'


def file_name(number: int, section: str, chart: Chart) -> str:
    """Name of a chart's files, without an ending: what it shows, in letters that every system and every LaTeX takes."""
    return f"{number:03d}-{slug(section, 40)}-{slug(chart.title, 60)}"


def slug(text: str, most: int) -> str:
    """Letters, digits and hyphens."""
    words = "".join(sign if sign.isascii() and sign.isalnum() else " " for sign in text.lower()).split()
    return "-".join(words)[:most].strip("-") or "x"


def _legend(chart: Chart) -> str:
    """The names of a chart's traces with their line and marker, for charts that do not write them beside the lines."""
    items: dict[str, str] = {}
    for trace in chart.figure["data"]:
        if "name" in trace and trace.get("showlegend") is not False and trace["type"] in ("scatter", "bar"):
            items.setdefault(trace["name"], _sign(trace))
    if not items:
        return ""
    listed = "".join(f"<li>{sign}{name}</li>" for name, sign in list(items.items())[:_LEGEND])
    more = f"<li>and {len(items) - _LEGEND} more</li>" if len(items) > _LEGEND else ""
    return f'<ul class="legend">{listed}{more}</ul>'


_STROKES = {"dash": "5 3", "dot": "1.5 2.5", "dashdot": "5 2 1.5 2", "longdash": "8 3", "longdashdot": "8 2 1.5 2"}
_MARKS = {
    "circle": "M11 2a4 4 0 1 1 0 8a4 4 0 1 1 0-8z",
    "square": "M7.5 2.5h7v7h-7z",
    "diamond": "M11 1l5 5l-5 5l-5-5z",
    "triangle-up": "M11 2l4.6 8h-9.2z",
    "triangle-down": "M11 10l4.6-8h-9.2z",
    "star": "M11 1l1.5 3.4l3.6.4l-2.7 2.4l.8 3.6l-3.2-1.9l-3.2 1.9l.8-3.6l-2.7-2.4l3.6-.4z",
    "hexagon": "M7 3.8l4-2.3l4 2.3v4.5l-4 2.3l-4-2.3z",
    "cross": "M9.5 2h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z",
    "x": "M8 1.5l3 3l3-3l1.5 1.5l-3 3l3 3l-1.5 1.5l-3-3l-3 3l-1.5-1.5l3-3l-3-3z",
    "pentagon": "M11 1.5l4.5 3.3l-1.7 5.2h-5.6l-1.7-5.2z",
}


def _sign(trace: Mapping[str, Any]) -> str:
    """A trace's line and marker, small."""
    marker = trace.get("marker", {})
    colour = trace.get("line", {}).get("color") or marker.get("color")
    colour = colour if isinstance(colour, str) else "#808080"
    parts = ""
    if trace["type"] == "bar":
        hatched = marker.get("pattern", {}).get("shape")
        parts = f'<path d="M5 1.5h12v9h-12z" fill="{colour}"{_HALF if hatched else ""}/>'
        parts += '<path d="M6 10l6-8M11 10l6-8" stroke="#fff" stroke-width="1.3"/>' if hatched else ""
    elif "lines" in trace["mode"]:
        dash = _STROKES.get(trace["line"].get("dash", ""), "")
        parts += f'<path d="M0 6h22" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
    if trace["type"] == "scatter" and "markers" in trace["mode"]:
        symbol = marker.get("symbol", "circle")
        symbol = symbol if isinstance(symbol, str) else "circle"
        shape = _MARKS.get(symbol.removesuffix("-open"), _MARKS["circle"])
        fill = "none" if symbol.endswith("-open") else colour
        parts += f'<path d="{shape}" fill="{fill}" stroke="{colour}" stroke-width="1.4"/>'
    return f'<svg width="22" height="12" viewBox="0 0 22 12" aria-hidden="true">{parts}</svg>'


_HALF = ' opacity=".85"'


def plain_table(header: Sequence[str], lines: Iterable[Sequence[str]], label: str, names: str = "") -> str:
    """A table of texts that can be sorted."""
    head = "".join(f'<th scope="col">{escape(word)}</th>' for word in header)
    body = "".join(
        f'<tr><th scope="row">{escape(line[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in line[1:])}</tr>'
        for line in lines
    )
    return scrolled(f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>", label, names)


def scrolled(inner: str, label: str, names: str = "", attributes: str = "") -> str:
    """A table in a place of its own, which scrolls sideways if it must and never downwards: of many rows the first are shown.

    Args:
        inner: its head and body.
        label: for those who cannot see it.
        names: classes.
        attributes: others.
    """
    rows = inner.count("<tr") - 1
    names = f"{names} short".strip() if rows > _ROWS else names
    kind = f' class="{names}"' if names else ""
    more = f'<button type="button" class="all">Show all {rows} rows</button>' if rows > _ROWS else ""
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">'
        f"<table{kind}{attributes}>{inner}</table></div>{more}"
    )


def count(n: int, word: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{n} {word}" + ("" if n == 1 else "s")


def texts(value: Any) -> list[str]:
    """The items of a list as texts; of anything else none."""
    return [str(item) for item in value] if isinstance(value, list) else []
