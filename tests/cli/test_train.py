"""``locallearn train``: the record it leaves, sweeps, failure, and runs side by side."""

from __future__ import annotations

import csv
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from locallearn.records import COST_COLUMNS, TEMPLATE
from locallearn.study._callbacks import _Keeper
from tests.cli.conftest import Cli

ReadRecords = Callable[[Path], list[dict[str, Any]]]
_CLAIMS = {
    "backprop": "global",
    "deep_supervision": "global",
    "mono_forward": "layer-local",
    "forward_forward": "layer-local",
}


@pytest.mark.parametrize("algorithm", list(_CLAIMS))
def test_every_algorithm_leaves_a_complete_record(algorithm: str, cli: Cli, tmp_path: Path) -> None:
    outcome = cli("train", f"algorithm={algorithm}", "seed=3", "meter=all")
    assert outcome.code == 0
    assert outcome.folder.parent == Path("runs")
    assert sorted(path.name for path in outcome.folder.iterdir()) == ["csv", "metrics.csv", "model.pt", "record.json"]
    record = outcome.record
    assert set(record) >= set(TEMPLATE)
    assert "process" not in record
    assert (record["algorithm"], record["dataset"], record["net"]) == (algorithm, "digits", "mlp")
    assert (record["seed"], record["status"], record["mode"]) == (3, "done", "own")
    assert record["locality"] == _CLAIMS[algorithm]
    for part in ("validation", "test"):
        assert 0 <= record[part]["accuracy"] <= 1
    assert set(record["cost"]) == {*COST_COLUMNS, "energy_j", "stages", "uncounted"}
    assert len(record["energy"]) >= 2  # counters and a model, readable or not
    for reading in record["energy"]:
        assert reading["quality"] in ("measured", "modelled")
        assert reading["joules"] is not None or reading["reason"]
    assert record["command"].startswith("locallearn train ")
    assert f"algorithm={algorithm}" in record["command"]
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["hardware"]["threads"] >= 1
    assert record["config"]["seed"] == 3
    assert record["config"]["dataset"]["seed"] == 3
    assert not list(tmp_path.glob("runs/.*"))


def test_metrics_hold_loss_and_probe_of_every_block(cli: Cli) -> None:
    outcome = cli("train", "trainer.max_epochs=2")
    rows = list(csv.DictReader((outcome.folder / "metrics.csv").read_text(encoding="utf-8").splitlines()))
    for name in ("layer1", "layer2"):
        for figure in ("loss", "probe_accuracy"):
            found = [row for row in rows if row["name"] == f"block/{name}/{figure}"]
            assert [row["epoch"] for row in found] == ["0", "1"]
            assert all(float(row["value"]) >= 0 for row in found)
    steps = [int(row["step"]) for row in rows if row["name"] == "validation/accuracy"]
    assert steps == [21, 42]  # ceil(1293 / 64) batches in an epoch


def test_the_same_command_twice_gives_the_same_figures_in_two_folders(cli: Cli) -> None:
    first, second = (cli("train", "algorithm=forward_forward", "algorithm.negatives=hard") for _ in range(2))
    assert first.folder != second.folder
    assert first.record["test"] == second.record["test"]
    assert first.record["validation"] == second.record["validation"]
    other = cli("train", "algorithm=forward_forward", "algorithm.negatives=hard", "seed=1")
    assert other.record["test"] != first.record["test"]


@pytest.mark.parametrize("algorithm", ["mono_forward", "forward_forward"])
def test_sequential_with_and_without_a_cache(algorithm: str, cli: Cli) -> None:
    words = [f"algorithm={algorithm}", "schedule=sequential", "schedule.patience=null"]
    plain, cached = cli("train", *words), cli("train", *words, "schedule.cache=true")
    assert plain.code == 0
    assert plain.record["epochs"][:2] == [1, 1]
    if algorithm == "mono_forward":
        assert cached.record["test"] == plain.record["test"]
    else:
        assert cached.code == 2  # negatives are drawn anew: there is nothing to keep
        assert "cache" in cached.err


