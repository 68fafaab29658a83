"""A finished run keeps what it trained: built again, it predicts what it predicted."""

from __future__ import annotations

import csv
import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import locallearn
from locallearn.cli.plans import make_plan
from locallearn.cli.predict import evaluate, table
from locallearn.cli.settings import UsageError, compose_settings
from locallearn.study.train import run
from tests.cli.conftest import SMALL, Cli

_FEW = (*SMALL, "trainer.probe_samples=0", "net.hidden=[8,8]")
_IMAGES = (*_FEW, "dataset.limit_train=64")
_GRAPH = (*_FEW, "dataset=karate_club")
_RUNS: dict[str, tuple[str, ...]] = {
    "backprop": (*_IMAGES, "algorithm=backprop"),
    "deep supervision": (*_IMAGES, "algorithm=deep_supervision"),
    "mono forward, sequential": (*_IMAGES, "algorithm=mono_forward", "schedule=sequential"),
    "forward forward": (*_IMAGES, "algorithm=forward_forward"),
    "forward forward, softmax": (*_IMAGES, "algorithm=forward_forward", "algorithm.inference=softmax"),
    "feedback alignment": (*_IMAGES, "algorithm=feedback_alignment"),
    "product feedback alignment": (*_IMAGES, "algorithm=product_feedback_alignment", "optimizer=sgd"),
    "pepita": (*_IMAGES, "algorithm=pepita", "optimizer=sgd"),
    "counter current": (*_IMAGES, "algorithm=counter_current"),
    "brain float": (*_IMAGES, "algorithm=mono_forward", "trainer.precision=bf16-mixed"),
    "forward gnn": (*_GRAPH, "algorithm=forward_gnn"),
    "forward gnn, goodness": (*_GRAPH, "algorithm=forward_gnn", "algorithm.variant=ff_la"),
    "links": (*_GRAPH, "algorithm=backprop", "task=link_prediction", "task.outputs=4"),
}


