"""Sentences made from the numbers: who wins by how much, at what cost, with which certainty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from locallearn.report._charts import lower, short
from locallearn.report._columns import (
    AT_LEAST,
    TIMES,
    Column,
    best_energy,
    found_how,
    headline_metric,
    judge_of,
    lacking,
    metric_title,
    p_text,
    ratio_text,
    source_of,
)
from locallearn.statistics import PairedDifference, Row, elsewhere

_NAMED = 3  # rows that a sentence names
_WITH_ALL = "with figures for all seeds"
_FEW = "fewer than three pairs, so nothing is certain"


@dataclass(frozen=True)
class Verdict:
    """A section in a sentence, and the same as cells.

    Attributes:
        rows: of the section.
        metric: the figure that is told, ``None`` where no finished run has one; in mode ``target`` a cost to it.
        chosen_by: what chooses ``best`` and ``rival``, mostly the validation's figure: the best of many test figures is
            flattered by luck.
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
    name, better, names = lower(metric.title), None, short(row.label for row in rows)
    if rival is None or pair is None or pair.mean is None:
        sentence, certainty = _alone(ranked, len(rows), metric, judge, baseline, names)
    else:
        level, near = _level(others), _near(rival, rows)
        which = names[rival.label]
        if len(level) < len(others):
            which += ", the only other one" if len(level) == 1 else f", of the {len(level)} others"
            which += f" {_WITH_ALL}" + (f" the best by {by}," if len(level) > 1 else ",")
        elif len(others) > 1:
            which += f", the best of the {len(others)} others by {by},"
        sentence, certainty = _against(which, names[near.label], pair, metric, name, len(ranked))
        sentence += _costs(rival, shown, rows, pair.n)
        better = _better_baseline(rival, ranked, baseline)
        if better is not None and _worth(better, judge) <= _worth(near, judge):
            better = None  # it is first for having all seeds, not for its figure
        if better is not None:
            value = f"{judge.number(_centre(better, judge))}{_unit(judge)} {lower(judge.title)}"
            bases = _bases(ranked, baseline)
            limit = f" {_WITH_ALL}" if len(_level(bases)) < len(bases) else ""
            sentence += f" That is the {baseline} whose settings are nearest to its own; the best one{limit} is "
            sentence += f"{names[better.label]}, with {value}."
    sentence += _missing(rows, names, metric)
    return Verdict(rows, metric, by, best, rival, pair, certainty, sentence, better)


def cost_ratios(row: Row, shown: Sequence[Column], rows: Sequence[Row]) -> list[tuple[str, Column, PairedDifference]]:
    """The row's seconds, joules and bytes against the baseline's, as far as there are ratios; to a target what it cost."""
    pairs = {
        key: figure.paired for key, figure in row.figures.items() if figure.paired and figure.paired.ratio is not None
    }
    # What only other rows of the section know must not hide what this one and the baseline do.
    known = {column.key: column for column in shown if column.key in pairs}
    to_target = any(column.key == "target/seconds" for column in shown)
    allocated = known.get("allocated_peak_bytes")
    wanted = [
        ("time", known.get("target/seconds" if to_target else "train_s")),
        ("joules", best_energy(list(known.values()), rows, "target/joules/" if to_target else "energy_j/")),
        # Of a CPU nobody knows what all of a training holds at a time; weights and optimizers are left out then.
        ("memory", allocated) if allocated else ("peak activations", known.get("activation_peak_bytes")),
    ]
    return [(word, column, pairs[column.key]) for word, column in wanted if column is not None]


def _level(ranked: Sequence[Row]) -> list[Row]:
    """Those that lack no more than the first one, after which all others come whatever their figures are."""
    return [row for row in ranked if row.complete == ranked[0].complete]


def _bases(ranked: Sequence[Row], baseline: str) -> list[Row]:
    """The baseline with all of its settings, without the controls of one."""
    return [row for row in ranked if row.algorithm == baseline and row.against is None]


