"""What ``locallearn analyze`` found, as charts: read from its files, whatever they hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locallearn.records import ANALYSIS, Record, plain_file
from locallearn.report._charts import Chart, Figure, figure_of, plain_text, ramp
from locallearn.report._columns import UNKNOWN
from locallearn.report._styles import Styles
from locallearn.statistics import Row

_NOISE = 0.44
"""Hoyer's measure of rectified Gaussian noise in a wide layer: (1 - 0.564) and a little more where it is narrower."""
_SHOWN = {
    "plain": "as they are",
    "true": "with the true label in the input",
    "neutral": "with the neutral label in the input",
}
_CLASSES, _COLUMNS, _LINES, _LAYERS = 1000, 5000, 20_000, 2000  # most of each that a file may hold
_BUDGET = 600_000  # numbers in maps and matrices on one page
_DETAILED = 12  # layers of a run that are shown one by one
_SCALE = [[0.0, "rgba(0,114,178,0.04)"], [0.5, "rgba(0,114,178,0.55)"], [1.0, "#0072B2"]]
_DIVERGING = [[0.0, "#D55E00"], [0.5, "rgba(128,128,128,0.08)"], [1.0, "#0072B2"]]


@dataclass(frozen=True)
class Layer:
    """What is known of one layer; numbers that are ``None`` are unknown."""

    name: str
    units: int
    hoyer: float | None
    undefined: int
    by_class: Sequence[float | None]
    maximum: float | None
    never_active: float
    sizes: Sequence[int]
    overlap: Sequence[Sequence[int]]
    unique: Sequence[int]
    shared: int
    columns: Sequence[int]
    profile: Sequence[Sequence[int]]
    members: Sequence[Sequence[int]]
    map_labels: Sequence[int]
    map_values: Sequence[Sequence[int]]
    probe: float | None
    probe_unseen: float | None


@dataclass(frozen=True)
class Shown:
    """Layers as seen with one label in the input, and the samples of every class that they were seen on."""

    label: str
    counts: Sequence[int]
    layers: Sequence[Layer]


@dataclass(frozen=True)
class Analysis:
    """One analysed run."""

    record: Record
    name: str
    colour: str
    symbol: str
    part: str
    accuracy: float
    samples: int
    tau: float
    only_right: bool
    unseen: Sequence[int]
    shown: Sequence[Shown]


@dataclass(frozen=True)
class Likeness:
    """Layers of some runs, compared with each other."""

    rows: Sequence[tuple[str, str]]
    cka: Sequence[Sequence[float | None]]
    rsa: Sequence[Sequence[float | None]]
    samples: int
    pairs_of: int
    only_right: bool
    part: str


def read_analyses(rows: Sequence[Row], style: Styles) -> tuple[list[Analysis], list[Likeness], list[str]]:
    """Analyses of the runs of a page and of several of them together; a sentence for each that cannot be used."""
    runs: dict[str, tuple[Row, Record]] = {record.id: (row, record) for row in rows for record in row.records}
    found: list[Analysis] = []
    likenesses: list[Likeness] = []
    problems: list[str] = []

    def read(path: Path, use: Callable[[Mapping[str, Any]], None]) -> None:
        try:
            data = json.loads(plain_file(path).decode("utf-8"))
            if not isinstance(data, dict) or data.get("format") != 1:
                raise ValueError("it is no analysis that this version of locallearn has written")
            use(data)
        except FileNotFoundError:
            pass
        except (ValueError, RecursionError, OverflowError) as error:
            problems.append(f"{path} is left out ({str(error)[:200]}); locallearn analyze writes it anew.")

    for row, record in runs.values():
        path = record.path.parent / ANALYSIS / f"{record.path.name}.json"
        read(path, lambda data, row=row, record=record: found.append(_analysis(data, row, record, style)))  # type: ignore[misc]
    for folder in sorted({record.path.parent / ANALYSIS for _, record in runs.values()}):
        for path in sorted(folder.glob("similarity-*.json")):
            read(path, lambda data: likenesses.extend(_likeness(data, runs)))
    return found, likenesses, problems


