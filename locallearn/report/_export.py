"""Every figure as SVG and PDF and every table as CSV and LaTeX, beside the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

from locallearn.report._columns import AT_LEAST, UNKNOWN
from locallearn.report._html import Book, file_name, slug
from locallearn.tables import Column, Line, Table, write


def folder_of(page: Path) -> Path:
    """Where the files of a page go."""
    return page.with_name(f"{page.stem}_figures")


def export(book: Book, folder: Path) -> list[Path]:
    """Writes the files of a page; those of an earlier page that have other names stay.

    Returns:
        What was written.
    """
    from locallearn.report._vector import draw

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (section, chart) in enumerate(book.charts):
        stem = folder / file_name(number, section, chart)
        written += draw(chart, stem)
        table = _table(f"{section}: {chart.title}", chart.header, chart.table)
        written += [write(table, stem.with_name(f"{stem.name}.{end}")) for end in ("csv", "tex")]
    for number, (section, title, header, lines) in enumerate(book.tables):
        stem = folder / f"table-{number:03d}-{slug(section, 40)}-{slug(title, 40)}"
        table = _table(f"{section}: {title}", header, lines)
        written += [write(table, stem.with_name(f"{stem.name}.{end}")) for end in ("csv", "tex")]
    return written


def _table(title: str, header: Sequence[str], lines: Sequence[Sequence[Any]]) -> Table:
    keys: list[str] = []
    for word in header:
        key, n = word, 2
        while key in keys:  # two columns of one heading, of intervals say
            key, n = f"{word} {n}", n + 1
        keys.append(key)
    plain = [len(lines) > 0 and i > 0 and _numeric([line[i] for line in lines]) for i in range(len(header))]
    found = [Column(key, word, numeric=of) for key, word, of in zip(keys, header, plain, strict=True)]
    return Table(unescape(title), found, [Line(list(line)) for line in lines])


def _numeric(cells: Sequence[str]) -> bool:
    return sum(cell[:1].isdigit() or cell[:1] in ("+", "-", AT_LEAST, UNKNOWN) for cell in cells) > len(cells) / 2
