"""``locallearn distill``: a table, files beside the runs, students that can be loaded again; the run stays as it was."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import locallearn
from locallearn.cli.plans import make_plan
from locallearn.cli.predict import evaluate
from locallearn.cli.settings import compose_settings
from locallearn.distillation import load_student
from locallearn.study.train import run
from tests.cli.conftest import SMALL, Cli

_FEW = (*SMALL, "trainer.probe_samples=0", "dataset.limit_train=400", "optimizer.lr=5e-3")
_QUICK = ("distill.samples=300", "distill.rounds=1", "distill.steps=1", "distill.batch=20")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("runs")
    made = {}
    for name, words in {
        "backprop": ("algorithm=backprop", "trainer.max_epochs=4", "net.hidden=[32,32]", "net.batch_norm=true"),
        "cnn": ("algorithm=mono_forward", "net=cnn", "~net.hidden", "net.channels=[8,16]"),
        "graph": ("dataset=karate_club", "algorithm=backprop", "net.hidden=[8,8]", "~dataset.limit_train"),
    }.items():
        given = [w for w in _FEW if not (w.startswith("net.hidden") and name == "cnn")]
        if name == "graph":
            given = [w for w in given if not w.startswith("dataset.limit")]
        words = tuple(word for word in words if not word.startswith("~"))
        cfg, choices = compose_settings([*given, *words, f"runs_dir={place}"])
        made[name] = run(make_plan(cfg, choices, ""))
    return made


@pytest.fixture
def own(runs: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The runs, in a folder of the test's own."""
    return {name: shutil.copytree(folder, tmp_path / "runs" / folder.name) for name, folder in runs.items()}


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_every_depth_is_told_and_the_best_student_is_kept(cli: Cli, own: dict[str, Path], tmp_path: Path) -> None:
    before = _content(own["backprop"])
    told = cli("distill", str(own["backprop"]), *_QUICK, "distill.sizes=[0.5,0.8]", "distill.keep=best")
    assert told.code == 0, told.err
    assert _content(own["backprop"]) == before  # a run's folder is never changed
    folder = tmp_path / "runs" / "distilled" / own["backprop"].name
    found = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    teacher, *students = found["students"]
    record = json.loads((own["backprop"] / "record.json").read_text(encoding="utf-8"))
    assert teacher["test"]["accuracy"] == pytest.approx(record["test"]["accuracy"])
    assert teacher["params"] == record["cost"]["params"] == teacher["learned"]
    assert teacher["flops"] == 2 * (64 * 32 + 32 * 32 + 32 * 10)
    assert teacher["latency_ratio"] == 1
    assert [s["depth"] for s in students] == [1, 2] * 8
    assert "not replaced: readout" in told.out
    assert "members.layer1.1 with its ReLU" in told.out
    for student in students:
        share, depth, method = student["recipe"]["share"], student["depth"], student["recipe"]["method"]
        removed = sum((2080, 1056)[:depth])
        norms = 64 * depth if method in ("eugen", "snnk") else 0  # of those the normalisation is replaced as well
        assert student["params"] + norms <= teacher["params"] - removed + share * removed
        assert student["flops"] < teacher["flops"]
        assert student["lost"] == pytest.approx(teacher["test"]["accuracy"] - student["test"]["accuracy"])
        assert list(student["layers"]) == ["members.layer1.1", "members.layer2.0"][:depth]
    with (folder / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["test_accuracy"]) for row in rows] == [s["test"]["accuracy"] for s in found["students"]]
    (kept,) = folder.glob("student-*.pt")
    number = int(kept.stem.partition("-")[2])
    deep = [s for s in found["students"] if s["depth"] == 2]
    best = max(s["validation"]["accuracy"] for s in deep)
    assert found["students"][number]["validation"]["accuracy"] == best
    saved = locallearn.load(own["backprop"])
    load_student(saved.net, kept)
    again = evaluate(saved, "test")[0]
    assert again["accuracy"] == found["students"][number]["test"]["accuracy"]
    predicted = cli("predict", str(own["backprop"]), f"predict.student={kept}")
    assert predicted.code == 0, predicted.err
    assert f"test accuracy {again['accuracy']:.4f}" in predicted.out


