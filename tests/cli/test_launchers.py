"""``train -m`` and ``tune -m`` with a launcher whose jobs are other processes: their outcome is that of the basic launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli import apart
from tests.cli.conftest import Cli

APART = "hydra/launcher=apart"
TINY = ("dataset.limit_train=100", "net.hidden=[8]", "trainer.probe_samples=0", "meter=none", "trainer.accelerator=cpu")
# Backpropagation, but with seed 1 its process is killed, as by a machine without memory.
_KILLER = """
import os, signal

from locallearn.algorithms import Backprop


class Killer(Backprop):
    def updates(self, batch):
        if self.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().updates(batch)
"""


@pytest.fixture(autouse=True)
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    apart.offer(monkeypatch)


def test_a_sweep_tells_which_jobs_failed_and_gives_the_table_of_the_rest(cli: Cli, tmp_path: Path) -> None:
    """What a job's process prints does not reach the terminal, as on a cluster: this one tells what went wrong, once."""
    outcome = cli("train", "-m", APART, *TINY, "optimizer.lr=1e-3,-1", "compare.table=table.csv")
    assert outcome.code == 2
    assert [line for line in outcome.err.splitlines() if "Invalid" in line] == [
        "locallearn: optimizer.lr=-1: the optimizer cannot be made: Invalid learning rate: -1"
    ]
    assert "Invalid" not in (tmp_path / "printed.txt").read_text(encoding="utf-8")
    assert "mono_forward" in (tmp_path / "table.csv").read_text(encoding="utf-8")
    assert "test accuracy" in outcome.out
    [run] = (tmp_path / "runs").iterdir()  # the launch's folder is gone
    assert f"runs/{run.name}" in (tmp_path / "printed.txt").read_text(encoding="utf-8")


def test_a_job_whose_process_dies_is_named_and_costs_no_other_its_row(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "killer.py").write_text(_KILLER, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    words = ["algorithm=backprop", "algorithm._target_=killer.Killer", "seed=0,1,2", "compare.table=table.csv"]
    outcome = cli("train", "-m", APART, *TINY, *words)
    assert outcome.code == 1
    [told] = [line for line in outcome.err.splitlines() if "gave up" in line]
    assert "job 1 ended with -9" in told
    assert "died or had not ended: seed=1; combinations that had not begun are left out" in told
    assert "test accuracy" in outcome.out
    assert (tmp_path / "table.csv").is_file()
    [launch] = (tmp_path / "runs").glob(".launch-*")  # and what may tell why is kept
    assert told.endswith(f"more is in {launch}")
    assert "job 1 ended with -9" in (launch / "error.txt").read_text(encoding="utf-8")
    assert cli("report").code == 0
    assert ".launch" not in (tmp_path / "runs" / "report.html").read_text(encoding="utf-8")


def test_jobs_find_an_experiment_that_is_a_file_under_runs_dir(cli: Cli, tmp_path: Path) -> None:
    """Another machine has another folder for temporary files, and shares this one."""
    (tmp_path / "mine.yaml").write_text("# @package _global_\nnet: {hidden: [6]}\n", encoding="utf-8")
    words = ["experiment=mine.yaml", "tune.algorithms=[backprop]", "tune.trials=1", "runs_dir=my runs?"]
    outcome = cli("tune", "-m", APART, *TINY, "trainer.max_epochs=1", *words, "tune.worker=0,1")
    assert outcome.code == 0
    [history] = (tmp_path / "my runs?" / "tune").glob("*/tune.json")
    command = json.loads(history.read_text(encoding="utf-8"))["command"]
    assert f"file://{tmp_path}/my runs?/.launch-" in command
    assert outcome.out.count("best of 1 trials each") == 1
    train, compare = outcome.out.splitlines()[-2:]
    assert train.startswith("locallearn train 'experiment=my runs?/tune/")
    assert compare.startswith("locallearn compare 'experiment=my runs?/tune/")
    assert "searchpath" not in outcome.out  # of a folder that is gone
    assert not list((tmp_path / "my runs?").glob(".launch-*"))
    assert "best of" not in (tmp_path / "printed.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("launcher", [(), (APART,)])
def test_mistakes_in_a_launched_search_have_the_same_exit_code(
    launcher: tuple[str, ...], cli: Cli, tmp_path: Path
) -> None:
    words = ["tune.algorithms=[backprop]", "tune.trials=1", "tune.space={optimizer.lr:{low:-2,high:-1}}"]
    outcome = cli("tune", "-m", *launcher, *TINY, *words, "tune.worker=0,1")
    assert outcome.code == 2
    assert outcome.err.splitlines() == [
        f"locallearn: tune.worker={worker}: the optimizer cannot be made: Invalid learning rate: -2.0"
        for worker in (0, 1)
    ]
    assert not (tmp_path / "runs").exists()
