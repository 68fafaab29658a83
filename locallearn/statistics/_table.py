"""From records to rows: grouped by experiment, compared with the baseline seed by seed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from locallearn.records import Record
from locallearn.statistics._identity import (
    age,
    apart,
    beside_the_rule,
    circumstances,
    differing,
    distance,
    in_words,
    machines,
    settings,
    spoken,
)
from locallearn.statistics._inference import Summary, geometric, holm, paired, summarise, t_interval
from locallearn.statistics._rows import Arrivals, Figure, Row, labelled

_SHOWN = 5
# Figures that are those of a machine, and those of a whole training, by the beginnings of their names.
_MACHINE_BOUND = (
    *("train_s", "validation_s", "co2_g", "energy_j/", "energy_net_j/"),
    *("allocated_peak_bytes", "target/seconds", "target/joules"),
)
_WHOLE_TRAINING = ("train_s", "validation_s", "co2_g", "energy_j/", "energy_net_j/", "samples", "train_flops")
_TO_TARGET = ("target/seconds", "target/joules", "target/samples")

# Settings of the baseline that make a control of it: what becomes of its memory, or of the samples it learns from.
_CONTROLS = ("checkpoint=", "accumulate=", "keep=", "keep_by=")
# Its way through a device, for which no other rule asks.
_THROUGH = {"differentiable"}

# Data set, network, task, mode, target.
_Section = tuple[str, str, str, str, float | None]


@dataclass(frozen=True)
class _Group:
    """Runs of one experiment, one per seed: those that finished, and of the other seeds those that did not."""

    section: _Section
    algorithm: str
    variant: str
    apart: str
    done: tuple[Record, ...]
    missing: tuple[Record, ...]
    notes: tuple[str, ...]

    @property
    def said(self) -> str | None:
        """What sets it apart from others of its rule."""
        return ", ".join(filter(None, (self.variant, self.apart))) or None

    @property
    def words(self) -> frozenset[str]:
        """What its variant says."""
        return _words(self.variant)

    @property
    def order(self) -> tuple[str, str, str]:
        return self.algorithm, self.variant, self.apart

    @property
    def newest(self) -> Record:
        return (self.done or self.missing)[-1]


def compare_table(records: Iterable[Record], baseline: str = "backprop") -> list[Row]:
    """Groups runs by data set, network, task, mode, target, rule and variant; compares each group with the baseline.

    Runs of one seed with different settings (a sweep's) are different experiments: the group is split by these settings,
    which its rows name. Of several finished runs with the same group and seed the newest is taken, and a note says so; they
    are never pooled. A seed without a finished run stands in :attr:`Row.missing`. Benchmarks are left out. The baseline is
    the group of the same data set, network, task, mode and target whose rule is ``baseline``, of a variant that says nothing
    which the row's does not (but settings beside the rule: its optimizer's rate): the one that says most of what the row's
    does, of several such the one whose settings differ least from the row's, and then a note names it. Where the section has a
    baseline, but none such, a note says so. The baseline's own controls (checkpointed, accumulated) are compared with it, too.

    Runs are paired by seed. Figures of a machine (seconds, joules, grams) are paired only where both ran on the same one.
    Costs to a target that not everybody reached, and costs of such trainings, are not compared at all. p-values are
    corrected over the rows of a section, figure by figure.

    Returns:
        Rows ordered by data set, network, task, mode, target; the baseline first, then by rule, variant and settings.
    """
    groups = _groups(records)
    rows: list[Row] = []
    for group in sorted(groups, key=lambda g: (_sortable(g.section), g.algorithm != baseline, g.order)):
        reference, notes = _reference(group, groups, baseline)
        figures = _figures(group, reference)
        net, task, mode = group.section[1:4]
        rows.append(
            Row(
                *(group.section[0], net, task, group.algorithm, group.said, mode or None, group.done, figures),
                notes=(*_own_notes(group, figures), *notes),
                missing=group.missing,
                target=group.section[4],
                arrivals=_arrivals(group),
                against=None if reference is None else labelled(reference.algorithm, reference.said),
            )
        )
    return _corrected(rows)


def _sortable(section: _Section) -> tuple[str, str, str, str, float]:
    return (*section[:4], -math.inf if section[4] is None else section[4])


# ------------------------------------------------------------------------------------------- groups


def _groups(records: Iterable[Record]) -> list[_Group]:
    found: dict[tuple[_Section, str, frozenset[str]], list[Record]] = {}
    for record in records:
        if not record.part("bench"):
            net, task, mode, variant = (record.text(name) or "" for name in ("net", "task", "mode", "variant"))
            section = (record.dataset, net, task, mode, record.wanted)
            found.setdefault((section, record.algorithm, _words(variant)), []).append(record)
    return [
        _Group(section, algorithm, group[0].text("variant") or "", name, *_newest(part))
        for (section, algorithm, _), group in found.items()
        for name, part in apart(group)
    ]


def _words(variant: str) -> frozenset[str]:
    """What a variant says, in whatever order and digits it was typed."""
    return frozenset(_as_number(word) for word in variant.split(", ") if word)


def _as_number(setting: str) -> str:
    """``lr=3e-3`` as ``lr=0.003``."""
    name, equals, value = setting.partition("=")
    try:
        return f"{name}{equals}{float(value)!r}" if equals else setting
    except ValueError:
        return setting


def _newest(group: Sequence[Record]) -> tuple[tuple[Record, ...], tuple[Record, ...], tuple[str, ...]]:
    """One finished record per seed, one record for every seed that has none, and what must be said about the choice."""
    by_seed: dict[int, list[Record]] = {}
    for record in sorted(group, key=lambda record: age(record, group)):
        by_seed.setdefault(record.seed, []).append(record)
    resumed = {record.text("resumed_from") for record in group}
    done: list[Record] = []
    missing: list[Record] = []
    notes: list[str] = []
    for seed, same in sorted(by_seed.items()):
        finished = [record for record in same if record.status == "done"]
        (done if finished else missing).append((finished or same)[-1])
        # An interrupted run and the one that went on with it are one attempt.
        attempts = [record for record in same if record.status == "done" or record.id not in resumed]
        if len(attempts) > 1:
            others = Counter(record.status for record in attempts if record.status != "done")
            ended = ", ".join(f"{count} {status}" for status, count in sorted(others.items()))
            counted = "finished run" if others else "run"
            known = [circumstances(record) for record in finished]
            told = [f"{name} {' / '.join(one.get(name, 'not recorded') for one in known)}" for name in differing(known)]
            unlike = f" They were not made alike, oldest first: {_listed(told)}." if told else ""
            notes.append(
                f"Seed {seed} was run {len(attempts)} times{f' ({ended})' if ended else ''}; "
                + (f"only the newest {counted} is counted.{unlike}" if finished else "none finished.")
            )
    return tuple(done), tuple(missing), tuple(notes)


def _reference(group: _Group, groups: Sequence[_Group], baseline: str) -> tuple[_Group | None, tuple[str, ...]]:
    """The baseline of a group, and what must be said of it."""
    words, control = group.words, group.algorithm == baseline
    bases = [other for other in groups if other.section == group.section and other.algorithm == baseline]
    if control:  # it is compared with what it is a control of
        words = _uncontrolled(words)
        if words == group.words:
            return None, ()
        bases = [other for other in bases if other.words == _uncontrolled(other.words)]
    # What a baseline alone has would be taken for the rule's doing; of a rate of its own a note tells.
    found = [other for other in bases if not _hinders(other.words - words, control)]
    if not found:
        others = _listed(sorted({labelled(baseline, other.said) for other in bases}))
        return None, (f"It is compared with no {baseline}: it lacks settings of {others}.",) if bases else ()
    found = [other for other in found if other.done] or found
    most = max(len(other.words & words) for other in found)
    found = [other for other in found if len(other.words & words) == most]
    chosen = min(found, key=lambda other: (distance(*_of_one_seed(group, other)), other.order))
    notes = []
    if len(found) > 1:
        notes.append(
            f"Its baseline is {baseline} {f'with {chosen.said}' if chosen.said else 'without settings of its own'}."
        )
    pair = _of_one_seed(group, chosen)
    names = beside_the_rule(*pair)
    if names:
        mine, theirs = (in_words(record, settings(record)) for record in pair)
        told = [f"{name} ({spoken(mine.get(name))} against {spoken(theirs.get(name))})" for name in names]
        notes.append(f"Beside the rule it differs from its baseline in {_listed(told)}.")
    notes += _against(group.done, chosen.done)
    if group.done and not {record.seed for record in group.done} & {record.seed for record in chosen.done}:
        notes.append("It has no finished seed in common with its baseline, so nothing of it is compared.")
    if group.algorithm != baseline:  # its controls are meant to train as it does
        notes += _same_weights(group.done, chosen.done)
    return chosen, tuple(notes)


def _hinders(alone: frozenset[str], control: bool) -> bool:
    """Whether what only a baseline says keeps it from being one; of optimizers, networks, ... each rule may have its own."""
    return any(control or "." not in word.partition("=")[0] for word in alone - _THROUGH)


def _uncontrolled(words: frozenset[str]) -> frozenset[str]:
    return frozenset(word for word in words if not word.startswith(_CONTROLS))


def _of_one_seed(one: _Group, other: _Group) -> tuple[Record, Record]:
    """A run of either group to compare their settings by, some of which may follow the seed.

    Of the last seed that both have, one that finished in both where there is any; without a common seed the newest runs.
    """
    mine, theirs = ({record.seed: record for record in (*group.missing, *group.done)} for group in (one, other))
    common = sorted(
        mine.keys() & theirs.keys(),
        key=lambda seed: (sum(record.status == "done" for record in (mine[seed], theirs[seed])), seed),
    )
    return (mine[common[-1]], theirs[common[-1]]) if common else (one.newest, other.newest)


# ------------------------------------------------------------------------------------------- notes


def _own_notes(group: _Group, figures: Mapping[str, Figure]) -> tuple[str, ...]:
    notes = list(group.notes)
    names = differing([settings(record) for record in group.done])
    if names:
        notes.append(f"Its runs differ in more than the seed ({_listed(names)}); the spread mixes both.")
    for record in group.missing if group.done else ():
        # A run of another experiment, for which nothing of its own has finished at that seed.
        apart_in = min((differing([settings(record), settings(done)]) for done in group.done), key=len)
        if apart_in:
            notes.append(
                f"Seed {record.seed}, which did not finish, had other settings than those that did ({_listed(apart_in)}): "
                "it is no missing seed of theirs."
            )
    known = [circumstances(record) for record in group.done]
    unlike = differing(known)
    if unlike:
        told = [f"{name} {_by_value(name, known, group.done)}" for name in unlike]
        notes.append(f"Its runs were not made alike, and their means pool over it: {_listed(told)}.")
    shared = {_whole(record.part("hardware"), "workers") for record in group.done} - {None}
    if shared:
        notes.append(
            f"Its seconds are those of a machine that {_listed([str(n) for n in sorted(shared)])} processes shared "
            "(compare.workers)."
        )
    for record in group.done:
        if len(machines(record)) > 1:
            notes.append(
                f"Seed {record.seed} was resumed on another machine; its seconds and joules are sums over both."
            )
    notes += [_ended(record) for record in group.missing]
    uncounted = sorted({name for record in group.done for name in record.uncounted})
    if uncounted:
        notes.append(f"FLOPs are incomplete, for want of a formula for {_listed(uncounted)}.")
    notes += _cut_short(group.done)
    notes += _as_long_as_the_cap(group.done)
    censored = next((figure.arrivals for figure in figures.values() if figure.censored), None)
    if censored is not None:
        late = len(group.done) - censored.reached
        counted = ["who finished without it counts with all that it spent"] if late else []
        counted += ["who did not finish is left out"] if group.missing else []
        notes.append(
            f"The target: {censored}. Means of costs to it ({'; '.join(counted)}) are too low, and there is no ratio."
        )
    return tuple(notes)


def _cut_short(records: Sequence[Record]) -> list[str]:
    """What made trainings smaller than they sound: fewer samples, or a cap that came before patience."""
    notes = []
    samples = {_setting(record, "dataset", "limit_train") for record in records} - {None}
    if samples:
        notes.append(
            f"It learned from {_listed([f'{n:,}' for n in sorted(samples)])} training samples alone (dataset.limit_train)."
        )
    trainers = [record.part("config").get("trainer") for record in records]
    for name in ("limit_train_batches", "max_steps", "max_time"):
        given = [trainer.get(name) for trainer in trainers if isinstance(trainer, Mapping)]
        limits = sorted({str(value) for value in given} - {"None", "-1", "1.0"})  # 1.0 is all batches, and 1 is one
        if limits:
            notes.append(f"Its training had a limit, trainer.{name}={_listed(limits)}.")
    patient = [r for r in records if r.text("mode") == "own" and _setting(r, "schedule", "patience") is not None]
    caps = [cap for n, cap in map(longest_stage, patient) if n is not None and cap is not None and n >= cap]
    if caps:
        most = _listed([str(n) for n in sorted(set(caps))])
        which = "the only run" if len(records) == 1 else f"{len(caps)} of {len(records)} runs"
        notes.append(
            f"{which} went on to the cap (trainer.max_epochs={most}), not stopped by patience before: longer trainings may "
            "give other figures."
        )
    return notes


def longest_stage(record: Record) -> tuple[int | None, int | None]:
    """Epochs of a run's longest stage, and the most that its settings allow one; ``None`` for what is not recorded."""
    epochs = record.data.get("epochs")
    known = [n for n in epochs if type(n) is int] if isinstance(epochs, list) else []
    return max(known, default=None), _setting(record, "trainer", "max_epochs")


