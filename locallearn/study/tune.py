"""Tuning on equal budgets: the same space and the same number of trials for every algorithm, judged on validation data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
        ValueError: an empty or endless range, or a logarithmic one that does not stay above zero.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf or (self.log and self.low <= 0):
            raise ValueError(
                f"a search range from {self.low} to {self.high}{' on a log scale' if self.log else ''} cannot be searched: "
                "expected finite numbers with low < high, and low above 0 for log"
            )


@dataclass(frozen=True)
class Best:
    """Outcome of one algorithm's search.

    Attributes:
        algorithm: its name.
        settings: the best trial's, as ``KEY=VALUE``.
        metric: name of the task's metric.
        value: of that metric on the validation data in that trial.
        trials: number of trials that count, diverged ones included.
    """

    algorithm: str
    settings: list[str]
    metric: str
    value: float
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
    value of the task's metric on validation data; the test set is never read. A trial that diverges counts with the worst
    value there is (an accuracy of 0).

    Args:
        algorithms: names that ``make`` knows.
        make: makes the plan of a trial.
        space: range of every setting, the same for all algorithms.
        trials: of each algorithm in total, those of earlier calls included.
        storage: SQLite file that keeps the trials.
        name: of the study; settings that are not searched belong into it, so that different studies do not mix.
        sampler_seed: of the sampler. The first ten draws are random and the same for every algorithm; then draws follow
            what each algorithm answered.
        show: told ``(name, trial, trials, metrics)`` after every trial.

    Raises:
        ValueError: no trials, or nothing to search.
    """
    if trials < 1 or not space:
        raise ValueError(f"tune.trials is {trials} with {len(space)} ranges in tune.space, expected at least 1 of each")
    storage.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    base = optuna.storages.RDBStorage(f"sqlite:///{storage}")
    try:
        studies = {
            algorithm: optuna.create_study(
                storage=base, study_name=f"{algorithm}-{name}", direction="maximize", load_if_exists=True
            )
            for algorithm in algorithms
        }
        for number in range(trials):
            for algorithm, study in studies.items():
                if len(_complete(study)) > number:
                    continue
                study.sampler = _sampler(sampler_seed, number)
                metric, value = _trial(study, algorithm, make, space)
                if show is not None:
                    show(f"tune {algorithm}", number + 1, trials, {f"validation/{metric}": value})
        return [_best(algorithm, _complete(study)[:trials]) for algorithm, study in studies.items()]
    finally:
        base.remove_session()
        base.engine.dispose()


def study_name(dataset: str, net: str, settings: Sequence[str]) -> str:
    """A name that tells studies with different fixed settings apart."""
    digest = hashlib.sha256(json.dumps(sorted(settings)).encode()).hexdigest()[:8]
    return f"{dataset}-{net}-{digest}"


def _complete(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that count, oldest first: one whose process was killed stays RUNNING, and its place is tried again."""
    return study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))


def _sampler(seed: int, number: int) -> optuna.samplers.TPESampler:
    """A sampler for one trial: a search that goes on later must draw what it would have drawn, not its start again."""
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    # Nothing else runs beside a trial here, so one that is still RUNNING was killed and says nothing of its place.
    return optuna.samplers.TPESampler(seed=own, constant_liar=False)


def _trial(study: optuna.Study, algorithm: str, make: Make, space: Mapping[str, Range]) -> tuple[str, float]:
    """Name and value of the metric that the trial reached; the study maximises it, or its negative."""
    trial = study.ask()
    settings = [f"{key}={trial.suggest_float(key, r.low, r.high, log=r.log)!r}" for key, r in space.items()]
    plan = make(algorithm, settings)
    plan.evaluate_test = plan.keep_model = False
    try:
        record = load_record(run(plan))
    except Diverged as error:
        record = load_record(error.run_folder)  # type: ignore[attr-defined]  # set by run()
    metric, maximise = record.data["metric"]["name"], record.data["metric"]["maximise"]
    value = record.data["validation"].get(metric)
    if value is None or not math.isfinite(value):
        value = 0.0 if maximise else math.inf
    trial.set_user_attr("record", record.path.name)
    trial.set_user_attr("metric", metric)
    trial.set_user_attr("reached", float(value))
    study.tell(trial, float(value) if maximise else -float(value))
    return metric, float(value)


def _best(algorithm: str, counted: Sequence[optuna.trial.FrozenTrial]) -> Best:
    best = max(counted, key=lambda trial: -math.inf if trial.value is None else trial.value)
    settings = [f"{k}={v!r}" for k, v in best.params.items()]
    return Best(algorithm, settings, best.user_attrs["metric"], best.user_attrs["reached"], len(counted))
