"""What the terminal shows while runs go on, streams that lose no work by failing, and shell completion."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# Signs of the tables as plain ASCII, for terminals that have no others.
_ASCII = {
    **{"±": "+-", "\N{MULTIPLICATION SIGN}": "x", "\N{EN DASH}": "-", "\N{MINUS SIGN}": "-", "·": "|"},
    **{"≥": ">=", "…": "...", "→": "->", "₂": "2"},
}
_ERRORS = "locallearn.plain"
_NO_TERMINAL = 200  # characters in a line


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What stands for signs that a stream has no code for."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


codecs.register_error(_ERRORS, _plain)


class Steady(io.TextIOBase):
    """A stream that whoever prints need not fear: what it cannot encode is replaced, and when it fails it falls silent.

    A comparison of hours must not be lost because a terminal knows no Greek, a pipe was closed or a disk is full.

    Args:
        stream: where to write; ``None`` (a stream that was closed before Python started) is silent from the beginning.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: str | None = None

    def write(self, text: str) -> int:
        """Write as much as can be written."""
        if self._stream is not None:
            with self._guard():
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    encoding = getattr(self._stream, "encoding", None) or "ascii"
                    self._stream.write(text.encode(encoding, _ERRORS).decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Hand over what is buffered."""
        if self._stream is not None:
            with self._guard():
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether people look at it."""
        return self._stream is not None and bool(self._stream.isatty())

    def fileno(self) -> int:
        """Number of the open file, where there is one."""
        if self._stream is None:
            raise io.UnsupportedOperation("the stream is closed")
        return int(self._stream.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def buffer(self) -> Any:
        """The bytes below, for those who write them themselves."""
        return self._stream.buffer

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: somebody has closed it
            self.failure = str(error)
            with contextlib.suppress(OSError, ValueError):
                # What is still buffered must not fail once more when Python ends.
                number = self._stream.fileno()
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), number)
            self._stream = None


@contextlib.contextmanager
def steady_streams() -> Iterator[None]:
    """Standard output and standard error as :class:`Steady` ones; a failure of the former is told on the latter."""
    out, err = Steady(sys.stdout), Steady(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()
            if out.failure is not None and "Broken pipe" not in out.failure:
                print(f"locallearn: standard output failed ({out.failure}), what was printed is lost", file=err)
            err.flush()


def printing() -> Any:
    """What prints tables: as wide as the terminal, and where there is none (a file, a pipe) as wide as they are."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _NO_TERMINAL
    return console


class Progress:
    """One line per run that moves with its epochs; plain and silent where there is no terminal.

    Args:
        of: what is counted.
    """

    def __init__(self, of: str = "epoch") -> None:
        self._of = of

    def __enter__(self) -> Callable[[str, int, int, dict[str, float]], None]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._plain = not console.is_terminal
        self._last = ("", 0.0)
        self._bars: dict[str, Any] = {}
        self._progress = Progress(
            TextColumn("{task.description:<32}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[reached]}"),
            TimeElapsedColumn(),
            console=console,
        )
        if not self._plain:  # some versions of rich end even a disabled display with an empty line
            self._progress.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        if not self._plain:
            self._progress.stop()

    def _counted(self, number: int, most: int) -> str:
        """A trial is named by Optuna's number, which this is not: how many have ended, in whatever order."""
        return f"{self._of} {number} of at most {most}" if self._of == "epoch" else f"{number} of {most} {self._of}s"

    def _show(self, name: str, epoch: int, epochs: int, metrics: dict[str, float]) -> None:
        figures = {k: v for k, v in metrics.items() if k.startswith("validation/")}
        loss = figures.pop("validation/loss", None)  # which a search may be for
        value = next(iter(figures.values()), loss)
        reached = "" if value is None else f"validation {value:.4f}"
        if self._plain:
            if name == self._last[0] and time.monotonic() - self._last[1] < 2:
                return  # a log file wants signs of life, not every epoch of a quick run
            self._last = (name, time.monotonic())
            told = f"{name}: {self._counted(epoch, epochs)}{reached and f', {reached}'}"
            print(told, file=sys.stderr, flush=True)
            return
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=epochs, reached="")
        self._progress.update(self._bars[name], completed=epoch, total=epochs, reached=reached)


def completion(words: list[str], commands: list[str]) -> int:
    """Hand shell completion to Hydra, without the subcommand, which Hydra does not know; complete that one here."""
    import hydra

    line = os.environ.get("COMP_LINE", "")
    parts = line.split(" ")
    if any("query" in word for word in words):
        if len(parts) <= 2:
            print(" ".join(c for c in commands if c.startswith(parts[-1] if len(parts) == 2 else "")))
            return 0
        os.environ["COMP_LINE"] = " ".join([parts[0], *parts[2:]])

    @hydra.main(config_path="pkg://locallearn.conf", config_name="config", version_base="1.3")
    def job(cfg: Any) -> None:
        """Never called: completion ends before."""

    sys.argv = ["locallearn", *words]
    job()
    return 0
