"""``tune.json``: a search as a file, for reports and for people without Optuna (docs/records.md has its keys)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from locallearn.records import source, write_file
from locallearn.study._objectives import Objective
from locallearn.study._samplers import importances
from locallearn.study.space import Choices, Range, Space

HISTORY = "tune.json"
"""The name of the file."""
SCHEMA = 1

COUNTED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
"""States of trials that are part of the budget."""


def counted(study: optuna.Study, most: int) -> list[FrozenTrial]:
    """The trials that count, oldest first: those that have ended, up to so many.

    Whatever is told of a search (its best trial, its table, its experiments, its file) is told of these.
    """
    return study.get_trials(deepcopy=False, states=COUNTED)[:most]


@dataclass(frozen=True)
class History:
    """Where a search is written down, and what is said of it beside its trials.

    Attributes:
        folder: the search's own, beside the records of its trials.
        about: entries that the search itself does not know (data set, network, command, storage, names of sampler and
            pruner, ...).
    """

    folder: Path
    about: Mapping[str, Any] = field(default_factory=dict)

    def write(
        self,
        studies: Mapping[str, optuna.Study],
        spaces: Mapping[str, Space],
        objectives: Sequence[Objective],
        best: Mapping[str, Sequence[int]],
        trials: int,
        most: int,
    ) -> None:
        """Write the search as it stands; a reader never sees half of it.

        Args:
            studies: by algorithm.
            spaces: the same.
            objectives: of all.
            best: numbers of the best trials of every algorithm.
            trials: the budget of each.
            most: trials of each that count (:func:`counted`): the budget, or where time was up as many as all have had.
        """
        told = [
            _study(algorithm, study, spaces[algorithm], objectives, best[algorithm], most)
            for algorithm, study in studies.items()
        ]
        started = [trial["started"] for entry in told for trial in entry["trials"] if trial["started"] is not None]
        content = {
            "schema": SCHEMA,
            **self.about,
            "source": source(),
            "started": min(started, default=None),
            "updated": datetime.now(UTC).isoformat(),
            "finished": all(sum(trial["counts"] for trial in entry["trials"]) >= trials for entry in told),
            "objectives": [
                {"name": o.name, "of": "cost" if o.cost else "validation", "direction": o.direction} for o in objectives
            ],
            "studies": told,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.folder / HISTORY, json.dumps(content, indent=1, allow_nan=False).encode())


def experiment_name(algorithm: str, number: int | None = None) -> str:
    """Name of the file with an algorithm's best settings; with ``number`` that of one trial among several best ones.

    Signs that are awkward in a file's name are left out, and then a digest of all of them tells it from others.
    """
    words = "".join(sign if sign.isalnum() or sign in "_." else " " for sign in algorithm).split()
    if words != [algorithm]:
        words.append(hashlib.sha256(algorithm.encode()).hexdigest()[:8])
    return "-".join([*words, *([] if number is None else [str(number)])]) + ".yaml"


def _study(
    algorithm: str,
    study: optuna.Study,
    space: Space,
    objectives: Sequence[Objective],
    best: Sequence[int],
    most: int,
) -> dict[str, Any]:
    trials = [_trial(trial) for trial in study.get_trials(deepcopy=False) if trial.state is not TrialState.WAITING]
    counting = {trial.number for trial in counted(study, most)}
    for trial in trials:
        trial["counts"] = trial["number"] in counting
    shares = {
        objective.name: importances(study, place if len(objectives) > 1 else None)
        for place, objective in enumerate(objectives)
    }
    return {
        "study": study.study_name,
        "algorithm": algorithm,
        "directions": [objective.direction for objective in objectives],
        "space": {key: part_as_json(part) for key, part in space.items()},
        "trials": trials,
        "seconds": math.fsum(trial["seconds"] or 0.0 for trial in trials),
        "best": list(best),
        "importances": shares if any(shares.values()) else None,
        "experiment": experiment_name(algorithm) if best else None,
    }


def _trial(trial: FrozenTrial) -> dict[str, Any]:
    attrs = trial.user_attrs
    running = trial.state is TrialState.RUNNING
    curve = attrs.get("curve") or {str(step): value for step, value in sorted(trial.intermediate_values.items())}
    values = [_number(value) for value in attrs.get("values") or trial.values or []] or None
    return {
        "number": trial.number,
        "state": trial.state.name,
        "params": dict(trial.params),
        "values": values,
        "intermediate": {step: _number(value) for step, value in curve.items()},
        "by_seed": {seed: [_number(v) for v in own] for seed, own in attrs.get("by_seed", {}).items()},
        "seconds": None if running else attrs.get("seconds"),
        "started": _utc(trial.datetime_start),
        "ended": _utc(trial.datetime_complete),
        "attempts": attrs.get("attempts", 1),
        "worker": attrs.get("by"),
        "records": attrs.get("record", "").split(),
        "error": attrs.get("error"),
    }


def part_as_json(part: Range | Choices) -> dict[str, Any]:
    """A range or choices as ``tune.space`` has them."""
    when = {"when": {parent: list(values) for parent, values in part.when}} if part.when else {}
    if isinstance(part, Choices):
        return {"choices": list(part.values), **when}
    ends: dict[str, Any] = {"low": part.low, "high": part.high}
    if part.log:
        ends["log"] = True
    if part.step is not None:
        ends["step"] = part.step
    return {**ends, **({"type": "int"} if part.whole else {}), **when}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _utc(moment: datetime | None) -> str | None:
    """Optuna's times are naive ones of this machine's clock."""
    return None if moment is None else moment.astimezone(UTC).isoformat()