@pytest.mark.parametrize("words", _RUNS.values(), ids=_RUNS)
def test_what_is_loaded_predicts_what_was_trained(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg, choices = compose_settings(words)
    plan = make_plan(cfg, choices, "")
    folder = run(plan)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    saved = locallearn.load(folder)
    assert torch.equal(torch.get_rng_state(), before)  # loading draws nothing that others would have drawn
    own, trained = saved.task.state_dict(), plan.algorithm.state_dict()
    assert {name.removeprefix("algorithm.") for name in own if name.startswith("algorithm.")} == set(trained)
    test = next(iter(plan.data.test_dataloader()))
    plan.algorithm.eval()
    with torch.no_grad(), saved.trainer.precision_plugin.val_step_context():
        expected = plan.algorithm.predict(test.inputs, *test.context)
    found = saved.predict() if test.context else saved.predict(test.inputs)
    if choices["task"] != "link_prediction":  # there every part has edges of its own
        assert torch.equal(found, expected)
    figures, _ = evaluate(saved, "test")
    assert figures == dict(saved.record.part("test"))
    figures, _ = evaluate(saved, "validation")
    assert figures == dict(saved.record.part("validation"))


def test_two_views_are_judged_saved_and_paid_for(cli: Cli) -> None:
    """What validation and test judge is what the saved run predicts; operations of a prediction are twice as many."""
    one, two = (
        locallearn.load(cli("train", "dataset.limit_train=64", *more).folder) for more in ((), ("task.views=2",))
    )
    images = next(iter(two.data.test_dataloader())).inputs
    both = (one.predict(images) + one.predict(images.flip(3))) / 2
    assert torch.allclose(two.predict(images), both, atol=1e-6)  # training is the same
    assert evaluate(two, "test")[0] == two.record.data["test"]
    assert two.record.data["cost"]["inference_flops"] == 2 * one.record.data["cost"]["inference_flops"]
    assert two.record.data["cost"]["train_flops"] == one.record.data["cost"]["train_flops"]


def test_predictions_go_where_they_are_asked_for(cli: Cli, tmp_path: Path) -> None:
    folder = cli("train", "dataset.limit_train=64").folder
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    printed = cli("predict", str(folder), "predict.out=test.csv")
    assert printed.code == 0, printed.err
    accuracy = record["test"]["accuracy"]
    assert printed.out == f"mono_forward on digits: test accuracy {accuracy:.4f}\ntest.csv\n"
    rows = list(csv.DictReader((tmp_path / "test.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["sample"] for row in rows] == [str(i) for i in range(len(rows))]
    assert np.mean([row["predicted"] == row["label"] for row in rows]) == pytest.approx(accuracy)
    scores = np.array([[float(row[f"score_{i}"]) for i in range(10)] for row in rows])
    assert [str(i) for i in scores.argmax(1)] == [row["predicted"] for row in rows]

    assert cli("predict", str(folder), "predict.part=validation", "predict.out=validation.npy").code == 0
    assert np.load(tmp_path / "validation.npy").shape[1] == 10

    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = locallearn.load(folder).predict(images)
    torch.save(images, tmp_path / "own.pt")
    np.save(tmp_path / "own.npy", images.numpy())
    for name in ("own.pt", "own.npy"):
        own = cli("predict", str(folder), f"predict.inputs={name}", "predict.out=own.out.npy")
        assert own.code == 0, own.err
        assert own.out == "own.out.npy\n"
        assert torch.equal(torch.from_numpy(np.load(tmp_path / "own.out.npy")), expected)
    lines = cli("predict", f"{folder}/", "predict.inputs=own.pt").out.splitlines()
    assert lines[0].startswith("sample,predicted,score_0")
    assert [line.split(",")[1] for line in lines[1:]] == [str(int(i)) for i in expected.argmax(1)]


@pytest.mark.parametrize("end", [("compare.mode=target", "compare.target=0.05"), ("+trainer.max_steps=15",)])
@pytest.mark.parametrize("rule", [("mono_forward",), ("forward_forward", "algorithm.inference=softmax")])
def test_a_training_that_was_ended_before_its_last_stage_predicts_with_what_it_trained(
    cli: Cli, rule: tuple[str, ...], end: tuple[str, ...]
) -> None:
    name, *own = rule
    outcome = cli("train", f"algorithm={name}", *own, *end, "schedule=sequential", "optimizer.lr=0.01")
    assert outcome.code == 0, outcome.err
    assert outcome.record["untrained"]
    saved = locallearn.load(outcome.folder)
    assert saved.algorithm.active is not None
    assert saved.algorithm.active.isdisjoint(outcome.record["untrained"])
    predicted = cli("predict", str(outcome.folder))
    assert f"test accuracy {outcome.record['test']['accuracy']:.4f}" in predicted.out + predicted.err
    assert "the record says" not in predicted.out + predicted.err


def test_links_have_a_table_of_their_own_and_pictures_none(cli: Cli, tmp_path: Path) -> None:
    words = ("dataset=karate_club", "task=link_prediction", "task.outputs=4", "algorithm=backprop")
    folder = cli("train", *words).folder
    assert cli("predict", str(folder), "predict.out=pairs.csv").code == 0
    rows = list(csv.reader((tmp_path / "pairs.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["source", "target", "label", "score_0"]
    assert {row[2] for row in rows[1:]} == {"0.0", "1.0"}
    with pytest.raises(UsageError, match=r"predict\.out=FILE\.npy"):
        table([(None, torch.zeros(2, 1, 8, 8), None)], classes=False)


_ASKING = """
from locallearn.tasks.classification import Classification


class Asking(Classification):
    def test_step(self, batch, batch_idx):
        batch = self.to_batch(batch)
        right = self.algorithm.predict(inputs=batch.inputs).argmax(1) == batch.targets
        self.log("test/accuracy", right.float().mean(), on_epoch=True, batch_size=len(right))
"""


def test_a_task_may_ask_the_rule_itself(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "asking_task.py").write_text(_ASKING, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    outcome = cli("train", "algorithm=mono_forward", "task._target_=asking_task.Asking")
    assert outcome.code == 0, outcome.err
    predicted = cli("predict", str(outcome.folder), "--trust", "predict.out=out.npy")
    assert predicted.code == 0, predicted.err
    assert f"{outcome.record['test']['accuracy']:.4f}" in predicted.out
    assert np.load(tmp_path / "out.npy").shape == (360, 10)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "takes one run, and got 0"),
        (("RUN", "RUN2"), "takes one run, and got 2"),
        (("RUN", "--foo"), "no option --foo"),
        (("RUN", "seed=1"), "'seed=1' cannot be changed"),
        (("RUN", "predict.part=train"), "expected test or validation"),
        (("RUN", "predict.inputs=nowhere.npy"), "no file nowhere.npy"),
        (("RUN", "predict.inputs=text.npy"), "cannot be read as an array"),
        (("RUN", "predict.inputs=text.pt"), "cannot be read"),
        (("RUN", "predict.inputs=text.txt"), "ends in .npy or .pt"),
        (("RUN", "predict.inputs=flat.npy"), "expected (N, 1, 8, 8)"),
        (("RUN", "predict.inputs=whole.npy"), "expected floating point"),
        (("RUN", "predict.inputs=words.npy"), "no tensor of numbers"),
        (("RUN", "predict.inputs=unknown.npy"), "1 of 3 samples in unknown.npy hold NaN or infinity"),
        (("RUN", "predict.inputs=flat.npy", "predict.part=test"), "give one of the two"),
        (("RUN", "predict.out=x.txt"), "ends in .csv or .npy"),
        (("RUN", "predict.out=nowhere/x.csv"), "cannot be written"),
        (("RUN", "trainer.accelerator=tpu"), "trainer.accelerator"),
        (("runs/none",), "there is no folder"),
    ],
)
def test_what_cannot_be_predicted_is_one_sentence(
    cli: Cli, tmp_path: Path, words: tuple[str, ...], said: str, finished_run: Path
) -> None:
    for name in ("text.npy", "text.pt", "text.txt"):
        (tmp_path / name).write_text("text", encoding="utf-8")
    np.save(tmp_path / "flat.npy", np.zeros((3, 64), dtype=np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((3, 1, 8, 8), dtype=np.uint8))
    np.save(
        tmp_path / "unknown.npy", np.where(np.arange(3 * 64).reshape(3, 1, 8, 8) == 70, np.nan, 0).astype(np.float32)
    )
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    refused = cli("predict", *(str(finished_run) if word == "RUN" else word for word in words))
    assert refused.code == 2
    assert said in refused.err
    assert len(refused.err.splitlines()) == 1


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg, choices = compose_settings([*_IMAGES, f"runs_dir={tmp_path_factory.mktemp('runs')}"])
    return run(make_plan(cfg, choices, ""))


def _copy(run: Path, place: Path, **changes: Any) -> Path:
    place.mkdir()
    record = json.loads((run / "record.json").read_text(encoding="utf-8"))
    (place / "record.json").write_text(json.dumps({**record, "id": place.name, **changes}), encoding="utf-8")
    (place / "model.pt").write_bytes((run / "model.pt").read_bytes())
    return place


def test_what_cannot_be_loaded_says_why(finished_run: Path, tmp_path: Path) -> None:
    config = json.loads((finished_run / "record.json").read_text(encoding="utf-8"))["config"]
    interrupted = _copy(finished_run, tmp_path / "a", status="interrupted")
    with pytest.raises(UsageError, match="a is interrupted, and only a finished run"):
        locallearn.load(interrupted)
    none = _copy(finished_run, tmp_path / "b")
    (none / "model.pt").unlink()
    with pytest.raises(UsageError, match=r"holds no model\.pt"):
        locallearn.load(none)
    for content in (b"", b"<html>", (finished_run / "model.pt").read_bytes()[:900]):
        (none / "model.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.pt cannot be read"):
            locallearn.load(none)
    torch.save({"w": torch.zeros(2)}, none / "model.pt")
    with pytest.raises(ValueError, match="holds no model"):
        locallearn.load(none)
    wider = _copy(finished_run, tmp_path / "c", config={**config, "net": {**config["net"], "hidden": [9, 8]}})
    with pytest.raises(ValueError, match="does not fit"):
        locallearn.load(wider)
    for number, odd in enumerate(({}, None, 3, {"seed": 0}, {**config, "trainer": 5}, {**config, "net": {}})):
        with pytest.raises(UsageError, match=r"settings|damaged"):
            locallearn.load(_copy(finished_run, tmp_path / f"odd{number}", config=odd))
    older = {key: value for key, value in config.items() if key not in ("keep_model", "predict")}
    older["trainer"] = {key: value for key, value in config["trainer"].items() if key != "matmul_precision"}
    assert locallearn.load(_copy(finished_run, tmp_path / "older", config=older)).record.id == "older"


def test_a_run_that_is_to_keep_no_model_keeps_none(cli: Cli) -> None:
    folder = cli("train", "dataset.limit_train=64", "keep_model=false").folder
    assert not (folder / "model.pt").exists()
    assert cli("predict", str(folder)).code == 2
    assert "keep_model is 3" in cli("train", "keep_model=3").err


def test_a_full_disk_for_predictions(cli: Cli, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("locallearn.records.write_file", full)
    refused = cli("predict", str(finished_run), "predict.out=x.csv")
    assert refused.code == 2
    assert "the disk is full: x.csv" in refused.err
    assert "test accuracy" in refused.out  # what it was for is there all the same


# -- a graph in a file of one's own ------------------------------------------------------------------------------------------


def _own_graph(place: Path, seed: int = 0) -> Path:
    from torch_geometric.data import Data

    torch.manual_seed(seed)
    edges = torch.randint(30, (2, 120))
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(Data(x=torch.rand(30, 5), y=torch.arange(30) % 3, edge_index=edges), place)
    return place


_OWN = ("dataset=own_graph", "dataset.path=../data/own.pt", "algorithm=backprop")


def test_a_file_that_was_named_relatively_is_found_from_anywhere(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _own_graph(tmp_path / "data/own.pt")
    for folder in ("there", "elsewhere/inside"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there")
    trained = cli("train", *_OWN)
    assert trained.code == 0, trained.err
    run = (tmp_path / "there" / trained.folder).resolve()
    assert json.loads((run / "record.json").read_text(encoding="utf-8"))["config"]["dataset"]["path"] == _OWN[1][13:]
    whole = locallearn.load(run).predict()
    monkeypatch.chdir(tmp_path / "elsewhere/inside")
    _own_graph(tmp_path / "elsewhere/data/own.pt", seed=1)  # another one of that name, from here
    assert torch.equal(locallearn.load(run).predict(), whole)

    (tmp_path / "data/own.pt").rename(tmp_path / "moved.pt")
    assert not torch.equal(locallearn.load(run).predict(), whole)  # the other one is all that is left
    (tmp_path / "elsewhere/data/own.pt").unlink()
    gone = cli("predict", str(run))
    assert gone.code == 2
    assert gone.err.count("\n") == 1
    assert "no such file: say where it is with dataset.path=FILE" in gone.err
    found = cli("predict", str(run), "dataset.path=../../moved.pt")
    assert found.code == 0, found.err
    assert torch.equal(locallearn.load(run, data_path=tmp_path / "moved.pt").predict(), whole)
    analysed = cli("analyze", str(run), f"dataset.path={tmp_path}/moved.pt")
    assert "was trained on a graph" in analysed.err  # it was found, then
    assert "null, expected the file" in cli("predict", str(run), "dataset.path=null").err


def test_a_run_goes_on_with_the_file_that_it_began_with(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from locallearn.study._callbacks import _Keeper
    from locallearn.study.train import Interrupted

    def stop(keeper: Any, trainer: Any) -> None:
        save(keeper, trainer)
        if trainer.global_step == 2:
            raise Interrupted

    _own_graph(tmp_path / "data/own.pt")
    for folder in ("there", "elsewhere"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "there")
    words = (*_OWN, "trainer.max_epochs=4", "schedule.patience=null", "trainer.checkpoint_s=1e-9")
    save = _Keeper._save_or_stop
    with monkeypatch.context() as patch:
        patch.setattr(_Keeper, "_save_or_stop", stop)
        stopped = cli("train", *words)
    assert stopped.code == 130, stopped.err
    whole = cli("train", *words)
    test = whole.record["test"]
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = cli("train", f"resume=../there/{stopped.folder}")
    assert resumed.code == 0, resumed.err
    assert resumed.record["test"] == test
    again = cli("predict", str(resumed.folder))  # its own record leads there, too
    assert again.code == 0, again.err
    (tmp_path / "data/own.pt").rename(tmp_path / "moved.pt")
    assert "no such file" in cli("train", f"resume=../there/{stopped.folder}").err
    moved = cli("train", f"resume=../there/{stopped.folder}", "dataset.path=../moved.pt")
    assert moved.record["test"] == test


def test_data_that_come_from_no_file_have_no_path(finished_run: Path, cli: Cli) -> None:
    refused = cli("predict", str(finished_run), "dataset.path=own.pt")
    assert refused.code == 2
    assert "the data of this run come from none" in refused.err
