"""``locallearn tune``: what it asks of the settings, and what it leaves: commands to paste, experiments, a history."""

from __future__ import annotations

import json
import multiprocessing
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from locallearn.cli import main
from locallearn.cli.arms import arms_of
from locallearn.cli.settings import compose_settings
from locallearn.cli.tune import _helpers
from locallearn.records import load_record

SMALL = ("meter=none", "net.hidden=[8,8]", "trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.probe_samples=0")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder and a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["locallearn"])
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def _history(runs: Path) -> dict[str, Any]:
    [file] = (runs / "tune").glob("*/tune.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _compared(words: list[str]) -> dict[str, Any]:
    """The settings with which ``compare`` runs every algorithm, by its text."""
    base, _, arms, shared = arms_of("compare", words)
    overrides = base.compare.overrides or {}
    return {
        arm.text: compose_settings([*shared, *arm.overrides, "seed=0", *overrides.get(arm.text, [])])[0] for arm in arms
    }


def _same(cfg: Any, config: Mapping[str, Any]) -> bool:
    """Whether settings are those of a record, whatever the seed."""
    groups = ("algorithm", "dataset", "net", "optimizer", "schedule", "scheduler", "task", "trainer")

    def plain(value: Any) -> Any:
        return {k: v for k, v in value.items() if k != "seed"} if hasattr(value, "items") else value

    return all(plain(cfg[group]) == plain(config[group]) for group in groups)


def test_what_is_printed_can_be_pasted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each algorithm with its own best settings, whatever the other one has."""
    space = "tune.space={optimizer.lr:{low:1e-3,high:1e-2,log:true},optimizer.weight_decay:{low:0,high:1e-4}}"
    algorithms = 'tune.algorithms=["mono_forward(optimizer=sgd,keep=0.5)",backprop]'
    assert main(["tune", *SMALL, "tune.trials=2", space, algorithms, "scheduler_interval=step"]) == 0
    out = capsys.readouterr().out
    found = [load_record(path.parent) for path in (here / "runs" / "tune").glob("*/record.json")]
    found.sort(key=lambda record: int(record.data["serial"]))
    assert [record.algorithm for record in found] == ["mono_forward", "backprop"] * 2
    assert all(record.data["test"] == {} for record in found)
    assert {record.seed for record in found} == {1000}
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["tune", "tune.sqlite"]
    history = _history(here / "runs")
    best = {}
    for study in history["studies"]:
        [number] = study["best"]
        trial = study["trials"][number]
        [best[study["algorithm"]]] = [record for record in found if [record.id] == trial["records"]]
        assert f"{trial['values'][0]:.4f}" in out
        assert trial["values"] == [best[study["algorithm"]].data["validation"]["accuracy"]]
    *_, first, second, last = out.splitlines()
    for line, record in zip((first, second), best.values(), strict=True):
        program, command, *words = shlex.split(line)
        assert (program, command) == ("locallearn", "train")
        cfg, choices = compose_settings(words)
        assert choices["algorithm"] == record.algorithm
        assert _same(cfg, record.data["config"])
    program, command, *words = shlex.split(last)
    assert (program, command) == ("locallearn", "compare")
    compared = _compared(words)
    assert compared.keys() == best.keys()
    for name, cfg in compared.items():
        assert _same(cfg, best[name].data["config"]), name
    assert main(["train", *words]) == 0
    run = load_record(Path(capsys.readouterr().out.splitlines()[-1]))
    assert run.data["config"]["optimizer"] == best["backprop"].data["config"]["optimizer"]
    assert main(["compare", *words, "compare.seeds=[0,1000]"]) == 2
    assert "seed 1000 is both tuned on" in capsys.readouterr().err


def test_whole_numbers_steps_and_choices(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the search draws is what the settings take, and what it prints can be pasted into a shell."""
    space = (
        "tune.space={dataset.batch_size:{low:16,high:64,step:16},optimizer.weight_decay:{low:0,high:1},"
        "net.hidden:{choices:[[8],[8,8]]},trainer.gradient_clip_val:{choices:[null,1]},optimizer:{choices:[adam,sgd]}}"
    )
    words = ["runs_dir=my runs?", "dataset.limit_train=100", *SMALL]
    assert main(["tune", *words, "tune.trials=4", space, "tune.algorithms=[backprop]"]) == 0
    out = capsys.readouterr().out
    records = [load_record(path.parent) for path in (here / "my runs?" / "tune").glob("*/record.json")]
    configs = [record.data["config"] for record in records]
    assert len(configs) == 4
    assert all(type(config["dataset"]["batch_size"]) is int for config in configs)
    assert {config["dataset"]["batch_size"] for config in configs} <= {16, 32, 48, 64}
    assert all(type(config["optimizer"]["weight_decay"]) is float for config in configs)
    assert all(config["net"]["hidden"] in ([8], [8, 8]) for config in configs)
    assert {config["trainer"]["gradient_clip_val"] for config in configs} <= {None, 1}
    program, command, *printed = shlex.split(out.splitlines()[-2])
    assert (program, command) == ("locallearn", "train")
    study = _history(here / "my runs?")["studies"][0]
    [best] = [r for r in records if [r.path.name] == study["trials"][study["best"][0]]["records"]]
    again, choices = compose_settings(printed)
    assert choices["algorithm"] == "backprop"
    assert _same(again, best.data["config"])
    assert again.runs_dir == "my runs?"
    assert _same(_compared(shlex.split(out.splitlines()[-1])[2:])["backprop"], best.data["config"])


def test_two_objectives_two_seeds_and_a_launcher(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two jobs of Hydra's launcher are one search; its Pareto set is printed and written."""
    words = ["tune.algorithms=[backprop]", "tune.trials=2", "tune.seeds=[7,8]", "dataset.limit_train=100", *SMALL]
    space = "tune.space={net.hidden:{choices:[[4],[64,64]]}}"
    assert main(["tune", "-m", "tune.worker=one,two", *words, space, "tune.objectives=[accuracy,flops]"]) == 0
    out = capsys.readouterr().out
    assert out.count("Pareto set with train_flops") == 1  # the jobs leave it to the process that launched them
    history = _history(here / "runs")
    [study] = history["studies"]
    assert [trial["worker"] for trial in study["trials"]] == ["one"] * 2
    for trial in study["trials"]:
        records = [load_record(here / "runs" / "tune" / name) for name in trial["records"]]
        assert [record.seed for record in records] == [7, 8]
        for place, name in enumerate(("validation/accuracy", "train_flops")):
            assert trial["values"][place] == pytest.approx(sum(float(r.figures()[name] or 0) for r in records) / 2)
    files = sorted(path.name for path in (here / "runs" / "tune" / history["search"]).glob("*.yaml"))
    others = [f"backprop-{number}.yaml" for number in study["best"][1:]]
    assert files == sorted(["backprop.yaml", *others])


def test_an_experiment_is_taken_from_a_file(here: Path) -> None:
    (here / "mono_forward_mnist.yaml").write_text(
        "# @package _global_\ndefaults:\n- override /algorithm: pepita\nalgorithm: {dropout: 0.5}\n"
        "net: {hidden: [3]}\ncompare: {algorithms: [pepita, ridge]}\n",
        encoding="utf-8",
    )
    words = [f"experiment={here}/mono_forward_mnist.yaml"]  # whose name is that of one of locallearn's
    cfg, choices = compose_settings(words)
    assert (choices["algorithm"], choices["dataset"], cfg.net.hidden, cfg.algorithm.dropout) == (
        "pepita",
        "digits",
        [3],
        0.5,
    )
    cfg, choices = compose_settings([*words, "algorithm=backprop"])
    assert (choices["algorithm"], cfg.net.hidden) == ("backprop", [3])
    assert "dropout" not in cfg.algorithm
    assert [arm.text for arm in arms_of("compare", words)[2]] == ["pepita", "ridge"]
    assert [arm.text for arm in arms_of("tune", words)[2]] == ["backprop", "pepita"]
    assert [arm.text for arm in arms_of("compare", [*words, "algorithm=mono_forward"])[2]] == [
        "backprop",
        "mono_forward",
    ]


@pytest.mark.slow
def test_workers_of_one_command_share_its_search(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune.algorithms=[backprop,mono_forward]", "tune.trials=4", "trainer.max_epochs=8", "tune.workers=2"]
    assert main(["tune", *SMALL, *words]) == 0
    assert capsys.readouterr().out.count("locallearn compare") == 1
    history = _history(here / "runs")
    assert [[trial["number"] for trial in study["trials"]] for study in history["studies"]] == [[0, 1, 2, 3]] * 2
    assert len(list((here / "runs" / "tune").glob("*/record.json"))) == 8


@pytest.mark.parametrize(
    ("command", "wanted"),
    [("tune", "the same command goes on where the search stopped"), ("compare", "with compare.resume=true goes on")],
)
def test_ctrl_c_between_two_runs_says_how_to_go_on(
    command: str, wanted: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"locallearn.study.{command}.{command}", stopped)
    assert main([command, *SMALL, f"{command}.algorithms=[backprop]", "dataset.limit_train=100"]) == 130
    assert wanted in capsys.readouterr().err


def test_helpers_do_not_hear_ctrl_c_while_they_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal sends it to them, too, and a traceback of their imports would be what the user sees of it."""
    heard: list[Any] = []

    class Process:
        pid = None

        def __init__(self, **_: Any) -> None:
            pass

        def start(self) -> None:
            heard.append(signal.getsignal(signal.SIGINT))

    monkeypatch.setattr(multiprocessing, "get_context", lambda _: SimpleNamespace(Process=Process))
    before = signal.getsignal(signal.SIGINT)
    with _helpers(["tune.workers=3"], 3):
        assert signal.getsignal(signal.SIGINT) == before
    assert heard == [signal.SIG_IGN] * 2


def test_nothing_is_recommended_where_all_diverged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = "tune.space={optimizer.lr:{low:1e29,high:1e30}}"
    words = ["dataset.limit_train=200", "tune.trials=2", space, "tune.algorithms=[backprop]"]
    assert main(["tune", *SMALL, "optimizer=sgd", *words]) == 1
    out, err = capsys.readouterr()
    assert "locallearn compare" not in out
    assert "locallearn train" not in out
    assert "all of the 2 trials of backprop failed or diverged" in err
    assert "nothing can be recommended" in err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (
            ["tune.space={dataset.batch_size:{low:16.5,high:64}}"],
            "tune.space.dataset.batch_size: whole numbers are drawn",
        ),
        (["tune.space={dataset.batch_size:{low:16,high:64,step:7}}"], "steps of 7 do not lead from 16 to 64"),
        (
            ["tune.space={dataset.batch_size:{low:16,high:64,type:float}}"],
            "dataset.batch_size is 16.0, expected a whole",
        ),
        (["tune.space={dataset.batch_size:{low:0,high:64}}"], "batch_size"),
        (["tune.space={optimizer.lr:{low:0.1,high:1,log:true,step:0.1}}"], "take out log, or step=0.1"),
        (["tune.space={optimizer.lr:{low:0.1,high:1,type:text}}"], "type is 'text', expected int or float"),
        (["tune.space={optimizer.lr:{low:0.1,high:1,log:1}}"], "log is 1, expected true or false"),
        (["tune.space={optimizer.lr:{low:true,high:1}}"], "low is True, expected a number"),
        (["tune.space={optimizer.lr:{low:0.1,high:1,choices:[1]}}"], "tune.space.optimizer.lr is {"),
        (["tune.space={optimizer.lr:{choices:[0.1,0.2,0.1]}}"], "the choices are 0.1, 0.2, 0.1; expected"),
        (["tune.space={optimizer.lr:{choices:[0.1]}}"], "expected at least two"),
        (["tune.space={optimizer.lr:{choices:[0.1,0.2,much]}}"], "optimizer.lr is 'much'"),
        (["tune.space={optimizer:{choices:[adam,none]}}"], "there is no optimizer 'none'"),
        (["tune.space={seed:{choices:[1,2,3]}}"], "tune.space.seed: seeds of trials are tune.seeds"),
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
        (["tune.sampler=best"], "tune.sampler is best, expected one of tpe, random, gp, nsgaii, or {_target_"),
        (["tune.pruner={_target_:optuna.samplers.TPESampler}"], "which makes no pruner of Optuna"),
        (["tune.pruner={_target_:optuna.pruners.PercentilePruner,percentile:900}"], "tune.pruner cannot be made: "),
        (["tune.pruner=median", "tune.objectives=[accuracy,flops]"], "tune.pruner=median goes with one objective"),
        (["tune.objectives=[accuracy,beauty]"], "tune.objectives names 'beauty'; there are accuracy, loss"),
        (["tune.objectives=[flops,accuracy]"], "the first of tune.objectives is flops"),
        (["tune.objectives=[accuracy,flops,train_flops]"], "of which two are the same figure"),
        (["tune.objectives=[accuracy,energy_j]"], "meter=none reads none"),
        (["tune.objectives=[accuracy,seconds]", "tune.workers=2"], "train_s would be that of all of them"),
        (["tune.seeds=[0]"], "seed 0 is both tuned on (tune.seeds [0]) and compared (compare.seeds [0, 1, 2])"),
        (["seed=2"], "seed 2 is both tuned on"),
        (["seed=7", "tune.seeds=[8]"], "seed= has no place beside it"),
        (["tune.seeds=[7,7]"], "expected different whole numbers"),
        (["tune.timeout=0"], "tune.timeout is 0, expected seconds above 0"),
        (["tune.workers=none"], "tune.workers is none"),
        (["tune.heartbeat=0"], "tune.heartbeat is 0"),
        (["tune.storage=3"], "tune.storage is 3"),
        (["tune.storage=no/such/t.sqlite"], "tune.storage is no/such/t.sqlite, but there is no folder no: make it"),
        (["tune.storage='journal:///no/such/t'"], "tune.storage is no/such/t, but there is no folder no: make it"),
        (["experiment=nowhere.yaml"], "experiment=nowhere.yaml cannot be read (No such file or directory)"),
        (["tune.space={net.dropout:{low:0,high:1,when:{optimizer:sgd}}}"], "nothing to search with these settings"),
        (["tune.space={net.dropout:{low:0,high:1,when:3}}"], "net.dropout.when is 3"),
        (
            ["tune.space={optimizer:{choices:[adam,sgd]},optimizer.momentum:{low:0,high:1,when:{optimizer:[sdg]}}}"],
            "optimizer.momentum is drawn when optimizer is sdg, which is none of its choices adam, sgd",
        ),
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