def _near(rival: Row, rows: Sequence[Row]) -> Row:
    """What the rival is compared with."""
    return next(row for row in rows if row.label == rival.against)


def _better_baseline(rival: Row, ranked: Sequence[Row], baseline: str) -> Row | None:
    """The baseline with other settings that come before those which the rival is compared with."""
    plain = _bases(ranked, baseline)
    return None if not plain or plain[0].label == rival.against else plain[0]


def _alone(
    ranked: Sequence[Row], n: int, metric: Column, judge: Column, baseline: str, names: Mapping[str, str]
) -> tuple[str, str]:
    """Without a comparison by pairs: the best mean of ``n`` rows, and whether the intervals of the first two overlap."""
    name, level = lower(metric.title), _level(ranked)
    best, figure = ranked[0], ranked[0].figures[metric.key]
    value = f"{metric.number(figure.centre)}{_unit(metric)}"
    limit = f" {_WITH_ALL}" if len(level) < len(ranked) else ""
    if len(level) == 1:
        sentence = f"{names[best.label]} reaches {value} {name}, "
        sentence += "alone here" if n == 1 else f"the only one of {n} rows{limit or ' with such a figure'}"
    else:
        word = "lowest" if metric.lower else "highest"
        sentence = f"{names[best.label]} has the {word} {lower(judge.title)} of {len(level)} rows{limit}"
        sentence += f", {value}" if judge is metric else f", and {value} {name}"
    doubt, certainty = _doubt(level, metric, names)
    bases = [row for row in ranked if row.algorithm == baseline]
    return f"{sentence}{doubt}." + ("" if bases else f" There is no {baseline} to compare with."), certainty


def _doubt(ranked: Sequence[Row], column: Column, names: Mapping[str, str], of: str = "") -> tuple[str, str]:
    """How certain it is that the first of ``ranked`` is before the second: what ends a sentence, and two or three words.

    Args:
        ranked: rows with a figure for ``column``, one at least.
        column: what is told.
        names: of rows in a sentence, by their labels.
        of: what the intervals are about, where that is another mean than the one told.
    """
    figure = ranked[0].figures[column.key]
    if figure.interval is None:
        few = figure.summary.n < 3 or figure.reason is None
        told = f"n = {figure.summary.n}, so nothing is certain" if few else f"{figure.reason}, so nothing is certain"
        return f"; {told}", "too few seeds" if few else "no interval"
    if len(ranked) == 1:
        return f" (95 % interval{of} {column.interval(figure)})", "nothing to compare"
    name, second = names[ranked[1].label], ranked[1].figures[column.key]
    if second.interval is None:
        if second.summary.n < 3 or second.reason is None:
            return f"; {name}, next to it, has too few seeds for an interval", "too few seeds"
        return f"; {name}, next to it, has {second.reason}", "no interval"
    mine = f"its interval{of} {column.interval(figure)}"
    if figure.interval[0] > second.interval[1] or figure.interval[1] < second.interval[0]:
        return f"; {mine} lies apart from that of {name}", "intervals apart"
    return f"; {mine} overlaps that of {name}", "intervals overlap"