def _as_long_as_the_cap(records: Sequence[Record]) -> list[str]:
    """A learning rate that falls over all allowed epochs makes their number part of what a target costs."""
    lengths = set()
    for record in records:
        scheduler, cap = record.part("config").get("scheduler"), _setting(record, "trainer", "max_epochs")
        if record.text("mode") == "target" and cap is not None and isinstance(scheduler, Mapping):
            lengths |= {value for value in scheduler.values() if type(value) is int and value == cap}
    if not lengths:
        return []
    return [
        f"Its learning rate follows a schedule of {_listed([f'{n:,}' for n in sorted(lengths)])} epochs, all that "
        "trainer.max_epochs allows: with another cap the target costs something else; scheduler=null keeps the rate constant."
    ]


def _setting(record: Record, group: str, name: str) -> Any:
    """A setting of a run that is a whole number; ``None``: it is none, or not there."""
    return _whole(record.part("config").get(group), name)


def _whole(part: Any, name: str) -> Any:
    value = part.get(name) if isinstance(part, Mapping) else None
    return value if type(value) is int else None


def _ended(record: Record) -> str:
    reason = (record.text("error") or "no reason was recorded").strip().rstrip(".")
    word = record.status if record.status in ("failed", "interrupted") else f"not finished ({record.status})"
    return f"Seed {record.seed}: {word}: {reason[:200]}."


