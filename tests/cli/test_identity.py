"""What makes a run, a search or a name another one, and what does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from locallearn.cli import tuned
from locallearn.cli.arms import signature, what_runs
from locallearn.cli.compare import _changed
from locallearn.cli.searching import fixed_words
from locallearn.cli.settings import compose_settings, located
from locallearn.cli.tune import _said_here
from locallearn.records import Record, load_record
from locallearn.records import _settings as kinds
from locallearn.statistics._identity import apart, differing, settings
from locallearn.study._history import experiment_name
from locallearn.study.tune import Best, Point
from tests.cli.conftest import Cli

LISTS = (kinds.OF_THE_RUN, kinds.OF_MEASURING, kinds.OF_PLACES, kinds.OF_COMMANDS)
QUICK = ("dataset.limit_train=64", "trainer.probe_samples=0", "net.hidden=[8]")


def _plain(*words: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    config: Any = OmegaConf.to_container(compose_settings(words)[0], resolve=True)
    return dict(config)


def _stands_for(config: dict[str, Any], algorithm: str, weights: str | None) -> str:
    return signature(*what_runs(config, algorithm, weights))


def test_every_setting_is_of_exactly_one_kind() -> None:
    assert sorted(key for kind in LISTS for key in kind) == sorted(_plain())


def test_a_run_stands_for_another_unless_what_makes_it_differs() -> None:
    base = {**_plain(), "mine": 1}  # what nobody has thought of makes a run another one
    one = _stands_for(base, "backprop", None)
    for key in base.keys() - {"compare"}:
        another = key in (*kinds.OF_THE_RUN, *kinds.OF_MEASURING, "mine") and key != "init_from"
        assert (_stands_for({**base, key: "other"}, "backprop", None) != one) == another, key
    elsewhere = {**base, "init_from": "a name", "dataset": {**base["dataset"], "data_dir": "/elsewhere"}}
    assert _stands_for(elsewhere, "backprop", None) == one
    assert _stands_for(base, "backprop", "weights") != one
    assert _stands_for({**base, "compare": {**base["compare"], "table": "x.md"}}, "backprop", None) == one
    assert _stands_for({**base, "compare": {**base["compare"], "mode": "matched"}}, "backprop", None) != one


def test_what_keeps_earlier_runs_from_being_taken_over_is_named() -> None:
    """The newest finished run counts, held against the run that is nearest to it; whatever makes runs others is told."""

    def earlier(number: int, *words: str, algorithm: str = "backprop", status: str = "done") -> Record:
        data = {"id": str(number), "algorithm": algorithm, "status": status, "serial": number}
        return Record(Path("runs") / str(number), {**data, "config": _plain(f"algorithm={algorithm}", *words)})

    def wanted(*words: str, algorithm: str = "backprop") -> tuple[str, dict[str, Any]]:
        return what_runs(_plain(f"algorithm={algorithm}", *words), algorithm, None)

    runs = [wanted("seed=1"), wanted("seed=2"), wanted("seed=2", algorithm="mono_forward")]
    before = [
        earlier(3, "seed=2", "optimizer.lr=0.1", "trainer.checkpoint_s=5"),
        earlier(1, "seed=2", "net.hidden=[8]"),
        earlier(4, "seed=2", "optimizer.lr=0.2", status="interrupted"),
        earlier(5, "seed=2", "optimizer.lr=0.2", algorithm="pepita"),
        earlier(6, "seed=2", "optimizer.lr=0.2", "dataset=mnist"),
    ]
    assert _changed(before, runs) == ["optimizer.lr", "trainer.checkpoint_s"]
    assert _changed(before[1:], runs) == ["net.hidden"]
    assert _changed(before[2:], runs) == []
    for words, told in (
        (["seed=3"], ["seed"]),
        (["seed=1", "net=cnn"], ["net"]),
        (["seed=1", "optimizer=sgd", "meter.idle_s=7"], ["optimizer", "meter.idle_s"]),
        (["seed=1", "compare.mode=target", "compare.target=0.9"], ["compare.mode", "compare.target"]),
        (["seed=1", "init_from=runs/a"], ["init_from"]),
        (["seed=1", "scheduler={_target_:a.B}"], ["scheduler"]),
        (["seed=1", "+trainer.max_steps=3"], ["trainer.max_steps"]),
        (["seed=1", "dataset.limit_train=9", "runs_dir=elsewhere"], ["dataset.limit_train"]),
    ):
        assert _changed([earlier(1, *words)], runs) == told, words


def test_the_name_of_a_search_is_made_of_what_makes_it() -> None:
    fixed = ["net.hidden=[8]", "+mine=3", "tune.space={a:{low:1,high:2}}", "tune.sampler=random", "compare.mode=target"]
    aside = ("compare.table=x.md", "compare.workers=2", "compare.resume=true", "logger=none", "++logger.x=1", "seed=3")
    aside += (
        "keep_model=false",
        "meter.cooldown_s=2",
        "meters.seconds=1",
        "report.title=x",
        "tune.trials=5",
        "runs_dir=r",
    )
    aside += ("init_from=runs/a",)  # its weights count, not what they are called
    assert fixed_words([*fixed, *aside], [1000], None) == [*fixed, "seeds=[1000]"]
    assert fixed_words(["meter=cpu"], [1], ["energy_j"], joules=True)[0] == "meter=cpu"
    assert fixed_words(aside, [1], None, weights="abc") == ["seeds=[1]", "init_from=abc"]
    here = ["data_dir=d", "meter=none", "logger.save_dir=x", "trainer.accelerator=cpu", "hydra.searchpath=[file://c]"]
    assert [word for word in [*fixed, *here] if _said_here(word)] == here


def test_an_experiment_of_a_search_has_all_that_makes_its_runs() -> None:
    """A search that begins with weights recommends beginning with them."""
    cfg = compose_settings(["init_from=runs/a", "+mine=3", "trainer.accelerator=cpu", "net.hidden=[8]"])[0]
    found = tuned._plain(cfg)
    assert found.keys() == {*kinds.OF_THE_RUN, "mine"} - {"seed"}
    assert (found["init_from"], found["mine"], found["net"]["hidden"]) == ("runs/a", 3, [8])
    assert not {"accelerator", "devices"} & found["trainer"].keys()


def test_an_experiment_tells_of_the_trials_that_count() -> None:
    trial = {"started": "2", "ended": "3", "counts": True, "worker": "me"}
    beyond = {"started": "1", "ended": "4", "counts": False, "worker": "another"}
    told: dict[str, Any] = dict.fromkeys(("dataset", "net", "storage", "sampler", "pruner", "command"), "x")
    told |= {"studies": [{"algorithm": "a", "study": "s", "trials": [trial, beyond], "space": {}}]}
    told |= {"objectives": [{"name": "accuracy"}], "seeds": [1], "source": {"commit": None, "dirty": None}}
    point = Point(0, [], (0.5,))
    first, second, *_ = tuned._heading(told, Best("a", [], "accuracy", 0.5, 1, points=(point,), seconds=7.0), point)
    assert "trial 0 (Optuna's number, from 0) among 1 of" in first
    assert second.startswith("7 s of trials, from 2 to 3, by me;")


def test_names_of_experiments_do_not_collide() -> None:
    arms = ["backprop", "ff(threshold=-1)", "ff(threshold=1)", "ff(threshold:1)", "ff-threshold-1", "ff(a=1)", "ff(a)"]
    names = [experiment_name(arm, number) for arm in arms for number in (None, 1, 2)]
    assert len(set(names)) == len(names)
    assert experiment_name("mono_forward", 3) == "mono_forward-3.yaml"


@pytest.fixture
def first(cli: Cli) -> Path:
    """A finished run to begin with."""
    return cli("train", *QUICK, "algorithm=backprop").folder


def test_a_beginning_is_told_from_others_by_its_weights(cli: Cli, first: Path, tmp_path: Path) -> None:
    """Another spelling trains nothing again; other weights under the same name do."""
    two = ("compare.algorithms=[backprop,ridge]", "compare.seeds=[0]", "runs_dir=two", "compare.resume=true", *QUICK)

    def runs() -> set[str]:
        return {path.parent.name for path in (tmp_path / "two").glob("*/record.json")}

    assert cli("compare", *two, f"init_from={first}").code == 0
    began = runs()
    known = {load_record(tmp_path / "two" / name).data["beginning"]["weights"] for name in began}
    assert len(began) == 2
    assert known != {None}
    assert {load_record(tmp_path / "two" / name).data["beginning"]["run"] for name in began} == {first.name}
    assert cli("compare", *two, f"init_from={first.absolute()}/model.pt", "logger=none").code == 0
    assert runs() == began
    model = torch.load(first / "model.pt", weights_only=True)
    model["state_dict"]["net.readout.weight"] *= 2
    torch.save(model, first / "model.pt")
    assert cli("compare", *two, f"init_from={first}").code == 0
    assert len(runs()) == 4
    records = [load_record(tmp_path / "two" / name) for name in sorted(runs())]
    again = [record for record in records if record.algorithm == "ridge"]
    assert differing([settings(record) for record in again]) == ["init_from"]
    labels = [label for label, _ in apart(again)]
    assert len(labels) == 2
    assert all(label.startswith(f"init_from={first.name} (") for label in labels)
    older = {**again[0].data, "beginning": None}  # as records were before they said which weights
    assert type(again[0])(again[0].path, older).begins_with == f"unknown weights of {first}"


def test_a_readout_that_stays_as_drawn_is_told(cli: Cli, first: Path) -> None:
    """Once on the terminal, and in the notes of every record."""
    words = ("compare.algorithms=[backprop,mono_forward]", "compare.seeds=[0]", "runs_dir=drawn", *QUICK)
    model = torch.load(first / "model.pt", weights_only=True)
    for name, value in model["state_dict"].items():
        if name.startswith("net.readout."):
            model["state_dict"][name] = value[:7]
    torch.save(model, first / "model.pt")
    outcome = cli("compare", *words, f"init_from={first}")
    told = "the readout begins as it is drawn, not with the weights of init_from: readout."
    assert outcome.code == 0
    assert outcome.err.count(told) == 1
    for path in Path("drawn").glob("*/record.json"):
        assert [note.startswith(told) for note in load_record(path).data["notes"]] == [True]


@pytest.mark.parametrize("given", ["[a]", "true", "''"])
def test_a_beginning_that_is_no_name_is_refused(given: str, cli: Cli) -> None:
    outcome = cli("train", f"init_from={given}")
    assert outcome.code == 2
    assert "init_from is" in outcome.err
    assert "expected a folder" in outcome.err
    assert not Path("runs").exists()


def test_a_replay_begins_where_the_run_began(cli: Cli, first: Path, tmp_path: Path) -> None:
    words = ("algorithm=zeroth_order", "algorithm.variant=mezo", "algorithm.exact=true", "algorithm.trajectory=run")
    run = cli("train", *QUICK, *words, "optimizer=sgd", "optimizer.lr=1e-2", f"init_from={first}").folder
    outcome = cli("replay", str(run))
    assert outcome.code == 0
    assert "model.pt: bit-equal" in outcome.out
    shutil.move(first, tmp_path / "away")
    outcome = cli("replay", str(run))
    assert outcome.code == 2
    assert f"began with the weights of {first}, and they are not there any more" in outcome.err
    shutil.copytree(tmp_path / "away", first)
    torch.save({"state_dict": {"net.a": torch.zeros(1)}}, first / "model.pt")
    outcome = cli("replay", str(run))
    assert outcome.code == 2
    assert "other weights are there now" in outcome.err


def test_a_search_in_a_file_that_was_changed_is_another_search(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"

    def name() -> list[str]:
        return fixed_words([f"experiment={file}"], [1], None)

    file.write_text("# @package _global_\nnet: {hidden: [16]}\n", encoding="utf-8")
    first = name()
    file.write_text("# @package _global_\nnet: {hidden: [64, 64]}\n", encoding="utf-8")
    assert name() != first
    moved = tmp_path / "elsewhere" / "mine.yaml"
    moved.parent.mkdir()
    moved.write_text("# @package _global_\nnet: {hidden: [16]}\n", encoding="utf-8")
    assert fixed_words([f"experiment={moved}"], [1], None) == first
    given = [f"experiment={moved}", "hydra.searchpath=[file:///elsewhere]"]
    assert fixed_words(located(given), [1], None) == [*first[:1], "hydra.searchpath=[file:///elsewhere]", *first[1:]]
    assert fixed_words(located(given[:1]), [1], None) == first
