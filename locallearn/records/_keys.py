"""The words of a record: its keys, and the names of the files in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

SCHEMA: Final = 1


CHECKPOINT: Final = "resume.ckpt"
"""Where a run keeps what ``train resume=FOLDER`` goes on from; gone once the run is done."""

ANALYSIS: Final = "analysis"
"""Folder beside the runs' folders for what is worked out of kept models: one file per run, rebuilt at will."""

SHARES: Final = ("accuracy", "auc")
"""Metrics that are shares of 1, which people read in percent."""

COST_COLUMNS: Final = (
    "train_s",
    "validation_s",
    "co2_g",
    "train_flops",
    "update_flops",
    "once_flops",
    "inference_flops",
    "activation_peak_bytes",
    "allocated_peak_bytes",
    "state_bytes",
    "gradient_bytes",
    "optimizer_bytes",
    "cache_bytes",
    "params",
    "extra_params",
    "samples",
)
"""The single-number cost columns: seconds, grams, floating-point operations, bytes, counts (docs/studies.md)."""

TEMPLATE: Final[Mapping[str, Any]] = {
    "id": None,
    "schema": SCHEMA,
    "serial": None,
    "algorithm": None,
    "variant": None,
    "dataset": None,
    "net": None,
    "task": None,
    "metric": None,
    "seed": None,
    "status": None,
    "error": None,
    "locality": None,
    "mode": None,
    "validation": {},
    "test": {},
    "cost": {**dict.fromkeys(COST_COLUMNS), "energy_j": {}, "stages": [], "uncounted": []},
    "energy": [],
    "target": None,
    "blocks": [],
    "config": {},
    "command": None,
    "versions": {},
    "hardware": {},
    "source": {},
    "started": None,
    "finished": None,
    "beginning": None,
    "resumed_from": None,
    "parts": [],
    "notes": [],
}
"""Every top-level key of ``record.json`` with its value when nothing is known.

``metric`` names the figure by which the run is judged: ``{"name": "mse", "maximise": false}``; ``null`` means accuracy.
``serial`` counts the runs of one folder in the order of their starts, whatever the clock says. ``docs/records.md``
explains every key.
"""

LOCK = ".lock"

ENDINGS = ("done", "failed", "interrupted")


UNRECORDED: Final = (
    "it has no record yet: its run is just starting, or was killed before its first record was written. Then nothing "
    "was trained in it, and it can be deleted."
)


class Metric(NamedTuple):
    """One line of ``metrics.csv``; ``value`` is ``None`` where the figure was unknown."""

    epoch: int
    step: int
    name: str
    value: float | None


class Quality(NamedTuple):
    """The figure by which runs are judged: ``validation/<name>`` and ``test/<name>``, and whether more of it is better."""

    name: str = "accuracy"
    maximise: bool = True
