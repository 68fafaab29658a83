"""The first look: every comparison in one line."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from locallearn.report._charts import lower
from locallearn.report._columns import AT_LEAST, UNKNOWN, Column, found_how, ratio_text
from locallearn.report._html import Book, scrolled
from locallearn.report._section import Section
from locallearn.report._styles import Styles
from locallearn.report._verdicts import cost_ratios
from locallearn.statistics import Row

_HEADER = (
    "Comparison",
    "Best",
    "Figure",
    "Best other rule against {baseline}",
    "Time",
    "Joules",
    "Memory",
    "Certainty",
    "Runs",
)
_WIDTH, _HEIGHT = 120, 16


def glance(sections: Sequence[Section], style: Styles, baseline: str, book: Book) -> str:
    """A table with a line for every section: who is best, by how much against the baseline, at what cost, how certain."""
    reach = _reach(sections)
    lines: list[str] = []
    plain: list[Sequence[str]] = []
    for section in sections:
        found = section.verdict
        rows, metric, best = section.rows, found.metric, found.best
        place = f"{rows[0].place}"
        badge = f" ({rows[0].terms})" if rows[0].mode else ""
        name = f'<a href="#{section.anchor}">{escape(place)}</a><small>{escape(badge.strip(" ()"))}</small>'
        figure = best.figures.get(metric.key) if best is not None and metric is not None else None
        value = (
            UNKNOWN
            if figure is None or metric is None
            else f"{metric.number(figure.summary.mean)} {metric.unit}".strip()
        )
        if figure is not None and figure.censored:
            value = f"{AT_LEAST} {value}"
        what = (
            ""
            if metric is None
            else f"<small>{escape(lower(metric.heading if metric.lower else metric.title))}</small>"
        )
        difference, picture = _difference(section, style, reach)
        doubt = "" if found.better is None else f"{baseline} is better with other settings"
        ratios = (
            {word: (column, pair) for word, column, pair in cost_ratios(found.rival, section.shown, rows)}
            if found.rival
            else {}
        )
        told = {word: ratio_text(pair.ratio) for word, (_, pair) in ratios.items()}
        source = "" if "joules" not in ratios else found_how(ratios["joules"][0].key, rows)
        memory = told.get("memory") or told.get("peak activations", UNKNOWN)
        which = "activations" if "peak activations" in told else ""
        done, lost = sum(len(row.records) for row in rows), sum(len(row.missing) for row in rows)
        runs = str(done) if not lost else f"{done} of {done + lost}"
        dot = f'<span class="dot" style="background:{style[best.label].colour}"></span>' if best else ""
        cells = [
            dot + (_named(best) if best else "nobody yet"),
            f"{escape(value)}{what}",
            f"{picture}{escape(difference)}"
            + (f"<small>{_named(found.rival)}</small>" if difference != UNKNOWN and found.rival else "")
            + (f"<small>{escape(doubt)}</small>" if doubt else ""),
            told.get("time", UNKNOWN),
            told.get("joules", UNKNOWN) + (f"<small>{escape(source)}</small>" if source else ""),
            memory + (f"<small>{which}</small>" if which else ""),
            escape(found.certainty),
            runs,
        ]
        left = ("left", "", "left", "", "", "", "left", "")
        body = "".join(
            f'<td class="{c}">{cell}</td>' if c else f"<td>{cell}</td>" for c, cell in zip(left, cells, strict=True)
        )
        lines.append(f'<tr data-section="{section.anchor}"><th scope="row">{name}</th>{body}</tr>')
        joules = told.get("joules", UNKNOWN) + (f" ({source})" if source else "")
        memory += f" ({which})" if which else ""
        plain.append(
            (
                *(
                    place + badge,
                    best.label if best else "",
                    value,
                    f"{difference} ({'; '.join(filter(None, (found.rival.label, doubt)))})"
                    if found.rival
                    else difference,
                ),
                *(told.get("time", UNKNOWN), joules, memory, found.certainty, runs),
            )
        )
    header = tuple(word.format(baseline=baseline) for word in _HEADER)
    book.tables.append(("overview", "at a glance", header, plain))
    head = "".join(
        f'<th scope="col"{" class=left" if i in (0, 1, 3, 7) else ""}>{escape(word)}</th>'
        for i, word in enumerate(header)
    )
    table = scrolled(f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>", "At a glance", "cards glance")
    ways = dict.fromkeys(section.verdict.chosen_by for section in sections if len(section.rows) > 1)
    ways.pop("", None)
    note = f"The best row, and of the others the best one, is chosen by {', elsewhere by '.join(ways)}; figures are those of "
    note = f"{note}the test set where there are any. " if ways else ""
    if ways and any(not row.complete for section in sections for row in section.rows):
        note += "Rows without figures for all of their seeds come after the others. "
    note += f"Time, joules and memory are ratios to {baseline} of the best other rule, paired by seed."
    if any(section.verdict.metric and section.verdict.metric.key.startswith("target/") for section in sections):
        note += " Where a target was to be reached, what it cost is what is compared."
    if reach:
        note += f" The bar is its difference to {baseline} with the 95 % interval, the line in it no difference; ends beyond "
        note += f"{reach:g} points are cut, and dots are the other rules."
    return f'<nav id="glance" aria-label="Sections"><h2>At a glance</h2><p class="note">{escape(note)}</p>{table}</nav>'


def _named(row: Row) -> str:
    """The rule, and what sets the row apart in small type, on one line that is cut."""
    setting = (
        "" if row.variant is None else f'<small class="cut" title="{escape(row.variant)}">{escape(row.variant)}</small>'
    )
    return f"{escape(row.algorithm)}{setting}"


def _difference(section: Section, style: Styles, reach: float) -> tuple[str, str]:
    """The best other rule against the baseline, as text and as a small picture."""
    found = section.verdict
    metric, pair, rival = found.metric, found.pair, found.rival
    if metric is None or rival is None or pair is None or pair.mean is None:
        return UNKNOWN, ""
    if metric.key.startswith("target/"):
        return ratio_text(pair.ratio) or UNKNOWN, ""
    text = metric.difference(pair.mean)
    if metric.unit != "%":
        return text, ""
    text += " points"

    def at(value: float) -> float:
        return _WIDTH / 2 * (1 + max(-1.0, min(1.0, value / metric.scale / reach)))

    others = "".join(
        f'<circle cx="{at(mean):.1f}" cy="8" r="2.5" fill="{style[row.label].colour}" opacity=".55"/>'
        for row in section.rows
        if row is not rival and (mean := _mean(row, metric)) is not None
    )
    colour = style[rival.label].colour
    bar = ""
    if pair.lo is not None and pair.hi is not None:
        bar = f'<path d="M{at(pair.lo):.1f} 8H{at(pair.hi):.1f}" stroke="{colour}" stroke-width="2"/>'
    picture = (
        f'<svg class="spark" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true">'
        f'<path d="M{_WIDTH / 2:g} 0V{_HEIGHT}" stroke="#808080"/>{others}{bar}'
        f'<circle cx="{at(pair.mean):.1f}" cy="8" r="4" fill="{colour}"/></svg>'
    )
    return text, picture


def _mean(row: Row, metric: Column) -> float | None:
    figure = row.figures.get(metric.key)
    return figure.paired.mean if figure is not None and figure.paired is not None else None


def _reach(sections: Sequence[Section]) -> float:
    """Half the width of the small pictures in percentage points: most differences fit, a rule that fails is cut off."""
    found = sorted(
        abs(section.verdict.pair.mean / section.verdict.metric.scale)
        for section in sections
        if section.verdict.pair
        and section.verdict.pair.mean is not None
        and section.verdict.metric
        and section.verdict.metric.unit == "%"
    )
    if not found:
        return 0.0
    wanted = 1.3 * found[min(len(found) - 1, int(0.8 * len(found)))]
    return next((step for step in (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0) if step >= wanted), 100.0)
