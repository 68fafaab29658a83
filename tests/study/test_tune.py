"""Tuning: equal budgets in turn, a search that goes on where it stopped, and a test set that nobody reads."""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from locallearn.cli.settings import UsageError
from locallearn.records import load_record
from locallearn.strategies import Diverged
from locallearn.study._workers import Worker
from locallearn.study.train import Interrupted, Plan
from locallearn.study.tune import Best, Options, Range, study_name, tune
from locallearn.tasks.classification import Classification
from tests.study.conftest import MakePlan
from tests.study.tuning import RATE, Answer, FakeRecord, FakeRuns, asked_for, ended, search, worker


def _tune(
    runs: FakeRuns, storage: Path, trials: int, algorithms: Sequence[str] = ("a", "b"), **other: Any
) -> list[Best]:
    return search(runs, storage / "tune.sqlite", trials, algorithms, **other)


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_trials_alternate_and_are_equally_many(runs: FakeRuns, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    found = _tune(runs, tmp_path, 3, show=lambda name, number, of, metrics: told.append((name, number, of)))
    assert runs.order == ["a", "b"] * 3
    assert [best.trials for best in found] == [3, 3]
    assert told == [(f"tune {name}", number, 3) for number in (1, 2, 3) for name in ("a", "b")]
    assert not any(plan.evaluate_test for plan in runs.asked)


def test_the_best_trial_is_the_one_with_the_highest_accuracy(runs: FakeRuns, tmp_path: Path) -> None:
    """The optimum of ``a`` is 1e-2, that of ``b`` 1e-3."""
    optimum = {"a": -2.0, "b": -3.0}
    runs.answer = lambda name, settings: 1 - (math.log10(settings["optimizer.lr"]) - optimum[name]) ** 2 / 10
    for best in _tune(runs, tmp_path, 5):
        rates = {plan.settings["optimizer.lr"] for plan in runs.asked if plan.algorithm == best.algorithm}
        [(key, rate)] = [(k, float(v)) for k, _, v in (s.partition("=") for s in best.settings)]
        assert key == "optimizer.lr"
        assert rate == min(rates, key=lambda lr: abs(math.log10(lr) - optimum[best.algorithm]))  # to the last digit
        assert best.value == pytest.approx(runs.answer(best.algorithm, {"optimizer.lr": rate}))


def test_suggestions_stay_in_the_space_and_spread_on_its_scale(runs: FakeRuns, tmp_path: Path) -> None:
    space = {"optimizer.lr": Range(1e-4, 1e-1, log=True), "algorithm.threshold": Range(-2, 5)}
    runs.answer = lambda name, settings: settings["algorithm.threshold"] / 10
    _tune(runs, tmp_path, 20, ["a"], space=space)
    rates, thresholds = runs.values(), runs.values("algorithm.threshold")
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert all(-2 <= threshold <= 5 for threshold in thresholds)
    # Two of three decades lie below 1e-2; on a linear scale a tenth of the draws would.
    assert sum(rate < 1e-2 for rate in rates[:10]) >= 4
    # The other is linear, and TPE climbs: later values are larger than the first, random ones.
    assert min(thresholds[:10]) < 0.5
    assert sum(thresholds[10:]) / 10 > sum(thresholds[:10]) / 10 + 1


def test_the_first_draws_are_the_same_for_all_and_follow_the_seed(runs: FakeRuns, tmp_path: Path) -> None:
    _tune(runs, tmp_path / "one", 2)
    rates = runs.values()
    assert rates[0::2] == rates[1::2]
    assert rates[0] != rates[2]
    _tune(runs, tmp_path / "same", 2)
    _tune(runs, tmp_path / "other", 2, sampler_seed=1)
    assert runs.values()[4:8] == rates
    assert not set(runs.values()[8:]) & set(rates)


# -- interruptions ----------------------------------------------------------------------------------------------------


def _stop_at(runs: FakeRuns, number: int, answer: Answer) -> None:
    def stopping(algorithm: str, settings: dict[str, float]) -> float:
        if len(runs.asked) == number:
            raise KeyboardInterrupt
        return answer(algorithm, settings)

    runs.answer = stopping


def _hill(algorithm: str, settings: Mapping[str, float]) -> float:
    return 1 - (math.log10(settings["optimizer.lr"]) + 2) ** 2 / 10


def test_a_second_call_runs_only_what_is_missing(runs: FakeRuns, tmp_path: Path) -> None:
    _tune(runs, tmp_path, 2)
    found = _tune(runs, tmp_path, 3)
    assert runs.order == ["a", "b"] * 3
    assert [best.trials for best in found] == [3, 3]
    assert _tune(runs, tmp_path, 3) == found
    assert len(runs.asked) == 6
    _tune(runs, tmp_path, 3, ["a", "b", "c"])  # one who comes later gets as many as the others
    assert runs.order[6:] == ["c"] * 3


def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(runs: FakeRuns, tmp_path: Path) -> None:
    """Beyond the ten random draws, so that what TPE has learnt counts; the killed trial must not."""
    runs.answer = _hill
    whole = _tune(runs, tmp_path / "whole", 13, ["a"])
    rates = runs.values()
    runs.asked.clear()
    _stop_at(runs, 12, _hill)
    with pytest.raises(KeyboardInterrupt):
        _tune(runs, tmp_path / "parts", 13, ["a"])
    left = optuna.load_study(study_name="a-study", storage=f"sqlite:///{tmp_path / 'parts' / 'tune.sqlite'}")
    assert [trial.state.name for trial in left.trials] == ["COMPLETE"] * 11 + ["RUNNING"]
    runs.answer = _hill
    assert _tune(runs, tmp_path / "parts", 13, ["a"]) == whole
    assert runs.values() == [*rates[:12], *rates[11:]]  # the one that was cut off is tried again


def test_a_stop_after_a_trial_s_training_loses_no_trial(runs: FakeRuns, tmp_path: Path) -> None:
    """As in the last look at the idle machine: the trial has its value, and the search stops."""
    stop = Interrupted()
    stop.ended = 0.7  # type: ignore[assignment]  # what the fake record is read from

    def stopping(algorithm: str, settings: dict[str, float]) -> float:
        if len(runs.asked) == 2:
            raise stop
        return 0.5

    runs.answer = stopping
    with pytest.raises(Interrupted):
        _tune(runs, tmp_path, 3, ["a"])
    [best] = _tune(runs, tmp_path, 3, ["a"])
    assert (best.trials, best.value, len(runs.asked)) == (3, 0.7, 3)
    runs.asked.clear()
    with pytest.raises(Interrupted):  # seeds that have run are kept
        _tune(runs, tmp_path / "seeds", 1, ["a"], options=Options(seeds=[10, 20, 30]))
    [best] = _tune(runs, tmp_path / "seeds", 1, ["a"], options=Options(seeds=[10, 20, 30]))
    assert runs.values("seed") == [10, 20, 30]
    assert best.value == pytest.approx((0.5 + 0.7 + 0.5) / 3)


def test_a_smaller_budget_later_is_still_equal(runs: FakeRuns, tmp_path: Path) -> None:
    """``a`` has had a third trial, its best one, and ``b`` has not: with two trials each it does not count."""
    answers = {"a": [0.1, 0.2, 0.9], "b": [0.3, 0.4]}
    given = {name: iter(values) for name, values in answers.items()}
    _stop_at(runs, 6, lambda name, settings: next(given[name]))
    with pytest.raises(KeyboardInterrupt):
        _tune(runs, tmp_path, 3)
    found = _tune(runs, tmp_path, 2)
    assert [(best.value, best.trials) for best in found] == [(0.2, 2), (0.4, 2)]


def test_studies_with_other_settings_do_not_mix() -> None:
    names = {study_name("digits", "mlp", settings) for settings in ([], ["seed=1"], ["seed=2"], ["seed=1", "a=2"])}
    assert len(names) == 4
    assert study_name("digits", "mlp", ["a=2", "seed=1"]) in names


# -- failures ---------------------------------------------------------------------------------------------------------


def test_the_best_trial_of_an_error_is_the_smallest(
    runs: FakeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRecord, "maximise", False)
    answers = iter([0.3, 0.2, math.nan])
    runs.answer = lambda algorithm, settings: next(answers)
    [best] = _tune(runs, tmp_path, 3, algorithms=["a"])
    assert best.value == 0.2
    assert best.settings == [f"optimizer.lr={runs.values()[1]!r}"]


@pytest.mark.parametrize("how", ["diverged", "nan"])
def test_a_diverged_trial_counts_with_accuracy_0(how: str, runs: FakeRuns, tmp_path: Path) -> None:
    def answer(algorithm: str, settings: dict[str, float]) -> float:
        if algorithm == "a" and len(runs.asked) < 4:
            if how == "diverged":
                error = Diverged("unit 'layer1' diverged")
                error.run_folder = None  # type: ignore[attr-defined]
                raise error
            return math.nan
        return 0.3

    runs.answer = answer
    seen: list[float] = []
    found = _tune(runs, tmp_path, 3, show=lambda n, i, of, metrics: seen.append(metrics["validation/accuracy"]))
    assert seen == [0.0, 0.3, 0.0, 0.3, 0.3, 0.3]
    assert [(best.value, best.trials) for best in found] == [(0.3, 3), (0.3, 3)]
    assert found[0].settings == [f"optimizer.lr={runs.asked[4].settings['optimizer.lr']!r}"]


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (1.0, 1.0, False),
        (2.0, 1.0, False),
        (0.0, 1.0, True),
        (-1.0, 1.0, True),
        (0.0, math.inf, False),
        (math.nan, 1.0, False),
    ],
)
def test_a_range_that_cannot_be_searched_is_refused(low: float, high: float, log: bool) -> None:
    with pytest.raises(ValueError, match=f"from {low} to {high}.*low < high"):
        Range(low, high, log)


