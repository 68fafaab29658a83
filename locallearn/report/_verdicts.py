"""Sentences made from the numbers: who wins by how much, at what cost, with which certainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from locallearn.report._charts import lower
from locallearn.report._columns import (
    AT_LEAST,
    TIMES,
    Column,
    best_energy,
    headline_metric,
    judge_of,
    metric_title,
    quality,
    ratio_text,
)
from locallearn.statistics import Arrivals, PairedDifference, Row

_LONG = 90  # signs of a row's name in a sentence
_FEW = "fewer than three pairs, so nothing is certain"


@dataclass(frozen=True)
class Verdict:
    """A section in a sentence, and the same as cells.

    Attributes:
        rows: of the section.
        metric: the figure that is told, ``None`` where no finished run has one; in mode ``target`` a cost to it.
        chosen_by: name of the figure that chooses ``best`` and ``rival``, mostly the validation's: the best of many test
            figures is flattered by luck.
        best: the row with the best mean of it, of complete rows alone where there are any.
        rival: what stands against the baseline: the best row that is not the baseline.
        pair: the rival against the baseline in the metric, ``None`` without a baseline.
        certainty: in two or three words whether the interval of the difference (of a cost: of the ratio) holds none, or
            why there is no interval.
        sentence: the verdict.
        better: the baseline with its best settings, where the rival is compared with others.
    """

    rows: Sequence[Row]
    metric: Column | None
    chosen_by: str
    best: Row | None
    rival: Row | None
    pair: PairedDifference | None
    certainty: str
    sentence: str
    better: Row | None = None


def verdict(rows: Sequence[Row], shown: Sequence[Column], baseline: str) -> Verdict:
    """What the numbers of a section say."""
    if rows[0].mode == "target" and any(column.key == "target/seconds" for column in shown):
        return _to_target(rows, shown, baseline)
    metric = headline_metric(shown, rows[0].metric)
    known = [row for row in rows if metric is not None and _centre(row, metric) is not None]
    if metric is None or not known:
        ended = sum(len(row.records) for row in rows)
        said = "No run has finished here." if not ended else "No finished run has a figure to be judged by."
        return Verdict(rows, metric, "", None, None, None, "nothing to compare", said)
    judge = judge_of(known, shown, metric)
    ranked, by = _ranked(known, judge), lower(judge.title)
    if judge is metric and metric.key.startswith("test/"):
        by += " (not every row has a validation figure)"
    best, others = ranked[0], [row for row in ranked if row.algorithm != baseline]
    rival = others[0] if others else None
    pair = rival.figures[metric.key].paired if rival is not None else None
    name, better = lower(metric.title), None
    if rival is None or pair is None or pair.mean is None:
        sentence, certainty = _alone(ranked, metric, judge, baseline)
    else:
        which = _named(rival.label)
        if len(others) > 1:
            which += f", the best of the {len(others)} others by {by},"
        sentence, certainty = _against(which, _named(rival.against or baseline), pair, metric, name, len(ranked))
        sentence += _costs(rival, shown, rows)
        better = _better_baseline(rival, ranked, baseline)
        if better is not None:
            value = f"{judge.number(_centre(better, judge))}{_unit(judge)} {lower(judge.title)}"
            sentence += f" That is the {baseline} whose settings are nearest to its own; the best one is "
            sentence += f"{_named(better.label)}, with {value}."
    sentence += _missing(rows)
    return Verdict(rows, metric, by, best, rival, pair, certainty, sentence, better)


def cost_ratios(row: Row, shown: Sequence[Column], rows: Sequence[Row]) -> list[tuple[str, Column, PairedDifference]]:
    """The row's seconds, joules and bytes against the baseline's, as far as there are ratios."""
    by_key = {column.key: column for column in shown}
    allocated = by_key.get("allocated_peak_bytes")
    wanted = [
        ("time", by_key.get("target/seconds") or by_key.get("train_s")),
        ("joules", best_energy(shown, rows)),
        # Of a CPU nobody knows what all of a training holds at a time; weights and optimizers are left out then.
        ("memory", allocated) if allocated else ("peak activations", by_key.get("activation_peak_bytes")),
    ]
    found = []
    for word, column in wanted:
        figure = row.figures.get(column.key) if column else None
        if column is not None and figure is not None and figure.paired is not None and figure.paired.ratio is not None:
            found.append((word, column, figure.paired))
    return found


def _better_baseline(rival: Row, ranked: Sequence[Row], baseline: str) -> Row | None:
    """The baseline with other settings that are better than those which the rival is compared with."""
    plain = [row for row in ranked if row.algorithm == baseline and row.against is None]  # no control of another one
    return None if not plain or plain[0].label == rival.against else plain[0]


def _alone(ranked: Sequence[Row], metric: Column, judge: Column, baseline: str) -> tuple[str, str]:
    """Without a comparison by pairs: the best mean, and whether the intervals of the first two overlap."""
    name = lower(metric.title)
    best, figure = ranked[0], ranked[0].figures[metric.key]
    value = f"{metric.number(figure.centre)}{_unit(metric)}"
    if len(ranked) == 1:
        sentence = f"{_named(best.label)} reaches {value} {name}, alone here"
    else:
        word = "lowest" if metric.lower else "highest"
        sentence = f"{_named(best.label)} has the {word} {lower(judge.title)} of {len(ranked)} rows"
        sentence += f", {value}" if judge is metric else f", and {value} {name}"
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
            sentence += f"; {_named(ranked[1].label)}, next to it, has too few seeds for an interval."
        elif figure.interval[0] > second[1] or figure.interval[1] < second[0]:
            certainty = "intervals apart"
            sentence += f"; its interval {metric.interval(figure)} lies apart from that of {_named(ranked[1].label)}."
        else:
            certainty = "intervals overlap"
            sentence += f"; its interval {metric.interval(figure)} overlaps that of {_named(ranked[1].label)}."
    bases = [row for row in ranked if row.algorithm == baseline]
    return sentence + ("" if bases else f" There is no {baseline} to compare with."), certainty


def _against(which: str, baseline: str, pair: PairedDifference, metric: Column, name: str, n: int) -> tuple[str, str]:
    """The chosen other row against the baseline, paired by seed."""
    assert pair.mean is not None
    unit = " points" if metric.unit == "%" else _unit(metric)
    by = f"{abs(pair.mean) / metric.scale:.{metric.digits}f}{unit}"
    ahead = pair.mean < 0 if metric.lower else pair.mean > 0
    pairs = f"{pair.n} pair{'s' if pair.n != 1 else ''}"
    said = f"{which} lies {by} {'above' if pair.mean > 0 else 'below'} {baseline} in {name} over {pairs}"
    if pair.mean == 0:  # which differences that are none have, and such as cancel
        said = f"{which} and {baseline} have the same {'' if pair.equal else 'mean '}{name} over {pairs}"
    if pair.lo is None or pair.hi is None:
        return f"{said}: {_FEW}", "too few seeds"
    if pair.equal:
        return said, "equal"
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
    return f"{baseline} beats {which} by {by} in {name} ({told})", certainty


def _costs(rival: Row, shown: Sequence[Column], rows: Sequence[Row], told: Column | None = None) -> str:
    """At what cost, with intervals, and how the joules came about; without a cost that has been told."""
    said = []
    for word, column, pair in cost_ratios(rival, shown, rows):
        if told is not None and column.key == told.key:
            continue
        text = ratio_text(pair.ratio)
        if pair.ratio_lo is not None and pair.ratio_hi is not None and pair.ratio_hi / pair.ratio_lo > 1.005:
            text += f" [{ratio_text(pair.ratio_lo).rstrip(TIMES)}, {ratio_text(pair.ratio_hi).rstrip(TIMES)}]"
        if word == "joules":
            word = f"joules ({_by_what(column, rows)})"
        if word == "time" and column.key == "target/seconds":
            word = "time to the target"
        said.append(f"{text} the {word}")
    if not said:
        return "."
    listed = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    return f"; {rival.algorithm} takes {listed}."


def _by_what(column: Column, rows: Sequence[Row]) -> str:
    """The source of joules, and whether they were measured."""
    source = column.key.rpartition("/")[2]
    return f"{source}, {quality(source, rows).partition(' (')[0]}"


# ------------------------------------------------------------------------------------------- what a target costs


def _to_target(rows: Sequence[Row], shown: Sequence[Column], baseline: str) -> Verdict:
    """Who arrived, and at what cost: how good the last weights are says only by how much an epoch went beyond the target."""
    by_key = {column.key: column for column in shown}
    joules = best_energy(shown, rows, "target/joules/")
    everywhere = joules is not None and all(joules.key in row.figures for row in rows if row.records)
    if joules is not None and everywhere and _by_what(joules, rows).endswith(", measured"):
        cost, word = joules, f"joules ({_by_what(joules, rows)})"
    else:
        cost, word = by_key["target/seconds"], "time"
    value = "" if rows[0].target is None else f" {rows[0].target:g}"
    goal = f"{metric_title(rows[0].metric.name)}{value}"
    ranked = sorted(rows, key=lambda row: (-_share(row), math.inf if (c := _centre(row, cost)) is None else c))
    others = [row for row in ranked if row.algorithm != baseline]
    best, rival = ranked[0] if _share(ranked[0]) else None, others[0] if others else None
    pair = None if rival is None or cost.key not in rival.figures else rival.figures[cost.key].paired
    certainty, better = "nothing to compare", None
    if best is None:
        sentence, certainty = f"No run reached the target, {goal}.", "nobody arrived"
    elif rival is not None and pair is not None and pair.ratio is not None:
        which = _named(rival.label)
        if len(others) > 1:
            which += f", the one of the {len(others)} others with the least {lower(cost.title)},"
        base = _named(rival.against or baseline)
        sentence, certainty = _in_ratio(which, base, pair, f"{word} to the target, {goal}", len(ranked))
        sentence += _costs(rival, shown, rows, told=cost)
        better = _better_baseline(rival, ranked, baseline)
        if better is not None:
            sentence += f" That is the {baseline} whose settings are nearest to its own; the best one is "
            sentence += f"{_named(better.label)}, with {cost.number(_centre(better, cost))}{_unit(cost)}."
    else:
        arrived, least = _arrivals(best), "" if _share(best) == 1 else f"{AT_LEAST} "
        assert arrived is not None  # some have
        sentence = f"{_named(best.label)} reaches the target, {goal}, in {arrived.reached} of {arrived.total} runs"
        sentence += ", alone here" if len(ranked) == 1 else f", first of {len(ranked)} rows"
        sentence += f": {lower(cost.title)} {least}{cost.number(_centre(best, cost))}{_unit(cost)}."
        if any(_share(row) < 1 for row in ranked):
            certainty = "not all arrived"
            sentence += " Where runs did not arrive there is no ratio."
        if all(row.algorithm != baseline for row in rows):
            sentence += f" There is no {baseline} to compare with."
    sentence += _missing(rows)
    return Verdict(rows, cost, lower(cost.title), best, rival, pair, certainty, sentence, better)


def _share(row: Row) -> float:
    """Of the runs that arrived."""
    found = _arrivals(row)
    return 0.0 if found is None else found.reached / found.total


def _in_ratio(which: str, baseline: str, pair: PairedDifference, what: str, n: int) -> tuple[str, str]:
    """A cost of the chosen other row over the baseline's, paired by seed."""
    pairs = f"{pair.n} pair{'s' if pair.n != 1 else ''}"
    ratio = ratio_text(pair.ratio)
    if pair.ratio_lo is None or pair.ratio_hi is None:
        return f"{which} takes {ratio} of what {baseline} does in {what}, over {pairs}: {_FEW}", "too few seeds"
    told = (
        f"95 % interval [{ratio_text(pair.ratio_lo).rstrip(TIMES)}, {ratio_text(pair.ratio_hi).rstrip(TIMES)}], {pairs}"
    )
    if pair.ratio_lo <= 1 <= pair.ratio_hi:
        return f"{which} and {baseline} cannot be told apart in {what}: {ratio}, {told}", "not told apart"
    if n > 2 and pair.p_holm is not None:
        told += f"; p after Holm over all rules {pair.p_holm:.2g}"
    certainty = "interval without 1" if n > 2 else "certain at 95 %"
    return f"{which} takes {ratio} of what {baseline} does in {what} ({told})", certainty


