"""The queue of rows for a GPU is rehearsed here, on few samples and a CPU."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from locallearn.cli.arms import arms_of
from locallearn.cli.plans import make_plan
from locallearn.cli.settings import compose_settings
from tests.terminals import lost

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

import gpu
import gpu_queue

DOCS = Path(__file__).parents[2] / "docs"


def test_entries_have_a_name_each() -> None:
    names = [entry.name for entry in gpu_queue.queue()]
    assert len(names) == len(set(names))


@pytest.mark.once
@pytest.mark.parametrize("entry", gpu_queue.queue(), ids=lambda entry: entry.name)
def test_every_arm_can_be_made(entry: Any) -> None:
    """Its settings compose, and make a run's objects and its optimizer."""
    command, *words = gpu_queue.rehearsed(entry.words)
    base, _, arms, shared = arms_of(command, [*words, "trainer.accelerator=cpu", "meter=none"])
    for arm in arms:
        own = (base.compare.overrides or {}).get(arm.text, [])
        cfg, choices = compose_settings([*shared, *arm.overrides, *own])
        make_plan(cfg, choices, "", arm).optimizer([torch.nn.Parameter(torch.zeros(1))])


def test_a_rehearsal_leaves_records_in_one_archive_and_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tiny", "--data", "digits", "--accelerator", "cpu", "--out", str(tmp_path), "--only", "joules_mnist"]
    assert gpu.main(words) == 0
    with tarfile.open(tmp_path / "records.tar.gz") as archive:
        records = [name for name in archive.getnames() if name.endswith("record.json")]
    assert len(records) == 2
    capsys.readouterr()
    assert gpu.main(words) == 0
    assert "done: 0; left: nothing" in capsys.readouterr().out


def _queue_of(monkeypatch: pytest.MonkeyPatch, script: str, *names: str, seconds: int = 5) -> None:
    """A queue of entries that run a line of Python in place of ``locallearn``."""
    monkeypatch.setattr(gpu, "queue", lambda: [gpu_queue.Entry(name, seconds, (script,), alone=True) for name in names])
    monkeypatch.setattr(gpu, "LOCALLEARN", (sys.executable, "-c", "import sys; exec(sys.argv[1])"))


WRITES = """
import pathlib, sys
(*_, place) = sys.argv
folder = pathlib.Path(place.partition("=")[2]) / "run"
folder.mkdir(parents=True, exist_ok=True)
for name in ("record.json", "model.pt", "index.sqlite"):
    (folder / name).write_text("{}")
"""
SLEEPS = WRITES + "import time; print('began', flush=True); time.sleep(60)"


def _call(tmp_path: Path, *words: str) -> int:
    code: int = gpu.main(["--accelerator", "cpu", "--out", str(tmp_path), *words])
    return code


