"""The command line, run inside the test process: what it returned, printed and left on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from locallearn.cli import main

SMALL = (
    "meter=none",
    "net.hidden=[16,16]",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1",
    "trainer.probe_samples=50",
)


@dataclass
class Outcome:
    """Exit code, standard output and standard error of one command."""

    code: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        """The last line on standard output, which is the run's folder."""
        return Path(self.out.splitlines()[-1])

    @property
    def record(self) -> dict[str, Any]:
        """The run's record."""
        found: dict[str, Any] = json.loads((self.folder / "record.json").read_text(encoding="utf-8"))
        return found


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run ``locallearn COMMAND ...`` in an empty folder; ``train`` and ``compare`` get small settings first.

    A resumed run has its own settings and takes no others.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["locallearn"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("LOCALLEARN_DATA", raising=False)

    def run(command: str, *words: str) -> Outcome:
        resumed = any(word.startswith("resume=") for word in words)
        small = SMALL if command == "compare" or (command == "train" and not resumed) else ()
        capsys.readouterr()
        code = main([command, *small, *words])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture
def small() -> tuple[str, ...]:
    """The settings that ``cli`` puts first."""
    return SMALL


def records(folder: Path) -> list[dict[str, Any]]:
    """All records in a folder of runs, oldest first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/record.json")]
    return sorted(found, key=lambda record: str(record["started"]))


@pytest.fixture
def read_records() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads all records in a folder of runs, oldest first."""
    return records