# ------------------------------------------------------------------------------------------- from files


def _analysis(data: Mapping[str, Any], row: Row, record: Record, style: Styles) -> Analysis:
    if data.get("run") != record.id:
        raise ValueError(f"it is about the run {str(data.get('run'))[:100]!r}")
    passes = data.get("passes")
    if not isinstance(passes, dict) or not passes or not passes.keys() <= _SHOWN.keys():
        raise ValueError("passes are missing or unknown")
    shown = [_shown(label, part) for label, part in passes.items()]
    colour, symbol, _ = style[row.label]
    return Analysis(
        record,
        f"{row.label}, seed {record.seed}",
        colour,
        symbol,
        _word(data.get("part")),
        _known(data.get("accuracy"), 0, 1),
        _whole(data.get("samples")),
        _known(data.get("tau"), 0),
        data.get("only_right") is True,
        _wholes(data.get("unseen", []), None, _CLASSES),
        shown,
    )


def _shown(label: str, part: Any) -> Shown:
    if not isinstance(part, dict):
        raise ValueError(f"the pass {label} is no object")
    counts = _wholes(part.get("counts"), None, _CLASSES)
    layers = [_layer(one, len(counts)) for one in _list(part.get("layers"), None, _LAYERS)]
    if not layers or not counts:
        raise ValueError(f"the pass {label} holds no layer or no class")
    return Shown(label, counts, layers)


def _layer(data: Any, classes: int) -> Layer:
    if not isinstance(data, dict) or not isinstance(data.get("map"), dict):
        raise ValueError("a layer is no object")
    columns = _wholes(data.get("columns"), None, _COLUMNS)
    labels = _wholes(data["map"].get("labels"), None, _LINES)

    def grid(values: Any, lines: int, width: int) -> list[list[int]]:
        return [_wholes(line, width) for line in _list(values, lines)]

    return Layer(
        _word(data.get("name")),
        _whole(data.get("units")),
        _number(data.get("hoyer")),
        _whole(data.get("undefined")),
        [_number(value) for value in _list(data.get("hoyer_by_class"), classes)],
        _number(data.get("maximum")),
        _known(data.get("never_active"), 0, 1),
        _wholes(data.get("sizes"), classes),
        grid(data.get("overlap"), classes, classes),
        _wholes(data.get("unique"), classes),
        _whole(data.get("shared")),
        columns,
        grid(data.get("profile"), classes, len(columns)),
        grid(data.get("members"), classes, len(columns)),
        labels,
        grid(data["map"].get("values"), len(labels), len(columns)),
        _number(data.get("probe")),
        _number(data.get("probe_unseen")),
    )


def _likeness(data: Mapping[str, Any], runs: Mapping[str, tuple[Row, Record]]) -> Iterator[Likeness]:
    """What is said of several runs, if the page is about all of them."""
    rows = _list(data.get("rows"), None, _LAYERS)
    if not all(isinstance(row, list) and len(row) == 2 and all(isinstance(word, str) for word in row) for row in rows):
        raise ValueError("its rows are no pairs of a run and a layer")
    if not rows or any(run not in runs for run, _ in rows):
        return

    def matrix(key: str) -> list[list[float | None]]:
        return [[_number(value) for value in _list(line, len(rows))] for line in _list(data.get(key), len(rows))]

    named = [(f"{runs[run][0].label}, seed {runs[run][1].seed}", _word(layer)) for run, layer in rows]
    yield Likeness(
        named,
        matrix("cka"),
        matrix("rsa"),
        _whole(data.get("samples")),
        _whole(data.get("pairs_of")),
        data.get("only_right") is True,
        _word(data.get("part")),
    )


def _list(value: Any, length: int | None, most: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise ValueError("a list is missing, or has another length than it should")
    if most is not None and len(value) > most:
        raise ValueError(f"a list has {len(value):,} entries, more than the {most:,} that are read")
    return value


def _wholes(value: Any, length: int | None, most: int | None = None) -> list[int]:
    return [_whole(one) for one in _list(value, length, most)]


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f"{str(value)[:40]} is no whole number of at least 0")
    return value


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]} is no number")
    return float(value)


