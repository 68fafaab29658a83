"""Runs side by side: processes that take plan after plan, whose death costs the run that they were at and no other.

Ctrl-C reaches this process alone; it has every worker stop between two batches and write a checkpoint, as a run by itself
does. A worker whose parent is gone ends with its run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from locallearn.study._signals import deaf, terminations
from locallearn.study.plan import Interrupted, Plan
from locallearn.study.train import run

_RESUME = "the same command with compare.resume=true goes on with it"

Show = Callable[[str, int, int, dict[str, float]], None]
Named = tuple[str, Callable[[], Plan]]


def side_by_side(plans: Sequence[Named], workers: int, show: Show | None) -> tuple[list[Path], list[str]]:
    """What :func:`locallearn.study.compare.compare` does with several workers."""
    pool = _Pool(plans, workers, show)
    with terminations():
        try:
            pool.run()
        except KeyboardInterrupt:
            raise Interrupted from None
        finally:
            pool.stop()
    return [pool.folders[i] for i in sorted(pool.folders)], [pool.problems[i] for i in sorted(pool.problems)]


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    task: int | None = None
    ready: bool = False


class _Pool:
    def __init__(self, plans: Sequence[Named], workers: int, show: Show | None) -> None:
        self.names = [name for name, _ in plans]
        self.tasks = [_packed(name, make) for name, make in plans]
        self.waiting = deque(range(len(plans)))
        self.count, self.show = workers, show
        self.threads = max(1, torch.get_num_threads() // workers)
        self.workers: list[_Worker] = []
        self.folders: dict[int, Path] = {}
        self.problems: dict[int, str] = {}

    def run(self) -> None:
        """Until every plan has run; who has none left, or comes too late for one, is not waited for."""
        for _ in range(min(self.count, len(self.tasks))):
            self._start()
        while self.workers and len(self.folders.keys() | self.problems.keys()) < len(self.tasks):
            ready = wait([end for worker in self.workers for end in (worker.pipe, worker.process.sentinel)])
            for worker in [one for one in self.workers if one.pipe in ready or one.process.sentinel in ready]:
                try:
                    message = worker.pipe.recv() if worker.pipe.poll() or worker.pipe in ready else None
                except (EOFError, OSError):
                    message = None
                if message is None:
                    self._lost(worker)
                else:
                    self._heard(worker, *message)

    def stop(self) -> None:
        """Have those who are still at work stop between two batches, and wait for them; a second Ctrl-C waits no longer."""
        try:
            for worker in self.workers:
                if worker.task is not None or not worker.ready:  # else it is ending by itself
                    worker.process.terminate()
                worker.pipe.close()  # it gets no further plan, and what it says now reaches nobody
            for worker in self.workers:
                worker.process.join()
        except KeyboardInterrupt:
            for worker in self.workers:
                worker.process.kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would take over locks and threads of PyTorch half-way
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.threads, self.count), name="locallearn-worker")
        with deaf():
            process.start()
        theirs.close()  # so that its death is the end of the pipe
        self.workers.append(_Worker(process, ours))

    def _heard(self, worker: _Worker, kind: str, *what: Any) -> None:
        task, worker.ready = worker.task, True
        if kind == "progress":
            if self.show is not None and task is not None:
                self.show(self.names[task], *what)
            return
        if kind == "never started":  # the settings are wrong, and the next run's will be too
            raise what[0]
        if task is not None:
            folder, problem = what
            if folder is not None:
                self.folders[task] = folder
            if problem is not None:
                self.problems[task] = f"{self.names[task]} {problem}"
        worker.task = self.waiting.popleft() if self.waiting else None
        with contextlib.suppress(OSError):  # it has died meanwhile, which the next look shows
            if worker.task is None:
                worker.pipe.send_bytes(b"")
            else:
                worker.pipe.send_bytes(self.tasks[worker.task])

    def _lost(self, worker: _Worker) -> None:
        """A worker that has ended: its time was over, or it was killed and another one takes its place."""
        worker.process.join()
        self.workers.remove(worker)
        code = worker.process.exitcode
        if worker.task is not None:
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            self.problems[worker.task] = (
                f"{self.names[worker.task]} was lost, its process was killed ({how}); {_RESUME}"
            )
        elif code:
            raise RuntimeError(f"a process for runs ended before it had begun with one (exit code {code})")
        if worker.task is not None and self.waiting:
            self._start()


def _packed(name: str, make: Callable[[], Plan]) -> bytes:
    try:
        return pickle.dumps(make)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"{name} cannot be handed to another process ({error}): set compare.workers=1") from error


# ------------------------------------------------------------------------------------------- in the worker


def _work(pipe: Connection, threads: int, workers: int) -> None:
    """Take plans and run them until there are none, or nobody is there to give any."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is for the parent, which tells us in its turn
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        pipe.send(("ready", None, None))
        while packed := pipe.recv_bytes():
            pipe.send(_ran(pickle.loads(packed), pipe, workers))


def _ran(make: Callable[[], Plan], pipe: Connection, workers: int) -> tuple[Any, ...]:
    """What became of one run: its folder, and what went wrong."""

    def progress(*what: Any) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            pipe.send(("progress", *what))

    try:
        plan = make()
        plan.progress, plan.workers = progress, workers
        return "ended", run(plan), None
    except (Interrupted, KeyboardInterrupt) as error:
        if isinstance(error, Interrupted) and error.ended is not None:
            return "ended", error.ended, None
        return "ended", getattr(error, "run_folder", None), f"was stopped by a signal to its process; {_RESUME}"
    except Exception as error:
        folder = getattr(error, "run_folder", None)
        return ("never started", _portable(error)) if folder is None else ("ended", folder, f"failed: {error}")


def _portable(error: Exception) -> Exception:
    """The error, or one with its words if it cannot travel."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return (
            ValueError(str(error))
            if isinstance(error, ValueError)
            else RuntimeError(f"{type(error).__name__}: {error}")
        )
    return error
