"""One self-contained HTML page from any set of records."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from locallearn.records import SCHEMA, Record, plain_file
from locallearn.report._analysis import Analysis, Likeness, analysis_groups, analysis_notes, read_analyses
from locallearn.report._assets import SCRIPT, STYLE
from locallearn.report._charts import (
    Chart,
    Curves,
    cost_charts,
    memory_charts,
    paired_charts,
    styles,
)
from locallearn.report._columns import AT_LEAST, LEGEND, UNKNOWN, Column, columns, metric_title, shared_notes
from locallearn.report._curves import (
    LOSS,
    PASSES,
    SECONDS,
    block_charts,
    layer_charts,
    loss_charts,
    metric_chart,
    passes_by,
)
from locallearn.report._library import plotly
from locallearn.report._sweeps import estimate_charts, sweep_charts
from locallearn.statistics import Row, age, compare_table

_BASELINE = "backprop"
_HOW = (
    "Intervals are 95 % t-intervals over seeds, of costs on a logarithmic scale, none below three seeds. The sign-flip p "
    "asks how rarely random signs of the paired differences do as much; it cannot fall below its smallest value, and is also "
    "given after Holm's correction over the rules of the table."
)
_MODES = {
    "own": "Every rule trains until its own validation metric stops improving, under one patience and one cap.",
    "matched": "The same number of samples passes through every unit.",
    "target": "Cost until validation {metric} first reaches the stated target.",
}
# What keeps a page of hundreds of runs below about 8 MB: numbers and lines drawn in curves, configurations shown.
_CURVE_POINTS = 40_000
_BLOCK_LINES = 1_000
_CONFIGS = 100
_CONFIG_CHARACTERS = 20_000
_ERROR_CHARACTERS = 2_000
_PICTURE_BYTES = 1_500_000
_PICTURE = "reconstructions.png"
_PICTURE_NOTE = "Test images above, what the network made of them below; of every rule its newest run."
# Curves of parts of a network, which a very large page leaves out.
_DETAILS = ("block/", "unit/", "layer/")
_PNG = b"\x89PNG\r\n\x1a\n"


def write_report(
    records: Sequence[Record], out: Path, *, title: str = "locallearn report", problems: Sequence[str] = ()
) -> Path:
    """Writes one HTML page about ``records`` that needs nothing but itself: no network, no server, no other file.

    Args:
        records: any runs; those that did not end with ``done`` are listed with their error, not compared.
        out: the page's file; an older page is replaced in one step once the new one is complete.
        title: heading of the page.
        problems: sentences on records that could not be read, e.g. :attr:`locallearn.records.Scan.problems`.

    Returns:
        ``out``.

    Raises:
        ValueError: ``out`` is a folder.
    """
    check_place(out)
    page = _render(records, title, problems)
    aside = _aside(out)
    try:
        # Half characters, of odd file names, are shown as escapes.
        aside.write_text(page, encoding="utf-8", errors="backslashreplace")
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    return out


def check_place(out: Path) -> None:
    """Whether a page can be written to ``out``: makes its folder, and writes and removes an empty file in it.

    Raises:
        ValueError: it cannot; the sentence says why.
    """
    if out.is_dir():
        raise ValueError(f"the report cannot be written to {out}, which is a folder; give a file such as report.html.")
    aside = _aside(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise ValueError(
            f"the report cannot be written to {out} ({error.strerror}: {error.filename}); give another place for it."
        ) from None


def _aside(out: Path) -> Path:
    """Where a page is written before it takes the place of ``out``; its name is short, for there is a longest one."""
    return out.with_name(f".{secrets.token_hex(8)}.html.part")


def _render(records: Sequence[Record], title: str, problems: Sequence[str]) -> str:
    benches = [record for record in records if record.part("bench")]
    records = [record for record in records if not record.part("bench")]
    rows = compare_table(records, _BASELINE)
    curves, damaged = _read_curves(rows)
    damaged += _limit_blocks(rows, curves)
    pictures, unseen = _read_pictures(rows)
    style = styles(rows, _BASELINE)
    points = max(12, min(200, _CURVE_POINTS // max(1, sum(map(len, curves)))))
    figures: list[Mapping[str, Any]] = []
    sections, links = [], []
    order = groupby(
        zip(rows, curves, pictures, strict=True),
        key=lambda item: item[0].section,
    )
    for number, (_, items) in enumerate(order):
        members, known, seen = zip(*items, strict=True)
        name, mode = members[0].place, members[0].mode
        links.append(
            f'<li><a href="#s{number}">{escape(name)}{f" ({escape(members[0].terms)})" if mode else ""}</a></li>'
        )
        sections.append(_section(f"s{number}", members, known, seen, style, points, figures))
    analyses, likenesses, unused = read_analyses(rows, style)
    if analyses or likenesses:
        links.append('<li><a href="#representations">Representations</a></li>')
        sections.append(_representations(analyses, likenesses, figures))
    body = (
        "".join([*sections, *(_bench(record, figures) for record in benches)])
        or "<p>There is no finished run to show yet.</p>"
    )
    nav = f'<nav aria-label="Sections"><ul>{"".join(links)}</ul></nav>' if len(links) > 1 else ""
    unfinished = _unfinished(records, [*problems, *damaged, *unseen, *unused])
    return _document(title, f"{_lead(records, rows)}{nav}", body + unfinished + _provenance(records, rows), figures)


def _document(title: str, head: str, body: str, figures: Sequence[Mapping[str, Any]]) -> str:
    library = plotly()
    # Only these two scripts may run and nothing may be fetched, whatever a record smuggles into the page.
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in (library, SCRIPT))
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the results</a>
<header class="page"><h1>{escape(title)}</h1>{head}</header>
<main id="content">
<noscript><p>Charts need JavaScript; every number is also in the tables.</p></noscript>
{body}
</main>
<footer class="muted">Made by locallearn from its run records.</footer>
<script type="application/json" id="charts">{_embed(figures)}</script>
<script>{library}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _embed(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _finite(data: Any) -> Any:
    """The same with ``None`` for what JSON has no number for: a figure too large for its unit, say."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, (list, tuple)) else data


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _lead(records: Sequence[Record], rows: Sequence[Row]) -> str:
    if not records:
        return '<p class="lead">No records were found.</p>'
    done = sum(record.status == "done" for record in records)
    ends = sorted(filter(None, (record.text("finished") for record in records)))
    when = "" if not ends else f", {ends[0][:10]}" + (f" to {ends[-1][:10]}" if ends[-1][:10] != ends[0][:10] else "")
    rules = len({row.algorithm for row in rows})
    return f'<p class="lead">{_count(done, "finished run")}, {_count(rules, "rule")}{escape(when)} (UTC).</p>'


