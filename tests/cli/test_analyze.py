"""``locallearn analyze``: a table, a file per run beside the runs, and a section of the report; runs stay as they were."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import locallearn
from locallearn import analysis
from locallearn.batch import Batch
from locallearn.cli.plans import make_plan
from locallearn.cli.settings import compose_settings
from locallearn.study.train import run
from tests.cli.conftest import SMALL, Cli

_FEW = (*SMALL, "trainer.probe_samples=0", "trainer.max_epochs=4", "dataset.limit_train=600", "optimizer.lr=5e-3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("runs")
    made = {}
    for name, words in {
        "backprop": (*_FEW, "algorithm=backprop"),
        "forward_forward": (*_FEW, "algorithm=forward_forward", "dataset.normalize=standard"),
        "graph": (*SMALL, "dataset=karate_club", "algorithm=backprop", "trainer.probe_samples=0", "net.hidden=[8,8]"),
    }.items():
        cfg, choices = compose_settings([*words, f"runs_dir={place}"])
        made[name] = run(make_plan(cfg, choices, ""))
    return made


@pytest.fixture
def own(runs: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The runs, in a folder of the test's own."""
    return {name: shutil.copytree(folder, tmp_path / "runs" / folder.name) for name, folder in runs.items()}


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_runs_are_told_about_and_compared_and_the_report_shows_it(
    cli: Cli, own: dict[str, Path], tmp_path: Path
) -> None:
    names = ("backprop", "forward_forward")
    before = [_content(own[name]) for name in names]
    told = cli("analyze", *(str(own[name]) for name in names), "analyze.tau=0.5", "analyze.only_right=false")
    assert told.code == 0, told.err
    assert [_content(own[name]) for name in names] == before  # a run's folder is never changed
    files = [Path(line) for line in told.out.splitlines() if line.endswith(".json")]
    assert [file.parent for file in files] == [tmp_path / "runs" / "analysis"] * 3
    assert [file.name for file in files[:2]] == [f"{own[name].name}.json" for name in names]
    for name, file in zip(names, files, strict=False):
        found = json.loads(file.read_text(encoding="utf-8"))
        saved = locallearn.load(own[name])
        assert found["run"] == saved.record.id
        assert found["accuracy"] == pytest.approx(saved.record.data["test"]["accuracy"])
        saved.data.setup("test")
        whole = [Batch(b.inputs, b.targets) for b in saved.data.test_dataloader()]
        again = analysis.analyse(saved.algorithm, whole, 10, tau=0.5, only_right=False)
        assert {key: found[key] for key in again} == json.loads(json.dumps(again))
        shown = f"{again['passes'][next(iter(again['passes']))]['layers'][0]['hoyer']:.3f}"
        assert shown in told.out
    likeness = json.loads(files[2].read_text(encoding="utf-8"))
    assert [row[0] for row in likeness["rows"]] == [own[name].name for name in names for _ in range(2)]
    assert likeness["samples"] == 360
    assert f"{likeness['cka'][0][2]:.3f}" in told.out

    assert cli("report", str(tmp_path / "runs")).code == 0
    page = (tmp_path / "runs" / "report.html").read_text(encoding="utf-8")
    assert 'id="representations"' in page
    for heading in (
        "Sparsity of every layer",
        "Centred kernel alignment",
        "Ensembles: backprop, seed 0, test accuracy",
    ):
        assert heading in page
    assert cli("analyze", str(own["backprop"]), "analyze.only_right=false").code == 0  # anew, over the old one
    assert json.loads(files[0].read_text(encoding="utf-8"))["tau"] == 1.0
    assert len(list((tmp_path / "runs" / "analysis").iterdir())) == 4


def test_the_validation_part_and_one_run_alone(cli: Cli, own: dict[str, Path]) -> None:
    few = ("analyze.per_class=3", "analyze.units=5", "analyze.only_right=false")
    told = cli("analyze", str(own["backprop"]), "analyze.part=validation", *few)
    assert told.code == 0, told.err
    found = json.loads(Path(told.out.splitlines()[-2]).read_text(encoding="utf-8"))
    record = json.loads((own["backprop"] / "record.json").read_text(encoding="utf-8"))
    assert found["part"] == "validation"
    assert found["accuracy"] == pytest.approx(record["validation"]["accuracy"])
    layer = found["passes"]["plain"]["layers"][1]
    assert len(layer["columns"]) == 5
    assert len(layer["map"]["labels"]) <= 30
    assert "CKA" not in told.out


