"""What a table is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import TypeAlias

Value: TypeAlias = str | int | float | bool | Mapping[str, float] | None
"""What a cell holds: text, a number, yes or no, numbers by name, or nothing that is known."""

UNKNOWN = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """A value, and what readers see of it.

    Attributes:
        value: for programs (CSV, JSON): as it is, not rounded. A number that is not finite is unknown.
        text: for readers (Markdown, LaTeX): rounded, with spread or unit as the column wants it, a line break where the cell
            is to have two lines; ``None``: the value's own.
    """

    value: Value
    text: str | None = None

    @property
    def known(self) -> Value:
        """The value, ``None`` for a number that is none."""
        return None if isinstance(self.value, float) and not math.isfinite(self.value) else self.value

    @property
    def shown(self) -> list[str]:
        """What readers see, line by line; a dash for what is unknown."""
        text = plain(self.known, UNKNOWN).replace("\n", " ") if self.text is None else self.text
        return text.split("\n")


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: its name for programs, unique in the table.
        title: its heading for readers, plain text.
        unit: of what readers see; stands behind the heading.
        numeric: whether it is set flush right.
    """

    key: str
    title: str
    unit: str = ""
    numeric: bool = False

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True)
class Line:
    """One row.

    Attributes:
        cells: one per column; a plain value stands for ``Cell(value)``.
        group: what it belongs to; readers see a line of its own where that changes.
        notes: what it must not be read without, whole sentences; readers see marks and footnotes.
    """

    cells: Sequence[Cell | Value]
    group: str = ""
    notes: Sequence[str] = ()

    def marks(self, of: Mapping[str, str]) -> str:
        """The marks of its notes, in order."""
        return ",".join(mark for note, mark in of.items() if note in self.notes)

    def __iter__(self) -> Iterator[Cell]:
        return (cell if isinstance(cell, Cell) else Cell(cell) for cell in self.cells)


@dataclass(frozen=True)
class Table:
    """Rows under headings.

    Attributes:
        title: plain text, empty for none.
        columns: in order.
        lines: in order.
        notes: what holds for all of it, whole sentences.

    Raises:
        ValueError: two columns have one key, or a line has another number of cells than there are columns.
    """

    title: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        keys = [column.key for column in self.columns]
        twice = sorted({key for key in keys if keys.count(key) > 1} | {"group", "notes"}.intersection(keys))
        if twice or not keys:
            raise ValueError(
                f"the columns' keys are {keys}: give at least one, every one once, and none the name group or notes"
            )
        for number, line in enumerate(self.lines, 1):
            if len(line.cells) != len(keys):
                raise ValueError(f"line {number} has {len(line.cells)} cells, but there are {len(keys)} columns")

    def footnotes(self) -> dict[str, str]:
        """The lines' notes, each once, with the mark of each: a, b, ... z, aa, ab, ..."""
        sentences = dict.fromkeys(note for line in self.lines for note in line.notes)
        return {sentence: _mark(place) for place, sentence in enumerate(sentences)}


def plain(value: Value, unknown: str = "") -> str:
    """A value as text that can be read back."""
    if value is None:
        return unknown
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return " ".join(f"{name}={plain(number)}" for name, number in value.items())
    return value if isinstance(value, str) else repr(value)


def _mark(place: int) -> str:
    letters = ""
    place += 1
    while place:
        place, last = divmod(place - 1, len(ascii_lowercase))
        letters = ascii_lowercase[last] + letters
    return letters
