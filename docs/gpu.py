"""The rows of results.md that want a CUDA device, as one queue with a time limit.

    LOCALLEARN_DATA=data python docs/gpu.py --list                 what there is, in order, with estimated seconds
    LOCALLEARN_DATA=data python docs/gpu.py --limit 570            as much of it as ten minutes hold, most valuable first
    LOCALLEARN_DATA=data python docs/gpu.py --only joules_mnist    these entries
    python docs/gpu.py --tiny --data digits --accelerator cpu      a rehearsal: two steps of everything

The entries are those of gpu_queue.py. Those that measure seconds or joules run alone, one after another; then come those that
ask for accuracies only, several at a time, on one device. An entry that takes twice its estimate (--patience) is stopped as by
Ctrl-C, and so is everything at the limit, at a Ctrl-C, when the process is told to end and when its terminal is lost: the same
command again takes over what is finished and goes on with the rest. One queue works in one OUT; after kill -9 what it had
begun runs on, and the next queue says so and does not start beside it.
Records are in OUT/records, one folder per entry, outputs in OUT/logs, and
OUT/records.tar.gz holds what is to be committed, without weights: copy it to docs/records/. A rehearsal has another OUT.
Needs locallearn importable: installed, or its unpacked wheel on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_queue import Entry, queue, rehearsed

LOCALLEARN = (sys.executable, "-m", "locallearn.cli")


def main(words: Sequence[str] | None = None) -> int:
    """Runs the queue; 1 if an entry failed, 2 if it cannot start, 130 if it was interrupted."""
    said = _arguments(words)
    entries = [entry for entry in queue() if not said.only or entry.name in said.only]
    if unknown := sorted(set(said.only) - {entry.name for entry in entries}):
        return _refuse(f"there is no entry {', '.join(unknown)}; --list shows them")
    if said.list:
        for entry in entries:
            print(f"{entry.name:32} {entry.seconds:5} s {'alone' if entry.alone else '':6} {shlex.join(entry.words)}")
        return 0
    if said.accelerator == "cuda":  # asked once, and not by every entry after a minute of its own
        import torch

        if not torch.cuda.is_available():
            return _refuse(
                "PyTorch sees no CUDA device here; --tiny --data digits --accelerator cpu rehearses the queue without one"
            )
    said.out.mkdir(parents=True, exist_ok=True)
    with (said.out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _refuse(
                f"another queue, or a training that one has left behind, works in {said.out}: wait for it or end it"
            )
        return _Queue(said, lock.fileno()).run(entries)


def _refuse(why: str) -> int:
    print(f"gpu.py: {why}", file=sys.stderr)
    return 2


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="folder of records and outputs; runs/gpu, rehearsed: runs/gpu_rehearsal"
    )
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for everything")
    parser.add_argument(
        "--patience", type=float, default=2.0, help="an entry is stopped after so many times its estimate"
    )
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="entries at a time")
    parser.add_argument("--only", type=_names, default=[], help="names, separated by commas")
    parser.add_argument("--accelerator", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two steps of everything on few samples")
    parser.add_argument("--data", help="in a rehearsal: this data set instead of every other one")
    parser.add_argument("--list", action="store_true", help="show the queue and do nothing")
    said = parser.parse_args(words)
    for name, least in (("limit", 0), ("patience", 1), ("workers", 1)):
        if not getattr(said, name) >= least:
            parser.error(f"--{name} is {getattr(said, name)}, expected at least {least}")
    if said.data and not said.tiny:
        parser.error("--data is for a rehearsal: give --tiny, too")
    if said.out is None:
        said.out = Path("runs/gpu_rehearsal" if said.tiny else "runs/gpu")
    return said


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


class _Queue:
    """Runs entries as processes until the time is up."""

    def __init__(self, said: argparse.Namespace, lock: int) -> None:
        self._said = said
        self._lock = lock  # processes have it, too: it is held until the last of them has ended
        self._out: Path = said.out.absolute()
        self._until = time.monotonic() + said.limit
        self._running: list[_Running] = []
        self._failed: list[str] = []
        self._asked = False  # to end, by a signal
        for name in ("records", "logs", "begun", "done"):
            (self._out / name).mkdir(parents=True, exist_ok=True)

    def run(self, entries: Sequence[Entry]) -> int:
        from locallearn.terminals import hang_up

        waiting = [entry for entry in entries if not self._is_done(entry)]
        interrupted = False
        lost = hang_up()

        def asked(number: int, frame: object) -> None:
            self._asked = True
            if number == signal.SIGHUP:
                with suppress(KeyboardInterrupt):
                    lost()

        heard = [
            one for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN
        ]
        usual = {one: signal.signal(one, asked) for one in heard}
        try:
            for entry in sorted(
                waiting, key=lambda entry: not self._is_alone(entry)
            ):  # those that are alone, in their order
                self._wait_for_less_than(1 if self._is_alone(entry) else self._said.workers)
                self._start(entry)
            self._wait_for_less_than(1)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            try:
                self._end_all()
            finally:
                self._archive()
                for one, handler in usual.items():
                    signal.signal(one, handler)
        left = [entry.name for entry in waiting if not self._is_done(entry)]
        told = ", ".join(left) or "nothing", ", ".join(self._failed) or "nothing"
        print(f"done: {len(waiting) - len(left)}; left: {told[0]}; failed: {told[1]}")
        return 130 if interrupted else 1 if self._failed else 0

    def _end_all(self) -> None:
        """Whoever starts processes ends them; asked a second time, without waiting for them to save what they have."""
        self._until = 0.0
        try:
            self._wait_for_less_than(1)
        except KeyboardInterrupt:
            for one in self._running:
                one.stopped = one.stopped or time.monotonic()
                os.killpg(one.process.pid, signal.SIGKILL)
            for one in self._running:
                one.process.wait()
                self._ended(one)

    def _is_alone(self, entry: Entry) -> bool:
        return entry.alone and not self._said.tiny

    def _words(self, entry: Entry) -> list[str]:
        words = rehearsed(entry.words, self._said.data) if self._said.tiny else entry.words
        return [*words, f"trainer.accelerator={self._said.accelerator}"]

    def _is_done(self, entry: Entry) -> bool:
        """Whether just this has run to its end: the same words, not only an entry of that name."""
        return _text(self._out / "done" / entry.name) == shlex.join(self._words(entry))

    def _start(self, entry: Entry) -> None:
        if self._until - time.monotonic() < min(20, entry.seconds / 2):
            return
        words, records = self._words(entry), self._out / "records" / entry.name
        begun = self._out / "begun" / entry.name
        if records.exists() and _text(begun) != shlex.join(words):  # other settings: one folder holds one row
            kept = next(path for i in range(1, 1000) if not (path := records.with_name(f"{entry.name}.{i}")).exists())
            records.rename(kept)
            print(f"{entry.name}: records of other settings are now in {kept}", flush=True)
        begun.write_text(shlex.join(words), encoding="utf-8")
        resumed = ["compare.resume=true"] if words[0] == "compare" else []
        command = [*LOCALLEARN, *words, *resumed, f"runs_dir={records}"]
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with self._log(entry).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **one},
                start_new_session=True,
                pass_fds=(self._lock,),
            )
        self._running.append(_Running(entry, process, time.monotonic()))

    def _log(self, entry: Entry) -> Path:
        return self._out / "logs" / f"{entry.name}.txt"

    def _wait_for_less_than(self, number: int) -> None:
        """Until fewer entries than that are running.

        Raises:
            KeyboardInterrupt: somebody asked to end. It is raised here and not where the signal comes: within Popen.poll it
                would leave a lock held, and between an entry's end and the note of it nothing would be known of the entry.
        """
        while True:
            for one in list(self._running):
                if one.process.poll() is not None:
                    self._running.remove(one)
                    self._ended(one)
                elif time.monotonic() > min(self._until, one.started + self._said.patience * one.entry.seconds):
                    one.stop()
            if self._asked:
                self._asked = False
                raise KeyboardInterrupt
            if len(self._running) < number:
                return
            time.sleep(0.2)

    def _ended(self, one: _Running) -> None:
        code, took = one.process.returncode, time.monotonic() - one.started
        name = one.entry.name
        print(f"{name}: {took:.0f} s (estimated {one.entry.seconds}), exit code {code}", flush=True)
        if code == 0:
            (self._out / "done" / name).write_text(shlex.join(self._words(one.entry)), encoding="utf-8")
        elif one.stopped is None:
            self._failed.append(name)
            print(_text(self._log(one.entry))[-1500:], flush=True)

    def _archive(self) -> None:
        with tarfile.open(self._out / "records.tar.gz", "w:gz") as archive:
            for path in sorted((self._out / "logs").glob("*.txt")):
                archive.add(path, path.relative_to(self._out))
            for name in ("record.json", "metrics.csv"):
                for path in sorted((self._out / "records").glob(f"*/*/{name}")):
                    archive.add(path, path.relative_to(self._out))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


@dataclass
class _Running:
    entry: Entry
    process: subprocess.Popen[bytes]
    started: float
    stopped: float | None = None

    def stop(self) -> None:
        """As by Ctrl-C; twenty seconds later for good."""
        if self.stopped is None:
            self.stopped = time.monotonic()
            os.killpg(self.process.pid, signal.SIGINT)
        elif time.monotonic() > self.stopped + 20:
            os.killpg(self.process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
