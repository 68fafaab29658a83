"""What the terminal shows while runs go on, and shell completion."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any


class Progress:
    """One line per run that moves with its epochs; plain and silent where there is no terminal."""

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
            disable=self._plain,
        )
        self._progress.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show(self, name: str, epoch: int, epochs: int, metrics: dict[str, float]) -> None:
        value = next((v for k, v in metrics.items() if k.startswith("validation/") and k != "validation/loss"), None)
        reached = "" if value is None else f"validation {value:.4f}"
        if self._plain:
            if name == self._last[0] and time.monotonic() - self._last[1] < 2:
                return  # a log file wants signs of life, not every epoch of a quick run
            self._last = (name, time.monotonic())
            print(f"{name}: epoch {epoch} of at most {epochs}, {reached}", file=sys.stderr, flush=True)
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
