"""What ended the trainings of a comparison in which each has an end of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from locallearn.records import Record
from locallearn.report._columns import known_number
from locallearn.report._html import count
from locallearn.statistics import Row, longest_stage


@dataclass(frozen=True)
class _Rule:
    """A stopping rule, as a record's settings have it.

    Attributes:
        patience: validations without improvement; ``None``: none of them ends a training.
        monitor: what has to improve, ``None`` for the task's metric.
        best: whether the weights of the best validation are kept.
        sooner: whether the run ended before the rule or the cap can have ended it (a closed form, a limit of steps).
    """

    patience: int | None
    monitor: str | None
    best: bool
    sooner: bool


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
    waited = None if patience is None else int(patience)
    sooner = _sooner(record, waited)
    watched = (
        monitor if isinstance(monitor, str) and waited is not None and not sooner else None
    )  # else it ends nothing
    return _Rule(waited, watched, best, sooner)


def _sooner(record: Record, patience: int | None) -> bool:
    epochs, cap = longest_stage(record)
    if epochs is None or cap is None or epochs >= cap:
        return False
    trainer = record.part("config").get("trainer")
    often = isinstance(trainer, Mapping) and trainer.get("val_check_interval") is not None
    return patience is None or (epochs <= patience and not often)  # the first validation improves


def _told(rule: _Rule | None, records: Sequence[Record], metric: str) -> str:
    if rule is None:
        return "by a rule that is not recorded"
    stages = [longest_stage(record) for record in records]
    caps = sorted({cap for _, cap in stages if cap is not None})
    most = "" if not caps else f" ({caps[0]})" if len(caps) == 1 else f" ({caps[0]} to {caps[-1]})"
    kept = "" if rule.best else ", and its last weights are kept"
    if rule.sooner:
        waited = "" if rule.patience is None else f"{count(rule.patience, 'validation')} without improvement or "
        return f"sooner than after {waited}all epochs{most}{kept}"
    if rule.patience is None:
        return f"after all epochs{most}, for there is no stopping rule{kept}"
    watched = f"validation {metric}" if rule.monitor is None else rule.monitor.replace("/", " ")
    ended = [epochs >= cap for epochs, cap in stages if epochs is not None and cap is not None]
    did = f", as {sum(ended)} of {len(ended)} did" if ended else ""
    waited = count(rule.patience, "validation")
    return f"once {watched} has not improved for {waited}, or after all epochs{most}{did}{kept}"


def _named(records: Sequence[Record]) -> str:
    return ", ".join(dict.fromkeys(record.algorithm for record in records))
