"""The headline table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.table import Table
from rich.text import Text

from locallearn.records import Record
from locallearn.report._columns import AT_LEAST, LEGEND, UNKNOWN, Column, columns, headline_metric, shared_notes
from locallearn.statistics import Row, compare_table

BASELINE = "backprop"
_SHORT = {
    "train_s": "train",
    "train_flops": "training",
    "update_flops": "update",
    "activation_peak_bytes": "peak activ.",
}
_NOTES = 12
_RULE = 32


def terminal_table(records: Sequence[Record], width: int = 80) -> Table:
    """The figures of the report's headline table that fit a terminal, one line per rule.

    Each cell holds the mean ± standard deviation over seeds and below it the ratio to backprop, paired by seed. What a row
    must not be read without stands below the table.

    Args:
        records: of runs.
        width: of the terminal; where lines have to break, they break between words.
    """
    rows = compare_table(records, BASELINE)
    shown = selection(columns(rows), rows)
    notes = shared_notes(rows)
    more = [f"{len(notes) - _NOTES} more notes are in the report."] if len(notes) > _NOTES else []
    caption = Text("\n".join([LEGEND.format(baseline=BASELINE), *notes[:_NOTES], *more]))
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    if not any(row.records for row in rows):
        return Table("There is no finished run to show.")
    places = [(name, list(members)) for name, members in groupby(rows, key=place)]
    longest = max(len(row.label) for row in rows)
    named = max(len(name) for name, _ in places) if len(places) > 1 else 0
    rule = max(min(longest, max(_RULE, width // 3)), min(named, _RULE))  # longer ones break between words
    table.add_column("rule", width=rule, overflow="fold")
    table.add_column("n", justify="right")
    for heading in _headings(shown):
        table.add_column(Text(heading), justify="right", overflow="fold")
    for name, members in places:
        if len(places) == 1:
            table.title = Text(name)
        else:
            table.add_section()
            table.add_row(Text(name, style="italic", no_wrap=False, overflow="fold"))
        for row in members:
            table.add_row(Text(row.label), row.seeds, *(_cell(row, column) for column in shown))
    _fit(table, width)
    return table


def _fit(table: Table, width: int) -> None:
    """Columns as narrow as their longest word where the table is too wide, from the right on, as many as have to be."""
    lines = [
        [line for text in (column.header, *column.cells) for line in str(text).splitlines()] for column in table.columns
    ]
    taken = [column.width or max(map(len, found)) for found, column in zip(lines, table.columns, strict=True)]
    over = sum(taken) + 2 * len(taken) - width
    for column, found, most in reversed(list(zip(table.columns, lines, taken, strict=True))):
        least = max(len(word) for line in found for word in line.split(" "))
        if over > 0 and column.width is None:
            column.width = max(least, most - over)
            over -= most - column.width


def _headings(shown: Sequence[Column]) -> list[str]:
    """What stands over the columns, without the name of the program that joules are from where they differ without it."""
    long = [_heading(column) for column in shown]
    short = [
        text.partition(": ")[2] or text if column.key.startswith("energy_j/") else text
        for text, column in zip(long, shown, strict=True)
    ]
    return short if len(set(short)) == len(short) else long


def _heading(column: Column) -> str:
    """A heading of short words, one line each where the terminal is narrow."""
    title = _SHORT.get(column.key, column.title.lower().replace(",", "").removeprefix("energy "))
    title = title.partition(" (")[0]  # by what a figure was modelled has its place on the page
    for separator in ":/":
        title = title.replace(separator, f"{separator} ")
    return f"{title} ({column.qualifier})" if column.qualifier else title


def place(row: Row) -> str:
    """What all rows of a section have in common: data set, network, mode and target."""
    return f"{row.place} · mode {row.terms}"


def selection(every: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """The figures that a table of moderate width has room for."""
    metrics = [headline_metric(every, quality) for quality in {row.metric for row in rows}]
    flops = "train_flops" if any(column.key == "train_flops" for column in every) else "update_flops"
    wanted = {"train_s", flops, "activation_peak_bytes", *(metric.key for metric in metrics if metric)}
    prefixes = ("energy_j/", "target/")
    return [column for column in every if column.key in wanted or column.key.startswith(prefixes)]


def _cell(row: Row, column: Column) -> Text:
    figure = row.figures.get(column.key)
    if figure is None:
        return Text(UNKNOWN)
    # In a narrow terminal the line breaks at the space: before the sign, not after it.
    text = Text(column.summary(figure, row).replace("± ", "±").replace(f"{AT_LEAST} ", AT_LEAST))
    pair = figure.paired
    if pair and pair.ratio is not None:
        over = "" if pair.n == figure.summary.n else f" ({pair.n} pairs)"
        text.append(f"\n{column.ratio(pair.ratio)}{over}", style="dim")
    if figure.arrivals is not None:
        text.append(f"\n{figure.arrivals}", style="dim")
    elif figure.summary.n != len(row.records):
        text.append(f"\nn = {figure.summary.n}", style="dim")
    return text