def test_runs_on_different_samples_are_not_compared(cli: Cli, own: dict[str, Path]) -> None:
    folder = own["backprop"].parent / "other"
    shutil.copytree(own["backprop"], folder)
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    record["id"] = "other"
    record["config"]["dataset"]["split_seed"] = 5
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    words = ("analyze.part=validation", "analyze.only_right=false")
    told = cli("analyze", str(own["backprop"]), str(folder), *words)
    assert told.code == 0, told.err
    assert "compared among runs on the same samples only" in told.err
    assert "CKA" not in told.out


def test_a_class_that_training_never_saw_is_shown_beside_the_others(cli: Cli) -> None:
    folder = cli(
        "train", "algorithm=bp_ff", "dataset.exclude=[3]", "dataset.limit_train=64", "trainer.probe_samples=0"
    ).folder
    told = cli("analyze", str(folder), "analyze.only_right=false")
    assert told.code == 0, told.err
    assert "never trained: class 3; share of its samples that a linear probe finds: layer1 " in told.out
    found = json.loads(Path(told.out.splitlines()[-2]).read_text(encoding="utf-8"))
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert found["accuracy"] == pytest.approx(record["test"]["accuracy"])
    assert found["samples"] == 360 - found["passes"]["neutral"]["counts"][3]
    assert "exclude=[12]" in cli("train", "dataset.exclude=[12]").err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "takes one run or several"),
        (("RUN", "--foo"), "no option --foo"),
        (("RUN", "seed=1"), "'seed=1' cannot be changed"),
        (("RUN", "analyze.part=train"), "expected test or validation"),
        (("RUN", "analyze.tau=-1"), "analyze.tau is -1"),
        (("RUN", "analyze.tau=.inf"), "analyze.tau is .inf"),
        (("RUN", "analyze.tau=much"), "analyze.tau is much"),
        (("RUN", "analyze.only_right=3"), "expected true or false"),
        (("RUN", "analyze.per_class=1"), "analyze.per_class is 1"),
        (("RUN", "analyze.units=5000"), "from 2 to 2000"),
        (("RUN", "analyze.samples=3"), "analyze.samples"),
        (("RUN", "RUN"), "is named twice"),
        (("runs/none",), "there is no folder"),
        (("GRAPH",), "was trained on a graph"),
        (("EMPTY",), "holds no model.pt"),
        (("OWN",), "--trust"),
        (("UNTRAINED",), "classified rightly"),
    ],
)
def test_what_cannot_be_analysed_is_one_sentence(
    cli: Cli, own: dict[str, Path], words: tuple[str, ...], said: str
) -> None:
    places = {"RUN": own["backprop"], "GRAPH": own["graph"]}
    for name in ("EMPTY", "OWN", "UNTRAINED"):
        places[name] = own["backprop"].parent / name.lower()
        shutil.copytree(own["backprop"], places[name])
    (places["EMPTY"] / "model.pt").unlink()
    record = json.loads((places["OWN"] / "record.json").read_text(encoding="utf-8"))
    record["config"]["net"] = {"_target_": "somebody.net"}
    (places["OWN"] / "record.json").write_text(json.dumps(record), encoding="utf-8")
    kept = torch.load(places["UNTRAINED"] / "model.pt", weights_only=True)
    for value in kept["state_dict"].values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    torch.save(kept, places["UNTRAINED"] / "model.pt")
    refused = cli("analyze", *(str(places.get(word, word)) for word in words))
    assert refused.code == 2
    assert said in refused.err
    assert len(refused.err.splitlines()) == 1
    assert not (own["backprop"].parent / "analysis").exists()


def test_a_full_disk_loses_no_table(cli: Cli, own: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("locallearn.records.write_file", full)
    refused = cli("analyze", str(own["backprop"]), "analyze.only_right=false")
    assert refused.code == 2
    assert "the disk is full" in refused.err
    assert "sparsity" in refused.out


def test_analysed_runs_are_taken_over_by_a_comparison_with_other_wishes(cli: Cli, tmp_path: Path) -> None:
    words = ("dataset.limit_train=64", "trainer.probe_samples=0", "compare.algorithms=[backprop]", "compare.seeds=[0]")
    assert cli("compare", *words).code == 0
    (tmp_path / "wishes.yaml").write_text("# @package _global_\nanalyze: {tau: 3}\n", encoding="utf-8")
    again = cli("compare", *words, "experiment=wishes.yaml", "compare.resume=true")
    assert again.code == 0
    assert len(list((tmp_path / "runs").glob("*/record.json"))) == 1