def _by_value(name: str, known: Sequence[Mapping[str, str]], records: Sequence[Record]) -> str:
    """The values of a circumstance with the seeds of each."""
    seeds: dict[str, list[str]] = {}
    for one, record in zip(known, records, strict=True):
        seeds.setdefault(one.get(name, "not recorded"), []).append(str(record.seed))
    return " / ".join(
        f"{value} (seed{'s' if len(of) > 1 else ''} {_listed(of, ', ')})" for value, of in sorted(seeds.items())
    )


def _against(mine: Sequence[Record], theirs: Sequence[Record]) -> list[str]:
    """In what else than the rule and its settings two groups were not made alike."""
    if not mine or not theirs:
        return []
    told = []
    ours, base = ([circumstances(record) for record in records] for records in (mine, theirs))
    for name in sorted({name for one in [*ours, *base] for name in one}):
        values, others = ({one.get(name, "not recorded") for one in of} for of in (ours, base))
        if values != others:
            told.append(f"{name} ({' / '.join(sorted(values))} against {' / '.join(sorted(others))})")
    return [f"It and its baseline were not made alike: {_listed(told)}."] if told else []


def _same_weights(mine: Sequence[Record], theirs: Sequence[Record]) -> list[str]:
    """Whether a rule seems to have trained what its baseline did: no two agree in a loss to the last digit by mere chance."""
    ours, base = ({record.seed: _judged(record) for record in records} for records in (mine, theirs))
    both = ours.keys() & base.keys()
    if not both or any(ours[seed] != base[seed] for seed in both):
        return []
    if any("test/loss" not in ours[seed] or None in ours[seed].values() for seed in both):
        return []  # what nobody knows is not equal
    return [
        "It has the baseline's test loss and metric to the last digit at every seed of both, as it would have with the same "
        "weights."
    ]


