"""Loggers from settings: checked before anything is trained, made when the run's folder is there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from locallearn.cli.settings import UsageError

# Packages that Lightning's loggers want only when they are made.
_NEEDED = {"TensorBoardLogger": "tensorboard", "WandbLogger": "wandb", "MLFlowLogger": "mlflow", "AimLogger": "aim"}


def logger_maker(settings: dict[str, Any]) -> Callable[[Path], Any] | None:
    """What makes the logger for a run's folder; ``None`` for no logger.

    In its settings ``{folder}`` stands for that folder, and ``{id}`` for the run's id.

    Raises:
        UsageError: the package that it needs is not installed.
    """
    if not settings:
        return None
    package = _NEEDED.get(str(settings.get("_target_")).rpartition(".")[2])
    if package is not None and not _is_installed(package):
        raise UsageError(
            f"logger: {package} is not installed; loggers are extras: pip install 'locallearn[tensorboard,wandb,mlflow,aim]'"
        )
    return partial(_make, settings)


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # something that is no package goes by its name
        return False


def _make(settings: dict[str, Any], folder: Path) -> Any:
    from hydra.utils import instantiate

    return instantiate(_filled(settings, folder), _convert_="all")


def _filled(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _filled(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, folder) for part in value]
    if isinstance(value, str):
        # The folder of a run that goes on has its id with a dot before and a word behind.
        run = folder.name.removeprefix(".").removesuffix(".part")
        return value.replace("{folder}", str(folder)).replace("{id}", run)
    return value
