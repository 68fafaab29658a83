"""How a search goes about it: seeds, pruners, samplers, time, several objectives, conditions, and the file that it leaves."""

from __future__ import annotations

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest

from locallearn.strategies import Diverged
from locallearn.study._objectives import Objective, front
from locallearn.study.space import Choices, Range
from locallearn.study.tune import PRUNERS, SAMPLERS, Best, History, Options, Pruned, _points
from tests.study.tuning import FakeRuns, search

ACCURACY = Objective("accuracy", maximise=True)


def _read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "tune.json").read_text(encoding="utf-8"))
    return found


def _search(runs: FakeRuns, folder: Path, trials: int, **options: Any) -> list[Best]:
    other = {key: options.pop(key) for key in ("algorithms", "space", "show") if key in options}
    given = Options(**{"objectives": [ACCURACY], "history": History(folder, {"search": "study"}), **options})
    return search(runs, folder / "tune.sqlite", trials, options=given, **other)


def _study(folder: Path, name: str = "a-study") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'tune.sqlite'}")


# -- seeds --------------------------------------------------------------------------------------------------------------


def test_a_trial_is_the_mean_over_its_seeds(runs: FakeRuns, tmp_path: Path) -> None:
    runs.answer = lambda algorithm, settings: settings["seed"] / 100
    best, _ = _search(runs, tmp_path, 2, seeds=[10, 20, 60])
    assert runs.values("seed") == [10, 20, 60] * 4
    rates = runs.values()
    assert [len(set(rates[place : place + 3])) for place in (0, 3, 6, 9)] == [1] * 4
    assert best.value == pytest.approx(0.3)
    [trial, _] = _read(tmp_path)["studies"][0]["trials"]
    assert trial["by_seed"] == {"10": [0.1], "20": [0.2], "60": [0.6]}
    assert trial["values"] == [pytest.approx(0.3)]
    assert len(trial["records"]) == 3


def test_a_seed_that_was_finished_is_not_run_again(runs: FakeRuns, tmp_path: Path) -> None:
    def answer(algorithm: str, settings: dict[str, float]) -> float:
        if len(runs.asked) == 2:
            raise KeyboardInterrupt
        return settings["seed"] / 100

    runs.answer = answer
    with pytest.raises(KeyboardInterrupt):
        _search(runs, tmp_path, 1, algorithms=["a"], seeds=[10, 20])
    [best] = _search(runs, tmp_path, 1, algorithms=["a"], seeds=[10, 20])
    assert runs.values("seed") == [10, 20, 20]
    assert best.value == pytest.approx(0.15)


# -- pruning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pruner", "validated"),
    [
        ("none", [4, 4, 4, 4, 4, 4, 4, 4]),
        ("median", [4, 4, 4, 4, 4, 1, 4, 1]),  # the first five are its measure; then who is below their median ends
        ("asha", [4, 4, 1, 1, 4, 1, 4, 1]),  # the first one says where rungs are; then whoever is best so far goes on
    ],
)
def test_a_pruner_ends_trials_by_their_validations(
    pruner: str, validated: list[int], runs: FakeRuns, tmp_path: Path
) -> None:
    """Trials get better and worse in turn; every value is the trial's own, and grows with the epochs."""
    levels = [0.5, 0.4, 0.3, 0.2, 0.6, 0.1, 0.9, 0.05]
    told: list[int] = []

    def answer(algorithm: str, settings: dict[str, float]) -> float:
        told.append(0)
        level = levels[len(told) - 1]
        for epoch in range(1, 5):
            told[-1] = epoch
            try:
                runs.asked[-1].validate(epoch, level + epoch / 100)
            except Pruned as stop:
                stop.run_folder = tmp_path  # type: ignore[attr-defined]  # as run() does
                raise
        return level + 0.04

    runs.answer = answer
    [best] = _search(runs, tmp_path, 8, algorithms=["a"], pruner=PRUNERS[pruner])
    assert told == validated
    assert best.value == pytest.approx(0.94)
    assert (best.trials, best.pruned, best.failures) == (8, sum(number < 4 for number in validated), ())
    states = ["COMPLETE" if number == 4 else "PRUNED" for number in validated]
    study = _study(tmp_path)
    assert [trial.state.name for trial in study.trials] == states
    for trial, level, number in zip(study.trials, levels, validated, strict=True):
        assert trial.intermediate_values == {e: pytest.approx(level + e / 100) for e in range(1, number + 1)}
    told_of = _read(tmp_path)["studies"][0]["trials"]
    assert [trial["state"] for trial in told_of] == states
    assert all(trial["counts"] for trial in told_of)
    assert all(bool(trial["records"]) for trial in told_of)  # of pruned ones, too
    assert told_of[5]["values"] == [pytest.approx(0.14 if pruner == "none" else 0.11)]
    assert told_of[6]["intermediate"] == {str(e): pytest.approx(0.9 + e / 100) for e in range(1, 5)}


