"""A Trainer that says nothing and writes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from locallearn.tasks import _digests


def quiet_trainer(tmp_path: Path, **settings: Any) -> pl.Trainer:
    """On the CPU; settings go before these."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(**(defaults | settings))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, bytes]], None]:
    """Let made-up files, by their place below the data folder, be the ones that are known."""

    def make(files: Mapping[str, bytes]) -> None:
        digests = {place: (hashlib.sha256(content).hexdigest(),) for place, content in files.items()}
        monkeypatch.setattr(_digests, "DIGESTS", {**_digests.DIGESTS, **digests})

    return make