def _known(value: Any, low: float, high: float = math.inf) -> float:
    number = _number(value)
    if number is None or not low <= number <= high:
        raise ValueError(f"{str(value)[:40]} is no number that there could be")
    return number


def _word(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a name is missing")
    return value[:200].encode("utf-8", "replace").decode("utf-8")


# ------------------------------------------------------------------------------------------- to charts


def analysis_groups(analyses: Sequence[Analysis], likenesses: Sequence[Likeness]) -> list[tuple[str, list[Chart]]]:
    """Charts by heading."""
    groups = [("Sparsity", [_sparsity_chart(analyses), *_scatter(analyses)])] if analyses else []
    likely = [chart for one in likenesses for chart in _likeness_charts(one)]
    if likely:
        groups.append(("Likeness of layers", likely))
    for one, whole in zip(analyses, _fitting(analyses), strict=True):
        charts = _class_charts(one)
        for layer in _picked(one.shown[0].layers) if whole else ():
            charts += _layer_charts(one, layer)
        groups.append((f"Ensembles: {one.name}, {one.part} accuracy {100 * one.accuracy:.2f} %", charts))
    return groups


def analysis_notes(analyses: Sequence[Analysis], likenesses: Sequence[Likeness]) -> list[str]:
    """How the charts are to be read, and what is not in them."""
    if not analyses and not likenesses:
        return []
    notes = [
        "Representations are the outputs of the blocks behind their activation, before anything a rule does to them on the way "
        "to the next block. Sparsity is Hoyer's measure: 1 is one active unit, 0 all equal, and "
        f"{_NOISE} what rectified noise has. It depends on layer and settings as much as on the rule, so the accuracy "
        "stands beside it.",
    ]
    taus = sorted({one.tau for one in analyses})
    if taus:
        notes.append(
            f"A unit belongs to the ensemble of a class where its mean activation exceeds that of the other units by more than "
            f"{' or '.join(f'{tau:g}' for tau in taus)} times (tau)."
        )
    if any(len(one.shown) > 1 and one.shown[0].label == "true" for one in analyses):
        notes.append(
            "Rules that write labels into the input are shown the true one, which makes part of what the first layer says of "
            "the class trivial; the pass with the neutral label is the control for that."
        )
    if any(one.only_right for one in analyses):
        notes.append("Samples that are classified wrongly are left out.")
    for one in analyses:
        for shown in one.shown:
            silent = [f"{layer.undefined} on {layer.name}" for layer in shown.layers if layer.undefined]
            if silent:
                notes.append(
                    f"{one.name}, samples {_SHOWN[shown.label]}: samples that are all zero and in no mean: {', '.join(silent)}."
                )
    for one in analyses:
        blind = [layer for layer in one.shown[-1].layers if layer.probe is not None or layer.probe_unseen is not None]
        if one.unseen:
            found = [f"{_percent(x.probe_unseen)} on {x.name} ({_percent(x.probe)} of all classes)" for x in blind]
            notes.append(
                f"{one.name} never saw class {', '.join(map(str, one.unseen))}, of which all samples are shown and none counts "
                f"in the accuracy; a linear probe finds of its samples, without their label: {', '.join(found) or UNKNOWN}."
            )
    fits = _fitting(analyses)
    deep = [
        f"{one.name} ({len(layers)})"
        for one, whole in zip(analyses, fits, strict=True)
        if whole and len(layers := one.shown[0].layers) > _DETAILED
    ]
    if deep:
        notes.append(f"Of many layers {_DETAILED} have charts of their own, evenly spread: {', '.join(deep)}.")
    dropped = [one.name for one, whole in zip(analyses, fits, strict=True) if not whole]
    if dropped:
        notes.append(f"Maps and matrices are not shown, to keep the page small: {', '.join(dropped)}.")
    return notes


def _fitting(analyses: Sequence[Analysis]) -> list[bool]:
    """Which analyses are shown with all their maps and matrices, first come, first served."""
    spent, fits = 0, []
    for one in analyses:
        layers = _picked(one.shown[0].layers)
        cost = sum(len(x.sizes) ** 2 + len(x.columns) * (len(x.sizes) + len(x.map_labels)) for x in layers)
        fits.append(spent + cost <= _BUDGET)
        spent += cost if fits[-1] else 0
    return fits


def _picked(layers: Sequence[Layer]) -> Sequence[Layer]:
    """At most so many layers, the first and the last among them."""
    if len(layers) <= _DETAILED:
        return layers
    return [layers[round(i * (len(layers) - 1) / (_DETAILED - 1))] for i in range(_DETAILED)]


def _sparsity_chart(analyses: Sequence[Analysis]) -> Chart:
    data: list[Figure] = []
    table = []
    deepest = max(len(shown.layers) for one in analyses for shown in one.shown)
    for one in analyses:
        told = f"{one.name}: {one.part} accuracy {100 * one.accuracy:.2f} %"
        for place, shown in enumerate(one.shown):
            layers = shown.layers
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": plain_text(told if place == 0 else f"{one.name}, {shown.label}"),
                    "x": list(range(1, len(layers) + 1)),
                    "y": [layer.hoyer for layer in layers],
                    "line": {"color": one.colour, "width": 2, "dash": ("solid", "dash", "dot")[min(place, 2)]},
                    "marker": {"color": one.colour, "symbol": one.symbol + ("-open" if place else ""), "size": 9},
                    "text": [
                        f"<b>{plain_text(told)}</b><br>samples {plain_text(_SHOWN[shown.label])}<br>"
                        f"{plain_text(layer.name)}: {_said(layer.hoyer)}"
                        for layer in layers
                    ],
                    "hovertemplate": "%{text}<extra></extra>",
                }
            )
            cells = [
                _said(layer.hoyer) + (f" ({layer.undefined} silent)" if layer.undefined else "") for layer in layers
            ]
            table.append(
                (
                    *(one.name, f"{one.part}: {100 * one.accuracy:.2f} %", _SHOWN[shown.label], str(sum(shown.counts))),
                    *cells,
                    *[UNKNOWN] * (deepest - len(cells)),
                )
            )
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": _NOISE, "y1": _NOISE}
    layout = {
        "xaxis": {"title": {"text": "layer"}, **({"dtick": 1} if deepest <= 20 else {})},
        "yaxis": {"title": {"text": "sparsity (Hoyer)"}, "range": [-0.03, 1.03]},
        "shapes": [{**line, "line": {"color": "#808080", "width": 1.5, "dash": "dot"}}],
    }
    header = ("Run", "Accuracy", "Samples shown", "Samples", *(f"Layer {i + 1}" for i in range(deepest)))
    note = "The dotted line is rectified noise; dashed lines are passes without the true label."
    return Chart("Sparsity of every layer", note, figure_of(data, layout), header, table, 380 + 8 * len(data))


