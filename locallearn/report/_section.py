"""One comparison: its verdict, its table, what must not be read without, its charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from locallearn.report._charts import Chart, Curves, cost_charts, memory_charts, paired_charts
from locallearn.report._columns import (
    LEGEND,
    PER_SAMPLE,
    UNKNOWN,
    Column,
    best_energy,
    headline_metric,
    metric_title,
    shared_notes,
)
from locallearn.report._curves import block_charts, layer_charts, loss_charts, metric_chart, spent_charts
from locallearn.report._ends import own_ends
from locallearn.report._energy import energy_charts
from locallearn.report._files import PICTURE_NOTE, Runs
from locallearn.report._html import Book, count, scrolled, texts
from locallearn.report._runs import facets
from locallearn.report._styles import Styles
from locallearn.report._sweeps import sweep_charts
from locallearn.report._targets import target_charts
from locallearn.report._verdicts import Verdict
from locallearn.statistics import Row

_HOW = (
    "Intervals are 95 % t-intervals over seeds, of costs on a logarithmic scale, none below three seeds. The sign-flip p "
    "asks how rarely random signs of the paired differences do as much; it cannot fall below its smallest value, and is also "
    "given after Holm's correction over the rules of the table."
)
_MODES = {
    "matched": "The same number of samples passes through every unit.",
    "target": "Cost until validation {metric} first reaches the stated target.",
}
_CAVEATS = 3  # shown at once; the others open with a click
_FIRST = 8  # columns shown at once


@dataclass(frozen=True)
class Section:
    """Everything that one comparison is made of.

    Attributes:
        anchor: its place on the page.
        rows: that may be compared with each other.
        shown: columns of its table.
        curves: of every row.
        runs: of every row the curves of its single runs.
        pictures: of every row a figure, or empty.
        verdict: what its numbers say.
    """

    anchor: str
    rows: Sequence[Row]
    shown: Sequence[Column]
    curves: Sequence[Curves]
    runs: Sequence[Runs]
    pictures: Sequence[str]
    verdict: Verdict


def section_html(section: Section, style: Styles, baseline: str, points: int, book: Book) -> str:
    """The section as a part of the page."""
    rows, shown, curves = section.rows, section.shown, section.curves
    name, mode = rows[0].place, rows[0].mode
    book.section = f"{name} {rows[0].terms if mode else ''}"
    metric = metric_title(rows[0].metric.name)
    badge = f'<span class="badge">mode: {escape(rows[0].terms)}</span>'
    learning = metric_chart(rows, curves, style, points)
    title = f"{metric[:1].upper()}{metric[1:]}"
    groups = [
        (f"{title} against cost", cost_charts(rows, shown, style)),
        ("Time to target", target_charts(rows, shown, style)),
        (f"Against {baseline}, paired by seed", paired_charts(rows, shown, style, baseline)),
        ("Memory", memory_charts(rows, shown, style)),
        ("Energy", energy_charts(rows, shown)),
        (
            "Learning",
            [
                *([learning] if learning else []),
                *spent_charts(rows, curves, style, points, best_energy(shown, rows)),
                *loss_charts(rows, curves, style, points),
            ],
        ),
        ("By setting", sweep_charts(rows, shown, style)),
    ]
    table = _headline(section, style, book)
    charts = "".join(f"<h3>{escape(heading)}</h3>{book.grid(group)}" for heading, group in groups if group)
    charts += _parts(section, points, book)
    told = own_ends(rows, metric) if mode == "own" else _MODES.get(mode or "", "").format(metric=metric)
    about = f'<p class="note">{escape(told)}</p>' if told else ""
    if any(section.pictures):
        pictures = "".join(section.pictures)
        charts += f'<h3>Reconstructions</h3><p class="note">{PICTURE_NOTE}</p><div class="grid">{pictures}</div>'
    return (
        f'<section id="{section.anchor}" data-place="{escape(name)}"><h2>{escape(name)} {badge}</h2>'
        f'<p class="verdict">{escape(section.verdict.sentence)}</p>{about}'
        f"{table}{_notes(rows, shown, baseline)}{charts}</section>"
    )


# ------------------------------------------------------------------------------------------- its table


def _headline(section: Section, style: Styles, book: Book) -> str:
    rows, shown = section.rows, section.shown
    first = _first(rows, shown)
    off = ["" if column.key in first else ' class="off"' for column in shown]
    head = "".join(
        f'<th scope="col" data-name="{escape(column.key)}"{o}>{_heading(column)}</th>'
        for column, o in zip(shown, off, strict=True)
    )
    lines: list[str] = []
    plain: list[Sequence[str]] = []
    for row in rows:
        locality = row.newest.text("locality")
        below = f"<small>{escape(locality)}</small>" if locality else ""
        dot = f'<span class="dot" style="background:{style[row.label].colour}"></span>'
        cells = "".join(f"<td{o}>{_cell(row, column)}</td>" for column, o in zip(shown, off, strict=True))
        found = facets([*row.records, *row.missing], row.label, row.place)
        lines.append(f'<tr{found}><th scope="row">{dot}{escape(row.label)}{below}</th><td>{row.seeds}</td>{cells}</tr>')
        plain.append(
            (
                *(row.label, row.seeds),
                *(column.summary(f, row) if (f := row.figures.get(column.key)) else UNKNOWN for column in shown),
            )
        )
    book.tables.append((book.section, "figures", ("Rule", "Seeds", *(column.heading for column in shown)), plain))
    return scrolled(
        f'<thead><tr><th scope="col">Rule</th><th scope="col">Seeds</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody>',
        "Headline figures",
        "cards",
        " data-columns",
    )


def _first(rows: Sequence[Row], shown: Sequence[Column]) -> set[str]:
    """Columns that are shown at once: what is looked for first, and as many as fit."""
    metric, energy = headline_metric(shown, rows[0].metric), best_energy(shown, rows)
    keys = {column.key for column in shown}
    source = energy.key.partition("/")[2] if energy else ""
    wanted = [
        *([metric.key] if metric else []),
        *(key for key in ("target/seconds", f"target/joules/{source}") if key in keys),
        *("train_s", f"energy_j/{source}", f"{PER_SAMPLE}{source}"),
        *("train_flops" if "train_flops" in keys else "update_flops", "activation_peak_bytes", "allocated_peak_bytes"),
        *("params", "inference_flops"),
    ]
    known = [key for key in wanted if key in keys]
    # A table of few figures shows all of them.
    rest = [column.key for column in shown if column.key not in known]
    return set((known + rest)[:_FIRST])


def _heading(column: Column) -> str:
    below = f"<small>{escape(column.qualifier)}</small>" if column.qualifier else ""
    return f"{escape(column.title)}{below}"


def _cell(row: Row, column: Column) -> str:
    figure = row.figures.get(column.key)
    if figure is None:
        return UNKNOWN
    std = figure.summary.std
    text = column.least(figure, row) + column.number(figure.summary.mean)
    text += f' <span class="sd">± {column.number(std)}</span>' if std else ""
    below = [] if figure.arrivals is None else [str(figure.arrivals)]
    below += (
        [f"n = {figure.summary.n}"] if figure.summary.n != len(row.records) else []
    )  # else it is in the column before
    pair = figure.paired
    if pair is not None and pair.ratio is not None:
        over = "" if pair.n == figure.summary.n else f" (of {count(pair.n, 'pair')})"
        below.insert(0, f"{column.ratio(pair.ratio)}{over}")
    return text + (f"<small>{', '.join(below)}</small>" if below else "")


# ------------------------------------------------------------------------------------------- what must be known


def _notes(rows: Sequence[Row], shown: Sequence[Column], baseline: str) -> str:
    """Warnings first, some of them open; how the numbers are made behind a click, for it is the same everywhere."""
    words = []
    if all(row.algorithm != baseline or not row.records for row in rows):
        words.append(f"There is no {baseline} run here that finished, so there is nothing to compare with.")
    for n, what in ((1, "One seed only, so no spread and no interval"), (2, "Two seeds only, so no interval")):
        few = [row.label for row in rows if len(row.records) == n]
        words += [f"{what}: {', '.join(few)}."] if few else []
    words += shared_notes(rows)
    for row in rows:
        words += _fewer_pairs(row, shown, baseline)
    words += _reasons(rows, shown)
    machines = frozenset().union(*(row.machines for row in rows))
    if len(machines) > 1:
        words.append(
            f"The runs come from {len(machines)} machines, or uses of one (device, cores, threads, workers); time and energy "
            "compare only within each."
        )
    words += _meter_notes(rows, shown)
    words = list(dict.fromkeys(words))
    made = _list([LEGEND.format(baseline=baseline), _HOW])
    rest = words[_CAVEATS:]
    more = (
        f"<details data-name='notes'><summary>{count(len(rest), 'further note')}</summary>{_list(rest)}</details>"
        if rest
        else ""
    )
    return (
        f"{_list(words[:_CAVEATS]) if words else ''}{more}"
        f"<details><summary>How these numbers are made</summary>{made}</details>"
    )


def _list(words: Sequence[str]) -> str:
    return f'<ul class="plain note">{"".join(f"<li>{escape(word)}</li>" for word in words)}</ul>'


def _fewer_pairs(row: Row, shown: Sequence[Column], baseline: str) -> list[str]:
    """Where a row was paired over fewer seeds than it has; figures are named where not all have as many pairs."""
    titles: dict[int, list[str]] = {}
    for column in shown:
        figure = row.figures.get(column.key)
        if figure is not None and figure.paired is not None:
            titles.setdefault(figure.paired.n, []).append(column.title)
    return [
        f"{row.label}: paired with {baseline} over {n} of its {len(row.records)} seeds"
        + (f" ({', '.join(names)})" if len(titles) > 1 else "")
        + "; means are over all that have a figure, ratios over the pairs."
        for n, names in sorted(titles.items())
        if n < len(row.records)
    ]


def _reasons(rows: Sequence[Row], shown: Sequence[Column]) -> list[str]:
    """Why intervals or comparisons are missing, one sentence for all rules and figures of one reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        titles: dict[str, list[str]] = {}
        for column in shown:
            figure = row.figures.get(column.key)
            pair = figure.paired if figure else None
            reason = figure.reason if figure and figure.reason else pair.reason if pair else None
            if reason:
                titles.setdefault(reason, []).append(column.title)
        for reason, names in titles.items():
            found.setdefault((", ".join(names), reason), []).append(row.label)
    return [f"{names} ({', '.join(labels)}): {reason}." for (names, reason), labels in found.items()]


