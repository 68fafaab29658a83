"""Searches whose trials are answered by a formula: what tune does around the training, without training."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from locallearn.study.tune import Best, Range, tune

RATE = {"optimizer.lr": Range(1e-4, 1e-1, log=True)}
Answer = Callable[[str, dict[str, float]], Any]


class _OneStage:
    def stages(self, algorithm: str) -> list[str]:
        return [algorithm]


@dataclass
class FakePlan:
    """What ``tune`` knows of a plan."""

    algorithm: str
    settings: dict[str, float]
    evaluate_test: bool = True
    max_epochs: int = 4
    schedule: _OneStage = field(default_factory=_OneStage)
    progress: Callable[[int, int, dict[str, float]], None] | None = None

    def validate(self, epoch: int, accuracy: float) -> None:
        """Tell of an epoch's validation, as a training does."""
        assert self.progress is not None
        self.progress(epoch, self.max_epochs, {"validation/accuracy": accuracy, "validation/loss": 1.0})


@dataclass
class FakeRuns:
    """Stands for training: answers every trial by a formula, and notes what was asked.

    An answer is the accuracy, or a mapping of a record's figures.
    """

    answer: Answer = lambda algorithm, settings: 0.5
    asked: list[FakePlan] = field(default_factory=list)

    def make(self, algorithm: str, settings: Sequence[str]) -> Any:
        return FakePlan(algorithm, {key: _number(value) for key, _, value in (s.partition("=") for s in settings)})

    def run(self, plan: FakePlan) -> Any:
        self.asked.append(plan)
        return self.answer(plan.algorithm, plan.settings)

    @property
    def order(self) -> list[str]:
        return [plan.algorithm for plan in self.asked]

    def values(self, key: str = "optimizer.lr") -> list[float]:
        return [plan.settings[key] for plan in self.asked]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


class FakeRecord:
    """``given`` is what the fake run returned, or the folder ``None`` of one that diverged."""

    maximise = True

    def __init__(self, given: Any) -> None:
        figures = given if isinstance(given, dict) else {"validation/accuracy": given}
        self.data = {
            "validation": {"accuracy": figures["validation/accuracy"]},
            "metric": {"name": "accuracy", "maximise": self.maximise},
        }
        self.path = Path("a-run")
        self._figures = figures

    def figures(self) -> dict[str, float | None]:
        return self._figures


def search(
    runs: FakeRuns, storage: Path | str, trials: int, algorithms: Sequence[str] = ("a", "b"), **other: Any
) -> list[Best]:
    """A search by ``tune`` with the space and the name that all these tests have."""
    return tune(algorithms, runs.make, other.pop("space", RATE), trials, storage, "study", **other)


# -- several processes -------------------------------------------------------------------------------------------------


def worker(runs: FakeRuns, folder: Path, storage: Path | str, trials: int, answer: Answer, **other: Any) -> int:
    """Number of a process that searches, and notes what it was asked for in a file of its own in ``folder``."""

    def noted(algorithm: str, settings: dict[str, float]) -> Any:
        with (folder / f"asked-{os.getpid()}").open("a") as file:
            file.write(f"{algorithm} {settings['optimizer.lr']!r}\n")
        return answer(algorithm, settings)

    process = os.fork()
    if process:
        return process
    code = 3
    try:
        runs.answer = noted
        found = search(runs, storage, trials, **other)
        code = 0 if [best.trials for best in found] == [trials, trials] else 4
    finally:
        os._exit(code)


def asked_for(folder: Path) -> list[str]:
    """What all processes were asked for: ``algorithm rate``."""
    return [line for file in sorted(folder.glob("asked-*")) for line in file.read_text().splitlines()]


def ended(process: int) -> int:
    """Exit code of a process, negative for a signal; waits for it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait, but not for ever."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
