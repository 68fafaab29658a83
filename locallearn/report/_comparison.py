"""The comparison as a table for papers, and as figures for programs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from locallearn.records import Record
from locallearn.report._columns import AT_LEAST, TIMES, UNKNOWN, Column, columns, p_text, quality, source_of
from locallearn.report._terminal import BASELINE, place, selection
from locallearn.statistics import Figure, PairedDifference, Row, compare_table, is_cost
from locallearn.tables import Cell, Line, Table, kind_of, plus_minus, range_text, write
from locallearn.tables import Column as Heading

_READERS = ("md", "tex")
_NOTE = (
    "Mean ± standard deviation over the seeds that finished, to the second digit of the latter. Below it, against {baseline} "
    "and paired by seed: the difference of a metric, the ratio of a cost (geometric mean, "
    f"{TIMES}), with its 95 % t-interval. p: of sign flips, two-sided, in brackets after Holm's correction over the rules; "
    f"with n seeds it cannot fall below 2/2ⁿ. {UNKNOWN}: unknown."
)
_CENSORED = (
    f"{AT_LEAST}: not every run reached the target; one that finished without it counts with all that it spent, one that did "
    "not finish is left out."
)
# Units of figures as they are recorded, by the ends of their names.
_UNITS = {"_s": "s", "seconds": "s", "_g": "g", "_flops": "FLOP", "_bytes": "B"}


def write_comparison(records: Sequence[Record], path: Path) -> Path:
    """Writes what the runs say of the rules: as a table for readers (``.md``, ``.tex``) or all figures (``.csv``, ``.json``).

    Raises:
        ValueError: the suffix stands for no format.
        OSError: it cannot be written.
    """
    made = comparison_table if kind_of(path) in _READERS else figures_table
    return write(made(records), path)


def comparison_table(records: Sequence[Record]) -> Table:
    """One line per rule, as papers have it: the figures of the terminal's table, rounded to their uncertainty.

    Below a metric stands the paired difference to the baseline with its interval, and beside it p; below a cost the ratio with
    its interval. A title, or a line of its own where there are several, says data set, network, mode and target; what a row
    must not be read without is a footnote.
    """
    rows = compare_table(records, BASELINE)
    shown = [column for column in selection(columns(rows), rows) if not _is_asked(column.key)]
    headings = {column.key: _headings(column, rows) for column in shown}
    places = list(dict.fromkeys(map(place, rows)))
    notes = [_NOTE.format(baseline=BASELINE), *_models(shown)]
    if any(figure.censored for row in rows for figure in row.figures.values()):
        notes.append(_CENSORED)
    lines = [
        Line(
            [
                *(row.label, Cell(len(row.records), row.seeds)),
                *(cell for column in shown for cell in _cells(row, column, headings[column.key])),
            ],
            place(row) if len(places) > 1 else "",
            (*row.notes, *_reasons(row, shown)),
        )
        for row in rows
    ]
    return Table(
        places[0] if len(places) == 1 else "",
        [Heading("rule", "Rule"), Heading("n", "n", numeric=True), *chain.from_iterable(headings.values())],
        lines,
        notes if rows else ["There is no run to show."],
    )


def figures_table(records: Sequence[Record]) -> Table:
    """One line per rule and figure, for programs: nothing is rounded, and units are those of the records.

    ``shown`` is what a reader would be told of it, in the unit of the table for readers.
    """
    rows = compare_table(records, BASELINE)
    every = columns(rows)
    lines = []
    for row in rows:
        for column in every:
            figure = row.figures.get(column.key)
            if figure is not None:
                lines.append(Line([*_of_row(row), *_of_figure(row, column, figure, rows)], notes=row.notes))
        if not row.figures:
            lines.append(Line([*_of_row(row), *([None] * len(_FIGURE))], notes=row.notes))
    return Table("", [Heading(key, key) for key in (*_ROW, *_FIGURE)], lines, [_NOTE.format(baseline=BASELINE)])


_ROW = (
    "dataset",
    "net",
    "task",
    "mode",
    "target",
    "rule",
    "variant",
    "label",
    "baseline",
    "seeds_finished",
    "seeds_run",
)
_FIGURE = (
    *("figure", "title", "unit", "kind", "n", "mean", "std", "centre", "centre_lo", "centre_hi"),
    *(
        "pairs",
        "difference",
        "difference_lo",
        "difference_hi",
        "ratio",
        "ratio_lo",
        "ratio_hi",
        "p",
        "p_least",
        "p_holm",
    ),
    *("reached", "shown", "reason", "by_seed"),
)


def _of_row(row: Row) -> tuple[str | float | None, ...]:
    done = len(row.records)
    return (
        *(row.dataset, row.net, row.task, row.mode, row.target, row.algorithm, row.variant, row.label, BASELINE),
        *(done, done + len(row.missing)),
    )


def _of_figure(row: Row, column: Column, figure: Figure, rows: Sequence[Row]) -> list[Cell]:
    lo, hi = figure.interval or (None, None)
    pair = figure.paired
    versus = (
        [None] * 10
        if pair is None
        else [
            *(pair.n, pair.mean, pair.lo, pair.hi, pair.ratio, pair.ratio_lo, pair.ratio_hi),
            *(pair.p, pair.p_least, pair.p_holm),
        ]
    )
    return [
        Cell(value)
        for value in (
            *(column.key, column.title, _unit(column.key), _kind(column.key, rows)),
            *(figure.summary.n, figure.summary.mean, figure.summary.std, figure.centre, lo, hi, *versus),
            None if figure.arrivals is None else str(figure.arrivals),
            f"{_mean(column, figure, row)} {column.unit}".rstrip(),
            figure.reason,
            {str(seed): value for seed, value in figure.by_seed.items()},
        )
    ]


def _unit(key: str) -> str:
    if key.startswith(("energy_j/", "energy_net_j/", "target/joules/")):
        return "J"
    return next((unit for end, unit in _UNITS.items() if key.endswith(end)), "")


def _kind(key: str, rows: Sequence[Row]) -> str | None:
    """How a cost was found; ``None`` for what is no cost of a machine."""
    if key.startswith(("energy_j/", "energy_net_j/", "target/joules/")):
        return quality(source_of(key), rows)
    if key == "co2_g":
        return "modelled"
    if _unit(key) == "s":
        return "measured"
    return "counted" if _unit(key) in ("FLOP", "B") else None


def _is_asked(key: str) -> bool:
    """Whether it is the target itself, which the title says."""
    return key.startswith("target/") and not key.startswith(("target/seconds", "target/samples", "target/joules/"))


# ------------------------------------------------------------------------------------------- for readers


def _headings(column: Column, rows: Sequence[Row]) -> list[Heading]:
    """Of one figure: itself, and p where a reader looks for it and any row has one."""
    title = column.title.partition(" (")[0]  # by what joules were modelled is told below
    tested = not is_cost(column.key) or column.key.startswith("target/")  # there the costs are what is asked for
    some = any((pair := _pair(row, column)) is not None and pair.p is not None for row in rows)
    own = Heading(column.key, title, column.qualifier, numeric=True)
    return [own, Heading(f"{column.key}/p", "p (Holm)", numeric=True)] if tested and some else [own]


def _cells(row: Row, column: Column, headings: Sequence[Heading]) -> list[Cell]:
    """Of one figure: mean and deviation over the comparison with the baseline, and p."""
    figure, pair = row.figures.get(column.key), _pair(row, column)
    if figure is None:
        return [Cell(None)] * len(headings)
    told = _mean(column, figure, row)
    if figure.arrivals is None and figure.summary.n != len(row.records):
        told += f" (n = {figure.summary.n})"
    versus = None if pair is None else _versus(column, pair)
    if pair is not None and versus is not None:
        told += f"\n{versus}" + ("" if pair.n == figure.summary.n else f" ({pair.n} pairs)")
    p = None if pair is None else pair.p
    corrected = "" if pair is None or pair.p_holm is None else f" ({p_text(pair.p_holm)})"
    return [Cell(figure.summary.mean, told), Cell(p, None if p is None else f"{p_text(p)}{corrected}")][: len(headings)]


def _pair(row: Row, column: Column) -> PairedDifference | None:
    figure = row.figures.get(column.key)
    return None if figure is None else figure.paired


def _mean(column: Column, figure: Figure, row: Row) -> str:
    mean, std = figure.summary.mean, figure.summary.std
    if mean is None:
        return UNKNOWN
    least = column.least(figure, row)
    if figure.censored:
        return f"{least}{plus_minus(mean / column.scale, None)} ({figure.arrivals})"
    return least + plus_minus(mean / column.scale, None if std is None else std / column.scale)


def _versus(column: Column, pair: PairedDifference) -> str | None:
    """The difference of a metric, the ratio of a cost, with its interval."""
    if is_cost(column.key):
        if pair.ratio is None:
            return None
        number, ends = "", ""
        if pair.ratio_lo is not None and pair.ratio_hi is not None:
            number, _, ends = range_text(pair.ratio, pair.ratio_lo, pair.ratio_hi, ratio=True).partition(" ")
        return f"{number}{TIMES} {ends}" if ends else column.ratio(pair.ratio)
    if pair.mean is None:
        return None
    mean, scale = pair.mean / column.scale, column.scale
    told = plus_minus(mean, None) if pair.lo is None or pair.hi is None else ""
    if pair.lo is not None and pair.hi is not None:
        told = range_text(mean, pair.lo / scale, pair.hi / scale)
    return told if told.startswith("-") or not told.partition(" ")[0].strip("0.") else f"+{told}"


def _models(shown: Sequence[Column]) -> list[str]:
    """By what joules were modelled."""
    return [
        f"{column.title.partition(' (')[0]}: {column.title.partition(' (')[2].removesuffix(')')}."
        for column in shown
        if " (" in column.title
    ]


def _reasons(row: Row, shown: Sequence[Column]) -> list[str]:
    """Why a figure is not compared, where that is not told by the row's own notes."""
    found = []
    for column in shown:
        figure = row.figures.get(column.key)
        if figure is not None and figure.reason is not None and not figure.censored:
            found.append(f"{column.title.partition(' (')[0]}: {figure.reason}.")
    return found
