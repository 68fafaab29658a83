"""Tuning on equal budgets: the same number of trials for every algorithm, in turn, judged on validation data."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import optuna
import torch
from optuna.trial import FrozenTrial, Trial, TrialState

from locallearn.records import Record, load_record
from locallearn.strategies.local import Diverged
from locallearn.study._history import COUNTED, HISTORY, History, counted, experiment_name, part_as_json
from locallearn.study._objectives import ALIASES, Direction, Objective, front
from locallearn.study._samplers import PRUNERS, SAMPLERS, MakePruner, MakeSampler, importances, sampler_for
from locallearn.study._storages import Shared, file_of, masked, shared
from locallearn.study.space import Choices, Range, Space, holds, ordered, words
from locallearn.study.train import CHECKPOINT, Interrupted, Plan, run

__all__ = [
    "ALIASES",
    "HISTORY",
    "PRUNERS",
    "SAMPLERS",
    "Best",
    "Choices",
    "History",
    "Make",
    "Objective",
    "Options",
    "Point",
    "Range",
    "experiment_name",
    "file_of",
    "masked",
    "study_name",
    "tune",
]

Make = Callable[[str, Sequence[str]], Plan]
"""Makes a plan: ``make(algorithm, settings)``."""

# A trial whose process dies is run again; one that was the death of so many is taken for the cause.
_ATTEMPTS = 3
_LOOK_AGAIN_S = 1.0


class Pruned(Interrupted):
    """The pruner gave a trial up between two epochs."""


@dataclass(frozen=True)
class Options:
    """How a search goes about it, beyond its budget.

    Attributes:
        seeds: of every trial, whose value is their mean; empty: the one run that ``make`` plans.
        objectives: what is looked for, the first one a figure of the validation data; empty: the task's metric, as the
            first trial's record names it, and then nothing is reported while a trial runs.
        sampler: makes the sampler of a trial.
        pruner: makes every study's pruner, which is asked after every validation.
        timeout_s: no round of trials (one for every algorithm) begins after so many seconds; ``None``: no limit.
        deadline: the same as a moment of :func:`time.monotonic`, for processes of one machine that begin at different times.
        heartbeat_s: seconds between two signs of life of a trial in a database; without three of them it is taken over.
        by: who runs these trials, as it is to stand beside them.
        history: where the search is written down after every trial.
    """

    seeds: Sequence[int] = ()
    objectives: Sequence[Objective] = ()
    sampler: MakeSampler = SAMPLERS["tpe"]
    pruner: MakePruner = PRUNERS["none"]
    timeout_s: float | None = None
    deadline: float | None = None
    heartbeat_s: int = 60
    by: str | None = None
    history: History | None = None


@dataclass(frozen=True)
class Point:
    """One trial's outcome.

    Attributes:
        number: Optuna's, from 0.
        settings: ``KEY=VALUE``.
        values: of the objectives, in their order.
    """

    number: int
    settings: list[str]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Best:
    """Outcome of one algorithm's search.

    Attributes:
        algorithm: its name.
        settings: the best trial's, as ``KEY=VALUE``; none where no trial came to an end with finite figures.
        metric: name of the task's metric; ``None`` where nothing is known of it.
        value: of that metric on the validation data in that trial; ``None`` where no trial came to an end.
        trials: number of trials that count, pruned, failed and diverged ones included.
        failures: what went wrong, one sentence for every trial that failed or diverged.
        points: the best trial; of several objectives those that no other one beats, the best of the first objective first.
        pruned: how many trials the pruner gave up.
        seconds: of all its trials together.
        study: Optuna's name of the study.
        importances: shares of the settings in how much an objective's values differ, by objective, where enough is known.
    """

    algorithm: str
    settings: list[str]
    metric: str | None
    value: float | None
    trials: int
    failures: tuple[str, ...] = ()
    points: tuple[Point, ...] = field(default=(), compare=False)
    pruned: int = field(default=0, compare=False)
    seconds: float = field(default=0.0, compare=False)
    study: str = field(default="", compare=False)
    importances: Mapping[str, Mapping[str, float] | None] = field(default_factory=dict, compare=False)


def tune(
    algorithms: Sequence[str],
    make: Make,
    space: Space | Mapping[str, Space],
    trials: int,
    storage: Path | str,
    name: str,
    sampler_seed: int = 0,
    show: Callable[[str, int, int, dict[str, float]], None] | None = None,
    say: Callable[[str], None] | None = None,
    options: Options | None = None,
) -> list[Best]:
    """Search every algorithm's settings with Optuna; an interrupted search goes on where it stopped.

    Trials alternate between the algorithms, so that nobody has a quieter machine. The objective is the best epoch's
    value of the task's metric on validation data; the test set is never read. A trial that diverges counts with the worst
    value there is (an accuracy of 0); one that raises is ``FAIL`` in Optuna, counts, and the search goes on. With several
    objectives, of which a trial that diverged has no costs, it is ``FAIL``, too.

    Several processes may search at once, on one machine or, where the storage is a database, on many: each takes the next
    trial that nobody has, and all of them come back when the budget is spent. A trial whose process was killed is run
    again, under its number and with the settings that it had, so that it is neither lost nor counted twice.

    Args:
        algorithms: names that ``make`` knows.
        make: makes the plan of a trial.
        space: what may be drawn, the same for all algorithms, or by algorithm.
        trials: of each algorithm in total, those of earlier calls and other processes included.
        storage: SQLite file that keeps the trials, or a text (:func:`~locallearn.study._storages.shared`).
        name: of the study; settings that are not searched belong into it, so that different studies do not mix.
        sampler_seed: of the sampler. The first ten draws are random and the same for every algorithm of one space; then draws
            follow what each algorithm answered.
        show: told ``(name, trial, trials, metrics)`` after every trial.
        say: told in a sentence when a trial fails, or other processes are waited for.
        options: seeds, objectives, sampler, pruner and so on.

    Raises:
        ValueError: no trials, nothing to search, a storage that cannot be used or that holds another search of this name,
            or several objectives with a pruner.
        OSError: the disk is full; the trial is run again when the search goes on.
    """
    options = options or Options()
    spaces = {algorithm: ordered(_space_of(algorithm, space)) for algorithm in algorithms}
    fewest = min((len(own) for own in spaces.values()), default=0)
    if trials < 1 or not fewest:
        raise ValueError(f"tune.trials is {trials} with {fewest} ranges in tune.space, expected at least 1 of each")
    if len(options.objectives) > 1 and not isinstance(options.pruner(), optuna.pruners.NopPruner):
        raise ValueError(
            f"{len(options.objectives)} objectives cannot be pruned by: a trial may be behind in one and ahead in another; "
            "take out tune.pruner, or name one of tune.objectives"
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with shared(storage, options.heartbeat_s) as place:
        with place.alone():  # studies are made once
            studies = {
                algorithm: _study(place.base, f"{algorithm}-{name}", algorithm, own, options)
                for algorithm, own in spaces.items()
            }
        search = _Search(studies, make, spaces, trials, sampler_seed, place, options, show, say)
        search.run()
        search.write_down()
        return [_best(algorithm, study, search.most, options) for algorithm, study in studies.items()]


def study_name(dataset: str, net: str, settings: Sequence[str]) -> str:
    """A name that tells studies with different fixed settings apart."""
    digest = hashlib.sha256(json.dumps(sorted(settings)).encode()).hexdigest()[:8]
    return f"{dataset}-{net}-{digest}"


def _space_of(algorithm: str, space: Space | Mapping[str, Space]) -> Space:
    if any(isinstance(part, Mapping) for part in space.values()):
        return cast(Mapping[str, Space], space)[algorithm]
    return cast(Space, space)


def _study(
    base: optuna.storages.BaseStorage, name: str, algorithm: str, space: Space, options: Options
) -> optuna.Study:
    """The study of one algorithm, made or found again.

    Raises:
        ValueError: it was begun with another space or other objectives.
    """
    directions: list[Direction] = [objective.direction for objective in options.objectives] or ["maximize"]
    study = optuna.create_study(
        storage=base, study_name=name, directions=directions, load_if_exists=True, pruner=options.pruner()
    )
    told: dict[str, Any] = {
        "algorithm": algorithm,
        "space": {key: part_as_json(part) for key, part in space.items()},
        "seeds": list(options.seeds),
        "objectives": [objective.name for objective in options.objectives],
    }
    told = json.loads(json.dumps(told))
    known = study.user_attrs
    for key, value in told.items():
        if known.get(key, value) != value:
            raise ValueError(
                f"the search {name} in this storage was begun with {key} {known[key]}, and now it is {value}: go on with "
                "the former, or begin anew with another runs_dir or tune.storage"
            )
        if key not in known:
            study.set_user_attr(key, value)
    if [direction.name.lower() for direction in study.directions] != directions:
        raise ValueError(f"the search {name} in this storage has other objectives: choose another tune.storage")
    if options.objectives:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # since 2023; for optuna-dashboard
            study.set_metric_names([objective.name for objective in options.objectives])
    return study


@dataclass
class _Search:
    """One process's part in a search.

    ``most`` is how many trials of each algorithm count: the budget, or when time is up as many as one of them has had by then.
    """

    studies: dict[str, optuna.Study]
    make: Make
    spaces: Mapping[str, Space]
    trials: int
    seed: int
    shared: Shared
    options: Options
    show: Callable[[str, int, int, dict[str, float]], None] | None
    say: Callable[[str], None] | None

    def __post_init__(self) -> None:
        seconds, moment = self.options.timeout_s, self.options.deadline
        ends = [math.inf if seconds is None else time.monotonic() + seconds, math.inf if moment is None else moment]
        self._deadline = min(ends)
        self.most = self.trials

    def run(self) -> None:
        """Run trials until every algorithm has had its number of them, here or in another process."""
        told = False
        while True:
            claimed = self.shared.patiently(self._claim)
            if claimed is not None:
                self._try(*claimed)
                continue
            if all(len(counted(study, self.most)) == self.most for study in self.studies.values()):
                return
            running = sum(len(self._running(study)) for study in self.studies.values())
            if running:  # else its process has died meanwhile, and it is free
                if not told and self.say is not None:
                    self.say(f"waiting for {running} trial{'s' * (running > 1)} of other processes")
                told = True
                time.sleep(_LOOK_AGAIN_S)

    def _begun(self) -> int:
        """Trials of the algorithm that has had the most: when time is up, all others get as many."""
        return max(1, min(self.trials, max(len(_trials(study)) for study in self.studies.values())))

    def _claim(self) -> tuple[str, optuna.Study, Trial] | None:
        """A trial for this process, its settings drawn; ``None`` where all are taken.

        The algorithm that has had the fewest comes next. Trials whose process died come when there are no new ones left: if one
        of them is the cause, or whoever kills is quick, all others have been run by then.
        """
        with self.shared.alone():
            # The clock is asked where nobody else begins a trial: processes of one deadline then come to the same number.
            if self.most == self.trials and time.monotonic() > self._deadline:
                self.most = self._begun()
            while True:
                found = {algorithm: self._census(study) for algorithm, study in self.studies.items()}
                begun = {algorithm: taken + len(left) for algorithm, (taken, left) in found.items()}
                stopped = {
                    name: [t for t in left if not t.user_attrs.get("attempts")] for name, (_, left) in found.items()
                }
                open_ = [name for name in found if stopped[name] or begun[name] < self.most]
                if open_:
                    algorithm = min(open_, key=lambda name: begun[name] - len(stopped[name]))
                    again = stopped[algorithm][:1]
                else:
                    died = [name for name in found if found[name][1] and found[name][0] < self.most]
                    if not died:
                        return None
                    algorithm = min(died, key=lambda name: found[name][0])
                    again = [min(found[algorithm][1], key=lambda trial: trial.user_attrs["attempts"])]
                study = self.studies[algorithm]
                attempts = again[0].user_attrs.get("attempts", 0) if again else 0
                if attempts >= _ATTEMPTS:
                    _trial(study, again[0]).set_user_attr("error", f"its process died {attempts} times")
                    study.tell(again[0].number, state=TrialState.FAIL)
                    self.write_down()
                    continue
                return algorithm, study, self._taken(algorithm, study, again, attempts)

    def _taken(self, algorithm: str, study: optuna.Study, again: Sequence[FrozenTrial], attempts: int) -> Trial:
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))  # somebody has put them in line
        place = [*again, *waiting]
        number = place[0].number if place else len(study.get_trials(deepcopy=False))
        study.sampler = sampler_for(self.options.sampler, self.seed, number)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Heartbeat of storage"
            )  # it goes with ask and tell where one beats oneself
            trial = _trial(study, again[0]) if again else study.ask()
        self.shared.beat(trial)
        trial.set_user_attr("worker", self.shared.name)
        trial.set_user_attr("attempts", attempts + 1)
        if self.options.by is not None:
            trial.set_user_attr("by", self.options.by)
        for key, part in self.spaces[algorithm].items():
            if holds(part, trial.params):
                _draw(trial, key, part)
        return trial

    def _census(self, study: optuna.Study) -> tuple[int, list[FrozenTrial]]:
        """Number of trials that are finished or that somebody runs, and those whose process died.

        A trial of another process may end at any moment: all are counted in one look, and what seems dead is looked at
        again, because its process may have told of it and gone.
        """
        trials = _trials(study)
        dead = self.shared.left(study, _unfinished(trials))
        if dead:
            trials = _trials(study)
        left = [trial for trial in _unfinished(trials) if trial.number in dead]
        return len(trials) - len(left), left

    def _running(self, study: optuna.Study) -> list[FrozenTrial]:
        unfinished = _unfinished(_trials(study))
        dead = self.shared.left(study, unfinished)
        return [trial for trial in unfinished if trial.number not in dead]

    def _try(self, algorithm: str, study: optuna.Study, trial: Trial) -> None:
        """Run a trial and tell Optuna."""
        began = time.monotonic()
        told: dict[str, Any] = {}
        metrics: dict[str, float] = {}
        state, values = TrialState.COMPLETE, None
        judge = _Judge(self, algorithm, study, trial, told)
        try:
            with self.shared.alive(trial):
                values = judge.values()
        except Pruned:
            state = TrialState.PRUNED
        except (Interrupted, KeyboardInterrupt):
            with suppress(Exception):  # the user's stop comes first
                trial.set_user_attr("attempts", trial.user_attrs["attempts"] - 1)  # it was not the cause
                trial.set_user_attr("worker", None)
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            state = TrialState.FAIL
            told["error"] = f"{type(error).__name__}: {str(error).strip() or 'no message'}".partition("\n")[0]
        told["seconds"] = time.monotonic() - began
        ours = self.shared.patiently(partial(self._tell, study, trial, state, values, told))
        if not ours and self.say is not None:
            self.say(
                f"trial {trial.number} of {algorithm} was taken over by another process meanwhile, and counts there"
            )
        if state is TrialState.FAIL:
            if self.say is not None:
                self.say(f"trial {trial.number} of {algorithm} failed, the search goes on: {told['error']}")
            gc.collect()  # what it held, in particular on the device, must not be the end of the next one, too
            torch.cuda.empty_cache()  # does nothing where CUDA was not used
        elif "reached" in told:
            metrics = {f"validation/{told['metric']}": told["reached"]}
        if self.show is not None:
            ended = self.shared.patiently(partial(counted, study, self.trials))
            self.show(f"tune {algorithm}", len(ended), self.trials, metrics)
        if judge.stopped is not None:
            raise judge.stopped

    def _tell(
        self,
        study: optuna.Study,
        trial: Trial,
        state: TrialState,
        values: Sequence[float] | None,
        told: Mapping[str, Any],
    ) -> bool:
        """Whether the trial was still this process's to tell of: one that seemed dead may be another's now."""
        with self.shared.alone():
            now = trial.storage.get_trial(trial._trial_id)
            if now.state.is_finished() or now.user_attrs.get("worker") != self.shared.name:
                return False
            for key, value in told.items():
                trial.set_user_attr(key, value)
            study.tell(trial, values, state=None if state is TrialState.COMPLETE else state)
            self.write_down()
            return True

    def write_down(self) -> None:
        """The search as it stands, as a file."""
        history = self.options.history
        if history is not None:
            best = {
                algorithm: [point.number for point in _points(study, counted(study, self.most), self.options)]
                for algorithm, study in self.studies.items()
            }
            history.write(self.studies, self.spaces, self.options.objectives, best, self.trials, self.most)


@dataclass
class _Judge:
    """Runs one trial with all of its seeds, and says what it is worth.

    What is to be kept of it goes into ``told``.
    """

    search: _Search
    algorithm: str
    study: optuna.Study
    trial: Trial
    told: dict[str, Any]
    stopped: Interrupted | None = None
    """Somebody asked to stop when a run's training was over: what it was worth is told first."""

    def values(self) -> list[float]:
        """The objectives, in their order, as Optuna is told them.

        Raises:
            Pruned: the pruner gave the trial up.
        """
        options = self.search.options
        space = self.search.spaces[self.algorithm]
        drawn = words({key: self.trial.params[key] for key in space if key in self.trial.params})
        known: dict[str, list[float]] = dict(self.trial.user_attrs.get("by_seed", {}))  # of an attempt that was killed
        records = str(self.trial.user_attrs.get("record", "")).split() if known else []
        sign = 1.0
        for place, seed in enumerate(options.seeds or [None]):
            if str(seed) in known:
                continue
            plan = self.search.make(self.algorithm, [*drawn, *([] if seed is None else [f"seed={seed}"])])
            plan.evaluate_test = plan.keep_model = False
            if options.objectives:
                plan.progress = partial(self._reported, plan, [own[0] for own in known.values()], place)
            record, own, sign, diverged = self._run(plan)
            records.append(record.path.name)
            self.told["record"] = " ".join(records)
            if diverged is not None:
                return self._diverged(diverged, own, sign)
            known[str(seed)] = own
            if options.seeds:
                self.search.shared.patiently(partial(self._keep, {"by_seed": known, "record": self.told["record"]}))
                if self.stopped is not None and len(known) < len(options.seeds):
                    raise self.stopped
        mean = [math.fsum(column) / len(known) for column in zip(*known.values(), strict=True)]
        self.told |= {"values": mean, "reached": mean[0]}
        return [sign * value for value in mean] if not options.objectives else mean

    def _keep(self, told: Mapping[str, Any]) -> None:
        for key, value in told.items():
            self.trial.set_user_attr(key, value)

    def _diverged(self, why: str, values: list[float], sign: float) -> list[float]:
        objectives = self.search.options.objectives
        if len(objectives) > 1:
            raise Diverged(why)
        self.told |= {"error": why, "values": values, "reached": values[0]}
        return values if objectives else [sign * values[0]]

    def _run(self, plan: Plan) -> tuple[Record, list[float], float, str | None]:
        """The record of one seed, its figures, the sign by which more is better, and why it diverged, if it did."""
        diverged: str | None = None
        try:
            folder = run(plan)
        except Diverged as error:
            folder, diverged = error.run_folder, str(error)  # type: ignore[attr-defined]  # set by run()
        except Pruned as error:
            folder = cast(Path, error.run_folder)  # the same
            self.told["record"] = f"{self.told.get('record', '')} {folder.name}".strip()
            (folder / CHECKPOINT).unlink(missing_ok=True)  # nobody goes on with it
            raise
        except Interrupted as error:
            if error.ended is None:
                raise
            folder, self.stopped = error.ended, error
        record = load_record(folder)
        objectives = self.search.options.objectives
        metric, maximise = record.data["metric"]["name"], record.data["metric"]["maximise"]
        if objectives:
            metric, maximise = objectives[0].name, objectives[0].maximise
        self.told["metric"] = metric
        value = record.data["validation"].get(metric)
        if value is None or not math.isfinite(value):
            diverged = diverged or f"validation {metric} is {value}"
        if diverged is not None:
            return record, [0.0 if maximise else math.inf], 1.0 if maximise else -1.0, diverged
        costs = [objective.read(record) for objective in objectives[1:]]
        return record, [float(value), *costs], 1.0 if maximise else -1.0, None

    def _reported(
        self, plan: Plan, before: Sequence[float], place: int, epoch: int, epochs: int, metrics: Mapping[str, float]
    ) -> None:
        """Take down what a validation gave, as a mean over the seeds so far, and ask the pruner."""
        objective = self.search.options.objectives[0]
        value = metrics.get(f"validation/{objective.name}")
        if value is None or not math.isfinite(value):
            return
        step = place * plan.max_epochs * len(plan.schedule.stages(plan.algorithm)) + epoch
        mean = math.fsum([*before, value]) / (len(before) + 1)
        self.told |= {"metric": objective.name, "reached": mean}
        if len(self.study.directions) > 1:  # of which Optuna has no intermediate values
            self.told.setdefault("curve", {})[str(step)] = mean
        elif self.search.shared.patiently(partial(self._hopeless, step, mean)):
            raise Pruned(f"the pruner ended it after epoch {epoch}, with a validation {objective.name} of {mean:.4g}")

    def _hopeless(self, step: int, value: float) -> bool:
        if step not in self.trial.storage.get_trial(self.trial._trial_id).intermediate_values:  # as another attempt did
            self.trial.report(value, step)
        return self.trial.should_prune()


