"""The formats, and files of them."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from locallearn.records import write_file
from locallearn.tables._latex import latex
from locallearn.tables._table import Line, Table, plain

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would work out instead of showing


def render(table: Table, kind: str) -> str:
    """The table as text, with a line break at the end.

    Args:
        table: the table.
        kind: one of :data:`FORMATS`.

    Raises:
        ValueError: there is no such format.
    """
    if kind not in _WRITERS:
        raise ValueError(f"there is no format {kind!r} of tables; the formats are {', '.join(FORMATS)}")
    return _WRITERS[kind](table)


def kind_of(path: Path) -> str:
    """The format that a file's suffix stands for.

    Raises:
        ValueError: it stands for none.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in _WRITERS:
        raise ValueError(f"{path} is no name for a table, expected one that ends in .{', .'.join(FORMATS)}")
    return kind


def check_place(path: Path) -> None:
    """Whether a table can be written to ``path``: makes its folder, and writes and removes an empty file in it.

    Raises:
        ValueError: its suffix stands for no format, or it cannot be written; the sentence says why.
    """
    kind_of(path)
    if path.is_dir():
        raise ValueError(f"a table cannot be written to {path}, which is a folder; give a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"a table cannot be written to {path} ({error.strerror}); give another place") from None


def write(table: Table, path: Path) -> Path:
    """Writes the table in the format of its suffix; the file is there as a whole or not at all.

    Returns:
        ``path``.

    Raises:
        ValueError: the suffix stands for no format.
        OSError: it cannot be written.
    """
    text = render(table, kind_of(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(
        path, text.encode("utf-8", "backslashreplace")
    )  # half characters, of odd file names, are shown as escapes
    return path


def _records(table: Table) -> list[dict[str, Any]]:
    """One mapping per line, by :func:`_keys`."""
    keys = _keys(table)
    return [{key: value for key, value in _values(table, line).items() if key in keys} for line in table.lines]


def _keys(table: Table) -> list[str]:
    """What a program is told of every line: its group, where any line has one, the columns' cells, its notes."""
    grouped = any(line.group for line in table.lines)
    return [*(["group"] if grouped else []), *(column.key for column in table.columns), "notes"]


def _values(table: Table, line: Line) -> dict[str, Any]:
    cells = {column.key: cell.known for column, cell in zip(table.columns, line, strict=True)}
    return {"group": line.group, **cells, "notes": list(line.notes)}


def _csv(table: Table) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([_defused(name) for name in _keys(table)])
    for record in _records(table):
        writer.writerow([_field(value) for value in record.values()])
    return file.getvalue()


def _field(value: Any) -> str:
    if isinstance(value, list):
        return _defused(" ".join(value))
    return _defused(value) if isinstance(value, str) else plain(value)


def _defused(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


def _json(table: Table) -> str:
    rows = [
        {key: dict(value) if isinstance(value, Mapping) else value for key, value in record.items()}
        for record in _records(table)
    ]
    columns = [{"key": column.key, "title": column.title, "unit": column.unit} for column in table.columns]
    content = {"title": table.title, "columns": columns, "rows": rows, "notes": list(table.notes)}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _markdown(table: Table) -> str:
    marks = table.footnotes()
    rows, group = [], ""
    for line in table.lines:
        if line.group != group:
            group = line.group
            rows.append([f"*{_marked_down(group)}*", *("" for _ in table.columns[1:])])
        cells = ["<br>".join(map(_marked_down, cell.shown)) for cell in line]
        if line.notes:
            cells[0] += f" <sup>{line.marks(marks)}</sup>"
        rows.append(cells)
    lines = [
        *([f"**{_marked_down(table.title)}**", ""] if table.title else []),
        _row([_marked_down(column.heading) for column in table.columns]),
        _row(["---:" if column.numeric else "---" for column in table.columns]),
        *map(_row, rows),
        *(line for note, mark in marks.items() for line in ("", f"<sup>{mark}</sup> {_marked_down(note)}")),
        *(line for note in table.notes for line in ("", _marked_down(note))),
    ]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _marked_down(text: str) -> str:
    """Text of which Markdown takes no sign for its own."""
    return "".join(f"\\{sign}" if sign in r"\`*_[]<>|#~" else sign for sign in " ".join(text.split()))


_WRITERS: dict[str, Callable[[Table], str]] = {"csv": _csv, "md": _markdown, "tex": latex, "json": _json}

FORMATS = tuple(_WRITERS)
"""Formats, which are the suffixes of their files, too."""