def test_settings_reach_the_run(cli: Cli) -> None:
    record = cli("train", "net.hidden=[5,6,7]", "net.readout_bias=true", "trainer.precision=bf16-mixed").record
    assert record["blocks"] == ["layer1", "layer2", "layer3"]
    assert record["cost"]["params"] == 65 * 5 + 6 * 6 + 7 * 7 + 8 * 10
    assert record["config"]["trainer"]["precision"] == "bf16-mixed"


def test_divergence_is_told_and_recorded(cli: Cli) -> None:
    outcome = cli("train", "optimizer=sgd", "optimizer.lr=1e30")
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert "unit 'layer" in outcome.err
    assert " at step " in outcome.err
    assert outcome.record["status"] == "failed"
    assert outcome.record["error"] in outcome.err


def test_a_sweep_runs_every_combination_and_leaves_nothing_but_records(
    cli: Cli, tmp_path: Path, read_records: ReadRecords
) -> None:
    outcome = cli("train", "-m", "algorithm=backprop,mono_forward", "seed=0,1")
    assert outcome.code == 0
    found = read_records(tmp_path / "runs")
    assert [(record["algorithm"], record["seed"]) for record in found] == [
        ("backprop", 0),
        ("backprop", 1),
        ("mono_forward", 0),
        ("mono_forward", 1),
    ]
    assert all(record["status"] == "done" for record in found)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    lines = outcome.out.splitlines()
    assert lines[:4] == [f"runs/{record['id']}" for record in found]
    table = "\n".join(lines[4:])  # as compare prints it
    assert "digits · mlp · mode own" in table
    ratio = found[2]["cost"]["train_flops"] / found[0]["cost"]["train_flops"]
    assert f"{ratio:.2f}\N{MULTIPLICATION SIGN}" in table
    assert outcome.err.splitlines()[-1] == "locallearn: a page of all runs there: locallearn report runs"


def test_one_bad_combination_does_not_end_a_sweep(
    cli: Cli, tmp_path: Path, read_records: ReadRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    outcome = cli("train", "-m", "optimizer=sgd", "optimizer.lr=1e30,1e-2")
    assert outcome.code == 1
    assert [record["status"] for record in read_records(tmp_path / "runs")] == ["failed", "done"]
    rows = [line.strip() for line in outcome.out.splitlines()]  # the swept setting names the rows, the failed one too
    assert any(re.match(r"mono_forward · optimizer.lr=1e\+30 +0 of 1 ", row) for row in rows)
    assert any(re.match(r"mono_forward · optimizer.lr=0.01 +1 +[0-9]", row) for row in rows)


def test_a_sweep_writes_tables_and_a_page_where_they_are_asked_for(cli: Cli, tmp_path: Path) -> None:
    words = ["algorithm=backprop", "seed=0,1", "compare.table=[sweep.csv,sweep.tex]", "compare.report=page.html"]
    outcome = cli("train", "-m", *words)
    assert outcome.code == 0
    assert outcome.out.splitlines()[-3:] == ["sweep.csv", "sweep.tex", "page.html"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "sweep.csv").read_text(encoding="utf-8"), newline="")))
    assert {(row["rule"], row["n"]) for row in rows} == {("backprop", "2")}
    assert "\\toprule" in (tmp_path / "sweep.tex").read_text(encoding="utf-8")
    assert "<html" in (tmp_path / "page.html").read_text(encoding="utf-8")
    refused = cli("train", "-m", "seed=0,1", "compare.table=sweep.xlsx", "runs_dir=none")
    assert refused.code == 2
    wrong = cli("train", "-m", "optimizer.lr=-1,-2", "runs_dir=none")
    assert [line.partition(": the optimizer")[0] for line in wrong.err.splitlines()] == [
        "locallearn: optimizer.lr=-1",
        "locallearn: optimizer.lr=-2",
    ]
    assert "sweep.xlsx is no name for a table" in refused.err
    assert not (tmp_path / "none").exists()


