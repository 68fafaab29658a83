"""Programs in a terminal that is lost: its window is closed, or a connection breaks."""

from __future__ import annotations

import os
import pty
import signal
import sys
from collections.abc import Sequence
from pathlib import Path


def lost(words: Sequence[str], place: Path, said: str) -> int:
    """Run Python in a terminal of its own until it has said something, and take the terminal away: its exit status."""
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
            os.chdir(place)
            os.environ["OMP_NUM_THREADS"] = "1"
            os.execv(sys.executable, [sys.executable, *words])
        finally:
            os._exit(127)  # there is no such program
    heard = ""
    try:
        while said not in heard:
            heard += os.read(terminal, 4096).decode(errors="replace")
    except OSError:  # it has ended
        os.close(terminal)
        raise AssertionError(f"it ended before it said {said!r}: {heard}") from None
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