def test_later_seeds_report_their_mean_with_the_earlier_ones(runs: FakeRuns, tmp_path: Path) -> None:
    def answer(algorithm: str, settings: dict[str, float]) -> float:
        for epoch in (2, 4):
            runs.asked[-1].validate(epoch, settings["seed"] / 100 + epoch / 1000)
        return settings["seed"] / 100

    runs.answer = answer
    _search(runs, tmp_path, 1, algorithms=["a"], seeds=[10, 30])
    steps = {2: 0.102, 4: 0.104, 6: 0.201, 8: 0.202}
    assert _study(tmp_path).trials[0].intermediate_values == {key: pytest.approx(value) for key, value in steps.items()}


# -- samplers, spaces ---------------------------------------------------------------------------------------------------


def test_a_sampler_is_the_one_that_was_named(runs: FakeRuns, tmp_path: Path) -> None:
    """A new one for every trial, with a seed that is that trial's; a seed of the user's stays, and draws the same again."""
    seeds: list[int] = []

    def make(seed: int) -> optuna.samplers.BaseSampler:
        seeds.append(seed)
        return optuna.samplers.RandomSampler(seed=seed)

    _search(runs, tmp_path / "made", 3, algorithms=["a"], sampler=make)
    assert len(set(seeds)) == 3
    alone = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seeds[1])).ask()
    assert runs.values()[1] == alone.suggest_float("x", 1e-4, 1e-1, log=True)
    runs.asked.clear()
    _search(runs, tmp_path / "own", 2, algorithms=["a"], sampler=partial(SAMPLERS["random"], seed=3))
    assert len(set(runs.values())) == 1


def test_a_setting_is_drawn_only_where_its_condition_holds(runs: FakeRuns, tmp_path: Path) -> None:
    space = {
        "momentum": Range(0.1, 0.9, when=(("optimizer", ("sgd", "muon")),)),
        "nesterov": Choices(("true", "false"), when=(("optimizer", ("sgd",)),)),
        "optimizer": Choices(("adam", "sgd", "muon")),
    }
    _search(runs, tmp_path, 12, algorithms=["a"], space=space)
    asked = [plan.settings for plan in runs.asked]
    assert {settings["optimizer"] for settings in asked} == {"adam", "sgd", "muon"}
    for settings in asked:
        assert ("momentum" in settings) == (settings["optimizer"] != "adam")
        assert ("nesterov" in settings) == (settings["optimizer"] == "sgd")
    told = _read(tmp_path)["studies"][0]
    assert told["space"]["momentum"] == {"low": 0.1, "high": 0.9, "when": {"optimizer": ["sgd", "muon"]}}
    assert [set(trial["params"]) for trial in told["trials"]] == [set(settings) for settings in asked]


