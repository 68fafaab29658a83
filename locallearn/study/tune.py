"""Tuning on equal budgets: the same space and the same number of trials for every algorithm, judged on validation data."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import math
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial, Trial, TrialState

from locallearn.records import load_record
from locallearn.strategies.local import Diverged
from locallearn.study._workers import Worker
from locallearn.study.space import Choices, Range, Space, words
from locallearn.study.train import Interrupted, Plan, run

__all__ = ["Best", "Choices", "Make", "Range", "study_name", "tune"]

Make = Callable[[str, Sequence[str]], Plan]
"""Makes a plan: ``make(algorithm, settings)``."""

# A trial whose process dies is run again; one that was the death of so many is taken for the cause.
_ATTEMPTS = 3
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True)
class Best:
    """Outcome of one algorithm's search.

    Attributes:
        algorithm: its name.
        settings: the best trial's, as ``KEY=VALUE``; none where no trial came to an end with finite figures.
        metric: name of the task's metric; ``None`` where nothing is known of it.
        value: of that metric on the validation data in that trial; ``None`` where no trial came to an end.
        trials: number of trials that count, failed and diverged ones included.
        failures: what went wrong, one sentence for every trial that failed or diverged.
    """

    algorithm: str
    settings: list[str]
    metric: str | None
    value: float | None
    trials: int
    failures: tuple[str, ...] = ()


def tune(
    algorithms: Sequence[str],
    make: Make,
    space: Space,
    trials: int,
    storage: Path,
    name: str,
    sampler_seed: int = 0,
    show: Callable[[str, int, int, dict[str, float]], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Best]:
    """Search every algorithm's settings with Optuna's TPE; an interrupted search goes on where it stopped.

    Trials alternate between the algorithms, so that nobody has a quieter machine. The objective is the best epoch's
    value of the task's metric on validation data; the test set is never read. A trial that diverges counts with the worst
    value there is (an accuracy of 0); one that raises is ``FAIL`` in Optuna, counts, and the search goes on.

    Several processes of one machine may search at once: each takes the next trial that nobody has, and all of them come
    back when the budget is spent. A trial whose process was killed is run again, with the settings that it had.

    Args:
        algorithms: names that ``make`` knows.
        make: makes the plan of a trial.
        space: what may be drawn, the same for all algorithms.
        trials: of each algorithm in total, those of earlier calls and other processes included.
        storage: SQLite file that keeps the trials.
        name: of the study; settings that are not searched belong into it, so that different studies do not mix.
        sampler_seed: of the sampler. The first ten draws are random and the same for every algorithm; then draws follow
            what each algorithm answered.
        show: told ``(name, trial, trials, metrics)`` after every trial.
        say: told in a sentence when a trial fails, or other processes are waited for.

    Raises:
        ValueError: no trials, or nothing to search.
        OSError: the disk is full; the trial is run again when the search goes on.
    """
    if trials < 1 or not space:
        raise ValueError(f"tune.trials is {trials} with {len(space)} ranges in tune.space, expected at least 1 of each")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with Worker(storage) as worker:
        with worker.alone():  # tables and studies are made once
            base = _open(storage)
            studies = {algorithm: _study(base, f"{algorithm}-{name}") for algorithm in algorithms}
        try:
            search = _Search(studies, make, space, trials, sampler_seed, worker, show, say)
            search.run()
            return [_best(algorithm, _finished(study)[:trials]) for algorithm, study in studies.items()]
        finally:
            base.remove_session()
            base.engine.dispose()


def study_name(dataset: str, net: str, settings: Sequence[str]) -> str:
    """A name that tells studies with different fixed settings apart."""
    digest = hashlib.sha256(json.dumps(sorted(settings)).encode()).hexdigest()[:8]
    return f"{dataset}-{net}-{digest}"


def _open(storage: Path) -> optuna.storages.RDBStorage:
    """The file as Optuna's storage; its path is handed over as a path, since in a URL ``?``, ``#`` and ``{`` mean something."""

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(storage, timeout=60, check_same_thread=False)

    return optuna.storages.RDBStorage("sqlite:///tune.sqlite", engine_kwargs={"creator": connect})


def _study(base: optuna.storages.RDBStorage, name: str) -> optuna.Study:
    return optuna.create_study(storage=base, study_name=name, direction="maximize", load_if_exists=True)