def _against(which: str, baseline: str, pair: PairedDifference, metric: Column, name: str, n: int) -> tuple[str, str]:
    """The chosen other row against the baseline, paired by seed."""
    assert pair.mean is not None
    unit = " points" if metric.unit == "%" else _unit(metric)
    by = f"{metric.difference(abs(pair.mean)).lstrip('+')}{unit}"
    ahead = pair.mean < 0 if metric.lower else pair.mean > 0
    pairs = _pairs(pair)
    said = f"{which} lies {by} {'above' if pair.mean > 0 else 'below'} {baseline} in {name} over {pairs}"
    if pair.mean == 0:  # which differences that are none have, and such as cancel
        said = f"{which} and {baseline} have the same {'' if pair.equal else 'mean '}{name} over {pairs}"
    if pair.lo is None or pair.hi is None:
        return f"{said}: {_FEW}", "too few seeds"
    if pair.equal:
        return said, "equal"
    ends = f"[{metric.difference(pair.lo)}, {metric.difference(pair.hi)}]"
    if pair.lo <= 0 <= pair.hi:
        mean = metric.difference(pair.mean)
        return (
            f"{which} and {baseline} cannot be told apart in {name}: {mean}{unit}, 95 % interval {ends}, {pairs}",
            "not told apart",
        )
    told = f"95 % interval {ends}, {pairs}"
    if n > 2 and pair.p_holm is not None:
        # The best of many is so by luck, too: the interval does not know of the others, Holm's correction does.
        told += f"; p after Holm over all rules {p_text(pair.p_holm)}"
    certainty = "interval without 0" if n > 2 else "certain at 95 %"
    if ahead:
        return f"{which} beats {baseline} by {by} in {name} ({told})", certainty
    return f"{baseline} beats {which} by {by} in {name} ({told})", certainty


def _costs(rival: Row, shown: Sequence[Column], rows: Sequence[Row], pairs: int, told: Column | None = None) -> str:
    """At what cost, with intervals, and how the joules came about; without a cost that has been told.

    Args:
        rival: the row that is told of.
        shown: columns of its section.
        rows: of its section.
        pairs: of the comparison before; fewer of them are told.
        told: a cost that has been told.
    """
    said = []
    for word, column, pair in cost_ratios(rival, shown, rows):
        if told is not None and column.key == told.key:
            continue
        text = ratio_text(pair.ratio)
        if pair.ratio_lo is not None and pair.ratio_hi is not None and pair.ratio_hi / pair.ratio_lo > 1.005:
            text += f" [{ratio_text(pair.ratio_lo).rstrip(TIMES)}, {ratio_text(pair.ratio_hi).rstrip(TIMES)}]"
        if column.key.startswith("target/"):
            word += " to the target"
        beside = [_by_what(column, rows)] if word.startswith("joules") else []
        beside += [f"over {_pairs(pair)}"] if pair.n < pairs else []
        said.append(f"{text} the {word}" + (f" ({'; '.join(beside)})" if beside else ""))
    if not said:
        return "."
    listed = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    return f"; {rival.algorithm} takes {listed}."


def _by_what(column: Column, rows: Sequence[Row]) -> str:
    """The source of joules, and whether they were measured."""
    return f"{source_of(column.key)}, {found_how(column.key, rows)}"


# ------------------------------------------------------------------------------------------- what a target costs


