"""Tuning: equal budgets in turn, a search that goes on where it stopped, and a test set that nobody reads."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from locallearn.cli import main
from locallearn.cli.settings import compose_settings
from locallearn.records import load_record
from locallearn.strategies import Diverged
from locallearn.study import tune as module
from locallearn.study.train import Plan
from locallearn.study.tune import Best, Range, study_name, tune
from locallearn.tasks.classification import Classification
from tests.study.conftest import MakePlan

RATE = {"optimizer.lr": Range(1e-4, 1e-1, log=True)}
Answer = Callable[[str, dict[str, float]], float]


@dataclass
class FakePlan:
    """What ``tune`` knows of a plan."""

    algorithm: str
    settings: dict[str, float]
    evaluate_test: bool = True


@dataclass
class FakeRuns:
    """Stands for training: answers every trial by a formula, and notes what was asked."""

    answer: Answer = lambda algorithm, settings: 0.5
    asked: list[FakePlan] = field(default_factory=list)

    def make(self, algorithm: str, settings: Sequence[str]) -> Any:
        return FakePlan(algorithm, {key: float(value) for key, _, value in (s.partition("=") for s in settings)})

    def run(self, plan: FakePlan) -> float:
        self.asked.append(plan)
        return self.answer(plan.algorithm, plan.settings)

    @property
    def order(self) -> list[str]:
        return [plan.algorithm for plan in self.asked]

    def values(self, key: str = "optimizer.lr") -> list[float]:
        return [plan.settings[key] for plan in self.asked]


class _FakeRecord:
    """``accuracy`` is what the fake run returned: a value of the metric, or the folder ``None`` of one that diverged."""

    maximise = True

    def __init__(self, accuracy: float | None) -> None:
        self.data = {"validation": {"accuracy": accuracy}, "metric": {"name": "accuracy", "maximise": self.maximise}}
        self.path = Path("a-run")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    fake = FakeRuns()
    monkeypatch.setattr(module, "run", fake.run)
    monkeypatch.setattr(module, "load_record", _FakeRecord)
    return fake


def _tune(
    runs: FakeRuns, storage: Path, trials: int, algorithms: Sequence[str] = ("a", "b"), **other: Any
) -> list[Best]:
    return tune(algorithms, runs.make, other.pop("space", RATE), trials, storage / "tune.sqlite", "study", **other)


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
    monkeypatch.setattr(_FakeRecord, "maximise", False)
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


# -- the command ------------------------------------------------------------------------------------------------------

SMALL = ("meter=none", "net.hidden=[8,8]", "trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.probe_samples=0")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder and a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["locallearn"])
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_the_command_prints_what_compare_accepts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = "tune.space={optimizer.lr:{low:1e-3,high:1e-2,log:true},optimizer.weight_decay:{low:0,high:1e-4}}"
    assert main(["tune", *SMALL, "tune.trials=2", space, "tune.algorithms=[mono_forward,backprop]"]) == 0
    out = capsys.readouterr().out
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (here / "runs" / "tune").glob("*/record.json")]
    found.sort(key=lambda record: str(record["started"]))
    assert [record["algorithm"] for record in found] == ["mono_forward", "backprop"] * 2
    assert all(record["test"] == {} for record in found)
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["tune", "tune.sqlite"]
    *_, command, overrides = shlex.split(out.splitlines()[-1].partition(": ")[2])
    assert command == "..."
    cfg, _ = compose_settings(["compare.algorithms=[mono_forward,backprop]", overrides])
    for name in ("mono_forward", "backprop"):
        best = max((r for r in found if r["algorithm"] == name), key=lambda r: float(r["validation"]["accuracy"]))
        assert f"{best['validation']['accuracy']:.4f}" in out
        own = best["config"]["optimizer"]
        words = list(cfg.compare.overrides[name])
        assert sorted(words) == [f"optimizer.lr={own['lr']!r}", f"optimizer.weight_decay={own['weight_decay']!r}"]
        tuned, _ = compose_settings(words)  # as compare does for every run
        assert (tuned.optimizer.lr, tuned.optimizer.weight_decay) == (own["lr"], own["weight_decay"])


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["tune.trials=0"], "tune.trials is 0"),
        (["tune.trials=abc"], "tune.trials is abc"),
        (["tune.space={optimizer.lr:{low:1e-2,high:1e-3}}"], "from 0.01 to 0.001"),
        (["tune.space={optimizer.lr:{low:1e-2}}"], "tune.space.optimizer.lr is {'low': 0.01}"),
        (["tune.space={optimizer.lr:{low:1e-3,high:abc}}"], "tune.space.optimizer.lr.high is 'abc', expected a number"),
        (["tune.space={optimizer.lr:3}"], "tune.space.optimizer.lr is 3"),
        (["tune.space=[1]"], "tune.space is [1]"),
        (["tune.space={optimizer.lrr:{low:1e-3,high:1e-2}}"], "'optimizer.lrr'; did you mean optimizer.lr?"),
        (["tune.algorithms=backprop"], "expected a list"),
        (["tune.algorithms=[nope]"], "'nope'"),
        (["resume=somewhere"], "resume goes with train"),
        (["runs_dir=null"], "runs_dir is None"),
        # Only the second algorithm refuses it: told before the first one has been trained.
        (["tune.algorithms=[mono_forward,backprop]", "schedule=sequential"], "Backprop trains all of its units"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    words: list[str], wanted: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *SMALL, *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert wanted in err
    assert err.count("\n") == 1
    assert list(here.iterdir()) == []
