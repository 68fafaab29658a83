"""Sentences made from the numbers: who wins by how much, at what cost, with which certainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from locallearn.report._charts import lower
from locallearn.report._columns import TIMES, Column, best_energy, headline_metric, quality, ratio_text
from locallearn.statistics import Arrivals, PairedDifference, Row

_FEW = "fewer than three pairs, so nothing is certain"


@dataclass(frozen=True)
class Verdict:
    """A section in a sentence, and the same as cells.

    Attributes:
        rows: of the section.
        metric: the figure that decides, ``None`` where no finished run has one.
        best: the row with the best mean, of complete rows alone where there are any.
        rival: what stands against the baseline: the best row that is not the baseline.
        pair: the rival against the baseline in the metric, ``None`` without a baseline.
        certainty: in two or three words whether the interval of the difference holds 0, or why there is none.
        sentence: the verdict.
    """

    rows: Sequence[Row]
    metric: Column | None
    best: Row | None
    rival: Row | None
    pair: PairedDifference | None
    certainty: str
    sentence: str


def verdict(rows: Sequence[Row], shown: Sequence[Column], baseline: str) -> Verdict:
    """What the numbers of a section say."""
    metric = headline_metric(shown, rows[0].metric)
    known = [row for row in rows if metric is not None and _centre(row, metric) is not None]
    if metric is None or not known:
        ended = sum(len(row.records) for row in rows)
        said = "No run has finished here." if not ended else "No finished run has a figure to be judged by."
        return Verdict(rows, metric, None, None, None, "nothing to compare", said)
    ranked = _ranked(known, metric)
    best = ranked[0]
    rival = next((row for row in ranked if row.algorithm != baseline), None)
    pair = rival.figures[metric.key].paired if rival is not None else None
    name = lower(metric.title) if not metric.title.isupper() else metric.title
    if rival is None or pair is None or pair.mean is None:
        sentence, certainty = _alone(ranked, metric, name, baseline)
    else:
        sentence, certainty = _against(rival, pair, metric, name, baseline, len(ranked))
        sentence += _costs(rival, shown, rows)
    sentence += _missing(rows)
    return Verdict(rows, metric, best, rival, pair, certainty, sentence)


def cost_ratios(row: Row, shown: Sequence[Column], rows: Sequence[Row]) -> list[tuple[str, Column, PairedDifference]]:
    """The row's seconds, joules and bytes against the baseline's, as far as there are ratios."""
    by_key = {column.key: column for column in shown}
    energy = best_energy(shown, rows)
    wanted = [
        ("time", by_key.get("target/seconds") or by_key.get("train_s")),
        ("joules", energy),
        ("memory", by_key.get("allocated_peak_bytes") or by_key.get("activation_peak_bytes")),
    ]
    found = []
    for word, column in wanted:
        figure = row.figures.get(column.key) if column else None
        if column is not None and figure is not None and figure.paired is not None and figure.paired.ratio is not None:
            found.append((word, column, figure.paired))
    return found


def _alone(ranked: Sequence[Row], metric: Column, name: str, baseline: str) -> tuple[str, str]:
    """Without a comparison by pairs: the best mean, and whether the intervals of the first two overlap."""
    best, figure = ranked[0], ranked[0].figures[metric.key]
    value = f"{metric.number(figure.centre)}{_unit(metric)}"
    if len(ranked) == 1:
        sentence = f"{best.label} reaches {value} {name}, alone here"
    else:
        word = "lowest" if metric.lower else "highest"
        sentence = f"{best.label} has the {word} {name} of {len(ranked)} rows, {value}"
    if figure.interval is None:
        certainty = "too few seeds"
        sentence += f"; n = {figure.summary.n}, so nothing is certain."
    elif len(ranked) == 1:
        certainty = "nothing to compare"
        sentence += f" (95 % interval {metric.interval(figure)})."
    else:
        second = ranked[1].figures[metric.key].interval
        if second is None:
            certainty = "too few seeds"
            sentence += f"; {ranked[1].label}, next to it, has too few seeds for an interval."
        elif figure.interval[0] > second[1] or figure.interval[1] < second[0]:
            certainty = "intervals apart"
            sentence += f"; its interval {metric.interval(figure)} lies apart from that of {ranked[1].label}."
        else:
            certainty = "intervals overlap"
            sentence += f"; its interval {metric.interval(figure)} overlaps that of {ranked[1].label}."
    bases = [row for row in ranked if row.algorithm == baseline]
    return sentence + ("" if bases else f" There is no {baseline} to compare with."), certainty


def _against(rival: Row, pair: PairedDifference, metric: Column, name: str, baseline: str, n: int) -> tuple[str, str]:
    """The best other rule against the baseline, paired by seed."""
    assert pair.mean is not None
    unit = " points" if metric.unit == "%" else _unit(metric)
    by = f"{abs(pair.mean) / metric.scale:.{metric.digits}f}{unit}"
    ahead = pair.mean < 0 if metric.lower else pair.mean > 0
    which = rival.label if n == 2 else f"{rival.label}, the best of the others,"
    pairs = f"{pair.n} pair{'s' if pair.n != 1 else ''}"
    if pair.mean == 0 and (pair.lo is None or pair.lo == pair.hi):
        return f"{which} and {baseline} have the same {name} over {pairs}", "equal"
    if pair.lo is None or pair.hi is None:
        word = "above" if (pair.mean > 0) else "below"
        return f"{which} lies {by} {word} {baseline} in {name} over {pairs}: {_FEW}", "too few seeds"
    ends = f"[{pair.lo / metric.scale:+.{metric.digits}f}, {pair.hi / metric.scale:+.{metric.digits}f}]"
    if pair.lo <= 0 <= pair.hi:
        mean = f"{pair.mean / metric.scale:+.{metric.digits}f}{unit}"
        return (
            f"{which} and {baseline} cannot be told apart in {name}: {mean}, 95 % interval {ends}, {pairs}",
            "not told apart",
        )
    told = f"95 % interval {ends}, {pairs}"
    if n > 2 and pair.p_holm is not None:
        # The best of many is so by luck, too: the interval does not know of the others, Holm's correction does.
        told += f"; p after Holm over all rules {pair.p_holm:.2g}"
    certainty = "interval without 0" if n > 2 else "certain at 95 %"
    if ahead:
        return f"{which} beats {baseline} by {by} in {name} ({told})", certainty
    if n == 2:
        return f"{baseline} beats {which} by {by} in {name} ({told})", certainty
    return f"No rule reaches {baseline} in {name}: {rival.label}, the closest, lies {by} behind ({told})", certainty


def _costs(rival: Row, shown: Sequence[Column], rows: Sequence[Row]) -> str:
    """At what cost, with intervals, and how the joules came about."""
    said = []
    for word, column, pair in cost_ratios(rival, shown, rows):
        text = ratio_text(pair.ratio)
        if pair.ratio_lo is not None and pair.ratio_hi is not None and pair.ratio_hi / pair.ratio_lo > 1.005:
            text += f" [{ratio_text(pair.ratio_lo).rstrip(TIMES)}, {ratio_text(pair.ratio_hi).rstrip(TIMES)}]"
        if word == "joules":
            source = column.key.partition("/")[2]
            how = quality(source, rows).partition(" (")[0]
            word = f"joules ({source}, {how})"
        if word == "time" and column.key == "target/seconds":
            word = "time to the target"
        said.append(f"{text} the {word}")
    if not said:
        return "."
    listed = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    return f"; {rival.label} takes {listed}."


def _missing(rows: Sequence[Row]) -> str:
    words = []
    lost = sum(len(row.missing) for row in rows)
    if lost:
        words.append(f"{lost} seed{'s' if lost != 1 else ''} did not finish")
    late = [(row, n) for row in rows if (n := _arrivals(row)) is not None and not n.all]
    words += [f"{row.label} reached the target in {n.reached} of {n.total} runs" for row, n in late[:3]]
    return f" {'; '.join(words)}." if words else ""


def _arrivals(row: Row) -> Arrivals | None:
    return next((figure.arrivals for figure in row.figures.values() if figure.arrivals is not None), None)


def _ranked(known: Sequence[Row], metric: Column) -> list[Row]:
    """Best mean first; rows that lost seeds come last, for their means are those of survivors."""
    sign = 1.0 if metric.lower else -1.0
    return sorted(known, key=lambda row: (bool(row.missing), sign * (_centre(row, metric) or 0.0)))


def _centre(row: Row, metric: Column) -> float | None:
    figure = row.figures.get(metric.key)
    return figure.centre if figure is not None and figure.centre is not None and math.isfinite(figure.centre) else None


def _unit(metric: Column) -> str:
    return f" {metric.unit}" if metric.unit else ""