def _to_target(rows: Sequence[Row], shown: Sequence[Column], baseline: str) -> Verdict:
    """Who arrived, and at what cost: how good the last weights are says only by how much an epoch went beyond the target."""
    cost = next(column for column in shown if column.key == "target/seconds")
    word = "time"
    joules = best_energy(shown, rows, "target/joules/")
    # Where some runs have none, a comparison of joules would be one of fewer runs.
    everywhere = joules is not None and all(_known(row, joules) == len(row.records) for row in rows)
    if joules is not None and everywhere and _by_what(joules, rows).endswith(", measured"):
        cost, word = joules, f"joules ({_by_what(joules, rows)})"
    what = lower(cost.title).partition(",")[0]
    value = "" if rows[0].target is None else f" {rows[0].target:g}"
    goal = f"{metric_title(rows[0].metric.name)}{value}"
    away, names = elsewhere(rows), short(row.label for row in rows)

    def place(row: Row) -> tuple[float, bool, bool, float]:
        mean = _mean(row, cost)
        return -_share(row), mean is None, row.label in away, mean or 0.0

    ranked = sorted(rows, key=place)
    others = [row for row in ranked if row.algorithm != baseline]
    best, rival = ranked[0] if _share(ranked[0]) else None, others[0] if others else None
    pair = None if rival is None or cost.key not in rival.figures else rival.figures[cost.key].paired
    certainty, better = "nothing to compare", None
    told: Row | None = None
    if best is None:
        sentence, certainty = f"No run reached the target, {goal}.", "nobody arrived"
    elif rival is not None and pair is not None and pair.ratio is not None:
        told = rival
        which, near = f"{names[rival.label]}{_among(rival, others, cost)}", _near(rival, rows)
        base = names[near.label]
        sentence, certainty = _in_ratio(which, base, pair, f"{word} to the target, {goal}", len(ranked))
        sentence += _costs(rival, shown, rows, pair.n, told=cost)
        better = _better_baseline(rival, [row for row in ranked if row.machines == near.machines], baseline)
        if better is not None:
            sentence += f" That is the {baseline} whose settings are nearest to its own; the best one is "
            sentence += f"{names[better.label]}, with {cost.number(_mean(better, cost))}{_unit(cost)}."
    else:
        told = best
        arrived, mean = best.arrivals, _mean(best, cost)
        assert arrived is not None  # some have
        sentence = f"{names[best.label]} reaches the target, {goal}, in {arrived.reached} of {arrived.total} runs"
        apart = _apart(best, ranked[1:], cost)
        beside = len(ranked) - len(apart)
        sentence += ", alone here" if len(ranked) == 1 else f", first of {beside} rows" if beside > 1 else ""
        least = "" if arrived.all else f"{AT_LEAST} "
        if mean is None:
            sentence += f"; its {what} is unknown."
        else:
            sentence += f": {lower(cost.title)} {least}{cost.number(mean)}{_unit(cost)}"
            if arrived.all:  # who else did comes before those that did not, whatever it cost
                level = [row for row in ranked if _share(row) == 1 and row not in apart]
                doubt, certainty = _doubt(level, cost, names, " of the geometric mean")
                sentence += doubt if certainty != "nothing to compare" else ""
            sentence += "."
        if any(_share(row) < 1 for row in ranked):
            certainty = "not all arrived"
            sentence += " Where runs did not arrive there is no ratio."
        if all(row.algorithm != baseline for row in rows):
            sentence += f" There is no {baseline} to compare with."
    silent = [row for row in ranked if _share(row) and row is not told]
    unknown = [row for row in silent if _mean(row, cost) is None]
    strange = [row for row in silent if row.label in away and row not in unknown]
    if unknown:
        sentence += f" The {what} of {_listed(unknown, names)} is unknown."
    if strange:
        sentence += f" The {what} of {_listed(strange, names)} is not of the same machine, and not ranked."
    sentence += _missing(rows, names)
    by = f"who arrived and then by {lower(cost.title)}"
    return Verdict(rows, cost, by, best, rival, pair, certainty, sentence, better)


def _share(row: Row) -> float:
    """Of the runs that arrived."""
    return 0.0 if row.arrivals is None else row.arrivals.reached / row.arrivals.total


def _known(row: Row, cost: Column) -> int:
    """Of how many runs it is known."""
    return row.figures[cost.key].summary.n if cost.key in row.figures else 0


def _mean(row: Row, cost: Column) -> float | None:
    """The mean that the table shows: there is one figure of a name."""
    return row.figures[cost.key].summary.mean if cost.key in row.figures else None


def _apart(first: Row, rows: Sequence[Row], cost: Column) -> list[Row]:
    """Of those that arrived as often as ``first`` the ones that nobody can rank beside it."""
    level = [row for row in rows if _share(row) == _share(first)]
    return [row for row in level if row.machines != first.machines or _mean(row, cost) is None]


