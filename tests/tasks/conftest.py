"""A Trainer that says nothing and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl


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
