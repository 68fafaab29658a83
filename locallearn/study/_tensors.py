"""Tensors read from files that anybody may have written: checkpoints, kept models, students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def read_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain values: nobody's code is run.

    Raises:
        ValueError: it is anything else, or damaged.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # what is no archive can fail in any way; PyTorch's advice is not passed on
            raise ValueError(
                f"{path} cannot be read: it is empty, cut short, or holds something else than tensors, numbers and text "
                f"({type(error).__name__})"
            ) from error
