"""Who answers Ctrl-C and a termination, and what Lightning makes of them; only the main thread can have handlers set."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from locallearn.study.plan import Interrupted
from locallearn.terminals import hang_up


@contextlib.contextmanager
def _answered(number: int, handler: Any, instead_of: Any = None) -> Iterator[None]:
    """A signal has another handler in here, if it has the one named so far."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    if instead_of is not None and before is not instead_of:
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextlib.contextmanager
def terminations() -> Iterator[None]:
    """A termination signal and the loss of the terminal are taken for Ctrl-C, unless somebody has given them a handler.

    Without one a termination would leave workers behind, and Lightning only notes it: it ends a training at its next batch, and
    after the last one, or in a short test, nothing. A lost terminal (``SIGHUP``: a connection that broke) would end the process
    at once; under ``nohup`` it is not noticed.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_answered(signal.SIGTERM, signal.default_int_handler, instead_of=signal.SIG_DFL))
        if hasattr(signal, "SIGHUP"):  # not on Windows
            stack.enter_context(_answered(signal.SIGHUP, hang_up(), instead_of=signal.SIG_DFL))
        yield


def deaf() -> contextlib.AbstractContextManager[None]:
    """A process started in here does not hear Ctrl-C, not even while it imports."""
    return _answered(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """A Trainer's work that Ctrl-C ends: Lightning would end the process, and leave Ctrl-C switched off.

    Raises:
        Interrupted: it was pressed.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise Interrupted from None
    finally:
        if main and before is not None:  # None: of a program that is not Python
            signal.signal(signal.SIGINT, before)