def _scatter(analyses: Sequence[Analysis]) -> list[Chart]:
    """Sparsity against accuracy over runs, a colour per layer and a marker per rule."""
    if len(analyses) < 2:
        return []
    deepest = max(len(one.shown[0].layers) for one in analyses)
    data, table = [], []
    for i in range(deepest):
        known = [(one, one.shown[0].layers[i]) for one in analyses if i < len(one.shown[0].layers)]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"layer {i + 1}",
                "x": [100 * one.accuracy for one, _ in known],
                "y": [layer.hoyer for _, layer in known],
                "marker": {
                    "color": ramp(i, deepest),
                    "symbol": [one.symbol for one, _ in known],
                    "size": 11,
                },
                "text": [
                    f"<b>{plain_text(one.name)}</b><br>{plain_text(layer.name)}: {_said(layer.hoyer)} at "
                    f"{100 * one.accuracy:.2f} %"
                    for one, layer in known
                ],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    for one in analyses:
        table.append((one.name, f"{100 * one.accuracy:.2f}", ", ".join(_said(x.hoyer) for x in one.shown[0].layers)))
    layout = {
        "xaxis": {"title": {"text": "accuracy (%)"}},
        "yaxis": {"title": {"text": "sparsity (Hoyer)"}, "range": [-0.03, 1.03]},
    }
    note = "Every run once per layer; the marker is the rule's."
    header = ("Run", "Accuracy (%)", "Sparsity by layer")
    return [Chart("Sparsity against accuracy", note, figure_of(data, layout), header, table, 380)]


