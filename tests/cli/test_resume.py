"""Stopping a real process in three ways, and going on from what it left."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from locallearn.cli.mistakes import explain
from locallearn.cli.saved import move
from locallearn.cli.settings import compose_settings
from locallearn.records import RunFolder, recover
from locallearn.study._callbacks import _Keeper
from locallearn.study.train import Interrupted
from tests.cli.conftest import SMALL, Cli, Outcome
from tests.terminals import lost

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
            if "epoch " in line:  # which one it tells is a matter of speed
                while not list((place / "runs").glob(".*.part/resume.ckpt")) and process.poll() is None:
                    time.sleep(0.01)
                process.send_signal(number)
                break
        out, err = process.communicate(timeout=300)
    return place, process.returncode, out, err


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, str, str]]:
    """One process for every signal, stopped once it has a checkpoint: place, exit code, standard output, error."""
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
    assert _curve(resumed.folder) == _curve(whole.folder)
    assert _curve(resumed.folder)


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
    assert sorted(path.name for path in folder.iterdir()) == ["csv", "metrics.csv", "record.json", "resume.ckpt"]
    assert (
        err.splitlines()[-1] == f"locallearn: interrupted; go on with: locallearn train resume={out.splitlines()[-1]}"
    )

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for word in ("seed=1", "algorithm=backprop", "net.hidden=[8]"):
        refused = cli("train", f"resume={folder}", word)
        assert refused.code == 2
        assert f"'{word}' cannot be changed on resume" in refused.err

    resumed = cli("train", f"resume={folder}", f"runs_dir={place / 'runs'}")
    _check_resumed(resumed, whole, folder.name)
    assert {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file()
    } == before  # what was left is left alone


def test_a_lost_terminal_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    """As a termination does; and what is said to nobody is no error."""
    settings = (*SMALL, *_SETTINGS, "trainer.max_epochs=100000")
    assert lost(["-m", "locallearn.cli", "train", *settings], tmp_path, "validation ") == 130
    (folder,) = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    assert _read(folder)["status"] == "interrupted"
    assert (folder / "resume.ckpt").is_file()


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


def test_a_finished_run_cannot_be_resumed(cli: Cli, tmp_path: Path) -> None:
    finished = cli("train", "dataset.limit_train=64")
    count = len(list((tmp_path / "runs").iterdir()))
    refused = cli("train", f"resume={finished.folder}")
    assert refused.code == 2
    assert refused.err == f"locallearn: {finished.folder} is done: only an interrupted or failed run can be resumed\n"
    assert len(list((tmp_path / "runs").iterdir())) == count


def test_a_run_that_failed_before_its_first_checkpoint_says_so(cli: Cli, tmp_path: Path) -> None:
    failed = cli("train", "optimizer=sgd", "optimizer.lr=1e30")
    refused = cli("train", f"resume={failed.folder}")
    assert refused.code == 2
    assert "resume.ckpt" in refused.err


# -- in this process: folders as they are left, checkpoints as they are found ----------------------------------------------


@pytest.fixture
def killed(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The part folder of a run whose process was killed in its second epoch, in the middle of the data."""

    def dies(self: _Keeper, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 10:
            raise SystemError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(_Keeper, "on_train_batch_start", dies)
        patch.setattr(RunFolder, "finish", lambda folder, *_: folder.abandon())
        cli("train", *_SHORT)
    (part,) = (tmp_path / "runs").glob(".*.part")
    return part.relative_to(tmp_path)


_SHORT = ("dataset.limit_train=400", "trainer.max_epochs=3", "schedule.patience=null", "trainer.checkpoint_s=1e-9")


@pytest.mark.parametrize("named", ["part", "part/", "final", "absolute", "through a link", "record", "from inside"])
def test_a_killed_run_goes_on_however_it_is_named(
    named: str, killed: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = killed.parent / killed.name[1:-5]
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    if named == "from inside":
        monkeypatch.chdir(killed)
    word = {
        "part": str(killed),
        "part/": f"{killed}/",
        "final": str(final),
        "absolute": str(tmp_path / killed),
        "through a link": str(Path("link") / killed.name),
        "record": str(killed / "record.json"),
        "from inside": ".",
    }[named]
    if named != "part":  # the others need not train to the end
        monkeypatch.setattr("locallearn.cli.train._train_once", lambda cfg, *_: print(cfg.resume) or 0)
        outcome = cli("train", f"resume={word}")
        assert outcome.code == 0, outcome.err
        assert Path(outcome.out.strip()).resolve().samefile(tmp_path / final)
        return
    resumed = cli("train", f"resume={word}")
    assert resumed.code == 0, resumed.err
    whole = cli("train", *_SHORT)
    assert not killed.exists()
    assert _read(final)["status"] == "interrupted"
    record, expected = resumed.record, whole.record
    assert record["resumed_from"] == final.name
    assert record["test"] == expected["test"]
    assert record["cost"]["samples"] == expected["cost"]["samples"]
    assert _curve(resumed.folder) == _curve(whole.folder)  # all of it, the loss of the interrupted epoch as well
    (part,) = record["parts"]
    left = _read(final)
    assert part == {**{key: left[key] for key in ("hardware", "versions", "source", "started")}, "epochs": 1}
    assert expected["parts"] == []


def test_the_parts_of_a_run_that_was_resumed_twice_are_all_named(
    killed: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(keeper: Any, trainer: Any) -> None:
        save(keeper, trainer)
        if trainer.global_step == 16:
            raise Interrupted

    save = _Keeper._save_or_stop
    with monkeypatch.context() as patch:
        patch.setattr(_Keeper, "_save_or_stop", stop)
        second = cli("train", f"resume={killed}")
    assert second.code == 130
    third = cli("train", f"resume={second.folder}")
    assert third.code == 0, third.err
    whole = cli("train", *_SHORT)
    assert _curve(third.folder) == _curve(whole.folder)
    parts = third.record["parts"]
    assert [part["epochs"] for part in parts] == [1, 1]
    assert parts[0] == second.record["parts"][0]
    assert parts[1]["started"] == second.record["started"]
    assert [record["serial"] for record in (_read(killed.parent / killed.name[1:-5]), second.record, third.record)] == [
        1,
        2,
        3,
    ]


def test_a_run_that_is_still_going_on_is_left_alone(cli: Cli, tmp_path: Path) -> None:
    mine = RunFolder.create(tmp_path / "runs", {"algorithm": "a", "dataset": "d", "seed": 0})
    for word in (mine.path, mine.path.parent / mine.path.name[1:-5]):
        refused = cli("train", f"resume={word}")
        assert refused.code == 2
        assert "still going on in another process" in refused.err
    assert mine.path.is_dir()


def test_a_run_that_was_killed_before_its_record_says_so(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "runs" / ".early.part").mkdir(parents=True)
    for word in ("runs/.early.part", "runs/early"):
        refused = cli("train", f"resume={word}")
        assert refused.code == 2
        assert "before its first record was written" in refused.err
    assert "there is no folder runs/none" in cli("train", "resume=runs/none").err
    assert "before its first record" in cli("report", "runs").err  # told, whoever comes by


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_that_cannot_be_gone_on_from_is_one_sentence(killed: Path, cli: Cli, tmp_path: Path) -> None:
    recover(killed.parent)
    folder = killed.parent / killed.name[1:-5]
    good = (folder / "resume.ckpt").read_bytes()
    loaded = torch.load(folder / "resume.ckpt", weights_only=True)

    def saved(value: Any) -> bytes:
        torch.save(value, tmp_path / "odd")
        return (tmp_path / "odd").read_bytes()

    state = dict(loaded["state_dict"])
    state.popitem()
    odd = {
        "empty": b"",
        "html": b"<html>not found</html>",
        "zeros": bytes(1000),
        "cut": good[: len(good) // 2],
        "head": b"PK\x03\x04" + bytes(900),
        "weights only": saved({"w": torch.zeros(2)}),
        "a tensor": saved(torch.zeros(2)),
        "lightning's": saved({**loaded, "callbacks": {}}),
        "another network": saved({**loaded, "state_dict": state}),
        "no state": saved({**loaded, "state_dict": 3}),
        "no optimizers": saved({**loaded, "optimizer_states": [{}]}),
    }
    for name, content in odd.items():
        (folder / "resume.ckpt").write_bytes(content)
        before = _content(folder)
        refused = cli("train", f"resume={folder}")
        assert refused.code == 2, name
        assert len(refused.err.splitlines()) == 1, refused.err
        assert str(folder / "resume.ckpt") in refused.err, name
        assert "weights_only" not in refused.err, name
        assert _content(folder) == before, name
    (folder / "resume.ckpt").write_bytes(good)
    assert cli("train", f"resume={folder}").code == 0


# -- full disks --------------------------------------------------------------------------------------------------------------


def _full(path: Any) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_ends_a_run_with_its_reason(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_with, log, steps = RunFolder.write_with, RunFolder.log, iter(range(1000))

    def second_fails(folder: RunFolder, name: str, write: Any) -> None:
        if name == "resume.ckpt" and next(steps) >= 1:
            raise _full(folder.path / name)
        write_with(folder, name, write)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_with", second_fails)
        failed = cli("train", *_SHORT)
    assert failed.code == 2
    assert "Traceback" not in failed.err
    assert "the disk is full" in failed.err
    assert f"go on with: locallearn train resume={failed.folder}" in failed.err
    assert failed.record["status"] == "failed"
    assert "No space left" in failed.record["error"]
    resumed = cli("train", f"resume={failed.folder}")
    assert resumed.code == 0, resumed.err
    whole = cli("train", *_SHORT)
    assert _curve(resumed.folder) == _curve(whole.folder)

    def full_log(folder: RunFolder, *given: Any) -> None:
        raise _full(folder.path / "metrics.csv")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", full_log)
        failed = cli("train", "dataset.limit_train=64")
    assert failed.code == 2
    assert "metrics.csv could not be written" in failed.err
    assert "has to start again" in failed.err
    assert failed.record["status"] == "failed"
    assert log is RunFolder.log


@pytest.mark.parametrize("what", ["model.pt", "the last record", "every record", "the new name"])
def test_the_reason_is_not_masked_by_the_failure_to_write_it(
    what: str, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    update, rename, write_with = RunFolder.update, Path.rename, RunFolder.write_with

    def full_update(folder: RunFolder, values: Any) -> None:
        if "status" in values or (what == "every record" and "serial" not in values):
            raise _full(folder.path / "record.json")
        update(folder, values)

    def full_rename(path: Path, target: Any) -> Any:
        if path.name.endswith(".part"):
            raise _full(target)
        return rename(path, target)

    def full_model(folder: RunFolder, name: str, write: Any) -> None:
        if name == "model.pt":
            raise _full(folder.path / name)
        write_with(folder, name, write)

    with monkeypatch.context() as patch:
        if what == "model.pt":
            patch.setattr(RunFolder, "write_with", full_model)
        elif what == "the new name":
            patch.setattr(Path, "rename", full_rename)
        else:
            patch.setattr(RunFolder, "update", full_update)
        failed = cli("train", "dataset.limit_train=64")
    assert failed.code == 2
    assert len([line for line in failed.err.splitlines() if line.startswith("locallearn: ")]) == 1
    assert "the disk is full" in failed.err
    if what == "model.pt":
        assert (failed.record["status"], "model.pt" in failed.record["error"]) == ("failed", True)
        return
    assert failed.folder.name.endswith(".part")  # where it is, and not owned by anybody any more
    (final,) = recover(tmp_path / "runs")
    assert _read(final)["status"] == ("done" if what == "the new name" else "interrupted")
    assert (_read(final)["test"] == {}) == (what == "every record")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_that_names_no_file_is_told_as_well(number: int) -> None:
    code, sentence = explain(OSError(number, os.strerror(number)), [])
    assert code == 2
    assert sentence.startswith("the disk is full: a file could not be written")


def test_a_full_disk_before_the_run_leaves_nothing(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(path: Path, content: bytes) -> None:
        raise _full(path)

    monkeypatch.setattr("locallearn.records._folder.write_file", full)
    failed = cli("train", "dataset.limit_train=64")
    assert failed.code == 2
    assert "record.json could not be written" in failed.err
    assert "make room" in failed.err
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_index_that_cannot_be_written_costs_no_page(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    cli("train", "dataset.limit_train=64")
    monkeypatch.setattr(sqlite3, "connect", full)
    outcome = cli("report")
    assert outcome.code == 0
    assert outcome.err == "locallearn: the index could not be written (database or disk is full): runs/index.sqlite\n"
    assert Path("runs/report.html").is_file()


def test_places_that_were_moved_move_what_was_taken_from_them() -> None:
    cfg, _ = compose_settings(["dataset=mnist", "logger=tensorboard", "data_dir=/there", "runs_dir=/then"])
    resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    move(resolved, "data_dir", "/here")
    move(resolved, "runs_dir", "2026")
    assert (resolved.data_dir, resolved.dataset.data_dir) == ("/here", "/here")
    assert (resolved.runs_dir, resolved.logger.save_dir) == ("2026", "2026")
    resolved.dataset.data_dir = "/elsewhere"  # said apart
    move(resolved, "data_dir", "/new")
    assert resolved.dataset.data_dir == "/elsewhere"