def _count(n: int, word: str) -> str:
    return f"{n} {word}" + ("" if n == 1 else "s")


# ------------------------------------------------------------------------------------------- one benchmark


def _bench(record: Record, figures: list[Mapping[str, Any]]) -> str:
    """The table that ``locallearn bench`` printed, and a chart where its figures make curves."""
    bench = record.part("bench")
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in _texts(bench.get("columns")))
    rows = bench.get("rows")
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _texts(row)) + "</tr>"
        for row in (rows if isinstance(rows, list) else [])
    )
    where = " · ".join(filter(None, (record.text("dataset"), record.text("net"), record.text("started"))))
    drawn = estimate_charts(bench)
    charts = _grid(drawn, figures) if drawn else ""
    return (
        f"<section><h2>{escape(str(bench.get('title', 'benchmark')))}</h2>"
        f'<p class="note">{escape(where)}; <code>{escape(record.text("command") or "")}</code></p>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>{charts}</section>'
    )


# ------------------------------------------------------------------------------------------- one comparison


def _section(
    anchor: str,
    rows: Sequence[Row],
    curves: Sequence[Curves],
    pictures: Sequence[str],
    style: Mapping[str, tuple[str, str]],
    points: int,
    figures: list[Mapping[str, Any]],
) -> str:
    name, mode = rows[0].place, rows[0].mode
    shown = columns(rows)
    metric = metric_title(rows[0].metric.name)
    badge = f'<span class="badge">mode: {escape(rows[0].terms)}</span>'
    learning = metric_chart(rows, curves, style, points)
    groups = [
        (f"{metric[:1].upper()}{metric[1:]} against cost", cost_charts(rows, shown, style)),
        (f"Against {_BASELINE}, paired by seed", paired_charts(rows, shown, style, _BASELINE)),
        ("Memory", memory_charts(rows, shown, style)),
        ("Learning", [*([learning] if learning else []), *loss_charts(rows, curves, style, points)]),
        ("By setting", sweep_charts(rows, shown, style)),
        *(
            (heading, [chart for row, known in zip(rows, curves, strict=True) for chart in draw(row, known, points)])
            for heading, draw in (("Blocks", block_charts), ("Alignment", layer_charts))
        ),
    ]
    charts = "".join(f"<h3>{escape(heading)}</h3>{_grid(group, figures)}" for heading, group in groups if group)
    about = f'<p class="note">{escape(_MODES[mode].format(metric=metric))}</p>' if mode in _MODES else ""
    if any(pictures):
        charts += (
            f'<h3>Reconstructions</h3><p class="note">{_PICTURE_NOTE}</p><div class="grid">{"".join(pictures)}</div>'
        )
    return (
        f'<section id="{anchor}"><h2>{escape(name)} {badge}</h2>{about}'
        f"{_headline(rows, shown, style)}{_notes(rows, shown)}{charts}</section>"
    )


