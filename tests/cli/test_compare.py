"""``compare``, ``report``, ``audit`` and ``data``: what they print, write and return."""

from __future__ import annotations

import json
import shlex
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from locallearn.algorithms import MonoForward
from locallearn.algorithms.base import Locality, ParamGroup, Update
from locallearn.batch import Batch
from tests.cli.conftest import Cli

ReadRecords = Callable[[Path], list[dict[str, Any]]]
_TWO = ("compare.algorithms=[backprop,mono_forward]", "compare.seeds=[0,1]")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal wide enough that no cell of a table is cut."""
    monkeypatch.setenv("COLUMNS", "200")


def test_compare_alternates_and_leaves_records_index_table_and_report(
    cli: Cli, tmp_path: Path, read_records: ReadRecords
) -> None:
    outcome = cli("compare", *_TWO)
    assert outcome.code == 0
    found = read_records(tmp_path / "runs")
    # A B A B, so that heat and neighbours weigh on both alike.
    assert [(record["algorithm"], record["seed"]) for record in found] == [
        ("backprop", 0),
        ("mono_forward", 0),
        ("backprop", 1),
        ("mono_forward", 1),
    ]
    for name in ("backprop", "mono_forward", "digits", "mode own"):
        assert name in outcome.out
    flops = [record["cost"]["update_flops"] for record in found]
    assert flops[0] == flops[2]
    assert flops[1] == flops[3]
    assert f"{flops[1] / flops[0]:.2f}" in outcome.out  # the ratio to backprop, worked out here
    assert outcome.out.splitlines()[-1] == "runs/report.html"
    page = (tmp_path / "runs" / "report.html").read_text(encoding="utf-8")
    assert "<html" in page
    assert all(record["id"] in page for record in found)
    with closing(sqlite3.connect(tmp_path / "runs" / "index.sqlite")) as base:
        rows = base.execute("SELECT id, seed, test_accuracy FROM runs ORDER BY started").fetchall()
    assert rows == [(record["id"], record["seed"], record["test"]["accuracy"]) for record in found]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_a_failing_algorithm_does_not_end_the_comparison(cli: Cli, tmp_path: Path, read_records: ReadRecords) -> None:
    outcome = cli("compare", *_TWO, 'compare.overrides={mono_forward:["optimizer=sgd","optimizer.lr=1e30"]}')
    assert outcome.code == 1
    found = read_records(tmp_path / "runs")
    assert [record["status"] for record in found] == ["done", "failed", "done", "failed"]
    assert "backprop" in outcome.out
    assert outcome.out.splitlines()[-1] == "runs/report.html"
    told = [line for line in outcome.err.splitlines() if line.startswith("locallearn: ")]
    assert [line.partition(":")[2].partition(" failed")[0].strip() for line in told] == [
        "mono_forward seed 0",
        "mono_forward seed 1",
    ]


def test_overrides_are_for_one_algorithm(cli: Cli, tmp_path: Path, read_records: ReadRecords) -> None:
    words = ['compare.overrides={backprop:["optimizer.lr=3e-4"]}', "compare.seeds=[0]"]
    assert cli("compare", _TWO[0], *words).code == 0
    rates = {record["algorithm"]: record["config"]["optimizer"]["lr"] for record in read_records(tmp_path / "runs")}
    assert rates == {"backprop": 3e-4, "mono_forward": 1e-3}


def test_matched_gives_every_algorithm_the_same_samples(cli: Cli, tmp_path: Path, read_records: ReadRecords) -> None:
    # A rate of zero would end every run early, were patience not off in this mode.
    outcome = cli(
        "compare",
        "compare.algorithms=[backprop,deep_supervision,mono_forward,forward_forward]",
        "compare.seeds=[0]",
        "compare.mode=matched",
        "schedule.patience=1",
        "trainer.max_epochs=3",
        "optimizer.lr=0.0",
    )
    assert outcome.code == 0
    found = read_records(tmp_path / "runs")
    assert [record["cost"]["samples"] for record in found] == [3 * 1293] * 4
    assert {record["mode"] for record in found} == {"matched"}
    assert "mode matched" in outcome.out


def test_matched_means_the_same_to_every_command(cli: Cli, tmp_path: Path, read_records: ReadRecords) -> None:
    """``train``, its sweeps and trials of ``tune`` write this mode into their records, so they train all epochs, too."""
    words = ["compare.mode=matched", "schedule.patience=1", "trainer.max_epochs=3", "optimizer.lr=0.0"]
    assert cli("train", "algorithm=backprop", "dataset.limit_train=100", *words).code == 0
    [record] = read_records(tmp_path / "runs")
    assert (record["mode"], record["cost"]["samples"]) == ("matched", 300)


def test_target_reports_seconds_and_samples(cli: Cli, tmp_path: Path, read_records: ReadRecords) -> None:
    words = ["compare.mode=target", "compare.target=0.5", "trainer.max_epochs=20", "optimizer.lr=1e-2"]
    assert cli("compare", _TWO[0], "compare.seeds=[0]", *words).code == 0
    for record in read_records(tmp_path / "runs"):
        assert record["mode"] == "target"
        assert record["target"]["accuracy"] == 0.5
        assert record["target"]["seconds"] > 0
        assert record["target"]["samples"] == record["epochs"][0] * 1293


def test_a_target_that_is_missed_is_named_without_a_cost(cli: Cli, tmp_path: Path, read_records: ReadRecords) -> None:
    words = ["compare.algorithms=[backprop]", "compare.seeds=[0]", "compare.mode=target", "compare.target=0.999"]
    outcome = cli("compare", *words)
    assert outcome.code == 0
    (record,) = read_records(tmp_path / "runs")
    assert record["target"] == {"accuracy": 0.999}
    assert "99.90" in outcome.out
    assert "time to target" in outcome.out


def test_a_named_algorithm_stands_beside_backpropagation(cli: Cli, tmp_path: Path, read_records: ReadRecords) -> None:
    """Its own settings are not for the other one."""
    words = ["algorithm=feedback_alignment", "algorithm.mode=usf", "optimizer.lr=1e-2", "compare.seeds=[0]"]
    assert cli("compare", *words).code == 0
    assert [
        (r["algorithm"], r["variant"], r["config"]["optimizer"]["lr"]) for r in read_records(tmp_path / "runs")
    ] == [
        ("backprop", None, 1e-2),
        ("feedback_alignment", "usf", 1e-2),
    ]


def test_a_rule_of_the_users_own_is_compared(cli: Cli, tmp_path: Path, read_records: ReadRecords) -> None:
    """Its YAML lies in a folder of the user's."""
    own = tmp_path / "my_conf" / "algorithm"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("_target_: locallearn.algorithms.MonoForward\n", encoding="utf-8")
    words = ["hydra.searchpath=[file://my_conf]", "compare.algorithms=[backprop,mine]", "compare.seeds=[0]"]
    assert cli("compare", *words).code == 0
    assert [record["algorithm"] for record in read_records(tmp_path / "runs")] == ["backprop", "mine"]
    # Under the recipe of another rule, and in a search, whose result is such a recipe.
    words = [words[0], "experiment=mono_forward_mnist", "dataset=digits", "scheduler=null", "dataset.validation=0.2"]
    assert cli("compare", *words, "compare.algorithms=[mine]", "compare.seeds=[0]", "runs_dir=recipe").code == 0
    [record] = read_records(tmp_path / "recipe")
    assert record["algorithm"] == "mine"
    searched = cli("tune", words[0], "tune.algorithms=[backprop,mine]", "tune.trials=1", "runs_dir=search")
    assert searched.code == 0, searched.err
    for line in searched.out.splitlines()[-2:]:  # what it recommends to do next
        _, command, *recommended = shlex.split(line)
        assert cli(command, *recommended, "runs_dir=next").code == 0
    # Wherever it lies.
    for named, written in (
        ("my,conf", "'file://my,conf'"),
        ("my conf", r"file://my\ conf"),
        ("my conf", "file://my conf"),
    ):
        (tmp_path / named / "algorithm").mkdir(parents=True, exist_ok=True)
        (tmp_path / named / "algorithm" / "ours.yaml").write_text("_target_: locallearn.algorithms.MonoForward\n")
        assert cli("train", f"hydra.searchpath=[{written}]", "algorithm=ours").code == 0
    # And what is mistyped beside it is told.
    assert "there is no folder my_conff " in cli("train", "hydra.searchpath=[file://my_conff]", "algorithm=mine").err
    for word, told in (
        ('compare.algorithms=["mine(sed=1)"]', "'algorithm.sed'"),
        ("dataset.limit=3", "'dataset.limit'"),
    ):
        arms = () if word.startswith("compare") else ("compare.algorithms=[mine]",)
        mistyped = cli("compare", words[0], *arms, word)
        assert mistyped.code == 2
        assert told in mistyped.err
        assert mistyped.err.count("\n") == 1