def _judged(record: Record) -> dict[str, float | None]:
    """What came of a run's weights on the test set."""
    return {name: value for name, value in record.figures().items() if name.startswith("test/")}


def _listed(words: Sequence[str], separator: str = "; ") -> str:
    separator = ", " if all(" " not in word for word in words) else separator
    return separator.join(words[:_SHOWN]) + (" …" if len(words) > _SHOWN else "")


# ------------------------------------------------------------------------------------------- figures


def _figures(group: _Group, reference: _Group | None) -> dict[str, Figure]:
    base = {} if reference is None else _by_seed(reference.done)
    arrivals = _arrivals(group)
    others = None if reference is None else _arrivals(reference)
    result: dict[str, Figure] = {}
    for name, values in _by_seed(group.done).items():
        if name.startswith(_TO_TARGET) and arrivals is not None and not arrivals.all:
            mean = summarise(values.items()).mean
            result[name] = Figure(
                values,
                Summary(len(values), mean, None),
                None,
                None,
                mean,
                arrivals,
                f"{arrivals}: no interval, no ratio",
            )
            continue
        figure = own_figure(name, values, arrivals if name.startswith(_TO_TARGET) else None)
        if reference is not None:
            reason = _incomparable(name, group, reference, arrivals, others)
            figure = _compared(name, figure, base.get(name, {}), group, reference, reason)
        result[name] = figure
    return result