def _among(rival: Row, others: Sequence[Row], cost: Column) -> str:
    """Of how many other rows it was chosen, and by what: arrivals come first."""
    what = lower(cost.title)
    late = [row for row in others if _share(row) < _share(rival)]
    apart = _apart(rival, others, cost)
    limits = ["whose runs all arrived"] if late else []
    limits += [f"whose {what.partition(',')[0]} can be compared"] if apart else []
    n = len(others) - len(late) - len(apart)
    if limits:
        among = " and ".join(limits)
        return (
            f", the only other one {among},"
            if n == 1
            else f", of the {n} others {among} the one with the least {what},"
        )
    return f", the one of the {n} others with the least {what}," if n > 1 else ""


def _pairs(pair: PairedDifference) -> str:
    return f"{pair.n} pair{'s' if pair.n != 1 else ''}"


def _listed(rows: Sequence[Row], names: Mapping[str, str]) -> str:
    return ", ".join(names[row.label] for row in rows[:_NAMED]) + (", …" if len(rows) > _NAMED else "")


def _in_ratio(which: str, baseline: str, pair: PairedDifference, what: str, n: int) -> tuple[str, str]:
    """A cost of the chosen other row over the baseline's, paired by seed."""
    pairs, ratio = _pairs(pair), ratio_text(pair.ratio)
    if pair.ratio_lo is None or pair.ratio_hi is None:
        return f"{which} takes {ratio} of what {baseline} does in {what}, over {pairs}: {_FEW}", "too few seeds"
    ends = f"[{ratio_text(pair.ratio_lo).rstrip(TIMES)}, {ratio_text(pair.ratio_hi).rstrip(TIMES)}]"
    told = f"a ratio paired by seed, 95 % interval {ends}, {pairs}"
    if pair.ratio_lo <= 1 <= pair.ratio_hi:
        return f"{which} and {baseline} cannot be told apart in {what}: {ratio}, {told}", "not told apart"
    if n > 2 and pair.p_holm is not None:
        told += f"; p after Holm over all rules {p_text(pair.p_holm)}"
    certainty = "interval without 1" if n > 2 else "certain at 95 %"
    return f"{which} takes {ratio} of what {baseline} does in {what} ({told})", certainty


def _missing(rows: Sequence[Row], names: Mapping[str, str], metric: Column | None = None) -> str:
    """What no mean counts: seeds that did not finish, runs without the metric (or ``metric``), runs that did not arrive."""
    words = []
    lost = [(row, record.seed) for row in rows for record in row.missing]
    if lost:
        which = f" ({', '.join(f'{seed} of {names[row.label]}' for row, seed in lost)})" if len(lost) <= _NAMED else ""
        words.append(f"{len(lost)} seed{'s' if len(lost) != 1 else ''}{which} did not finish")
    for row in rows:
        said = lacking(row)
        if not said and row.records and metric is not None and metric.key not in row.figures:
            said = [f"there is no {lower(metric.title)}"]
        words += [f"{one} ({names[row.label]})" for one in said]
    late = [(row, row.arrivals) for row in rows if row.arrivals is not None and not row.arrivals.all]
    words += [f"{names[row.label]} reached the target in {n.reached} of {n.total} runs" for row, n in late[:_NAMED]]
    if len(late) > _NAMED:
        words.append(f"{len(late) - _NAMED} more did not reach it in every run")
    return f" {'; '.join(words)}." if words else ""


def _ranked(known: Sequence[Row], metric: Column) -> list[Row]:
    """Best mean first; rows that lost seeds come last, for their means are those of survivors."""
    return sorted(known, key=lambda row: (not row.complete, -_worth(row, metric)))


def _worth(row: Row, metric: Column) -> float:
    """Its mean, the more the better."""
    return (-1.0 if metric.lower else 1.0) * (_centre(row, metric) or 0.0)


def _centre(row: Row, metric: Column) -> float | None:
    figure = row.figures.get(metric.key)
    return figure.centre if figure is not None and figure.centre is not None and math.isfinite(figure.centre) else None


def _unit(metric: Column) -> str:
    return f" {metric.unit}" if metric.unit else ""