def _class_charts(one: Analysis) -> list[Chart]:
    charts = []
    for shown in one.shown:
        names = [layer.name for layer in shown.layers]
        classes = [str(c) for c in range(len(shown.counts))]
        table = [
            (c, str(shown.counts[int(c)]), *(_said(layer.by_class[int(c)]) for layer in shown.layers)) for c in classes
        ]
        figure = _heatmap(
            [list(layer.by_class) for layer in shown.layers],
            classes,
            [plain_text(name) for name in names],
            {"zmin": 0, "zmax": 1, "colorscale": _SCALE, "hovertemplate": "class %{x}, %{y}: %{z:.3f}<extra></extra>"},
            {"xaxis": {"title": {"text": "class"}}, "yaxis": {"autorange": "reversed"}},
        )
        title = f"Sparsity by class, samples {_SHOWN[shown.label]}"
        charts.append(Chart(title, "", figure, ("Class", "Samples", *names), table, 170 + 26 * len(names)))
    return charts


def _layer_charts(one: Analysis, layer: Layer) -> list[Chart]:
    classes = [str(c) for c in range(len(layer.sizes))]
    where = f"{layer.name}, {layer.units:,} units"
    many = {"dtick": 1} if len(classes) <= 20 else {}
    overlap = _heatmap(
        [list(line) for line in layer.overlap],
        classes,
        classes,
        {
            "colorscale": _SCALE,
            "zmin": 0,
            "zmax": max(1, *layer.sizes),
            "hovertemplate": "classes %{y} and %{x}: %{z} units<extra></extra>",
        }
        | ({"text": [list(line) for line in layer.overlap], "texttemplate": "%{text}"} if len(classes) <= 12 else {}),
        {
            "xaxis": {"title": {"text": "class"}, **many},
            "yaxis": {"title": {"text": "class"}, "autorange": "reversed", **many},
        },
    )
    table = [
        (c, str(layer.sizes[int(c)]), str(layer.unique[int(c)]), ", ".join(map(str, layer.overlap[int(c)])))
        for c in classes
    ]
    header = ("Class", "Units", "Of no other class", "Shared with class 0, 1, …")
    note = f"tau {one.tau:g}; the diagonal holds the sizes; {layer.shared} units belong to several ensembles."
    height = 300 + min(320, 18 * len(classes))
    charts = [Chart(f"Overlap of ensembles: {where}", note, overlap, header, table, height)]
    axis = {
        "title": {"text": "unit" + ("" if len(layer.columns) == layer.units else f" ({len(layer.columns)} of them)")}
    }
    told = f"largest activation {_said(layer.maximum)}; {100 * layer.never_active:.1f} % of the units are never active."
    if layer.map_labels:
        ends = [i for i in range(1, len(layer.map_labels)) if layer.map_labels[i] != layer.map_labels[i - 1]]
        starts = [0, *ends]
        picture = _heatmap(
            [list(line) for line in layer.map_values],
            list(layer.columns),
            list(range(len(layer.map_labels))),
            {
                "colorscale": _SCALE,
                "zmin": 0,
                "zmax": 100,
                "hovertemplate": "unit %{x}, row %{y}: %{z} % of the largest<extra></extra>",
            },
            {
                "xaxis": axis,
                "yaxis": {
                    "title": {"text": "samples by class"},
                    "autorange": "reversed",
                    "tickvals": starts,
                    "ticktext": [str(layer.map_labels[i]) for i in starts],
                },
                "shapes": [
                    {
                        **{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": end - 0.5, "y1": end - 0.5},
                        "line": {"color": "#808080", "width": 0.5},
                    }
                    for end in ends
                ],
            },
        )
        rows = [
            (
                c,
                str(
                    len(
                        own := [
                            v for label, v in zip(layer.map_labels, layer.map_values, strict=True) if str(label) == c
                        ]
                    )
                ),
                f"{sum(map(sum, own)) / max(1, len(own) * len(layer.columns)):.1f}",
            )
            for c in classes
        ]
        charts.append(
            Chart(
                f"Activation map: {where}",
                told,
                picture,
                ("Class", "Samples drawn", "Mean (% of the largest)"),
                rows,
                420,
            )
        )
    profile = _heatmap(
        [list(line) for line in layer.profile],
        list(layer.columns),
        classes,
        {
            "colorscale": _SCALE,
            "zmin": 0,
            "zmax": 100,
            "hovertemplate": "unit %{x}, class %{y}: %{z} % of the largest mean<extra></extra>",
        },
        {"xaxis": axis, "yaxis": {"title": {"text": "class"}, "autorange": "reversed", **many}},
    )
    marked = [
        (column, c)
        for c, line in zip(classes, layer.members, strict=True)
        for column, m in zip(layer.columns, line, strict=True)
        if m
    ]
    profile["data"].append(
        {
            "type": "scatter",
            "mode": "markers",
            "x": [column for column, _ in marked],
            "y": [c for _, c in marked],
            "marker": {"color": "#D55E00", "size": 4, "symbol": "circle"},
            "hovertemplate": "unit %{x} belongs to the ensemble of class %{y}<extra></extra>",
            "showlegend": False,
        }
    )
    lines = [(c, ", ".join(str(column) for column, of in marked if of == c) or "none") for c in classes]
    note = "Mean activation of every class; dots are members of its ensemble."
    charts.append(Chart(f"Class means: {where}", note, profile, ("Class", "Members among the units drawn"), lines, 300))
    return charts


def _likeness_charts(one: Likeness) -> list[Chart]:
    names = [f"{run}: {layer}" for run, layer in one.rows]
    numbers = [str(i + 1) for i in range(len(names))]
    which = "that all of them classify rightly" if one.only_right else "whether classified rightly or not"
    charts = []
    for title, values, note in (
        (
            "Centred kernel alignment (CKA)",
            one.cka,
            f"Linear, unbiased estimate over {one.samples:,} samples of {one.part}, {which}: around 0 where two layers "
            "have nothing in common.",
        ),
        (
            "Representational similarity (RSA)",
            one.rsa,
            f"Spearman's correlation of dissimilarities over the pairs of {one.pairs_of:,} samples of {one.part}, {which}.",
        ),
    ):
        figure = _heatmap(
            [list(line) for line in values],
            numbers,
            numbers,
            {
                "colorscale": _DIVERGING,
                "zmin": -1,
                "zmax": 1,
                "customdata": [[f"{plain_text(a)}<br>{plain_text(b)}" for b in names] for a in names],
                "hovertemplate": "%{customdata}<br>%{z:.3f}<extra></extra>",
            }
            | (
                {"text": [[_short(value) for value in line] for line in values], "texttemplate": "%{text}"}
                if len(names) <= 12
                else {}
            ),
            {
                "xaxis": {"title": {"text": "layer, numbered as in the table"}, "type": "category"},
                "yaxis": {"autorange": "reversed", "type": "category"},
            },
        )
        table = [
            (f"{i + 1}: {name}", *map(_short, line)) for i, (name, line) in enumerate(zip(names, values, strict=True))
        ]
        charts.append(Chart(title, note, figure, ("Layer", *numbers), table, 300 + min(420, 22 * len(names))))
    return charts


def _heatmap(z: list[list[Any]], x: list[Any], y: list[Any], look: Figure, layout: Figure) -> Figure:
    axes = {key: {"showgrid": False, "zeroline": False, **layout[key]} for key in ("xaxis", "yaxis")}
    trace = {"type": "heatmap", "z": z, "x": x, "y": y, "colorbar": {"thickness": 10}, **look}
    return figure_of([trace], {**layout, **axes})


def _said(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


def _short(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f}"