def test_nothing_to_search_is_refused(runs: FakeRuns, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tune\.trials is 0"):
        _tune(runs, tmp_path, 0)
    with pytest.raises(ValueError, match=r"0 ranges in tune\.space"):
        _tune(runs, tmp_path, 1, space={})
    assert list(tmp_path.iterdir()) == []


def test_a_failing_trial_counts_and_the_search_goes_on(runs: FakeRuns, tmp_path: Path) -> None:
    """Whatever it raises, when it is made or when it is run, but for the user's own stop and a full disk."""
    said: list[str] = []

    def answer(algorithm: str, settings: dict[str, float]) -> float:
        if len(runs.asked) == 2:
            raise torch.OutOfMemoryError("tried to allocate 40 GiB\nfree: none")
        return 0.1 * len(runs.asked)

    def make(algorithm: str, settings: Sequence[str]) -> Any:
        made.append(list(settings))
        if len(made) == 1:
            raise UsageError("net.hidden is odd")
        return original(algorithm, settings)

    made: list[list[str]] = []
    original, runs.make = runs.make, make  # type: ignore[method-assign]
    runs.answer = answer
    [best] = _tune(runs, tmp_path, 4, ["a"], say=said.append)
    assert len(made) == 4
    study = optuna.load_study(study_name="a-study", storage=f"sqlite:///{tmp_path / 'tune.sqlite'}")
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    assert best == Best("a", made[3], "accuracy", pytest.approx(0.3), 4, best.failures)
    sentences = ["UsageError: net.hidden is odd", "OutOfMemoryError: tried to allocate 40 GiB"]
    assert list(best.failures) == [f"trial {n}: {text}" for n, text in zip((0, 2), sentences, strict=True)]
    assert said == [
        f"trial {n} of a failed, the search goes on: {text}" for n, text in zip((0, 2), sentences, strict=True)
    ]
    assert len({line for (line,) in made}) == 4
    assert _tune(runs, tmp_path, 4, ["a"]) == [best]
    assert len(made) == 4


@pytest.mark.parametrize("how", ["diverged", "nan", "failed"])
def test_where_nothing_came_to_an_end_nothing_is_recommended(how: str, runs: FakeRuns, tmp_path: Path) -> None:
    def answer(algorithm: str, settings: dict[str, float]) -> float:
        if algorithm == "b":
            return 0.5
        if how == "nan":
            return math.nan
        error = Diverged("unit 'layer1' diverged") if how == "diverged" else MemoryError()
        error.run_folder = None  # type: ignore[union-attr]
        raise error

    runs.answer = answer
    bad, good = _tune(runs, tmp_path, 2)
    said = {
        "diverged": "unit 'layer1' diverged",
        "nan": "validation accuracy is nan",
        "failed": "MemoryError: no message",
    }
    metric = None if how == "failed" else "accuracy"
    assert bad == Best("a", [], metric, None, 2, tuple(f"trial {n}: {said[how]}" for n in (0, 1)))
    assert (good.value, good.failures) == (0.5, ())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_ones_settings_fault(number: int, runs: FakeRuns, tmp_path: Path) -> None:
    def full(algorithm: str, settings: dict[str, float]) -> float:
        raise OSError(number, "No space left on device")

    runs.answer = full
    with pytest.raises(OSError, match="No space"):
        _tune(runs, tmp_path, 1, ["a"])
    runs.answer = lambda algorithm, settings: 0.5
    [best] = _tune(runs, tmp_path, 1, ["a"])
    assert (best.value, best.failures) == (0.5, ())
    assert runs.values()[0] == runs.values()[1]


# -- several processes ------------------------------------------------------------------------------------------------

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def _worker(runs: FakeRuns, folder: Path, trials: int, answer: Answer) -> int:
    (folder / "search").mkdir(exist_ok=True)
    return worker(runs, folder, folder / "search" / "tune.sqlite", trials, answer)


@forks
def test_processes_share_a_budget_and_draw_differently(runs: FakeRuns, tmp_path: Path) -> None:
    """Three of them make the tables, and 2 x 3 trials, none twice."""

    def answer(algorithm: str, settings: dict[str, float]) -> float:
        time.sleep(0.05)
        return settings["optimizer.lr"]

    workers = [_worker(runs, tmp_path, 3, answer) for _ in range(3)]
    assert [ended(worker) for worker in workers] == [0, 0, 0]
    asked = asked_for(tmp_path)
    assert len(asked) == 6
    for algorithm in ("a", "b"):
        assert len({line for line in asked if line.startswith(algorithm)}) == 3
    assert [path.name for path in (tmp_path / "search").iterdir()] == ["tune.sqlite"]
    assert [best.trials for best in _tune(runs, tmp_path / "search", 3)] == [3, 3]
    assert runs.asked == []


@pytest.mark.parametrize("leaves", [False, True], ids=["stays", "leaves"])
def test_a_trial_that_ends_while_trials_are_counted_counts(
    runs: FakeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """Another process tells of its trial between two looks, and is gone then, or not."""
    get_trials, pending = optuna.Study.get_trials, []
    with ExitStack() as stack:
        other = stack.enter_context(Worker(tmp_path / "tune.sqlite"))
        for name in ("a-study", "b-study"):
            study = optuna.create_study(
                storage=f"sqlite:///{tmp_path / 'tune.sqlite'}", study_name=name, direction="maximize"
            )
            trial = study.ask()
            for key, value in (("worker", other.name), ("metric", "accuracy"), ("reached", 0.5)):
                trial.set_user_attr(key, value)
            trial.suggest_float("optimizer.lr", 1e-4, 1e-1, log=True)
            pending.append((study, trial))

        def looked(study: optuna.Study, *args: Any, **kwargs: Any) -> Any:
            found = get_trials(study, *args, **kwargs)
            for mine, trial in pending:
                if mine.study_name == study.study_name and trial is not None:
                    pending[pending.index((mine, trial))] = (mine, None)
                    mine.tell(trial, 0.5)
                    if leaves and not any(trial for _, trial in pending):
                        stack.close()
                    break
            return found

        monkeypatch.setattr(optuna.Study, "get_trials", looked)
        assert [best.trials for best in _tune(runs, tmp_path, 1)] == [1, 1]
    assert runs.asked == []


@forks
def test_a_killed_trial_is_neither_lost_nor_counted_twice(runs: FakeRuns, tmp_path: Path) -> None:
    """The second process waits for the trial that the first one was killed in, and runs it with the same settings."""

    def killed(algorithm: str, settings: dict[str, float]) -> float:
        if (tmp_path / "killed").exists():
            return 0.5
        (tmp_path / "killed").touch()
        time.sleep(600)
        return 0.0

    first = _worker(runs, tmp_path, 2, killed)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    second = _worker(runs, tmp_path, 2, killed)
    while len(asked_for(tmp_path)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(first, signal.SIGKILL)
    assert [ended(first), ended(second)] == [-signal.SIGKILL, 0]
    asked = asked_for(tmp_path)
    assert (len(asked), len(set(asked))) == (5, 4)
    study = optuna.load_study(study_name="a-study", storage=f"sqlite:///{tmp_path / 'search' / 'tune.sqlite'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    assert [path.name for path in (tmp_path / "search").iterdir()] == ["tune.sqlite"]


@forks
def test_a_trial_that_kills_its_process_is_given_up_in_the_end(runs: FakeRuns, tmp_path: Path) -> None:
    """As the system does when the machine's memory is out; it must not be the end of every search to come."""

    def fatal(algorithm: str, settings: dict[str, float]) -> float:
        if algorithm == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.5

    assert [ended(_worker(runs, tmp_path, 1, fatal)) for _ in range(4)] == [-signal.SIGKILL] * 3 + [0]
    good, bad = _tune(runs, tmp_path / "search", 1)
    assert (good.value, bad.value) == (0.5, None)
    assert bad.failures == ("trial 0: its process died 3 times",)
    assert [path.name for path in (tmp_path / "search").iterdir()] == ["tune.sqlite"]  # nor are the dead remembered


def test_a_users_stop_is_no_attempt(runs: FakeRuns, tmp_path: Path) -> None:
    def stop(algorithm: str, settings: dict[str, float]) -> float:
        raise KeyboardInterrupt

    runs.answer = stop
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            _tune(runs, tmp_path, 1, ["a"])
    runs.answer = lambda algorithm, settings: 0.5
    assert _tune(runs, tmp_path, 1, ["a"])[0].value == 0.5
    assert len(set(runs.values())) == 1


@pytest.mark.parametrize("name", ["a?b#c%20", "with spaces {x} ü", "mode=memory&cache=shared", ":memory:"])
def test_a_path_is_a_path(runs: FakeRuns, tmp_path: Path, name: str) -> None:
    _tune(runs, tmp_path / name, 1)
    assert [path.name for path in (tmp_path / name).iterdir()] == ["tune.sqlite"]
    assert list(tmp_path.iterdir()) == [tmp_path / name]
    assert len(runs.asked) == 2
    _tune(runs, tmp_path / name, 1)
    assert len(runs.asked) == 2


# -- with real runs ---------------------------------------------------------------------------------------------------


def test_trials_judge_validation_data_and_never_read_the_test_set(
    make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: Any) -> None:
        raise AssertionError("the test set was read")

    monkeypatch.setattr(Classification, "test_step", forbidden)
    plans: list[Plan] = []

    def make(algorithm: str, settings: Sequence[str]) -> Plan:
        [rate] = [float(value) for _, _, value in (setting.partition("=") for setting in settings)]
        if len(plans) == 1:
            rate = 1e30  # overflows in the first epoch
        plans.append(make_plan(algorithm, optimizer=partial(torch.optim.SGD, lr=rate), max_epochs=1))
        monkeypatch.setattr(plans[-1].data, "test_dataloader", forbidden)
        return plans[-1]

    storage = tmp_path / "tune.sqlite"
    [best] = tune(["backprop"], make, RATE, 3, storage, "study")
    records = sorted(
        (load_record(path) for path in (tmp_path / "runs").iterdir()), key=lambda r: str(r.data["started"])
    )
    assert [record.status for record in records] == ["done", "failed", "done"]
    done = {record.id: record.data["validation"]["accuracy"] for record in records if record.status == "done"}
    assert all(record.data["test"] == {} for record in records if record.status == "done")
    assert best.value == max(done.values())
    assert best.trials == 3
    study = optuna.load_study(study_name="backprop-study", storage=f"sqlite:///{storage}")
    assert [trial.values for trial in study.trials] == [
        [done[record.id]] if record.status == "done" else [0.0] for record in records
    ]
    assert [trial.user_attrs["record"] for trial in study.trials] == [record.id for record in records]