def _representations(
    analyses: Sequence[Analysis], likenesses: Sequence[Likeness], figures: list[Mapping[str, Any]]
) -> str:
    """What `locallearn analyze` found of the page's runs."""
    notes = "".join(f"<li>{escape(note)}</li>" for note in analysis_notes(analyses, likenesses))
    charts = "".join(
        f"<h3>{escape(heading)}</h3>{_grid(group, figures)}"
        for heading, group in analysis_groups(analyses, likenesses)
        if group
    )
    return (
        f'<section id="representations"><h2>Representations</h2><ul class="plain note">{notes}</ul>{charts}</section>'
    )


def _headline(rows: Sequence[Row], shown: Sequence[Column], style: Mapping[str, tuple[str, str]]) -> str:
    head = "".join(f'<th scope="col">{_heading(column)}</th>' for column in shown)
    lines = []
    for row in rows:
        locality = row.newest.text("locality")
        below = f"<small>{escape(locality)}</small>" if locality else ""
        dot = f'<span class="dot" style="background:{style[row.label][0]}"></span>'
        cells = "".join(f"<td>{_cell(row, column)}</td>" for column in shown)
        lines.append(f'<tr><th scope="row">{dot}{escape(row.label)}{below}</th><td>{row.seeds}</td>{cells}</tr>')
    return (
        '<div class="scroll" role="region" aria-label="Headline figures" tabindex="0"><table><thead><tr>'
        f'<th scope="col">Rule</th><th scope="col">Seeds</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _heading(column: Column) -> str:
    below = f"<small>{escape(column.qualifier)}</small>" if column.qualifier else ""
    return f"{escape(column.title)}{below}"


def _cell(row: Row, column: Column) -> str:
    figure = row.figures.get(column.key)
    if figure is None:
        return UNKNOWN
    std = figure.summary.std
    least = f"{AT_LEAST} " if figure.censored or ("flops" in column.key and row.newest.uncounted) else ""
    text = least + column.number(figure.summary.mean)
    text += f' <span class="sd">± {column.number(std)}</span>' if std else ""
    below = [] if figure.arrivals is None else [str(figure.arrivals)]
    below += (
        [f"n = {figure.summary.n}"] if figure.summary.n != len(row.records) else []
    )  # else it is in the column before
    pair = figure.paired
    if pair is not None and pair.ratio is not None:
        over = "" if pair.n == figure.summary.n else f" (of {_count(pair.n, 'pair')})"
        below.insert(0, f"{column.ratio(pair.ratio)}{over}")
    return text + (f"<small>{', '.join(below)}</small>" if below else "")


def _notes(rows: Sequence[Row], shown: Sequence[Column]) -> str:
    words = [LEGEND.format(baseline=_BASELINE), _HOW]
    if all(row.algorithm != _BASELINE or not row.records for row in rows):
        words.append(f"There is no {_BASELINE} run here that finished, so there is nothing to compare with.")
    for n, what in ((1, "One seed only, so no spread and no interval"), (2, "Two seeds only, so no interval")):
        few = [row.label for row in rows if len(row.records) == n]
        words += [f"{what}: {', '.join(few)}."] if few else []
    words += shared_notes(rows)
    for row in rows:
        pairs = {figure.paired.n for figure in row.figures.values() if figure.paired}
        if pairs and min(pairs) < len(row.records):
            words.append(
                f"{row.label}: paired with {_BASELINE} over {min(pairs)} of its {len(row.records)} seeds; means are over all "
                "that finished, ratios over the pairs."
            )
    words += _reasons(rows, shown)
    machines = {_settled(record.part("hardware")) for row in rows for record in row.records}
    if len(machines) > 1:
        words.append(f"The runs come from {len(machines)} machines; time and energy compare only within one.")
    words += _meter_notes(rows, shown)
    return f'<ul class="plain note">{"".join(f"<li>{escape(word)}</li>" for word in dict.fromkeys(words))}</ul>'


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
        flagged.setdefault(window["source"], []).extend(_texts(window.get("flags"))[:1])
    for source, flags in flagged.items():
        if flags:
            notes.append(f"Joules from {source}: {_count(len(flags), 'run')} flagged, e.g. {flags[0]}")
    if not any(column.key.startswith("energy_j/") for column in shown):
        notes.insert(0, "No meter gave joules for these runs.")
    return list(dict.fromkeys(notes))[:12]


def _grid(charts: Sequence[Chart], figures: list[Mapping[str, Any]]) -> str:
    parts = []
    for chart in charts:
        note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
        parts.append(
            f"<figure><h4>{escape(chart.title)}</h4>{note}"
            f'<div class="chart" data-chart="{len(figures)}" role="img" aria-label="Chart: {escape(chart.title)}; '
            f'the numbers are in the table below" style="height:{chart.height}px"></div>'
            f"<details><summary>Numbers</summary>{_table(chart.header, chart.table, chart.title)}</details></figure>"
        )
        figures.append(chart.figure)
    return f'<div class="grid">{"".join(parts)}</div>'


def _table(header: Sequence[str], lines: Iterable[Sequence[str]], label: str) -> str:
    head = "".join(f'<th scope="col">{escape(word)}</th>' for word in header)
    body = "".join(
        f'<tr><th scope="row">{escape(line[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in line[1:])}</tr>'
        for line in lines
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _read_curves(rows: Sequence[Row]) -> tuple[list[Curves], list[str]]:
    """For every row: name of the curve, epoch, the seeds' values; and what could not be read."""
    result: list[Curves] = []
    problems: list[str] = []
    for row in rows:
        curves: dict[str, dict[int, list[float]]] = {}
        wanted = (f"validation/{row.metric.name}", LOSS, SECONDS)
        for record in row.records:
            try:
                metrics = record.metrics()
            except ValueError as error:
                problems.append(str(error))
                continue
            # Several lines of one epoch: the last one counts.
            last = {(m.name, m.epoch): m.value for m in metrics if m.value is not None and math.isfinite(m.value)}
            for (name, epoch), value in last.items():
                if name in wanted or name.startswith(_DETAILS):
                    curves.setdefault(name, {}).setdefault(epoch, []).append(value)
            steps = {m.epoch: m.step for m in metrics if m.name == LOSS}
            for epoch, step in steps.items():
                if (passes := passes_by(record, step)) is not None:
                    curves.setdefault(PASSES, {}).setdefault(epoch, []).append(passes)
        result.append(curves)
    return result, problems


def _limit_blocks(rows: Sequence[Row], curves: list[Curves]) -> list[str]:
    """Drops the curves per block and layer of the last rows of a very large page, and says so."""
    lines, dropped = 0, 0
    for i, known in enumerate(curves):
        lines += len(known)
        if lines > _BLOCK_LINES:
            curves[i] = {name: values for name, values in known.items() if not name.startswith(_DETAILS)}
            dropped += 1
    if not dropped:
        return []
    return [
        f"The curves per block of {dropped} of {len(rows)} rules, to keep the page small; report fewer runs at once."
    ]


def _read_pictures(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """For every row the reconstructions of its newest run that kept some, as a figure; and what could not be shown."""
    figures: list[str] = []
    problems: list[str] = []
    used, dropped = 0, 0
    for row in rows:
        figures.append("")
        kept = [record for record in row.records if os.path.lexists(record.path / _PICTURE)]
        if not kept:
            continue
        newest = max(kept, key=lambda record: age(record, kept))
        path = newest.path / _PICTURE
        try:
            content = plain_file(path, _PICTURE_BYTES)
        except (FileNotFoundError, ValueError) as error:
            problems.append(f"{path} cannot be read ({error}).")
            continue
        if used + len(content) > _PICTURE_BYTES:
            dropped += 1
            continue
        if not content.startswith(_PNG):
            problems.append(f"{path} is not a PNG picture.")
            continue
        used += len(content)
        name = f"{row.label}, seed {newest.seed}"
        figures[-1] = (
            f'<figure><h4>{escape(name)}</h4><img class="picture" alt="Reconstructions by {escape(name)}: test images above, '
            f'what the network made of them below" src="data:image/png;base64,{base64.b64encode(content).decode()}"></figure>'
        )
    if dropped:
        problems.append(
            f"The reconstructions of {dropped} of {len(rows)} rules, to keep the page small; report fewer runs at once."
        )
    return figures, problems


# ------------------------------------------------------------------------------------------- the rest of the page


def _unfinished(records: Sequence[Record], problems: Sequence[str]) -> str:
    others = [record for record in records if record.status != "done" and not record.part("bench")]
    foreign = sum(record.data.get("schema") != SCHEMA for record in records)
    words = list(dict.fromkeys(problems))
    if foreign:
        words.append(f"{_count(foreign, 'record')} of another schema than {SCHEMA}: what is unknown here is not shown.")
    parts = []
    if others:
        lines = "".join(
            f'<tr><th scope="row">{escape(record.id)}</th><td class="left">{escape(record.status)}</td>'
            f'<td class="left wrap">{escape((record.text("error") or "No reason was recorded.")[:_ERROR_CHARACTERS])}</td></tr>'
            for record in others
        )
        parts.append(
            f"<h2>Runs that did not finish</h2><p class='note'>They are in no mean above; their rules' rows count them.</p>"
            f'<div class="scroll" role="region" aria-label="Runs that did not finish" tabindex="0"><table><thead><tr>'
            f'<th scope="col">Run</th><th scope="col" class="left">Status</th><th scope="col" class="left">Why</th>'
            f"</tr></thead><tbody>{lines}</tbody></table></div>"
        )
    if words:
        items = "".join(f"<li>{escape(word)}</li>" for word in words)
        parts.append(f'<h2>Left out</h2><ul class="plain">{items}</ul>')
    return "".join(parts)


def _provenance(records: Sequence[Record], rows: Sequence[Row]) -> str:
    if not records:
        return ""
    runs = [
        (
            record.id,
            record.algorithm,
            str(record.seed),
            record.status,
            ", ".join(_texts(record.data.get("epochs"))) or UNKNOWN,
            (record.text("started") or "")[:19].replace("T", " "),
            _earlier(record),
            record.text("command") or UNKNOWN,
        )
        for record in records
    ]
    header = ("Run", "Rule", "Seed", "Status", "Epochs", "Started (UTC)", "Resumed from", "Command")
    notes = [f"{record.id}: {note}" for record in records for note in _texts(record.data.get("notes"))]
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        "<h2>Provenance</h2>"
        + _settings(records, "hardware", "Hardware")
        + _settings(records, "versions", "Versions")
        + _settings(records, "source", "Source")
        + _settings(records, "precision", "Arithmetic")
        + f"<details><summary>Runs and commands ({len(runs)})</summary>{_table(header, runs, 'Runs')}</details>"
        + (f'<details><summary>Notes</summary><ul class="plain">{items}</ul></details>' if notes else "")
        + "".join(_stages(row) for row in rows[:_CONFIGS])
        + "".join(_config(row) for row in rows[:_CONFIGS])
        + ("<p class='note'>Further configurations are in the runs' folders.</p>" if len(rows) > _CONFIGS else "")
    )


def _earlier(record: Record) -> str:
    """The run that this one went on with, and when and how long its parts ran."""
    parts = record.data.get("parts")
    told = [
        f"{str(part.get('started'))[:19].replace('T', ' ')} for {part.get('epochs')} epochs"
        for part in (parts if isinstance(parts, list) else [])
        if isinstance(part, Mapping)
    ]
    return "; ".join([record.text("resumed_from") or UNKNOWN, *told])


def _settings(records: Sequence[Record], key: str, title: str) -> str:
    """The distinct contents of ``key``, each with the number of records that have it."""
    counts: dict[str, int] = {}
    for record in records:
        text = _settled(record.part(key))
        counts[text] = counts.get(text, 0) + 1
    if not any(record.part(key) for record in records):
        return ""
    parts = []
    for text, count in counts.items():
        values = json.loads(text)
        words = ", ".join(f"{name} {_word(value)}" for name, value in values.items()) or "not recorded"
        parts.append(f"<li>{_count(count, 'run')}: {escape(words)}</li>")
    return f'<h3>{title}</h3><ul class="plain">{"".join(parts)}</ul>'


def _stages(row: Row) -> str:
    """What every stage of a training cost, of the row's last run; empty where the record does not say."""
    stages = row.newest.part("cost").get("stages")
    lines = [stage for stage in stages if isinstance(stage, Mapping)] if isinstance(stages, list) else []
    if not lines:
        return ""
    names = list(dict.fromkeys(name for line in lines for name in line))
    table = [(str(number), *(_word(line.get(name)) for name in names)) for number, line in enumerate(lines, start=1)]
    title = f"Cost per stage: {' · '.join(filter(None, (row.place, row.label)))}, seed {row.newest.seed}"
    return f"<details><summary>{escape(title)}</summary>{_table(('Stage', *names), table, title)}</details>"


def _config(row: Row) -> str:
    first = (row.records or row.missing)[0]
    text = json.dumps(first.part("config"), indent=2, ensure_ascii=False)
    if len(text) > _CONFIG_CHARACTERS:
        text = text[:_CONFIG_CHARACTERS] + "\n… cut here; the whole is in the run's folder"
    place = " · ".join(filter(None, (row.place, row.terms if row.mode else "", row.label)))
    return (
        f"<details><summary>Configuration: {escape(place)}, seed {first.seed}</summary>"
        f'<pre tabindex="0"><code>{escape(text)}</code></pre></details>'
    )


def _settled(part: Mapping[str, Any]) -> str:
    return json.dumps(part, sort_keys=True, ensure_ascii=False)


def _word(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []
