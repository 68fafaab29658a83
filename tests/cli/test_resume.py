"""Stopping a real process in three ways, and going on from what it left."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import SMALL, Cli, Outcome

_SETTINGS = (
    "algorithm=forward_forward",
    "trainer.max_epochs=30",
    "schedule.patience=null",
    "trainer.checkpoint_s=0.05",
)
_SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}


def _stop(place: Path, number: signal.Signals) -> tuple[Path, int, str, str]:
    command = [sys.executable, "-m", "locallearn.cli", "train", *SMALL, *_SETTINGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch 3 of" in line:
                process.send_signal(number)
                break
        out, err = process.communicate(timeout=300)
    return place, process.returncode, out, err


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, str, str]]:
    """One process for every signal, stopped after its third epoch: place, exit code, standard output, error."""
    places = [tmp_path_factory.mktemp(name) for name in _SIGNALS]
    with ThreadPoolExecutor() as pool:
        return dict(zip(_SIGNALS, pool.map(_stop, places, _SIGNALS.values()), strict=True))


@pytest.fixture
def whole(cli: Cli) -> Outcome:
    """The same run, uninterrupted."""
    return cli("train", *_SETTINGS)


def _read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return found


def _curve(folder: Path) -> dict[tuple[str, str], str]:
    rows = csv.DictReader((folder / "metrics.csv").read_text(encoding="utf-8").splitlines())
    kept = ("block/", "validation/", "unit/")
    return {(row["epoch"], row["name"]): row["value"] for row in rows if row["name"].startswith(kept)}


def _check_resumed(resumed: Outcome, whole: Outcome, left: str) -> None:
    assert resumed.code == 0, resumed.err
    assert resumed.record["status"] == "done"
    assert resumed.record["resumed_from"] == left
    assert resumed.record["test"] == whole.record["test"]
    assert resumed.record["validation"] == whole.record["validation"]
    assert resumed.record["cost"]["samples"] == whole.record["cost"]["samples"]
    # A block's mean loss covers the part of an epoch that was run in one piece; everything later must agree to the bit.
    expected, found = _curve(whole.folder), _curve(resumed.folder)
    last = {key: value for key, value in found.items() if key[0] == "29"}
    assert last == {key: value for key, value in expected.items() if key[0] == "29"}
    assert last


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(
    name: str, stopped: dict[str, tuple[Path, int, str, str]], whole: Outcome, cli: Cli
) -> None:
    place, code, out, err = stopped[name]
    assert code == 130
    assert "Traceback" not in err
    folder = place / out.splitlines()[-1]
    record = _read(folder)
    assert record["status"] == "interrupted"
    assert record["error"]
    assert record["test"] == {}
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.csv", "record.json", "resume.ckpt"]
    assert (
        err.splitlines()[-1] == f"locallearn: interrupted; go on with: locallearn train resume={out.splitlines()[-1]}"
    )

    before = {path: path.read_bytes() for path in folder.iterdir()}
    for word in ("seed=1", "algorithm=backprop", "net.hidden=[8]"):
        refused = cli("train", f"resume={folder}", word)
        assert refused.code == 2
        assert f"'{word}' cannot be changed on resume" in refused.err

    resumed = cli("train", f"resume={folder}", f"runs_dir={place / 'runs'}")
    _check_resumed(resumed, whole, folder.name)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before  # what was left is left alone


@pytest.mark.slow
def test_a_killed_run_is_recovered(stopped: dict[str, tuple[Path, int, str, str]], whole: Outcome, cli: Cli) -> None:
    place, code, out, _ = stopped["SIGKILL"]
    assert code == -signal.SIGKILL
    assert out == ""
    (part,) = (place / "runs").glob(".*.part")
    folder = place / "runs" / part.name.removeprefix(".").removesuffix(".part")
    resumed = cli("train", f"resume={folder}", f"runs_dir={place / 'runs'}")
    assert _read(folder)["status"] == "interrupted"
    assert not part.exists()
    _check_resumed(resumed, whole, folder.name)


def test_a_finished_run_cannot_be_resumed(whole: Outcome, cli: Cli, tmp_path: Path) -> None:
    count = len(list((tmp_path / "runs").iterdir()))
    refused = cli("train", f"resume={whole.folder}")
    assert refused.code == 2
    assert refused.err == f"locallearn: {whole.folder} is done: only an interrupted or failed run can be resumed\n"
    assert len(list((tmp_path / "runs").iterdir())) == count


def test_a_run_that_failed_before_its_first_checkpoint_says_so(cli: Cli, tmp_path: Path) -> None:
    failed = cli("train", "optimizer=sgd", "optimizer.lr=1e30")
    refused = cli("train", f"resume={failed.folder}")
    assert refused.code == 2
    assert "resume.ckpt" in refused.err