def _trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that count or may come to count, oldest first."""
    return study.get_trials(deepcopy=False, states=(*COUNTED, TrialState.RUNNING))


def _unfinished(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state is TrialState.RUNNING]


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


def _points(study: optuna.Study, counting: Sequence[FrozenTrial], options: Options) -> list[Point]:
    """The best of the trials that count: one, or of several objectives those that no other one beats, each once."""
    good = [trial for trial in counting if trial.state is TrialState.COMPLETE and "error" not in trial.user_attrs]
    if len(options.objectives) > 1:
        places = front([trial.values for trial in good], options.objectives)
        sign = 1 if options.objectives[0].maximise else -1
        good = sorted((good[place] for place in places), key=lambda trial: -sign * trial.values[0])
        good = [t for place, t in enumerate(good) if t.params not in [other.params for other in good[:place]]]
    elif good:
        sign = 1 if study.direction is optuna.study.StudyDirection.MAXIMIZE else -1
        good = [max(good, key=lambda trial: -math.inf if trial.value is None else sign * trial.value)]
    return [
        Point(t.number, words(t.params), tuple(t.user_attrs.get("values", [t.user_attrs["reached"]]))) for t in good
    ]


def _best(algorithm: str, study: optuna.Study, most: int, options: Options) -> Best:
    counting = counted(study, most)
    failures = tuple(
        f"trial {trial.number}: {trial.user_attrs.get('error', 'it failed')}"
        for trial in counting
        if trial.state is TrialState.FAIL or "error" in trial.user_attrs
    )
    points = _points(study, counting, options)
    several = len(options.objectives) > 1
    return Best(
        algorithm,
        points[0].settings if points else [],
        next((t.user_attrs["metric"] for t in counting if "metric" in t.user_attrs), None),
        points[0].values[0] if points else None,
        len(counting),
        failures,
        points=tuple(points),
        pruned=sum(trial.state is TrialState.PRUNED for trial in counting),
        seconds=math.fsum(trial.user_attrs.get("seconds", 0.0) for trial in counting),
        study=study.study_name,
        importances={
            objective.name: importances(study, place if several else None)
            for place, objective in enumerate(options.objectives)
        },
    )
