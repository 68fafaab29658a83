"""The queue of rows for a GPU is rehearsed here, on few samples and a CPU."""

from __future__ import annotations

import importlib.util
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from locallearn.cli.arms import arms_of
from locallearn.cli.plans import make_plan
from locallearn.cli.settings import compose_settings

SCRIPT = Path(__file__).parents[2] / "docs" / "gpu.py"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gpu = _script()


def test_entries_have_a_name_each() -> None:
    names = [entry.name for entry in gpu.queue()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("entry", gpu.queue(), ids=lambda entry: entry.name)
def test_every_arm_can_be_made(entry: Any) -> None:
    """Its settings compose, and make a run's objects and its optimizer."""
    command, *words = gpu.rehearsed(entry.words)
    base, _, arms, shared = arms_of(command, [*words, "trainer.accelerator=cpu", "meter=none"])
    for arm in arms:
        own = (base.compare.overrides or {}).get(arm.text, [])
        cfg, choices = compose_settings([*shared, *arm.overrides, *own])
        make_plan(cfg, choices, "", arm).optimizer([torch.nn.Parameter(torch.zeros(1))])


def test_a_rehearsal_leaves_records_in_one_archive_and_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tiny", "--data", "digits", "--accelerator", "cpu", "--out", str(tmp_path), "--only", "joules_mnist"]
    assert gpu.main(words) == 0
    with tarfile.open(tmp_path / "records.tar.gz") as archive:
        records = [name for name in archive.getnames() if name.endswith("record.json")]
    assert len(records) == 2
    capsys.readouterr()
    assert gpu.main(words) == 0
    assert "done: 0; left: nothing" in capsys.readouterr().out


def test_what_the_limit_does_not_allow_is_left_for_the_next_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--limit", "0", "--out", str(tmp_path), "--only", "joules_mnist,ff_4x2000"]) == 0
    assert "left: joules_mnist, ff_4x2000" in capsys.readouterr().out


def test_an_unknown_entry_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--only", "nothing"]) == 2
    assert "there is no entry ['nothing']" in capsys.readouterr().err