def own_figure(name: str, values: Mapping[int, float], arrivals: Arrivals | None = None) -> Figure:
    """A figure by itself: a cost with its geometric mean, anything else with its mean."""
    summary = summarise(values.items())
    interval = t_interval(values.values())
    centre, reason = summary.mean, None
    if is_cost(name) and min(values.values()) > 0:
        centre, interval = geometric([math.log(value) for value in values.values()])
        if len(set(values.values())) == 1:  # exactly, not but for the rounding of a logarithm
            centre = next(iter(values.values()))
            interval = None if interval is None else (centre, centre)
    elif is_cost(name) and len(set(values.values())) > 1:
        interval, reason = None, "no interval on a logarithmic scale, for a value is not above 0"
    return Figure(values, summary, interval, None, centre, arrivals, reason)


def _compared(
    name: str, figure: Figure, base: Mapping[int, float], group: _Group, reference: _Group, reason: str | None
) -> Figure:
    if reason is not None:
        return _with_reason(figure, reason)
    if name.startswith("target/") and not is_cost(name):
        return figure  # what was asked for, not what came of it
    values: Mapping[int, float] = figure.by_seed
    if machine_bound(name):
        where = {record.seed: machines(record) for record in reference.done}
        same = {r.seed for r in group.done if len(machines(r)) == 1 and machines(r) == where.get(r.seed)}
        left = [str(seed) for seed in values if seed in base and seed not in same]
        values = {seed: value for seed, value in values.items() if seed in same}
        if left:
            why = f"not compared for seed{'s' if len(left) > 1 else ''} {', '.join(left)}: another machine"
            figure = _with_reason(figure, why)
    comparison = paired(values, base, log=is_cost(name))
    return replace(figure, paired=comparison if comparison.n else None)


def _with_reason(figure: Figure, reason: str) -> Figure:
    """The figure with a reason more."""
    return replace(figure, reason="; ".join(filter(None, (figure.reason, reason))))


def _incomparable(
    name: str, group: _Group, reference: _Group, arrivals: Arrivals | None, others: Arrivals | None
) -> str | None:
    """Why a figure cannot be compared with the baseline's at all."""
    whole = name.startswith((*_TO_TARGET, *_WHOLE_TRAINING))
    for who, found in (("", arrivals), ("of the baseline ", others)):
        if whole and found is not None and not found.all:
            return f"{who}{found}: no ratio"
    if "flops" in name and any(record.uncounted for record in (*group.done, *reference.done)):
        return "operators without a formula: no ratio"
    return None


def machine_bound(name: str) -> bool:
    """Whether a figure is one of the machine, too, and says nothing beside that of another machine."""
    return name.startswith(_MACHINE_BOUND)


def is_cost(name: str) -> bool:
    """Whether a figure is compared by ratios, on a logarithmic scale: all but metrics and losses."""
    return not name.startswith(("test/", "validation/")) and (
        not name.startswith("target/") or name.startswith(_TO_TARGET)
    )


def _arrivals(group: _Group) -> Arrivals | None:
    """Who reached the target; ``None`` in another mode."""
    if group.section[3] != "target":
        return None
    return Arrivals(sum(record.arrived for record in group.done), len(group.done) + len(group.missing))


def _by_seed(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Figures by seed; where a run did not reach its target, the costs to it are all that it spent."""
    values: dict[str, dict[int, float]] = {}
    for record in records:
        figures = record.figures() | (record.spent() if record.text("mode") == "target" and not record.arrived else {})
        for name, value in figures.items():
            if value is not None:
                values.setdefault(name, {})[record.seed] = value
    return values


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows with their p-values corrected by Holm, over the rows of a section, figure by figure."""
    families: dict[tuple[_Section, str], list[int]] = {}
    for i, row in enumerate(rows):
        for name, figure in row.figures.items():
            if figure.paired is not None and figure.paired.p is not None:
                families.setdefault((row.section, name), []).append(i)
    figures = [dict(row.figures) for row in rows]
    for (_, name), members in families.items():
        found = [figures[i][name] for i in members]
        for i, figure, p in zip(members, found, holm([f.paired.p for f in found if f.paired]), strict=True):
            assert figure.paired is not None
            figures[i][name] = replace(figure, paired=replace(figure.paired, p_holm=p))
    return [replace(row, figures=new) for row, new in zip(rows, figures, strict=True)]