def test_what_cut_trainings_short_stands_under_the_table(cli: Cli) -> None:
    words = [
        "compare.algorithms=[backprop]",
        "compare.seeds=[0]",
        "+trainer.limit_train_batches=2",
        "+trainer.max_steps=2",
    ]
    outcome = " ".join(cli("compare", *words).out.split())
    assert "Its training had a limit, trainer.limit_train_batches=2." in outcome
    assert "Its training had a limit, trainer.max_steps=2." in outcome


def test_report_reads_several_folders(cli: Cli, tmp_path: Path) -> None:
    ids = [cli("train", f"runs_dir={name}", f"algorithm={name}").record["id"] for name in ("backprop", "mono_forward")]
    outcome = cli("report", "backprop", "mono_forward", "report.out=both.html", 'report.title="two <b>folders</b>"')
    assert outcome.code == 0
    assert outcome.out == "both.html\n"
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert all(name in page for name in ids)
    assert "two <b>folders</b>" not in page
    assert cli("report", "backprop").out == "backprop/report.html\n"


@pytest.mark.parametrize("algorithm", ["backprop", "deep_supervision", "mono_forward", "forward_forward"])
def test_audit_confirms_every_claim(algorithm: str, cli: Cli, tmp_path: Path) -> None:
    outcome = cli("audit", f"algorithm={algorithm}", "net.hidden=[8,8]", "meter=none")
    assert outcome.code == 0
    assert "confirmed" in outcome.out
    units = ("network",) if algorithm in ("backprop", "deep_supervision") else ("layer1", "layer2")
    assert all(unit in outcome.out for unit in units)
    assert list(tmp_path.iterdir()) == []


