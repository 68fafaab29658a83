"""Whoever wants a loss for a loop of their own must not pay for the framework around it."""

from __future__ import annotations

import subprocess
import sys


def test_the_losses_import_torch_and_nothing_of_the_framework() -> None:
    heavy = {"lightning", "hydra", "omegaconf", "sklearn", "torchvision", "torch_geometric", "optuna", "codecarbon"}
    code = "import sys, locallearn.losses; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not heavy & set(loaded)
