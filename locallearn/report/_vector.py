"""The page's charts drawn by matplotlib, as vector pictures: no browser is needed, and a paper can take them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import unescape
from pathlib import Path
from typing import Any

from locallearn.report._charts import Chart

_MARKERS = {
    **{"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v", "star": "*"},
    **{"hexagon": "h", "cross": "P", "x": "X", "pentagon": "p", "triangle-right": ">"},
}
_DASHES: Mapping[str, Any] = {
    **{"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (8, 3))},
    "longdashdot": (0, (8, 2, 2, 2)),
}
_LEGEND = 25  # names below a picture


def draw(chart: Chart, stem: Path) -> list[Path]:
    """Writes a chart as ``<stem>.svg`` and ``<stem>.pdf``; text stays text, and the same chart gives the same file.

    Args:
        chart: as the page draws it.
        stem: path without an ending.

    Returns:
        Both files.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    look = {
        **{"svg.fonttype": "none", "svg.hashsalt": "locallearn", "pdf.fonttype": 42, "font.size": 9},
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dde1e6"},
        **{"axes.axisbelow": True, "text.parse_math": False, "hatch.linewidth": 0.8, "hatch.color": "white"},
    }
    paths = []
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(6.4, max(2.2, chart.height / 110)), layout="constrained")
        _draw(figure, chart.figure)
        # The layout is worked out once for both files.
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for end, canvas in (("svg", FigureCanvasSVG), ("pdf", FigureCanvasPdf)):
            path = stem.with_name(f"{stem.name}.{end}")
            when = {"Date": None} if end == "svg" else {"CreationDate": None, "ModDate": None}
            canvas(figure).print_figure(path, metadata=when)
            paths.append(path)
    return paths


