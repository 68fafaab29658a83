"""What ended the trainings of a comparison in which each has an end of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from locallearn.records import Record
from locallearn.report._columns import known_number
from locallearn.report._html import count
from locallearn.statistics import Row


@dataclass(frozen=True)
class _Rule:
    """A stopping rule, as a record's settings have it.

    Attributes:
        patience: validations without improvement; ``None``: none of them ends a training.
        monitor: what has to improve, ``None`` for the task's metric.
        best: whether the weights of the best validation are kept.
    """

    patience: int | None
    monitor: str | None
    best: bool


def own_ends(rows: Sequence[Row], metric: str) -> str:
    """In a sentence or two: the stopping rule of the finished runs, and how many of them it did not stop.

    Args:
        rows: of a section in mode ``own``.
        metric: name of the task's metric.
    """
    records = [record for row in rows for record in row.records]
    if not records:
        return ""
    rules: dict[_Rule | None, list[Record]] = {}
    for record in records:
        rules.setdefault(_rule(record), []).append(record)
    if set(rules) == {None}:
        return "Every run has an end of its own, and the records do not say by what rule."
    told = [_told(rule, of, metric) for rule, of in rules.items()]
    if len(told) == 1:
        return f"Every run ends {told[0]}."
    each = [
        f"{count(len(of), 'run')} ({_named(of)}) {sentence}" for of, sentence in zip(rules.values(), told, strict=True)
    ]
    return f"Not all runs end by the same rule: {'; '.join(each)}."


def _rule(record: Record) -> _Rule | None:
    schedule = record.part("config").get("schedule")
    if not isinstance(schedule, Mapping) or "patience" not in schedule:
        return None
    patience, monitor = known_number(schedule["patience"]), schedule.get("monitor")
    best = schedule.get("restore_best") is not False
    if patience is None:  # then what is watched ends nothing
        return _Rule(None, None, best)
    return _Rule(int(patience), monitor if isinstance(monitor, str) else None, best)


def _told(rule: _Rule | None, records: Sequence[Record], metric: str) -> str:
    if rule is None:
        return "by a rule that is not recorded"
    caps = sorted({cap for record in records if (cap := _cap(record)) is not None})
    most = "" if not caps else f" ({caps[0]})" if len(caps) == 1 else f" ({caps[0]} to {caps[-1]})"
    kept = "" if rule.best else ", and its last weights are kept"
    if rule.patience is None:
        return f"after all epochs{most}, for there is no stopping rule{kept}"
    watched = f"validation {metric}" if rule.monitor is None else rule.monitor.replace("/", " ")
    ended = [record for record in records if _cap(record) is not None and _epochs(record)]
    late = sum(max(_epochs(record)) >= (_cap(record) or 0) for record in ended)
    did = f", as {late} of {len(ended)} did" if ended else ""
    waited = count(rule.patience, "validation")
    return f"once {watched} has not improved for {waited}, or after all epochs{most}{did}{kept}"


def _cap(record: Record) -> int | None:
    """Most epochs of a stage."""
    trainer = record.part("config").get("trainer")
    found = known_number(trainer.get("max_epochs")) if isinstance(trainer, Mapping) else None
    return None if found is None else int(found)


def _epochs(record: Record) -> list[float]:
    """Epochs of every stage."""
    found = record.data.get("epochs")
    return [n for one in found if (n := known_number(one)) is not None] if isinstance(found, list) else []


def _named(records: Sequence[Record]) -> str:
    return ", ".join(dict.fromkeys(record.algorithm for record in records))