def test_done_is_what_ran_with_just_these_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rehearsal, or an entry whose settings were another's, is not the row."""
    _queue_of(monkeypatch, WRITES, "a")
    assert _call(tmp_path) == 0
    with tarfile.open(tmp_path / "records.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["logs/a.txt", "records/a/run/record.json"]
    assert "done: 1" in capsys.readouterr().out
    assert _call(tmp_path) == 0
    assert "done: 0; left: nothing" in capsys.readouterr().out
    _queue_of(monkeypatch, WRITES + "# other", "a")
    assert _call(tmp_path) == 0
    out = capsys.readouterr().out
    assert "records of other settings are now in" in out
    assert "done: 1" in out
    assert (tmp_path / "records" / "a.1" / "run" / "record.json").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whoever_ends_the_queue_ends_its_processes_and_has_the_archive(
    how: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _queue_of(monkeypatch, SLEEPS, "a", "b")
    usual = signal.signal(how, signal.default_int_handler)  # a process in the background may be deaf to it

    def interrupt() -> None:
        log = tmp_path / "logs" / "a.txt"
        while not log.exists() or "began" not in log.read_text(encoding="utf-8"):
            time.sleep(0.05)
        os.kill(os.getpid(), how)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        assert _call(tmp_path) == 130
    finally:
        signal.signal(how, usual)
    out = capsys.readouterr().out
    assert "a: " in out  # its end was seen
    assert "left: a, b; failed: nothing" in out
    with tarfile.open(tmp_path / "records.tar.gz") as archive:
        assert "records/a/run/record.json" in archive.getnames()


def test_a_lost_terminal_costs_no_archive(tmp_path: Path) -> None:
    """Nobody hears what the queue says then."""
    script = (
        f"import sys; sys.path.insert(0, {str(DOCS)!r}); import gpu, gpu_queue\n"
        f"gpu.queue = lambda: [gpu_queue.Entry('a', 60, ({SLEEPS!r},), alone=True)]\n"
        "gpu.LOCALLEARN = (sys.executable, '-c', 'import sys; exec(sys.argv[1])')\n"
        "start = gpu._Queue._start\n"
        "def told(queue, entry):\n"
        "    start(queue, entry)\n"
        "    while 'began' not in gpu._text(queue._log(entry)): pass\n"
        "    print('began', flush=True)\n"
        "gpu._Queue._start = told\n"
        f"sys.exit(gpu.main(['--accelerator', 'cpu', '--out', {str(tmp_path)!r}]))"
    )
    assert lost(["-c", script], tmp_path, "began") == 130
    with tarfile.open(tmp_path / "records.tar.gz") as archive:
        assert "records/a/run/record.json" in archive.getnames()


def test_a_signal_that_comes_as_an_entry_ends_costs_neither_its_end_nor_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An exception within Popen.poll can leave its lock held, and then no entry would ever be seen to end."""
    _queue_of(monkeypatch, WRITES, "a", "b")
    poll = subprocess.Popen.poll

    def interrupted(process: subprocess.Popen[bytes]) -> int | None:
        code = poll(process)
        if code is not None:
            signal.raise_signal(signal.SIGTERM)
        return code

    monkeypatch.setattr(subprocess.Popen, "poll", interrupted)
    assert _call(tmp_path) == 130
    assert "done: 1; left: b; failed: nothing" in capsys.readouterr().out
    assert not (tmp_path / "begun" / "b").exists()
    assert (tmp_path / "records.tar.gz").exists()


def test_asked_a_second_time_the_queue_does_not_wait_for_what_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _queue_of(monkeypatch, f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{SLEEPS}", "a")
    poll = subprocess.Popen.poll

    def interrupted(process: subprocess.Popen[bytes]) -> int | None:
        if "began" in gpu._text(tmp_path / "logs" / "a.txt"):
            signal.raise_signal(signal.SIGTERM)
        return poll(process)

    monkeypatch.setattr(subprocess.Popen, "poll", interrupted)
    assert _call(tmp_path) == 130
    assert "exit code -9\ndone: 0; left: a; failed: nothing" in capsys.readouterr().out


def test_signals_that_are_ignored_stay_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    _queue_of(monkeypatch, WRITES, "a")
    poll = subprocess.Popen.poll

    def lost(process: subprocess.Popen[bytes]) -> int | None:
        signal.raise_signal(signal.SIGHUP)
        return poll(process)

    monkeypatch.setattr(subprocess.Popen, "poll", lost)
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert _call(tmp_path) == 0
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_no_queue_trains_beside_what_another_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after kill -9: the queue is gone, and what it had started still has the lock."""
    _queue_of(monkeypatch, SLEEPS, "a")
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        left = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.fileno(),))
    try:
        assert _call(tmp_path) == 2
        assert "a training that one has left behind, works in" in capsys.readouterr().err
        assert not (tmp_path / "logs").exists()
    finally:
        left.communicate(b"\n")
    _queue_of(monkeypatch, WRITES, "a")
    assert _call(tmp_path) == 0


def test_what_is_started_has_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        f"import fcntl, pathlib\nlock = pathlib.Path({str(tmp_path)!r}, 'lock').open()\n"
        "try:\n    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept BlockingIOError:\n    print('held')\n"
    )
    _queue_of(monkeypatch, script, "a")
    assert _call(tmp_path) == 0
    assert "held" in (tmp_path / "logs" / "a.txt").read_text(encoding="utf-8")


def test_what_takes_too_long_is_stopped_and_what_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _queue_of(monkeypatch, SLEEPS, "a", seconds=1)
    assert _call(tmp_path, "--patience", "1") == 0
    assert "left: a; failed: nothing" in capsys.readouterr().out
    _queue_of(monkeypatch, "import os, signal; print('so'); os.kill(os.getpid(), signal.SIGKILL)", "b")
    assert _call(tmp_path) == 1  # by whom it was killed does not matter: not by the queue
    out = capsys.readouterr().out
    assert "failed: b" in out
    assert "so" in out


def test_what_the_limit_does_not_allow_is_left_for_the_next_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call(tmp_path, "--limit", "0", "--only", "joules_mnist, ff_4x2000") == 0
    assert "left: joules_mnist, ff_4x2000" in capsys.readouterr().out


def test_what_is_listed_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list", "--only", "joules_mnist"]) == 0
    told = shlex.split(capsys.readouterr().out)
    assert 'compare.algorithms=["backprop","mono_forward"]' in told


def test_what_cannot_be_is_told_before_anything_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu.main(["--only", "nothing"]) == 2
    assert "there is no entry nothing" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--only", "joules_mnist"]) == 2
    assert "PyTorch sees no CUDA device here" in capsys.readouterr().err
    for words, told in (
        (["--data", "digits"], "--data is for a rehearsal"),
        (["--limit", "-5"], "--limit is -5.0, expected at least 0"),
        (["--workers", "0"], "--workers is 0, expected at least 1"),
    ):
        with pytest.raises(SystemExit):
            gpu.main(words)
        assert told in capsys.readouterr().err