def _missing(rows: Sequence[Row]) -> str:
    words = []
    lost = sum(len(row.missing) for row in rows)
    if lost:
        words.append(f"{lost} seed{'s' if lost != 1 else ''} did not finish")
    for row in rows:
        if row.unjudged:
            what = "finished run has" if row.unjudged == 1 else "finished runs have"
            words.append(f"{row.unjudged} {what} no {metric_title(row.metric.name)} ({_named(row.label)})")
    late = [(row, n) for row in rows if (n := _arrivals(row)) is not None and not n.all]
    words += [f"{_named(row.label)} reached the target in {n.reached} of {n.total} runs" for row, n in late[:3]]
    return f" {'; '.join(words)}." if words else ""


def _arrivals(row: Row) -> Arrivals | None:
    return next((figure.arrivals for figure in row.figures.values() if figure.arrivals is not None), None)


def _ranked(known: Sequence[Row], metric: Column) -> list[Row]:
    """Best mean first; rows that lost seeds come last, for their means are those of survivors."""
    sign = 1.0 if metric.lower else -1.0
    return sorted(known, key=lambda row: (not row.complete, sign * (_centre(row, metric) or 0.0)))


def _centre(row: Row, metric: Column) -> float | None:
    figure = row.figures.get(metric.key)
    return figure.centre if figure is not None and figure.centre is not None and math.isfinite(figure.centre) else None


def _named(label: str) -> str:
    """A row in a sentence: its first settings, for the table has them all."""
    if len(label) <= _LONG:
        return label
    kept = label[:_LONG].rpartition(", ")[0]
    return f"{kept or label[:_LONG]}, …"


def _unit(metric: Column) -> str:
    return f" {metric.unit}" if metric.unit else ""
