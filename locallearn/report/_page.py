"""One self-contained HTML page from any set of records."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from locallearn.records import Record
from locallearn.report._analysis import Analysis, Likeness, analysis_groups, analysis_notes, read_analyses
from locallearn.report._assets import PLAIN, SCRIPT, STYLE
from locallearn.report._columns import columns
from locallearn.report._distilled import read_distilled
from locallearn.report._energy import per_sample
from locallearn.report._export import export, folder_of
from locallearn.report._files import limit_blocks, read_curves, read_pictures
from locallearn.report._glance import glance
from locallearn.report._html import Book, count, scrolled, texts
from locallearn.report._library import packed, plotly
from locallearn.report._locality import locality_table
from locallearn.report._runs import failures, provenance, unfinished, unfinished_runs
from locallearn.report._section import Section, section_html
from locallearn.report._styles import styles
from locallearn.report._sweeps import estimate_charts
from locallearn.report._tuning import Search, read_searches
from locallearn.report._verdicts import verdict
from locallearn.statistics import Row, compare_table

_BASELINE = "backprop"
# Numbers drawn in curves, which keeps a page of hundreds of runs small.
_CURVE_POINTS = 40_000


def write_report(
    records: Sequence[Record],
    out: Path,
    *,
    title: str = "locallearn report",
    problems: Sequence[str] = (),
    figures: bool = False,
    running: Sequence[Record] = (),
    watch_s: float | None = None,
) -> Path:
    """Writes one HTML page about ``records`` that needs nothing but itself: no network, no server, no other file.

    Args:
        records: any runs; those that did not end with ``done`` are listed with their error, not compared.
        out: the page's file; an older page is replaced in one step once the new one is complete.
        title: heading of the page.
        problems: sentences on records that could not be read, e.g. :attr:`locallearn.records.Scan.problems`.
        figures: write every chart as SVG and PDF, and every table as CSV and LaTeX, into the folder ``<name>_figures`` beside
            the page, which links to them.
        running: runs that go on; the top of the page says how far they are.
        watch_s: have the open page read itself from the disk again so often, in seconds; ``None``: never.

    Returns:
        ``out``.

    Raises:
        ValueError: ``out`` is a folder.
    """
    check_place(out)
    book = Book(files=folder_of(out).name if figures else "")
    page = _render(records, title, problems, running, watch_s, out, book)
    if figures:
        export(book, folder_of(out))
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


def _render(
    records: Sequence[Record],
    title: str,
    problems: Sequence[str],
    running: Sequence[Record],
    watch_s: float | None,
    out: Path,
    book: Book,
) -> str:
    benches = [record for record in records if record.part("bench")]
    searches, unread = read_searches(records)
    trials = frozenset(name for search in searches for name in search.records)
    all_runs = [record for record in records if not record.part("bench")]
    # Trials of a search stand in its section; a page of nothing but trials is about them.
    records = [record for record in all_runs if record.id not in trials] or all_runs
    aside = len(all_runs) - len(records)
    rows = [per_sample(row) for row in compare_table(records, _BASELINE)]
    curves, runs, damaged = read_curves(rows)
    damaged += limit_blocks(rows, curves)
    pictures, unseen = read_pictures(rows)
    style = styles(rows, _BASELINE)
    points = max(12, min(200, _CURVE_POINTS // max(1, sum(map(len, curves)))))
    sections = []
    order = groupby(zip(rows, curves, runs, pictures, strict=True), key=lambda item: item[0].section)
    for number, (_, items) in enumerate(order):
        members, known, single, seen = zip(*items, strict=True)
        shown = columns(members)
        said = verdict(members, shown, _BASELINE)
        sections.append(Section(f"s{number}", members, shown, known, single, seen, said))
    first = glance(sections, style, _BASELINE, book) if len(sections) > 1 else ""
    body = "".join(section_html(section, style, _BASELINE, points, book) for section in sections)
    analyses, likenesses, unused = read_analyses(rows, style)
    others = []
    if analyses or likenesses:
        book.section = "representations"
        others.append(("representations", "Representations", _representations(analyses, likenesses, book)))
    others += [(f"t{i}", search.name, _search(f"t{i}", search, book)) for i, search in enumerate(searches)]
    students, unusable = read_distilled(rows)
    if students:
        book.section = "distilled"
        inner = f'<section id="distilled"><h2>Smaller students</h2>{book.grid(students)}</section>'
        others.append(("distilled", "Smaller students", inner))
    if rows and (claims := locality_table(rows))[1]:
        book.section = "locality"
        inner = '<h2 id="locality">Locality</h2><p class="note">What every rule claims; locallearn audit checks it.</p>'
        others.append(("locality", "Locality", inner + book.table("Claims of locality", *claims)))
    body += "".join(part for *_, part in others)
    book.section = "benchmarks"
    body = body + "".join(_bench(record, book) for record in benches) or "<p>There is no finished run to show yet.</p>"
    left = [*problems, *damaged, *unseen, *unused, *unread, *unusable]
    more = [(anchor, name) for anchor, name, _ in others] + ([("runs", "Runs and provenance")] if records else [])
    links = " · ".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name in more)
    lost = unfinished_runs(records, running, rows)
    head = f"{_lead(records, rows, aside)}{failures(lost, running)}"
    head += f'<p class="note">Also here: {links}</p>' if links else ""
    tail = unfinished(lost, records, left, out) + provenance(records, rows, out, book)
    form = '<div id="filter" role="search" hidden></div>'
    return _document(title, head, f"{form}{first}{body}{tail}", book, watch_s)


def _document(title: str, head: str, body: str, book: Book, watch_s: float | None) -> str:
    library = plotly()
    # Only these two scripts may run and nothing may be fetched, whatever a record smuggles into the page.
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in (library, SCRIPT))
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    watched = "" if watch_s is None else f' data-watch="{watch_s:g}"'
    return f"""<!DOCTYPE html>