def test_each_algorithm_has_its_space_and_a_search_stays_what_it_is(runs: FakeRuns, tmp_path: Path) -> None:
    space = {"a": {"x": Range(0, 1)}, "b": {"y": Range(2, 3), "x": Range(0, 1)}}
    _search(runs, tmp_path, 1, space=space)
    assert [set(plan.settings) for plan in runs.asked] == [{"x"}, {"x", "y"}]
    for other in ({"space": {"x": Range(0, 2)}}, {"space": space, "seeds": [3]}):
        with pytest.raises(ValueError, match="was begun with"):
            _search(runs, tmp_path, 2, **other)  # type: ignore[arg-type]
    assert len(runs.asked) == 2


# -- time ---------------------------------------------------------------------------------------------------------------


def test_when_time_is_up_all_have_had_equally_many(
    runs: FakeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock runs out in the second trial of ``a``; ``b`` and ``c`` get their second one, too."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def answer(algorithm: str, settings: dict[str, float]) -> float:
        clock[0] += 10.0
        return 0.5

    runs.answer = answer
    found = _search(runs, tmp_path, 9, algorithms=["a", "b", "c"], timeout_s=35.0)
    assert runs.order == ["a", "b", "c"] * 2
    assert [best.trials for best in found] == [2, 2, 2]
    told = _read(tmp_path)
    assert not told["finished"]
    assert [trial["seconds"] for trial in told["studies"][0]["trials"]] == [10.0, 10.0]
    assert _search(runs, tmp_path, 3, algorithms=["a", "b", "c"])[0].trials == 3  # and it goes on when asked to
    assert _read(tmp_path)["finished"]


def test_what_others_add_when_time_is_up_counts_nowhere(
    runs: FakeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table, best trial and file are of the same trials, though another process goes on with the search."""
    monkeypatch.setattr(time, "monotonic", lambda: 10.0)

    def answer(algorithm: str, settings: dict[str, float]) -> float:
        if algorithm == "b":
            other = _study(tmp_path)
            trial = other.ask()
            trial.suggest_float("optimizer.lr", 1e-4, 1e-1, log=True)
            trial.set_user_attr("reached", 0.9)
            other.tell(trial, 0.9)
        return 0.5

    runs.answer = answer
    found = _search(runs, tmp_path, 9, deadline=5.0)
    assert [(best.trials, best.value) for best in found] == [(1, 0.5)] * 2
    told = _read(tmp_path)["studies"][0]
    assert ([trial["counts"] for trial in told["trials"]], told["best"]) == ([True, False], [0])


# -- several objectives -------------------------------------------------------------------------------------------------

COSTS = [ACCURACY, Objective("train_flops", maximise=False)]


def test_two_objectives_have_a_pareto_set(runs: FakeRuns, tmp_path: Path) -> None:
    answers = [(0.5, 5.0), (0.6, 6.0), (0.5, 6.0), (0.4, 1.0), (0.3, 1.0)]

    def answer(algorithm: str, settings: dict[str, float]) -> Any:
        place = len(runs.asked) - 1
        runs.asked[-1].validate(1, 0.1)
        if place == 5:
            error = Diverged("unit 'layer1' diverged")
            error.run_folder = None  # type: ignore[attr-defined]
            raise error
        return {"validation/accuracy": answers[place][0], "train_flops": answers[place][1] if place != 6 else None}

    runs.answer = answer
    answers += [(0.0, 0.0), (0.9, 0.0)]
    [best] = _search(runs, tmp_path, 7, algorithms=["a"], objectives=COSTS)
    assert [(point.number, point.values) for point in best.points] == [
        (1, (0.6, 6.0)),
        (0, (0.5, 5.0)),
        (3, (0.4, 1.0)),
    ]
    assert (best.settings, best.value) == (best.points[0].settings, 0.6)
    assert len(best.failures) == 2
    assert "the run has no train_flops" in best.failures[1]
    told = _read(tmp_path)
    assert told["objectives"] == [
        {"name": "accuracy", "of": "validation", "direction": "maximize"},
        {"name": "train_flops", "of": "cost", "direction": "minimize"},
    ]
    study = told["studies"][0]
    assert study["best"] == [1, 0, 3]
    assert study["trials"][0]["intermediate"] == {"1": 0.1}
    assert [trial["values"] for trial in study["trials"]] == [[a, c] for a, c in answers[:5]] + [None, None]
    assert [trial.state.name for trial in _study(tmp_path).trials] == ["COMPLETE"] * 5 + ["FAIL"] * 2


def test_settings_that_were_drawn_twice_stand_once_in_a_pareto_set() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    for width, values in ((4, [0.5, 10.0]), (8, [0.9, 20.0]), (4, [0.5, 10.0])):
        known = {"values": values, "reached": values[0]}
        drawn = {"width": optuna.distributions.IntDistribution(4, 8)}
        study.add_trial(
            optuna.trial.create_trial(params={"width": width}, distributions=drawn, values=values, user_attrs=known)
        )
    options = Options(objectives=(Objective("accuracy", True), Objective("train_flops", False)))
    assert [point.number for point in _points(study, study.trials, options)] == [1, 0]


def test_several_objectives_are_not_pruned_by(runs: FakeRuns, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 objectives cannot be pruned by"):
        _search(runs, tmp_path, 1, objectives=COSTS, pruner=PRUNERS["median"])
    assert runs.asked == []


def test_a_front_is_what_nobody_beats() -> None:
    values = [(1.0, 1.0), (2.0, 2.0), (1.0, 2.0), (2.0, 2.0), (0.0, 0.5)]
    assert front(values, COSTS) == [0, 1, 3, 4]
    assert front([(2.0,), (1.0,)], [Objective("loss", maximise=False)]) == [1]


# -- the file -----------------------------------------------------------------------------------------------------------


def test_the_file_tells_the_search_as_it_stands(runs: FakeRuns, tmp_path: Path) -> None:
    """After every trial, and while one runs; a diverged one counts, with no infinity in the file."""
    seen: list[dict[str, Any]] = []
    loss = Objective("accuracy", maximise=False)

    def answer(algorithm: str, settings: dict[str, float]) -> float:
        if len(runs.asked) > 1:
            seen.append(_read(tmp_path))
        if len(runs.asked) == 3:
            return math.nan
        return settings["optimizer.lr"]

    runs.answer = answer
    _search(runs, tmp_path, 2, objectives=[loss], by="somebody")
    last = _read(tmp_path)
    assert [[len(study["trials"]) for study in told["studies"]] for told in [*seen, last]] == [
        [1, 0],
        [1, 1],
        [2, 1],
        [2, 2],
    ]
    assert (last["schema"], last["search"], last["finished"], seen[-1]["finished"]) == (1, "study", True, False)
    first, second = last["studies"]
    assert first["study"] == "a-study"
    assert (first["algorithm"], first["directions"]) == ("a", ["minimize"])
    assert first["experiment"] == "a.yaml"
    assert first["space"] == {"optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True}}
    good, bad = first["trials"]
    assert first["best"] == [0]
    assert good["params"] == {"optimizer.lr": runs.values()[0]}
    assert good["values"] == [runs.values()[0]]
    assert (bad["values"], bad["error"], bad["state"]) == ([None], "validation accuracy is nan", "COMPLETE")
    assert [trial["worker"] for trial in second["trials"]] == ["somebody"] * 2
    assert good["started"] <= good["ended"] <= bad["started"]
    assert good["started"].endswith("+00:00")
    assert first["importances"] is None
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".sqlite"] == ["tune.json"]


def test_importances_say_what_mattered(runs: FakeRuns, tmp_path: Path) -> None:
    runs.answer = lambda algorithm, settings: 1 - abs(settings["x"])
    [best] = _search(runs, tmp_path, 24, algorithms=["a"], space={"x": Range(-1, 1), "y": Range(0, 1)})
    shares = _read(tmp_path)["studies"][0]["importances"]["accuracy"]
    assert shares == best.importances["accuracy"]
    assert list(shares) == ["x", "y"]
    assert shares["x"] > 0.6
    assert sum(shares.values()) == pytest.approx(1)