class Liar(MonoForward):
    """Says layer-local, and lets the last block's loss reach every block."""

    @property
    def locality(self) -> Locality:
        """A lie."""
        return Locality.LAYER_LOCAL

    def block_groups(self, index: int) -> list[ParamGroup]:
        """As they should be."""
        return super().block_groups(index)

    def updates(self, batch: Batch) -> Iterator[Update]:
        """Nothing is detached."""
        output: Tensor = batch.inputs
        for i, (name, block) in enumerate(zip(self.blocks.names, self.blocks, strict=True)):
            output = block(output)
            yield Update(name, self.local_loss(i, output, batch))


def test_audit_refutes_a_liar(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("somebodys_rule")
    module.Liar = Liar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys_rule", module)
    outcome = cli("audit", "algorithm._target_=somebodys_rule.Liar", "net.hidden=[8,8]", "meter=none")
    assert outcome.code == 1
    assert "REFUTED" in outcome.out
    assert "layer1" in outcome.out.partition("claim:")[2]


def test_data_says_what_is_here_and_where_the_rest_belongs(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "images" / "MNIST" / "raw").mkdir(parents=True)
    for name in ("train-images", "t10k-images"):
        (tmp_path / "images" / "MNIST" / "raw" / f"{name}-idx3-ubyte").touch()
    for name in ("train-labels", "t10k-labels"):
        (tmp_path / "images" / "MNIST" / "raw" / f"{name}-idx1-ubyte").touch()
    outcome = cli("data", f"data_dir={tmp_path}")
    assert outcome.code == 0
    lines = {
        line.split()[1]: line for line in outcome.out.splitlines() if line.startswith("│") and line.split()[1] != "│"
    }
    assert "yes" in lines["mnist"]
    assert "yes" in lines["digits"]
    assert " no " in lines["cifar10"]
    assert "data_batch_1" in lines["cifar10"]


def test_audit_shows_what_hard_negatives_couple(cli: Cli) -> None:
    run = cli("audit", "algorithm=forward_forward", "algorithm.negatives=hard")
    assert run.code == 0
    lines = run.out.splitlines()
    assert "layer2, readout" in next(line for line in lines if "layer1" in line)
    assert "readout" in next(line for line in lines if line.startswith("│ layer2"))


def test_an_interrupted_comparison_goes_on(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_records: ReadRecords
) -> None:
    """The second of four runs is stopped; then the first is taken over, the second goes on, and two are trained."""
    from locallearn.study import compare as study
    from locallearn.study.train import Interrupted, run

    begun: list[str] = []

    def stopped(plan: Any) -> Path:
        begun.append(f"{plan.names['algorithm']} {plan.seed}")
        if len(begun) == 2:
            steps = iter(range(3))
            updates = plan.algorithm.updates

            def stop(batch: Batch) -> Iterator[Update]:
                if next(steps, None) is None:
                    raise Interrupted
                yield from updates(batch)

            plan.algorithm.updates = stop
        return run(plan)

    monkeypatch.setattr(study, "run", stopped)
    words = (*_TWO, "trainer.checkpoint_s=1e-6", "trainer.max_epochs=2")
    outcome = cli("compare", *words)
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == "locallearn: interrupted; the same command with compare.resume=true goes on"
    assert begun == ["backprop 0", "mono_forward 0"]
    outcome = cli("compare", *words, "compare.resume=true")
    assert outcome.code == 0
    assert begun[2:] == ["mono_forward 0", "backprop 1", "mono_forward 1"]
    assert "locallearn: 1 of 4 runs are taken over from runs, 1 is gone on with\n" in outcome.err
    found = read_records(tmp_path / "runs")
    assert [record["status"] for record in found] == ["done", "interrupted", "done", "done", "done"]
    assert found[2]["resumed_from"] == found[1]["id"]
    page = (tmp_path / "runs" / "report.html").read_text(encoding="utf-8")
    assert all(record["id"] in page for record in found if record["status"] == "done")
    assert "locallearn: 4 of 4 runs are taken over from runs\n" in cli("compare", *words, "compare.resume=true").err
    assert len(begun) == 5  # there was nothing left
    changed = cli("compare", *words, "compare.resume=true", "optimizer.lr=3e-4")
    assert "locallearn: 0 of 4 runs are taken over from runs: the newest there differs in optimizer.lr\n" in changed.err
    assert len(begun) == 9  # other settings, other runs
    for path in (tmp_path / "runs").glob("*/record.json"):  # as a trial of a search leaves it
        record = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**record, "test": {}}), encoding="utf-8")
    untested = cli("compare", *words, "compare.resume=true")
    assert "locallearn: 0 of 4 runs are taken over from runs, 1 is gone on with\n" in untested.err
    assert len(begun) > 9


def test_folders_in_the_home_folder_and_records_that_cannot_be_read(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cli("train", 'runs_dir="~/runs"').code == 0
    runs = tmp_path / "home" / "runs"
    (broken := runs / "broken").mkdir()
    (broken / "record.json").write_text("{", encoding="utf-8")
    assert "ends in .html" in cli("report", 'runs_dir="~/runs"', "report.out=page.pdf").err
    outcome = cli("report", 'runs_dir="~/runs"', 'report.out="~/page.html"')
    assert outcome.code == 0
    assert outcome.err == "locallearn: 1 record left out, the page says why\n"
    assert (tmp_path / "home" / "page.html").is_file()
    assert not (tmp_path / "~").exists()


def test_a_refusal_names_the_arm_as_it_was_written(cli: Cli) -> None:
    outcome = cli("compare", 'compare.algorithms=[backprop,"zeroth_order(variant=fzoo,n=1)"]')
    assert outcome.code == 2
    assert outcome.err.startswith("locallearn: zeroth_order(variant=fzoo,n=1): ")
    assert "n is 1 on one side" in outcome.err