def _draw(figure: Any, chart: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    layout = chart["layout"]
    names = _categories(chart["data"], layout)
    # A heatmap is drawn cell by cell, whatever its rows and columns are called: what lies on it has its place by their names.
    maps = [[str(v) for v in trace[key]] for trace in chart["data"] if trace["type"] == "heatmap" for key in ("x", "y")]
    across, down = maps[:2] or ([], names)
    bars = [trace for trace in chart["data"] if trace["type"] == "bar"]
    for trace in chart["data"]:
        kind = trace["type"]
        if kind == "heatmap":
            _heatmap(figure, axes, trace)
        elif kind == "bar":
            _bars(axes, trace, bars.index(trace), len(bars), names)
        else:
            _scatter(axes, trace, across, down)
    _axes(axes, layout, names)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1 or (labels and chart.get("labels")):
        title = f"the first {_LEGEND} of {len(labels)} names" if len(labels) > _LEGEND else None
        look = {"loc": "outside lower center", "ncols": 2, "frameon": False, "fontsize": 8, "title_fontsize": 8}
        figure.legend(handles[:_LEGEND], labels[:_LEGEND], title=title, **look)


def _categories(traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> list[str]:
    """The categories of the vertical axis from top to bottom; empty where it has numbers."""
    if layout.get("yaxis", {}).get("type") != "category":
        return []
    return list(dict.fromkeys(str(y) for trace in traces for y in trace["y"]))


def _place(values: Sequence[Any], names: Sequence[str]) -> list[Any]:
    return [names.index(str(value)) for value in values] if names else [_nan(value) for value in values]


def _nan(value: Any) -> Any:
    return float("nan") if value is None else value


def _scatter(axes: Any, trace: Mapping[str, Any], across: Sequence[str], down: Sequence[str]) -> None:
    x, y = _place(trace["x"], across), _place(trace["y"], down)  # None: a gap in the line
    marker, line, mode = trace.get("marker", {}), trace.get("line", {}), trace["mode"]
    colour = line.get("color") or marker.get("color") or "#808080"
    if "fill" in trace:  # the upper edge of a band was the trace before
        upper = axes.locallearn_edge
        axes.fill_between(
            x, upper, y, color=colour if line.get("color") else trace["fillcolor"][:7], alpha=0.18, linewidth=0
        )
        return
    if line.get("width") == 0:
        axes.locallearn_edge = y
        return
    symbols = marker.get("symbol", "circle")
    shown = trace.get("name") if trace.get("showlegend") is not False else None
    label = plain(shown) if shown else "_nolegend_"
    if not isinstance(symbols, str):
        for one, px, py in zip(symbols, x, y, strict=True):
            axes.plot(
                [px],
                [py],
                color=colour,
                marker=_MARKERS.get(one.removesuffix("-open"), "o"),
                linestyle="none",
                label=label,
            )
            label = "_nolegend_"
        return
    style = {
        "color": colour,
        "alpha": trace.get("opacity", marker.get("opacity")),
        "linestyle": _DASHES.get(line.get("dash", "solid"), "-") if "lines" in mode else "none",
        "linewidth": line.get("width", 1.5) * 0.75,
        "label": label,
    }
    if "markers" in mode:
        style |= {
            "marker": _MARKERS.get(symbols.removesuffix("-open"), "o"),
            "markersize": marker.get("size", 6) * 0.6,
            "markerfacecolor": "none" if symbols.endswith("-open") else colour,
        }
    if line.get("shape") == "hv":
        style["drawstyle"] = "steps-post"
    axes.plot(x, y, **style)
    for key in ("error_x", "error_y"):
        bar = trace.get(key, {})
        if "array" in bar:
            ends = [bar.get("arrayminus", bar["array"]), bar["array"]]
            axes.errorbar(
                x, y, **{key.replace("error_", "") + "err": ends}, fmt="none", ecolor=colour, elinewidth=1, capsize=2
            )


def _bars(axes: Any, trace: Mapping[str, Any], number: int, of: int, names: Sequence[str]) -> None:
    # Bars of one category stand below each other, unless every trace has one of its own.
    alone = "name" not in trace
    high = 0.7 if alone else 0.8 / of
    y = [place + (0 if alone else (number - (of - 1) / 2) * high) for place in _place(trace["y"], names)]
    hatch = "///" if trace["marker"].get("pattern", {}).get("shape") else None
    label = plain(trace["name"]) if not alone else "_nolegend_"
    found = axes.barh(
        y, [_nan(v) for v in trace["x"]], height=high, color=trace["marker"]["color"], hatch=hatch, label=label
    )
    if "text" in trace:
        axes.bar_label(found, labels=[str(text) for text in trace["text"]], padding=3, fontsize=8)


def _heatmap(figure: Any, axes: Any, trace: Mapping[str, Any]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    z = [[_nan(value) for value in line] for line in trace["z"]]
    diverging = trace.get("zmin", 0) < 0
    colours = ["#D55E00", "#FFFFFF", "#0072B2"] if diverging else ["#FFFFFF", "#0072B2"]
    scheme = LinearSegmentedColormap.from_list("locallearn", colours)
    image = axes.imshow(
        z, aspect="auto", cmap=scheme, vmin=trace.get("zmin"), vmax=trace.get("zmax"), interpolation="nearest"
    )
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, fraction=0.03)
    for values, put in ((trace["x"], axes.set_xticks), (trace["y"], axes.set_yticks)):
        step = max(1, len(values) // 12)
        put(range(0, len(values), step), [plain(str(v)) for v in values[::step]])


def _axes(axes: Any, layout: Mapping[str, Any], names: Sequence[str]) -> None:
    for key in ("x", "y"):
        axis = layout.get(f"{key}axis", {})
        if axis.get("type") == "log":
            getattr(axes, f"set_{key}scale")("log")
        if text := axis.get("title", {}).get("text"):
            getattr(axes, f"set_{key}label")(plain(text))
        if "range" in axis and not (names and key == "y"):
            getattr(axes, f"set_{key}lim")(*axis["range"])
        if "tickvals" in axis:
            getattr(axes, f"set_{key}ticks")(axis["tickvals"], [plain(text) for text in axis["ticktext"]], fontsize=8)
        if axis.get("visible") is False:
            getattr(axes, f"{key}axis").set_visible(False)
    if names:
        axes.set_yticks(range(len(names)), [plain(name) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
    for shape in layout.get("shapes", []):
        if shape.get("yref") == "paper":
            axes.axvline(shape["x0"], color="#808080", linewidth=1, linestyle=":")
        else:
            axes.axhline(shape["y0"], color="#808080", linewidth=shape["line"].get("width", 1), linestyle=":")
    for note in layout.get("annotations", []):
        axes.annotate(
            plain(note["text"]),
            (note["x"], note["y"]),
            xytext=(note.get("xshift", 0), note.get("yshift", 0)),
            textcoords="offset points",
            fontsize=7,
            va="center",
        )


def plain(text: str) -> str:
    """What Plotly's markup says, as plain text in lines."""
    return unescape(re.sub(r"<[^>]*>", "", text.replace("<br>", "\n")))