def _meter_notes(rows: Sequence[Row], shown: Sequence[Column]) -> list[str]:
    windows = [window for row in rows for record in row.records for window in record.energy()]
    notes = [f"No joules from {window['source']}: {window['reason']}" for window in windows if window.get("reason")]
    flagged: dict[str, list[str]] = {}
    for window in windows:
        flagged.setdefault(window["source"], []).extend(texts(window.get("flags"))[:1])
    for source, flags in flagged.items():
        if flags:
            notes.append(f"Joules from {source}: {count(len(flags), 'run')} flagged, e.g. {flags[0]}")
    if not any(column.key.startswith("energy_j/") for column in shown):
        notes.insert(0, "No meter gave joules for these runs.")
    return list(dict.fromkeys(notes))[:12]


# ------------------------------------------------------------------------------------------- blocks of a chosen run


def _parts(section: Section, points: int, book: Book) -> str:
    """Curves of every block and layer: of every rule as means, and of single runs; the chosen one is shown."""
    # What is chosen is known by its rule and seed, without the number of seeds, which grows.
    choices: list[tuple[str, str, list[Chart]]] = []
    for row, known, runs in zip(section.rows, section.curves, section.runs, strict=True):
        few = f", mean of {len(row.records)} seeds" if len(row.records) > 1 else ""
        choices.append(
            (row.label, f"{row.label}{few}", [*block_charts(row, known, points), *layer_charts(row, known, points)])
        )
        for seed, own in runs.items():
            name = f"{row.label}, seed {seed}"
            charts = [*block_charts(row, own, points, name), *layer_charts(row, own, points, name)]
            choices.append((name, name, charts))
    choices = [choice for choice in choices if choice[2]]
    if not choices:
        return ""
    options = "".join(
        f'<option value="{i}" data-name="{escape(known)}">{escape(name)}</option>'
        for i, (known, name, _) in enumerate(choices)
    )
    places = "".join(
        f'<div data-choice="{i}"{"" if i == 0 else " hidden"}>{book.grid(charts)}</div>'
        for i, (*_, charts) in enumerate(choices)
    )
    alignment = " and Alignment" if any(name.startswith("layer/") for known in section.curves for name in known) else ""
    chooser = f'<p><label>Run: <select class="choose">{options}</select></label></p>' if len(choices) > 1 else ""
    return f'<h3>Blocks{alignment}</h3><div class="chooser">{chooser}{places}</div>'