@dataclass
class _Search:
    """One process's part in a search."""

    studies: dict[str, optuna.Study]
    make: Make
    space: Space
    trials: int
    seed: int
    worker: Worker
    show: Callable[[str, int, int, dict[str, float]], None] | None
    say: Callable[[str], None] | None

    def run(self) -> None:
        """Run trials until every algorithm has had its number of them, here or in another process."""
        told = False
        while True:
            for number in range(self.trials):
                for algorithm, study in self.studies.items():
                    trial = self._claim(study, number)
                    if trial is not None:
                        self._try(algorithm, study, trial, number)
            if all(len(_finished(study)) >= self.trials for study in self.studies.values()):
                return
            running = sum(len(self._running(study)) for study in self.studies.values())
            if running:  # else its process has died meanwhile, and it is free
                if not told and self.say is not None:
                    self.say(f"waiting for {running} trial{'s' * (running > 1)} of other processes")
                told = True
                time.sleep(_LOOK_AGAIN_S)

    def _claim(self, study: optuna.Study, number: int) -> Trial | None:
        """A trial for this process, its settings drawn; ``None`` where more than ``number`` are taken already."""
        with self.worker.alone():
            while True:
                taken, left = self._census(study)
                if taken > number:
                    return None
                attempts = left[0].user_attrs.get("attempts", 0) if left else 0
                if attempts >= _ATTEMPTS:
                    _trial(study, left[0]).set_user_attr("error", f"its process died {attempts} times")
                    study.tell(left[0].number, state=TrialState.FAIL)
                    continue
                trial = _trial(study, left[0]) if left else study.ask()
                trial.set_user_attr("worker", self.worker.name)
                trial.set_user_attr("attempts", attempts + 1)
                study.sampler = _sampler(self.seed, trial.number)
                for key, part in self.space.items():
                    _draw(trial, key, part)
                return trial

    def _census(self, study: optuna.Study) -> tuple[int, list[FrozenTrial]]:
        """Number of trials that are finished or that somebody runs, and those whose process died.

        A trial of another process may end at any moment: all are counted in one look, and what seems dead is looked at
        again, because its process may have told of it and gone.
        """
        trials = _trials(study)
        dead = {trial.number for trial in trials if trial.state is TrialState.RUNNING and not self._is_run(trial)}
        if dead:
            trials = _trials(study)
        left = [trial for trial in trials if trial.number in dead and trial.state is TrialState.RUNNING]
        return len(trials) - len(left), left

    def _is_run(self, trial: FrozenTrial) -> bool:
        return self.worker.is_at_work(trial.user_attrs.get("worker"))

    def _running(self, study: optuna.Study) -> list[FrozenTrial]:
        unfinished = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial for trial in unfinished if self._is_run(trial)]

    def _try(self, algorithm: str, study: optuna.Study, trial: Trial, number: int) -> None:
        """Run a trial and tell Optuna: the study maximises the metric, or its negative."""
        metrics: dict[str, float] = {}
        try:
            metric, reached, maximise = self._judged(algorithm, trial)
        except (Interrupted, KeyboardInterrupt):
            trial.set_user_attr("attempts", trial.user_attrs["attempts"] - 1)  # it was not the cause
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            sentence = f"{type(error).__name__}: {str(error).strip() or 'no message'}".partition("\n")[0]
            trial.set_user_attr("error", sentence)
            study.tell(trial, state=TrialState.FAIL)
            if self.say is not None:
                self.say(f"trial {number + 1} of {algorithm} failed, the search goes on: {sentence}")
            failed = True
        else:
            study.tell(trial, reached if maximise else -reached)
            metrics = {f"validation/{metric}": reached}
            failed = False
        if failed:  # what it held, in particular on the device, must not be the end of the next one, too
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where CUDA was not used
        if self.show is not None:
            self.show(f"tune {algorithm}", number + 1, self.trials, metrics)

    def _judged(self, algorithm: str, trial: Trial) -> tuple[str, float, bool]:
        """Name of the metric, the value that the trial reached, and whether more is better."""
        plan = self.make(algorithm, words({key: trial.params[key] for key in self.space}))
        plan.evaluate_test = plan.keep_model = False
        diverged: str | None = None
        try:
            folder = run(plan)
        except Diverged as error:
            folder, diverged = error.run_folder, str(error)  # type: ignore[attr-defined]  # set by run()
        record = load_record(folder)
        metric, maximise = record.data["metric"]["name"], record.data["metric"]["maximise"]
        value = record.data["validation"].get(metric)
        if value is None or not math.isfinite(value):
            diverged = diverged or f"validation {metric} is {value}"
            value = 0.0 if maximise else math.inf
        if diverged is not None:
            trial.set_user_attr("error", diverged)
        trial.set_user_attr("record", record.path.name)
        trial.set_user_attr("metric", metric)
        trial.set_user_attr("reached", float(value))
        return metric, float(value), maximise


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that count, oldest first."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))


def _trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that count or may come to count, oldest first."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING))


def _trial(study: optuna.Study, left: FrozenTrial) -> Trial:
    """A trial that was left unfinished, to go on with: its number and what it drew stay."""
    return Trial(study, left._trial_id)


def _draw(trial: Trial, key: str, part: Range | Choices) -> None:
    """Draw a setting; one that the trial has drawn already stays."""
    of = part.distribution
    if isinstance(of, optuna.distributions.CategoricalDistribution):
        trial.suggest_categorical(key, of.choices)
    elif isinstance(of, optuna.distributions.IntDistribution):
        trial.suggest_int(key, of.low, of.high, step=of.step, log=of.log)
    elif isinstance(of, optuna.distributions.FloatDistribution):
        trial.suggest_float(key, of.low, of.high, step=of.step, log=of.log)


def _sampler(seed: int, number: int) -> optuna.samplers.TPESampler:
    """A sampler for one trial: a search that goes on later must draw what it would have drawn, not its start again."""
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    return optuna.samplers.TPESampler(seed=own)


def _best(algorithm: str, counted: Sequence[FrozenTrial]) -> Best:
    failures = tuple(
        f"trial {place}: {trial.user_attrs.get('error', 'it failed')}"
        for place, trial in enumerate(counted, 1)
        if trial.state is TrialState.FAIL or "error" in trial.user_attrs
    )
    good = [t for t in counted if t.state is TrialState.COMPLETE and "error" not in t.user_attrs]
    if not good:
        metric = next((t.user_attrs["metric"] for t in counted if "metric" in t.user_attrs), None)
        return Best(algorithm, [], metric, None, len(counted), failures)
    best = max(good, key=lambda trial: -math.inf if trial.value is None else trial.value)
    return Best(
        algorithm, words(best.params), best.user_attrs["metric"], best.user_attrs["reached"], len(counted), failures
    )
