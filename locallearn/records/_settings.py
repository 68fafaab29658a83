"""What the settings of a run are about: which make it what it is, and which only say where it goes or who asked.

Every top-level key of ``conf/config.yaml`` is in exactly one of the lists; a key that is in none of them (somebody's own)
makes a run what it is, so that nothing is ever forgotten by whoever asks whether two runs are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

OF_THE_RUN: Final = (
    *("algorithm", "dataset", "task", "net", "optimizer", "schedule", "trainer", "scheduler", "scheduler_interval"),
    *("init_from", "seed"),
)
"""They make a run what it is."""
OF_MEASURING: Final = ("meter",)
"""What watches the run; it changes no weight, but which figures there are."""
OF_PLACES: Final = ("data_dir", "runs_dir", "resume", "keep_model", "logger")
"""Where a run finds its data, leaves what it leaves, and is copied to."""
OF_COMMANDS: Final = ("compare", "tune", "report", "replay", "predict", "analyze", "distill", "bench", "meters")
"""What a command does with runs."""

ENDS: Final = ("mode", "target")
"""The settings of ``compare`` that make a run another one all the same: they say when its training ends."""
PLACES_WITHIN: Final = ("dataset.data_dir",)
"""Copies of places among the settings that make a run."""
SEEDS_APART: Final = ("net.device.seed", "dataset.graph.seed")
"""Seeds that do not follow the run's: of a device and of a generated graph, which are others with another seed."""
COUNTS_OR_SHARES: Final = (
    *(f"trainer.limit_{part}_batches" for part in ("train", "val", "test", "predict")),
    *("trainer.overfit_batches", "trainer.val_check_interval"),
)
"""Where 1 and 1.0 are two settings: a whole number counts batches, any other is a share of all."""
OF_THE_MACHINE: Final = ("trainer.accelerator", "trainer.devices")
"""What computes a run: no part of a recommendation."""


def number(name: str, value: Any) -> Any:
    """The value of a setting, in which a float that is a whole number is one, where that is the same setting."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15 and name not in COUNTS_OR_SHARES
    return int(value) if whole else value


def makes_the_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that makes a run what it is, but for the ends (:data:`ENDS`)."""
    aside = {*OF_MEASURING, *OF_PLACES, *OF_COMMANDS, "hydra"}
    return {key: without(value, key, PLACES_WITHIN) for key, value in config.items() if key not in aside}


def without(value: Any, key: str, names: tuple[str, ...]) -> Any:
    """The settings below ``key`` without those that dotted ``names`` name."""
    if not isinstance(value, Mapping):
        return value
    return {name: own for name, own in value.items() if f"{key}.{name}" not in names}


def group_of(word: str) -> str:
    """The top-level key that a word of the command line is about (``KEY.PART=VALUE``, ``+KEY=VALUE``, ``~KEY``)."""
    return word.lstrip("+~").partition("=")[0].partition(".")[0]
