"""What a table is made of: rows, their figures, and who arrived at a target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from locallearn.records import Quality, Record
from locallearn.statistics._identity import machines
from locallearn.statistics._inference import PairedDifference, Summary


@dataclass(frozen=True)
class Arrivals:
    """How many runs of a row reached its target.

    Attributes:
        reached: runs that did.
        total: all of them, the failed and interrupted ones too.
    """

    reached: int
    total: int

    @property
    def all(self) -> bool:
        """Whether everyone arrived."""
        return self.reached == self.total

    def __str__(self) -> str:
        return f"{self.reached} of {self.total} reached"


@dataclass(frozen=True)
class Figure:
    """One quantity of one group of runs.

    Attributes:
        by_seed: the known values by seed.
        summary: their number, mean and spread. Of a cost to a target that not everybody reached the mean is restricted:
            a run that finished without arriving counts with all that it spent, so the true mean is larger; there is no
            spread then.
        interval: 95 % t-interval of ``centre``, ``None`` below three seeds or where ``reason`` says why.
        paired: the comparison with the baseline's group, ``None`` where there is none or for the baseline itself.
        centre: middle of the interval: the geometric mean of a cost, the mean of anything else.
        arrivals: of a cost to a target: how many reached it.
        reason: why there is no interval or no comparison that one would look for, ``None`` where nothing is missing.
    """

    by_seed: Mapping[int, float]
    summary: Summary
    interval: tuple[float, float] | None
    paired: PairedDifference | None
    centre: float | None = None
    arrivals: Arrivals | None = None
    reason: str | None = None

    @property
    def censored(self) -> bool:
        """Whether some runs did not reach the target that this is the cost to."""
        return self.arrivals is not None and not self.arrivals.all


@dataclass(frozen=True)
class Row:
    """A group of runs that differ only in their seed.

    Attributes:
        dataset: data set.
        net: network, empty when the records do not say.
        task: task, empty when the records do not say.
        algorithm: learning rule.
        variant: what else sets the group apart (the records' ``variant``, and settings that only some runs of a seed have),
            ``None`` for nothing.
        mode: protocol mode (``own``, ``matched``, ``target``), ``None`` when the records do not say.
        records: one finished record per seed, ordered by seed.
        figures: figures by the names of :meth:`Record.figures`; a name is here when one record knows its value.
        notes: sentences to print beside the numbers.
        missing: seeds without a finished run: the record of the newest one that failed or was interrupted.
        target: value of the metric that ends a run in mode ``target``.
        arrivals: how many of its runs reached it, ``None`` in another mode.
        against: label of the row that its figures are compared with, ``None`` for the baseline itself or without one.
    """

    dataset: str
    net: str
    task: str
    algorithm: str
    variant: str | None
    mode: str | None
    records: tuple[Record, ...]
    figures: Mapping[str, Figure]
    notes: tuple[str, ...]
    missing: tuple[Record, ...] = ()
    target: float | None = None
    arrivals: Arrivals | None = None
    against: str | None = None

    @property
    def label(self) -> str:
        """The rule, with its variant where there is one; controls of memory by their names."""
        return labelled(self.algorithm, self.variant)

    @property
    def place(self) -> str:
        """Data set and network, and the task where it is not the usual one."""
        task = "" if self.task == "classification" else self.task
        return " · ".join(filter(None, (self.dataset, self.net, task)))

    @property
    def terms(self) -> str:
        """How a training ends: the mode, with the target's value where there is one."""
        mode = self.mode or "not stated"
        return mode if self.target is None else f"{mode} {self.target:g}"

    @property
    def section(self) -> tuple[str, str, str, str, float | None]:
        """What all rows that may be compared have in common."""
        return self.dataset, self.net, self.task, self.mode or "", self.target

    @property
    def newest(self) -> Record:
        """The record of the last seed, a finished one where there is one."""
        return (self.records or self.missing)[-1]

    @property
    def metric(self) -> Quality:
        """The figure by which its runs are judged."""
        return self.newest.metric

    @property
    def seeds(self) -> str:
        """How many of its seeds have a finished run: ``5``, or ``4 of 5``."""
        done = len(self.records)
        return str(done) if not self.missing else f"{done} of {done + len(self.missing)}"

    @property
    def complete(self) -> bool:
        """Whether every seed finished, has the metric, and reached its target: else means are those of survivors."""
        arrived = self.arrivals is None or self.arrivals.all
        return not self.missing and arrived and not self.unjudged

    @property
    def unjudged(self) -> Mapping[tuple[str, ...], int]:
        """How many finished runs lack the metric, by the parts of the data (``test``, ``validation``) in which they lack it.

        A part that no record of the row speaks of was not asked for, and is lacking only where there is no other.
        """
        name, parts = self.metric.name, ("test", "validation")
        asked = [part for part in parts if any(name in record.part(part) for record in self.records)] or parts
        known = {part: figure.by_seed if (figure := self.figures.get(f"{part}/{name}")) else {} for part in asked}
        lacking = (tuple(part for part in asked if record.seed not in known[part]) for record in self.records)
        return Counter(filter(None, lacking))

    @property
    def machines(self) -> frozenset[tuple[str, ...]]:
        """The machines that its runs ran on."""
        return frozenset().union(*map(machines, self.records))


def elsewhere(rows: Sequence[Row]) -> frozenset[str]:
    """Labels of the rows of a section whose seconds and joules cannot be ranked among the others', being of another machine.

    What counts is the machine of the baseline; where none has finished, or its settings ran on several, that of most rows.
    """
    ran = [row for row in rows if row.records]
    named = {row.against for row in ran}
    often = Counter(row.machines for row in ran)
    bases = [row for row in ran if row.label in named] or ran
    home = max((row.machines for row in bases), key=often.__getitem__, default=None)
    return frozenset(row.label for row in ran if row.machines != home)


def labelled(algorithm: str, variant: str | None) -> str:
    """A rule with what sets a group of its runs apart."""
    return algorithm if variant is None else f"{algorithm} · {', '.join(map(_spoken, variant.split(', ')))}"


def _spoken(setting: str) -> str:
    """What a reader calls it."""
    if setting == "checkpoint=auto":
        return "checkpointed"
    name, _, parts = setting.partition("=")
    return f"accumulated, {parts} parts" if name == "accumulate" and parts.isdecimal() and parts != "1" else setting
