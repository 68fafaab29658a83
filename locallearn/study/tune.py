"""Tuning on equal budgets: the same space and the same number of trials for every algorithm, judged on validation data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from locallearn.records import load_record
from locallearn.strategies.local import Diverged
from locallearn.study.train import Plan, run

Make = Callable[[str, Sequence[str]], Plan]
"""Makes a plan: ``make(algorithm, settings)``."""


@dataclass(frozen=True)
class Range:
    """Values that a setting may take in a search.

    Attributes:
        low: smallest value.
        high: largest value.
        log: search on a logarithmic scale.

    Raises:
        ValueError: an empty range, or a logarithmic one that does not stay above zero.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(
                f"a search range from {self.low} to {self.high}{' on a log scale' if self.log else ''} is empty: "
                "expected low < high, and low above 0 for log"
            )


@dataclass(frozen=True)
class Best:
    """Outcome of one algorithm's search.

    Attributes:
        algorithm: its name.
        settings: the best trial's, as ``KEY=VALUE``.
        accuracy: validation accuracy of that trial.
        trials: number of trials that count, failed ones included.
    """

    algorithm: str
    settings: list[str]
    accuracy: float
    trials: int


def tune(
    algorithms: Sequence[str],
    make: Make,
    space: Mapping[str, Range],
    trials: int,
    storage: Path,
    name: str,
    sampler_seed: int = 0,
    show: Callable[[str, int, int, dict[str, float]], None] | None = None,
) -> list[Best]:
    """Search every algorithm's settings with Optuna's TPE; an interrupted search goes on where it stopped.

    Trials alternate between the algorithms, so that nobody has a quieter machine. The objective is the best epoch's
    validation accuracy; the test set is never read. A trial that diverges counts with accuracy 0.

    Args:
        algorithms: names that ``make`` knows.
        make: makes the plan of a trial.
        space: range of every setting, the same for all algorithms.
        trials: of each algorithm in total, those of earlier calls included.
        storage: SQLite file that keeps the trials.
        name: of the study; settings that are not searched belong into it, so that different studies do not mix.
        sampler_seed: of the sampler. Algorithms get different draws, since each answers differently.
        show: told ``(name, trial, trials, metrics)`` after every trial.

    Raises:
        ValueError: no trials, or nothing to search.
    """
    if trials < 1 or not space:
        raise ValueError(f"tune.trials is {trials} with {len(space)} ranges in tune.space, expected at least 1 of each")
    storage.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    studies = {
        algorithm: optuna.create_study(
            storage=optuna.storages.RDBStorage(f"sqlite:///{storage}"),
            sampler=optuna.samplers.TPESampler(seed=sampler_seed),
            study_name=f"{algorithm}-{name}",
            direction="maximize",
            load_if_exists=True,
        )
        for algorithm in algorithms
    }
    for number in range(trials):
        for algorithm, study in studies.items():
            # A trial whose process was killed stays RUNNING and does not count; it is simply tried again.
            if sum(trial.state.is_finished() for trial in study.trials) > number:
                continue
            accuracy = _trial(study, algorithm, make, space)
            if show is not None:
                show(f"tune {algorithm}", number + 1, trials, {"validation/accuracy": accuracy})
    return [_best(algorithm, study) for algorithm, study in studies.items()]


def study_name(dataset: str, net: str, settings: Sequence[str]) -> str:
    """A name that tells studies with different fixed settings apart."""
    digest = hashlib.sha256(json.dumps(sorted(settings)).encode()).hexdigest()[:8]
    return f"{dataset}-{net}-{digest}"


def _trial(study: optuna.Study, algorithm: str, make: Make, space: Mapping[str, Range]) -> float:
    trial = study.ask()
    settings = [f"{key}={trial.suggest_float(key, r.low, r.high, log=r.log)!r}" for key, r in space.items()]
    plan = make(algorithm, settings)
    plan.evaluate_test = False
    try:
        record = load_record(run(plan))
        accuracy = float(record.data["validation"]["accuracy"])
        trial.set_user_attr("record", record.path.name)
    except Diverged:
        accuracy = 0.0
    if not math.isfinite(accuracy):
        accuracy = 0.0
    study.tell(trial, accuracy)
    return accuracy


def _best(algorithm: str, study: optuna.Study) -> Best:
    finished: list[Any] = [trial for trial in study.trials if trial.state.is_finished()]
    best = study.best_trial
    return Best(algorithm, [f"{k}={v!r}" for k, v in best.params.items()], float(best.value or 0.0), len(finished))
