"""Locks on files, by which a run owns its folder."""

from __future__ import annotations

import contextlib
import errno
import os
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from locallearn.records._keys import LOCK

_flock: Callable[[int, int], None] | None
try:
    from fcntl import LOCK_EX, LOCK_NB, flock

    _flock = flock
except ImportError:  # Windows
    _flock = None


class Lock:
    """A lock on a file, held until it is released or the process ends, however that happens.

    It is an ``flock``: two openings of one file exclude each other even inside one process, and containers that share
    process numbers and host names exclude each other, too. On NFS it reaches other machines where the mount passes locks
    on (not with ``local_lock=flock`` or ``nolock``). A forked child, a data loader's worker say, closes its copy at once;
    else a worker that outlives its parent would keep the lock.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._handle: int | None = handle
        _held.add(self)

    @classmethod
    def take(cls, path: Path, wait_s: float = 0.0) -> Lock | None:
        """The lock; ``None`` when somebody else still holds it after ``wait_s`` seconds.

        Raises:
            OSError: the file cannot be made, or there are no locks here.
        """
        if _flock is None:
            raise OSError(errno.ENOLCK, "this system has no flock", str(path))
        until = time.monotonic() + wait_s
        while True:
            # A link is not followed: it would lead out of the folder. Python opens it closed to programs started later.
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                _flock(handle, LOCK_EX | LOCK_NB)
                # Who held it before may have moved or removed the file meanwhile: then this is a lock on nothing.
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return cls(path, handle)
            except BlockingIOError:
                if time.monotonic() >= until:
                    os.close(handle)
                    return None
                time.sleep(0.005)
            except FileNotFoundError:
                pass
            except BaseException as error:
                os.close(handle)
                if isinstance(error, OSError) and error.filename is None:
                    error.filename = str(path)
                raise
            os.close(handle)

    def release(self, remove: bool = False) -> None:
        """Lets go; with ``remove`` the file goes, too, while it is still held."""
        if self._handle is None:
            return
        if remove:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.forget()

    def forget(self) -> None:
        """Closes the file: the lock is gone, unless another process shares this opening."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(OSError):
                os.close(handle)

    def __del__(self) -> None:
        self.forget()


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


@contextlib.contextmanager
def alone(runs_dir: Path, wait_s: float = 5.0) -> Iterator[bool]:
    """Keeps others from numbering runs and writing the index; says whether it could be done.

    Where it cannot (no locks, a read-only folder, somebody who was halted), the work goes on: two runs may then share a
    number, and nothing is lost.
    """
    lock: Lock | None = None
    with contextlib.suppress(OSError):
        lock = Lock.take(runs_dir / LOCK, wait_s)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release(remove=True)
