"""Processes that search together: who is at work, and one at a time where it matters.

Locks of the operating system say so (``flock``), not process numbers, host names or times: they end with their process,
however it ends, and no clock that is set makes a living one look dead. They hold on one machine, as SQLite does.
"""

from __future__ import annotations

import glob
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Worker:
    """This process among those that search on one storage; use it in a ``with`` statement.

    Args:
        storage: the file that they share; beside it lies a hidden file for every worker, as long as it works.
    """

    def __init__(self, storage: Path) -> None:
        self.name = uuid.uuid4().hex
        self._storage = storage
        self._own: int | None = None

    def __enter__(self) -> Worker:
        self._storage.parent.mkdir(parents=True, exist_ok=True)
        with self.alone():  # so that nobody sees a file that is there and not yet locked
            for left in self._storage.parent.glob(f"{glob.escape(self._file('').name)}*"):
                self.is_at_work(left.name.rpartition(".")[2])
            self._own = os.open(self._file(self.name), os.O_CREAT | os.O_RDWR)
            lock(self._own)
        return self

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            self._file(self.name).unlink(missing_ok=True)
            os.close(self._own)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other worker is in here meanwhile."""
        folder = os.open(self._storage.parent, os.O_RDONLY)
        try:
            lock(folder)
            yield
        finally:
            os.close(folder)

    def is_at_work(self, name: object) -> bool:
        """Whether the worker of this name lives; what a dead one left behind is cleaned up."""
        if name == self.name:
            return True
        if not isinstance(name, str) or not name.isalnum():
            return False
        try:
            other = os.open(self._file(name), os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            if not lock(other, wait=False):
                return True
            with suppress(FileNotFoundError):
                self._file(name).unlink()
            return False
        finally:
            os.close(other)

    def _file(self, name: str) -> Path:
        return self._storage.parent / f".{self._storage.name}.{name}"


def lock(descriptor: int, wait: bool = True) -> bool:
    """Whether the lock of the operating system was got; it ends when the descriptor is closed."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: one process at a time, then
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
