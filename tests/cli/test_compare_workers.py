"""``compare.workers``: runs side by side are those of one process, and nothing is lost with a process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from locallearn.cli.terminal import Progress
from tests.cli.conftest import Cli

ReadRecords = Callable[[Path], list[dict[str, Any]]]
WORDS = ("trainer.max_epochs=2", "trainer.checkpoint_s=1e-6")
_TWO = "compare.algorithms=[backprop,mono_forward]"
# Mono-Forward, but the first process that is at its 15th step is killed there, as by a machine without memory.
_KILLER = """
import os, signal
from pathlib import Path

from locallearn.algorithms import MonoForward


class Killer(MonoForward):
    steps = 0

    def updates(self, batch):
        self.steps += 1
        if self.steps == 15 and batch.index is not None and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().updates(batch)
"""


def _left(runs: Path, record: dict[str, Any]) -> tuple[Any, ...]:
    """What a run left that depends on no clock: weights, figures, curves."""
    folder = runs / record["id"]
    weights = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
    lines = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    return (
        {name: value.numpy().tobytes() for name, value in weights.items() if isinstance(value, torch.Tensor)},
        *(record["validation"], record["test"], record["epochs"], record["cost"]["train_flops"]),
        [line for line in lines if ",cost/train_s," not in line],
    )


Alone = dict[tuple[str, int], tuple[Any, ...]]


def _alone(cli: Cli, tmp_path: Path, read_records: ReadRecords, seeds: str) -> Alone:
    """What the runs leave when they are run one after another, in one process."""
    assert cli("compare", *WORDS, seeds, _TWO, "runs_dir=alone").code == 0
    return {(r["algorithm"], r["seed"]): _left(tmp_path / "alone", r) for r in read_records(tmp_path / "alone")}


def test_runs_side_by_side_are_bit_by_bit_those_of_one_process(
    cli: Cli, tmp_path: Path, read_records: ReadRecords
) -> None:
    seeds = "compare.seeds=[3]"
    alone = _alone(cli, tmp_path, read_records, seeds)
    outcome = cli("compare", *WORDS, seeds, _TWO, "runs_dir=both", "compare.workers=2")
    assert outcome.code == 0
    found = read_records(tmp_path / "both")
    assert {(r["algorithm"], r["seed"]): _left(tmp_path / "both", r) for r in found} == alone
    assert len(alone) == 2
    assert {record["hardware"]["workers"] for record in found} == {2}
    assert {record["hardware"]["threads"] for record in found} == {max(1, torch.get_num_threads() // 2)}
    assert "2 processes shared" in " ".join(outcome.out.split())
    assert "backprop seed 3: epoch" in outcome.err


@pytest.mark.slow
def test_a_killed_process_costs_its_run_alone_which_goes_on_later(
    cli: Cli, tmp_path: Path, read_records: ReadRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "killing.py").write_text(_KILLER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    seeds = "compare.seeds=[0,1]"
    alone = _alone(cli, tmp_path, read_records, seeds)
    killer = 'compare.algorithms=[backprop,mono_forward,"mono_forward(_target_=killing.Killer)"]'
    outcome = cli("compare", *WORDS, seeds, killer, "runs_dir=both", "compare.workers=2")
    assert outcome.code == 1
    told = [line for line in outcome.err.splitlines() if line.startswith("locallearn: ")]
    assert len(told) == 1
    assert "(_target_=killing.Killer) seed" in told[0]
    assert "was lost, its process was killed (signal 9); the same command with compare.resume=true goes on" in told[0]
    found = read_records(tmp_path / "both")
    assert sorted(record["status"] for record in found) == ["done"] * 5 + ["interrupted"]
    assert "1 of 2" in outcome.out  # the killed run stands in its row
    for record in found:
        if record["variant"] is None:
            assert _left(tmp_path / "both", record) == alone[record["algorithm"], record["seed"]]

    outcome = cli("compare", *WORDS, seeds, killer, "runs_dir=both", "compare.resume=true")
    assert outcome.code == 0
    found = read_records(tmp_path / "both")
    assert len(found) == 7  # the killed run went on, and nothing else was run
    (resumed,) = [record for record in found if record["resumed_from"]]
    assert _left(tmp_path / "both", resumed)[:3] == alone["mono_forward", resumed["seed"]][:3]


@pytest.mark.slow
def test_ctrl_c_stops_every_process_with_a_checkpoint(
    cli: Cli, tmp_path: Path, read_records: ReadRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    training: set[str] = set()

    def pressed(_: Progress, name: str, *__: Any) -> None:
        training.add(name)
        if len(training) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    words = ("compare.seeds=[0]", _TWO, "compare.workers=2", "trainer.max_epochs=200", "schedule.patience=null")
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "_show", pressed)
        outcome = cli("compare", *words)
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == "locallearn: interrupted; the same command with compare.resume=true goes on"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    found = read_records(tmp_path / "runs")
    assert [record["status"] for record in found] == ["interrupted"] * 2
    assert not list((tmp_path / "runs").glob(".*.part"))  # each ended by itself
    assert all((tmp_path / "runs" / record["id"] / "resume.ckpt").is_file() for record in found)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["compare.workers=0"], "compare.workers is 0, expected a whole number of at least 1"),
        (["compare.workers=two"], "compare.workers is two, expected a whole number"),
        (["compare.workers=2", "meter=all"], "nvml, rapl, codecarbon would count the joules of all runs"),
        (["compare.workers=2", "meter=measured"], "set meter=none, or compare.workers=1"),
        (["compare.workers=2", "compare.mode=target", "compare.target=0.9"], "in mode target seconds and joules"),
        (
            ["compare.table=results.doc"],
            "results.doc is no name for a table, expected one that ends in .csv, .md, .tex",
        ),
        (["compare.table=[a.csv,3]"], "expected a file that ends in .csv, .md, .tex, .json, or a list"),
        (["compare.table=[a.csv,no/such/a.csv]"], "compare.table is no/such/a.csv, but there is no folder no: make it"),
        (["compare.report=no/such/a.html"], "compare.report is no/such/a.html, but there is no folder no: make it"),
        (["compare.controls=everything"], "expected true for all, false for none, or a list of backprop, deep_super"),
        (["compare.controls=[checkpoint]"], "compare.controls is ['checkpoint'], expected true for all"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    words: list[str], sentence: str, cli: Cli, tmp_path: Path
) -> None:
    outcome = cli("compare", *words)
    assert outcome.code == 2
    assert sentence in " ".join(outcome.err.split())
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