def test_ctrl_c_ends_a_sweep(
    cli: Cli, tmp_path: Path, read_records: ReadRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(self: _Keeper, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(_Keeper, "on_train_batch_start", pressed)
    outcome = cli("train", "-m", "seed=0,1,2")
    assert outcome.code == 130
    assert [record["status"] for record in read_records(tmp_path / "runs")] == ["interrupted"]


@pytest.mark.parametrize("command", ["train", "train -m", "compare"])
def test_ctrl_c_when_a_training_is_over_lets_no_other_begin(
    command: str, cli: Cli, tmp_path: Path, read_records: ReadRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the last look at the idle machine: what has run is kept whole, and the exit code is that of an interruption."""
    end = _Keeper.on_train_end

    def pressed(self: _Keeper, *given: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        end(self, *given)

    monkeypatch.setattr(_Keeper, "on_train_end", pressed)
    words = {
        "train": ["train"],
        "train -m": ["train", "-m", "seed=0,1"],
        "compare": ["compare", "compare.seeds=[0,1]", "compare.algorithms=[backprop]"],
    }[command]
    outcome = cli(*words, "trainer.max_epochs=1")
    assert outcome.code == 130
    (record,) = read_records(tmp_path / "runs")
    assert (record["status"], "accuracy" in record["test"]) == ("done", True)
    said = {"compare": "interrupted; the same command with compare.resume=true goes on"}.get(
        command, f"interrupted when the training was over: the run is done, runs/{record['id']} holds all of it"
    )
    assert outcome.err.splitlines()[-1] == f"locallearn: {said}"


def test_a_run_s_figures_are_a_table_in_its_folder(cli: Cli) -> None:
    """The default logger: a row per epoch, a last one of what all has cost."""
    outcome = cli("train")
    assert outcome.code == 0
    lines = (outcome.folder / "csv" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert {"epoch", "step", "validation/accuracy", "test/accuracy", "cost/train_s"} <= set(lines[0].split(","))
    assert len(lines) == 3


@pytest.mark.slow
def test_parallel_runs_in_one_folder_do_not_collide(
    tmp_path: Path, small: tuple[str, ...], read_records: ReadRecords
) -> None:
    command = [sys.executable, "-m", "locallearn.cli", "train", *small, "trainer.max_epochs=2"]
    running = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    folders = [out.splitlines()[-1] for out, _ in outputs]
    found = read_records(tmp_path / "runs")
    assert len(set(folders)) == len(found) == 2
    assert found[0]["test"] == found[1]["test"]
    assert all("Traceback" not in err and "Warning" not in err for _, err in outputs)


def test_a_simulated_rule_says_so_and_leaves_its_costs_empty(cli: Cli) -> None:
    outcome = cli("train", "algorithm=forward_gradient", "algorithm.guess=local", "algorithm.simulated=true")
    assert outcome.code == 0
    assert "finds the target by backpropagation" in " ".join(outcome.err.split())
    record = outcome.record
    assert record["variant"].startswith("simulated=true")
    cost = record["cost"]
    assert (cost["train_s"], cost["train_flops"], cost["activation_peak_bytes"]) == (None, None, None)
    assert (record["energy"], cost["energy_j"]) == ([], {})
    assert cost["stages"][0]["train_flops"] is None
    assert cost["inference_flops"] > 0  # prediction is the network's own
    assert any(note.startswith("simulated=true") for note in record["notes"])
    assert "train_s" not in (outcome.folder / "metrics.csv").read_text(encoding="utf-8")
    refused = cli("bench", 'bench.algorithms=[backprop,"forward_gradient(guess=local,simulated=true)"]')
    assert refused.code == 2
    assert "cannot be benched: simulated=true" in " ".join(refused.err.split())
    honest = cli("train", "algorithm=forward_gradient", "algorithm.guess=local").record
    assert honest["cost"]["train_s"] > 0
    assert honest["test"] == record["test"]  # the same steps up to rounding