<html lang="en"{watched}>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
<noscript><style>{PLAIN}</style></noscript>
</head>
<body>
<a class="skip" href="#content">Skip to the results</a>
<header class="page"><h1>{escape(title)}</h1>{head}</header>
<main id="content">
<noscript><p>Charts need JavaScript; every number is also in the tables.</p></noscript>
{body}
</main>
<footer class="muted">Made by locallearn from its run records.</footer>
<script type="application/json" id="charts">{_embed(book.figures)}</script>
<script type="text/plain" id="library">{packed(library)}</script>
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


def _lead(records: Sequence[Record], rows: Sequence[Row], aside: int) -> str:
    if not records:
        return '<p class="lead">No records were found.</p>'
    done = sum(record.status == "done" for record in records)
    ends = sorted(filter(None, (record.text("finished") for record in records)))
    when = "" if not ends else f", {ends[0][:10]}" + (f" to {ends[-1][:10]}" if ends[-1][:10] != ends[0][:10] else "")
    rules = len({row.algorithm for row in rows})
    compared = len({row.section for row in rows})
    trials = f" {count(aside, 'trial')} of tuning {'is' if aside == 1 else 'are'} in no comparison." if aside else ""
    return (
        f'<p class="lead">{count(done, "finished run")}, {count(rules, "rule")}, {count(compared, "comparison")}'
        f"{escape(when)} (UTC).{trials}</p>"
    )


# ------------------------------------------------------------------------------------------- other sections


def _bench(record: Record, book: Book) -> str:
    """The table that ``locallearn bench`` printed, and a chart where its figures make curves."""
    bench = record.part("bench")
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in texts(bench.get("columns")))
    rows = bench.get("rows")
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in texts(row)) + "</tr>"
        for row in (rows if isinstance(rows, list) else [])
    )
    where = " · ".join(filter(None, (record.text("dataset"), record.text("net"), record.text("started"))))
    table = f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody>"
    drawn = estimate_charts(bench)
    charts = book.grid(drawn) if drawn else ""
    return (
        f"<section><h2>{escape(str(bench.get('title', 'benchmark')))}</h2>"
        f'<p class="note">{escape(where)}; <code>{escape(record.text("command") or "")}</code></p>'
        f"{scrolled(table, 'Benchmark')}{charts}</section>"
    )


def _representations(analyses: Sequence[Analysis], likenesses: Sequence[Likeness], book: Book) -> str:
    """What `locallearn analyze` found of the page's runs."""
    notes = "".join(f"<li>{escape(note)}</li>" for note in analysis_notes(analyses, likenesses))
    charts = "".join(
        f"<h3>{escape(heading)}</h3>{book.grid(group)}"
        for heading, group in analysis_groups(analyses, likenesses)
        if group
    )
    return (
        f'<section id="representations"><h2>Representations</h2><ul class="plain note">{notes}</ul>{charts}</section>'
    )


def _search(anchor: str, search: Search, book: Book) -> str:
    """What a search of settings found, how, and by which command."""
    book.section = search.name
    best = book.table("Best settings", *search.best) if search.best[1] else ""
    command = f'<p class="note"><code>{escape(search.command)}</code></p>' if search.command else ""
    return (
        f'<section id="{anchor}"><h2>{escape(search.name)}</h2><p class="verdict">{escape(search.sentence)}</p>{command}'
        f"{best}{book.grid(search.charts)}</section>"
    )