def test_the_last_layers_of_convolutions_under_a_rule_with_its_own_inference(
    cli: Cli, own: dict[str, Path], tmp_path: Path
) -> None:
    words = ("distill.order=last", "distill.methods=[snnk,low_rank]", "distill.sizes=[0.9]", "distill.inputs=teacher")
    told = cli(
        "distill",
        str(own["cnn"]),
        *_QUICK,
        *words,
        f"distill.out={tmp_path / 'there'}",
        "distill.keep=all",
        "distill.draws=teacher",
    )
    assert told.code == 0, told.err
    found = json.loads((tmp_path / "there" / "table.json").read_text(encoding="utf-8"))
    layers = [layer["name"] for layer in found["layers"]]
    assert layers == ["members.conv1.0", "members.conv2.0"]
    assert [list(s["layers"]) for s in found["students"][1:]] == [layers[1:], layers] * 2
    files = _content(tmp_path / "there")
    assert len([name for name in files if name.startswith("student-")]) == 4
    again = cli("distill", str(own["cnn"]), *_QUICK, f"distill.out={tmp_path / 'there'}")
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "holds student-1.pt, which was kept with another table" in again.err
    assert _content(tmp_path / "there") == files
    assert found["students"][0]["test"]["accuracy"] == pytest.approx(
        json.loads((own["cnn"] / "record.json").read_text(encoding="utf-8"))["test"]["accuracy"]
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "takes one run, and got 0"),
        (("RUN", "RUN"), "got 2"),
        (("RUN", "seed=1"), "'seed=1' cannot be changed"),
        (("RUN", "distill.methods=[pca]"), "names pca, expected some of eugen"),
        (("RUN", "distill.methods=svd"), "expected a list"),
        (("RUN", "distill.sizes=[25]"), "has 25, expected shares"),
        (("RUN", "distill.sizes=[0.5,0.5]"), "list of different entries"),
        (("RUN", "distill.sizes=[half]"), "expected numbers"),
        (("RUN", "distill.sizes=[0.001]"), "does not fit into a share of 0.001"),
        (("RUN", "distill.penalties=[-1]"), "at least 0"),
        (("RUN", "distill.depths=[0]"), "distill.depths is [0]"),
        (("RUN", "distill.depths=[3]"), "and 2 layers can be replaced"),
        (("RUN", "distill.layers=[layer9]"), "layer 'layer9' cannot be replaced: there is no such layer"),
        (("RUN", "distill.inputs=both"), "expected teacher or student"),
        (("RUN", "distill.draws=wide"), "expected isotropic or teacher"),
        (("RUN", "distill.order=middle"), "expected first or last"),
        (("RUN", "distill.keep=7"), "expected null or best or all"),
        (("RUN", "distill.samples=1"), "at least 2"),
        (("RUN", "distill.seed=-1"), "distill.seed is -1"),
        (("RUN", "distill.orthogonal=7"), "expected true or false"),
        (("RUN", "distill.width=3"), "distill.width"),
        (("RUN", "distill.out=RUN"), "the folder of a run"),
        (("GRAPH",), "was trained on a graph"),
        (("runs/none",), "there is no folder"),
    ],
)
def test_what_cannot_be_distilled_is_one_sentence(
    cli: Cli, own: dict[str, Path], words: tuple[str, ...], said: str
) -> None:
    places = {"RUN": str(own["backprop"]), "GRAPH": str(own["graph"])}
    given = [word.replace("=RUN", f"={places['RUN']}") if "=" in word else places.get(word, word) for word in words]
    refused = cli("distill", *given)
    assert refused.code == 2
    assert said in refused.err
    assert len(refused.err.splitlines()) == 1
    assert not (own["backprop"].parent / "distilled").exists()


def test_the_readout_and_named_layers(cli: Cli, own: dict[str, Path], tmp_path: Path) -> None:
    words: Any = ("distill.methods=[svd]", "distill.sizes=[0.5]", "distill.layers=[readout,members.layer2.0]")
    told = cli("distill", str(own["backprop"]), *_QUICK, *words)
    assert told.code == 0, told.err
    assert "layers in the order of inference: members.layer2.0 with its ReLU, readout" in told.out
    assert "not replaced: members.layer1.1: it is not among distill.layers" in told.out


def test_a_student_of_another_network_is_one_sentence(cli: Cli, own: dict[str, Path], tmp_path: Path) -> None:
    torch.save({"nothing": 1}, tmp_path / "odd.pt")
    for file, said in (("odd.pt", "holds no student"), ("none.pt", "there is no file")):
        refused = cli("predict", str(own["backprop"]), f"predict.student={tmp_path / file}")
        assert refused.code == 2
        assert said in refused.err
        assert len(refused.err.splitlines()) == 1
